"""report.html: its numbers and marks against what went in, and the page in a headless browser."""

from __future__ import annotations

import dataclasses
import math
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from browsing import HOSTILE, PNG, Browser, Reader
from evaluations import BASELINES, NC, WAVELENGTH, E, dull, evaluation, judged

from spectralvae.analysis.comparison import drawn_baselines, opponent, quantities, verdicts, written
from spectralvae.analysis.evaluation import Evaluation
from spectralvae.analysis.report import Table, write_evaluation_report, write_report
from spectralvae.pages.html import chart_of

CHARTS = {
    "steps": ["mse", "psnr", "spectral_angle", "rmse_radiance", "relative_rmse", "noise_ratio"],
    "wavelength": ["mean_spectrum", "channel_rmse", "channel_rmse_radiance", "channel_relative", "channel_noise"],
    "latents": ["bits"],
}


def write(folder: Path, e: Evaluation | None = None) -> Path:
    path = folder / "report.html"
    write_evaluation_report(path, e or evaluation(), {"a picture": PNG, "another one": PNG})
    return path


def tables(path: Path) -> list[list[tuple[str, list[tuple[str, str]]]]]:
    """Rows of each table of a page: attributes of the row; attributes and text of its cells."""
    row, cell = (rf"<{tag}([^>]*)>(.*?)</{tag}>" for tag in ("tr", "t[hd]"))
    return [
        [(attributes, re.findall(cell, unescape(content))) for attributes, content in re.findall(row, table, re.DOTALL)]
        for table in re.findall("<table.*?</table>", path.read_text(), re.DOTALL)
    ]


def rows(table: list[tuple[str, list[tuple[str, str]]]]) -> list[list[str]]:
    return [[text for _, text in cells] for _, cells in table]


def marked(table: list[tuple[str, list[tuple[str, str]]]]) -> list[set[int]]:
    """The columns that each row is the best of."""
    return [{i for i, (attributes, _) in enumerate(cells) if "best" in attributes} for _, cells in table]


def columns(e: Evaluation) -> list[str]:
    return ["", "floats", *(q.key for q in quantities(e)), "bits", "active"]


