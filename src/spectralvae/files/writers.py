"""New netCDF-4 files and Zarr folders behind one interface: whole under their name, or not there at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from spectralvae.files.writer_base import Writer
from spectralvae.files.writer_netcdf import NetcdfWriter
from spectralvae.files.writer_zarr import ZarrWriter
from spectralvae.runtime.atomic import room_for

__all__ = ["Writer", "new_file"]


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
                writer: Writer = (NetcdfWriter if kind == "netcdf" else ZarrWriter)(temporary, thread)
                complete = False
                try:
                    writer.open()
                    yield writer
                    writer.finish()
                    complete = True
                finally:
                    writer.close(complete)
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
