"""Output directories: who may write into one, when a run is resumed, and in what state it is left."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from refusals import refused
from running import record

from spectralvae.config import PrepareConfig, SimulateConfig, TrainConfig
from spectralvae.errors import ConfigError, NoRoomError, RunError
from spectralvae.runtime.atomic import write_atomic
from spectralvae.runtime.rundir import RunDir
from spectralvae.runtime.signals import Stopped


def train_dir(path: Path, *, overwrite: bool = False, **sections: dict[str, Any]) -> RunDir:
    values = {"output_dir": path, **sections, "data": {"store": "store", **sections.get("data", {})}}
    config = TrainConfig.model_validate(values)
    return RunDir("train", config, overwrite=overwrite)


def simulate_dir(path: Path, *, overwrite: bool = False) -> RunDir:
    return RunDir("simulate", SimulateConfig(output_dir=path), overwrite=overwrite)


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


def test_a_run_from_beginning_to_end(path: Path) -> None:
    path.mkdir()  # an empty directory may be used
    run = train_dir(path / "below" / "others")
    assert not (path / "below").exists(), "nothing is made before the directory is entered"
    with run:
        assert record(run.path)["state"] == "running"
        assert run.opens_as == "fresh"
        run.note(store_hash="abc")
    found = record(run.path)
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == run.config == found["config"]
    assert (found["command"], found["state"], found["store_hash"]) == ("train", "finished", "abc")
    assert len(found["starts"]) == 1 and found["starts"][0]["ended"]


@pytest.mark.parametrize(
    "run_json",
    [
        None,
        b"[]",
        b'{"tool": "other", "command": "train"}',
        b'{"tool": "spectralvae", "command": "simulate", "config": {}, "state": "failed", "starts": []}',
        b"{",
        b"\xff\xfe",
        b'{"tool": "spectralvae", "command": "train"}',
    ],
)
def test_directory_of_others_is_refused_and_untouched(path: Path, run_json: bytes | None) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("mine")
    if run_json is not None:
        (path / "run.json").write_bytes(run_json)
    before = snapshot(path)
    for overwrite in (False, True):
        with refused(ConfigError, key="output_dir", value=path):
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
        assert run.opens_as == "overwrite"
        assert {p.name for p in path.iterdir()} == {".lock", "run.json", "config.yaml"}
    assert len(record(path)["starts"]) == 1
    assert record(path)["config"]["optimizer"]["lr"] == 1.0
    assert (outside / "kept").read_text() == "kept"


def test_output_dir_that_cannot_be_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("a file")
    link.symlink_to(tmp_path / "absent")
    for bad, named in ((file, file), (file / "a", file), (file / "a" / "b", file), (link, link)):
        with refused(ConfigError, f"{named} is not a directory", key="output_dir", value=bad):
            train_dir(bad, overwrite=True)
    assert file.read_text() == "a file"
    monkeypatch.setattr(os, "access", lambda *_: False)  # a superuser may write anywhere
    with refused(ConfigError, "permission", str(tmp_path), key="output_dir"):
        train_dir(tmp_path / "run")


def test_other_names_of_the_directory_are_the_same(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "real"
    real.mkdir()
    path.symlink_to(real)
    stop(path)
    assert record(real)["state"] == "stopped"
    monkeypatch.chdir(tmp_path)
    for name in (path, real, Path("real")):
        assert train_dir(name).opens_as == "resumable"
    with train_dir(path, overwrite=True):
        pass
    assert path.is_symlink()
    stop(real, training={"log_every": 3})
    real.rename("moved")
    assert train_dir(Path("moved"), training={"log_every": 3}).opens_as == "resumable"


# --- resuming ---------------------------------------------------------------------------------


def test_finished_run_is_left_as_it_is_but_for_more_steps(path: Path) -> None:
    with train_dir(path, training={"n_steps": 10}) as run:
        run.note(store_hash="abc")
    before = snapshot(path)
    for others in ({}, {"log_every": 3, "device": "cpu"}):
        run = train_dir(path, training={"n_steps": 10, **others})
        assert run.opens_as == "finished"
    run = train_dir(path, training={"n_steps": 20})
    assert run.opens_as == "resumable"
    assert snapshot(path) == before
    with run:
        assert record(path)["state"] == "running"
    found = record(path)
    assert found["store_hash"] == "abc", "notes are kept"
    assert [start.get("changed") for start in found["starts"]] == [None, {"training.n_steps": [10, 20]}]
    assert yaml.safe_load((path / "config.yaml").read_text()) == found["config"] == run.config


def test_other_config_is_refused_with_all_differences(path: Path) -> None:
    stop(path, training={"n_steps": 200}, model={"chs": [16, 8]})
    before = snapshot(path)
    words = ["training.n_steps: 200", "100", "model.chs: [16, 8]", "[8, 16]", "training.init_from: null", "'other'"]
    with refused(ConfigError, *words, "--overwrite", key="output_dir", value=path) as caught:
        train_dir(path, training={"n_steps": 100, "init_from": "other", "log_every": 1}, model={"chs": [8, 16]})
    assert "log_every" not in str(caught.value), "that one may differ"
    assert f"training.init_from: {path}" in caught.value.remedy, "it keeps what was learned"
    assert snapshot(path) == before


def test_only_training_is_pointed_to_its_weights(path: Path) -> None:
    def prepare_dir(**values: Any) -> RunDir:
        config = PrepareConfig.model_validate({"output_dir": path, "inputs": ["a.nc"], **values})
        return RunDir("prepare", config, overwrite=False)

    with pytest.raises(Stopped), prepare_dir():
        raise Stopped(75)
    assert prepare_dir(cluster="local", n_workers=2).opens_as == "resumable"
    with refused(ConfigError, "dtype", key="output_dir", value=path) as caught:
        prepare_dir(dtype="float32", cluster="local")
    assert "init_from" not in caught.value.remedy and "cluster" not in str(caught.value)


def test_commands_that_cannot_resume_ask_for_overwrite(path: Path) -> None:
    with pytest.raises(ValueError, match="disk"), simulate_dir(path):
        raise ValueError("disk")
    with refused(ConfigError, "simulate", "failed", "--overwrite", key="output_dir", value=path):
        simulate_dir(path)
    with simulate_dir(path, overwrite=True):
        pass
    assert simulate_dir(path).opens_as == "finished"


# --- states -----------------------------------------------------------------------------------


def test_an_error_is_recorded_until_the_next_start(path: Path) -> None:
    error = OSError(errno.EIO, "Input/output error", "a.nc")
    with pytest.raises(OSError, match=r"a\.nc") as caught, train_dir(path):
        raise error
    assert caught.value is error
    assert (record(path)["state"], record(path)["error"]) == ("failed", f"OSError: {error}")
    stop(path)
    assert record(path)["state"] == "stopped" and "error" not in record(path)


@contextmanager
def file_limit(n_bytes: int) -> Iterator[None]:
    """No process may write beyond so many bytes of a file (Python ignores the signal)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_does_not_fit_is_told_and_the_old_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    write_atomic(target, "old")
    with refused(NoRoomError, "12,345 bytes", "1,000 bytes", "ulimit -f", path=target), file_limit(1000):
        write_atomic(target, "x" * 12_345)

    def crash(_: int) -> None:
        raise OSError(5, "crash")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="crash"):
        write_atomic(target, "new and longer")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("code", "word"), [("ENOSPC", "room"), ("EDQUOT", "quota"), ("EFBIG", "ulimit -f")])
