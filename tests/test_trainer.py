"""The training run: what it writes, that it resumes exactly, and that it stops when it should."""

import hashlib
import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
import zarr
from browsing import Reader
from refusals import refused
from running import newest_checkpoint, record, rows, write_config
from safetensors.torch import load_file

from spectralvae import load_model
from spectralvae.cli import run as cli
from spectralvae.data import sampling
from spectralvae.data.loader import make_sampler, read_crops
from spectralvae.data.store import Store
from spectralvae.errors import ConfigError
from spectralvae.model import AutoencoderKL
from spectralvae.training import memory
from spectralvae.training import record as run_record
from spectralvae.weights.artifact import read_artifact, verify, weights_sha256, write_folder
from spectralvae.weights.provenance import Scenes

N_STEPS = 14  # of `train` and `write_config`


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


@pytest.fixture(scope="module")
def whole(starter, store, tmp_path_factory):
    """A run that nothing interrupts, with dropout and as users see it: its config, its directory, what it printed."""
    config, run = write_config(tmp_path_factory.mktemp("runs"), "whole", store)
    child = starter.train(config, pictures=True)
    assert child.wait() == 0, child.errors
    return config, run, child.output


@pytest.fixture
def finished(whole, starter, tmp_path):
    """A copy of that run, and a function that starts it again with other settings; returns the ended process."""
    run = tmp_path / "run"
    shutil.copytree(whole[1], run)

    def again(**settings):
        child = starter.train(whole[0], options=options(output_dir=run, **settings))
        child.wait()
        return child

    return run, again


def options(**settings):
    """The command's options; ``data_store`` stands for data.store."""
    given = {key if key == "output_dir" else key.replace("_", ".", 1): value for key, value in settings.items()}
    return [word for key, value in given.items() for word in ("--set", f"{key}={value}")]


def final_bytes(run):
    """What must be byte-equal: weights, optimizer, random states, metrics."""
    names = ("model.safetensors", "optimizer.safetensors", "trainer.json", "manifest.json")
    files = {name: run / f"checkpoints/step={N_STEPS:06d}" / name for name in names}
    return {name: path.read_bytes() for name, path in {**files, "metrics": run / "metrics.jsonl"}.items()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def rewrite(run, name, change):
    """Change a JSON file of the newest checkpoint; the manifest fits."""
    folder = newest_checkpoint(run)
    files = dict(verify(folder))
    content = json.loads(files[name])
    change(content)
    shutil.rmtree(folder)
    write_folder(folder, {**files, name: json.dumps(content).encode()})


def rewrite_record(run, change):
    """Change run.json."""
    content = record(run)
    change(content)
    (run / "run.json").write_text(json.dumps(content))


def at_update(monkeypatch, action):
    """Call ``action`` right before each step of the optimizer."""
    original = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (action(), original(self))[1])


# --- what a run leaves ------------------------------------------------------------------------------------------


