"""The page of a run: its data against what went in, and the page itself in a headless browser."""

import math
import re
import time

import numpy as np
import pytest
from browsing import HOSTILE, PNG, Reader

from spectralvae.pages import html
from spectralvae.training.curves import Points
from spectralvae.training.dashboard import Dashboard, write_dashboard
from spectralvae.training.logbook import Event


def points(step, mean, half_range=0.0):
    step, mean = np.asarray(step, float), np.asarray(mean, float)
    return Points(step, mean, mean - half_range, mean + half_range, mean)


def dashboard(**changes):
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
        "curves": {
            "loss": loss_points,
            "val_loss": points(step[99::100], loss[99::100] + 1),
            "pixel_mse": points(step, 1 / step),
            "memory_gb": points(step, np.full(2000, 2.5)),
        },
        "references": {"predicting the mean": 1.02, "PCA, 1 component": 0.1},
        "events": [Event(500, "checkpoint", "step=000500"), Event(1500, "spike", "loss 4321, 99 deviations")],
        "n_events": 2,
        "validation": validation,
        "picture": PNG,
        "picture_step": 1900,
        "facts": {"device": "abacus", "parameters": "27,289,893"},
    }
    return Dashboard(**given | changes)


def write(folder, **changes):
    path = folder / "index.html"
    write_dashboard(path, dashboard(**changes))
    return path


# --- what stands in the file ----------------------------------------------------------------------


def test_data_are_what_went_in(tmp_path):
    given = dashboard()
    page = Reader(write(tmp_path))
    training, validation = page.charts["loss"]["series"]
    for series, key in ((training, "loss"), (validation, "val_loss")):
        curve = given.curves[key]
        assert series["x"] == curve.step.tolist()
        assert all(isinstance(step, int) for step in series["x"])
        for name, column in (("y", curve.mean), ("low", curve.low), ("high", curve.high)):
            np.testing.assert_allclose(series[name], column, rtol=5.0001e-6)
    assert training["high"][1499] == 4321.12  # to six digits
    assert page.charts["loss"]["spikes"] == [{"step": 1500, "text": "loss 4321, 99 deviations"}]
    assert page.charts["pixel_mse"]["references"] == [
        {"label": "predicting the mean", "value": 1.02},
        {"label": "PCA, 1 component", "value": 0.1},
    ]
    network, mean = page.charts["rmse"]["series"]
    assert network["y"] == [0.5, None, 0.2]
    assert mean["y"] == [1.0, 1.1, 0.9]
    (spread,) = page.charts["latents"]["series"]
    assert (spread["low"], spread["high"]) == ([-0.4, -0.01], [1.4, 0.01])
    assert "grad_norm" not in page.charts  # no such curve was given


