"""Judging the network on fixed tiles with fixed noise, and drawing what it makes of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from spectralvae.data import sampling
from spectralvae.data.loader import TargetReader, grid_crops, read_crops
from spectralvae.data.pca import reference_errors
from spectralvae.data.sampling import Crop, CropSampler
from spectralvae.data.store import Store
from spectralvae.errors import RunError
from spectralvae.model import DiagonalGaussianDistribution
from spectralvae.plotting.reconstructions import N_TILES, draw_reconstructions
from spectralvae.training.engine import Engine
from spectralvae.training.objective import Sums, add, means, to_host
from spectralvae.weights.provenance import LatentStatistics

ACTIVE_VARIANCE = 0.01  # a latent channel whose posterior mean varies less says nothing (Burda et al. 2016)
REFERENCE_TILES = 64  # that PCA is fitted on: enough pixels for 1028 channels, and a matter of seconds


class Validated(NamedTuple):
    """What a validation found.

    Attributes:
        metrics: those of the objective, named val_*: pixel_mse per valid sample, the others per
            tile, a head's per valid target.
        description: errors by channel, and what the latents are like, as JSON values (see ``_describe``).
        latents: what to scale latents with.
    """

    metrics: dict[str, float]
    description: dict[str, Any]
    latents: LatentStatistics


class Validation:
    """The fixed validation tiles of a run. Nothing here touches a global random state.

    Args:
        store: the data.
        sampler: the training tiles: its scenes serve for PCA, its first tiles for pictures without validation.
        batch_size: tiles at a time.
        max_invalid_fraction: tiles with more invalid samples are left out.
        at_most: how many tiles.
        noise_shape: (E, h, w).
        targets: what the targets of supervised latents are read with; None without supervision.
        keep_on: where the tiles stay once they are read; None reads them each time.

    Attributes:
        crops: the tiles; empty if the store keeps nothing for validation.
        reference_crops: the training tiles that PCA is fitted on.
    """

    def __init__(
        self,
        store: Store,
        sampler: CropSampler,
        *,
        batch_size: int,
        max_invalid_fraction: float,
        at_most: int,
        noise_shape: tuple[int, int, int],
        targets: TargetReader | None = None,
        keep_on: torch.device | None = None,
    ) -> None:
        self.store, self.sampler, self.targets = store, sampler, targets
        self.tile_size, self.batch_size, self.noise_shape = sampler.tile_size, batch_size, noise_shape
        self._keep_on = keep_on
        self._kept: dict[int, Tensor] = {}
        on_grid = partial(grid_crops, store, tile_size=self.tile_size, max_invalid_fraction=max_invalid_fraction)
        self.crops = on_grid(store.indices("val"), at_most=at_most)
        some = [sampler.scenes[i] for i in sampling.evenly(len(sampler.scenes), REFERENCE_TILES)]
        self.reference_crops = on_grid(some, at_most=REFERENCE_TILES)

    def _read(self, crops: list[Crop]) -> Tensor:
        return read_crops(self.store, crops, self.tile_size)

    def _batches(self, engine: Engine) -> Iterator[tuple[list[Crop], Tensor, Tensor]]:
        """(crops, tiles (B, y, x, C), noise (B, E, h, w)): this process's share."""
        starts = range(0, len(self.crops), self.batch_size)
        for start in starts[engine.ranks.rank :: engine.ranks.world_size]:
            crops = self.crops[start : start + self.batch_size]
            noise = [
                sampling.noise(self.sampler.seed, sampling.VALIDATION_NOISE, start + j, self.noise_shape)
                for j in range(len(crops))
            ]
            tiles = self._kept[start] if start in self._kept else self._read(crops)
            if self._keep_on is not None:
                self._kept[start] = tiles = tiles.to(self._keep_on)
            yield crops, tiles, torch.from_numpy(np.stack(noise))

    def run(self, engine: Engine) -> Validated:
        """Judge the network on all tiles; all processes share the work, and each gets the result.

        Raises:
            RunError: a metric is not finite.
        """
        with engine.ranks.together():
            sums, channels, latents = self._sums(engine)
        names = engine.ranks.broadcast(list(sums))  # the other processes may have no batch
        sums = {name: sums.get(name, (0.0, 0.0)) for name in names}
        totals = engine.ranks.add({**sums, "channels": channels, "latents": latents})
        channels, latents = totals.pop("channels"), totals.pop("latents")
        metrics = {f"val_{name}": value for name, value in means(totals).items()}
        return Validated(metrics, self._describe(channels, latents), _statistics(latents, len(self.crops)))

    def _sums(self, engine: Engine) -> tuple[Sums, NDArray[np.float64], NDArray[np.float64]]:
        """Of this process's share: of the metrics, (3, C) by channel, (6, E) by latent channel."""
        sums: Sums = {}
        channels, latents = np.zeros((3, self.store.normalization.n_channels)), np.zeros((6, self.noise_shape[0]))
        for crops, tiles, noise in self._batches(engine):
            targets = self.targets.read_all(crops, self.tile_size).to(engine.device) if self.targets else None
            _, more, found = engine.judge(tiles, noise, targets)
            sums = add(sums, to_host(more))
            channels += _channel_sums(found.x, found.x_hat, found.mask).cpu().numpy()
            latents += _latent_sums(found.posterior, found.mask).cpu().numpy()
            if not np.isfinite(list(sums.values())).all():
                places = ", ".join(f"{self.store.scenes[c.scene].id} at ({c.y}, {c.x})" for c in crops)
                numbers = ", ".join(f"{name} {value:g}" for name, value in means(sums).items())
                raise RunError(f"validation is not finite ({numbers}) on the tiles {places}", path=self.store.path)
        return sums, channels, latents

    def _describe(self, channels: NDArray[np.float64], latents: NDArray[np.float64]) -> dict[str, Any]:
        """From sums to JSON values.

        By channel: ``mse`` of the reconstruction and ``variance`` (the error of predicting 0, which is the mean of the
        training data); None where nothing is valid. By latent channel, over tiles and those positions that see
        anything (``_latent_sums``): mean and std of the posterior mean, mean of the posterior's std, and the KL term
        in bits; ``active_units`` of them vary.
        """
        count = channels[2]
        squares = np.divide(channels[:2], count, out=np.full((2, len(count)), np.nan), where=count > 0)
        mse, variance = ([float(v) if v == v else None for v in row] for row in squares)
        wavelength = self.store.normalization.wavelength
        assert wavelength is not None, "a store always has wavelengths"
        mean, spread, _, posterior_std, kl = _moments(latents)
        described = {"bits": kl / math.log(2.0), "posterior_std": posterior_std, "mean": mean, "std": np.sqrt(spread)}
        return {
            "wavelength": wavelength.tolist(),
            "mse": mse,
            "variance": variance,
            "latents": {key: values.tolist() for key, values in described.items()},
            "active_units": int((spread > ACTIVE_VARIANCE).sum()),
        }

    def reference_errors(self) -> dict[str, float]:
        """Errors of predicting the mean, and of PCA per pixel fitted on a grid of tiles over the training scenes."""
        training = (self._read([crop])[0].numpy() for crop in self.reference_crops)
        validation = (self._read([crop])[0].numpy() for crop in self.crops)
        return reference_errors(training, validation)

    def draw(self, engine: Engine, step: int) -> Figure:
        """Reconstructions, from the posterior's mode, of a few of the tiles."""
        crops = self.crops or [self.sampler.crop(i) for i in range(N_TILES)]
        crops = [crops[i] for i in sampling.evenly(len(crops), N_TILES)]
        tiles = self._read(crops)
        x_hat = engine.judge(tiles, torch.zeros(len(tiles), *self.noise_shape)).reconstruction.x_hat
        return draw_reconstructions(
            tiles.float().numpy(),
            x_hat.float().permute(0, 2, 3, 1).cpu().numpy(),
            [f"{self.store.scenes[c.scene].id}\nfrom y = {c.y}, x = {c.x}" for c in crops],
            self.store.normalization,
            f"{'validation' if self.crops else 'training'} tiles, step {step}",
        )


