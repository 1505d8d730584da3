"""Sampling: pure in (seed, i), even over all admissible tiles and orientations, never an inadmissible one."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest

from spectralvae.data import sampling
from spectralvae.data.sampling import Crop, CropSampler, as_read, evenly, grid, noise, scattered
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
        where="the scenes of this test",
    )


# Scenes number 3 and 5 of a store, of different sizes
TWO = {3: invalid_counts(3), 5: invalid_counts(5, (9, 12))}
ALLOWED = {(scene, y, x) for scene, n in TWO.items() for y, x in brute_force(n, 0.25 * TILE * TILE * NC)}


def chi_square_is_likely(observed: list[int]) -> bool:
    """Of k cells that are equally likely: k - 1 degrees of freedom, mean k - 1, variance 2 (k - 1)."""
    k, n = len(observed), sum(observed)
    chi_square = sum((m - n / k) ** 2 / (n / k) for m in observed)
    return abs(chi_square - (k - 1)) < 4 * np.sqrt(2 * (k - 1))


# --- which tile is sample i -------------------------------------------------------------------


def test_crop_is_pure() -> None:
    forwards = [sampler_of(7, TWO).crop(i) for i in range(300)]
    one = sampler_of(7, TWO)
    backwards = [one.crop(i) for i in reversed(range(300))][::-1]
    assert forwards == backwards
    assert [one.crop(250), one.crop(3), one.crop(250)] == [forwards[250], forwards[3], forwards[250]]
    np.random.default_rng(0).random()
    assert sampler_of(7, TWO).crop(10**12) == sampler_of(7, TWO).crop(10**12)


def test_other_seed_differs() -> None:
    a, b = sampler_of(7, TWO), sampler_of(8, TWO)
    assert sum(a.crop(i) == b.crop(i) for i in range(300)) < 30


def test_only_admissible_tiles_all_of_them_and_evenly() -> None:
    """Over scenes of different sizes and different shares of admissible tiles."""
    possible = 10 * 14 + 6 * 9
    assert 20 < len(ALLOWED) < 0.7 * possible
    assert {scene for scene, _, _ in ALLOWED} == {3, 5}
    sampler = sampler_of(1, TWO)
    drawn = Counter((c.scene, c.y, c.x) for c in map(sampler.crop, range(200 * len(ALLOWED))))
    assert set(drawn) == ALLOWED
    assert chi_square_is_likely(list(drawn.values()))


def test_tiles_of_a_stack_are_whole_and_even() -> None:
    """Scene 0 is a stack of three pieces of five rows, scene 1 of three of exactly a tile, scene 2 an image."""
    counts = {0: invalid_counts(0, (15, 8)), 1: invalid_counts(1, (12, 9)), 2: invalid_counts(2, (6, 8))}
    stacks = {0: 5, 1: TILE}
    most = 0.5 * TILE * TILE * NC
    allowed = {(s, y, x) for s, n in counts.items() for y, x in brute_force(n, most, stacks.get(s))}
    assert {y for s, y, _ in allowed if s == 0} == {0, 1, 5, 6, 10, 11}
    assert {y for s, y, _ in allowed if s == 1} == {0, 4, 8}
    sampler = sampler_of(4, counts, 0.5, stacks)
    drawn = Counter((c.scene, c.y, c.x) for c in map(sampler.crop, range(200 * len(allowed))))
    assert set(drawn) == allowed
    assert chi_square_is_likely(list(drawn.values()))


def test_orientations_are_even_and_independent_of_the_place() -> None:
    counts = np.zeros((5, 5), np.int64)
    counts[0, 4] = counts[4, 0] = 1  # of the four places, those on the diagonal are left
    sampler = sampler_of(2, {0: counts}, 0.0)
    crops = [sampler.crop(i) for i in range(16_000)]
    drawn = Counter((c.y, c.x, c.flip, c.turns) for c in crops)
    assert set(drawn) == {(p, p, flip, turns) for p in (0, 1) for flip in (False, True) for turns in range(4)}
    assert chi_square_is_likely(list(drawn.values()))


def test_neighbouring_samples_are_independent() -> None:
    sampler = sampler_of(3, TWO)
    crops = [sampler.crop(i) for i in range(4000)]
    same = sum(a == b for a, b in pairwise(crops))
    assert same < 3 * 4000 / (8 * len(ALLOWED)) + 5


def test_scene_without_admissible_tile_is_passed_over() -> None:
    lost, good = np.full((8, 9), NC), np.full((8, 9), NC)
    good[2:6, 3:7] = 0
    sampler = sampler_of(0, {0: lost, 1: good, 2: lost}, 0.0)
    assert {(c.scene, c.y, c.x) for c in map(sampler.crop, range(50))} == {(1, 2, 3)}


@pytest.mark.parametrize(("fraction", "n_channels", "most"), [(0.25, 6, 37), (0.29, 4, 29), (0.07, 4, 7), (0.0, 6, 0)])
def test_the_limit_itself_is_admissible(fraction: float, n_channels: int, most: int) -> None:
    """A tile with exactly the largest share is drawn, one sample more is not (0.29 * 100 is 28.999999999999996)."""
    counts = np.zeros((5, 5), np.int64)
    counts[2, 1] = most
    assert sampler_of(0, {0: counts}, fraction, tile=5, n_channels=n_channels).crop(0).scene == 0
    counts[4, 4] = 1
    with pytest.raises(ConfigError):
        sampler_of(0, {0: counts}, fraction, tile=5, n_channels=n_channels).crop(0)


def test_no_admissible_tile_is_an_error() -> None:
    sampler = sampler_of(0, {0: np.full((8, 9), NC)}, 0.5)
    with pytest.raises(
        ConfigError, match=r"data\.max_invalid_fraction: 0\.5 leaves hardly a tile of 4 x 4 in the scenes of"
    ):
        sampler.crop(5)


def test_an_archive_costs_four_numbers_a_scene_and_no_lookup() -> None:
    """10,000 granules: the positions are counted, never listed, and their files are not opened."""

    def lookup(scene: int, y: int, x: int, tile_size: int) -> int:
        looked_up.append((scene, y, x))
        return 0

    looked_up: list[tuple[int, int, int]] = []
    shapes = np.broadcast_to([131, 2048, 131], (10_000, 3))
    sampler = CropSampler(
        0,
        range(10_000),
        shapes,
        tile_size=64,
        n_channels=1028,
        max_invalid_fraction=0.5,
        count_invalid=lookup,
        where="an archive",
    )
    assert looked_up == []
    arrays = [v for v in vars(sampler).values() if isinstance(v, np.ndarray)]
    assert sum(a.nbytes for a in arrays) + sys.getsizeof(sampler.scenes) < 10_000 * 8 * 6
    assert not [v for v in vars(sampler).values() if isinstance(v, dict | set)]
    crops = [sampler.crop(i) for i in range(2000)]
    assert looked_up == [(c.scene, c.y, c.x) for c in crops]
    assert {c.y for c in crops} == set(range(131 - 64 + 1))
    n, mean = len(crops), np.mean([[c.scene, c.x] for c in crops], axis=0)
    for found, last in zip(mean, (9999, 2048 - 64), strict=True):  # even: mean last / 2, variance last^2 / 12
        assert abs(found - last / 2) < 4 * last / np.sqrt(12 * n)


# --- orientations -----------------------------------------------------------------------------


def test_as_read_undoes_the_eight_symmetries_of_a_square() -> None:
    tile = np.arange(3 * 3 * 2).reshape(3, 3, 2)
    finished = {}
    for flip in (False, True):
        for turns in range(4):
            out = np.empty_like(tile)
            as_read(out, Crop(0, 0, 0, flip, turns))[...] = tile
            np.testing.assert_array_equal(out, np.rot90(np.flipud(tile) if flip else tile, turns))
            finished[flip, turns] = out
    assert len({t.tobytes() for t in finished.values()}) == 8
    np.testing.assert_array_equal(finished[False, 1], tile.transpose(1, 0, 2)[::-1])
    for t in finished.values():  # spectra stay whole
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


def test_scattered_over_all_columns_of_a_grid() -> None:
    assert scattered(5, 10) == [0, 1, 2, 3, 4]
    assert scattered(0, 10) == []
    chosen = scattered(4 * 8 * 16, 64)  # scenes of 4 x 8 tiles: every eighth would be one column
    assert chosen == sorted(set(chosen)) == scattered(4 * 8 * 16, 64)
    assert [i * 64 // (4 * 8 * 16) for i in chosen] == list(range(64))  # from everywhere
    columns = np.bincount(np.array(chosen) % 8, minlength=8)
    assert columns.min() >= 3  # of 8 expected
