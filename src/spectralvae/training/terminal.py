"""What the terminal shows of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TaskID

from spectralvae.runtime.console import new_progress
from spectralvae.training.plots import CURVES
from spectralvae.training.watch import Watch

LOG_LINE_SECONDS = 30.0  # between lines where there is no terminal for a progress bar


class Terminal:
    """A progress bar, or a line now and then where there is no terminal."""

    def __init__(self, progress: Progress, task: TaskID, n_steps: int, console: Console) -> None:
        self._progress, self._task, self._n_steps, self._console = progress, task, n_steps, console
        self._shown = time.monotonic()

    def show(self, step: int, metrics: Mapping[str, float], steps_per_second: float) -> None:
        """Show a step."""
        loss, mse = f"{metrics['loss']:.4g}", f"{metrics['pixel_mse']:.4g}"
        self._progress.update(self._task, completed=step, loss=loss, mse=mse, speed=f"{steps_per_second:.2f}/s")
        now = time.monotonic()
        if not self._progress.console.is_terminal and now - self._shown > LOG_LINE_SECONDS:
            self._shown = now
            speed = f"{steps_per_second:.2f} steps/s"
            self._console.print(f"step {step}/{self._n_steps}: loss {loss}, pixel MSE {mse}, {speed}")


@contextmanager
def terminal(step: int, n_steps: int, console: Console) -> Iterator[Terminal]:
    """Show the progress from a step on while the block runs."""
    # no description, and short names: with a bar in 80 columns, and without one in 60
    fields = ("loss {task.fields[loss]}", "MSE {task.fields[mse]}", "{task.fields[speed]}")
    with new_progress(*fields, quiet=console.quiet) as progress:
        task = progress.add_task("", total=n_steps, completed=step, loss="-", mse="-", speed="")
        yield Terminal(progress, task, n_steps, console)


class Stopwatch:
    """Where the time of a run's loop goes, as the main process sees it."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Count the time of the block."""
        began = time.monotonic()
        yield
        self._seconds[what] = self._seconds.get(what, 0.0) + time.monotonic() - began

    def seconds(self) -> dict[str, float]:
        """Wall time in total and per non-training activity."""
        found = {"all": time.monotonic() - self._began, **self._seconds}
        return {what: round(seconds, 3) for what, seconds in found.items()}


def summarize(watch: Watch, step: int, seconds: Mapping[str, float], console: Console) -> None:
    """Say how well the network does, what took the time, and where to look."""
    validation = watch.log.curves.get("val_pixel_mse")
    if validation is not None and validation.first is not None and validation.last is not None:
        errors = {"before training": validation.first, f"at step {step}": validation.last, **watch.references}
        console.print("validation pixel MSE (in z):")
        for label, value in errors.items():
            console.print(f"  {label:22s} {value:.4g}")
    whole = seconds["all"]
    parts = [f"{what} {part / whole:.1%}" for what, part in seconds.items() if what != "all"]
    console.print(f"time of the loop: {whole:.0f} s; of that: {', '.join(parts) or 'all for steps'}")
    console.print("pictures to look at:")
    console.print(f"  {watch.path / 'summary' / 'index.html'}")
    for name, _, _ in CURVES:
        console.print(f"  {watch.path / 'summary' / name}.png")
    console.print(f"  {watch.figure_path(step)}")
