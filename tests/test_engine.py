"""Forward, backward and update against a plain loop, autograd in float64, and what the docstrings promise."""

import shutil

import numpy as np
import pytest
import torch
from refusals import refused
from tiny import N_CHANNELS, SETTINGS
from tiny import tiny_model as small_model
from torch import nn

from spectralvae.config import OptimizerConfig, TrainConfig
from spectralvae.data.loader import Batch
from spectralvae.errors import ConfigError
from spectralvae.model import AttnBlock
from spectralvae.runtime import placement
from spectralvae.runtime.ranks import Ranks
from spectralvae.training.engine import Engine, check_shares, idle_parameters, learning_rate
from spectralvae.training.failure import gradient_norms
from spectralvae.training.objective import means

METRICS = ("loss", "nll_loss", "kl_loss", "pixel_mse")  # of every run

CPU = torch.device("cpu")
EVERYWHERE = {**SETTINGS, "attn_sizes": [8, 4]}  # attention after every block, too


def tiny_model(settings=SETTINGS):
    """With weights so large that attention matters."""
    model = small_model(settings=settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4.0
    return model


def make_config(batch_size=6, lr=1e-3, **training):
    return TrainConfig.model_validate(
        {
            "output_dir": "run",
            "data": {"store": "store", "batch_size": batch_size, "tile_size": 8},
            "optimizer": {"lr": lr, "weight_decay": 0.1},
            "training": training,
        }
    )


def make_batch(step=0, n=6):
    """Tiles as the loader gives them, of which each has its own share of invalid samples."""
    random = np.random.default_rng([7, step])
    z = random.normal(size=(n, 8, 8, N_CHANNELS)).astype(np.float16)
    z[random.random(z.shape) < 0.1 * np.arange(n)[:, None, None, None]] = np.nan
    noise = random.normal(size=(n, 3, 4, 4)).astype(np.float32)
    return Batch(step, torch.from_numpy(z), torch.from_numpy(noise), [])


def plain_loss(model, batch):
    """The definition, without the engine; returns get_loss's pair."""
    dtype = next(model.parameters()).dtype
    x = batch.tiles.permute(0, 3, 1, 2).contiguous().to(dtype)
    return model.get_loss(x, torch.isfinite(x), batch.noise.to(dtype))


def double_gradients(settings, batch):
    """Of the tiny model, the whole batch at once, in float64: name -> gradient, of all weights that get one."""
    model = tiny_model(settings=settings).double()
    plain_loss(model, batch)[0].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def idle_names(model):
    idle = {id(p) for p in idle_parameters(model)}
    return {name for name, p in model.named_parameters() if id(p) in idle}


# --- against a plain loop ---------------------------------------------------------------------------------------


def torch_schedule(optimizer, warmup, decay):
    """The same learning rates from torch's own schedulers."""
    schedules, lr = torch.optim.lr_scheduler, optimizer.param_groups[0]["lr"]
    parts = [schedules.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)] if warmup else []
    rest = schedules.CosineAnnealingLR(optimizer, decay - warmup) if decay else schedules.ConstantLR(optimizer, 1.0)
    whole = schedules.SequentialLR(optimizer, [*parts, rest], [warmup] if warmup else [])
    assert optimizer.param_groups[0]["initial_lr"] == lr
    return whole


