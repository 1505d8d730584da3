"""How well a predicted quantity agrees with its truth, and how sure that is.

Cells of one scene resemble each other, so the interval asks how the scores would change with other scenes: whole
scenes are drawn with replacement (cluster bootstrap; percentile intervals of Efron 1979, Ann. Statist. 7, 1-26, and
Efron & Tibshirani 1993, ch. 13). Of few scenes these intervals are too narrow: in simulations with errors that scenes
share, nominal 95 % were 75 to 81 % of 4 scenes, 83 to 90 % of 8, 87 to 90 % of 16 and 92 to 93 % of 30; and scenes of
one day may share more than the bootstrap knows.
"""

from __future__ import annotations

from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

LEVEL = 0.95
NO_VARIANCE = 1e-12  # share of the sum of squares: less is rounding


class Scores(TypedDict):
    """Scores with the ends of their 95 % intervals; None where they cannot be had, as `score` says."""

    r2: float | None
    r2_low: float | None
    r2_high: float | None
    rmse: float
    rmse_low: float | None
    rmse_high: float | None
    bias: float
    bias_low: float | None
    bias_high: float | None
    n: int
    n_scenes: int


def score(truth: NDArray[Any], predicted: NDArray[Any], scene: NDArray[Any], *, seed: int, n: int = 1000) -> Scores:
    """R2 (coefficient of determination), RMSE and bias of predictions, with intervals over scenes.

    R2 = 1 - sum (predicted - truth)^2 / sum (truth - mean of these truths)^2: 1 is perfect, 0 as good as knowing the
    mean of the test cells beforehand, below 0 worse than that. Bias = mean of predicted - truth.

    Args:
        truth: (cell), finite, at least one.
        predicted: (cell), finite.
        scene: (cell) which scene each is of; only equality counts.
        seed: of the bootstrap: the same seed gives the same intervals.
        n: how many times scenes are drawn.

    Returns:
        RMSE and bias in the units given. Intervals are None if there is one scene. R2 is None if the truths do not
        vary, for then it has no meaning, and so is its interval if those of a drawing of scenes do not.
    """
    assert len(truth) and truth.shape == predicted.shape == scene.shape
    sums = _scene_sums(truth, predicted, scene)
    n_scenes = len(sums)
    r2, rmse, bias = _scores(sums.sum(axis=0))
    if n_scenes > 1:
        drawn = np.random.default_rng(seed).multinomial(n_scenes, np.full(n_scenes, 1 / n_scenes), size=n)
        ends = np.quantile(_scores(drawn @ sums), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)  # NaN if one is
    else:
        ends = np.full((2, 3), np.nan)
    (r2_low, rmse_low, bias_low), (r2_high, rmse_high, bias_high) = ends
    return {
        "r2": _known(r2),
        "r2_low": _known(r2_low),
        "r2_high": _known(r2_high),
        "rmse": float(rmse),
        "rmse_low": _known(rmse_low),
        "rmse_high": _known(rmse_high),
        "bias": float(bias),
        "bias_low": _known(bias_low),
        "bias_high": _known(bias_high),
        "n": len(truth),
        "n_scenes": n_scenes,
    }


def _scene_sums(truth: NDArray[Any], predicted: NDArray[Any], scene: NDArray[Any]) -> Float64:
    """(scene, 5): number of cells, and sums of truth, its square, error, its square; truth from an arbitrary zero.

    Counted from the first truth, sums of squares of values that are nearly alike keep their digits.
    """
    t = truth.astype(np.float64)
    e = predicted.astype(np.float64) - t
    assert np.isfinite(t).all() and np.isfinite(e).all(), "what cannot be judged is left out beforehand"
    t -= t[0]
    _, index = np.unique(scene, return_inverse=True)
    return np.stack([np.bincount(index, weights) for weights in (np.ones(len(t)), t, t**2, e, e**2)], axis=1)


def _scores(sums: Float64) -> Float64:
    """(..., 5) sums -> (3, ...) R2, RMSE, bias; R2 is NaN where the truths do not vary."""
    n, t, t2, e, e2 = np.moveaxis(sums, -1, 0)
    variation = t2 - t**2 / n
    ratio = np.divide(e2, variation, out=np.full(np.shape(n), np.nan), where=variation > NO_VARIANCE * t2)
    return np.stack([1 - ratio, np.sqrt(e2 / n), e / n])


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
