"""Files and folders of named arrays: HDF5 (and netCDF-4), netCDF-3 classic, and Zarr, all behind one interface.

Through h5py, scipy and zarr themselves: xarray opens no Zarr array whose dimensions have no names, and takes the size
of an HDF5 array from dimensions that it finds by name, whatever the array's own is.
"""

from __future__ import annotations

import base64
import math
import os
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import zarr
from numpy.typing import NDArray

from spectralvae.errors import InputError
from spectralvae.readers import hdf5, zarrs
from spectralvae.readers.base import damage_named, formats_extra
from spectralvae.readers.hdf5 import MAX_CHUNK_BYTES
from spectralvae.readers.packing import NUMERIC_ATTRIBUTES, text

_ATTRIBUTES = (*NUMERIC_ATTRIBUTES, "units", "_Unsigned")

# What libraries keep of dimensions and of themselves.
_BOOKKEEPING = {
    *("CLASS", "NAME", "DIMENSION_LIST", "REFERENCE_LIST", "DIMENSION_LABELS"),
    *("_Netcdf4Dimid", "_Netcdf4Coordinates", "_nc3_strict", "_NCProperties", "_ARRAY_DIMENSIONS"),
}
_NO_VARIABLE = "This is a netCDF dimension but not a netCDF variable"
_NAMED_AS_DIMENSION = "_nc4_non_coord_"  # before the name of a variable that isn't along the dimension of its name

# What zarr raises over chunks of size 0, and blosc over damaged headers.
_ZARR_DAMAGE = (ArithmeticError, SystemError)


@dataclass(frozen=True)
class Variable:
    """An array of a file, without its numbers.

    Attributes:
        name: "name" or "group/name".
        dims: A name for each axis; "?" where it has none.
        attrs: Those that tell fills, packing and units.
        homes: The places of the dimensions, "name" or "group/name". Zarr has no dimensions but their names: arrays
            share one if all of that name have one size, else only those of one group do.
        chunks: Sizes that are stored together, None where the array isn't chunked.
    """

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    attrs: Mapping[str, Any]
    homes: tuple[str, ...]
    chunks: tuple[int, ...] | None = None

    @property
    def group(self) -> str:
        return self.name.rpartition("/")[0]

    @property
    def base(self) -> str:
        return self.name.rpartition("/")[2]

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(f'{d}: {n}' for d, n in zip(self.dims, self.shape, strict=True))})"


class Container(Protocol):
    """An open file of arrays.

    `attributes` are those of a variable or of a group, "" being the root, without what libraries keep for themselves.
    `check` is asked once, when a file is tried out, whether all of an array is there and sound. `read` gives texts as
    arrays of `str`.
    """

    path: Path

    def variables(self) -> list[Variable]: ...
    def groups(self) -> list[str]: ...
    def attributes(self, name: str) -> dict[str, Any]: ...
    def check(self, name: str) -> None: ...
    def read(self, name: str, key: tuple[slice, ...]) -> NDArray[Any]: ...
    def close(self) -> None: ...


def open_container(path: Path) -> Container:
    """Open a file or folder of arrays.

    Raises:
        InputError: It is damaged, none of the three formats, or a Zarr folder that isn't read.
    """
    if path.is_dir():
        return _Zarr(path)
    with damage_named(path):
        with path.open("rb") as file:
            is_classic = file.read(3) == b"CDF"
        return _Classic(path) if is_classic else _Hdf5(path)


def is_zarr(path: Path) -> bool:
    """Is a folder the root of a Zarr array or group?"""
    return any((path / mark).is_file() for mark in ("zarr.json", ".zgroup", ".zarray"))


