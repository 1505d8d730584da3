"""TEMPO level-1 radiance granules (netCDF-4): `radiance` and `nominal_wavelength` of one band group.

Dimensions are known by name and may stand in any order; whatever is optional may be missing.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from spectralvae.errors import ConfigError, InputError
from spectralvae.readers import hdf5
from spectralvae.readers.arguments import Window
from spectralvae.readers.base import (
    COORDINATES,
    FLAG,
    READABLE,
    Coordinate,
    Place,
    Scene,
    damage_named,
    invalidate,
    is_undeclared_fill,
)
from spectralvae.readers.packing import (
    EPOCH,
    check_packing,
    decode,
    is_declared_fill,
    nanometres,
    text,
    unix_seconds,
    unpack,
)

DEFAULT_BAND = "band_290_490_nm"

# Bits of pixel_quality_flag that make a sample invalid by default: missing, bad pixel, processing error, saturated.
# The others (transient, RTS, noise underflow, correction errors) are warnings over usable samples.
REJECTED_FLAG_BITS = (0, 1, 2, 5)

NOISE = "radiance_error"
Y, X, C = "mirror_step", "xtrack", "spectral_channel"
_REQUIRED = {"radiance": (Y, X, C), "nominal_wavelength": (X, C)}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    FLAG: (Y, X, C),
    NOISE: (Y, X, C),
    **dict.fromkeys(COORDINATES, (Y, X)),
    "time": (Y,),
}

_BAND = re.compile(r"band_\d+_\d+_nm")
_NAME_TIME = re.compile(r"_(\d{8}T\d{6})Z(?![0-9A-Za-z])")
_NAME_VERSION = re.compile(r"_V(\d+)_")


class TempoScene(Scene):
    """One band of a TEMPO level-1 granule: y = mirror_step, x = xtrack.

    Args:
        path: The file.
        band: The band group; None takes the file's only one, or `band_290_490_nm` where there are more.
        region: [y0, y1, x0, x1], half-open pixel bounds; None for the full image.
        flag_bits: Bits of pixel_quality_flag that make a sample invalid.

    Raises:
        InputError: No TEMPO level-1 radiance, a required variable is missing, dimensions don't fit, or damage.
        ConfigError: The file has no such band, or the region doesn't fit.
    """

    format = "tempo"

    def __init__(
        self,
        path: Path,
        *,
        band: str | None = None,
        region: Sequence[int] | None = None,
        flag_bits: Sequence[int] = REJECTED_FLAG_BITS,
    ) -> None:
        self._flag_mask = sum(1 << bit for bit in set(flag_bits))
        with damage_named(path), h5py.File(path, "r") as file:
            band = _choose_band(path, file, band)
            sizes, absent = _check_layout(path, file, band)
            radiance = file[band]["radiance"]
            chunks = dict(zip(dims_of(radiance), radiance.chunks or (), strict=False))
            super().__init__(
                path,
                (sizes[Y], sizes[X], sizes[C]),
                region,
                absent=absent,
                band=band,
                units=text(radiance.attrs.get("units", "")) or None,
                time=_scan_start(path, None if "time" in absent else file["time"]),
                version=version_of(path, file),
                chunk=(chunks.get(Y, 1), chunks.get(X, sizes[X])),
            )

    @property
    def wavelength(self) -> NDArray[np.float64]:
        # Read on each call: kept, it would hold 17 MB for every granule of a long list.
        with damage_named(self.path):
            variable = self._variable("nominal_wavelength")
            wanted = (X, C)[-variable.ndim :]
            return decode(variable, slab(variable, wanted, self._window)).astype(np.float64)

    def coordinates(self) -> dict[str, Coordinate]:
        coordinates: dict[str, Coordinate] = {}
        for name in COORDINATES:
            if name in self.absent:
                continue
            with damage_named(self.path):
                variable = self._variable(name)
                values = decode(variable, slab(variable, _OPTIONAL[name], self._window))
                if name == "time":
                    values = unix_seconds(self.path, text(variable.attrs["units"]), values)
                coordinates[name] = ("y", "x")[: values.ndim], values
        return coordinates

    @property
    def places(self) -> dict[str, Place]:
        roles = {Y: "y", X: "x", C: "channel"}
        names = {"radiance": "radiance", "wavelength": "nominal_wavelength"} | {name: name for name in COORDINATES}
        with damage_named(self.path):
            return {
                key: Place(_place(self.band, name), tuple(roles[dim] for dim in dims_of(self._variable(name))))
                for key, name in names.items()
                if name not in self.absent
            }

    def probe(self) -> None:
        with damage_named(self.path):
            names = [name for name in _REQUIRED | _OPTIONAL if name not in self.absent]
            variables = {_place(self.band, name): self._variable(name) for name in names}
            hdf5.check_variables(self.path, variables)
            for place, variable in variables.items():
                hdf5.check_written(self.path, place, variable)
        super().probe()

    def _open(self) -> h5py.File:
        # h5py, for h5netcdf takes a variable's shape from dimensions found by name (so a size that differs is not
        # seen), and reads all of a variable that is shorter than its unlimited dimension.
        with damage_named(self.path):
            return h5py.File(self.path, "r")

    def _variable(self, name: str) -> h5py.Dataset:
        return self._file[_place(self.band, name)]

    def _read_raw(self, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.bool_] | None]:
        with damage_named(self.path):
            radiance = self._variable("radiance")
            raw = slab(radiance, (Y, X, C), window)
            filled = is_declared_fill(radiance, raw)
            flagged = None
            if FLAG not in self.absent:
                flag = self._variable(FLAG)
                flagged = is_rejected(flag, slab(flag, (Y, X, C), window), self._flag_mask)
            return unpack(radiance, raw), filled, flagged

    def read_noise(self, rows: slice, columns: slice = slice(None)) -> NDArray[np.float32] | None:
        if NOISE in self.absent:
            return None
        with damage_named(self.path):
            noise = self._variable(NOISE)
            raw = slab(noise, (Y, X, C), self._in_file(rows, columns))
            return invalidate(unpack(noise, raw), is_declared_fill(noise, raw), None)[0]


def is_tempo(file: h5py.File) -> bool:
    """Is an HDF5 file of TEMPO: does it have a band group, or is it a level-2 product, which is then refused?"""
    names = text(file.attrs.get("collection_shortname", "")) + text(file.attrs.get("title", ""))
    return any(_BAND.fullmatch(name) for name in file) or ("product" in file and "TEMPO" in names)


def dims_of(variable: h5py.Dataset) -> tuple[str, ...]:
    """The names of a netCDF-4 variable's dimensions, which are scales attached to its axes; "?" where there is none."""
    return tuple(str(axis[len(axis) - 1].name).split("/")[-1] if len(axis) else "?" for axis in variable.dims)


