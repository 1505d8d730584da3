"""Tables of integers to bytes and back, by what their neighbours say of them.

Differences along rows and columns leave little of smooth coordinates but the noise of their rounding, which a weighted
sum of 16 neighbours foresees in part. The weights are fitted to the table, and travel with it as integers. All
arithmetic is that of 64-bit integers, modulo 2^64.

Shapes: (ny, nx) tables; "along x" is within a row.
"""

from __future__ import annotations

import heapq
import struct
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectralvae.codec.container import inflate
from spectralvae.codec.entropy import IntegerDecoder, IntegerEncoder, Integers, Levels, levels_of

_ORDERS = 4  # of differences, 0 to 3
_TAPS = (*((0, dx) for dx in range(1, 5)), *((1, dx) for dx in range(-3, 4)), *((2, dx) for dx in range(-2, 3)))
_SLOPE = 4  # a sample's taps lie on diagonals x + 4 y before its own
_BITS = 16  # of a weight, behind the point
_ABOVE, _BEFORE = 2, 4  # rows above and samples beside a table that its taps reach
_SHARE = 16  # samples to a diagonal, at least, where weights are used: else diagonals cost too much time
_FITTED, _ROUNDS = 2**16, 8  # samples that weights are fitted to, and how often
_FEW, _RUN = 256, 64  # samples of a chunk, at least, and of one without a chunk above it
_CAP = 2**40  # larger magnitudes are the same to the coder
_LARGE = 2**61  # magnitudes that the coder does not take
_USUAL_BITS, _LOWEST_BYTES = 30, 5  # bits of residuals that are worth a table; bytes of them that may be left to zlib
_FITTED_WAYS = 3  # ways that weights are fitted for
_SIZES = struct.Struct("<III")  # bytes of the holes, of the residuals' lowest bytes, and of the rest of them


@dataclass(frozen=True)
class _Way:
    """How residuals are made.

    Attributes:
        x, y: orders of differences along x and along y.
        weights: of the taps, and what is added at last; none without taps.
        origin: what is subtracted from all samples first.
        unit: bits of all samples that are 0 then.
        hole: the value of samples that are left out, None where none are.
        low: bytes of each residual that are not coded, but left to zlib.
        start: a magnitude to begin with.
    """

    x: int
    y: int
    weights: tuple[int, ...] = ()
    origin: int = 0
    unit: int = 0
    hole: int | None = None
    low: int = 0
    start: int = 0

    def check(self, shape: tuple[int, int]) -> None:
        integers = [
            self.x,
            self.y,
            self.origin,
            self.unit,
            self.low,
            self.start,
            *self.weights,
            *(() if self.hole is None else (self.hole,)),
        ]
        if not (
            all(isinstance(i, int) and -(2**63) <= i < 2**63 for i in integers)
            and 0 <= min(self.x, self.y) <= max(self.x, self.y) < _ORDERS
            and 0 <= self.unit < 64
            and 0 <= self.low <= _LOWEST_BYTES
            and 0 <= self.start <= _CAP
            and (not self.weights or (len(self.weights) == len(_TAPS) + 1 and _may_have_weights(shape)))
        ):
            raise ValueError(f"coded integers are corrupt: {self} for a table of {shape}")


def pack_table(table: Integers) -> tuple[dict[str, Any], bytes]:
    """A table (ny, nx) as what JSON can hold, and bytes."""
    holes, hole = _find_holes(table)
    origin = int(table[~holes][0])
    used = int(np.bitwise_or.reduce(table[~holes] - origin))
    unit = max(0, (used & -used).bit_length() - 1)
    smooth = (_fill(table, holes) - origin) >> unit if hole is not None else (table - origin) >> unit
    best = _best_way(smooth)
    residuals = _residuals(smooth, best)
    low = _low(residuals)
    lowest, residuals = _split(residuals, low)
    start = min(_CAP, int(np.median(np.abs(residuals.ravel()[:_FEW]))))
    way = replace(best, origin=origin, unit=unit, hole=hole, low=low, start=start)
    where = zlib.compress(np.packbits(holes).tobytes(), 9) if hole is not None else b""
    parts = (where, lowest, _code(residuals, start))
    return _to_values(way), _SIZES.pack(*map(len, parts)) + b"".join(parts)


