"""Which tile is sample number i: a pure function of (seed, i), and of nothing else.

So a run that goes on after a kill needs no state of the loader, and neither the number of reader threads
nor of processes changes what is seen. No files here; numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Streams of random numbers that must not meet: (seed, stream, i) names a generator.
TILES, NOISE, VALIDATION_NOISE = 0, 1, 2


def generator(seed: int, stream: int, i: int) -> np.random.Generator:
    """The random generator number i of a stream: Philox, a counter-based generator (Salmon et al. 2011)."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, i]))


@dataclass(frozen=True)
class Crop:
    """A tile: its scene, its first pixel, and how it is turned.

    Attributes:
        scene: index in the store.
        y, x: first pixel.
        flip: mirrored along y, before turning.
        turns: quarter turns.
    """

    scene: int
    y: int
    x: int
    flip: bool = False
    turns: int = 0


def turn(tile: NDArray[Any], crop: Crop) -> NDArray[Any]:
    """(y, x, channel) as read -> a view of it, flipped and turned."""
    return np.rot90(tile[::-1] if crop.flip else tile, crop.turns)


def admissible_positions(
    n_invalid: NDArray[np.int64], n_channels: int, tile: int, max_invalid_fraction: float
) -> NDArray[np.int64]:
    """Where tiles may begin.

    Args:
        n_invalid: (y, x) invalid samples of each pixel.
        n_channels: samples of a pixel.
        tile: size of a tile.
        max_invalid_fraction: largest share of invalid samples in a tile.

    Returns:
        Sorted flat indices into the (y - tile + 1, x - tile + 1) possible first pixels.
    """
    ny, nx = n_invalid.shape
    table = np.zeros((ny + 1, nx + 1), np.int64)  # summed-area table (Crow 1984)
    np.cumsum(np.cumsum(n_invalid, axis=0), axis=1, out=table[1:, 1:])
    inside = table[tile:, tile:] - table[:-tile, tile:] - table[tile:, :-tile] + table[:-tile, :-tile]
    return np.flatnonzero(inside <= max_invalid_fraction * tile * tile * n_channels)


class CropSampler:
    """Draws tiles evenly over all admissible positions of all scenes, each in one of its eight orientations.

    Args:
        seed: of the run.
        scenes: (index in the store, width nx - tile + 1 of its positions, admissible positions) of each scene.
    """

    def __init__(self, seed: int, scenes: Sequence[tuple[int, int, NDArray[np.int64]]]) -> None:
        self.seed = seed
        self._scenes = [scene for scene in scenes if len(scene[2])]
        self._ends = np.cumsum([len(positions) for _, _, positions in self._scenes])
        assert self._scenes, "no admissible position in any scene"

    @property
    def scenes(self) -> list[int]:
        """The scenes that have admissible positions, as indices in the store."""
        return [scene for scene, _, _ in self._scenes]

    def __len__(self) -> int:
        """How many positions there are."""
        return int(self._ends[-1])

    def crop(self, i: int) -> Crop:
        """Sample number i."""
        random = generator(self.seed, TILES, i)
        k = int(random.integers(len(self)))
        s = int(np.searchsorted(self._ends, k, side="right"))
        scene, width, positions = self._scenes[s]
        y, x = divmod(int(positions[k - (int(self._ends[s - 1]) if s else 0)]), width)
        return Crop(scene, y, x, flip=bool(random.integers(2)), turns=int(random.integers(4)))


def grid(size: int, tile: int) -> list[int]:
    """First pixels of tiles that cover an axis: side by side, the last one moved back to the edge."""
    starts = list(range(0, size - tile + 1, tile))
    return starts if starts[-1] + tile == size else [*starts, size - tile]


def evenly(n: int, at_most: int) -> list[int]:
    """At most ``at_most`` of the indices 0 ... n - 1, spread evenly."""
    count = min(n, at_most)
    return [i * n // count for i in range(count)]


def noise(seed: int, stream: int, i: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """The posterior's noise of sample i, standard normal, float32."""
    return generator(seed, stream, i).standard_normal(tuple(shape), dtype=np.float32)
