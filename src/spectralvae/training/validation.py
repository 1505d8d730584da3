"""Judging the network on fixed tiles with fixed noise, and drawing what it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from spectralvae.analysis.baselines import reference_errors
from spectralvae.data import sampling
from spectralvae.data.loader import grid_crops, read_crops
from spectralvae.data.sampling import Crop, CropSampler
from spectralvae.data.store import Store
from spectralvae.model import AutoencoderKL
from spectralvae.training.figures import N_TILES, draw_reconstructions

METRICS = ("loss", "nll_loss", "kl_loss", "pixel_mse")
REFERENCE_TILES = 64  # that PCA is fitted on: enough pixels for 1028 channels, and a matter of seconds
REFERENCE_LABELS = {"mean": "predicting the mean", "pca_1": "PCA, 1 component", "pca_2": "PCA, 2 components"}

ToDevice = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Validation:
    """The fixed validation tiles of a run. Nothing here touches a global random state.

    Args:
        store: the data.
        sampler: the training tiles: its scenes serve for PCA, its first tiles for pictures without validation.
        tile_size: pixels along y and x.
        batch_size: tiles at a time.
        max_invalid_fraction: tiles with more invalid samples are left out.
        at_most: how many tiles.
        noise_shape: (E, h, w).

    Attributes:
        crops: the tiles; empty if the store keeps nothing for validation.
        reference_crops: the training tiles that PCA is fitted on.
    """

    def __init__(
        self,
        store: Store,
        sampler: CropSampler,
        *,
        tile_size: int,
        batch_size: int,
        max_invalid_fraction: float,
        at_most: int,
        noise_shape: tuple[int, int, int],
    ) -> None:
        self.store, self.sampler = store, sampler
        self.tile_size, self.batch_size, self.noise_shape = tile_size, batch_size, noise_shape
        on_grid = partial(grid_crops, store, tile_size=tile_size, max_invalid_fraction=max_invalid_fraction)
        self.crops = on_grid(store.indices("val"), at_most=at_most)
        some = [sampler.scenes[i] for i in sampling.evenly(len(sampler.scenes), REFERENCE_TILES)]
        self.reference_crops = on_grid(some, at_most=REFERENCE_TILES)

    def _read(self, crops: list[Crop]) -> Tensor:
        return read_crops(self.store, crops, self.tile_size)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(tiles (B, y, x, C), noise (B, E, h, w))"""
        for start in range(0, len(self.crops), self.batch_size):
            crops = self.crops[start : start + self.batch_size]
            noise = [
                sampling.noise(self.sampler.seed, sampling.VALIDATION_NOISE, start + j, self.noise_shape)
                for j in range(len(crops))
            ]
            yield self._read(crops), torch.from_numpy(np.stack(noise))

    @torch.no_grad()
    def run(self, model: AutoencoderKL, to_device: ToDevice, autocast: torch.autocast) -> dict[str, float]:
        """The metrics over all tiles: pixel_mse per valid sample, the others per tile; named val_*."""
        model.eval()
        totals = dict.fromkeys(METRICS, 0.0)
        n_valid = 0
        for tiles, noise in self._batches():
            with autocast:
                _, metrics = model.get_loss(*to_device(tiles, noise))
            n = int(metrics["n_valid"])
            n_valid += n
            for key in METRICS:
                totals[key] += float(metrics[key]) * (n if key == "pixel_mse" else len(tiles))
        model.train()
        return {
            f"val_{key}": total / (n_valid if key == "pixel_mse" else len(self.crops)) for key, total in totals.items()
        }

    def reference_errors(self) -> dict[str, float]:
        """Errors of predicting the mean, and of PCA per pixel fitted on a grid of tiles over the training scenes."""
        training = (self._read([crop])[0].numpy() for crop in self.reference_crops)
        validation = (self._read([crop])[0].numpy() for crop in self.crops)
        return reference_errors(training, validation)

    @torch.no_grad()
    def draw(self, model: AutoencoderKL, to_device: ToDevice, autocast: torch.autocast, step: int) -> Figure:
        """Reconstructions, from the posterior's mode, of a few of the tiles."""
        crops = self.crops or [self.sampler.crop(i) for i in range(N_TILES)]
        crops = [crops[i] for i in sampling.evenly(len(crops), N_TILES)]
        tiles = self._read(crops)
        x, mask, _ = to_device(tiles, torch.empty(0))
        model.eval()
        with autocast:
            x_hat = model.decode(model.encode(x.masked_fill(~mask, 0.0)).mode())
        model.train()
        return draw_reconstructions(
            tiles.float().numpy(),
            x_hat.float().permute(0, 2, 3, 1).cpu().numpy(),
            [f"{self.store.scenes[c.scene].id}\nfrom y = {c.y}, x = {c.x}" for c in crops],
            self.store.normalization,
            f"{'validation' if self.crops else 'training'} tiles, step {step}",
        )
