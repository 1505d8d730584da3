"""Files are first opened in a child process with limits on time and memory.

A corrupt or hostile file may hang a library, crash it, or make it ask for all memory there is. What the child process
survives, this one repeats on the same bytes.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from spectralvae.errors import ConfigError, InputError, RunError, UserError, printable, show
from spectralvae.readers import hdf5
from spectralvae.readers.base import damage_named

SECONDS = 30  # of CPU time at most, to read a file's structure
PATIENCE = 20  # times that on the clock: storage may be slow, and other processes busy
_BYTES = 2**31

# A MATLAB file of version 5 has to be loaded whole: more time and memory, by its size. Others may be mapped.
_LOADED_WHOLE = b"MATLAB 5.0"
_BYTES_PER_SECOND = 20e6
_INFLATION = 20

_MAX_MESSAGE = 2000
_MEMORY, _UNFORESEEN = "MemoryError", "unforeseen"
_ERRORS: dict[str, type[UserError]] = {"InputError": InputError, "ConfigError": ConfigError}

# Modules come from where this process has them; the working directory is no such place.
_PROGRAM = """\
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from spectralvae.readers.guard import serve
serve()
"""


def try_out(path: Path, arguments: Mapping[str, Any], function: str) -> None:
    """Call a function of a file in another process.

    Args:
        path: An existing file or folder.
        arguments: By name; those of `open_reader` that were given.
        function: "module:name"; it is called with the path and the arguments, and what it returns is dropped.

    Raises:
        InputError, ConfigError: What the function has against them; or it took too long, needed too much memory or
            crashed.
        RunError: The other process cannot be started.
    """
    seconds, limit = _limits(path)
    request = {
        "path": str(path),
        "folder": None if path.is_absolute() else os.getcwd(),  # noqa: PTH109 (the path is for the other process)
        "arguments": arguments,
        "function": function,
        "seconds": seconds,
        "patience": seconds * PATIENCE,
        "bytes": limit,
    }
    line, status = _HELPER.ask(json.dumps(request, default=_plain))
    remedy = "it is corrupt or hostile: fetch it again"
    if status == -signal.SIGALRM:
        raise InputError(
            f"reading its structure did not finish within {seconds * PATIENCE} s, most of them spent waiting",
            path=path,
            remedy="check whether the storage is slow or hangs; if other files open, fetch this one again",
        )
    if status is not None:
        took_long = status == -signal.SIGPROF
        how = f"took more than {seconds} s of CPU time" if took_long else f"crashed the reader (status {status})"
        raise InputError(f"reading its structure {how}", path=path, remedy=remedy)
    answer = json.loads(line)
    if answer["error"] == _MEMORY:
        _HELPER.end()  # or what it still holds would count against the next file
        problem = f"reading its structure needed more than {limit / 2**30:.3g} GiB"
        raise InputError(problem, path=path, remedy=remedy)
    if answer["error"] in _ERRORS:
        value = answer["parts"].pop("value")  # is shown with its control characters escaped
        value = value if len(show(value)) <= _MAX_MESSAGE else _one_line(show(value))
        texts = {name: part and _one_line(part) for name, part in answer["parts"].items()}
        raise _ERRORS[answer["error"]](**texts, value=value)
    if answer["error"] is not None:
        problem = _one_line(f"reading its structure failed ({answer['message']})")
        unforeseen = InputError(problem, path=path, remedy=remedy)
        unforeseen.add_note(answer["traceback"])
        raise unforeseen


def _limits(path: Path) -> tuple[int, int]:
    """Seconds of CPU time and bytes that reading the file's structure may take."""
    if path.is_dir():
        return SECONDS, _BYTES
    with damage_named(path), path.open("rb") as file:
        loaded_whole = file.read(len(_LOADED_WHOLE)) == _LOADED_WHOLE
    size = path.stat().st_size
    if loaded_whole:
        return SECONDS + int(size / _BYTES_PER_SECOND), _BYTES + _INFLATION * size
    return SECONDS, _BYTES + size