class _Hdf5:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = h5py.File(path, "r")

    def _items(self, kind: type) -> dict[str, Any]:
        found: dict[str, Any] = {}

        # Visits no links, which may lead to other files or in circles.
        def visit(name: str, item: Any) -> None:
            if isinstance(item, kind):
                found[name] = item

        self._file.visititems(visit)
        return found

    def variables(self) -> list[Variable]:
        items = {name: item for name, item in self._items(h5py.Dataset).items() if item.shape is not None}
        numbered = {
            int(np.ravel(item.attrs["_Netcdf4Dimid"])[0]): name
            for name, item in items.items()
            if item.is_scale and "_Netcdf4Dimid" in item.attrs
        }
        found = []
        for name, item in items.items():
            if text(item.attrs.get("NAME", "")).startswith(_NO_VARIABLE):
                continue
            attributes = {key: item.attrs[key] for key in _ATTRIBUTES if key in item.attrs}
            homes: tuple[str, ...]
            # Dimensions are scales attached to the axes; a scale is its own first dimension, and may number the others.
            if item.is_scale and item.ndim == 1:
                homes = (name,)
            elif item.is_scale and "_Netcdf4Coordinates" in item.attrs:
                homes = tuple(numbered.get(int(number), "?") for number in item.attrs["_Netcdf4Coordinates"])
            else:
                scales = [axis[len(axis) - 1].name if len(axis) else None for axis in item.dims]
                homes = tuple("?" if scale is None else str(scale).strip("/") for scale in scales)
            dims = tuple(home.rpartition("/")[2] for home in homes)
            place = name.replace(_NAMED_AS_DIMENSION, "")
            found.append(Variable(place, dims, item.shape, item.dtype, attributes, homes, item.chunks))
        return found

    def groups(self) -> list[str]:
        return list(self._items(h5py.Group))

    def _item(self, name: str) -> Any:
        group, slash, base = name.rpartition("/")
        hidden = f"{group}{slash}{_NAMED_AS_DIMENSION}{base}"
        return self._file[hidden if hidden in self._file else name or "/"]

    def attributes(self, name: str) -> dict[str, Any]:
        """Text and numbers: references and compounds mean nothing in another file."""
        plain = {}
        for key, value in self._item(name).attrs.items():
            array = np.asarray(value)
            texts = array.dtype.kind == "O" and all(isinstance(item, str) for item in array.ravel())
            if key not in _BOOKKEEPING and (texts or array.dtype.kind in "iufbSU" or isinstance(value, h5py.Empty)):
                plain[key] = value
        return plain

    def check(self, name: str) -> None:
        with damage_named(self.path):
            item = self._item(name)
            if item.dtype.kind in "SO":
                self.read(name, (slice(None),) * item.ndim)
            else:
                hdf5.check_variables(self.path, {name: item})
                hdf5.check_written(self.path, name, item)

    def read(self, name: str, key: tuple[slice, ...]) -> NDArray[Any]:
        item = self._item(name)
        return _texts(np.asarray(item[key])) if item.dtype.kind in "SO" else hdf5.read(item, *key)

    def close(self) -> None:
        self._file.close()


class _Classic:
    """netCDF-3, memory-mapped."""

    def __init__(self, path: Path) -> None:
        with formats_extra(path, "netCDF-3 files need scipy"):
            import scipy.io
        self.path = path
        with path.open("rb") as file:
            version = file.read(4)[3:]
        if version not in (b"\1", b"\2"):
            remedy = "convert it: nccopy -k nc4 IN OUT"
            raise InputError("netCDF of the format CDF-5, which is not read", path=path, remedy=remedy)
        self._file = scipy.io.netcdf_file(str(path), "r", mmap=True)

    def variables(self) -> list[Variable]:
        return [
            Variable(name, dims := tuple(v.dimensions), tuple(v.shape), v.data.dtype, dict(v._attributes), dims)
            for name, v in self._file.variables.items()
        ]

    def groups(self) -> list[str]:
        return []

    def attributes(self, name: str) -> dict[str, Any]:
        return dict((self._file.variables[name] if name else self._file)._attributes)

    def check(self, name: str) -> None:
        """scipy has compared all sizes with the file's when it opened it."""

    def read(self, name: str, key: tuple[slice, ...]) -> NDArray[Any]:
        return np.array(self._file.variables[name].data[key])

    def close(self) -> None:
        self._file.close()


