"""The curves of a run, redrawn while it goes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, StrMethodFormatter

from spectralvae.rundir import write_atomic

LINEAR_UNTIL = 100  # steps: what comes before would fill half of a logarithmic axis
TRAIN_COLOR, VAL_COLOR = "#3b6ea5", "#d1495b"

CURVES = (
    # file, metric, title
    ("loss", "loss", "Loss per tile: negative log-likelihood, summed over samples, + weighted KL"),
    ("recons_err", "pixel_mse", "Reconstruction error: mean squared error in z, valid samples"),
    ("kl", "kl_loss", "KL term per tile (weighted)"),
)


def save_figure(figure: Figure, path: Path) -> bytes:
    """Write a PNG that is either whole or not there; returns its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomic(path, buffer.getvalue())
    return buffer.getvalue()


def draw_curves(rows: Sequence[Mapping[str, Any]], folder: Path, references: Mapping[str, float]) -> None:
    """Rewrite the three plots in ``folder``.

    Args:
        rows: of metrics.jsonl.
        folder: summary/ of the run.
        references: errors to compare recons_err with, by their label.
    """
    for name, metric, title in CURVES:
        figure = draw_curve(rows, metric, title, references if metric == "pixel_mse" else {})
        save_figure(figure, folder / f"{name}.png")


def draw_curve(rows: Sequence[Mapping[str, Any]], metric: str, title: str, references: Mapping[str, float]) -> Figure:
    """Training as a line, validation as markers: linear until step 100, then log-log over the steps from 100 on.

    Where values are not all positive (the likelihood loss goes negative once logvar is learned) a logarithmic axis
    would drop them without a word; the axis becomes symlog, and its label says so.
    """
    last = rows[-1]["step"]
    late = last > LINEAR_UNTIL
    shown = [row for row in rows if row["step"] >= LINEAR_UNTIL] if late else list(rows)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    train = [(row["step"], row[metric]) for row in shown if metric in row]
    val = [(row["step"], row[f"val_{metric}"]) for row in shown if f"val_{metric}" in row]
    if train:
        axes.plot(*zip(*train, strict=True), color=TRAIN_COLOR, lw=1, label="training batch")
    if val:
        axes.plot(*zip(*val, strict=True), "o", color=VAL_COLOR, ms=4, label="validation", clip_on=False)
    values = np.array([value for _, value in (*train, *val)])
    for (label, value), style in zip(references.items(), ("--", "-.", ":"), strict=False):
        axes.axhline(value, color="0.45", ls=style, lw=1, label=f"{label}: {value:.3g}")
    axes.set(title=title, xlabel=f"step (from {LINEAR_UNTIL} on)" if late else "step", ylabel=metric)
    if late:
        axes.set_xscale("log")
        axes.set_xlim(LINEAR_UNTIL, last * 1.05)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        axes.xaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
        _set_value_scale(axes, values, metric)
    axes.grid(True, which="major", color="0.88")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure


def _set_value_scale(axes: Axes, values: np.ndarray, metric: str) -> None:
    if (values > 0).all():
        axes.set_yscale("log")
        return
    sizes = np.abs(values[values != 0])
    threshold = 10.0 ** np.floor(np.log10(np.quantile(sizes, 0.1))) if len(sizes) else 1.0
    axes.set_yscale("symlog", linthresh=threshold)
    if values.max() > 0:
        axes.axhline(0, color="0.7", lw=0.8)
    axes.set_ylabel(f"{metric}   (symlog axis: linear within ±{threshold:g})")
