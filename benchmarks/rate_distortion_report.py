"""What rate_distortion.py found: as a table in Markdown, and as curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import NullLocator

Point = dict[str, Any]

STYLES: dict[str, dict[str, Any]] = {
    "ours": {"color": "#000000", "lw": 2.5},
    "ours-bounded": {"color": "#000000", "lw": 2, "ls": "--"},
    "ours-network": {"color": "#000000", "lw": 1.5, "ls": ":"},
    "pca": {"color": "#004488"},
    "pca-jpeg2000": {"color": "#66ccee"},
    "pca-2-floats": {"color": "#aa3377"},
    "sz3": {"color": "#bb5566"},
    "zfp": {"color": "#ddaa33"},
    "bitround-zstd3": {"color": "#999999"},
    "bitround-zstd19": {"color": "#228833"},
}
OURS = ("ours", "ours-bounded", "ours-network")
GAP, WIDTH = 0.05, 0.3  # of a label, in a panel's height and width
ROOM = 20.0  # for labels: how much farther the axis goes than the curves


# --- table ----------------------------------------------------------------------------------------


def number(value: float, digits: int = 2) -> str:
    """Short, without an exponent where that is readable."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "–"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
        return f"{value:.{decimals}f}"
    return f"{value:.{digits - 1}e}"


def several(values: Sequence[float], digits: int = 2) -> str:
    """In one cell."""
    return " / ".join(number(value, digits) for value in values)


def _columns(scene: dict[str, Any]) -> dict[str, Callable[[Point], str]]:
    """Header and cell of each; what a scene does not know has none."""
    products = list(scene["r2_before"])
    columns: dict[str, Callable[[Point], str]] = {
        "× float32": lambda p: number(p["ratio"], 3) + ("" if p["reached"] else " *"),
        "method": lambda p: str(p["method"]),
        "× deflated": lambda p: number(p["ratio_to_deflated"], 3),
        "bytes": lambda p: f"{p['bytes']:,}" + (f" ({p['file_bytes']:,})" if p["method"] in OURS else ""),
        "bits / sample": lambda p: number(p["bits_per_sample"], 3),
        "PSNR, dB": lambda p: number(p["psnr"], 3),
        "RMSE": lambda p: number(p["rmse"]),
        "largest error": lambda p: number(p["largest"]),
        "angle, °: median / 99 %": lambda p: several([p["angle_median"], p["angle_99"]]),
        "relative, %: median / 99 % / largest": lambda p: several(
            [100 * p[f"relative_{which}"] for which in ("median", "99", "largest")]
        ),
    }
    if any(math.isfinite(p["noise_ratio"]) for p in scene["points"]):
        columns["in noise"] = lambda p: number(p["noise_ratio"])
    if products:
        names = " / ".join(products)
        columns[f"change: {names}"] = lambda p: several([p["retrieval"][name]["change"] for name in products])
        columns[f"R²: {names}"] = lambda p: " / ".join(f"{p['retrieval'][name]['r2']:.2f}" for name in products)
    columns["MB/s: encode / decode"] = lambda p: several([p["encode_mb_per_s"], p["decode_mb_per_s"]])
    return columns


