"""Fields of a scene on the grid of its latents: a cell is s x s pixels, fewer at the ends of a scene."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectralvae.weights.normalization import Float64

LEAST_VALID = 0.5  # share of a cell's pixels without which its mean says nothing


def cell_sums(values: NDArray[Any], s: int) -> Float64:
    """(..., y, x) -> (..., cells along y, along x): sums over the pixels of each cell."""
    rows = np.add.reduceat(values, range(0, values.shape[-2], s), axis=-2, dtype=np.float64)
    return np.asarray(np.add.reduceat(rows, range(0, values.shape[-1], s), axis=-1))


def cell_means(values: NDArray[Any], s: int) -> Float64:
    """(..., y, x), NaN = invalid -> (..., cells along y, along x): means over the valid pixels of each cell.

    NaN where fewer than half of the pixels that a cell has are valid.
    """
    valid = np.isfinite(values)
    n_valid = cell_sums(valid, s)
    n_pixels = cell_sums(np.ones(values.shape[-2:]), s)
    total = cell_sums(np.where(valid, values, 0.0), s)
    enough = n_valid >= LEAST_VALID * n_pixels
    return np.asarray(np.divide(total, n_valid, out=np.full(total.shape, np.nan), where=enough))