def unpack_table(values: Any, data: bytes, shape: tuple[int, int]) -> Integers:
    """What `pack_table` packed.

    Raises:
        ValueError: it is corrupt.
    """
    way = _from_values(values)
    way.check(shape)
    holes, lowest, coded = _split_parts(data)
    residuals = _decode(coded, shape, way.start)
    table = (_restore(_join(lowest, residuals, way.low), way) << way.unit) + way.origin
    if way.hole is not None:
        size = shape[0] * shape[1]
        bits = np.frombuffer(_inflate(holes, (size + 7) // 8), np.uint8)
        table[np.unpackbits(bits, count=size).reshape(shape).astype(bool)] = way.hole
    return table


def _split_parts(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Holes, lowest bytes and the rest."""
    sizes = _SIZES.unpack_from(data) if len(data) >= _SIZES.size else (0, 0, 0)
    if len(data) != _SIZES.size + sum(sizes):
        raise ValueError(f"coded integers are corrupt: {len(data):,} of {_SIZES.size + sum(sizes):,} bytes")
    first, second = _SIZES.size + sizes[0], _SIZES.size + sizes[0] + sizes[1]
    return data[_SIZES.size : first], data[first:second], data[second:]


def _inflate(data: bytes, n_bytes: int) -> bytes:
    content = inflate(data, n_bytes)
    if len(content) != n_bytes:
        raise ValueError(f"coded integers are corrupt: {len(content):,} of {n_bytes:,} bytes")
    return content


def _to_values(way: _Way) -> dict[str, Any]:
    defaults = asdict(_Way(0, 0))
    return {key: value for key, value in asdict(way).items() if value != defaults[key]}


def _from_values(values: Any) -> _Way:
    try:
        return _Way(**{"x": 0, "y": 0, **values, "weights": tuple(values.get("weights", ()))})
    except (TypeError, AttributeError) as error:
        raise ValueError(f"coded integers are corrupt: {error}") from error


# --- holes ------------------------------------------------------------------------------------


def _find_holes(table: Integers) -> tuple[NDArray[np.bool_], int | None]:
    """Samples with a value that is farther from all others than these are from each other, as fills are."""
    for extreme, nearest, opposite in ((table.max(), np.max, np.min), (table.min(), np.min, np.max)):
        holes = table == extreme
        others = table[~holes]
        if others.size and abs(int(extreme) - int(nearest(others))) > abs(int(nearest(others)) - int(opposite(others))):
            return holes, int(extreme)
    return np.zeros(table.shape, bool), None


def _fill(table: Integers, holes: NDArray[np.bool_]) -> Integers:
    """A table with straight lines where it has holes, and whole rows as the one above."""
    nx = table.shape[1]
    x = np.arange(nx)
    left = np.maximum.accumulate(np.where(holes, -1, x), axis=1)
    right = np.minimum.accumulate(np.where(holes, nx, x)[:, ::-1], axis=1)[:, ::-1]
    left, right = np.where(left < 0, right, left), np.where(right == nx, left, right)
    empty = holes.all(axis=1)
    left[empty] = right[empty] = 0
    first, last = np.take_along_axis(table, left, 1), np.take_along_axis(table, right, 1)
    share = np.where(holes, (x - left) / np.maximum(right - left, 1), 0)
    filled = np.where(holes, first + ((last - first) * share).astype(np.int64), table)
    above = np.maximum.accumulate(np.where(empty, -1, np.arange(len(table))))
    above[above < 0] = np.argmin(empty)
    return filled[above]


# --- differences and weights ------------------------------------------------------------------


def _best_way(table: Integers) -> _Way:
    """The one with the smallest residuals: differences of all orders, the best of them with weights, too."""
    ny, nx = table.shape
    costs: dict[_Way, float] = {}
    for y in range(min(_ORDERS, ny)):
        for x in range(min(_ORDERS, nx)):
            way = _Way(x, y)
            costs[way] = _cost(_residuals(table, way))
    if _may_have_weights(table.shape):
        for way in heapq.nsmallest(_FITTED_WAYS, costs, key=lambda way: costs[way]):
            fitted = replace(way, weights=_fit(_residuals(table, way)))
            costs[fitted] = _cost(_residuals(table, fitted))
    return min(costs, key=lambda way: costs[way])


def _cost(residuals: Integers) -> float:
    """About the bits that residuals take."""
    rows = residuals[:: max(1, residuals.size // _FITTED)]
    return float(np.log2(1.0 + np.abs(rows.astype(np.float64))).mean())


def _residuals(table: Integers, way: _Way) -> Integers:
    residuals = _difference(_difference(table, way.x, 1), way.y, 0)
    # what the first differences leave as it is
    residuals[:, : way.x] = _difference(residuals[:, : way.x], 2 - way.y, 0)
    residuals[: way.y] = _difference(residuals[: way.y], 2 - way.x, 1)
    if way.weights:
        residuals = residuals - _predict(residuals, way.weights)
    return residuals


def _restore(residuals: Integers, way: _Way) -> Integers:
    """The table that residuals were made of."""
    table = _unpredict(residuals, way.weights) if way.weights else residuals
    table[: way.y] = _sum(table[: way.y], 2 - way.x, 1)
    table[:, : way.x] = _sum(table[:, : way.x], 2 - way.y, 0)
    return _sum(_sum(table, way.y, 0), way.x, 1)


def _difference(table: Integers, order: int, axis: int) -> Integers:
    table = table.copy()
    for _ in range(order):
        table = np.diff(table, axis=axis, prepend=np.int64(0))
    return table


def _sum(table: Integers, order: int, axis: int) -> Integers:
    for _ in range(order):
        table = np.cumsum(table, axis=axis)
    return table


def _may_have_weights(shape: tuple[int, ...]) -> bool:
    ny, nx = shape
    return ny * nx >= _SHARE * (nx + _SLOPE * ny)


def _predict(table: Integers, weights: tuple[int, ...]) -> Integers:
    """What neighbours say of each sample; those outside of the table are 0."""
    ny, nx = table.shape
    padded = np.pad(table, ((_ABOVE, 0), (_BEFORE, _BEFORE)))
    total = np.full(table.shape, weights[-1])
    for (dy, dx), weight in zip(_TAPS, weights, strict=False):
        total += weight * padded[_ABOVE - dy : _ABOVE - dy + ny, _BEFORE - dx : _BEFORE - dx + nx]
    return total >> _BITS


def _unpredict(residuals: Integers, weights: tuple[int, ...]) -> Integers:
    """The table that residuals and predictions add up to: diagonal by diagonal, as each needs those before."""
    ny, nx = residuals.shape
    # skewed[x + 4 y, y]
    skewed = np.zeros((nx + _SLOPE * ny + _LATEST, ny + _ABOVE), np.int64)
    y = np.arange(ny)[:, None]
    places = (_LATEST + np.arange(nx) + _SLOPE * y, y + _ABOVE)
    skewed[places] = residuals
    back, up = np.array([(dx + _SLOPE * dy, dy) for dy, dx in _TAPS]).T[:, :, None]
    factors, added = np.array(weights[:-1]), weights[-1]
    for t in range(nx + _SLOPE * (ny - 1)):
        rows = np.arange(max(0, -((nx - 1 - t) // _SLOPE)), min(ny, t // _SLOPE + 1)) + _ABOVE
        known = skewed[t + _LATEST - back, rows - up]
        skewed[t + _LATEST, rows] += (factors @ known + added) >> _BITS
    table: Integers = skewed[places]
    return table


_LATEST = max(dx + _SLOPE * dy for dy, dx in _TAPS)


def _fit(table: Integers) -> tuple[int, ...]:
    """Weights with which most samples are predicted well, few badly: least squares, again and again, of what is near.

    Only the packing side comes here, so that floats do no harm.
    """
    ny, nx = table.shape
    rows = np.arange(0, ny, max(1, table.size // _FITTED))
    padded = np.pad(table, ((_ABOVE, 0), (_BEFORE, _BEFORE))).astype(np.float64)
    taps = [padded[rows + _ABOVE - dy, _BEFORE - dx : _BEFORE - dx + nx].ravel() for dy, dx in _TAPS]
    inputs, wanted = np.stack([*taps, np.ones(taps[0].size)]), table[rows].ravel().astype(np.float64)
    usual = 100 * (1 + np.median(np.abs(wanted)))
    usable = (np.abs(inputs).max(axis=0) < usual) & (np.abs(wanted) < usual)
    inputs, wanted = inputs[:, usable], wanted[usable]
    weights = np.zeros(len(inputs))
    for _ in range(_ROUNDS if wanted.size else 0):
        errors = np.abs(wanted - np.einsum("i,in", weights, inputs))
        shares = inputs / (1 + np.median(errors) + errors) ** 2
        products = np.einsum("in,jn", shares, inputs)  # no BLAS: its threads would wait for each other's cores
        weights = np.linalg.lstsq(products, np.einsum("in,n", shares, wanted), rcond=1e-10)[0]
    weights[-1] += 0.5  # the nearest integer, not the one below
    return tuple(int(i) for i in np.rint(np.clip(weights, -(2**20), 2**20) * 2**_BITS))


# --- coding -----------------------------------------------------------------------------------


def _low(residuals: Integers) -> int:
    """How many bytes of residuals are noise, or too much for the coder."""
    usual = int(np.median(np.abs(residuals))).bit_length()
    large = int(residuals.max()) >= _LARGE or int(residuals.min()) <= -_LARGE
    return min(_LOWEST_BYTES, max(int(large), -(-(usual - _USUAL_BITS) // 8)))


def _split(residuals: Integers, low: int) -> tuple[bytes, Integers]:
    """The lowest bytes, compressed, and the rest."""
    if not low:
        return b"", residuals
    lowest = residuals.astype("<i8").ravel().view(np.uint8).reshape(-1, 8)[:, :low]
    return zlib.compress(lowest.T.tobytes()), residuals >> 8 * low


def _join(lowest: bytes, rest: Integers, low: int) -> Integers:
    """What `_split` split."""
    if not low:
        return rest
    joined = (rest << 8 * low).astype("<i8")
    parts = np.frombuffer(_inflate(lowest, low * rest.size), np.uint8).reshape(low, -1)
    joined.ravel().view(np.uint8).reshape(-1, 8)[:, :low] = parts.T
    return joined.astype(np.int64)


def _code(residuals: Integers, start: int) -> bytes:
    encoder, flat = IntegerEncoder(), residuals.ravel()

    def encode(part: slice, levels: Levels) -> Integers:
        encoder.encode(flat[part], levels)
        return flat[part]

    _walk(residuals.shape, start, encode)
    return encoder.finish()


def _decode(data: bytes, shape: tuple[int, int], start: int) -> Integers:
    decoder, residuals = IntegerDecoder(data), np.empty(shape, np.int64)

    def decode(part: slice, levels: Levels) -> Integers:
        residuals.ravel()[part] = decoder.decode(levels)
        return residuals.ravel()[part]

    _walk(shape, start, decode)
    decoder.finish()
    return residuals


def _walk(shape: tuple[int, ...], start: int, code: Callable[[slice, Levels], Integers]) -> None:
    """Go through a table in chunks of rows; levels of the first are those of the run before, of others from above.

    Args:
        shape: of the table.
        start: a magnitude to begin with.
        code: encodes or decodes a part at its levels, and returns its values.
    """
    ny, nx = shape
    length = nx * -(-_FEW // nx) if ny > 1 else nx  # of a chunk
    margin = 2 * length + 2
    magnitudes = np.zeros(margin + ny * nx, np.int64)
    total = start * _RUN
    for first in range(0, min(length, ny * nx), _RUN):
        part = slice(first, min(first + _RUN, length, ny * nx))
        n = part.stop - first
        values = code(part, levels_of(np.full(n, total), _RUN))
        magnitudes[margin + first : margin + part.stop] = np.minimum(np.abs(values), _CAP)
        total = int(magnitudes[margin + first : margin + part.stop].sum()) * _RUN // n
    for first in range(length, ny * nx, length):
        part = slice(first, min(first + length, ny * nx))
        n = part.stop - first
        expected = np.zeros(n, np.int64)
        for up, across, weight in _CONTEXT:
            begin = margin + first - up * length + across
            expected += weight * magnitudes[begin : begin + n]
        values = code(part, levels_of(expected, sum(weight for *_, weight in _CONTEXT)))
        magnitudes[margin + first : margin + part.stop] = np.minimum(np.abs(values), _CAP)


_CONTEXT = ((1, -2, 1), (1, -1, 2), (1, 0, 4), (1, 1, 2), (1, 2, 1), (2, -1, 1), (2, 0, 2), (2, 1, 1))
