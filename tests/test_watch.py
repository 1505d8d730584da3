"""What a run shows of itself: events, validation by channel, the page, run.json, the report of a failure."""

import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from spectralvae import load_model
from spectralvae.data import sampling
from spectralvae.data.loader import TileStream
from spectralvae.data.store import Store
from spectralvae.training import record
from spectralvae.training import watch as watch_module
from spectralvae.training.engine import Engine
from spectralvae.training.spikes import LEARNING
from spectralvae.training.watch import Watch


@pytest.fixture
def store(tmp_path, make_store):
    """Three scenes of 6 channels: one has no valid sample at all, some of the others' are invalid."""
    random = np.random.default_rng(5)
    scenes = {name: random.normal(size=(24, 24, 6)) for name in ("a", "b", "v")}
    for z in scenes.values():
        z[random.random(z.shape) < 0.2] = np.nan
        z[..., 4] = np.nan
    return make_store(tmp_path / "store", scenes, val=("v",)).path


def test_validation_by_channel_and_latent(store, train):
    """summary/validation.json against its definitions, in numpy, from the last checkpoint."""
    code, run = train(n_steps=6, data={"n_val_tiles": 50, "batch_size": 4})
    assert code == 0
    found = json.loads((run / "summary/validation.json").read_text())
    assert found["step"] == 6
    assert found["wavelength"] == [400 + i for i in range(6)]
    model = load_model(run)
    v = zarr.open_array(store / "scenes/v/z", mode="r")[:].astype(np.float32)
    places = [(y, x) for y in (0, 8, 16) for x in (0, 8, 16)]
    tiles = np.stack([v[y : y + 8, x : x + 8] for y, x in places])
    noise = np.stack([sampling.noise(0, sampling.VALIDATION_NOISE, i, (4, 4, 4)) for i in range(len(places))])
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(np.nan_to_num(tiles)).permute(0, 3, 1, 2))
        z_hat = model.decode(posterior.mean + posterior.std * torch.from_numpy(noise)).permute(0, 2, 3, 1).numpy()
    with np.errstate(invalid="ignore"):
        mse = np.nanmean((tiles - z_hat.astype(np.float64))[..., :4] ** 2, axis=(0, 1, 2))
        variance = np.nanmean(tiles[..., :4].astype(np.float64) ** 2, axis=(0, 1, 2))
    assert found["mse"][:4] == pytest.approx(mse.tolist(), rel=1e-4)
    assert found["variance"][:4] == pytest.approx(variance.tolist(), rel=1e-5)
    assert found["mse"][4] is None
    mean, std = posterior.mean.double().numpy(), posterior.std.double().numpy()
    kl = 0.5 * (mean**2 + std**2 - 1 - 2 * np.log(std)) / math.log(2)
    for key, values in (("bits", kl), ("posterior_std", std), ("mean", mean)):
        assert found["latents"][key] == pytest.approx(values.mean(axis=(0, 2, 3)).tolist(), rel=1e-4, abs=1e-7), key
    spread = mean.std(axis=(0, 2, 3))
    assert found["latents"]["std"] == pytest.approx(spread.tolist(), rel=1e-3, abs=1e-7)
    assert found["active_units"] == int((spread**2 > 0.01).sum())


@pytest.mark.pictures
def test_a_spike_is_marked(train, monkeypatch, capsys):
    """Planted at a step that is not logged; noted once, also by a run that was interrupted before and after it."""
    step = LEARNING + 7
    original, seen = Engine.gradients, {}

    def gradients(self, batch):
        seen["step"] = batch.step + 1
        return original(self, batch)

    norm = Engine.gradient_norm
    monkeypatch.setattr(Engine, "gradients", gradients)
    monkeypatch.setattr(Engine, "gradient_norm", lambda self: norm(self) * (1000 if seen["step"] == step else 1))
    often = {"save_every": 40, "val_every": 40, "log_every": 5, "plot_every": 1000}
    _, whole = train("whole", n_steps=step + 10, **often)
    assert f"WARNING: step {step}: spike: grad_norm" in capsys.readouterr().out
    events = [json.loads(line) for line in (whole / "events.jsonl").read_text().splitlines()]
    assert [(event["step"], event["kind"]) for event in events] == [(step, "spike")]
    assert events[0]["text"].startswith("grad_norm")
    assert events[0]["text"].split(",")[0] in (whole / "summary/index.html").read_text()

    for end in (step - 3, step + 4, step + 10):
        _, run = train("parts", n_steps=end, **often)
    assert (run / "events.jsonl").read_bytes() == (whole / "events.jsonl").read_bytes()


def page(run: Path) -> str:
    return (run / "summary/index.html").read_text()


