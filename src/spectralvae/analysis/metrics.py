"""Errors of reconstructions: sums over samples, so that nothing else has to be kept, and the metrics made of them.

C channels, P pixels of one tile. Samples are float32 on any device, sums are float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Radiance:
    """How z becomes radiance: ``unit`` times gain * z + offset, or its exponential.

    The unit keeps squares of radiance, which may be 1e13, within float32.

    Attributes:
        logarithmic: whether z is that of the logarithm.
        gain, offset: (C, 1) float32.
        unit: of radiance.
    """

    logarithmic: bool
    gain: Tensor
    offset: Tensor
    unit: float

    @classmethod
    def of(cls, mean: Float64, spread: Float64, *, logarithmic: bool, device: torch.device) -> Radiance:
        """From radiance (or its logarithm) = spread * z + mean; NaN in both for channels that are never valid."""
        gain, offset, unit = np.nan_to_num(spread), np.nan_to_num(mean), 1.0
        if logarithmic:
            largest = float(np.nanmax(mean))
            offset, unit = np.nan_to_num(mean - largest), math.exp(largest)
        elif largest := float(max(np.abs(offset).max(), gain.max())):
            gain, offset, unit = gain / largest, offset / largest, largest
        gain_on_device, offset_on_device = (
            torch.from_numpy(a[:, None]).to(device, torch.float32) for a in (gain, offset)
        )
        return cls(logarithmic, gain_on_device, offset_on_device, unit)

    def __call__(self, z: Tensor) -> Tensor:
        """(C, P) -> radiance in units of ``unit``."""
        values = self.gain * z + self.offset
        return values.exp_() if self.logarithmic else values


class Observed:
    """Pixels of one tile, as they were measured.

    Args:
        z: (C, P) float32, NaN = invalid.
        radiance: how z becomes radiance.

    Attributes:
        valid: (C, P) bool.
        z: 0 where invalid.
    """

    def __init__(self, z: Tensor, radiance: Radiance) -> None:
        self.valid = ~z.isnan()
        zero = z.new_zeros(())
        self.z = torch.where(self.valid, z, zero)
        self._to_radiance = radiance
        self._radiance = torch.where(self.valid, radiance(self.z), zero)
        self._norm = _sum(self._radiance.square(), 0)
        self._zero = zero

    def sums(self) -> Tensor:
        """What `Truth.add` takes, on the device, (4 C + 3,) float64.

        By channel the number of valid samples, and sums of z, z^2 and radiance in its unit; the number of pixels that
        have a valid sample; smallest and largest valid z, inf and -inf where there is none.
        """
        rows = (self.valid, self.z, self.z.square(), self._radiance)
        infinity = self.z.new_full((), torch.inf)
        low = torch.where(self.valid, self.z, infinity).min()
        high = torch.where(self.valid, self.z, -infinity).max()
        others = torch.stack([self.valid.any(0).sum().double(), low.double(), high.double()])
        return torch.cat([*(_sum(row, 1) for row in rows), others])

    def errors(self, z_hat: Tensor) -> Tensor:
        """What `Errors.add` takes, on the device: how far a reconstruction is from this.

        The angle between spectra a and b = a + d is found from that part of d which is orthogonal to a: an arc cosine
        would lose small angles in the rounding of 1.

        Args:
            z_hat: (C, P) float32, finite.

        Returns:
            (4 C + 2,) float64: by channel the sums of squares and absolute values of errors of z, of squares of errors
            of radiance in its unit, and of squares of errors relative to radiance (0 unless z is of the logarithm); the
            sum of the angles between radiance spectra over the pixels, in degrees; the number of valid samples.
        """
        error = torch.where(self.valid, z_hat - self.z, self._zero)
        scaled = self._to_radiance.gain * error
        if self._to_radiance.logarithmic:
            relative = scaled.expm1_()
            difference = relative * self._radiance
        else:
            difference, relative = scaled, torch.zeros_like(scaled[:, :1])
        rows = (error.square(), error.abs(), difference.square(), relative.square())
        along = _sum(difference * self._radiance, 0)
        share = along / self._norm.clamp(min=torch.finfo(torch.float32).tiny)
        across = difference - share.float() * self._radiance
        sine = (self._norm * _sum(across.square(), 0)).sqrt()
        angle = torch.rad2deg(torch.atan2(sine, self._norm + along)).sum()
        others = torch.stack([angle, self.valid.sum().double()])
        return torch.cat([*(_sum(row, 1) for row in rows), others])


def _sum(values: Tensor, dim: int) -> Tensor:
    return values.sum(dim, dtype=torch.float64)


@dataclass
class Truth:
    """What was measured, summed up over tiles.

    Attributes:
        channels: (4, C): the first part of `Observed.sums`.
        scenes: (scene, 2): valid samples, pixels that have one.
        low, high: smallest and largest z.
    """

    channels: Float64
    scenes: Float64
    low: float = math.inf
    high: float = -math.inf

    @classmethod
    def empty(cls, n_channels: int, n_scenes: int) -> Truth:
        return cls(np.zeros((4, n_channels)), np.zeros((n_scenes, 2)))

    def add(self, scene: int, sums: Float64) -> None:
        """Count what `Observed.sums` gives for pixels of a scene."""
        channels, (n_pixels, low, high) = sums[:-3].reshape(4, -1), sums[-3:]
        self.channels += channels
        self.scenes[scene] += channels[0].sum(), n_pixels
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    @property
    def n_samples(self) -> int:
        """Valid ones."""
        return int(self.channels[0].sum())

    @property
    def peak(self) -> float:
        """Largest less smallest z."""
        return self.high - self.low


@dataclass
class Errors:
    """Of one way to reconstruct, summed up over tiles.

    Attributes:
        channels: (4, C): the first part of `Observed.errors`.
        scenes: (scene, 3): sums of squares and absolute values of errors of z, and of angles in degrees.
    """

    channels: Float64
    scenes: Float64 = field(repr=False)

    @classmethod
    def empty(cls, n_channels: int, n_scenes: int) -> Errors:
        return cls(np.zeros((4, n_channels)), np.zeros((n_scenes, 3)))

    def add(self, scene: int, sums: Float64) -> None:
        """Count what `Observed.errors` gives for pixels of a scene."""
        channels, angles = sums[:-2].reshape(4, -1), sums[-2]
        self.channels += channels
        self.scenes[scene] += *channels[:2].sum(axis=1), angles


def metrics_of(truth: Truth, errors: Errors, radiance: Radiance, noise: Float64 | None) -> dict[str, float]:
    """Metrics over all samples; NaN where one cannot be had.

    Args:
        truth, errors: sums over the same pixels.
        radiance: as they were summed up with.
        noise: (C) in z, NaN where unknown; None where nothing is known of it.

    Returns:
        mse and mae of z; psnr, 10 log10(peak^2 / mse) in dB; spectral_angle, in degrees, mean over the pixels that
        have a valid sample; explained_variance, 1 - sum of squared errors / sum of squared deviations of z from the
        mean of its channel; rmse_radiance; relative_rmse, under the logarithm; noise_ratio, the root of the mean
        squared error in units of the noise, over the channels whose noise is known.
    """
    n, total, squares, _ = truth.channels
    square, absolute, radiance_square, relative_square = errors.channels
    n_samples, n_pixels = n.sum(), truth.scenes[:, 1].sum()
    mse = _ratio(square.sum(), n_samples)
    deviations = squares - _divided(total**2, n, 0.0)
    return {
        "mse": mse,
        "mae": _ratio(absolute.sum(), n_samples),
        "psnr": 10.0 * math.log10(truth.peak**2 / mse) if mse > 0.0 and truth.peak > 0.0 else math.nan,
        "spectral_angle": _ratio(errors.scenes[:, 2].sum(), n_pixels),
        "explained_variance": 1.0 - _ratio(square.sum(), deviations.sum()),
        "rmse_radiance": radiance.unit * math.sqrt(_ratio(radiance_square.sum(), n_samples)),
        "relative_rmse": math.sqrt(_ratio(relative_square.sum(), n_samples)) if radiance.logarithmic else math.nan,
        "noise_ratio": _noise_ratio(n, square, noise),
    }


def _noise_ratio(n: Float64, square: Float64, noise: Float64 | None) -> float:
    if noise is None:
        return math.nan
    known = np.isfinite(noise)
    return math.sqrt(_ratio((square[known] / noise[known] ** 2).sum(), n[known].sum()))


def scene_metrics(truth: Truth, errors: Errors) -> list[dict[str, float]]:
    """mse, mae and spectral_angle of each scene."""
    n = truth.scenes[:, [0, 0, 1]]  # two are means over samples, one is over pixels
    names = ("mse", "mae", "spectral_angle")
    return [dict(zip(names, map(float, row), strict=True)) for row in _divided(errors.scenes, n, math.nan)]


def channel_errors(truth: Truth, errors: Errors, radiance: Radiance, noise: Float64 | None) -> dict[str, Any]:
    """By channel, (C) each, NaN where it cannot be had.

    Args:
        truth, errors, radiance, noise: as of `metrics_of`.

    Returns:
        rmse of z; rmse_radiance; relative; noise: rmse in units of the noise, None where nothing is known of it.
    """
    square, _, radiance_square, relative_square = (
        np.sqrt(_divided(sums, truth.channels[0], math.nan)) for sums in errors.channels
    )
    return {
        "rmse": square,
        "rmse_radiance": radiance.unit * radiance_square,
        "relative": relative_square if radiance.logarithmic else np.full_like(square, math.nan),
        "noise": None if noise is None else square / noise,
    }


def mean_radiance(truth: Truth, radiance: Radiance) -> Float64:
    """(C), NaN where no sample is valid."""
    return radiance.unit * _divided(truth.channels[3], truth.channels[0], math.nan)


def _ratio(a: float, b: float) -> float:
    return float(a / b) if b > 0.0 else math.nan


def _divided(a: Float64, b: Float64, otherwise: float) -> Float64:
    return np.asarray(np.divide(a, b, out=np.full(a.shape, otherwise), where=b > 0))


@dataclass
class Latents:
    """Of a network, summed up over cells of the latent grid.

    Attributes:
        sums: (4, E): of cells, of the posterior's mean, of its square, and of the KL term in nats.
    """

    sums: Float64

    @classmethod
    def empty(cls, embed_dim: int) -> Latents:
        return cls(np.zeros((4, embed_dim)))

    def add(self, mean: Tensor, logvar: Tensor, counts: Tensor) -> None:
        """Count cells of some tiles.

        Args:
            mean, logvar: (B, E, h, w) of the posterior.
            counts: (B, 1, h, w) bool, which cells do.
        """
        mean, logvar = mean.double(), logvar.double()
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)
        rows = [torch.where(counts, row, 0.0).sum((0, 2, 3)) for row in (torch.ones_like(mean), mean, mean**2, kl)]
        self.sums += torch.stack(rows).cpu().numpy()

    @property
    def bits(self) -> Float64:
        """(E): KL divergence of the posterior from the standard normal, mean over cells."""
        return np.asarray(self.sums[3] / self.sums[0] / math.log(2.0))

    @property
    def variance(self) -> Float64:
        """(E): of the posterior's mean over cells."""
        mean, square = self.sums[1:3] / self.sums[0]
        return np.asarray(np.maximum(square - mean**2, 0.0))
