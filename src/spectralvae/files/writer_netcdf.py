"""New netCDF-4 files."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5netcdf
import h5py
import numpy as np
from numpy.typing import NDArray

from spectralvae.files.writer_base import Key, Writer, join, pieces, stored_dtype
from spectralvae.readers import hdf5

# Measured on radiance: a higher level takes longer and saves nothing, for deflate finds little in noise.
_DEFLATE_LEVEL = 1
_MOST_THREADS = 8


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


class NetcdfWriter(Writer):
    """netCDF-4: deflate, shuffle and Fletcher-32 checksums, by several threads for whole chunks."""

    def __init__(self, path: Path, thread: ThreadPoolExecutor) -> None:
        super().__init__(path, thread)
        self._sink: _Sink | None = None
        self._hdf5: Any = None
        self._file: Any = None
        self._variables: dict[str, Any] = {}
        self._packers = ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0))), "packer")

    def _open(self) -> None:
        self._sink = _Sink(self._path, "w+")
        self._hdf5 = h5py.File(self._sink, "w", track_order=True)
        self._file = h5netcdf.File(self._hdf5, "w")

    def _do(self, function: Callable[[], None]) -> None:
        try:
            function()
        finally:
            # Comes first, for HDF5 may not find again what was not written.
            if self._sink is not None and self._sink.error is not None:
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
        hidden = join(group, f"_nc4_non_coord_{name}")  # where a dimension along which it isn't has its name
        self._variables[place] = self._hdf5[hidden if hidden in self._hdf5 else place]

    def _write(self, place: str, key: Key, values: Any) -> None:
        variable = self._variables[place]
        if not variable.chunks:
            variable[key] = values
            return
        parts = list(pieces(key, variable))
        whole = [part for part in parts if _is_chunk(part[0], variable)]
        packed = self._packers.map(lambda part: self._pack(variable, values[part[1]]), whole)
        for (inside, _), content in zip(whole, packed, strict=True):
            variable.id.write_direct_chunk(tuple(axis.start for axis in inside), content)
        for inside, here in parts:
            if not _is_chunk(inside, variable):
                variable[inside] = values[here]

    @staticmethod
    def _pack(variable: Any, values: NDArray[Any]) -> bytes:
        chunk = np.empty(variable.chunks, variable.dtype)
        if values.shape != chunk.shape:  # at the edge
            chunk[...] = variable.fillvalue
        chunk[tuple(slice(0, n) for n in values.shape)] = values
        return hdf5.pack_chunk(chunk, _DEFLATE_LEVEL)

    def _close(self, complete: bool) -> None:
        self._packers.shutdown(cancel_futures=True)
        if self._sink is None:
            return
        self._sink.discards |= not complete
        self._variables.clear()
        for file in (self._file, self._hdf5):
            if file is not None:
                file.close()
        if not self._sink.discards:
            os.fsync(self._sink.fileno())
        self._sink.close()
        if complete and self._sink.error is not None:
            raise self._sink.error


def _is_chunk(part: Key, variable: Any) -> bool:
    """Is a part within a chunk all of it that lies in the variable?"""
    return all(
        axis.start % chunk == 0 and axis.stop == min(axis.start + chunk, size)
        for axis, chunk, size in zip(part, variable.chunks, variable.shape, strict=True)
    )
