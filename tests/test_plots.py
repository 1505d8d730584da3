"""The pictures of a run: that no point is lost, and that axes are what they say."""

import json
import math

import numpy as np
import pytest

from spectralvae.data.normalize import Normalization
from spectralvae.training.figures import draw_reconstructions
from spectralvae.training.logbook import Logbook
from spectralvae.training.plots import draw_curve, draw_curves


def make_rows(last, value, every=10):
    return [
        {"step": s, "loss": value(s), **({"val_loss": value(s) + 1} if s % 20 == 0 else {})}
        for s in range(0, last + 1, every)
    ]


def lines(figure):
    axes = figure.axes[0]
    return axes, {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}


def test_linear_until_step_100():
    axes, drawn = lines(draw_curve(make_rows(100, lambda s: 50.0 - s), "loss", "t", {}))
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "linear")
    assert drawn["training batch"] == [[s, 50.0 - s] for s in range(0, 101, 10)]
    assert drawn["validation"] == [[s, 51.0 - s] for s in range(0, 101, 20)]


def test_log_log_from_step_100():
    figure = draw_curve(make_rows(300, lambda s: 1000.0 / (s + 1)), "loss", "t", {"PCA": 5.0})
    axes, drawn = lines(figure)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlim()[0] == 100
    assert [x for x, _ in drawn["training batch"]] == list(range(100, 301, 10))
    assert drawn["PCA: 5"][0][1] == 5.0


@pytest.mark.parametrize("value", [lambda s: 200.0 - s, lambda s: -1.0 * s, lambda s: 0.0])
def test_negative_loss_is_on_a_symlog_axis_that_says_so(value):
    """A logarithmic axis would drop what is not positive."""
    axes, drawn = lines(draw_curve(make_rows(400, value), "loss", "t", {}))
    assert axes.get_yscale() == "symlog"
    assert "symlog" in axes.get_ylabel()
    shown = np.array(drawn["training batch"] + drawn["validation"])
    assert len(shown) == 31 + 16
    low, high = sorted(axes.get_ylim())
    assert ((shown[:, 1] >= low) & (shown[:, 1] <= high)).all()
    placed = axes.transData.transform(shown)
    assert np.isfinite(placed).all()


def test_all_negative_values_fill_the_plot():
    """A line at zero would stretch the axis and press the curve into its lower edge."""
    axes, _ = lines(draw_curve(make_rows(400, lambda s: -12000.0 - s), "loss", "t", {}))
    assert max(axes.get_ylim()) < -1000


def test_plots_are_rewritten_whole(tmp_path):
    rows = [{"step": s, "loss": -s, "pixel_mse": 1 / (s + 1), "kl_loss": 1.0, "nll_loss": -s} for s in range(300)]
    for n in (1, 50, 300):
        draw_curves(rows[:n], tmp_path, {})
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["kl.png", "loss.png", "recons_err.png"]


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


def test_logbook_cuts_off_what_a_kill_undid(tmp_path):
    book = Logbook(tmp_path, 0)
    for step in range(6):
        book.log({"step": step, "loss": 1.0 / 3 + step})
    book.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a row that a kill tore
    book = Logbook(tmp_path, 3)
    assert [row["step"] for row in book.rows] == [0, 1, 2, 3]
    book.log({"step": 4, "loss": math.pi})
    book.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == book.rows
    assert book.first("loss") == 1.0 / 3
    assert book.last("loss") == math.pi
    assert book.last("val_loss") is None
    timing = [json.loads(line)["step"] for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert timing == [0, 1, 2, 3, 4, 5, 4]  # all time that was spent
