"""Probes: the ridge against scikit-learn's own search, the network against what it must and must not learn."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
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
    new = spectra(1, k=k)[0]
    np.testing.assert_allclose(found.predict(new), search.predict(new.astype(np.float64)), rtol=1e-9)
    assert found.predict(new).dtype == np.float64


def test_a_ridge_without_noise_is_least_squares() -> None:
    rng = np.random.default_rng(0)
    x, groups = rng.normal(size=(200, 3)), np.repeat(np.arange(5), 40)
    y = x @ [1.0, -2.0, 0.5] + 4.0
    found = fit_linear(x, y, groups, seed=0)
    assert found.facts["edge"] == "weakest"
    np.testing.assert_allclose(found.predict(x), LinearRegression().fit(x, y).predict(x), atol=1e-6)


def test_large_scenes_are_predicted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, groups = spectra(0)
    found = fit_linear(x, y, groups, seed=0)
    whole = found.predict(x)
    monkeypatch.setattr(regressors, "PREDICTED", 8)
    np.testing.assert_allclose(found.predict(x), whole, rtol=1e-12)


# --- the network ---------------------------------------------------------------------------------


def test_network_learns_what_a_line_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product of two features, on scales that need standardising."""
    for name, value in {"HIDDEN": 128, "MAX_EPOCHS": 12, "BATCH": 64}.items():  # so that it takes a second
        monkeypatch.setattr(regressors, name, value)
    rng = np.random.default_rng(0)
    amounts, groups = rng.uniform(-1, 1, size=(2500, 4)), np.repeat(np.arange(10), 250)
    x = (amounts * [1e-3, 1e3, 1, 1] + [0, 1e4, 0, 0]).astype(np.float32)
    y = 1e5 + 300 * amounts[:, 0] * amounts[:, 1]
    fitted, new = groups < 8, groups >= 8
    network = fit_mlp(x[fitted], y[fitted], groups[fitted], seed=0)
    line = fit_linear(x[fitted], y[fitted], groups[fitted], seed=0)
    assert r2_score(y[new], network.predict(x[new])) > 0.9
    assert r2_score(y[new], line.predict(x[new])) < 0.05
    assert min(network.curves["validation"]) == pytest.approx(1 - r2_score(y[new], network.predict(x[new])), abs=0.05)


def test_network_finds_what_hardly_varies_in_spectra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels that are nearly alike, and a target in an axis of a millionth of their variance; one channel is dead."""
    for name, value in {"HIDDEN": 64, "MAX_EPOCHS": 12, "BATCH": 64}.items():
        monkeypatch.setattr(regressors, name, value)
    random = np.random.default_rng(3)
    brightness, gas = random.normal(size=(2, 3000))
    shapes = random.normal(size=(2, 20))
    x = (np.outer(brightness, 2.0 + 0.1 * shapes[0]) + 1e-3 * np.outer(gas, shapes[1])).astype(np.float32)
    x[:, 7] = 0.0
    scene = np.arange(3000) // 300
    fit = scene < 8
    predicted = fit_mlp(x[fit], gas[fit], scene[fit], seed=0).predict(x[~fit])
    assert r2_score(gas[~fit], predicted) > 0.9


@pytest.mark.parametrize("probe", ["linear", "mlp"])
def test_noise_is_not_learnt(probe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither remembers the cells that it saw: both predict about the mean of scenes that they did not see."""
    monkeypatch.setattr(regressors, "PATIENCE", 3)
    rng = np.random.default_rng(1)
    x, y, groups = rng.normal(size=(2000, 8)), rng.normal(size=2000), np.repeat(np.arange(10), 200)
    fitted, new = groups < 8, groups >= 8
    found = FITS[probe](x[fitted], y[fitted], groups[fitted], seed=0)
    assert abs(r2_score(y[new], found.predict(x[new]))) < 0.04


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
    rng = np.random.default_rng(1)
    x, y, groups = rng.normal(size=(300, 8)), rng.normal(size=300), np.repeat(np.arange(5), 60)
    found = fit_mlp(x, y, groups, seed=0)
    left_out = groups == np.random.default_rng(0).permutation(5)[0]
    validation = found.curves["validation"]
    assert validation[-1] > 1.001 * min(validation)
    assert validation[found.facts["epoch"]] == min(validation)
    mse = np.mean((found.predict(x[left_out]) - y[left_out]) ** 2) / y.var()
    assert mse == pytest.approx(min(validation), rel=1e-5)
    assert found.predict(x).dtype == np.float64


