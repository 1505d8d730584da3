"""Metrics from sums, against scikit-learn, numpy over whole arrays, and analytic answers."""

import math

import numpy as np
import pytest
import torch
from evaluations import angles, channels_by_hand, in_radiance, metrics_by_hand
from sklearn.metrics import r2_score

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


def judge(z, z_hat, logarithmic, noise=None, scenes=(0, 0, 0, 1, 1)):
    """All that is made of sums, which are taken over parts of the pixels; each belongs to a scene."""
    radiance = Radiance.of(*statistics(logarithmic), logarithmic=logarithmic, device=CPU)
    truth, errors = Truth.empty(NC, max(scenes) + 1), Errors.empty(NC, max(scenes) + 1)
    for i, scene in enumerate(scenes):
        part = slice(40 * i, 40 * i + 40)
        observed = Observed(torch.from_numpy(z[:, part]).float(), radiance)
        truth.add(scene, observed.sums().numpy())
        errors.add(scene, observed.errors(torch.from_numpy(z_hat[:, part]).float()).numpy())
    return truth, errors, radiance, metrics_of(truth, errors, radiance, noise)


NOISE = np.array([0.1, 0.2, np.nan, 0.05, 0.3, 0.1, 0.1])


@pytest.mark.parametrize("logarithmic", [True, False])
@pytest.mark.parametrize("invalid", [0.2, 0])
def test_over_all_samples_and_by_channel(logarithmic, invalid):
    z, z_hat = arrays(invalid=invalid)
    truth, errors, radiance, found = judge(z, z_hat, logarithmic, NOISE)
    by_hand = (z.T, z_hat.T, *statistics(logarithmic), logarithmic, NOISE)
    expected = metrics_by_hand(*by_hand)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-6, nan_ok=True), name
    if not invalid:
        assert found["explained_variance"] == pytest.approx(r2_score(z.T, z_hat.T, multioutput="variance_weighted"))
    assert truth.n_samples == np.isfinite(z).sum()
    assert truth.peak == pytest.approx(np.nanmax(z) - np.nanmin(z))
    by_channel = channel_errors(truth, errors, radiance, NOISE) | {"mean": mean_radiance(truth, radiance)}
    for name, values in channels_by_hand(*by_hand).items():
        np.testing.assert_allclose(by_channel[name], values, rtol=2e-6, err_msg=name)


def test_by_scene():
    """A third scene, without a sample, has no metrics."""
    z, z_hat = arrays()
    z[:, 160:] = np.nan
    truth, errors, *_ = judge(z, z_hat, True, scenes=(0, 0, 0, 1, 2))
    *found, empty = scene_metrics(truth, errors)
    assert all(math.isnan(value) for value in empty.values())
    for part, scene in zip((slice(0, 120), slice(120, 160)), found, strict=True):
        error = (z_hat - z)[:, part]
        assert scene["mse"] == pytest.approx(np.nanmean(error**2), rel=2e-6)
        assert scene["mae"] == pytest.approx(np.nanmean(np.abs(error)), rel=2e-6)
        a, b = (in_radiance(values[:, part].T, *statistics(True), True) for values in (z, z_hat))
        assert scene["spectral_angle"] == pytest.approx(angles(a, b).mean(), rel=2e-6)


def test_small_angles_are_not_lost():
    """Of 0.001 degrees, of which the cosine is 1 in float32."""
    mean, spread = statistics(True)
    radiance = Radiance.of(mean, spread, logarithmic=True, device=CPU)
    z = np.random.default_rng(0).normal(size=(NC, 50)).astype(np.float32)
    z_hat = z.copy()
    z_hat[2] += np.float32(1e-4)
    degrees = angles(*(in_radiance(values.T.astype(float), mean, spread, True) for values in (z, z_hat))).mean()
    assert degrees < 0.002
    *_, found, n_valid = Observed(torch.from_numpy(z), radiance).errors(torch.from_numpy(z_hat)).tolist()
    assert n_valid == z.size
    assert found / 50 == pytest.approx(degrees, rel=1e-2)  # float32 has z_hat - z to 0.1 %


def test_right_angles():
    radiance = Radiance.of(np.zeros(2), np.ones(2), logarithmic=False, device=CPU)
    a = torch.tensor([[1.0, 0.0, 1.0], [0.0, 2.0, 1.0]])
    b = torch.tensor([[0.0, 0.0, -1.0], [3.0, 5.0, -1.0]])
    *_, degrees, _ = Observed(a, radiance).errors(b).tolist()
    assert degrees == pytest.approx(90 + 0 + 180)


def test_a_perfect_reconstruction():
    z, _ = arrays()
    *_, found = judge(z, np.nan_to_num(z), True, np.full(NC, 0.1))
    assert [found[name] for name in ("mse", "mae", "spectral_angle", "noise_ratio")] == [0, 0, 0, 0]
    assert found["explained_variance"] == 1
    assert math.isnan(found["psnr"])  # no number


@pytest.mark.parametrize("noise", [None, np.full(NC, np.nan)])
def test_noise_of_no_channel_is_known(noise):
    truth, errors, radiance, found = judge(*arrays(), True, noise)
    assert math.isnan(found["noise_ratio"])
    by_channel = channel_errors(truth, errors, radiance, noise)["noise"]
    assert by_channel is None if noise is None else np.isnan(by_channel).all()


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
