"""Supervised latents: targets, loss, runs and checkpoints, against plain computations and unsupervised runs."""

from __future__ import annotations

import json
import shutil
import signal
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
import zarr
from refusals import refused
from rich.console import Console
from running import differing, left_behind, newest_checkpoint, record, rows, train_ranks, write_config
from safetensors.torch import load_file
from tiny import equal_weights, flip, tiny_model

from spectralvae import load_model
from spectralvae.cli import run as cli
from spectralvae.config import TrainConfig
from spectralvae.data.loader import Batch, TargetReader
from spectralvae.data.sampling import Crop
from spectralvae.data.store import Store
from spectralvae.errors import ConfigError, InputError
from spectralvae.model import AutoencoderKL
from spectralvae.runtime.ranks import Ranks
from spectralvae.training.engine import Engine
from spectralvae.training.objective import means
from spectralvae.training.setup import set_up
from spectralvae.training.supervision import Supervision, build_supervision

METRICS = ("loss", "nll_loss", "kl_loss", "pixel_mse")  # of every run

CPU = torch.device("cpu")
NY, NX = 24, 28
PRODUCTS = {"CLDO4": 0.3, "NO2": 1.5, "O3TOT": 0.7}


def fields() -> dict[str, dict[str, np.ndarray]]:
    """(y, x) by product and scene: different towards every side, with holes of all sizes."""
    random = np.random.default_rng(4)
    y, x = np.mgrid[:NY, :NX]
    level2: dict[str, dict[str, np.ndarray]] = {product: {} for product in PRODUCTS}
    for i, scene in enumerate(("a", "b", "v")):
        level2["CLDO4"][scene] = (y + 3 * x + i) / (NY + 3 * NX + 3)
        level2["NO2"][scene] = 1e15 * (random.normal(size=(NY, NX)) + 0.2 * x - 0.05 * y * i)
        level2["O3TOT"][scene] = 300.0 + y - 2.0 * x + random.normal(size=(NY, NX))
        for field in level2.values():
            field[scene][random.random((NY, NX)) < 0.4] = np.nan
            field[scene][4:12, 6:14] = np.nan
    return level2


def write_store(make_store, path: Path) -> Path:
    random = np.random.default_rng(0)
    scenes = {name: random.normal(size=(NY, NX, 6)) for name in ("a", "b", "v")}
    for z in scenes.values():
        z[random.random(z.shape) < 0.1] = np.nan
    made: Path = make_store(path, scenes, val=("v",), level2=fields()).path
    return made


@pytest.fixture(scope="module")
def store(tmp_path_factory, make_store):
    return write_store(make_store, tmp_path_factory.mktemp("data") / "store")


def config_file(folder: Path, name: str, store: Path, supervision=None, **changes) -> tuple[Path, Path]:
    """As `running.write_config`, without dropout, with supervision."""
    changes.setdefault("data", {}).setdefault("num_workers", 0)
    changes.setdefault("model", {}).setdefault("dropout_prob", 0.0)
    if supervision is not None:
        changes["supervision"] = supervision
    return write_config(folder, name, store, **changes)


SUPERVISED = {"products": {"O3TOT": 0.7, "CLDO4": 0.3, "HCHO": 0.0, "NO2": 1.5}, "hidden": [5, 7]}


# --- targets ----------------------------------------------------------------------------------------------------


def plain_targets(store: Store, product: str, field: np.ndarray) -> np.ndarray:
    """Standardised values by their definition, in float64."""
    found = store.attributes["targets"][product]
    x = field.astype(np.float32).astype(np.float64)
    t = {
        "NO2": lambda: np.log(x / 1e15 / found["scale"] + np.sqrt(1 + (x / 1e15 / found["scale"]) ** 2)),
        "O3TOT": lambda: (x - found["center"]) / found["scale"],
        "CLDO4": lambda: np.log((0.01 + 0.98 * x) / (1 - (0.01 + 0.98 * x))),
    }[product]()
    return np.asarray((t - found["mean"]) / found["std"])


