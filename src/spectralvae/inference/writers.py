"""New netCDF-4 files and Zarr folders behind one interface: whole under their name, or not there at all.

Libraries run in a thread of their own, where no signal interrupts them.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import os
import shutil
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import h5netcdf
import h5py
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from spectralvae.data.store_writer import group_json
from spectralvae.rundir import room_for

Key = tuple[slice, ...]

CHUNK_BYTES = 2**20

# Measured on radiance: a higher level takes longer and saves little, for deflate finds little in noise.
_DEFLATE_LEVEL = 1
_ZSTD_LEVEL = 1

_NETCDF_DTYPES = {"i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8", "S1"}


class Writer(ABC):
    """A new file of arrays.

    Places are "name" or "group/name", "" is the root; a group and those above it are made when they are first named.
    A variable's dimensions are given by name, and are those of its own group or else of the nearest one above it.

    Attributes:
        dimensions: The size of each, by its place.
    """

    def __init__(self) -> None:
        self.dimensions: dict[str, int] = {}
        self._thread: ThreadPoolExecutor
        self._under_way: Future[None] | None = None

    def group(self, place: str, attributes: Mapping[str, Any]) -> None:
        """Add attributes to a group: texts, bytes, numbers, and vectors of one of these; anything else as JSON."""
        self._call(lambda: self._group(place, {key: attribute(value) for key, value in attributes.items()}))

    def dimension(self, place: str, size: int) -> None:
        """Make a dimension of a group."""
        assert place not in self.dimensions, f"dimension {place} exists"
        self._call(lambda: self._dimension(place, size))
        self.dimensions[place] = size

    def create(
        self,
        place: str,
        dims: tuple[str, ...],
        dtype: np.dtype[Any] | type | str,
        attributes: Mapping[str, Any],
        *,
        fill: Any = None,
        chunks: tuple[int, ...] | None = None,
        values: Any = None,
    ) -> None:
        """Make a variable.

        Args:
            place: Where.
            dims: Names of its dimensions; none for a scalar.
            dtype: Of numbers, or "str" for texts, or "S1" for single characters.
            attributes: As of a group; `_FillValue` is none of them, but `fill`.
            fill: What stands for a missing value; None declares none.
            chunks: What is stored together; None for `row_chunks` of the first axis.
            values: All of it; None where `write` follows.
        """
        assert "_FillValue" not in attributes, f"{place}: give fill"
        shape = tuple(self.dimensions[home_of(self.dimensions, place.rpartition("/")[0], dim)] for dim in dims)
        dtype = np.dtype(object) if dtype in (str, "str") else np.dtype(dtype).newbyteorder("=")
        if chunks is None:
            chunks = row_chunks(shape, dtype.itemsize)
        plain = {key: attribute(value) for key, value in attributes.items()}
        self._call(lambda: self._create(place, dims, shape, dtype, plain, fill, chunks))
        if values is not None:
            self.write(place, (slice(None),) * len(shape), values)

    def write(self, place: str, key: Key, values: Any) -> None:
        """Write a part of a variable, while the caller goes on; what goes wrong is told at the next call.

        Args:
            place: Of the variable.
            key: A slice of each axis; () for a scalar.
            values: Of the part's shape; they are copied.
        """
        values = np.array(values)
        self.finish()
        self._under_way = self._thread.submit(self._write, place, key, values)

    def finish(self) -> None:
        """Wait until all that was given is written."""
        if self._under_way is not None:
            self._under_way.result()

    def _call(self, function: Callable[[], None]) -> None:
        self.finish()
        self._thread.submit(function).result()

    @abstractmethod
    def _group(self, place: str, attributes: Mapping[str, Any]) -> None: ...
    @abstractmethod
    def _dimension(self, place: str, size: int) -> None: ...
    @abstractmethod
    def _create(
        self,
        place: str,
        dims: tuple[str, ...],
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        attributes: Mapping[str, Any],
        fill: Any,
        chunks: tuple[int, ...],
    ) -> None: ...
    @abstractmethod
    def _write(self, place: str, key: Key, values: Any) -> None: ...
    @abstractmethod
    def _close(self, complete: bool) -> None:
        """Close the file; where it isn't complete it will be deleted."""


