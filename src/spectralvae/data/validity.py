"""Which samples that a reader found valid may not be used all the same: the rules that a config sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectralvae.config import PrepareConfig
from spectralvae.data.statistics import PIECE_SAMPLES
from spectralvae.weights.normalization import Normalization, reject_small

# In this order, after the reader's own rules: a sample is counted under the first rule that rejects it.
CONFIGURED_RULES = ("solar_zenith", "out_of_range", "below_min_radiance")


@dataclass(frozen=True)
class Validity:
    """The rules of a store.

    Attributes:
        transform: log_zscore or zscore.
        min_radiance: log_zscore only: smaller radiance is invalid.
        valid_range: (low, high) of valid radiance, both included; None for any.
        max_solar_zenith: degrees; pixels beyond it, or without a known angle, are invalid. None for any.
    """

    transform: str
    min_radiance: float | None
    valid_range: tuple[float, float] | None
    max_solar_zenith: float | None

    @classmethod
    def of(cls, config: PrepareConfig) -> Validity:
        """As a config asks for them."""
        low_high = config.validity.valid_range
        return cls(
            config.normalization.transform,
            config.normalization.min_radiance,
            (low_high[0], low_high[1]) if low_high else None,
            config.validity.max_solar_zenith,
        )

    @classmethod
    def of_model(cls, normalization: Normalization) -> Validity:
        """As they were in the training of a model; the reader knows about the quality flag."""
        n = normalization
        return cls(n.transform, n.min_radiance, n.valid_range, n.max_solar_zenith)

    def reject(self, radiance: NDArray[np.float32], solar_zenith: NDArray[Any] | None) -> dict[str, int]:
        """Make invalid samples NaN, in place.

        Args:
            radiance: (rows, columns, channel), NaN = invalid.
            solar_zenith: (rows, columns) degrees; needed only where there is a limit.

        Returns:
            How many samples each of `CONFIGURED_RULES` rejected.
        """
        counts = dict.fromkeys(CONFIGURED_RULES, 0)
        dark = None
        if self.max_solar_zenith is not None:
            assert solar_zenith is not None
            dark = ~(solar_zenith <= self.max_solar_zenith).reshape(-1, 1)
        n_channels = radiance.shape[-1]
        samples = radiance.reshape(-1, n_channels)
        assert samples.base is not None, "a view: what is changed there must change in radiance"
        height = max(1, PIECE_SAMPLES // n_channels)
        for i in range(0, len(samples), height):
            piece = samples[i : i + height]
            if dark is not None:
                counts["solar_zenith"] += _reject(piece, np.isfinite(piece) & dark[i : i + height])
            if self.valid_range is not None:
                low, high = self.valid_range
                counts["out_of_range"] += _reject(piece, (piece < low) | (piece > high))
            counts["below_min_radiance"] += reject_small(piece, self.transform, self.min_radiance)
        return counts


def _reject(values: NDArray[np.float32], invalid: NDArray[np.bool_]) -> int:
    """Make some values NaN, in place; returns how many."""
    n = int(np.count_nonzero(invalid))
    if n:
        values[invalid] = np.nan
    return n
