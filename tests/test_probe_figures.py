"""Pictures of probes: what is drawn against numpy, and that nothing is drawn over anything else."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
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


def table(**ends: Any) -> dict[str, Any]:
    """Scores as in probes.json, all alike."""
    scores = {"r2": 0.5, "r2_low": 0.4, "r2_high": 0.6, **ends}
    one = {name: {**scores, "unfiltered": {**scores, "r2": 0.3}} for name in FEATURES}
    return {product: dict.fromkeys(("linear", "mlp"), one) for product in ("NO2", "HCHO", "O3TOT", "CLDO4")}


def drawn_texts(figure: Figure) -> list[Text]:
    """Texts that are seen, after drawing."""
    FigureCanvasAgg(figure).draw()
    return [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text() and text.get_visible()]


def is_tidy(figure: Figure) -> bool:
    """No title, label or legend touches another, lies over a panel, or leaves the page."""
    drawn_texts(figure)
    titles = [
        figure._suptitle,
        *(part for axes in figure.axes for part in (axes.title, axes.xaxis.label, axes.yaxis.label)),
    ]  # type: ignore[attr-defined]
    legends = figure.legends
    boxes = [part.get_window_extent() for part in (*titles, *legends) if not isinstance(part, Text) or part.get_text()]
    panels = [axes.get_window_extent() for axes in figure.axes if axes.axison]
    page = figure.bbox.expanded(1.005, 1.005)
    inside = all(page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes)
    apart = not any(a.overlaps(b) for a, b in itertools.combinations([_shrunk(box) for box in boxes], 2))
    return inside and apart and not any(_shrunk(box).overlaps(_shrunk(panel)) for box in boxes for panel in panels)


def _shrunk(box: Any) -> Any:
    return box.padded(-1)


def titled(figure: Figure, start: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title().startswith(start))


def markers(axes: Axes, marker: str) -> list[Any]:
    return [line for line in axes.lines if line.get_marker() == marker]


# --- overview ----------------------------------------------------------------------------------


def test_overview_shows_each_score_once() -> None:
    figure = draw_overview(table())
    assert is_tidy(figure)
    assert [axes.get_title() for axes in figure.axes] == ["NO2", "HCHO", "O3TOT", "CLDO4"]
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


def test_overview_tells_what_lies_beyond_its_edge() -> None:
    figure = draw_overview(table(r2=-37.42, r2_low=-80.0, r2_high=-12.0))
    axes = figure.axes[0]
    arrows = markers(axes, "<")
    assert len(arrows) == 2 * len(FEATURES)
    assert {line.get_xdata()[0] for line in arrows} == {LOWEST}
    assert [text.get_text() for text in axes.texts] == ["-37.4"] * len(arrows)
    assert axes.get_xlim()[0] < LOWEST
    assert is_tidy(figure)


@pytest.mark.parametrize(("r2", "n_points"), [(0.5, 2), (None, 0)])
def test_overview_without_intervals_or_r2(r2: float | None, n_points: int) -> None:
    """One test scene has no interval; truths that do not vary have no R2; a product may have no filter."""
    scores = {"r2": r2, "r2_low": None, "r2_high": None}
    figure = draw_overview({"NO2": {"linear": {"latents": {**scores, "unfiltered": scores}}}})
    assert len(markers(figure.axes[0], "o")) == n_points
    assert is_tidy(figure)
    figure = draw_overview({"CLDO4": {"mlp": {"latents": scores}}})
    assert len(markers(figure.axes[0], "s")) == n_points // 2


# --- truth and prediction -----------------------------------------------------------------------


def test_hexbin_counts_every_cell_within_its_axes() -> None:
    made = predictions()
    figure = draw_hexbin("NO2", LABEL, made)
    assert is_tidy(figure)
    counts = {}
    for probe, name in itertools.product(made, ("latents", "pca", "raw")):
        axes = titled(figure, f"{name}, {probe}")
        low, high = axes.get_xlim()
        assert (low, high) == axes.get_ylim()
        truth, guess, scores = made[probe][name]
        assert f"R² {scores['r2']:.3f} ({scores['r2_low']:.3f} to {scores['r2_high']:.3f})" in axes.get_title()
        inside = (truth >= low) & (truth <= high) & (guess >= low) & (guess <= high)
        outside = "" if inside.all() else f"{100 * np.mean(~inside):.2g} % of the cells outside"
        assert axes.get_title().endswith(f"\n{outside}")
        hexagons = next(part for part in axes.collections if isinstance(part, PolyCollection))
        counts[probe, name] = hexagons.get_array()
        assert counts[probe, name].sum() == inside.sum()
        assert "NO2" in figure._suptitle.get_text()  # type: ignore[attr-defined]
    limits = {axes.collections[0].get_clim() for axes in figure.axes if "R²" in axes.get_title()}
    assert limits == {(1, max(part.max() for part in counts.values()))}


def test_few_cells_are_points() -> None:
    made = predictions(50, n_scenes=1)
    figure = draw_hexbin("NO2", LABEL, made)
    assert is_tidy(figure)
    axes = titled(figure, "pca, mlp")
    assert "no interval" in axes.get_title()
    assert "outside" not in axes.get_title()
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), np.stack(made["mlp"]["pca"][:2], axis=1))


def test_far_predictions_do_not_stretch_the_axes() -> None:
    made = predictions(200)
    made["mlp"]["raw"].predicted[:10] = 1e6
    figure = draw_hexbin("NO2", LABEL, made)
    assert all(max(axes.get_ylim()) < 20 for axes in figure.axes)
    assert "5 % of the cells outside" in titled(figure, "raw, mlp").get_title()


def test_truths_that_do_not_vary_can_be_drawn() -> None:
    truth = np.full(40, 2.0)
    one = Predicted(truth, truth + 0.1, score(truth, truth + 0.1, np.arange(40) % 2, seed=0))
    figure = draw_hexbin("NO2", LABEL, {"linear": {"latents": one}})
    assert "truth does not vary" in figure.axes[0].get_title()
    assert is_tidy(figure)
    assert is_tidy(draw_residuals("NO2", LABEL, {"linear": {"latents": one}}))


def test_residuals_are_binned() -> None:
    made = predictions()
    figure = draw_residuals("NO2", LABEL, made)
    assert is_tidy(figure)
    truth, guess, _ = made["mlp"]["pca"]
    edges = np.linspace(*np.quantile(truth, [0.001, 0.999]), 21)
    axes = titled(figure, "mlp")
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
    assert is_tidy(figure)
    for probe, place in (("linear", (strengths[7], 0.5)), ("mlp", (1, 0.6))):
        (chosen,) = markers(titled(figure, probe), FEATURES["latents"].marker)
        assert (chosen.get_xdata()[0], chosen.get_ydata()[0]) == place
    assert titled(figure, "linear").get_xscale() == "log"
    assert titled(figure, "mlp").get_xscale() == "linear"
    assert titled(figure, "mlp").get_ylim()[1] == 2.0
    assert titled(figure, "mlp").get_ylim()[0] < 0.2


# --- maps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 32), (33, 512), (90, 20), (1, 1)])
def test_maps_show_what_is_judged(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    truth, guess = rng.normal(size=shape), rng.normal(size=shape)
    truth[rng.random(shape) < 0.2] = np.nan
    truth[0, 0] = 1.0
    figure = draw_maps("NO2", LABEL, "scene_1", truth, {"latents, linear": guess, "raw, mlp": truth})
    assert is_tidy(figure)
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
    assert f"{seen.sum()} of {seen.size} cells" in figure._suptitle.get_text()  # type: ignore[attr-defined]


def test_a_scene_without_truth_can_be_drawn() -> None:
    assert is_tidy(draw_maps("NO2", LABEL, "scene_1", np.full((8, 9), np.nan), {"latents, linear": np.zeros((8, 9))}))
