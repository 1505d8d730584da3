"""`doctor`: a healthy set-up passes every check and stays as it was; each thing that is wrong is found."""

import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure

from spectralvae.cli import run as cli
from spectralvae.config import TrainConfig
from spectralvae.config.loading import load_config
from spectralvae.errors import ConfigError, RunError
from spectralvae.model import AutoencoderKL
from spectralvae.runtime.signals import Stopped
from spectralvae.training import doctor, proofs, trainer, trials
from spectralvae.training.engine import Engine
from spectralvae.training.validation import Validation
from spectralvae.training.watch import Watch

NAMES = [name for name, *_ in doctor.EXAMINATIONS]


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
def patient(config_path, tmp_path):
    return doctor._admit(load_config(TrainConfig, config_path), tmp_path)


def state_of(folder):
    """Name, time and digest of all files."""
    return {
        path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None)
        for path in [folder, *folder.rglob("*")]
    }


def children(process):
    """Processes that this one's main thread started, dead or alive."""
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()


def is_there(group):
    """Whether a process group has members."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def soon(condition):
    """Whether it holds within 20 s."""
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def driver(tmp_path, name, *lines):
    """A command that patches something before it does what the module or command of that name does."""
    path = tmp_path / "driver.py"
    path.write_text("\n".join(lines))
    return (sys.executable, str(path), *name)


@pytest.fixture(scope="module")
def healthy(config_path, folder):
    """Exit code and JSON of one run, and what is found afterwards."""
    before, others = state_of(folder), children(os.getpid())
    scratch = folder.parent / "scratch"
    scratch.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(scratch))
        with redirect_stdout(io.StringIO()) as out:
            code = cli(["doctor", str(config_path), "--json"])
    left = list(scratch.iterdir())
    return {
        "done": (code, out.getvalue()),
        "unchanged": state_of(folder) == before,
        "left": left,
        "children": children(os.getpid()) == others,
    }


def test_healthy_is_all_well(healthy):
    code, out = healthy["done"]
    found = json.loads(out)
    assert code == 0
    assert found["ok"] is True
    assert list(found["checks"]) == NAMES
    assert {name: check["ok"] for name, check in found["checks"].items()} == dict.fromkeys(NAMES, True)


def test_figures_are_those_of_the_data(healthy):
    figures = {name: check["figures"] for name, check in json.loads(healthy["done"][1])["checks"].items()}
    assert figures["store"]["positions"] == 2 * 13 * 17
    assert figures["store"]["invalid_share"] == pytest.approx(1 / 7, abs=0.01)
    assert figures["batch"]["processes"] == [1, 2]
    assert figures["hours"]["times"] == {"validation": 3, "figure": 2, "plot": 2, "checkpoint": 2}
    assert figures["disk"]["checkpoint_bytes"] == pytest.approx(figures["hours"]["checkpoint_bytes"], rel=0.3)
    assert figures["resume"] == {"from_step": 2, "differing": [], "moments": 0.0}


def test_nothing_is_changed_and_nothing_left(healthy):
    assert healthy["unchanged"]
    assert healthy["left"] == []
    assert healthy["children"]


def test_what_is_wrong_is_found_together(config_path, tmp_path, monkeypatch, capsys):
    """No update, one process's loss doubled, no memory, and a run that fails."""
    quick = [examination for examination in doctor.EXAMINATIONS if examination[0] != "hours"]
    monkeypatch.setattr(doctor, "EXAMINATIONS", quick)
    monkeypatch.setattr(Engine, "update", lambda self, norm, step: None)
    monkeypatch.setattr(proofs, "OVERFIT_STEPS", 50)
    monkeypatch.setattr(trials, "available_memory", lambda device: 0)
    monkeypatch.setattr(trials, "_resident_bytes", lambda: 0)
    rehearsal = driver(
        tmp_path,
        (),
        "import os, sys",
        "from spectralvae.model import AutoencoderKL",
        "from spectralvae.training.rehearsal import main",
        "original = AutoencoderKL.get_loss",
        "def get_loss(*arguments):",
        "    loss, metrics = original(*arguments)",
        "    return loss * (1 + (os.environ['RANK'] == '1')), metrics",
        "AutoencoderKL.get_loss = get_loss",
        "sys.exit(main(*sys.argv[1:]))",
    )
    monkeypatch.setattr(proofs, "REHEARSAL", rehearsal)
    monkeypatch.setattr(proofs, "TRAIN", (sys.executable, "-c", "import sys; sys.exit('no train today')"))
    assert cli(["doctor", str(config_path)]) == 1
    out, err = capsys.readouterr()
    lines = {line.split()[1]: line for line in out.splitlines() if line[0] in "✓✗-"}
    wrong = [name for name, *_ in quick if lines[name][0] == "✗"]
    assert wrong == ["memory", "overfit", "processes", "resume"]
    assert "too little" in lines["memory"]
    assert "must fall below" in lines["overfit"]
    assert "they must agree" in lines["processes"]
    assert lines["resume"].endswith("exit code 1: no train today")
    assert err.strip() == "spectralvae: error: doctor: not well: memory, overfit, processes, resume"


