"""The page of a run: its data against what went in, and the page itself in a headless browser."""

import math
import re
import time

import numpy as np
import pytest
from browsing import HOSTILE, PNG, Reader

from spectralvae.training import dashboard
from spectralvae.training.curves import Points
from spectralvae.training.dashboard import Dashboard, write_dashboard
from spectralvae.training.logbook import Event

SPIKE = "loss 4321"


def points(step, mean, half_range=0.0):
    step, mean = np.asarray(step, float), np.asarray(mean, float)
    return Points(step, mean, mean - half_range, mean + half_range, mean)


def run_of(**changes):
    step = np.arange(1, 2001)
    loss = 5000 / step
    loss_points = points(step, loss, 0.125)
    loss_points.high[1499] = 4321.123  # one row of a bin
    validation = {
        "step": 2000,
        "wavelength": [290.0, 390.0, 490.0],
        "mse": [0.25, None, 0.04],
        "variance": [1.0, 1.21, 0.81],
        "latents": {"bits": [3.5, 0.0], "posterior_std": [0.1, 1.0], "mean": [0.5, 0.0], "std": [0.9, 0.01]},
        "active_units": 1,
    }
    given = {
        "title": "a run",
        "state": "finished",
        "step": 2000,
        "n_steps": 2000,
        "updated": "2026-01-02T03:04:05+00:00",
        "seconds_left": None,
        "tiles_per_second": 12.3,
        "grad_clip": 0.25,
        "curves": {
            "loss": loss_points,
            "val_loss": points(step[99::100], loss[99::100] + 1),
            "pixel_mse": points(step, 1 / step),
            "memory_gb": points(step, np.full(2000, 2.5)),
        },
        "references": {"mean": 1.02, "PCA 1": 0.1},
        "events": [Event(500, "checkpoint", "step=000500"), Event(1500, "spike", SPIKE)],
        "n_events": 2,
        "validation": validation,
        "picture": PNG,
        "picture_step": 1900,
        "facts": {"device": "abacus", "parameters": "27,289,893"},
    }
    return Dashboard(**given | changes)


def write(folder, **changes):
    path = folder / "index.html"
    write_dashboard(path, run_of(**changes))
    return path


# --- what stands in the file ----------------------------------------------------------------------


def test_data_are_what_went_in(tmp_path):
    given = run_of()
    page = Reader(write(tmp_path))
    training, validation = page.charts["loss"]["series"]
    for series, key in ((training, "loss"), (validation, "val_loss")):
        curve = given.curves[key]
        assert series["x"] == curve.step.tolist()
        assert all(isinstance(step, int) for step in series["x"])
        for name, column in (("y", curve.mean), ("low", curve.low), ("high", curve.high)):
            np.testing.assert_allclose(series[name], column, rtol=5.0001e-6)
    assert training["high"][1499] == 4321.12  # to six digits
    assert page.charts["loss"]["spikes"] == [{"step": 1500, "text": SPIKE}]
    references = page.charts["pixel_mse"]["references"]
    assert references == [{"label": "mean", "value": 1.02}, {"label": "PCA 1", "value": 0.1}]
    network, mean = page.charts["rmse"]["series"]
    assert network["y"] == [0.5, None, 0.2]
    assert mean["y"] == [1.0, 1.1, 0.9]
    (spread,) = page.charts["latents"]["series"]
    assert (spread["low"], spread["high"]) == ([-0.4, -0.01], [1.4, 0.01])
    assert "grad_norm" not in page.charts  # no such curve was given


def test_the_gradient_norm_is_shown_with_its_clip(tmp_path):
    """Far above it, as a sum over samples is."""
    chart = Reader(write(tmp_path, curves={"grad_norm": points([1, 2], [2e5, 1e5])})).charts["grad_norm"]
    assert chart["references"] == [{"label": "training.grad_clip", "value": 0.25}]
    assert "samples" in chart["title"]


