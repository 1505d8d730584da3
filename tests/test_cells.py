"""Fields on the grid of the latents."""

from __future__ import annotations

import numpy as np

from spectralvae.data.cells import cell_means, cell_sums


def test_sums_over_cells_with_fewer_pixels_at_the_ends() -> None:
    values = np.arange(15.0).reshape(3, 5)
    np.testing.assert_array_equal(cell_sums(values, 2), [[0 + 1 + 5 + 6, 2 + 3 + 7 + 8, 4 + 9], [21, 25, 14]])


def test_means_are_those_of_the_valid_pixels() -> None:
    values = np.random.default_rng(0).normal(size=(2, 8, 12))
    values[np.random.default_rng(1).random(values.shape) < 0.3] = np.nan
    found = cell_means(values, 4)
    blocks = values.reshape(2, 2, 4, 3, 4).swapaxes(2, 3).reshape(2, 2, 3, 16)
    assert (np.isfinite(blocks).sum(axis=-1) >= 8).all()
    np.testing.assert_allclose(found, np.nanmean(blocks, axis=-1), rtol=1e-13)


def test_a_cell_needs_half_of_the_pixels_that_it_has() -> None:
    values = np.ones((3, 3))
    values[0, 0] = values[0, 1] = np.nan  # 2 of 4 are left
    values[0, 2] = np.nan  # 1 of 2
    values[2, 2] = np.nan  # 0 of 1
    np.testing.assert_array_equal(cell_means(values, 2), [[1, 1], [1, np.nan]])
    values[1, 0] = np.nan  # 1 of 4
    values[1, 2] = np.nan  # 0 of 2
    np.testing.assert_array_equal(cell_means(values, 2), [[np.nan, np.nan], [1, np.nan]])
