"""Write simulated granules as netCDF-4 files in TEMPO's format, level 1 and level 2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import h5netcdf
import numpy as np
from numpy.typing import NDArray

from spectralvae.config import PlantConfig
from spectralvae.simulate import fields, physics
from spectralvae.simulate.plant import FILL, deal, plant_unphysical, planted_counts, spoil
from spectralvae.version import __version__

EPOCH = datetime(1980, 1, 6, tzinfo=UTC)
TITLES = {"NO2": "nitrogen dioxide", "HCHO": "formaldehyde", "O3TOT": "total ozone", "CLDO4": "cloud"}
PIXEL = ("mirror_step", "xtrack")
SAMPLE = (*PIXEL, "spectral_channel")

BLOCK_SAMPLES = 300_000  # spectra of about this many samples are written at a time, and at least one mirror step


@dataclass(frozen=True)
class World:
    """What all granules of a simulation share."""

    seed: int
    place: fields.Place
    optics: physics.Optics
    noise: bool
    version: str
    planted: PlantConfig


def granule_name(kind: str, start: datetime, version: str) -> str:
    """File name as the archive has it."""
    scan, part = _scan_number(start)
    return f"TEMPO_{kind}_{version}_{start:%Y%m%dT%H%M%SZ}_S{scan:03d}G{part:02d}.nc"


def _scan_number(start: datetime) -> tuple[int, int]:
    """Number of the scan, hourly from 10 UTC, and of the granule in it: a second one begins at half past."""
    return start.hour - 9, 1 + start.minute // 30


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


def _describe(file: h5netcdf.File, path: Path, kind: str, title: str, world: World, granule: fields.Granule) -> None:
    """Root dimensions and attributes that both levels have."""
    steps, xtrack = granule.pixels.ozone.shape
    file.dimensions = {"mirror_step": steps, "xtrack": xtrack}
    start, end = (granule.start + timedelta(seconds=float(s)) for s in (0.0, granule.time[-1]))
    scan, part = _scan_number(granule.start)
    product, _ = kind.split("_")
    number = np.int32(world.version.removeprefix("V"))
    file.attrs.update(
        Conventions="CF-1.6",
        title=title,
        source=f"SIMULATED by spectralvae {__version__}, seed {world.seed}, granule {granule.index}: not a "
        "measurement. Cross sections and solar lines are stylised.",
        simulated=np.int32(1),
        simulation_seed=np.int64(world.seed),
        product_type=product,
        collection_shortname=f"TEMPO_{kind}",
        version_id=number,
        processing_version=number,
        local_granule_id=path.name,
        scan_num=np.int32(scan),
        granule_num=np.int32(part),
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
        _put(group, name, PIXEL, data.astype(np.float32), long_name=long_name, units=units)


def _put_time(group: Any, granule: fields.Granule) -> None:
    seconds = (granule.start - EPOCH).total_seconds() + granule.time
    units = f"seconds since {EPOCH:%Y-%m-%dT%H:%M:%SZ}"
    _put(group, "time", ("mirror_step",), seconds, long_name="radiance exposure start time", units=units)


def write_level1(path: Path, world: World, granule: fields.Granule, missing: NDArray[np.bool_]) -> Iterator[int]:
    """Write a granule's radiance, a few mirror steps at a time.

    Args:
        path: of the file, which appears once it is complete.
        world: what all granules share.
        granule: geometry and truth.
        missing: pixels without radiance, (y, x).

    Yields:
        How many mirror steps were written.
    """
    steps, xtrack = missing.shape
    channels = world.optics.wavelength.shape[1]
    counts = planted_counts(world.planted, int((~missing).sum()) * channels)
    with _new_file(path) as file:
        _describe(file, path, "RAD_L1", f"Simulated TEMPO level 1 radiance, {path.name}", world, granule)
        file.attrs.update({f"planted_{kind}": np.int64(count) for kind, count in counts.items() if count})
        if granule.index in world.planted.night:
            file.attrs["planted_night"] = np.int32(1)
        _put_time(file, granule)
        seconds = 0.9 * min(fields.SECONDS_PER_STEP, fields.LONGEST_SCAN / steps)
        exposure = np.full(steps, seconds, dtype=np.float32)
        _put(file, "exposure_time", ("mirror_step",), exposure, long_name="exposure time", units="s")
        distance = np.array(granule.earth_sun_distance, dtype=np.float32)
        _put(file, "earth_sun_distance", (), distance, long_name="distance between earth and sun", units="AU")

        band = file.create_group("band_290_490_nm")
        band.dimensions = {"spectral_channel": channels}
        wavelength = world.optics.wavelength.astype(np.float32)
        _put(band, "nominal_wavelength", SAMPLE[1:], wavelength, long_name="nominal wavelength", units="nm")
        _put_geolocation(band, world.place, granule)
        variables = _create_spectra(band, (steps, xtrack, channels), declare_fill=world.planted.declare_fill)
        block = max(1, BLOCK_SAMPLES // (xtrack * channels))
        for rows, spectra in _spectra(world, granule, missing, counts, block):
            for variable, values in zip(variables, spectra, strict=True):
                variable[rows] = values
            yield rows.stop - rows.start


def _spectra(
    world: World, granule: fields.Granule, missing: NDArray[np.bool_], counts: dict[str, int], block: int
) -> Iterator[tuple[slice, tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint16]]]]:
    """Radiance, its error and its flag, each (y, x, c), of one block of mirror steps after the other."""
    steps, channels = missing.shape[0], world.optics.wavelength.shape[1]
    noise = fields.random_stream(world.seed, fields.Purpose.NOISE, granule.index)
    planting = fields.random_stream(world.seed, fields.Purpose.PLANT, granule.index)
    chosen = deal(planting, counts, ~missing, channels) if any(counts.values()) else None
    for first in range(0, steps, block):
        rows = slice(first, min(first + block, steps))
        signal = fields.clean_radiance(world.optics, world.place, granule, rows)
        sigma = physics.noise_sigma(signal)
        if world.noise:
            signal += sigma * noise.standard_normal(signal.shape, dtype=np.float32)
        radiance, error = signal.astype(np.float32), sigma.astype(np.float32)
        radiance[missing[rows]] = error[missing[rows]] = FILL
        flag = np.repeat(missing[rows, :, None].astype(np.uint16), channels, axis=-1)
        if chosen is not None:
            for step in range(rows.stop - rows.start):
                spoil(planting, next(chosen), radiance[step], flag[step])
        yield rows, (radiance, error, flag)


def _create_spectra(band: Any, shape: tuple[int, int, int], *, declare_fill: bool) -> list[Any]:
    """Create the three large variables, one mirror step a chunk so that rows can be streamed."""
    # Deflate finds little in noise: a higher level costs time and saves nothing
    layout: dict[str, Any] = {"chunks": (1, min(shape[1], 512), shape[2]), "compression": "gzip",
                              "compression_opts": 1, "shuffle": True}  # fmt: skip
    variables = []
    for name, long_name in (("radiance", "spectral radiance"), ("radiance_error", "spectral radiance uncertainty")):
        fill = FILL if declare_fill or name != "radiance" else None
        variable = band.create_variable(name, SAMPLE, np.float32, fillvalue=fill, **layout)
        variable.attrs.update(long_name=long_name, units="photons/s/cm^2/nm/sr")
        variables.append(variable)
    flag = band.create_variable("pixel_quality_flag", SAMPLE, np.uint16, **layout)
    flag.attrs.update(
        long_name="pixel quality flag",
        flag_masks=np.array([1 << bit for bit in range(7)], dtype=np.uint16),
        flag_meanings="missing bad_pixel processing_error transient rts saturated noise_underflow",
    )
    return [*variables, flag]


def write_level2(path: Path, product: str, world: World, granule: fields.Granule, missing: NDArray[np.bool_]) -> None:
    """Write the truth of one product, fill where the level-1 pixel is fill.

    Args:
        path: of the file, which appears once it is complete.
        product: NO2, HCHO, O3TOT or CLDO4.
        world: what all granules share.
        granule: geometry and truth.
        missing: pixels without radiance, (y, x).
    """
    with _new_file(path) as file:
        title = f"Simulated TEMPO level 2 {TITLES[product]} product"
        _describe(file, path, f"{product}_L2", title, world, granule)
        file.attrs["input_files"] = granule_name("RAD_L1", granule.start, world.version)
        geolocation = file.create_group("geolocation")
        _put_time(geolocation, granule)
        _put_geolocation(geolocation, world.place, granule)

        truth = _truth(product, granule.pixels)
        if product == "NO2" and world.planted.unphysical_l2:
            name, column, units = truth[0]
            random = fields.random_stream(world.seed, fields.Purpose.PLANT_L2, granule.index)
            column, count = plant_unphysical(random, column, missing, world.planted.unphysical_l2)
            truth[0] = name, column, units
            file.attrs["planted_unphysical_l2"] = np.int64(count)
        target = file.create_group("product")
        for name, values, units in truth:
            _put(target, name, PIXEL, np.where(missing, values.dtype.type(FILL), values), units=units)
        _put_quality(target, product, granule, missing)
        if product != "CLDO4":
            cloud = np.where(missing, FILL, granule.pixels.cloud_fraction).astype(np.float32)
            _put(file.create_group("support_data"), "eff_cloud_fraction", PIXEL, cloud, units="1")
        statistics = file.create_group("qa_statistics")
        for name, count in (("num_pixels", missing.size), ("num_pixels_missing", int(missing.sum()))):
            _put(statistics, name, (), np.array(count, dtype=np.int32))


def _put_quality(target: Any, product: str, granule: fields.Granule, missing: NDArray[np.bool_]) -> None:
    """Write the product's quality flag."""
    if product in ("NO2", "HCHO"):
        hidden = granule.pixels.cloud_fraction > fields.HIDING_CLOUD
        quality = np.where(missing, 2, np.where(hidden, 1, 0)).astype(np.int16)
        why = f"suspicious: cloud fraction above {fields.HIDING_CLOUD}, which hides most of the column"
        _put(target, "main_data_quality_flag", PIXEL, quality, flag_values=np.arange(3, dtype=np.int16),
             flag_meanings="normal suspicious bad", comment=why)  # fmt: skip
    else:
        name = "quality_flag" if product == "O3TOT" else "processing_quality_flag"
        bit = np.array([1], dtype=np.uint16)
        _put(target, name, PIXEL, missing.astype(np.uint16), flag_masks=bit, flag_meanings="missing")


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
