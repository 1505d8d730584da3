"""The pictures of a run: that no point is lost, and that axes are what they say."""

import math

import numpy as np
import pytest
from matplotlib.image import imread

from spectralvae.plotting.reconstructions import draw_reconstructions
from spectralvae.training.curves import Curve
from spectralvae.training.plots import draw_curve, draw_curves
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
    axes = draw_curve(curves, "loss", "t", dict(references), spikes).axes[0]
    return axes, {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}


def spans(axes):
    """Lowest and highest value that bands and bars show at each step."""
    corners = [path.vertices for collection in axes.collections for path in collection.get_paths()]
    bars = [line.get_xydata() for line in axes.get_lines() if line.get_label().startswith("_")]
    shown = {}
    for x, y in np.concatenate([*corners, *bars]):
        low, high = shown.get(x, (math.inf, -math.inf))
        shown[x] = min(low, y), max(high, y)
    return shown


def test_linear_until_step_100():
    axes, drawn = draw(make_curves(100, lambda s: 50.0 - s))
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "linear")
    assert drawn["training batch"] == [[s, 50.0 - s] for s in range(0, 101, 10)]
    assert drawn["validation"] == [[s, 51.0 - s] for s in range(0, 101, 20)]


def test_log_log_from_step_100():
    axes, drawn = draw(make_curves(300, lambda s: 1000.0 / (s + 1)), {"PCA": 5.0})
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlim()[0] == 100
    for label in ("training batch", "training, smoothed"):
        assert [x for x, _ in drawn[label]] == list(range(100, 301, 10))
    assert drawn["PCA: 5"][0][1] == 5.0


def test_smoothed_beside_raw():
    """A value that alternates: raw between the two, smoothed in between."""
    _, drawn = draw(make_curves(4000, lambda s: 1.0 if s % 20 else 3.0))
    assert {y for _, y in drawn["training batch"]} == {1.0, 3.0}
    late = [y for x, y in drawn["training, smoothed"] if x > 2000]
    assert late == pytest.approx([2.0] * len(late), abs=0.1)


@pytest.mark.parametrize("value", [lambda s: 200.0 - s, lambda s: -1.0 * s, lambda s: 0.0])
def test_negative_loss_is_on_a_symlog_axis_that_says_so(value):
    """A logarithmic axis would drop what is not positive."""
    axes, drawn = draw(make_curves(400, value))
    assert axes.get_yscale() == "symlog"
    assert "symlog" in axes.get_ylabel()
    shown = np.array(drawn["training batch"] + drawn["validation"])
    assert len(shown) == 31 + 16
    low, high = sorted(axes.get_ylim())
    assert ((shown[:, 1] >= low) & (shown[:, 1] <= high)).all()
    placed = axes.transData.transform(shown)
    assert np.isfinite(placed).all()


@pytest.mark.parametrize("where", ["train", "val"])
def test_one_negative_row_of_a_merged_bin_is_on_the_axis(where):
    """Its bin's mean is positive: the band alone shows it."""
    curves = make_curves(20_000, lambda s: 100.0)
    key = {"train": "loss", "val": "val_loss"}[where]
    curves[key].add(20_001, -50.0)
    points = curves[key].points()
    assert points.mean[-1] > 0 > points.low[-1]
    axes, _ = draw(curves)
    assert axes.get_yscale() == "symlog"
    assert min(axes.get_ylim()) <= -50


def test_smoothed_value_from_before_step_100_is_on_the_axis():
    """All that is shown raw is positive; what the smoothed line still remembers is not."""
    curves = make_curves(400, lambda s: -1e6 if s == 90 else 1.0)
    axes, drawn = draw(curves)
    lowest = min(y for _, y in drawn["training, smoothed"])
    assert lowest < 0
    assert (axes.get_yscale(), min(axes.get_ylim()) <= lowest) == ("symlog", True)


