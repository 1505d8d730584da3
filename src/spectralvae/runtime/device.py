"""Which device a run uses, and how much memory it has."""

from __future__ import annotations

import resource
from pathlib import Path

import torch
from rich.console import Console

from spectralvae.errors import ConfigError
from spectralvae.runtime.ranks import Ranks

CGROUP = Path("/sys/fs/cgroup")


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
        raise ConfigError(f"this machine has {n} CUDA devices", key=key, value=name, remedy="use auto or cpu")
    console.print(f"device: {name} (named in the config)")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _own_device(name: str, n: int, ranks: Ranks, console: Console, key: str) -> torch.device:
    if name not in ("auto", "cuda"):
        problem = f"cannot be shared by {ranks.world_size} processes"
        raise ConfigError(problem, key=key, value=name, remedy="use auto or cuda")
    # a launcher may show each process its own device only
    index = 0 if n == 1 and ranks.local_rank is not None else ranks.local_rank
    if index is None or index >= n:
        problem = f"process {ranks.rank} is number {ranks.local_rank} on a machine with {n} CUDA devices"
        raise ConfigError(problem, key=key, remedy="start one process a GPU")
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


def peak_memory(device: torch.device) -> int:
    """Bytes that this process took at most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
