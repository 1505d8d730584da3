"""What it costs to write down and draw a run, early and late in it.

    python benchmarks/watching.py [--json FILE] [--steps EARLY LATE]

Logbooks of two made-up runs are opened, one short and one long: a row every 10 steps, validation every 50. Measured are
opening (which replays metrics.jsonl and timing.jsonl), one call of log(), one of draw_curves(), and the memory that the
history takes. Beside it stands what one would do otherwise: keep all rows in a list and draw them all. The four
cases take turns.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from matplotlib.figure import Figure
from progress import say

from spectralvae.plotting.figures import save_figure
from spectralvae.training.logbook import Logbook
from spectralvae.training.plots import CURVES, draw_curves

LOG_EVERY, VAL_EVERY = 10, 50
KEYS = ("loss", "nll_loss", "kl_loss", "pixel_mse")
N_ROWS = 500  # logged in each repeat


class AllRows:
    """The alternative: every row in a list, every row drawn. No TensorBoard."""

    def __init__(self, run: Path) -> None:
        self.path = run / "metrics.jsonl"
        self.rows = [json.loads(line) for line in self.path.read_text().splitlines()]

    def log(self, row: dict[str, Any]) -> None:
        """Add a row to list and file."""
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def draw(self, folder: Path) -> None:
        """The same three plots, raw only."""
        for name, metric, title in CURVES:
            figure = Figure(figsize=(8, 5), layout="constrained")
            axes = figure.add_subplot(xscale="log", yscale="symlog", title=title)
            for key, style in ((metric, "-"), (f"val_{metric}", "o")):
                shown = [(row["step"], row[key]) for row in self.rows if key in row and row["step"] >= 100]
                axes.plot(*zip(*shown, strict=True), style, ms=4, label=key)
            figure.legend(loc="outside lower center", ncols=3)
            save_figure(figure, folder / f"{name}.png")


def make_row(step: int, random: np.random.Generator) -> dict[str, Any]:
    """A row of metrics: noisy, and the loss falls through zero."""
    error = (1 + step / 30) ** -0.45 * random.lognormal(0, 0.2)
    values = dict(zip(KEYS, (4000 * (error - 0.2), 4000 * error, 800.0, error**2), strict=True))
    row = {"step": step, **values, "grad_norm": random.lognormal(0, 0.3)}
    return row | ({f"val_{key}": value for key, value in values.items()} if step % VAL_EVERY == 0 else {})


def write_run(run: Path, last: int) -> None:
    """The files of a run that has come to a step."""
    random = np.random.default_rng(0)
    run.mkdir()
    (run / "events.jsonl").touch()
    with (run / "metrics.jsonl").open("w") as metrics, (run / "timing.jsonl").open("w") as timing:
        for step in range(0, last + 1, LOG_EVERY):
            metrics.write(json.dumps(make_row(step, random)) + "\n")
            row = {"start": 1, "step": step, "seconds": step / 7 + random.random(), "memory_gb": 3.25}
            timing.write(json.dumps(row) + "\n")


def seconds(function: Callable[[], Any]) -> float:
    """Of one call."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def kept_bytes(make: Callable[[], Any]) -> int:
    """Memory that a new object keeps."""
    gc.collect()
    tracemalloc.start()
    made = make()
    gc.collect()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    if isinstance(made, Logbook):
        made.close()
    return size


def measure_ours(run: Path, last: int) -> dict[str, float]:
    """Seconds of one opening, logged row and drawing."""
    random = np.random.default_rng(1)
    rows = [make_row(last + LOG_EVERY * i, random) for i in range(1, N_ROWS + 1)]
    begun = time.perf_counter()
    book = Logbook(run, last)
    found = {"replay": time.perf_counter() - begun}
    # the median: TensorBoard's thread writes now and then
    found["draw"] = seconds(lambda: draw_curves(book.curves, run, {"PCA": 0.1}, [500]))
    found["log"] = statistics.median(seconds(lambda row=row: book.log(row, 3.25)) for row in rows)  # type: ignore[misc]
    book.close()
    return found


def measure_all_rows(run: Path, last: int) -> dict[str, float]:
    """The same of the alternative."""
    random = np.random.default_rng(1)
    rows = [make_row(last + LOG_EVERY * i, random) for i in range(1, N_ROWS + 1)]
    begun = time.perf_counter()
    book = AllRows(run)
    found = {"replay": time.perf_counter() - begun}
    found["draw"] = seconds(lambda: book.draw(run))
    found["log"] = statistics.median(seconds(lambda row=row: book.log(row)) for row in rows)  # type: ignore[misc]
    return found


def cut(run: Path, last: int) -> None:
    """Undo what a repeat has added."""
    Logbook(run, last).close()
    for path in (run / "tensorboard").iterdir():
        path.unlink()
    timing = [line for line in (run / "timing.jsonl").read_text().splitlines() if json.loads(line)["start"] == 1]
    (run / "timing.jsonl").write_text("\n".join(timing) + "\n")


def compare(folder: Path, steps: list[int], repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seconds of all repeats by case, what was done, and step; and bytes by case and step."""
    measures = {"curves": measure_ours, "all rows": measure_all_rows}
    times: dict[str, Any] = {
        case: {what: {str(s): [] for s in steps} for what in ("replay", "draw", "log")} for case in measures
    }
    memory: dict[str, Any] = {case: {} for case in measures}
    for last in steps:
        say(f"a run of {last} steps")
        run = folder / str(last)
        write_run(run, last)
        memory["curves"][str(last)] = kept_bytes(lambda run=run, last=last: Logbook(run, last))  # type: ignore[misc]
        memory["all rows"][str(last)] = kept_bytes(lambda run=run: AllRows(run))  # type: ignore[misc]
    for repeat in range(repeats):
        say(f"repeat {repeat + 1} of {repeats}")
        for last in steps:
            for case, measure in measures.items():
                for what, value in measure(folder / str(last), last).items():
                    times[case][what][str(last)].append(value)
                cut(folder / str(last), last)
    return times, memory


def table(times: Mapping[str, Any], memory: Mapping[str, Any], steps: list[int]) -> str:
    """Medians, and how much more the long run costs."""
    early, late = map(str, steps)
    lines = [f"{'':9s} {'':11s} {'step ' + early:>13s} {'step ' + late:>13s}   late / early (least - most)"]
    for case, found in times.items():
        for what, each in found.items():
            a, b = (1000 * statistics.median(each[step]) for step in (early, late))
            ratios = [y / x for x, y in zip(each[early], each[late], strict=True)]
            lines.append(
                f"{case:9s} {what + ', ms':11s} {a:13.3f} {b:13.3f}   "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
            )
    for case, size in memory.items():
        a, b = size[early] / 1e6, size[late] / 1e6
        lines.append(f"{case:9s} {'memory, MB':11s} {a:13.3f} {b:13.3f}   {b / a:.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results there, too")
    parser.add_argument("--steps", type=int, nargs=2, default=[1000, 200_000], metavar=("EARLY", "LATE"))
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="watching-") as name:
        times, memory = compare(Path(name), options.steps, options.repeats)
    print(table(times, memory, options.steps))
    if options.json:
        report = {
            "machine": machine(["numpy", "matplotlib", "tensorboard"]),
            "load_before": load_before,
            "load_after": os.getloadavg(),
            "steps": options.steps,
            "seconds": times,
            "bytes_kept": memory,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
