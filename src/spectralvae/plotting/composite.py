"""A whole scene and what the network makes of it, on one page."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter
from numpy.typing import NDArray

from spectralvae.data.pca import PixelPCA
from spectralvae.data.sampling import evenly
from spectralvae.plotting.panels import FEW, INVALID, MARKS, draw_spectra, mark_pixel, spectral_axis, telling_pixels
from spectralvae.weights.normalization import Normalization

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

MAX_PIXELS = 300 * 300  # that are drawn and counted: the caller holds them twice, with all channels
# that principal components are fitted on: plenty for three of 1028 channels, and a second's work; a prime, so that
# pixels spread evenly over rows are not all of a few columns
FIT_PIXELS = 16_381
BLOCK_SAMPLES = 2**22  # that are float64 at a time
QUANTILES = [0.02, 0.98]  # of a component over the original: the ends of its colours
# RGB of each component (the idea is of Tyo et al. 2003, IEEE Trans. Geosci. Remote Sens. 41): the eye sees lightness
# best, and the colour-blind tell yellow from blue
COLORS = np.array([[0.7, 0.7, 0.7], [0.3, 0.18, -0.48], [0.3, -0.3, 0.0]])
COLOR_NAMES = ("lightness", "yellow against blue", "red against green")
NEGLIGIBLE = 1e-12  # share of variance: less is rounding of float32, and no component

WIDTH = 15.0  # inches
TURNED_FROM = 1.5  # pixels along y for one along x: the scene is turned
STACKED_FROM = 3.0  # pixels along the longer axis for one along the other: maps stand above each other
STRETCHED_FROM = 8.0  # the same: pixels are drawn longer than wide, or else the maps would be threads
MAPS, CURVES = ("original", "reconstruction", "error"), ("channels", "z", "radiance")
ERRORS = colormaps["magma"].with_extremes(bad=(0, 0, 0, 0))
HATCHED: dict[str, Any] = {"facecolor": INVALID, "edgecolor": "0.45", "hatch": "////", "lw": 0}
PLATE = {"facecolor": "white", "edgecolor": "none"}


def draw_scene(
    original: Float32,
    reconstruction: Float32,
    rmse: NDArray[Any],
    *,
    normalization: Normalization,
    name: str,
    pixels_per_sample: tuple[int, int] = (1, 1),
) -> Figure:
    """Composites of original and reconstruction, map and spectrum of the error, and spectra of a few pixels.

    The composites show the first three principal components of the original's spectra as lightness, yellow against
    blue and red against green, of both scenes on one scale. A scene that is long along y is turned by a quarter. Of a
    large scene some pixels are enough: `thinning` tells which; if more are given, the others are left out here.

    Args:
        original: (y, x, channel) z, NaN = invalid.
        reconstruction: the same shape; used where the original is valid.
        rmse: (y, x) over the channels, in z, NaN where nothing is valid: of the whole scene, or of the pixels given.
        normalization: for wavelengths and radiance.
        name: of the scene.
        pixels_per_sample: every how many-th pixel of the scene is given, along y and x, from the first one on.
    """
    drawn = _thinned(original, reconstruction, rmse, pixels_per_sample)
    view, errors = drawn.view, _channel_errors(drawn.original, drawn.reconstruction)
    images, meaning = _composites(drawn.original, drawn.reconstruction, errors)
    pixels = telling_pixels(drawn.original)
    if pixels:
        pixels["worst"] = divmod(int(np.nanargmax(drawn.rmse)), drawn.rmse.shape[1])

    figure, panels = _page(view)
    for panel, image in zip(MAPS, images, strict=False):
        view.show(panels[panel], image, (image.shape[0] * view.steps[0], image.shape[1] * view.steps[1]))
    _draw_errors(panels["error"], rmse, view)
    _draw_channels(panels["channels"], errors, normalization)
    spectra = [(drawn.original[place], drawn.reconstruction[place], MARKS[kind]) for kind, place in pixels.items()]
    draw_spectra(panels["z"], panels["radiance"], spectra, normalization)
    for kind, place in pixels.items():
        for panel in MAPS:
            mark_pixel(panels[panel], *view.point(place), MARKS[kind])
    _draw_legend(figure, drawn, pixels)
    lines = (name, _facts(drawn, errors), meaning, _remarks(view))
    figure.suptitle("\n".join(line for line in lines if line), fontsize="large")
    if not pixels:
        for panel, axes in panels.items():
            axes.text(0.5, 0.5, "no valid sample", transform=axes.transAxes, ha="center", va="center", bbox=PLATE)
            if panel in CURVES:
                axes.set(xticks=[], yticks=[])
    return figure


def thinning(ny: int, nx: int) -> tuple[int, int]:
    """Every how many-th pixel of a scene is drawn, along y and x: at most `MAX_PIXELS` in all."""
    ky = kx = 1
    while (rows := math.ceil(ny / ky)) * (columns := math.ceil(nx / kx)) > MAX_PIXELS:
        ky, kx = (ky + 1, kx) if rows > columns else (ky, kx + 1)
    return ky, kx


@dataclass(frozen=True)
class _View:
    """How a scene lies on the page.

    Attributes:
        size: pixels of the scene along y and x.
        steps: every how many-th of them is drawn.
    """

    size: tuple[int, int]
    steps: tuple[int, int]

    @property
    def turned(self) -> bool:
        """y to the right and x upwards: turned by a quarter, not mirrored."""
        return self.size[0] > TURNED_FROM * self.size[1]

    @property
    def ratio(self) -> float:
        """Pixels across for one down."""
        ny, nx = self.size
        return ny / nx if self.turned else nx / ny

    @property
    def stretch(self) -> float:
        """Height of a pixel by its width."""
        return max(1.0, self.ratio / STRETCHED_FROM)

    def show(self, axes: Axes, image: NDArray[Any], covers: tuple[int, int], **settings: Any) -> AxesImage:
        """Draw an image on axes that count pixels of the scene; what is transparent is hatched.

        Args:
            axes: where to draw.
            image: (y, x), or (y, x, RGBA).
            covers: pixels of the scene along y and x that it stands for.
            settings: of imshow.
        """
        axes.patch.set(**HATCHED)
        (ny, nx), (y, x) = self.size, covers
        if self.turned:
            extent = (-0.5, y - 0.5, -0.5, x - 0.5)
            shown = axes.imshow(image.swapaxes(0, 1), origin="lower", extent=extent, **settings)
            axes.set(xlim=(-0.5, ny - 0.5), ylim=(-0.5, nx - 0.5))
        else:
            shown = axes.imshow(image, extent=(-0.5, x - 0.5, y - 0.5, -0.5), **settings)
            axes.set(xlim=(-0.5, nx - 0.5), ylim=(ny - 0.5, -0.5))
        axes.set_aspect(self.stretch)
        return shown

    def point(self, place: tuple[int, int]) -> tuple[int, int]:
        """Where on the axes a pixel that is drawn lies."""
        y, x = (i * step for i, step in zip(place, self.steps, strict=True))
        return (y, x) if self.turned else (x, y)


class _Drawn(NamedTuple):
    """The pixels that are drawn, as of `draw_scene`, and where they lie."""

    original: Float32
    reconstruction: Float32
    rmse: NDArray[Any]
    view: _View


def _thinned(original: Float32, reconstruction: Float32, rmse: NDArray[Any], given: tuple[int, int]) -> _Drawn:
    ny, nx, _ = original.shape
    size = (rmse.shape[0], rmse.shape[1]) if rmse.shape != (ny, nx) else (ny * given[0], nx * given[1])
    if rmse.shape != (ny, nx):
        rmse = rmse[:: given[0], :: given[1]]
    assert reconstruction.shape == original.shape and rmse.shape == (ny, nx)
    ky, kx = thinning(ny, nx)
    kept = np.s_[::ky, ::kx]
    return _Drawn(original[kept], reconstruction[kept], rmse[kept], _View(size, (given[0] * ky, given[1] * kx)))


class _ChannelErrors(NamedTuple):
    """(channel) each, over the valid samples of the pixels drawn; NaN where there are none."""

    n_valid: Float64
    mean: Float64
    variance: Float64
    mse: Float64


def _blocks(pixels: NDArray[Any]) -> Iterator[slice]:
    """Parts of the first axis, small enough to be float64."""
    n = max(1, BLOCK_SAMPLES // math.prod(pixels.shape[1:]))
    return (slice(start, start + n) for start in range(0, len(pixels), n))


def _channel_errors(original: Float32, reconstruction: Float32) -> _ChannelErrors:
    sums = np.zeros((4, original.shape[-1]))
    for rows in _blocks(original):
        z = original[rows].astype(np.float64)
        valid = np.isfinite(z)
        difference = np.where(valid, reconstruction[rows] - z, 0.0)
        z[~valid] = 0.0
        sums += [part.sum(axis=(0, 1)) for part in (valid, z, z**2, difference**2)]
    n_valid = sums[0]
    mean, square, mse = np.divide(sums[1:], n_valid, out=np.full((3, len(n_valid)), np.nan), where=n_valid > 0)
    return _ChannelErrors(n_valid, mean, np.maximum(square - mean**2, 0.0), mse)


def _composites(original: Float32, reconstruction: Float32, errors: _ChannelErrors) -> tuple[Float32, str]:
    """Principal components of the original's spectra as colours, of both scenes on one scale.

    A sample that is invalid in the original counts as the scene's mean of its channel, in both scenes: so a missing
    channel hardly colours a pixel, and never makes the two differ.

    Returns:
        (original or reconstruction, y, x, RGBA) from 0 to 1, transparent where nothing is valid; what colours mean.
    """
    seen = np.stack([np.isfinite(row).any(axis=-1) for row in original])
    rgba = np.zeros((2, *seen.shape, 4), np.float32)
    rgba[..., 3] = seen
    components = _principal_components(original, seen, errors.mean)
    if not len(components):
        return rgba, "no colours: they need two valid pixels that differ"
    scores = np.zeros((2, *seen.shape, len(components)))
    for rows in _blocks(original):
        valid = np.isfinite(original[rows])
        for score, scene in zip(scores, (original, reconstruction), strict=True):
            deviation = np.where(valid, scene[rows] - errors.mean, 0.0)
            score[rows] = np.tensordot(deviation, components, axes=(-1, -1))  # `@` takes rows one by one: slower
    low, high = np.quantile(scores[0, seen], QUANTILES, axis=0)
    scaled = np.clip((scores - low) / np.where(high > low, high - low, 1.0), 0.0, 1.0)
    rgba[..., :3] = np.clip(0.5 + (scaled - 0.5) @ COLORS[: len(components)], 0.0, 1.0)
    total = np.nansum(errors.variance * errors.n_valid) / seen.sum()
    shares = 100 * scores[0, seen].var(axis=0) / total
    meaning = ", ".join(f"{name} {share:.3g} %" for name, share in zip(COLOR_NAMES, shares, strict=False))
    return rgba, f"composites: principal components of the original: {meaning} of its variance"


def _principal_components(original: Float32, seen: NDArray[np.bool_], mean: Float64) -> Float64:
    """(k, channel), at most three; none where all spectra are the same.

    Signs are such that colours are like true ones: bright is light, more at the last channels than at the first is
    yellow, more in the middle than at both ends is green.
    """
    y, x = (index[evenly(len(index), FIT_PIXELS)] for index in np.nonzero(seen))
    k = min(3, original.shape[-1], len(y) - 1)
    if k < 1:
        return np.zeros((0, original.shape[-1]))
    deviations = [original[y[i : i + 1024], x[i : i + 1024]] - mean for i in range(0, len(y), 1024)]
    pca = PixelPCA.fit(deviations, k)
    variances = sum(np.sum((np.nan_to_num(part) @ pca.components.T) ** 2, axis=0) for part in deviations)
    total = sum(np.nansum(part**2) for part in deviations)
    components = pca.components[variances > NEGLIGIBLE * total]
    along = np.linspace(-1.0, 1.0, original.shape[-1])
    shapes = np.stack([np.ones_like(along), along, 3 * along**2 - 1])[: len(components)]
    return np.asarray(np.where((components * shapes).sum(axis=1) < 0, -1.0, 1.0)[:, None] * components)


def _page(view: _View) -> tuple[Figure, dict[str, Axes]]:
    """Maps beside each other over the curves; maps above each other where they are long."""
    if view.ratio < STACKED_FROM:
        rows: list[Any] = [list(MAPS), list(CURVES)]
        heights = [min(4.4 / view.ratio, 5.0) + 0.4, 3.8]
    else:
        rows = [*([panel] * 3 for panel in MAPS), list(CURVES)]
        heights = [min(13.4 / view.ratio * view.stretch, 2.6) + 0.35] * 3 + [3.8]
    figure = Figure(figsize=(WIDTH, sum(heights) + 1.8), layout="constrained")
    panels: dict[str, Axes] = figure.subplot_mosaic(rows, height_ratios=heights)
    across, down = ("y", "x") if view.turned else ("x", "y")
    titles = ("original", "reconstruction, on the scale of the original", "error: RMSE over the channels")
    for panel, title in zip(MAPS, titles, strict=True):
        axes = panels[panel]
        axes.set_title(title)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
        leftmost, lowest = (panel == MAPS[0], True) if len(rows) == 2 else (True, panel == MAPS[-1])
        axes.set(xlabel=f"{across}, pixels" * lowest, ylabel=f"{down}, pixels" * leftmost)
        axes.tick_params(labelbottom=lowest, labelleft=leftmost)
    return figure, panels


def _draw_errors(axes: Axes, rmse: NDArray[Any], view: _View) -> None:
    """Colours up to the largest error but for a few outliers."""
    valid = rmse[np.isfinite(rmse)]
    top = float(np.quantile(valid, 0.99)) if len(valid) else 0.0
    shown = view.show(axes, rmse, view.size, vmin=0.0, vmax=top or 1.0, cmap=ERRORS)
    assert axes.figure is not None
    beside = axes.inset_axes((1.015, 0.0, 0.03 if view.ratio < STACKED_FROM else 0.01, 1.0))
    axes.figure.colorbar(shown, cax=beside, extend="max", label="RMSE of z")


def _draw_channels(axes: Axes, errors: _ChannelErrors, normalization: Normalization) -> None:
    """RMSE of the reconstruction beside that of predicting the scene's mean spectrum."""
    channels = spectral_axis(axes, normalization)
    marker = "o" if len(channels) <= FEW else None
    std, rmse = np.sqrt(errors.variance), np.sqrt(errors.mse)
    axes.plot(channels, std, color="0.5", ls="--", lw=1.2, marker=marker, ms=4)
    axes.plot(channels, rmse, color=MARKS["dark"].color, lw=1.2, marker=marker, ms=4)
    axes.set(title="RMSE (solid) and standard deviation (dashed) of z", ylabel="z")
    shown = np.concatenate([std, rmse])
    shown = shown[np.isfinite(shown)]
    if len(shown) and shown.min() > 1e-6 * shown.max():  # less is rounding
        axes.set_yscale("log", subs=[])
        axes.set_ylim(shown.min() / 1.6, shown.max() * 1.6)  # a factor of 2.5 at least: one of 1, 2, 5 is in it
        axes.yaxis.set_major_locator(LogLocator(subs=[1, 2, 5]))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(color="0.9")


