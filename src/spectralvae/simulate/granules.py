"""Write simulated TEMPO level-1 granules, and level-2 products that hold the truth behind them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import h5netcdf
import numpy as np
from numpy.typing import NDArray

from spectralvae import __version__
from spectralvae.console import new_progress
from spectralvae.errors import ConfigError
from spectralvae.simulate import fields, physics

FILL = -1e30
EPOCH = datetime(1980, 1, 6, tzinfo=UTC)
FIRST_DAY = datetime(2024, 6, 1, tzinfo=UTC)
HOURS = (15, 18, 21)  # UTC; the first scan of a day starts at 10
TITLES = {"NO2": "nitrogen dioxide", "HCHO": "formaldehyde", "O3TOT": "total ozone", "CLDO4": "cloud"}
PRODUCTS = tuple(TITLES)
MIN_CHANNELS = 16

_BLOCK_SAMPLES = 300_000  # spectra of about this many samples are in memory at a time, and at least one mirror step
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
) -> list[Path]:
    """Simulate granules of one place on consecutive days.

    The same arguments give the same arrays. Granule i does not depend on ``n_granules``, ``products`` or, where it is
    valid, ``invalid_fraction``. Memory holds the maps of one granule and the spectra of a few mirror steps.

    Args:
        output_dir: made if need be; files of the same names are replaced.
        seed: of everything random, not negative.
        n_granules: how many level-1 files.
        shape: (mirror_step, xtrack).
        n_channels: spectral channels over 290-490 nm, at least 16.
        products: which level-2 products to write beside each granule, among NO2, HCHO, O3TOT, CLDO4.
        invalid_fraction: share of the pixels that are fill, at both ends of the slit; 0 <= f < 1.

    Returns:
        The files written: each level-1 granule, followed by its products.

    Raises:
        ConfigError: an argument is outside its limits.
    """
    _check(seed, n_granules, shape, n_channels, products, invalid_fraction)
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    optics = physics.make_optics(physics.wavelength_grid(shape[1], n_channels))
    place = fields.make_place(seed, shape)

    expected_seconds = n_granules * shape[0] * shape[1] * n_channels / _SAMPLES_PER_SECOND
    written: list[Path] = []
    progress = new_progress("steps")
    progress.disable = expected_seconds < 2.0
    with progress:
        task = progress.add_task("simulating", total=n_granules * shape[0])
        for index in range(n_granules):
            start = FIRST_DAY + timedelta(days=index, hours=HOURS[index % len(HOURS)])
            granule = fields.make_granule(place, seed, index, start)
            missing = fields.missing_pixels(seed, index, shape, invalid_fraction)
            name = granule_name("RAD_L1", start)
            with _new_file(output_dir / name) as file:
                _describe(file, granule, seed, f"Simulated TEMPO level 1 radiance, {name}")
                for rows in _write_level1(file, optics, place, granule, seed, missing):
                    progress.advance(task, rows)
            written.append(output_dir / name)
            for product in products:
                path = output_dir / granule_name(f"{product}_L2", start)
                with _new_file(path) as file:
                    _describe(file, granule, seed, f"Simulated TEMPO level 2 {TITLES[product]} product")
                    file.attrs.update(product_type=product, input_files=name)
                    _write_level2(file, product, place, granule, missing)
                written.append(path)
    return written


def granule_name(kind: str, start: datetime) -> str:
    """File name as the archive has it; the scan of the day counts hourly from 10 UTC."""
    return f"TEMPO_{kind}_V03_{start:%Y%m%dT%H%M%SZ}_S{start.hour - 9:03d}G01.nc"


def _check(
    seed: int,
    n_granules: int,
    shape: tuple[int, int],
    n_channels: int,
    products: Sequence[str],
    invalid_fraction: float,
) -> None:
    """Refuse what cannot be simulated, before anything is written."""
    if seed < 0:
        raise ConfigError(f"seed: {seed} is negative; give 0 or more")
    if n_granules < 1:
        raise ConfigError(f"n_granules: {n_granules} is too small; give 1 or more")
    if len(shape) != 2 or min(shape) < 1:
        raise ConfigError(f"shape: {list(shape)} is not [mirror_step, xtrack] with both 1 or more")
    if n_channels < MIN_CHANNELS:
        raise ConfigError(f"n_channels: {n_channels} is too small; give {MIN_CHANNELS} or more")
    for product in products:
        if product not in PRODUCTS:
            raise ConfigError(f"products: {product!r} is unknown; choose among {', '.join(PRODUCTS)}")
    if len(set(products)) < len(products):
        raise ConfigError(f"products: {', '.join(products)} names one twice; give each once")
    if not 0.0 <= invalid_fraction < 1.0:
        raise ConfigError(f"invalid_fraction: {invalid_fraction} is outside 0 <= f < 1")


@contextmanager
def _new_file(path: Path) -> Iterator[h5netcdf.File]:
    """Open a netCDF-4 file that appears under its name only when it is complete and on disk."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with h5netcdf.File(temporary, "w") as file:
            yield file
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _describe(file: h5netcdf.File, granule: fields.Granule, seed: int, title: str) -> None:
    """Root dimensions and attributes that both levels share."""
    steps, xtrack = granule.pixels.ozone.shape
    file.dimensions = {"mirror_step": steps, "xtrack": xtrack}
    start, end = (granule.start + timedelta(seconds=float(s)) for s in (0.0, granule.time[-1]))
    file.attrs.update(
        Conventions="CF-1.6",
        title=title,
        source=f"SIMULATED by spectralvae {__version__}, seed {seed}, granule {granule.index}: not a measurement. "
        "Cross sections and solar lines are stylised.",
        simulated=np.int32(1),
        simulation_seed=np.int64(seed),
        scan_num=np.int32(granule.start.hour - 9),
        granule_num=np.int32(1),
        time_reference=f"{EPOCH:%Y-%m-%dT%H:%M:%SZ}",
        time_coverage_start=f"{start:%Y-%m-%dT%H:%M:%SZ}",
        time_coverage_end=f"{end:%Y-%m-%dT%H:%M:%SZ}",
    )
    for name, long_name in (("mirror_step", "scan mirror position index"), ("xtrack", "pixel index along slit")):
        count = file.dimensions[name].size
        _put(file, name, (name,), np.arange(count, dtype=np.int32), long_name=long_name)