def test_overfit_passes(patient):
    assert proofs.overfit(patient).ok


def no_gradient(patch):
    original = AutoencoderKL.get_loss

    def get_loss(self, *arguments):
        loss, metrics = original(self, *arguments)
        return loss.detach() + 0.0 * loss, metrics

    patch.setattr(AutoencoderKL, "get_loss", get_loss)


def filled(value):
    def breaks(patch):
        original = Engine.to_device

        def to_device(self, tiles, noise):
            x, mask, noise = original(self, tiles.nan_to_num(value), noise)
            return x, torch.ones_like(mask), noise

        patch.setattr(Engine, "to_device", to_device)

    return breaks


def wrong_scale(patch):
    original = Engine.to_device
    patch.setattr(Engine, "to_device", lambda self, tiles, noise: original(self, 2 * tiles, noise))


def no_learning_rate(patch):
    patch.setattr(proofs, "OVERFIT_LR", 1e-12)


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (no_gradient, "must fall below"),
        (no_learning_rate, "must fall below"),
        (filled(0.0), "samples count"),
        (filled(9.0), "samples count"),
        (wrong_scale, "untrained network must begin with"),
    ],
)
def test_overfit_fails_where_training_is_broken(patient, monkeypatch, breaks, words):
    monkeypatch.setattr(proofs, "OVERFIT_STEPS", 50)
    breaks(monkeypatch)
    check = proofs.overfit(patient)
    assert check.ok is False
    assert words in check.text