def test_run_leaves_what_the_contract_says(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, run, printed = whole
    metrics = rows(run)
    assert [row["step"] for row in metrics] == [0, 2, 4, 5, 6, 8, 10, 12, 14]
    validated = [row["step"] for row in metrics if "val_loss" in row]
    assert validated == [0, 4, 5, 8, 10, 12, 14]  # with every checkpoint, too
    keys = {"step", "loss", "nll_loss", "kl_loss", "pixel_mse"}
    for row in metrics:
        expected = keys | ({f"val_{key}" for key in keys - {"step"}} if row["step"] in validated else set())
        assert set(row) == expected | ({"grad_norm"} if row["step"] else set())
    assert {"config.yaml", "timing.jsonl", "baselines.json"} < set(names(run))
    pictures = [
        *(f"summary/{name}.png" for name in ("loss", "recons_err", "kl")),
        "figures/reconstructions_step=000005.png",
    ]
    for name in pictures:
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    page, description = Reader(run / "summary/index.html"), json.loads((run / "summary/validation.json").read_text())
    assert page.data["state"] == "finished"
    assert page.charts["rmse"]["series"][0]["x"] == pytest.approx(description["wavelength"], rel=1e-5)
    assert page.charts["bits"]["series"][0]["y"] == pytest.approx(description["latents"]["bits"], rel=1e-5)
    assert any(given.get("src", "").startswith("data:image/png;base64,") for tag, given in page.tags if tag == "img")
    assert names(run / "checkpoints") == [f"step={s:06d}" for s in (5, 10, 14)]
    assert record(run)["state"] == "finished"
    assert f"{record(run)['n_parameters']:,}" in printed and str(run) in "".join(printed.split())

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    values = {event.step: event.value for event in events.Scalars("val/pixel_mse")}
    assert values == pytest.approx({row["step"]: row["val_pixel_mse"] for row in metrics if row["step"] in validated})
    assert [event.step for event in events.Images("reconstructions")] == [5, 10, 14]


def test_numbers_by_hand(tmp_path, make_store, train, monkeypatch):
    """Half of the samples are invalid, in any pattern: the numbers in metrics.jsonl against the definition.

    What stands at an invalid sample must not matter, every valid one counts the same, and each tile has its noise.
    Step 0 shows the untrained network, whose output is 0, on the first batch: the errors are the data's own.
    """
    random = np.random.default_rng(0)
    scenes = {name: random.normal(size=(19, 16, 6)) for name in ("a", "b", "v")}
    for z in scenes.values():
        z[random.random(z.shape) < 0.4] = np.nan
        z[:, :2] = np.nan
        z[..., 4] = np.nan
    scenes["v"][:8] = np.where(random.random((8, 16, 6)) < 0.5, np.nan, scenes["v"][:8])
    store = make_store(tmp_path / "store", scenes, val=("v",))
    data = {"store": str(store.path), "n_val_tiles": 50, "max_invalid_fraction": 0.9, "batch_size": 2}
    decoded = []
    decode = AutoencoderKL.decode
    monkeypatch.setattr(
        AutoencoderKL, "decode", lambda self, z: decoded.append(self.training and not z.is_meta) or decode(self, z)
    )
    code, run = train(data=data, model={"kl_weight": 0.01})
    assert code == 0
    assert sum(decoded) == N_STEPS  # one forward pass a step

    sampler = make_sampler(store, store.indices("train"), seed=0, tile_size=8, max_invalid_fraction=0.9)
    batch = read_crops(store, [sampler.crop(i) for i in range(2)], 8).numpy().astype(np.float64)
    first, *_, last = rows(run)
    assert first["pixel_mse"] == pytest.approx(np.nanmean(batch**2), rel=1e-6)
    assert first["nll_loss"] == pytest.approx(np.nansum(np.abs(batch)) / 2, rel=1e-6)

    model = load_model(run)
    v = zarr.open_array(tmp_path / "store/scenes/v/z", mode="r")[:].astype(np.float32)
    places = [(y, x) for y in (0, 8, 11) for x in (0, 8)]
    tiles = np.stack([v[y : y + 8, x : x + 8] for y, x in places])
    z = torch.from_numpy(tiles).permute(0, 3, 1, 2)
    valid = torch.isfinite(z)
    noise = np.stack([sampling.noise(0, sampling.VALIDATION_NOISE, i, (4, 4, 4)) for i in range(len(places))])
    with torch.no_grad():
        posterior = model.encode(torch.where(valid, z, 0.0))
        rec = z - model.decode(posterior.mean + posterior.std * torch.from_numpy(noise))
        nll = float((rec[valid].abs() / model.logvar.exp() + model.logvar).sum()) / len(places)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).double().numpy()
    assert last["val_nll_loss"] == pytest.approx(nll, rel=1e-5)
    assert last["val_loss"] == pytest.approx(nll + 0.01 * kl.sum() / len(places), rel=1e-5)
    assert last["val_pixel_mse"] == pytest.approx(float((rec[valid] ** 2).mean()), rel=1e-5)

    found = json.loads((run / "summary/validation.json").read_text())
    assert (found["step"], found["wavelength"]) == (N_STEPS, [400 + i for i in range(6)])
    for key, values in (("mse", rec.numpy()), ("variance", z.numpy())):
        assert found[key][4] is None
        for channel in (0, 1, 2, 3, 5):
            expected = np.nanmean(values[:, channel].astype(np.float64) ** 2)
            assert found[key][channel] == pytest.approx(expected, rel=1e-4)
    seen = valid.any(dim=1).numpy().reshape(len(places), 4, 2, 4, 2).any(axis=(2, 4))
    of_latents = {"bits": kl / np.log(2), "posterior_std": posterior.std.numpy(), "mean": posterior.mean.numpy()}
    of_latents = {key: np.moveaxis(values, 1, 3)[seen].astype(np.float64) for key, values in of_latents.items()}
    for key, values in of_latents.items():
        assert found["latents"][key] == pytest.approx(values.mean(axis=0).tolist(), rel=1e-4, abs=1e-7), key
    spread = of_latents["mean"].std(axis=0)
    assert found["latents"]["std"] == pytest.approx(spread.tolist(), rel=1e-3, abs=1e-7)
    assert found["active_units"] == int((spread**2 > 0.01).sum())
    baselines = json.loads((run / "baselines.json").read_text())
    assert baselines["mean"] == pytest.approx(np.nanmean(tiles.astype(np.float64) ** 2), rel=1e-6)