@contextmanager
def new_file(path: Path, kind: Literal["netcdf", "zarr"]) -> Iterator[Writer]:
    """Write a file, or a folder, that appears under its name once the block is left without error.

    What stood there is then replaced. While it is written it is ".NAME.part" beside it, which is deleted however the
    block is left; what a killed process left of it is replaced by the next try.

    Args:
        path: A file (netCDF-4) or folder (Zarr, version 3) in an existing folder.
        kind: Which of them.

    Yields:
        The writer.

    Raises:
        NoRoomError: The disk is full.
    """
    temporary, before = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    with room_for(path):
        try:
            _remove(temporary)
            # Left only when nothing is under way any more, also after a signal.
            with ThreadPoolExecutor(1, "writer") as thread:
                writer: Writer = _Netcdf(temporary) if kind == "netcdf" else _Zarr(temporary)
                writer._thread = thread
                complete = False
                try:
                    yield writer
                    writer.finish()
                    complete = True
                finally:
                    thread.submit(writer._close, complete).result()
            if path.is_dir():  # a folder cannot be renamed onto another one
                _remove(before)
                path.rename(before)
            temporary.replace(path)
        finally:
            _remove(temporary)
            _remove(before)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def join(group: str, name: str) -> str:
    """The place of a name in a group."""
    return f"{group}/{name}" if group else name


def home_of(dimensions: Mapping[str, int], group: str, name: str) -> str:
    """The place of the dimension that a name means to a variable of a group: in that group, or the nearest above."""
    groups = [group]
    while groups[-1]:
        groups.append(groups[-1].rpartition("/")[0])
    return next(place for place in (join(above, name) for above in groups) if place in dimensions)


def row_chunks(shape: tuple[int, ...], itemsize: int, row: int = 0, column: int | None = None) -> tuple[int, ...]:
    """Chunks that are whole when rows are written one after the other, at most `CHUNK_BYTES` each if they can be.

    Args:
        shape: Of the variable.
        itemsize: Bytes of a number.
        row: The axis that is written piece by piece.
        column: The axis to cut where a row is too large: by powers of two, so that panels of columns fit; None for
            the longest.
    """
    if math.prod(shape) * itemsize <= CHUNK_BYTES:
        return tuple(max(1, n) for n in shape)
    chunks = [max(1, n) for n in shape]
    chunks[row] = 1
    if math.prod(chunks) * itemsize > CHUNK_BYTES:
        cut = int(np.argmax(chunks)) if column is None else column
        fitting = CHUNK_BYTES * chunks[cut] // (math.prod(chunks) * itemsize)
        chunks[cut] = min(chunks[cut], 2 ** max(0, fitting.bit_length() - 1))
    return tuple(chunks)


def attribute(value: Any) -> Any:
    """An attribute as netCDF can hold it: a text, bytes, or empty, or a vector of texts or of numbers.

    Numbers and truths become vectors of one, and whatever netCDF has no type for its JSON.
    """
    if isinstance(value, h5py.Empty):
        return value if value.dtype.kind == "S" else ""
    if isinstance(value, str | bytes):
        return value
    try:
        array = np.atleast_1d(value).ravel()
    except ValueError:  # a list of lists of several lengths
        return json.dumps(value)
    if array.dtype.kind in "UO" and all(isinstance(item, str) for item in array.tolist()):
        return array.astype(object) if array.size else ""
    if array.dtype.kind == "S":
        return array
    dtype = stored_dtype(array.dtype) if array.dtype.kind in "biuf" else None
    return json.dumps(value, default=str) if dtype is None else array.astype(dtype)


def stored_dtype(dtype: np.dtype[Any]) -> str | None:
    """What netCDF-4 has for a type of numpy, h5py or zarr: as numpy has it, "f4" say, "str" for texts, or None."""
    if dtype.kind in "TU" or (dtype.kind == "S" and dtype.itemsize != 1):
        return "str"
    if dtype.kind == "O":
        holds_texts = h5py.check_vlen_dtype(dtype) in (None, str, bytes) and h5py.check_ref_dtype(dtype) is None
        return "str" if holds_texts else None
    wider = {"b": "i1", "f2": "f4"}
    plain = wider.get(dtype.kind) or wider.get(dtype.str[1:]) or dtype.str[1:]
    return np.dtype(plain).str[1:] if plain in _NETCDF_DTYPES else None


class _Sink(io.FileIO):
    """A file for HDF5 that never fails: HDF5 cannot close a file that it cannot write, and crashes in the end.

    Attributes:
        error: The first thing that went wrong.
        discards: Nothing more is written.
    """

    error: OSError | None = None
    discards = False

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        size = view.nbytes
        try:
            while view and not self.discards:
                view = view[super().write(view) :]
        except OSError as error:
            self.error, self.discards = error, True
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            if not self.discards:
                super().truncate(size)
        except OSError as error:
            self.error, self.discards = error, True
        return size or 0


