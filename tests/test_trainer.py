"""The training run: what it writes, that it goes on exactly, and that it stops when it should."""

import hashlib
import json
import os
import select
import shutil
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import yaml
import zarr
from running import write_config
from safetensors.torch import load_file

from spectralvae import load_model
from spectralvae.cli import run as cli
from spectralvae.config import TrainConfig
from spectralvae.data import sampling
from spectralvae.data.cache import SceneCache
from spectralvae.data.loader import make_sampler, read_crops
from spectralvae.data.store import REQUIRED_ARRAYS, Store
from spectralvae.data.store_writer import finish_store
from spectralvae.errors import ConfigError, RunError
from spectralvae.model import AutoencoderKL
from spectralvae.runtime import device
from spectralvae.training import record, trainer
from spectralvae.training.engine import Engine
from spectralvae.training.trainer import Trainer
from spectralvae.training.validation import Validation
from spectralvae.weights.artifact import read_artifact, verify, weights_sha256, write_folder
from spectralvae.weights.provenance import Scenes

N_STEPS = 14  # of `train`


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A small store of three simulated granules."""
    folder = tmp_path_factory.mktemp("data")
    simulate = {"output_dir": str(folder / "granules"), "seed": 3, "n_granules": 3, "shape": [24, 40], "n_channels": 24}
    prepare = {"output_dir": str(folder / "store"), "inputs": [str(folder / "granules/TEMPO_RAD_L1_*.nc")]}
    for command, config in (("simulate", {**simulate, "products": []}), ("prepare", prepare)):
        path = folder / f"{command}.yaml"
        path.write_text(yaml.safe_dump(config))
        assert cli([command, str(path)]) == 0
    return folder / "store"


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def final_bytes(run, step=N_STEPS):
    """What must be byte-equal: weights, optimizer, random states, metrics."""
    folder = run / "checkpoints" / f"step={step:06d}"
    names = ("model.safetensors", "optimizer.safetensors", "trainer.json", "manifest.json")
    return {name: (folder / name).read_bytes() for name in names} | {"metrics": (run / "metrics.jsonl").read_bytes()}


def newest(run):
    return sorted((run / "checkpoints").iterdir())[-1]


def rewritten(run, name, change):
    """Change a JSON file of the newest checkpoint; the manifest fits."""
    folder = newest(run)
    files = dict(verify(folder))
    content = json.loads(files[name])
    change(content)
    shutil.rmtree(folder)
    write_folder(folder, {**files, name: json.dumps(content).encode()})


def at_step(monkeypatch, step, action):
    """Call ``action`` once, right before update number ``step``."""
    original = Trainer._advance
    done = []

    def advance(self, batch, signals):
        if self.step + 1 == step and not done:
            done.append(step)
            action()
        return original(self, batch, signals)

    monkeypatch.setattr(Trainer, "_advance", advance)


@pytest.mark.pictures
def test_run_leaves_what_the_contract_says(train, capsys):
    code, run = train()
    assert code == 0
    metrics = rows(run)
    assert [row["step"] for row in metrics] == [0, 2, 4, 5, 6, 8, 10, 12, 14]
    validated = [row["step"] for row in metrics if "val_loss" in row]
    assert validated == [0, 4, 5, 8, 10, 12, 14]  # with every checkpoint, too
    keys = {"step", "loss", "nll_loss", "kl_loss", "pixel_mse"}
    for row in metrics:
        expected = keys | ({f"val_{key}" for key in keys - {"step"}} if row["step"] in validated else set())
        assert set(row) == expected | ({"grad_norm"} if row["step"] else set())
    for name in ("config.yaml", "run.json", "timing.jsonl", "baselines.json", "summary/loss.png", "summary/index.html"):
        assert (run / name).is_file()
    for name in ("summary/recons_err.png", "summary/kl.png", "figures/reconstructions_step=000005.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [f"step={s:06d}" for s in (5, 10, 14)]
    assert list((run / "tensorboard").glob("events*"))
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
    printed = capsys.readouterr().out
    for words in (
        "parameters: ",
        "device: cpu",
        "first batch: 3 tiles",
        "output directory: ",
        "first step: peak memory",
    ):
        assert words in printed
    check_tensorboard(run)


def check_tensorboard(run):
    """It has the same scalars, and the pictures."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    values = {event.step: event.value for event in events.Scalars("val/pixel_mse")}
    expected = {row["step"]: row["val_pixel_mse"] for row in rows(run) if "val_pixel_mse" in row}
    assert values == pytest.approx(expected, rel=1e-6)
    assert [event.step for event in events.Images("reconstructions")] == [5, 10, 14]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_stopped_run_goes_on_exactly(train, monkeypatch, number, code):
    """With dropout, so that torch's random state matters too."""
    _, whole = train("whole", model={"dropout_prob": 0.2})
    at_step(monkeypatch, 7, lambda: signal.raise_signal(number))
    stopped, run = train("stopped", model={"dropout_prob": 0.2})
    assert stopped == code
    assert json.loads((run / "run.json").read_text())["state"] == "stopped"
    assert (run / "checkpoints/step=000007").is_dir()
    assert train("stopped", model={"dropout_prob": 0.2})[0] == 0
    assert final_bytes(run) == final_bytes(whole)


