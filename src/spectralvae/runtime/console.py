"""What the terminal shows: results on stdout, progress on stderr."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column


class _Stream:
    """stdout or stderr, as long as somebody reads it: work must not die of a closed pipe or terminal."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(getattr(sys, self._name), attribute)

    def write(self, text: str) -> int:
        """As of a text stream."""
        self._unless_gone(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        """As of a text stream."""
        self._unless_gone(lambda stream: stream.flush())

    def _unless_gone(self, call: Callable[[Any], object]) -> None:
        stream = getattr(sys, self._name)
        try:
            call(stream)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())  # what is buffered, and all that comes
            os.close(nowhere)


def new_console() -> Console:
    """For results: lines are neither cut nor coloured, and no part of a path is taken for markup."""
    return Console(file=_Stream("stdout"), highlight=False, soft_wrap=True, markup=False, emoji=False)  # type: ignore[arg-type]


def warn(console: Console, message: str) -> None:
    """Print what the user should not overlook."""
    console.print(f"WARNING: {message}", style="bold yellow")


def new_progress(*fields: str, quiet: bool = False) -> Progress:
    """A progress bar on stderr; ``fields`` are rich markup over a task's own fields.

    It is for people: where stderr is no terminal, nothing but an error's one line is printed there. ``quiet`` is for
    processes beside the one that shows it.
    """
    console = Console(file=_Stream("stderr"))  # type: ignore[arg-type]
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),  # the only column that may wrap: in a narrow terminal it shrinks before any text is cut
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        *(TextColumn(field) for field in fields),
        TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(no_wrap=True)),
        console=console,
        redirect_stdout=sys.stdout.isatty(),  # else what is printed beside the bar would go where the bar is
        disable=quiet or not console.is_terminal,
    )
