"""A command's output directory: who may write into it, when it is resumed, what state it is in."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import socket
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from pydantic import ValidationError

from spectralvae.config import CommandConfig
from spectralvae.config.loading import dump_config, resume_rules, to_yaml
from spectralvae.errors import ConfigError, LostPeerError, NoRoomError, RunError, show
from spectralvae.runtime.atomic import NO_ROOM, no_room_error, room_for, write_atomic
from spectralvae.runtime.signals import Stopped
from spectralvae.version import __version__

TOOL = "spectralvae"
State = Literal["running", "stopped", "finished", "failed"]
_ANOTHER = "choose another directory"
_BEFORE_RECORD = (".lock", ".run.json.tmp")  # all that a kill leaves of a run before it is known as ours
# errors of file systems without locks, such as NFS without lockd, and some mounts of FUSE and Lustre
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EPERM, errno.ENOTSUP)


def command_of(folder: Path) -> str | None:
    """Which command made a folder; None if none of this tool's."""
    try:
        record = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        return None
    return str(record.get("command")) if isinstance(record, dict) and record.get("tool") == TOOL else None


def state_after(error: BaseException | None) -> State:
    """The state that a run is left in: after "stopped" it is to be started again, after "failed" to be looked at."""
    if error is None:
        return "finished"
    return "stopped" if isinstance(error, (Stopped, KeyboardInterrupt, LostPeerError)) else "failed"


def _flatten(values: Any, *path: str) -> dict[str, Any]:
    """The values of a config by the paths of their keys, such as "data.store"."""
    if not isinstance(values, Mapping):
        return {".".join(path): values}
    return {name: value for key in values for name, value in _flatten(values[key], *path, key).items()}


