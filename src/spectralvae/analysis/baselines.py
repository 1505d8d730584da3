"""What a reconstruction must be better than: predicting the mean, and PCA of each pixel's spectrum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from spectralvae.data.pca import PixelPCA


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
