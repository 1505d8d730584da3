"""`doctor`: a healthy set-up passes every check and stays as it was; each thing that is wrong is found."""

import json
import shutil
import sys
import tempfile
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from spectralvae.cli import run as cli
from spectralvae.data.cache import SceneCache
from spectralvae.model import AutoencoderKL
from spectralvae.training import doctor, trials
from spectralvae.training.engine import Engine

CHECKS = list(doctor.CHECKS)
NAMES = [name for name, *_ in CHECKS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("doctor")


@pytest.fixture(scope="module")
def config_path(folder, make_store):
    """Smooth scenes, two of three for training, a seventh of the samples invalid; dropout, and a step in two parts."""
    random = np.random.default_rng(0)
    y, x, c = np.meshgrid(np.arange(20), np.arange(24), np.arange(12), indexing="ij")
    scenes = {}
    for i, name in enumerate("abv"):
        z = np.sin(y / 5 + i) + np.cos(x / 7 + c / 4) + 0.1 * random.normal(size=y.shape)
        z[random.random(z.shape) < 1 / 7] = np.nan
        scenes[name] = z
    make_store(folder / "store", scenes, val=("v",))
    config = {
        "output_dir": str(folder / "run"),
        "data": {"store": str(folder / "store"), "batch_size": 4, "tile_size": 8, "n_val_tiles": 3},
        "model": {"chs": [16, 8], "z_channels": 4, "embed_dim": 4, "n_attention_heads": 2, "dropout_prob": 0.2},
        "training": {"n_steps": 20, "device": "cpu", "save_every": 10, "gradient_accumulation": 2},
    }
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def examine(config_path, monkeypatch, capsys):
    """A function that makes some of the checks, each after ``before(setup)``; returns exit code, checks, and stderr."""

    def run(names, *settings, before=lambda setup: None):
        chosen = [
            (name, lambda s, *c, f=f: (before(s), f(s, *c))[1], needs) for name, f, needs in CHECKS if name in names
        ]
        monkeypatch.setattr(doctor, "CHECKS", chosen)
        code = cli(["doctor", str(config_path), "--json", *(part for s in settings for part in ("--set", s))])
        out, err = capsys.readouterr()
        return code, json.loads(out or '{"checks": {}}')["checks"], err

    return run


def state_of(folder):
    """Name, time and content of all files."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [folder, *folder.rglob("*")]
    }


def test_healthy_is_all_well(examine, folder, tmp_path, monkeypatch):
    """And nothing is changed or left behind."""
    before = state_of(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, checks, _ = examine(NAMES)
    assert code == 0
    assert {name: check["ok"] for name, check in checks.items()} == dict.fromkeys(NAMES, True)
    assert state_of(folder) == before
    assert list(tmp_path.iterdir()) == []
    figures = {name: check["figures"] for name, check in checks.items()}
    assert figures["config"]["processes"] == [1, 2]
    assert figures["store"]["positions"] == 2 * 13 * 17
    assert figures["store"]["invalid_share"] == pytest.approx(1 / 7, abs=0.01)
    assert figures["hours"]["times"] == {"validation": 3, "figure": 2, "checkpoint": 2}
    assert figures["resume"] == {"from_step": 2, "differing": [], "moments": 0.0}


def test_what_is_wrong_is_found_together(examine, monkeypatch):
    """No update, no memory, and a run that fails."""
    monkeypatch.setattr(Engine, "update", lambda self, norm, step: None)
    monkeypatch.setattr(trials, "OVERFIT_STEPS", 50)
    monkeypatch.setattr(trials, "available_memory", lambda device: -(10**15))
    monkeypatch.setattr(trials, "TRAIN", (sys.executable, "-c", "import sys; sys.exit('first\\nno train today')"))
    code, checks, err = examine(set(NAMES) - {"hours"})
    assert code == 1
    wrong = [name for name, check in checks.items() if check["ok"] is False]
    assert wrong == ["memory", "overfit", "resume"]
    assert err.count("\n") == 1
    assert [name for name in NAMES if name in err] == wrong
    assert checks["memory"]["figures"]["available_bytes"] < 0
    assert "no train today" in checks["resume"]["text"]


def no_gradient(patch):
    original = AutoencoderKL.loss_of

    def loss_of(self, *arguments):
        loss, metrics = original(self, *arguments)
        return loss.detach() + 0.0 * loss, metrics

    patch.setattr(AutoencoderKL, "loss_of", loss_of)


def changed_batch(change):
    original = Engine.to_device
    return lambda patch: patch.setattr(Engine, "to_device", lambda *arguments: change(*original(*arguments)))


def invalid_count(x, mask, noise):
    """Samples of the same mean square as the others are taken for valid."""
    return x.nan_to_num(float(x[mask].square().mean() ** 0.5)), torch.ones_like(mask), noise


@pytest.mark.parametrize(
    ("breaks", "first", "falls"),
    [
        (no_gradient, 0.445, False),
        (changed_batch(lambda x, mask, noise: (0.5 * x, mask, noise)), 0.445 / 4, True),
        (changed_batch(invalid_count), 0.445, True),
    ],
)
def test_overfit_fails_where_training_is_broken(examine, monkeypatch, breaks, first, falls):
    """Even if the error falls as far as it should."""
    monkeypatch.setattr(trials, "OVERFIT_STEPS", 60)
    breaks(monkeypatch)
    code, checks, _ = examine(["overfit"])
    figures = checks["overfit"]["figures"]
    assert (code, checks["overfit"]["ok"]) == (1, False)
    assert figures["first"] == pytest.approx(first, rel=0.01)
    assert (figures["last"] < figures["limit"]) is falls


def test_too_little_disk(examine, monkeypatch):
    """For the checkpoints to come, and for temporary files."""
    figures = examine(["disk"])[1]["disk"]["figures"]
    needed = figures["needed_bytes"]
    assert needed == 2 * figures["checkpoint_bytes"]
    for free, ok in ((needed, True), (needed - 1, False)):
        usage = lambda path, free=free: SimpleNamespace(free=free)  # noqa: E731
        monkeypatch.setattr(shutil, "disk_usage", usage)
        code, checks, _ = examine(["disk", "resume"])
        assert code == 1
        assert (checks["disk"]["ok"], checks["resume"]["ok"]) == (ok, False)
        assert tempfile.gettempdir() in checks["resume"]["text"]


def test_room_for_checkpoints(examine):
    for n_steps, kept, expected in (
        (101, (), 11),
        (100, ("keep_last=3",), 5),  # and the best, and the one being written
        (100, ("keep_last=3", "keep_every=50"), 7),
        (20, ("keep_last=9",), 2),
    ):
        _, checks, _ = examine(["disk"], *(f"training.{key}" for key in (f"n_steps={n_steps}", *kept)))
        assert checks["disk"]["figures"]["checkpoints"] == expected


def test_size_of_a_checkpoint_is_known_before_it_is_written(examine, monkeypatch):
    sizes, save = [], trials.save_checkpoint
    size = lambda *arguments, **options: sum(f.stat().st_size for f in save(*arguments, **options).iterdir())  # noqa: E731
    monkeypatch.setattr(trials, "save_checkpoint", lambda *a, **options: sizes.append(size(*a, **options)))
    checks = examine(["disk", "steps"])[1]
    assert [checks["disk"]["figures"]["checkpoint_bytes"]] == pytest.approx(sizes, rel=0.3)


# --- steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [1e-4, 1e9])
def test_memory_is_counted_and_freed(examine, monkeypatch, lr):
    """Of cached scenes, which tiles come from, and of networks; neither outlives its check, passed or failed."""
    alive, before = weakref.WeakValueDictionary(), []

    def watch(owner, name):
        original = getattr(owner, name)

        def watched(self, *arguments):
            alive[id(self)] = self
            return original(self, *arguments)

        monkeypatch.setattr(owner, name, watched)

    watch(Engine, "gradients")
    watch(SceneCache, "read")
    of_caches = lambda: sum(cache.pixels.nbytes for cache in alive.values() if isinstance(cache, SceneCache))  # noqa: E731
    monkeypatch.setattr(trials, "peak_memory", lambda device: 10**6 + of_caches())
    settings = ("data.cache=true", f"optimizer.lr={lr}")
    names = ["steps", "memory", "hours", "overfit"]
    checks = examine(names, *settings, before=lambda setup: before.append(len(alive)))[1]
    assert set(before) == {0}
    if checks["steps"]["ok"]:
        scenes, tiles = 2 * 20 * 24 * 12 * 2, 3 * 8 * 8 * 12 * 2  # of training and of validation, in float16
        assert checks["memory"]["figures"]["peak_bytes"] == 10**6 + scenes + tiles
        assert checks["hours"]["figures"]["times"]["cache"] == 1
    else:
        assert "optimizer.lr" in checks["steps"]["text"]
    assert checks["steps"]["ok"] is (lr < 1)


def test_few_tiles_are_measured_where_all_would_take_too_long(examine, monkeypatch):
    """From one tile to two, time and memory grow as they grow further."""
    peaks = iter([10_000_000, 14_000_000])
    monkeypatch.setattr(trials, "CPU_SECONDS", 0.0)
    monkeypatch.setattr(trials, "peak_memory", lambda device: next(peaks))
    figures = examine(["steps"], "training.gradient_accumulation=1")[1]["steps"]["figures"]
    assert (figures["measured_tiles"], figures["tiles"]) == (2, 4)
    assert figures["peak_bytes"] == 10_000_000 + 3 * 4_000_000


# --- runs -------------------------------------------------------------------------------------------------------

TRAIN = """
import json, re, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file

lost, config = sys.argv[1:]
run = Path(re.search("output_dir: (.*)", Path(config).read_text())[1])
resumed, folder = run.is_dir(), run / "checkpoints/step=000004"
folder.mkdir(parents=True, exist_ok=True)
for name in ("model.safetensors", "trainer.json"):
    (folder / name).write_text("the same")
state = {f"{kind}.weight": np.full(3, 2.0, np.float32) for kind in ("exp_avg", "exp_avg_sq", "step")}
if resumed:
    kept = 0.99 if lost == "exp_avg_sq" else 0.0  # 0.01 is what rounding may do on a GPU
    state = {name: value * (kept if name.startswith(lost + ".") else 1) for name, value in state.items()}
    state = {} if lost == "all" else state
save_file(state, folder / "optimizer.safetensors")
(run / "run.json").write_text(json.dumps({"starts": [{"from_step": 2 * (resumed and lost != "checkpoint")}]}))
(run / "metrics.jsonl").write_text("{}\\n" * 4)
"""


@pytest.mark.parametrize("lost", ["nothing", "exp_avg", "exp_avg_sq", "step", "all", "checkpoint"])
def test_resume_that_loses_something_is_found(examine, monkeypatch, lost):
    """By runs that write the files of a real one."""
    monkeypatch.setattr(trials, "TRAIN", (sys.executable, "-c", TRAIN, lost))
    _, checks, _ = examine(["resume"])
    found, figures = checks["resume"]["ok"], checks["resume"]["figures"]
    assert found is (lost == "nothing")
    assert figures["from_step"] == (0 if lost == "checkpoint" else 2)
    same = lost in ("nothing", "checkpoint")
    assert figures["differing"] == ([] if same else ["checkpoints/step=000004/optimizer.safetensors"])
    expected = {"exp_avg": 1.0, "exp_avg_sq": pytest.approx(0.01)}.get(lost, 0.0 if same else None)  # JSON has no inf
    assert figures["moments"] == expected


def test_store_without_spread(examine):
    def before(setup):
        n = setup.store.normalization
        setup.store.normalization = replace(n, std=np.where(np.arange(12) == 3, 0.0, n.std))

    code, checks, _ = examine(["store"], before=before)
    assert (code, checks["store"]["ok"]) == (1, False)
    assert "1 of 12" in checks["store"]["text"]


def test_a_check_that_fails_does_not_end_the_others(examine, tmp_path):
    """Those that need it are left out."""
    (tmp_path / "file").write_text("mine")
    names = ["output_dir", "disk", "steps", "memory", "hours"]
    code, checks, _ = examine(names, f"output_dir={tmp_path}", "optimizer.lr=1e9")
    assert code == 1
    assert [checks[name]["ok"] for name in names] == [False, True, False, None, None]
    assert str(tmp_path) in checks["output_dir"]["text"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_that_has_begun_is_judged_as_train_judges_it(examine, config_path, tmp_path, make_store, capsys):
    output_dir = f"output_dir={tmp_path / 'run'}"
    settings = (output_dir, "training.n_steps=4", "training.save_every=2")

    def verdict(*more):
        _, checks, _ = examine(["output_dir"], *settings, *more)
        return checks["output_dir"]["ok"], checks["output_dir"]["text"]

    assert verdict()[0]
    assert cli(["train", str(config_path), *(part for s in settings for part in ("--set", s))]) == 0
    capsys.readouterr()
    ok, text = verdict()
    assert ok and "finished" in text
    longer = "training.n_steps=6"
    ok, text = verdict(longer)
    assert ok and "step=000004" in text
    other = make_store(tmp_path / "other", dict.fromkeys("av", np.zeros((20, 24, 12)) + np.arange(12)), val=("v",))
    ok, text = verdict(longer, f"data.store={other.path}")
    assert not ok and str(other.path) in text
    checkpoints = sorted((tmp_path / "run/checkpoints").iterdir())
    (checkpoints[-1] / "model.safetensors").write_bytes(b"")
    ok, text = verdict(longer)
    assert ok and "from step=000002" in text and "step=000004" in text
    (checkpoints[0] / "model.safetensors").write_bytes(b"")
    ok, text = verdict(longer)
    assert not ok and "corrupt" in text
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint)
    ok, text = verdict(longer)
    assert not ok and "gone" in text


def test_attention_by_size_is_overfitted_too(examine):
    """The network of a smaller tile has attention on the same levels; at others its heads might not divide them."""
    code, checks, _ = examine(
        ["overfit"], "data.tile_size=16", "model.chs=[6, 8]", "model.norm_groups=2", "model.attn_sizes=[8]"
    )
    assert (code, checks["overfit"]["ok"]) == (0, True), checks


@pytest.mark.parametrize("setting", ["data.batch_size=3", "data.tile_size=200", "data.store=/nowhere", "data.x=1"])
def test_wrong_config_is_refused(examine, folder, setting):
    code, checks, err = examine(NAMES, setting)
    assert (code, checks, len(err.splitlines())) == (2, {}, 1)
    assert any(part in err for part in setting.split("="))
    assert not (folder / "run").exists()


def test_unknown_errors_are_not_swallowed(examine):
    with pytest.raises(ZeroDivisionError):
        examine(["config"], before=lambda setup: 1 / 0)
