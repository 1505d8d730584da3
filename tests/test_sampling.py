"""Sampling: pure in (seed, i), even over all admissible tiles and orientations, never an inadmissible one."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from refusals import refused

from spectralvae.data import sampling
from spectralvae.data.sampling import CropSampler, evenly, grid, noise, scattered
from spectralvae.errors import ConfigError

NC, TILE = 6, 4


def invalid_counts(seed: int, shape: tuple[int, int] = (13, 17)) -> np.ndarray:
    """(y, x): a third of the pixels has lost some channels, an edge all of them."""
    rng = np.random.default_rng(seed)
    counts = np.where(rng.random(shape) < 0.35, rng.integers(1, NC + 1, shape), 0)
    counts[:, -3:] = NC
    return counts


def brute_force(n_invalid: np.ndarray, most: float, stack: int | None = None, tile: int = TILE) -> set[tuple[int, int]]:
    """First pixels of all tiles in which at most so many samples are invalid, counted one tile after the other."""
    ny, nx = n_invalid.shape
    return {
        (y, x)
        for y in range(ny - tile + 1)
        for x in range(nx - tile + 1)
        if n_invalid[y : y + tile, x : x + tile].sum() <= most
        and (stack is None or len({row // stack for row in range(y, y + tile)}) == 1)
    }


def sampler_of(
    seed: int,
    counts: Mapping[int, np.ndarray],
    fraction: float = 0.25,
    stacks: Mapping[int, int] | None = None,
    tile: int = TILE,
    n_channels: int = NC,
) -> CropSampler:
    """A sampler over scenes with these (y, x) counts of invalid samples."""
    shapes = [(*n.shape, (stacks or {}).get(scene, n.shape[0])) for scene, n in counts.items()]
    return CropSampler(
        seed,
        list(counts),
        np.array(shapes),
        tile_size=tile,
        n_channels=n_channels,
        max_invalid_fraction=fraction,
        count_invalid=lambda scene, y, x, size: int(counts[scene][y : y + size, x : x + size].sum()),
        where="",
        path=Path("store"),
    )


# Scenes number 3 and 5 of a store, of different sizes
TWO = {3: invalid_counts(3), 5: invalid_counts(5, (9, 12))}
ALLOWED = {(scene, y, x) for scene, n in TWO.items() for y, x in brute_force(n, 0.25 * TILE * TILE * NC)}


def check_drawn_evenly(drawn: Iterable[Hashable], allowed: set[Any]) -> None:
    counts = Counter(drawn)
    assert set(counts) == allowed
    assert 1e-4 < scipy.stats.chisquare(list(counts.values())).pvalue < 1 - 1e-4  # as uneven as chance makes it


def places(sampler: CropSampler, n: int) -> list[tuple[int, int, int]]:
    return [(c.scene, c.y, c.x) for c in map(sampler.crop, range(n))]


# --- which tile is sample i -------------------------------------------------------------------


def test_crop_is_a_function_of_seed_and_number() -> None:
    forwards = [sampler_of(7, TWO).crop(i) for i in range(300)]
    one = sampler_of(7, TWO)
    assert one.any_admissible(50)
    assert [one.crop(i) for i in reversed(range(300))][::-1] == forwards
    assert sampler_of(7, TWO).crop(10**12) == sampler_of(7, TWO).crop(10**12)
    other = sampler_of(8, TWO)
    assert sum(a == other.crop(i) for i, a in enumerate(forwards)) < 30
    # neighbours are independent
    crops = [one.crop(i) for i in range(2000)]
    assert sum(a == b for a, b in pairwise(crops)) < 3 * 2000 / (8 * len(ALLOWED)) + 5


def test_only_admissible_tiles_all_of_them_and_evenly() -> None:
    """Scene 3 is a stack of three pieces of five rows, scene 5 of three of exactly a tile, scene 7 an image."""
    counts = {3: invalid_counts(0, (15, 8)), 5: invalid_counts(1, (12, 9)), 7: invalid_counts(2, (6, 8))}
    stacks = {3: 5, 5: TILE}
    most = 0.5 * TILE * TILE * NC
    allowed = {(s, y, x) for s, n in counts.items() for y, x in brute_force(n, most, stacks.get(s))}
    assert {y for s, y, _ in allowed if s == 3} == {0, 1, 5, 6, 10, 11}
    assert {y for s, y, _ in allowed if s == 5} == {0, 4, 8}
    assert 5 < len({(y, x) for s, y, x in allowed if s == 7}) < 3 * 5
    check_drawn_evenly(places(sampler_of(4, counts, 0.5, stacks), 100 * len(allowed)), allowed)


def test_orientations_are_even_and_independent_of_the_place() -> None:
    counts = np.zeros((5, 5), np.int64)
    counts[0, 4] = counts[4, 0] = 1  # of the four places, those on the diagonal are left
    sampler = sampler_of(2, {0: counts}, 0.0)
    allowed = {(p, p, flip, turns) for p in (0, 1) for flip in (False, True) for turns in range(4)}
    check_drawn_evenly([(c.y, c.x, c.flip, c.turns) for c in map(sampler.crop, range(4000))], allowed)


def test_scene_without_admissible_tile_is_passed_over() -> None:
    lost, good = np.full((8, 9), NC), np.full((8, 9), NC)
    good[2:6, 3:7] = 0
    assert set(places(sampler_of(0, {0: lost, 1: good, 2: lost}, 0.0), 20)) == {(1, 2, 3)}
    with refused(ConfigError, "4 x 4", key="data.max_invalid_fraction", value=0.0, path="store"):
        sampler_of(0, {0: lost}, 0.0).crop(5)


@pytest.mark.parametrize(("fraction", "n_channels", "most"), [(0.25, 6, 37), (0.29, 4, 29), (0.07, 4, 7), (0.0, 6, 0)])
def test_the_limit_itself_is_admissible(fraction: float, n_channels: int, most: int) -> None:
    """A tile with exactly the largest share is drawn, one sample more is not (0.29 * 100 is 28.999999999999996)."""
    counts = np.zeros((5, 5), np.int64)
    for n in (most, most + 1):
        counts[2, 1] = n
        sampler = sampler_of(0, {0: counts}, fraction, tile=5, n_channels=n_channels)
        assert sampler.any_admissible(10) == (n == most)


def test_an_archive_costs_four_numbers_a_scene_and_no_lookup() -> None:
    """10,000 granules: the positions are counted, never listed, and their files are not opened."""
    looked_up: list[tuple[int, ...]] = []
    counts = {"count_invalid": lambda *tile: looked_up.append(tile[:3]) or 0, "where": "an archive"}
    shapes = np.broadcast_to([131, 2048, 131], (10_000, 3))
    tracemalloc.start()
    sampler = CropSampler(0, range(10_000), shapes, tile_size=64, n_channels=1028, max_invalid_fraction=0.5, **counts)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 10_000 * (8 * 6 + 32) and looked_up == []  # 32: an index, as Python keeps it
    drawn = places(sampler, 2000)
    assert looked_up == drawn
    for values, last in zip(np.transpose(drawn), (9999, 131 - 64, 2048 - 64), strict=True):
        assert abs(values.mean() - last / 2) < 4 * last / np.sqrt(12 * 2000)  # variance last^2 / 12


# --- noise ------------------------------------------------------------------------------------


def test_noise_is_standard_normal() -> None:
    values = np.concatenate([noise(5, sampling.NOISE, i, (4, 8, 8)).ravel() for i in range(800)])
    assert scipy.stats.kstest(values, "norm").pvalue > 1e-4


def test_noise_is_a_function_of_seed_stream_and_sample() -> None:
    """And a long draw of a sample holds nothing of the next one's: each has its own part of the counter."""
    streams = ("TILES", "NOISE", "VALIDATION_NOISE", "TRIAL", "DROPOUT", "HEAD")
    keys = [(seed, getattr(sampling, s), i) for seed in (0, 1, 2**63 - 1) for s in streams for i in (0, 1, 2)]
    draws = [noise(*key, (4, 16)) for key in keys]
    again = [noise(*key, [4, 16]) for key in reversed(keys)][::-1]
    np.testing.assert_array_equal(draws, again)
    assert (draws[0].shape, draws[0].dtype) == ((4, 16), np.float32)
    correlation = np.corrcoef([draw.ravel() for draw in draws]) - np.eye(len(draws))
    assert np.abs(correlation).max() < 0.6  # 64 samples: 0.125 a standard deviation; shared numbers give 1
    long = noise(0, sampling.NOISE, 0, (5000,))
    following = noise(0, sampling.NOISE, 1, (50,))
    windows = np.lib.stride_tricks.sliding_window_view(long, 4)
    assert not (windows == following[:4]).all(axis=1).any()


# --- the fixed grid ---------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 3, 8])
def test_grid_covers_every_pixel(tile: int) -> None:
    for size in range(tile, 40):
        starts = grid(size, tile)
        assert {p for s in starts for p in range(s, s + tile)} == set(range(size))
        assert len(starts) == -(-size // tile)  # no more tiles than needed
        assert starts == sorted(starts)


def test_evenly_and_scattered() -> None:
    for choose in (evenly, scattered):
        assert (choose(5, 10), choose(0, 10)) == ([0, 1, 2, 3, 4], [])
    for n, most in ((10, 5), (100, 7), (64, 64), (9, 4)):
        gaps = np.diff([*evenly(n, most), n])
        assert len(gaps) == most and gaps.max() - gaps.min() <= 1
    n = 4 * 8 * 16  # scenes of 4 x 8 tiles: every eighth would be one column
    chosen = scattered(n, 64)
    assert chosen == scattered(n, 64)
    assert [i * 64 // n for i in chosen] == list(range(64))  # from everywhere
    assert np.bincount(np.array(chosen) % 8, minlength=8).min() >= 3  # of 8 expected