@pytest.mark.parametrize("name", [None, "elsewhere/granule.nc"])
def test_no_room_for_what_others_write(path: Path, code: str, word: str, name: str | None) -> None:
    """A library's OSError, with or without the name of a file."""
    number = getattr(errno, code)
    names = () if name is None else (str(path / name),)
    where = path / name if name else path
    with refused(NoRoomError, os.strerror(number), path=where) as caught, train_dir(path):
        raise OSError(number, os.strerror(number), *names)
    assert word in str(caught.value.remedy)
    (free,) = re.findall(r"([\d,]+) bytes are free", str(caught.value))
    assert int(free.replace(",", "")) == pytest.approx(shutil.disk_usage(path).free, rel=0.2)
    assert record(path)["state"] == "failed"
    assert record(path)["error"] == f"NoRoomError: {caught.value}"


def test_directory_that_cannot_be_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, kind in ((errno.ENOSPC, NoRoomError), (errno.EROFS, ConfigError)):

        def fail(*_: object, number: int = number, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "mkdir", fail)
        with refused(kind, str(path), os.strerror(number)), train_dir(path):
            pass


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("error", [RunError("loss nan"), None])
def test_first_error_counts_where_the_record_cannot_be_written(path: Path, error: RunError | None, lost: bool) -> None:
    def work() -> None:
        with ExitStack() as stack, train_dir(path):
            if lost:
                shutil.rmtree(path)
            else:
                stack.enter_context(file_limit(10))
            if error is not None:
                raise error

    with pytest.raises(RunError) as caught:
        work()
    assert caught.value is error if error else caught.value.path == path / "run.json"
    assert lost or record(path)["state"] == "running"
    with train_dir(path):  # the lock is free, and there is room again
        pass
    assert record(path)["state"] == "finished"


