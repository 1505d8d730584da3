"""What a reconstruction must be better than: predicting the mean, and PCA of each pixel's spectrum."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectralvae.errors import InputError


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
            raise InputError(f"PCA: too few pixels ({n}) to fit {n_components} components on")
        mean = np.asarray(total / n)
        covariance = products / n - np.outer(mean, mean)
        return cls(mean, np.linalg.eigh(covariance)[1].T[::-1][:n_components])

    def reconstruct(self, tile: NDArray[Any], k: int) -> NDArray[np.float64]:
        """(..., channel) -> the same from k components; an invalid sample counts as in `fit`."""
        deviation = np.nan_to_num(tile.astype(np.float64)) - self.mean
        basis = self.components[:k]
        return np.asarray(deviation @ basis.T @ basis + self.mean)


class Baselines:
    """The mean and PCA as reconstructions of tiles, in float32 on a device.

    Args:
        pca: fitted with as many components as the last of ``components``.
        components: numbers of them, in rising order.
        device: where to compute.

    Attributes:
        names: "mean", which predicts z = 0, the mean of the training scenes; then "pca_1" and so on.
    """

    def __init__(self, pca: PixelPCA, components: Sequence[int], device: torch.device) -> None:
        self.names = ["mean", *(f"pca_{k}" for k in components)]
        self._components = components
        self._mean = torch.from_numpy(pca.mean[:, None]).to(device, torch.float32)
        self._basis = torch.from_numpy(pca.components.copy()).to(device, torch.float32)

    def reconstruct(self, z: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name and reconstruction, one after the other; each is overwritten when the next one is asked for.

        Args:
            z: (channel, pixel) float32, 0 where invalid, as `PixelPCA` takes it.
        """
        z_hat = torch.zeros_like(z)
        yield self.names[0], z_hat
        z_hat += self._mean
        scores = self._basis @ (z - self._mean)
        for name, (first, last) in zip(self.names[1:], pairwise([0, *self._components]), strict=True):
            z_hat += self._basis[first:last].T @ scores[first:last]
            yield name, z_hat


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
        raise InputError("baselines: the validation tiles hold no valid sample to judge on")
    return {name: total / n_valid for name, total in squares.items()}
