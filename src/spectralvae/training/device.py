"""Which device a run takes, and whether it fits."""

from __future__ import annotations

import math
import resource
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from rich.console import Console

from spectralvae.console import warn
from spectralvae.errors import ConfigError
from spectralvae.training.distributed import Ranks

CGROUP = Path("/sys/fs/cgroup")
KEPT_FREE = 0.1  # of the memory that is free, by scenes that are kept: weights and activations want some


def choose_device(name: str, ranks: Ranks, console: Console, *, key: str = "training.device") -> torch.device:
    """The device called ``name``; auto takes the CUDA device with the most free memory, else the CPU.

    Of several processes on a machine, each takes the CUDA device of its own number.

    Args:
        name: auto, cpu, cuda or cuda:N.
        ranks: the processes.
        console: where to print.
        key: of the config, for messages.

    Raises:
        ConfigError: a named device is absent, or processes would have to share one.
    """
    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if ranks.world_size > 1 and name != "cpu" and (n > 0 or name != "auto"):
        return _own_device(name, n, ranks, console, key)
    if name == "auto":
        if n == 0:
            console.print("device: cpu (auto: no CUDA device)")
            return torch.device("cpu")
        free = [torch.cuda.mem_get_info(i)[0] for i in range(n)]
        best = max(range(n), key=lambda i: free[i])
        console.print(
            f"device: cuda:{best}, {torch.cuda.get_device_name(best)} "
            f"(auto: {free[best] / 1e9:.1f} GB free, the most of {n})"
        )
        return torch.device("cuda", best)
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= n:
        raise ConfigError(f"{key}: {name} is absent: this machine has {n} CUDA devices; use auto or cpu")
    console.print(f"device: {name} (named in the config)")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _own_device(name: str, n: int, ranks: Ranks, console: Console, key: str) -> torch.device:
    if name not in ("auto", "cuda"):
        raise ConfigError(f"{key}: {name} cannot be shared by {ranks.world_size} processes; use auto or cuda")
    # a launcher may show each process its own device only
    index = 0 if n == 1 and ranks.local_rank is not None else ranks.local_rank
    if index is None or index >= n:
        raise ConfigError(
            f"{key}: process {ranks.rank} is number {ranks.local_rank} on a machine with {n} CUDA devices; "
            "start one process a GPU"
        )
    torch.cuda.set_device(index)
    console.print(
        f"device: cuda:{index}, {torch.cuda.get_device_name(index)}; one for each of {ranks.world_size} processes"
    )
    return torch.device("cuda", index)


def available_memory(device: torch.device) -> int:
    """Bytes that this process may still take on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    limit = CGROUP / "memory.max"  # what a SLURM job or container may use
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        cache = int(stat["active_file"]) + int(stat["inactive_file"])  # of files that were read; given up when needed
        available = min(available, int(text) - used + cache)
    return available


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
            f"data.batch_size: {batch_size} tiles of {' x '.join(map(str, shape))} samples need at least "
            f"{batch_size * tile / 1e9:.0f} GB, {free / 1e9:.0f} GB are free on {device}; at most {free // tile} fit"
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
            f"data.cache: {len(sizes)} training scenes need {copies * sum(sizes) / 1e9:.3g} GB{copied}, "
            f"{free / 1e9:.3g} GB are free on {device}, {(free - room) / 1e9:.3g} GB of them for the steps; "
            f"at most {fitting} fit (data.max_scenes), or leave data.cache false"
        )


def peak_memory(device: torch.device) -> int:
    """Bytes that this process took at most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report_first_step(device: torch.device, console: Console) -> None:
    """Print what the first step took beside what is left; tight memory is said now, not hours later."""
    peak, free = peak_memory(device), available_memory(device)
    console.print(f"first step: peak memory {peak / 1e9:.2f} GB on {device}, {free / 1e9:.1f} GB still free")
    if free < 0.1 * peak:
        warn(console, "memory is nearly used up: lower data.batch_size before the run dies of it")
