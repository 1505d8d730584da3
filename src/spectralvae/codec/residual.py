"""What is left of a scene after prediction, as integers: row by row to bytes and back.

Such integers are nearly white noise. How large they are depends on the channel, on the pixel and on the step that they
were divided by; every sample's level (see `entropy`) comes from what is known of both: a running mean of magnitudes for
its channel, times how much larger than these means the rows above were near its pixel. What little can still be
predicted (what is shifted from pixel to pixel along the slit, stripes) is predicted from the row above, with a factor
for each channel that is fitted to the rows before.

Everything is integer arithmetic, alike on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectralvae.codec.entropy import IntegerDecoder, IntegerEncoder, Integers, Levels, levels_of

_BITS = 12  # of a magnitude's fraction
_FINE = 16  # steps of an octave in logarithms
_LARGEST = 2**20  # larger values are taken for this in prediction

_PART = 2**16  # samples coded at a time, which fit into a processor's cache
_FIRST_PART = 2**13  # as many in the first row, from which most is learnt
_FIRST = 4  # pixels in the first part of all, which has nothing to go by but one mean
_PRIOR, _WINDOW = 8, 2**14  # samples that a channel's mean starts with, and keeps

_BLOCK = 8  # neighbouring channels whose magnitudes are added up
_NEAR = (2, 1)  # pixels and blocks to each side that count as near
_TRUST = 3  # how much the pixels' magnitudes count against the channels'

_REACH = (2, 4)  # pixels and channels to each side that predict: the kernel is triangular in both
_WEIGHT = (_REACH[0] + 1) ** 2 * (_REACH[1] + 1) ** 2  # sum of the kernel
_FACTOR_BITS = 16
_FIT = 2**14  # larger values are taken for this in fitting, lest sums of squares overflow

Logarithms = NDArray[np.int16]


# --- logarithms -------------------------------------------------------------------------------


def _log(values: Integers) -> Logarithms:
    """Logarithms to base 2 of integers from 1 to 2^53, in sixteenths."""
    # the exponent and the first bits of a mantissa: such integers are floats without rounding
    logarithms: Logarithms = _logarithms()[(values.astype(np.float64).view(np.int64) >> 44) - (1023 << 8)]
    return logarithms


@cache
def _logarithms() -> Logarithms:
    """By exponent and the 8 bits of a mantissa that follow its leading one."""
    middles = [(2 * (256 + first) + 1) ** _FINE for first in range(256)]
    octave = np.array([power.bit_length() - 1 - 9 * _FINE for power in middles])
    table: Logarithms = (_FINE * np.arange(54)[:, None] + octave).astype(np.int16).ravel()
    return table


@cache
def _level_table() -> Levels:
    """Levels by the logarithm of a magnitude in units of 2^-_BITS."""
    powers = [1 << exponent for exponent in range(62 * _FINE)]
    for _ in range(_FINE.bit_length() - 1):
        powers = [math.isqrt(power) for power in powers]
    return levels_of(np.array(powers, np.int64), 1 << _BITS)


def _box(values: NDArray[Any], n: int, axis: int) -> NDArray[Any]:
    """Sums of n neighbours along an axis, which becomes n - 1 shorter."""
    length = values.shape[axis] - n + 1
    shifted = [values[(slice(None),) * axis + (slice(i, i + length),)] for i in range(n)]
    total = shifted[0].copy()
    for other in shifted[1:]:
        total += other
    return total


# --- what is known of a sample ----------------------------------------------------------------


class _Knowledge:
    """What encoder and decoder both know before a sample is coded.

    Args:
        nx: pixels in a row.
        nc: channels.
        mean: a first guess of every channel's mean magnitude, in units of 2^-_BITS.
    """

    def __init__(self, nx: int, nc: int, mean: int) -> None:
        self._nx, self._nc = nx, nc
        self._blocks = np.arange(0, nc, _BLOCK)
        self._sizes = np.minimum(_BLOCK, nc - self._blocks)
        self._sums, self._counts = np.full(nc, _PRIOR * mean), np.full(nc, _PRIOR)
        self._means, self._caps = self._sums, self._sums
        self._is_first = True
        self._row_sums = np.zeros((nx, len(self._blocks)), np.int64)
        self._near = np.zeros_like(self._row_sums)
        self._log_ratios = np.zeros(self._near.shape, np.int16)
        self._above = np.zeros((nx + 2 * _REACH[0], nc + 2 * _REACH[1]), np.int32)
        self._row = np.zeros_like(self._above)
        self._kernel_sums = self._above
        self._products, self._squares = np.zeros(nc, np.int64), np.zeros(nc, np.int64)

    def parts(self) -> Iterator[slice]:
        """Pixels of a row that are coded together; in the first row more and more, but fewer."""
        largest = max(1, (_FIRST_PART if self._is_first else _PART) // self._nc)
        start, size = 0, min(_FIRST, largest) if self._is_first else largest
        while start < self._nx:
            yield slice(start, min(start + size, self._nx))
            start, size = start + size, min(2 * size, largest)

    def expect(self, part: slice) -> tuple[Integers, Levels]:
        """Predictions of a part's samples, and levels of what is left of them.

        Args:
            part: pixels.
        """
        self._means = self._sums // self._counts + 1
        self._caps = np.minimum((self._means >> _BITS - 4) + 16, _LARGEST)
        logs = np.repeat(self._log_ratios[part], _BLOCK, axis=1)[:, : self._nc] + _log(self._means)
        levels = _level_table()[np.clip(logs, 0, 62 * _FINE - 1, out=logs)]

        sums = self._above[part.start : part.stop + 2 * _REACH[0]]
        for axis in (0, 1):
            for _ in range(2):
                sums = _box(sums, _REACH[axis] + 1, axis)
        self._kernel_sums = sums
        largest = (2 << _FACTOR_BITS) // _WEIGHT
        factors = np.clip(self._products // ((self._squares >> _FACTOR_BITS) + 1), -largest, largest)
        return (sums * factors + (1 << _FACTOR_BITS - 1)) >> _FACTOR_BITS, levels

    def learn(self, part: slice, values: Integers, left: Integers, valid: NDArray[np.bool_]) -> None:
        """Take in a part that is coded.

        Args:
            part: pixels, those of the latest `expect`.
            values: (n, nc), 0 where not valid.
            left: values less their predictions, 0 where not valid.
            valid: (n, nc)
        """
        # one value that stands out must not spoil what is expected of its neighbours
        capped = np.clip(left, -self._caps, self._caps)
        magnitudes = np.abs(capped)
        self._sums += magnitudes.sum(axis=0) << _BITS
        self._counts += np.count_nonzero(valid, axis=0)
        many = self._counts > _WINDOW
        self._sums[many] //= 2
        self._counts[many] //= 2

        sums = np.add.reduceat(magnitudes, self._blocks, axis=1) << _BITS
        if not valid.all():
            n_valid = np.add.reduceat(valid, self._blocks, axis=1, dtype=np.int64)
            means = np.add.reduceat(self._means, self._blocks)
            sums = np.where(n_valid > 0, sums * self._sizes // np.maximum(n_valid, 1), means)
        self._row_sums[part] = sums

        first, channels = part.start + _REACH[0], slice(_REACH[1], _REACH[1] + self._nc)
        values = np.clip(values - left + capped, -_LARGEST, _LARGEST)
        self._row[first : first + len(values), channels] = values
        # every other pixel is enough for a fit
        predictors = self._kernel_sums[::2].clip(-_FIT * _WEIGHT, _FIT * _WEIGHT).astype(np.int64) * valid[::2]
        self._products += (predictors * values[::2].clip(-_FIT, _FIT)).sum(axis=0)
        self._squares += (predictors * predictors).sum(axis=0)

    def end_row(self) -> None:
        """Make the row that is coded the one above."""
        self._above, self._row = self._row, self._above
        self._products -= self._products >> 2
        self._squares -= self._squares >> 2
        self._near += (self._row_sums - self._near) >> (0 if self._is_first else 1)
        self._is_first = False

        pixels, blocks = _NEAR
        padded = np.pad(self._near, ((pixels, pixels), (blocks, blocks)), mode="edge")
        near = _box(_box(padded, 2 * pixels + 1, 0), 2 * blocks + 1, 1)
        means = np.add.reduceat(self._sums // self._counts + 1, self._blocks)
        usual = _box(np.pad(means, blocks, mode="edge"), 2 * blocks + 1, 0) * (2 * pixels + 1)
        one = 1 << _BITS
        self._log_ratios = _log(_TRUST * near + usual + one) - _log((_TRUST + 1) * usual + one)


# --- coding -----------------------------------------------------------------------------------


class ResidualEncoder:
    """Rows of integers to bytes.

    Args:
        nx: pixels in a row.
        nc: channels.
    """

    def __init__(self, nx: int, nc: int) -> None:
        self._shape = (nx, nc)
        self._coder = IntegerEncoder()
        self._knowledge: _Knowledge | None = None

    def encode_row(self, values: NDArray[Any], valid: NDArray[np.bool_]) -> None:
        """Add a row.

        Args:
            values: (nx, nc) integers of less than 2^61.
            valid: (nx, nc), samples that are to be coded.
        """
        assert values.shape == valid.shape == self._shape
        if not valid.any():
            return
        if self._knowledge is None:
            mean = _first_mean(values[valid])
            self._coder.encode(np.array([mean]), np.zeros(1, np.uint8))
            self._knowledge = _Knowledge(*self._shape, mean)
        for part in self._knowledge.parts():
            some, coded = np.where(valid[part], values[part], 0).astype(np.int64), valid[part]
            predictions, levels = self._knowledge.expect(part)
            left = np.where(coded, some - predictions, 0)
            self._coder.encode(left[coded], levels[coded])
            self._knowledge.learn(part, some, left, coded)
        self._knowledge.end_row()

    def finish(self) -> bytes:
        """All rows."""
        return self._coder.finish()


def _first_mean(values: NDArray[Any]) -> int:
    """The mean magnitude of the first row, but for what sticks out."""
    magnitudes = np.abs(values.astype(np.int64))
    middle = int(np.partition(magnitudes, len(magnitudes) // 2)[len(magnitudes) // 2])
    total = int(np.minimum(magnitudes, min(16 * (middle + 1), _LARGEST)).sum())
    return (total << _BITS) // len(magnitudes)


class ResidualDecoder:
    """What `ResidualEncoder` made back to rows of integers.

    Args:
        data: from `ResidualEncoder.finish`.
        nx: pixels in a row.
        nc: channels.

    Raises:
        ValueError: the data was not made by it.
    """

    def __init__(self, data: bytes, nx: int, nc: int) -> None:
        self._shape = (nx, nc)
        self._coder = IntegerDecoder(data)
        self._knowledge: _Knowledge | None = None

    def decode_row(self, valid: NDArray[np.bool_]) -> Integers:
        """The next row, 0 where not valid.

        Args:
            valid: (nx, nc), as it was in encoding.

        Raises:
            ValueError: the data is corrupt.
        """
        assert valid.shape == self._shape
        values = np.zeros(self._shape, np.int64)
        if not valid.any():
            return values
        if self._knowledge is None:
            mean = int(self._coder.decode(np.zeros(1, np.uint8))[0])
            if not 0 <= mean <= _LARGEST << _BITS:
                raise ValueError(f"coded rows are corrupt: they start with a mean magnitude of {mean}")
            self._knowledge = _Knowledge(*self._shape, mean)
        for part in self._knowledge.parts():
            coded = valid[part]
            predictions, levels = self._knowledge.expect(part)
            left = np.zeros(coded.shape, np.int64)
            left[coded] = self._coder.decode(levels[coded])
            values[part] = np.where(coded, left + predictions, 0)
            self._knowledge.learn(part, values[part], left, coded)
        self._knowledge.end_row()
        return values

    def finish(self) -> None:
        """Check that nothing is left.

        Raises:
            ValueError: there is.
        """
        self._coder.finish()
