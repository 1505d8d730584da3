"""Pictures of what the network makes of a few tiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray

from spectralvae.plotting.panels import INVALID, MARKS, draw_spectra, mark_pixel, robust_limits, telling_pixels
from spectralvae.weights.normalization import Normalization

N_TILES = 3
VALUES, DIFFERENCES = (colormaps[name].with_extremes(bad=INVALID) for name in ("viridis", "RdBu_r"))


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
        low, high = robust_limits(np.stack([map_, map_hat]))
        for ax, image, label in ((row[0], map_, "original"), (row[1], map_hat, "reconstruction")):
            shown = ax.imshow(image, vmin=low, vmax=high, cmap=VALUES, interpolation="nearest")
            ax.set_title(label)
        figure.colorbar(shown, ax=list(row[:2]), shrink=0.8, extend="both", label="z")
        span = float(np.nanmax(np.abs(difference), initial=1e-12))
        shown = row[2].imshow(difference, vmin=-span, vmax=span, cmap=DIFFERENCES, interpolation="nearest")
        row[2].set_title(f"difference: MSE {np.nanmean((x_hat - x) ** 2):.3g}")
        figure.colorbar(shown, ax=row[2], shrink=0.8, label="reconstruction - original")
        row[0].set_ylabel(name, fontsize=8)
        pixels = [(i, j, MARKS[kind]) for kind, (i, j) in telling_pixels(x).items()]
        for i, j, mark in pixels:
            mark_pixel(row[0], j, i, mark)
        draw_spectra(row[3], row[4], [(x[i, j], x_hat[i, j], mark) for i, j, mark in pixels], normalization)
        for ax in row[:3]:
            ax.set(xticks=[], yticks=[])
    return figure


def _telling_channel(z: NDArray[np.float32]) -> int:
    """The channel whose valid samples vary most over the tiles."""
    flat = z.reshape(-1, z.shape[-1]).astype(np.float64)
    valid = np.isfinite(flat)
    count = np.maximum(valid.sum(axis=0), 1)
    mean = np.where(valid, flat, 0.0).sum(axis=0) / count
    variance = (np.where(valid, flat - mean, 0.0) ** 2).sum(axis=0) / count
    return int(np.argmax(variance))