@pytest.mark.parametrize(
    ("changes", "warnings"),
    [
        ({}, [("1 spike", SPIKE, "1,500")]),
        ({"events": [], "n_events": 0}, []),
        ({"events": [], "state": "failed"}, [("failed", "2,000", "run.json")]),
        ({"events": [Event(7, "failed", "NaN")], "n_events": 0, "state": "failed"}, [("failed", "NaN", "step 7")]),
        ({"events": [Event(7, "warning", "a"), Event(8, "warning", "b")], "n_events": 9}, [("least 2", "b", "step 8")]),
    ],
)
def test_warnings_come_first(tmp_path, changes, warnings):
    text = write(tmp_path, **changes).read_text()
    listed = re.findall("<li>(.*)</li>", text[text.index('id="warnings"') : text.index("</header>")])
    assert len(listed) == len(warnings)
    assert all(word in line for line, words in zip(listed, warnings, strict=True) for word in words)


def test_time_left(tmp_path):
    for seconds, text in ((None, "–"), (12.4, "12 s"), (600, "10 min"), (3590, "1 h 0 min"), (360000, "4 d 4 h")):
        assert f"<dd>{text}</dd>" in write(tmp_path, seconds_left=seconds, tiles_per_second=1.0).read_text()


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """The page of 200,000 steps, with all curves and as many channels, events and bytes of picture as there may be."""
    random = np.random.default_rng(0)
    step = np.unique(np.geomspace(1, 200_000, 5000).astype(int))[-3600:]
    names = ["loss", "nll_loss", "kl_loss", "pixel_mse"]
    keys = [*names, *(f"val_{name}" for name in names), "grad_norm", "steps_per_second", "memory_gb"]
    validation = {key: random.random(1028).tolist() for key in ("wavelength", "mse", "variance")}
    latents = {key: random.random(32).tolist() for key in ("bits", "posterior_std", "mean", "std")}
    return write(
        tmp_path_factory.mktemp("long"),
        step=200_000,
        n_steps=200_000,
        curves={key: points(step, random.lognormal(size=len(step)), random.random(len(step))) for key in keys},
        validation={"step": 200_000, **validation, "latents": latents, "active_units": 30},
        picture=PNG + random.bytes(700_000),
        events=[Event(i, "spike", SPIKE * 5) for i in range(200)],
    )


# --- what a browser makes of it -------------------------------------------------------------------


def axes(browser, chart):
    """Text of the y axis, and ticks of both."""
    texts = browser.run(
        f"[...document.querySelectorAll('#chart-{chart} svg text')].map(t => [t.className.baseVal, t.textContent])"
    )
    return dict(texts)["y-label"], {text for name, text in texts if not name}


def drawn(browser, chart, selector):
    """Pixels (n, 2) of a path."""
    path = browser.run(f"document.querySelector('#chart-{chart} path.{selector}').getAttribute('d')")
    return np.array(re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path), float)


def scales(browser, i=0):
    """Whether x and y of a chart against step are logarithmic, and the threshold of symlog."""
    return browser.run(f"(({{x, y_scale}}) => [x.log, y_scale.log, y_scale.threshold])(groups.steps.charts[{i}])")


def count(browser, selector):
    return browser.run(f"document.querySelectorAll('{selector}').length")


def domain(browser):
    return browser.run("groups.steps.domain()")


def readout(browser, x):
    browser.run(f"groups.steps.hover({x})")
    return browser.run("document.querySelector('#chart-loss .readout').textContent")


def drag(browser, chart, start, end):
    """Drag over shares of the plot's width."""
    script = f"""(() => {{
        const svg = document.querySelector('#chart-{chart} svg');
        svg.scrollIntoView({{block: 'center'}});
        const frame = svg.querySelector('.frame').getBoundingClientRect();
        return [frame.left, frame.width, frame.top + frame.height / 2];
    }})()"""
    left, width, y = browser.run(script)
    browser.mouse("mousePressed", left + start * width, y)
    browser.mouse("mouseMoved", left + (start + end) / 2 * width, y)
    assert count(browser, ".selection") == 1
    browser.mouse("mouseMoved", left + end * width, y)
    browser.mouse("mouseReleased", left + end * width, y)
    return left + (start + end) / 2 * width, y


def click(browser, axis, scale):
    browser.run(f"document.querySelector('[data-axis={axis}][data-scale={scale}]').click()")


