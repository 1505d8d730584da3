"""A scene in blocks of radiance, each of them read, checked and worked on by one of several threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from spectralvae.data.validity import Validity
from spectralvae.readers import Scene

BLOCK_SAMPLES = 4_000_000  # read at a time: 16 MB of float32

R = TypeVar("R")


@dataclass(frozen=True)
class Block:
    """A piece of a scene.

    Attributes:
        rows, columns: where it lies.
        values: (rows, columns, channel) radiance, NaN = invalid.
        counts: rejected samples by rule.
        noise: its standard deviation, as values; None where unknown or not asked for.
    """

    rows: slice
    columns: slice
    values: NDArray[np.float32]
    counts: dict[str, int]
    noise: NDArray[np.float32] | None

    @property
    def n_pixels(self) -> int:
        """How many pixels it has."""
        return int(self.values.shape[0] * self.values.shape[1])


def map_blocks(
    function: Callable[[Block], R], scene: Scene, validity: Validity, *, noise: bool = False, n_threads: int = 1
) -> Iterator[R]:
    """What a function makes of each block of a scene, in the order of the blocks.

    Args:
        function: called in several threads.
        scene: entered.
        validity: which samples may be used.
        noise: read it, too.
        n_threads: that read and work at the same time; so many blocks and one more are in memory.

    Raises:
        InputError: the scene cannot be read.
    """
    solar_zenith = scene.coordinates()["solar_zenith_angle"][1] if validity.max_solar_zenith is not None else None

    def work(rows: slice, columns: slice) -> R:
        values, counts = scene.read(rows, columns)
        counts |= validity.reject(values, None if solar_zenith is None else solar_zenith[rows, columns])
        return function(Block(rows, columns, values, counts, scene.read_noise(rows, columns) if noise else None))

    running: deque[Future[R]] = deque()
    with ThreadPoolExecutor(n_threads, thread_name_prefix="blocks") as threads:
        for window in scene.blocks(BLOCK_SAMPLES):
            running.append(threads.submit(work, *window))
            if len(running) > n_threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
