"""MATLAB `.mat` files, version 5 (through scipy) and 7.3 (HDF5): one real 3-D or 2-D array is the scene.

A 3-D array is (y, x, channel). A 2-D array is bands x pixels, the pixels stored column by column: pixel
p = x * ny + y; its size comes from the user or from scalars of the file.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from spectralvae.errors import ConfigError, InputError
from spectralvae.readers import hdf5
from spectralvae.readers.arguments import (
    GIVE_WAVELENGTHS,
    Window,
    check_wavelengths,
    given_wavelengths,
    no_wavelengths,
    whole_numbers,
)
from spectralvae.readers.base import COORDINATES, FLAG, WAVELENGTH_NAMES, Scene, damage_named, formats_extra

_NUMERIC = {"double", "single", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}
_SIZE_NAMES = (("lines", "cols"), ("nrow", "ncol"), ("rows", "cols"))

# Name -> (shape as MATLAB shows it, MATLAB's class name).
Listing = dict[str, tuple[tuple[int, ...], str]]


class MatlabScene(Scene):
    """The scene of a MATLAB file.

    Candidates are its real numeric arrays: all 3-D ones, and 2-D ones of more than one band whose pixels are as many
    as the size says; while no size is known, those with more columns than rows. The only candidate is taken; among
    several one has to be named.

    Args:
        path: The file.
        variable: The array's name; None takes the only candidate.
        size: [ny, nx] of a 2-D array; None takes it from scalars lines/cols, nRow/nCol or rows/cols (any case).
        wavelength: nc wavelengths in nm, or {"first": nm, "last": nm} for evenly spaced channels; None takes
            them from a vector wavelength(s), wl or lambda (any case) in the file.
        region: [y0, y1, x0, x1], half-open pixel bounds; None for the full image.
        units: Of the values, which the file doesn't tell.

    Raises:
        InputError: No or several candidates, no wavelengths, or damage.
        ConfigError: An argument doesn't fit the file.
    """

    format = "matlab"

    def __init__(
        self,
        path: Path,
        *,
        variable: str | None = None,
        size: Sequence[int] | None = None,
        wavelength: Sequence[float] | NDArray[Any] | Mapping[str, float] | None = None,
        region: Sequence[int] | None = None,
        units: str | None = None,
    ) -> None:
        with closing(_open(path)) as source:
            with damage_named(path):
                listing = source.listing()
            ny_nx = _known_size(path, source, listing, size)
            self._name = _choose_variable(path, listing, variable, ny_nx)
            full_shape = _scene_shape(path, self._name, listing[self._name][0], ny_nx, size is not None)
            self._ny = full_shape[0]
            if wavelength is not None:
                wavelengths = given_wavelengths("wavelength", wavelength, full_shape[2], path=path)
            else:
                wavelengths = _wavelengths(path, source, listing, full_shape[2])
        super().__init__(path, full_shape, region, absent=(FLAG, *COORDINATES), units=units, wavelength=wavelengths)

    def probe(self) -> None:
        with damage_named(self.path):
            self._file.probe(self._name, self._ny)

    def _open(self) -> _Source:
        return _open(self.path)

    def _read_raw(self, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.bool_] | None]:
        source = self._file
        with damage_named(self.path):
            raw = source.window(self._name, self._ny, window)
        return raw, np.zeros((), dtype=np.bool_), None


def _open(path: Path) -> _Source:
    if h5py.is_hdf5(path):
        with damage_named(path):
            return _Mat73(path)
    with damage_named(path), path.open("rb") as file:
        head = file.read(20)
    # Version 4 has no header: a file begins with the type, rows, columns, imaginary and name's length of a matrix.
    for order in "<>" if len(head) == 20 else "":
        kind, rows, columns, imaginary, name_length = struct.unpack(f"{order}5i", head)
        if 0 <= kind < 5000 and min(rows, columns) >= 0 and imaginary in (0, 1) and name_length > 0:
            remedy = "load it in MATLAB and save it as version 5, save(..., '-v7'), or as 7.3, save(..., '-v7.3')"
            raise InputError("a MATLAB file of version 4, which is not read", path=path, remedy=remedy)
    return _Mat5(path)


class _Mat5:
    """Version 5. scipy loads whole arrays, so the scene is kept once it is loaded."""

    def __init__(self, path: Path) -> None:
        with formats_extra(path, "MATLAB files of version 5 need scipy"):
            import scipy.io
        self._io = scipy.io
        self._path = path
        self._cube: NDArray[Any] | None = None
        self._loading = threading.Lock()

    def listing(self) -> Listing:
        # whosmat doesn't tell complex arrays apart; it lists the elements in the order of the file.
        complex_ = list(_complex_elements(self._path))
        return {
            name: (tuple(int(n) for n in shape), f"complex {kind}" if is_complex else kind)
            for (name, shape, kind), is_complex in zip(self._io.whosmat(self._path), complex_, strict=True)
        }

    def array(self, name: str) -> NDArray[Any]:
        value = self._io.loadmat(self._path, variable_names=[name]).get(name)
        # scipy gives a text in place of an array that it could not read.
        if not isinstance(value, np.ndarray):
            raise ValueError(f"{name} cannot be read")
        return value

    def window(self, name: str, ny: int, window: Window) -> NDArray[Any]:
        with self._loading:
            if self._cube is None:
                cube = self.array(name)
                if cube.ndim == 2:
                    cube = cube.reshape(cube.shape[0], ny, -1, order="F").transpose(1, 2, 0)
                self._cube = cube
        y0, y1, x0, x1 = window
        return self._cube[y0:y1, x0:x1].copy()

    def probe(self, name: str, ny: int) -> None:
        self.window(name, ny, (0, 0, 0, 0))

    def close(self) -> None:
        self._cube = None


class _Mat73:
    """Version 7.3: HDF5, which shows MATLAB's dimensions in reverse. Only the rows asked for are read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = h5py.File(path, "r")

    def listing(self) -> Listing:
        found: Listing = {}
        for name, item in self._file.items():
            if name.startswith("#"):  # MATLAB's own groups
                continue
            if not isinstance(item, h5py.Dataset):
                found[name] = (), "struct or sparse"
            elif "MATLAB_empty" in item.attrs:
                found[name] = item.shape[::-1], "empty"
            elif item.dtype.kind == "V" and item.dtype.names == ("real", "imag"):
                found[name] = item.shape[::-1], "complex"
            else:
                # Files that h5py wrote have no MATLAB_class.
                stored = {"f8": "double", "f4": "single", "f2": "single"}.get(item.dtype.str[1:], item.dtype.name)
                kind = item.attrs.get("MATLAB_class", stored)
                found[name] = item.shape[::-1], kind.decode() if isinstance(kind, bytes) else str(kind)
        return found

    def array(self, name: str) -> NDArray[Any]:
        self.probe(name)
        return hdf5.read(self._file[name]).T

    def window(self, name: str, ny: int, window: Window) -> NDArray[Any]:
        y0, y1, x0, x1 = window
        item = self._file[name]
        if item.ndim == 3:
            return hdf5.read(item, slice(None), slice(x0, x1), slice(y0, y1)).transpose(2, 1, 0)
        if y0 == y1:
            return np.empty((0, x1 - x0, item.shape[1]), dtype=item.dtype)
        runs = h5py.MultiBlockSlice(start=x0 * ny + y0, stride=ny, count=x1 - x0, block=y1 - y0)
        pixels = hdf5.read(item, runs, slice(None))  # (x * y, channel)
        return pixels.reshape(x1 - x0, y1 - y0, -1).transpose(1, 0, 2)

    def probe(self, name: str, ny: int = 0) -> None:
        hdf5.check_variables(self._path, {name: self._file[name]})
        hdf5.check_written(self._path, name, self._file[name])

    def close(self) -> None:
        self._file.close()


