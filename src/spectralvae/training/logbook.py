"""What a run writes down as it goes: metrics.jsonl, events.jsonl, timing.jsonl and TensorBoard."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from array import array
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

from spectralvae.errors import RunError
from spectralvae.runtime.atomic import write_atomic
from spectralvae.training.curves import Curve

N_EVENTS = 200  # kept in memory
_REMEDY = "restore the file, or start the run afresh with --overwrite"


class Event(NamedTuple):
    """Something that happened at a step: ``kind`` is "spike", "checkpoint", "warning", …"""

    step: int
    kind: str
    text: str


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An error of writing names the file, which a full disk's own does not."""
    try:
        yield
    except OSError as error:
        if error.filename:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


class Lines:
    """A file of JSON objects, one a line, that is read again and added to.

    Args:
        path: where it lies.
        keys: what each object holds at least; one is ``step``, a whole number.
    """

    def __init__(self, path: Path, keys: Collection[str]) -> None:
        self.path = path
        self._keys = frozenset(keys)

    def replay(self, until: int | None = None) -> Iterator[dict[str, Any]]:
        """All rows, one by one; what comes after the last one is then cut off.

        Args:
            until: the first row of a later step, and all that follow it, are cut off; None keeps all.

        Raises:
            RunError: a line is corrupt. The last one alone may be torn, as a kill leaves it: it is cut off.
        """
        kept = 0  # bytes
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                row = self._parse(line)
                if row is None:
                    if not line.endswith(b"\n"):
                        break
                    raise RunError(f"line {number} is corrupt", path=self.path, remedy=_REMEDY)
                if until is not None and row["step"] > until:
                    break
                yield row
                kept += len(line)
            size = os.fstat(file.fileno()).st_size
        if kept < size:
            os.truncate(self.path, kept)  # whole or not at all, and without a copy
        elif kept and not line.endswith(b"\n"):
            with _naming(self.path), self.path.open("ab", buffering=0) as end:
                end.write(b"\n")

    def _parse(self, line: bytes) -> dict[str, Any] | None:
        try:
            row = json.loads(line)
        except ValueError:
            return None
        whole = isinstance(row, dict) and self._keys <= row.keys() and isinstance(row["step"], int)
        return row if whole else None

    def open(self) -> None:
        """Begin to add rows."""
        # unbuffered: a row is in the file, or the error is raised here and not again on closing
        self._file = self.path.open("ab", buffering=0)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row.

        Raises:
            OSError: it cannot be written; names the file.
        """
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        with _naming(self.path):
            while line:
                line = line[self._file.write(line) :]

    def sync(self) -> None:
        """Have all rows on the disk.

        Raises:
            OSError: they cannot be written; names the file.
        """
        with _naming(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Add nothing more."""
        with _naming(self.path):
            self._file.close()


