"""A metric against the step, in a size that does not grow with the run; pure, no files."""

from __future__ import annotations

import math
from array import array
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RESOLUTION = 500  # bins: one a step until there are so many, then so many while the step grows by the factor e
# rows over which values are smoothed: 20; more on a long run, where 20 rows are less than a bin of a logarithmic axis;
# fewer at its start, where a value decades above the rest must be forgotten fast
HORIZON_ROWS = 20
HORIZON_FRACTION = 1 / 50  # of all rows
START_FRACTION = 1 / 6  # of all rows


class Points(NamedTuple):
    """A curve as it is drawn: float64 arrays, an entry a bin.

    ``step`` is the bin's last row's; ``mean``, ``low`` and ``high`` are over its rows; ``smooth`` is the exponential
    mean of all rows until its last one.
    """

    step: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    smooth: npt.NDArray[np.float64]


def bin_of(step: int) -> int:
    """Which bin a step falls into.

    A bin is never wider than 1/RESOLUTION of its step: thinning is not seen on a linear or a logarithmic axis.
    """
    return step if step <= RESOLUTION else RESOLUTION + int(RESOLUTION * math.log(step / RESOLUTION))


class Curve:
    """A metric against the step, thinned as it grows, its extremes kept.

    The bin of a row is a function of its step alone, and rows are only added: a curve built again from all rows
    equals the one that was never interrupted. 200,000 steps make at most 3,496 bins, whatever the number of rows.

    Smoothing is an exponential mean: each row weighs 1, and what came before loses 1/horizon of its weight with it.

    Attributes:
        first, last: the first and the newest value; None before there is one.
        newest: its step; -1 before there is one.
        not_finite: steps of values that are NaN or infinite, one a bin: they enter nothing else.
    """

    def __init__(self) -> None:
        self.first: float | None = None
        self.last: float | None = None
        self.newest = -1
        self.not_finite = array("q")
        self._step, self._mean, self._low, self._high, self._smooth = (array("d") for _ in Points._fields)
        self._bin = -1
        self._in_bin = self._rows = 0
        self._sum = 0.0  # of the newest bin
        self._weighted = self._weight = 0.0  # of the exponential mean

    def add(self, step: int, value: float) -> None:
        """Add a row; steps grow."""
        assert step > self.newest, f"step {step} after {self.newest}"
        self.newest = step
        self.first = value if self.first is None else self.first
        self.last = value
        if not math.isfinite(value):
            if not self.not_finite or bin_of(self.not_finite[-1]) < bin_of(step):
                self.not_finite.append(step)
            return
        self._rows += 1
        horizon = min(max(HORIZON_ROWS, self._rows * HORIZON_FRACTION), 1 + self._rows * START_FRACTION)
        kept = 1 - 1 / horizon
        self._weighted = self._weighted * kept + value
        self._weight = self._weight * kept + 1
        number = bin_of(step)
        if number > self._bin:
            self._bin = number
            self._open_bin(step)
        self._in_bin += 1
        self._sum += value
        self._step[-1] = step
        self._mean[-1] = self._sum / self._in_bin
        self._low[-1] = min(self._low[-1], value)
        self._high[-1] = max(self._high[-1], value)
        self._smooth[-1] = self._weighted / self._weight

    def _open_bin(self, step: int) -> None:
        self._in_bin, self._sum = 0, 0.0
        for column, empty in (
            (self._step, step),
            (self._mean, 0.0),
            (self._low, math.inf),
            (self._high, -math.inf),
            (self._smooth, 0.0),
        ):
            column.append(empty)

    @property
    def newest_smooth(self) -> float | None:
        """The exponential mean until the newest row; None before there is one."""
        return self._smooth[-1] if self._smooth else None

    def points(self) -> Points:
        """All bins, as arrays of their own."""
        return Points(*(np.array(c) for c in (self._step, self._mean, self._low, self._high, self._smooth)))
