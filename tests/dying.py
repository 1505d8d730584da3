"""Work on scenes that goes wrong: a module, for the processes that do the work import it."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from spectralvae.data import scenes

VICTIM = "SPECTRALVAE_TEST_VICTIM"  # id of the scene
MARKER = "SPECTRALVAE_TEST_MARKER"  # file that a death leaves, so that there is only one; without it every worker dies


def measure(bench: Any, p: Any, advance: Any) -> None:
    """`scenes.measure`; the victim's worker is killed in the middle of it."""
    with _ending(p.id):
        scenes.measure(bench, p, advance)


def write(bench: Any, normalization: Any, targets: Any, p: Any, advance: Any) -> None:
    """`scenes.write`; the victim's worker is killed in the middle of it."""
    with _ending(p.id):
        scenes.write(bench, normalization, targets, p, advance)


def write_slowly(bench: Any, normalization: Any, targets: Any, p: Any, advance: Any) -> None:
    """`scenes.write`; once the marker is there, the victim's will take long."""
    if p.id == os.environ[VICTIM]:
        os.close(os.open(os.environ[MARKER], os.O_CREAT))
        time.sleep(5)
    scenes.write(bench, normalization, targets, p, advance)


class _ending:
    """Every second block that is read of the victim is the last one."""

    def __init__(self, scene: str) -> None:
        self.armed = scene == os.environ[VICTIM] and not os.path.exists(os.environ.get(MARKER, ""))  # noqa: PTH110

    def __enter__(self) -> None:
        self.blocks = scenes.blocks
        if self.armed:
            scenes.blocks = self.deadly_blocks  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        scenes.blocks = self.blocks

    def deadly_blocks(self, *arguments: Any, **options: Any) -> Any:
        for i, block in enumerate(self.blocks(*arguments, **options)):
            yield block
            if i == 0:  # the work on the first block is done
                if MARKER in os.environ:
                    os.close(os.open(os.environ[MARKER], os.O_CREAT))
                os.kill(os.getpid(), signal.SIGKILL)
