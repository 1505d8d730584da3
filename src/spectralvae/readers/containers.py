"""Files and folders of named arrays: HDF5 (and netCDF-4), netCDF-3 classic, and Zarr, all behind one interface.

Through h5py, scipy and zarr themselves: xarray opens no Zarr array whose dimensions have no names, and takes the size
of an HDF5 array from dimensions that it finds by name, whatever the array's own is.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import zarr
from numpy.typing import NDArray

from spectralvae.errors import InputError
from spectralvae.readers import hdf5
from spectralvae.readers.base import damage_named
from spectralvae.readers.hdf5 import MAX_CHUNK_BYTES
from spectralvae.readers.packing import NUMERIC_ATTRIBUTES

_ATTRIBUTES = (*NUMERIC_ATTRIBUTES, "units", "_Unsigned")

# Codecs that compress or reorder numbers. Others may run code of the file's author: pickle does.
_CODECS = {
    *("blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd"),
    *("bitround", "delta", "fixedscaleoffset", "quantize", "shuffle"),
    *("adler32", "crc32", "crc32c", "fletcher32"),
    *("bytes", "sharding_indexed", "transpose", "vlen-bytes", "vlen-utf8"),
}
# What zarr raises over chunks of size 0, and blosc over damaged headers.
_ZARR_DAMAGE = (ArithmeticError, SystemError)

_PLAIN_DTYPE = re.compile(r"[<>|=]?[biufcSUmM]\d*(\[\d*\w+\])?")


@dataclass(frozen=True)
class Variable:
    """An array of a file, without its numbers.

    Attributes:
        name: "name" or "group/name".
        dims: A name for each axis; "?" where it has none.
        attrs: Those that tell fills, packing and units.
        chunks: Sizes that are stored together, None where the array isn't chunked.
    """

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    attrs: Mapping[str, Any]
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

    `check` is asked once, when a file is tried out, whether all of an array is there and sound.
    """

    def variables(self) -> list[Variable]: ...
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
        self._path = path
        self._file = h5py.File(path, "r")

    def variables(self) -> list[Variable]:
        found: list[Variable] = []

        # Visits no links, which may lead to other files or in circles.
        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset) and item.shape is not None:
                attributes = {key: item.attrs[key] for key in _ATTRIBUTES if key in item.attrs}
                found.append(Variable(name, self._dims(name, item), item.shape, item.dtype, attributes, item.chunks))

        self._file.visititems(visit)
        return found

    @staticmethod
    def _dims(name: str, item: Any) -> tuple[str, ...]:
        """Dimensions are scales attached to the axes; a scale is its own dimension."""
        if item.ndim == 1 and item.is_scale:
            return (name.rpartition("/")[2],)
        scales = [axis[len(axis) - 1].name if len(axis) else None for axis in item.dims]
        return tuple("?" if scale is None else str(scale).rpartition("/")[2] for scale in scales)

    def check(self, name: str) -> None:
        with damage_named(self._path):
            hdf5.check_variables(self._path, {name: self._file[name]})
            hdf5.check_written(self._path, name, self._file[name])

    def read(self, name: str, key: tuple[slice, ...]) -> NDArray[Any]:
        return hdf5.read(self._file[name], *key)

    def close(self) -> None:
        self._file.close()


class _Classic:
    """netCDF-3, memory-mapped."""

    def __init__(self, path: Path) -> None:
        try:
            import scipy.io
        except ImportError as error:
            raise InputError(
                f'{path}: netCDF-3 files need scipy; install it: pip install "spectralvae[formats]"'
            ) from error
        with path.open("rb") as file:
            version = file.read(4)[3:]
        if version not in (b"\1", b"\2"):
            raise InputError(f"{path}: netCDF of the format CDF-5, which is not read; convert it: nccopy -k nc4 IN OUT")
        self._file = scipy.io.netcdf_file(str(path), "r", mmap=True)

    def variables(self) -> list[Variable]:
        return [
            Variable(name, tuple(v.dimensions), tuple(v.shape), v.data.dtype, dict(v._attributes))
            for name, v in self._file.variables.items()
        ]

    def check(self, name: str) -> None:
        """scipy has compared all sizes with the file's when it opened it."""

    def read(self, name: str, key: tuple[slice, ...]) -> NDArray[Any]:
        return np.array(self._file.variables[name].data[key])

    def close(self) -> None:
        self._file.close()