def test_numbers_have_six_digits_and_gaps_are_null():
    values = [0.0, -0.0, 123456.7, -1.23456789e-7, 1.2345678e20, -3e-308, math.nan, math.inf, -math.inf, 999999.9]
    expected = [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
    expected[5] = 0.0  # as good as zero
    assert html.numbers_of(values) == expected
    random = np.random.default_rng(0)
    assert max(len(repr(value)) for value in html.numbers_of(random.normal(size=999) * 1e8)) <= 12
    many = random.normal(size=2000) * 10.0 ** random.integers(-200, 200, 2000)
    assert html.numbers_of(many) == [pytest.approx(float(f"{value:.6g}"), rel=1e-15) for value in many]
    assert html.numbers_of([]) == []


def test_json_never_holds_nan(tmp_path):
    curve = points([1, 2, 3], [1.0, math.nan, math.inf])
    page = Reader(write(tmp_path, curves={"loss": curve}, references={"PCA": math.nan}))
    assert page.charts["loss"]["series"][0]["y"] == [1.0, None, None]
    with pytest.raises(ValueError, match="not JSON compliant"):
        html.write_page(tmp_path / "x.html", "page.html", ("charts.js",), {"value": math.nan})


def test_the_page_asks_for_nothing(tmp_path):
    page = Reader(write(tmp_path))
    links = [
        value
        for tag, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action", "background")
    ]
    assert len(links) == 2  # picture and icon
    assert all(link.startswith("data:") for link in links)
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy


def test_hostile_text_makes_no_tag(tmp_path):
    plain = Reader(write(tmp_path))
    hostile = {
        "title": HOSTILE,
        "facts": {HOSTILE: HOSTILE, "b": "c"},
        "events": [Event(500, HOSTILE, HOSTILE), Event(1500, "spike", HOSTILE)],
        "references": {HOSTILE: 1.0, "PCA": 0.1},
    }
    page = Reader(write(tmp_path, **hostile))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert page.charts["pixel_mse"]["references"][0]["label"] == HOSTILE
    assert (tmp_path / "index.html").read_text().count("{{ 7 * 7 }}") >= 10  # no template either


@pytest.mark.parametrize(
    ("changes", "warnings"),
    [
        ({}, ["1 spike, the newest: loss 4321, 99 deviations (step 1,500)"]),
        ({"events": [], "n_events": 0}, []),
        ({"events": [], "state": "failed"}, ["failed after step 2,000: run.json tells why"]),
        ({"events": [Event(7, "failed", "NaN")], "n_events": 0, "state": "failed"}, ["failed: NaN (step 7)"]),
        ({"events": [Event(7, "warning", "a"), Event(8, "warning", "b")], "n_events": 9}, None),
    ],
)
def test_warnings_come_first(tmp_path, changes, warnings):
    text = write(tmp_path, **changes).read_text()
    listed = text[text.index('id="warnings"') : text.index("</header>")]
    expected = ["at least 2 warnings, the newest: b (step 8)"] if warnings is None else warnings
    assert re.findall("<li>(.*)</li>", listed) == expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (12.4, "12 s"), (600, "10 min"), (3590, "1 h 0 min"), (45000, "12 h 30 min"), (360000, "4 d 4 h")],
)
def test_time_left(tmp_path, seconds, text):
    page = write(tmp_path, seconds_left=seconds).read_text()
    assert f"<dt>time left</dt><dd>{text}</dd>" in page


def big_dashboard():
    random = np.random.default_rng(0)
    step = np.unique(np.geomspace(1, 200_000, 5000).astype(int))[-3600:]
    names = ["loss", "nll_loss", "kl_loss", "pixel_mse"]
    keys = [*names, *(f"val_{name}" for name in names), "grad_norm", "steps_per_second", "memory_gb"]
    noisy = lambda: points(step, random.lognormal(size=len(step)), random.random(len(step)))  # noqa: E731
    validation = {
        "step": 200_000,
        "wavelength": np.linspace(290, 490, 1028).tolist(),
        "mse": random.random(1028).tolist(),
        "variance": random.random(1028).tolist(),
        "latents": {key: random.random(32).tolist() for key in ("bits", "posterior_std", "mean", "std")},
        "active_units": 30,
    }
    return dashboard(
        step=200_000,
        n_steps=200_000,
        curves={key: noisy() for key in keys},
        validation=validation,
        picture=PNG + random.bytes(700_000),
        events=[Event(i, "spike", "loss 4321, 99 deviations above its mean of 12") for i in range(200)],
    )


def test_a_long_run_has_a_small_page(tmp_path):
    write_dashboard(tmp_path / "index.html", big_dashboard())
    assert (tmp_path / "index.html").stat().st_size < 3_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


# --- what a browser makes of it -------------------------------------------------------------------


def labels(browser, chart):
    """Texts of the axes: (x label, y label, ticks)"""
    texts = browser.run(
        f"[...document.querySelectorAll('#chart-{chart} svg text')].map(t => [t.className.baseVal, t.textContent])"
    )
    by = {name: text for name, text in texts if name}
    return by["x-label"], by["y-label"], [text for name, text in texts if not name]


def drawn(browser, chart, selector):
    """Pixels (n, 2) of a path."""
    path = browser.run(f"document.querySelector('#chart-{chart} path.{selector}').getAttribute('d')")
    return np.array(re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path), float)


