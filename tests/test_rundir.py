"""Output directories: who may write into one, when a run goes on, and in what state it is left."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from spectralvae.config import SimulateConfig, TrainConfig, may_change_on_resume
from spectralvae.errors import ConfigError, NoRoomError, RunError
from spectralvae.runtime.atomic import write_atomic
from spectralvae.runtime.rundir import RunDir
from spectralvae.runtime.signals import Stopped


def train_config(path: Path, **sections: dict[str, Any]) -> TrainConfig:
    values = {"output_dir": path, **sections}
    return TrainConfig.model_validate({**values, "data": {"store": "store", **sections.get("data", {})}})


def train_dir(path: Path, *, overwrite: bool = False, **sections: dict[str, Any]) -> RunDir:
    config = train_config(path, **sections)
    return RunDir("train", config, overwrite=overwrite, resumable=True, may_differ=may_change_on_resume)


def simulate_dir(path: Path, *, overwrite: bool = False, **keys: Any) -> RunDir:
    return RunDir("simulate", SimulateConfig(output_dir=path, **keys), overwrite=overwrite)


def record(path: Path) -> dict[str, Any]:
    return json.loads((path / "run.json").read_text())


def snapshot(path: Path) -> dict[str, bytes | None]:
    """Everything below a folder."""
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


def stop(path: Path, **sections: dict[str, Any]) -> None:
    """Leave a training run that was stopped by a signal."""
    with pytest.raises(Stopped), train_dir(path, **sections):
        raise Stopped(75)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


# --- who may write ----------------------------------------------------------------------------


def test_nothing_is_made_before_the_directory_is_entered(path: Path) -> None:
    run = train_dir(path)
    assert not path.exists()
    with run:
        assert record(path)["state"] == "running"
    assert record(path)["state"] == "finished"


def test_fresh_directory_holds_the_resolved_config(path: Path) -> None:
    with train_dir(path / "below" / "others") as run:
        assert not run.resuming
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == run.config == record(run.path)["config"]
    found = record(run.path)
    assert (found["command"], len(found["starts"])) == ("train", 1)
    assert found["starts"][0]["ended"]


def test_empty_directory_may_be_used(path: Path) -> None:
    path.mkdir()
    with train_dir(path):
        pass
    assert record(path)["state"] == "finished"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("run_json", [None, "{}", "[]", '{"tool": "other", "command": "train"}'])
def test_directory_of_others_is_refused_and_untouched(path: Path, run_json: str | None, overwrite: bool) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("mine")
    if run_json is not None:
        (path / "run.json").write_text(run_json)
    before = snapshot(path)
    with pytest.raises(ConfigError, match="not made by this tool"):
        train_dir(path, overwrite=overwrite)
    assert snapshot(path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_directory_of_another_command_is_refused_and_untouched(path: Path, overwrite: bool) -> None:
    with simulate_dir(path):
        (path / "granule.nc").write_text("data")
    before = snapshot(path)
    with pytest.raises(ConfigError, match=r"made by spectralvae simulate.*another directory"):
        train_dir(path, overwrite=overwrite)
    assert snapshot(path) == before


def test_overwrite_clears_its_own_directory_and_follows_no_links(path: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    with train_dir(path):
        (path / "checkpoints" / "step=000001").mkdir(parents=True)
        (path / "checkpoints" / "step=000001" / "old").write_text("old")
        (path / "linked").symlink_to(outside)
    run = train_dir(path, overwrite=True, optimizer={"lr": 1.0})
    assert (path / "checkpoints").exists(), "nothing is deleted before the directory is entered"
    with run:
        assert not run.resuming
        assert {p.name for p in path.iterdir()} == {".lock", "run.json", "config.yaml"}
    assert len(record(path)["starts"]) == 1
    assert record(path)["config"]["optimizer"]["lr"] == 1.0
    assert (outside / "kept").read_text() == "kept"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe", b'{"tool": "spectralvae"}', b'{"tool": "spectralvae", "command": "train"}']
)
def test_damaged_record_is_refused_and_untouched(path: Path, content: bytes, overwrite: bool) -> None:
    with train_dir(path):
        (path / "results").write_text("old")
    (path / "run.json").write_bytes(content)
    before = snapshot(path)
    with pytest.raises(ConfigError, match=r"run\.json is damaged.*choose another"):
        train_dir(path, overwrite=overwrite)
    assert snapshot(path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_output_dir_that_is_no_directory_is_refused(path: Path, overwrite: bool) -> None:
    path.write_text("a file")
    for below in (path, path / "a", path / "a" / "b"):
        with pytest.raises(ConfigError, match=r"output_dir: .*run is not a directory"):
            train_dir(below, overwrite=overwrite)
    assert path.read_text() == "a file"


def test_output_dir_without_permission_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # a superuser may write anywhere
    with pytest.raises(ConfigError, match=f"no permission to write in {path.parent}"):
        train_dir(path)


def test_link_that_leads_nowhere_is_refused(path: Path) -> None:
    path.symlink_to(path.with_name("absent"))
    with pytest.raises(ConfigError, match="is not a directory"):
        train_dir(path)


def test_output_dir_may_be_a_link_to_a_directory(path: Path, tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    path.symlink_to(real)
    stop(path)
    assert record(real)["state"] == "stopped"
    assert train_dir(path).resuming
    assert train_dir(real).resuming, "it is the same directory"
    with train_dir(path, overwrite=True):
        pass
    assert path.is_symlink()


# --- going on ---------------------------------------------------------------------------------


def test_unfinished_run_goes_on(path: Path) -> None:
    stop(path)
    with train_dir(path) as run:
        assert run.resuming
        assert record(path)["state"] == "running"
    assert [("changed" in start) for start in record(path)["starts"]] == [False, False]


def test_finished_run_is_left_as_it_is(path: Path) -> None:
    with train_dir(path):
        pass
    before = snapshot(path)
    for run in (train_dir(path), train_dir(path, training={"log_every": 3}, data={"num_workers": 0})):
        assert run.finished
        assert not run.resuming
    assert snapshot(path) == before


def test_finished_run_goes_on_for_more_steps(path: Path) -> None:
    with train_dir(path, training={"n_steps": 10}):
        pass
    run = train_dir(path, training={"n_steps": 20})
    assert run.resuming
    assert not run.finished


def test_moved_run_goes_on(path: Path) -> None:
    stop(path)
    path.rename(path.with_name("moved"))
    assert train_dir(path.with_name("moved")).resuming


@pytest.mark.parametrize(
    ("section", "key", "there", "here"),
    [
        ("training", "n_steps", 200, 100),
        ("training", "grad_clip", 1.0, 2.0),
        ("training", "precision", "32-true", "bf16-mixed"),
        ("training", "compile", False, True),
        ("training", "init_from", None, "other"),
        ("data", "batch_size", 32, 16),
        ("data", "tile_size", 64, 32),
        ("data", "max_invalid_fraction", 0.5, 0.25),
        ("model", "chs", [16, 8], [8, 16]),
        ("optimizer", "lr", 1e-4, 1e-3),
    ],
)
def test_other_config_is_refused_with_both_values(path: Path, section: str, key: str, there: Any, here: Any) -> None:
    stop(path, **{section: {key: there}})
    before = snapshot(path)
    with pytest.raises(ConfigError) as caught:
        train_dir(path, **{section: {key: here}})
    message = str(caught.value)
    assert f"{section}.{key}: {there!r} there, {here!r} here" in message
    assert "--overwrite" in message
    assert snapshot(path) == before


def test_all_differences_are_listed(path: Path) -> None:
    stop(path)
    with pytest.raises(ConfigError) as caught:
        train_dir(path, optimizer={"lr": 1.0}, data={"batch_size": 2}, training={"log_every": 1})
    assert "optimizer.lr" in str(caught.value)
    assert "data.batch_size" in str(caught.value)
    assert "log_every" not in str(caught.value), "that one may differ"


@pytest.mark.parametrize(
    ("section", "key", "there", "here"),
    [
        ("training", "n_steps", 100, 200),
        ("training", "save_every", 5, 3),
        ("training", "val_every", 5, 7),
        ("training", "log_every", 5, 7),
        ("training", "plot_every", 5, 7),
        ("training", "keep_last", None, 2),
        ("training", "keep_every", 5, None),
        ("training", "device", "cpu", "cuda:1"),
        ("data", "num_workers", 2, 0),
        ("data", "store", "here", "/there"),
    ],
)
def test_what_may_differ_is_recorded(path: Path, section: str, key: str, there: Any, here: Any) -> None:
    stop(path, **{section: {key: there}})
    with train_dir(path, **{section: {key: here}}) as run:
        assert run.resuming
    found = record(path)
    assert found["starts"][1]["changed"] == {f"{section}.{key}": [there, here]}
    assert found["config"][section][key] == here
    assert yaml.safe_load((path / "config.yaml").read_text())[section][key] == here


def test_commands_that_cannot_go_on_ask_for_overwrite(path: Path) -> None:
    with pytest.raises(ValueError, match="disk"), simulate_dir(path):
        raise ValueError("disk")
    with pytest.raises(ConfigError, match=r"did not finish \(state: failed\).*--overwrite"):
        simulate_dir(path)
    with simulate_dir(path, overwrite=True):
        pass
    assert simulate_dir(path).finished


# --- states -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (Stopped(75), "stopped"),
        (Stopped(130), "stopped"),
        (KeyboardInterrupt(), "stopped"),
        (RunError("loss nan"), "failed"),
        (ConfigError("late"), "failed"),
        (SystemExit(3), "failed"),
    ],
)
def test_state_tells_how_the_run_ended(path: Path, error: BaseException, state: str) -> None:
    with pytest.raises(type(error)), train_dir(path):
        raise error
    found = record(path)
    assert found["state"] == state
    assert ("error" in found) == (state == "failed")
    with train_dir(path):
        assert "error" not in record(path)
    assert record(path)["state"] == "finished"


def test_notes_are_kept_over_starts(path: Path) -> None:
    with train_dir(path, training={"n_steps": 1}) as run:
        run.note(store_hash="abc")
    run = train_dir(path)
    assert run.record["store_hash"] == "abc"
    with run:
        pass
    assert record(path)["store_hash"] == "abc"


def test_full_disk_does_not_hide_the_first_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    run = train_dir(path).__enter__()
    monkeypatch.setattr("spectralvae.runtime.rundir.write_atomic", no_space)
    run.__exit__(RunError, RunError("loss nan"), None)  # raises nothing, so that the error goes on
    monkeypatch.undo()
    with pytest.raises(RunError, match=r"run\.json"), train_dir(path):
        monkeypatch.setattr("spectralvae.runtime.rundir.write_atomic", no_space)


@contextmanager
def file_limit(n_bytes: int) -> Iterator[None]:
    """No process may write beyond so many bytes of a file (Python ignores the signal)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_does_not_fit_is_told_in_one_line(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_atomic(target, "old")
    with pytest.raises(NoRoomError) as error, file_limit(1000):
        write_atomic(target, "x" * 12_345)
    told = r"12,345 bytes are needed, [\d,]+ bytes are free, 1,000 bytes are the limit of a file"
    assert re.fullmatch(rf".*/file: File too large: {told}; raise `ulimit -f` and start again", str(error.value))
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("code", "remedy"), [("ENOSPC", "make room"), ("EDQUOT", "quota raised"), ("EFBIG", "raise `ulimit -f`")]
)
@pytest.mark.parametrize("name", [None, "elsewhere/granule.nc"])
def test_no_room_for_what_others_write(path: Path, code: str, remedy: str, name: str | None) -> None:
    """A library's OSError, with or without the name of a file."""
    number = getattr(errno, code)
    names = () if name is None else (str(path / name),)
    with pytest.raises(NoRoomError) as error, train_dir(path):
        raise OSError(number, os.strerror(number), *names)
    told = str(error.value)
    assert told.startswith(f"{path / name if name else path}: {os.strerror(number)}: ")
    free = re.search(r": ([\d,]+) bytes are free; ", told)
    assert free is not None
    assert int(free[1].replace(",", "")) == pytest.approx(shutil.disk_usage(path).free, rel=0.2)
    assert remedy in told
    assert "\n" not in told
    assert record(path)["state"] == "failed"
    assert record(path)["error"] == f"NoRoomError: {told}"