@pytest.mark.parametrize("step", [5, 8, 10])
def test_stopped_where_it_would_have_validated(train, monkeypatch, step):
    """At a checkpoint of its own (5, 10) or at a validation (8) a signal changes nothing: rows and files are those of
    a run that was not stopped, at once."""
    _, whole = train("whole")
    at_step(monkeypatch, step, lambda: signal.raise_signal(signal.SIGTERM))
    assert train("stopped")[0] == 75
    run = whole.with_name("stopped")
    assert rows(run)[-1]["step"] == step
    assert "val_loss" in rows(run)[-1]
    stopped = read_artifact(run / f"checkpoints/step={step:06d}")[0]
    assert stopped.latents is not None
    if step != 8:
        names = [path.name for path in (whole / f"checkpoints/step={step:06d}").iterdir()]
        for name in names:
            pair = [(folder / f"checkpoints/step={step:06d}" / name).read_bytes() for folder in (run, whole)]
            assert pair[0] == pair[1], name
    assert train("stopped")[0] == 0
    assert final_bytes(run) == final_bytes(whole)


def test_a_signal_does_not_wait_for_a_validation(train, monkeypatch):
    """Its checkpoint says that it has none; the next one has."""
    validated = []
    original = Validation.run
    monkeypatch.setattr(Validation, "run", lambda self, engine: validated.append(0) or original(self, engine))
    at_step(monkeypatch, 7, lambda: signal.raise_signal(signal.SIGTERM))
    code, run = train()
    assert code == 75
    assert len(validated) == 3  # 0, 4, 5
    assert "val_loss" not in rows(run)[-1]
    stopped = read_artifact(run / "checkpoints/step=000007")[0]
    assert (stopped.latents, stopped.provenance.metrics, stopped.provenance.n_val_tiles) == (None, None, 5)
    assert json.loads((run / "run.json").read_text())["best"]["step"] == 5
    assert train()[0] == 0
    assert read_artifact(run / "checkpoints/step=000010")[0].latents.n_tiles == 5


def test_checkpoint_says_where_it_comes_from(train, store):
    """Against the granules' names, the store's table and the run's own files."""
    _, run = train(data={"max_scenes": 1, "n_val_tiles": 3})
    found = read_artifact(run / "checkpoints/step=000010")[0]
    provenance, opened = found.provenance, Store(store)
    assert (provenance.store, provenance.store_hash) == ("store", opened.hash)
    scans = {
        split: [record.source.split("_")[4] for record in opened.scenes if record.split == split]
        for split in ("train", "val")
    }
    assert (len(scans["train"]), len(scans["val"])) == (2, 1)
    for scenes, (scan,) in ((provenance.training, scans["train"][:1]), (provenance.validation, scans["val"])):
        day, time = scan.rstrip("Z").split("T")
        assert (scenes.n_scenes, scenes.n_sources, scenes.versions) == (1, 1, ["V03"])
        assert scenes.first == scenes.last
        assert scenes.first[:19].replace("-", "").replace(":", "") == f"{day}T{time}"
    row = next(row for row in rows(run) if row["step"] == 10)
    assert provenance.metrics == {key: value for key, value in row.items() if key.startswith("val_")}
    assert provenance.baselines == json.loads((run / "baselines.json").read_text())
    assert (provenance.tile_size, provenance.batch_size, provenance.seed, provenance.n_val_tiles) == (8, 3, 0, 3)
    assert (provenance.initial_weights, found.latents.n_tiles) == (None, 3)


