"""Signals that ask a command to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

# TERM and USR1 come from schedulers, HUP from a terminal that was closed: "start it again" is 75; Ctrl-C is 130 by
# convention.
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGHUP: 75, signal.SIGINT: 130}

Handler = Callable[[int, FrameType | None], None]


class Stopped(BaseException):
    """A signal asked the command to stop, and it has saved its work; ``exit_code`` 75 or 130.

    No `Exception`, like KeyboardInterrupt: libraries that catch all of these would go on.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"stopped, exit code {exit_code}")
        self.exit_code = exit_code


class StopSignal:
    """Remembers that a signal asked the run to stop after the step at hand.

    Attributes:
        exit_code: what to exit with; None while nothing was asked.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.exit_code = EXIT_CODES[signal.Signals(number)]
        if os.isatty(2):  # a step may take long; the console's own locks may be held just now
            os.write(2, b"\nfinishing the step, then saving\n")


@contextmanager
def _handlers(handlers: Mapping[signal.Signals, Handler]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Catch TERM, USR1, HUP and INT while the block runs, but for HUP under nohup."""
    stop = StopSignal()
    caught = [number for number in EXIT_CODES if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    with _handlers(dict.fromkeys(caught, stop)):
        yield stop


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise Stopped(EXIT_CODES[signal.Signals(number)])


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Make TERM and USR1 raise `Stopped` while the block runs: for work that can be cut anywhere and goes on."""
    with _handlers({signal.SIGTERM: _raise_stopped, signal.SIGUSR1: _raise_stopped}):
        yield
