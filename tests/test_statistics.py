"""Moments equal numpy's over all samples, medians of ratios come within 1 %, whatever the pieces and their order."""

from __future__ import annotations

import warnings
from functools import reduce

import numpy as np
import pytest

from spectralvae.data.statistics import Moments, RatioHistogram

N, NC = 4000, 5


def samples(kind: str) -> np.ndarray:
    """(N, NC) with invalid ones; "offset": mean 1e6, std 1e-2, where E[x^2] - E[x]^2 leaves no digit."""
    rng = np.random.default_rng(2)
    if kind == "log_radiance":
        values = rng.normal([25, 26, 27, 28, 29], [0.1, 0.4, 0.8, 2, 4], (N, NC))
    elif kind == "offset":
        values = 1e6 + rng.normal(0, 1e-2, (N, NC))
    elif kind == "float32":  # summed in float64
        values = (1e4 + rng.normal(0, 0.1, (N, NC))).astype(np.float32)
    else:
        values = rng.exponential(1.0, (N, NC)) * 10.0 ** np.arange(-10, 10, 4)
    invalid = rng.random(values.shape) < 0.1
    values[invalid] = rng.choice([np.nan, np.inf, -np.inf], invalid.sum())
    return values


def check(moments: Moments, values: np.ndarray) -> None:
    """Against numpy, in extended precision; where a mean's last digit is not far below std, std suffers with it."""
    values = np.where(np.isfinite(values), values, np.nan).astype(np.float64)
    exact = values.astype(np.longdouble)
    std = np.nanstd(exact, axis=0).astype(float)
    last_digit = np.spacing(np.abs(np.nanmax(values, axis=0)))
    np.testing.assert_array_equal(moments.count, np.isfinite(values).sum(axis=0))
    assert moments.count.dtype == np.int64
    np.testing.assert_allclose(moments.mean, np.nanmean(exact, axis=0).astype(float), rtol=1e-10)
    np.testing.assert_array_less(np.abs(moments.std - std), 1e-10 * std + last_digit)
    np.testing.assert_array_equal(moments.minimum, np.nanmin(values, axis=0))
    np.testing.assert_array_equal(moments.maximum, np.nanmax(values, axis=0))


def merged(pieces: list[np.ndarray]) -> Moments:
    return reduce(Moments.merge, map(Moments.of, pieces), Moments.empty(pieces[0].shape[-1]))


@pytest.mark.parametrize("kind", ["log_radiance", "offset", "float32", "wide"])
def test_any_pieces_order_and_tree(kind: str) -> None:
    values = samples(kind)
    values[:2000, 1] = np.nan  # a channel that begins late
    for cuts in ([], [1, 2, 3, 3999], list(range(7, N, 7))):
        check(merged([piece.reshape(-1, 1, NC) for piece in np.split(values, cuts)]), values)
    # of far apart means, and merged pairwise, as parallel workers would
    parts = [Moments.of(rows) for rows in np.array_split(np.sort(values, axis=0), 37)]
    while len(parts) > 1:
        parts = [parts[i].merge(parts[i + 1]) if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)]
    check(parts[0], values)


def test_channels_without_samples() -> None:
    """And no warning."""
    values = samples("log_radiance")
    values[:, 2] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moments = merged(np.split(values, [11, 300]))
        std = moments.std
    assert (moments.count[2], moments.minimum[2], moments.maximum[2]) == (0, np.inf, -np.inf)
    assert np.isnan(std[2])
    check(merged([values[:11, [0, 1, 3, 4]], values[11:, [0, 1, 3, 4]]]), values[:, [0, 1, 3, 4]])


# --- medians of ratios ----------------------------------------------------------------------------


def ratios() -> np.ndarray:
    """(N, NC) over twelve decades, skewed, two peaks in the last channel; some of them no ratios at all."""
    rng = np.random.default_rng(5)
    values = rng.lognormal(0, [0.01, 0.3, 1, 3, 0.1], (N, NC)) * 10.0 ** np.array([-7, -4, -2, 0, 1])
    values[: N // 3, 4] *= 1e-3
    odd = rng.random((N, NC)) < 0.2
    values[odd] = rng.choice([np.nan, 0.0, -1e-3, np.inf, -np.inf], odd.sum())
    return values


def with_ones(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numerators and denominators of ratios."""
    return values, np.ones_like(values)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("cuts", [[], list(range(50, N, 50))])
def test_median_within_a_percent(dtype: type, cuts: list[int]) -> None:
    values = ratios().astype(dtype)
    histogram = RatioHistogram.empty(NC)
    for piece in np.split(values, cuts)[::-1]:
        histogram = histogram.merge(RatioHistogram.of(*with_ones(piece.reshape(-1, 1, NC))))
    valid = np.isfinite(values) & (values > 0)
    np.testing.assert_array_equal(histogram.counts.sum(axis=1), valid.sum(axis=0))
    np.testing.assert_allclose(histogram.median(), np.nanmedian(np.where(valid, values, np.nan), axis=0), rtol=0.01)
    np.testing.assert_array_equal(histogram.counts, RatioHistogram.of(*with_ones(values)).counts)


def test_ratios_beyond_the_bins_count_at_the_ends_and_none_has_no_median() -> None:
    """And no warning."""
    values = np.array([[1e-20, 1e10, np.nan], [1e-12, 1e5, 0.0], [1e-5, 1e-5, -1.0]])
    histogram = RatioHistogram.of(*with_ones(values))
    np.testing.assert_array_equal(histogram.counts.sum(axis=1), [3, 3, 0])
    low, high, none = histogram.median()
    assert 1e-8 <= low <= 1.02e-8
    assert 0.98e2 <= high <= 1.02e2
    assert np.isnan(none)
