"""New Zarr folders, version 3."""

from __future__ import annotations

import base64
import json
import os
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from spectralvae.data.store_writer import group_json
from spectralvae.files.writer_base import Key, Writer, pieces

# Measured on radiance: a higher level takes longer and saves nothing.
_ZSTD_LEVEL = 1


class ZarrWriter(Writer):
    """Zarr 3: zstd and CRC-32C checksums; all metadata at the root, too."""

    def __init__(self, path: Path, thread: ThreadPoolExecutor) -> None:
        super().__init__(path, thread)
        self._arrays: dict[str, Any] = {}

    def _open(self) -> None:
        self._attributes: dict[str, dict[str, Any]] = {}
        self._group("", {})

    def _group(self, place: str, attributes: Mapping[str, Any]) -> None:
        if place and (above := place.rpartition("/")[0]) not in self._attributes:
            self._group(above, {})
        own = self._attributes.setdefault(place, {})
        own |= {key: _json_value(value) for key, value in attributes.items()}
        self._write_metadata(place, json.dumps({"zarr_format": 3, "node_type": "group", "attributes": own}).encode())

    def _write_metadata(self, place: str, content: bytes) -> None:
        folder = self._path / place
        folder.mkdir(exist_ok=True)
        (folder / "zarr.json").write_bytes(content)

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
        # zarr would write several files at once, and go on with the others after one has failed.
        metadata: dict[str, Any] = {}
        zarr.create_array(
            metadata,
            shape=shape,
            chunks=chunks,
            dtype=str if texts else dtype,
            fill_value="" if texts else dtype.type(0 if fill is None else fill),
            compressors=[ZstdCodec(level=_ZSTD_LEVEL), Crc32cCodec()],
            dimension_names=dims,
            attributes=described,
        )
        if (above := place.rpartition("/")[0]) not in self._attributes:
            self._group(above, {})
        self._write_metadata(place, metadata["zarr.json"].to_bytes())
        # A reader cannot tell a chunk that is lost from one that is empty and so not written.
        with zarr.config.set({"array.write_empty_chunks": True}):
            self._arrays[place] = zarr.open_array(self._path / place, mode="r+")

    def _write(self, place: str, key: Key, values: Any) -> None:
        array = self._arrays[place]
        for inside, here in pieces(key, array):  # one by one, for the same reason as above
            array[inside or ...] = values[here]

    def _close(self, complete: bool) -> None:
        if complete:
            (self._path / "zarr.json").write_text(group_json(self._path, self._attributes[""]))
            os.sync()  # zarr doesn't wait for the disk


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
