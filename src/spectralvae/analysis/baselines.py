"""What a reconstruction must be better than: predicting the mean, and PCA of each pixel's spectrum."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectralvae.errors import InputError


@dataclass(frozen=True)
class PixelPCA:
    """Principal components of spectra.

    Attributes:
        mean: (channel); NaN for channels that no training pixel has.
        components: (k, channel), orthonormal over the other channels, 0 there.
    """

    mean: NDArray[np.float64]
    components: NDArray[np.float64]

    @classmethod
    def fit(cls, tiles: Iterable[NDArray[Any]], n_components: int) -> PixelPCA:
        """Fit on the complete pixels of tiles.

        A pixel is complete if all channels are valid that any pixel of the first tile has valid.

        Args:
            tiles: (..., channel) each, NaN = invalid.
            n_components: k.

        Raises:
            InputError: there are too few complete pixels.
        """
        sums: dict[str, Any] = {}
        for tile in tiles:
            pixels = tile.reshape(-1, tile.shape[-1]).astype(np.float64)
            if not sums:
                alive = np.flatnonzero(np.isfinite(pixels).any(axis=0))
                sums = {"n": 0, "x": np.zeros(len(alive)), "xx": np.zeros((len(alive), len(alive)))}
            complete = pixels[:, alive]
            complete = complete[np.isfinite(complete).all(axis=1)]
            sums["n"] += len(complete)
            sums["x"] += complete.sum(axis=0)
            sums["xx"] += complete.T @ complete
        if not sums or sums["n"] <= n_components:
            raise InputError(f"PCA: too few complete pixels to fit {n_components} components on")
        mean = sums["x"] / sums["n"]
        covariance = sums["xx"] / sums["n"] - np.outer(mean, mean)
        vectors = np.linalg.eigh(covariance)[1][:, ::-1][:, :n_components]
        all_means, components = np.full(pixels.shape[1], np.nan), np.zeros((vectors.shape[1], pixels.shape[1]))
        all_means[alive], components[:, alive] = mean, vectors.T
        return cls(all_means, components)

    def reconstruct(self, tile: NDArray[Any], k: int) -> NDArray[np.float64]:
        """(..., channel) -> the same from k components; an invalid sample counts as the mean."""
        mean = np.nan_to_num(self.mean)
        deviation = np.where(np.isfinite(tile), tile.astype(np.float64) - mean, 0.0)
        basis = self.components[:k]
        return np.asarray(deviation @ basis.T @ basis + mean)


def reference_errors(
    training: Iterable[NDArray[Any]], validation: Iterable[NDArray[Any]], components: tuple[int, ...] = (1, 2)
) -> dict[str, float]:
    """Mean squared error in z over the valid samples of validation tiles.

    Args:
        training: tiles (..., channel) to fit PCA on, NaN = invalid.
        validation: tiles to judge on.
        components: numbers of principal components per pixel.

    Returns:
        ``mean`` (predicting z = 0, the mean of the training set) and ``pca_k``.
    """
    pca = PixelPCA.fit(training, max(components))
    squares = dict.fromkeys(("mean", *(f"pca_{k}" for k in components)), 0.0)
    n_valid = 0
    for tile in validation:
        valid = np.isfinite(tile)
        n_valid += int(valid.sum())
        z = tile[valid].astype(np.float64)
        squares["mean"] += float((z**2).sum())
        for k in components:
            squares[f"pca_{k}"] += float(((pca.reconstruct(tile, k)[valid] - z) ** 2).sum())
    return {name: total / n_valid for name, total in squares.items()}
