"""Pictures of what the network makes of a few tiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from spectralvae.data.normalize import Normalization

N_TILES = 3
COLORS = ("#3b6ea5", "#d1495b", "#66a182")
VALUES, DIFFERENCES = (colormaps[name].with_extremes(bad="0.6") for name in ("viridis", "RdBu_r"))


def draw_reconstructions(
    original: NDArray[np.float32],
    reconstruction: NDArray[np.float32],
    names: Sequence[str],
    normalization: Normalization,
    title: str,
) -> Figure:
    """Original, reconstruction and difference of some tiles at one channel, and spectra of some of their pixels.

    Args:
        original: (tile, y, x, channel) z, NaN = invalid.
        reconstruction: the same shape.
        names: of the tiles.
        normalization: for wavelengths and radiance.
        title: of the figure.
    """
    n = len(original)
    channel = _telling_channel(original)
    wavelength = normalization.wavelength
    assert wavelength is not None, "a store always has wavelengths"
    figure = Figure(figsize=(17, 3.6 * n + 0.5), layout="constrained")
    figure.suptitle(
        f"{title}   (maps: z at {wavelength[channel]:.1f} nm, where these tiles vary most; grey = invalid; "
        "MSE over all channels)"
    )
    axes = figure.subplots(n, 5, squeeze=False, width_ratios=[1, 1, 1, 1.6, 1.6])
    for row, x, x_hat, name in zip(axes, original, reconstruction, names, strict=True):
        map_ = x[..., channel]
        map_hat = np.where(np.isfinite(map_), x_hat[..., channel], np.nan)
        difference = map_hat - map_
        low, high = _limits(np.stack([map_, map_hat]))
        for ax, image, label in ((row[0], map_, "original"), (row[1], map_hat, "reconstruction")):
            shown = ax.imshow(image, vmin=low, vmax=high, cmap=VALUES, interpolation="nearest")
            ax.set_title(label)
        figure.colorbar(shown, ax=list(row[:2]), shrink=0.8, extend="both", label="z")
        span = float(np.nanmax(np.abs(difference), initial=1e-12))
        shown = row[2].imshow(difference, vmin=-span, vmax=span, cmap=DIFFERENCES, interpolation="nearest")
        row[2].set_title(f"difference: MSE {np.nanmean((x_hat - x) ** 2):.3g}")
        figure.colorbar(shown, ax=row[2], shrink=0.8, label="reconstruction - original")
        row[0].set_ylabel(name, fontsize=8)
        _draw_spectra(row[3], row[4], row[0], x, x_hat, normalization, wavelength)
        for ax in row[:3]:
            ax.set(xticks=[], yticks=[])
    return figure


def _draw_spectra(
    z_axes: Axes,
    radiance_axes: Axes,
    map_axes: Axes,
    x: NDArray[np.float32],
    x_hat: NDArray[np.float32],
    normalization: Normalization,
    wavelength: NDArray[np.float64],
) -> None:
    for (i, j), color in zip(_pixels(x), COLORS, strict=False):
        map_axes.plot(j, i, "o", mfc=color, mec="white", ms=7)
        for ax, line, line_hat in (
            (z_axes, x[i, j], x_hat[i, j]),
            (radiance_axes, normalization.denormalize(x[i, j]), normalization.denormalize(x_hat[i, j])),
        ):
            ax.plot(wavelength, line, color=color, lw=2.2, alpha=0.35)
            ax.plot(wavelength, np.where(np.isfinite(line), line_hat, np.nan), color=color, lw=0.9)
    z_axes.set(title="z: original (wide), reconstruction (thin)", xlabel="wavelength, nm")
    quantity = "radiance" if normalization.transform == "log_zscore" else "value"
    radiance_axes.set(title=f"{quantity}, {normalization.units or 'in the units of the file'}", xlabel="wavelength, nm")
    if normalization.transform == "log_zscore":
        radiance_axes.set_yscale("log")
    for ax in (z_axes, radiance_axes):
        ax.grid(color="0.9")


def _telling_channel(z: NDArray[np.float32]) -> int:
    """The channel whose valid samples vary most over the tiles."""
    flat = z.reshape(-1, z.shape[-1]).astype(np.float64)
    valid = np.isfinite(flat)
    count = np.maximum(valid.sum(axis=0), 1)
    mean = np.where(valid, flat, 0.0).sum(axis=0) / count
    variance = (np.where(valid, flat - mean, 0.0) ** 2).sum(axis=0) / count
    return int(np.argmax(variance))


def _limits(image: NDArray[np.float32]) -> tuple[float, float]:
    """A colour scale that a few outliers do not stretch."""
    valid = image[np.isfinite(image)]
    if not len(valid):
        return 0.0, 1.0
    low, high = np.quantile(valid, [0.01, 0.99])
    return float(low), float(max(high, low + 1e-6))


def _pixels(x: NDArray[np.float32]) -> list[tuple[int, int]]:
    """A dark, a middling and a bright pixel, by the mean of z, among those with the fewest invalid samples."""
    n_invalid = np.isnan(x).sum(axis=-1)
    candidates = np.flatnonzero(n_invalid == n_invalid.min())
    brightness = np.where(np.isfinite(x), x, 0.0).reshape(-1, x.shape[-1])[candidates].mean(axis=-1)
    order = candidates[np.argsort(brightness)]
    chosen = [order[int(q * (len(order) - 1))] for q in (0.05, 0.5, 0.95)]
    return [(int(k) // x.shape[1], int(k) % x.shape[1]) for k in chosen]
