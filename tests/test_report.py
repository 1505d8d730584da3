"""report.html: its numbers, sentences and marks against what went in, and the page in a headless browser."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browsing import HOSTILE, PNG, Browser, Reader
from evaluations import BASELINES, NC, WAVELENGTH, E, evaluation, judged, normalization

from spectralvae.analysis.comparison import drawn_baselines, opponent, verdicts, written
from spectralvae.analysis.evaluation import Evaluation
from spectralvae.analysis.report import Table, group_of, write_evaluation_report, write_report
from spectralvae.pages.html import chart_of, series_of

CHARTS = {
    "steps": ["mse", "psnr", "spectral_angle", "rmse_radiance", "relative_rmse", "noise_ratio"],
    "wavelength": ["mean_spectrum", "channel_rmse", "channel_rmse_radiance", "channel_relative", "channel_noise"],
    "latents": ["bits"],
}


def write(folder: Path, e: Evaluation | None = None) -> Path:
    path = folder / "report.html"
    write_evaluation_report(path, e or evaluation(), {"a picture": PNG, "another one": PNG})
    return path


class Cells(HTMLParser):
    """Tables of a page: rows of (text, classes of the cell, class of the row)."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: list[list[list[tuple[str, str, str]]]] = []
        self.headings: list[str] = []
        self._row, self._cell, self._in = "", "", ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        kind = dict(attrs).get("class") or ""
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
            self._row = kind
        elif tag in ("td", "th"):
            self._cell, self._in = kind, tag
            self.tables[-1][-1].append(("", kind, self._row))
        elif tag == "h2":
            self._in = tag
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "h2":
            self.headings[-1] += data
        elif self._in:
            text, cell, row = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = (text + data, cell, row)


def rows(table: list[list[tuple[str, str, str]]]) -> list[list[str]]:
    return [[text for text, _, _ in row] for row in table]


