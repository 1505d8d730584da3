"""Whole batches of finished tiles, read ahead by threads."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from spectralvae.data import sampling
from spectralvae.data.cache import SceneCache
from spectralvae.data.cells import cell_means
from spectralvae.data.sampling import Crop, CropSampler
from spectralvae.data.store import Store
from spectralvae.data.targets import TargetTransform
from spectralvae.errors import ConfigError

BATCHES_AHEAD = 2
POSITIONS_TRIED = 2000  # fail before training starts if almost no tile is admissible


@dataclass(frozen=True)
class Batch:
    """One step's samples.

    Attributes:
        step: which step it is for.
        tiles: (B, y, x, channel) in the store's dtype, NaN = invalid; permuted, it is channels_last. Out of a cache,
            they are on its device.
        noise: (B, E, h, w) float32, the posterior's noise.
        crops: where the tiles come from.
        targets: (B, P, h, w) float32, level-2 targets on the grid of the latents, NaN = invalid; None if not asked for.
    """

    step: int
    tiles: Tensor
    noise: Tensor
    crops: list[Crop]
    targets: Tensor | None = None


def make_sampler(
    store: Store, scenes: Sequence[int], *, seed: int, tile_size: int, max_invalid_fraction: float
) -> CropSampler:
    """A sampler over some scenes of a store, whose files are all there.

    Raises:
        ConfigError: a scene is smaller than a tile, or hardly a tile anywhere is valid enough.
        InputError: a file of a scene is lost or not as long as it was written.
    """
    shapes = [_tileable(store, scene, tile_size) for scene in scenes]
    for scene in scenes:
        store.check_files(scene)
    sampler = CropSampler(
        seed,
        scenes,
        np.array(shapes),
        tile_size=tile_size,
        n_channels=store.normalization.n_channels,
        max_invalid_fraction=max_invalid_fraction,
        count_invalid=store.count_invalid,
        where=_where(store, scenes),
        path=store.path,
    )
    if not sampler.any_admissible(POSITIONS_TRIED):
        raise sampling.no_tile_left(max_invalid_fraction, tile_size, _where(store, scenes), store.path)
    return sampler


def grid_crops(
    store: Store, scenes: Sequence[int], *, tile_size: int, max_invalid_fraction: float, at_most: int
) -> list[Crop]:
    """Fixed tiles: a grid over some scenes of a store, or some of it, scattered over all.

    Raises:
        ConfigError: a scene is smaller than a tile, or there are scenes, but no tile of theirs will do.
        InputError: a file of a scene is lost or damaged.
    """
    samples = tile_size * tile_size * store.normalization.n_channels
    crops = []
    for scene in scenes:
        ny, nx, piece = _tileable(store, scene, tile_size)
        n_invalid = store.n_invalid(scene)
        crops += [
            Crop(scene, y, x)
            for start in range(0, ny, piece)
            for y in (start + first for first in sampling.grid(piece, tile_size))
            for x in sampling.grid(nx, tile_size)
            if n_invalid[y : y + tile_size, x : x + tile_size].sum() / samples <= max_invalid_fraction
        ]
    if scenes and not crops:
        raise sampling.no_tile_left(max_invalid_fraction, tile_size, _where(store, scenes), store.path)
    return [crops[i] for i in sampling.scattered(len(crops), at_most)]


def _tileable(store: Store, scene: int, tile_size: int) -> tuple[int, int, int]:
    """(y, x, height of the pieces that no tile may straddle) of a scene.

    Raises:
        ConfigError: not one tile fits in.
    """
    record = store.scenes[scene]
    ny, nx, _ = record.shape
    piece = record.stack or ny
    assert ny % piece == 0
    if min(piece, nx) < tile_size:
        largest = min(min(other.stack or other.shape[0], other.shape[1]) for other in store.scenes)
        raise ConfigError(
            f"{record.split} scene {record.id} has only {piece} x {nx} pixels",
            key="data.tile_size",
            value=tile_size,
            limit=f"at most {largest}, which fits into every scene of the store",
            remedy="with n levels in model.chs, choose a multiple of 2^(n - 1)",
        )
    return ny, nx, piece


def _where(store: Store, scenes: Sequence[int]) -> str:
    return f"the {len(scenes)} {store.scenes[scenes[0]].split} scenes"


def read_crops(store: Store, crops: Sequence[Crop], tile_size: int) -> Tensor:
    """Read tiles one after the other: (B, y, x, channel) in the store's dtype, NaN = invalid."""
    tiles = np.empty((len(crops), tile_size, tile_size, store.normalization.n_channels), store.dtype)
    for crop, tile in zip(crops, tiles, strict=True):
        _read_crop(store, crop, tile)
    return torch.from_numpy(tiles)


