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
from itertools import count, dropwhile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

LONG = 120.0  # seconds; longer takes nothing here, even on a busy machine

# --- a run's files --------------------------------------------------------------------------------


def write_config(folder: Path, name: str, store: Path, **changes: Mapping[str, Any]) -> tuple[Path, Path]:
    """A config of a tiny run with dropout; returns its path and the run's directory."""
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
        sections[section].update(values)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(folder / name), **sections}))
    return path, folder / name


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


class Trace:
    """What ``traced`` notes: lines of time, what, and "begins" or "ends"."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def notes(self) -> list[tuple[float, str, str]]:
        if not self.path.is_file():
            return []
        lines = self.path.read_text().splitlines(keepends=True)
        whole = [line.split() for line in lines if line.endswith("\n")]
        return [(float(at), what, edge) for at, what, edge in whole]

    def times(self, what: str, edge: str) -> list[float]:
        return [at for at, *note in self.notes() if note == [what, edge]]

    def inside(self, what: str) -> bool:
        """Whether the process was in the middle of it when it ended."""
        return len(self.times(what, "begins")) > len(self.times(what, "ends"))

    def seconds(self, what: str) -> float:
        """The median of what it took."""
        begun, ended = self.times(what, "begins"), self.times(what, "ends")
        return float(np.median([end - begin for begin, end in zip(begun, ended, strict=True)]))

    def await_note(self, what: str, edge: str, n: int, child: Child) -> float | None:
        """The time of the n-th such note, from 0; None if the child ended before."""
        deadline = time.monotonic() + LONG
        ended = False
        for i in count():
            found = self.times(what, edge)
            if len(found) > n:
                return found[n]
            if ended:
                return None
            assert time.monotonic() < deadline, f"{self.path}: {what} never {edge}"
            time.sleep(0.002)
            ended = i % 20 == 19 and child.wait(0) is not None
        raise AssertionError


def sleep_until(moment: float) -> None:
    """``moment`` is of time.monotonic(), which all processes of a machine share."""
    time.sleep(max(0.0, moment - time.monotonic()))


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


def traced(path: str) -> None:
    """Note when the parts of a run begin and end."""
    from spectralvae.training import trainer
    from spectralvae.training.watch import Watch

    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(what: str, edge: str) -> None:
        os.write(file, f"{time.monotonic()} {what} {edge}\n".encode())

    def noting(what: str) -> Callable[..., Any]:
        def wrapper(original: Any, *arguments: Any, **options: Any) -> Any:
            note(what, "begins")
            result = original(*arguments, **options)
            note(what, "ends")
            return result

        return wrapper

    note("process", "begins")
    _around(trainer, "save_checkpoint", noting("saving"))
    _around(trainer, "terminal", noting("loop"))  # signals are caught from here on
    _around(trainer.Trainer, "_advance", noting("update"))
    _around(trainer.Trainer, "_validate", noting("validating"))
    _around(Watch, "draw", noting("drawing"))


def at_update(step: int, number: int, rank: int = 0) -> None:
    """One process sends itself a signal right before an update."""
    from spectralvae.training.trainer import Trainer

    def advance(original: Any, self: Any, *arguments: Any) -> Any:
        if self.step + 1 == step and self.ranks.rank == rank:
            os.kill(os.getpid(), number)
        return original(self, *arguments)

    _around(Trainer, "_advance", advance)


def line_a_step(pipe: str) -> None:
    """Print into a pipe, and at once."""
    from spectralvae.training import terminal

    os.dup2(os.open(pipe, os.O_WRONLY), sys.stdout.fileno())
    terminal.LOG_LINE_SECONDS = 0.0


def paused(step: int, until: str) -> None:
    """Wait before an update until there is a file."""
    from spectralvae.training.trainer import Trainer

    def advance(original: Any, self: Any, *arguments: Any) -> Any:
        while self.step + 1 == step and not Path(until).exists():
            time.sleep(0.005)
        return original(self, *arguments)

    _around(Trainer, "_advance", advance)


def slow_blocks(n_samples: int) -> None:
    """Prepare scenes in blocks of so many samples, so slowly that any moment can be met."""
    from spectralvae.data import scenes

    def blocks(original: Any, *arguments: Any, **options: Any) -> Any:
        for block in original(*arguments, **options):
            time.sleep(0.04)
            yield block

    scenes.BLOCK_SAMPLES = n_samples
    _around(scenes, "blocks", blocks)


def killed_before(name: str, step: int) -> None:
    """SIGKILL after the checkpoint of a step: right before "thin_out", or before "draw"."""
    from spectralvae.training import trainer
    from spectralvae.training.watch import Watch
    from spectralvae.weights.checkpoint import checkpoint_path

    def wrapper(original: Any, first: Any, *arguments: Any) -> Any:
        run = first.path if isinstance(first, Watch) else first
        if checkpoint_path(run, step).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return original(first, *arguments)

    _around(Watch if name == "draw" else trainer, name, wrapper)


def killed_at_file(folder: str, n: int) -> None:
    """SIGKILL right before the n-th time that a file or folder in ``folder`` is opened, made, renamed or removed."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        changes = event in ("open", "os.mkdir", "os.rename", "os.remove")
        if changes and str(arguments[0]).startswith(folder):
            seen += 1
            if seen == n:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def channels_last() -> None:
    """The memory layout that GPUs get."""
    import torch

    from spectralvae.runtime import placement

    placement._fastest_layout = lambda *_: torch.channels_last


