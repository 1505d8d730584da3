"""Integers to bytes: adaptive tables of counts, and constriction's range coder.

Every integer comes with a level: how large it is expected to be, which its caller knows from neighbours that are coded
already. Each level has a table of its own, which starts as a two-sided geometric distribution and learns from what is
coded. Nothing here depends on the machine: counts, levels and sizes are integers, and what floats there are (the first
tables) come from sums, products, quotients and roots, which IEEE 754 rounds in one way only.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectralvae.errors import ConfigError

try:
    import constriction
except ImportError as error:
    remedy = 'install it: pip install "spectralvae[codec]"'
    raise ConfigError(f"compressing needs constriction ({error})", remedy=remedy) from error

_Categorical = constriction.stream.model.Categorical
_Uniform = constriction.stream.model.Uniform

_LOWEST = -7  # level i stands for magnitudes of about 2^(_LOWEST + i / 2)
N_LEVELS = 2 * (40 - _LOWEST)
_LARGEST = 15  # a symbol is a number from -15 to 15, or says that the number follows
_ESCAPE = 2 * _LARGEST + 1
_N_SYMBOLS = _ESCAPE + 1
_TOTAL = 2**22  # of the integer frequencies: high enough for what never comes to cost nothing
_PRIOR, _GAIN, _WINDOW = 2**10, 2**5, 2**21  # counts that a table starts with, gains with a symbol, and keeps
_LIMB = 16  # bits that are stored at a time without a table

Integers = NDArray[np.int64]
Levels = NDArray[np.uint8]


# --- levels -----------------------------------------------------------------------------------


def levels_of(total: NDArray[Any], weight: int) -> Levels:
    """Levels of integers that are expected to be about as large as ``total / weight``.

    Args:
        total: sums of magnitudes, integers of at least 0.
        weight: by which they are to be divided.
    """
    thresholds, table = _thresholds(weight)
    if not total.size or int(total.max()) < len(table):
        few: Levels = table[total]
        return few
    return np.searchsorted(thresholds, total, side="right").astype(np.uint8)


@cache
def _thresholds(weight: int) -> tuple[Integers, Levels]:
    """The least total of each level from 1 on, and the levels of small totals."""
    # ceil(weight * 2^(_LOWEST + i / 2)) in integers
    squares = [weight * weight << i for i in range(1, N_LEVELS)]
    divisor = 1 << -2 * _LOWEST
    roots = [math.isqrt((square + divisor - 1) // divisor - 1) + 1 for square in squares]
    thresholds = np.array([min(root, 2**62) for root in roots], np.int64)
    table = np.searchsorted(thresholds, np.arange(64 * weight), side="right").astype(np.uint8)
    return thresholds, table


def _shift(level: int) -> int:
    """Low bits that are not worth a table, so that what is left of a number is about 2 to 4."""
    return max(0, _LOWEST + level // 2 - 1)


def _first_counts(level: int) -> Integers:
    """A two-sided geometric distribution with the magnitude that a level stands for, as counts."""
    magnitude = 1.0
    for _ in range(abs(_LOWEST)):
        magnitude /= 2
    for _ in range(level):
        magnitude *= math.sqrt(2)
    for _ in range(_shift(level)):
        magnitude /= 2
    ratio = (math.sqrt(1 + magnitude * magnitude) - 1) / magnitude  # of one probability to the next
    weights = [(1 - ratio) / (1 + ratio)]
    for _ in range(_LARGEST):
        weights.append(weights[-1] * ratio)
    both = [*weights[:0:-1], *weights, weights[-1] * ratio]
    return np.array([1 + int(weight * _PRIOR) for weight in both], np.int64)


class _Tables:
    """The tables of all levels, alike in encoder and decoder."""

    def __init__(self) -> None:
        self._counts: dict[int, Integers] = {}
        self._models: dict[int, Any] = {}

    def model(self, level: int) -> Any:
        """constriction's model of a level."""
        if level not in self._models:
            if level not in self._counts:
                self._counts[level] = _first_counts(level)
            counts = self._counts[level]
            frequencies = 1 + counts * (_TOTAL - _N_SYMBOLS) // counts.sum()
            frequencies[np.argmax(frequencies)] += _TOTAL - frequencies.sum()
            # exact in floats, and so are their sums
            self._models[level] = _Categorical(frequencies / _TOTAL, perfect=False)
        return self._models[level]

    def learn(self, level: int, symbols: NDArray[np.int32]) -> None:
        """Count symbols that have been coded."""
        counts = self._counts[level]
        counts += _GAIN * np.bincount(symbols, minlength=_N_SYMBOLS)
        while counts.sum() > _WINDOW:
            counts[:] = (counts + 1) // 2
        del self._models[level]


