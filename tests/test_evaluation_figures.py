"""The pictures of an evaluation: what is drawn where, against what went in."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from evaluations import BASELINES, NC, UNITS, WAVELENGTH, E, evaluation, judged, normalization, scene_view, tile_view
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from spectralvae.analysis import evaluation_figures as figures
from spectralvae.analysis.evaluation import Channels, Evaluation, Judged, LatentUse


def panels(figure: Figure) -> dict[str, Axes]:
    """Axes by the first line of their title."""
    return {axes.get_title().partition("\n")[0]: axes for axes in figure.axes if axes.get_title()}


def extents(figure: Figure) -> list:
    """Where the texts of a page lie."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [text for axes in figure.axes for text in (axes.title, *axes.texts, axes.xaxis.label, axes.yaxis.label)]
    texts += figure.texts
    if figure._suptitle is not None:
        texts.append(figure._suptitle)
    # of an annotation without its leader
    boxes = [
        super(Annotation, text).get_window_extent(renderer)
        if isinstance(text, Annotation)
        else text.get_window_extent(renderer)
        for text in dict.fromkeys(texts)
        if text.get_text()
    ]
    return [box for box in boxes if box.width > 0]


def assert_readable(figure: Figure) -> None:
    """No text on another, none beyond the page."""
    boxes = extents(figure)
    assert len(boxes) > 2
    frames = [axes.get_tightbbox() for axes in figure.axes]  # with ticks and names
    assert not [1 for a, b in itertools.combinations(frames, 2) if a.shrunk(0.99, 0.98).overlaps(b.shrunk(0.99, 0.98))]
    boxes = [*boxes, *frames]
    for box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
    texts = boxes[: -len(frames)]
    assert not [1 for a, b in itertools.combinations(texts, 2) if a.shrunk(0.98, 0.7).overlaps(b.shrunk(0.98, 0.7))]


def with_noise(found: Judged, noise: np.ndarray | None) -> Judged:
    return dataclasses.replace(
        found,
        metrics=found.metrics | {"noise_ratio": math.nan},
        channels=dataclasses.replace(found.channels, noise=noise),
    )


def without_noise(e: Evaluation, noise: np.ndarray | None) -> Evaluation:
    """Not known, or NaN everywhere."""
    return dataclasses.replace(
        e,
        noise=noise,
        checkpoints={step: with_noise(found, noise) for step, found in e.checkpoints.items()},
        baselines={name: with_noise(found, noise) for name, found in e.baselines.items()},
    )


def test_metrics_by_step() -> None:
    e = evaluation()
    figure = figures.draw_metrics(e)
    drawn = panels(figure)
    assert list(drawn) == [
        "MSE of z",
        "PSNR",
        "spectral angle",
        "RMSE of radiance",
        "relative RMSE of radiance",
        "RMSE in units of the noise",
    ]
    axes = drawn["MSE of z"]
    network, *references = axes.lines
    np.testing.assert_array_equal(network.get_xdata(), [100, 200, 300])
    np.testing.assert_array_equal(network.get_ydata(), [0.16, 0.09, 0.1225])
    assert [line.get_ydata()[0] for line in references] == list(BASELINES.values())
    assert [text.get_text() for text in axes.texts] == [
        "PCA 8: 0.0025",
        "PCA 4: 0.01",
        "PCA 2: 0.04",
        "PCA 1: 0.25",
        "predicting the mean: 1",
    ]
    low, high = axes.get_ylim()
    assert low < 0.0025 < 1.0 < high
    assert axes.get_yscale() == "log" and drawn["PSNR"].get_yscale() == "linear"
    assert drawn["PSNR"].get_title() == "PSNR\ndB, higher is better"
    assert drawn["RMSE of radiance"].get_title() == f"RMSE of radiance\n{UNITS}, lower is better"
    assert_readable(figure)
    # what a name says lies beside its line, or is led to it
    for axes in drawn.values():
        for text, line in zip(axes.texts, sorted(line.get_ydata()[0] for line in axes.lines[1:]), strict=True):
            place = axes.transAxes.inverted().transform(axes.transData.transform((100, line)))[1]
            assert text.xy == (1.0, pytest.approx(place))