def test_readers_and_validation_do_not_change_the_run(starter, store, whole, tmp_path):
    """Dropout draws from the global random state: validating more often must not move it."""
    config, run = write_config(tmp_path, "run", store, data={"num_workers": 0}, training={"val_every": N_STEPS})
    assert starter.train(config).wait() == 0
    weights = [load_file(newest_checkpoint(folder) / "model.safetensors") for folder in (run, whole[1])]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert rows(run)[-1] == rows(whole[1])[-1]
    assert len(rows(run)) == len(rows(whole[1]))


def test_without_validation_scenes(train, make_store, tmp_path):
    made = make_store(tmp_path / "all", {"a": np.random.default_rng(0).normal(size=(16, 16, 6))})
    code, run = train(n_steps=5, data={"store": str(made.path)})
    assert code == 0
    assert not any(key.startswith("val_") for row in rows(run) for key in row)
    found = read_artifact(newest_checkpoint(run))[0]
    assert (found.latents, found.provenance.metrics, found.provenance.baselines) == (None, None, None)
    assert (found.provenance.n_val_tiles, found.provenance.validation.n_scenes) == (0, 0)


# --- interrupted and resumed ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "step", "code", "before", "after"),
    [
        (signal.SIGTERM, 7, 75, {}, {}),
        (signal.SIGUSR1, 8, 75, {"data_cache": False}, {"data_cache": True}),
        (signal.SIGINT, 10, 130, {"data_cache": True}, {"data_cache": False}),
        (signal.SIGKILL, 9, -signal.SIGKILL, {"data_num_workers": 2}, {"data_num_workers": 0}),
    ],
)
def test_interrupted_run_resumes_exactly(starter, store, whole, tmp_path, number, step, code, before, after):
    """Where it validates (8) or saves (10) in any case, a signal changes nothing; elsewhere it waits for no validation.

    Steps 6 to 8 of the killed run are done again, and their rows are not written twice.
    """
    config, run = write_config(tmp_path, "cut", store)
    assert starter.train(config, ("at_update", step, number), options=options(**before)).wait() == code
    last, newest = rows(run)[-1], newest_checkpoint(run)
    saved = read_artifact(newest)[0]
    if number == signal.SIGKILL:
        assert (record(run)["state"], last["step"], newest.name) == ("running", 8, "step=000005")
    else:
        assert (record(run)["state"], newest.name) == ("stopped", f"step={step:06d}")
        assert last["step"] == step - step % 2  # `log_every` is 2
        assert {"val_loss" in last, saved.latents is not None, saved.provenance.metrics is not None} == {step != 7}
        assert saved.provenance.n_val_tiles == 5
    if step == 10:
        for file in newest.iterdir():
            assert file.read_bytes() == (whole[1] / "checkpoints" / newest.name / file.name).read_bytes(), file.name

    assert starter.train(config, options=options(**after)).wait() == 0
    changed = {key.replace("_", ".", 1): [before[key], after[key]] for key in after}
    assert record(run)["starts"][-1].get("changed", {}) == changed
    assert final_bytes(run) == final_bytes(whole[1])
    assert record(run)["best"] == record(whole[1])["best"]
    assert set(names(run / "figures")) - set(names(whole[1] / "figures")) <= {f"reconstructions_step={step:06d}.png"}


def test_closed_terminal_costs_nothing(starter, store, whole, tmp_path):
    """The reader of stdout is gone (tee, a terminal); the run continues, and SIGHUP stops it as SIGTERM does."""
    config, run = write_config(tmp_path, "cut", store)
    child = starter.train(config, ["closed_stdout"], ("at_update", 11, signal.SIGHUP), to_the_end=True)
    assert (child.wait(), child.errors) == (75, [])
    assert (record(run)["state"], record(run)["starts"][0]["to_step"]) == ("stopped", 11)
    assert starter.train(config).wait() == 0
    assert final_bytes(run) == final_bytes(whole[1])


