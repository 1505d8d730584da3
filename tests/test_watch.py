"""What a run shows of itself: events, validation by channel, the page, run.json, the report of a failure."""

import json
import math
import shutil
import subprocess
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import pytest
import torch
from browsing import Reader
from running import record, rows

from spectralvae.data.loader import make_sampler
from spectralvae.data.store import Store, scene_folder, shard_file
from spectralvae.errors import RunError
from spectralvae.training import record as run_record
from spectralvae.training import watch as watch_module
from spectralvae.training.spikes import LEARNING
from spectralvae.training.watch import Watch


@pytest.fixture
def store(tmp_path, make_store):
    return write_store(tmp_path / "store", make_store)


def write_store(path, make_store, size=24, val=("v",)):
    """Three scenes of 6 channels: one has no valid sample at all, some of the others' are invalid."""
    random = np.random.default_rng(5)
    scenes = {name: random.normal(size=(size, size, 6)) for name in ("a", "b", "v")}
    for z in scenes.values():
        z[random.random(z.shape) < 0.2] = np.nan
        z[..., 4] = np.nan
    return make_store(path, scenes, val=val).path


def plant(path, step, value, n_steps):
    """Set a sample that a run of so many steps sees once, in the second tile of a step; returns where its tiles lie."""
    store, first = Store(path), 3 * (step - 1)
    sampler = make_sampler(store, store.indices("train"), seed=0, tile_size=8, max_invalid_fraction=0.5)
    seen = np.zeros((len(store.scenes), *store.scenes[0].shape[:2]), int)
    crops = [sampler.crop(i) for i in range(3 * n_steps)]
    for crop in crops:
        seen[crop.scene, crop.y : crop.y + 8, crop.x : crop.x + 8] += 1
    scene, y, x = (getattr(crops[first + 1], key) for key in ("scene", "y", "x"))
    name = store.scenes[scene].id
    z = np.memmap(shard_file(scene_folder(path, name)), np.float16, "r+", shape=tuple(store.scenes[scene].shape))
    tile = z[y : y + 8, x : x + 8, 0]
    tile[tuple(np.argwhere((seen[scene, y : y + 8, x : x + 8] == 1) & np.isfinite(tile))[0])] = value
    return [(store.scenes[crop.scene].id, crop.y, crop.x) for crop in crops[first : first + 3]]


def test_a_spike_is_noted_once(train, make_store, tmp_path, capsys):
    """At a step that is not logged; also by a run that was interrupted before it, and after it."""
    step = LEARNING + 3
    large = write_store(tmp_path / "large", make_store, size=80)
    plant(large, step, 3e4, step + 3)
    often = {"save_every": 1000, "val_every": 1000, "log_every": 5, "plot_every": 1000}
    often["data"] = {"store": str(large)}
    _, whole = train("whole", n_steps=step + 3, **often)
    warned = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    events = [json.loads(line) for line in (whole / "events.jsonl").read_text().splitlines()]
    assert {(event["step"], event["kind"]) for event in events} == {(step, "spike")}
    assert len(warned) == len(events)
    assert all(f"step {step}" in line and event["text"] in line for line, event in zip(warned, events, strict=True))
    for end in (step - 1, step + 1, step + 3):
        _, run = train("parts", n_steps=end, **often)
    assert (run / "events.jsonl").read_bytes() == (whole / "events.jsonl").read_bytes()


def test_the_page_of_a_run_that_fails(tmp_path):
    """Spikes, errors to compare with, and why it failed."""
    watch = Watch(tmp_path, 0, n_steps=500, batch_size=2, grad_clip=0.5, facts={}, spikes={})
    watch.keep_baselines({"pca_1": 0.25})
    for step in range(LEARNING + 10):
        metrics = dict.fromkeys(("loss", "grad_norm", "pixel_mse", "kl_loss"), 1.0 + step % 2)
        metrics["grad_norm"] *= 1e4 if step == LEARNING + 5 else 1
        spikes = watch.note_spikes(step, metrics)
        assert bool(spikes) == (step == LEARNING + 5)
        watch.log.log({"step": step, **metrics}, 1.0)
    watch.draw(step, "running")
    page = Reader(tmp_path / "summary/index.html")
    assert page.data["state"] == "running"
    assert [spike["step"] for spike in page.charts["loss"]["spikes"]] == [LEARNING + 5]
    for chart, value in (("pixel_mse", 0.25), ("grad_norm", 0.5)):
        assert [reference["value"] for reference in page.charts[chart]["references"]] == [value]
    watch.failed(step, RunError("no more", path="/disk"))
    watch.log.close()
    assert Reader(tmp_path / "summary/index.html").data["state"] == "failed"
    assert (tmp_path / "summary/index.html").read_text().count("/disk: no more") == 2  # above, and among the events


def test_report_of_a_step_that_is_not_finite(store, train, capsys):
    """One sample of one tile is infinite: the report names the tile, and nothing is saved."""
    train(n_steps=5)
    places = plant(store, 7, math.inf, 7)
    capsys.readouterr()
    code, run = train(n_steps=14)
    assert code == 1
    report_path = run / "failures/step=000007.json"
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(report_path) in error
    report = json.loads(report_path.read_text())
    assert (report["step"], report["learning_rate"]) == (7, 2e-3)
    assert report["metrics"]["loss"] in ("nan", "inf")
    assert [(tile["scene"], tile["y"], tile["x"]) for tile in report["tiles"]] == places
    assert [isinstance(tile["loss"], float) for tile in report["tiles"]] == [True, False, True]
    assert report["tiles"][1]["z_max"] == "inf"
    assert f"{places[1][0]} at ({places[1][1]}, {places[1][2]})" in error
    assert "encoder.conv_in" in report["gradient_norms"]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step=000005"]
    page = Reader(run / "summary/index.html")
    assert record(run)["state"] == page.data["state"] == "failed"
    assert page.charts["grad_norm"]["references"][0]["value"] == 1.0  # training.grad_clip of the config
    assert str(report_path) in (run / "summary/index.html").read_text()


