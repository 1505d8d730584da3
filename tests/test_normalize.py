"""Normalisation: the formula worked out by hand, its inverse, and what becomes of invalid samples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spectralvae.weights.normalization import Normalization, reject_small

MEAN, STD = np.array([25.0, 24.5, 3.0]), np.array([0.4, 1.5, 0.02])


def normalization(transform: str, mean: np.ndarray = MEAN, std: np.ndarray = STD, clip: float = 10.0) -> Normalization:
    minimum = 1.0 if transform == "log_zscore" else None
    return Normalization(transform, mean, std, clip, minimum, None, None)


def test_log_zscore_by_hand() -> None:
    radiance = np.array([[1e11, 2e10, 19.0], [3e13, 1.0, 25.5]], np.float32)
    z = normalization("log_zscore").normalize(radiance)
    assert z.dtype == np.float64
    for (pixel, c), value in np.ndenumerate(radiance):
        by_hand = (math.log(float(value)) - MEAN[c]) / (STD[c] + 1e-8)
        assert z[pixel, c] == pytest.approx(max(-10.0, min(10.0, by_hand)), rel=1e-14)
    assert np.count_nonzero(np.abs(z) == 10) == 3  # clipped; the others are not


def test_zscore_by_hand_takes_zeros_and_negatives() -> None:
    """With a std of 1e-8 the guard halves z; a maximum of the two, or none, would not."""
    values = np.array([[0.0, -0.25, 3.05, 4e-8]], np.float32)
    mean, std = np.array([0.3, 0.1, 3.0, 0.0]), np.array([0.1, 0.2, 0.02, 1e-8])
    by_hand = [
        (0.0 - 0.3) / (0.1 + 1e-8),
        (-0.25 - 0.1) / (0.2 + 1e-8),
        (float(np.float32(3.05)) - 3.0) / (0.02 + 1e-8),
        float(np.float32(4e-8)) / 2e-8,
    ]
    np.testing.assert_allclose(normalization("zscore", mean, std).normalize(values)[0], by_hand, rtol=1e-12)
    clipped = normalization("zscore", mean, std, clip=1.9).normalize(values)
    np.testing.assert_allclose(clipped[0], np.clip(by_hand, -1.9, 1.9), rtol=1e-12)


@pytest.mark.parametrize("transform", ["log_zscore", "zscore"])
def test_inverse(transform: str) -> None:
    rng = np.random.default_rng(0)
    z = rng.uniform(-9.9, 9.9, (50, 7, 3))
    n = normalization(transform)
    there = n.denormalize(z)
    assert there.dtype == np.float64
    np.testing.assert_allclose(n.normalize(there), z, rtol=0, atol=1e-12)
    np.testing.assert_allclose(n.denormalize(n.normalize(there)), there, rtol=1e-12)
    half = z.astype(np.float16)  # undone in float64: in float16 the radiance would be infinite
    np.testing.assert_array_equal(n.denormalize(half), n.denormalize(half.astype(np.float64)))


@pytest.mark.parametrize("transform", ["log_zscore", "zscore"])
def test_nan_stays_nan_and_only_nan(transform: str) -> None:
    """And so are all samples of a channel without statistics; the input is not changed."""
    rng = np.random.default_rng(1)
    radiance = rng.uniform(10, 20, (6, 5, 3)).astype(np.float32)
    invalid = rng.random(radiance.shape) < 0.3
    radiance[invalid] = np.nan
    before = radiance.copy()
    n = normalization(transform)
    z = n.normalize(radiance)
    np.testing.assert_array_equal(np.isnan(z), invalid)
    np.testing.assert_array_equal(np.isnan(n.denormalize(z)), invalid)
    unknown = normalization(transform, np.array([1.0, np.nan, 1.0]), np.array([1.0, np.nan, 1.0])).normalize(radiance)
    np.testing.assert_array_equal(np.isnan(unknown), invalid | [False, True, False])
    np.testing.assert_array_equal(radiance, before)


def test_small_radiance_is_rejected_never_clamped() -> None:
    """Fill turned into log(min) would look like data: what is below the minimum becomes NaN and is counted."""
    below = np.nextafter(np.float32(1), np.float32(0))
    radiance = np.array([-1e30, -3.0, 0.0, 0.5, below, 1.0, 1.5, np.nan, 1e12], np.float32)
    z = normalization("log_zscore").normalize(np.repeat(radiance[:, None], 3, axis=1))
    assert np.isnan(z[:5]).all()  # nor do they become log(0), clipped to -10
    assert reject_small(radiance, "log_zscore", 1.0) == 5
    np.testing.assert_array_equal(radiance, np.array([np.nan] * 5 + [1.0, 1.5, np.nan, 1e12], np.float32))