def _put(group: Any, name: str, dims: tuple[str, ...], data: NDArray[Any], **attributes: Any) -> None:
    """Write a whole variable; floats declare the fill value, and whatever has more than one dimension is deflated."""
    layout: dict[str, Any] = {"compression": "gzip", "compression_opts": 4, "shuffle": True} if len(dims) > 1 else {}
    fill = FILL if data.dtype.kind == "f" else None
    group.create_variable(name, dims, data=data, fillvalue=fill, **layout).attrs.update(attributes)


def _put_geolocation(group: Any, place: fields.Place, granule: fields.Granule) -> None:
    """Coordinates and angles; they stay valid where the radiance is missing."""
    pixels = granule.pixels
    for name, data, long_name, units in (
        ("latitude", place.latitude, "pixel center latitude", "degrees_north"),
        ("longitude", place.longitude, "pixel center longitude", "degrees_east"),
        ("solar_zenith_angle", pixels.solar_zenith, "solar zenith angle at pixel center", "degrees"),
        ("viewing_zenith_angle", pixels.viewing_zenith, "viewing zenith angle at pixel center", "degrees"),
        ("relative_azimuth_angle", pixels.relative_azimuth, "azimuth between sun and satellite", "degrees"),
    ):
        _put(group, name, ("mirror_step", "xtrack"), data.astype(np.float32), long_name=long_name, units=units)


def _put_time(group: Any, granule: fields.Granule) -> None:
    seconds = (granule.start - EPOCH).total_seconds() + granule.time
    units = f"seconds since {EPOCH:%Y-%m-%dT%H:%M:%SZ}"
    _put(group, "time", ("mirror_step",), seconds, long_name="radiance exposure start time", units=units)