def plain_cells(t: np.ndarray, s: int) -> np.ndarray:
    cells = np.full((t.shape[0] // s, t.shape[1] // s), np.nan)
    for i in range(cells.shape[0]):
        for j in range(cells.shape[1]):
            pixels = t[s * i : s * (i + 1), s * j : s * (j + 1)]
            valid = pixels[~np.isnan(pixels)]
            if 2 * len(valid) >= s * s:
                cells[i, j] = valid.mean()
    return cells


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_targets_follow_their_tiles(store, scale):
    """In all eight orientations: pixels are turned, transformed, standardised, and only then averaged."""
    opened, level2 = Store(store), fields()
    reader = TargetReader(opened, list(PRODUCTS), [0, 1, 2], scale)
    seen = []
    for k, (mirrored, turns) in enumerate((m, n) for m in (False, True) for n in range(4)):
        crop = Crop(k % 3, 3 + k, 5 + k, mirrored, turns)
        found = reader.read(crop, 8)
        assert found.dtype == np.float32 and found.shape == reader.shape(8) == (3, 8 // scale, 8 // scale)
        for p, product in enumerate(PRODUCTS):
            window = level2[product][opened.scenes[crop.scene].id][crop.y : crop.y + 8, crop.x : crop.x + 8]
            turned = np.rot90(np.flipud(window) if mirrored else window, turns)
            expected = plain_cells(plain_targets(opened, product, turned), scale)
            np.testing.assert_allclose(found[p], expected, rtol=1e-5, atol=1e-6)
            seen.append(np.isnan(expected).mean())
    assert min(seen) < 0.5 and max(seen) == 1.0  # some tiles have hardly a hole, one has nothing else


def test_batches_have_the_targets_of_their_crops(store, tmp_path):
    config, _ = config_file(tmp_path, "run", store, SUPERVISED)
    trainer = set_up(load(config), Ranks(), Console(quiet=True))
    plain = set_up(load(config_file(tmp_path, "plain", store)[0]), Ranks(), Console(quiet=True))
    for workers in (0, 2):
        pairs = zip(trainer.stream(0, workers), plain.stream(0, workers), strict=True)
        for batch, without in islice(pairs, 4):
            assert batch.crops == without.crops and without.targets is None
            assert torch.equal(batch.noise, without.noise)
            assert torch.equal(batch.tiles.nan_to_num(99), without.tiles.nan_to_num(99))
            for target, crop in zip(batch.targets, batch.crops, strict=True):
                np.testing.assert_array_equal(target.numpy(), trainer.targets.read(crop, 8))
    assert equal_weights(trainer.model.state_dict(), plain.model.state_dict())


def load(path: Path) -> TrainConfig:
    return TrainConfig.model_validate(yaml.safe_load(path.read_text()))


def test_fields_are_plain_files(store, tmp_path, make_store):
    """Also one of zeros, which zarr would leave out."""
    zeros = {"CLDO4": {"a": np.zeros((5, 6)), "b": np.eye(5, 6)}}
    made = make_store(tmp_path / "store", {name: np.zeros((5, 6, 3)) for name in ("a", "b")}, level2=zeros)
    for scene, name in enumerate(("a", "b")):
        made.check_field(scene, "CLDO4")
        np.testing.assert_array_equal(made.read_field(scene, "CLDO4", 1, 2, 3), zeros["CLDO4"][name][1:4, 2:5])
        array = zarr.open_array(made.path / f"scenes/{name}/l2/CLDO4", mode="r")
        np.testing.assert_array_equal(array[:], zeros["CLDO4"][name])
    file = made.path / "scenes/a/l2/CLDO4/c/0/0"
    file.write_bytes(file.read_bytes()[:-1])
    with refused(InputError, "5 x 6", path=file):
        made.check_field(0, "CLDO4")
    with refused(InputError, "5 x 6", path=file):
        made.read_field(0, "CLDO4", 2, 0, 3)
    file.unlink()
    with refused(InputError, str(file)):
        made.check_field(0, "CLDO4")


# --- the loss ---------------------------------------------------------------------------------------------------


def make_config(parts: int = 1, **training) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "output_dir": "run",
            "data": {"store": "store", "batch_size": 4, "tile_size": 8},
            "training": {"gradient_accumulation": parts, **training},
        }
    )


def make_batch() -> Batch:
    """Four tiles: of targets, one has none, one is whole, others lack some; one product is valid in two cells only."""
    random = np.random.default_rng(5)
    z = random.normal(size=(4, 8, 8, 6)).astype(np.float16)
    z[random.random(z.shape) < 0.2] = np.nan
    targets = random.normal(size=(4, 3, 4, 4)).astype(np.float32)
    for i, share in enumerate((0.3, 1.0, 0.0, 0.6)):
        targets[i][random.random((3, 4, 4)) < share] = np.nan
    targets[:, 2] = np.nan
    targets[2, 2, 1:3, 0] = 0.5
    noise = random.normal(size=(4, 3, 4, 4)).astype(np.float32)
    return Batch(0, torch.from_numpy(z), torch.from_numpy(noise), [], torch.from_numpy(targets))


def wide_model() -> AutoencoderKL:
    """With weights so large that attention matters."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4.0
    return model


def make_head(hidden=(5, 7), scale=0.5) -> Supervision:
    """Every weight random: the last layer begins with zeros, which would hide mistakes."""
    head = Supervision(PRODUCTS, 3, hidden, seed=1)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return head


def plain_head(weights: list[torch.Tensor], latents: torch.Tensor) -> torch.Tensor:
    """Of one position after the other: (E) -> (P), for all positions of (B, E, h, w)."""
    values = latents.permute(0, 2, 3, 1)
    for i in range(0, len(weights), 2):
        values = values @ weights[i][:, :, 0, 0].T + weights[i + 1]
        if i + 2 < len(weights):
            values = values * 0.5 * (1 + torch.erf(values / 2**0.5))
    return values.permute(0, 3, 1, 2)


def plain_step(model: AutoencoderKL, head: Supervision, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    """The definition in float64, tile by tile and product by product; gradients are in the weights afterwards."""
    model, head = model.double(), head.double()
    total = torch.zeros((), dtype=torch.float64)
    squares = {product: [] for product in PRODUCTS}
    for tile, noise, targets in zip(batch.tiles, batch.noise, batch.targets, strict=True):
        x = tile.double().permute(2, 0, 1)[None]
        mask = torch.isfinite(x)
        loss, _ = model.get_loss(x, mask, noise.double()[None])
        posterior = model.encode(x.masked_fill(~mask, 0.0))
        predicted = plain_head(list(head.parameters()), posterior.mean + posterior.std * noise.double())[0]
        for p, (product, weight) in enumerate(PRODUCTS.items()):
            for place in torch.isfinite(targets[p]).nonzero().tolist():
                square = (predicted[p][tuple(place)] - float(targets[p][tuple(place)])) ** 2
                squares[product].append(float(square.detach()))
                loss = loss + weight * (6 * 8 * 8) * square / (4 * 4)
        total = total + loss / len(batch.tiles)
    total.backward()
    return total, {f"supervision_{product}": float(np.mean(found)) for product, found in squares.items()}


@pytest.mark.parametrize("hidden", [(), (5, 7)], ids=["linear", "two layers"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_loss_and_gradients_are_those_of_a_plain_computation(parts, hidden):
    batch = make_batch()
    expected, expected_head = wide_model(), make_head(hidden)
    _, squares = plain_step(expected, expected_head, batch)
    model, head = wide_model().train(), make_head(hidden)
    engine = Engine(model, make_config(parts), CPU, Ranks(), head)
    sums, norm = engine.gradients(batch)
    found = means(sums)
    assert found == pytest.approx({**{key: found[key] for key in found if key not in squares}, **squares}, rel=1e-5)
    unsupervised = Engine(wide_model(), make_config(parts), CPU, Ranks())
    own = means(unsupervised.gradients(batch).sums)
    assert {key: own[key] for key in METRICS} == pytest.approx({key: found[key] for key in METRICS}, rel=1e-6)
    measured = means(engine.measure(batch))  # the head from the posterior's mode
    assert {key: measured[key] for key in METRICS} == pytest.approx({key: found[key] for key in METRICS}, rel=1e-5)

    wanted = {**dict(expected.named_parameters()), **{f"head.{n}": p for n, p in expected_head.named_parameters()}}
    have = {**dict(model.named_parameters()), **{f"head.{n}": p for n, p in head.named_parameters()}}
    total = 0.0
    for name, p in have.items():
        if p.requires_grad:
            want = wanted[name].grad
            torch.testing.assert_close(p.grad.double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()), msg=name)
            total += float(want.square().sum())
    assert float(norm) == pytest.approx(np.sqrt(total), rel=1e-5)  # of both together


def test_tiles_without_targets_add_nothing():
    """Neither NaN nor a gradient, in head and network."""
    batch = make_batch()
    nothing = Batch(0, batch.tiles, batch.noise, [], torch.full_like(batch.targets, torch.nan))
    model, head, alone = wide_model().train(), make_head(), wide_model().train()
    engine, plain = Engine(model, make_config(2), CPU, Ranks(), head), Engine(alone, make_config(2), CPU, Ranks())
    with_head, without = means(engine.gradients(nothing).sums), means(plain.gradients(batch).sums)
    assert with_head == without
    for p in head.parameters():
        assert torch.equal(p.grad, torch.zeros_like(p))
    for p, expected in zip(model.parameters(), alone.parameters(), strict=True):
        if p.requires_grad:
            assert torch.equal(p.grad, expected.grad)


def test_the_heads_loss_is_float32_under_autocast():
    head, batch = make_head(), make_batch()
    latents = batch.noise
    with torch.autocast("cpu", torch.bfloat16):
        predicted, errors = head.layers(latents), head(latents, batch.targets)
    assert predicted.dtype == torch.bfloat16 and errors.dtype == torch.float32
    expected = [((predicted.double() - batch.targets)[:, p]).square().nansum() for p in range(3)]
    np.testing.assert_allclose(errors[:, 0].detach(), torch.stack(expected).detach(), rtol=1e-6)


def test_first_weights_of_the_head_are_its_own():
    """A function of the run's seed; the global random state stays as it was, and the first prediction is the mean."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (Supervision(PRODUCTS, 3, [5], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert equal_weights(first.state_dict(), again.state_dict())
    assert not torch.equal(first.layers[0].weight, other.layers[0].weight)
    assert not first(torch.randn(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))[:, 0].any()


def test_order_of_products_in_the_config_means_nothing():
    """A run goes on with the channels that it had, and without those of weight 0."""
    given = {"NO2": 1.5, "HCHO": 0.0, "O3TOT": 0.7, "CLDO4": 0.3}
    configs = [
        TrainConfig.model_validate({**make_config().model_dump(), "supervision": {"products": products}})
        for products in (given, dict(reversed(given.items())))
    ]
    assert [build_supervision(config).products for config in configs] == [list(PRODUCTS)] * 2
    np.testing.assert_allclose(build_supervision(configs[0]).weights, list(PRODUCTS.values()))


# --- runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(starter, store, tmp_path_factory):
    """A finished run in the memory layout of GPUs: its config and its directory."""
    path, run = config_file(tmp_path_factory.mktemp("runs"), "supervised", store, SUPERVISED)
    assert starter.train(path, ["channels_last"]).wait() == 0
    return path, run


def test_weights_of_zero_are_no_supervision(starter, store, tmp_path, whole):
    """Byte for byte; and with weights, the run begins as the unsupervised one."""
    zeros = {"products": {"NO2": 0.0, "HCHO": 0.0}}
    configs = [config_file(tmp_path, name, store, given) for name, given in (("plain", None), ("zero", zeros))]
    children = [starter.train(path, ["channels_last"]) for path, _ in configs]
    assert [child.wait() for child in children] == [0, 0]
    (_, plain), (_, zero), (_, supervised) = *configs, whole
    assert left_behind(zero) == left_behind(plain)
    files = [{path.name for path in newest_checkpoint(run).iterdir()} for run in (plain, supervised)]
    assert files[1] == files[0] | {"supervision.safetensors", "supervision_optimizer.safetensors"}
    first, last = rows(supervised)[0], rows(supervised)[-1]
    keys = {f"{kind}supervision_{product}" for kind in ("", "val_") for product in PRODUCTS}
    assert {key for key in first if "supervision" in key} == keys
    assert {key: value for key, value in first.items() if key not in keys} == rows(plain)[0]
    assert last.keys() - keys == rows(plain)[-1].keys() and last["nll_loss"] != rows(plain)[-1]["nll_loss"]
    head = load_file(newest_checkpoint(supervised) / "supervision.safetensors")
    assert [tuple(value.shape) for key, value in head.items() if "bias" in key] == [(5,), (7,), (3,)]
    assert all(value.any() for value in head.values())  # the last layer began as zeros
    pages = [(run / "summary/index.html").read_text() for run in (plain, supervised)]
    assert ["chart-supervision" in page for page in pages] == [False, True]


def test_killed_and_started_again(starter, store, tmp_path, whole):
    cut, run = config_file(tmp_path, "cut", store, SUPERVISED)
    killed = starter.train(cut, ["channels_last"], ("at_update", 7, signal.SIGKILL))
    assert killed.wait() == -signal.SIGKILL
    assert newest_checkpoint(run).name == "step=000005"
    assert starter.train(cut, ["channels_last"]).wait() == 0
    assert differing(run, whole[1]) == []
    assert "checkpoints/step=000014/supervision_optimizer.safetensors" in left_behind(run)


def test_two_processes_learn_what_one_does(starter, store, tmp_path):
    changes = {"optimizer": {"lr": 1e-4}, "training": {"gradient_accumulation": 2, "peer_timeout": 60}}
    one, one_run = config_file(tmp_path, "one", store, SUPERVISED, **changes)
    two, two_run = config_file(tmp_path, "two", store, SUPERVISED, **changes)
    assert starter.train(one).wait() == 0
    assert [child.wait() for child in train_ranks(starter, two, 2)] == [0, 0]
    for name in ("model.safetensors", "supervision.safetensors"):
        alone, together = (load_file(newest_checkpoint(run) / name) for run in (one_run, two_run))
        for key in alone:
            torch.testing.assert_close(together[key], alone[key], rtol=0, atol=1e-6, msg=key)
    for mine, expected in zip(rows(two_run), rows(one_run), strict=True):
        assert mine == pytest.approx(expected, rel=1e-5)


def test_validation_is_of_the_posteriors_mean(store, tmp_path):
    trainer = set_up(load(config_file(tmp_path, "run", store, SUPERVISED)[0]), Ranks(), Console(quiet=True))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (*trainer.model.parameters(), *trainer.supervision.parameters()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    engine = Engine(trainer.model, trainer.config, CPU, Ranks(), trainer.supervision)
    first, again = (trainer.validation.run(engine).metrics for _ in range(2))
    assert first == again

    opened, level2 = Store(store), fields()
    z = torch.from_numpy(zarr.open_array(store / "scenes/v/z", mode="r")[:].astype(np.float32))
    squares = {product: [] for product in PRODUCTS}
    for crop in trainer.validation.crops:
        tile = z[crop.y : crop.y + 8, crop.x : crop.x + 8].permute(2, 0, 1)[None]
        with torch.no_grad():
            mean = trainer.model.eval().encode(tile.nan_to_num(0.0)).mean
            predicted = plain_head(list(trainer.supervision.parameters()), mean)[0].numpy()
        for p, product in enumerate(PRODUCTS):
            window = level2[product]["v"][crop.y : crop.y + 8, crop.x : crop.x + 8]
            squares[product].append((predicted[p] - plain_cells(plain_targets(opened, product, window), 2)) ** 2)
    for product, found in squares.items():
        assert first[f"val_supervision_{product}"] == pytest.approx(np.nanmean(found), rel=1e-4)


# --- checkpoints ------------------------------------------------------------------------------------------------


def test_the_model_is_loaded_without_its_head(whole, starter, store, tmp_path):
    _, run = whole
    checkpoint = newest_checkpoint(run)
    assert {"supervision.safetensors", "supervision_optimizer.safetensors"} <= json.loads(
        (checkpoint / "manifest.json").read_text()
    )["files"].keys()
    weights = load_file(checkpoint / "model.safetensors")
    assert equal_weights(dict(load_model(run).state_dict()), weights)
    assert not any("supervision" in key for key in load_file(checkpoint / "optimizer.safetensors"))

    convert = tmp_path / "convert.yaml"
    convert.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "export"), "source": str(run)}))
    assert cli(["convert", str(convert)]) == 0
    assert not list((tmp_path / "export").glob("supervision*"))
    assert equal_weights(load_file(tmp_path / "export/model.safetensors"), weights)

    path, next_run = config_file(tmp_path, "next", store, training={"init_from": str(run), "n_steps": 1})
    assert starter.train(path).wait() == 0
    assert rows(next_run)[0]["val_pixel_mse"] == pytest.approx(rows(run)[-1]["val_pixel_mse"], rel=1e-6)


