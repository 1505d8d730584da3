"""The page of a run, rewritten while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from spectralvae.pages.html import Json, chart_of, inline_picture, numbers_of, series_of, write_page
from spectralvae.runtime.rundir import State
from spectralvae.training.curves import Points
from spectralvae.training.logbook import Event

RELOAD_SECONDS = 60
LOG_FROM = 100  # steps: what comes before would fill half of a logarithmic axis
LOG_FROM_SINCE = 1000  # steps: a run of fewer is shown whole
NOTABLE = ("failed", "spike", "warning")  # kinds of events that a reader should see first


@dataclass(frozen=True)
class Dashboard:
    """What the page of a run shows.

    Attributes:
        title: name of the run.
        state: of the run.
        step: optimizer steps done.
        n_steps: steps that the run shall have.
        updated: when this was true, ISO 8601 with its offset from UTC.
        seconds_left: until the end, if known.
        tiles_per_second: lately, over all devices, if known.
        grad_clip: training.grad_clip, the norm that longer gradients are scaled down to.
        curves: by their keys in metrics.jsonl, and "steps_per_second" and "memory_gb". Those without a plot are not
            in the page.
        references: mean squared errors of z to compare pixel_mse with, by label.
        events: the newest, oldest first.
        n_events: how many there were.
        validation: summary/validation.json: step, wavelength in nm, mse and variance of z (C each), latents (bits,
            posterior_std, mean, std; E each), active_units.
        picture: PNG of the newest reconstructions.
        picture_step: its step.
        facts: device, versions and the like, in order.
    """

    title: str
    state: State
    step: int
    n_steps: int
    updated: str
    seconds_left: float | None
    tiles_per_second: float | None
    grad_clip: float
    curves: Mapping[str, Points]
    references: Mapping[str, float]
    events: Sequence[Event]
    n_events: int
    validation: Mapping[str, Any] | None
    picture: bytes | None
    picture_step: int | None
    facts: Mapping[str, str]


@dataclass(frozen=True)
class _Plot:
    """A plot against step: of `key`, with val_`key` if there is one."""

    key: str
    section: str
    title: str
    label: str  # of the y axis
    y: str  # "switch": linear or logarithmic, as the reader likes; "zero": linear, from zero


_PLOTS = (
    _Plot("loss", "learning", "Loss: negative log-likelihood + weighted KL", "nats per tile", "switch"),
    _Plot("pixel_mse", "learning", "Reconstruction error", "mean squared error of z, valid samples", "switch"),
    _Plot("kl_loss", "learning", "KL term, weighted", "nats per tile", "switch"),
    _Plot(
        "grad_norm",
        "learning",
        "Gradient norm before clipping (normally large, as the loss is a sum over a tile's samples)",
        "L2 norm",
        "switch",
    ),
    _Plot("steps_per_second", "machine", "Throughput", "steps per second", "zero"),
    _Plot("memory_gb", "machine", "Memory of the main process, highest so far", "GB", "zero"),
)

_PRODUCT_COLORS = ("hue-1", "hue-2", "hue-3", "hue-4")


def write_dashboard(path: Path, dashboard: Dashboard) -> None:
    """Write the page of a run.

    Args:
        path: summary/index.html of the run.
        dashboard: what it shows.
    """
    assert dashboard.picture is None or dashboard.picture_step is not None
    write_page(
        path,
        "dashboard.html",
        ("scales.js", "charts.js", "views.js", "dashboard.js"),
        _data(dashboard),
        run=dashboard,
        numbers=_numbers(dashboard),
        warnings=_warnings(dashboard),
        notable=NOTABLE,
        picture=None if dashboard.picture is None else inline_picture(dashboard.picture),
    )


def _data(dashboard: Dashboard) -> Json:
    """What the scripts read; its form stands at the head of templates/charts.js."""
    late = dashboard.step >= LOG_FROM_SINCE
    x_log, y_log = {"x_log": dashboard.step > LOG_FROM}, {"y_log": dashboard.step > LOG_FROM}
    return {
        "state": dashboard.state,
        "updated": dashboard.updated,
        "reload_seconds": RELOAD_SECONDS,
        "groups": {
            "steps": {"label": "step", "log_from": LOG_FROM if late else 1, "pad": 0, **x_log, **y_log},
            "wavelength": {"label": "wavelength, nm", "log_from": 0, "pad": 0, "x_log": False, "y_log": False},
            "latents": {"label": "latent channel", "log_from": 0, "pad": 0.5, "x_log": False, "y_log": False},
        },
        "charts": [*_step_charts(dashboard), *_validation_charts(dashboard.validation)],
    }


def _step_charts(dashboard: Dashboard) -> list[Json]:
    spikes = [{"step": event.step, "text": event.text} for event in dashboard.events if event.kind == "spike"]
    references = {"pixel_mse": dashboard.references, "grad_norm": {"training.grad_clip": dashboard.grad_clip}}
    charts = []
    for plot in _PLOTS:
        series = []
        if plot.key in dashboard.curves:
            name = "training batch" if plot.section == "learning" else "measured"
            series.append(_curve(name, "training", dashboard.curves[plot.key], smooth=True))
        if f"val_{plot.key}" in dashboard.curves:
            series.append(_curve("validation", "validation", dashboard.curves[f"val_{plot.key}"], smooth=False))
        if series:
            chart = chart_of(plot.key, "steps", plot.title, plot.label, plot.y, series, references.get(plot.key))
            charts.append({**chart, "section": plot.section, "spikes": spikes if plot.section == "learning" else []})
    supervision = _supervision_series(dashboard.curves)
    if supervision:
        reference = {"variance of the training pixels": 1.0}
        title, label = "Supervision: error of predicted level-2 products", "mean squared error, standardised targets"
        chart = chart_of("supervision", "steps", title, label, "switch", supervision, reference)
        charts.append({**chart, "section": "learning"})
    return charts


def _supervision_series(curves: Mapping[str, Points]) -> list[Json]:
    """A colour for each product; of training batches a line, of validation a line with dots."""
    series = []
    products = sorted({key.partition("supervision_")[2] for key in curves if "supervision_" in key})
    for product, color in zip(products, _PRODUCT_COLORS, strict=False):
        if points := curves.get(f"supervision_{product}"):
            series.append(series_of(f"{product}, training, smoothed", color, "line", points.step, points.smooth))
        if points := curves.get(f"val_supervision_{product}"):
            series.append(series_of(f"{product}, validation", color, "curve", points.step, points.mean))
    return series


def _curve(name: str, color: str, points: Points, *, smooth: bool) -> Json:
    series: Json = {
        "label": f"{name}: smoothed, mean and range" if smooth else name,
        "short": name,
        "color": color,
        "draw": "curve",
        "x": np.asarray(points.step).astype(np.int64).tolist(),
        "y": numbers_of(points.mean),
        "low": numbers_of(points.low),
        "high": numbers_of(points.high),
    }
    return series | {"smooth": numbers_of(points.smooth)} if smooth else series


def _validation_charts(validation: Mapping[str, Any] | None) -> list[Json]:
    if validation is None:
        return []
    wavelength = np.asarray(validation["wavelength"], dtype=np.float64)
    assert np.isfinite(wavelength).all()
    latents = {key: np.asarray(validation["latents"][key], dtype=np.float64) for key in _LATENT_KEYS}
    channel = np.arange(len(latents["bits"]))
    rmse = [
        series_of("the network", "validation", "line", wavelength, _root(validation["mse"])),
        series_of("predicting the mean", "grey", "line", wavelength, _root(validation["variance"])),
    ]
    mean, std = latents["mean"], latents["std"]
    spread = series_of("mean and mean ± std", "training", "dots", channel, mean, mean - std, mean + std)
    bits = series_of("bits", "training", "bars", channel, latents["bits"])
    posterior = series_of("posterior std", "training", "dots", channel, latents["posterior_std"])
    prior = {"the prior": 1.0}
    return [
        chart_of("rmse", "wavelength", "Validation error of each channel", "root mean squared error of z", "log", rmse),
        chart_of("bits", "latents", "KL to the prior", "bits per latent position", "zero", [bits]),
        chart_of(
            "posterior", "latents", "Posterior standard deviation", "mean over positions", "log", [posterior], prior
        ),
        chart_of(
            "latents", "latents", "Posterior mean: its mean and spread", "over tiles and positions", "linear", [spread]
        ),
    ]


_LATENT_KEYS = ("bits", "posterior_std", "mean", "std")


def _root(squares: ArrayLike) -> np.ndarray:
    return np.sqrt(np.asarray(squares, dtype=np.float64))


def _numbers(dashboard: Dashboard) -> dict[str, str]:
    """The newest figures, by what they are."""

    def newest(key: str, column: str) -> float | None:
        points = dashboard.curves.get(key)
        return None if points is None or not len(points.step) else float(getattr(points, column)[-1])

    def text(value: float | None) -> str:
        if value is None:
            return "–"
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"

    return {
        "time left": "–" if dashboard.seconds_left is None else _duration(dashboard.seconds_left),
        "tiles per second": text(dashboard.tiles_per_second),
        "loss, smoothed": text(newest("loss", "smooth")),
        "pixel MSE, smoothed": text(newest("pixel_mse", "smooth")),
        "pixel MSE, validation": text(newest("val_pixel_mse", "mean")),
    }


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 1:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def _warnings(dashboard: Dashboard) -> list[str]:
    """What a reader must see first."""
    warnings = []
    least = "at least " if dashboard.n_events > len(dashboard.events) else ""
    for kind in NOTABLE:
        events = [event for event in dashboard.events if event.kind == kind]
        if not events:
            continue
        newest = f"{events[-1].text} (step {events[-1].step:,})"
        count = f"{least}{len(events)} {kind}{'' if len(events) == 1 else 's'}, the newest: "
        warnings.append(f"failed: {newest}" if kind == "failed" else count + newest)
    if dashboard.state == "failed" and not any(event.kind == "failed" for event in dashboard.events):
        warnings.insert(0, f"failed after step {dashboard.step:,}: run.json tells why")
    return warnings
