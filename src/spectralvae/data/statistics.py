"""Statistics per channel that can be merged, so that data may come in any pieces and order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from spectralvae.weights.normalization import transform_values

PIECE_SAMPLES = 2**16  # worked on at a time: half a megabyte of float64, which stays in the processor's cache
_LIMITS = ("minimum", "maximum")


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
    def of(cls, values: NDArray[Any], transform: str = "zscore") -> Moments:
        """The moments of some samples, by two passes in float64.

        Each pass transforms a piece of the samples that fits into the processor's cache, and adds it up row by row.

        Args:
            values: (..., channel) radiance or z; what is not finite is invalid.
            transform: log_zscore takes the logarithm first.
        """
        n_channels = values.shape[-1]
        values = values.reshape(-1, n_channels)
        # a single column, as of level-2 products, is one piece: numpy adds it up in another order than rows
        height = max(1, len(values) if n_channels == 1 else min(255, PIECE_SAMPLES // n_channels))
        pieces = [values[i : i + height] for i in range(0, len(values), height)]
        invalid = [~np.isfinite(piece) for piece in pieces]
        empty = cls.empty(n_channels)
        count, total, m2, minimum, maximum = (getattr(empty, name).copy() for name in ("count", "mean", "m2", *_LIMITS))
        rows = np.empty((height + 1, n_channels))  # the first one holds the sum over the pieces before
        with np.errstate(invalid="ignore", divide="ignore"):
            for piece, missing in zip(pieces, invalid, strict=True):
                x = transform_values(piece, transform, out=rows[1 : len(piece) + 1])
                count += len(piece) - np.add.reduce(missing, axis=0, dtype=np.uint8 if height < 256 else np.int64)
                np.copyto(x, np.nan, where=missing)
                np.fmin(minimum, np.fmin.reduce(x, axis=0), out=minimum)
                np.fmax(maximum, np.fmax.reduce(x, axis=0), out=maximum)
                np.copyto(x, 0.0, where=missing)
                if n_channels == 1:
                    total = x.sum(axis=0)
                    continue
                rows[0] = total
                total = np.add.reduce(rows[: len(piece) + 1], axis=0)
            mean = total / np.maximum(count, 1)
            for piece, missing in zip(pieces, invalid, strict=True):
                x = transform_values(piece, transform, out=rows[1 : len(piece) + 1])
                x -= mean
                np.copyto(x, 0.0, where=missing)
                if n_channels == 1:
                    m2 = np.einsum("nc,nc->c", x, x)
                    continue
                np.square(x, out=x)
                rows[0] = m2
                m2 = np.add.reduce(rows[: len(piece) + 1], axis=0)
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
    def of(cls, numerators: NDArray[Any], denominators: NDArray[Any]) -> RatioHistogram:
        """Of (..., channel) numerators over denominators; what is not a positive finite number is left out."""
        n_channels, width = numerators.shape[-1], cls.BINS + 1  # the bin behind the last is for what is left out
        numerators, denominators = (values.reshape(-1, n_channels) for values in (numerators, denominators))
        bins = np.empty(numerators.shape, np.intp)
        lowest, first = np.log(cls.LOWEST), np.arange(0, n_channels * width, width)
        height = max(1, PIECE_SAMPLES // n_channels)
        with np.errstate(all="ignore"):
            for i in range(0, len(bins), height):
                position = numerators[i : i + height] / denominators[i : i + height]
                np.log(position, out=position)
                left_out = ~np.isfinite(position)
                position -= lowest
                position /= cls.STEP
                np.clip(position, 0, cls.BINS - 1, out=position)
                np.copyto(position, cls.BINS, where=left_out)
                np.add(position.astype(np.intp), first, out=bins[i : i + height])
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