class _Netcdf(Writer):
    """netCDF-4: deflate, shuffle and Fletcher-32 checksums, by several threads for whole chunks."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._sink = _Sink(path, "w+")
        self._hdf5 = h5py.File(self._sink, "w", track_order=True)
        self._file = h5netcdf.File(self._hdf5, "w")
        self._variables: dict[str, Any] = {}
        self._packers = ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0))), "packer")

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            # Comes first, for HDF5 may not find again what was not written.
            if self._sink.error is not None:
                raise self._sink.error

    def _call(self, function: Callable[[], None]) -> None:
        try:
            super()._call(function)
        finally:
            if self._sink.error is not None:
                raise self._sink.error

    def _of(self, group: str) -> Any:
        found = self._file
        for name in filter(None, group.split("/")):
            found = found.groups[name] if name in found.groups else found.create_group(name)
        return found

    def _group(self, place: str, attributes: Mapping[str, Any]) -> None:
        self._of(place).attrs.update(attributes)

    def _dimension(self, place: str, size: int) -> None:
        group, _, name = place.rpartition("/")
        self._of(group).dimensions[name] = size

    def _create(
        self,
        place: str,
        dims: tuple[str, ...],
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        attributes: Mapping[str, Any],
        fill: Any,
        chunks: tuple[int, ...],
    ) -> None:
        group, _, name = place.rpartition("/")
        more: dict[str, Any] = {}
        if dtype.kind == "O":
            more["dtype"] = h5py.string_dtype()
        else:
            assert stored_dtype(dtype) == dtype.str[1:], f"{place}: netCDF has no {dtype}"
            more["dtype"] = dtype
            if shape:
                more |= {"chunks": chunks, "shuffle": True, "fletcher32": True}
                more |= {"compression": "gzip", "compression_opts": _DEFLATE_LEVEL}
        variable = self._of(group).create_variable(name, dims, fillvalue=fill, **more)
        variable.attrs.update(attributes)
        self._variables[place] = variable

    def _write(self, place: str, key: Key, values: Any) -> None:
        self._variables[place][key or ...] = values

    def _close(self, complete: bool) -> None:
        self._sink.discards |= not complete
        self._variables.clear()
        self._file.close()
        if not self._sink.discards:
            os.fsync(self._sink.fileno())
        self._sink.close()
        if complete and self._sink.error is not None:
            raise self._sink.error


class _Zarr(Writer):
    """Zarr 3: zstd and CRC-32C checksums; all metadata at the root, too."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._root = zarr.create_group(path, zarr_format=3)
        self._arrays: dict[str, Any] = {}

    def _group(self, place: str, attributes: Mapping[str, Any]) -> None:
        group = self._root.require_group(place) if place else self._root
        group.update_attributes({key: _json_value(value) for key, value in attributes.items()})

    def _dimension(self, place: str, size: int) -> None:
        """They are of arrays here."""

    def _create(
        self,
        place: str,
        dims: tuple[str, ...],
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        attributes: Mapping[str, Any],
        fill: Any,
        chunks: tuple[int, ...],
    ) -> None:
        texts = dtype.kind == "O"
        described = {key: _json_value(value) for key, value in attributes.items()}
        if fill is not None:
            described["_FillValue"] = _encode_fill(fill, dtype)
        self._arrays[place] = self._root.create_array(
            place,
            shape=shape,
            chunks=chunks,
            dtype=str if texts else dtype,
            fill_value="" if texts else dtype.type(0 if fill is None else fill),
            compressors=[ZstdCodec(level=_ZSTD_LEVEL), Crc32cCodec()],
            dimension_names=dims,
            attributes=described,
            config={"write_empty_chunks": True},  # a reader cannot tell what is lost from what is empty
        )

    def _write(self, place: str, key: Key, values: Any) -> None:
        array = self._arrays[place]
        values = np.asarray(values)
        # One by one, for of several that zarr writes at once some go on after one has failed.
        axes = [_by_chunk(*part) for part in zip(key, array.shape, array.chunks, strict=True)]
        for pieces in itertools.product(*axes):
            inside, here = zip(*pieces, strict=True) if pieces else ((), ())
            array[inside or ...] = values[here]

    def _close(self, complete: bool) -> None:
        if not complete:
            return
        root = self._path / "zarr.json"
        attributes = json.loads(root.read_text())["attributes"]
        root.write_text(group_json(self._path, attributes))
        os.sync()  # zarr doesn't wait for the disk


def _by_chunk(part: slice, size: int, chunk: int) -> list[tuple[slice, slice]]:
    """Cut a slice of an axis at its chunks: where each piece lies in the array, and where in the values."""
    start, stop, _ = part.indices(size)
    edges = [start, *range(start - start % chunk + chunk, stop, chunk), stop]
    return [(slice(a, b), slice(a - start, b - start)) for a, b in itertools.pairwise(edges) if a < b]


def _json_value(value: Any) -> Any:
    if isinstance(value, h5py.Empty):
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    items = [item.decode("utf-8", "replace") if isinstance(item, bytes) else item for item in np.ravel(value).tolist()]
    return items[0] if len(items) == 1 else items


def _encode_fill(fill: Any, dtype: np.dtype[Any]) -> Any:
    """A _FillValue as xarray has it in Zarr 3."""
    if dtype.kind == "f":
        return base64.standard_b64encode(struct.pack("<d", float(dtype.type(fill)))).decode()
    return fill if dtype.kind == "O" else int(fill)
