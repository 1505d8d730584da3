"""Do scenes have the same channels?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spectralvae.errors import InputError
from spectralvae.readers.arguments import check_wavelengths
from spectralvae.weights.normalization import Float64


def channel_means(path: Path | None, wavelength: NDArray[np.float64]) -> Float64:
    """One wavelength a channel.

    Args:
        path: of the scene's file, for errors; None for a scene in memory.
        wavelength: (channel) or (x, channel), nm, NaN where unknown.

    Returns:
        (channel) nm, averaged over x where they depend on it.

    Raises:
        InputError: a channel has none.
        ConfigError: they do not increase.
    """
    wavelength = wavelength.reshape(-1, wavelength.shape[-1])
    known = np.isfinite(wavelength).any(axis=0)
    if not known.all():
        raise InputError(f"channel {int(np.argmin(known))} has no wavelength anywhere", path=path)
    means = np.asarray(np.nanmean(wavelength, axis=0), np.float64)
    return check_wavelengths("wavelength", means, len(means), path=path)


def wavelength_gap(found: Float64, expected: Float64) -> tuple[float, float]:
    """How far (channel) wavelengths lie from those expected at most, and how far they may: one channel spacing; nm."""
    limit = float(np.median(np.diff(expected))) if len(expected) > 1 else np.inf
    return float(np.abs(found - expected).max()), limit


def span(wavelength: Float64) -> str:
    """First and last, as messages name them."""
    return f"{wavelength.min():.2f}-{wavelength.max():.2f} nm"