def test_finished_run_gets_more_steps(finished, store, make_store, tmp_path):
    """One of a version without some keys, too; its validation tiles may be others, which is said once."""
    run, again = finished

    def forget(content):
        for key in ("warmup_steps", "decay_steps"):
            del content["config"]["optimizer"][key]
        del content["config"]["supervision"]

    rewrite_record(run, forget)
    before = record(run)
    assert again().wait() == 0
    assert record(run) == before  # finished: nothing to do

    rewrite(run, "trainer.json", lambda state: state.pop("validation_tiles"))
    warned = again(training_n_steps=16, training_plot_every=3)
    assert record(run)["starts"][-1]["changed"] == {"training.n_steps": [14, 16], "training.plot_every": [7, 3]}
    assert rows(run)[-1]["step"] == 16

    moved = tmp_path / "moved"
    shutil.copytree(store, moved)
    resumed = again(training_n_steps=17, data_store=moved)
    assert (warned.wait(), resumed.wait()) == (0, 0)
    assert ("val_*" in warned.output, "val_*" in resumed.output) == (True, False)

    other = make_store(tmp_path / "other", dict.fromkeys("av", np.zeros((24, 40, 24)) + np.arange(24)), val=("v",))
    refusal = again(training_n_steps=18, data_store=other.path)
    assert refusal.wait() == 2
    [line] = refusal.errors
    assert "data.store" in line and str(other.path) in line
    assert rows(run)[-1]["step"] == 17


@pytest.mark.parametrize(("precision", "differs"), [("32-true", False), ("bf16-mixed", True)])
def test_a_run_of_earlier_arithmetic_is_told(precision, differs):
    """Versions that did not note it computed all of a bf16 forward pass in bf16."""
    facts = {"versions": {"torch": "2"}, "n_processes": 1, "devices": ["host: CPU"]}
    before = {**facts, "config": {"training": {"precision": precision}}}
    now = {**facts, "arithmetic": run_record.ARITHMETIC[precision]}
    assert bool(run_record.rounding_changes(before, now)) == differs
    assert run_record.rounding_changes({**before, **now}, now) == []


def test_lost_and_corrupt_history(finished):
    """A corrupt newest checkpoint is passed over loudly; what else is lost is refused, and nothing is touched."""
    run, again = finished

    def refuses(path, *words, n_steps=16):
        child = again(training_n_steps=n_steps)
        assert child.wait() == 1
        [line] = child.errors
        assert str(run / path) in line and all(word in line for word in words), line

    checkpoints, metrics = run / "checkpoints", run / "metrics.jsonl"
    checkpoints.rename(run / "aside")
    refuses("checkpoints", "--overwrite")
    (run / "aside").rename(checkpoints)
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(lines[:2] + lines[3:]))
    refuses("metrics.jsonl", f"{len(lines) - 1} rows", f" {len(lines)} ")
    metrics.write_bytes(b"".join(lines))

    corrupt = checkpoints / "step=000014/model.safetensors"
    corrupt.write_bytes(corrupt.read_bytes()[:-1] + b"x")
    child = again(training_n_steps=16)
    assert child.wait() == 0
    printed = "".join(child.output.split())
    assert "WARNING" in printed and str(corrupt) in printed
    assert record(run)["starts"][-1]["from_step"] == 10
    for checkpoint in checkpoints.iterdir():
        (checkpoint / "config.json").write_text("{}")
    refuses("checkpoints", "--overwrite", n_steps=17)


# --- where weights come from ------------------------------------------------------------------------------------


def test_init_from_starts_where_the_source_ended(starter, store, whole, tmp_path):
    """A checkpoint is complete in itself, wherever it lies; and a start that left none is no start."""
    shutil.copytree(newest_checkpoint(whole[1]), tmp_path / "alone")
    assert load_model(tmp_path / "alone").encoder.shape == (24, 8, 8)
    training = {"init_from": str(tmp_path / "alone"), "n_steps": 2}
    config, run = write_config(tmp_path, "next", store, training=training)
    for put, code in ([("at_update", 2, signal.SIGKILL)], -signal.SIGKILL), ([], 0):
        assert starter.train(config, *put).wait() == code
        first, last = rows(run)[0], rows(whole[1])[-1]
        assert [first[key] for key in first if key.startswith("val_")] == [
            last[key] for key in last if key.startswith("val_")
        ]


