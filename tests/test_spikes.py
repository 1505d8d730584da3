"""Spikes: the planted ones are found, those of ordinary noise are not."""

import json

import numpy as np
import pytest

from spectralvae.training.spikes import LEARNING, SpikeDetector

N = 20_000


def training(kind, noise, seed):
    """A loss (or gradient norm) over N steps: lognormal noise, one step in twenty of twice its width, falling by three
    decades; "through zero" is the likelihood loss whose scale is learned: error / scale + log scale."""
    random = np.random.default_rng(seed)
    steps = np.arange(N)
    trend = {
        "power": 1000 * (1 + steps) ** -0.7,
        "exponential": 1000 * np.exp(-steps / 2000) + 1,
        "level": np.ones(N),
        "through zero": np.maximum(1000 * (1 + steps) ** -0.7, 1),
    }[kind]
    width = noise * np.where(random.random(N) < 0.05, 2, 1)
    error = np.exp(width * random.normal(size=N) - noise**2 / 2)
    if kind == "through zero":
        return 4000 * error + 4000 * np.log(trend / 30), 4000 * error
    return trend * error, trend * error


def found(values):
    detector = SpikeDetector()
    return [step for step, value in enumerate(values.tolist()) if detector.look(value) is not None]


@pytest.mark.parametrize("kind", ["power", "exponential", "level", "through zero"])
@pytest.mark.parametrize(("noise", "share"), [(0.1, 0.97), (0.2, 0.97), (0.3, 0.85)])
def test_ordinary_noise_is_no_spike_and_a_tenfold_error_is(kind, noise, share):
    values, error = training(kind, noise, seed=1)
    assert len(found(values)) <= (1 if noise < 0.3 else 3)
    planted = np.arange(150, N, 500)
    values[planted] += 9 * error[planted]
    hit = set(planted.tolist()).intersection(found(values))
    assert len(hit) >= share * len(planted)
    assert 150 in hit or noise == 0.3


def test_a_drop_and_the_first_steps_are_no_spikes():
    values, _ = training("level", 0.02, 0)  # of 60 typical deviations
    values[5000:] /= 100
    assert not found(values)
    values = np.where(np.arange(LEARNING + 1) % 2, 1.0, 1.1)
    values[50] = values[LEARNING - 1] = 1e6
    assert not found(values)
    values = np.where(np.arange(LEARNING + 1) % 2, 1.0, 1.1)
    values[LEARNING] = 20.0
    assert found(values) == [LEARNING]


def test_spike_tells_how_far_it_stands_out():
    """A square wave of ±1 around 10: the mean absolute deviation is 1."""
    detector = SpikeDetector()
    for step in range(2000):
        assert detector.look(9.0 + 2 * (step % 2)) is None
    assert detector.look(60.0) == pytest.approx(50, rel=0.02)


def test_second_spike_is_found_beside_the_first_and_a_new_level_becomes_usual():
    values, _ = training("level", 0.1, 3)
    values[10_000] *= 1e6
    values[10_001:10_003] *= 100
    assert found(values) == [10_000, 10_001, 10_002]
    values[10_003:] *= 100
    alarms = found(values)
    assert alarms[0] == 10_000
    assert max(alarms) < 10_100


def test_constant_quantities():
    """Rounding of a constant is no spike; nor is the first value after zeros, beside which nothing is typical."""
    values = np.full(500, 5000.0)
    values[300] += 1e-9
    values[400] += 10
    values[450] = 50_000
    assert found(values) == [450]
    zeros = np.zeros(500)
    zeros[300:] = 1e-9
    assert set(found(zeros)) <= set(range(301, 310))


@pytest.mark.parametrize("stop", [1, 77, 5000])
def test_state_through_json_goes_on_bit_equally(stop):
    values, _ = training("through zero", 0.3, 2)
    values[6000] += 1e6
    whole, first = SpikeDetector(), SpikeDetector()
    expected = [whole.look(value) for value in values[:7000].tolist()]
    before = [first.look(value) for value in values[:stop].tolist()]
    state = json.dumps(first.state)
    second = SpikeDetector(given := json.loads(state))
    assert before + [second.look(value) for value in values[stop:7000].tolist()] == expected
    assert json.dumps(given) == state
    assert second.state == whole.state
    assert expected[6000] is not None