def test_times_and_sources_of_many_scenes(make_store, tmp_path):
    """Two regions of one file are two scenes of one source; scenes without a time don't count for the range."""
    z = np.zeros((8, 8, 3)) + np.arange(3)
    store = make_store(tmp_path / "store", dict.fromkeys("abcde", z), val=("e",))
    times = ["2024-06-03T18:00:00+00:00", "2024-06-01T18:00:00+00:00", None, "2024-06-02T18:00:00+00:00", None]
    sources = ["one.nc", "two.nc", "two.nc", "two.nc", "three.nc"]
    digests = ["1", "2", "2", "3", "4"]  # two files may have one name
    facts = zip(times, sources, digests, ["V03", None, "V04", "V03", None], strict=True)
    store.scenes = [
        replace(record, time=time, source=source, sha256=digest, version=version)
        for record, (time, source, digest, version) in zip(store.scenes, facts, strict=True)
    ]
    config = TrainConfig.model_validate({"output_dir": "out", "data": {"store": str(store.path)}})
    found = record.provenance(
        config,
        store,
        store.indices("train"),
        initial_weights=None,
        ancestors=None,
        n_val_tiles=0,
        metrics=None,
        baselines=None,
    )
    assert found.training == Scenes(4, 3, times[1], times[0], ["V03", "V04"], ["1", "2", "2", "3"])
    assert found.validation == Scenes(1, 1, None, None, [], ["4"])


def test_old_checkpoint_goes_on(train):
    """Of a version that wrote nothing of latents and provenance, with init_from: what it began with is unknown."""
    _, source = train("source", n_steps=3)
    changes = {"init_from": str(source), "n_steps": 8}
    _, whole = train("whole", **changes)
    _, run = train("old", **(changes | {"n_steps": 5}))
    assert {row["step"]: row.get("val_loss") for row in rows(run)} == {
        row["step"]: row.get("val_loss") for row in rows(whole) if row["step"] <= 5
    }
    folder = run / "checkpoints/step=000005"
    files = dict(verify(folder))
    config = json.loads(files["config.json"])
    del config["latents"], config["provenance"]
    shutil.rmtree(folder)
    write_folder(folder, {**files, "config.json": json.dumps(config).encode()})
    run_json = json.loads((run / "run.json").read_text())
    began, ancestors = run_json.pop("initial_weights"), run_json.pop("ancestors")
    assert began == weights_sha256(load_model(source))
    (run / "run.json").write_text(json.dumps(run_json))
    assert train("old", **changes)[0] == 0
    found, expected = (read_artifact(folder / "checkpoints/step=000008")[0] for folder in (run, whole))
    assert weights_sha256(found.model) == weights_sha256(expected.model)
    assert expected.provenance.initial_weights == began
    assert ancestors == expected.provenance.ancestors == read_artifact(newest(source))[0].provenance.training.identities
    assert found.provenance == replace(expected.provenance, initial_weights="unknown", ancestors=None)
    np.testing.assert_array_equal(found.latents.std, expected.latents.std)