def _place(band: str | None, name: str) -> str:
    return name if name == "time" else f"{band}/{name}"


def _choose_band(path: Path, file: h5py.File, band: str | None) -> str:
    """The band group to read; refuses a file that is no TEMPO level-1 radiance."""
    bands = sorted(name for name, item in file.items() if _BAND.fullmatch(name) and isinstance(item, h5py.Group))
    if not bands:
        collection = text(file.attrs.get("collection_shortname", ""))
        title = text(file.attrs.get("title", ""))
        if "product" in file and "TEMPO" in collection + title:
            what = f"a TEMPO level-2 product ({collection or title}), which holds no radiance"
        else:
            what = "an HDF5/netCDF-4 file that is no TEMPO L1 radiance"
            what += ": it has no group band_290_490_nm or band_540_740_nm"
        raise InputError(what, path=path, remedy=f"formats read now: {READABLE}")
    if band is not None and band not in bands:
        limit = f"one of the file's: {', '.join(bands)}"
        raise ConfigError("no such group", key="band", path=path, value=band, limit=limit)
    if band is None and len(bands) > 1 and DEFAULT_BAND not in bands:
        raise ConfigError("the file holds several", key="band", path=path, remedy=f"name one: {', '.join(bands)}")
    return band or (DEFAULT_BAND if DEFAULT_BAND in bands else bands[0])


