"""What pictures of reconstructions share: colours, scales, and spectra of a few pixels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from spectralvae.weights.normalization import Normalization

INVALID = "0.6"  # grey
QUANTILES = {"dark": 0.05, "middling": 0.5, "bright": 0.95}  # of the mean of z
FEW = 40  # samples: a line through so few of them is marked at each


class Mark(NamedTuple):
    """How a pixel is shown, on the map and as a spectrum."""

    color: str
    marker: str


# Paul Tol's "high contrast" and black: told apart by the colour-blind, and in print without colours
MARKS = {
    "dark": Mark("#004488", "o"),
    "middling": Mark("#bb5566", "s"),
    "bright": Mark("#ddaa33", "^"),
    "worst": Mark("#000000", "X"),
}


def mark_pixel(axes: Axes, x: float, y: float, mark: Mark) -> None:
    """Show on a map where a spectrum is from."""
    axes.plot(x, y, mark.marker, mfc=mark.color, mec="white", mew=1.1, ms=8, clip_on=False, zorder=4)


def telling_pixels(z: NDArray[Any]) -> dict[str, tuple[int, int]]:
    """A dark, a middling and a bright pixel, by the mean of z, among the half with the fewest invalid samples.

    Args:
        z: (y, x, channel), NaN = invalid.

    Returns:
        (y, x) by name; nothing if no sample is valid.
    """
    n_valid, total = np.zeros(z.shape[:2], np.int64), np.zeros(z.shape[:2])
    for i, row in enumerate(z):  # a scene may be large, and a copy of it too much
        valid = np.isfinite(row)
        n_valid[i] = valid.sum(axis=-1)
        total[i] = row.sum(axis=-1, where=valid, dtype=np.float64)
    seen = n_valid > 0
    if not seen.any():
        return {}
    y, x = np.nonzero(n_valid >= np.median(n_valid[seen]))
    order = np.argsort(total[y, x] / n_valid[y, x], kind="stable")
    chosen = {name: order[int(q * (len(order) - 1))] for name, q in QUANTILES.items()}
    return {name: (int(y[k]), int(x[k])) for name, k in chosen.items()}


def spectral_axis(axes: Axes, normalization: Normalization) -> NDArray[Any]:
    """Label an axis along channels; returns where they stand: wavelengths, or numbers from 0 where there are none."""
    if normalization.wavelength is not None:
        axes.set_xlabel("wavelength, nm")
        return normalization.wavelength
    axes.set_xlabel("number of the channel")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return np.arange(normalization.n_channels)


def draw_spectra(
    z_axes: Axes,
    radiance_axes: Axes,
    spectra: Iterable[tuple[NDArray[Any], NDArray[Any], Mark]],
    normalization: Normalization,
) -> None:
    """Spectra of pixels in z and in radiance: the original wide, over it the reconstruction thin.

    Args:
        z_axes, radiance_axes: where to draw.
        spectra: (channel) z of the original, NaN = invalid, and of the reconstruction, which is drawn where the
            original is valid; how to draw them.
        normalization: for wavelengths and radiance.
    """
    channels = spectral_axis(z_axes, normalization)
    spectral_axis(radiance_axes, normalization)
    for z, z_hat, mark in spectra:
        valid = np.isfinite(z)
        marker = mark.marker if valid.sum() <= FEW else None
        for axes, line, line_hat in (
            (z_axes, z, z_hat),
            (radiance_axes, normalization.denormalize(z), normalization.denormalize(z_hat)),
        ):
            shown = np.where(valid, line_hat, np.nan)
            axes.plot(channels, line, color=mark.color, lw=2.8, alpha=0.35, marker=marker, ms=8, mew=0)
            axes.plot(channels, shown, color=mark.color, lw=0.9, marker=marker, ms=3)
    is_log = normalization.transform == "log_zscore"
    z_axes.set(title="z: original (wide), reconstruction (thin)", ylabel="z")
    radiance_axes.set_title("the same as radiance" if is_log else "the same as in the file")
    radiance_axes.set_ylabel(normalization.units or "units of the file")
    if is_log:
        radiance_axes.set_yscale("log")
    for axes in (z_axes, radiance_axes):
        axes.grid(color="0.9")


def robust_limits(image: NDArray[Any]) -> tuple[float, float]:
    """A colour scale that a few outliers do not stretch."""
    valid = image[np.isfinite(image)]
    if not len(valid):
        return 0.0, 1.0
    low, high = np.quantile(valid, [0.01, 0.99])
    return float(low), float(max(high, low + 1e-6))
