"""Sampling: pure in (seed, i), even over all admissible tiles and orientations, never an inadmissible one."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from spectralvae.data import sampling
from spectralvae.data.sampling import Crop, CropSampler, admissible_positions, evenly, grid, noise, turn

NC, TILE = 6, 4


def invalid_counts(seed: int, shape: tuple[int, int] = (13, 17)) -> np.ndarray:
    """(y, x): a third of the pixels has lost some channels, an edge all of them."""
    rng = np.random.default_rng(seed)
    counts = np.where(rng.random(shape) < 0.35, rng.integers(1, NC + 1, shape), 0)
    counts[:, -3:] = NC
    return counts


def brute_force(n_invalid: np.ndarray, tile: int, most: float) -> set[tuple[int, int]]:
    """First pixels of all tiles in which at most so many samples are invalid, counted one tile after the other."""
    ny, nx = n_invalid.shape
    return {
        (y, x)
        for y in range(ny - tile + 1)
        for x in range(nx - tile + 1)
        if n_invalid[y : y + tile, x : x + tile].sum() <= most
    }


def two_scenes(fraction: float = 0.25) -> tuple[list[tuple[int, int, np.ndarray]], set[tuple[int, int, int]]]:
    """Sampler input for scenes number 3 and 5 of a store, and the admissible (scene, y, x)."""
    scenes, allowed = [], set()
    for index, shape in ((3, (13, 17)), (5, (9, 12))):
        n_invalid = invalid_counts(index, shape)
        scenes.append((index, shape[1] - TILE + 1, admissible_positions(n_invalid, NC, TILE, fraction)))
        allowed |= {(index, y, x) for y, x in brute_force(n_invalid, TILE, fraction * TILE * TILE * NC)}
    return scenes, allowed


# --- which tiles are admissible ---------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0, 0.1, 0.25, 0.5, 1])
@pytest.mark.parametrize("tile", [1, 4, 13])
def test_admissible_positions_against_brute_force(fraction: float, tile: int) -> None:
    n_invalid = invalid_counts(0)
    n_invalid[:5, :5] = 0
    width = n_invalid.shape[1] - tile + 1
    found = admissible_positions(n_invalid, NC, tile, fraction)
    assert sorted(found) == found.tolist()
    assert {divmod(int(p), width) for p in found} == brute_force(n_invalid, tile, fraction * tile * tile * NC)


def test_the_limit_itself_is_admissible() -> None:
    """A tile with exactly the largest share is drawn, one sample more is not."""
    n_invalid = np.zeros((4, 4), np.int64)
    n_invalid[0] = NC  # 24 of 96 samples
    assert len(admissible_positions(n_invalid, NC, 4, 0.25)) == 1
    n_invalid[1, 0] = 1
    assert len(admissible_positions(n_invalid, NC, 4, 0.25)) == 0


# --- which tile is sample i -------------------------------------------------------------------


def test_crop_is_pure() -> None:
    scenes, _ = two_scenes()
    forwards = [CropSampler(7, scenes).crop(i) for i in range(300)]
    one = CropSampler(7, scenes)
    backwards = [one.crop(i) for i in reversed(range(300))][::-1]
    assert forwards == backwards
    assert [one.crop(250), one.crop(3), one.crop(250)] == [forwards[250], forwards[3], forwards[250]]
    np.random.default_rng(0).random()
    assert CropSampler(7, scenes).crop(10**12) == CropSampler(7, scenes).crop(10**12)


def test_other_seed_differs() -> None:
    scenes, _ = two_scenes()
    a, b = CropSampler(7, scenes), CropSampler(8, scenes)
    assert sum(a.crop(i) == b.crop(i) for i in range(300)) < 30


def test_only_admissible_tiles_all_of_them_and_evenly() -> None:
    scenes, allowed = two_scenes()
    sampler = CropSampler(1, scenes)
    assert len(sampler) == len(allowed) > 20
    n = 200 * len(allowed)
    drawn = Counter((c.scene, c.y, c.x) for c in map(sampler.crop, range(n)))
    assert set(drawn) == allowed
    # chi-square with k - 1 degrees of freedom: mean k - 1, variance 2 (k - 1)
    k = len(allowed)
    chi_square = sum((drawn[p] - n / k) ** 2 / (n / k) for p in allowed)
    assert abs(chi_square - (k - 1)) < 4 * np.sqrt(2 * (k - 1))


def test_orientations_are_even_and_independent_of_the_place() -> None:
    sampler = CropSampler(2, [(0, 2, np.array([0, 3]))])
    crops = [sampler.crop(i) for i in range(16_000)]
    drawn = Counter((c.y, c.x, c.flip, c.turns) for c in crops)
    assert set(drawn) == {(p, p, flip, turns) for p in (0, 1) for flip in (False, True) for turns in range(4)}
    chi_square = sum((m - 1000) ** 2 / 1000 for m in drawn.values())
    assert chi_square < 15 + 4 * np.sqrt(30)


def test_neighbouring_samples_are_independent() -> None:
    scenes, allowed = two_scenes()
    sampler = CropSampler(3, scenes)
    crops = [sampler.crop(i) for i in range(4000)]
    same = sum(a == b for a, b in pairwise(crops))
    assert same < 3 * 4000 / (8 * len(allowed)) + 5


def test_scene_without_admissible_tile_is_passed_over() -> None:
    sampler = CropSampler(0, [(0, 3, np.array([], np.int64)), (1, 3, np.array([4])), (2, 3, np.array([], np.int64))])
    assert {(c.scene, c.y, c.x) for c in map(sampler.crop, range(50))} == {(1, 1, 1)}


# --- orientations -----------------------------------------------------------------------------


def test_turn_gives_the_eight_symmetries_of_a_square() -> None:
    tile = np.arange(3 * 3 * 2).reshape(3, 3, 2)
    turned = {(flip, turns): turn(tile, Crop(0, 0, 0, flip, turns)) for flip in (False, True) for turns in (0, 1, 2, 3)}
    assert len({t.tobytes() for t in turned.values()}) == 8
    np.testing.assert_array_equal(turned[False, 0], tile)
    np.testing.assert_array_equal(turned[True, 0], tile[::-1])
    np.testing.assert_array_equal(turned[False, 2], tile[::-1, ::-1])
    np.testing.assert_array_equal(turned[False, 1], tile.transpose(1, 0, 2)[::-1])
    for t in turned.values():  # spectra stay whole
        assert {tuple(p) for p in t.reshape(-1, 2)} == {tuple(p) for p in tile.reshape(-1, 2)}


# --- noise ------------------------------------------------------------------------------------


def test_noise_is_standard_normal() -> None:
    values = np.concatenate([noise(5, sampling.NOISE, i, (4, 8, 8)).ravel() for i in range(800)]).astype(np.float64)
    n = len(values)
    assert abs(values.mean()) < 4 / np.sqrt(n)
    assert abs(values.var() - 1) < 4 * np.sqrt(2 / n)
    assert abs((values**3).mean()) < 4 * np.sqrt(15 / n)
    assert abs((values**4).mean() - 3) < 4 * np.sqrt(96 / n)


def test_noise_is_pure() -> None:
    shape = (2, 4, 4)
    first = [noise(5, sampling.NOISE, i, shape) for i in range(20)]
    again = [noise(5, sampling.NOISE, i, list(shape)) for i in reversed(range(20))][::-1]
    np.testing.assert_array_equal(first, again)
    assert first[0].shape == shape
    assert first[0].dtype == np.float32


def test_noise_differs_by_seed_stream_and_sample() -> None:
    draws = [
        noise(seed, stream, i, (64,))
        for seed in (0, 1, 2**63 - 1)
        for stream in (sampling.NOISE, sampling.VALIDATION_NOISE, sampling.TILES)
        for i in (0, 1, 2)
    ]
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 0.6  # 64 samples: 0.125 a standard deviation; shared numbers give 1


def test_samples_do_not_overlap() -> None:
    """A long draw of sample i holds nothing of sample i + 1's: each has its own part of the counter."""
    long = noise(0, sampling.NOISE, 0, (5000,))
    following = noise(0, sampling.NOISE, 1, (50,))
    windows = np.lib.stride_tricks.sliding_window_view(long, 4)
    assert not (windows == following[:4]).all(axis=1).any()


def test_streams_have_their_own_names() -> None:
    assert len({sampling.TILES, sampling.NOISE, sampling.VALIDATION_NOISE}) == 3


# --- the fixed grid ---------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 3, 8])
def test_grid_covers_every_pixel(tile: int) -> None:
    for size in range(tile, 40):
        starts = grid(size, tile)
        covered = {p for s in starts for p in range(s, s + tile)}
        assert covered == set(range(size))
        assert len(starts) == len(set(starts)) == -(-size // tile)  # no more tiles than needed
        assert starts == sorted(starts)


def test_evenly() -> None:
    assert evenly(5, 10) == [0, 1, 2, 3, 4]
    assert evenly(0, 10) == []
    for n, most in ((10, 5), (100, 7), (64, 64), (9, 4)):
        chosen = evenly(n, most)
        assert len(chosen) == most
        assert chosen[0] == 0
        assert set(chosen) <= set(range(n))
        gaps = np.diff([*chosen, n])
        assert gaps.max() - gaps.min() <= 1