def test_order_and_facts(tmp_path: Path) -> None:
    """First what was judged and the verdict, then the table, charts, pictures, scenes."""
    path = write(tmp_path)
    text = unescape(path.read_text())
    parts = ["runs/x/store", *verdicts(evaluation()), ">PCA 8<", 'id="chart-mse"', "a picture", "another", "<td>a</td>"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    facts = " ".join(map(" ".join, rows(tables(path)[0])))
    numbers = ["100, 200, 300", " 5 ", "8 x 8", "12 channels", "10,000", " 1 ", "2 x 2", "2 floats", " 10:", " 0.02"]
    assert all(text in facts for text in ("runs/x/train", *numbers))
    assert [written(value) for value in (0.0012345, 1234567.0, math.nan)] == ["0.001234", "1.235e06", "–"]


def test_the_table_marks_the_best_of_what_is_as_small(tmp_path: Path) -> None:
    _, table, scenes = tables(write(tmp_path))
    keys = columns(evaluation())
    header, *body = rows(table)
    assert len(header) == len(keys)
    assert [row[:3] for row in body] == [
        ["step 100", "2", "0.16"],
        ["step 200", "2", "0.09"],
        ["step 300", "2", "0.1225"],
        ["predicting the mean", "0", "1"],
        ["PCA 1", "1", "0.25"],
        ["PCA 2", "2", "0.04"],
        ["PCA 4", "4", "0.01"],
        ["PCA 8", "8", "0.0025"],
    ]
    # in all columns PCA 2 is the best: the larger ones do not compete
    assert marked(table) == [set()] * 6 + [set(range(2, len(keys) - 2))] + [set()] * 2
    assert ["aside" in attributes for attributes, _ in table] == [False] * 7 + [True] * 2
    assert body[1][-2:] == [written(22.5 / 4), "7 of 8"] and body[5][-2:] == ["–", "–"]
    assert body[1][keys.index("explained_variance")] == "0.91000"
    # 1.5 and 0.5 times the MSE of all
    _, a, b = rows(scenes)
    assert a == ["a", "2024-06-01T15:00:00+00:00", "6,000", "0.135", "0.06", "2.25", "0.09", "3", "3"]
    assert b[:4] == ["b", "–", "4,000", "0.045"]


def test_ties_are_marked_together_and_psnr_is_better_when_larger(tmp_path: Path) -> None:
    e = evaluation(baselines={name: judged(mse) for name, mse in (BASELINES | {"pca_2": 0.09000001}).items()})
    table = tables(write(tmp_path, e))[1]
    for key in ("mse", "psnr", "explained_variance"):
        best = [row[0] for row, of in zip(rows(table), marked(table), strict=True) if columns(e).index(key) in of]
        assert best == ["step 200", "PCA 2"]


@pytest.mark.parametrize(
    ("e", "scale", "names", "expected", "numbers"),
    [
        (8, 2, BASELINES, "pca_2", ["(2)"]),  # as many floats a pixel
        (12, 2, BASELINES, "pca_4", ["(4)", "(3)"]),  # more: those of PCA, those of the latents
        (1, 4, BASELINES, "pca_1", ["(1)", "(0.0625)"]),
        (64, 2, BASELINES, "pca_8", ["(8)", "(16)"]),  # fewer
        (8, 2, ("mean",), "mean", []),
    ],
)
def test_opponent(e: int, scale: int, names: tuple[str, ...], expected: str, numbers: list[str]) -> None:
    baselines = {name: judged(BASELINES[name]) for name in names}
    found = evaluation(embed_dim=e, scale=scale, baselines=baselines)
    assert opponent(found) == expected
    assert re.findall(r"\([\d.]+\)", verdicts(found)[0]) == numbers
    assert len(drawn_baselines(found)) <= 3 and "mean" not in drawn_baselines(found)


PERFECT = dataclasses.replace(judged(0.01), metrics=judged(0.01).metrics | {"mse": 0.0})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [(False, "0.09", "0.04", "2.25"), (False, "15", "10", "1.5")]),
        (  # each for itself
            {"checkpoints": {200: judged(0.01, np.ones(E), noise_ratio=20.0)}},
            [(True, "0.01", "0.04", "0.25"), (False, "20", "10", "2")],
        ),
        # no better is not beaten
        ({"checkpoints": {200: judged(0.04, np.ones(E), noise_ratio=math.nan)}}, [(False, "0.04", "0.04", "1")]),
        ({"baselines": {"pca_2": PERFECT}}, [(False, "0.09", "0"), (False, "15", "5", "3")]),
    ],
)
def test_verdicts(changes: dict[str, object], expected: list[tuple[object, ...]]) -> None:
    """Whether the best checkpoint beats its opponent: errors of z, and of the noise, and their ratio."""
    found = verdicts(evaluation(**changes))
    for verdict, (beats, *numbers) in zip(found, expected, strict=True):
        assert ("not beat" not in verdict) == beats
        assert re.findall(r"[\d.]*\d", verdict)[-len(numbers) :] == numbers


def test_charts_hold_what_was_found(tmp_path: Path) -> None:
    e = evaluation()
    page = Reader(write(tmp_path, e))
    assert list(page.charts) == [name for names in CHARTS.values() for name in names]
    network, *baselines = page.charts["mse"]["series"]
    assert (network["x"], network["y"]) == ([100, 200, 300], [0.16, 0.09, 0.1225])
    drawn = {series["label"]: series["y"] for series in baselines}
    assert drawn == {"PCA 1": [0.25] * 3, "PCA 2": [0.04] * 3, "PCA 8": [0.0025] * 3}
    assert page.charts["psnr"]["label"] == "dB" and page.charts["psnr"]["y"] == "linear"
    labels = [series["label"] for series in page.charts["channel_rmse"]["series"]]
    assert labels == ["step 200", "PCA 1", "PCA 2", "PCA 8", "noise"]
    first, *_, noise = page.charts["channel_rmse"]["series"]
    np.testing.assert_allclose(first["x"], WAVELENGTH)
    np.testing.assert_allclose(first["y"], e.checkpoints[200].channels.rmse, rtol=1e-5)
    np.testing.assert_allclose(noise["y"], e.noise, rtol=1e-5)
    assert page.charts["bits"]["series"][0]["y"] == e.checkpoints[200].latents.bits.tolist()


