"""What all pages share: numbers as JSON, series and charts, and a file that needs nothing else and runs no stranger."""

import math

import numpy as np
import pytest
from browsing import HOSTILE, PNG, Reader

from spectralvae.pages import html


def write(path, text="t", charts=()):
    given = {key: [] for key in ("remarks", "tables", "details")}
    data = {"groups": {"steps": {"heading": text, "buttons": ["x", "y"]}}, "charts": list(charts)}
    scripts = ("scales.js", "charts.js", "views.js")
    pictures = {text: html.inline_picture(PNG)}
    html.write_page(path, "report.html", scripts, data, title=text, facts={text: text}, pictures=pictures, **given)
    return Reader(path)


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


def test_charts_are_data_without_nan(tmp_path):
    series = html.series_of("s", "training", "line", [1, 2], [1.0, math.nan], [0.5, math.inf], [2.0, 3.0])
    chart = html.chart_of("x", "steps", "t", "l", "log", [series], {"a": 1 / 3, "b": math.nan})
    page = write(tmp_path / "page.html", charts=[chart])
    assert page.charts["x"]["series"] == [series]
    assert (series["y"], series["low"], series["high"]) == ([1.0, None], [0.5, None], [2.0, 3.0])
    assert page.charts["x"]["references"] == [{"label": "a", "value": 0.333333}]
    with pytest.raises(ValueError, match="JSON"):
        write(tmp_path / "nan.html", charts=[{**chart, "y": math.nan}])
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_the_page_asks_for_nothing_and_hostile_text_makes_no_tag(tmp_path):
    plain, hostile = (write(tmp_path / f"{i}.html", text) for i, text in enumerate(("t", HOSTILE)))
    for page in (plain, hostile):
        names = ("src", "href", "srcset", "data", "action", "background")
        links = [given[name] for _, given in page.tags for name in names if name in given]
        assert len(links) == 2  # picture and icon
        assert all(link.startswith("data:") for link in links)
        policy = next(given["content"] for _, given in page.tags if "http-equiv" in given)
        assert policy.split(";")[:2] == ["default-src 'none'", " img-src data:"]
        assert "unsafe" not in policy
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert (tmp_path / "1.html").read_text().count("{{ 7 * 7 }}") >= 6  # no template either