def recorded(path: str) -> None:
    """Keep what this process learned from: scene, y, x, flip and turns of each tile, (step, tile, 5), and its noise."""
    from spectralvae.training.trainer import Trainer

    crops: list[Any] = []
    noise: list[Any] = []

    def advance(original: Any, self: Any, batch: Any, signals: Any) -> Any:
        crops.append([(c.scene, c.y, c.x, c.flip, c.turns) for c in batch.crops])
        noise.append(batch.noise.numpy().copy())
        np.savez(f"{path}-{self.ranks.rank}.npz", crops=np.array(crops), noise=np.array(noise))
        return original(self, batch, signals)

    _around(Trainer, "_advance", advance)


def poisoned(rank: int, step: int, tile: int, path: str) -> None:
    """The tile of one process's batch is infinite; when the run fails, its weights are kept at ``path``."""
    import torch
    from safetensors.torch import save_file

    from spectralvae.data.loader import TileStream
    from spectralvae.training.trainer import Trainer

    def fill(original: Any, self: Any, batch: Any, j: int) -> Any:
        crop = original(self, batch, j)
        if (self.rank, batch.step + 1, j) == (rank, step, tile):
            batch.tiles[j] = torch.inf
        return crop

    def fit(original: Any, self: Any, *arguments: Any) -> None:
        try:
            original(self, *arguments)
        except Exception:
            weights = {key: value.contiguous() for key, value in self.model.state_dict().items()}
            save_file(weights, f"{path}-{self.ranks.rank}.safetensors")
            raise

    _around(TileStream, "_fill", fill)
    _around(Trainer, "fit", fit)


def unreadable(rank: int, step: int) -> None:
    """From a step on, the disk answers one process with an error."""
    from spectralvae.data.loader import TileStream
    from spectralvae.data.store import Store, scene_folder

    reading = [0]

    def fill(original: Any, self: Any, batch: Any, j: int) -> Any:
        reading[0] = batch.step + 1 if self.rank == rank else 0
        return original(self, batch, j)

    def read_tile(original: Any, self: Any, scene: int, *arguments: Any) -> Any:
        if reading[0] >= step:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(scene_folder(self.path, self.scenes[scene].id)))
        return original(self, scene, *arguments)

    _around(TileStream, "_fill", fill)
    _around(Store, "read_tile", read_tile)


def small_files(n_bytes: int, rank: int) -> None:
    """One process may write no file beyond a size, which is as good as a full disk."""
    if os.environ["RANK"] == str(rank):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def never_there(rank: int) -> None:
    """One process ends before it has met the others."""
    if os.environ["RANK"] == str(rank):
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


def srun(arguments: list[str]) -> int:
    """Do as srun does with two tasks of a step: they are forked, so that all is imported once.

    A run that STOP names gets a signal in its second process when it has a checkpoint.

    Returns:
        The larger of their exit codes.
    """
    program, *arguments = dropwhile(lambda argument: argument.startswith("--"), arguments)
    assert program == "spectralvae"
    _prepare()
    small_pictures()
    pids = []
    for task in ("0", "1"):
        pids.append(os.fork())
        if pids[-1] == 0:
            step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "node1"}
            os.environ.update(step, SLURM_PROCID=task, SLURM_LOCALID=task)
            from spectralvae.cli import run

            return run(arguments)
    if os.environ["STOP"]:
        while not list(Path(os.environ["STOP"]).glob("checkpoints/step=*")):
            time.sleep(0.02)
        os.kill(pids[1], signal.SIGUSR1)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)


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
