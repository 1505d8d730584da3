"""A preparation that is cut off, anywhere and in any way, leaves no store, resumes, and ends as if nothing had been."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from inferring import Runs
from preparing import (
    NC,
    NX,
    NY,
    SPLIT_OF_THREE,
    WriteGranule,
    name,
    nothing_opens,
    radiance,
    run_prepare,
    same_content,
    write_level2,
)
from refusals import refused

from spectralvae.data import blocks as blocks_module
from spectralvae.data.store import Store
from spectralvae.errors import ConfigError, InputError, RunError
from spectralvae.readers import Scene
from spectralvae.runtime.rundir import RunDir


@pytest.fixture
def granules(tmp_path: Path, write_granule: WriteGranule) -> list[Path]:
    """Clean scans of three days, with NO2; the last one is for validation, so only the others are measured."""
    paths = [write_granule(tmp_path / name(f"2024060{i}T180000"), radiance(i)) for i in (1, 2, 3)]
    for i, path in enumerate(paths):
        write_level2(tmp_path / "NO2", path, "NO2", np.random.default_rng(i).normal(3e15, 1e15, (NY, NX)))
    return paths


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {"split": SPLIT_OF_THREE, "l2": {"NO2": {"folder": str(tmp_path / "NO2")}}}


@pytest.fixture
def config(tmp_path: Path, granules: list[Path], settings: dict[str, Any]) -> Path:
    """A config file whose output goes to `store`."""
    file = tmp_path / "prepare.yaml"
    file.write_text(
        yaml.safe_dump({"output_dir": str(tmp_path / "store"), "inputs": [str(p) for p in granules], **settings})
    )
    return file


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows at a time."""
    monkeypatch.setattr(blocks_module, "BLOCK_SAMPLES", 3 * NX * NC)


class Interrupted(Exception):
    pass


def interrupt() -> None:
    raise Interrupted


def prepare_with(
    action: Callable[[], object], granule: Path, number: int, out: Path, inputs: list[Any], **settings: Any
) -> Store:
    """Prepare; ``action`` is called when reading of a granule begins: for the statistics (0), or to be written (1)."""
    read, calls = Scene.read, []

    def watched(self: Scene, rows: slice, columns: slice = slice(None)) -> Any:
        if self.path == granule and rows.start == 0:
            calls.append(0)
            if len(calls) == number + 1:
                action()
        return read(self, rows, columns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scene, "read", watched)
        return run_prepare(out, inputs, **settings)


def interrupted(granule: Path, number: int, out: Path, inputs: list[Any], **settings: Any) -> None:
    with pytest.raises(Interrupted):
        prepare_with(interrupt, granule, number, out, inputs, **settings)
    assert nothing_opens(out)


# --- killed -------------------------------------------------------------------------------------------


def test_killed_before_any_change_of_a_file(
    amount: Callable[[int, int], int],
    tmp_path: Path,
    granules: list[Path],
    settings: dict[str, Any],
    config: Path,
    starter: Runs,
) -> None:
    """What a kill leaves is no store, or all of it; what was done is not done again."""
    whole = run_prepare(tmp_path / "whole", granules, **settings)
    out, log = tmp_path / "store", tmp_path / "changes"
    assert starter.start("prepare", config, ("at_change", f"{out}/", 0, 0, str(log))).wait() == 0
    n_changes = len(log.read_text().splitlines())
    assert n_changes > 60
    kept = opened = 0
    first_scene = out / "scenes" / granules[0].stem / "z" / "c" / "0" / "0" / "0"
    for n in np.linspace(10, n_changes, amount(6, n_changes - 9)).astype(int).tolist():
        shutil.rmtree(out)
        assert starter.start("prepare", config, ("at_change", f"{out}/", n)).wait() == -signal.SIGKILL
        if (out / "zarr.json").exists():
            assert Store(out).hash == whole.hash
            opened += 1
        else:
            assert nothing_opens(out)
        written = first_scene.stat().st_mtime_ns if first_scene.exists() else None
        run_prepare(out, granules, **settings)
        assert same_content(out, whole.path)
        assert not (out / ".partial").exists()
        if written is not None:
            assert first_scene.stat().st_mtime_ns == written
            kept += 1
    assert kept > 1 and opened > 0


def test_cut_off_in_the_middle_of_a_scene(
    tmp_path: Path, granules: list[Path], settings: dict[str, Any], config: Path, small_blocks: None, starter: Runs
) -> None:
    """Killed, or stopped by a signal, again and again: each start resumes from there."""
    whole = run_prepare(tmp_path / "whole", granules, **settings)
    out = tmp_path / "store"
    for n, number in ((2, signal.SIGKILL), (6, signal.SIGTERM), (7, signal.SIGUSR1), (5, signal.SIGKILL)):
        child = starter.start("prepare", config, ("at_block", 3 * NX * NC, n, number))
        assert child.wait() == (-number if number == signal.SIGKILL else 75)
        assert nothing_opens(out)
        state = "running" if number == signal.SIGKILL else "stopped"
        assert json.loads((out / "run.json").read_text())["state"] == state
    last = starter.start("prepare", config, ("at_block", 3 * NX * NC, 0, 0))
    assert last.wait() == 0, last.errors
    assert json.loads((out / "run.json").read_text())["state"] == "finished"
    assert same_content(out, whole.path)


# --- what is kept -------------------------------------------------------------------------------------