def _plain(value: Any) -> Any:
    """Arguments as JSON has them; what it cannot hold at all, readers refuse as text too."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if hasattr(value, "__iter__") and hasattr(value, "__len__") else repr(value)


def _one_line(text: str) -> str:
    """Text from a file, which may hold anything, with control characters escaped and cut if it is too long."""
    line = printable(text)
    return line if len(line) <= _MAX_MESSAGE else f"{line[: _MAX_MESSAGE // 2]} ... {line[-_MAX_MESSAGE // 2 :]}"


class _Helper:
    """The other process: started when first needed, kept for the next file, ended with this one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, request: str) -> tuple[bytes, int | None]:
        """Send a line; return the line that comes back and None, or nothing and the status that it ended with."""
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                process = self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(request.encode() + b"\n")
                process.stdin.flush()
                line = process.stdout.readline()
                return line, None if line else process.wait()
            except BaseException:
                # Interrupted between question and answer, which would be taken for the next file's.
                self.stop()
                raise

    def _start(self) -> subprocess.Popen[bytes]:
        self.stop()
        modules = [str(entry) or os.getcwd() for entry in sys.path]  # noqa: PTH109 (entries of sys.path are text)
        self._process = process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(modules)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Ctrl-C is meant for this process, which then ends the other.
            start_new_session=True,
            # Threads of BLAS would reserve memory each.
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        if not process.stdout.readline():
            problem = f"the process that tries out files cannot start (status {process.wait()})"
            raise RunError(problem, remedy=f'try: {sys.executable} -c "import spectralvae.readers.guard"')
        return process

    def end(self) -> None:
        """End the process between two files; the next file gets a new one."""
        with self._lock:
            self.stop()

    def stop(self) -> None:
        """End the process, if there is one, whatever it is at."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._forget(self._process)

    def _forget(self, process: subprocess.Popen[bytes]) -> None:
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # over a request that it didn't take
                pipe.close()
        self._process = None

    def before_fork(self) -> None:
        self._lock.acquire()

    def after_fork(self) -> None:
        self._lock.release()

    def in_fork(self) -> None:
        """A forked process leaves the other process to its parent: an open pipe would keep it alive."""
        if self._process is not None:
            self._process.returncode = 0  # or its deletion would warn
            self._forget(self._process)
        self._lock.release()


_HELPER = _Helper()
atexit.register(_HELPER.stop)
os.register_at_fork(before=_HELPER.before_fork, after_in_parent=_HELPER.after_fork, after_in_child=_HELPER.in_fork)


def serve() -> None:
    """Answer requests, a line each, until there are no more: the other process's whole work."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for alarm in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(alarm, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM, signal.SIGPROF})
    # What a library prints must not mix with the answers.
    with os.fdopen(os.dup(1), "w") as answers, open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 1)
        answers.write("ready\n")
        answers.flush()
        for line in sys.stdin.buffer:
            answers.write(json.dumps(_answer(json.loads(line)), default=_plain) + "\n")
            answers.flush()


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Try out one file within its limits; either alarm ends this process, whatever library it is in."""
    # Of RLIMIT_DATA, for mapped files and libraries that are only read take no memory.
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = request["bytes"] if hard == resource.RLIM_INFINITY else min(request["bytes"], hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    if request["folder"] is not None:
        os.chdir(request["folder"])
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # counts CPU time: SIGPROF
    signal.alarm(request["patience"])
    try:
        _try(Path(request["path"]), request["arguments"], request["function"])
    except Exception as error:
        if isinstance(error, MemoryError):
            return {"error": _MEMORY}
        for name, kind in _ERRORS.items():
            if isinstance(error, kind):
                return {"error": name, "parts": error.parts()}
        return {"error": _UNFORESEEN, "message": repr(error), "traceback": traceback.format_exc()}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        os.chdir("/")
    return {"error": None}


def _try(path: Path, arguments: Mapping[str, Any], function: str) -> None:
    # Before all else, for an open variable may already have followed its links.
    if path.is_file() and h5py.is_hdf5(path):
        with damage_named(path), h5py.File(path, "r") as file:
            hdf5.check_links(path, file)
    module, name = function.split(":")
    getattr(import_module(module), name)(path, **arguments)
