"""The objective against the network's own loss, and how metrics add up."""

import math

import numpy as np
import pytest
import torch
from tiny import N_CHANNELS, tiny_model

from spectralvae.runtime.ranks import Ranks
from spectralvae.training.objective import Objective, add, means, to_host
from spectralvae.training.supervision import Supervision

METRICS = ("loss", "nll_loss", "kl_loss", "pixel_mse")  # of every run


@pytest.fixture
def batch():
    """x with invalid samples, mask, noise and targets of one product."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(4, N_CHANNELS, 8, 8, generator=random)
    mask = torch.rand(x.shape, generator=random) > 0.2
    targets = torch.randn(4, 1, 4, 4, generator=random)
    targets[:, :, 0] = torch.nan
    return x.masked_fill(~mask, torch.nan), mask, torch.randn(4, 3, 4, 4, generator=random), targets


def test_loss_and_metrics_are_the_networks(batch):
    x, mask, noise, _ = batch
    loss, metrics = tiny_model().get_loss(x, mask, noise)
    outcome = Objective(tiny_model())(x, mask, noise)
    assert torch.equal(outcome.loss, loss)
    assert means(to_host(outcome.sums)) == pytest.approx({key: float(metrics[key]) for key in METRICS}, rel=1e-12)
    weights = {name: weight for name, (_, weight) in to_host(outcome.sums).items()}
    assert weights == {"loss": 4, "nll_loss": 4, "kl_loss": 4, "pixel_mse": int(mask.sum())}


def test_zeros_decode_the_mode(batch):
    x, mask, noise, _ = batch
    model = tiny_model()
    found = Objective(model).reconstruct(x, mask, torch.zeros_like(noise))
    assert torch.equal(found.latents, found.posterior.mode())
    assert torch.equal(found.x_hat, model.decode(model.encode(x.nan_to_num()).mode()))


def test_the_head_sees_the_sample_in_training_and_the_mode_in_validation(batch):
    x, mask, noise, targets = batch
    objective = Objective(tiny_model(), Supervision({"NO2": 2.0}, 3, [], seed=0))
    with torch.no_grad():
        objective.supervision.layers[-1].weight.normal_()
    valid = ~targets.isnan()
    for training in (True, False):
        found = objective.train(training)(x, mask, noise, targets)
        latents = found.reconstruction.latents if training else found.reconstruction.posterior.mode()
        expected = (objective.supervision.layers(latents) - targets)[valid].square().detach()
        total, weight = to_host(found.sums)["supervision_NO2"]
        assert (total, weight) == (pytest.approx(float(expected.sum()), rel=1e-5), int(valid.sum()))
    assert {*METRICS, "supervision_NO2"} <= found.sums.keys()


def test_metrics_of_two_batches_are_those_of_both(batch):
    x, mask, noise, _ = batch
    objective = Objective(tiny_model())
    parts = [objective(x[some], mask[some], noise[some]).sums for some in (slice(0, 1), slice(1, 4))]
    together = means(to_host(add(add({}, parts[0]), parts[1])))
    assert together == pytest.approx(means(to_host(objective(x, mask, noise).sums)), rel=1e-6)


def test_a_metric_of_nothing_is_left_out_and_one_that_is_no_number_stays():
    found = means({"a": (3.0, 2.0), "nothing": (0.0, 0.0), "broken": (math.nan, 0.0), "b": np.array([1.0, 4.0])})
    assert {key: value for key, value in found.items() if key != "broken"} == {"a": 1.5, "b": 0.25}
    assert math.isnan(found["broken"])


def test_named_sums_keep_their_shapes():
    named = {"a": (1.0, 2.0), "table": np.arange(6.0).reshape(2, 3), "flag": 1.0}
    found = Ranks().add(named)
    assert {name: array.shape for name, array in found.items()} == {"a": (2,), "table": (2, 3), "flag": ()}
    assert all(np.array_equal(found[name], named[name]) for name in named)
