"""Simulate TEMPO level-1 granules of one place, and level-2 products that hold the truth behind them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spectralvae.config import PlantConfig
from spectralvae.errors import ConfigError
from spectralvae.runtime.console import new_progress
from spectralvae.simulate import fields, files, physics, plant

PRODUCTS = tuple(files.TITLES)
VERSIONS = ("V03", "V04")
MIN_CHANNELS = 16
MAX_GRANULES = 10_000

_SAMPLES_PER_SECOND = 2e6  # a modest core; decides only whether a progress bar is worth showing


def simulate_granules(
    output_dir: Path,
    *,
    seed: int,
    n_granules: int,
    shape: tuple[int, int],
    n_channels: int,
    products: Sequence[str],
    invalid_fraction: float,
    scans_per_day: int = 1,
    noise: bool = True,
    version: str = "V03",
    planted: PlantConfig | None = None,
) -> list[Path]:
    """Simulate granules of one place on consecutive days.

    The same arguments give the same arrays. The truth of granule i depends on ``seed``, ``shape``, ``scans_per_day``
    and i, and on nothing else; its radiance, where it is valid, also on ``n_channels`` and ``noise``. Memory holds the
    maps of one granule and the spectra of a few mirror steps.

    Args:
        output_dir: made if need be; files of the same names are replaced.
        seed: of everything random, not negative.
        n_granules: how many level-1 files, at most 10,000.
        shape: (mirror_step, xtrack).
        n_channels: spectral channels over 290-490 nm, at least 16.
        products: which level-2 products to write beside each granule, among NO2, HCHO, O3TOT, CLDO4.
        invalid_fraction: share of the pixels that are fill, at both ends of the slit; 0 <= f < 1.
        scans_per_day: granule i is scan i % scans_per_day of day i // scans_per_day; 1 to 12.
        noise: whether the radiance has photon noise; radiance_error tells its size either way.
        version: V03 or V04, in names and attributes.
        planted: invalid samples to plant; None for none.

    Returns:
        The files written: each level-1 granule, followed by its products.

    Raises:
        ConfigError: an argument is outside its limits.
    """
    planted = planted or PlantConfig()
    _check_counts(seed, n_granules, scans_per_day, shape, n_channels)
    _check_choices(products, version, invalid_fraction)
    _check_planted(planted, n_granules, shape, n_channels, invalid_fraction)
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    optics = physics.make_optics(physics.wavelength_grid(shape[1], n_channels))
    world = files.World(seed, fields.make_place(seed, shape), optics, noise, version, planted)

    written: list[Path] = []
    progress = new_progress("steps")
    progress.disable |= n_granules * shape[0] * shape[1] * n_channels / _SAMPLES_PER_SECOND < 2.0
    with progress:
        task = progress.add_task("simulating", total=n_granules * shape[0])
        for index in range(n_granules):
            granule = fields.make_granule(world.place, seed, index, scans_per_day)
            missing = fields.missing_pixels(seed, index, shape, invalid_fraction)
            if index in planted.night:
                missing = np.ones_like(missing)
            path = output_dir / files.granule_name("RAD_L1", granule.start, version)
            for rows in files.write_level1(path, world, granule, missing):
                progress.advance(task, rows)
            written.append(path)
            for product in products:
                path = output_dir / files.granule_name(f"{product}_L2", granule.start, version)
                files.write_level2(path, product, world, granule, missing)
                written.append(path)
    return written


def _check_counts(seed: int, n_granules: int, scans_per_day: int, shape: tuple[int, int], n_channels: int) -> None:
    """Refuse numbers that cannot be simulated, before anything is written."""
    if seed < 0:
        raise ConfigError(key="seed", value=seed, limit="0 or more")
    if not 1 <= n_granules <= MAX_GRANULES:
        raise ConfigError(key="n_granules", value=n_granules, limit=f"from 1 to {MAX_GRANULES}")
    if not 1 <= scans_per_day <= fields.MAX_SCANS_PER_DAY:
        raise ConfigError(key="scans_per_day", value=scans_per_day, limit=f"from 1 to {fields.MAX_SCANS_PER_DAY}")
    if len(shape) != 2 or min(shape) < 1:
        raise ConfigError(key="shape", value=list(shape), limit="[mirror_step, xtrack] with both 1 or more")
    if n_channels < MIN_CHANNELS:
        raise ConfigError(key="n_channels", value=n_channels, limit=f"{MIN_CHANNELS} or more")


def _check_choices(products: Sequence[str], version: str, invalid_fraction: float) -> None:
    """Refuse products, versions and shares that do not exist."""
    for product in products:
        if product not in PRODUCTS:
            raise ConfigError(key="products", value=product, limit=f"one of {', '.join(PRODUCTS)}")
    if len(set(products)) < len(products):
        raise ConfigError("names a product twice", key="products", value=list(products), remedy="name each once")
    if version not in VERSIONS:
        raise ConfigError(key="version", value=version, limit=f"one of {', '.join(VERSIONS)}")
    if not 0.0 <= invalid_fraction < 1.0:
        raise ConfigError(key="invalid_fraction", value=invalid_fraction, limit="from 0 to below 1")


def _check_planted(
    planted: PlantConfig, n_granules: int, shape: tuple[int, int], n_channels: int, invalid_fraction: float
) -> None:
    """Refuse what cannot be planted in these granules."""
    for night in planted.night:
        if night >= n_granules:
            raise ConfigError(key="plant.night", value=night, limit=f"from 0 to n_granules - 1 ({n_granules - 1})")
    pixels = shape[0] * shape[1]
    n_valid = (pixels - round(invalid_fraction * pixels)) * n_channels
    if any(plant.planted_counts(planted, n_valid).values()) and n_valid >= plant.MAX_SAMPLES:
        problem = f"a granule has {n_valid} samples to plant in; the limit is {plant.MAX_SAMPLES - 1}"
        raise ConfigError(problem, key="plant", remedy="lower shape or n_channels")
