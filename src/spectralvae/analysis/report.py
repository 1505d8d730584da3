"""report.html: what a command found out, on one page that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spectralvae.analysis.comparison import (
    Quantity,
    channel_quantities,
    drawn_baselines,
    floats_per_pixel,
    knows_noise,
    label_of,
    n_components,
    opponent,
    quantities,
    units,
    verdicts,
    written,
)
from spectralvae.analysis.evaluation import Evaluation, Judged
from spectralvae.pages.html import Json, chart_of, inline_picture, series_of, write_page

ROOM = 10  # steps at both sides of a single one
LATENTS, BASELINES = "latents", ("paler", "pale", "dark")  # colours: classes of report.css


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        title: over it.
        header: of its columns, with units.
        rows: as many cells each; the first names the row.
        note: under the title.
        best: (row, column) of cells to mark.
        pale: rows that count less.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    best: frozenset[tuple[int, int]] = frozenset()
    pale: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.header) for row in self.rows)


def group_of(heading: str, label: str, *, buttons: Sequence[str] = ("y",), y_log: bool = True, pad: float = 0) -> Json:
    """Charts that share an x axis, as templates/charts.js wants them.

    Args:
        heading: over them.
        label: of the x axis.
        buttons: axes ("x", "y") whose scale a reader may choose.
        y_log: whether charts with y = "switch" begin with a logarithmic axis.
        pad: room at both ends of the x axis.
    """
    scales = {"x_log": False, "y_log": y_log, "log_from": 1}
    return {"heading": heading, "label": label, "buttons": list(buttons), "pad": pad, **scales}


def write_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    remarks: Sequence[str] = (),
    tables: Sequence[Table] = (),
    groups: Mapping[str, Json] | None = None,
    charts: Sequence[Json] = (),
    pictures: Mapping[str, bytes] | None = None,
    details: Sequence[Table] = (),
) -> None:
    """Write a page, its parts in the order of the arguments.

    Args:
        path: of the page.
        title: its heading.
        facts: what one must know to read the rest.
        remarks: what the page comes to, in sentences.
        tables: the most important ones.
        groups: of charts, by name, as `group_of` makes them.
        charts: as `html.chart_of` makes them, each of one of the groups.
        pictures: PNG by caption.
        details: tables for those who read to the end.
    """
    groups = groups or {}
    assert {chart["group"] for chart in charts} <= groups.keys()
    write_page(
        path,
        "report.html",
        ("scales.js", "charts.js", "views.js"),
        {"groups": groups, "charts": list(charts)},
        styles=("report.css",),
        title=title,
        facts=facts,
        remarks=remarks,
        tables=tables,
        pictures={caption: inline_picture(png) for caption, png in (pictures or {}).items()},
        details=details,
    )


def write_evaluation_report(path: Path, e: Evaluation, pictures: Mapping[str, bytes]) -> None:
    """Write the page of `evaluate`.

    Args:
        path: report.html.
        e: what it shows.
        pictures: PNG by caption.
    """
    groups = {
        "steps": group_of(
            "Errors by step; dashed: PCA", "step", buttons=("x", "y") if len(e.checkpoints) > 1 else ("y",)
        ),
        "wavelength": group_of(f"Errors by wavelength, step {e.shown:,}", "wavelength, nm"),
    }
    charts = [*_step_charts(e), *_wavelength_charts(e)]
    latents = e.checkpoints[e.shown].latents
    if latents is not None:
        groups[LATENTS] = group_of(f"Latents, step {e.shown:,}", "latent channel", buttons=(), pad=0.5)
        bits = series_of("bits", "training", "bars", np.arange(e.embed_dim), latents.bits)
        charts.append(chart_of("bits", LATENTS, "KL to the prior", "bits per latent cell", "zero", [bits]))
    write_report(
        path,
        title=f"Evaluation of {Path(e.run).name}",
        facts=_facts(e),
        remarks=[*verdicts(e), *e.remarks],
        tables=[_table(e)],
        groups=groups,
        charts=charts,
        pictures=pictures,
        details=[_scene_table(e)],
    )


def _facts(e: Evaluation) -> dict[str, str]:
    nc = e.normalization.n_channels
    steps = ", ".join(f"{step:,}" for step in e.checkpoints)
    kept = f"{e.embed_dim} channel{'s' * (e.embed_dim > 1)}, a cell for {e.scale} x {e.scale} pixels"
    facts = {
        "run": e.run,
        "store": e.store,
        "checkpoints judged, by step": steps,
        "judged on": f"{e.n_tiles:,} validation tiles of {e.tile_size} x {e.tile_size} pixels x {nc} channels: "
        f"{e.n_samples:,} valid samples, each counted once; {e.n_left_out:,} tiles left out as too invalid",
        "latents": f"{kept}: {written(floats_per_pixel(e))} floats per pixel for {nc} channels; reconstructed from the "
        "posterior's mode",
        "z": "log of radiance, standardised by channel"
        if e.normalization.transform == "log_zscore"
        else f"values of the file ({units(e)}), standardised by channel",
        "peak of PSNR": f"{written(e.peak)}: largest less smallest z of the samples judged",
    }
    if e.noise is not None and knows_noise(e):
        facts["units of the noise"] = (
            f"error of z by the standard deviation of the measurement's noise in z, of each channel (median "
            f"{written(float(np.nanmedian(e.noise)))}); 1 = as large as the noise"
        )
    return facts


def _table(e: Evaluation) -> Table:
    """Checkpoints and baselines; what keeps more floats than the opponent competes in a class of its own."""
    columns, judged = quantities(e), list(e.judged().values())
    steps = [f"step {step:,}" for step in e.checkpoints]
    floats = [floats_per_pixel(e)] * len(steps) + [float(n_components(name)) for name in e.baselines]
    limit = max(floats_per_pixel(e), n_components(opponent(e)))
    fair = [i for i, size in enumerate(floats) if size <= limit]
    rows = [
        [name, written(size), *(written(q.of(found), q.form) for q in columns), *_latent_cells(found)]
        for name, size, found in zip([*steps, *map(label_of, e.baselines)], floats, judged, strict=True)
    ]
    return Table(
        "Checkpoints and baselines",
        ["", "floats per pixel", *(q.label for q in columns), "KL, bits per pixel", "latent channels that vary"],
        rows,
        note="All on the same samples. PCA k: the first k principal components of each pixel's spectrum. Marked: best "
        f"of its column among those with at most {written(limit)} floats per pixel; grey: those with more.",
        best=frozenset((i, 2 + c) for c, q in enumerate(columns) for i in _best(q, judged, fair)),
        pale=frozenset(range(len(rows))) - frozenset(fair),
    )


def _latent_cells(found: Judged) -> list[str]:
    if found.latents is None:
        return ["–", "–"]
    return [written(found.latents.bits_per_pixel), f"{found.latents.active_units} of {len(found.latents.bits)}"]


def _best(q: Quantity, judged: Sequence[Judged], fair: Sequence[int]) -> list[int]:
    """Those that are best as far as the digits shown can tell."""
    known = {i: value for i in fair if np.isfinite(value := q.of(judged[i]))}
    if not known:
        return []
    best = written((max if q.more_is_better else min)(known.values()), q.form)
    return [i for i, value in known.items() if written(value, q.form) == best]


def _scene_table(e: Evaluation) -> Table:
    """Of the checkpoint shown beside its opponent."""
    name = opponent(e)
    rows = []
    for ours, theirs in zip(e.checkpoints[e.shown].scenes, e.baselines[name].scenes, strict=True):
        assert ours.id == theirs.id
        mse, mse_theirs = ours.metrics["mse"], theirs.metrics["mse"]
        figures = (mse, mse_theirs, mse / mse_theirs if mse_theirs else np.nan)
        more = (ours.metrics["mae"], ours.metrics["spectral_angle"], theirs.metrics["spectral_angle"])
        rows.append([ours.id, ours.time or "–", f"{ours.n_samples:,}", *map(written, (*figures, *more))])
    them, angle = label_of(name), "spectral angle, degrees"
    return Table(
        f"Scenes: step {e.shown:,} and {them}",
        ["", "time (UTC)", "samples", "MSE of z", f"MSE of z, {them}", "ratio", "MAE of z", angle, f"{angle}, {them}"],
        rows,
        note="ratio: below 1 the network is better.",
    )


def _step_charts(e: Evaluation) -> list[Json]:
    charts = []
    steps = list(e.checkpoints)
    # a line needs two points
    wide = steps if len(steps) > 1 else [steps[0] - ROOM, steps[0], steps[0] + ROOM]
    for q in (q for q in quantities(e) if q.is_drawn):
        values = [q.of(judged) for judged in e.checkpoints.values()]
        series = [series_of("the network", "validation", "curve", steps, values)]
        for name, color in _drawn(e).items():
            line = [q.of(e.baselines[name])] * len(wide)
            series.append(series_of(label_of(name), f"{color} dashed", "line", wide, line))
        charts.append(chart_of(q.key, "steps", q.name, q.unit or "no unit", "switch" if q.is_log else "linear", series))
    return charts


def _drawn(e: Evaluation) -> dict[str, str]:
    """Colours of the baselines that are drawn, by name; all of them are in the table and in the picture."""
    names = drawn_baselines(e)
    return dict(zip(names, BASELINES[len(BASELINES) - len(names) :], strict=True))


def _wavelength_charts(e: Evaluation) -> list[Json]:
    wavelength = e.normalization.wavelength
    assert wavelength is not None, "a store always has wavelengths"
    judged = {f"step {e.shown:,}": (e.checkpoints[e.shown], "validation")}
    judged |= {label_of(name): (e.baselines[name], color) for name, color in _drawn(e).items()}
    mean = series_of("mean over the samples judged", "grey", "line", wavelength, e.mean_spectrum)
    charts = [chart_of("mean_spectrum", "wavelength", "Mean radiance", units(e), "switch", [mean])]
    for q in channel_quantities(e):
        series = [
            series_of(name, color, "line", wavelength, getattr(found.channels, q.key))
            for name, (found, color) in judged.items()
        ]
        if q.key == "rmse" and e.noise is not None and knows_noise(e):
            series.append(series_of("noise", "grey", "line", wavelength, e.noise))
        if q.key == "noise":
            series.append(series_of("noise", "grey dashed", "line", wavelength, np.ones(len(wavelength))))
        charts.append(chart_of(f"channel_{q.key}", "wavelength", q.name, q.unit or "no unit", "switch", series))
    return charts
