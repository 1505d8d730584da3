"""Statistics per channel that can be merged, so that data may come in any pieces and order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Moments:
    """Count, mean, sum of squared deviations, minimum and maximum of the valid samples of each channel.

    Attributes:
        count: (channel) int64.
        mean, m2: (channel) float64; 0 where count is 0.
        minimum, maximum: (channel) float64; inf and -inf where count is 0.
    """

    count: NDArray[np.int64]
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]
    minimum: NDArray[np.float64]
    maximum: NDArray[np.float64]

    @classmethod
    def empty(cls, n_channels: int) -> Moments:
        """Of no samples at all."""
        zeros = np.zeros(n_channels)
        return cls(np.zeros(n_channels, np.int64), zeros, zeros, zeros + np.inf, zeros - np.inf)

    @classmethod
    def of(cls, values: NDArray[Any]) -> Moments:
        """(..., channel) values, NaN = invalid; computed in float64 by two passes."""
        values = values.reshape(-1, values.shape[-1]).astype(np.float64)
        invalid = ~np.isfinite(values)
        count = len(values) - np.count_nonzero(invalid, axis=0).astype(np.int64)
        values[invalid] = np.nan
        minimum = np.fmin.reduce(values, axis=0, initial=np.inf)
        maximum = np.fmax.reduce(values, axis=0, initial=-np.inf)
        values[invalid] = 0.0
        mean = values.sum(axis=0) / np.maximum(count, 1)
        values -= mean
        values[invalid] = 0.0
        return cls(count, mean, np.einsum("nc,nc->c", values, values), minimum, maximum)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of samples together (Chan, Golub & LeVeque 1979, eq. 2.1)."""
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * share,
            self.m2 + other.m2 + delta**2 * self.count * share,
            np.minimum(self.minimum, other.minimum),
            np.maximum(self.maximum, other.maximum),
        )

    @property
    def std(self) -> NDArray[np.float64]:
        """(channel) population standard deviation (divisor n), as mltools' statistics have it; NaN without samples."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.sqrt(self.m2 / self.count)


@dataclass(frozen=True)
class RatioHistogram:
    """How often ratios of each size occur in each channel: their medians, in bounded memory.

    Attributes:
        counts: (channel, bin) int64; bin i holds ratios of LOWEST * exp(STEP * i) to LOWEST * exp(STEP * (i + 1)),
            the first and the last bin also what lies beyond.
    """

    LOWEST: ClassVar[float] = 1e-8
    STEP: ClassVar[float] = 0.01
    BINS: ClassVar[int] = 2304  # up to 1e2

    counts: NDArray[np.int64]

    @classmethod
    def empty(cls, n_channels: int) -> RatioHistogram:
        """Of no samples at all."""
        return cls(np.zeros((n_channels, cls.BINS), np.int64))

    @classmethod
    def of(cls, ratios: NDArray[Any]) -> RatioHistogram:
        """(..., channel) ratios; what is not a positive finite number is left out."""
        ratios = ratios.reshape(-1, ratios.shape[-1])
        n_channels, width = ratios.shape[1], cls.BINS + 1  # the bin behind the last is for what is left out
        with np.errstate(invalid="ignore", divide="ignore"):
            position = np.log(ratios)
        left_out = ~np.isfinite(position)
        position -= np.log(cls.LOWEST)
        position /= cls.STEP
        np.clip(position, 0, cls.BINS - 1, out=position)
        position[left_out] = cls.BINS
        bins = position.astype(np.intp)
        bins += np.arange(0, n_channels * width, width)
        counts = np.bincount(bins.reshape(-1), minlength=n_channels * width)
        return cls(counts.reshape(n_channels, width)[:, :-1])

    def merge(self, other: RatioHistogram) -> RatioHistogram:
        """Of both sets of samples together."""
        return RatioHistogram(self.counts + other.counts)

    def median(self) -> NDArray[np.float64]:
        """(channel) medians, interpolated within a bin and so within 1 % of the true ones; NaN without samples."""
        below = np.cumsum(self.counts, axis=1)
        half = below[:, -1] / 2
        channel = np.arange(len(below))
        bin_ = np.argmax(below >= half[:, None], axis=1)
        inside = self.counts[channel, bin_]
        with np.errstate(invalid="ignore", divide="ignore"):
            share = (half - (below[channel, bin_] - inside)) / inside
        return np.asarray(self.LOWEST * np.exp(self.STEP * (bin_ + share)))