class Logbook:
    """What is known of a run's past: the rows in files, curves of a bounded size in memory.

    Rows and events later than ``step`` belong to a future that a kill has undone: they are cut off, so that a resumed
    run leaves the files of one that was never interrupted. For that, too, all that belongs to a step is written before
    its checkpoint (``sync``), and what belongs to a single start (that it was resumed) is no event.
    timing.jsonl keeps its rows: that time was really spent.

    Args:
        run: the run's directory.
        step: where the run resumes; 0 for a fresh one.
        checkpoints: steps whose ``val_loss`` is wanted again.
        n_rows: how many rows of metrics there must be up to ``step``; None for any number.

    Attributes:
        curves: of every metric, by its key in metrics.jsonl.
        timing: ``steps_per_second`` and ``memory_gb``; of a step that was done twice, the later time.
        events: the newest N_EVENTS.
        n_events: how many there are in all.
        n_rows: how many rows of metrics there are.
        last_row: the newest row of metrics; empty before there is one.
        val_losses: of the checkpoints, by step, where validated.

    Raises:
        RunError: a file is missing or corrupt, or rows are lost.
    """

    def __init__(self, run: Path, step: int, checkpoints: Collection[int] = (), n_rows: int | None = None) -> None:
        self.curves: dict[str, Curve] = {}
        self.timing = {"steps_per_second": Curve(), "memory_gb": Curve()}
        self.events: deque[Event] = deque(maxlen=N_EVENTS)
        self.n_events = self.n_rows = 0
        self.last_row: dict[str, Any] = {}
        self.val_losses: dict[int, float] = {}
        self._metrics = Lines(run / "metrics.jsonl", {"step"})
        self._events = Lines(run / "events.jsonl", Event._fields)
        self._timing = Lines(run / "timing.jsonl", {"start", "step", "seconds", "memory_gb"})
        self._files = (self._metrics, self._events, self._timing)
        if step:
            self._replay(step, frozenset(checkpoints))
        else:
            write_atomic(self._metrics.path, "")
            write_atomic(self._events.path, "")
        if n_rows is not None and n_rows != self.n_rows:
            problem = f"has {self.n_rows} rows up to step {step}, but {n_rows} were written"
            raise RunError(problem, path=self._metrics.path, remedy=_REMEDY)
        self._start = 1 + (self._replay_timing(step) if self._timing.path.is_file() else 0)
        self._tensorboard = run / "tensorboard"
        with _naming(self._tensorboard):
            self._writer = SummaryWriter(str(self._tensorboard), purge_step=step + 1 if step else 0)
        for file in self._files:
            file.open()
        self._started = time.monotonic()
        self._timed: tuple[int, float] | None = None  # step and second of this start's newest row

    def _replay(self, step: int, checkpoints: frozenset[int]) -> None:
        for file in (self._metrics, self._events):
            if not file.path.is_file():
                raise RunError(f"is missing, but the run resumes from step {step}", path=file.path, remedy=_REMEDY)
        for row in self._metrics.replay(step):
            if self.last_row and row["step"] <= self.last_row["step"]:
                problem = f"step {row['step']} follows step {self.last_row['step']}"
                raise RunError(problem, path=self._metrics.path, remedy=_REMEDY)
            self._take(row)
            if row["step"] in checkpoints and "val_loss" in row:
                self.val_losses[row["step"]] = row["val_loss"]
        for row in self._events.replay(step):
            self._take_event(Event(row["step"], row["kind"], row["text"]))

    def _replay_timing(self, step: int) -> int:
        """Rebuild the curves of all starts; returns how many starts there were."""
        table = array("d")
        for row in self._timing.replay():
            table.extend((row["start"], row["step"], row["seconds"], row["memory_gb"]))
        start, steps, seconds, memory = np.array(table).reshape(-1, 4).T
        goes_on = step + 1 if step else 0  # the first step that is done again
        earliest = np.minimum.accumulate(np.append(steps, goes_on)[::-1])[::-1]  # of a row and all later ones
        for i in np.flatnonzero(steps < earliest[1:]):
            self.timing["memory_gb"].add(int(steps[i]), float(memory[i]))
            if i and start[i] == start[i - 1] and seconds[i] > seconds[i - 1]:
                speed = (steps[i] - steps[i - 1]) / (seconds[i] - seconds[i - 1])
                self.timing["steps_per_second"].add(int(steps[i]), float(speed))
        return int(start.max(initial=0))

    def _take(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            if key != "step":
                self.curves.setdefault(key, Curve()).add(row["step"], value)
        self.last_row = row
        self.n_rows += 1

    def _take_event(self, event: Event) -> None:
        self.events.append(event)
        self.n_events += 1

    def log(self, row: dict[str, Any], memory_gb: float) -> None:
        """Add a row of metrics.

        Args:
            row: raw values, and their `step`.
            memory_gb: the most memory taken so far.

        Raises:
            OSError: a file cannot be written; names it.
        """
        step = row["step"]
        self._metrics.append(row)
        seconds = round(time.monotonic() - self._started, 6)
        self._timing.append({"start": self._start, "step": step, "seconds": seconds, "memory_gb": memory_gb})
        self._take(row)
        self.timing["memory_gb"].add(step, memory_gb)
        if self._timed is not None and seconds > self._timed[1]:
            self.timing["steps_per_second"].add(step, (step - self._timed[0]) / (seconds - self._timed[1]))
        self._timed = step, seconds
        with _naming(self._tensorboard):
            for name, value in row.items():
                if name != "step":
                    kind = "val" if name.startswith("val_") else "train"
                    self._writer.add_scalar(f"{kind}/{name.removeprefix('val_')}", value, step)

    def saved(self, step: int) -> None:
        """Keep the ``val_loss`` of a checkpoint that is written now, if its step was validated."""
        if self.last_row.get("step") == step and "val_loss" in self.last_row:
            self.val_losses[step] = self.last_row["val_loss"]

    def event(self, event: Event) -> None:
        """Add an event.

        Raises:
            OSError: the file cannot be written; names it.
        """
        self._events.append(event._asdict())
        self._take_event(event)

    def picture(self, name: str, png: bytes, step: int) -> None:
        """Show a picture in TensorBoard.

        Raises:
            OSError: it cannot be written; names the folder.
        """
        with _naming(self._tensorboard):
            self._writer.add_image(name, imread(io.BytesIO(png)), step, dataformats="HWC")

    def sync(self) -> None:
        """Have all rows on the disk; a checkpoint that outlives a power loss must not be ahead of them.

        Raises:
            OSError: a file cannot be written; names it.
        """
        for file in self._files:
            file.sync()

    def close(self) -> None:
        """Close all files.

        Raises:
            OSError: one cannot be written; names it. Not while another error is on its way: that one comes first,
                and this one is most often its consequence.
        """
        for close in (*(file.close for file in self._files), self._writer.close):
            with suppress(OSError) if sys.exception() else _naming(self._tensorboard):
                close()
