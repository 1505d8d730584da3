"""What a run writes down as it goes: metrics.jsonl, timing.jsonl and TensorBoard."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

from spectralvae.rundir import write_atomic


def _parse(line: str) -> dict[str, Any] | None:
    """A row, or None for what a kill or a power loss left of one."""
    try:
        return dict(json.loads(line))
    except ValueError:
        return None


class Logbook:
    """The rows of a run, in files and in memory.

    Rows later than ``step`` belong to a future that a kill has undone: they are cut off, so that a resumed run
    leaves the files of one that was never interrupted. timing.jsonl keeps its rows: that time was really spent.

    Args:
        run: the run's directory.
        step: where the run goes on; 0 for a fresh one.
    """

    def __init__(self, run: Path, step: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self._metrics = run / "metrics.jsonl"
        if step and self._metrics.is_file():
            for line in self._metrics.read_text().splitlines():
                row = _parse(line)
                if row is None or row["step"] > step:
                    break
                self.rows.append(row)
            write_atomic(self._metrics, "".join(json.dumps(row) + "\n" for row in self.rows))
        else:
            write_atomic(self._metrics, "")
        self._timing = run / "timing.jsonl"
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)
        self._started = time.monotonic()

    def log(self, row: dict[str, Any]) -> None:
        """Add a row of metrics; it holds `step`."""
        self.rows.append(row)
        with self._metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
        with self._timing.open("a") as file:
            seconds = round(time.monotonic() - self._started, 3)
            file.write(json.dumps({"step": row["step"], "seconds": seconds}) + "\n")
        for name, value in row.items():
            if name != "step":
                kind = "val" if name.startswith("val_") else "train"
                self._writer.add_scalar(f"{kind}/{name.removeprefix('val_')}", value, row["step"])

    def picture(self, name: str, png: bytes, step: int) -> None:
        """Show a picture in TensorBoard."""
        self._writer.add_image(name, imread(io.BytesIO(png)), step, dataformats="HWC")

    def first(self, key: str) -> float | None:
        """The first value of a metric."""
        return next((row[key] for row in self.rows if key in row), None)

    def last(self, key: str) -> float | None:
        """The newest value of a metric."""
        return next((row[key] for row in reversed(self.rows) if key in row), None)

    def close(self) -> None:
        """Flush TensorBoard."""
        self._writer.close()