@pytest.mark.parametrize("values", [[0.5] * 7, [0.0, 0.0, 0.01, 0.5, 0.51, 0.99, 1.0], [0.97, 0.98, 1.0], [0.3]])
def test_names_of_close_lines_are_pushed_apart(values: list[float]) -> None:
    places = figures._apart(values)
    assert (np.diff(places) >= figures.LEAST_GAP - 1e-9).all()
    assert places[-1] <= 1.0
    if len(values) == 1:
        assert places == values


def test_names_of_equal_lines_are_readable() -> None:
    same = {name: judged(0.04 + 1e-5 * i) for i, name in enumerate(BASELINES)}
    assert_readable(figures.draw_metrics(evaluation(baselines=same)))


def test_errors_by_wavelength() -> None:
    e = evaluation()
    figure = figures.draw_channels(e)
    mean, *others = figure.axes
    np.testing.assert_array_equal(mean.lines[0].get_ydata(), e.mean_spectrum)
    assert [axes.get_ylabel().replace("\n", " ") for axes in figure.axes] == [
        f"radiance, {UNITS}",
        "RMSE of z",
        f"RMSE of radiance, {UNITS}",
        "relative RMSE of radiance",
        "RMSE in units of the noise",
    ]
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
    assert figure.axes[-1].get_xlabel() == "wavelength, nm"
    assert_readable(figure)
    legend_top = legend.get_window_extent().y1
    assert all(axes.get_tightbbox().y0 >= legend_top for axes in figure.axes)


@pytest.mark.parametrize("noise", [None, np.full(NC, np.nan)])
def test_without_noise(noise: np.ndarray | None) -> None:
    e = without_noise(evaluation(), noise)
    assert "RMSE in units of the noise" not in panels(figures.draw_metrics(e))
    figure = figures.draw_channels(e)
    assert len(figure.axes) == 4
    assert "noise" not in [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_scene_of_reflectances_has_no_relative_error() -> None:
    nan = np.full(NC, np.nan)
    channels = Channels(np.linspace(1, 2, NC), np.linspace(3, 4, NC), nan, None)
    found = dataclasses.replace(
        judged(0.1, np.ones(E), relative_rmse=math.nan, noise_ratio=math.nan), channels=channels
    )
    e = evaluation(
        normalization=normalization("zscore"),
        units=None,
        noise=None,
        checkpoints={200: found},
        baselines={"mean": found},
    )
    figure = figures.draw_channels(e)
    assert [axes.get_ylabel().replace("\n", " ") for axes in figure.axes] == [
        "radiance, units of the file",
        "RMSE of z",
        "RMSE of radiance, units of the file",
    ]
    assert figure.axes[0].get_yscale() == "linear"  # reflectances may be zero
    drawn = panels(figures.draw_metrics(e))
    assert list(drawn) == ["MSE of z", "PSNR", "spectral angle", "RMSE of radiance"]
    for axes in drawn.values():  # of a single checkpoint
        assert list(axes.get_xticks()) == [200]


def test_a_dead_channel_is_a_gap() -> None:
    e = evaluation()
    for found in e.judged().values():
        for values in (found.channels.rmse, found.channels.rmse_radiance, found.channels.relative):
            values[4] = np.nan
    figure = figures.draw_channels(e)
    for axes in figure.axes[1:4]:
        assert np.isnan(axes.lines[0].get_ydata()[4])
        assert np.isfinite(axes.get_ylim()).all()


def test_error_maps_have_one_scale() -> None:
    views = [scene_view("a", (16, 24), whole=True), scene_view("b"), scene_view("c", (40, 24))]
    e = evaluation(views=views)
    figure = figures.draw_error_maps(e)
    drawn = panels(figure)
    images = [drawn[view.id].get_images()[0] for view in views]
    everything = np.concatenate([view.rmse[2:].ravel() for view in views])
    for image, view in zip(images, views, strict=True):
        assert image.get_clim() == (0.0, pytest.approx(np.quantile(everything, 0.99)))
        np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), view.rmse)
        assert image.cmap.get_bad()[:3] == pytest.approx([0.6] * 3)  # grey
    assert figure.axes[-1].get_ylabel() == "RMSE of z over the channels"
    assert figure.legends[0].get_texts()[0].get_text().startswith("not judged")
    assert drawn["a"].get_ylabel() == "y, pixels" and drawn["c"].get_xlabel() == "x, pixels"
    assert_readable(figure)


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