def test_hostile_names_make_no_tag(tmp_path: Path) -> None:
    plain = Reader(write(tmp_path))
    e = evaluation()
    for found in e.judged().values():
        found.scenes[0] = dataclasses.replace(found.scenes[0], id=HOSTILE, time=HOSTILE)
    e = dataclasses.replace(e, run=HOSTILE.replace("/", ""), store=HOSTILE, units=HOSTILE)
    page = Reader(write(tmp_path, e))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]


# --- what a browser makes of it -------------------------------------------------------------------


def paths(browser: Browser, chart: str, selector: str) -> list[np.ndarray]:
    """Points (n, 2) of each path that is drawn."""
    found = browser.run(
        f"[...document.querySelectorAll('#chart-{chart} path.{selector}')].map(p => p.getAttribute('d'))"
    )
    return [np.array(re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path), float) for path in found]


def texts(browser: Browser, selector: str) -> list[str]:
    return browser.run(f"[...document.querySelectorAll('{selector}')].map(node => node.textContent)")


def test_charts_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    """All of them, with as many points as there are; no complaint, no request. Groups share a cursor and a scale."""
    url = write(tmp_path).as_uri()
    browser.open(url)
    assert browser.requests() == [url]
    assert len(texts(browser, "figure svg .frame")) == sum(map(len, CHARTS.values()))
    assert [len(line) for line in paths(browser, "mse", "line")] == [3, 3, 3, 3]
    assert len(paths(browser, "mse", "dots")[0]) == 3
    assert [len(line) for line in paths(browser, "channel_rmse", "line")] == [NC] * 5
    assert len(paths(browser, "bits", "bars")[0]) == E
    colors = "[...document.querySelectorAll('#chart-mse path.line')].map(p => getComputedStyle(p).stroke)"
    assert len(set(browser.run(colors))) == 4
    assert browser.run("getComputedStyle(document.querySelector('td.best')).fontWeight") == "700"
    browser.run("groups.steps.hover(200)")
    numbers = re.findall(r"[\d.]+", texts(browser, "#chart-mse .readout")[0])
    assert numbers == ["200", "0.09", "1", "0.25", "2", "0.04", "8", "0.0025"]
    browser.run("document.querySelector('[data-group=wavelength] [data-scale=linear]').click()")
    assert browser.run("[groups.wavelength.charts[1], groups.steps.charts[0]].map(c => c.y_scale.log)") == [False, True]
    assert browser.complaints() == []


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("e", [evaluation(), dull()], ids=["rich", "dull"])
def test_any_page_fits_the_screen(browser: Browser, tmp_path: Path, e: Evaluation, width: int) -> None:
    browser.open(write(tmp_path, e).as_uri(), width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    for scale in ("linear", "log"):
        browser.run(f"document.querySelectorAll('[data-scale={scale}]').forEach(button => button.click())")
        drawn = browser.run("[...document.querySelectorAll('svg *')].map(node => node.outerHTML).join()")
        assert not re.search("NaN|Infinity|undefined|null", drawn)
    assert browser.complaints() == []


def test_a_page_of_another_command(browser: Browser, tmp_path: Path) -> None:
    """Tables alone make a page."""
    path = tmp_path / "report.html"
    table = Table("R2", ["", "latents"], [["NO2", "0.5"], ["O3", "0.9"]], best=frozenset({(1, 1)}))
    write_report(path, title="Probes", facts={"model": "m"}, tables=[table])
    browser.open(path.as_uri())
    assert browser.run("document.title") == "Probes"
    assert texts(browser, "td.best") == ["0.9"]
    assert browser.complaints() == []


def test_our_own_mistakes_are_found(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        Table("t", ["a", "b"], [["only one"]])
    chart = chart_of("x", "nowhere", "t", "l", "log", [])
    with pytest.raises(AssertionError):
        write_report(tmp_path / "r.html", title="t", facts={}, charts=[chart])
    with pytest.raises(AssertionError):
        write_report(tmp_path / "r.html", title="t", facts={}, pictures={"no PNG": b"GIF89a"})
