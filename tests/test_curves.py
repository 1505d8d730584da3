"""Curves of a bounded size: nothing is lost but detail, and history does not matter."""

import math

import numpy as np
import pandas as pd
import pytest

from spectralvae.training.curves import RESOLUTION, Curve, bin_of


def noisy(n, seed=0):
    """Values that fall through zero, with heavy tails."""
    random = np.random.default_rng(seed)
    return 1000 * np.exp(-np.arange(n) / (n / 5)) - 300 + 20 * random.standard_t(3, n)


def curve_of(steps, values):
    curve = Curve()
    for step, value in zip(steps, values, strict=True):
        curve.add(int(step), float(value))
    return curve


@pytest.mark.parametrize(("n", "every"), [(1, 1), (RESOLUTION + 2, 1), (20_001, 10), (30_000, 1), (700, 997)])
def test_bins_against_the_whole_series(n, every):
    """Means and extremes of each bin, whose limits follow from the definition: R ln(step/R) is whole there."""
    steps, values = np.arange(n) * every, noisy(n)
    numbers = np.where(
        steps <= RESOLUTION, steps, RESOLUTION + np.floor(RESOLUTION * np.log(np.maximum(steps, 1) / RESOLUTION))
    )
    groups = pd.Series(values).groupby(numbers)
    points = curve_of(steps, values).points()
    assert points.low.tolist() == groups.min().tolist()
    assert points.high.tolist() == groups.max().tolist()
    assert points.mean == pytest.approx(groups.mean().to_numpy(), rel=1e-12, abs=1e-9)
    assert points.step.tolist() == pd.Series(steps).groupby(numbers).max().tolist()
    assert (points.low.min(), points.high.max()) == (values.min(), values.max())
    assert all(column.dtype == np.float64 and len(column) == len(points.step) for column in points)


def test_bins_are_narrow_and_few():
    """No wider than 1/R of the step they end at (give or take that steps are whole): seen on no axis."""
    steps = np.arange(1, 200_001)
    numbers = np.array([bin_of(int(step)) for step in steps])
    assert (np.diff(numbers) >= 0).all() and (np.diff(numbers) <= 1).all()
    _, widths = np.unique(numbers, return_counts=True)
    assert (widths <= np.cumsum(widths) / RESOLUTION + 1).all()
    assert bin_of(200_000) < RESOLUTION * (1 + math.log(200_000 / RESOLUTION)) + 1 < 3500


@pytest.mark.parametrize("n", [1, 100, 5000])
def test_smoothing_is_an_exponential_mean(n):
    """Pandas' own, in which a row is as much later than the one before as makes it forget as much."""
    values = noisy(n)
    rows = np.arange(1, n + 1)
    horizon = np.minimum(np.maximum(20, rows / 50), 1 + rows / 6)
    halvings = -np.log2(1 - 1 / horizon)
    times = pd.Timestamp("2000-01-01") + pd.to_timedelta(np.cumsum(halvings), unit="D")
    expected = pd.Series(values).ewm(halflife="1D", times=times, adjust=True).mean()
    points = curve_of(range(n), values).points()
    assert points.smooth == pytest.approx(expected.to_numpy()[points.step.astype(int)], rel=1e-7, abs=1e-7)


def test_constant_stays_exactly_constant():
    points = curve_of(range(3000), [-7.25] * 3000).points()
    assert (points.mean == -7.25).all()


def test_first_and_last_are_raw():
    curve = Curve()
    assert (curve.first, curve.last, len(curve.points().step)) == (None, None, 0)
    for step in range(9_000, 9_010):  # one bin
        curve.add(step, step / 3)
    before = curve.points()
    curve.add(9_010, 1e6)
    assert before.high.tolist() == [9009 / 3]  # points are copies
    assert (curve.first, curve.last, curve.newest) == (3000.0, 1e6, 9010)


def test_not_finite_hides_nothing_else():
    values = noisy(6000)
    broken = values.copy()
    broken[[0, 40, 5990, 5991, 5992]] = [np.nan, np.inf, -np.inf, np.nan, np.nan]
    curve = curve_of(range(6000), broken)
    points = curve.points()
    assert all(np.isfinite(column).all() for column in points)
    assert list(curve.not_finite) == [0, 40, 5990]  # one a bin
    finite = values[np.isfinite(broken)]
    assert (points.low.min(), points.high.max()) == (finite.min(), finite.max())
    assert math.isnan(curve.first)


def test_steps_only_grow():
    curve = curve_of([3], [1.0])
    with pytest.raises(AssertionError, match="step 3 after 3"):
        curve.add(3, 1.0)