def test_what_was_done_is_kept(
    tmp_path: Path, granules: list[Path], small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics are not read twice; a file that failed before anything was kept of it may be mended."""
    whole, mended, out = (tmp_path / name for name in ("whole", "mended", "store"))
    interrupted(granules[1], 0, mended, granules, split=SPLIT_OF_THREE)
    os.utime(granules[1], ns=(1, 1))
    expected = run_prepare(whole, granules, split=SPLIT_OF_THREE)
    assert run_prepare(mended, granules, split=SPLIT_OF_THREE).hash == expected.hash
    interrupted(granules[1], 1, out, granules, split=SPLIT_OF_THREE)
    read, passes = Scene.read, []

    def counted(self: Scene, rows: slice, columns: slice = slice(None)) -> Any:
        if rows.start == 0:
            passes.append(self.path.name)
        return read(self, rows, columns)

    monkeypatch.setattr(Scene, "read", counted)
    run_prepare(out, granules, split=SPLIT_OF_THREE)
    assert passes == [granules[1].name, granules[2].name]


@pytest.mark.parametrize("change", ["new", "gone", "changed", "statistics"])
def test_other_files_after_an_interruption_are_refused(
    tmp_path: Path, granules: list[Path], write_granule: WriteGranule, change: str
) -> None:
    """Statistics and scenes that were made already belong to the old files."""
    out = tmp_path / "store"
    inputs: list[Any] = [str(tmp_path / "TEMPO*.nc")]
    settings: dict[str, Any] = {"split": SPLIT_OF_THREE}
    fourth, other, foreign = tmp_path / name("20240602T190000"), tmp_path / "other.nc", tmp_path / "foreign"
    if change == "gone":
        write_granule(fourth, radiance(5))
    elif change == "statistics":
        run_prepare(foreign, [write_granule(other, radiance(7))], split={"val_fraction": 0})
        settings["normalization"] = {"statistics": str(foreign)}
    interrupted(granules[1], 0 if change == "statistics" else 1, out, inputs, **settings)
    word = {"changed": granules[0].stem, "statistics": "normalization.statistics"}.get(change, fourth.stem)
    if change == "new":
        write_granule(fourth, radiance(5))
    elif change == "gone":
        fourth.unlink()
    elif change == "changed":
        os.utime(write_granule(granules[0], radiance(8)), ns=(1, 1))
    else:
        run_prepare(foreign, [write_granule(other, radiance(8))], split={"val_fraction": 0}, overwrite=True)
    with refused(ConfigError, word, "--overwrite"):
        run_prepare(out, inputs, **settings)
    assert nothing_opens(out)
    store = run_prepare(out, inputs, overwrite=True, **settings)
    assert store.hash == run_prepare(tmp_path / "fresh", inputs, **settings).hash


def test_interrupted_after_the_marker(
    tmp_path: Path, granules: list[Path], write_granule: WriteGranule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is whole but not known as finished: the same inputs finish it, others are not mixed in."""
    out = tmp_path / "store"
    inputs = [str(tmp_path / "TEMPO*.nc")]
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "note", lambda *_, **facts: interrupt() if "store_hash" in facts else None)
        with pytest.raises(Interrupted):
            run_prepare(out, inputs)
    added = write_granule(tmp_path / name("20240605T180000"), radiance(5))
    with refused(ConfigError, added.stem):
        run_prepare(out, inputs)
    added.unlink()
    written = (out / "scenes").stat().st_ino
    assert run_prepare(out, inputs).hash == run_prepare(tmp_path / "fresh", inputs).hash
    assert (out / "scenes").stat().st_ino == written


# --- what is not trusted ------------------------------------------------------------------------------


def test_nothing_of_an_older_store_stays(tmp_path: Path, granules: list[Path]) -> None:
    """A folder whose plan was lost begins anew: neither root nor scenes nor statistics of before pass for new ones."""
    out, split = tmp_path / "store", {"val_fraction": 0}
    old = run_prepare(out, granules, split=split)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "state": "failed"}))
    stray = out / "scenes" / "stray"
    stray.mkdir()
    (out / ".partial" / "old").mkdir(parents=True)
    for scene in old.scenes:
        (out / ".partial" / "old" / f"{scene.id}.measured.npz").write_bytes(b"stale")
    interrupted(granules[0], 0, out, granules, split=split)
    assert not (out / "zarr.json").exists() and not stray.exists()
    assert run_prepare(out, granules, split=split).hash == old.hash


def test_results_of_another_run_are_not_taken(tmp_path: Path, granules: list[Path]) -> None:
    """A worker that was lost may finish its scene while the next run, of another config, is at work."""
    out = tmp_path / "store"
    interrupted(granules[2], 0, out, granules, split=SPLIT_OF_THREE)  # a scene for validation is only written
    (old,) = (path for path in (out / ".partial").iterdir() if path.is_dir())
    kept = {path: path.read_bytes() for path in old.glob("*.npz")}
    assert len(kept) == 4  # two are measured and written

    def late() -> None:
        old.mkdir(exist_ok=True)
        for path, content in kept.items():
            path.write_bytes(content)

    changed: dict[str, Any] = {"split": SPLIT_OF_THREE, "normalization": {"transform": "zscore"}}
    store = prepare_with(late, granules[0], 0, out, granules, overwrite=True, **changed)
    assert store.hash == run_prepare(tmp_path / "fresh", granules, **changed).hash


def test_a_file_that_changes_in_the_middle(tmp_path: Path, granules: list[Path], write_granule: WriteGranule) -> None:
    """Between the statistics and the writing: what is written would not be what was measured."""

    def change() -> None:
        values = radiance(1)
        values[2, 3, 4] = np.nan
        write_granule(granules[0], values)

    with pytest.raises(RunError):
        prepare_with(change, granules[1], 0, tmp_path / "store", granules, split=SPLIT_OF_THREE)
    with pytest.raises(InputError):
        Store(tmp_path / "store")