def _write_level1(
    file: h5netcdf.File,
    optics: physics.Optics,
    place: fields.Place,
    granule: fields.Granule,
    seed: int,
    missing: NDArray[np.bool_],
) -> Iterator[int]:
    """Write the granule a few mirror steps at a time; yields how many were written."""
    steps, xtrack = missing.shape
    channels = optics.wavelength.shape[1]
    _put_time(file, granule)
    exposure = np.full(steps, 0.9 * fields.SECONDS_PER_STEP, dtype=np.float32)
    _put(file, "exposure_time", ("mirror_step",), exposure, long_name="exposure time", units="s")
    distance = np.array(granule.earth_sun_distance, dtype=np.float32)
    _put(file, "earth_sun_distance", (), distance, long_name="distance between earth and sun", units="AU")

    band = file.create_group("band_290_490_nm")
    band.dimensions = {"spectral_channel": channels}
    _put(band, "nominal_wavelength", ("xtrack", "spectral_channel"), optics.wavelength.astype(np.float32),
         long_name="nominal wavelength", units="nm")  # fmt: skip
    _put_geolocation(band, place, granule)
    radiance, error, flag = _create_spectra(band, (steps, xtrack, channels))

    random = fields.random_stream(seed, fields.Purpose.NOISE, granule.index)
    block = max(1, _BLOCK_SAMPLES // (xtrack * channels))
    for first in range(0, steps, block):
        rows = slice(first, min(first + block, steps))
        signal = clean_radiance(optics, place, granule, rows)
        sigma = physics.noise_sigma(signal)
        signal += sigma * random.standard_normal(signal.shape, dtype=np.float32)
        for variable, values in ((radiance, signal), (error, sigma)):
            values[missing[rows]] = FILL
            variable[rows] = values.astype(np.float32)
        flag[rows] = np.broadcast_to(missing[rows, :, None], signal.shape).astype(np.uint16)
        yield rows.stop - rows.start


def _create_spectra(band: Any, shape: tuple[int, int, int]) -> list[Any]:
    """Create the three large variables, one mirror step a chunk so that rows can be streamed."""
    dims = ("mirror_step", "xtrack", "spectral_channel")
    # Deflate finds little in noise: a higher level costs time and saves nothing
    layout: dict[str, Any] = {"chunks": (1, min(shape[1], 512), shape[2]), "compression": "gzip",
                              "compression_opts": 1, "shuffle": True}  # fmt: skip
    variables = []
    for name, long_name in (("radiance", "spectral radiance"), ("radiance_error", "spectral radiance uncertainty")):
        variable = band.create_variable(name, dims, np.float32, fillvalue=FILL, **layout)
        variable.attrs.update(long_name=long_name, units="photons/s/cm^2/nm/sr")
        variables.append(variable)
    flag = band.create_variable("pixel_quality_flag", dims, np.uint16, **layout)
    flag.attrs.update(
        long_name="pixel quality flag",
        flag_masks=np.array([1 << bit for bit in range(7)], dtype=np.uint16),
        flag_meanings="missing bad_pixel processing_error transient rts saturated noise_underflow",
    )
    return [*variables, flag]


def clean_radiance(optics: physics.Optics, place: fields.Place, granule: fields.Granule, rows: slice) -> physics.Array:
    """Noise-free radiance of some mirror steps: (y, x, c) in photons/s/cm^2/nm/sr."""
    pixels = physics.Pixels(**{name: values[rows] for name, values in vars(granule.pixels).items()})
    surface = fields.surface_reflectance(place.surface[:, rows], optics.wavelength)
    return physics.radiance(optics, pixels, surface, granule.earth_sun_distance)


def _write_level2(
    file: h5netcdf.File, product: str, place: fields.Place, granule: fields.Granule, missing: NDArray[np.bool_]
) -> None:
    """Write the truth of one product, fill where the level-1 pixel is fill."""
    dims = ("mirror_step", "xtrack")
    geolocation = file.create_group("geolocation")
    _put_time(geolocation, granule)
    _put_geolocation(geolocation, place, granule)

    target = file.create_group("product")
    for name, values, units in _truth(product, granule.pixels):
        _put(target, name, dims, np.where(missing, values.dtype.type(FILL), values), units=units)
    hidden = granule.pixels.cloud_fraction > fields.HIDING_CLOUD
    if product in ("NO2", "HCHO"):
        quality = np.where(missing, 2, np.where(hidden, 1, 0)).astype(np.int16)
        why = f"suspicious: cloud fraction above {fields.HIDING_CLOUD}, which hides most of the column"
        _put(target, "main_data_quality_flag", dims, quality, flag_values=np.arange(3, dtype=np.int16),
             flag_meanings="normal suspicious bad", comment=why)  # fmt: skip
    else:
        name = "quality_flag" if product == "O3TOT" else "processing_quality_flag"
        bit = np.array([1], dtype=np.uint16)
        _put(target, name, dims, missing.astype(np.uint16), flag_masks=bit, flag_meanings="missing")

    if product != "CLDO4":
        cloud = np.where(missing, FILL, granule.pixels.cloud_fraction).astype(np.float32)
        _put(file.create_group("support_data"), "eff_cloud_fraction", dims, cloud, units="1")
    statistics = file.create_group("qa_statistics")
    for name, count in (("num_pixels", missing.size), ("num_pixels_missing", int(missing.sum()))):
        _put(statistics, name, (), np.array(count, dtype=np.int32))


def _truth(product: str, pixels: physics.Pixels) -> list[tuple[str, NDArray[Any], str]]:
    """Name, values (y, x) and units of a product's fields."""
    if product == "NO2":
        return [
            ("vertical_column_troposphere", pixels.no2_troposphere, "molecules/cm^2"),
            ("vertical_column_stratosphere", pixels.no2_stratosphere, "molecules/cm^2"),
        ]
    if product == "HCHO":
        return [("vertical_column", pixels.hcho, "molecules/cm^2")]
    if product == "O3TOT":
        return [("column_amount_o3", (pixels.ozone / physics.DOBSON_UNIT).astype(np.float32), "DU")]
    return [("cloud_fraction", pixels.cloud_fraction.astype(np.float32), "1")]
