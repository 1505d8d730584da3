"""The network against tensors computed with mltools (``golden/``), and against its own contract."""

import hashlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spectralvae.model import (
    AttnBlock,
    AutoencoderKL,
    DiagonalGaussianDistribution,
    ResNetBlock,
    ResNetDown,
    ResNetUp,
    get_conv,
    zero_init,
)
from spectralvae.runtime.placement import place

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/case.json"))
SMALL = {"shape": (6, 16, 16), "chs": [16, 8], "mid_attn": True, "z_channels": 3, "norm_groups": 4}


def load_case(name):
    folder = GOLDEN / name
    case = json.loads((folder / "case.json").read_text())
    return case, {p.stem: load_file(p) for p in folder.glob("*.safetensors")}


def deviation(ours, reference):
    """Largest deviation as a share of the reference's largest absolute value."""
    return float((ours.detach() - reference).abs().max() / reference.abs().max().clamp_min(1e-30))


@pytest.fixture
def golden(record_property):
    """Assert that a deviation is within its limit, and put it into the table at the end of the run."""

    def check(case, quantity, value, limit):
        record_property(f"golden:{case}:{quantity}", f"{value:.1e}   (limit {limit:.0e})")
        assert value < limit, f"{case}: {quantity}"

    return check


def small_model(seed=0, **settings):
    """A small network with every weight random: a fresh one ends in zeros, which would hide mistakes."""
    torch.manual_seed(seed)
    model = AutoencoderKL({**SMALL, **settings}, embed_dim=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", CASES)
def test_golden_initial_weights_are_bit_identical(name):
    case, tensors = load_case(name)
    torch.manual_seed(case["seed_init"])
    model = AutoencoderKL(**case["config"])
    state = model.state_dict()
    assert state.keys() == tensors["init"].keys()
    assert sum(p.numel() for p in model.parameters()) == case["n_params"]
    for key, value in tensors["init"].items():
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize("name", CASES)
def test_golden_forward_loss_and_gradients(name, golden):
    case, tensors = load_case(name)
    ref = tensors["tensors"]
    model = AutoencoderKL(**case["config"])
    model.load_state_dict(tensors["weights"])
    with torch.no_grad():
        posterior = model.encode(ref["x"])
        got = {
            "encoder_out": model.encoder(ref["x"]),
            "moments": model.quant_conv(model.encoder(ref["x"])),
            "mean": posterior.mean,
            "logvar": posterior.logvar,
            "std": posterior.std,
            "decoded_mode": model.decode(posterior.mode()),
        }
    torch.manual_seed(case["seed_noise"])
    got["sample"] = posterior.sample()
    for quantity, value in got.items():
        golden(name, quantity, deviation(value, ref[quantity]), 1e-5)
    kl = ref["kl"].flatten(1).sum(1) if ref["kl"].ndim > 1 else ref["kl"]
    golden(name, "kl", deviation(posterior.kl(), kl), 1e-5)
    torch.manual_seed(case["seed_noise"])
    loss, metrics = model.get_loss(ref["x"])
    golden(name, "train_loss", deviation(loss, ref["train_loss"]), 1e-5)
    for key in ("loss", "nll_loss", "kl_loss"):
        golden(name, key, deviation(metrics[key], ref[f"eval_{key}"]), 1e-5)
    loss.backward()
    largest = max(g.abs().max() for g in tensors["grads"].values())
    gradients = {key: p.grad for key, p in model.named_parameters()}
    assert sorted(key for key, g in gradients.items() if g is None) == case["params_without_grad"]
    worst = max(float((g - tensors["grads"][key]).abs().max()) for key, g in gradients.items() if g is not None)
    golden(name, "gradients (of the largest)", worst / float(largest), 1e-4)


@pytest.mark.parametrize("name", CASES)
def test_golden_trajectory(name, golden):
    case, tensors = load_case(name)
    model = AutoencoderKL(**case["config"])
    model.load_state_dict(tensors["weights"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    torch.manual_seed(case["seed_trajectory"])
    losses = []
    for _ in range(8):
        loss, metrics = model.get_loss(tensors["tensors"]["x"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(metrics["loss"]))
    worst = max(abs(ours / theirs - 1) for ours, theirs in zip(losses, case["trajectory_losses"], strict=True))
    golden(name, "8-step trajectory", worst, 5e-4)


def test_golden_full_size(golden):
    """As it is, and as it computes on the CPU in training and for latents."""
    case = json.loads((GOLDEN / "full_size.json").read_text())
    torch.manual_seed(case["seed_init"])
    model = AutoencoderKL(**case["config"])
    assert sum(p.numel() for p in model.parameters()) == case["n_params"] == 27_289_893
    state = model.state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == case["shapes"]
    for key, value in state.items():
        digest = hashlib.sha256(value.numpy().tobytes()).hexdigest()
        assert digest.startswith(case["init_sha256_16"][key]), key

    norms = {name for name, module in model.named_modules() if isinstance(module, torch.nn.GroupNorm)}
    g = torch.Generator().manual_seed(case["seed_weights"])
    for key in sorted(state):
        noise = torch.randn(state[key].shape, generator=g)
        if noise.ndim >= 2:
            state[key] = noise / math.sqrt(noise[0].numel())
        elif key.removesuffix(".weight") in norms:
            state[key] = 1 + 0.1 * noise
        else:
            state[key] = 0.1 * noise
    model.load_state_dict(state)
    x = torch.randn([1, 1028, 64, 64], generator=g)
    for label in ("full_size", "full_size, fast"):
        if "fast" in label and place(model, torch.device("cpu")) is not torch.channels_last:
            break  # no wide convolution is computed otherwise on this processor
        with torch.no_grad():
            posterior = model.encode(x)
            decoded = model.decode(posterior.mode())
            for name, got in (("mean", posterior.mean), ("decoded", decoded)):
                points = {tuple(map(int, at.strip("()").split(","))): v for at, v in case[f"{name}_at"].items()}
                worst = max(abs(float(got[at]) - value) for at, value in points.items())
                golden(label, f"{name} at points", worst / float(got.abs().max()), 1e-5)
                mean, std = case[f"{name}_stats"]
                assert float(got.mean()) == pytest.approx(mean, abs=1e-5)
                assert float(got.std()) == pytest.approx(std, rel=1e-5)
            golden(label, "kl", abs(float(posterior.kl().sum()) / case["kl"] - 1), 1e-5)
            torch.manual_seed(case["seed_noise"])
            loss, metrics = model.get_loss(x)
        golden(label, "loss", abs(float(loss) / case["loss"] - 1), 1e-5)
        golden(label, "nll_loss", abs(float(metrics["nll_loss"]) / case["nll"] - 1), 1e-5)


@pytest.mark.parametrize(("junk", "loss_type"), [(math.nan, "l1"), (math.inf, "l2"), (-1e30, "l1"), (3.0, "l2")])
def test_masked_samples_change_nothing(junk, loss_type):
    model = small_model()
    model.nll_loss_type = loss_type
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 6, 16, 16, generator=g)
    mask = torch.rand(x.shape, generator=g) > 0.3
    noise = torch.randn(2, 4, 8, 8, generator=g)

    def run(x):
        model.zero_grad()
        loss, metrics = model.get_loss(x, mask, noise)
        loss.backward()
        return loss, metrics, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    loss, metrics, gradients = run(x)
    loss_junk, metrics_junk, gradients_junk = run(torch.where(mask, x, junk))
    assert torch.equal(loss, loss_junk)
    assert all(torch.equal(metrics[key], metrics_junk[key]) for key in metrics)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_junk, strict=True))
    assert metrics["n_valid"] == mask.sum()
    assert torch.equal(model.get_loss(x, None, noise)[0], model.get_loss(x, torch.ones_like(mask), noise)[0])


@pytest.mark.parametrize("loss_type", ["l1", "l2"])
def test_masked_loss_against_its_definition(loss_type):
    model = small_model().double()
    model.nll_loss_type = loss_type
    with torch.no_grad():
        model.logvar.fill_(0.7)
    x = torch.randn(2, 6, 16, 16, dtype=torch.float64)
    mask = torch.rand(x.shape) > 0.3
    noise = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    loss, metrics = model.get_loss(x, mask, noise)
    with torch.no_grad():
        posterior = model.encode(torch.where(mask, x, 0.0))
        x_hat = model.decode(posterior.mean + torch.exp(0.5 * posterior.logvar) * noise)
        total = squares = 0.0
        for value, predicted in zip(x[mask], x_hat[mask], strict=True):
            rec = abs(value - predicted) if loss_type == "l1" else (value - predicted) ** 2
            total += rec / math.exp(0.7) + 0.7
            squares += (value - predicted) ** 2
        normal = torch.distributions.Normal(posterior.mean, posterior.std)
        kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum() / 2
    assert float(metrics["nll_loss"]) == pytest.approx(float(total / 2), rel=1e-12)
    assert float(metrics["kl_loss"]) == pytest.approx(model.kl_weight * float(kl), rel=1e-12)
    assert float(metrics["pixel_mse"]) == pytest.approx(float(squares / mask.sum()), rel=1e-12)
    assert float(metrics["loss"]) == float(metrics["nll_loss"] + metrics["kl_loss"]) == float(loss.detach())


def test_distribution_against_torch():
    moments = torch.randn(3, 8, 4, 5)
    ours = DiagonalGaussianDistribution(moments)
    other = DiagonalGaussianDistribution(torch.randn(3, 8, 4, 5))
    normal, other_normal = (torch.distributions.Normal(d.mean, d.std) for d in (ours, other))
    standard = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(ours.kl(), kl(normal, standard).flatten(1).sum(1))
    torch.testing.assert_close(ours.kl(other), kl(normal, other_normal).flatten(1).sum(1))
    sample = torch.randn(3, 4, 4, 5)
    torch.testing.assert_close(ours.nll(sample), -normal.log_prob(sample).flatten(1).sum(1))
    torch.manual_seed(5)
    drawn = ours.sample()
    torch.manual_seed(5)
    assert torch.equal(drawn, ours.mean + ours.std * torch.randn(ours.mean.shape))
    clamped = DiagonalGaussianDistribution(torch.tensor([0.0, -99.0, 99.0, 1.0]).reshape(1, 4, 1, 1))
    assert clamped.logvar.flatten().tolist() == [20.0, 1.0]
    assert DiagonalGaussianDistribution(torch.tensor([0.0, -99.0]).reshape(1, 2, 1, 1)).logvar.item() == -30.0


@pytest.mark.parametrize("act", ["gelu", "relu", "silu"])
@pytest.mark.parametrize("padding", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(("dim", "kernel"), [(2, 3), (2, 5), (3, 3), (3, 1)])
def test_every_combination_runs_and_keeps_its_shape(act, padding, dim, kernel):
    shape = (4, *([8] * dim))
    settings = {"shape": shape, "chs": [8, 16], "num_res_blocks": 2, "z_channels": 2, "act": act}
    settings |= {"conv_padding_mode": padding, "conv_kernel_size": kernel, "dropout_prob": 0.1, "mid_attn": dim == 2}
    model = AutoencoderKL(settings, embed_dim=3)
    x = torch.randn(2, *shape)
    x_hat, posterior = model(x)
    assert x_hat.shape == x.shape
    assert posterior.mean.shape == (2, 3, *([4] * dim))
    loss, _ = model.get_loss(x)
    loss.backward()
    assert posterior.kl().shape == (2,)


def test_small_parts():
    x = torch.randn(1, 8, 6, 6)
    assert ResNetDown(8, 16)(x).shape == (1, 16, 3, 3)
    assert ResNetUp(8, 16)(x).shape == (1, 16, 12, 12)
    block = ResNetBlock(8, 16)
    assert torch.equal(block(x), block.skip_conv(x))  # net2 starts as zero
    assert all(not p.any() for p in zero_init(get_conv(8, 8)).parameters())
    assert get_conv(4, 6, dim=3, kernel_size=3).weight.shape == (6, 4, 3, 3, 3)
    assert "net2.2.weight" in block.state_dict()  # dropout takes a place only when it is used
    assert "net2.3.weight" in ResNetBlock(8, 8, dropout_prob=0.1).state_dict()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"norm_groups": 5}, "norm_groups = 5"),
        ({"n_attention_heads": 3}, "n_attention_heads = 3"),
        ({"conv_kernel_size": 4}, "conv_kernel_size = 4"),
        ({"shape": (6, 8, 8, 8)}, "attention"),
        ({"shape": (6, 8, 8, 8), "mid_attn": False, "attn_sizes": [8]}, "attention"),
        ({"double_z": False}, "double_z"),
        ({"shape": (6, 15, 16)}, "multiple of 2"),
        ({"shape": (6, 16)}, "shape"),
        ({"act": "tanh"}, "'tanh'"),
        ({"conv_padding_mode": "same"}, "'same'"),
        ({"num_res_blocks": 0}, "num_res_blocks"),
        ({"chs": []}, "chs"),
        ({"nll_loss_type": "l3"}, "'l3'"),
        ({"embed_dim": 0}, "embed_dim"),
    ],
)
def test_wrong_settings_are_named(changed, words):
    rest = {key: changed[key] for key in changed.keys() & {"nll_loss_type", "embed_dim"}}
    with pytest.raises(ValueError, match=re.escape(words)):
        AutoencoderKL({**SMALL, **{key: changed[key] for key in changed.keys() - rest.keys()}}, **rest)


def test_wrong_arguments_and_inputs_are_named():
    with pytest.raises(TypeError, match="draw_figure"):
        AutoencoderKL(SMALL, draw_figure=None)
    with pytest.raises(TypeError, match="channels"):
        AutoencoderKL({**SMALL, "channels": 3})
    model, x = small_model(), torch.randn(1, 6, 16, 16)
    for call, words in (
        (lambda: get_conv(3, 3, dim=4), "4"),
        (lambda: model.encode(x[..., :15, :]), "15 x 16"),
        (lambda: model.encode(x[:, :5]), "6 channels"),
        (lambda: model.encoder(x[0]), "6 channels"),
        (lambda: model.get_loss(x, torch.ones(x.shape)), "mask"),
        (lambda: model.get_loss(x, noise=torch.randn(1, 4, 8, 7)), "noise"),
        (lambda: AttnBlock(8)(torch.randn(1, 8, 4, 4, 4)), "attention"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert model(torch.randn(1, 6, 20, 34))[0].shape == (1, 6, 20, 34)  # sizes other than in training pass
