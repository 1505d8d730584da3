"""The curves of a run, redrawn while it goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, LogFormatterSciNotation, MaxNLocator, ScalarFormatter, StrMethodFormatter

from spectralvae.plotting.figures import save_figure
from spectralvae.training.curves import Curve, Points

LINEAR_UNTIL = 100  # steps: what comes before would fill half of a logarithmic axis
FEW = 60  # points: so many are marked one by one
MOST_TICKS = 9  # of a symlog axis
TRAIN_COLOR, VAL_COLOR, SPIKE_COLOR, BROKEN_COLOR = "#3b6ea5", "#d1495b", "#e08e0b", "black"

CURVES = (
    # file, metric, title
    ("loss", "loss", "Loss per tile: negative log-likelihood, summed over samples, + weighted KL"),
    ("recons_err", "pixel_mse", "Reconstruction error: mean squared error in z, valid samples"),
    ("kl", "kl_loss", "KL term per tile (weighted)"),
)


def draw_curves(
    curves: Mapping[str, Curve], folder: Path, references: Mapping[str, float], spikes: Sequence[int]
) -> None:
    """Rewrite the three plots in ``folder``.

    Args:
        curves: by key of metrics.jsonl; at least one holds a value.
        folder: summary/ of the run.
        references: errors to compare recons_err with, by their label.
        spikes: steps to mark.
    """
    for name, metric, title in CURVES:
        figure = draw_curve(curves, metric, title, references if metric == "pixel_mse" else {}, spikes)
        save_figure(figure, folder / f"{name}.png")


def draw_curve(
    curves: Mapping[str, Curve], metric: str, title: str, references: Mapping[str, float], spikes: Sequence[int]
) -> Figure:
    """Training raw and smoothed, validation as markers: linear until step 100, then log-log over the steps from 100 on.

    Where a point stands for several rows, a band or bar spans them from the lowest to the highest.

    Where values are not all positive (the likelihood loss goes negative once logvar is learned) a logarithmic axis
    would drop them without a word; the axis becomes symlog, and its label says so.
    """
    train, val = (curves.get(key, Curve()) for key in (metric, f"val_{metric}"))
    last = max(curve.newest for curve in curves.values())
    late = last > LINEAR_UNTIL
    first = LINEAR_UNTIL if late else 0
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    train_points, val_points = (_from(curve.points(), first) for curve in (train, val))
    _draw_train(axes, train_points)
    _draw_val(axes, val_points)
    for (label, value), style in zip(references.items(), ("--", "-.", ":"), strict=False):
        axes.axhline(value, color="0.45", ls=style, lw=1, label=f"{label}: {value:.3g}")
    broken = sorted({*train.not_finite, *val.not_finite})
    for steps, marker, color, label in (
        (spikes, "v", SPIKE_COLOR, "spike of loss or gradient"),
        (broken, "X", BROKEN_COLOR, "not finite"),
    ):
        _mark(axes, [step for step in steps if step >= first], marker, color, label)
    axes.set(title=title, xlabel=f"step (from {LINEAR_UNTIL} on)" if late else "step", ylabel=metric)
    if late:
        axes.set_xscale("log")
        axes.set_xlim(LINEAR_UNTIL, last * 1.05)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        axes.xaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
        extremes = [column for points in (train_points, val_points) for column in (points.low, points.high)]
        _set_value_scale(axes, np.concatenate([*extremes, train_points.smooth, list(references.values())]), metric)
    axes.grid(True, which="major", color="0.88")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    return figure


def _from(points: Points, first: int) -> Points:
    return Points(*(column[points.step >= first] for column in points))


def _draw_train(axes: Axes, points: Points) -> None:
    if not len(points.step):
        return
    if (points.low < points.high).any():
        axes.fill_between(points.step, points.low, points.high, color=TRAIN_COLOR, alpha=0.25, lw=0)
    marker = "." if len(points.step) <= FEW else None
    axes.plot(
        points.step, points.mean, color=TRAIN_COLOR, alpha=0.45, lw=0.8, marker=marker, ms=4, label="training batch"
    )
    axes.plot(points.step, points.smooth, color=TRAIN_COLOR, lw=1.8, zorder=3, label="training, smoothed")


def _draw_val(axes: Axes, points: Points) -> None:
    if not len(points.step):
        return
    size, alpha = (4.0, 1.0) if len(points.step) <= FEW else (2.5, 0.6)  # many must not hide the line
    several = points.low < points.high
    step, low, high = points.step[several], points.low[several], points.high[several]
    # one broken line: matplotlib draws separate bars more slowly
    bars = np.column_stack([low, high, np.full(len(step), np.nan)]).ravel()
    axes.plot(step.repeat(3), bars, color=VAL_COLOR, lw=0.8, alpha=0.4)
    axes.plot(
        points.step, points.mean, "o", color=VAL_COLOR, alpha=alpha, ms=size, mew=0, label="validation", clip_on=False
    )


def _mark(axes: Axes, steps: Sequence[int], marker: str, color: str, label: str) -> None:
    """Marks at the upper edge."""
    if steps:
        edge = np.full(len(steps), 0.985)
        place = axes.get_xaxis_transform()
        axes.plot(steps, edge, marker, color=color, ms=5, mew=0, transform=place, label=label, clip_on=False)


def _set_value_scale(axes: Axes, values: npt.NDArray[np.float64], metric: str) -> None:
    if (values > 0).all():
        axes.set_yscale("log")
        return
    sizes = np.abs(values[values != 0])
    threshold = 10.0 ** np.floor(np.log10(np.quantile(sizes, 0.1))) if len(sizes) else 1.0
    axes.set_yscale("symlog", linthresh=threshold)
    if values.max() > 0:
        axes.axhline(0, color="0.7", lw=0.8)
    axes.set_ylabel(f"{metric}   (symlog axis: linear within ±{threshold:g})")
    _set_symlog_ticks(axes, threshold)


def _set_symlog_ticks(axes: Axes, threshold: float) -> None:
    """Ticks at zero and at decades, or at 1, 2 and 5 of each, or linear ones where these are too few.

    Matplotlib's own may lie within the linear part, where their labels overlap, and there may be none in sight.
    """
    low, high = axes.get_ylim()
    decades = np.arange(np.log10(threshold), np.log10(max(-low, high, threshold)) + 1e-9)
    for factors in ((1,), (1, 2, 5)):
        sizes = np.multiply.outer(10.0**decades, factors).ravel()
        ticks = np.concatenate([-sizes[::-1], [0.0], sizes])
        inside = ticks[(ticks >= low) & (ticks <= high)]
        if len(inside) >= 3:
            stride = -(-len(inside) // MOST_TICKS)
            start = int(np.argmin(np.abs(inside))) % stride  # zero keeps its tick
            axes.set_yticks(inside[start::stride])
            axes.yaxis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(np.inf, np.inf)))
            return
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