def _read_crop(store: Store, crop: Crop, out: np.ndarray) -> None:
    store.read_tile(crop.scene, crop.y, crop.x, sampling.as_read(out, crop))


class TargetReader:
    """Level-2 fields under the tiles of a store, as standardised targets on the grid of the latents.

    Args:
        store: where the fields are.
        products: in the order of the targets.
        scenes: that have to have them.
        scale: pixels of a latent cell along y and x.

    Raises:
        ConfigError: the store, or a scene of it, lacks a product.
        InputError: a file of a field is lost, cut off or compressed.
    """

    def __init__(self, store: Store, products: Sequence[str], scenes: Sequence[int], scale: int) -> None:
        for product in products:
            for scene in scenes:
                record = store.scenes[scene]
                if product not in record.products:
                    raise ConfigError(
                        f"{record.split} scene {record.id} has no {product}",
                        key="supervision.products",
                        path=store.path,
                        remedy=f"prepare the store with l2.{product}, or set the weight of {product} to 0",
                    )
                store.check_field(scene, product)
        known = store.attributes.get("targets", {})
        self._store, self._scale = store, scale
        self._transforms = [TargetTransform.from_attributes(known[product]) for product in products]

    def read(self, crop: Crop, tile_size: int) -> NDArray[np.float32]:
        """(P, h, w) of a tile, flipped and turned as it is; NaN where fewer than half of a cell's pixels are valid."""
        fields = [
            (t.transform(self._store.read_field(crop.scene, t.product, crop.y, crop.x, tile_size)) - t.mean) / t.std
            for t in self._transforms
        ]
        means = cell_means(np.stack(fields), self._scale)
        targets = np.empty(means.shape, np.float32)
        for target, mean in zip(targets, means, strict=True):
            sampling.as_read(target, crop)[...] = mean
        return targets

    def read_all(self, crops: Sequence[Crop], tile_size: int) -> Tensor:
        """(B, P, h, w) of several tiles."""
        return torch.from_numpy(np.stack([self.read(crop, tile_size) for crop in crops]))

    def shape(self, tile_size: int) -> tuple[int, int, int]:
        """(P, h, w)"""
        return len(self._transforms), tile_size // self._scale, tile_size // self._scale


class _Memory:
    """Memory for batches. What nobody holds any more is used again: to write to fresh pages takes longer than reading.

    Args:
        shape, dtype: of a batch.
        pin: for transfers to a GPU that do not block.
        gpu: where it is; None for the memory of this machine.
    """

    def __init__(self, shape: Sequence[int], dtype: np.dtype[Any], pin: bool, gpu: torch.device | None = None) -> None:
        self._shape, self._dtype, self._pin, self._gpu = tuple(shape), dtype, pin, gpu
        self._free: list[NDArray[Any]] = []

    def take(self) -> Tensor:
        """Uninitialised. Its memory is free again when the tensor and all its views are gone."""
        if self._gpu is not None or self._pin:  # torch itself keeps such memory, and knows what still needs it
            dtype = torch.from_numpy(np.empty(0, self._dtype)).dtype
            return torch.empty(self._shape, dtype=dtype, device=self._gpu, pin_memory=self._gpu is None)
        memory = self._free.pop() if self._free else np.empty(self._shape, self._dtype)
        lent = memory.view()  # what the tensor and its views hold on to, and the free list does not
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent)