_Source = _Mat5 | _Mat73


def _complex_elements(path: Path) -> Iterator[bool]:
    """Walk a version 5 file's elements: is each one complex? (MATLAB "MAT-File Format", 1-9 and 1-16.)

    Raises:
        ValueError: An element ends behind the file's end, or the file is no version 5.
    """
    end = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(128)
        order = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}.get(header[124:128])
        if order is None:
            raise ValueError("no MATLAB file of version 5 or 7.3")
        while tag := file.read(8):
            kind, size = struct.unpack(f"{order}2I", tag)
            start = file.tell()
            if start + size > end:
                raise ValueError(f"an array ends at byte {start + size} of {end}")
            head = file.read(min(size, 4096))
            if kind == 15:  # compressed: an element of its own, tag and all
                head = zlib.decompressobj().decompress(head, 64)[8:]
            (flags,) = struct.unpack(f"{order}I", head[8:12])
            yield bool(flags & 0x0800)
            file.seek(start + size)


def _known_size(path: Path, source: _Source, listing: Listing, size: Sequence[int] | None) -> tuple[int, int] | None:
    """(ny, nx), as the user or else the file's scalars give it; None where neither does."""
    if size is not None:
        ny, nx = whole_numbers(path, "size", size, "[ny, nx]")
        if min(ny, nx) < 1:
            raise ConfigError(key="size", path=path, value=[ny, nx], limit="[ny, nx], both at least 1")
        return ny, nx
    scalars = {name.lower(): name for name, (shape, kind) in listing.items() if kind in _NUMERIC and set(shape) <= {1}}
    found = {}
    for names in _SIZE_NAMES:
        if all(name in scalars for name in names):
            with damage_named(path):
                values = [source.array(scalars[name]).item() for name in names]
            for name, value in zip(names, values, strict=True):
                if value < 1 or not float(value).is_integer():
                    limit, remedy = "a whole number above 0", "give size: [ny, nx]"
                    raise InputError(key=scalars[name], path=path, value=value, limit=limit, remedy=remedy)
            found[int(values[0]), int(values[1])] = names
    if len(found) > 1:
        problem = f"the file gives several: {', '.join(map(str, found))}"
        raise InputError(problem, key="size", path=path, remedy="give one, size: [ny, nx]")
    return next(iter(found), None)


