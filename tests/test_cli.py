"""The command line: exit codes, what is printed where, and what a user sees who got something wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import yaml

from spectralvae import __version__, cli
from spectralvae.config.loading import to_yaml
from spectralvae.errors import ConfigError, InputError, RunError
from spectralvae.runtime.signals import Stopped

MODEL = {"chs": [8, 8], "norm_groups": 2, "n_attention_heads": 1, "embed_dim": 2, "z_channels": 2, "mid_attn": False}
TRAIN: dict[str, Any] = {
    "data": {"store": "store", "batch_size": 2, "tile_size": 16, "num_workers": 0, "n_val_tiles": 2},
    "model": MODEL,
    "training": {"n_steps": 1, "device": "cpu"},
}


@dataclass
class Result:
    """What one call of the command line did."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one line of an error."""
        assert self.err.startswith("spectralvae: error: "), self
        assert self.err.count("\n") == 1, self
        assert self.err.endswith("\n"), self
        return self.err.removeprefix("spectralvae: error: ").rstrip("\n")


def snapshot(path: Path) -> dict[str, bytes | None]:
    """Everything below a folder."""
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs the command line in this process."""

    def caller(*arguments: object) -> Result:
        capfd.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr())

    return caller


def python(*arguments: object) -> Result:
    """Runs another Python."""
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


def write_config(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(to_yaml(values))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``granules`` and ``store``, made by the command line itself."""
    folder = tmp_path_factory.mktemp("data")
    simulate = {"n_granules": 3, "shape": [40, 48], "n_channels": 32, "products": []}
    config = write_config(folder / "simulate.yaml", {"output_dir": str(folder / "granules"), **simulate})
    assert cli.run(["simulate", str(config)]) == 0
    inputs = [str(folder / "granules" / "TEMPO_RAD_*.nc")]
    config = write_config(folder / "prepare.yaml", {"output_dir": str(folder / "store"), "inputs": inputs})
    assert cli.run(["prepare", str(config)]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    """A finished run of one step."""
    config = write_config(data / "train.yaml", {"output_dir": str(data / "trained"), **TRAIN})
    assert cli.run(["train", str(config), "--set", f"data.store={data / 'store'}"]) == 0
    return data / "trained"


@pytest.fixture
def work(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory beside links to the data."""
    monkeypatch.chdir(tmp_path)
    for name in ("granules", "store"):
        (tmp_path / name).symlink_to(data / name)
    return tmp_path


@pytest.fixture
def behaves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[BaseException | None], Path]:
    """Makes `simulate` raise something, and gives a config for it."""

    def install(error: BaseException | None) -> Path:
        def work(*_: object, **__: object) -> list[Path]:
            if error is not None:
                raise error
            return []

        monkeypatch.setattr("spectralvae.simulate.simulate_granules", work)
        return write_config(tmp_path / "simulate.yaml", {"output_dir": str(tmp_path / "out")})

    return install


# --- exit codes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "message", "state"),
    [
        (None, 0, None, "finished"),
        (InputError("file.nc: cut"), 2, "file.nc: cut", "failed"),
        (ConfigError("key: two\nlines\r\n  long"), 2, "key: two lines long", "failed"),
        (RunError("step 7: loss nan"), 1, "step 7: loss nan", "failed"),
        (OSError(5, "Input/output error", "a.nc"), 1, "a.nc: Input/output error", "failed"),
        (OSError("unknown\nfailure"), 1, "unknown failure", "failed"),
        (Stopped(75), 75, None, "stopped"),
        (Stopped(130), 130, None, "stopped"),
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
    assert result.message == message if message else result.err == ""
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
        (["train", "a.yaml", "--overwrit"], "--overwrit"),
        (["train", "a.yaml", "--set"], "--set"),
        (["simulate", "a.yaml", "--debug"], "--debug"),
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


def test_process_exits_with_the_code(tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", {"output_dir": str(tmp_path / "out"), "n_granules": 0})
    result = python("-m", "spectralvae", "simulate", config)
    assert result.code == 2
    assert "n_granules: 0" in result.message
    assert result.out == ""
    config = write_config(tmp_path / "good.yaml", {"output_dir": str(tmp_path / "out")})
    assert python("-m", "spectralvae", "simulate", config, "--print-config").code == 0


# --- help, version, start-up ------------------------------------------------------------------


def test_no_arguments_print_the_help(call: Callable[..., Result]) -> None:
    result = call()
    assert result.code == 2
    assert result.err == ""
    for command in ("simulate", "prepare", "train", "convert"):
        assert command in result.out


def test_help_of_every_command(call: Callable[..., Result]) -> None:
    for command in ("simulate", "prepare", "train", "convert"):
        result = call(command, "--help")
        assert result.code == 0
        assert all(word in result.out for word in (f"spectralvae {command}", "--set", "--overwrite", "--print-config"))
        assert ("--debug" in result.out) == (command == "train")


def test_version(call: Callable[..., Result]) -> None:
    assert call("--version") == Result(0, f"{__version__}\n", "")


HEAVY = (
    "import sys; heavy = {'torch', 'xarray', 'matplotlib', 'h5py', 'zarr'} & set(sys.modules); assert not heavy, heavy"
)


@pytest.mark.parametrize(
    "code",
    [
        "import spectralvae",
        "from spectralvae import cli; assert cli.run(['--help']) == 0",
        "from spectralvae import cli; assert cli.run(['train', '--help']) == 0",
        "from spectralvae import cli; assert cli.run(['--version']) == 0",
        "from spectralvae import cli; assert cli.run(['train', 'absent.yaml']) == 2",
    ],
)
def test_start_up_imports_nothing_heavy(code: str) -> None:
    result = python("-c", f"{code}; {HEAVY}")
    assert result.code == 0, result.err


def test_lazy_names_are_there() -> None:
    import spectralvae
    from spectralvae import open_scene
    from spectralvae.model import AutoencoderKL
    from spectralvae.weights.loading import load_model

    assert spectralvae.load_model is load_model
    assert spectralvae.AutoencoderKL is AutoencoderKL
    assert spectralvae.open_scene is open_scene
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = spectralvae.absent


# --- --print-config, --set, --overwrite -------------------------------------------------------


def test_print_config_reads_back_and_writes_nothing(call: Callable[..., Result], work: Path) -> None:
    values = {"output_dir": "1e-4", "data": {"store": "absent"}}
    config = write_config(work / "config.yaml", values)
    before = snapshot(work)
    first = call("train", config, "--debug", "--set", "training.save_every=7", "--print-config")
    assert (first.code, first.err) == (0, "")
    assert snapshot(work) == before
    printed = yaml.safe_load(first.out)
    assert (printed["training"]["n_steps"], printed["training"]["save_every"]) == (200, 7)
    config.write_text(first.out)
    assert call("train", config, "--print-config").out == first.out


def test_finished_run_says_so(call: Callable[..., Result], behaves: Callable[[BaseException | None], Path]) -> None:
    config = behaves(None)
    for name in ("out", "out [/b] [red]"):
        assert call("simulate", config, "--set", f"output_dir={config.parent / name}").code == 0
        before = snapshot(config.parent)
        result = call("simulate", config, "--set", f"output_dir={config.parent / name}")
        assert (result.code, result.err) == (0, "")
        assert result.out.count("\n") == 1
        assert f"{config.parent / name}: this run is finished" in result.out
        assert "--overwrite" in result.out
        assert snapshot(config.parent) == before


def test_overwrite_deletes_nothing_before_all_is_known_to_be_good(
    call: Callable[..., Result], work: Path, trained: Path
) -> None:
    config = write_config(work / "train.yaml", {"output_dir": str(trained), **TRAIN})
    before = snapshot(trained)
    for setting in ("data.store=absent", "data.tile_size=15", "data.tile_size=64", "training.device=cuda:7"):
        assert call("train", config, "--overwrite", "--set", setting).code == 2
        assert snapshot(trained) == before
    for setting in ("training.init_from=absent", "model.norm_groups=3", "model.shape=[3, 16, 16]", "training.x=1"):
        assert call("train", config, "--overwrite", "--set", setting).code == 2
        assert snapshot(trained) == before
    config = write_config(work / "prepare.yaml", {"output_dir": os.path.realpath("store"), "inputs": ["absent*.nc"]})
    before = snapshot(work / "store")
    assert call("prepare", config, "--overwrite").code == 2
    assert snapshot(work / "store") == before


# --- twelve bad inputs ------------------------------------------------------------------------


@dataclass
class Bad:
    """A command that must be refused, and what its message must hold."""

    command: str
    config: dict[str, Any]
    parts: list[str]


def train(parts: list[str], **sections: dict[str, Any]) -> Bad:
    merged = {name: {**TRAIN.get(name, {}), **sections.get(name, {})} for name in ("data", "model", "training")}
    return Bad("train", {"output_dir": "out", **merged}, parts)


def missing_key(work: Path, trained: Path) -> Bad:
    return Bad("train", {"output_dir": "out", "data": {}}, ["config.yaml", "data.store: this key is required"])


def unknown_key(work: Path, trained: Path) -> Bad:
    return train(["config.yaml", "training.n_step: unknown key", "did you mean n_steps"], training={"n_step": 3})


def wrong_type(work: Path, trained: Path) -> Bad:
    return train(["config.yaml", "data.batch_size: '2'", "integer"], data={"batch_size": "2"})


def missing_file(work: Path, trained: Path) -> Bad:
    return Bad("prepare", {"output_dir": "out", "inputs": ["absent.nc"]}, ["absent.nc", "no such file"])


def truncated_granule(work: Path, trained: Path) -> Bad:
    whole = sorted(Path("granules").glob("TEMPO_RAD_*.nc"))[0].read_bytes()
    Path("TEMPO_RAD_cut.nc").write_bytes(whole[: len(whole) * 2 // 3])
    return Bad(
        "prepare", {"output_dir": "out", "inputs": ["TEMPO_RAD_cut.nc"]}, ["TEMPO_RAD_cut.nc", "truncated", "again"]
    )


def wrong_checkpoint(work: Path, trained: Path) -> Bad:
    parts = ["training.init_from", str(trained), "chs: [8, 8] there, [8, 16] here"]
    return train(parts, model={"chs": [8, 16]}, training={"init_from": str(trained)})


def absent_device(work: Path, trained: Path) -> Bad:
    return train(["training.device: cuda:7", "absent", "auto or cpu"], training={"device": "cuda:7"})


def existing_directory(work: Path, trained: Path) -> Bad:
    Path("out").mkdir()
    Path("out", "thesis.tex").write_text("mine")
    return train(["output_dir: out", "not made by this tool", "another directory"])


def empty_store(work: Path, trained: Path) -> Bad:
    Path("empty").mkdir()
    return train(["store empty", "spectralvae prepare"], data={"store": "empty"})


def indivisible_tile_size(work: Path, trained: Path) -> Bad:
    return train(["config.yaml", "data.tile_size: 15", "multiple of 2", "nearest: 16"], data={"tile_size": 15})


def ambiguous_mat(work: Path, trained: Path) -> Bad:
    scene = np.random.default_rng(0).uniform(1, 2, (20, 20, 5))
    scipy.io.savemat("two.mat", {"first": scene, "second": scene})
    return Bad("prepare", {"output_dir": "out", "inputs": ["two.mat"]}, ["two.mat", "first", "second", "variable: "])


class Hostile:
    """Unpickling it makes a file."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("pwned"),)


def pickle_checkpoint(work: Path, trained: Path) -> Bad:
    import torch

    torch.save({"state_dict": Hostile()}, "hostile.pt")
    return train(["hostile.pt", "never run"], training={"init_from": "hostile.pt"})


TWELVE = [
    missing_key,
    unknown_key,
    wrong_type,
    missing_file,
    truncated_granule,
    wrong_checkpoint,
    absent_device,
    existing_directory,
    empty_store,
    indivisible_tile_size,
    ambiguous_mat,
    pickle_checkpoint,
]


@pytest.mark.parametrize("make", TWELVE, ids=lambda make: make.__name__)
def test_bad_input(call: Callable[..., Result], work: Path, trained: Path, make: Callable[[Path, Path], Bad]) -> None:
    bad = make(work, trained)
    config = write_config(work / "config.yaml", bad.config)
    before = snapshot(work)
    result = call(bad.command, config)
    assert result.code == 2
    assert all(part in result.message for part in bad.parts), result.message
    assert snapshot(work) == before, "nothing was made or changed, no code was run"


def test_output_dir_that_cannot_be_made(call: Callable[..., Result], work: Path) -> None:
    (work / "file").write_text("a file")
    config = write_config(work / "config.yaml", {"output_dir": "file/below/it"})
    result = call("simulate", config)
    assert result.code == 2
    assert "output_dir: file/below/it" in result.message
    assert "not a directory" in result.message