@pytest.mark.parametrize(("warmup", "decay"), [(0, None), (5, None), (0, 20), (5, 20), (19, 20)])
def test_learning_rates_are_those_of_torch(warmup, decay):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    expected = torch_schedule(optimizer, warmup, decay)
    config = OptimizerConfig(lr=0.3, warmup_steps=warmup, decay_steps=decay)
    for step in range(20):
        assert learning_rate(config, step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        expected.step()
    if decay:
        assert learning_rate(config, decay) == 0.0


@pytest.mark.parametrize(("grad_clip", "warmup", "decay"), [(0.5, 0, None), (1e6, 0, None), (1e6, 3, 9)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_several_steps_are_those_of_a_plain_loop(grad_clip, warmup, decay, layout, monkeypatch):
    """Its AdamW is not fused, and its batches and weights are contiguous."""
    monkeypatch.setattr(placement, "_fastest_layout", lambda *_: layout)
    plain, model = tiny_model(), tiny_model()
    idle = idle_names(plain)
    config = make_config(grad_clip=grad_clip, n_steps=8)
    schedule = {"warmup_steps": warmup, "decay_steps": decay}
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update=schedule)})
    engine = Engine(model, config, CPU, Ranks())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, foreach=False)
    expected_schedule = torch_schedule(optimizer, warmup, decay)
    plain.train()
    for step in range(8):
        batch = make_batch(step)
        optimizer.zero_grad()
        loss, expected = plain_loss(plain, batch)
        loss.backward()
        for name, p in plain.named_parameters():
            if name in idle:
                p.grad = None
        norm = nn.utils.clip_grad_norm_(plain.parameters(), grad_clip)
        optimizer.step()
        expected_schedule.step()

        sums, found_norm = engine.gradients(batch)
        wanted = {**{key: float(expected[key]) for key in METRICS}, "grad_norm": float(norm)}
        assert means(sums) == pytest.approx(wanted, rel=1e-5)
        assert float(found_norm) == means(sums)["grad_norm"]
        engine.update(found_norm, step)
    moved = 0.0
    start = tiny_model().state_dict()
    for name, weights in model.state_dict().items():
        torch.testing.assert_close(weights, plain.state_dict()[name], rtol=0, atol=1e-6, msg=name)
        moved = max(moved, float((weights - start[name]).abs().max()))
    assert moved > (5e-3 if decay is None else 3e-3)  # eight steps of 1e-3, or 4.5 of them


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts):
    """Whatever the parts' shares of valid samples: the loss is a mean over tiles."""
    model, batch = tiny_model(), make_batch()
    expected = double_gradients(SETTINGS, batch)
    engine = Engine(model, make_config(gradient_accumulation=parts), CPU, Ranks())
    metrics = means(engine.gradients(batch).sums)
    _, whole = plain_loss(tiny_model().double(), batch)
    assert {key: metrics[key] for key in METRICS} == pytest.approx(
        {key: float(whole[key]) for key in METRICS}, rel=1e-5
    )
    names = {id(p): name for name, p in model.named_parameters()}
    for p in engine.parameters:
        want = expected[names[id(p)]]
        torch.testing.assert_close(p.grad.double(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    norm = np.sqrt(sum(float(expected[names[id(p)]].square().sum()) for p in engine.parameters))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_shares_must_be_even():
    assert check_shares(make_config(12, gradient_accumulation=3), Ranks(1, 2)) == 2
    with refused(ConfigError, "multiple of 8", "(2)", "(4)", key="data.batch_size", value=12):
        check_shares(make_config(12, gradient_accumulation=4), Ranks(1, 2))


# --- weights that do not matter ---------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [SETTINGS, EVERYWHERE], ids=["mid", "everywhere"])
def test_idle_parameters_are_those_without_influence(settings):
    """Shaken, they leave the output as it is; each of the others changes it. In float64."""
    model = tiny_model(settings=settings).double().eval()
    batch = make_batch()
    x = torch.nan_to_num(batch.tiles.permute(0, 3, 1, 2).double())
    idle = {id(p) for p in idle_parameters(model)}
    attention = sum(isinstance(module, AttnBlock) for module in model.modules())
    assert len(idle) == len(idle_parameters(model)) == 4 + attention

    def output():
        posterior = model.encode(x)
        x_hat = model.decode(posterior.sample(batch.noise.double()))
        return torch.cat([t.flatten() for t in (posterior.mean, posterior.std, x_hat, model.logvar)])

    with torch.no_grad():
        before = output()
        for name, p in model.named_parameters():
            kept = p.clone()
            p += torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype)
            change = float((output() - before).abs().max())
            p.copy_(kept)
            assert change < 1e-12 if id(p) in idle else change > 1e-4, (name, change)


def test_idle_parameters_stay_as_they_are():
    """Weight decay would shrink them, rounding noise would drive them about."""
    model = tiny_model(settings=EVERYWHERE)
    engine = Engine(model, make_config(), CPU, Ranks())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine.update(engine.gradients(make_batch()).norm, 0)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == before.keys() - idle_names(model)


# --- precision, layout, dropout ---------------------------------------------------------------------------------


def test_bf16_keeps_posterior_and_loss_in_float32(monkeypatch):
    model, batch = tiny_model(), make_batch()
    exact = double_gradients(SETTINGS, batch)
    engine = Engine(model, make_config(precision="bf16-mixed"), CPU, Ranks())
    convolutions, seen = [], []
    model.encoder.conv_in.register_forward_hook(lambda module, given, out: convolutions.append(out.dtype))
    loss_of = model.loss_of

    def watched(x, x_hat, posterior, mask):
        loss, metrics = loss_of(x, x_hat, posterior, mask)
        floats = [value for key, value in metrics.items() if key != "n_valid"]
        of_posterior = (posterior.mean, posterior.logvar, posterior.std, posterior.var)
        seen.extend(value.dtype for value in (x, x_hat, loss, *of_posterior, *floats))
        return loss, metrics

    monkeypatch.setattr(model, "loss_of", watched)
    metrics = means(engine.gradients(batch).sums)
    assert (convolutions, seen) == ([torch.bfloat16], [torch.float32] * 11)
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in engine.parameters} == {torch.float32}
    _, whole = plain_loss(tiny_model().double(), batch)
    assert metrics["loss"] == pytest.approx(float(whole["loss"]), rel=0.01)
    names = {id(p): name for name, p in model.named_parameters()}
    ours = torch.cat([p.grad.flatten() for p in engine.parameters]).double()
    theirs = torch.cat([exact[names[id(p)]].flatten() for p in engine.parameters])
    assert float((ours - theirs).norm() / theirs.norm()) < 0.05


