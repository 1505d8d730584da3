"""Networks and baselines over all validation tiles of a store, one batch of them in memory at a time.

Reconstructions of z are clipped to the range of the normalisation, as `decode` clips them: what users get is judged.

Shapes: C channels, E latent channels; t pixels along a tile, s along a latent cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectralvae.analysis.baselines import Baselines
from spectralvae.analysis.evaluation import SceneView, TileView
from spectralvae.analysis.metrics import Errors, Latents, Observed, Radiance, Truth
from spectralvae.data import sampling
from spectralvae.data.loader import grid_crops, read_crops
from spectralvae.data.sampling import Crop
from spectralvae.data.store import Store
from spectralvae.errors import RunError
from spectralvae.model import AutoencoderKL, DiagonalGaussianDistribution
from spectralvae.plotting.composite import thinning
from spectralvae.runtime.placement import place
from spectralvae.training.objective import Objective
from spectralvae.weights.artifact import Artifact
from spectralvae.weights.normalization import EPSILON

ALL = 2**62  # more than there are tiles
BLOCK_SAMPLES = 2**20  # that are summed up at a time: more would leave the processor's cache between two operations

Advance = Callable[[int], None]  # called with the number of tiles that are done
Mask = NDArray[np.bool_]


class Tiles:
    """The tiles that lie on a grid over a store's validation scenes and are valid enough.

    The last tile along an axis is moved back to the edge, so that tiles overlap. A pixel counts in the first tile that
    it is in.

    Args:
        store: the data.
        tile_size: t.
        max_invalid_fraction: tiles with a larger share of invalid samples are left out.

    Attributes:
        scenes: indices of the validation scenes.
        crops: the tiles, scene by scene.
        n_left_out: how many are not valid enough.

    Raises:
        ConfigError: a scene is smaller than a tile, or no tile is valid enough.
        InputError: a file of a scene is lost or damaged.
    """

    def __init__(self, store: Store, tile_size: int, max_invalid_fraction: float) -> None:
        self.store, self.tile_size = store, tile_size
        self.scenes = store.indices("val")
        self.crops = grid_crops(
            store, self.scenes, tile_size=tile_size, max_invalid_fraction=max_invalid_fraction, at_most=ALL
        )
        self.n_left_out = sum(map(self._n_places, self.scenes)) - len(self.crops)

    def _n_places(self, scene: int) -> int:
        record = self.store.scenes[scene]
        ny, nx, _ = record.shape
        piece = record.stack or ny
        return ny // piece * len(sampling.grid(piece, self.tile_size)) * len(sampling.grid(nx, self.tile_size))

    def of(self, scene: int) -> list[Crop]:
        """Those of one scene."""
        return [crop for crop in self.crops if crop.scene == scene]

    def counting(self, crops: Sequence[Crop]) -> Iterator[Mask]:
        """(t, t) for each tile: which of its pixels are in none before it."""
        scene, seen = None, np.zeros((0, 0), bool)
        for crop in crops:
            if crop.scene != scene:
                scene, seen = crop.scene, np.zeros(self.store.scenes[crop.scene].shape[:2], bool)
            here = seen[crop.y : crop.y + self.tile_size, crop.x : crop.x + self.tile_size]
            yield ~here
            here[...] = True


@dataclass(frozen=True)
class Batch:
    """Tiles as they are judged.

    Attributes:
        crops: where they are.
        counts: (B, t, t), which of their pixels count.
        x: (B, C, t, t) float32 z on the device, NaN = invalid.
    """

    crops: Sequence[Crop]
    counts: Mask
    x: Tensor


@dataclass(frozen=True)
class NetworkErrors:
    """What a network makes of all tiles.

    Attributes:
        errors: of its reconstructions.
        latents: of those cells that hold a valid sample of a pixel that counts.
        tile_mse: of z over all valid samples of each tile.
    """

    errors: Errors
    latents: Latents
    tile_mse: NDArray[np.float64]


class Judge:
    """Puts tiles through networks and baselines, and sums up how far they are off.

    Args:
        tiles: which.
        device: where to compute.
        batch_size: tiles at a time.

    Attributes:
        radiance: how z becomes radiance, in sums.
    """

    def __init__(self, tiles: Tiles, device: torch.device, batch_size: int) -> None:
        self.tiles, self.device, self.batch_size = tiles, device, batch_size
        self._layout = torch.contiguous_format  # of the network that is judged
        normalization = tiles.store.normalization
        self._n_channels, self._clip = normalization.n_channels, normalization.clip
        self._row = {scene: i for i, scene in enumerate(tiles.scenes)}
        self.radiance = Radiance.of(
            normalization.mean,
            normalization.std + EPSILON,
            logarithmic=normalization.transform == "log_zscore",
            device=device,
        )

    def baselines(self, baselines: Baselines, advance: Advance) -> tuple[Truth, dict[str, Errors]]:
        """What there is to reconstruct, and how well each of the baselines does."""
        truth = Truth.empty(self._n_channels, len(self._row))
        errors = {name: Errors.empty(self._n_channels, len(self._row)) for name in baselines.names}
        for batch in self._batches(self.tiles.crops):
            scenes, seen, off = [], [], []  # sums stay on the device until the batch is done
            for crop, counts, x in zip(batch.crops, batch.counts, batch.x, strict=True):
                for (z,) in self._blocks(counts, x):
                    observed = Observed(z, self.radiance)
                    scenes.append(self._row[crop.scene])
                    seen.append(observed.sums())
                    them = baselines.reconstruct(observed.z)
                    off.append(torch.stack([observed.errors(self._clipped(z_hat)) for _, z_hat in them]))
            fetched = (torch.stack(sums).cpu().numpy() for sums in (seen, off))
            for scene, of_truth, of_baselines in zip(scenes, *fetched, strict=True):
                truth.add(scene, of_truth)
                for name, sums in zip(errors, of_baselines, strict=True):
                    errors[name].add(scene, sums)
            advance(len(batch.crops))
        return truth, errors

    def network(self, artifact: Artifact, advance: Advance) -> NetworkErrors:
        """How well a network does.

        Raises:
            RunError: it gives values that are not finite.
        """
        model = self._on_device(artifact)
        errors = Errors.empty(self._n_channels, len(self._row))
        latents = Latents.empty(model.embed_dim)
        tile_mse = []
        for batch in self._batches(self.tiles.crops):
            x_hat, posterior = self._reconstruct(model, artifact, batch)
            rows = []  # they stay on the device until the batch is done
            owners = []  # of each row: the tile, and whether it is of pixels that count, or of all in the tile
            for i, (counts, x, y) in enumerate(zip(batch.counts, batch.x, x_hat, strict=True)):
                for of_counting in (True,) if counts.all() else (True, False):
                    for z, z_hat in self._blocks(counts if of_counting else np.ones_like(counts), x, y):
                        rows.append(Observed(z, self.radiance).errors(z_hat))
                        owners.append((i, of_counting))
            whole = np.zeros((len(batch.crops), 2))  # squared errors and valid samples of each tile
            for (i, of_counting), row in zip(owners, torch.stack(rows).cpu().numpy(), strict=True):
                if of_counting:
                    errors.add(self._row[batch.crops[i].scene], row)
                if not of_counting or batch.counts[i].all():
                    whole[i] += row[: self._n_channels].sum(), row[-1]
            tile_mse += list(whole[:, 0] / whole[:, 1])
            counted = torch.from_numpy(batch.counts).to(self.device)[:, None] & ~batch.x.isnan()
            latents.add(posterior.mean, posterior.logvar, _cells(counted, model.scale))
            advance(len(batch.crops))
        return NetworkErrors(errors, latents, np.array(tile_mse))

    def _batches(self, crops: Sequence[Crop]) -> Iterator[Batch]:
        counting = self.tiles.counting(crops)
        for start in range(0, len(crops), self.batch_size):
            some = crops[start : start + self.batch_size]
            yield Batch(some, np.stack([next(counting) for _ in some]), self._read(some))

    def _read(self, crops: Sequence[Crop]) -> Tensor:
        """(B, C, t, t) float32 on the device, NaN = invalid, in the network's memory layout."""
        tiles = read_crops(self.tiles.store, crops, self.tiles.tile_size)
        x = tiles.to(self.device).permute(0, 3, 1, 2)
        return x.to(torch.float32, memory_format=self._layout)

    def _blocks(self, counts: Mask, *images: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """(C, t, t) each -> (C, P) each, some pixels that count at a time."""
        flat = [image.flatten(1) for image in images]
        if not counts.all():
            places = torch.from_numpy(np.flatnonzero(counts)).to(self.device)
            flat = [image[:, places] for image in flat]
        size = max(1, BLOCK_SAMPLES // self._n_channels)
        for start in range(0, flat[0].shape[1], size):
            yield tuple(image[:, start : start + size] for image in flat)

    def _on_device(self, artifact: Artifact) -> AutoencoderKL:
        self._layout = place(artifact.model, self.device)
        return artifact.model

    def _clipped(self, z_hat: Tensor) -> Tensor:
        return z_hat.clamp(-self._clip, self._clip)

    def _reconstruct(
        self, model: AutoencoderKL, artifact: Artifact, batch: Batch
    ) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """(B, C, t, t) from the posterior's mode, clipped, and the posterior."""
        cells = batch.x.shape[2] // model.scale
        mode = batch.x.new_zeros(len(batch.x), model.embed_dim, cells, cells)
        found = Objective(model).reconstruct(batch.x, ~batch.x.isnan(), mode)
        if not bool(torch.isfinite(found.x_hat).all()):
            places = ", ".join(f"{self.tiles.store.scenes[c.scene].id} at ({c.y}, {c.x})" for c in batch.crops)
            raise RunError(f"its reconstruction is not finite for the tiles {places}", path=artifact.path)
        return self._clipped(found.x_hat), found.posterior

    # --- what is looked at ----------------------------------------------------------------------

    def view(self, artifact: Artifact, scene: int, *, in_full: bool) -> SceneView:
        """A scene as a network reconstructs it; ``in_full`` with spectra and latents."""
        model, store = self._on_device(artifact), self.tiles.store
        ny, nx, nc = store.scenes[scene].shape
        steps, s = thinning(ny, nx), model.scale
        rmse = _Canvas(np.arange(ny), np.arange(nx), 1)
        spectra = _Canvas(np.arange(0, ny, steps[0]), np.arange(0, nx, steps[1]), 2 * nc)
        y, x = (np.minimum(np.arange(s // 2, size + s // 2, s), size - 1) for size in (ny, nx))  # centres of cells
        latents = _Canvas(y, x, model.embed_dim, unit=s)
        for batch in self._batches(self.tiles.of(scene)):
            x_hat, posterior = self._reconstruct(model, artifact, batch)
            rmse.put(batch, (x_hat - batch.x).square().nanmean(1, keepdim=True).sqrt())
            if in_full:
                spectra.put(batch, torch.cat([batch.x, x_hat], 1))
                latents.put(batch, posterior.mean)
        name, errors = store.scenes[scene].id, rmse.values[..., 0]
        if not in_full:
            return SceneView(name, errors, None, None, None)
        z, z_hat = spectra.values[..., :nc], spectra.values[..., nc:]
        return SceneView(name, errors, z, z_hat, latents.values.transpose(2, 0, 1))

    def worst(self, artifact: Artifact, tile_mse: NDArray[np.float64], n: int) -> list[TileView]:
        """The tiles with the largest errors, the worst first, none of which overlaps another.

        Args:
            artifact: the network.
            tile_mse: its `NetworkErrors.tile_mse`.
            n: how many tiles at most.
        """
        model, t, chosen = self._on_device(artifact), self.tiles.tile_size, list[int]()
        for i in np.argsort(-tile_mse, kind="stable"):
            crop = self.tiles.crops[i]
            others = (self.tiles.crops[j] for j in chosen)
            if not any(o.scene == crop.scene and max(abs(o.y - crop.y), abs(o.x - crop.x)) < t for o in others):
                chosen.append(int(i))
            if len(chosen) == n:
                break
        views = []
        for i in chosen:
            (batch,) = self._batches([self.tiles.crops[i]])
            x_hat, _ = self._reconstruct(model, artifact, batch)
            z, z_hat = (np.ascontiguousarray(a[0].permute(1, 2, 0).cpu().numpy()) for a in (batch.x, x_hat))
            crop = self.tiles.crops[i]
            name = self.tiles.store.scenes[crop.scene].id
            views.append(TileView(name, crop.y, crop.x, float(tile_mse[i]), z, z_hat))
        return views


class _Canvas:
    """An image of a scene, put together from tiles; NaN where no tile counts.

    Args:
        y, x: pixels of the scene, rising, that rows and columns of the image stand for.
        depth: values of each.
        unit: pixels of the scene along each axis for one of what is put here.
    """

    def __init__(self, y: NDArray[np.int64], x: NDArray[np.int64], depth: int, unit: int = 1) -> None:
        self._y, self._x, self._unit = y, x, unit
        self.values = np.full((len(y), len(x), depth), np.nan, np.float32)

    def put(self, batch: Batch, images: Tensor) -> None:
        """Fill in those pixels of (B, depth, t / unit, t / unit) that count."""
        for crop, counts, image in zip(batch.crops, batch.counts, images.permute(0, 2, 3, 1), strict=True):
            rows, columns = (
                slice(*np.searchsorted(axis, [start, start + len(counts)]))
                for axis, start in ((self._y, crop.y), (self._x, crop.x))
            )
            y, x = self._y[rows] - crop.y, self._x[columns] - crop.x
            here = counts[np.ix_(y, x)]
            wanted = image.cpu().numpy()[np.ix_(y // self._unit, x // self._unit)]
            self.values[rows, columns][here] = wanted[here]


def _cells(pixels: Tensor, scale: int) -> Tensor:
    """(B, C, t, t) bool -> (B, 1, t / s, t / s): whether any sample of a cell is True."""
    n, _, t, _ = pixels.shape
    return pixels.any(1).reshape(n, 1, t // scale, scale, t // scale, scale).any(5).any(3)