def test_order_of_the_page(tmp_path: Path) -> None:
    """First what was judged and the verdict, then the table, charts, pictures, scenes."""
    text = write(tmp_path).read_text()
    parts = ["runs/x/store", "does not beat", ">PCA 8<", 'id="chart-mse"', "a picture", "another one", "<td>a</td>"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_facts(tmp_path: Path) -> None:
    facts = dict(rows(Cells(write(tmp_path)).tables[0]))
    assert facts["run"] == "runs/x/train" and facts["checkpoints judged, by step"] == "100, 200, 300"
    assert facts["judged on"].startswith("5 validation tiles of 8 x 8 pixels x 12 channels: 10,000 valid samples")
    assert "1 tiles left out" in facts["judged on"]
    assert "2 x 2 pixels: 2 floats per pixel for 12 channels" in facts["latents"]
    assert facts["peak of PSNR"].startswith("10: largest less smallest z")
    assert "median 0.02" in facts["units of the noise"]


def test_the_table_marks_the_best_of_what_is_as_small(tmp_path: Path) -> None:
    _, table, scenes = Cells(write(tmp_path)).tables
    header, *body = rows(table)
    assert header[:4] == ["", "floats per pixel", "MSE of z", "MAE of z"]
    assert "RMSE of radiance, photons/s/cm^2/nm/sr" in header and "PSNR, dB" in header
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
    marked = {row[0][0] for row in table for _, kind, _ in row if kind == "best"}
    assert marked == {"PCA 2"}  # in all columns: the larger ones do not compete
    assert {row[0][0] for row in table if row[0][2] == "aside"} == {"PCA 4", "PCA 8"}
    assert body[1][-2:] == [written(22.5 / 4), "7 of 8"] and body[5][-2:] == ["–", "–"]
    assert body[1][header.index("explained variance of z")] == "0.91000"
    header, *body = rows(scenes)
    # 1.5 and 0.5 times the MSE of all
    assert body[0] == ["a", "2024-06-01T15:00:00+00:00", "6,000", "0.135", "0.06", "2.25", "0.09", "3", "3"]
    assert body[1][:4] == ["b", "–", "4,000", "0.045"]


def test_ties_are_marked_together_and_psnr_is_better_when_larger(tmp_path: Path) -> None:
    e = evaluation(baselines={name: judged(mse) for name, mse in (BASELINES | {"pca_2": 0.09000001}).items()})
    table = Cells(write(tmp_path, e)).tables[1]
    header = [text for text, _, _ in table[0]]
    for column in ("MSE of z", "PSNR, dB", "explained variance of z"):
        k = header.index(column)
        assert [row[0][0] for row in table if row[k][1] == "best"] == ["step 200", "PCA 2"]


@pytest.mark.parametrize(
    ("e", "scale", "names", "expected", "words"),
    [
        (8, 2, BASELINES, "pca_2", "2 components, which keeps as many floats per pixel as the latents (2)"),
        (12, 2, BASELINES, "pca_4", "4 components, which keeps more floats per pixel (4) than the latents (3)"),
        (1, 4, BASELINES, "pca_1", "1 component, which keeps more floats per pixel (1) than the latents (0.0625)"),
        (64, 2, BASELINES, "pca_8", "8 components, which keeps fewer floats per pixel (8) than the latents (16)"),
        (8, 2, ("mean",), "mean", "predicting the mean, the only baseline"),
    ],
)
def test_opponent(e: int, scale: int, names: tuple[str, ...], expected: str, words: str) -> None:
    baselines = {name: judged(BASELINES[name]) for name in names}
    found = evaluation(embed_dim=e, scale=scale, baselines=baselines)
    assert opponent(found) == expected
    assert words in verdicts(found)[0]
    assert len(drawn_baselines(found)) <= 3 and "mean" not in drawn_baselines(found)


def test_verdicts() -> None:
    worse, noise = verdicts(evaluation())
    assert worse.startswith(
        "Step 200, the checkpoint with the smallest MSE, does not beat PCA of each pixel's spectrum"
    )
    assert worse.endswith("its MSE of z is 0.09 against 0.04, 2.25 times as much.")
    assert noise == "In units of the noise it does not beat PCA 2: its RMSE is 15 against 10, 1.5 times as much."
    better = evaluation(checkpoints={200: judged(0.01, np.ones(E), noise_ratio=20.0)})
    assert "MSE, beats PCA" in verdicts(better)[0] and "0.25 times as much" in verdicts(better)[0]
    assert "it does not beat PCA 2: its RMSE is 20 against 10" in verdicts(better)[1]  # each for itself
    (alone,) = verdicts(evaluation(checkpoints={200: judged(0.04, np.ones(E), noise_ratio=math.nan)}))
    assert "does not beat" in alone  # no better is not beaten
    perfect = evaluation(
        baselines={"pca_2": dataclasses.replace(judged(0.01), metrics=judged(0.01).metrics | {"mse": 0.0})}
    )
    assert verdicts(perfect)[0].endswith("its MSE of z is 0.09 against 0.")


def test_charts_hold_what_was_found(tmp_path: Path) -> None:
    e = evaluation()
    page = Reader(write(tmp_path, e))
    assert list(page.charts) == [name for names in CHARTS.values() for name in names]
    network, *baselines = page.charts["mse"]["series"]
    assert (network["x"], network["y"]) == ([100, 200, 300], [0.16, 0.09, 0.1225])
    assert [(series["label"], series["y"]) for series in baselines] == [
        ("PCA 1", [0.25] * 3),
        ("PCA 2", [0.04] * 3),
        ("PCA 8", [0.0025] * 3),
    ]
    assert page.charts["psnr"]["label"] == "dB" and page.charts["psnr"]["y"] == "linear"
    first, *others, noise = page.charts["channel_rmse"]["series"]
    assert [series["label"] for series in (first, *others, noise)] == ["step 200", "PCA 1", "PCA 2", "PCA 8", "noise"]
    np.testing.assert_allclose(first["x"], WAVELENGTH)
    np.testing.assert_allclose(first["y"], e.checkpoints[200].channels.rmse, rtol=1e-5)
    np.testing.assert_allclose(noise["y"], e.noise, rtol=1e-5)
    assert page.charts["bits"]["series"][0]["y"] == e.checkpoints[200].latents.bits.tolist()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0012345, "0.001234"), (1234567.0, "1.235e06"), (12.0, "12"), (0.0, "0"), (math.nan, "–"), (math.inf, "–")],
)
def test_numbers(value: float, text: str) -> None:
    assert written(value) == text


def test_hostile_names_make_no_tag(tmp_path: Path) -> None:
    plain = Reader(write(tmp_path))
    e = evaluation()
    for found in e.judged().values():
        found.scenes[0] = dataclasses.replace(found.scenes[0], id=HOSTILE, time=HOSTILE)
    e = dataclasses.replace(e, run=HOSTILE.replace("/", ""), store=HOSTILE, units=HOSTILE)
    page = Reader(write(tmp_path, e))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]


def test_the_page_asks_for_nothing(tmp_path: Path) -> None:
    page = Reader(write(tmp_path))
    links = [value for _, given in page.tags for name, value in given.items() if name in ("src", "href", "srcset")]
    assert len(links) == 3  # icon and pictures
    assert all(link.startswith("data:") for link in links)
    policy = next(given["content"] for _, given in page.tags if "http-equiv" in given)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-") and "unsafe" not in policy


# --- what a browser makes of it -------------------------------------------------------------------


