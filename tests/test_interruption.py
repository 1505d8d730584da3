"""A preparation that is cut off, anywhere and in any way, leaves no store, goes on, and ends as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import signal
import time
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
    refused,
    run_prepare,
    same_content,
    write_level2,
)

from spectralvae.config import PrepareConfig
from spectralvae.data import prepare as prepare_module
from spectralvae.data import scenes as scenes_module
from spectralvae.data.store import Store
from spectralvae.errors import ConfigError, InputError, RunError
from spectralvae.readers import Scene
from spectralvae.runtime.rundir import RunDir
from spectralvae.runtime.signals import Stopped


@pytest.fixture
def granules(tmp_path: Path, write_granule: WriteGranule) -> list[Path]:
    """Clean scans of three days, with NO2."""
    paths = [write_granule(tmp_path / name(f"2024060{i}T180000"), radiance(i)) for i in (1, 2, 3)]
    for i, path in enumerate(paths):
        write_level2(tmp_path / "NO2", path, "NO2", np.random.default_rng(i).normal(3e15, 1e15, (NY, NX)))
    return paths


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {"split": SPLIT_OF_THREE, "l2": {"NO2": {"folder": str(tmp_path / "NO2")}}}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows at a time."""
    monkeypatch.setattr(scenes_module, "BLOCK_SAMPLES", 3 * NX * NC)


class Interrupted(Exception):
    pass


Where = Callable[[pytest.MonkeyPatch, list[Path]], None]


def at_scene_2(monkeypatch: pytest.MonkeyPatch, granules: list[Path]) -> None:
    """Before the second scene is written."""
    write = prepare_module.write

    def interrupted_write(bench: Any, normalization: Any, targets: Any, p: Any, advance: Any) -> None:
        if p.scene.path == granules[1]:
            raise Interrupted
        write(bench, normalization, targets, p, advance)

    monkeypatch.setattr(prepare_module, "write", interrupted_write)


def in_pass(monkeypatch: pytest.MonkeyPatch, granules: list[Path], number: int) -> None:
    """While rows of the second scene are read: in the pass of the statistics (0), or in that which writes (1)."""
    read = Scene.read
    calls = iter(range(1000))

    def interrupted_read(self: Scene, rows: slice, columns: slice = slice(None)) -> Any:
        if self.path == granules[1] and rows.start == 6 and next(calls) == number:
            raise Interrupted
        return read(self, rows, columns)

    monkeypatch.setattr(Scene, "read", interrupted_read)


def in_the_statistics(monkeypatch: pytest.MonkeyPatch, granules: list[Path]) -> None:
    in_pass(monkeypatch, granules, 0)


def in_the_middle_of_scene_2(monkeypatch: pytest.MonkeyPatch, granules: list[Path]) -> None:
    in_pass(monkeypatch, granules, 1)


def at_call(monkeypatch: pytest.MonkeyPatch, module: Any, function: str, number: int, *, after: bool = False) -> None:
    """Before the call of a function of this number, from 0, or after it."""
    original = getattr(module, function)
    calls = iter(range(1000))

    def interrupted(*arguments: Any, **options: Any) -> Any:
        last = next(calls) == number
        if last and not after:
            raise Interrupted
        result = original(*arguments, **options)
        if last:
            raise Interrupted
        return result

    monkeypatch.setattr(module, function, interrupted)


def in_level_2(monkeypatch: pytest.MonkeyPatch, granules: list[Path]) -> None:
    at_call(monkeypatch, scenes_module, "_write_product", 1)


def before_the_group_of_scene_2(monkeypatch: pytest.MonkeyPatch, granules: list[Path]) -> None:
    at_call(monkeypatch, scenes_module, "write_scene_group", 1)


def before_scene_2_has_its_name(monkeypatch: pytest.MonkeyPatch, granules: list[Path]) -> None:
    """Its result is kept: two of the statistics, two of level 2, two of the writing."""
    at_call(monkeypatch, scenes_module, "_save", 5, after=True)


def before_the_marker(monkeypatch: pytest.MonkeyPatch, granules: list[Path]) -> None:
    """All scenes are written, the store is not."""
    at_call(monkeypatch, prepare_module, "finish_store", 0)


