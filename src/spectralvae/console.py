"""What the terminal shows: results on stdout, progress on stderr."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def new_console() -> Console:
    """For results: no line is cut, no number is coloured."""
    return Console(highlight=False, soft_wrap=True)


def new_progress(*fields: str) -> Progress:
    """A progress bar on stderr; ``fields`` are rich markup over a task's own fields."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *(TextColumn(field) for field in fields),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
