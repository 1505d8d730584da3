"""z of a scene, read along the chunks of its file, so that they are decompressed once where few rows fill them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from spectralvae.data.validity import Validity
from spectralvae.inference.coder import Float32, Read
from spectralvae.readers.base import Coordinate
from spectralvae.weights.normalization import Normalization

BLOCK_SAMPLES = 4_000_000  # normalised at a time
BAND_SAMPLES = 75_000_000  # kept of rows that chunks span: 300 MB of float32, 35 rows of a TEMPO granule
TALL_SHARE = 5  # so much less is read at a time of chunks with more: often whole scenes that are not compressed

Found = tuple[Float32, dict[str, int]]  # radiance, and how many samples were rejected, by rule
T = TypeVar("T")


class Source(Protocol):
    """What is encoded: a scene of a file, or one in memory."""

    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def wavelength(self) -> NDArray[np.float64]: ...
    @property
    def units(self) -> str | None: ...
    @property
    def region(self) -> Sequence[int] | None: ...
    @property
    def chunk(self) -> tuple[int, int]: ...
    def coordinates(self) -> dict[str, Coordinate]: ...
    def read(self, rows: slice, columns: slice) -> Found: ...
    def blocks(self, max_samples: int) -> Iterator[tuple[slice, slice]]: ...


def z_reader(source: Source, normalization: Normalization, counts: dict[str, int]) -> Read:
    """z of parts of a scene, valid as in the model's training: (rows, columns, channel) float32, NaN = invalid.

    Rows that a chunk spans beyond those asked for are kept for the next part. Chunks of more than
    `BAND_SAMPLES` in the width of the scene are read several times, and so are those across the border of two panels.

    Args:
        source: the scene.
        normalization: the model's.
        counts: to which the numbers of rejected samples are added, by rule: once each, where the parts that are read
            go from the top to the bottom of panels, and these from the left to the right and may overlap.
    """
    return _ZReader(source, normalization, counts).read


class _ZReader:
    """Band is what rows from and to are called that are read together, panel what columns are."""

    def __init__(self, source: Source, normalization: Normalization, counts: dict[str, int]) -> None:
        self._source, self._normalization, self._counts = source, normalization, counts
        self._validity = Validity.of_model(normalization)
        limited = normalization.max_solar_zenith is not None
        self._solar_zenith = source.coordinates()["solar_zenith_angle"][1] if limited else None
        self._bands: dict[range, list[slice]] = {}  # each with the columns of its blocks
        for rows, columns in source.blocks(_block_size(source)):
            self._bands.setdefault(range(rows.start, rows.stop), []).append(columns)
        self._panel, self._counted_to = slice(0, 0), 0  # columns; those before are counted already
        self._kept: tuple[range, Float32] | None = None

    def read(self, rows: slice, columns: slice) -> Float32:
        """As `z_reader` says."""
        if columns != self._panel:
            self._panel, self._counted_to, self._kept = columns, self._panel.stop, None
        nc = self._source.shape[2]
        z = np.empty((rows.stop - rows.start, columns.stop - columns.start, nc), np.float32)
        bands = [band for band in self._bands if band.start < rows.stop and rows.start < band.stop]
        if self._kept and bands[0] == self._kept[0]:
            _copy(self._kept, z, rows)
            bands = bands[1:]
        parts = [(band, piece) for band in bands for piece in self._pieces(band)]
        with closing(_one_ahead(self._fetch, parts)) as found:
            for band in bands:
                if rows.start <= band.start and band.stop <= rows.stop:
                    self._fill(z[band.start - rows.start : band.stop - rows.start], band, found)
                else:
                    self._kept = None  # its memory is free before there is more
                    values = np.empty((len(band), *z.shape[1:]), np.float32)
                    self._fill(values, band, found)
                    self._kept = band, values
                    _copy(self._kept, z, rows)
        return z

    def _pieces(self, band: range) -> list[slice]:
        """Columns in which a band of the panel is read; what is counted already is apart."""
        pieces = []
        for block in self._bands[band]:
            start, stop = max(block.start, self._panel.start), min(block.stop, self._panel.stop)
            cut = min(max(start, self._counted_to), stop)
            pieces += [slice(start, cut), slice(cut, stop)]
        return [piece for piece in pieces if piece.start < piece.stop]

    def _fetch(self, band: range, columns: slice) -> Found:
        rows = slice(band.start, band.stop)
        values, found = self._source.read(rows, columns)
        angles = None if self._solar_zenith is None else self._solar_zenith[rows, columns]
        return values, found | self._validity.reject(values, angles)

    def _fill(self, z: Float32, band: range, found: Iterator[Found]) -> None:
        """Normalise what is found of a band, a few rows at a time, for that takes several times the memory."""
        left = self._panel.start
        for piece in self._pieces(band):
            values, rejected = next(found)
            height = max(1, BLOCK_SAMPLES // (values.shape[1] * values.shape[2]))
            for top in range(0, len(band), height):
                some = slice(top, top + height)
                z[some, piece.start - left : piece.stop - left] = self._normalization.normalize(values[some])
            for rule, n in rejected.items():
                self._counts[rule] = self._counts.get(rule, 0) + n * (piece.start >= self._counted_to)


def _block_size(source: Source) -> int:
    """Samples to read at a time: all rows of a chunk, unless they are more than may be kept; reading takes several
    times their memory.
    """
    _, nx, nc = source.shape
    height, width = source.chunk
    row = max(width, nx) * nc
    if height * row <= BAND_SAMPLES:
        return max(height * width * nc, BLOCK_SAMPLES)
    return max(1, BAND_SAMPLES // TALL_SHARE // row) * width * nc


def _copy(kept: tuple[range, Float32], z: Float32, rows: slice) -> None:
    """Copy those rows of a band that are wanted to where they are."""
    band, values = kept
    first, end = max(rows.start, band.start), min(rows.stop, band.stop)
    z[first - rows.start : end - rows.start] = values[first - band.start : end - band.start]


def _one_ahead(function: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> Generator[T]:
    """Results of calls, each of which is made while the caller works on the result before."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:
        following: Future[T] | None = None
        for given in arguments:
            before, following = following, thread.submit(function, *given)
            if before is not None:
                yield before.result()
        if following is not None:
            yield following.result()
