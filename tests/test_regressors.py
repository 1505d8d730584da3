"""Probes: the ridge against scikit-learn's own search, the network against what it must and must not learn."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from spectralvae.analysis import regressors
from spectralvae.analysis.regressors import STRENGTHS, Fitted, fit_linear, fit_mlp
from spectralvae.errors import InputError

FITS: dict[str, Callable[..., Fitted]] = {"linear": fit_linear, "mlp": fit_mlp}


def spectra(seed: int, n_scenes: int = 7, k: int = 30) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features that resemble each other, of all scales, with a constant one; a faint part of them is the target."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n_scenes), rng.integers(10, 16, n_scenes))
    parts = rng.normal(size=(len(groups), 4)) + 0.5 * rng.normal(size=(n_scenes, 4))[groups]
    x = parts @ np.random.default_rng(9).normal(size=(4, k)) + 0.05 * rng.normal(size=(len(groups), k))
    y = 3 + 0.4 * parts[:, 2] + 0.1 * rng.normal(size=n_scenes)[groups] + 0.3 * rng.normal(size=len(groups))
    x = x * np.logspace(-3, 3, k) + 10.0
    x[:, 5] = 7.0
    return x.astype(np.float32), y, groups


def drawn(seed: int, n: int = 300, k: int = 8, n_scenes: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features and targets that have nothing to do with each other."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, k)), rng.normal(size=n), np.repeat(np.arange(n_scenes), n // n_scenes)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrow network, small batches, few epochs: enough for what does not ask how well it learns."""
    for name, value in {"HIDDEN": 16, "MAX_EPOCHS": 4, "BATCH": 32}.items():
        monkeypatch.setattr(regressors, name, value)