def test_training_ends_when_nothing_is_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regressors, "PATIENCE", 2)
    rng = np.random.default_rng(1)
    x, y, groups = rng.normal(size=(300, 8)), rng.normal(size=300), np.repeat(np.arange(5), 60)
    facts = fit_mlp(x, y, groups, seed=0).facts
    assert facts["epochs"] == facts["epoch"] + 2 < regressors.MAX_EPOCHS


def test_the_same_seed_gives_the_same_bits(brief: None) -> None:
    x, y, groups = spectra(0)
    torch.manual_seed(1)
    first = fit_mlp(x, y, groups, seed=0)
    torch.manual_seed(2)
    second = fit_mlp(x, y, groups, seed=0)
    assert first.curves == second.curves
    np.testing.assert_array_equal(first.predict(x), second.predict(x))
    assert fit_mlp(x, y, groups, seed=1).curves != first.curves


def test_the_global_random_state_is_left_alone(brief: None) -> None:
    def state() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # type: ignore[index]  # noqa: NPY002

    x, y, groups = spectra(0)
    before = state()
    fit_mlp(x, y, groups, seed=0).predict(x)
    assert state() == before


# --- both ------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", ["linear", "mlp"])
def test_given_arrays_are_left_alone(probe: str, brief: None) -> None:
    """Scaling happens in place, on copies: even of float64 features."""
    x, y, groups = spectra(0)
    x = x.astype(np.float64)
    kept = [part.copy() for part in (x, y, groups)]
    FITS[probe](x, y, groups, seed=0).predict(x)
    for part, copy in zip((x, y, groups), kept, strict=True):
        np.testing.assert_array_equal(part, copy)


@pytest.mark.parametrize("probe", ["linear", "mlp"])
def test_one_scene_is_refused(probe: str) -> None:
    x, y, groups = spectra(0, n_scenes=1)
    with pytest.raises(InputError, match=rf"{len(x)} cells .* 1 day or scene; at least 2"):
        FITS[probe](x, y, groups, seed=0)


@pytest.mark.parametrize("probe", ["linear", "mlp"])
def test_targets_that_do_not_vary_are_refused(probe: str) -> None:
    x, y, groups = spectra(0)
    with pytest.raises(InputError, match=r"one target, 0\.1, of all cells"):
        FITS[probe](x, np.full_like(y, 0.1), groups, seed=0)


def test_targets_that_vary_only_where_held_back_are_refused() -> None:
    x, y, groups = spectra(0)
    left_out = np.isin(groups, np.random.default_rng(0).permutation(np.arange(7))[:1])
    with pytest.raises(InputError, match="nothing can be learnt"):
        fit_mlp(x, np.where(left_out, y, 0.1), groups, seed=0)


def test_a_network_that_one_cell_is_left_to_is_refused() -> None:
    """Two scenes, of which the one held back has all cells but one."""
    x, y, _ = spectra(0)
    one = np.arange(len(y)) == 0
    left_out = np.random.default_rng(0).permutation([0, 1])[0]
    with pytest.raises(InputError, match=r"of all cells to fit on \(1\)"):
        fit_mlp(x, y, np.where(one, 1 - left_out, left_out), seed=0)


@pytest.mark.parametrize("value", [0.0, 0.1])
@pytest.mark.parametrize("probe", ["linear", "mlp"])
def test_features_that_do_not_vary_tell_the_mean(probe: str, value: float, brief: None) -> None:
    """Warnings are errors here. Where the channels vary in new cells alone, that tells nothing either."""
    x, y, groups = spectra(0)
    found = FITS[probe](np.full_like(x, value), y, groups, seed=0).predict(x)
    assert np.ptp(found) < 1e-3 * y.std()
    assert abs(found[0] - y.mean()) < 0.5 * y.std()


@pytest.mark.parametrize("probe", ["linear", "mlp"])
def test_what_is_not_finite_is_no_feature(probe: str) -> None:
    x, y, groups = spectra(0)
    x[3, 4] = np.nan
    with pytest.raises(AssertionError, match="left out"):
        FITS[probe](x, y, groups, seed=0)