def domain(browser):
    return browser.run("groups.steps.domain()")


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
    assert browser.run("document.querySelectorAll('.selection').length") == 1
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
    assert (
        browser.run("document.getElementById('step').textContent.replace(/\\s+/g, ' ')")
        == "step 2,000 of 2,000 (100.0%)"
    )
    assert browser.run("document.images.length && document.images[0].naturalWidth") == 1
    click(browser, "x", "linear")
    click(browser, "y", "linear")
    band = drawn(browser, "loss", "band")
    frame = browser.run("(({x, y, width, height}) => [x, y, width, height].map(v => v.baseVal.value))"
                        "(document.querySelector('#chart-loss .frame'))")  # fmt: skip
    top, low, high = band[:, 1].min(), frame[1], frame[1] + frame[3]
    assert top >= low  # the highest is inside the frame
    assert band[:, 1].max() <= high
    at_extreme = band[np.abs(band[:, 0] - (frame[0] + frame[2] * 1499 / 1999)) < 0.06]
    per_pixel = (5000.125 - (2.5 - 0.125)) * 1.1 / frame[3]  # 5 % of margin at both ends
    assert at_extreme[:, 1].min() == pytest.approx(top + (5000.125 - 4321.123) / per_pixel, abs=0.2)
    assert browser.run("document.querySelectorAll('#chart-loss path.triangle').length") == 1
    assert browser.complaints() == []


def test_scales_and_zoom(browser, tmp_path):
    """Buttons and dragging change the axes, a page loaded again remembers, a double click shows all."""
    browser.open(write(tmp_path).as_uri())
    assert labels(browser, "loss")[:2] == ("step (log axis, from 100 on)", "nats per tile (log axis)")
    click(browser, "x", "linear")
    click(browser, "y", "linear")
    assert labels(browser, "loss")[:2] == ("step", "nats per tile")
    assert domain(browser) == [1, 2000]
    ticks = labels(browser, "loss")[2]
    centre = drag(browser, "loss", 0.8, 0.9)
    assert domain(browser) == pytest.approx([1600.2, 1800.1], abs=3)
    x_ticks = {"1,650", "1,700", "1,750", "1,800"}
    assert x_ticks <= set(labels(browser, "loss")[2])
    assert not x_ticks & set(ticks)
    low, high = browser.run("groups.steps.charts[0].y_scale.domain")
    # what is visible: training down to 5000 / 1800, validation up to 5000 / 1700 + 1; neither the start nor the spike
    assert 2.4 < low < 5000 / 1800 < 5000 / 1700 + 1 < high < 4.1
    assert browser.run("groups.steps.charts[1].y_scale.domain[1]") < 1 / 1590  # references do not hold it back
    browser.events.clear()
    browser.run("window.kept = 1")
    browser.send("Page.reload")
    browser.until("!window.kept && document.readyState === 'complete'")
    assert domain(browser) == pytest.approx([1600.2, 1800.1], abs=3)
    assert labels(browser, "loss")[:2] == ("step", "nats per tile")
    for n in (1, 2):
        browser.mouse("mousePressed", *centre, clicks=n)
        browser.mouse("mouseReleased", *centre, clicks=n)
    assert domain(browser) == [1, 2000]
    drag(browser, "pixel_mse", 0.5, 1.2)  # beyond the edge: up to the newest step, whatever it will be
    assert browser.run("location.hash").startswith("#steps.range=1000")
    assert browser.run("groups.steps.range[1]") is None
    assert browser.complaints() == []


def test_read_out(browser, tmp_path):
    browser.open(write(tmp_path).as_uri())
    click(browser, "x", "linear")
    browser.run("groups.steps.hover(1500)")
    text = browser.run("document.querySelector('#chart-loss .readout').textContent")
    assert text.startswith("step 1,500training batch 3.3333 (3.2083 to 4,321.1), smoothed 3.3333")
    assert "validation 4.3333" in text
    assert "step 1,500: loss 4321, 99 deviations" in text
    assert browser.run("document.querySelectorAll('.crosshair').length") == 3  # in all plots against step
    browser.run("groups.steps.hover(1440)")
    text = browser.run("document.querySelector('#chart-loss .readout').textContent")
    assert "validation 4.5714 at 1,400" in text
    assert "deviations" not in text


