"""Pictures of what latents tell: how well probes predict each product, beside their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from spectralvae.analysis.scores import Scores
from spectralvae.plotting.panels import INVALID, Mark, robust_limits

Float64 = NDArray[np.float64]
Curves = Mapping[str, Sequence[float]]  # as of regressors.Fitted

# Paul Tol's "high contrast" and "muted": told apart by the colour-blind, and by their markers
FEATURES = {
    "latents": Mark("#004488", "o"),
    "pca": Mark("#bb5566", "s"),
    "raw": Mark("#ddaa33", "^"),
    "decoded": Mark("#44aa99", "D"),
    "decoded_pca": Mark("#aa4499", "v"),
    "geometry": Mark("#999933", "P"),
    "shuffled": Mark("#777777", "X"),
}
PROBES = {"linear": Mark("#004488", "o"), "mlp": Mark("#bb5566", "s")}
SCALES = {"strength": "strength of the ridge: alpha / cells", "epoch": "epoch"}
VALUES, DIFFERENCES = (colormaps[name].with_extremes(bad=INVALID) for name in ("viridis", "RdBu_r"))

LOWEST = -0.3  # R2: what is worse stands at the edge as an arrow with its number
FEW = 1000  # cells: they are drawn one by one
ENDS = [0.001, 0.999]  # quantiles of truth between which things are drawn
N_BINS, LEAST = 20, 10  # bins of truth; cells in one that are worth a mean
WORST = 2.0  # times the variance: learning curves are drawn up to it
NARROWEST, WIDEST = 0.7, 2.5  # width by height that a map may have


class Predicted(NamedTuple):
    """What one probe made of the test cells.

    Attributes:
        truth, predicted: (cell) in target space.
        scores: of them.
    """

    truth: NDArray[Any]
    predicted: NDArray[Any]
    scores: Scores


# --- the picture to look at first -------------------------------------------------------------


def draw_overview(table: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]) -> Figure:
    """R2 of all features by product and probe, with intervals.

    Args:
        table: product -> probe -> features -> `Scores`, with those of all cells as `unfiltered`: as in probes.json.
    """
    columns = list(table.values())
    shown = [name for name in FEATURES if any(name in by_name for column in columns for by_name in column.values())]
    probes = [name for name in PROBES if any(name in column for column in columns)]
    places = _spread(2 * len(probes), 0.7)
    figure = Figure(figsize=(max(7.0, 1.6 + 3.3 * len(table)), 1.5 + 0.62 * len(shown)), layout="constrained")
    panels = figure.subplots(1, len(table), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (product, column) in zip(panels, table.items(), strict=True):
        for probe, by_name in column.items():
            filtered, unfiltered = places[2 * probes.index(probe) :][:2]
            for name, scores in by_name.items():
                _draw_interval(axes, scores, shown.index(name) + filtered, PROBES[probe], full=True)
                if "unfiltered" in scores:
                    _draw_interval(
                        axes, scores["unfiltered"], shown.index(name) + unfiltered, PROBES[probe], full=False
                    )
        for i in range(1, len(shown)):
            axes.axhline(i - 0.5, color="0.85", lw=0.8)
        axes.axvline(0.0, color="0.3", lw=0.9, zorder=1)
        axes.set(
            title=product, xlabel="R² of the test cells", xlim=(LOWEST - 0.03, 1.03), ylim=(len(shown) - 0.5, -0.5)
        )
        axes.set_yticks(range(len(shown)), shown)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    handles = [
        _handle(f"{probe}, {cells}", PROBES[probe], mfc=mfc)
        for probe in probes
        for cells, mfc in (("filtered", PROBES[probe].color), ("all cells", "white"))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle("What features tell of each product: R² with 95 % intervals over test scenes")
    return figure


def _draw_interval(axes: Axes, scores: Mapping[str, Any], y: float, mark: Mark, *, full: bool) -> None:
    """A point and its interval; at the left edge an arrow and the number if R2 lies beyond, nothing if it has none."""
    r2, low, high = (scores[key] for key in ("r2", "r2_low", "r2_high"))
    if r2 is None:
        return
    if low is not None and high > LOWEST:
        axes.plot([max(low, LOWEST), min(high, 1.0)], [y, y], color=mark.color, lw=1.3, solid_capstyle="butt")
    look: dict[str, Any] = {"mec": mark.color, "mfc": mark.color if full else "white", "mew": 1.2, "zorder": 3}
    if r2 >= LOWEST:
        axes.plot(r2, y, mark.marker, ms=6, **look)
        return
    axes.plot(LOWEST, y, "<", ms=6, **look)
    number = f"{r2:.1f}" if r2 > -100 else f"{r2:.0e}"
    start = LOWEST if low is None or high <= LOWEST else min(high, 1.0)
    axes.annotate(
        number, (start, y), xytext=(7, 0), textcoords="offset points", va="center", fontsize=7, color=mark.color
    )


def _spread(n: int, width: float) -> Float64:
    """Places of n things around 0, from top to bottom."""
    return (np.arange(n) - (n - 1) / 2) * width / n


def _handle(label: str, mark: Mark, **settings: Any) -> Line2D:
    return Line2D([], [], **{"color": mark.color, "marker": mark.marker, "ms": 6, "label": label, **settings})


# --- truth and prediction ----------------------------------------------------------------------


def draw_hexbin(product: str, label: str, predictions: Mapping[str, Mapping[str, Predicted]]) -> Figure:
    """Prediction against truth: a row a probe, a column a kind of features; a point a cell if there are few.

    Args:
        product: for the title.
        label: of the target and its units.
        predictions: probe -> features -> what it made of the same test cells.
    """
    truth = _first(predictions).truth
    low, high = _ends(truth)
    margin = 0.08 * (high - low)
    limits = (low - margin, high + margin)
    figure, panels = _grid(predictions)
    drawn = []
    for probe, by_name in predictions.items():
        for name, (t, p, scores) in by_name.items():
            axes = panels[probe, name]
            if len(t) <= FEW:
                axes.plot(t, p, "o", ms=2.5, mew=0, alpha=0.6, color=FEATURES[name].color)
            else:
                drawn.append(
                    axes.hexbin(t, p, gridsize=45, extent=(*limits, *limits), mincnt=1, cmap="cividis", linewidths=0.1)
                )
            axes.axline((low, low), slope=1, color="0.2", lw=0.9, ls="--")
            outside = float(np.mean((t < limits[0]) | (t > limits[1]) | (p < limits[0]) | (p > limits[1])))
            rest = f"{100 * outside:.2g} % of the cells outside" if outside else ""
            axes.set_title(f"{name}, {probe}\nR² {_interval(scores)}\n{rest}", fontsize="medium")
            axes.set(xlim=limits, ylim=limits, aspect="equal")
            axes.grid(color="0.9")
            axes.set_axisbelow(True)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(5))
    _label_edges(predictions, panels, f"truth: {label}", "prediction")
    if drawn:
        norm = LogNorm(1, max(2, max(float(shown.get_array().max()) for shown in drawn)))  # type: ignore[union-attr]
        for shown in drawn:
            shown.set_norm(norm)
        figure.colorbar(drawn[0], ax=list(panels.values()), label="cells", aspect=30)
    scores = _first(predictions).scores
    figure.suptitle(f"{product}: {scores['n']} cells of {_scenes(scores['n_scenes'])}; dashed: prediction = truth")
    return figure


def draw_residuals(product: str, label: str, predictions: Mapping[str, Mapping[str, Predicted]]) -> Figure:
    """Mean and standard deviation of prediction - truth in bins of truth, and how many cells each has.

    Any regression whose R2 is below 1 is drawn towards the mean: it falls by 1 - R2 a unit of truth, if it is the
    best one; only what differs from that between features tells something.

    Args:
        product: for the title.
        label: of the target and its units.
        predictions: probe -> features -> what it made of the same test cells.
    """
    truth = _first(predictions).truth
    edges = np.linspace(*_ends(truth), N_BINS + 1)
    width = edges[1] - edges[0]
    names = _names(predictions)
    figure = Figure(figsize=(1.2 + 5.5 * len(predictions), 6.2), layout="constrained")
    panels = figure.subplots(2, len(predictions), squeeze=False, sharex=True, sharey="row", height_ratios=[3, 1])
    for axes, below, (probe, by_name) in zip(panels[0], panels[1], predictions.items(), strict=True):
        for shift, name in zip(_spread(len(names), 0.6), names, strict=True):
            if name not in by_name:
                continue
            mean, std = _binned(by_name[name], edges)
            places = edges[:-1] + (0.5 + shift) * width
            color, marker = FEATURES[name]
            axes.errorbar(places, mean, std, color=color, marker=marker, ms=5, lw=1.2, elinewidth=0.9)
        axes.axhline(0.0, color="0.3", lw=0.9, zorder=1)
        axes.set_title(probe)
        axes.grid(color="0.9")
        below.hist(truth, edges, color="0.6")
        below.set_yscale("log")
        below.set_xlabel(f"truth: {label}")
    panels[0, 0].set_ylabel("prediction - truth: mean, bars: standard deviation")
    panels[1, 0].set_ylabel("cells")
    handles = [_handle(name, FEATURES[name]) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(f"{product}: residuals by truth, bins with at least {LEAST} cells")
    return figure


def _binned(predicted: Predicted, edges: Float64) -> tuple[Float64, Float64]:
    """Mean and standard deviation of prediction - truth in each bin; NaN in those with too few cells."""
    residual = predicted.predicted - predicted.truth
    inside = (predicted.truth >= edges[0]) & (predicted.truth <= edges[-1])
    index = np.minimum(np.searchsorted(edges, predicted.truth[inside], side="right"), len(edges) - 1) - 1
    n, total, square = (
        np.bincount(index, weights, len(edges) - 1)
        for weights in (np.ones(len(index)), residual[inside], residual[inside] ** 2)
    )
    n = np.where(n >= LEAST, n, np.nan)
    return total / n, np.sqrt(np.maximum(square / n - (total / n) ** 2, 0.0))


def _ends(truth: NDArray[Any]) -> tuple[float, float]:
    """Between which truths are drawn; a few outliers do not stretch them."""
    low, high = (float(end) for end in np.quantile(truth, ENDS))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _interval(scores: Scores) -> str:
    if scores["r2"] is None:
        return "unknown: truth does not vary"
    if scores["r2_low"] is None or scores["r2_high"] is None:
        return f"{scores['r2']:.3f}, no interval"
    return f"{scores['r2']:.3f} ({scores['r2_low']:.3f} to {scores['r2_high']:.3f})"


def _scenes(n: int) -> str:
    return f"{n} scene" if n == 1 else f"{n} scenes"


# --- how probes learnt -------------------------------------------------------------------------


def draw_learning(product: str, fits: Mapping[str, Mapping[str, Curves]]) -> Figure:
    """Errors on cells fitted on and on scenes held back, by strength of the ridge or by epoch; the choice is marked.

    Args:
        product: for the title.
        fits: probe -> features -> curves, as of `regressors.Fitted`.
    """
    names = _names(fits)
    figure = Figure(figsize=(1.0 + 5.5 * len(fits), 5.2), layout="constrained")
    panels = figure.subplots(1, len(fits), squeeze=False, sharey=True)[0]
    lowest = 1.0
    for axes, (probe, by_name) in zip(panels, fits.items(), strict=True):
        for name in (name for name in names if name in by_name):
            curves = by_name[name]
            scale = next(key for key in SCALES if key in curves)
            x, training, validation = (np.asarray(curves[key]) for key in (scale, "training", "validation"))
            color, marker = FEATURES[name]
            axes.plot(x, training, color=color, lw=1.0, ls="--")
            axes.plot(x, validation, color=color, lw=1.6)
            best = int(np.argmin(validation))
            axes.plot(x[best], validation[best], marker, ms=7, mfc=color, mec="white", zorder=3)
            lowest = min(lowest, float(training.min()), float(validation.min()))
        axes.set_xlabel(SCALES[scale])
        if scale == "strength":
            axes.set_xscale("log")
        else:
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.axhline(1.0, color="0.3", lw=0.9, zorder=1)
        axes.set_title(probe)
        axes.grid(color="0.9")
    panels[0].set_yscale("log")
    panels[0].set_ylim(max(lowest, 1e-6) / 1.3, WORST)
    panels[0].yaxis.set_major_locator(LogLocator(subs=[1, 2, 5]))
    panels[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panels[0].yaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("mean squared error / variance of the target")
    handles = [_handle(name, FEATURES[name]) for name in names]
    handles += [Line2D([], [], color="0.3", lw=1.6, label="days held back; marked: chosen")]
    handles += [Line2D([], [], color="0.3", lw=1.0, ls="--", label="cells fitted on")]
    figure.legend(handles=handles, loc="outside lower center", ncols=1 + 2 * len(panels), frameon=False)
    figure.suptitle(f"{product}: how the probes learnt; 1 is predicting the mean")
    return figure


# --- maps ------------------------------------------------------------------------------------


def draw_maps(product: str, label: str, scene: str, truth: Float64, predictions: Mapping[str, Float64]) -> Figure:
    """Truth, prediction and difference over the cells of one scene; a row a prediction.

    Args:
        product: for the title.
        label: of the target and its units.
        scene: its name.
        truth: (y, x), NaN = not judged.
        predictions: by name, (y, x) each; drawn where there is a truth.
    """
    ny, nx = truth.shape
    shape = min(max(nx / ny, NARROWEST), WIDEST)
    stretch = (nx / ny) / shape  # height of a cell by its width
    seen = np.isfinite(truth)
    differences = {name: np.where(seen, predicted - truth, np.nan) for name, predicted in predictions.items()}
    low, high = robust_limits(truth)
    span = max((robust_limits(np.abs(difference))[1] for difference in differences.values()), default=1.0)

    width = 3.2 * min(1.6, max(0.8, shape))
    size = (3 * width + 2.2, (width / shape + 0.4) * len(predictions) + 1.0)
    figure = Figure(figsize=size, layout="compressed")
    panels = figure.subplots(len(predictions), 3, squeeze=False, sharex=True, sharey=True)
    values: dict[str, Any] = {"vmin": low, "vmax": high, "cmap": VALUES}
    for row, (name, predicted) in zip(panels, predictions.items(), strict=True):
        images = (truth, np.where(seen, predicted, np.nan), differences[name])
        looks: tuple[dict[str, Any], ...] = (values, values, {"vmin": -span, "vmax": span, "cmap": DIFFERENCES})
        titles = ("truth", f"prediction: {name}", "prediction - truth")
        shown = []
        for axes, image, look, title in zip(row, images, looks, titles, strict=True):
            shown.append(axes.imshow(image, interpolation="nearest", aspect=stretch, **look))
            axes.set_title(title, fontsize="medium")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        row[0].set_ylabel("y, cells")
    for axes in panels[-1]:
        axes.set_xlabel("x, cells")
    figure.colorbar(shown[0], ax=panels[:, :2], extend="both", label=label, aspect=12 * len(predictions))
    figure.colorbar(shown[2], ax=panels[:, 2], extend="both", label="prediction - truth", aspect=12 * len(predictions))
    remark = "" if abs(stretch - 1) < 0.01 else f"; cells are drawn {stretch:.2g} times as tall as wide"
    figure.suptitle(f"{product}, {scene}\n{seen.sum()} of {seen.size} cells are judged, grey ones are not{remark}")
    return figure


# --- shared ----------------------------------------------------------------------------------


def _names(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Kinds of features of any probe, in the order of `FEATURES`."""
    return [name for name in FEATURES if any(name in by_name for by_name in table.values())]


def _first(predictions: Mapping[str, Mapping[str, Predicted]]) -> Predicted:
    return next(iter(next(iter(predictions.values())).values()))


def _grid(predictions: Mapping[str, Mapping[str, Predicted]]) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """A panel for each probe (rows) and features (columns) that there are."""
    probes, names = list(predictions), _names(predictions)
    size = (max(6.0, 3.3 * len(names) + 1.5), 3.75 * len(probes) + 1.0)
    figure = Figure(figsize=size, layout="compressed")
    rows = figure.subplots(len(probes), len(names), squeeze=False)
    panels = {}
    for row, probe in zip(rows, probes, strict=True):
        for axes, name in zip(row, names, strict=True):
            if name in predictions[probe]:
                panels[probe, name] = axes
            else:
                axes.set_axis_off()
    return figure, panels


def _label_edges(
    predictions: Mapping[str, Mapping[str, Predicted]], panels: dict[tuple[str, str], Axes], x: str, y: str
) -> None:
    """Axes are told at the left and below only."""
    names, lowest = _names(predictions), list(predictions)[-1]
    for (probe, name), axes in panels.items():
        axes.set(xlabel=x * (probe == lowest), ylabel=y * (name == names[0]))
