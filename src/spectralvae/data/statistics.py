"""Per-channel moments that can be merged, so that data may come in any pieces and order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
        valid = np.isfinite(values)
        count = valid.sum(axis=0, dtype=np.int64)
        mean = np.where(valid, values, 0.0).sum(axis=0) / np.maximum(count, 1)
        m2 = (np.where(valid, values - mean, 0.0) ** 2).sum(axis=0)
        minimum = np.where(valid, values, np.inf).min(axis=0, initial=np.inf)
        maximum = np.where(valid, values, -np.inf).max(axis=0, initial=-np.inf)
        return cls(count, mean, m2, minimum, maximum)

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
