"""The pictures of an evaluation: what is drawn where, against what went in."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from drawing import assert_readable
from evaluations import BASELINES, NC, WAVELENGTH, dull, evaluation, judged, scene_view, tile_view
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spectralvae.analysis import evaluation_figures as figures
from spectralvae.analysis.comparison import channel_quantities, quantities, written
from spectralvae.analysis.evaluation import Evaluation, LatentUse


def panels(e: Evaluation) -> dict[str, Axes]:
    """Of the errors by step."""
    figure = figures.draw_metrics(e)
    assert_readable(figure)
    return dict(zip((q.key for q in quantities(e) if q.is_drawn), figure.axes, strict=True))


def maps(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_images()]


def values(axes: Axes) -> np.ndarray:
    return np.ma.filled(axes.get_images()[0].get_array(), np.nan)


def test_metrics_by_step() -> None:
    drawn = panels(evaluation())
    assert list(drawn) == ["mse", "psnr", "spectral_angle", "rmse_radiance", "relative_rmse", "noise_ratio"]
    axes = drawn["mse"]
    network, *references = axes.lines
    np.testing.assert_array_equal(network.get_xdata(), [100, 200, 300])
    np.testing.assert_array_equal(network.get_ydata(), [0.16, 0.09, 0.1225])
    assert [line.get_ydata()[0] for line in references] == list(BASELINES.values())
    low, high = axes.get_ylim()
    assert low < 0.0025 < 1.0 < high
    assert (axes.get_yscale(), drawn["psnr"].get_yscale()) == ("log", "linear")
    # what a name says lies beside its line, or is led to it
    for axes in drawn.values():
        for text, line in zip(axes.texts, sorted(line.get_ydata()[0] for line in axes.lines[1:]), strict=True):
            place = axes.transAxes.inverted().transform(axes.transData.transform((100, line)))[1]
            assert text.xy == (1.0, pytest.approx(place))
            assert float(text.get_text().split(": ")[1]) == pytest.approx(line, rel=1e-3)


def test_names_of_close_lines_are_pushed_apart() -> None:
    for axes in panels(evaluation(baselines={n: judged(0.04 + 1e-5 * i) for i, n in enumerate(BASELINES)})).values():
        places = sorted(text.xyann[1] for text in axes.texts)
        assert (np.diff(places) >= figures.LEAST_GAP - 1e-9).all() and places[-1] <= 1.0


def test_errors_by_wavelength() -> None:
    e = evaluation()
    figure = figures.draw_channels(e)
    mean, *others = figure.axes
    np.testing.assert_array_equal(mean.lines[0].get_ydata(), e.mean_spectrum)
    assert mean.get_yscale() == "log"
    judged_ = [e.checkpoints[200], *(e.baselines[name] for name in ("pca_1", "pca_2", "pca_8"))]
    for axes, column in zip(others, ("rmse", "rmse_radiance", "relative", "noise"), strict=True):
        assert axes.get_yscale() == "log"
        for line, found in zip(axes.lines, judged_, strict=False):
            np.testing.assert_array_equal(line.get_xdata(), WAVELENGTH)
            np.testing.assert_array_equal(line.get_ydata(), getattr(found.channels, column))
    np.testing.assert_array_equal(others[0].lines[4].get_ydata(), e.noise)
    assert list(others[3].lines[4].get_ydata()) == [1.0, 1.0]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["step 200", "PCA 1", "PCA 2", "PCA 8", "noise"]
    assert_readable(figure)
    assert all(axes.get_tightbbox().y0 >= legend.get_window_extent().y1 for axes in figure.axes)


@pytest.mark.parametrize("noise", [None, np.full(NC, np.nan)])
def test_what_is_not_known_is_not_drawn(noise: np.ndarray | None) -> None:
    """Reflectances have no relative error, and may be zero; here nothing is known of the noise, and one step judged."""
    e = dull(noise=noise)
    assert [q.key for q in channel_quantities(e)] == ["rmse", "rmse_radiance"]
    figure = figures.draw_channels(e)
    assert len(figure.axes) == 3 and figure.axes[0].get_yscale() == "linear"
    assert np.isnan(figure.axes[1].lines[0].get_ydata()[3]), "a dead channel is a gap"
    assert all(np.isfinite(axes.get_ylim()).all() for axes in figure.axes)
    assert "noise" not in [text.get_text() for text in figure.legends[0].get_texts()]
    drawn = panels(e)
    assert list(drawn) == ["mse", "psnr", "spectral_angle", "rmse_radiance"]
    assert all(list(axes.get_xticks()) == [0] for axes in drawn.values())


def test_error_maps_have_one_scale() -> None:
    views = [scene_view("a", (16, 24), whole=True), scene_view("b"), scene_view("c", (40, 24))]
    e = evaluation(views=views)
    figure = figures.draw_error_maps(e)
    everything = np.concatenate([view.rmse[2:].ravel() for view in views])
    for axes, view in zip(maps(figure), views, strict=True):
        (image,) = axes.get_images()
        assert axes.get_title() == view.id
        assert image.get_clim() == (0.0, pytest.approx(np.quantile(everything, 0.99)))
        np.testing.assert_array_equal(values(axes), view.rmse)
        assert image.cmap.get_bad()[:3] == pytest.approx([0.6] * 3)  # grey
    assert figure.legends
    assert_readable(figure)
    nothing = dataclasses.replace(views[0], rmse=np.full((8, 8), np.nan, np.float32))
    assert maps(figures.draw_error_maps(evaluation(views=[nothing])))[0].get_images()[0].get_clim() == (0.0, 1.0)


@pytest.mark.parametrize(("size", "columns"), [((131, 2048), 1), ((30, 40), 3), ((400, 20), 3)])
def test_maps_are_never_threads(size: tuple[int, int], columns: int) -> None:
    """And long names stay on the page."""
    views = [scene_view(f"{'a_long_name_' * 9}{i}", size) for i in range(4)]
    figure = figures.draw_error_maps(evaluation(views=views))
    assert_readable(figure)
    boxes = [axes.get_window_extent() for axes in figure.axes[:4]]
    assert len({round(box.x0) for box in boxes}) == columns
    for box in boxes:
        assert 1 / 8.5 < box.height / box.width < 2.1


@pytest.mark.parametrize(("e", "shown", "size"), [(1, 1, (16, 96)), (8, 8, (36, 96)), (20, 12, (16, 24))])
def test_latents_with_the_most_bits_first(e: int, shown: int, size: tuple[int, int]) -> None:
    """A channel whose bits are not known comes last. Rows of flat maps do not touch."""
    bits = np.random.default_rng(0).permutation(e) + 1.0
    bits[e // 2] = math.nan if e > 1 else 1.0
    found = dataclasses.replace(judged(0.1, np.ones(e)), latents=LatentUse(bits, 1.0, e))
    view = scene_view("a", size, whole=True, e=e)
    figure = figures.draw_latents(evaluation(embed_dim=e, checkpoints={200: found}, views=[view]))
    for k, axes in zip(np.argsort(-bits)[:shown], maps(figure), strict=True):
        latents = view.latents[k]
        assert f" {k}: {written(bits[k])} " in axes.get_title()
        np.testing.assert_array_equal(values(axes), latents)
        np.testing.assert_allclose(axes.get_images()[0].get_clim(), np.quantile(latents[1:], [0.01, 0.99]), rtol=1e-6)
    assert_readable(figure)


def test_worst_tiles_and_the_scene_are_told_by_name() -> None:
    e = evaluation(worst=[tile_view(0.2, 8)])
    axes = figures.draw_worst(e).axes
    assert "y = 8, x = 4" in axes[0].get_ylabel() and any("0.2" in panel.get_title() for panel in axes)
    assert "a, step 200\n16 x 24 x 12" in figures.draw_composite(e).get_suptitle()


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each figure that there is something to draw for; the captions name the step."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    found = figures.save_figures(evaluation(), tmp_path)
    names = ["metrics", "channels", "error_maps", "worst", "composite", "latents"]
    assert list(found.values()) == [tmp_path / f"{name}.png" for name in names]
    assert set(tmp_path.iterdir()) == set(found.values())
    assert all("step" in caption for caption in found)
    assert len(figures.save_figures(evaluation(views=[scene_view("b")]), tmp_path)) == 4
