"""Which tiles cover a scene, and how what is computed from them is blended. Pure: numpy alone.

A network's result for a tile depends on all of the tile, and is worst at its border, beyond which it sees nothing. So
tiles overlap, and where they do their results are averaged with weights that fall to the border as a squared cosine.
The weights of all tiles add up to 1 everywhere, and those of two axes multiply.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Panel:
    """A piece of an axis that is worked on at a time.

    Attributes:
        start, stop: what it gives: cells, from and to, of `unit` pixels.
        tiles: starts in pixels of all tiles that reach into it.
    """

    start: int
    stop: int
    tiles: tuple[int, ...]


@dataclass(frozen=True)
class Cover:
    """The tiles along one axis.

    Attributes:
        size: pixels of the scene.
        tile: pixels of a tile.
        overlap: pixels that neighbours share at least.
        unit: pixels of a cell; tiles begin at multiples of it.
        starts: first pixel of each tile. The last tile may reach beyond the scene: by less than a cell, or, where the
            scene is smaller than a tile, by the rest of the tile.
    """

    size: int
    tile: int
    overlap: int
    unit: int

    def __post_init__(self) -> None:
        assert self.size > 0 and 0 <= self.overlap < self.tile
        assert self.tile % self.unit == self.overlap % self.unit == 0

    @property
    def n_cells(self) -> int:
        """Cells that the scene touches."""
        return -(-self.size // self.unit)

    @property
    def starts(self) -> tuple[int, ...]:
        """Evenly spread, so that the scene's end is covered like all of it."""
        n_free = max(0, self.n_cells - self.tile // self.unit)  # cells beyond the first tile
        step = (self.tile - self.overlap) // self.unit
        n_steps = -(-n_free // step)
        return tuple(round(i * n_free / n_steps) * self.unit for i in range(n_steps + 1)) if n_steps else (0,)

    def weights(self, unit: int) -> list[NDArray[np.float32]]:
        """What each tile's results count for.

        Args:
            unit: pixels of a cell of the result: 1, or `unit`.

        Returns:
            For each tile the weights of its cells, (tile / unit) float32; for every cell they sum to 1.
        """
        starts, n = self.starts, self.tile // unit
        windows = np.ones((len(starts), n))
        for i in range(len(starts) - 1):
            shared = (starts[i] + self.tile - starts[i + 1]) // unit
            rising = np.sin(np.pi / 2 * (np.arange(shared) + 0.5) / max(shared, 1)) ** 2
            windows[i, n - shared :] *= rising[::-1]
            windows[i + 1, :shared] *= rising
        total = np.zeros((starts[-1] + self.tile) // unit)
        for start, window in zip(starts, windows, strict=True):
            total[start // unit :][:n] += window
        return [
            (window / total[start // unit :][:n]).astype(np.float32)
            for start, window in zip(starts, windows, strict=True)
        ]

    def panels(self, max_pixels: int) -> Iterator[Panel]:
        """Cut the axis into pieces, each with all tiles that count there; tiles at a cut belong to both.

        Args:
            max_pixels: that the tiles of a piece may span, if the fewest that give anything do not span more.
        """
        starts = self.starts
        ends = [*(start // self.unit for start in starts[1:]), self.n_cells]  # up to where no later tile counts
        begin = 0
        while begin < self.n_cells:
            first = next(i for i, start in enumerate(starts) if start + self.tile > begin * self.unit)
            last = next(i for i in range(first, len(starts)) if ends[i] > begin)
            while last + 1 < len(starts) and starts[last + 1] + self.tile - starts[first] <= max_pixels:
                last += 1
            yield Panel(begin, ends[last], starts[first : last + 1])
            begin = ends[last]


def mirrored(start: int, stop: int, size: int) -> NDArray[np.int64]:
    """Positions start..stop of an axis that goes on beyond its end as in a mirror: 0 1 2 | 2 1 0 | 0 1 2 ..."""
    position = np.arange(start, stop) % (2 * size)
    return np.minimum(position, 2 * size - 1 - position)