@pytest.mark.parametrize(
    "where",
    [
        in_the_statistics,
        at_scene_2,
        in_the_middle_of_scene_2,
        in_level_2,
        before_the_group_of_scene_2,
        before_scene_2_has_its_name,
        before_the_marker,
    ],
)
def test_interrupted_and_started_again(
    tmp_path: Path,
    granules: list[Path],
    settings: dict[str, Any],
    small_blocks: None,
    monkeypatch: pytest.MonkeyPatch,
    where: Where,
) -> None:
    whole = run_prepare(tmp_path / "whole", granules, **settings)
    out = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        where(patch, granules)
        with pytest.raises(Interrupted):
            run_prepare(out, granules, **settings)
    with pytest.raises(InputError, match="not finished"):
        Store(out)
    assert nothing_opens(out)
    first_scene = out / "scenes" / granules[0].stem / "z" / "c" / "0" / "0" / "0"
    written = first_scene.stat().st_mtime_ns if where is not in_the_statistics else None
    begun = [p.name for p in (out / ".partial").glob("*/*") if p.is_dir()]
    assert bool(begun) == (where not in (in_the_statistics, at_scene_2, before_the_marker))

    run_prepare(out, granules, **settings)
    assert same_content(out, whole.path)
    assert not (out / ".partial").exists()
    assert written in (None, first_scene.stat().st_mtime_ns)  # what was done was not done again