def _choose_variable(path: Path, listing: Listing, variable: str | None, ny_nx: tuple[int, int] | None) -> str:
    """The name of the scene's array."""
    candidates = [name for name, (shape, kind) in listing.items() if kind in _NUMERIC and _may_be_scene(shape, ny_nx)]
    shapes = {name: " x ".join(map(str, shape)) for name, (shape, _) in listing.items()}
    listed = ", ".join(f"{name} ({shapes[name]})" for name in candidates) or "none"
    if variable is not None:
        if variable not in listing:
            remedy = f"what may be the scene: {listed}"
            raise ConfigError("no such variable", key="variable", path=path, value=variable, remedy=remedy)
        shape, kind = listing[variable]
        if kind not in _NUMERIC or len(shape) not in (2, 3):
            raise ConfigError(
                f"is {kind} ({shapes[variable] or 'no array'})",
                key="variable",
                path=path,
                value=variable,
                limit="a real numeric array in 3-D, or in 2-D (bands x pixels)",
                remedy=f"what may be the scene: {listed}",
            )
        return variable
    if not candidates:
        everything = ", ".join(f"{name} ({shapes[name]} {kind})" for name, (_, kind) in listing.items())
        known = f"pixels counting {ny_nx[0]} x {ny_nx[1]}" if ny_nx else "more pixels than bands"
        problem = f"no array may be the scene: it holds {everything or 'nothing'}"
        limit = f"real, numeric and 3-D, or 2-D (bands x pixels) with {known}"
        raise InputError(problem, key="variable", path=path, limit=limit)
    if len(candidates) > 1:
        largest = max(candidates, key=lambda name: np.prod(listing[name][0]))
        problem = f"{len(candidates)} arrays may be the scene: {listed}"
        raise InputError(problem, key="variable", path=path, remedy=f"name one, variable: {largest}")
    return candidates[0]


def _may_be_scene(shape: tuple[int, ...], ny_nx: tuple[int, int] | None) -> bool:
    if len(shape) == 3:
        return True
    if len(shape) != 2 or shape[0] < 2:
        return False
    return shape[1] == ny_nx[0] * ny_nx[1] if ny_nx else shape[1] > shape[0]


def _scene_shape(
    path: Path, name: str, shape: tuple[int, ...], ny_nx: tuple[int, int] | None, from_user: bool
) -> tuple[int, int, int]:
    """(ny, nx, nc) of an array, checked against the size."""
    text = " x ".join(map(str, shape))
    if len(shape) == 3:
        if from_user and ny_nx != shape[:2]:
            problem = f"{name} is {text} (y, x, channel)"
            raise ConfigError(problem, key="size", path=path, value=list(ny_nx or ()), remedy="leave it out")
        return shape[0], shape[1], shape[2]
    if ny_nx is None:
        problem = f"{name} is {text} (bands x pixels), and nothing says how the {shape[1]} pixels lie"
        raise ConfigError(problem, key="size", path=path, remedy="give size: [ny, nx]")
    ny, nx = ny_nx
    if ny * nx != shape[1]:
        problem = f"{name} is {text} (bands x pixels), {shape[1]} pixels, but {ny} x {nx} makes {ny * nx}"
        raise ConfigError(problem, key="size", path=path, remedy="give the right size: [ny, nx]")
    return ny, nx, shape[0]


def _wavelengths(path: Path, source: _Source, listing: Listing, nc: int) -> NDArray[np.float64]:
    """(nc,) wavelengths in nm of the file."""
    names = [n for n, (shape, kind) in listing.items() if n.lower() in WAVELENGTH_NAMES and kind in _NUMERIC]
    if not names:
        raise no_wavelengths(path, nc)
    if len(names) > 1:
        problem = f"several vectors may be the wavelengths: {', '.join(names)}"
        raise InputError(problem, key="wavelength", path=path, remedy=GIVE_WAVELENGTHS)
    with damage_named(path):
        values = source.array(names[0]).astype(np.float64)
    if max(values.shape, default=1) != values.size:
        raise InputError(f"has shape {values.shape}, no vector", key=names[0], path=path, remedy=GIVE_WAVELENGTHS)
    return check_wavelengths(names[0], values.ravel(), nc, path=path)
