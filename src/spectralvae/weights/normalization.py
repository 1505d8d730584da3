"""Radiance to z and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

EPSILON = 1e-8  # mltools' guard against a channel without spread; kept, so that its statistics mean the same

Float64 = NDArray[np.float64]


def reject_small(radiance: NDArray[Any], transform: str, min_radiance: float | None) -> int:
    """Make what the transform cannot take NaN, in place.

    Under log_zscore a sample below ``min_radiance`` is invalid, never clamped: a fill value turned into
    log(min) would look like data. Under zscore every finite value is valid.

    Returns:
        How many samples were rejected.
    """
    if transform == "zscore":
        return 0
    with np.errstate(invalid="ignore"):
        small = radiance < min_radiance
    radiance[small] = np.nan
    return int(np.count_nonzero(small))


def transform_values(radiance: NDArray[Any], transform: str, out: Float64 | None = None) -> Float64:
    """log(radiance) under log_zscore, radiance itself under zscore; float64, NaN stays NaN; into ``out`` if given."""
    values = np.empty(radiance.shape) if out is None else out
    if transform == "log_zscore":
        np.log(radiance, out=values, dtype=np.float64)
    else:
        np.copyto(values, radiance)
    return values


@dataclass(frozen=True)
class Normalization:
    """z = (f(radiance) - mean_c) / (std_c + 1e-8), clipped; f is log (log_zscore) or nothing (zscore).

    Attributes:
        transform: log_zscore or zscore.
        mean, std: (channel) float64, of f(radiance) over the valid samples of the training scenes;
            NaN for a channel that had none: its z is NaN everywhere, and so always masked.
        clip: z is clipped to [-clip, clip].
        min_radiance: log_zscore only: smaller radiance is invalid.
        band: the TEMPO band, where there is one.
        wavelength: (channel) float64, nm; None for foreign statistics that came without.
        units: of radiance, as the source files have it.
        valid_range, flag_bits, max_solar_zenith: which other samples are invalid; as in the config of `prepare`.
    """

    transform: str
    mean: Float64
    std: Float64
    clip: float
    min_radiance: float | None
    band: str | None
    wavelength: Float64 | None
    units: str | None = None
    valid_range: tuple[float, float] | None = None
    flag_bits: tuple[int, ...] | None = None
    max_solar_zenith: float | None = None

    def __post_init__(self) -> None:
        assert self.transform in ("log_zscore", "zscore")
        assert self.mean.shape == self.std.shape and self.mean.ndim == 1

    @property
    def n_channels(self) -> int:
        """How many channels the scenes have."""
        return len(self.mean)

    def normalize(self, radiance: NDArray[Any]) -> Float64:
        """(..., channel) radiance, NaN = invalid -> z, float64, NaN = invalid or below min_radiance."""
        z = self.standardize(radiance)
        return np.clip(z, -self.clip, self.clip, out=z)

    def standardize(self, radiance: NDArray[Any]) -> Float64:
        """As `normalize`, not clipped."""
        radiance = radiance.copy()
        reject_small(radiance, self.transform, self.min_radiance)
        z = transform_values(radiance, self.transform)
        z -= self.mean
        z /= self.std + EPSILON
        return z

    def denormalize(self, z: NDArray[Any]) -> Float64:
        """(..., channel) z -> radiance, float64: the inverse of ``normalize`` within the clip."""
        values: Float64 = z.astype(np.float64) * (self.std + EPSILON) + self.mean
        return np.exp(values, out=values) if self.transform == "log_zscore" else values

    def settings(self) -> dict[str, Any]:
        """All but the arrays, as JSON values."""
        return {
            "transform": self.transform,
            "clip": self.clip,
            "min_radiance": self.min_radiance,
            "band": self.band,
            "units": self.units,
            "valid_range": self.valid_range,
            "flag_bits": self.flag_bits,
            "max_solar_zenith": self.max_solar_zenith,
        }

    def arrays(self) -> dict[str, Float64]:
        """mean, std and, where known, wavelength."""
        arrays = {"mean": self.mean, "std": self.std}
        return arrays if self.wavelength is None else {**arrays, "wavelength": self.wavelength}

    def sha256(self) -> str:
        """Identifies settings and statistics, hexadecimal."""
        digest = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode())
        for name, values in sorted(self.arrays().items()):
            digest.update(name.encode() + np.ascontiguousarray(values, np.float64).tobytes())
        return digest.hexdigest()

    @classmethod
    def from_parts(cls, settings: Mapping[str, Any], arrays: Mapping[str, Float64]) -> Normalization:
        """The inverse of ``settings`` and ``arrays``."""
        lists = {key: tuple(value) for key, value in settings.items() if isinstance(value, list)}  # JSON has no tuples
        wavelength = arrays.get("wavelength")
        return cls(**{**settings, **lists}, mean=arrays["mean"], std=arrays["std"], wavelength=wavelength)
