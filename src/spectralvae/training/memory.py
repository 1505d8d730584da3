"""Whether batches and cached scenes fit into the device's memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from rich.console import Console

from spectralvae.errors import ConfigError
from spectralvae.runtime.console import warn
from spectralvae.runtime.device import available_memory, peak_memory

KEPT_FREE = 0.1  # share of the free memory that cached scenes leave to weights and activations


def _least_batch_bytes(batch_size: int, shape: Sequence[int]) -> int:
    """Input, reconstruction, difference and a gradient, in float32."""
    return 4 * 4 * batch_size * math.prod(shape)


def check_batch_fits(batch_size: int, shape: Sequence[int], device: torch.device) -> None:
    """Refuse a batch that cannot fit whatever the network: input, reconstruction, difference and a gradient.

    Args:
        batch_size: tiles a step.
        shape: (C, H, W) of a tile.
        device: where they must fit, in float32.

    Raises:
        ConfigError: they need more than is free.
    """
    tile = _least_batch_bytes(1, shape)
    free = available_memory(device)
    if batch_size * tile > free:
        raise ConfigError(
            f"{batch_size} tiles at a time of {' x '.join(map(str, shape))} samples need at least "
            f"{batch_size * tile / 1e9:.0f} GB, {free / 1e9:.0f} GB are free on {device}; at most {free // tile} fit",
            key="data.batch_size",
        )


def check_cache(
    sizes: Sequence[int],
    batch_size: int,
    shape: Sequence[int],
    device: torch.device,
    n_processes: int,
    *,
    n_val_tiles: int = 0,
) -> None:
    """Refuse to keep scenes that leave no room for even the least that a batch needs.

    Args:
        sizes: bytes of each scene.
        batch_size: tiles at a time.
        shape: (C, H, W) of a tile.
        device: where they must fit.
        n_processes: of the run. Each keeps its own copy: on its own GPU, or all of them in this machine's memory.
        n_val_tiles: that are kept as well, in float32 at most.

    Raises:
        ConfigError: they need more than is free.
    """
    copies = 1 if device.type == "cuda" else n_processes
    free = available_memory(device)
    beside = _least_batch_bytes(batch_size, shape) + 4 * n_val_tiles * math.prod(shape)
    room = free - copies * beside - int(KEPT_FREE * free)
    fitting = sum(total * copies <= room for total in accumulate(sizes))
    if fitting < len(sizes):
        copied = f" in {copies} processes" if copies > 1 else ""
        raise ConfigError(
            f"{len(sizes)} training scenes need {copies * sum(sizes) / 1e9:.3g} GB{copied}, "
            f"{free / 1e9:.3g} GB are free on {device}, {(free - room) / 1e9:.3g} GB of them for the steps",
            key="data.cache",
            remedy=f"at most {fitting} fit (data.max_scenes), or leave data.cache false",
        )


def report_first_step(device: torch.device, console: Console) -> None:
    """Print what the first step took beside what is left; tight memory is said now, not hours later."""
    peak, free = peak_memory(device), available_memory(device)
    console.print(f"first step: peak memory {peak / 1e9:.2f} GB on {device}, {free / 1e9:.1f} GB still free")
    if free < 0.1 * peak:
        warn(console, "memory is nearly used up: lower data.batch_size before the run dies of it")
