"""What a reader sees of probes: figures, a page, a few lines on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console

from spectralvae.analysis.probe_data import Question
from spectralvae.analysis.probe_features import pixel_components
from spectralvae.analysis.probe_figures import (
    Predicted,
    draw_hexbin,
    draw_learning,
    draw_maps,
    draw_overview,
    draw_residuals,
)
from spectralvae.analysis.probe_results import Answer, Counts, Nested, Results, interval, label_of
from spectralvae.analysis.report import Table, write_report
from spectralvae.analysis.scores import Scores
from spectralvae.config import ProbeConfig
from spectralvae.inference.coder import Coder
from spectralvae.plotting.figures import save_figure
from spectralvae.runtime.console import new_progress

DRAWN = ("latents", "pca", "raw")  # predictions of these are drawn cell by cell


def _explanations(coder: Coder) -> dict[str, str]:
    """Of all features."""
    k, floats = pixel_components(coder), coder.model.embed_dim / coder.scale**2
    return {
        "latents": "the posterior's mean, as encode gives it",
        "pca": "principal components of the cell's mean spectrum, as many as latent channels",
        "raw": "mean spectrum of the cell, all channels",
        "decoded": "the linear probe of raw, tested on mean spectra of what is decoded from the latents",
        "decoded_pca": f"the linear probe of raw, tested on what {k} principal component{'s' if k > 1 else ''} a pixel "
        f"leave{'' if k > 1 else 's'}; the latents are {floats:.4g} floats a pixel",
        "geometry": "angles, place and local time alone",
        "shuffled": "latents, with targets of other cells: a check of the probes, about 0",
    }


def _draw(folder: Path, results: Results, s: int) -> dict[str, bytes]:
    """Draw everything; returns PNG by caption."""
    jobs: dict[str, tuple[str, Callable[[], Figure]]] = {
        "overview": (
            "R2 of all features on test scenes, filtered and unfiltered",
            partial(draw_overview, results.scores),
        )
    }
    for q, answer in results.answers.items():
        if q.filtered:
            product, label = q.product, label_of(q)
            predictions = _predicted(answer, results.scores[product])
            scene = int(np.bincount(answer.scene).argmax())
            record = results.store.scenes[scene]
            maps = _maps(answer, scene, (-(-record.shape[0] // s), -(-record.shape[1] // s)))
            jobs |= {
                f"hexbin_{product}": (
                    f"{product}: predictions and truth",
                    partial(draw_hexbin, product, label, predictions),
                ),
                f"residuals_{product}": (
                    f"{product}: errors by value",
                    partial(draw_residuals, product, label, predictions),
                ),
                f"maps_{product}": (
                    f"{product}: the test scene with the most cells",
                    partial(draw_maps, product, label, record.id, *maps),
                ),
                f"learning_{product}": (
                    f"{product}: how the probes were fitted",
                    partial(draw_learning, product, results.curves[q]),
                ),
            }
    pictures = {}
    with new_progress() as progress:
        for name, (caption, draw) in progress.track(jobs.items(), description="drawing (figures)"):
            pictures[caption] = save_figure(draw(), folder / f"{name}.png")
    return pictures


def _predicted(answer: Answer, scores: Nested) -> dict[str, dict[str, Predicted]]:
    """What the figures compare, cell by cell."""
    return {
        name: {
            features: Predicted(answer.truth, answer.predictions[name, features], _plain(by_features[features]))
            for features in DRAWN
        }
        for name, by_features in scores.items()
    }


def _plain(found: Mapping[str, Any]) -> Scores:
    scores: Any = {key: found[key] for key in Scores.__annotations__}
    return scores  # type: ignore[no-any-return]


def _maps(
    answer: Answer, scene: int, shape: tuple[int, int]
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Truth and predictions from latents over the cells of a scene, NaN where there is none."""
    here = answer.scene == scene
    row, column = answer.row[here], answer.column[here]

    def spread(values: NDArray[Any]) -> NDArray[np.float64]:
        grid = np.full(shape, np.nan)
        grid[row, column] = values[here]
        return grid

    predictions = {
        f"{name}, latents": spread(values)
        for (name, features), values in answer.predictions.items()
        if features == "latents"
    }
    return spread(answer.truth), predictions