@pytest.mark.parametrize("n_steps", [5, 8])
def test_run_of_before_some_keys_goes_on(train, capsys, n_steps):
    """One that is finished says so; one that is to have more steps has them."""
    _, run = train(n_steps=5)
    record = json.loads((run / "run.json").read_text())
    for key in ("warmup_steps", "decay_steps"):
        del record["config"]["optimizer"][key]
    del record["config"]["supervision"]
    (run / "run.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert train(n_steps=n_steps)[0] == 0
    assert ("finished; nothing to do" in capsys.readouterr().out) == (n_steps == 5)
    found = json.loads((run / "run.json").read_text())
    assert len(found["starts"]) == (1 if n_steps == 5 else 2)
    if n_steps == 8:
        assert found["starts"][-1]["changed"] == {"training.n_steps": [5, 8]}
        assert rows(run)[-1]["step"] == 8


@pytest.mark.parametrize(
    ("change", "warned"),
    [
        (lambda state: None, False),
        (lambda state: state.pop("validation_tiles"), True),
        (lambda state: state.update(validation_tiles="0" * 16), True),
    ],
)
def test_other_validation_tiles_are_warned_of_once(train, capsys, change, warned):
    _, run = train(n_steps=5)
    rewritten(run, "trainer.json", change)
    for first, n_steps in ((True, 8), (False, 10)):
        capsys.readouterr()
        assert train(n_steps=n_steps)[0] == 0
        told = " ".join(capsys.readouterr().out.split())
        assert told.count("val_* before and after are not comparable, nor is `best`") == (warned and first)


def test_digest_of_tiles():
    """Depends on each place and on their order, on nothing else."""
    crops = [sampling.Crop(0, 8, 16), sampling.Crop(1, 0, 0)]
    expected = hashlib.sha256(b"[[0, 8, 16], [1, 0, 0]]").hexdigest()
    assert expected.startswith(record.tiles_digest(crops))
    others = [crops[::-1], crops[:1], [sampling.Crop(0, 8, 17), crops[1]], [sampling.Crop(2, 8, 16), crops[1]]]
    assert len({record.tiles_digest(c) for c in [crops, *others]}) == 5


def test_ancestors(train, make_store, tmp_path, monkeypatch):
    """Scenes of all earlier weights, through three runs and a resume; unknown from where one does not know."""

    def other_store(name, digest, val):
        z = np.random.default_rng(0).normal(size=(16, 16, 24))
        opened = make_store(tmp_path / name, {"a": z, "b": z}, val=(val,))
        path = opened.path
        records = [replace(r, sha256=f"{digest}{r.id}") for r in opened.scenes]
        arrays = {key: np.zeros(24) for key in REQUIRED_ARRAYS if key not in opened.normalization.arrays()}
        copied = tmp_path / f"{name}_named"
        shutil.copytree(path / "scenes", copied / "scenes")
        finish_store(copied, records, opened.normalization, arrays, "float16")
        return {"store": str(copied)}

    def provenance(run):
        return read_artifact(newest(run))[0].provenance

    one, two, three = other_store("one", "1", "b"), other_store("two", "2", "b"), other_store("three", "3", "a")
    _, first = train("first", n_steps=2, data=one)
    assert provenance(first).ancestors == []
    _, second = train("second", n_steps=2, data=two, init_from=str(first))
    assert provenance(second).ancestors == ["1a"]
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    options = {"n_steps": 4, "data": three, "init_from": str(second)}
    assert train("third", **options)[0] == 75
    assert provenance(tmp_path / "third").ancestors == ["1a", "2a"]
    shutil.rmtree(second)
    code, third = train("third", **{**options, "init_from": str(tmp_path / "second")})
    assert code == 0
    assert (provenance(third).ancestors, provenance(third).training.identities) == (["1a", "2a"], ["3b"])
    rewritten(third, "config.json", lambda config: config["provenance"].pop("ancestors"))
    _, fourth = train("fourth", n_steps=2, data=one, init_from=str(third))
    assert provenance(fourth).ancestors is None
    rewritten(first, "config.json", lambda config: config["provenance"].pop("ancestors"))  # it began at random
    _, fifth = train("fifth", n_steps=2, data=two, init_from=str(first))
    assert provenance(fifth).ancestors == ["1a"]


def test_killed_run_goes_on_exactly(starter, store, tmp_path):
    """SIGKILL at step 8: steps 6 to 8 are done again from checkpoint 5, and their rows are not written twice."""
    (config, whole), (cut, run) = (write_config(tmp_path, name, store) for name in ("whole", "killed"))
    assert starter.train(config).wait() == 0
    assert starter.train(cut, ("at_update", 9, signal.SIGKILL)).wait() == -signal.SIGKILL
    assert rows(run)[-1]["step"] == 8
    assert json.loads((run / "run.json").read_text())["state"] == "running"
    assert starter.train(cut).wait() == 0
    assert final_bytes(run) == final_bytes(whole)
    assert [p.name for p in sorted((run / "figures").iterdir())] == [
        p.name for p in sorted((whole / "figures").iterdir())
    ]


def test_readers_and_validation_do_not_change_the_run(train):
    """Dropout draws from the global random state: validating more often must not move it."""
    model = {"dropout_prob": 0.2}
    _, a = train("a", model=model, data={"num_workers": 0}, val_every=2)
    _, b = train("b", model=model, data={"num_workers": 3}, val_every=14)
    weights = [load_file(run / f"checkpoints/step={N_STEPS:06d}/model.safetensors") for run in (a, b)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    last = [rows(run)[-1] for run in (a, b)]
    assert last[0] == last[1]


def test_longer_run_extends_a_finished_one(train):
    _, run = train()
    code, run = train(n_steps=N_STEPS + 3, plot_every=3)
    assert code == 0
    assert rows(run)[-1]["step"] == N_STEPS + 3
    changed = json.loads((run / "run.json").read_text())["starts"][-1]["changed"]
    assert changed == {"training.n_steps": [14, 17], "training.plot_every": [7, 3]}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_scenes_that_are_kept_do_not_change_the_run(train, store, monkeypatch, capsys, num_workers):
    batches: list[tuple[int, ...]] = []  # of tiles that are read for validation, by where they are
    read_tiles = Validation._read

    def spy(self, crops):
        batches.append(tuple((c.scene, c.y, c.x) for c in crops))
        return read_tiles(self, crops)

    monkeypatch.setattr(Validation, "_read", spy)
    _, whole = train("whole")
    often = {batch for batch in batches if batches.count(batch) > 3}
    assert often  # read anew for every validation
    batches.clear()
    read, made = SceneCache.read, []
    monkeypatch.setattr(SceneCache, "read", lambda self, crop, out: (made.append(crop), read(self, crop, out)))
    code, kept = train("kept", data={"cache": True, "num_workers": num_workers})
    assert code == 0
    assert len(made) >= 3 * (N_STEPS + 1)  # the first batch is looked at before
    n_bytes = sum(2 * np.prod(scene.shape) for scene in Store(store).scenes if scene.split == "train")
    assert {batches.count(batch) for batch in often} == {1}
    assert f"data.cache: 2 scenes, {n_bytes / 1e9:.3g} GB, are kept on cpu" in capsys.readouterr().out
    assert final_bytes(kept) == final_bytes(whole)


@pytest.mark.parametrize("first", [False, True])
def test_whether_scenes_are_kept_may_change(train, first):
    _, whole = train("whole")
    train("run", n_steps=5, data={"cache": first})
    code, run = train("run", data={"cache": not first})
    assert code == 0
    changed = json.loads((run / "run.json").read_text())["starts"][-1]["changed"]
    assert changed["data.cache"] == [first, not first]
    assert final_bytes(run) == final_bytes(whole)


def test_scenes_that_do_not_fit_are_refused_first(train, store, monkeypatch, capsys):
    """`max_scenes` of them may."""
    sizes = [2 * int(np.prod(s.shape)) for s in Store(store).scenes if s.split == "train"]
    free = (sizes[0] + (4 * 4 * 3 + 4 * 5) * 24 * 8 * 8) / 0.9 + 10  # a batch of 3, 5 validation tiles
    assert len(sizes) == 2
    monkeypatch.setattr(device, "available_memory", lambda _: int(free))
    assert train()[0] == 0
    capsys.readouterr()
    code, run = train("kept", data={"cache": True})
    assert code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for words in ("data.cache: 2 training scenes need", f"{sum(sizes) / 1e9:.3g} GB", f"{free / 1e9:.3g} GB are free"):
        assert words in error
    assert "at most 1 fit (data.max_scenes)" in error
    assert not run.exists()
    assert train("kept", data={"cache": True, "max_scenes": 1})[0] == 0


def test_scenes_fit_once_for_each_process_that_shares_the_memory(monkeypatch):
    """9 of 10 bytes for two scenes of 4; each process on a GPU has one of its own."""
    shape, batch = (1, 1, 1), 0
    monkeypatch.setattr(device, "available_memory", lambda _: 10)
    for name, n_processes, fits in (("cpu", 1, True), ("cpu", 2, False), ("cuda", 2, True)):
        check = partial(device.check_cache, [4, 4], batch, shape, torch.device(name), n_processes)
        if fits:
            check()
        else:
            with pytest.raises(ConfigError, match=r"need 1\.6e-08 GB in 2 processes, .*at most 1 fit"):
                check()
    with pytest.raises(ConfigError, match=r"2 training scenes need 1e-08 GB, .*at most 1 fit"):
        device.check_cache([8, 2], batch, shape, torch.device("cuda"), 1)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_finite_stops_before_the_update(train, monkeypatch, capsys, where):
    seen = {"updates": 0}
    original = AutoencoderKL.get_loss

    def get_loss(self, x, mask=None, noise=None):
        loss, metrics = original(self, x, mask, noise)
        if x.is_meta:  # the check before the run
            return loss, metrics
        if self.training and seen["updates"] == 6:
            seen["weights"] = {key: value.clone() for key, value in self.state_dict().items()}
            seen["model"] = self
            # sqrt has a finite value and an infinite slope at 0
            zero = self.logvar - self.logvar.detach()
            loss = loss * float("nan") if where == "loss" else loss + zero.sqrt()
        seen["updates"] += self.training
        return loss, metrics

    monkeypatch.setattr(AutoencoderKL, "get_loss", get_loss)
    code, run = train()
    assert code == 1
    assert all(torch.equal(value, seen["weights"][key]) for key, value in seen["model"].state_dict().items())
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step 7" in message
    assert "not finite" in message
    assert "the loss of each tile alone is" in message  # without the plant
    report = json.loads((run / "failures/step=000007.json").read_text())
    assert ["TEMPO_RAD_L1" in tile["scene"] for tile in report["tiles"]] == [True] * 3
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step=000005"]
    assert json.loads((run / "run.json").read_text())["state"] == "failed"


def test_report_of_a_failure_has_the_learning_rate_of_its_step(train, monkeypatch):
    """Step 7 of a warm-up of 20."""
    original = Engine.gradients

    def gradients(self, batch):
        return original(self, batch) * (np.nan if batch.step == 6 else 1.0)

    monkeypatch.setattr(Engine, "gradients", gradients)
    code, run = train(optimizer={"lr": 2e-3, "warmup_steps": 20})
    assert code == 1
    report = json.loads((run / "failures/step=000007.json").read_text())
    assert report["learning_rate"] == pytest.approx(2e-3 * 7 / 20)


def test_validation_by_hand(tmp_path, make_store, train):
    """Half of the samples are invalid, in any pattern: the numbers in metrics.jsonl against the definition.

    What stands at an invalid sample must not matter, every valid one counts the same, and each tile has its noise.
    """
    random = np.random.default_rng(0)
    scenes = {name: random.normal(size=(19, 16, 6)) for name in ("a", "b", "v")}
    for z in scenes.values():
        z[random.random(z.shape) < 0.4] = np.nan
        z[:, :2] = np.nan
        z[..., 4] = np.nan
    scenes["v"][:8] = np.where(random.random((8, 16, 6)) < 0.5, np.nan, scenes["v"][:8])
    make_store(tmp_path / "store", scenes, val=("v",))
    data = {"store": str(tmp_path / "store"), "n_val_tiles": 50, "max_invalid_fraction": 0.9, "batch_size": 2}
    code, run = train(data=data, model={"kl_weight": 0.01})
    assert code == 0
    model = load_model(run)
    v = zarr.open_array(tmp_path / "store/scenes/v/z", mode="r")[:].astype(np.float32)
    loss = nll = squares = n_valid = 0.0
    places = [(y, x) for y in (0, 8, 11) for x in (0, 8)]
    for i, (y, x) in enumerate(places):
        tile = torch.from_numpy(v[y : y + 8, x : x + 8]).permute(2, 0, 1)[None]
        valid = torch.isfinite(tile)
        noise = torch.from_numpy(sampling.noise(0, sampling.VALIDATION_NOISE, i, (4, 4, 4)))[None]
        with torch.no_grad():
            posterior = model.encode(torch.where(valid, tile, 0.0))
            x_hat = model.decode(posterior.mean + posterior.std * noise)
            rec = (tile - x_hat)[valid]
            tile_nll = float((rec.abs() / model.logvar.exp() + model.logvar).sum())
            kl = 0.5 * float((posterior.mean**2 + posterior.var - 1 - posterior.logvar).sum())
        nll += tile_nll
        loss += tile_nll + 0.01 * kl
        squares += float((rec**2).sum())
        n_valid += int(valid.sum())
    last = rows(run)[-1]
    assert last["val_nll_loss"] == pytest.approx(nll / len(places), rel=1e-5)
    assert last["val_loss"] == pytest.approx(loss / len(places), rel=1e-5)
    assert last["val_pixel_mse"] == pytest.approx(squares / n_valid, rel=1e-5)
    baselines = json.loads((run / "baselines.json").read_text())
    tiles = np.concatenate([v[y : y + 8, x : x + 8].ravel() for y, x in places])
    assert baselines["mean"] == pytest.approx(np.nanmean(tiles.astype(np.float64) ** 2), rel=1e-6)


def test_training_loss_by_hand(tmp_path, make_store, train):
    """Step 0 shows the untrained network on the first batch: its output is 0, so the errors are the data's own."""
    z = np.random.default_rng(1).normal(size=(12, 12, 6))
    z[::2, :, ::3] = np.nan
    make_store(tmp_path / "store", {"a": z})
    code, run = train(data={"store": str(tmp_path / "store"), "max_invalid_fraction": 0.9})
    assert code == 0
    store = Store(tmp_path / "store")
    sampler = make_sampler(store, [0], seed=0, tile_size=8, max_invalid_fraction=0.9)
    batch = read_crops(store, [sampler.crop(i) for i in range(3)], 8).numpy().astype(np.float64)
    first = rows(run)[0]
    assert first["pixel_mse"] == pytest.approx(np.nanmean(batch**2), rel=1e-6)
    assert first["nll_loss"] == pytest.approx(np.nansum(np.abs(batch)) / 3, rel=1e-6)


def test_gradients_are_clipped(train, monkeypatch):
    norms = []
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(grad_clip=0.5)
    assert max(norms) <= 0.5 * (1 + 1e-5)
    assert max(norms) > 0.49


def test_moved_store_goes_on_and_another_is_refused(train, store, tmp_path, make_store, capsys):
    train(n_steps=5)
    shutil.copytree(store, tmp_path / "moved")
    assert train(n_steps=7, data={"store": str(tmp_path / "moved")})[0] == 0
    other = {name: np.zeros((24, 40, 24)) + np.arange(24) for name in ("a", "v")}
    make_store(tmp_path / "other", other, val=("v",))
    code, run = train(n_steps=9, data={"store": str(tmp_path / "other")})
    assert code == 2
    assert "its hash differs" in capsys.readouterr().err
    assert rows(run)[-1]["step"] == 7


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ({"conv_padding_mode": "reflect", "conv_kernel_size": 5}, {"tile_size": 4}),
        ({"chs": [8, 8], "mid_attn": False}, {"tile_size": 2, "batch_size": 1}),
    ],
)
def test_network_that_cannot_take_the_tiles_is_refused_first(train, tmp_path, capsys, model, data):
    code, run = train(model=model, data=data)
    assert code == 2
    assert "data.tile_size" in capsys.readouterr().err
    assert not run.exists()