class _Zarr:
    """Versions 2 and 3."""

    def __init__(self, path: Path) -> None:
        self.path = path
        zarrs.check_folder(path)
        self._arrays: dict[str, Any] = {}
        self._groups: dict[str, Any] = {}
        with damage_named(path, *_ZARR_DAMAGE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a file beside the arrays is none
            # Consolidated metadata could name codecs that were not checked.
            if zarrs.is_array(path):
                self._arrays[path.stem] = zarr.open_array(path, mode="r")
                return
            self._groups[""] = root = zarr.open_group(path, mode="r", use_consolidated=False)
            # Zarr lists them in any order.
            for name, item in sorted(root.members(max_depth=None)):
                (self._arrays if isinstance(item, zarr.Array) else self._groups)[name] = item

    def variables(self) -> list[Variable]:
        dims: dict[str, tuple[str, ...]] = {}
        sizes: dict[str, set[int]] = {}
        groups: dict[str, list[str]] = {}
        for name, array in self._arrays.items():
            named: Any = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
            if not isinstance(named, list | tuple) or len(named) != array.ndim:
                named = [None] * array.ndim
            dims[name] = tuple("?" if dim is None else str(dim) for dim in named)
            for dim, size in zip(dims[name], array.shape, strict=True):
                sizes.setdefault(dim, set()).add(size)
                groups.setdefault(dim, []).append("/" + name.rpartition("/")[0])
        shared = {dim: os.path.commonpath(groups[dim]) for dim in groups if len(sizes[dim]) == 1}
        found = []
        for name, array in self._arrays.items():
            own = name.rpartition("/")[0]
            homes = tuple("?" if dim == "?" else f"{shared.get(dim, own)}/{dim}".strip("/") for dim in dims[name])
            packing = {key: value for key, value in self.attributes(name).items() if key in _ATTRIBUTES}
            dtype = np.dtype(array.dtype)
            found.append(Variable(name, dims[name], array.shape, dtype, packing, homes, array.chunks))
        return found

    def groups(self) -> list[str]:
        return [name for name in self._groups if name]

    def attributes(self, name: str) -> dict[str, Any]:
        """As in netCDF. Where they hold the dimensions in version 2, `fill_value` is the _FillValue."""
        array = self._arrays.get(name)
        item = self._groups.get(name) if array is None else array
        attributes = {key: value for key, value in dict(item.attrs if item else {}).items() if key not in _BOOKKEEPING}
        if array is None:
            return attributes
        if array.metadata.zarr_format == 2 and "_ARRAY_DIMENSIONS" in array.attrs and array.fill_value is not None:
            attributes.setdefault("_FillValue", array.fill_value)
        fill = attributes.get("_FillValue")
        if isinstance(fill, str) and np.dtype(array.dtype).kind == "f":
            # In Zarr 3, xarray writes a float's eight bytes in base64.
            try:
                attributes["_FillValue"] = struct.unpack("<d", base64.b64decode(fill, validate=True))[0]
            except (ValueError, struct.error):
                attributes["_FillValue"] = float("nan") if fill == "NaN" else fill
        return attributes

    def check(self, name: str) -> None:
        """Zarr reads a chunk that is not there as its fill value, lost or never written."""
        array = self._arrays[name]
        if getattr(array, "shards", None) is not None:
            problem = "is sharded, and zarr does not tell which chunks of a shard are there"
            raise InputError(problem, key=name, path=self.path, remedy="write it without shards")
        chunk_bytes = math.prod(array.chunks) * np.dtype(array.dtype).itemsize
        if chunk_bytes > MAX_CHUNK_BYTES:
            limit = f"at most {MAX_CHUNK_BYTES} bytes"
            raise InputError(f"a chunk has {chunk_bytes} bytes", key=name, path=self.path, limit=limit)
        with damage_named(self.path, *_ZARR_DAMAGE):
            missing = array.nchunks - array.nchunks_initialized
        if missing:
            problem = f"{missing} of {array.nchunks} chunks are missing, lost or never written"
            remedy = "fetch it again, or write all of them (zarr: write_empty_chunks=True)"
            raise InputError(problem, key=name, path=self.path, remedy=remedy)

    def read(self, name: str, key: tuple[slice, ...]) -> NDArray[Any]:
        with damage_named(self.path, *_ZARR_DAMAGE):
            return _texts(np.asarray(self._arrays[name][key]))

    def close(self) -> None:
        pass


def _texts(values: NDArray[Any]) -> NDArray[Any]:
    """Texts of any library as an array of `str`; numbers and single characters as they are."""
    if values.dtype.kind not in "SUTO" or values.dtype == "S1":
        return values
    texts = np.empty(values.shape, dtype=object)
    for index, value in np.ndenumerate(values):
        texts[index] = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
    return texts
