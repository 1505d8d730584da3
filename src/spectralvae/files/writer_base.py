"""What writers of every format have in common.

Places are "name" or "group/name", "" is the root.
"""

from __future__ import annotations

import itertools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np

Key = tuple[slice, ...]

CHUNK_BYTES = 2**20

_NETCDF_DTYPES = {"i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8", "S1"}


class Writer(ABC):
    """A new file of arrays.

    Places are "name" or "group/name", "" is the root; a group and those above it are made when they are first named.
    A variable's dimensions are given by name, and are those of its own group or else of the nearest one above it.

    Args:
        path: What is written.
        thread: In which all of it is written, for there no signal interrupts a library.

    Attributes:
        dimensions: The size of each, by its place.
    """

    def __init__(self, path: Path, thread: ThreadPoolExecutor) -> None:
        self._path = path
        self._thread = thread
        self.dimensions: dict[str, int] = {}
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
        if values.dtype.kind == "U":
            values = values.astype(object)
        self.finish()
        self._under_way = self._thread.submit(self._do, lambda: self._write(place, key, values))

    def open(self) -> None:
        """Make the file, with nothing in it."""
        self._call(self._open)

    def close(self, complete: bool) -> None:
        """Close the file; where it isn't complete it is going to be deleted, and nothing more is written."""
        self._thread.submit(self._close, complete).result()

    def finish(self) -> None:
        """Wait until all that was given is written."""
        if self._under_way is not None:
            self._under_way.result()

    def _call(self, function: Callable[[], None]) -> None:
        self.finish()
        self._thread.submit(self._do, function).result()

    def _do(self, function: Callable[[], None]) -> None:
        function()

    @abstractmethod
    def _open(self) -> None: ...
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
    def _close(self, complete: bool) -> None: ...


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
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):  # of bytes that are not numpy's h5py makes texts
        return np.bytes_(value) if value else h5py.Empty("S1")
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
    if h5py.check_enum_dtype(dtype) is not None:
        return None
    wider = {"b": "i1", "f2": "f4"}
    plain = wider.get(dtype.kind) or wider.get(dtype.str[1:]) or dtype.str[1:]
    return np.dtype(plain).str[1:] if plain in _NETCDF_DTYPES else None


def pieces(key: Key, array: Any) -> Iterator[tuple[Key, Key]]:
    """Cut a part of an array at its chunks: where each piece lies in the array, and where in the part."""
    axes = []
    for part, size, chunk in zip(key, array.shape, array.chunks, strict=True):
        start, stop, _ = part.indices(size)
        edges = [start, *range(start - start % chunk + chunk, stop, chunk), stop]
        axes.append([(slice(a, b), slice(a - start, b - start)) for a, b in itertools.pairwise(edges) if a < b])
    for pieces in itertools.product(*axes):
        yield tuple(inside for inside, _ in pieces), tuple(here for _, here in pieces)