class TileStream(IterableDataset[Batch]):
    """Endless training batches from a given step on. It has no length.

    Args:
        store: where the tiles are.
        sampler: which tiles.
        batch_size: tiles a step, of all processes together.
        tile_size: pixels along y and x.
        noise_shape: (E, h, w) of the posterior.
        first_step: batch of this step comes first; samples of step s are s * batch_size and on.
        num_workers: reader threads; 0 reads when asked.
        pin_memory: for transfers to a GPU that do not block.
        rank, world_size: which of how many processes: each gets its share of a step's samples, in order.
        targets: what the batches' targets are read with; None for batches without.
        cache: the sampler's scenes on a device, where the tiles are made then; None reads them from the store.

    Raises:
        ConfigError: batch_size cannot be shared out evenly.
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
        rank: int = 0,
        world_size: int = 1,
        targets: TargetReader | None = None,
        cache: SceneCache | None = None,
    ) -> None:
        if batch_size % world_size:
            limit = f"a multiple of the number of processes, {world_size}"
            raise ConfigError(key="data.batch_size", value=batch_size, limit=limit)
        assert 0 <= rank < world_size and tile_size == sampler.tile_size
        self.store = store
        self.sampler = sampler
        self.batch_size = batch_size
        self.tile_size = tile_size
        self.noise_shape = tuple(noise_shape)
        self.first_step = first_step
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.rank = rank
        self.targets = targets
        self.cache = cache
        self.share = batch_size // world_size

    def __iter__(self) -> Iterator[Batch]:
        shape = (self.share, self.tile_size, self.tile_size, self.store.normalization.n_channels)
        gpu = self.cache.pixels.device if self.cache is not None and self.cache.pixels.is_cuda else None
        memory = _Memory(shape, self.store.dtype, self.pin_memory, gpu)
        steps = count(self.first_step)
        if self.num_workers == 0:
            for step in steps:
                batch = self._new_batch(step, memory)
                batch.crops.extend(self._fill(batch, j) for j in range(self.share))
                yield batch
                del batch  # or its memory would not be free for the next one
            return
        queue: deque[tuple[Batch, list[Future[Crop]]]] = deque()
        readers = ThreadPoolExecutor(self.num_workers, thread_name_prefix="tiles")
        try:
            while True:
                while len(queue) <= BATCHES_AHEAD:
                    batch = self._new_batch(next(steps), memory)
                    queue.append((batch, [readers.submit(self._fill, batch, j) for j in range(self.share)]))
                batch, pending = queue.popleft()
                batch.crops.extend(future.result() for future in pending)
                yield batch
                del batch
        finally:
            readers.shutdown(cancel_futures=True)

    def _new_batch(self, step: int, memory: _Memory) -> Batch:
        """A batch that is to be filled."""
        noise = torch.empty((self.share, *self.noise_shape), pin_memory=self.pin_memory)
        targets = None
        if self.targets is not None:
            targets = torch.empty((self.share, *self.targets.shape(self.tile_size)), pin_memory=self.pin_memory)
        return Batch(step, memory.take(), noise, [], targets)

    def _fill(self, batch: Batch, j: int) -> Crop:
        """Read the tile and its targets, and draw the noise, of sample j of a batch."""
        i = batch.step * self.batch_size + self.rank * self.share + j
        crop = self.sampler.crop(i)
        if self.cache is not None:
            self.cache.read(crop, batch.tiles[j])
        else:
            _read_crop(self.store, crop, batch.tiles[j].numpy())
        batch.noise[j] = torch.from_numpy(sampling.noise(self.sampler.seed, sampling.NOISE, i, self.noise_shape))
        if self.targets is not None:
            assert batch.targets is not None
            batch.targets[j] = torch.from_numpy(self.targets.read(crop, self.tile_size))
        return crop