def paths(browser: Browser, chart: str, selector: str) -> list[np.ndarray]:
    """Points (n, 2) of each path that is drawn."""
    found = browser.run(
        f"[...document.querySelectorAll('#chart-{chart} path.{selector}')].map(p => p.getAttribute('d'))"
    )
    return [np.array(re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path), float) for path in found]


def test_charts_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    """All of them, with as many points as there are, where they belong; no complaint, no request."""
    url = write(tmp_path).as_uri()
    browser.open(url)
    assert browser.requests() == [url]
    assert browser.run("document.querySelectorAll('figure svg .frame').length") == sum(map(len, CHARTS.values()))
    network, *baselines = paths(browser, "mse", "line")
    assert [len(line) for line in (network, *baselines)] == [3, 3, 3, 3]
    assert len(paths(browser, "mse", "dots")[0]) == 3
    # the axis is logarithmic: pixels are linear in log(MSE)
    values = np.log([0.16, 0.09, 0.1225, 0.25, 0.04, 0.0025])
    pixels = [*network[:, 1], *(line[0, 1] for line in baselines)]
    slope, offset = np.polyfit(values, pixels, 1)
    assert slope < 0
    np.testing.assert_allclose(pixels, slope * values + offset, atol=0.1)
    assert [len(line) for line in paths(browser, "channel_rmse", "line")] == [NC] * 5
    assert browser.run("document.querySelector('#chart-bits path.bars').getAttribute('d').split('Z').length") == E + 1
    assert browser.run("document.images.length") == 2
    colors = "[...document.querySelectorAll('#chart-mse path.line')].map(p => getComputedStyle(p).stroke)"
    assert len(set(browser.run(colors))) == 4
    best = "getComputedStyle(document.querySelector('td.best')).fontWeight"
    assert browser.run(best) == "700"
    assert browser.complaints() == []


def test_read_out_and_scales(browser: Browser, tmp_path: Path) -> None:
    browser.open(write(tmp_path).as_uri())
    browser.run("groups.steps.hover(200)")
    text = browser.run("document.querySelector('#chart-mse .readout').textContent")
    assert text == "step 200the network 0.09PCA 1 0.25PCA 2 0.04PCA 8 0.0025"
    browser.run("document.querySelector('[data-group=wavelength] [data-scale=linear]').click()")
    assert browser.run("groups.wavelength.charts[1].y_scale.log") is False
    assert browser.run("groups.steps.charts[0].y_scale.log") is True
    assert browser.complaints() == []


def dull(transform: str = "zscore") -> Evaluation:
    """One checkpoint, one channel of the latents, nothing known of noise, a dead channel, no PCA."""
    found = judged(0.1, np.array([2.0]), relative_rmse=math.nan, noise_ratio=math.nan)
    nan = np.full(NC, np.nan)
    rmse = found.channels.rmse.copy()
    rmse[3] = math.nan
    channels = dataclasses.replace(found.channels, rmse=rmse, relative=nan, noise=None)
    found = dataclasses.replace(found, channels=channels, scenes=found.scenes[:1])
    baselines = {"mean": dataclasses.replace(found, latents=None)}
    return evaluation(
        normalization=normalization(transform),
        units=None,
        embed_dim=1,
        noise=nan,
        checkpoints={0: found},
        baselines=baselines,
        shown=0,
    )


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
    """Tables alone make a page; charts of any group are drawn under its heading."""
    path = tmp_path / "report.html"
    table = Table("R2", ["", "latents"], [["NO2", "0.5"], ["O3", "0.9"]], best=frozenset({(1, 1)}))
    write_report(path, title="Probes", facts={"model": "m"}, tables=[table])
    browser.open(path.as_uri())
    assert browser.run("document.title") == "Probes"
    assert browser.run("[...document.querySelectorAll('td.best')].map(cell => cell.textContent)") == ["0.9"]
    assert browser.complaints() == []
    chart = chart_of("x", "epochs", "Loss", "no unit", "switch", [series_of("fit", "training", "line", [1, 2], [3, 4])])
    groups = {"epochs": group_of("Learning", "epoch")}
    write_report(path, title="Probes", facts={}, groups=groups, charts=[chart], details=[table])
    browser.open(path.as_uri() + "#")
    assert browser.run("[...document.querySelectorAll('h2')].map(h => h.textContent)") == ["Learning", "R2"]
    assert [len(line) for line in paths(browser, "x", "line")] == [2]
    assert browser.complaints() == []


def test_our_own_mistakes_are_found(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        Table("t", ["a", "b"], [["only one"]])
    chart = chart_of("x", "nowhere", "t", "l", "log", [])
    with pytest.raises(AssertionError):
        write_report(tmp_path / "r.html", title="t", facts={}, charts=[chart])
    with pytest.raises(AssertionError):
        write_report(tmp_path / "r.html", title="t", facts={}, pictures={"no PNG": b"GIF89a"})
