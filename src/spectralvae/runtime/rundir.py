"""A command's output directory: who may write into it, when it is resumed, what state it is in."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from pydantic import ValidationError

from spectralvae.config import CommandConfig
from spectralvae.config.loading import dump_config, to_yaml
from spectralvae.errors import ConfigError, LostPeerError, NoRoomError, RunError, show
from spectralvae.runtime.atomic import NO_ROOM, no_room_error, room_for, write_atomic
from spectralvae.runtime.signals import Stopped
from spectralvae.version import __version__

TOOL = "spectralvae"
State = Literal["running", "stopped", "finished", "failed"]
_ANOTHER = "choose another directory"
_BEFORE_RECORD = (".lock", ".run.json.tmp")  # all that a kill leaves of a run before it is known as ours


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


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _completed(recorded: Mapping[str, Any], schema: type[CommandConfig]) -> Mapping[str, Any]:
    """A recorded config, with the defaults of keys that it had not yet; as it is if the schema does not take it."""
    try:
        return dump_config(schema.model_validate(recorded))
    except ValidationError:  # then the comparison names what differs
        return recorded


def _no_exceptions(key: str, old: Any, new: Any) -> bool:
    return False


class RunDir:
    """The output directory of one run of one command.

    Built before any input is touched, so that a directory that cannot be used is refused first;
    entered (``with run:``) once all inputs are known to be good: only then is it made, cleared or
    written to. Leaving it records the state.

    Args:
        command: name of the command.
        config: its config.
        overwrite: clear a directory that the same command made.
        resumable: an unfinished run of the same config may go on.
        may_differ: (key, old, new) -> whether a resumed run may have the new value.

    Raises:
        ConfigError: the directory is not this command's to use, or the configs differ.
    """

    def __init__(
        self,
        command: str,
        config: CommandConfig,
        *,
        overwrite: bool,
        resumable: bool = False,
        may_differ: Callable[[str, Any, Any], bool] = _no_exceptions,
    ) -> None:
        self.path = config.output_dir
        self.command = command
        self.config = dump_config(config)
        self.record: dict[str, Any] = {}
        self.changed: dict[str, list[Any]] = {}
        self.finished = False
        self.resuming = False
        self._lock: IO[str] | None = None
        self._clear = False
        self._check_place()
        record = self._found = self._read_record()
        if not self.path.exists() or not any(p.name not in _BEFORE_RECORD for p in self.path.iterdir()):
            return
        if record is None or record["command"] != command:
            problem = f"was made by {TOOL} {record['command']}" if record else f"has files, but none of {TOOL}"
            raise self._refusal(problem, _ANOTHER)
        if overwrite:
            self._clear = True
            return
        old = _flatten(_completed(record["config"], type(config)))
        new = _flatten(self.config)
        old["output_dir"] = new["output_dir"]  # wherever it is and however it is called: it is this directory
        differing = {
            key: [old.get(key), new.get(key)] for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
        }
        refused = [key for key, (a, b) in differing.items() if not may_differ(key, a, b)]
        if refused:
            listed = "; ".join(
                f"{key}: {show(differing[key][0])} there, {show(differing[key][1])} here" for key in refused
            )
            raise self._refusal(
                f"already holds a run with a different config ({listed})", f"{_ANOTHER} or pass --overwrite"
            )
        self.record, self.changed = record, differing
        # a finished run goes on for more steps only: else config.yaml would tell of a run that never was
        self.finished = record["state"] == "finished" and "training.n_steps" not in differing
        self.resuming = not self.finished
        if self.resuming and not resumable:
            raise self._refusal(
                f"holds an unfinished run of `{command}` (state: {record['state']})", "start afresh with --overwrite"
            )

    def _refusal(self, problem: str, remedy: str | None = None) -> ConfigError:
        return ConfigError(problem, key="output_dir", value=self.path, remedy=remedy)

    def _check_place(self) -> None:
        nearest = next(p for p in (self.path, *self.path.absolute().parents) if p.exists() or p.is_symlink())
        if not nearest.is_dir():
            raise self._refusal(f"{nearest} is not a directory", _ANOTHER)
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise self._refusal(f"no permission to write in {nearest}", _ANOTHER)

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
        try:
            with room_for(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = self._take_lock()
        except OSError as error:
            raise self._refusal(f"cannot be made or written: {error.strerror}") from error
        try:
            self._begin()
        except BaseException:
            self._lock.close()
            raise
        return self

    def _begin(self) -> None:
        if self._read_record() != self._found:
            raise self._refusal(f"another `{self.command}` has just used it", "look at it and start again")
        if self._clear:
            self._delete_all()
        starts = self.record.get("starts", [])
        start: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "argv": sys.argv[1:],
            "host": socket.gethostname(),
        }
        if self.changed:
            start["changed"] = self.changed
        self.record = {
            **self.record,
            "tool": TOOL,
            "version": __version__,
            "python": platform.python_version(),
            "command": self.command,
            "state": "running",
            "config": self.config,
            "starts": [*starts, start],
        }
        self.record.pop("error", None)
        self._write_record()
        write_atomic(self.path / "config.yaml", to_yaml(self.config))

    def refuse_inside(self, key: str, path: Path) -> None:
        """Refuse an input that lies in the directory: starting afresh would delete it.

        Raises:
            ConfigError: it does, and the directory is to be cleared.
        """
        if self._clear and path.resolve().is_relative_to(self.path.resolve()):
            problem = f"lies in output_dir, {self.path}, which --overwrite would clear"
            raise ConfigError(problem, key=key, path=path, remedy="move it")

    def refuse_within(self, key: str, path: Path) -> None:
        """Refuse an output directory that lies in an input, which must not change.

        Raises:
            ConfigError: it does.
        """
        if self.path.resolve().is_relative_to(path.resolve()):
            raise self._refusal(f"lies in {path} ({key}), which must not change", _ANOTHER)

    def _take_lock(self) -> IO[str]:
        lock = (self.path / ".lock").open("a")
        try:
            # lockf, not flock: a flock would outlive a SIGKILL in forked children
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise self._refusal(
                f"is in use by another running `{self.command}`", f"wait for it, stop it, or {_ANOTHER}"
            ) from error
        return lock

    def in_use(self) -> bool:
        """Whether another process has the directory; nothing is made or changed."""
        path = self.path / ".lock"
        if not path.is_file():
            return False
        with path.open("r+") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    def _delete_all(self) -> None:
        # cut off in the middle, it must still be known as ours (run.json goes last), and never as finished
        assert self._found is not None
        write_atomic(self.path / "run.json", json.dumps({**self._found, "state": "failed"}))
        markers = {"zarr.json": 0, "manifest.json": 0, "run.json": 2}  # what says "complete" goes first
        for child in sorted(self.path.iterdir(), key=lambda child: markers.get(child.name, 1)):
            if child.name == ".lock":
                continue
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()

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
            assert self._lock is not None
            self._lock.close()
        if no_room is not None:
            raise no_room
