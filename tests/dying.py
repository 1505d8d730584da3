"""Work on scenes that goes wrong: a module, for the processes that do the work import it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from spectralvae.data.measure import measure
from spectralvae.data.write import write

VICTIM = "SPECTRALVAE_TEST_VICTIM"  # id of the scene
MARKERS = "SPECTRALVAE_TEST_MARKERS"  # folder where a death leaves a file, so that there is only one of each kind;
# without it every worker dies


def deadly(stage: str, *arguments: Any) -> None:
    """`measure` or `write`; the victim's worker is killed once its first block is done."""
    *rest, p, advance = arguments
    marker = Path(os.environ[MARKERS], stage) if MARKERS in os.environ else None

    def die(n_pixels: int) -> None:
        if marker:
            marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    lives = p.id != os.environ[VICTIM] or (marker and marker.exists())
    {"measure": measure, "write": write}[stage](*rest, p, advance if lives else die)


def write_slowly(bench: Any, normalization: Any, targets: Any, p: Any, advance: Any) -> None:
    """`write`; once its marker is there, the victim's takes long."""
    if p.id == os.environ[VICTIM]:
        Path(os.environ[MARKERS], "write").touch()
        time.sleep(5)
    write(bench, normalization, targets, p, advance)