def test_other_errors_of_the_system_are_left_alone(path: Path) -> None:
    with pytest.raises(OSError, match="Input/output") as error, train_dir(path):
        raise OSError(errno.EIO, "Input/output error", "a.nc")
    assert type(error.value) is OSError


def test_no_room_for_the_directory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train_dir(path)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(NoRoomError, match=r"No space left on device: .* bytes are free; make room"), run:
        pass


@pytest.mark.parametrize("error", [RunError("loss nan"), None])
def test_first_error_counts_where_the_record_does_not_fit(path: Path, error: RunError | None) -> None:
    def work() -> None:
        with ExitStack() as stack, train_dir(path):
            stack.enter_context(file_limit(10))
            if error is not None:
                raise error

    with pytest.raises(RunError, match=r"^loss nan$" if error else r"run\.json: File too large"):
        work()
    assert record(path)["state"] == "running"
    with train_dir(path):  # the lock is free, and there is room again
        pass
    assert record(path)["state"] == "finished"


def test_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    write_atomic(target, "old")

    def crash(_: int) -> None:
        raise OSError(5, "crash")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="crash"):
        write_atomic(target, "new and longer")
    assert target.read_text() == "old"


def test_clearing_that_was_cut_off_is_not_taken_for_a_finished_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with train_dir(path):
        (path / "checkpoints").mkdir()

    def cut_off(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt), train_dir(path, overwrite=True):
        pass
    monkeypatch.undo()
    assert not train_dir(path).finished
    with train_dir(path, overwrite=True):
        assert not (path / "checkpoints").exists()