def test_statistics_are_not_read_twice(
    tmp_path: Path, granules: list[Path], small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "store"
    with monkeypatch.context() as patch:
        at_scene_2(patch, granules)
        with pytest.raises(Interrupted):
            run_prepare(out, granules, split=SPLIT_OF_THREE)
    read, passes = Scene.read, []

    def counted(self: Scene, rows: slice, columns: slice = slice(None)) -> Any:
        if rows.start == 0:
            passes.append(self.path.name)
        return read(self, rows, columns)

    monkeypatch.setattr(Scene, "read", counted)
    run_prepare(out, granules, split=SPLIT_OF_THREE)
    assert passes == [granules[1].name, granules[2].name]


@pytest.mark.parametrize("change", ["new", "gone", "changed"])
def test_other_files_after_an_interruption_are_refused(
    tmp_path: Path, granules: list[Path], write_granule: WriteGranule, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Statistics and scenes that were made already belong to the old files."""
    out = tmp_path / "store"
    pattern = str(tmp_path / "*.nc")
    with monkeypatch.context() as patch:
        at_scene_2(patch, granules)
        with pytest.raises(Interrupted):
            run_prepare(out, [pattern])
    if change == "new":
        write_granule(tmp_path / name("20240605T180000"), radiance(5))
    elif change == "gone":
        granules[2].unlink()
    else:
        write_granule(granules[0], radiance(8))
        os.utime(granules[0], ns=(1, 1))
    refused(ConfigError, out, [pattern], change, "--overwrite", made=True)
    store = run_prepare(out, [pattern], overwrite=True)
    fresh = run_prepare(tmp_path / "fresh", [pattern])
    assert store.hash == fresh.hash


def test_interrupted_after_the_marker(
    tmp_path: Path, granules: list[Path], write_granule: WriteGranule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is whole but not known as finished: the same inputs finish it, others are not mixed in."""
    out = tmp_path / "store"
    pattern = str(tmp_path / "*.nc")
    note = RunDir.note

    def interrupted_note(self: RunDir, **facts: Any) -> None:
        if "store_hash" in facts:
            raise Interrupted
        note(self, **facts)

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "note", interrupted_note)
        with pytest.raises(Interrupted):
            run_prepare(out, [pattern])
    added = tmp_path / name("20240605T180000")
    write_granule(added, radiance(5))
    with pytest.raises(ConfigError, match="is new since the preparation"):
        run_prepare(out, [pattern])
    added.unlink()
    written = (out / "scenes").stat().st_ino
    assert run_prepare(out, [pattern]).hash == run_prepare(tmp_path / "fresh", [pattern]).hash
    assert (out / "scenes").stat().st_ino == written
    assert not (out / ".partial").exists()


def test_scratch_without_its_plan_is_not_trusted(tmp_path: Path, granules: list[Path]) -> None:
    """A kill while it was deleted leaves statistics that may be of other files."""
    truth = run_prepare(tmp_path / "fresh", granules)
    out = tmp_path / "store"
    config = PrepareConfig.model_validate({"output_dir": str(out), "inputs": [str(g) for g in granules]})
    with RunDir("prepare", config, overwrite=False, resumable=True) as run:
        (out / ".partial" / "old").mkdir(parents=True)
        for scene in truth.scenes:
            (out / ".partial" / "old" / f"{scene.id}.measured.npz").write_bytes(b"stale")
    run.note(state="failed")
    assert run_prepare(out, granules).hash == truth.hash


def test_other_statistics_after_an_interruption_are_refused(
    tmp_path: Path, granules: list[Path], write_granule: WriteGranule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenes that are written already were normalised by the old ones."""
    other = write_granule(tmp_path / "other.nc", radiance(7))
    foreign = run_prepare(tmp_path / "foreign", [other], split={"val_fraction": 0})
    settings: dict[str, Any] = {"split": SPLIT_OF_THREE, "normalization": {"statistics": str(foreign.path)}}
    out = tmp_path / "store"
    with monkeypatch.context() as patch:
        at_scene_2(patch, granules)
        with pytest.raises(Interrupted):
            run_prepare(out, granules, **settings)
    write_granule(other, radiance(8))
    run_prepare(foreign.path, [other], split={"val_fraction": 0}, overwrite=True)
    words = ("normalization.statistics", "has changed since the preparation", "--overwrite")
    refused(ConfigError, out, granules, *words, made=True, **settings)
    store = run_prepare(out, granules, overwrite=True, **settings)
    assert store.hash == run_prepare(tmp_path / "fresh", granules, **settings).hash


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_stopped_by_a_signal_it_goes_on(
    tmp_path: Path, granules: list[Path], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out = tmp_path / "store"
    read = Scene.read
    handler = signal.getsignal(number)

    def signalled_read(self: Scene, rows: slice, columns: slice = slice(None)) -> Any:
        if self.path == granules[1]:
            os.kill(os.getpid(), number)
        return read(self, rows, columns)

    with monkeypatch.context() as patch:
        patch.setattr(Scene, "read", signalled_read)
        with pytest.raises(Stopped) as stopped:
            run_prepare(out, granules, **settings)
    assert stopped.value.exit_code == 75
    assert json.loads((out / "run.json").read_text())["state"] == "stopped"
    assert signal.getsignal(number) == handler
    assert nothing_opens(out)
    run_prepare(out, granules, **settings)
    assert same_content(out, run_prepare(tmp_path / "fresh", granules, **settings).path)


def test_killed_at_any_time(
    tmp_path: Path, granules: list[Path], settings: dict[str, Any], small_blocks: None, starter: Runs
) -> None:
    """Whatever a kill leaves is no store, or is all of it; the next start goes on from there."""
    whole = run_prepare(tmp_path / "whole", granules, **settings)
    out, file = tmp_path / "store", tmp_path / "prepare.yaml"
    config = {"output_dir": str(out), "inputs": [str(p) for p in granules], **settings}
    file.write_text(yaml.safe_dump(config))
    rng = random.Random(4)
    slow = ("slow_blocks", scenes_module.BLOCK_SAMPLES)
    codes = []

    def starts() -> int:
        record = out / "run.json"
        return len(json.loads(record.read_text())["starts"]) if record.exists() else 0

    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1, signal.SIGKILL):
        before = starts()
        child = starter.start("prepare", file, slow)
        while starts() == before and child.wait(0) is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0.1, 0.6))
        child.send(number)
        codes.append(child.wait())
        if not (out / "zarr.json").exists():
            assert nothing_opens(out)
        else:
            assert Store(out).hash == whole.hash
    assert codes[:2] == [-signal.SIGKILL, 75]  # the others may come too late
    last = starter.start("prepare", file, slow)
    assert last.wait() == 0, last.errors
    assert json.loads((out / "run.json").read_text())["state"] == "finished"
    assert same_content(out, whole.path)


def test_a_damaged_file_may_be_mended(tmp_path: Path, granules: list[Path]) -> None:
    """What was done of the other scenes is kept; of this one nothing had been."""
    whole = run_prepare(tmp_path / "whole", granules, split=SPLIT_OF_THREE)
    good = granules[1].read_bytes()
    damaged = bytearray(good)
    damaged[good.index(b"\x00" * 8, len(good) // 2) :] = b""
    granules[1].write_bytes(bytes(damaged))
    out = tmp_path / "mended"
    with pytest.raises(InputError):
        run_prepare(out, granules, split=SPLIT_OF_THREE)
    granules[1].write_bytes(good)
    assert run_prepare(out, granules, split=SPLIT_OF_THREE).hash == whole.hash


def test_a_file_that_fails_in_the_middle_may_be_mended(
    tmp_path: Path, granules: list[Path], small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_prepare(tmp_path / "whole", granules, split=SPLIT_OF_THREE)
    out = tmp_path / "mended"
    with monkeypatch.context() as patch:
        in_the_statistics(patch, granules)
        with pytest.raises(Interrupted):
            run_prepare(out, granules, split=SPLIT_OF_THREE)
    os.utime(granules[1], ns=(1, 1))
    assert run_prepare(out, granules, split=SPLIT_OF_THREE).hash == whole.hash


def test_results_of_another_run_are_not_taken(
    tmp_path: Path, granules: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that was lost may finish its scene while the next run, of another config, is at work."""
    out = tmp_path / "store"
    with monkeypatch.context() as patch:
        before_the_marker(patch, granules)
        with pytest.raises(Interrupted):
            run_prepare(out, granules, split=SPLIT_OF_THREE)
    (old,) = (path for path in (out / ".partial").iterdir() if path.is_dir())
    kept = {path.name: path.read_bytes() for path in old.glob("*.npz")}
    assert kept
    work = prepare_module.measure

    def late(bench: Any, p: Any, advance: Any) -> None:
        old.mkdir(exist_ok=True)
        for name_, content_ in kept.items():
            (old / name_).write_bytes(content_)
        work(bench, p, advance)

    settings: dict[str, Any] = {"split": SPLIT_OF_THREE, "normalization": {"transform": "zscore"}}
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "measure", late)
        store = run_prepare(out, granules, overwrite=True, **settings)
    assert store.hash == run_prepare(tmp_path / "fresh", granules, **settings).hash


def test_a_file_that_changes_in_the_middle(
    tmp_path: Path, granules: list[Path], write_granule: WriteGranule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the statistics and the writing: what is written would not be what was measured."""
    write = prepare_module.write

    def changed(bench: Any, normalization: Any, targets: Any, p: Any, advance: Any) -> None:
        if p.scene.path == granules[0]:
            values = radiance(1)
            values[2, 3, 4] = np.nan
            write_granule(granules[0], values)
        write(bench, normalization, targets, p, advance)

    monkeypatch.setattr(prepare_module, "write", changed)
    with pytest.raises(RunError, match="changed between the statistics and the writing"):
        run_prepare(tmp_path / "store", granules, split=SPLIT_OF_THREE)
    with pytest.raises(InputError):
        Store(tmp_path / "store")


def test_nothing_of_an_older_store_stays(tmp_path: Path, granules: list[Path]) -> None:
    """A folder whose plan was lost begins anew: neither an old root nor old scenes may pass for new ones."""
    out = tmp_path / "store"
    old = run_prepare(out, granules, split={"val_fraction": 0})
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "state": "failed"}))
    stray = out / "scenes" / "stray"
    stray.mkdir()

    def gone(*_: Any) -> Any:
        assert not (out / "zarr.json").exists()
        assert not stray.exists()
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "measure", gone)
        with pytest.raises(Interrupted):
            run_prepare(out, granules, split={"val_fraction": 0})
    assert run_prepare(out, granules, split={"val_fraction": 0}).hash == old.hash
