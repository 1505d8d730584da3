"""Pictures of an evaluation."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from spectralvae.analysis.comparison import (
    Quantity,
    channel_quantities,
    drawn_baselines,
    knows_noise,
    label_of,
    quantities,
    units,
    written,
)
from spectralvae.analysis.evaluation import Evaluation
from spectralvae.plotting.composite import draw_scene, thinning
from spectralvae.plotting.figures import save_figure
from spectralvae.plotting.panels import INVALID, robust_limits
from spectralvae.plotting.reconstructions import draw_reconstructions

NETWORK, NOISE = "#bb5566", "0.45"
BASELINES = ("#9db8d9", "#4f86c0", "#08306b")  # more components are darker
STYLES = ("-", "--", "-.")
ERRORS, LATENTS = (colormaps[name].with_extremes(bad=INVALID) for name in ("magma", "viridis"))
N_LATENTS = 12
WIDTH = 15.0  # inches
LINE = 130  # characters across a page
LEAST_GAP = 0.065  # between labels, as a share of the height of the axes
FLATTEST, STEEPEST = 1 / 8, 2.0  # height of a map by its width: beyond these, pixels are drawn longer than wide


def save_figures(e: Evaluation, folder: Path) -> dict[str, Path]:
    """Write all figures that there is something to draw for.

    Returns:
        The PNG files by caption.
    """
    first, latents = e.views[0], e.checkpoints[e.shown].latents
    step = f"step {e.shown:,}"
    figures: dict[str, tuple[str, Callable[[Evaluation], Figure]]] = {
        "metrics": ("Errors by step", draw_metrics),
        "channels": (f"Errors by wavelength, {step}", draw_channels),
        "error_maps": (f"Where the errors are, {step}", draw_error_maps),
        "worst": (f"Tiles with the largest errors, {step}", draw_worst),
    }
    if first.z is not None:
        figures["composite"] = (f"A scene and its reconstruction, {step}", draw_composite)
    if first.latents is not None and latents is not None:
        figures["latents"] = (f"Latent channels with the most bits, {step}", draw_latents)
    paths = {}
    for name, (caption, draw) in figures.items():
        paths[caption] = folder / f"{name}.png"
        save_figure(draw(e), paths[caption])  # one at a time: they are large
    return paths


def draw_metrics(e: Evaluation) -> Figure:
    """Each quantity against the step, with the baselines as lines that are named beside the axes."""
    shown = [q for q in quantities(e) if q.is_drawn]
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(WIDTH, 3.4 * rows + 0.4), layout="constrained")
    figure.suptitle(
        f"checkpoints (dots) and baselines (dashed) on the same validation samples; peak of PSNR {written(e.peak)}"
    )
    for i, q in enumerate(shown):
        axes = figure.add_subplot(rows, columns, i + 1)
        _draw_metric(axes, e, q)
    return figure


def _draw_metric(axes: Axes, e: Evaluation, q: Quantity) -> None:
    steps, values = list(e.checkpoints), np.array([q.of(judged) for judged in e.checkpoints.values()])
    references = {label_of(name): q.of(judged) for name, judged in e.baselines.items()}
    references = {label: value for label, value in references.items() if math.isfinite(value)}
    axes.plot(steps, values, "o-", color=NETWORK, ms=5, lw=1.6, zorder=3)
    better = f"{'higher' if q.more_is_better else 'lower'} is better"
    axes.set(title=f"{q.name}\n{q.unit}{', ' * bool(q.unit)}{better}", xlabel="step")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if len(steps) == 1:
        axes.set(xticks=steps, xlim=(steps[0] - 1, steps[0] + 1))
    else:
        axes.margins(x=0.03)
    _set_limits(axes, np.array([*values, *references.values()]), is_log=q.is_log)
    for value in references.values():
        axes.axhline(value, color=BASELINES[1], ls="--", lw=1)
    _label_lines(axes, references)
    axes.grid(axis="y", color="0.9")


def _set_limits(axes: Axes, values: NDArray[np.float64], *, is_log: bool) -> None:
    """Limits of y with a margin; ticks that are readable within less than a decade, too; linear if not all > 0."""
    values = values[np.isfinite(values)]
    if is_log and (values > 0).all():
        axes.set_yscale("log")
        low, high = values.min() / 1.3, values.max() * 1.3
        few = high / low < 300
        axes.yaxis.set_major_locator(LogLocator(subs=[1, 2, 5] if few else [1]))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        margin = 0.06 * (values.max() - values.min()) or 1.0
        low, high = values.min() - margin, values.max() + margin
    axes.set_ylim(low, high)


def _label_lines(axes: Axes, values: dict[str, float]) -> None:
    """Names right of the axes, pushed apart where lines are close."""
    ordered = sorted(values, key=lambda label: values[label])
    if not ordered:
        return
    to_share = axes.transData + axes.transAxes.inverted()
    x = axes.get_xlim()[1]
    shares = [float(to_share.transform((x, values[label]))[1]) for label in ordered]
    for label, share, place in zip(ordered, shares, _apart(shares), strict=True):
        axes.annotate(
            f"{label}: {written(values[label])}",
            (1.0, share),
            xytext=(1.05, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize="small",
            color=BASELINES[2],
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": BASELINES[1],
                "lw": 0.7,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )


def _apart(places: Sequence[float]) -> list[float]:
    """Ascending places between 0 and 1, at least LEAST_GAP apart: pushed up, then down from the upper edge."""
    found = list(places)
    for i in range(1, len(found)):
        found[i] = max(found[i], found[i - 1] + LEAST_GAP)
    found[-1] = min(found[-1], max(1.0, LEAST_GAP * (len(found) - 1)))
    for i in range(len(found) - 2, -1, -1):
        found[i] = min(found[i], found[i + 1] - LEAST_GAP)
    return found


def draw_channels(e: Evaluation) -> Figure:
    """RMSE of each channel, of the checkpoint shown, of PCA and of the noise, under the mean spectrum."""
    judged = {f"step {e.shown:,}": (e.checkpoints[e.shown], NETWORK, 1.6, "-")}
    names = drawn_baselines(e)
    looks = zip(names, BASELINES[len(BASELINES) - len(names) :], STYLES[: len(names)], strict=True)
    judged |= {label_of(name): (e.baselines[name], color, 1.2, style) for name, color, style in looks}
    shown = channel_quantities(e)

    wavelength = e.normalization.wavelength
    assert wavelength is not None, "a store always has wavelengths"
    figure = Figure(figsize=(WIDTH, 2.5 + 2.9 * len(shown)), layout="constrained")
    top, *panels = figure.subplots(
        len(shown) + 1, 1, sharex=True, squeeze=False, height_ratios=[1.9] + [2.9] * len(shown)
    )[:, 0]
    mark = "." if len(wavelength) == 1 else None
    top.plot(wavelength, e.mean_spectrum, color="black", lw=1.2, marker=mark)
    top.set(title="mean of the samples judged", ylabel=f"radiance,\n{units(e)}")
    if e.normalization.transform == "log_zscore":
        _set_limits(top, e.mean_spectrum, is_log=True)
    for axes, q in zip(panels, shown, strict=True):
        for name, (found, color, width, style) in judged.items():
            axes.plot(
                wavelength, getattr(found.channels, q.key), color=color, lw=width, ls=style, label=name, marker=mark
            )
        if q.key == "rmse" and e.noise is not None and knows_noise(e):
            axes.plot(wavelength, e.noise, color=NOISE, lw=1.2, ls=":", label="noise", marker=mark)
        if q.key == "noise":
            axes.axhline(1.0, color=NOISE, lw=1.2, ls=":")
        axes.set_ylabel(",\n".join(part for part in (_wrapped(q.name, 18), q.unit) if part))
        lines = np.concatenate([np.asarray(line.get_ydata(), np.float64) for line in axes.lines])
        _set_limits(axes, lines, is_log=True)
    for axes in (top, *panels):
        axes.grid(color="0.9")
        axes.margins(x=0.01)
    panels[-1].set_xlabel("wavelength, nm")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def draw_error_maps(e: Evaluation) -> Figure:
    """RMSE of z over the channels of some scenes, on one scale."""
    largest = np.concatenate([view.rmse[np.isfinite(view.rmse)] for view in e.views])
    top = float(np.quantile(largest, 0.99)) if len(largest) else 1.0
    titles = [view.id for view in e.views]
    figure, axes = _map_page([view.rmse.shape for view in e.views], titles, 3, "pixels")
    for ax, view in zip(axes, e.views, strict=True):
        shown = _show(ax, view.rmse, vmin=0.0, vmax=top or 1.0, cmap=ERRORS)
    figure.colorbar(shown, ax=axes, extend="max", label="RMSE of z over the channels", shrink=0.8, aspect=40)
    figure.suptitle(f"error of the reconstruction, step {e.shown:,}")
    _explain_grey(figure)
    return figure


def draw_worst(e: Evaluation) -> Figure:
    """Originals, reconstructions, differences and spectra of the tiles with the largest errors."""
    return draw_reconstructions(
        np.stack([tile.z for tile in e.worst]),
        np.stack([tile.z_hat for tile in e.worst]),
        [f"{tile.scene}\nfrom y = {tile.y}, x = {tile.x}" for tile in e.worst],
        e.normalization,
        f"tiles with the largest MSE, step {e.shown:,}",
    )


def draw_composite(e: Evaluation) -> Figure:
    """The first scene in colours, and what the network makes of it."""
    view = e.views[0]
    assert view.z is not None and view.z_hat is not None
    return draw_scene(
        view.z,
        view.z_hat,
        view.rmse,
        normalization=e.normalization,
        name=f"{view.id}, step {e.shown:,}",
        pixels_per_sample=thinning(view.rmse.shape[0], view.rmse.shape[1]),
    )


def draw_latents(e: Evaluation) -> Figure:
    """Maps of the latent channels that carry most, each on a scale of its own."""
    view, use = e.views[0], e.checkpoints[e.shown].latents
    assert view.latents is not None and use is not None
    order = np.argsort(-np.nan_to_num(use.bits, nan=-1.0), kind="stable")[:N_LATENTS]
    titles = [f"channel {channel}: {written(float(use.bits[channel]), '.3g')} bits per cell" for channel in order]
    figure, axes = _map_page([view.latents.shape[1:]] * len(order), titles, 4, "cells")
    for ax, channel in zip(axes, order, strict=True):
        low, high = robust_limits(view.latents[channel])
        shown = _show(ax, view.latents[channel], vmin=low, vmax=high, cmap=LATENTS)
        figure.colorbar(shown, ax=ax, extend="both", shrink=0.9)
    figure.suptitle(
        f"{_wrapped(view.id, LINE)}\nstep {e.shown:,}: mean of the posterior, no unit\n"
        f"{len(order)} of {len(use.bits)} latent channels, those with the most bits first; "
        f"a cell is {e.scale} x {e.scale} pixels; each map has its own scale"
    )
    _explain_grey(figure)
    return figure


def _map_page(
    shapes: Sequence[tuple[int, ...]], titles: Sequence[str], most: int, unit: str
) -> tuple[Figure, list[Axes]]:
    """Axes for maps of (y, x) `shapes` in `unit`: at most `most` beside each other, fewer where they are flat."""
    n, boxes = len(shapes), [_box(shape) for shape in shapes]
    columns = max(min(n, round(most * min(1.0, 2 * max(boxes)))), math.ceil(n / 6), 1)
    rows = math.ceil(n / columns)
    height = min(0.75 * WIDTH / columns * max(boxes), 5.0) + 0.85
    # the layout is found before the ticks are final: more room than by default
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
    figure = Figure(figsize=(WIDTH, rows * height + 1.1), layout=layout)
    axes = []
    for i, title in enumerate(titles):
        ax = figure.add_subplot(rows, columns, i + 1)
        ax.set_title(_wrapped(title, LINE // columns), fontsize="small")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
        lowest, leftmost = i + columns >= n, i % columns == 0
        ax.set(xlabel=f"x, {unit}" * lowest, ylabel=f"y, {unit}" * leftmost)
        axes.append(ax)
    return figure, axes


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _box(shape: Sequence[int]) -> float:
    """Height of a map by its width."""
    return min(max(shape[0] / shape[1], FLATTEST), STEEPEST)


def _show(axes: Axes, image: NDArray[Any], **settings: Any) -> AxesImage:
    ny, nx = image.shape
    return axes.imshow(image, aspect=_box(image.shape) * nx / ny, interpolation="nearest", **settings)


def _explain_grey(figure: Figure) -> None:
    patch = Patch(color=INVALID, label="not judged: no valid sample, or in no tile that is valid enough")
    figure.legend(handles=[patch], loc="outside lower center", frameon=False)
