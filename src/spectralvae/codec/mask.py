"""Which samples of a scene are valid, row by row to bytes and back.

Most pixels are as those of the row above, wholly invalid, or wholly valid, and a symbol says so; only the others'
samples are coded one by one. Even numbers go first, so that odd ones are seen between two neighbours. What is expected
of a symbol or a sample, its context, takes the place of a level (see `entropy`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from spectralvae.codec.entropy import IntegerDecoder, IntegerEncoder, Integers, Levels

# a pixel's symbol; "remembered" are its samples when some of them were valid last
_AS_ABOVE, _TURNED, _ALL, _OTHER = range(4)  # turned: invalid where it was not, or as remembered where it was
_SAME, _EMPTY, _PIXELS = range(3)  # a row's symbol: as above, wholly invalid (which is forgotten), pixel by pixel
_ROW = 15  # a row's context; 0 to 14 are the pixels'
_PART = 2**16  # samples coded at a time
_LENGTH = 4  # bytes that say how many the pixels' symbols take

Bools = NDArray[np.bool_]


class _Coder(Protocol):
    """Writes values, or reads them where they are not known."""

    def __call__(self, values: NDArray[np.uint8] | None, contexts: Levels, largest: int) -> NDArray[np.uint8]: ...


class _Writer:
    def __init__(self) -> None:
        self.encoder = IntegerEncoder()

    def __call__(self, values: NDArray[np.uint8] | None, contexts: Levels, largest: int) -> NDArray[np.uint8]:
        assert values is not None
        self.encoder.encode(values.ravel(), contexts.ravel())
        return values


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.decoder = IntegerDecoder(data)

    def __call__(self, values: NDArray[np.uint8] | None, contexts: Levels, largest: int) -> NDArray[np.uint8]:
        assert values is None
        decoded: Integers = self.decoder.decode(contexts.ravel())
        if decoded.size and not 0 <= decoded.min() <= decoded.max() <= largest:
            raise ValueError(f"coded mask is corrupt: {decoded.min()} to {decoded.max()} where 0 to {largest} may be")
        return decoded.astype(np.uint8).reshape(contexts.shape)


class _Walk:
    """The way through a mask, the same in packing and in unpacking.

    Args:
        pixels: codes what is known by pixel.
        samples: codes single samples.
        nx: pixels in a row.
        nc: channels.
    """

    def __init__(self, pixels: _Coder, samples: _Coder, nx: int, nc: int) -> None:
        self._pixels, self._samples = pixels, samples
        self._remembered = np.ones((nx, nc), np.bool_)
        self._all = np.ones(nx, np.bool_)  # remembered as wholly valid
        self._none = np.zeros(nx, np.bool_)  # wholly invalid in the row above
        self._n_invalid, self._n = np.zeros(nc, np.int64), 1  # by channel, in the pixels coded one by one
        self._size = 1

    def row(self, valid: Bools | None) -> Bools:
        """Code a row.

        Args:
            valid: (nx, nc), or None in unpacking.

        Returns:
            It.
        """
        symbols, kinds = None, None
        if valid is not None:
            symbols = self._symbols(valid)
            kind = _SAME if not symbols.any() else _PIXELS if valid.any() else _EMPTY
            kinds = np.array([kind], np.uint8)
        kind = self._pixels(kinds, np.array([_ROW], np.uint8), _PIXELS)[0]
        if kind == _EMPTY:
            return np.zeros_like(self._remembered)
        if kind == _PIXELS:
            symbols = self._code_symbols(symbols)
            self._none[symbols >= _ALL] = False
            self._none[symbols == _TURNED] ^= True
            self._remembered[symbols == _ALL] = True
            others = np.flatnonzero(symbols == _OTHER)
            while len(others):
                part, others = others[: self._size], others[self._size :]
                self._remembered[part] = self._code_samples(part, None if valid is None else valid[part])
                self._size = min(2 * self._size, max(1, _PART // self._remembered.shape[1]))
            self._all = np.all(self._remembered, axis=1)
        return np.where(self._none[:, None], False, self._remembered)

    def _symbols(self, valid: Bools) -> NDArray[np.uint8]:
        none = ~valid.any(axis=1)
        symbols = np.where(valid.all(axis=1), _ALL, _OTHER).astype(np.uint8)
        symbols[(valid == self._remembered).all(axis=1)] = _AS_ABOVE
        symbols[none] = _AS_ABOVE
        return np.where((symbols == _AS_ABOVE) & (none != self._none), _TURNED, symbols).astype(np.uint8)

    def _code_symbols(self, symbols: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
        above = np.where(self._none, 2, np.where(self._all, 0, 1)).astype(np.uint8)
        edge = np.pad(above, 1, mode="edge")
        at_edge = (edge[:-2] != above) | (edge[2:] != above)
        coded = np.zeros(len(above), np.uint8)
        coded[::2] = self._pixels(
            None if symbols is None else symbols[::2], (2 * above + at_edge)[::2].astype(np.uint8), _OTHER
        )
        changed = _beside(coded[::2] != _AS_ABOVE, len(above))
        coded[1::2] = self._pixels(
            None if symbols is None else symbols[1::2], (6 + 3 * above[1::2] + changed).astype(np.uint8), _OTHER
        )
        return coded

    def _code_samples(self, part: NDArray[np.intp], valid: Bools | None) -> Bools:
        invalid = None if valid is None else (~valid).view(np.uint8)
        before = (~self._remembered[part]).view(np.uint8)
        rates = np.searchsorted([1, 8, 32], 64 * self._n_invalid // self._n, side="right").astype(np.uint8)
        coded = np.zeros(before.shape, np.uint8)
        contexts = before[:, ::2] + 2 * rates[::2]
        coded[:, ::2] = self._samples(None if invalid is None else invalid[:, ::2], contexts, 1)
        expected = before[:, 1::2] + (rates[1::2] >= 2)
        contexts = 8 + 3 * expected + _beside(coded[:, ::2], before.shape[1])
        coded[:, 1::2] = self._samples(None if invalid is None else invalid[:, 1::2], contexts, 1)
        self._n_invalid += np.count_nonzero(coded, axis=0)
        self._n += len(part)
        samples: Bools = coded == 0
        return samples


def _beside(even: NDArray[np.uint8] | Bools, n: int) -> NDArray[np.uint8]:
    """How many of its two neighbours are set, for the odd ones of n, along the last axis."""
    marked = even.astype(np.uint8)
    right = np.concatenate((marked[..., 1:], marked[..., -1:]), axis=-1)
    both: NDArray[np.uint8] = (marked + right)[..., : n // 2]
    return both


def pack_mask(rows: Iterable[Bools], shape: tuple[int, int, int]) -> bytes:
    """A mask to bytes.

    Args:
        rows: (x, channel) each, from the top; or the whole (y, x, channel).
        shape: y, x, channel.
    """
    pixels, samples = _Writer(), _Writer()
    walk, n_rows = _Walk(pixels, samples, *shape[1:]), 0
    for valid in rows:
        assert valid.shape == shape[1:]
        walk.row(valid)
        n_rows += 1
    assert n_rows == shape[0]
    symbols = pixels.encoder.finish()
    return len(symbols).to_bytes(_LENGTH, "little") + symbols + samples.encoder.finish()


def unpack_mask(data: bytes, shape: tuple[int, int, int]) -> Iterator[Bools]:
    """What `pack_mask` made back to rows (x, channel).

    Raises:
        ValueError: the data is corrupt; before the last row at the latest.
    """
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    if not _LENGTH <= end <= len(data):
        raise ValueError(f"coded mask is corrupt: {len(data)} bytes where {end} or more must be")
    pixels, samples = _Reader(data[_LENGTH:end]), _Reader(data[end:])
    walk = _Walk(pixels, samples, *shape[1:])
    for y in range(shape[0]):
        valid = walk.row(None)
        if y == shape[0] - 1:
            pixels.decoder.finish()
            samples.decoder.finish()
        yield valid