def test_clearing_may_be_cut_off_anywhere(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What says "complete" goes first, run.json last: it is never taken for a finished run, nor for that of others."""
    content = ["a", "manifest.json", "zarr.json", "config.yaml"]
    for n_deleted in range(len(content) + 2):
        with train_dir(path, overwrite=True):
            for name in content:
                (path / name).write_text("")
            (path / "checkpoints").mkdir()
        n_left = iter(range(n_deleted))

        def cut_off(delete: Callable[..., None], n_left: Iterator[int] = n_left) -> Callable[..., None]:
            def deleting(target: Path, **options: Any) -> None:
                if not target.name.startswith(".") and next(n_left, None) is None:  # else it is a temporary file
                    raise KeyboardInterrupt
                delete(target, **options)

            return deleting

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", cut_off(Path.unlink))
            patch.setattr(shutil, "rmtree", cut_off(shutil.rmtree))
            with pytest.raises(KeyboardInterrupt), train_dir(path, overwrite=True):
                pass
        assert train_dir(path).opens_as == "resumable"
        left = {p.name for p in path.iterdir()} - {".lock"}
        assert len(left) == len(content) + 2 - n_deleted and "run.json" in left
        assert n_deleted < 2 or not left & {"manifest.json", "zarr.json"}


# --- two at a time ----------------------------------------------------------------------------

HOLDER = """
import os, sys, time
from pathlib import Path
from spectralvae.config import SimulateConfig
from spectralvae.runtime.rundir import RunDir

with RunDir("simulate", SimulateConfig(output_dir=Path(sys.argv[1])), overwrite=False):
    child = os.fork()
    if child == 0:
        os.close(1)
    else:
        print(child, flush=True)
    time.sleep(60)
"""


def test_second_process_is_refused_until_the_first_is_gone(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            before = snapshot(path)
            with refused(ConfigError, "simulate", key="output_dir", value=path), simulate_dir(path, overwrite=True):
                pass
            assert snapshot(path) == before
            process.kill()
            process.wait()
            os.kill(child, 0)  # lives on, with the lock's file open
            assert record(path)["state"] == "running", "SIGKILL leaves it so"
            with simulate_dir(path, overwrite=True):
                pass
            assert record(path)["state"] == "finished"
        finally:
            process.kill()
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("code", ["EACCES", "EAGAIN", "ENOLCK", "ENOSYS", "EPERM", "ENOTSUP", "EIO"])
def test_only_a_lock_that_is_held_means_in_use(path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """NFS without lockd, and some mounts of FUSE and Lustre, have no locks."""
    stop(path)
    before = snapshot(path)
    number = getattr(errno, code)
    monkeypatch.setattr(fcntl, "lockf", Mock(side_effect=OSError(number, os.strerror(number))))
    run = train_dir(path)
    with refused(ConfigError, key="output_dir", value=path) as caught, run:
        pass
    held = code in ("EACCES", "EAGAIN")
    assert ("in use" in str(caught.value)) == held
    assert (os.strerror(number) in str(caught.value)) == (not held)
    assert ("another file system" in str(caught.value.remedy)) == (not held and code != "EIO")
    if held:
        assert run.in_use()
    else:
        with pytest.raises(OSError if code == "EIO" else ConfigError, match=re.escape(os.strerror(number))):
            run.in_use()
    monkeypatch.undo()
    assert snapshot(path) == before
    assert not run.in_use()


def test_start_that_was_overtaken_is_refused(path: Path) -> None:
    late = train_dir(path)  # sees no run, then imports torch for seconds
    with train_dir(path):
        pass
    before = snapshot(path)
    with refused(ConfigError, "train", key="output_dir", value=path), late:
        pass
    assert snapshot(path) == before


def test_inputs_inside_a_directory_to_be_cleared_are_refused(tmp_path: Path) -> None:
    with simulate_dir(tmp_path / "out"):
        (tmp_path / "out" / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    again = simulate_dir(tmp_path / "out", overwrite=True)
    for inside in (tmp_path / "out" / "data", tmp_path / "link" / "data", tmp_path / "out"):
        with refused(ConfigError, "output_dir", key="inputs", path=inside):
            again.refuse_inside("inputs", inside)
    again.refuse_inside("inputs", tmp_path / "outside")
    simulate_dir(tmp_path / "new", overwrite=True).refuse_inside("inputs", tmp_path / "new" / "data")
