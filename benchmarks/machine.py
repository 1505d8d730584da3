"""What the figures of a benchmark depend on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spectralvae import __version__


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """Processor, memory, system, and the versions of spectralvae and some other packages."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "system": platform.platform(),
        "transparent_hugepage": huge_pages.read_text().strip() if huge_pages.is_file() else None,
        "python": platform.python_version(),
        "spectralvae": __version__,
        **{name: version(name) for name in packages},
    }