def _draw_legend(figure: Figure, drawn: _Drawn, pixels: dict[str, tuple[int, int]]) -> None:
    handles: list[Line2D | Patch] = []
    for kind, place in pixels.items():
        y, x = (i * step for i, step in zip(place, drawn.view.steps, strict=True))
        label = f"{kind} pixel: y {y}, x {x}, RMSE {drawn.rmse[place]:.2g}"
        color, marker = MARKS[kind]
        handles.append(Line2D([], [], color=color, lw=2, marker=marker, mec="white", ms=9, label=label))
    handles.append(Patch(**HATCHED, label="no valid sample"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def _facts(drawn: _Drawn, errors: _ChannelErrors) -> str:
    """The error in numbers."""
    ny, nx, nc = drawn.original.shape
    n_valid = errors.n_valid.sum()
    size = f"{drawn.view.size[0]} x {drawn.view.size[1]} x {nc} samples (y, x, channel)"
    invalid = f"{100 * (1 - n_valid / (ny * nx * nc)):.3g} % invalid"
    if not n_valid:
        return f"{size}, {invalid}"
    mse, variance = (np.nansum(part * errors.n_valid) / n_valid for part in (errors.mse, errors.variance))
    return f"{size}, {invalid}; RMSE of z {np.sqrt(mse):.3g}, standard deviation {np.sqrt(variance):.3g}"


def _remarks(view: _View) -> str:
    """What the page does to the scene; nothing if it does nothing."""
    remarks = []
    if view.turned:
        remarks.append("turned: y runs to the right, x upwards")
    if view.stretch > 1:
        remarks.append(f"pixels are drawn {view.stretch:.3g} times as tall as wide")
    if view.steps != (1, 1):
        left = (f"1 pixel in {step} along {axis}" for axis, step in zip("yx", view.steps, strict=True) if step > 1)
        remarks.append(f"composites and curves: {', '.join(left)}")
    return "; ".join(remarks)