def _in_order(levels: Levels) -> tuple[NDArray[np.intp], list[tuple[int, slice]]]:
    """Positions sorted by level, and where in this order each level's are."""
    order = np.argsort(levels, kind="stable")
    found, counts = np.flatnonzero(n := np.bincount(levels)), n[n > 0]
    ends = np.cumsum(counts).tolist()
    return order, [
        (int(level), slice(end - count, end)) for level, end, count in zip(found, ends, counts.tolist(), strict=True)
    ]


# --- coding -----------------------------------------------------------------------------------


class IntegerEncoder:
    """Integers to bytes, in chunks."""

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()
        self._tables = _Tables()

    def encode(self, values: NDArray[Any], levels: Levels) -> None:
        """Add a chunk; the tables learn from it afterwards.

        Args:
            values: (n,) integers of less than 2^62.
            levels: (n,) from `levels_of`.
        """
        assert values.shape == levels.shape and values.ndim == 1
        order, parts = _in_order(levels)
        values = values[order].astype(np.int64)
        for level, part in parts:
            some, shift = values[part], _shift(level)
            high = some >> shift
            escaped = np.abs(high) > _LARGEST
            symbols = np.where(escaped, _ESCAPE, high + _LARGEST).astype(np.int32)
            self._coder.encode(symbols, self._tables.model(level))
            self._tables.learn(level, symbols)
            if shift:
                self._raw((some & ((1 << shift) - 1))[~escaped], shift)
            if escaped.any():
                self._escaped(some[escaped])

    def _escaped(self, values: Integers) -> None:
        """Elias gamma of the zigzag numbers, but for the bits' order (Elias 1975)."""
        zigzag = (values << 1) ^ (values >> 63)
        for value in zigzag.tolist():
            n_bits = value.bit_length()
            self._coder.encode(n_bits, _Uniform(64))
            self._raw(np.array([value], np.int64), n_bits)

    def _raw(self, values: Integers, n_bits: int) -> None:
        """Bits as they are."""
        for first in range(0, n_bits, _LIMB):
            width = min(_LIMB, n_bits - first)
            limbs = (values >> first) & ((1 << width) - 1)
            self._coder.encode(limbs.astype(np.int32), _Uniform(1 << width))

    def finish(self) -> bytes:
        """All that was coded."""
        return bytes(self._coder.get_compressed().astype("<u4").tobytes())


class IntegerDecoder:
    """What `IntegerEncoder` made back to integers, in the same chunks.

    Args:
        data: from `IntegerEncoder.finish`.

    Raises:
        ValueError: the data was not made by it.
    """

    def __init__(self, data: bytes) -> None:
        if len(data) % 4:
            raise ValueError(f"{len(data)} bytes of coded integers are not a multiple of 4")
        self._coder = constriction.stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))
        self._tables = _Tables()

    def decode(self, levels: Levels) -> Integers:
        """The next chunk.

        Args:
            levels: (n,) as they were in encoding.

        Raises:
            ValueError: the data is corrupt.
        """
        order, parts = _in_order(levels)
        values = np.empty(len(levels), np.int64)
        for level, part in parts:
            shift = _shift(level)
            symbols = self._decode(self._tables.model(level), part.stop - part.start)
            self._tables.learn(level, symbols)
            some = (symbols.astype(np.int64) - _LARGEST) << shift
            escaped = symbols == _ESCAPE
            if shift:
                some[~escaped] |= self._raw(int(np.count_nonzero(~escaped)), shift)
            if escaped.any():
                some[escaped] = [self._escaped() for _ in range(int(np.count_nonzero(escaped)))]
            values[order[part]] = some
        return values

    def _decode(self, model: Any, n: int) -> NDArray[np.int32]:
        try:
            return np.asarray(self._coder.decode(model, n), np.int32)
        except AssertionError as error:  # how constriction tells
            raise ValueError(f"coded integers are corrupt: {error}") from error

    def _escaped(self) -> int:
        n_bits = int(self._decode(_Uniform(64), 1)[0])
        zigzag = int(self._raw(1, n_bits)[0])
        return zigzag >> 1 ^ -(zigzag & 1)

    def _raw(self, n: int, n_bits: int) -> Integers:
        values = np.zeros(n, np.int64)
        for first in range(0, n_bits, _LIMB):
            width = min(_LIMB, n_bits - first)
            values |= self._decode(_Uniform(1 << width), n).astype(np.int64) << first
        return values

    def finish(self) -> None:
        """Check that nothing is left.

        Raises:
            ValueError: there is.
        """
        if not self._coder.maybe_exhausted():
            raise ValueError("coded integers are corrupt: something is left over")