def test_cut_store_is_refused_first(train, store, tmp_path, capsys):
    shutil.copytree(store, tmp_path / "cut")
    shard = next((tmp_path / "cut/scenes").glob("*/z/c/0/0/0"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    code, run = train(data={"store": str(tmp_path / "cut")})
    assert code == 2
    assert str(shard) in capsys.readouterr().err
    assert not run.exists()


def test_init_from_starts_where_the_source_ended(train):
    _, source = train("source")
    code, run = train("next", init_from=str(source), n_steps=3)
    assert code == 0
    first, last = rows(run)[0], rows(source)[-1]
    assert {k: v for k, v in first.items() if k.startswith("val_")} == {
        k: v for k, v in last.items() if k.startswith("val_")
    }


def test_init_from_still_holds_when_the_first_start_left_no_checkpoint(train, monkeypatch):
    _, source = train("source")
    at_step(monkeypatch, 2, lambda: (_ for _ in ()).throw(RunError("killed")))
    assert train("next", init_from=str(source))[0] == 1
    code, run = train("next", init_from=str(source))
    assert code == 0
    assert rows(run)[0]["val_loss"] == rows(source)[-1]["val_loss"]


def test_checkpoint_is_complete_in_itself(train, tmp_path):
    """Moved elsewhere, the run's directory gone, it still starts another run where it ended."""
    _, run = train()
    last = rows(run)[-1]["val_loss"]
    (run / "checkpoints/step=000014").rename(tmp_path / "alone")
    shutil.rmtree(run)
    assert load_model(tmp_path / "alone").encoder.shape == (24, 8, 8)
    _, following = train("next", init_from=str(tmp_path / "alone"), n_steps=2)
    assert rows(following)[0]["val_loss"] == last


def test_damaged_checkpoints(train, capsys):
    """The newest is passed over loudly; if none is left the run does not silently start from scratch."""
    _, run = train(n_steps=5)
    train(n_steps=10)
    path = run / "checkpoints/step=000010/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, _ = train(n_steps=12)
    assert code == 0
    printed = capsys.readouterr().out
    assert "damaged checkpoint passed over" in printed
    assert "going on from" in printed.split("passed over")[1]
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "config.json").write_text("{}")
    assert train(n_steps=20)[0] == 1
    assert "all checkpoints are damaged" in capsys.readouterr().err


def test_bf16_stays_near_float32(train):
    _, full = train("full")
    _, mixed = train("mixed", precision="bf16-mixed")
    assert rows(mixed)[-1]["val_loss"] == pytest.approx(rows(full)[-1]["val_loss"], rel=0.02)
    assert rows(mixed)[-1]["val_loss"] != rows(full)[-1]["val_loss"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler, about torch's own code
def test_compiled_stays_near_eager(train):
    _, eager = train("eager", n_steps=4)
    _, compiled = train("compiled", n_steps=4, compile=True)
    assert rows(compiled)[-1]["loss"] == pytest.approx(rows(eager)[-1]["loss"], rel=1e-5)


def test_without_validation_scenes(train, store, tmp_path, capsys):
    config = yaml.safe_load((store / "config.yaml").read_text())
    config |= {"output_dir": str(tmp_path / "all"), "split": {"val_fraction": 0}}
    (tmp_path / "prepare.yaml").write_text(yaml.safe_dump(config))
    assert cli(["prepare", str(tmp_path / "prepare.yaml")]) == 0
    code, run = train(data={"store": str(tmp_path / "all")})
    assert code == 0
    assert not any(key.startswith("val_") for row in rows(run) for key in row)
    found = read_artifact(run / "checkpoints/step=000014")[0]
    assert (found.latents, found.provenance.metrics, found.provenance.baselines) == (None, None, None)
    assert (found.provenance.n_val_tiles, found.provenance.validation.n_scenes) == (0, 0)
    assert "no validation scenes" in capsys.readouterr().out


def test_one_forward_pass_a_step(train, monkeypatch):
    calls = []
    original = AutoencoderKL.decode
    monkeypatch.setattr(
        AutoencoderKL, "decode", lambda self, z: calls.append(self.training and not z.is_meta) or original(self, z)
    )
    train()
    assert sum(calls) == N_STEPS


def test_debug_mode_is_a_short_run_with_everything(store, tmp_path, monkeypatch):
    """Its settings, without its 200 steps."""
    seen = {}
    monkeypatch.setattr(trainer, "train", lambda config, *_: seen.update(config=config))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "run"), "data": {"store": str(store)}}))
    assert cli(["train", str(path), "--debug"]) == 0
    training = seen["config"].training
    assert (training.n_steps, training.plot_every, training.save_every, training.val_every) == (200, 20, 50, 25)
    assert seen["config"].data.max_scenes == 2


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_closed_pipe_and_closed_terminal_cost_nothing(starter, store, tmp_path, number):
    """The reader of stdout dies (tee, a terminal); the run goes on, and SIGHUP stops it as SIGTERM does."""
    training = {"n_steps": 60, "log_every": 30, "val_every": 30, "save_every": 60, "plot_every": 60}
    (config, whole), (cut, run) = (write_config(tmp_path, name, store, training=training) for name in ("whole", "cut"))
    assert starter.train(config).wait() == 0
    pipe, closed = tmp_path / "stdout", tmp_path / "closed"
    os.mkfifo(pipe)
    put = (("line_a_step", pipe), ("paused", 25, closed), ("at_update", 40, number))
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    child = starter.train(cut, *put, to_the_end=True)
    assert select.select([reading], [], [], 60)[0], "it never wrote"
    os.set_blocking(reading, True)
    with os.fdopen(reading) as lines:
        assert any(line.startswith("step 20/") for line in lines)
    closed.touch()
    assert (child.wait(), child.errors) == (75, [])
    record = json.loads((run / "run.json").read_text())
    assert (record["state"], record["starts"][0]["to_step"]) == ("stopped", 40)
    assert starter.train(cut).wait() == 0
    assert final_bytes(run, 60) == final_bytes(whole, 60)


def test_lost_history_is_not_begun_anew(train, capsys):
    """No checkpoint though there were some; fewer rows than were written: refused, and nothing is touched."""
    _, run = train(n_steps=10)
    rows_before = (run / "metrics.jsonl").read_bytes()
    (run / "checkpoints").rename(run / "aside")
    assert train(n_steps=12)[0] == 1
    assert "no checkpoint is left" in capsys.readouterr().err
    (run / "aside").rename(run / "checkpoints")
    lines = rows_before.splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:2] + lines[3:]))
    assert train(n_steps=12)[0] == 1
    assert f"has {len(lines) - 1} rows until step 10, {len(lines)} were written" in capsys.readouterr().err
    (run / "metrics.jsonl").write_bytes(rows_before)
    assert train(n_steps=12)[0] == 0