@pytest.mark.pictures
def test_page_of_a_finished_run(train):
    code, run = train(n_steps=7)
    assert code == 0
    text = page(run)
    assert "finished" in text
    assert "data:image/png;base64," in text
    for channel in json.loads((run / "summary/validation.json").read_text())["wavelength"]:
        assert f"{channel:g}" in text


def poison(monkeypatch, sample: int, value: float) -> None:
    """Put a number that is not finite, and not the mask, into the tile of this sample."""
    original = TileStream._fill

    def fill(self, batch, j):
        crop = original(self, batch, j)
        if batch.step * self.batch_size + j == sample and batch.step:
            batch.tiles[j, 3, 2, 1] = value
        return crop

    monkeypatch.setattr(TileStream, "_fill", fill)


@pytest.mark.pictures
def test_report_of_a_step_that_is_not_finite(store, train, monkeypatch, capsys):
    """One sample of one tile is infinite: the report names the tile, and nothing is saved."""
    poison(monkeypatch, 6 * 3 + 1, math.inf)
    code, run = train(save_every=5, data={"batch_size": 3})
    assert code == 1
    report_path = run / "failures/step=000007.json"
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(report_path) in error
    report = json.loads(report_path.read_text())
    assert report["step"] == 7
    assert report["learning_rate"] == 2e-3
    assert report["metrics"]["loss"] in ("nan", "inf")
    opened = Store(store)
    stream = TileStream(
        opened,
        _sampler(opened),
        batch_size=3,
        tile_size=8,
        noise_shape=(4, 4, 4),
        first_step=6,
    )
    batch = next(iter(stream))
    places = [(opened.scenes[crop.scene].id, crop.y, crop.x) for crop in batch.crops]
    assert [(tile["scene"], tile["y"], tile["x"]) for tile in report["tiles"]] == places
    assert [isinstance(tile["loss"], float) for tile in report["tiles"]] == [True, False, True]
    assert report["tiles"][1]["z_max"] == "inf"
    assert f"{places[1][0]} at ({places[1][1]}, {places[1][2]})" in error
    assert "encoder.conv_in" in report["gradient_norms"]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step=000005"]
    assert "failed" in page(run)
    assert "not finite" in page(run)
    assert json.loads((run / "run.json").read_text())["state"] == "failed"


def _sampler(store):
    from spectralvae.data.loader import make_sampler

    return make_sampler(store, store.indices("train"), seed=0, tile_size=8, max_invalid_fraction=0.5)


def test_run_json(store, train):
    train(n_steps=5)
    code, run = train(n_steps=14)
    assert code == 0
    found = json.loads((run / "run.json").read_text())
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["numpy"] == np.__version__
    assert found["seed"] == 0
    assert found["n_processes"] == len(found["devices"]) == 1
    assert found["store_hash"] == Store(store).hash
    assert [(start["from_step"], start["to_step"]) for start in found["starts"]] == [(0, 5), (5, 14)]
    assert all(start["time"] <= start["ended"] for start in found["starts"])
    losses = {row["step"]: row["val_loss"] for row in rows(run) if "val_loss" in row}
    saved = [int(p.name.partition("=")[2]) for p in (run / "checkpoints").iterdir()]
    best = min((step for step in saved if step in losses), key=losses.__getitem__)
    assert found["best"] == {"step": best, "val_loss": losses[best], "checkpoint": f"checkpoints/step={best:06d}"}


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_best_checkpoint_is_never_thinned_out(train, monkeypatch):
    """Validation that gets worse after step 4, in a run of two starts."""
    from spectralvae.training.validation import Validation

    original, steps = Validation.run, iter((0, 2, 4, 6, 8, 9, 10, 12))

    def run(self, engine):
        found = original(self, engine)
        return found._replace(metrics={**found.metrics, "val_loss": abs(next(steps) - 4.0)})

    monkeypatch.setattr(Validation, "run", run)
    often = {"save_every": 2, "val_every": 2, "keep_last": 1}
    train(n_steps=9, **often)
    _, run = train(n_steps=12, **often)
    assert next(steps, None) is None
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step=000004", "step=000012"]
    assert json.loads((run / "run.json").read_text())["best"]["step"] == 4


