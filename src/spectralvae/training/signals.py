"""Signals that ask a run to save and stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}


class StopSignal:
    """Remembers that a signal asked the run to stop after the step at hand.

    Attributes:
        exit_code: what to exit with; None while nothing was asked.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.exit_code = EXIT_CODES[signal.Signals(number)]


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Catch TERM, USR1 and INT while the block runs."""
    stop = StopSignal()
    before = {number: signal.signal(number, stop) for number in EXIT_CODES}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