def test_nothing_judged_in_the_views() -> None:
    views = [dataclasses.replace(scene_view("a"), rmse=np.full((8, 8), np.nan, np.float32))]
    image = figures.draw_error_maps(evaluation(views=views)).axes[0].get_images()[0]
    assert image.get_clim() == (0.0, 1.0)


def test_latents_with_the_most_bits_first() -> None:
    e = evaluation()
    figure = figures.draw_latents(e)
    drawn = panels(figure)
    bits = e.checkpoints[200].latents.bits
    order = sorted(range(E), key=lambda k: -bits[k])
    assert list(drawn) == [f"channel {k}: {bits[k]:.3g} bits per cell" for k in order]
    for k, axes in zip(order, drawn.values(), strict=True):
        image, values = axes.get_images()[0], e.views[0].latents[k]
        np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), values)
        np.testing.assert_allclose(image.get_clim(), np.quantile(values[1:], [0.01, 0.99]), rtol=1e-6)
    assert_readable(figure)


def test_rows_of_maps_do_not_touch() -> None:
    """Flat ones, whose ticks are final only when the layout is."""
    assert_readable(figures.draw_latents(evaluation(views=[scene_view("a", (36, 96), whole=True)])))


@pytest.mark.parametrize(("e", "shown"), [(1, 1), (20, 12)])
def test_how_many_latents(e: int, shown: int) -> None:
    """A channel whose bits are not known comes last."""
    bits = np.arange(e, dtype=np.float64)
    bits[-1] = math.nan if e > 1 else 1.0
    found = dataclasses.replace(judged(0.1, np.ones(e)), latents=LatentUse(bits, 1.0, e))
    view = scene_view("a", (16, 96), whole=True, e=e)
    titles = list(panels(figures.draw_latents(evaluation(embed_dim=e, checkpoints={200: found}, views=[view]))))
    assert len(titles) == shown
    assert titles[0].startswith(f"channel {max(e - 2, 0)}:")


def test_worst_tiles_and_the_scene_are_told_by_name() -> None:
    e = evaluation(worst=[tile_view(0.2, 8)])
    figure = figures.draw_worst(e)
    assert figure.axes[0].get_ylabel() == "a\nfrom y = 8, x = 4"
    assert panels(figure)["difference: MSE 0.2"]
    figure = figures.draw_composite(e)
    assert figure.get_suptitle().startswith("a, step 200\n16 x 24 x 12 samples")


def test_files(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each figure that there is something to draw for; the captions name the step."""
    written = {}

    def save(figure: Figure, path) -> bytes:
        written[path] = figure
        return b""

    monkeypatch.setattr(figures, "save_figure", save)
    found = figures.save_figures(evaluation(), tmp_path)
    names = ["metrics", "channels", "error_maps", "worst", "composite", "latents"]
    assert list(found.values()) == list(written) == [tmp_path / f"{name}.png" for name in names]
    assert all("step" in caption for caption in found)
    bare = evaluation(views=[scene_view("b")])
    assert len(figures.save_figures(bare, tmp_path)) == 4