def test_first_batch_that_is_not_finite(train, make_store, tmp_path):
    """Nothing of it is written: NaN is no JSON."""
    store = write_store(tmp_path / "training", make_store, val=())
    plant(store, 1, math.inf, 1)
    code, run = train(data={"store": str(store)})
    assert code == 1
    assert (run / "metrics.jsonl").read_text() == ""
    assert json.loads((run / "failures/step=000001.json").read_text())["tiles"][1]["loss"] == "nan"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the errors to compare with
def test_validation_that_is_not_finite_names_the_tiles(store, train, capsys):
    """Those of the batch: 5 tiles, 3 at a time."""
    z = np.memmap(shard_file(scene_folder(store, "v")), np.float16, "r+", shape=(24, 24, 6))
    z[23, 23, :4] = math.inf
    code, run = train(data={"n_val_tiles": 9})
    assert code == 1
    error = capsys.readouterr().err
    assert str(store) in error
    assert error.count("v at (") == 3
    assert "v at (16, 16)" in error
    assert (run / "metrics.jsonl").read_text() == ""


def test_run_json(store, train, capsys):
    """What each of three starts ran on, and where its time went; other threads round otherwise, which is warned of."""
    n_threads = torch.get_num_threads()
    train(n_steps=3)
    train(n_steps=5)
    assert "WARNING" not in capsys.readouterr().out
    torch.set_num_threads(n_threads + 1)
    try:
        code, run = train(n_steps=7)
    finally:
        torch.set_num_threads(n_threads)
    out = capsys.readouterr().out
    assert code == 0
    (warning,) = [line for line in out.splitlines() if "WARNING" in line]
    assert f"{n_threads + 1} threads" in warning
    found = record(run)
    starts = found["starts"]
    assert (found["versions"]["torch"], found["versions"]["numpy"]) == (torch.__version__, np.__version__)
    assert (found["seed"], found["n_processes"], found["store_hash"]) == (0, 1, Store(store).hash)
    assert [(start["from_step"], start["to_step"]) for start in starts] == [(0, 3), (3, 5), (5, 7)]
    assert [f"{n_threads + 1} threads" in start["devices"][0] for start in starts] == [False, False, True]
    parts = {"waiting for data", "validation", "saving", "drawing"}
    assert starts[-1]["seconds"].keys() == {"all", *parts}
    assert 0 < sum(starts[-1]["seconds"][part] for part in parts) < starts[-1]["seconds"]["all"]
    assert any(all(part in line for part in parts) for line in out.splitlines())


def test_the_best_checkpoint_is_never_thinned_out(train, make_store, tmp_path):
    """What is learned from the training scenes makes the validation worse from the start; a run of two starts."""
    scenes = {name: np.full((24, 24, 6), value) for name, value in (("a", 1.0), ("v", -1.0))}
    data = {"store": str(make_store(tmp_path / "opposite", scenes, val=("v",)).path)}
    often = {"save_every": 2, "val_every": 2, "keep_last": 1, "data": data}
    train(n_steps=9, **often)
    _, run = train(n_steps=12, **often)
    losses = {row["step"]: row["val_loss"] for row in rows(run) if "val_loss" in row and row["step"]}
    assert min(losses, key=losses.__getitem__) == 2
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step=000002", "step=000012"]
    assert record(run)["best"] == {"step": 2, "val_loss": losses[2], "checkpoint": "checkpoints/step=000002"}


def test_git_revision(monkeypatch, tmp_path):
    """Of the sources that run; nothing where they are no part of a repository, be they inside one."""

    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    source = tmp_path / "src" / "record.py"
    source.parent.mkdir()
    shutil.copy(run_record.__file__, source)
    spec = spec_from_file_location("record", source)
    copy = module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert copy.git_revision() is None
    git("init")
    assert copy.git_revision() is None
    git("add", ".")
    git("commit", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert copy.git_revision() == head
    source.write_text("2")
    assert copy.git_revision() == f"{head}+changes"
    monkeypatch.setenv("PATH", "")
    assert copy.git_revision() is None


def test_page_is_there_from_the_first_validation_on(train, monkeypatch):
    """And says "running" as soon as a stopped run goes on."""
    drawn = []
    monkeypatch.setattr(Watch, "draw", lambda self, step, state: drawn.append((step, state)))
    for n_steps in (3, 6):
        train(n_steps=n_steps, plot_every=100, save_every=100)
    assert drawn == [(0, "running"), (3, "finished"), (3, "running"), (6, "finished")]


def test_drawing_takes_no_more_than_its_share(tmp_path, monkeypatch):
    """Of steps of 0.1 s, with drawings that take 1 s each; the last drawing is made in any case."""
    seconds, drawn = [100.0], []

    def slow(*_):
        drawn.append(seconds[0])
        seconds[0] += 1.0

    monkeypatch.setattr(watch_module.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(watch_module.plots, "draw_curves", slow)
    watch = Watch(tmp_path, 0, n_steps=2000, batch_size=1, grad_clip=1.0, facts={}, spikes={})
    for step in range(1901):
        seconds[0] += 0.1
        if step % 50 == 0:
            watch.draw(step, "running" if step < 1900 else "finished")
    watch.log.close()
    # 50 s after the one before began, at the next step that is due
    at = [0, 500, 1000, 1500, 1900]
    assert drawn == pytest.approx([100 + 0.1 * (step + 1) + before for before, step in enumerate(at)])
