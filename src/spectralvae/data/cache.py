"""Training scenes kept whole on the device of a run: tiles are cut out, flipped and turned there."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from spectralvae.data import sampling
from spectralvae.data.sampling import Crop
from spectralvae.data.store import Store
from spectralvae.runtime.console import new_progress

BLOCK_BYTES = 2**26  # that are read at a time
QUIET_SECONDS = 2.0  # until a progress bar is worth looking at


@dataclass(frozen=True)
class SceneCache:
    """The pixels of some scenes of a store, as they are there. Each process of a run has a copy on its own device.

    Attributes:
        pixels: (pixel, channel) in the store's dtype, NaN = invalid: one scene after the other, each row by row.
        places: by index of the scene in the store: its first pixel, and how many it has along x.
    """

    pixels: Tensor
    places: dict[int, tuple[int, int]]

    def read(self, crop: Crop, out: Tensor) -> None:
        """Copy a tile into ``out`` (y, x, channel), which is contiguous and on the same device.

        On a GPU nothing is waited for: the copy takes its place among what the device has to do.
        """
        first, nx = self.places[crop.scene]
        steps = np.arange(len(out))
        index = torch.empty(out.shape[:2], dtype=torch.int64, pin_memory=self.pixels.is_cuda)
        sampling.as_read(index.numpy(), crop)[...] = first + (crop.y + steps)[:, None] * nx + crop.x + steps
        index = index.ravel().to(self.pixels.device, non_blocking=True)
        torch.index_select(self.pixels, 0, index, out=out.view(len(index), -1))


def scene_bytes(store: Store, scenes: Sequence[int]) -> list[int]:
    """What each of some scenes takes in a cache."""
    return [math.prod(store.scenes[scene].shape) * store.dtype.itemsize for scene in scenes]


def load_scenes(store: Store, scenes: Sequence[int], device: torch.device, console: Console) -> SceneCache:
    """Read scenes once; a progress bar shows up if it takes longer than a moment.

    Args:
        store: where they are.
        scenes: indices in the store.
        device: where they go.
        console: where to print what was read.

    Raises:
        InputError: a file is lost or shorter than it was written.
    """
    shapes = {scene: store.scenes[scene].shape for scene in scenes}
    n_pixels = sum(ny * nx for ny, nx, _ in shapes.values())
    dtype = torch.from_numpy(np.empty(0, store.dtype)).dtype
    pixels = torch.empty((n_pixels, store.normalization.n_channels), dtype=dtype, device=device)
    places, end, began = dict[int, tuple[int, int]](), 0, time.monotonic()
    with ExitStack() as stack:
        progress = new_progress(quiet=console.quiet)
        task = progress.add_task("reading rows of scenes", total=sum(ny for ny, _, _ in shapes.values()))
        shown = False
        for scene, (ny, nx, nc) in shapes.items():
            places[scene] = end, nx
            height = max(1, min(ny, BLOCK_BYTES // (nx * nc * store.dtype.itemsize)))
            buffer = np.empty((height, nx, nc), store.dtype)
            for y in range(0, ny, height):
                rows = buffer[: ny - y]
                store.read_tile(scene, y, 0, rows)
                begin, end = end, end + len(rows) * nx
                pixels[begin:end] = torch.from_numpy(rows).view(-1, nc)
                progress.advance(task, len(rows))
                if not shown and time.monotonic() - began > QUIET_SECONDS:
                    stack.enter_context(progress)
                    shown = True
    console.print(f"data.cache: {len(scenes)} scenes, {pixels.nbytes / 1e9:.3g} GB, are kept on {device}")
    return SceneCache(pixels, places)