class RunDir:
    """The output directory of one run of one command.

    Built before any input is touched, so that a directory that cannot be used is refused first;
    entered (``with run:``) once all inputs are known to be good: only then is it made, cleared or
    written to. Leaving it records the state.

    Args:
        command: name of the command.
        config: its config, whose class says whether the command resumes, and which keys may then differ.
        overwrite: clear a directory that the same command made.

    Attributes:
        opens_as: "fresh"; "overwrite", which clears it first; "resumable"; or "finished", with nothing to do.
        record: what run.json says.

    Raises:
        ConfigError: the directory is not this command's to use, or the configs differ.
    """

    def __init__(self, command: str, config: CommandConfig, *, overwrite: bool) -> None:
        self.path = config.output_dir
        self.command = command
        self.config = dump_config(config)
        self.opens_as: Literal["fresh", "overwrite", "resumable", "finished"] = "fresh"
        self.record: dict[str, Any] = {}
        self._changed: dict[str, list[Any]] = {}
        self._lock = ExitStack()
        nearest = next(p for p in (self.path, *self.path.absolute().parents) if p.exists() or p.is_symlink())
        if not nearest.is_dir():
            raise self._refusal(f"{nearest} is not a directory", _ANOTHER)
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise self._refusal(f"no permission to write in {nearest}", _ANOTHER)
        before = self._before = self._read_record()
        if not self.path.exists() or not any(p.name not in _BEFORE_RECORD for p in self.path.iterdir()):
            return
        if before is None or before["command"] != command:
            problem = f"was made by {TOOL} {before['command']}" if before else f"has files, but none of {TOOL}"
            raise self._refusal(problem, _ANOTHER)
        if overwrite:
            self.opens_as = "overwrite"
            return
        self.record = before
        self._compare(config, before)

    def _compare(self, config: CommandConfig, before: Mapping[str, Any]) -> None:
        """Find out whether the run of ``before`` is resumed or finished.

        Raises:
            ConfigError: neither, since the configs differ or the command does not resume.
        """
        recorded = before["config"]
        with suppress(ValidationError):  # then the comparison names what differs
            recorded = dump_config(type(config).model_validate(recorded))  # it may lack keys that are new
        old, new = _flatten(recorded), _flatten(self.config)
        old["output_dir"] = new["output_dir"]  # wherever it is and however it is called: it is this directory
        self._changed = {
            key: [old.get(key), new.get(key)] for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
        }
        rules = resume_rules(type(config))
        refused = [
            f"{key}: {show(a)} there, {show(b)} here"
            for key, (a, b) in self._changed.items()
            if key not in rules or (rules[key] == "may grow" and b < a)
        ]
        if refused:
            remedy = f"{_ANOTHER} or pass --overwrite"
            if self.command == "train":
                remedy += f"; `training.init_from: {self.path}` in another directory keeps what the network has learned"
            raise self._refusal(f"already holds a run with a different config ({'; '.join(refused)})", remedy)
        # a finished run is resumed for more steps only: else config.yaml would tell of a run that never was
        if before["state"] == "finished" and all(rules[key] != "may grow" for key in self._changed):
            self.opens_as = "finished"
        elif config.resumable:
            self.opens_as = "resumable"
        else:
            problem = f"holds an unfinished run of `{self.command}` (state: {before['state']})"
            raise self._refusal(problem, "start afresh with --overwrite")

    def _refusal(self, problem: str, remedy: str | None = None) -> ConfigError:
        return ConfigError(problem, key="output_dir", value=self.path, remedy=remedy)

    def _read_record(self) -> dict[str, Any] | None:
        path = self.path / "run.json"
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text())
        except ValueError as error:
            raise self._refusal(f"its run.json is corrupt ({error})", _ANOTHER) from error
        if not isinstance(record, dict) or record.get("tool") != TOOL:
            return None
        missing = [key for key in ("command", "config", "state", "starts") if key not in record]
        if missing:
            raise self._refusal(f"its run.json is corrupt (no {', '.join(missing)})", _ANOTHER)
        return record

    def __enter__(self) -> Self:
        with ExitStack() as lock:
            try:
                with room_for(self.path):
                    self.path.mkdir(parents=True, exist_ok=True)
                    free = self._try_lock(lock.enter_context((self.path / ".lock").open("a")))
            except OSError as error:
                raise self._refusal(f"cannot be made or written: {error.strerror}") from error
            if not free:
                problem = f"is in use by another running `{self.command}`"
                raise self._refusal(problem, f"wait for it, stop it, or {_ANOTHER}")
            if self._read_record() != self._before:
                raise self._refusal(f"another `{self.command}` has just used it", "look at it and start again")
            if self.opens_as == "overwrite":
                assert self._before is not None
                # interrupted in the middle, it must still be known as ours (run.json goes last), and never as finished
                write_atomic(self.path / "run.json", json.dumps({**self._before, "state": "failed"}))
                order = {"zarr.json": 0, "manifest.json": 0, "run.json": 2}  # what says "complete" goes first
                for child in sorted(self.path.iterdir(), key=lambda child: order.get(child.name, 1)):
                    if child.is_dir() and not child.is_symlink():
                        shutil.rmtree(child)
                    elif child.name != ".lock":
                        child.unlink()
            start: dict[str, Any] = {
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "argv": sys.argv[1:],
                "host": socket.gethostname(),
            }
            if self._changed:
                start["changed"] = self._changed
            self.record = {
                **self.record,
                "tool": TOOL,
                "version": __version__,
                "python": platform.python_version(),
                "command": self.command,
                "state": "running",
                "config": self.config,
                "starts": [*self.record.get("starts", []), start],
            }
            self.record.pop("error", None)
            self._write_record()
            write_atomic(self.path / "config.yaml", to_yaml(self.config))
            self._lock = lock.pop_all()
        return self

    def refuse_inside(self, key: str, path: Path) -> None:
        """Refuse an input that lies in the directory: starting afresh would delete it.

        Raises:
            ConfigError: it does, and the directory is to be cleared.
        """
        if self.opens_as == "overwrite" and path.resolve().is_relative_to(self.path.resolve()):
            problem = f"lies in output_dir, {self.path}, which --overwrite would clear"
            raise ConfigError(problem, key=key, path=path, remedy="move it")

    def refuse_within(self, key: str, path: Path) -> None:
        """Refuse an output directory that lies in an input, which must not change.

        Raises:
            ConfigError: it does.
        """
        if self.path.resolve().is_relative_to(path.resolve()):
            raise self._refusal(f"lies in {path} ({key}), which must not change", _ANOTHER)

    def _try_lock(self, file: IO[str]) -> bool:
        """Whether the directory was free: then this process has it until the file is closed.

        Raises:
            ConfigError: the file system has no locks.
        """
        try:
            # lockf, not flock: a flock would outlive a SIGKILL in forked children
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno in _NO_LOCKS:
                raise self._refusal(
                    f"is on a file system without file locks ({error.strerror})",
                    "choose a directory on another file system, or mount this one with locks",
                ) from error
            raise
        return True

    def in_use(self) -> bool:
        """Whether another process has the directory; nothing is made or changed.

        Raises:
            ConfigError: the file system has no locks.
        """
        path = self.path / ".lock"
        if not path.is_file():
            return False
        with path.open("r+") as lock:
            return not self._try_lock(lock)

    def note(self, **facts: Any) -> None:
        """Add facts to run.json."""
        self.record.update(facts)
        self._write_record()

    def note_start(self, **facts: Any) -> None:
        """Add facts about this start to run.json."""
        self.record["starts"][-1].update(facts)
        self._write_record()

    def _write_record(self) -> None:
        write_atomic(self.path / "run.json", json.dumps(self.record, indent=2) + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        no_room = None
        if isinstance(error, OSError) and error.errno in NO_ROOM:  # of a file that was not written by write_atomic
            no_room = no_room_error(error, Path(error.filename) if isinstance(error.filename, str) else self.path, None)
            error = no_room
        if error is not None and not isinstance(error, (Stopped, KeyboardInterrupt)):
            self.record["error"] = f"{type(error).__name__}: {error}"
        self.record["starts"][-1]["ended"] = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            self.note(state=state_after(error))
        except NoRoomError:
            if error is None:  # or it would hide the first error
                raise
        except OSError as problem:
            if error is None:
                raise RunError(f"cannot be written: {problem}", path=self.path / "run.json") from problem
        finally:
            self._lock.close()
        if no_room is not None:
            raise no_room