def test_too_little_disk(patient):
    """What n_steps / save_every checkpoints need, and four for the proofs."""
    free = shutil.disk_usage(patient.scratch).free
    assert doctor._check_disk(replace(patient, checkpoint_bytes=free // 3)).ok
    check = doctor._check_disk(replace(patient, checkpoint_bytes=free))
    assert check.ok is False
    assert "too little" in check.text
    with pytest.raises(ConfigError, match="set TMPDIR"):
        proofs.check_room(replace(patient, checkpoint_bytes=free // 3))


@pytest.mark.parametrize(
    ("n_steps", "kept", "expected"),
    [
        (100, {}, 10),
        (101, {}, 11),
        (100, {"keep_last": 3}, 5),  # and the best, and the one being written
        (100, {"keep_last": 3, "keep_every": 50}, 7),
        (20, {"keep_last": 9}, 2),
    ],
)
def test_room_for_checkpoints(patient, n_steps, kept, expected):
    patient.config = trials.changed(patient.config, training={"n_steps": n_steps, "save_every": 10, **kept})
    assert doctor._check_disk(patient).figures["checkpoints"] == expected


@pytest.mark.parametrize("lost", [None, "exp_avg", "exp_avg_sq", "step", "all"])
def test_resume_that_loses_something_is_found(patient, tmp_path, monkeypatch, lost):
    """The runs of the proof, without pictures; a failure takes the place of the kill, for all are in this process."""
    monkeypatch.setattr(Watch, "draw", lambda *_: None)
    monkeypatch.setattr(Validation, "draw", lambda *_: Figure(figsize=(1, 1)))
    paths = [tmp_path / name for name in ("whole", "killed")]
    configs = [proofs._write_config(path.with_suffix(".yaml"), proofs._short(patient, path)) for path in paths]
    assert cli(["train", configs[0]]) == 0
    advance = trainer.Trainer._advance
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_advance", lambda self, *a: advance(self, *a) if self.step < 3 else fail())
        assert cli(["train", configs[1]]) == 1
    restore = trainer.restore

    def losing(path, model, optimizer, supervision):
        state = restore(path, model, optimizer, supervision)
        if lost == "all":
            optimizer.state.clear()
        elif lost:
            for moments in optimizer.state.values():
                moments[lost].zero_()
        return state

    monkeypatch.setattr(trainer, "restore", losing)
    assert cli(["train", configs[1]]) == 0
    check = proofs._judge(patient, *paths)
    assert check.ok is (lost is None)
    assert check.figures["from_step"] == 2
    assert (check.figures["moments"] > proofs.CUDA_LIMIT) == (lost is not None)
    assert ("optimizer.safetensors" in check.text) == (lost is not None)


def fail():
    raise RunError("killed")


def test_resume_that_starts_afresh_is_no_resume(patient, tmp_path):
    for name in ("whole", "killed"):
        checkpoint = tmp_path / name / "checkpoints/step=000004"
        checkpoint.mkdir(parents=True)
        for file in (tmp_path / name / "metrics.jsonl", *(checkpoint / name for name in proofs.FILES)):
            file.write_text("the same")
        (tmp_path / name / "run.json").write_text('{"starts": [{"from_step": 0}]}')
    check = proofs._judge(patient, tmp_path / "whole", tmp_path / "killed")
    assert check.ok is False
    assert "not from its checkpoint" in check.text


def test_store_without_spread(patient):
    std = patient.store.normalization.std.copy()
    std[3] = 0.0
    patient.store.normalization = replace(patient.store.normalization, std=std)
    check = doctor._check_store(patient)
    assert check.ok is False
    assert "1 of 12 channels have no spread" in check.text


def test_output_dir_that_train_refuses(patient, tmp_path):
    """A cross, and the later checks go on."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    patient.config = patient.config.model_copy(update={"output_dir": tmp_path / "taken"})
    check = doctor._examine("output_dir", doctor._check_output_dir, patient, [])
    assert check.ok is False
    assert "not made by this tool" in check.text
    assert doctor._examine("hours", trials.forecast_hours, patient, ["steps"]).text == "not tried: needs steps"


def test_unknown_errors_are_not_swallowed(patient):
    def broken(patient):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        doctor._examine("batch", broken, patient, [])


@pytest.mark.parametrize("setting", ["data.batch_size=3", "data.tile_size=200", "data.store=/nowhere", "data.x=1"])
def test_wrong_config_is_refused(config_path, capsys, folder, setting):
    assert cli(["doctor", str(config_path), "--set", setting]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert not (folder / "run").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Stopped(75), RunError("x")])
def test_no_process_outlives_its_check(patient, error):
    """Nor one that it has started itself."""
    sleep = [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '60'])"]
    groups = []

    def examine():
        with proofs._started(patient, [(sleep, {})] * 2) as started:
            groups.extend(child.process.pid for child in started)
            assert soon(lambda: all(map(children, groups)))
            raise error

    with pytest.raises(type(error)):
        examine()
    assert len(groups) == 2
    assert soon(lambda: not any(map(is_there, groups)))


def test_failing_process_tells_why(patient):
    command = [sys.executable, "-c", "import sys; sys.exit('first\\nthe reason')"]
    with proofs._started(patient, [(command, {})]) as started, pytest.raises(RunError, match="exit code 1: the reason"):
        proofs._wait(started)


def test_launcher_variables_do_not_reach_the_processes(patient, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("SLURM_PROCID", "3")
    command = [sys.executable, "-c", "import os, sys; sys.exit('RANK' in os.environ or 'SLURM_PROCID' in os.environ)"]
    with proofs._started(patient, [(command, {})]) as started:
        assert started[0].process.wait(timeout=60) == 0