def table(scene: dict[str, Any], ratios: Sequence[float]) -> str:
    """One scene: without loss first, then by the ratio that was sought, the best first."""
    columns = _columns(scene)
    size = " × ".join(map(str, scene["shape"]))
    lines = [
        f"### {scene['scene']}",
        "",
        f"{size} samples, {scene['valid_share']:.1%} valid; {scene['float32_bytes'] / 1e6:.1f} MB as float32, "
        f"{scene['deflated_bytes'] / 1e6:.1f} MB deflated ({scene['deflated']}); peak {scene['peak']:.2f}; "
        f"the model has {scene['model_bytes'] / 1e6:.1f} MB, not counted.",
    ]
    if scene["r2_before"]:
        before = ", ".join(f"{name} {value:.2f}" for name, value in scene["r2_before"].items())
        lines.append(f"R² of regressions on the original: {before}.")
    lines += [f"{remark[0].upper()}{remark[1:]}." for remark in scene["remarks"]]
    lines += ["", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    order = {None: -1, **{ratio: i for i, ratio in enumerate(ratios)}}
    for point in sorted(scene["points"], key=lambda p: (order[p["target"]], -p["psnr"])):
        lines.append(f"| {' | '.join(cell(point) for cell in columns.values())} |")
    sought = ", ".join(f"{ratio:g}" for ratio in ratios)
    return "\n".join([*lines, "", f"\\* as near as it comes to the next of the ratios sought: {sought}.", ""])


# --- figure ---------------------------------------------------------------------------------------


def worst_change(point: Point) -> float:
    """Of the product that suffers most."""
    return max((found["change"] for found in point["retrieval"].values()), default=math.nan)


PANELS: dict[str, tuple[Callable[[Point], float], str]] = {
    "PSNR of z, dB": (lambda p: float(p["psnr"]), "linear"),
    "largest error of z": (lambda p: float(p["largest"]), "log"),
    "change of the worst retrieval / its error": (worst_change, "log"),
}


def draw(scenes: Sequence[dict[str, Any]]) -> Figure:
    """A column a scene: what of it is lost against the ratio to float32. Dotted: what there is without loss."""
    figure = Figure(figsize=(4.6 * max(2, len(scenes)), 11), layout="constrained")
    grid = figure.subplots(len(PANELS), len(scenes), squeeze=False)
    for column, scene in zip(grid.T, scenes, strict=True):
        column[0].set_title(scene["scene"], fontsize=9)
        for axes, (label, (value, scale)) in zip(column, PANELS.items(), strict=True):
            if not any(math.isfinite(value(p)) and value(p) > 0 for p in scene["points"]):
                axes.set_axis_off()
                continue
            _draw_panel(axes, scene["points"], value, scale)
            axes.set(ylabel=label, xlabel="bytes as float32 / bytes")
    return figure


def _draw_panel(axes: Axes, points: Sequence[Point], value: Callable[[Point], float], scale: str) -> None:
    axes.set(xscale="log", yscale=scale)
    labels = []
    for name, style in STYLES.items():
        known = sorted((p["ratio"], value(p)) for p in points if p["method"] == name)
        known = [(x, y) for x, y in known if math.isfinite(y) and (y > 0 or scale == "linear")]
        if known:
            axes.plot(
                *zip(*known, strict=True),
                **{"marker": "o", "ms": 4, "lw": 1.5, **style},
                zorder=3 if name in OURS else 2,
            )
            labels.append((known[-1], name, style["color"]))
    for point in points:
        if point["rmse"] == 0:
            axes.axvline(point["ratio"], color="0.75", lw=1, ls=":", zorder=0)
    ratios = [4**k for k in range(7)]
    axes.set_xlim(1, ROOM * max(ratios))
    axes.set_xticks(ratios, [f"{ratio}" for ratio in ratios])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(color="0.92")
    axes.margins(y=0.1)
    axes.get_ylim()  # until asked for they are not those of the curves
    _label(axes, labels)


def _label(axes: Axes, labels: Sequence[tuple[tuple[float, float], str, str]]) -> None:
    """The name of each curve beside its last point, up or down where another one's is in the way."""
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [[float(at) for at in to_axes.transform(point)] for point, _, _ in labels]
    for _ in range(100):
        for (i, a), (j, b) in itertools.combinations(enumerate(places), 2):
            missing = GAP - abs(a[1] - b[1])
            if abs(a[0] - b[0]) < WIDTH and missing > 0:
                push = math.copysign(missing / 2, a[1] - b[1] or i - j)
                a[1], b[1] = a[1] + push, b[1] - push
        for place in places:
            place[1] = min(max(place[1], GAP), 1 - GAP)
    for (left, height), (_, name, color) in zip(places, labels, strict=True):
        text = axes.text(
            left + 0.02, height, name, color=color, fontsize=8, va="center", transform=axes.transAxes, zorder=5
        )
        text.set_path_effects([Stroke(linewidth=3, foreground="white"), Normal()])
