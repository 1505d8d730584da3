"""Invalid samples of every kind, put among the good ones of a granule.

Every kind gets round(share * n) of the n samples of the granule that are valid before, no sample gets two, and each
sample is as likely as any other. All randomness is the planting's own, so that the other samples stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from spectralvae.config import PLANTED_KINDS, PlantConfig
from spectralvae.errors import ConfigError

FILL = -1e30
DEFAULT_FILL = 9.969209968386869e36  # netCDF's own for floats
REJECTING_FLAGS = np.array([1 << bit for bit in (0, 1, 2, 5)], dtype=np.uint16)  # missing, bad, error, saturated
UNPHYSICAL_NO2 = 1.5e20  # molecules/cm^2, as seen in real files
MAX_SAMPLES = 10**9  # below which numpy deals samples out exactly


def planted_counts(config: PlantConfig, n_valid: int) -> dict[str, int]:
    """How many samples of each kind a granule gets.

    Args:
        config: the shares.
        n_valid: valid samples of the granule.

    Raises:
        ConfigError: rounding asks for more samples than there are.
    """
    counts = {kind: round(getattr(config, kind) * n_valid) for kind in PLANTED_KINDS}
    if sum(counts.values()) > n_valid:
        problem = f"its shares are {sum(counts.values())} of {n_valid} valid samples"
        raise ConfigError(problem, key="plant", remedy="give smaller ones")
    return counts


def deal(
    random: np.random.Generator, counts: dict[str, int], valid: NDArray[np.bool_], channels: int
) -> Iterator[dict[str, NDArray[np.int64]]]:
    """Choose the samples of each kind, one mirror step after the other.

    Args:
        random: the stream to draw from; the caller may draw from it between two steps.
        counts: samples of each kind in the whole granule.
        valid: pixels that have valid samples, (y, x).
        channels: samples of a pixel.

    Yields:
        Of each mirror step, the samples of each kind: indices into its flattened (x, c).
    """
    left = np.array([*counts.values(), int(valid.sum()) * channels - sum(counts.values())])
    for row in valid:
        samples = np.flatnonzero(np.repeat(row, channels))
        share = random.multivariate_hypergeometric(left, samples.size)
        left -= share
        chosen = samples[random.choice(samples.size, int(share[:-1].sum()), replace=False)]
        yield dict(zip(counts, np.split(chosen, np.cumsum(share[:-2])), strict=True))


def spoil(
    random: np.random.Generator,
    chosen: dict[str, NDArray[np.int64]],
    radiance: NDArray[np.float32],
    flag: NDArray[np.uint16],
) -> None:
    """Overwrite the chosen samples of one mirror step, in place.

    Args:
        random: the stream to draw from.
        chosen: what `deal` gave for this step.
        radiance: (x, c), contiguous.
        flag: (x, c), contiguous.
    """
    values, flags = radiance.reshape(-1), flag.reshape(-1)
    values[chosen["fill"]] = FILL
    values[chosen["nan"]] = np.nan
    values[chosen["infinite"]] = random.choice([np.inf, -np.inf], chosen["infinite"].size)
    values[chosen["default_fill"]] = DEFAULT_FILL
    flags[chosen["flagged"]] = random.choice(REJECTING_FLAGS, chosen["flagged"].size)
    # In equal parts 0, values between 0 and 1, and negative ones as large as what noise leaves of a dark signal
    low = 1.0 - random.random(chosen["below_min_radiance"].size)
    values[chosen["below_min_radiance"]] = random.choice([0.0, 0.999, -1e9], low.size) * low


def plant_unphysical(
    random: np.random.Generator, column: NDArray[np.float64], missing: NDArray[np.bool_], share: float
) -> tuple[NDArray[np.float64], int]:
    """Put an impossible NO2 column into round(share * n) of the n valid pixels of a level-2 field.

    Args:
        random: the stream to draw from.
        column: molecules/cm^2, (y, x).
        missing: pixels that are not valid, (y, x).
        share: 0 <= share < 1.

    Returns:
        The field, and how many pixels it was.
    """
    valid = np.flatnonzero(~missing)
    chosen = random.choice(valid, round(share * valid.size), replace=False)
    planted = column.copy()
    planted.reshape(-1)[chosen] = UNPHYSICAL_NO2
    return planted, chosen.size
