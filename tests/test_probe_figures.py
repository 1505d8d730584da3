"""Pictures of probes: what is drawn against numpy, and that nothing is drawn over anything else."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from drawing import assert_readable
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from scipy.stats import binned_statistic

from spectralvae.analysis.probe_figures import (
    FEATURES,
    LOWEST,
    Predicted,
    draw_hexbin,
    draw_learning,
    draw_maps,
    draw_overview,
    draw_residuals,
)
from spectralvae.analysis.scores import score

LABEL = "asinh(NO2 / 4.02e15 molecules/cm^2)"


def predicted(seed: int, n: int = 3000, n_scenes: int = 6) -> Predicted:
    rng = np.random.default_rng(seed)
    truth = np.random.default_rng(99).gamma(2.0, size=n)
    guess = 1 + 0.5 * truth + 0.3 * rng.normal(size=n)
    return Predicted(truth, guess, score(truth, guess, np.arange(n) % n_scenes, seed=0))


def predictions(n: int = 3000, n_scenes: int = 6) -> dict[str, dict[str, Predicted]]:
    names = itertools.count()
    return {
        probe: {name: predicted(next(names), n, n_scenes) for name in ("latents", "pca", "raw")}
        for probe in ("linear", "mlp")
    }


def every(made: dict[str, dict[str, Predicted]]) -> list[Predicted]:
    return [part for parts in made.values() for part in parts.values()]


def table(**ends: Any) -> dict[str, Any]:
    """Scores as in probes.json, all alike."""
    scores = {"r2": 0.5, "r2_low": 0.4, "r2_high": 0.6, **ends}
    one = {name: {**scores, "unfiltered": {**scores, "r2": 0.3}} for name in FEATURES}
    return {product: dict.fromkeys(("linear", "mlp"), one) for product in ("NO2", "HCHO", "O3TOT", "CLDO4")}


def markers(axes: Axes, marker: str) -> list[Any]:
    return [line for line in axes.lines if line.get_marker() == marker]


# --- overview ----------------------------------------------------------------------------------


def test_overview_shows_each_score_once() -> None:
    figure = draw_overview(table())
    assert_readable(figure)
    assert [axes.get_title() for axes in figure.axes] == list(table())
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(FEATURES)
    for axes in figure.axes:
        for marker in ("o", "s"):
            points = markers(axes, marker)
            assert len(points) == 2 * len(FEATURES)
            full = [line.get_xdata()[0] for line in points if line.get_markerfacecolor() != "white"]
            assert set(full) == {0.5}
            assert {line.get_xdata()[0] for line in points if line.get_markerfacecolor() == "white"} == {0.3}
        intervals = [tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]
        assert intervals.count((0.4, 0.6)) == 4 * len(FEATURES)
        rows = sorted(round(float(line.get_ydata()[0])) for line in markers(axes, "o"))
        assert rows == sorted([*range(len(FEATURES)), *range(len(FEATURES))])


def test_overview_of_odd_scores() -> None:
    """R2 beyond the edge, of one test scene, and of truths that do not vary; without a filter."""
    scores: dict[str, Any] = {"r2": 0.5, "r2_low": None, "r2_high": None}
    far = {"r2": -37.42, "r2_low": -80.0, "r2_high": -12.0}
    made = {"NO2": far, "HCHO": scores, "O3TOT": {**scores, "r2": None}}
    both = {product: {"linear": {"latents": {**one, "unfiltered": one}}} for product, one in made.items()}
    figure = draw_overview({**both, "CLDO4": {"linear": {"latents": scores}}})
    assert_readable(figure)
    assert [[len(markers(axes, marker)) for marker in "<o"] for axes in figure.axes] == [[2, 0], [0, 2], [0, 0], [0, 1]]
    assert {line.get_xdata()[0] for line in markers(figure.axes[0], "<")} == {LOWEST}
    assert [text.get_text() for text in figure.axes[0].texts] == ["-37.4"] * 2
    assert figure.axes[0].get_xlim()[0] < LOWEST


# --- truth and prediction -----------------------------------------------------------------------


def test_hexbin_counts_every_cell_within_its_axes() -> None:
    made = predictions()
    figure = draw_hexbin("NO2", LABEL, made)
    assert_readable(figure)
    counts = []
    for axes, (truth, guess, scores) in zip(figure.axes, every(made), strict=False):
        low, high = axes.get_xlim()
        assert (low, high) == axes.get_ylim()
        assert all(f"{scores[key]:.3f}" in axes.get_title() for key in ("r2", "r2_low", "r2_high"))
        inside = (truth >= low) & (truth <= high) & (guess >= low) & (guess <= high)
        assert (f"{100 * np.mean(~inside):.2g} %" in axes.get_title()) == (not inside.all())
        hexagons = next(part for part in axes.collections if isinstance(part, PolyCollection))
        counts.append(hexagons.get_array())
        assert counts[-1].sum() == inside.sum()
    limits = {axes.collections[0].get_clim() for axes in figure.axes[:6]}
    assert limits == {(1, max(part.max() for part in counts))}


def test_few_cells_are_points_and_far_ones_do_not_stretch_the_axes() -> None:
    made = predictions(60, n_scenes=1)
    made["mlp"]["raw"].predicted[:3] = 1e6
    truth = np.full(40, 2.0)
    constant = Predicted(truth, truth + 0.1, score(truth, truth + 0.1, np.arange(40) % 2, seed=0))
    figure = draw_hexbin("NO2", LABEL, made)
    for axes, (given, guess, _) in zip(figure.axes, every(made), strict=False):
        assert max(axes.get_ylim()) < 20 and ("5 %" in axes.get_title()) == (guess.max() == 1e6)
        np.testing.assert_array_equal(axes.lines[0].get_xydata(), np.stack([given, guess], axis=1))
    for draw in (draw_hexbin, draw_residuals):
        assert_readable(draw("NO2", LABEL, {"linear": {"latents": constant}}))
    assert_readable(figure)


def test_residuals_are_binned() -> None:
    made = predictions()
    figure = draw_residuals("NO2", LABEL, made)
    assert_readable(figure)
    truth, guess, _ = made["mlp"]["pca"]
    edges = np.linspace(*np.quantile(truth, [0.001, 0.999]), 21)
    axes = figure.axes[1]
    n = np.histogram(truth, edges)[0]
    bars = figure.axes[3].patches
    np.testing.assert_array_equal([bar.get_height() for bar in bars], n)
    line = next(line for line in axes.lines if line.get_marker() == FEATURES["pca"].marker)
    bars_of_pca = [part for part in axes.collections if isinstance(part, LineCollection)][1]
    for statistic, found in (
        ("mean", line.get_ydata()),
        ("std", [np.ptp(part[:, 1]) / 2 if len(part) else np.nan for part in bars_of_pca.get_segments()]),
    ):
        expected = binned_statistic(truth, guess - truth, statistic, edges).statistic
        expected[n < 10] = np.nan
        assert np.isnan(expected).any()
        np.testing.assert_allclose(np.asarray(found)[: len(expected)], expected, rtol=1e-9)


# --- learning -----------------------------------------------------------------------------------


def test_learning_marks_the_choice() -> None:
    strengths = np.logspace(-8, 4, 25)
    ridge = {
        "strength": strengths.tolist(),
        "training": [0.3] * 25,
        "validation": [0.5 + abs(i - 7) for i in range(25)],
    }
    network = {"epoch": [0, 1, 2], "training": [1.0, 0.5, 0.2], "validation": [1.0, 0.6, 40.0]}
    figure = draw_learning("NO2", {"linear": {"latents": ridge, "raw": ridge}, "mlp": {"latents": network}})
    assert_readable(figure)
    linear, mlp = figure.axes[:2]
    for axes, place in ((linear, (strengths[7], 0.5)), (mlp, (1, 0.6))):
        (chosen,) = markers(axes, FEATURES["latents"].marker)
        assert (chosen.get_xdata()[0], chosen.get_ydata()[0]) == place
    assert (linear.get_xscale(), mlp.get_xscale()) == ("log", "linear")
    assert mlp.get_ylim()[0] < 0.2 and mlp.get_ylim()[1] == 2.0


# --- maps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 32), (33, 512), (90, 20), (1, 1)])
def test_maps_show_what_is_judged(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    truth, guess = rng.normal(size=shape), rng.normal(size=shape)
    truth[rng.random(shape) < 0.2] = np.nan
    truth[0, 0] = 1.0
    figure = draw_maps("NO2", LABEL, "scene_1", truth, {"latents, linear": guess, "raw, mlp": truth})
    assert_readable(figure)
    panels = [axes.images[0] for axes in figure.axes if axes.images]
    seen = np.isfinite(truth)
    expected: Iterable[np.ndarray] = (truth, guess, guess - truth, truth, truth, 0 * truth)
    for image, values in zip(panels, expected, strict=True):
        found = np.ma.filled(image.get_array().astype(float), np.nan)
        np.testing.assert_allclose(found, np.where(seen, values, np.nan))
        assert image.axes.get_aspect() == panels[0].axes.get_aspect()
    assert len({panels[i].get_clim() for i in (0, 1, 3, 4)}) == 1
    low, high = panels[2].get_clim()
    assert low == -high == panels[5].get_clim()[0]
    assert f"{seen.sum()} of {seen.size}" in figure.get_suptitle()
    assert_readable(draw_maps("NO2", LABEL, "scene_1", np.full(shape, np.nan), {"latents, linear": guess}))
