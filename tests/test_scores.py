"""Scores against scikit-learn, the bootstrap against drawing scenes for real, intervals against a known answer."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import r2_score

from spectralvae.analysis.scores import score

ENDS = ("r2_low", "r2_high", "rmse_low", "rmse_high", "bias_low", "bias_high")


def cells(seed: int, n_scenes: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth, prediction and scene of cells: scenes differ in size, mean and error."""
    rng = np.random.default_rng(seed)
    scene = np.repeat(np.arange(n_scenes), rng.integers(20, 60, n_scenes))
    truth = rng.normal(size=n_scenes)[scene] + rng.normal(size=len(scene))
    predicted = truth + 0.3 * rng.normal(size=n_scenes)[scene] + 0.5 * rng.normal(size=len(scene))
    order = rng.permutation(len(scene))
    return truth[order], predicted[order], scene[order]


def naive(truth: np.ndarray, predicted: np.ndarray) -> list[float]:
    error = predicted - truth
    return [float(r2_score(truth, predicted)), float(np.sqrt((error**2).mean())), float(error.mean())]


@pytest.mark.parametrize("n_scenes", [1, 7])
def test_against_scikit_learn(n_scenes: int) -> None:
    """One scene has no interval; what scenes are called does not matter, the seed does."""
    truth, predicted, scene = cells(0, n_scenes)
    names = np.array([f"scene {s}" for s in range(n_scenes)])
    found: dict[str, Any] = dict(score(truth, predicted, scene, seed=0))
    assert found == score(truth, predicted, names[scene], seed=0)
    assert (found == score(truth, predicted, scene, seed=1)) == (n_scenes == 1)
    np.testing.assert_allclose([found["r2"], found["rmse"], found["bias"]], naive(truth, predicted), rtol=1e-12)
    assert (found["n"], found["n_scenes"]) == (len(truth), n_scenes)
    assert {found[key] is None for key in ENDS} == {n_scenes == 1}
    json.dumps(found, allow_nan=False)
    predicted[3] = np.nan
    with pytest.raises(AssertionError):
        score(truth, predicted, scene, seed=0)


def test_digits_are_kept_far_from_zero() -> None:
    """Truths of 10^8 that vary by 1, as float32 features could not hold them."""
    truth, predicted, scene = cells(0)
    near, far = (score(truth + shift, predicted + shift, scene, seed=0) for shift in (0, 1e8))
    np.testing.assert_allclose([far[key] for key in ENDS], [near[key] for key in ENDS], rtol=1e-5)  # type: ignore[literal-required]


def test_intervals_are_those_of_drawing_cells_of_scenes() -> None:
    """The same quantiles as a loop that really puts the drawn scenes' cells together."""
    truth, predicted, scene = cells(1)
    members = [np.flatnonzero(scene == s) for s in np.unique(scene)]
    counts = np.random.default_rng(5).multinomial(7, np.full(7, 1 / 7), size=200)
    drawn = []
    for row in counts:
        index = np.concatenate([members[s] for s, times in enumerate(row) for _ in range(times)])
        drawn.append(naive(truth[index], predicted[index]))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    found = score(truth, predicted, scene, seed=5, n=200)
    np.testing.assert_allclose([found[key] for key in ENDS], np.stack([low, high], 1).ravel(), rtol=1e-10)  # type: ignore[literal-required]


def test_intervals_hold_the_truth_and_those_over_cells_do_not() -> None:
    """Errors that scenes share: the bias is 0 by construction, and nothing but scenes tells how uncertain it is."""
    held = {"scenes": 0, "cells": 0}
    n_scenes, repeats = 30, 100
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        scene = np.repeat(np.arange(n_scenes), 12)
        truth = rng.normal(size=len(scene))
        predicted = truth + rng.normal(size=n_scenes)[scene] + 0.3 * rng.normal(size=len(scene))
        for name, groups in (("scenes", scene), ("cells", np.arange(len(scene)))):
            found = score(truth, predicted, groups, seed=seed, n=200)
            held[name] += found["bias_low"] <= 0 <= found["bias_high"]
    assert 0.88 <= held["scenes"] / repeats <= 0.99
    assert held["cells"] / repeats < 0.6


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9 / 3])
def test_truths_that_do_not_vary_have_no_r2(value: float) -> None:
    """Of two scenes, each of one value, half of all drawings are of one scene: R2 has no interval."""
    _, predicted, scene = cells(0)
    found = score(np.full(len(scene), value), predicted, scene, seed=0)
    assert (found["r2"], found["r2_low"], found["r2_high"]) == (None, None, None)
    assert found["bias"] == pytest.approx((predicted - value).mean()) and found["rmse_low"] is not None
    truth = np.repeat([0.1, 0.2], 10)
    found = score(truth, truth + 0.01, np.repeat([0, 1], 10), seed=0)
    assert (found["r2"], found["r2_low"], found["r2_high"]) == (pytest.approx(1 - 0.01**2 / 0.05**2), None, None)
    assert found["bias_low"] == pytest.approx(0.01)