def _check_layout(path: Path, file: h5py.File, band: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """Check that all variables are there and fit each other.

    Returns:
        sizes: Of each dimension of the radiance.
        absent: The optional variables that the file lacks; a time without units is as good as none.
    """
    sizes: dict[str, int] = {}
    absent = []
    for name, dims in (_REQUIRED | _OPTIONAL).items():
        place = _place(band, name)
        variable = file.get(place)
        if not isinstance(variable, h5py.Dataset) or (name == "time" and "units" not in variable.attrs):
            if name in _REQUIRED:
                raise InputError("no such variable in it, which is required", key=place, path=path)
            absent.append(name)
            continue
        found = dims_of(variable)
        accepted = ({X, C}, {C}) if name == "nominal_wavelength" else (set(dims),)
        if set(found) not in accepted or len(set(found)) != len(found):
            problem, limit = f"has dimensions ({', '.join(found)})", f"{', '.join(dims)}, in any order"
            raise InputError(problem, key=place, path=path, limit=limit)
        if variable.dtype.kind not in "iuf":
            raise InputError(f"holds {variable.dtype}, not numbers", key=place, path=path)
        check_packing(path, place, variable)
        for dim, size in zip(found, variable.shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                problem = f"has {size} along {dim}, but the radiance has {sizes[dim]}"
                raise InputError(problem, key=place, path=path)
    units = text(file[band]["nominal_wavelength"].attrs.get("units", "nm"))
    if nanometres(units) != 1:
        raise InputError(f"is in {units!r}", key=f"{band}/nominal_wavelength", path=path, limit="in nm")
    return sizes, tuple(absent)


def slab(variable: h5py.Dataset, dims: tuple[str, ...], window: Window) -> NDArray[Any]:
    """Read a window of a variable, its axes in the order of dims; other dimensions it doesn't have."""
    y0, y1, x0, x1 = window
    cut = {Y: slice(y0, y1), X: slice(x0, x1), C: slice(None)}
    stored = dims_of(variable)
    raw = hdf5.read(variable, *(cut[d] for d in stored))
    return raw.transpose([stored.index(d) for d in dims])


def is_rejected(variable: h5py.Dataset, flags: NDArray[Any], mask: int) -> NDArray[np.bool_]:
    """Which flags have a bit of the mask, or are themselves fill; same shape."""
    filled = is_declared_fill(variable, flags)
    if flags.dtype.kind == "f":
        # Subsetted files may hold flags as floats, NaN where there is none.
        filled = filled | ~np.isfinite(flags) | is_undeclared_fill(flags)
        flags = np.where(filled, 0, flags).astype(np.uint32)
    rejected = np.empty(flags.shape, dtype=np.bool_)
    # Cast on the way, without a second array of the flags' size.
    np.bitwise_and(flags, np.array(mask).astype(flags.dtype), out=rejected, casting="unsafe")
    rejected |= filled
    return rejected


def version_of(path: Path, file: h5py.File) -> str | None:
    """The processing version, from the file's name ("..._V03_...") or else its attribute `version_id`."""
    if match := _NAME_VERSION.search(path.name):
        return f"V{int(match[1]):02d}"
    version = np.ravel(file.attrs.get("version_id", ()))
    return f"V{int(version[0]):02d}" if version.size and version.dtype.kind in "iu" else None


def _scan_start(path: Path, time: h5py.Dataset | None) -> dt.datetime | None:
    """Start of the scan: the time in the file's name, which is the granule's identity, or the first valid `time`."""
    if match := _NAME_TIME.search(path.name):
        try:
            return dt.datetime.strptime(match[1] + "+0000", "%Y%m%dT%H%M%S%z")
        except ValueError as error:
            problem = f"{match[1]}Z in its name is no date and time"
            raise InputError(problem, path=path, remedy="correct the name") from error
    if time is None:
        return None
    seconds = unix_seconds(path, text(time.attrs["units"]), decode(time, hdf5.read(time)))
    seconds = seconds[np.isfinite(seconds)]
    return EPOCH + dt.timedelta(seconds=float(seconds[0])) if seconds.size else None