def test_all_negative_values_fill_the_plot():
    """A line at zero would stretch the axis and press the curve into its lower edge."""
    axes, _ = draw(make_curves(400, lambda s: -12000.0 - s))
    assert max(axes.get_ylim()) < -1000


def test_extremes_of_a_long_run_are_drawn():
    """20,000 rows become fewer points; the one outlier of each curve is still in the picture, and in its axis."""
    random = np.random.default_rng(0)
    values = random.lognormal(0, 0.2, 20_001)
    values[15_001] = 1e4
    values[12_001] = 1e-4
    curves = make_curves(200_000, lambda s: float(values[s // 10]))
    curves["val_loss"].add(200_010, 1e5)
    axes, drawn = draw(curves)
    assert len(drawn["training batch"]) < 3000
    assert 1e5 not in np.array(drawn["validation"])  # as the mean of its bin it is hidden
    shown = spans(axes)
    low, high = axes.get_ylim()
    for extreme, step in ((1e4, 150_010), (1e-4, 120_010), (1e5, 200_010)):
        near = [value for x, pair in shown.items() if abs(x - step) <= step / 500 + 10 for value in pair]
        assert extreme in near
        assert low <= extreme <= high


@pytest.mark.parametrize("last", [0, 40, 110, 150])
def test_few_points_are_marked(last):
    """A line through one point is not seen."""
    curves = {"loss": Curve()}
    curves["loss"].add(last, 3.0)
    axes, drawn = draw(curves)
    line = next(line for line in axes.get_lines() if line.get_label() == "training batch")
    assert line.get_marker() == "."
    assert drawn["training batch"] == [[last, 3.0]]


def test_spikes_are_marked_at_the_edge():
    axes, drawn = draw(make_curves(400, lambda s: 1.0 + s), spikes=(99, 131, 240))
    assert [x for x, _ in drawn["spike of loss or gradient"]] == [131, 240]  # the axis begins at 100
    line = next(line for line in axes.get_lines() if line.get_label() == "spike of loss or gradient")
    height = axes.transAxes.inverted().transform(line.get_transform().transform(line.get_xydata()))[:, 1]
    assert (height > 0.95).all() and (height <= 1).all()
    assert "spike of loss or gradient" not in draw(make_curves(400, lambda s: 1.0 + s))[1]


def test_values_that_are_not_finite_are_marked():
    curves = make_curves(400, lambda s: math.nan if s == 250 else math.inf if s == 300 else 5.0)
    axes, drawn = draw(curves)
    assert [x for x, _ in drawn["not finite"]] == [250, 300]
    labels = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert "not finite" in labels


def test_nothing_but_broken_values_is_drawn_all_the_same():
    axes, drawn = draw({"loss": make_curves(400, lambda s: math.nan)["loss"]})
    assert len(drawn["not finite"]) == 31
    assert axes.get_xlim()[0] == 100


def test_plots_are_rewritten_whole(tmp_path):
    curves = {key: Curve() for key in ("loss", "pixel_mse", "kl_loss", "nll_loss")}
    for step in range(300):
        for key, value in zip(curves, (-step, 1 / (step + 1), 1.0, -step), strict=True):
            curves[key].add(step, value)
        if step in (0, 49, 299):
            draw_curves(curves, tmp_path, {"PCA": 0.1}, [150])
            names = sorted(path.name for path in tmp_path.iterdir())
            assert names == ["kl.png", "loss.png", "recons_err.png"]
            for name in names:
                assert imread(tmp_path / name).shape == (550, 880, 4)


def test_reconstructions_share_one_scale_and_keep_gaps(tmp_path):
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
    spectra = [ax for ax in figure.axes if ax.get_xlabel() == "wavelength, nm"]
    assert len(spectra) == 4
    z, radiance = (ax.get_lines()[0].get_ydata() for ax in spectra[:2])
    assert radiance == pytest.approx(np.exp(z.astype(np.float64) * (1 + 1e-8) + 20))
