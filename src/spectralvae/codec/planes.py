"""Stacks of images to bytes at one quantisation step: wavelet subbands, and levels from coefficients already coded.

A subband is coded on a grid that grows finer: first every 16th sample along both axes, then the middles of its squares,
the middles of their sides, and so on. So nearly every coefficient is surrounded by neighbours that the decoder has
already, and whole passes over all images are array operations, with few calls of the coder. Images that are noise are
coded as they are where that is smaller: the wavelet is not quite orthonormal, and their neighbours tell nothing.

Legend: n images, y rows, x columns; *magnitudes* are absolute values of quantised coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from spectralvae.codec.entropy import IntegerDecoder, IntegerEncoder, Integers, Levels, levels_of
from spectralvae.codec.wavelet import Float64, Subband, forward, inverse, n_levels_of, subband_sizes

_LARGEST = 2**40  # of magnitudes, so that no sum of neighbours leaves 64 bits
_UNIT = 64  # expected magnitudes are counted in 64ths
_NEAR, _PARENT, _SIBLING = 4, 2, 2  # what they weigh in an expected magnitude, beside the mean's 1; not critical
_COARSEST = 16  # spacing of the first grid
_MAX_SIZE = (_UNIT * _LARGEST).bit_length() + 1
# What a bit is worth in squared steps: at high rates, squared error is step^2 / 12 = c 4^-bits, so this is its slope.
_PER_BIT = math.log(2) / 6
_LEAST_EXPECTED = 1 / 32  # even in an empty neighbourhood; keeps what is dropped below one step

_WAVELET, _PLAIN = b"w", b"p"  # how a stack is coded
_CLEAR_GAIN = 0.3  # bits a sample; with less, samples as they are may take fewer bytes than wavelet coefficients
_FIRST_CHUNK = 512  # samples of noise, until the tables first learn

Bools = NDArray[np.bool_]

_Number = TypeVar("_Number", np.int64, np.float64)

# Codes integers with their levels and gives them back. In decoding, what comes in doesn't matter.
_Code = Callable[[Integers, Levels], Integers]
_Walk = Callable[[list[tuple[str, Integers]], _Code], None]


def encode_planes(images: Float64, step: float, valid: Bools | None = None) -> tuple[bytes, Float64]:
    """Code a stack of images.

    Args:
        images: (n, y, x), finite; at least one row and one column.
        step: of the quantiser, in the images' units. The mean squared error is at most about step^2 / 6, and about
            step^2 / 12 where few coefficients are 0.
        valid: (y, x), pixels that count; None for all. The others should be smooth.

    Returns:
        The bytes, and the images exactly as `decode_planes` gives them, who knows nothing of pixels that don't count.

    Raises:
        ValueError: the step is too small for such values.
    """
    subbands = forward(images, n_levels_of(*images.shape[1:]))
    quantised = [(name, _quantised(values, step)) for name, values in subbands]
    data, decoded = _WAVELET + _encoded(quantised, _walk), _images(quantised, step)
    if images.size and _gain(images, subbands) < _CLEAR_GAIN:
        valid = np.ones(images.shape[1:], np.bool_) if valid is None else valid
        samples = [("", _quantised(images[:, None, valid], step))]
        plain, as_is = _PLAIN + _encoded(samples, _walk_noise), _spread(samples[0][1], valid, step)
        bits = 8 * (len(plain) - len(data))
        more = np.square(images - as_is)[:, valid].sum() - np.square(images - decoded)[:, valid].sum()
        if more < -_PER_BIT * step**2 * bits:
            return plain, as_is
    return data, decoded


def _encoded(quantised: list[tuple[str, Integers]], walk: _Walk) -> bytes:
    encoder = IntegerEncoder()

    def code(values: Integers, levels: Levels) -> Integers:
        encoder.encode(values, levels)
        return values

    walk(quantised, code)
    return encoder.finish()


def _gain(images: Float64, subbands: list[Subband]) -> float:
    """Bits a sample that the wavelet saves, if all is Gaussian: the coding gain (Jayant and Noll 1984)."""
    tiny = 1e-300
    before = np.log2(np.square(images).mean(axis=(1, 2)) + tiny) / 2
    after = sum(
        values[0].size / images[0].size * np.log2(np.square(values).mean(axis=(1, 2)) + tiny) / 2
        for _, values in subbands
        if values.size
    )
    return float((before - after).mean())


def decode_planes(data: bytes, shape: tuple[int, int, int], step: float, valid: Bools | None = None) -> Float64:
    """The images (n, y, x) that `encode_planes` returned.

    Args:
        data: from `encode_planes`.
        shape: n, y, x.
        step, valid: as they were in encoding.

    Raises:
        ValueError: the data is corrupt.
    """
    n, n_y, n_x = shape
    way, decoder = data[:1], IntegerDecoder(data[1:])
    if way not in (_WAVELET, _PLAIN):
        raise ValueError(f"coded images are corrupt: they begin with {way!r}")
    valid = np.ones(shape[1:], np.bool_) if valid is None else valid
    plain_sizes = [("", 1, int(valid.sum()))]
    sizes = subband_sizes(n_y, n_x, n_levels_of(n_y, n_x)) if way == _WAVELET else plain_sizes
    quantised = [(name, np.zeros((n, rows, columns), np.int64)) for name, rows, columns in sizes]

    def code(_: Integers, levels: Levels) -> Integers:
        values = decoder.decode(levels)
        if values.size and not -_LARGEST <= values.min() <= values.max() <= _LARGEST:
            raise ValueError("coded images are corrupt: a coefficient is too large")
        return values

    (_walk if way == _WAVELET else _walk_noise)(quantised, code)
    decoder.finish()
    return _images(quantised, step) if way == _WAVELET else _spread(quantised[0][1], valid, step)


def _images(quantised: list[tuple[str, Integers]], step: float) -> Float64:
    return inverse([Subband(name, values.astype(np.float64) * step) for name, values in quantised])


def _spread(values: Integers, valid: Bools, step: float) -> Float64:
    """(n, 1, pixels that count) -> (n, y, x)"""
    images = np.zeros((len(values), *valid.shape))
    images[:, valid] = values[:, 0] * step
    return images


def _quantised(values: Float64, step: float) -> Integers:
    """Coefficients to integers of steps: rounded up only where that is worth the bits it costs.

    A magnitude k + 1 costs more bits than k, as many as a geometric distribution with the mean magnitude of the
    neighbours says, and the first one a sign. So zeros get a wider interval among zeros, and the other intervals shift
    just enough for their centres of mass to lie on the integers.
    """
    if not values.size:
        return np.zeros(values.shape, np.int64)
    magnitudes = np.abs(values) / step
    if not magnitudes.max() < _LARGEST:
        raise ValueError(f"step {step:g} is too small: a coefficient is {magnitudes.max():g} steps, the limit is 2^40")
    rounded = np.floor(magnitudes + 0.5)
    expected = (_blurred(rounded, 1) - rounded) / 8 + _LEAST_EXPECTED
    bits = -np.log2((np.sqrt(1 + expected * expected) - 1) / expected)
    lower = np.floor(magnitudes)
    upper = magnitudes - lower > 0.5 + _PER_BIT / 2 * (bits + (lower == 0))
    integers: Integers = (np.sign(values) * (lower + upper)).astype(np.int64)
    return integers


# --- what decoder and encoder do alike --------------------------------------------------------


def _walk(subbands: list[tuple[str, Integers]], code: _Code) -> None:
    """Code all coefficients, coarse to fine; in decoding this fills them in."""
    sizes: dict[str, Integers] = {}
    done: dict[str, Integers] = {}  # magnitudes of each orientation's latest subband
    for name, values in subbands:
        if not values.size:
            continue
        sizes[name] = _coded_sizes(values, sizes.get(name, np.zeros(len(values), np.int64)), code)
        live = np.flatnonzero(sizes[name])
        magnitudes = np.zeros_like(values)
        if live.size:
            means = _mean_magnitudes(sizes[name][live])[:, None, None]
            expected, weight = _expected(name, values[live].shape, {key: some[live] for key, some in done.items()})
            values[live], magnitudes[live] = _coded(values[live], means, expected, weight, code)
        done[name] = magnitudes


def _walk_noise(samples: list[tuple[str, Integers]], code: _Code) -> None:
    """Code samples that tell nothing of each other: only how large those of an image are on average."""
    ((_, values),) = samples
    means = _UNIT * np.abs(values).sum((1, 2)) // max(1, values[0].size) + (values != 0).any((1, 2))
    means = code(means, np.full(len(means), levels_of(np.array([_UNIT]), 1)[0]))
    if means.size and means.min() < 0:
        raise ValueError("coded images are corrupt: a mean magnitude is negative")
    for image, mean in zip(values, means, strict=True):
        flat, first, n = image.reshape(-1), 0, _FIRST_CHUNK
        level = levels_of(np.array([mean]), _UNIT)[0]
        while mean and first < flat.size:
            part = flat[first : first + n]
            part[...] = code(part.copy(), np.full(part.size, level))
            first, n = first + n, 2 * n


def _coded_sizes(values: Integers, before: Integers, code: _Code) -> Integers:
    """(n) each image's mean magnitude: 0 where all are 0, else 1 + the bits of its 64ths.

    Args:
        values: (n, y, x) of a subband.
        before: (n) this of the next coarser subband of this orientation.
    """
    totals = np.abs(values).sum((1, 2)).tolist()
    sizes = [total and 1 + (_UNIT * total // values[0].size).bit_length() for total in totals]
    levels = levels_of(np.where(before == 0, 1, 8), 8)
    sizes_coded = before + code(np.array(sizes, np.int64) - before, levels)
    if not 0 <= sizes_coded.min() <= sizes_coded.max() <= _MAX_SIZE:
        raise ValueError("coded images are corrupt: a subband's size is out of range")
    return sizes_coded


def _mean_magnitudes(sizes: Integers) -> Integers:
    """Mean magnitudes in 64ths, from sizes above 0."""
    return (3 << sizes - 1) >> 2


def _expected(name: str, shape: tuple[int, ...], done: dict[str, Integers]) -> tuple[Integers, int]:
    """What other subbands say of a subband's magnitudes: sums (n, y, x) in 64ths, and the sums' weight."""
    total, weight = np.zeros(shape, np.int64), 0
    if name in done:
        total += _UNIT * _PARENT // 16 * _resized(_blurred(done[name], 2), shape, 2)
        weight += _PARENT
    siblings = [key for key in {"LH": ["HL"], "HH": ["HL", "LH"]}.get(name, []) if key in done]
    for sibling in siblings:
        total += _UNIT * _SIBLING // len(siblings) * _resized(done[sibling], shape, 1)
        weight += _SIBLING // len(siblings)
    return total, weight


def _resized(values: Integers, shape: tuple[int, ...], factor: int) -> Integers:
    """Every value ``factor`` times along y and x, cut or extended to a shape."""
    rows, columns = (np.minimum(np.arange(shape[i]) // factor, values.shape[i] - 1) for i in (1, 2))
    return values[:, rows[:, None], columns]


def _coded(
    values: Integers, means: Integers, expected: Integers, weight: int, code: _Code
) -> tuple[Integers, Integers]:
    """Code a subband of the images that have something in it.

    Args:
        values: (n, y, x); in decoding, zeros.
        means: (n, 1, 1) mean magnitudes in 64ths.
        expected: (n, y, x) sums of magnitudes in 64ths, from other subbands.
        weight: of these sums.
        code: the coder.

    Returns:
        The values and their magnitudes.
    """
    values, magnitudes = values.copy(), np.zeros_like(values)
    for grid, near, near_weight in _passes(magnitudes):
        total = expected[grid] + _UNIT * near
        # a mean says little of a place that is empty
        total += np.minimum(means, total + _UNIT // 2) if near_weight else means
        levels = levels_of(total.ravel(), _UNIT * (weight + near_weight + 1))
        values[grid] = code(values[grid].ravel(), levels).reshape(total.shape)
        magnitudes[grid] = np.abs(values[grid])
    return values, magnitudes


def _passes(magnitudes: Integers) -> Iterator[tuple[tuple[slice, ...], Integers | int, int]]:
    """Parts of a subband in the order of coding.

    Args:
        magnitudes: (n, y, x), to be filled in by the caller, a part after each of its turns.

    Yields:
        Where the part is; the sum of its neighbours' magnitudes, and the sum's weight.
    """
    everywhere = slice(None)
    yield (everywhere, slice(0, None, _COARSEST), slice(0, None, _COARSEST)), 0, 0
    spacing = _COARSEST
    while spacing > 1:
        spacing //= 2
        for y, x in ((1, 1), (0, 1), (1, 0)):
            grid = everywhere, slice(y * spacing, None, 2 * spacing), slice(x * spacing, None, 2 * spacing)
            if magnitudes[grid].size:
                yield grid, *_neighbours(magnitudes[:, ::spacing, ::spacing], y, x)


def _neighbours(magnitudes: Integers, y: int, x: int) -> tuple[Integers, int]:
    """Sums of magnitudes around every second sample from (y, x) on, and their weight.

    Where y = x = 1, the four diagonal neighbours are known; else the other four; and where (y, x) = (1, 0), all eight.
    """
    padded = np.pad(magnitudes, ((0, 0), (1, 1), (1, 1)), "reflect")  # which keeps even at even, odd at odd places
    up, middle, down = (padded[:, y + i : padded.shape[1] - 2 + i : 2] for i in range(3))
    left, centre, right = (slice(x + i, padded.shape[2] - 2 + i, 2) for i in range(3))
    straight: Integers = up[..., centre] + down[..., centre] + middle[..., left] + middle[..., right]
    diagonal: Integers = up[..., left] + up[..., right] + down[..., left] + down[..., right]
    if (y, x) == (1, 0):
        return straight + diagonal // 2, _NEAR * 3 // 2
    return (diagonal if y else straight), _NEAR


def _blurred(values: NDArray[_Number], centre: int) -> NDArray[_Number]:
    """Sums over 3 x 3 samples with the weights (1, centre, 1) along both axes, mirrored at the border."""
    padded = np.pad(values, ((0, 0), (1, 1), (1, 1)), "reflect")
    rows = padded[:, :-2] + centre * padded[:, 1:-1] + padded[:, 2:]
    sums: NDArray[_Number] = rows[..., :-2] + centre * rows[..., 1:-1] + rows[..., 2:]
    return sums


# --- pixels that don't count ------------------------------------------------------------------


def fill_invalid(images: Float64, valid: NDArray[np.bool_]) -> Float64:
    """Images with smooth values at pixels that don't count, where they cost few bits.

    Means over 2 x 2 pixels, again and again, until all have a value; then back, each time towards the mean of the four
    neighbours ("pull-push", Gortler et al. 1996, with relaxation).

    Args:
        images: (n, y, x), anything where invalid.
        valid: (y, x).

    Returns:
        (n, y, x), the same where valid; zeros where nothing is.
    """
    return _filled(np.where(valid, images, 0.0), valid.astype(np.float64))


def _filled(images: Float64, weights: Float64) -> Float64:
    """Fill pixels without weight, in place. images: (n, y, x); weights (y, x): how many pixels each is the mean of."""
    missing = weights == 0
    if not missing.any() or missing.all():
        return images
    coarse_weights = _pair_sums(_pair_sums(weights, 0), 1)
    coarse = _pair_sums(_pair_sums(images * weights, 1), 2) / np.maximum(coarse_weights, 1)
    n_y, n_x = weights.shape
    y, x = np.nonzero(missing)
    images[:, y, x] = _filled(coarse, coarse_weights)[:, y // 2, x // 2]
    up, down, left, right = (
        np.abs(y - 1) % n_y,
        y + 1 - 2 * (y + 1 == n_y),
        np.abs(x - 1) % n_x,
        x + 1 - 2 * (x + 1 == n_x),
    )
    for _ in range(4):
        images[:, y, x] = (images[:, up, x] + images[:, down, x] + images[:, y, left] + images[:, y, right]) / 4
    return images


def _pair_sums(values: Float64, axis: int) -> Float64:
    """Sums of two neighbours along an axis; the last one stays alone where they are odd in number."""
    ahead = np.moveaxis(values, axis, 0)
    sums = ahead[::2].copy()
    sums[: len(ahead) // 2] += ahead[1::2]
    return np.moveaxis(sums, 0, axis)