def write_page(folder: Path, results: Results, config: ProbeConfig, coder: Coder) -> None:
    """figures/ and report.html."""
    pictures = _draw(folder / "figures", results, coder.scale)
    step = "" if coder.step is None else f", step {coder.step:,}"
    facts = {
        "model": f"{coder.path}{step}",
        "store": str(results.store.path),
        "a cell": f"{coder.scale} x {coder.scale} pixels, {coder.model.embed_dim} latent channels",
        "seed": str(config.seed),
        "intervals": "95 %, bootstrap over test scenes",
        **_explanations(coder),
    }
    both = {q.product for q in results.answers if not q.filtered}
    probes = next(iter(results.scores.values()))
    write_report(
        folder / "report.html",
        title=f"Probes of {coder.path.name}",
        facts=facts,
        remarks=results.remarks,
        tables=[*(_r2_table(name, results.scores, both) for name in probes), _count_table(results.counts)],
        pictures=pictures,
        details=[_error_table(product, nested, product in both) for product, nested in results.scores.items()],
    )


def _r2_table(name: str, scores: Mapping[str, Nested], both: Collection[str]) -> Table:
    """R2 by features and product; of `both` unfiltered, too."""
    features = list(next(iter(scores.values()))[name])
    sides = [
        (title, nested[name], unfiltered)
        for product, nested in scores.items()
        for title, unfiltered in ((product, False), (f"{product}, unfiltered", True))
        if product in both or not unfiltered
    ]
    return Table(
        f"R2 on test scenes, {name} probe",
        ["features", *(title for title, _, _ in sides)],
        [
            [
                key,
                *(interval(found[key]["unfiltered"] if unfiltered else found[key]) for _, found, unfiltered in sides),
            ]
            for key in features
        ],
        "1 is perfect, 0 as good as the mean of the test cells; in brackets 95 % intervals over scenes",
    )


def _error_table(product: str, nested: Nested, both: bool) -> Table:
    rows = []
    for name, by_features in nested.items():
        for features, found in by_features.items():
            for which, side in (
                ((", filtered", found), (", unfiltered", found["unfiltered"])) if both else (("", found),)
            ):
                physical = side["physical"]
                numbers = [side["rmse"], side["bias"], physical["rmse"], physical["bias"]]
                rows.append(
                    [
                        f"{name}, {features}{which}",
                        interval(side),
                        *("" if value is None else f"{value:.3g}" for value in numbers),
                        f"{side['n']:,}",
                        str(side["n_scenes"]),
                    ]
                )
    units = next(iter(next(iter(nested.values())).values()))["physical"]["units"] or "its units"
    header = ["probe", "R2", "RMSE", "bias", f"RMSE, {units}", f"bias, {units}", "cells", "scenes"]
    return Table(f"{product}: errors", header, rows, "of the transformed target, and of values transformed back")


def _count_table(counts: Mapping[Question, Counts]) -> Table:
    header = [
        *("product", "valid pixels", "with few clouds", "with the sun high enough", "cells left out"),
        *("cells to fit on", "of", "their scenes", "test cells", "their scenes"),
    ]
    rows = [
        [
            q.name,
            *(f"{n:,}" for n in (c.valid_pixels, c.clear_pixels, c.pixels, c.left_out_cells)),
            *(f"{n:,}" for n in (c.fit_cells, c.fit_cells_found, c.fit_scenes, c.test_cells, c.test_scenes)),
        ]
        for q, c in counts.items()
    ]
    limits = {
        f"{name} <= {limit:g}"
        for q in counts
        for name, limit in (("cloud fraction", q.max_cloud_fraction), ("solar zenith in degrees", q.max_solar_zenith))
        if limit is not None
    }
    note = "left out: cells with a target, but unknown geometry or too few valid samples"
    note += f"; of gases, the filter asks for {' and '.join(sorted(limits))}" if limits else ""
    return Table("What the filters left", header, rows, note)


def print_summary(results: Results, folder: Path, console: Console) -> None:
    """R2 of the first probe, a line for each kind of features, and where all is."""
    products = list(results.scores)
    first = next(iter(results.scores[products[0]]))
    names = list(results.scores[products[0]][first])
    console.print(f"R2 on test scenes, {first} probe, with 95 % intervals over scenes")
    rows = [["", *products]]
    rows += [[key, *(interval(results.scores[product][first][key]) for product in products)] for key in names]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        console.print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    console.print(f"{folder / 'report.html'}: tables and figures; numbers: probes.json, probes.csv, predictions.nc")
