"""Which tile is sample number i: a pure function of (seed, i) and of the data, and of nothing else.

So a run that goes on after a kill needs no state of the loader, and neither the number of reader threads
nor of processes changes what is seen. No files here: how many samples of a tile are invalid, a function tells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectralvae.errors import ConfigError

# Streams of random numbers that must not meet: (seed, stream, i) names a generator.
TILES, NOISE, VALIDATION_NOISE, TRIAL, DROPOUT, HEAD = 0, 1, 2, 3, 4, 5


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


def as_read(out: NDArray[Any], crop: Crop) -> NDArray[Any]:
    """Where a tile goes: (y, x, channel) of the finished tile -> a view of it, flipped and turned as in the scene."""
    tile = np.rot90(out, -crop.turns)
    return tile[::-1] if crop.flip else tile


ATTEMPTS = 100_000  # a sample fails with (1 - p)^ATTEMPTS, p the share of admissible positions: 4e-44 for 0.1 %


class CropSampler:
    """Draws tiles evenly over all admissible positions of all scenes, each in one of its eight orientations.

    A position is drawn evenly from all that there are, and drawn again until the tile there is admissible. So
    nothing has to be known of a scene but its size, however many scenes there are.

    Args:
        seed: of the run.
        scenes: indices in the store.
        shapes: (scene, 3): y, x, and the height of the pieces along y that no tile may straddle.
        tile_size: pixels along y and x.
        n_channels: samples of a pixel.
        max_invalid_fraction: largest share of invalid samples in an admissible tile.
        count_invalid: (scene, y, x, tile_size) -> how many samples of that tile are invalid.
        where: names the scenes in an error.
        path: the store, in an error.
    """

    def __init__(
        self,
        seed: int,
        scenes: Sequence[int],
        shapes: NDArray[np.int64],
        *,
        tile_size: int,
        n_channels: int,
        max_invalid_fraction: float,
        count_invalid: Callable[[int, int, int, int], int],
        where: str,
        path: Path | None = None,
    ) -> None:
        self.seed, self.scenes, self.tile_size = seed, list(scenes), tile_size
        self._max_invalid_fraction, self._count_invalid = max_invalid_fraction, count_invalid
        self._where, self._path = where, path
        self._samples = tile_size * tile_size * n_channels
        heights, widths, self._pieces = shapes.T
        self._widths = widths - tile_size + 1  # first pixels along x
        self._rows = self._pieces - tile_size + 1  # first pixels along y in a piece
        assert len(scenes) == len(shapes) and (self._widths > 0).all() and (self._rows > 0).all()
        self._ends = np.cumsum(heights // self._pieces * self._rows * self._widths)

    def crop(self, i: int) -> Crop:
        """Sample number i.

        Raises:
            ConfigError: no admissible tile was found.
        """
        random = generator(self.seed, TILES, i)
        for _ in range(ATTEMPTS):
            crop = self._draw(random)
            if self._is_admissible(crop):
                return crop
        raise no_tile_left(self._max_invalid_fraction, self.tile_size, self._where, self._path)

    def any_admissible(self, n: int) -> bool:
        """Whether any of n random positions is admissible."""
        random = generator(self.seed, TRIAL, 0)
        return any(self._is_admissible(self._draw(random)) for _ in range(n))

    def _is_admissible(self, crop: Crop) -> bool:
        n_invalid = self._count_invalid(crop.scene, crop.y, crop.x, self.tile_size)
        # the quotient is rounded as the limit was: a share of exactly the limit is admissible
        return n_invalid / self._samples <= self._max_invalid_fraction

    def _draw(self, random: np.random.Generator) -> Crop:
        k = int(random.integers(self._ends[-1]))
        s = int(np.searchsorted(self._ends, k, side="right"))
        row, x = divmod(k - (int(self._ends[s - 1]) if s else 0), int(self._widths[s]))
        piece, y = divmod(row, int(self._rows[s]))
        flip, turns = bool(random.integers(2)), int(random.integers(4))
        return Crop(self.scenes[s], piece * int(self._pieces[s]) + y, x, flip, turns)


def no_tile_left(max_invalid_fraction: float, tile_size: int, where: str, path: Path | None) -> ConfigError:
    """The error that no tile is valid enough."""
    return ConfigError(
        f"leaves hardly any tile of {tile_size} x {tile_size} pixels in {where}",
        key="data.max_invalid_fraction",
        value=max_invalid_fraction,
        path=path,
    )


def grid(size: int, tile: int) -> list[int]:
    """First pixels of tiles that cover an axis: side by side, the last one moved back to the edge."""
    starts = list(range(0, size - tile + 1, tile))
    return starts if starts[-1] + tile == size else [*starts, size - tile]


def evenly(n: int, at_most: int) -> list[int]:
    """At most ``at_most`` of the indices 0 ... n - 1, spread evenly."""
    count = min(n, at_most)
    return [i * n // count for i in range(count)]


def scattered(n: int, at_most: int) -> list[int]:
    """At most ``at_most`` of the indices 0 ... n - 1, always the same: one from each of as many equal parts, at random.

    Of a grid in order, every so many-th tile may lie in one column: what is to stand for all of it is chosen so.
    """
    count = min(n, at_most)
    ends = [(i + 1) * n // count for i in range(count)]
    random = np.random.Generator(np.random.Philox(0))
    return [int(random.integers(start, end)) for start, end in zip([0, *ends], ends, strict=False)]


def noise(seed: int, stream: int, i: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """The posterior's noise of sample i, standard normal, float32."""
    return generator(seed, stream, i).standard_normal(tuple(shape), dtype=np.float32)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """What torch's generator is seeded with before a step of one of several processes."""
    random = np.random.Generator(np.random.Philox(key=[seed, DROPOUT], counter=[0, 0, rank, step]))
    return int(random.integers(2**63))


def head_seed(seed: int) -> int:
    """What torch's generator is seeded with before the head of supervised latents gets its first weights."""
    return int(generator(seed, HEAD, 0).integers(2**63))
