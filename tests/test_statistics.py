"""Moments equal numpy's over all samples, medians of ratios come within 1 %, whatever the pieces and their order."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from spectralvae.data.statistics import Moments, RatioHistogram

N, NC = 4000, 5


def samples(kind: str) -> np.ndarray:
    """(N, NC) float64 with NaN; "offset": mean 1e6, std 1e-2, where E[x^2] - E[x]^2 leaves no digit."""
    rng = np.random.default_rng(2)
    if kind == "log_radiance":
        values = rng.normal([25, 26, 27, 28, 29], [0.1, 0.4, 0.8, 2, 4], (N, NC))
    elif kind == "offset":
        values = 1e6 + rng.normal(0, 1e-2, (N, NC))
    else:
        values = rng.exponential(1.0, (N, NC)) * 10.0 ** np.arange(-10, 10, 4)
    values[rng.random(values.shape) < 0.1] = np.nan
    return values


def check(moments: Moments, values: np.ndarray) -> None:
    """Against numpy, in extended precision: plain float64 sums are not exact themselves.

    A mean cannot be kept better than to its last digit; where that is not far below std, std suffers with it.
    """
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
    total = Moments.empty(NC)
    for piece in pieces:
        total = total.merge(Moments.of(piece))
    return total


@pytest.mark.parametrize("kind", ["log_radiance", "offset", "wide"])
@pytest.mark.parametrize("cuts", [[], [1], [1500], [1, 2, 3, 3999], list(range(7, N, 7))])
def test_any_pieces(kind: str, cuts: list[int]) -> None:
    values = samples(kind)
    check(merged(np.split(values, cuts)), values)


@pytest.mark.parametrize("kind", ["log_radiance", "offset", "wide"])
def test_any_order_and_tree(kind: str) -> None:
    values = samples(kind)
    rng = np.random.default_rng(3)
    parts = [Moments.of(values[rows]) for rows in np.array_split(rng.permutation(N), 37)]
    while len(parts) > 1:  # merged pairwise, as parallel workers would
        parts = [parts[i].merge(parts[i + 1]) if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)]
    check(parts[0], values)


def test_leading_axes_are_samples() -> None:
    values = samples("log_radiance")
    check(Moments.of(values.reshape(40, 100, NC)), values)


def test_pieces_far_apart() -> None:
    """Pieces of different means: the term between them counts (and is not the mean of the variances)."""
    low, high = np.full((10, 1), -50.0) + np.arange(10)[:, None], np.full((30, 1), 1000.0)
    check(Moments.of(low).merge(Moments.of(high)), np.concatenate([low, high]))


def test_float32_is_summed_in_float64() -> None:
    values = (1e4 + np.random.default_rng(4).normal(0, 0.1, (20_000, 2))).astype(np.float32)
    check(Moments.of(values), values.astype(np.float64))


def test_channels_without_samples() -> None:
    values = samples("log_radiance")
    values[:, 2] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moments = merged(np.split(values, [11, 300]))
        std = moments.std
    assert moments.count[2] == 0
    assert np.isnan(std[2])
    assert (moments.minimum[2], moments.maximum[2]) == (np.inf, -np.inf)
    rest = [0, 1, 3, 4]
    np.testing.assert_allclose(moments.mean[rest], np.nanmean(values[:, rest], axis=0), rtol=1e-10)
    np.testing.assert_allclose(std[rest], np.nanstd(values[:, rest], axis=0), rtol=1e-10)


def test_channel_that_begins_late() -> None:
    values = samples("log_radiance")
    values[:2000, 1] = np.nan
    check(merged(np.split(values, [1000, 2000, 3000])), values)


def test_merge_with_empty_changes_nothing() -> None:
    moments = Moments.of(samples("wide"))
    empty = Moments.empty(NC)
    no_rows = Moments.of(np.empty((0, NC)))
    for other in (empty, no_rows):
        for both in (moments.merge(other), other.merge(moments)):
            for name, value in vars(moments).items():
                np.testing.assert_array_equal(getattr(both, name), value)
    assert (empty.merge(empty).count == 0).all()
    assert np.isnan(empty.merge(no_rows).std).all()


def test_single_sample_has_no_spread() -> None:
    moments = Moments.of(np.array([[3.5, np.nan]]))
    np.testing.assert_array_equal(moments.count, [1, 0])
    np.testing.assert_array_equal(moments.std, [0, np.nan])


def test_infinite_samples_are_not_valid() -> None:
    moments = Moments.of(np.array([[1.0], [np.inf], [3.0], [-np.inf]]))
    assert (moments.count[0], moments.mean[0], moments.std[0]) == (2, 2.0, 1.0)


# --- medians of ratios ----------------------------------------------------------------------------


def ratios() -> np.ndarray:
    """(N, NC) over twelve decades, skewed, two peaks in the last channel; some of them no ratios at all."""
    rng = np.random.default_rng(5)
    values = rng.lognormal(0, [0.01, 0.3, 1, 3, 0.1], (N, NC)) * 10.0 ** np.array([-7, -4, -2, 0, 1])
    values[: N // 3, 4] *= 1e-3
    odd = rng.random((N, NC)) < 0.2
    values[odd] = rng.choice([np.nan, 0.0, -1e-3, np.inf, -np.inf], odd.sum())
    return values


def true_median(values: np.ndarray) -> np.ndarray:
    return np.nanmedian(np.where(np.isfinite(values) & (values > 0), values, np.nan), axis=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("cuts", [[], [1, 2, 700], list(range(50, N, 50))])
def test_median_within_a_percent(dtype: type, cuts: list[int]) -> None:
    values = ratios()
    histogram = RatioHistogram.empty(NC)
    for piece in np.split(values.astype(dtype), cuts)[::-1]:
        histogram = histogram.merge(RatioHistogram.of(piece.reshape(-1, 1, NC)))
    np.testing.assert_array_equal(histogram.counts.sum(axis=1), (np.isfinite(values) & (values > 0)).sum(axis=0))
    np.testing.assert_allclose(histogram.median(), true_median(values), rtol=0.01)


def test_pieces_change_no_bit_of_the_median() -> None:
    values = ratios()
    whole = RatioHistogram.of(values)
    parts = RatioHistogram.of(values[1000:]).merge(RatioHistogram.of(values[:1000]))
    np.testing.assert_array_equal(whole.counts, parts.counts)
    np.testing.assert_array_equal(whole.median(), parts.median())


def test_single_ratio_in_each_bin() -> None:
    """Every bin's own value comes back within its width."""
    values = 1e-8 * np.exp(0.01 * (np.arange(0, 2304, 7) + 0.5))[None, :]
    np.testing.assert_allclose(RatioHistogram.of(values).median(), values[0], rtol=0.01)


def test_ratios_beyond_the_bins_count_at_the_ends() -> None:
    values = np.array([[1e-20, 1e10], [1e-12, 1e5], [1e-5, 1e-5]])
    histogram = RatioHistogram.of(values)
    np.testing.assert_array_equal(histogram.counts.sum(axis=1), [3, 3])
    low, high = histogram.median()
    assert 1e-8 <= low <= 1.02e-8
    assert 0.98e2 <= high <= 1.02e2


def test_no_ratio_no_median() -> None:
    """And no warning."""
    values = np.array([[np.nan, 1e-3], [0.0, 2e-3], [-1.0, 3e-3]])
    median = RatioHistogram.of(values).median()
    assert np.isnan(median[0])
    assert median[1] == pytest.approx(2e-3, rel=0.01)
    assert np.isnan(RatioHistogram.empty(3).median()).all()
