"""Files in, scenes out: one module a format, and one lazy view of a scene in xarray."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from spectralvae.errors import ConfigError, InputError
from spectralvae.readers.base import READABLE, RULES, Scene, check_file, damage_named
from spectralvae.readers.matlab import MatlabScene
from spectralvae.readers.tempo import TempoScene

__all__ = ["RULES", "Scene", "open_reader", "open_scene"]

_HDF5 = b"\x89HDF\r\n\x1a\n"
_BLOCK_SAMPLES = 2**24

_ATTRIBUTES = {
    "wavelength": {"units": "nm", "long_name": "wavelength"},
    "latitude": {"units": "degrees_north", "long_name": "latitude"},
    "longitude": {"units": "degrees_east", "long_name": "longitude"},
    "solar_zenith_angle": {"units": "degrees", "long_name": "solar zenith angle"},
    "viewing_zenith_angle": {"units": "degrees", "long_name": "viewing zenith angle"},
    "relative_azimuth_angle": {"units": "degrees", "long_name": "relative azimuth angle"},
    "time": {"long_name": "time of the scan step, by the file's own units"},
}

Wavelength = Sequence[float] | NDArray[Any] | Mapping[str, float]


def open_scene(
    path: str | PathLike[str],
    *,
    variable: str | None = None,
    size: Sequence[int] | None = None,
    wavelength: Wavelength | None = None,
    region: Sequence[int] | None = None,
    band: str | None = None,
) -> xr.Dataset:
    """Open a scene lazily: radiance is read when it is used, and only the rows that are.

    Args:
        path: A TEMPO L1 radiance granule, or a MATLAB .mat file (v5, v7.3); "~" is the home folder.
        variable: MATLAB: the array's name, where more than one may be the scene.
        size: MATLAB: [ny, nx] of a 2-D array (bands x pixels), where the file doesn't say.
        wavelength: MATLAB: the wavelengths in nm, or {"first": nm, "last": nm} for evenly spaced channels.
        region: [y0, y1, x0, x1], half-open pixel bounds; None for the full image.
        band: TEMPO: the band group; None takes the only one, or band_290_490_nm where there are both.

    Returns:
        `radiance` (y, x, channel) float32, NaN where invalid; coordinates `wavelength` in nm, (channel) or
        (x, channel), and, where the file has them, `latitude`, `longitude`, `solar_zenith_angle`,
        `viewing_zenith_angle`, `relative_azimuth_angle` (y, x) and `time` (y). The attribute `absent` names the
        optional variables that the file lacks. For TEMPO y = mirror_step, x = xtrack.

    Raises:
        InputError: The file is missing, damaged, or none that is read.
        ConfigError: An argument doesn't fit the file.
    """
    scene = open_reader(path, variable=variable, size=size, wavelength=wavelength, region=region, band=band)
    with scene:
        wavelengths = scene.wavelength
        coordinates: dict[str, Any] = {"wavelength": (("x", "channel")[-wavelengths.ndim :], wavelengths)}
        for name, (dims, values) in scene.coordinates().items():
            coordinates[name] = dims, (_datetimes(values) if name == "time" else values)
    radiance = {"long_name": "radiance"} | ({"units": scene.units} if scene.units else {})
    dataset = xr.Dataset(
        {"radiance": (("y", "x", "channel"), indexing.LazilyIndexedArray(_LazyRadiance(scene)), radiance)},
        {name: (*value, _ATTRIBUTES[name]) for name, value in coordinates.items()},
        {
            "source": scene.path.name,
            "format": scene.format,
            **({"band": scene.band} if scene.band else {}),
            **({"region": list(scene.region)} if scene.region else {}),
            "absent": ", ".join(scene.absent),
        },
    )
    dataset.set_close(scene.close)
    return dataset


def open_reader(
    path: str | PathLike[str],
    *,
    variable: str | None = None,
    size: Sequence[int] | None = None,
    wavelength: Wavelength | None = None,
    region: Sequence[int] | None = None,
    band: str | None = None,
) -> Scene:
    """Open a file as a scene; its format is told by its content.

    Args, Raises: as for `open_scene`.

    Returns:
        The scene; no file is open until it is read.
    """
    path = Path(os.path.expanduser(path))  # noqa: PTH111 (pathlib's raises over a file of the name "~copy.nc")
    check_file(path)
    if _is_matlab(path):
        _refuse_arguments(path, "MATLAB", {"band": band}, "TEMPO granules")
        return MatlabScene(path, variable=variable, size=size, wavelength=wavelength, region=region)
    _refuse_arguments(
        path, "HDF5/netCDF-4", {"variable": variable, "size": size, "wavelength": wavelength}, "MATLAB files"
    )
    return TempoScene(path, band=band, region=region)


def _is_matlab(path: Path) -> bool:
    """True for MATLAB, False for other HDF5; refuses everything else."""
    with damage_named(path), path.open("rb") as file:
        head = file.read(4096)
    is_hdf5 = any(head.startswith(_HDF5, offset) for offset in (0, 512, 1024, 2048))
    if head.startswith((b"MATLAB 5.0", b"MATLAB 7.3")) or path.suffix.lower() == ".mat":
        return True
    if is_hdf5:
        return False
    if head.startswith(b"CDF"):
        raise InputError(f"{path}: a classic netCDF-3 file; formats read now: {READABLE}")
    if path.suffix.lower() in {".nc", ".nc4", ".h5", ".hdf5"}:
        raise InputError(f"{path}: it doesn't begin as HDF5/netCDF-4 does, so it is damaged; fetch it again")
    raise InputError(f"{path}: a file of unknown format; formats read now: {READABLE}")


def _refuse_arguments(path: Path, format: str, arguments: dict[str, object], meant_for: str) -> None:
    for key, value in arguments.items():
        if value is not None:
            why = "the file has its own wavelengths" if key == "wavelength" else f"it is meant for {meant_for}"
            raise ConfigError(f"{path}: {key} was given for this {format} file, but {why}; leave it out")


class _LazyRadiance(BackendArray):
    """A scene's radiance as xarray indexes it."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.shape = scene.shape
        self.dtype = np.dtype(np.float32)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.BASIC, self._read)

    def _read(self, key: tuple[int | slice, ...]) -> NDArray[np.float32]:
        """Read by whole rows, a few at a time: one column of a granule must not take the memory of all of it."""
        ny, nx, nc = self.shape
        y, *rest = key
        wanted = range(*y.indices(ny)) if isinstance(y, slice) else range(y, y + 1)
        result = np.empty((len(wanted), *np.empty((0, nx, nc))[:, *rest].shape[1:]), dtype=np.float32)
        block = max(1, _BLOCK_SAMPLES // (nx * nc)) if wanted.step == 1 else 1
        for start in range(0, len(wanted), block):
            rows = wanted[start : start + block]
            values, _ = self.scene.read(slice(rows[0], rows[-1] + 1))
            result[start : start + block] = values[:, *rest]
        return result if isinstance(y, slice) else result[0]


def _datetimes(seconds: NDArray[Any]) -> NDArray[np.datetime64]:
    """Seconds since 1970 as datetime64, to the microsecond (which is what float64 holds of them); NaN is NaT."""
    valid = np.isfinite(seconds)
    microseconds = np.round(np.where(valid, seconds, 0) * 1e6).astype(np.int64)
    times = microseconds.astype("datetime64[us]").astype("datetime64[ns]")
    times[~valid] = np.datetime64("NaT")
    return times