def test_values_below_zero_are_drawn_on_an_axis_that_says_so(browser, tmp_path):
    step = np.arange(1, 301)
    loss = 200.0 - step
    curves = {"loss": points(step, loss), "kl_loss": points(step, -(loss**2)), "grad_norm": points([1, 2], [0.0, 0.0])}
    browser.open(write(tmp_path, curves=curves, step=300).as_uri())
    assert labels(browser, "loss")[1] == "nats per tile (symlog axis: linear within ±10)"
    # all 300 but those before step 100; 200 - 100 = 100 is the first, -100 the last, as far from the middle
    line = drawn(browser, "loss", "raw")
    assert len(line) == 300
    assert line[-1, 1] - line[199, 1] == pytest.approx(line[199, 1] - line[99, 1], abs=0.2)
    assert {"100", "10", "0", "-10", "-100"} <= set(labels(browser, "loss")[2])
    assert labels(browser, "kl_loss")[1].startswith("nats per tile (symlog axis")
    assert labels(browser, "grad_norm")[1].startswith("L2 norm (symlog axis")
    assert browser.complaints() == []


def test_hostile_names_are_inert(browser, tmp_path):
    folder = tmp_path / "a & <b> #1 ünd 100 %"
    folder.mkdir()
    events = [Event(1500, "spike", HOSTILE), Event(1600, HOSTILE, HOSTILE)]
    path = write(folder, title=HOSTILE, facts={HOSTILE: HOSTILE}, events=events, references={HOSTILE: 1.0})
    browser.open(path.as_uri())
    browser.run("groups.steps.hover(1500)")
    assert browser.run("typeof window.hostile") == "undefined"
    assert browser.run("document.querySelector('h1').firstChild.textContent.trim()") == HOSTILE
    assert HOSTILE in browser.run("document.querySelector('#chart-loss .readout').textContent")
    assert browser.run("document.querySelectorAll('img').length") == 1
    assert browser.complaints() == []
    # were a name to slip through, the page's policy would stop it
    browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=\"data:,\" onerror=\"window.hostile = 3\">')")
    browser.until("document.images[1].complete")
    assert browser.run("typeof window.hostile") == "undefined"


def test_a_page_reloads_until_the_run_is_finished(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(html, "RELOAD_SECONDS", 0)
    finished, running = tmp_path / "finished", tmp_path / "running"
    finished.mkdir()
    running.mkdir()
    browser.open(write(finished).as_uri())
    assert browser.run("document.getElementById('reload')") is None
    browser.run("window.kept = 1")
    time.sleep(1.3)
    assert browser.run("window.kept") == 1
    browser.open(write(running, state="running", step=1000).as_uri())
    browser.run("window.kept = 1; groups.steps.dragging = true")
    write(running, state="running", step=1001)
    time.sleep(1.3)
    assert browser.run("window.kept") == 1  # not under the hand of a reader who zooms
    browser.run("groups.steps.dragging = false")
    browser.until("document.getElementById('step')?.textContent.includes('step 1,001')")
    write(running, state="stopped", step=1002)  # it may be started again
    browser.until("document.getElementById('step')?.textContent.includes('step 1,002')")
    write(running, state="running", step=1003)
    browser.until("document.getElementById('step')?.textContent.includes('step 1,003')")
    browser.run("document.getElementById('reload').click(); window.kept = 1")
    time.sleep(1.3)
    assert browser.run("window.kept") == 1
    assert "No news for" in browser.run("document.getElementById('warnings').textContent")  # it is of January
    assert browser.complaints() == []


@pytest.mark.parametrize("width", [1280, 400])
def test_a_long_run_fits_the_screen(browser, tmp_path, width):
    write_dashboard(tmp_path / "index.html", big_dashboard())
    browser.open((tmp_path / "index.html").as_uri(), width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.querySelectorAll('figure svg .frame').length") == 10
    assert browser.complaints() == []


@pytest.mark.parametrize(
    "changes",
    [
        {"curves": {}, "validation": None, "picture": None, "events": [], "references": {}, "step": 0},
        {"curves": {"loss": points([1], [5.0])}, "step": 1},
        {"curves": {"loss": points([0, 1, 2], [5.0, 4.0, 3.0])}, "step": 2},
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