def test_git_revision(monkeypatch, tmp_path):
    """Of the sources that run; nothing where they are no part of a repository, be they inside one."""

    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, *arguments], check=True, capture_output=True)

    source = tmp_path / "src" / "record.py"
    source.parent.mkdir()
    source.write_text("1")
    monkeypatch.setattr(record, "__file__", str(source))
    assert record.git_revision() is None
    git("init")
    assert record.git_revision() is None
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "one")
    head = subprocess.run(["git", "-C", tmp_path, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    assert record.git_revision() == head.stdout.strip()
    source.write_text("2")
    assert record.git_revision() == f"{head.stdout.strip()}+changes"
    monkeypatch.setenv("PATH", "")
    assert record.git_revision() is None


def test_config_hash_is_of_the_values():
    assert record.hash_of({"a": 1, "b": {"c": 2}}) == record.hash_of({"b": {"c": 2}, "a": 1})
    assert record.hash_of({"a": 1}) != record.hash_of({"a": 2})


def test_page_is_there_from_the_first_validation_on(train, monkeypatch):
    """And says "running" as soon as a stopped run goes on."""
    from spectralvae.training.watch import Watch

    drawn = []
    monkeypatch.setattr(Watch, "draw", lambda self, step, state: drawn.append((step, state)))
    train(n_steps=3, plot_every=100, save_every=100)
    train(n_steps=6, plot_every=100, save_every=100)
    assert drawn == [(0, "running"), (3, "finished"), (3, "running"), (6, "finished")]


def test_first_batch_that_is_not_finite(store, train, monkeypatch, capsys):
    """Nothing of it is written: NaN is no JSON."""
    original = TileStream._fill

    def fill(self, batch, j):
        crop = original(self, batch, j)
        if j == 1:
            batch.tiles[j] = math.inf
        return crop

    monkeypatch.setattr(TileStream, "_fill", fill)
    code, run = train()
    assert code == 1
    assert (run / "metrics.jsonl").read_text() == ""
    assert json.loads((run / "failures/step=000001.json").read_text())["tiles"][1]["loss"] == "nan"
    assert "not finite, with the tiles" in capsys.readouterr().err


def test_validation_that_is_not_finite_names_the_tiles(train, monkeypatch, capsys):
    from spectralvae.model import AutoencoderKL

    original = AutoencoderKL.loss_of

    def loss_of(self, x, x_hat, posterior, mask=None):
        loss, metrics = original(self, x, x_hat, posterior, mask)
        if not (self.training or x.is_meta) and len(x) == 2:  # the second batch of validation: 5 tiles, 3 at a time
            metrics["loss"] = metrics["loss"] * math.nan
        return loss, metrics

    monkeypatch.setattr(AutoencoderKL, "loss_of", loss_of)
    code, run = train()
    assert code == 1
    error = capsys.readouterr().err
    assert "validation" in error
    assert error.count("v at (") == 2
    assert (run / "metrics.jsonl").read_text() == ""


def test_a_start_elsewhere_is_warned_of(train, monkeypatch, capsys):
    """Another number of threads rounds otherwise; run.json keeps what each start ran on."""
    train(n_steps=3)
    train(n_steps=6)
    assert "round otherwise" not in capsys.readouterr().out
    monkeypatch.setattr(record, "describe_device", lambda _: "there: x86_64 CPU, 77 threads")
    _, run = train(n_steps=9)
    assert "round otherwise" in capsys.readouterr().out
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert [start["devices"] == ["there: x86_64 CPU, 77 threads"] for start in starts] == [False, False, True]
    assert all(start["versions"]["torch"] == torch.__version__ for start in starts)


def test_drawing_takes_no_more_than_its_share(tmp_path, monkeypatch):
    """Of steps of 0.1 s, with drawings that take 1 s each; the last drawing is made in any case."""
    seconds, drawn = [100.0], []

    def slow(*_):
        drawn.append(seconds[0])
        seconds[0] += 1.0

    monkeypatch.setattr(watch_module.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(watch_module.plots, "draw_curves", slow)
    monkeypatch.setattr(Watch, "_write_page", lambda *_: None)
    watch = Watch(tmp_path, 0, n_steps=2000, batch_size=1, facts={}, spikes={})
    for step in range(1901):
        seconds[0] += 0.1
        if step % 50 == 0:
            watch.draw(step, "running" if step < 1900 else "finished")
    watch.log.close()
    # 50 s after the one before began, at the next step that is due
    at = [0, 500, 1000, 1500, 1900]
    assert drawn == pytest.approx([100 + 0.1 * (step + 1) + before for before, step in enumerate(at)])


def test_run_tells_where_its_time_went(train, capsys):
    code, run = train(n_steps=4, val_every=2)
    assert code == 0
    seconds = json.loads((run / "run.json").read_text())["starts"][-1]["seconds"]
    parts = {"waiting for data", "validation", "saving", "drawing"}
    assert seconds.keys() == {"all", *parts}
    assert 0 < sum(seconds[part] for part in parts) < seconds["all"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("time of the loop:")]
    assert all(part in line for part in parts)
