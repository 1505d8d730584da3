"""Metrics from sums, against scikit-learn, numpy over whole arrays, and analytic answers."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

from spectralvae.analysis.metrics import (
    Errors,
    Latents,
    Observed,
    Radiance,
    Truth,
    channel_errors,
    mean_radiance,
    metrics_of,
    scene_metrics,
)

NC, NP = 7, 200
CPU = torch.device("cpu")


def arrays(seed=0, invalid=0.2):
    """z and a reconstruction, (C, P) float64, NaN = invalid; channel 4 is dead, and so is pixel 9."""
    random = np.random.default_rng(seed)
    z = random.normal(0.3, 1.0, (NC, NP)).astype(np.float32).astype(np.float64)
    z_hat = (z + random.normal(0.0, 0.1, z.shape)).astype(np.float32).astype(np.float64)
    if invalid:
        z[random.random(z.shape) < invalid] = np.nan
        z[4], z[:, 9] = np.nan, np.nan
    return z, z_hat


def statistics(logarithmic):
    mean = np.linspace(26.0, 28.0, NC) if logarithmic else np.linspace(1e12, 5e12, NC)
    spread = np.linspace(0.2, 0.5, NC) if logarithmic else np.linspace(1e11, 3e11, NC)
    return mean, spread


def judge(z, z_hat, logarithmic, noise=None):
    """All that is made of sums, which are taken over parts of the pixels; half of these belong to a second scene."""
    radiance = Radiance.of(*statistics(logarithmic), logarithmic=logarithmic, device=CPU)
    truth, errors = Truth.empty(NC, 2), Errors.empty(NC, 2)
    for start in range(0, NP, 40):
        part = slice(start, start + 40)
        observed = Observed(torch.from_numpy(z[:, part]).float(), radiance)
        truth.add(int(start >= 120), observed)
        errors.add(int(start >= 120), *observed.errors(torch.from_numpy(z_hat[:, part]).float()))
    return truth, errors, radiance, metrics_of(truth, errors, radiance, noise)


def in_radiance(z, logarithmic):
    mean, spread = statistics(logarithmic)
    values = spread[:, None] * z + mean[:, None]
    return np.exp(values) if logarithmic else values


def angles(a, b):
    """Degrees between the valid parts of spectra, (C, P) float64; NaN where nothing is valid."""
    dot, aa, bb = (np.where(np.isnan(a), 0.0, x * y).sum(axis=0) for x, y in ((a, b), (a, a), (b, b)))
    with np.errstate(invalid="ignore"):
        return np.degrees(np.arccos(dot / np.sqrt(aa * bb)))


@pytest.mark.parametrize("logarithmic", [True, False])
def test_over_all_samples(logarithmic):
    z, z_hat = arrays()
    noise = np.array([0.1, 0.2, np.nan, 0.05, 0.3, 0.1, 0.1])
    truth, _, _, found = judge(z, z_hat, logarithmic, noise)
    valid = np.isfinite(z)
    a, b = in_radiance(z, logarithmic), in_radiance(z_hat, logarithmic)
    in_noise = ((z_hat - z) / noise[:, None])[valid & np.isfinite(noise)[:, None]]
    with np.errstate(invalid="ignore"):
        means = np.array([np.mean(row[np.isfinite(row)]) if np.isfinite(row).any() else np.nan for row in z])[:, None]
    mse = mean_squared_error(z[valid], z_hat[valid])
    expected = {
        "mse": mse,
        "mae": mean_absolute_error(z[valid], z_hat[valid]),
        "psnr": 10 * np.log10((np.nanmax(z) - np.nanmin(z)) ** 2 / mse),
        "spectral_angle": np.nanmean(angles(a, b)),
        "explained_variance": 1 - np.nansum((z_hat - z) ** 2) / np.nansum((z - means) ** 2),
        "rmse_radiance": np.sqrt(mean_squared_error(a[valid], b[valid])),
        "relative_rmse": np.sqrt(np.nanmean((b / a - 1) ** 2)) if logarithmic else np.nan,
        "noise_ratio": np.sqrt(np.mean(in_noise**2)),
    }
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-6, nan_ok=True), name
    assert truth.n_samples == valid.sum()
    assert truth.peak == pytest.approx(np.nanmax(z) - np.nanmin(z))


def test_explained_variance_is_that_of_scikit_learn():
    z, z_hat = arrays(invalid=0)
    *_, found = judge(z, z_hat, True)
    assert found["explained_variance"] == pytest.approx(r2_score(z.T, z_hat.T, multioutput="variance_weighted"))


def test_the_mean_of_channels_explains_nothing():
    z, _ = arrays()
    means = np.nan_to_num([row[np.isfinite(row)].mean() if np.isfinite(row).any() else 0.0 for row in z])
    *_, found = judge(z, np.broadcast_to(means[:, None], z.shape).copy(), True)
    assert found["explained_variance"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("logarithmic", [True, False])
def test_by_channel(logarithmic):
    z, z_hat = arrays()
    noise = np.linspace(0.1, 0.2, NC)
    truth, errors, radiance, _ = judge(z, z_hat, logarithmic)
    found = channel_errors(truth, errors, radiance, noise)
    alive = np.arange(NC) != 4
    a, b = in_radiance(z, logarithmic), in_radiance(z_hat, logarithmic)
    rmse, in_units, relative, mean = (
        np.sqrt(np.nanmean((z_hat - z)[alive] ** 2, axis=1)),
        np.sqrt(np.nanmean((b - a)[alive] ** 2, axis=1)),
        np.sqrt(np.nanmean((b / a - 1)[alive] ** 2, axis=1)),
        np.nanmean(a[alive], axis=1),
    )
    np.testing.assert_allclose(found["rmse"][alive], rmse, rtol=2e-6)
    np.testing.assert_allclose(found["rmse_radiance"][alive], in_units, rtol=2e-6)
    np.testing.assert_allclose(found["noise"][alive], rmse / noise[alive], rtol=2e-6)
    np.testing.assert_allclose(mean_radiance(truth, radiance)[alive], mean, rtol=2e-6)
    if logarithmic:
        np.testing.assert_allclose(found["relative"][alive], relative, rtol=2e-6)
    else:
        assert np.isnan(found["relative"]).all()
    for name in ("rmse", "rmse_radiance", "relative", "noise"):
        assert np.isnan(found[name][4]), name
    assert channel_errors(truth, errors, radiance, None)["noise"] is None


def test_by_scene():
    z, z_hat = arrays()
    truth, errors, *_ = judge(z, z_hat, True)
    found = scene_metrics(truth, errors)
    for part, scene in zip((slice(0, 120), slice(120, NP)), found, strict=True):
        error = (z_hat - z)[:, part]
        assert scene["mse"] == pytest.approx(np.nanmean(error**2), rel=2e-6)
        assert scene["mae"] == pytest.approx(np.nanmean(np.abs(error)), rel=2e-6)
        degrees = angles(in_radiance(z, True)[:, part], in_radiance(z_hat, True)[:, part])
        assert scene["spectral_angle"] == pytest.approx(np.nanmean(degrees), rel=2e-6)


def test_a_scene_without_a_sample_has_no_metrics():
    z, z_hat = arrays()
    z[:, 120:] = np.nan
    truth, errors, *_ = judge(z, z_hat, True)
    assert all(math.isnan(value) for value in scene_metrics(truth, errors)[1].values())


def test_brightness_is_no_angle():
    """A reconstruction that is 10 % too bright everywhere: known errors, and spectra of the same direction."""
    z, _ = arrays()
    z_hat = z + np.log(1.1) / statistics(True)[1][:, None]
    *_, found = judge(z, np.nan_to_num(z_hat), True)
    assert found["relative_rmse"] == pytest.approx(0.1, rel=1e-5)
    assert found["spectral_angle"] < 1e-5


def test_small_angles_are_not_lost():
    """Of 0.001 degrees, of which the cosine is 1 in float32."""
    mean, spread = statistics(True)
    radiance = Radiance.of(mean, spread, logarithmic=True, device=CPU)
    z = np.random.default_rng(0).normal(size=(NC, 50)).astype(np.float32)
    z_hat = z.copy()
    z_hat[2] += np.float32(1e-4)
    degrees = angles(in_radiance(z.astype(float), True), in_radiance(z_hat.astype(float), True)).mean()
    assert degrees < 0.002
    _, found = Observed(torch.from_numpy(z), radiance).errors(torch.from_numpy(z_hat))
    assert found / 50 == pytest.approx(degrees, rel=1e-2)  # float32 has z_hat - z to 0.1 %


def test_right_angles():
    radiance = Radiance.of(np.zeros(2), np.ones(2), logarithmic=False, device=CPU)
    a = torch.tensor([[1.0, 0.0, 1.0], [0.0, 2.0, 1.0]])
    b = torch.tensor([[0.0, 0.0, -1.0], [3.0, 5.0, -1.0]])
    _, degrees = Observed(a, radiance).errors(b)
    assert degrees == pytest.approx(90 + 0 + 180)


def test_a_perfect_reconstruction():
    z, _ = arrays()
    *_, found = judge(z, np.nan_to_num(z), True, np.full(NC, 0.1))
    assert [found[name] for name in ("mse", "mae", "spectral_angle", "noise_ratio")] == [0, 0, 0, 0]
    assert found["explained_variance"] == 1
    assert math.isnan(found["psnr"])  # no number


def test_noise_of_no_channel_is_known():
    *_, found = judge(*arrays(), True, np.full(NC, np.nan))
    assert math.isnan(found["noise_ratio"])
    *_, found = judge(*arrays(), True, None)
    assert math.isnan(found["noise_ratio"])


def test_bits_of_a_gaussian():
    """Of N(mean, var) to N(0, 1), from torch's own formula, over those cells that count."""
    random = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn((3, 2, 4, 5), generator=random), torch.randn((3, 2, 4, 5), generator=random)
    counts = torch.rand((3, 1, 4, 5), generator=random) < 0.6
    latents = Latents.empty(2)
    for i in range(3):
        latents.add(mean[i : i + 1], logvar[i : i + 1], counts[i : i + 1])
    nats = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean.double(), (0.5 * logvar.double()).exp()),
        torch.distributions.Normal(torch.tensor(0.0).double(), torch.tensor(1.0).double()),
    )
    for e in range(2):
        chosen = counts[:, 0]
        assert latents.bits[e] == pytest.approx(float(nats[:, e][chosen].mean()) / math.log(2), rel=1e-12)
        assert latents.variance[e] == pytest.approx(float(mean[:, e][chosen].double().var(correction=0)), rel=1e-9)


def test_one_bit():
    """A posterior with variance 1/4 and mean^2 = 3/4 is log2(2) = 1 bit from the standard normal."""
    latents = Latents.empty(1)
    shape = (1, 1, 2, 2)
    latents.add(
        torch.full(shape, math.sqrt(0.75)), torch.full(shape, math.log(0.25)), torch.ones(shape, dtype=torch.bool)
    )
    assert latents.bits[0] == pytest.approx(1.0, rel=1e-6)