def _channel_sums(x: Tensor, x_hat: Tensor, mask: Tensor) -> Tensor:
    """(B, C, h, w) each -> (3, C) float64: squared differences, squares of x, and valid samples, by channel."""
    axes = (0, 2, 3)
    squares = (x - x_hat).masked_fill(~mask, 0.0).square()
    return torch.stack([squares.sum(axes).double(), x.square().sum(axes).double(), mask.sum(axes).double()])


def _latent_sums(posterior: DiagonalGaussianDistribution, mask: Tensor) -> Tensor:
    """(6, E) float64: sums of mean, mean^2, variance, std and KL term (nats) of the posterior, and their number.

    Over tiles and those positions that have a valid sample in the pixels beneath them: what the encoder makes of
    nothing but masked pixels says nothing about scenes.

    Args:
        posterior: (B, E, h, w).
        mask: (B, C, y, x), True = valid; h and w divide y and x.
    """
    n, _, height, width = posterior.mean.shape
    scale = mask.shape[2] // height
    seen = mask.any(1).reshape(n, 1, height, scale, width, scale).any(5).any(3)  # (B, 1, h, w)
    mean, std, var = posterior.mean.double(), posterior.std.double(), posterior.var.double()
    kl = 0.5 * (mean**2 + var - 1.0 - posterior.logvar.double())
    quantities = (mean, mean**2, var, std, kl, torch.ones_like(mean))
    return torch.stack([quantity.masked_fill(~seen, 0.0).sum((0, 2, 3)) for quantity in quantities])


def _moments(latents: NDArray[np.float64]) -> NDArray[np.float64]:
    """(6, E) ``_latent_sums`` -> (5, E): mean and variance of the posterior mean; means of variance, std, KL term."""
    moments: NDArray[np.float64] = latents[:5] / latents[5]
    moments[1] = np.maximum(moments[1] - moments[0] ** 2, 0.0)
    return moments


def _statistics(latents: NDArray[np.float64], n_tiles: int) -> LatentStatistics:
    """From (6, E) ``_latent_sums`` of all tiles.

    A sample's variance is that of the posterior's means and the mean of its variances: the law of total variance.
    """
    mean, between, within, *_ = _moments(latents)
    return LatentStatistics(mean, np.sqrt(between + within), n_tiles, int(latents[5, 0]))
