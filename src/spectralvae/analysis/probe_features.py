"""What cells of scenes look like to probes: latents, spectra, and what compression leaves of these.

Shapes: a scene is (y, x) pixels and C channels, its grid of latents (h, w) cells of s x s pixels, fewer at its ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectralvae.data.pca import PixelPCA
from spectralvae.data.store import Store
from spectralvae.inference.coder import Coder, Read

Float32 = NDArray[np.float32]

# features that probes are fitted on; `shuffled` are the latents, with targets of other cells
FITTED = ("latents", "pca", "raw", "geometry", "shuffled")
# what the linear probe of another is tested on: does radiance that went through so many floats still do? Of a network
# the answer would tell how it extrapolates
APPLIED = {"decoded": "raw", "decoded_pca": "raw"}


@dataclass(frozen=True)
class Bases:
    """Principal components that stand for as many floats as the latents.

    Attributes:
        cell: of the mean spectra of cells, as many components as there are latent channels.
        pixel: of the spectra of pixels, as many as there are latent channels a pixel, at least one.
    """

    cell: PixelPCA
    pixel: PixelPCA

    @classmethod
    def fit(cls, spectra: NDArray[Any], middles: NDArray[Any], coder: Coder) -> Bases:
        """From (cell, C) mean spectra, and (cell, C) spectra of one pixel of each cell, NaN = invalid."""
        cell = PixelPCA.fit(_blocks(spectra), coder.model.embed_dim)
        return cls(cell, PixelPCA.fit(_blocks(middles), pixel_components(coder)))

    def features(self, spectra: NDArray[Any]) -> Float32:
        """(..., C) mean spectra of cells -> (..., components)."""
        return np.asarray((spectra - self.cell.mean) @ self.cell.components.T, np.float32)


def pixel_components(coder: Coder) -> int:
    """As many as there are latent channels a pixel, rounded, but at least one."""
    n: int = coder.model.embed_dim
    return max(1, round(n / coder.scale**2))


def _blocks(rows: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """PCA makes float64 of what it is given."""
    return (rows[i : i + 10_000] for i in range(0, len(rows), 10_000))


@dataclass(frozen=True)
class Encoded:
    """A scene on the grid of its latents.

    Attributes:
        latents: (h, w, E), the posterior's mean, as `encode` makes it.
        spectra: (h, w, C), `mean_spectra` of z.
        middles: (h, w, C), `middle_pixels` of z.
        from_pca: (h, w, C), `mean_spectra` of what `Bases.pixel` makes of the valid samples; None without bases.
    """

    latents: Float32
    spectra: Float32
    middles: Float32
    from_pca: Float32 | None


def z_of(store: Store, scene: int) -> Read:
    """Reads (rows, columns, C) of a scene's z, NaN = invalid."""

    def read(rows: slice, columns: slice) -> Float32:
        shape = (rows.stop - rows.start, columns.stop - columns.start, store.scenes[scene].shape[2])
        z = np.empty(shape, store.dtype)
        store.read_tile(scene, rows.start, columns.start, z)
        return z.astype(np.float32, copy=False)

    return read


def encode_cells(store: Store, scene: int, coder: Coder, bases: Bases | None = None) -> Encoded:
    """Put a scene through the encoder.

    Args:
        store: the scenes.
        scene: which.
        coder: the network.
        bases: whose reconstructions are wanted, too.

    Raises:
        InputError: the scene's z is cut off, or the network gives what is not finite.
    """
    ny, nx, nc = store.scenes[scene].shape
    s = coder.scale
    grid = (-(-ny // s), -(-nx // s))
    latents = np.empty((*grid, coder.model.embed_dim), np.float32)
    spectra, middles = np.empty((2, *grid, nc), np.float32)
    from_pca = np.empty((*grid, nc), np.float32) if bases else None
    for piece in coder.encode(z_of(store, scene), (ny, nx)):
        cells = (piece.rows, piece.columns)
        latents[cells] = piece.result
        for row, block in zip(range(piece.rows.start, piece.rows.stop), _rows(piece.seen, s), strict=True):
            spectra[row, piece.columns] = mean_spectra(block, s)[0]
            middles[row, piece.columns] = middle_pixels(block, s)
            if bases and from_pca is not None:
                seen_again = bases.pixel.reconstruct(block, len(bases.pixel.components))
                from_pca[row, piece.columns] = mean_spectra(np.where(np.isfinite(block), seen_again, np.nan), s)[0]
    return Encoded(latents, spectra, middles, from_pca)


def decode_cells(store: Store, scene: int, coder: Coder, latents: Float32) -> Float32:
    """(h, w, E) latents -> (h, w, C): `mean_spectra` of the z decoded from them, of the scene's valid samples.

    As in `decode`, z is cut off at the clip of the normalisation.
    """
    ny, nx, nc = store.scenes[scene].shape
    s, clip = coder.scale, coder.normalization.clip
    spectra = np.empty((*latents.shape[:2], nc), np.float32)
    read = z_of(store, scene)
    for piece in coder.decode(lambda rows, columns: latents[rows, columns], (ny, nx)):
        columns = slice(piece.columns.start // s, -(-piece.columns.stop // s))
        for i, block in enumerate(_rows(piece.result, s)):
            top = piece.rows.start + i * s
            valid = np.isfinite(read(slice(top, top + len(block)), piece.columns))
            z = np.where(valid, np.clip(block, -clip, clip), np.nan)
            spectra[top // s, columns] = mean_spectra(z, s)[0]
    return spectra


def mean_spectra(z: NDArray[Any], s: int) -> Float32:
    """(y, x, C), NaN = invalid -> (h, w, C): means over the valid samples of each cell; 0 for a channel without any.

    0 is the mean of the training scenes. Sums are in float64.
    """
    columns = range(0, z.shape[1], s)
    means = np.empty((-(-z.shape[0] // s), len(columns), z.shape[2]), np.float32)
    for mean, block in zip(means, _rows(z, s), strict=True):
        valid = np.isfinite(block)
        total = np.where(valid, block, 0).sum(axis=0, dtype=np.float64)
        n_valid = np.add.reduceat(valid.sum(axis=0), columns, axis=0)
        mean[...] = np.add.reduceat(total, columns, axis=0) / np.maximum(n_valid, 1)
    return means


def middle_pixels(z: NDArray[Any], s: int) -> NDArray[Any]:
    """(up to s, x, C) pixels of a row of cells, NaN = invalid -> (w, C): of each cell that nearest to its middle which
    has a valid sample; NaN where none has."""
    ny, nx = z.shape[:2]
    w = -(-nx // s)
    y, x = np.ogrid[:ny, :nx]
    away = np.where(np.isfinite(z).any(axis=-1), (y - s // 2) ** 2 + (x % s - s // 2) ** 2, np.inf)
    away = np.pad(away, ((0, 0), (0, w * s - nx)), constant_values=np.inf).reshape(ny, w, s)
    row, column = np.divmod(away.swapaxes(0, 1).reshape(w, ny * s).argmin(axis=1), s)
    return np.asarray(z[row, np.arange(w) * s + column])


def _rows(z: NDArray[Any], s: int) -> Iterator[NDArray[Any]]:
    """The pixels of one row of cells after the other."""
    return (z[top : top + s] for top in range(0, len(z), s))