# --- ridge -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_scenes", "k"), [(2, 30), (3, 30), (12, 30), (7, 200)])
def test_ridge_is_that_of_a_grid_search(n_scenes: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales from the scenes fitted on, errors from those left out, as many folds as scenes up to five.

    The last case has more features than cells.
    """
    strengths = STRENGTHS[::3]
    monkeypatch.setattr(regressors, "STRENGTHS", strengths)
    x, y, groups = spectra(0, n_scenes, k)
    found = fit_linear(x, y, groups, seed=3)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), Ridge(solver="svd")),
        {"ridge__alpha": strengths * len(x)},
        scoring="neg_mean_squared_error",
        cv=GroupKFold(min(5, n_scenes), shuffle=True, random_state=3),
        return_train_score=True,
    ).fit(x.astype(np.float64), y, groups=groups)
    assert found.facts["alpha"] == search.best_params_["ridge__alpha"]
    assert found.facts["edge"] == ""
    for name, key in (("validation", "mean_test_score"), ("training", "mean_train_score")):
        np.testing.assert_allclose(np.array(found.curves[name]) * y.var(), -search.cv_results_[key], rtol=1e-6)
    monkeypatch.setattr(regressors, "PREDICTED", 8)  # cells at a time
    new = spectra(1, k=k)[0]
    np.testing.assert_allclose(found.predict(new), search.predict(new.astype(np.float64)), rtol=1e-9)
    assert found.predict(new).dtype == np.float64


def test_a_ridge_without_noise_is_least_squares() -> None:
    x, _, groups = drawn(0, 200, 3)
    y = x @ [1.0, -2.0, 0.5] + 4.0
    found = fit_linear(x, y, groups, seed=0)
    assert found.facts["edge"] == "weakest"
    np.testing.assert_allclose(found.predict(x), LinearRegression().fit(x, y).predict(x), atol=1e-6)


# --- the network ---------------------------------------------------------------------------------


def test_network_learns_what_a_line_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product of two axes of a millionth of the variance of channels that are nearly alike; one channel is dead."""
    for name, value in {"HIDDEN": 128, "MAX_EPOCHS": 12, "BATCH": 64}.items():  # so that it takes a second
        monkeypatch.setattr(regressors, name, value)
    rng = np.random.default_rng(0)
    amounts, groups = rng.uniform(-1, 1, size=(2500, 3)), np.repeat(np.arange(10), 250)
    x = (amounts * [1, 1e-3, 1e-3]) @ np.stack([2.0 + 0.1 * rng.normal(size=20), *rng.normal(size=(2, 20))])
    x = (x * np.logspace(-3, 3, 20)).astype(np.float32)
    x[:, 7] = 0.0
    y = 1e5 + 300 * amounts[:, 1] * amounts[:, 2]
    fitted, new = groups < 8, groups >= 8
    network, line = (fit(x[fitted], y[fitted], groups[fitted], seed=0) for fit in (fit_mlp, fit_linear))
    r2 = r2_score(y[new], network.predict(x[new]))
    assert r2 > 0.9 > 0.05 > r2_score(y[new], line.predict(x[new]))
    assert min(network.curves["validation"]) == pytest.approx(1 - r2, abs=0.05)


@pytest.mark.parametrize("probe", ["linear", "mlp"])
def test_noise_is_not_learnt(probe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither remembers the cells that it saw: both predict about the mean of scenes that they did not see."""
    monkeypatch.setattr(regressors, "PATIENCE", 3)
    x, y, groups = drawn(1, 2000, n_scenes=10)
    fitted, new = groups < 8, groups >= 8
    found = FITS[probe](x[fitted], y[fitted], groups[fitted], seed=0)
    assert abs(r2_score(y[new], found.predict(x[new]))) < 0.04
    if probe == "mlp":
        assert found.facts["epochs"] == found.facts["epoch"] + 3 < regressors.MAX_EPOCHS, (
            "it ends when nothing is gained"
        )


def test_scenes_held_back_are_never_fitted_on(brief: None) -> None:
    """A fifth of them: what they hold tells when to stop, and changes nothing of what is learnt until then."""
    x, y, groups = spectra(0, n_scenes=10)
    left_out = np.isin(groups, np.random.default_rng(4).permutation(10)[:2])
    found = fit_mlp(x, y, groups, seed=4)
    other = fit_mlp(np.where(left_out[:, None], 3 * x + 5, x), np.where(left_out, 1e3 - y, y), groups, seed=4)
    assert found.facts["held_back"] == 2
    n = min(len(found.curves["epoch"]), len(other.curves["epoch"]))
    ratio = np.array(found.curves["training"][:n]) / other.curves["training"][:n]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-12)  # that of the variances of all targets
    assert ratio[0] != pytest.approx(1)


def test_the_best_epoch_is_kept(brief: None) -> None:
    """What predicts is the network that did best on the scenes held back, not the last one."""
    x, y, groups = drawn(1)
    found = fit_mlp(x, y, groups, seed=0)
    left_out = groups == np.random.default_rng(0).permutation(5)[0]
    validation = found.curves["validation"]
    assert validation[-1] > 1.001 * min(validation)
    assert validation[found.facts["epoch"]] == min(validation)
    mse = np.mean((found.predict(x[left_out]) - y[left_out]) ** 2) / y.var()
    assert mse == pytest.approx(min(validation), rel=1e-5)
    assert found.predict(x).dtype == np.float64


# --- both ------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", ["linear", "mlp"])
def test_the_seed_decides_and_arrays_and_random_states_are_left_alone(probe: str, brief: None) -> None:
    """Scaling happens in place, on copies: even of float64 features."""

    def state() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # type: ignore[index]  # noqa: NPY002

    x, y, groups = spectra(0)
    x = x.astype(np.float64)
    kept = [part.copy() for part in (x, y, groups)]
    torch.manual_seed(1)
    first = FITS[probe](x, y, groups, seed=0)
    torch.manual_seed(2)
    before = state()
    second = FITS[probe](x, y, groups, seed=0)
    np.testing.assert_array_equal(first.predict(x), second.predict(x))
    assert state() == before
    assert first.curves == second.curves != FITS[probe](x, y, groups, seed=1).curves
    for part, copy in zip((x, y, groups), kept, strict=True):
        np.testing.assert_array_equal(part, copy)


@pytest.mark.parametrize("probe", ["linear", "mlp"])
def test_what_nothing_can_be_learnt_from_is_refused(probe: str) -> None:
    x, y, groups = spectra(0)
    with refused(InputError, f"{len(x)} cells", "1 day", key="store"):
        FITS[probe](x, y, np.zeros_like(groups), seed=0)
    with refused(InputError, f"{len(x)} cells", "0.1", key="n_cells"):
        FITS[probe](x, np.full_like(y, 0.1), groups, seed=0)
    if probe == "mlp":  # targets vary only where held back; one cell of two scenes is left to fit on
        left_out = np.random.default_rng(0).permutation(np.arange(7))[0]
        with refused(InputError, key="n_cells"):
            fit_mlp(x, np.where(groups == left_out, y, 0.1), groups, seed=0)
        first = np.random.default_rng(0).permutation([0, 1])[0]
        with refused(InputError, " 1 cells", key="n_cells"):
            fit_mlp(x, y, np.where(np.arange(len(y)) == 0, 1 - first, first), seed=0)
    x[3, 4] = np.nan
    with pytest.raises(AssertionError):
        FITS[probe](x, y, groups, seed=0)


@pytest.mark.parametrize("value", [0.0, 0.1])
@pytest.mark.parametrize("probe", ["linear", "mlp"])
def test_features_that_do_not_vary_tell_the_mean(probe: str, value: float, brief: None) -> None:
    """Warnings are errors here. Where the channels vary in new cells alone, that tells nothing either."""
    x, y, groups = spectra(0)
    found = FITS[probe](np.full_like(x, value), y, groups, seed=0).predict(x)
    assert np.ptp(found) < 1e-3 * y.std()
    assert abs(found[0] - y.mean()) < 0.5 * y.std()
