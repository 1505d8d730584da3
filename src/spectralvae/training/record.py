"""What run.json says of where a run came from."""

from __future__ import annotations

import hashlib
import json
import platform
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spectralvae import __version__


def versions() -> dict[str, str]:
    """Of all that decides about a result's bits."""
    found = {
        "spectralvae": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": platform.platform(),
    }
    if torch.version.cuda:
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        found |= {"cuda": torch.version.cuda, "cudnn": str(cudnn)}
    return found


def git_revision() -> str | None:
    """The revision of the sources that run, with "+changes" where they are not quite it; None if git has none."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            found = subprocess.run(["git", "-C", here.parent, *arguments], capture_output=True, text=True, check=False)
        except FileNotFoundError:  # no git on this machine
            return None
        return found.stdout.strip() if found.returncode == 0 else None

    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no", "..")
    return f"{git('rev-parse', 'HEAD')}{'+changes' if changed else ''}"


def describe_device(device: torch.device) -> str:
    """Machine, device and threads of this process."""
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else f"{platform.machine()} CPU"
    return f"{socket.gethostname()}: {name}, {torch.get_num_threads()} threads"


def hash_of(config: Mapping[str, Any]) -> str:
    """SHA-256 of a config, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def rounding_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two starts that lets results round otherwise, in words.

    Args:
        before, now: of run.json: versions, n_processes, devices.
    """

    def decisive(facts: Mapping[str, Any]) -> dict[str, Any]:
        devices = sorted(device.partition(": ")[2] for device in facts["devices"])  # on whatever machine
        return {"torch": facts["versions"]["torch"], "processes": facts["n_processes"], "devices": devices}

    if not before.keys() >= {"versions", "n_processes", "devices"}:  # killed before it was noted
        return []
    old, new = decisive(before), decisive(now)
    return [f"{key}: {old[key]} before, {new[key]} now" for key in old if old[key] != new[key]]
