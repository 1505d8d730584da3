"""Spectral components and integers as bytes: what codecs of rivals.py are made of.

Shapes: N spectra of C channels, K spectral components.
"""

from __future__ import annotations

import itertools
import math
import struct
from dataclasses import dataclass
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Integers = NDArray[np.int64]


def pack(*parts: bytes) -> bytes:
    """Several byte strings as one, with 4 bytes for the length of each."""
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def unpack(data: bytes) -> list[bytes]:
    """The inverse of ``pack``."""
    parts, at = [], 0
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        parts.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    assert at == len(data)
    return parts


# --- spectral components ------------------------------------------------------------------------


@dataclass(frozen=True)
class Spectra:
    """Mean and principal components of spectra, as they are stored.

    Attributes:
        mean: (C).
        basis: (K, C).
        data: both, as bytes.
    """

    mean: Float64
    basis: Float64
    data: bytes

    @classmethod
    def fit(cls, x: NDArray[Any], step: float, n_components: int | None = None) -> Spectra:
        """Of spectra (N, C) whose components will be quantised with a step.

        With an error of step^2 / 12 each, a component is worth its place if what it explains beyond that error
        outweighs its bits, those of its spectrum among them, at what bits achieve elsewhere: an error falls to a
        quarter with each further bit, so by 2 ln 2 of itself to begin with. What rounding to float16 would spoil
        beside that error is float32.

        Args:
            x: (N, C) finite.
            step: of the quantisation.
            n_components: take so many.
        """
        n, nc = x.shape
        mean = x.mean(axis=0, dtype=np.float64)
        centred = x - mean
        variance, vectors = np.linalg.eigh(centred.T @ centred / n)
        variance, vectors = np.maximum(variance[::-1], 0.0), vectors[:, ::-1].T
        spread = np.sqrt(variance)
        fine = spread * 2.0**-11 > step / 8
        if n_components is None:
            error = step**2 / 12
            bits = n / 2 * np.log2(np.maximum(variance / error, 1.0)) + np.where(fine, 32, 16) * nc
            worth = n * (variance - error) > 2 * math.log(2) * error * bits
            n_components = nc if worth.all() else int(np.argmin(worth))
        n_fine = int(fine[:n_components].sum())
        mean_type = "<f4" if n_fine or np.abs(mean).max() * 2.0**-11 > step / 8 else "<f2"
        parts = [mean.astype(mean_type), vectors[:n_fine].astype("<f4"), vectors[n_fine:n_components].astype("<f2")]
        head = struct.pack("<HHB", n_components, n_fine, int(mean_type[-1]))
        return cls.from_bytes(head + b"".join(part.tobytes() for part in parts), nc)

    @classmethod
    def from_bytes(cls, data: bytes, n_channels: int) -> Spectra:
        """From ``data``."""
        n_components, n_fine, mean_size = struct.unpack_from("<HHB", data)
        at, rows = struct.calcsize("<HHB"), []
        for count, size in ((1, mean_size), (n_fine, 4), (n_components - n_fine, 2)):
            part = np.frombuffer(data, f"<f{size}", count * n_channels, at)
            rows.append(part.reshape(count, n_channels).astype(np.float64))
            at += part.nbytes
        assert at == len(data)
        return cls(rows[0][0], np.concatenate(rows[1:]), data)

    def scores(self, x: NDArray[Any]) -> Float64:
        """(N, C) -> (N, K): of the components as they are stored, which rounding made a little oblique."""
        products = (x - self.mean) @ self.basis.T
        return np.asarray(np.linalg.solve(self.basis @ self.basis.T, products.T).T)

    def spectra(self, scores: NDArray[Any]) -> Float64:
        """(N, K) -> (N, C)"""
        return np.asarray(scores @ self.basis + self.mean)


# --- integers -----------------------------------------------------------------------------------


class _Table:
    """A distribution over symbols 0, 1, ... that begins even and learns from what was coded, chunk by chunk."""

    def __init__(self, n_symbols: int) -> None:
        self._counts = np.full(n_symbols, min(0.5, 32 / n_symbols))

    def model(self) -> Any:
        return constriction.stream.model.Categorical(self._counts / self._counts.sum(), perfect=False)

    def learn(self, symbols: NDArray[np.int32]) -> None:
        self._counts += np.bincount(symbols, minlength=len(self._counts))


def _chunks(n: int) -> list[slice]:
    """Short ones first, for a table that has seen nothing predicts badly."""
    edges = [0]
    while edges[-1] < n:
        edges.append(min(n, edges[-1] + min(4096, max(64, edges[-1]))))
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def encode_integers(rows: Integers) -> bytes:
    """(K, N) integers, each row with a table of its own; lowest bits that are as good as random go without."""
    coder = constriction.stream.queue.RangeEncoder()
    head = b""
    for row in rows:
        shift = max(0, math.floor(math.log2(max(float(row.std()), 1.0) / 8)))
        high = row >> shift
        low, n_symbols = int(high.min()), max(2, int(np.ptp(high)) + 1)  # what a table needs
        head += struct.pack("<qIB", low, n_symbols, shift)
        table = _Table(n_symbols)
        for chunk in _chunks(len(row)):
            symbols = (high[chunk] - low).astype(np.int32)
            coder.encode(symbols, table.model())
            table.learn(symbols)
        for bits, at in _raw(shift):
            raw = (row >> at & (1 << bits) - 1).astype(np.int32)
            coder.encode(raw, constriction.stream.model.Uniform(1 << bits))
    return pack(head, coder.get_compressed().astype("<u4").tobytes())


def decode_integers(data: bytes, shape: tuple[int, int]) -> Integers:
    """The inverse of ``encode_integers``: of this shape."""
    head, words = unpack(data)
    coder = constriction.stream.queue.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))
    rows = np.empty(shape, np.int64)
    for row, (low, n_symbols, shift) in zip(rows, struct.iter_unpack("<qIB", head), strict=True):
        table = _Table(n_symbols)
        for chunk in _chunks(len(row)):
            symbols = coder.decode(table.model(), chunk.stop - chunk.start)
            table.learn(symbols)
            row[chunk] = symbols.astype(np.int64) + low << shift
        for bits, at in _raw(shift):
            row += coder.decode(constriction.stream.model.Uniform(1 << bits), len(row)).astype(np.int64) << at
    return rows


def _raw(shift: int) -> list[tuple[int, int]]:
    """Random bits are coded at most 16 at a time: how many, and from which on."""
    return [(min(16, shift - at), at) for at in range(0, shift, 16)]
