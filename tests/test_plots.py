"""The pictures of a run: that no point is lost, and that axes are what they say."""

import math
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from spectralvae.plotting.reconstructions import draw_reconstructions
from spectralvae.training.curves import Curve
from spectralvae.training.plots import BROKEN_COLOR, SPIKE_COLOR, TRAIN_COLOR, VAL_COLOR, draw_curve, draw_curves
from spectralvae.weights.normalization import Normalization


def make_curves(last, value, every=10):
    """The loss every so many steps, and validation, one higher, every 20."""
    curves = {key: Curve() for key in ("loss", "val_loss")}
    for step in range(0, last + 1, every):
        curves["loss"].add(step, value(step))
        if step % 20 == 0:
            curves["val_loss"].add(step, value(step) + 1)
    return curves


def draw(curves, references=(), spikes=()):
    """The axes, and the points (n, 2) of each line: training raw and smoothed, validation, marks, references."""
    axes = draw_curve(curves, "loss", "t", dict(references), spikes).axes[0]
    of_color = {}
    for line in axes.get_lines():
        of_color.setdefault(line.get_color(), []).append(line.get_xydata())
    raw, smoothed = of_color.get(TRAIN_COLOR, (None, None))
    lines = {"raw": raw, "smoothed": smoothed, "val": of_color.get(VAL_COLOR, [None])[-1]}  # behind its bars
    lines |= {"spikes": of_color.get(SPIKE_COLOR), "broken": of_color.get(BROKEN_COLOR)}
    return axes, lines | {"references": of_color.get("0.45")}


def test_linear_until_step_100_then_log_log():
    axes, drawn = draw(make_curves(100, lambda s: 50.0 - s))
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "linear")
    assert drawn["raw"].tolist() == [[s, 50.0 - s] for s in range(0, 101, 10)]
    assert drawn["val"].tolist() == [[s, 51.0 - s] for s in range(0, 101, 20)]
    assert drawn["spikes"] is drawn["broken"] is drawn["references"] is None
    axes, drawn = draw(make_curves(300, lambda s: 1000.0 / (s + 1)), {"PCA": 5.0})
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlim()[0] == 100
    for line in ("raw", "smoothed"):
        assert drawn[line][:, 0].tolist() == list(range(100, 301, 10))
    assert drawn["references"][0][:, 1].tolist() == [5.0, 5.0]
    _, drawn = draw(make_curves(4000, lambda s: 1.0 if s % 20 else 3.0))
    assert set(drawn["raw"][:, 1]) == {1.0, 3.0}
    late = drawn["smoothed"][drawn["smoothed"][:, 0] > 2000, 1]
    assert late == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize(
    ("value", "lowest"),
    [
        (lambda s: 200.0 - s, -200),
        (lambda s: 0.0, 0),
        # all that is shown raw is positive; what the smoothed line still remembers from before step 100 is not
        (lambda s: -1e6 if s == 90 else 1.0, -1e4),
        (lambda s: -12000.0 - s, -12400),
    ],
)
def test_what_is_not_positive_is_on_a_symlog_axis_that_says_so(value, lowest):
    """A logarithmic axis would drop it."""
    axes, drawn = draw(make_curves(400, value))
    assert axes.get_yscale() == "symlog"
    assert "symlog" in axes.get_ylabel()
    assert (len(drawn["raw"]), len(drawn["val"])) == (31, 16)
    shown = np.concatenate([drawn["raw"], drawn["val"], drawn["smoothed"]])
    low, high = sorted(axes.get_ylim())
    assert low <= shown[:, 1].min() <= lowest
    assert shown[:, 1].max() <= high
    assert high < 0 or lowest > -12000  # a line at zero would press a curve far below it into the lower edge
    assert np.isfinite(axes.transData.transform(shown)).all()


