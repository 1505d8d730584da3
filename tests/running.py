"""Runs in processes of their own that start at once, and what can be done to them.

Importing torch and all that a run needs takes seconds. So one process imports it and then forks a child for each run,
before it has any thread: ``Starter`` speaks with it. The functions under "put into a run" are called in the child
before its run begins, by name.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import yaml

LONG = 120.0  # seconds; longer takes nothing here, even on a busy machine

# --- a run's files --------------------------------------------------------------------------------


def write_config(folder: Path, name: str, store: Path, **changes: Mapping[str, Any]) -> tuple[Path, Path]:
    """A config of a tiny run with dropout, some sections changed or added; returns its path and the run's directory."""
    sections: dict[str, Any] = {
        "data": {"store": str(store), "batch_size": 4, "tile_size": 8, "n_val_tiles": 5, "num_workers": 2},
        "model": {
            "chs": [16, 8],
            "z_channels": 4,
            "embed_dim": 4,
            "n_attention_heads": 2,
            "norm_groups": 4,
            "dropout_prob": 0.2,
        },
        "optimizer": {"lr": 2e-3},
        "training": {"n_steps": 14, "save_every": 5, "val_every": 4, "log_every": 2, "plot_every": 7, "device": "cpu"},
    }
    for section, values in changes.items():
        sections.setdefault(section, {}).update(values)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(folder / name), **sections}))
    return path, folder / name


def noise_store(make_store: Callable[..., Any], path: Path) -> Path:
    """A store of two training scenes and one for validation, of noise with holes."""
    random = np.random.default_rng(0)
    scenes = {name: random.normal(size=(24, 24, 6)) for name in ("a", "b", "v")}
    for z in scenes.values():
        z[random.random(z.shape) < 0.1] = np.nan
    made: Path = make_store(path, scenes, val=("v",)).path
    return made


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def record(run: Path) -> dict[str, Any]:
    """run.json."""
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