def test_checkpoint_says_where_it_comes_from(train, store):
    """Against the granules' names, the store's table and the run's own files."""
    _, run = train(n_steps=2, data={"max_scenes": 1, "n_val_tiles": 3})
    found = read_artifact(newest_checkpoint(run))[0]
    provenance, opened = found.provenance, Store(store)
    assert (provenance.store, provenance.store_hash) == ("store", opened.hash)
    assert (provenance.training.n_scenes, provenance.validation.n_scenes) == (1, 1)
    source = next(record.source for record in opened.scenes if record.split == "train")
    day, time = source.split("_")[4].rstrip("Z").split("T")
    assert provenance.training.first[:19].replace("-", "").replace(":", "") == f"{day}T{time}"
    assert provenance.metrics == {key: value for key, value in rows(run)[-1].items() if key.startswith("val_")}
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
    training, validation = (run_record.scenes_of(store, store.indices(split)) for split in ("train", "val"))
    assert training == Scenes(4, 3, times[1], times[0], ["V03", "V04"], ["1", "2", "2", "3"])
    assert validation == Scenes(1, 1, None, None, [], ["4"])


def test_old_checkpoint_is_resumed(train):
    """Of a version that wrote nothing of latents and provenance, with init_from: what it began with is unknown."""
    _, source = train("source", n_steps=2)
    changes = {"init_from": str(source), "data": {"n_val_tiles": 3}}
    _, run = train("old", n_steps=3, **changes)
    before = read_artifact(newest_checkpoint(run))[0].provenance
    assert before.initial_weights == record(run)["initial_weights"] == weights_sha256(load_model(source))
    assert before.ancestors == read_artifact(newest_checkpoint(source))[0].provenance.training.identities
    rewrite(run, "config.json", lambda config: [config.pop(key) for key in ("latents", "provenance")])
    rewrite_record(run, lambda content: [content.pop(key) for key in ("initial_weights", "ancestors")])
    assert train("old", n_steps=4, **changes)[0] == 0
    found = read_artifact(newest_checkpoint(run))[0]
    assert found.provenance == replace(
        before, initial_weights="unknown", ancestors=None, metrics=found.provenance.metrics
    )
    assert found.latents.n_tiles == 3


def test_validation_tiles_are_known_by_places_and_order():
    crops = [sampling.Crop(0, 8, 16), sampling.Crop(1, 0, 0)]
    digest = run_record.tiles_digest(crops)
    assert hashlib.sha256(b"[[0, 8, 16], [1, 0, 0]]").hexdigest().startswith(digest)
    assert run_record.other_tiles({"step": 5, "validation_tiles": digest}, crops) is None
    assert run_record.other_tiles({"step": 5}, []) is None
    assert "5" in run_record.other_tiles({"step": 5, "validation_tiles": digest}, crops[::-1])


def test_ancestors(train, store, make_store, tmp_path, monkeypatch):
    """Scenes of all earlier weights, through three runs and a resume; unknown from where one does not know."""
    z = np.random.default_rng(0).normal(size=(16, 16, 24))
    made = make_store(tmp_path / "made", {"a": z})
    data, digest = {"store": str(made.path)}, made.scenes[0].sha256

    def provenance(run):
        return read_artifact(newest_checkpoint(run))[0].provenance

    _, first = train("first", n_steps=1, data=data)
    assert provenance(first).ancestors == []
    _, second = train("second", n_steps=1, init_from=str(first))
    assert provenance(second).ancestors == [digest]
    lineage = sorted([digest, *(record.sha256 for record in Store(store).scenes if record.split == "train")])
    options, handler = {"n_steps": 4, "data": data, "init_from": str(second)}, signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        at_update(patch, lambda: signal.raise_signal(signal.SIGTERM))
        assert train("third", **options)[0] == 75
    assert signal.getsignal(signal.SIGTERM) == handler
    assert provenance(tmp_path / "third").ancestors == lineage
    shutil.rmtree(second)
    code, third = train("third", **options)
    assert code == 0
    assert (provenance(third).ancestors, provenance(third).training.identities) == (lineage, [digest])

    def forget(config):
        del config["provenance"]["ancestors"]

    rewrite(third, "config.json", forget)
    _, fourth = train("fourth", n_steps=1, init_from=str(third))
    assert provenance(fourth).ancestors is None
    rewrite(first, "config.json", forget)  # it began at random
    _, fifth = train("fifth", n_steps=1, init_from=str(first))
    assert provenance(fifth).ancestors == [digest]