# --- two at a time ----------------------------------------------------------------------------

HOLDER = """
import os, sys, time
from pathlib import Path
from spectralvae.config import SimulateConfig
from spectralvae.runtime.rundir import RunDir

with RunDir("simulate", SimulateConfig(output_dir=Path(sys.argv[1])), overwrite=False):
    child = os.fork() if "fork" in sys.argv else -1
    if child == 0:
        os.close(1)
    else:
        print(child, flush=True)
    time.sleep(60)
"""


def hold(path: Path, *options: str) -> tuple[subprocess.Popen[str], int]:
    """A process that is in the middle of a run, and the id of its child."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, path, *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_second_process_is_refused_until_the_first_is_gone(path: Path) -> None:
    process, child = hold(path, "fork")
    try:
        before = snapshot(path)
        with (
            pytest.raises(ConfigError, match="in use by another running `simulate`"),
            simulate_dir(path, overwrite=True),
        ):
            pass
        assert snapshot(path) == before
        end(process)
        os.kill(child, 0)  # lives on, with the lock's file open
        assert record(path)["state"] == "running", "SIGKILL leaves it so"
        with simulate_dir(path, overwrite=True):
            pass
        assert record(path)["state"] == "finished"
    finally:
        end(process)
        os.kill(child, signal.SIGKILL)


def test_start_that_was_overtaken_is_refused(path: Path) -> None:
    late = train_dir(path)  # sees no run, then imports torch for seconds
    with train_dir(path):
        pass
    before = snapshot(path)
    with pytest.raises(ConfigError, match="used by another"), late:
        pass
    assert snapshot(path) == before


def test_other_names_of_the_directory_are_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(path)
    monkeypatch.chdir(path.parent)
    assert train_dir(Path(path.name)).resuming


def test_inputs_inside_a_directory_to_be_cleared_are_refused(tmp_path):
    with RunDir("simulate", SimulateConfig(output_dir=tmp_path / "out"), overwrite=False):
        (tmp_path / "out" / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    again = RunDir("simulate", SimulateConfig(output_dir=tmp_path / "out"), overwrite=True)
    for inside in (tmp_path / "out" / "data", tmp_path / "link" / "data", tmp_path / "out"):
        with pytest.raises(ConfigError, match=r"inputs: .* lies in output_dir"):
            again.refuse_inside("inputs", inside)
    again.refuse_inside("inputs", tmp_path / "outside")
    RunDir("simulate", SimulateConfig(output_dir=tmp_path / "new"), overwrite=True).refuse_inside(
        "inputs", tmp_path / "new" / "data"
    )


def test_overwriting_deletes_what_says_complete_first(tmp_path, monkeypatch):
    with RunDir("simulate", SimulateConfig(output_dir=tmp_path / "out"), overwrite=False):
        for name in ("a", "manifest.json", "zarr.json"):
            (tmp_path / "out" / name).write_text("")
    gone = []
    original = Path.unlink

    def unlink(self, missing_ok=False):
        if not self.name.startswith("."):  # a temporary name is not part of the directory's content
            gone.append(self.name)
        original(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with RunDir("simulate", SimulateConfig(output_dir=tmp_path / "out"), overwrite=True):
        pass
    assert set(gone[:2]) == {"manifest.json", "zarr.json"}
    assert gone[-1] == "run.json"
