"""By what a store is normalised: statistics of its own training scenes, or those of another training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from spectralvae.config import NormalizationConfig, PrepareConfig
from spectralvae.data.splits import PlannedScene
from spectralvae.data.store import Store
from spectralvae.data.tasks import BELOW_MINIMUM
from spectralvae.data.validity import Validity
from spectralvae.data.wavelengths import wavelength_gap
from spectralvae.errors import ConfigError
from spectralvae.readers import Scene
from spectralvae.weights.normalization import Float64


@dataclass(frozen=True)
class Statistics:
    """By what a store is normalised.

    Attributes:
        mean, std: (channel); NaN for a channel without a valid training sample.
        more: other root arrays, (channel) each.
        source: whose they are; None for the store's own.
    """

    mean: Float64
    std: Float64
    more: dict[str, Any]
    source: str | None = None


def check_transform(scene: Scene, validity: Validity, normalization: NormalizationConfig) -> None:
    """Look at the middle of a scene before anything is written.

    Raises:
        ConfigError: log_zscore was asked for values most of which lie below min_radiance.
    """
    middle = scene.shape[0] // 2
    with scene:
        values, _ = scene.read(slice(middle, middle + 1))
    n_small = replace(validity, max_solar_zenith=None).reject(values, None)[BELOW_MINIMUM]
    check_share(n_small, int(np.count_nonzero(np.isfinite(values))) + n_small, normalization)


def check_share(n_small: int, n_valid: int, normalization: NormalizationConfig) -> None:
    """Refuse log_zscore where most samples lie below min_radiance.

    Raises:
        ConfigError: they do.
    """
    if 2 * n_small > n_valid:
        raise ConfigError(
            f"{n_small} of {n_valid} valid samples lie below min_radiance = {normalization.min_radiance:g}",
            key="normalization.transform",
            value=normalization.transform,
            remedy="use `transform: zscore` (reflectance) or a smaller min_radiance",
        )


def given_statistics(config: PrepareConfig, planned: Sequence[PlannedScene], wavelength: Float64) -> Statistics | None:
    """The statistics that `normalization.statistics` names.

    Raises:
        ConfigError, InputError: there are none, or they do not belong to such scenes.
    """
    path = config.normalization.statistics
    if path is None:
        return None
    n_channels = planned[0].scene.shape[2]
    if (path / "mean_spectrum.pt").exists():
        return _spectra(path, n_channels)
    theirs = Store(path)
    for what, ours, other in (
        ("transform", config.normalization.transform, theirs.normalization.transform),
        ("min_radiance", config.normalization.min_radiance, theirs.normalization.min_radiance),
        ("band", planned[0].scene.band, theirs.normalization.band),
        ("units", planned[0].scene.units, theirs.normalization.units),
        ("number of channels", n_channels, theirs.normalization.n_channels),
    ):
        if ours != other:
            problem = f"its {what} is {other}, but here it is {ours}"
            raise ConfigError(problem, key="normalization.statistics", path=path)
    assert theirs.normalization.wavelength is not None
    worst, limit = wavelength_gap(theirs.normalization.wavelength, wavelength)
    if worst > limit:
        raise ConfigError(
            f"its wavelengths differ by up to {worst:.3f} nm from those of the inputs",
            key="normalization.statistics",
            path=path,
            limit=f"within one channel ({limit:.3f} nm)",
        )
    more = {name: theirs.arrays[name] for name in ("minimum", "maximum", "noise") if name in theirs.arrays}
    return Statistics(theirs.normalization.mean, theirs.normalization.std, more, f"store {theirs.hash}")


def _spectra(folder: Path, n_channels: int) -> Statistics:
    """mltools' statistics."""
    from spectralvae.weights.mltools import read_spectrum  # torch takes seconds to import

    mean, std = (read_spectrum(folder / f"{name}_spectrum.pt") for name in ("mean", "std"))
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != n_channels:
            problem = f"has {len(values)} channels, but the inputs have {n_channels}"
            raise ConfigError(problem, key="normalization.statistics", path=folder / f"{name}_spectrum.pt")
    if not (std > 0).all():
        problem = f"is not above 0 in channel {int(np.argmin(std))}"
        raise ConfigError(problem, key="normalization.statistics", path=folder / "std_spectrum.pt")
    digest = hashlib.sha256(mean.tobytes() + std.tobytes()).hexdigest()
    return Statistics(mean, std, {}, f"mean_spectrum.pt and std_spectrum.pt, {digest}")