# --- scenes in memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("cache", [False, True])
def test_scenes_that_are_kept_are_read_once(train, store, monkeypatch, capsys, cache, num_workers):
    """All has been read before the first update, the validation tiles, too."""
    calls, at_updates = [], []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: (calls.append(0), preadv(*arguments))[1])
    at_update(monkeypatch, lambda: at_updates.append(len(calls)))
    code, _ = train(n_steps=6, data={"cache": cache, "num_workers": num_workers})
    assert (code, len(at_updates)) == (0, 6)
    assert (len({*at_updates, len(calls)}) == 1) == cache
    n_bytes = sum(2 * np.prod(scene.shape) for scene in Store(store).scenes if scene.split == "train")
    assert (f"{n_bytes / 1e9:.3g} GB" in capsys.readouterr().out) == cache


def test_scenes_that_do_not_fit_are_refused_first(train, store, monkeypatch, capsys):
    """`max_scenes` of them may."""
    sizes = [2 * int(np.prod(s.shape)) for s in Store(store).scenes if s.split == "train"]
    free = int((sizes[0] + (4 * 4 * 3 + 4 * 5) * 24 * 8 * 8) / 0.9 + 10)  # a batch of 3, 5 validation tiles
    assert len(sizes) == 2
    monkeypatch.setattr(memory, "available_memory", lambda _: free)
    words = ("data.cache", f"{sum(sizes) / 1e9:.3g} GB", f"{free / 1e9:.3g} GB", "data.max_scenes")
    refused_first(train, capsys, *words, data={"cache": True})
    assert train(n_steps=1, data={"cache": True, "max_scenes": 1})[0] == 0


def test_scenes_fit_once_for_each_process_that_shares_the_memory(monkeypatch):
    """9 of 10 bytes for two scenes of 4; each process on a GPU has one of its own."""
    monkeypatch.setattr(memory, "available_memory", lambda _: 10)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for sizes, device, n_processes in (([4, 4], cpu, 1), ([4, 4], cuda, 2)):
        memory.check_cache(sizes, 0, (1, 1, 1), device, n_processes)
    for sizes, device, n_processes, need in (([4, 4], cpu, 2, "1.6e-08 GB"), ([8, 2], cuda, 1, "1e-08 GB")):
        with refused(ConfigError, need, " 1 fit", key="data.cache"):
            memory.check_cache(sizes, 0, (1, 1, 1), device, n_processes)


# --- what is refused --------------------------------------------------------------------------------------------


def refused_first(train, capsys, *words, **changes):
    """In one line, before the directory is made."""
    capsys.readouterr()
    code, run = train(**changes)
    assert code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line
    assert not run.exists()


@pytest.mark.parametrize(
    ("words", "model", "data"),
    [
        (("model", "data.tile_size"), {"conv_padding_mode": "reflect", "conv_kernel_size": 5}, {"tile_size": 4}),
        (("model", "data.tile_size"), {"chs": [8, 8], "mid_attn": False}, {"tile_size": 2, "batch_size": 1}),
        (("model.shape", "[24, 9, 9]", "[24, 8, 8]"), {"shape": [24, 9, 9]}, {}),
    ],
)
def test_network_that_cannot_take_the_tiles(train, capsys, words, model, data):
    refused_first(train, capsys, *words, model=model, data=data)


def test_cut_store(train, store, tmp_path, capsys):
    shutil.copytree(store, tmp_path / "cut")
    shard = next((tmp_path / "cut/scenes").glob("*/z/c/0/0/0"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    refused_first(train, capsys, str(shard), data={"store": str(tmp_path / "cut")})


def test_gradient_that_is_not_finite_stops_before_the_update(train, monkeypatch):
    """In step 7 of a warm-up of 20; the loss is finite."""
    updates = []
    original = AutoencoderKL.loss_of

    def loss_of(self, x, *arguments):
        loss, metrics = original(self, x, *arguments)
        if self.training and not x.is_meta and len(updates) == 6:
            loss = loss + (self.logvar - self.logvar.detach()).sqrt()  # 0, and its slope is infinite
        return loss, metrics

    monkeypatch.setattr(AutoencoderKL, "loss_of", loss_of)
    at_update(monkeypatch, lambda: updates.append(0))
    code, run = train(optimizer={"lr": 2e-3, "warmup_steps": 20})
    assert (code, len(updates)) == (1, 6)
    report = json.loads((run / "failures/step=000007.json").read_text())
    assert all(np.isfinite(tile["loss"]) for tile in report["tiles"])  # without the plant
    assert report["learning_rate"] == pytest.approx(2e-3 * 7 / 20)
    assert names(run / "checkpoints") == ["step=000005"]
    assert record(run)["state"] == "failed"
