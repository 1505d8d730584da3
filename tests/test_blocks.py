"""How a scene is cut for reading: every pixel once, along the file's own chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectralvae.readers.base import Scene


class Sizes(Scene):
    """A scene that is never read."""

    format = "tempo"
    wavelength = None  # type: ignore[assignment]
    coordinates = _open = _read_raw = None  # type: ignore[assignment]


def made(shape: tuple[int, int, int], chunk: tuple[int, int] | None, region: list[int] | None) -> Sizes:
    return Sizes(Path("x"), shape, region, absent=(), chunk=chunk)


@pytest.mark.parametrize("seed", range(40))
def test_every_pixel_once_and_no_chunk_twice(seed: int) -> None:
    random = np.random.default_rng(seed)
    ny, nx, nc = (int(n) for n in random.integers(1, 40, 3))
    chunk = (int(random.integers(1, ny + 5)), int(random.integers(1, nx + 5)))
    y0, x0 = int(random.integers(0, ny)), int(random.integers(0, nx))
    region = [y0, int(random.integers(y0 + 1, ny + 1)), x0, int(random.integers(x0 + 1, nx + 1))]
    max_samples = int(np.exp(random.uniform(0, np.log(2 * ny * nx * nc))))  # mostly much less than the scene
    scene = made((ny, nx, nc), chunk, region if seed % 2 else None)
    read = np.zeros(scene.shape[:2], int)
    touched: dict[tuple[Any, Any], int] = {}
    top, left = (region[0], region[2]) if seed % 2 else (0, 0)
    for rows, columns in scene.blocks(max_samples):
        read[rows, columns] += 1
        height, width = rows.stop - rows.start, columns.stop - columns.start
        assert height > 0 < width
        # a row of one chunk is the least that can be read
        assert height * width * nc <= max(max_samples, min(chunk[1], nx) * nc)
        for y in {(top + y) // chunk[0] for y in range(rows.start, rows.stop)}:
            for x in {(left + x) // chunk[1] for x in range(columns.start, columns.stop)}:
                touched[y, x] = touched.get((y, x), 0) + 1
    assert (read == 1).all()
    if chunk[0] * chunk[1] * nc <= max_samples:
        assert set(touched.values()) == {1}


def test_whole_rows_where_the_file_has_them() -> None:
    """A full granule in the layout of TEMPO: a row at a time, 2.1 M samples."""
    blocks = list(made((131, 2048, 1028), (1, 512), None).blocks(4_000_000))
    assert blocks == [(slice(y, y + 1), slice(0, 2048)) for y in range(131)]