def test_page_from_a_file(browser, tmp_path):
    """No complaint, no request, the last step and every extreme are there."""
    url = write(tmp_path).as_uri()
    browser.open(url)
    assert browser.complaints() == []
    assert browser.requests() == [url]
    progress = browser.run("document.getElementById('step').textContent")
    assert re.findall(r"[\d,.%]+", progress) == ["2,000", "2,000", "100.0%"]
    assert browser.run("document.images[0].naturalWidth") == 1
    click(browser, "x", "linear")
    click(browser, "y", "linear")
    band = drawn(browser, "loss", "band")
    values = "['x', 'y', 'width', 'height'].map(key => document.querySelector('#chart-loss .frame')[key].baseVal.value)"
    left, top_of_frame, width, height = browser.run(values)
    top = band[:, 1].min()
    assert top_of_frame <= top and band[:, 1].max() <= top_of_frame + height
    at_extreme = band[np.abs(band[:, 0] - (left + width * 1499 / 1999)) < 0.06]
    per_pixel = (5000.125 - (2.5 - 0.125)) * 1.1 / height  # 5 % of margin at both ends
    assert at_extreme[:, 1].min() == pytest.approx(top + (5000.125 - 4321.123) / per_pixel, abs=0.2)
    assert count(browser, "svg .triangle") == 2  # the spike, in both charts of learning
    text = readout(browser, 1500)
    # step, mean, range and smoothed value of training, validation
    assert re.findall(r"[\d,]*\d\.?\d*", text)[:6] == ["1,500", "3.3333", "3.2083", "4,321.1", "3.3333", "4.3333"]
    assert text.endswith(SPIKE)
    assert count(browser, ".crosshair") == 3  # in all plots against step
    assert readout(browser, 1440).endswith("4.5714 at 1,400")  # the nearest validation; no spike
    assert browser.complaints() == []


def test_scales_and_zoom(browser, tmp_path):
    """Buttons and dragging change the axes, a page loaded again remembers, a double click shows all."""
    browser.open(write(tmp_path).as_uri())
    assert scales(browser) == [True, True, 0]
    assert domain(browser) == [100, 2000]
    click(browser, "x", "linear")
    click(browser, "y", "linear")
    assert scales(browser) == [False, False, 0]
    assert domain(browser) == [1, 2000]
    _, ticks = axes(browser, "loss")
    centre = drag(browser, "loss", 0.8, 0.9)
    assert domain(browser) == pytest.approx([1600.2, 1800.1], abs=3)
    x_ticks = {"1,650", "1,700", "1,750", "1,800"}
    assert x_ticks <= axes(browser, "loss")[1]
    assert not x_ticks & ticks
    low, high = browser.run("groups.steps.charts[0].y_scale.domain")
    # what is visible: training down to 5000 / 1800, validation up to 5000 / 1700 + 1; neither the start nor the spike
    assert 2.4 < low < 5000 / 1800 < 5000 / 1700 + 1 < high < 4.1
    assert browser.run("groups.steps.charts[1].y_scale.domain[1]") < 1 / 1590  # references do not hold it back
    browser.events.clear()
    browser.run("window.kept = 1")
    browser.send("Page.reload")
    browser.until("!window.kept && document.readyState === 'complete'")
    assert domain(browser) == pytest.approx([1600.2, 1800.1], abs=3)
    assert scales(browser) == [False, False, 0]
    for n in (1, 2):
        browser.mouse("mousePressed", *centre, clicks=n)
        browser.mouse("mouseReleased", *centre, clicks=n)
    assert domain(browser) == [1, 2000]
    drag(browser, "pixel_mse", 0.5, 1.2)  # beyond the edge: up to the newest step, whatever it will be
    assert browser.run("location.hash").startswith("#steps.range=1000")
    assert browser.run("groups.steps.range[1]") is None
    assert browser.complaints() == []