@pytest.mark.parametrize(
    "value",
    [
        lambda share: 1e7 * (1 - share) ** 3 - 1e4 * share,
        lambda share: 10 ** (7 - 48 * share) if share < 0.5 else -(10 ** (42 * share - 38)),  # of many decades
        lambda share: 1e-3 * np.sin(30 * share),
        lambda share: 3 - 4 * share,
        lambda share: -1e-9 if share > 0.9 else 0.0,
        lambda share: 1e7 if share < 0.02 else -1e4 - share,
        lambda share: -1e5 + 10 * share,  # no decade
        lambda share: -1234567.8 + 1e3 * share,
        lambda share: -12000 - 2e5**share,
    ],
)
def test_labels_of_a_symlog_axis_are_there_and_apart(value):
    curve = Curve()
    for step in np.geomspace(1, 200_000, 1000).astype(int):
        if step > curve.newest:
            curve.add(int(step), float(value(np.log(step) / np.log(200_000))))
    figure = draw_curve({"loss": curve}, "loss", "t", {}, [])
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    assert axes.get_yscale() == "symlog"
    low, high = axes.get_ylim()
    shown = [tick.label1 for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert 3 <= len({label.get_text() for label in shown}) == len(shown)
    boxes = sorted((label.get_window_extent() for label in shown), key=lambda box: box.y0)
    assert all(below.y1 < above.y0 for below, above in pairwise(boxes))
    places = np.array([axes.bbox.y0, *((box.y0 + box.y1) / 2 for box in boxes), axes.bbox.y1])
    assert np.diff(places).max() < 0.6 * axes.bbox.height


@pytest.mark.parametrize("key", ["loss", "val_loss"])
def test_one_negative_row_of_a_merged_bin_is_on_the_axis(key):
    """Its bin's mean is positive: the band alone shows it."""
    curves = make_curves(20_000, lambda s: 100.0)
    curves[key].add(20_001, -50.0)
    assert curves[key].points().mean[-1] > 0
    axes, _ = draw(curves)
    assert axes.get_yscale() == "symlog"
    assert min(axes.get_ylim()) <= -50


def test_extremes_of_a_long_run_are_drawn():
    """20,000 rows become fewer points; the outliers of each curve are still in the picture, and in its axis."""
    values = np.random.default_rng(0).lognormal(0, 0.2, 20_001)
    values[[12_001, 15_001]] = 1e-4, 1e4
    curves = make_curves(200_000, lambda s: float(values[s // 10]))
    curves["val_loss"].add(200_010, 1e5)
    axes, drawn = draw(curves)
    assert len(drawn["raw"]) < 3000
    assert 1e5 not in drawn["val"]  # as the mean of its bin it is hidden
    bands = [path.vertices for collection in axes.collections for path in collection.get_paths()]
    bars = [line.get_xydata() for line in axes.get_lines() if line.get_label().startswith("_")]
    for extreme, step in ((1e4, 150_010), (1e-4, 120_010), (1e5, 200_010)):
        near = [y for x, y in np.concatenate([*bands, *bars]) if abs(x - step) <= step / 500 + 10]
        assert extreme in near
        assert axes.get_ylim()[0] <= extreme <= axes.get_ylim()[1]


@pytest.mark.parametrize("last", [0, 150])
def test_few_points_are_marked(last):
    """A line through one point is not seen."""
    curves = {"loss": Curve()}
    curves["loss"].add(last, 3.0)
    axes, drawn = draw(curves)
    assert axes.get_lines()[0].get_marker() == "."
    assert drawn["raw"].tolist() == [[last, 3.0]]


def test_spikes_are_marked_at_the_edge():
    axes, drawn = draw(make_curves(400, lambda s: 1.0 + s), spikes=(99, 131, 240))
    (marks,) = drawn["spikes"]
    assert marks[:, 0].tolist() == [131, 240]  # the axis begins at 100
    line = next(line for line in axes.get_lines() if line.get_color() == SPIKE_COLOR)
    height = axes.transAxes.inverted().transform(line.get_transform().transform(marks))[:, 1]
    assert (height > 0.95).all() and (height <= 1).all()


def test_values_that_are_not_finite_are_marked():
    curves = make_curves(400, lambda s: math.nan if s == 250 else math.inf if s == 300 else 5.0)
    axes, drawn = draw(curves)
    assert drawn["broken"][0][:, 0].tolist() == [250, 300]
    assert len(axes.figure.legends[0].get_texts()) == 4  # raw, smoothed, validation, and these
    axes, drawn = draw({"loss": make_curves(400, lambda s: math.nan)["loss"]})  # nothing else
    assert len(drawn["broken"][0]) == 31
    assert axes.get_xlim()[0] == 100


def test_plots_are_rewritten_whole(tmp_path):
    curves = {key: Curve() for key in ("loss", "pixel_mse", "kl_loss")}
    for step in (0, 299):
        for curve, value in zip(curves.values(), (-step, 1 / (step + 1), 1.0), strict=True):
            curve.add(step, value)
        draw_curves(curves, tmp_path, {"PCA": 0.1}, [150])
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["kl.png", "loss.png", "recons_err.png"]
        assert all(imread(tmp_path / name).shape == (550, 880, 4) for name in names)


def test_reconstructions_share_one_scale_and_keep_gaps():
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 8, 8, 5)).astype(np.float32)
    x[0, :3] = np.nan
    normalization = Normalization(
        "log_zscore", np.full(5, 20.0), np.ones(5), 10.0, 1.0, None, np.linspace(300.0, 310.0, 5)
    )
    x_hat = np.where(np.isfinite(x), x, 0) + 0.1
    figure = draw_reconstructions(x, x_hat.astype(np.float32), ["a", "b"], normalization, "step 1")
    maps = [ax.get_images()[0] for ax in figure.axes if ax.get_images()]
    for original, reconstruction, difference in (maps[:3], maps[3:6]):
        assert original.get_clim() == reconstruction.get_clim()
        low, high = difference.get_clim()
        assert low == -high
        values = np.ma.filled(difference.get_array(), np.nan)
        assert np.nanmax(np.abs(values)) == pytest.approx(0.1, abs=1e-5)
        assert np.nanmax(np.abs(values)) <= high
    for shown in maps[:3]:  # what is invalid in the original is not painted in the reconstruction either
        assert np.isnan(np.ma.filled(shown.get_array(), np.nan)[:3]).all()
    spectra = [ax for ax in figure.axes if not ax.get_images() and ax.get_lines()]
    assert len(spectra) == 4
    z, radiance = (ax.get_lines()[0].get_ydata() for ax in spectra[:2])
    assert radiance == pytest.approx(np.exp(z.astype(np.float64) * (1 + 1e-8) + 20))
