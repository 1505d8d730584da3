"""z of a whole scene in a file that has no name: read several times over, and gone with the process."""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from spectralvae.runtime.atomic import room_for

BAND_SAMPLES = 8_000_000  # of rows that are worked on at a time: 32 MB of float32

Float32 = NDArray[np.float32]


def bands(shape: tuple[int, int, int]) -> Iterator[slice]:
    """Rows of a scene (ny, nx, nc) from the top to the bottom, some at a time."""
    ny, nx, nc = shape
    height = max(1, BAND_SAMPLES // (nx * nc))
    for top in range(0, ny, height):
        yield slice(top, min(top + height, ny))


class Scratch:
    """(ny, nx, nc) float32, on disk.

    Args:
        folder: where the file lies.
        shape: (ny, nx, nc).

    Attributes:
        folder, shape: as given.

    Raises:
        NoRoomError: there is no room for it.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.folder = folder
        self._n_bytes = 4 * math.prod(shape)
        with room_for(folder / "temporary file", self._n_bytes):
            if shutil.disk_usage(folder).free < self._n_bytes:  # before hours of work
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".scene-", buffering=0)  # noqa: SIM115 (see __exit__)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, rows: slice, columns: slice, values: Float32) -> None:
        """Write a part.

        Args:
            rows, columns: where it lies.
            values: (rows, columns, nc).
        """
        _, nx, nc = self.shape
        values = np.ascontiguousarray(values, np.float32)
        parts = [values] if columns == slice(0, nx) else list(values)  # whole rows lie one after the other
        with room_for(self.folder / "temporary file", self._n_bytes):
            for i, part in enumerate(parts):
                self._write_all(part, 4 * nc * ((rows.start + i) * nx + columns.start))

    def _write_all(self, values: Float32, offset: int) -> None:
        view = values.data.cast("B")
        while view:
            n = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[n:], offset + n

    def read(self, rows: slice, columns: slice | None = None) -> Float32:
        """(rows, columns, nc), of all columns if none are given."""
        _, nx, nc = self.shape
        if columns is None or columns == slice(0, nx):
            values = np.empty((rows.stop - rows.start, nx, nc), np.float32)
            self._read_all(values, 4 * nc * nx * rows.start)
            return values
        values = np.empty((rows.stop - rows.start, columns.stop - columns.start, nc), np.float32)
        for i, part in enumerate(values):
            self._read_all(part, 4 * nc * ((rows.start + i) * nx + columns.start))
        return values

    def _read_all(self, values: Float32, offset: int) -> None:
        view = values.data.cast("B")
        while view:
            n = os.preadv(self._file.fileno(), [view], offset)
            assert n, "read beyond what was written"
            view, offset = view[n:], offset + n
