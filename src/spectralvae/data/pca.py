"""Principal components of pixels' spectra, the baseline of every reconstruction. Plain numpy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectralvae.errors import InputError

REFERENCE_LABELS = {"mean": "predicting the mean", "pca_1": "PCA, 1 component", "pca_2": "PCA, 2 components"}


@dataclass(frozen=True)
class PixelPCA:
    """Principal components of spectra.

    Attributes:
        mean: (channel).
        components: (k, channel), orthonormal.
    """

    mean: NDArray[np.float64]
    components: NDArray[np.float64]

    @classmethod
    def fit(cls, tiles: Iterable[NDArray[Any]], n_components: int) -> PixelPCA:
        """Fit on the pixels that have a valid sample; an invalid one counts as z = 0, the training scenes' mean.

        Args:
            tiles: (..., channel) z each, NaN = invalid.
            n_components: k.

        Raises:
            InputError: there are too few pixels.
        """
        n, total, products = 0, np.zeros(1), np.zeros((1, 1))  # summed tile by tile, in float64
        for tile in tiles:
            pixels = tile.reshape(-1, tile.shape[-1]).astype(np.float64)
            pixels = np.nan_to_num(pixels[np.isfinite(pixels).any(axis=1)])
            n += len(pixels)
            total = total + pixels.sum(axis=0)
            products = products + pixels.T @ pixels
        if n <= n_components:
            raise InputError(f"too few pixels ({n}) to fit a PCA of {n_components} components")
        mean = np.asarray(total / n)
        covariance = products / n - np.outer(mean, mean)
        return cls(mean, np.linalg.eigh(covariance)[1].T[::-1][:n_components])

    def reconstruct(self, tile: NDArray[Any], k: int) -> NDArray[np.float64]:
        """(..., channel) -> the same from k components; an invalid sample counts as in `fit`."""
        deviation = np.nan_to_num(tile.astype(np.float64)) - self.mean
        basis = self.components[:k]
        return np.asarray(deviation @ basis.T @ basis + self.mean)


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

    Raises:
        InputError: there are too few complete training pixels, or no valid validation sample.
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
    if not n_valid:
        raise InputError("these tiles hold no valid sample to evaluate the baselines on")
    return {name: total / n_valid for name, total in squares.items()}
