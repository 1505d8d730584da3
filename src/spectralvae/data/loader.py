"""Whole batches of finished tiles, read ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from spectralvae.data import sampling
from spectralvae.data.sampling import Crop, CropSampler
from spectralvae.data.store import Store
from spectralvae.errors import ConfigError

BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """One step's samples.

    Attributes:
        step: which step it is for.
        tiles: (B, y, x, channel) in the store's dtype, NaN = invalid; permuted, it is channels_last.
        noise: (B, E, h, w) float32, the posterior's noise.
        crops: where the tiles come from.
    """

    step: int
    tiles: Tensor
    noise: Tensor
    crops: list[Crop]


def make_sampler(
    store: Store, scenes: Sequence[int], *, seed: int, tile_size: int, max_invalid_fraction: float
) -> CropSampler:
    """A sampler over some scenes of a store.

    Raises:
        ConfigError: a scene is smaller than a tile, or no tile anywhere is valid enough.
    """
    found = _admissible(store, scenes, tile_size, max_invalid_fraction)
    if not any(len(positions) for _, _, positions in found):
        raise _no_tile_left(store, scenes, tile_size, max_invalid_fraction)
    return CropSampler(seed, found)


def grid_crops(
    store: Store, scenes: Sequence[int], *, tile_size: int, max_invalid_fraction: float, at_most: int
) -> list[Crop]:
    """Fixed tiles: a grid over some scenes of a store, thinned evenly.

    Raises:
        ConfigError: a scene is smaller than a tile, or there are scenes, but no tile of theirs will do.
    """
    crops = []
    for scene, width, positions in _admissible(store, scenes, tile_size, max_invalid_fraction):
        ny, nx, _ = store.scenes[scene].shape
        admissible = set(positions.tolist())
        crops += [
            Crop(scene, y, x)
            for y in sampling.grid(ny, tile_size)
            for x in sampling.grid(nx, tile_size)
            if y * width + x in admissible
        ]
    if scenes and not crops:
        raise _no_tile_left(store, scenes, tile_size, max_invalid_fraction)
    return [crops[i] for i in sampling.evenly(len(crops), at_most)]


def _admissible(
    store: Store, scenes: Sequence[int], tile_size: int, max_invalid_fraction: float
) -> list[tuple[int, int, NDArray[np.int64]]]:
    """(scene, width of its positions, admissible positions) of each scene."""
    found = []
    for scene in scenes:
        record = store.scenes[scene]
        ny, nx, nc = record.shape
        if min(ny, nx) < tile_size:
            raise ConfigError(
                f"data.tile_size: {tile_size} is larger than {record.split} scene {record.id} ({ny} x {nx} pixels)"
            )
        positions = sampling.admissible_positions(store.n_invalid(scene), nc, tile_size, max_invalid_fraction)
        found.append((scene, nx - tile_size + 1, positions))
    return found


def _no_tile_left(store: Store, scenes: Sequence[int], tile_size: int, max_invalid_fraction: float) -> ConfigError:
    split = store.scenes[scenes[0]].split
    return ConfigError(
        f"data.max_invalid_fraction: {max_invalid_fraction} leaves no tile of {tile_size} x {tile_size} "
        f"in the {len(scenes)} {split} scenes of {store.path}"
    )


def read_crops(store: Store, crops: Sequence[Crop], tile_size: int) -> Tensor:
    """Read tiles one after the other: (B, y, x, channel) in the store's dtype, NaN = invalid."""
    tiles = np.empty((len(crops), tile_size, tile_size, store.normalization.n_channels), store.dtype)
    for crop, tile in zip(crops, tiles, strict=True):
        _read_crop(store, crop, tile)
    return torch.from_numpy(tiles)


def _read_crop(store: Store, crop: Crop, out: np.ndarray) -> None:
    if crop.flip or crop.turns:
        tile = np.empty_like(out)
        store.read_tile(crop.scene, crop.y, crop.x, tile)
        out[...] = sampling.turn(tile, crop)
    else:
        store.read_tile(crop.scene, crop.y, crop.x, out)


class TileStream(IterableDataset[Batch]):
    """Endless training batches from a given step on. It has no length.

    Args:
        store: where the tiles are.
        sampler: which tiles.
        batch_size: tiles a step.
        tile_size: pixels along y and x.
        noise_shape: (E, h, w) of the posterior.
        first_step: batch of this step comes first; samples of step s are s * batch_size and on.
        num_workers: reader threads; 0 reads when asked.
        pin_memory: for transfers to a GPU that do not block.
    """

    def __init__(
        self,
        store: Store,
        sampler: CropSampler,
        *,
        batch_size: int,
        tile_size: int,
        noise_shape: Sequence[int],
        first_step: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.store = store
        self.sampler = sampler
        self.batch_size = batch_size
        self.tile_size = tile_size
        self.noise_shape = tuple(noise_shape)
        self.first_step = first_step
        self.num_workers = num_workers
        self.pin_memory = pin_memory

    def _new_batch(self, step: int) -> Batch:
        channels = self.store.normalization.n_channels
        dtype = torch.from_numpy(np.empty(0, self.store.dtype)).dtype
        shape = (self.batch_size, self.tile_size, self.tile_size, channels)
        samples = range(step * self.batch_size, (step + 1) * self.batch_size)
        return Batch(
            step,
            torch.empty(shape, dtype=dtype, pin_memory=self.pin_memory),
            torch.empty((self.batch_size, *self.noise_shape), pin_memory=self.pin_memory),
            [self.sampler.crop(i) for i in samples],
        )

    def _fill(self, batch: Batch, j: int) -> None:
        _read_crop(self.store, batch.crops[j], batch.tiles[j].numpy())
        i = batch.step * self.batch_size + j
        batch.noise[j] = torch.from_numpy(sampling.noise(self.sampler.seed, sampling.NOISE, i, self.noise_shape))

    def __iter__(self) -> Iterator[Batch]:
        if self.num_workers == 0:
            yield from self._read_in_turn()
        else:
            yield from self._read_ahead()

    def _read_in_turn(self) -> Iterator[Batch]:
        step = self.first_step
        while True:
            batch = self._new_batch(step)
            for j in range(self.batch_size):
                self._fill(batch, j)
            yield batch
            step += 1

    def _read_ahead(self) -> Iterator[Batch]:
        queue: deque[tuple[Batch, list[Future[None]]]] = deque()
        step = self.first_step
        readers = ThreadPoolExecutor(self.num_workers, thread_name_prefix="tiles")
        try:
            while True:
                while len(queue) <= BATCHES_AHEAD:
                    batch = self._new_batch(step)
                    queue.append((batch, [readers.submit(self._fill, batch, j) for j in range(self.batch_size)]))
                    step += 1
                batch, pending = queue.popleft()
                for future in pending:
                    future.result()
                yield batch
        finally:
            readers.shutdown(cancel_futures=True)
