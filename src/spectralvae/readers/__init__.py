"""Files in, scenes out: one module a format."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, cast

import h5py
from numpy.typing import NDArray

from spectralvae.errors import ConfigError, InputError
from spectralvae.readers import envi, guard, tiles
from spectralvae.readers.base import READABLE, RULES, Scene, check_file, damage_named
from spectralvae.readers.tempo import is_tempo

__all__ = ["RULES", "Scene", "Wavelength", "open_reader"]

_HDF5 = b"\x89HDF\r\n\x1a\n"

Wavelength = Sequence[float] | NDArray[Any] | Mapping[str, float]


@dataclass(frozen=True)
class Format:
    """Where a format's reader is, and which arguments it takes.

    Attributes:
        label: As messages name it.
        reader: Module in this package and class.
        arguments: Of `open_reader`.
    """

    label: str
    reader: tuple[str, str]
    arguments: frozenset[str]


_GENERIC = frozenset({"wavelength", "region", "units"})

FORMATS = {
    "tempo": Format("TEMPO", ("tempo", "TempoScene"), frozenset({"band", "region", "flag_bits"})),
    "matlab": Format("MATLAB", ("matlab", "MatlabScene"), _GENERIC | {"variable", "size"}),
    "envi": Format("ENVI", ("envi", "EnviScene"), _GENERIC),
    "netcdf": Format("netCDF/HDF5", ("netcdf", "NetcdfScene"), _GENERIC | {"variable", "dims"}),
    "zarr": Format("Zarr", ("netcdf", "ZarrScene"), _GENERIC | {"variable", "dims"}),
    "tiles": Format("tile", ("tiles", "TilesScene"), _GENERIC),
}


def open_reader(
    path: str | PathLike[str],
    *,
    variable: str | None = None,
    size: Sequence[int] | None = None,
    wavelength: Wavelength | None = None,
    region: Sequence[int] | None = None,
    band: str | None = None,
    dims: Mapping[str, str | int] | None = None,
    units: str | None = None,
    flag_bits: Sequence[int] | None = None,
) -> Scene:
    """Open a file as a scene; its format is told by its content.

    Args:
        flag_bits: TEMPO: the bits of pixel_quality_flag that make a sample invalid; None for the default.
        The others, Raises: as for `open_scene`.

    Returns:
        The scene; no file is open until it is read.
    """
    if "://" in os.fspath(path):
        raise InputError("a URL; only local files are read", value=os.fspath(path), remedy="download it first")
    path = Path(os.path.expanduser(path))  # noqa: PTH111 (pathlib's raises over a file of the name "~copy.nc")
    check_file(path)
    arguments = {
        "variable": variable,
        "size": size,
        "wavelength": wavelength,
        "region": region,
        "band": band,
        "dims": dims,
        "units": units,
        "flag_bits": flag_bits,
    }
    given = {key: value for key, value in arguments.items() if value is not None}
    guard.try_out(path, given, f"{__name__}:{probe.__name__}")
    return open_unguarded(path, given)


def open_unguarded(path: Path, arguments: Mapping[str, Any]) -> Scene:
    """`open_reader` without asking first whether the file may harm.

    Args:
        path: An existing file.
        arguments: Those of `open_reader` that were given.
    """
    found = FORMATS[_format_of(path)]
    for key in arguments:
        if key not in found.arguments:
            takers = ", ".join(other.label for other in FORMATS.values() if key in other.arguments)
            why = "which has its own wavelengths" if key == "wavelength" else f"only to {takers}"
            raise ConfigError(
                f"does not apply to {found.label} files, {why}", key=key, path=path, remedy="leave it out"
            )
    module, name = found.reader
    reader = getattr(import_module(f"spectralvae.readers.{module}"), name)
    return cast(Scene, reader(path, **arguments))


def probe(path: Path, **arguments: Any) -> None:
    """What the guard tries out: all that this process will do with a scene, but for reading samples."""
    with open_unguarded(path, arguments) as scene:
        scene.probe()


def _format_of(path: Path) -> str:
    """The key in `FORMATS`; refuses what is none of them. A file's name matters only where its content doesn't tell."""
    if path.is_dir():
        from spectralvae.readers.containers import is_zarr

        if is_zarr(path):
            return "zarr"
        if found := tiles.tile_files(path):
            raise InputError(f"a folder of {len(found)} tile files", path=path, remedy=f"give these: {path}/[0-9]*.pt")
        raise InputError("a folder that is no Zarr array or group", path=path, remedy=f"formats read now: {READABLE}")
    with damage_named(path), path.open("rb") as file:
        head = file.read(4096)
    suffix = path.suffix.lower()
    if head.startswith((b"MATLAB 5.0", b"MATLAB 7.3")) or suffix == ".mat":
        return "matlab"
    if any(head.startswith(_HDF5, offset) for offset in (0, 512, 1024, 2048)):
        with damage_named(path), h5py.File(path, "r") as hdf5:
            return "tempo" if is_tempo(hdf5) else "netcdf"
    if head.startswith(b"CDF"):
        return "netcdf"
    if head.startswith(envi.MAGIC):
        return "envi"
    if tiles.is_torch_file(path, head):
        return "tiles"
    if suffix in {".nc", ".nc4", ".h5", ".hdf5"}:
        raise InputError("is corrupt: it does not begin as HDF5/netCDF-4 does", path=path, remedy="fetch it again")
    if envi.find_header(path):
        return "envi"
    raise InputError("a file of unknown format", path=path, remedy=f"formats read now: {READABLE}")