def test_values_below_zero_are_drawn_on_an_axis_that_says_so(browser, tmp_path):
    step = np.arange(1, 301)
    loss = 200.0 - step
    curves = {"loss": points(step, loss), "kl_loss": points(step, -(loss**2)), "grad_norm": points([1, 2], [0.0, 0.0])}
    browser.open(write(tmp_path, curves=curves, step=300).as_uri())
    assert scales(browser) == [True, True, 10]
    # all 300 but those before step 100; 200 - 100 = 100 is the first, -100 the last, as far from the middle
    line = drawn(browser, "loss", "raw")
    assert len(line) == 300
    assert line[-1, 1] - line[199, 1] == pytest.approx(line[199, 1] - line[99, 1], abs=0.2)
    label, ticks = axes(browser, "loss")
    assert {"100", "10", "0", "-10", "-100"} <= ticks
    assert "±10" in label
    assert all("symlog" in axes(browser, chart)[0] for chart in curves)
    assert browser.complaints() == []


def test_hostile_names_are_inert(browser, tmp_path):
    """In what scripts write, too."""
    events = [Event(1500, "spike", HOSTILE), Event(1600, HOSTILE, HOSTILE)]
    given = {"title": HOSTILE, "facts": {HOSTILE: HOSTILE, "b": "c"}, "references": {HOSTILE: 1.0, "PCA": 0.1}}
    plain = Reader(write(tmp_path)).tags
    path = write(tmp_path, events=events, **given)
    assert [tag for tag, _ in Reader(path).tags] == [tag for tag, _ in plain]
    browser.open(path.as_uri())
    assert HOSTILE in readout(browser, 1500)
    assert browser.run("typeof window.hostile") == "undefined"
    assert count(browser, "img") == 1
    assert browser.complaints() == []


def test_a_page_reloads_until_the_run_is_finished(browser, tmp_path, monkeypatch):
    """What it does once a second is done here when the test says so."""
    monkeypatch.setattr(dashboard, "RELOAD_SECONDS", 0)
    source = "window.setInterval = (call) => { window.tick = call; }"
    script = browser.send("Page.addScriptToEvaluateOnNewDocument", source=source)

    def stays():
        browser.run("window.kept = 1; tick()")
        time.sleep(0.2)
        return browser.run("window.kept") == 1

    def becomes(step):
        shown = f"document.getElementById('step')?.textContent.includes('{step}')"
        browser.until(f"{shown} || (window.tick?.(), false)")

    browser.open(write(tmp_path).as_uri())
    assert count(browser, "#reload") == 0
    assert stays()
    browser.open(write(tmp_path, state="running", step=1000).as_uri())
    browser.run("groups.steps.dragging = true")
    write(tmp_path, state="running", step=1001)
    assert stays()  # not under the hand of a reader who zooms
    browser.run("groups.steps.dragging = false")
    becomes("1,001")
    write(tmp_path, state="stopped", step=1002)  # it may be started again
    becomes("1,002")
    write(tmp_path, state="running", step=1003)
    becomes("1,003")
    browser.run("document.getElementById('reload').click()")
    assert stays()
    assert count(browser, "#stale") == 1  # it is of January
    assert browser.complaints() == []
    browser.send("Page.removeScriptToEvaluateOnNewDocument", **script)


@pytest.mark.parametrize("width", [1280, 400])
def test_a_long_run_fits_the_screen(browser, long_run, width):
    assert long_run.stat().st_size < 3_000_000
    browser.open(long_run.as_uri(), width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert count(browser, "figure svg .frame") == 10
    assert browser.complaints() == []


@pytest.mark.parametrize(
    "changes",
    [
        {"curves": {}, "validation": None, "picture": None, "events": [], "references": {}, "step": 0},
        {"curves": {"loss": points([1], [5.0])}, "step": 1},
        {"curves": {"loss": points([500], [math.nan])}, "step": 500},
        {"curves": {"loss": points([1, 2, 3], [1.0, math.nan, 2.0]), "val_loss": points([3], [0.0])}},
    ],
)
def test_a_young_or_broken_run_has_a_page(browser, tmp_path, changes):
    browser.open(write(tmp_path, **changes).as_uri())
    for axis in ("x", "y") if changes["curves"] else ():
        for scale in ("linear", "log"):
            click(browser, axis, scale)
    paths = browser.run("[...document.querySelectorAll('svg *')].map(node => node.outerHTML).join()")
    assert not re.search("NaN|Infinity|undefined|null", paths)
    assert browser.complaints() == []