def newest_checkpoint(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step=*"))[-1]


def left_behind(run: Path) -> dict[str, bytes]:
    """All that must not depend on interruptions, by name: the newest checkpoint, rows, events, pictures."""
    patterns = ("*.jsonl", "baselines.json", "summary/*.png", "summary/validation.json", "figures/*")
    files = [path for pattern in patterns for path in run.glob(pattern) if path.name != "timing.jsonl"]
    files += newest_checkpoint(run).iterdir()
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def differing(run: Path, whole: Path) -> list[str]:
    """Which files of ``run`` are not those of the uninterrupted ``whole``; a stop leaves more figures."""
    mine, expected = left_behind(run), left_behind(whole)
    more = [name for name in mine.keys() - expected.keys() if not name.startswith("figures/")]
    return sorted(more + [name for name in expected if mine.get(name) != expected[name]])


# --- processes ------------------------------------------------------------------------------------


class Child:
    """A run in a process of its own, started by a Starter."""

    def __init__(self, starter: Starter, pid: int, log: Path) -> None:
        self._starter, self.pid, self._log = starter, pid, log
        self._status: int | None = None

    def wait(self, timeout: float = LONG) -> int | None:
        """The exit code, negative for a signal's number; None if it still runs after ``timeout`` seconds."""
        if self._status is None:
            self._status = self._starter.ask({"wait": self.pid, "timeout": timeout})
        return self._status

    def send(self, number: int) -> None:
        """A signal; nothing happens to one that has ended (it stays a zombie until ``wait`` has told)."""
        if self._status is None:
            os.kill(self.pid, number)

    @property
    def output(self) -> str:
        return self._log.with_suffix(".out").read_text()

    @property
    def errors(self) -> list[str]:
        """The lines on stderr."""
        return self._log.with_suffix(".err").read_text().splitlines()


class Starter:
    """A process that has imported everything and starts runs.

    Args:
        script: what it executes: this module, or one that puts more into runs.
    """

    def __init__(self, script: str = __file__) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        self._process = subprocess.Popen(
            [sys.executable, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
        )
        self._children: list[Child] = []

    def ask(self, request: Mapping[str, Any]) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def train(
        self,
        config: Path,
        *put: Sequence[Any],
        environment: Mapping[str, str] | None = None,
        pictures: bool = False,
        options: Sequence[str] = (),
        to_the_end: bool = False,
    ) -> Child:
        """Start `spectralvae train`.

        Args:
            config: of the run; its output goes beside it.
            put: (function of this module, its arguments ...), called in the process before the run.
            environment: variables of the process.
            pictures: draw them as they are; else they are small, but of the same data.
            options: of the command.
            to_the_end: let the interpreter come to its own end, which takes as long as a tiny run: it matters where
                processes could wait for each other there.
        """
        log = config.with_name(f"{config.stem}-{len(self._children)}")
        first = [] if pictures else [["small_pictures"]]
        request = {
            "arguments": ["train", str(config), *options],
            "put": [*first, *([name, *map(_jsonable, arguments)] for name, *arguments in put)],
            "environment": dict(environment or {}),
            "log": str(log),
            "to_the_end": to_the_end,
        }
        self._children.append(Child(self, self.ask(request), log))
        return self._children[-1]

    def close(self) -> None:
        """End it, and what still runs."""
        for child in self._children:
            child.send(signal.SIGKILL)
            child.wait()
        self._process.communicate()  # its input ends, and so does it


def _jsonable(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def train_ranks(starter: Starter, config: Path, n: int, *put: Sequence[Any], **options: Any) -> list[Child]:
    """Start the processes of one run, as torchrun does."""
    return [starter.train(config, *put, environment=rank, **options) for rank in environments(n)]


def environments(n: int) -> list[dict[str, str]]:
    """What torchrun would tell each of n processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [{"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(n), **address} for i in range(n)]


# --- put into a run -------------------------------------------------------------------------------


def small_pictures() -> None:
    """Pictures take most of a tiny run's time; these are small, and as much a function of what they show."""
    from matplotlib.figure import Figure

    from spectralvae.training import plots, validation

    def draw_reconstructions(original: Any, reconstruction: Any, *_: Any) -> Figure:
        figure = Figure(figsize=(0.2, 0.2))
        figure.figimage(np.concatenate([original[0, ..., 0], reconstruction[0, ..., 0]]))
        return figure

    def draw_curves(curves: Any, folder: Path, references: Any, spikes: Any) -> None:
        points = {key: [column.tolist() for column in curve.points()] for key, curve in sorted(curves.items())}
        for name, _, _ in plots.CURVES:
            (folder / f"{name}.png").write_text(repr((points, references, spikes)))

    validation.draw_reconstructions = draw_reconstructions
    plots.draw_curves = draw_curves


def many_spikes() -> None:
    """Call nearly everything a spike, so that short runs have events."""
    from spectralvae.training import spikes

    spikes.LEARNING, spikes.THRESHOLD = 2, 0.5


def _around(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """``owner.name(*arguments)`` becomes ``wrapper(original, *arguments)``."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **options: wrapper(original, *arguments, **options))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _before_updates(action: Callable[[int], None]) -> None:
    """Call ``action`` with the number of each update, from 1, before its gradients are computed.

    Several processes compute those of their first update twice.
    """
    import torch

    def zero_grad(original: Any, self: Any, *arguments: Any) -> None:
        state = next(iter(self.state.values()), None)  # a checkpoint's, after a resume
        action(int(state["step"]) + 1 if state else 1)
        original(self, *arguments)

    _around(torch.optim.AdamW, "zero_grad", zero_grad)


def at_update(step: int, number: int, rank: int = 0) -> None:
    """One process sends itself a signal right before an update."""
    _before_updates(lambda n: os.kill(os.getpid(), number) if (n, _rank()) == (step, rank) else None)


def closed_stdout() -> None:
    """Nobody reads what is printed, a line a step."""
    from spectralvae.training import terminal

    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, sys.stdout.fileno())
    terminal.LOG_LINE_SECONDS = 0.0


def at_block(n_samples: int, n: int, number: int) -> None:
    """Prepare scenes in blocks of so many samples; a signal right before the n-th of them is read."""
    from spectralvae.data import blocks as blocks_module
    from spectralvae.readers import Scene

    blocks_module.BLOCK_SAMPLES = n_samples
    blocks = count(1)

    def read(original: Any, *arguments: Any) -> Any:
        if next(blocks) == n:
            os.kill(os.getpid(), number)
        return original(*arguments)

    _around(Scene, "read", read)


def at_change(folder: str, n: int, number: int = signal.SIGKILL, log: str | None = None) -> None:
    """A signal right before the n-th time that a file or folder in ``folder`` is opened, made, renamed or removed.

    Each of these times is a line of ``log``.
    """
    seen = count(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT) if log else None

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove") and str(arguments[0]).startswith(folder):
            if file is not None:
                os.write(file, f"{event} {arguments[0]} {arguments[1]}\n".encode())
            if next(seen) == n:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def channels_last() -> None:
    """The memory layout that GPUs get."""
    import torch

    from spectralvae.runtime import placement

    placement._fastest_layout = lambda *_: torch.channels_last


def recorded(path: str) -> None:
    """Keep what this process is to learn from: scene, y, x, flip and turns of each tile, (step, tile, 5), its noise,
    and the number of updates."""
    import torch

    from spectralvae.data.loader import TileStream

    batches: dict[int, Any] = {}
    updates = [0]

    def keep() -> None:
        crops, noise = zip(*batches.values(), strict=True)
        np.savez(f"{path}-{_rank()}.npz", crops=np.array(crops), noise=np.array(noise), updates=updates)

    def iterate(original: Any, self: Any) -> Any:
        for batch in original(self):
            crops = [(c.scene, c.y, c.x, c.flip, c.turns) for c in batch.crops]
            batches[batch.step] = (crops, batch.noise.numpy().copy())
            keep()
            yield batch

    def step(original: Any, *arguments: Any) -> Any:
        updates[0] += 1
        keep()
        return original(*arguments)

    _around(TileStream, "__iter__", iterate)
    _around(torch.optim.AdamW, "step", step)


def poisoned(rank: int, step: int, tile: int) -> None:
    """A tile of one process's batch is infinite."""
    from spectralvae.data.loader import TileStream

    def iterate(original: Any, self: Any) -> Any:
        for batch in original(self):
            if (_rank(), batch.step + 1) == (rank, step):
                batch.tiles[tile] = float("inf")
            yield batch

    _around(TileStream, "__iter__", iterate)


def unreadable(rank: int, step: int) -> None:
    """Before an update, the disk begins to answer one process with an error whenever it reads a tile."""
    if _rank() == rank:
        _before_updates(lambda n: setattr(os, "preadv", _fail) if n == step else None)


def _fail(*_: Any) -> Any:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def small_files(n_bytes: int, rank: int) -> None:
    """One process may write no file beyond a size, which is as good as a full disk."""
    if _rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def never_there(rank: int) -> None:
    """One process ends before it has met the others."""
    if _rank() == rank:
        sys.exit(0)


# --- the process that starts them -----------------------------------------------------------------


def _prepare() -> None:
    """Import all that a run imports, without a thread."""
    import torch
    import torch._dynamo
    import torch.distributed
    import torch.utils.tensorboard

    os.fsync = lambda descriptor: None  # a kill is no power loss
    assert torch.get_num_threads() == len(list(Path("/proc/self/task").iterdir())) == 1


def _become(request: Mapping[str, Any]) -> int:
    """In the child: run the command; returns its exit code."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, tests inherit that it is ignored
    for number, path in enumerate((os.devnull, f"{request['log']}.out", f"{request['log']}.err")):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(path, flags), number)
    os.environ.update(request["environment"])
    for name, *arguments in request["put"]:
        globals()[name](*arguments)
    from spectralvae.cli import run

    code = run(request["arguments"])
    if request["to_the_end"]:
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(pid: int, timeout: float) -> int | None:
    deadline = time.monotonic() + timeout
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.002)


def _serve() -> int:
    """Answer requests until there are no more; a child returns its exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _prepare()
    gc.freeze()  # or every child copies all that the collector looks at
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "wait" in request:
            answer = _wait(request["wait"], request["timeout"])
        else:
            answer = os.fork()
            if answer == 0:
                return _become(request)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(_serve())