class _Zarr:
    """Versions 2 and 3."""

    def __init__(self, path: Path) -> None:
        self._path = path
        _check_folder(path)
        with damage_named(path, *_ZARR_DAMAGE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a file beside the arrays is none
            # Consolidated metadata could name codecs that were not checked.
            if _is_array(path):
                self._arrays: dict[str, Any] = {path.stem: zarr.open_array(path, mode="r")}
            else:
                members = zarr.open_group(path, mode="r", use_consolidated=False).members(max_depth=None)
                # Zarr lists them in any order.
                self._arrays = {name: item for name, item in sorted(members) if isinstance(item, zarr.Array)}

    def variables(self) -> list[Variable]:
        return [
            Variable(name, self._dims(a), a.shape, np.dtype(a.dtype), self._attributes(a), a.chunks)
            for name, a in self._arrays.items()
        ]

    @staticmethod
    def _dims(array: Any) -> tuple[str, ...]:
        named: Any = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
        if not isinstance(named, list | tuple) or len(named) != array.ndim:
            return ("?",) * len(array.shape)
        return tuple("?" if name is None else str(name) for name in named)

    @staticmethod
    def _attributes(array: Any) -> dict[str, Any]:
        """Attributes as in netCDF. Where they hold the dimensions in version 2, `fill_value` is the _FillValue."""
        attributes = {key: array.attrs[key] for key in _ATTRIBUTES if key in array.attrs}
        if array.metadata.zarr_format == 2 and "_ARRAY_DIMENSIONS" in array.attrs and array.fill_value is not None:
            attributes.setdefault("_FillValue", array.fill_value)
        fill = attributes.get("_FillValue")
        if isinstance(fill, str) and np.dtype(array.dtype).kind == "f":
            attributes["_FillValue"] = _float(fill)
        return attributes

    def check(self, name: str) -> None:
        """Zarr reads a chunk that is not there as its fill value, lost or never written."""
        array = self._arrays[name]
        if getattr(array, "shards", None) is not None:
            raise InputError(
                f"{self._path}: {name} is sharded, and zarr doesn't tell which chunks of a shard are there; write it"
                " without shards"
            )
        chunk_bytes = math.prod(array.chunks) * np.dtype(array.dtype).itemsize
        if chunk_bytes > MAX_CHUNK_BYTES:
            raise InputError(
                f"{self._path}: a chunk of {name} has {chunk_bytes} bytes; at most {MAX_CHUNK_BYTES} are read: write"
                " smaller chunks"
            )
        with damage_named(self._path, *_ZARR_DAMAGE):
            missing = array.nchunks - array.nchunks_initialized
        if missing:
            raise InputError(
                f"{self._path}: {missing} of {array.nchunks} chunks of {name} are not there, lost or never written;"
                " fetch it again, or write all of them (zarr: write_empty_chunks=True)"
            )

    def read(self, name: str, key: tuple[slice, ...]) -> NDArray[Any]:
        with damage_named(self._path, *_ZARR_DAMAGE):
            return np.asarray(self._arrays[name][key])

    def close(self) -> None:
        pass


def _float(fill: str) -> Any:
    """A float's _FillValue in Zarr 3: xarray writes its eight bytes in base64. Other texts come back as they are."""
    try:
        return struct.unpack("<d", base64.b64decode(fill, validate=True))[0]
    except (ValueError, struct.error):
        return float("nan") if fill == "NaN" else fill


def _is_array(path: Path) -> bool:
    if (path / ".zarray").is_file():
        return True
    mark = path / "zarr.json"
    return mark.is_file() and _metadata(mark).get("node_type") == "array"


def _check_folder(path: Path) -> None:
    """Refuse a Zarr folder that could run code or lead elsewhere, before zarr opens it.

    Raises:
        InputError: It holds links or special files, or metadata with codecs or dtypes that aren't read.
    """
    for entry in _entries(path):
        if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
            raise InputError(
                f"{path}: {entry.path} is a link or no regular file, which no Zarr folder holds; remove it"
            )
        if entry.name in ("zarr.json", ".zarray"):
            with damage_named(path):
                problem = next(_problems(_metadata(Path(entry.path))), None)
            if problem:
                raise InputError(
                    f"{path}: {entry.path} has {problem}, which is not read; write it with zarr's defaults"
                )


def _entries(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    with damage_named(Path(folder)), os.scandir(folder) as entries:
        listed = list(entries)
    for entry in listed:
        yield entry
        if entry.is_dir(follow_symlinks=False):
            yield from _entries(entry.path)


def _metadata(path: Path) -> dict[str, Any]:
    with damage_named(path):
        content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise InputError(f"{path}: damaged: no metadata of Zarr; fetch it again")
    return content


def _problems(metadata: dict[str, Any]) -> Iterator[str]:
    """What in an array's metadata isn't read: codecs out of the list, and dtypes of Python objects."""
    for codec in _codecs(metadata):
        name = codec.get("id", codec.get("name")) if isinstance(codec, dict) else codec
        if name not in _CODECS:
            yield f"the codec {name!r}"
        for key in ("dtype", "astype"):
            if isinstance(codec, dict) and key in codec and not _PLAIN_DTYPE.fullmatch(str(codec[key])):
                yield f"a codec for {codec[key]!r}"
    if metadata.get("zarr_format") == 2 and "dtype" in metadata and not _PLAIN_DTYPE.fullmatch(str(metadata["dtype"])):
        texts = any(isinstance(f, dict) and f.get("id") == "vlen-utf8" for f in metadata.get("filters") or ())
        if not (metadata["dtype"] == "|O" and texts):
            yield f"the dtype {metadata['dtype']!r}"


def _codecs(metadata: dict[str, Any]) -> Iterator[Any]:
    """All codecs of an array, those inside of shards, too."""
    yield from (codec for codec in (metadata.get("compressor"), *(metadata.get("filters") or ())) if codec)
    for key in ("codecs", "index_codecs"):
        for codec in metadata.get(key) or ():
            yield codec
            if isinstance(codec, dict) and isinstance(codec.get("configuration"), dict):
                yield from _codecs(codec["configuration"])
