"""Normalisation: the formula worked out by hand, its inverse, and what becomes of invalid samples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spectralvae.weights.normalization import Normalization, reject_small, transform_values

MEAN, STD = np.array([25.0, 24.5, 3.0]), np.array([0.4, 1.5, 0.02])


def normalization(transform: str, mean: np.ndarray = MEAN, std: np.ndarray = STD, clip: float = 10.0) -> Normalization:
    minimum = 1.0 if transform == "log_zscore" else None
    return Normalization(transform, mean, std, clip, minimum, None, None)


def test_log_zscore_by_hand() -> None:
    radiance = np.array([[1e11, 2e10, 19.0], [3e13, 1.0, 25.5]], np.float32)
    z = normalization("log_zscore").normalize(radiance)
    assert z.dtype == np.float64
    for pixel in range(2):
        for c in range(3):
            by_hand = (math.log(float(radiance[pixel, c])) - MEAN[c]) / (STD[c] + 1e-8)
            assert z[pixel, c] == pytest.approx(max(-10.0, min(10.0, by_hand)), rel=1e-14)
    assert np.abs(z).max() == 10  # both cases were there: clipped and not
    assert np.count_nonzero(np.abs(z) == 10) == 3


def test_zscore_by_hand_takes_zeros_and_negatives() -> None:
    values = np.array([[0.0, -0.25, 3.05]], np.float32)
    assert reject_small(values, "zscore", None) == 0
    mean, std = np.array([0.3, 0.1, 3.0]), np.array([0.1, 0.2, 0.02])
    z = normalization("zscore", mean, std).normalize(values)
    by_hand = [
        (0.0 - 0.3) / (0.1 + 1e-8),
        (-0.25 - 0.1) / (0.2 + 1e-8),
        (float(np.float32(3.05)) - 3.0) / (0.02 + 1e-8),
    ]
    np.testing.assert_allclose(z[0], by_hand, rtol=1e-12)


def test_epsilon_is_added_to_std() -> None:
    """With a std of 1e-8 the guard halves z; a maximum of the two, or none, would not."""
    z = normalization("zscore", np.zeros(1), np.array([1e-8])).normalize(np.array([[4e-8]]))
    assert z[0, 0] == pytest.approx(2.0, rel=1e-12)


def test_clip_is_the_configs() -> None:
    z = normalization("zscore", np.zeros(1), np.ones(1), clip=2.5).normalize(np.array([[-7.0], [7.0], [1.0]]))
    np.testing.assert_allclose(z[:, 0], [-2.5, 2.5, 1.0], rtol=1e-7)


@pytest.mark.parametrize("transform", ["log_zscore", "zscore"])
def test_inverse(transform: str) -> None:
    rng = np.random.default_rng(0)
    z = rng.uniform(-9.9, 9.9, (50, 7, 3))
    n = normalization(transform)
    there = n.denormalize(z)
    assert there.dtype == np.float64
    np.testing.assert_allclose(n.normalize(there), z, rtol=0, atol=1e-12)
    np.testing.assert_allclose(n.denormalize(n.normalize(there)), there, rtol=1e-12)


def test_denormalize_by_hand_and_float16() -> None:
    """A float16 z is undone in float64: in float16 the radiance would be infinite."""
    z = np.array([[1.5, -2.0, 0.25]], np.float16)
    by_hand = [math.exp(v * (s + 1e-8) + m) for v, m, s in zip([1.5, -2.0, 0.25], MEAN, STD, strict=True)]
    np.testing.assert_allclose(normalization("log_zscore").denormalize(z)[0], by_hand, rtol=1e-13)


@pytest.mark.parametrize("transform", ["log_zscore", "zscore"])
def test_nan_stays_nan_and_only_nan(transform: str) -> None:
    rng = np.random.default_rng(1)
    radiance = rng.uniform(10, 20, (6, 5, 3)).astype(np.float32)
    invalid = rng.random(radiance.shape) < 0.3
    radiance[invalid] = np.nan
    n = normalization(transform)
    z = n.normalize(radiance)
    np.testing.assert_array_equal(np.isnan(z), invalid)
    np.testing.assert_array_equal(np.isnan(n.denormalize(z)), invalid)


def test_input_is_not_changed() -> None:
    radiance = np.full((2, 3), 1e11)
    z = np.zeros((2, 3))
    n = normalization("log_zscore")
    n.normalize(radiance)
    n.denormalize(z)
    transform_values(radiance, "log_zscore")
    assert (radiance == 1e11).all()
    assert (z == 0).all()


def test_channel_without_statistics_is_nan_everywhere() -> None:
    mean, std = MEAN.copy(), STD.copy()
    mean[1] = std[1] = np.nan
    z = normalization("log_zscore", mean, std).normalize(np.full((4, 3), 1e11, np.float32))
    assert np.isnan(z[:, 1]).all()
    assert np.isfinite(z[:, [0, 2]]).all()


def test_small_radiance_is_rejected_never_clamped() -> None:
    """Fill turned into log(min) would look like data: what is below the minimum becomes NaN and is counted."""
    below = np.nextafter(np.float32(1), np.float32(0))
    radiance = np.array([-1e30, -3.0, 0.0, 0.5, below, 1.0, 1.5, np.nan, 1e12], np.float32)
    assert reject_small(radiance, "log_zscore", 1.0) == 5
    np.testing.assert_array_equal(radiance, np.array([np.nan] * 5 + [1.0, 1.5, np.nan, 1e12], np.float32))
    assert reject_small(radiance, "log_zscore", 2.0) == 2
    np.testing.assert_array_equal(np.isfinite(radiance), [False] * 8 + [True])


@pytest.mark.parametrize("value", [-1e30, -1.0, 0.0, 0.99])
def test_small_radiance_never_becomes_z(value: float) -> None:
    """log(0) clipped to -10 would look like data."""
    assert np.isnan(normalization("log_zscore").normalize(np.full((2, 3), value))).all()


def test_zscore_rejects_nothing() -> None:
    values = np.array([-1e3, 0.0, np.nan, 2.0], np.float32)
    before = values.copy()
    assert reject_small(values, "zscore", None) == 0
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("wavelength", [None, np.array([400.0, 500.0, 600.0])])
def test_parts_and_back(wavelength: np.ndarray | None) -> None:
    n = Normalization("log_zscore", MEAN, STD, 8.0, 2.0, "band_290_490_nm", wavelength)
    again = Normalization.from_parts(n.settings(), n.arrays())
    assert again.settings() == n.settings()
    assert again.n_channels == 3
    assert set(again.arrays()) == set(n.arrays()) == {"mean", "std"} | (set() if wavelength is None else {"wavelength"})
    for name, values in n.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], values)
