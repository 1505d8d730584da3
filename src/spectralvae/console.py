"""What the terminal shows: results on stdout, progress on stderr."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def new_console() -> Console:
    """For results: lines are neither cut nor coloured, and no part of a path is taken for markup."""
    return Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def warn(console: Console, message: str) -> None:
    """Print what the user should not overlook."""
    console.print(f"WARNING: {message}", style="bold yellow")


def new_progress(*fields: str, quiet: bool = False) -> Progress:
    """A progress bar on stderr; ``fields`` are rich markup over a task's own fields.

    It is for people: where stderr is no terminal, nothing but an error's one line is printed there. ``quiet`` is for
    processes beside the one that shows it.
    """
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *(TextColumn(field) for field in fields),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        redirect_stdout=sys.stdout.isatty(),  # else what is printed beside the bar would go where the bar is
        disable=quiet or not console.is_terminal,
    )
