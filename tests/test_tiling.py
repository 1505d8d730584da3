"""Tiles cover every axis, and their weights add up to one."""

from __future__ import annotations

import numpy as np
import pytest

from spectralvae.data.tiling import Cover, mirrored


def covers() -> list[Cover]:
    """Axes of all kinds, the awkward ones first."""
    awkward = [Cover(1, 64, 16, 4), Cover(64, 64, 0, 4), Cover(65, 64, 60, 4), Cover(131, 64, 16, 4), Cover(7, 4, 0, 4)]
    random = np.random.default_rng(0)
    for _ in range(60):
        unit = int(random.choice([1, 2, 4, 8]))
        cells = int(random.integers(1, 17))
        overlap = unit * int(random.integers(0, cells))
        awkward.append(Cover(int(random.integers(1, 400)), unit * cells, overlap, unit))
    return awkward


@pytest.mark.parametrize("cover", covers(), ids=str)
def test_an_axis_is_covered_by_tiles_that_share_enough_and_weights_add_up_to_one(cover: Cover) -> None:
    starts = cover.starts
    assert starts[0] == 0 and all(start % cover.unit == 0 for start in starts)
    steps = np.diff(starts)
    assert (steps > 0).all() and (steps <= cover.tile - cover.overlap).all()
    beyond = starts[-1] + cover.tile - cover.size
    assert 0 <= beyond < cover.unit or (len(starts) == 1 and beyond >= 0)
    # no tile too many
    assert len(starts) == 1 or starts[-2] + cover.tile < cover.size + (cover.tile - cover.overlap)
    for unit in (1, cover.unit):
        total = np.zeros((starts[-1] + cover.tile) // unit)
        for start, weights in zip(starts, cover.weights(unit), strict=True):
            assert weights.shape == (cover.tile // unit,)
            assert (weights > 0).all() or cover.overlap == 0
            total[start // unit :][: len(weights)] += weights
        np.testing.assert_allclose(total, 1.0, rtol=1e-5)


def test_where_two_tiles_overlap_the_weights_are_squared_cosines() -> None:
    first, second = Cover(96, 64, 32, 4).weights(1)
    inside = (np.arange(32) + 0.5) / 32
    np.testing.assert_allclose(second[:32], np.sin(np.pi / 2 * inside) ** 2, rtol=1e-5)
    np.testing.assert_allclose(first[32:], np.cos(np.pi / 2 * inside) ** 2, rtol=1e-4)
    assert (first[:32] == 1).all() and (second[32:] == 1).all()  # the scene's own border is no reason to fade


@pytest.mark.parametrize("cover", covers(), ids=str)
@pytest.mark.parametrize("tiles_wide", [0, 1, 3, 1000])
def test_panels_follow_each_other_with_all_tiles_that_count_there(cover: Cover, tiles_wide: int) -> None:
    panels = list(cover.panels(tiles_wide * cover.tile))
    assert panels[0].start == 0 and panels[-1].stop == cover.n_cells
    assert [p.stop for p in panels[:-1]] == [p.start for p in panels[1:]]
    for panel in panels:
        begin, end = panel.start * cover.unit, panel.stop * cover.unit
        assert begin < end
        assert list(panel.tiles) == [s for s in cover.starts if s < end and s + cover.tile > begin]
    if tiles_wide == 1000:
        assert len(panels) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_an_axis_goes_on_as_numpy_pads_it(size: int) -> None:
    values = np.arange(size)
    np.testing.assert_array_equal(values[mirrored(0, size + 25, size)], np.pad(values, (0, 25), mode="symmetric"))
    np.testing.assert_array_equal(mirrored(5, 9, size), mirrored(0, 9, size)[5:])