def test_bf16_does_not_round_what_posterior_and_reconstruction_are_made_of():
    """These layers multiply in float32 whatever comes in, where bf16 would leave 8 bits."""
    model, seen = tiny_model(), {}
    for name in ("encoder.conv_out", "quant_conv", "decoder.conv_out"):
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda layer, given, out, name=name: seen.update({name: (layer, given[0], out)}))
    Engine(model, make_config(precision="bf16-mixed"), CPU, Ranks()).gradients(make_batch())
    assert len(seen) == 3
    for layer, given, out in seen.values():
        weights = layer.weight.detach().double(), layer.bias.detach().double()
        exact = nn.functional.conv2d(given.detach().double(), *weights, padding=layer.padding)
        assert float((out.detach() - exact).abs().max() / exact.abs().max()) < 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler, about torch's own code
def test_compiled_gradients_are_those_of_the_network(amount, monkeypatch):
    """Compiling to machine code takes a minute, so without --torture only the graph is compiled."""
    backend = amount("aot_eager", "inductor")
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    model, batch = tiny_model(), make_batch()
    expected = double_gradients(SETTINGS, batch)
    compiled = []
    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(compile(self, backend=backend)))
    engine = Engine(model, make_config(compile=True), CPU, Ranks())
    engine.gradients(batch)
    assert len(compiled) == 1
    for name, p in model.named_parameters():
        if p.requires_grad:
            want = expected[name]
            torch.testing.assert_close(p.grad.double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()), msg=name)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_tiles_arrive_in_the_layout_of_the_weights(layout, monkeypatch):
    monkeypatch.setattr(placement, "_fastest_layout", lambda *_: layout)
    engine = Engine(tiny_model(), make_config(), CPU, Ranks())
    batch = make_batch()
    x, mask, noise = engine.to_device(batch.tiles, batch.noise)
    assert x.is_contiguous(memory_format=layout)
    assert engine.model.encoder.conv_in.weight.is_contiguous(memory_format=layout)
    expected = np.moveaxis(batch.tiles.numpy().astype(np.float32), 3, 1)
    np.testing.assert_array_equal(x.numpy(), expected)
    np.testing.assert_array_equal(mask.numpy(), np.isfinite(expected))
    torch.testing.assert_close(noise, batch.noise)


def test_dropout_is_a_function_of_seed_step_and_rank():
    def norm(seed=0, step=3, rank=0, noise=None):
        model = tiny_model(settings={**SETTINGS, "dropout_prob": 0.3})
        config = make_config()
        engine = Engine(model, config.model_copy(update={"seed": seed}), CPU, Ranks())
        engine.ranks = Ranks(rank, 2)
        torch.manual_seed(noise or 0)  # whatever was drawn before must not matter
        same = make_batch()
        return float(engine.gradients(Batch(step, same.tiles, same.noise, [])).norm)

    assert norm() == norm(noise=99)
    assert len({norm(), norm(seed=1), norm(step=4), norm(rank=1)}) == 4


def test_measuring_leaves_everything_as_it_is():
    model = tiny_model(settings={**SETTINGS, "dropout_prob": 0.3})
    engine = Engine(model, make_config(), CPU, Ranks())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    first, second = (means(engine.measure(make_batch())) for _ in range(2))
    assert first == second
    _, expected = plain_loss(tiny_model(settings={**SETTINGS, "dropout_prob": 0.3}).double().eval(), make_batch())
    assert first == pytest.approx({key: float(expected[key]) for key in first}, rel=1e-5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- the report of a failure ------------------------------------------------------------------------------------


def test_gradient_norms_by_module():
    model, batch = tiny_model(settings=EVERYWHERE), make_batch()
    gradients = double_gradients(EVERYWHERE, batch)
    engine = Engine(model, make_config(), CPU, Ranks())
    engine.gradients(batch)
    squares = {}
    for name, gradient in gradients.items():
        if name not in idle_names(model):
            module = name.rpartition(".")[0] or name
            squares[module] = squares.get(module, 0.0) + float(gradient.square().sum())
    found = gradient_norms(engine.objective)
    assert "logvar" in found
    assert found == pytest.approx({name: np.sqrt(value) for name, value in squares.items()}, rel=1e-4)