@pytest.mark.parametrize("name", ["supervision.safetensors", "supervision_optimizer.safetensors"])
def test_a_corrupt_head_is_a_corrupt_checkpoint(whole, starter, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(whole[1], run)
    file = newest_checkpoint(run) / name
    flip(file, 0.6)
    child = starter.train(whole[0], options=["--set", f"output_dir={run}", "--set", "training.n_steps=15"])
    assert child.wait() == 0
    assert str(file) in "".join(child.output.split())
    assert record(run)["starts"][-1]["from_step"] == 10


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("supervision", "words"),
    [
        ({"products": {"NO2": 0.1, "HCHO": 0.1}}, ("supervision.products", "scene a", "HCHO")),
        ({"products": {}}, ("supervision.products",)),
        ({"products": {"NO2": -1.0}}, ("supervision.products.NO2", "-1.0")),
        ({"products": {"SO2": 1.0}}, ("supervision.products.SO2",)),
        ({"products": {"NO2": 1}, "hidden": [0]}, ("supervision.hidden",)),
    ],
)
def test_wrong_products(store, tmp_path, capsys, supervision, words):
    refused_first(*config_file(tmp_path, "run", store, supervision), capsys, *words)


def refused_first(path: Path, run: Path, capsys, *words: str) -> None:
    """In one line, before the directory is made."""
    assert cli(["train", str(path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line
    assert not run.exists()


def test_products_must_be_in_every_scene(tmp_path, make_store, capsys):
    random = np.random.default_rng(0)
    scenes = {name: random.normal(size=(16, 16, 6)) for name in ("a", "v")}
    level2 = {"O3TOT": {"a": random.normal(300, 30, (16, 16))}}
    made = make_store(tmp_path / "store", scenes, val=("v",), level2=level2)
    path, run = config_file(tmp_path, "run", made.path, {"products": {"O3TOT": 0.1}})
    refused_first(path, run, capsys, "supervision.products", "scene v", "O3TOT")
    with refused(ConfigError, "NO2"):
        TargetReader(made, ["NO2"], [0], 2)


def test_compressed_fields(tmp_path, make_store, capsys):
    """As stores of earlier versions have them."""
    copy = write_store(make_store, tmp_path / "store")
    array = copy / "scenes/b/l2/NO2"
    values = zarr.open_array(array, mode="r")[:]
    zarr.create_array(array, data=values, dimension_names=("y", "x"), overwrite=True)
    path, run = config_file(tmp_path, "run", copy, {"products": {"NO2": 0.1}})
    refused_first(path, run, capsys, str(array), "zstd")
