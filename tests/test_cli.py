"""The command line: exit codes, what is printed where, and what a user sees who got something wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from inferring import Result
from test_rundir import snapshot

import spectralvae
from spectralvae import __version__, cli
from spectralvae.config import TrainConfig
from spectralvae.config.loading import resume_rules, to_yaml
from spectralvae.errors import ConfigError, InputError, RunError
from spectralvae.runtime.signals import Stopped

COMMANDS = ["simulate", "download", "prepare", "train", "evaluate", "encode", "decode"]
COMMANDS += ["compress", "decompress", "probe", "convert"]
TRAIN: dict[str, Any] = {
    "data": {"store": "store", "batch_size": 2, "tile_size": 16, "num_workers": 0, "n_val_tiles": 2},
    "model": {"chs": [8, 8], "norm_groups": 2, "n_attention_heads": 1, "embed_dim": 2, "z_channels": 2},
    "training": {"n_steps": 1, "device": "cpu"},
}


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs the command line in this process."""

    def caller(*arguments: object) -> Result:
        capfd.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr(), Path())

    return caller


def python(*arguments: object) -> Result:
    """Runs another Python."""
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)
    return Result(done.returncode, done.stdout, done.stderr, Path())


def write_config(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(to_yaml(values))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with granules, a store and a run of one step, made by the command line, and an empty one."""
    folder = tmp_path_factory.mktemp("data")
    simulate = {"n_granules": 3, "shape": [40, 48], "n_channels": 32, "products": []}
    inputs = [str(folder / "granules" / "TEMPO_RAD_*.nc")]
    for command, name, values in (
        ("simulate", "granules", simulate),
        ("prepare", "store", {"inputs": inputs}),
        ("train", "trained", TRAIN | {"data": TRAIN["data"] | {"store": str(folder / "store")}}),
    ):
        config = write_config(folder / f"{command}.yaml", {"output_dir": str(folder / name), **values})
        assert cli.run([command, str(config)]) == 0
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def behaves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[BaseException | None], Path]:
    """Makes `simulate` raise something, and gives a config for it."""

    def install(error: BaseException | None) -> Path:
        monkeypatch.setattr("spectralvae.simulate.simulate_granules", Mock(side_effect=error, return_value=[]))
        return write_config(tmp_path / "simulate.yaml", {"output_dir": str(tmp_path / "out")})

    return install


# --- exit codes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "message", "state"),
    [
        (None, 0, None, "finished"),
        (InputError("two\nlines\r\n  long"), 2, "two lines long", "failed"),
        (ConfigError("late", key="seed"), 2, "{config}: seed: late", "failed"),  # which config, where no file is named
        (ConfigError("late", key="seed", path="other"), 2, "other: seed: late", "failed"),
        (RunError("step 7: loss nan"), 1, "step 7: loss nan", "failed"),
        (OSError(5, "Input/output error", "a.nc"), 1, "a.nc: Input/output error", "failed"),
        (OSError("unknown\nfailure"), 1, "unknown failure", "failed"),
        (Stopped(75), 75, None, "stopped"),
        (KeyboardInterrupt(), 130, "interrupted", "stopped"),
    ],
)
def test_exit_codes(
    call: Callable[..., Result],
    behaves: Callable[[BaseException | None], Path],
    error: BaseException | None,
    code: int,
    message: str | None,
    state: str,
) -> None:
    config = behaves(error)
    result = call("simulate", config)
    assert result.code == code
    assert result.message == message.format(config=config) if message else result.err == ""
    assert json.loads((config.parent / "out" / "run.json").read_text())["state"] == state


def test_bug_of_ours_shows_its_traceback(behaves: Callable[[BaseException | None], Path]) -> None:
    config = behaves(AssertionError("invariant"))
    with pytest.raises(AssertionError, match="invariant"):
        cli.run(["simulate", str(config)])


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["trian", "x.yaml"], "trian"),
        (["train"], "CONFIG.yaml"),
        (["train", "a.yaml", "b.yaml"], "b.yaml"),
        (["train", "a.yaml", "--set"], "--set"),
        (["--verbose"], "--verbose"),
        (["train", "absent.yaml"], "absent.yaml"),
        (["train", "two\nlines.yaml"], "two lines.yaml"),
    ],
)
def test_wrong_usage_is_one_line(call: Callable[..., Result], arguments: list[str], part: str) -> None:
    result = call(*arguments)
    assert result.code == 2
    assert part in result.message
    assert result.out == ""


# --- help, version, start-up ------------------------------------------------------------------


def test_help_and_version(call: Callable[..., Result]) -> None:
    result = call()
    assert (result.code, result.err) == (2, "")
    assert all(command in result.out for command in (*COMMANDS, "inspect", "doctor"))
    for command in COMMANDS:
        result = call(command, "--help")
        assert result.code == 0
        assert all(word in result.out for word in (f"spectralvae {command}", "--set", "--overwrite", "--print-config"))
        assert ("--debug" in result.out) == (command == "train")
    assert call("--version") == Result(0, f"{__version__}\n", "", Path())


START_UP = """
import sys
import spectralvae
from spectralvae import cli

for arguments, code in (["--help"], 0), (["train", "--help"], 0), (["--version"], 0), (["train", "absent.yaml"], 2):
    assert cli.run(arguments) == code
    heavy = {"torch", "xarray", "matplotlib", "h5py", "zarr"} & set(sys.modules)
    assert not heavy, (arguments, heavy)
"""


def test_processes(tmp_path: Path) -> None:
    """Starting up imports nothing heavy, and a process exits with the code."""
    result = python("-c", START_UP)
    assert result.code == 0, result.err
    config = write_config(tmp_path / "config.yaml", {"output_dir": str(tmp_path / "out"), "n_granules": 0})
    result = python("-m", "spectralvae", "simulate", config)
    assert (result.code, result.out) == (2, "")
    assert str(config) in result.message and "n_granules = 0" in result.message


def test_names_of_the_package_are_there() -> None:
    assert all(getattr(spectralvae, name) for name in spectralvae.__all__)
    with pytest.raises(AttributeError, match="absent"):
        _ = spectralvae.absent


# --- --print-config, --set, --overwrite -------------------------------------------------------


def test_print_config_reads_back_and_writes_nothing(call: Callable[..., Result], tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", {"output_dir": "1e-4", "data": {"store": "absent"}})
    before = snapshot(tmp_path)
    first = call("train", config, "--debug", "--set", "training.save_every=7", "--print-config")
    assert (first.code, first.err) == (0, "")
    assert snapshot(tmp_path) == before
    printed = yaml.safe_load(first.out)
    assert (printed["training"]["n_steps"], printed["training"]["save_every"]) == (200, 7)
    config.write_text(first.out)
    assert call("train", config, "--print-config").out == first.out
    comments = [line for line in first.out.splitlines() if line.startswith("#")]
    listed = {match[1] for line in comments if (match := re.search(r"(\w+\.\w+) \(", line))}
    assert listed == set(resume_rules(TrainConfig))
    config = write_config(tmp_path / "simulate.yaml", {"output_dir": "granules"})
    assert "#" not in call("simulate", config, "--print-config").out, "it does not resume"


def test_finished_run_says_so(call: Callable[..., Result], behaves: Callable[[BaseException | None], Path]) -> None:
    config = behaves(None)
    for name in ("out", "out [/b] [red]"):
        assert call("simulate", config, "--set", f"output_dir={config.parent / name}").code == 0
        before = snapshot(config.parent)
        result = call("simulate", config, "--set", f"output_dir={config.parent / name}")
        assert (result.code, result.err) == (0, "")
        assert re.fullmatch(rf"{re.escape(str(config.parent / name))}: .*finished.*--overwrite.*\n", result.out)
        assert snapshot(config.parent) == before


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.store=empty", ["empty", "prepare"]),
        ("data.tile_size=15", ["config.yaml", "data.tile_size", "15", "16"]),
        ("data.tile_size=64", ["64"]),
        ("training.device=cuda:7", ["config.yaml", "training.device", "cuda:7"]),
        ("training.n_step=1", ["config.yaml", "training.n_step", "n_steps?"]),
        ("training.init_from=absent", ["absent"]),
        ("model.norm_groups=3", ["norm_groups"]),
        ("model.shape=[3, 16, 16]", ["shape"]),
        ("inputs=[absent*.nc]", ["absent*.nc"]),
    ],
)
def test_overwrite_deletes_nothing_before_all_is_known_to_be_good(
    call: Callable[..., Result], data: Path, monkeypatch: pytest.MonkeyPatch, setting: str, words: list[str]
) -> None:
    monkeypatch.chdir(data)
    command, output_dir, values = ("prepare", "store", {}) if "inputs" in setting else ("train", "trained", TRAIN)
    config = write_config(data / "config.yaml", {"output_dir": os.path.realpath(output_dir), **values})
    before = snapshot(data)
    result = call(command, config, "--overwrite", "--set", setting)
    assert result.code == 2
    assert all(word in result.message for word in words), result.message
    assert snapshot(data) == before


@pytest.mark.parametrize("key", ["data.store", "training.init_from"])
def test_overwrite_deletes_no_input(
    call: Callable[..., Result], data: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.chdir(data)
    inside = data / "trained" / "inside"
    shutil.copytree(data / ("store" if key == "data.store" else "trained/checkpoints/step=000001"), inside)
    config = write_config(data / "config.yaml", {"output_dir": str(data / "trained"), **TRAIN})
    before = snapshot(data)
    result = call("train", config, "--overwrite", "--set", f"{key}={inside}")
    assert result.code == 2
    assert key in result.message and str(inside) in result.message
    assert snapshot(data) == before
    shutil.rmtree(inside)


def test_no_control_character_reaches_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "simulate.yaml"
    config.write_text('output_dir: a\n"bad\\nkey\\e[31m": 1\n')
    assert cli.run(["simulate", str(config)]) == 2
    line = capfd.readouterr().err
    assert line.count("\n") == 1 and line.strip().isprintable() and "key" in line
