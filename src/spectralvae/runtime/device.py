"""Which device a run uses, and how much memory it has."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from rich.console import Console

from spectralvae.errors import ConfigError
from spectralvae.runtime.ranks import Ranks

ROOT = Path("/")  # where /proc and /sys are read


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
        free = _free_memory(n)
        if not free:
            problem = f"none of the {n} CUDA devices accepts this process: they are full, or in exclusive use"
            raise ConfigError(problem, key=key, value=name, remedy="wait for them, or use cpu")
        best = max(free, key=lambda i: free[i])
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


def _free_memory(n: int) -> dict[int, int]:
    """Free bytes of each of the n visible CUDA devices, but for those in exclusive use by another process.

    NVML (package nvidia-ml-py) tells them without touching the devices. Without it CUDA is asked, which leaves a
    context of some hundred MB on each.
    """
    free = {}
    try:
        import pynvml

        pynvml.nvmlInit()
        for i in range(n):
            # by UUID: NVML counts all devices, CUDA those of CUDA_VISIBLE_DEVICES, and in another order
            card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(i).uuid}")
            mode, busy = pynvml.nvmlDeviceGetComputeMode(card), pynvml.nvmlDeviceGetComputeRunningProcesses(card)
            if not (mode == pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS and busy):
                free[i] = int(pynvml.nvmlDeviceGetMemoryInfo(card).free)
        return free
    except ImportError:
        pass
    except pynvml.NVMLError:  # no library, or slices of a device (MIG)
        free.clear()
    for i in range(n):
        with suppress(RuntimeError):  # the device is full, or in exclusive use
            free[i] = torch.cuda.mem_get_info(i)[0]
    return free


def _own_device(name: str, n: int, ranks: Ranks, console: Console, key: str) -> torch.device:
    if name not in ("auto", "cuda"):
        problem = f"cannot be shared by {ranks.world_size} processes"
        raise ConfigError(problem, key=key, value=name, remedy="use auto or cuda")
    if ranks.local_rank is None:
        problem = f"the launcher does not say which of the {n} CUDA devices belongs to process {ranks.rank}"
        raise ConfigError(problem, key=key, remedy="start with torchrun or srun")
    # srun may show each process its own device only. torchrun shows every process all devices, and tells their number.
    bound = n == 1 and ranks.local_world_size is None
    n_local = ranks.local_world_size or ranks.local_rank + 1
    if n_local > n and not bound:
        raise ConfigError(
            f"at least {n_local} processes run on this machine with {n} visible CUDA device{'' if n == 1 else 's'}",
            key=key,
            value=name,
            remedy="start one process for each device, or use cpu",
        )
    index = 0 if bound else ranks.local_rank
    torch.cuda.set_device(index)
    console.print(
        f"device: cuda:{index}, {torch.cuda.get_device_name(index)}; one for each of {ranks.world_size} processes"
    )
    return torch.device("cuda", index)


def available_memory(device: torch.device) -> int:
    """Bytes that this process may still take on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = dict(line.split(":") for line in (ROOT / "proc/meminfo").read_text().splitlines())
    return min([int(lines["MemAvailable"].split()[0]) * 1024, *_left_in_cgroups()])


def _left_in_cgroups() -> Iterator[int]:
    """Bytes left of each memory limit that this process's cgroup and the groups above it have.

    SLURM and containers set a limit at any level. Files: cgroup-v2.rst, cgroup-v1/memory.rst and proc_pid_mountinfo(5).
    """
    for line in (ROOT / "proc/self/mountinfo").read_text().splitlines():
        mount, _, file_system = line.partition(" - ")
        kind, _, options = file_system.split(" ", 2)
        if kind == "cgroup2":
            controller, usage, counts = "", "memory.current", ""
        elif kind == "cgroup" and "memory" in options.split(","):
            controller, usage, counts = "memory", "memory.usage_in_bytes", "total_"
        else:
            continue
        groups = (entry.split(":", 2) for entry in (ROOT / "proc/self/cgroup").read_text().splitlines())
        own = next(Path(path) for _, controllers, path in groups if controller in controllers.split(","))
        top, place = mount.split()[3:5]  # a container may see only the hierarchy below its own group
        inside = own.relative_to(top) if own.is_relative_to(top) else Path()
        for folder in (ROOT / place.lstrip("/") / level for level in (inside, *inside.parents)):
            if not (folder / usage).is_file():  # the root of version 2, or no memory controller
                continue
            stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            limit = stat.get("hierarchical_memory_limit") or (folder / "memory.max").read_text().strip()
            if limit != "max":
                # the page cache is reclaimed when memory is needed
                cache = int(stat[f"{counts}active_file"]) + int(stat[f"{counts}inactive_file"])
                yield int(limit) - int((folder / usage).read_text()) + cache


def peak_memory(device: torch.device) -> int:
    """Bytes that this process took at most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
