"""Writing a store: rows of z as they come, what stands beside them, and last of all the root."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray

from spectralvae.data.store import (
    FIELD_DTYPE,
    FORMAT,
    SceneRecord,
    beside_digest,
    content_hash,
    count_dtype,
    field_folder,
    index_bytes,
    plain_file,
    scene_folder,
    shard_file,
)
from spectralvae.runtime.atomic import write_atomic
from spectralvae.version import __version__
from spectralvae.weights.normalization import Normalization

NamedArray = tuple[tuple[str, ...], NDArray[Any]]  # dimensions and values

# Above, the metadata of all arrays at the root would take zarr seconds to parse, at every opening.
CONSOLIDATED_SCENES = 256

GROUP_ATTRIBUTES = ("id", "source", "region", "time", "split")

_EMPTY = {"kind": "inline", "must_understand": False, "metadata": {}}

ATTRIBUTES: dict[str, dict[str, Any]] = {
    "mean": {"long_name": "mean of the transformed radiance over the valid training samples"},
    "std": {"long_name": "standard deviation of the transformed radiance over the valid training samples"},
    "count": {"long_name": "number of valid training samples", "units": "1"},
    "minimum": {"long_name": "least transformed radiance of the valid training samples"},
    "maximum": {"long_name": "largest transformed radiance of the valid training samples"},
    "noise": {"long_name": "median of radiance_error / radiance over the valid training samples", "units": "1"},
    "rounding_rms": {"long_name": "root mean square of what storing z in its type changed, all scenes", "units": "1"},
    "rounding_max": {"long_name": "largest change of a z by storing it in its type, all scenes", "units": "1"},
    "lost_mean": {"long_name": "mean of z - stored z over the valid training samples, z before clipping", "units": "1"},
    "lost_square": {"long_name": "mean of z^2 - stored z^2 over the valid training samples", "units": "1"},
    "n_clipped": {"long_name": "number of samples whose z was clipped, all scenes", "units": "1"},
    "n_invalid": {"long_name": "number of invalid channels", "units": "1"},
    "wavelength": {"standard_name": "radiation_wavelength", "units": "nm"},
    "latitude": {"standard_name": "latitude", "units": "degrees_north"},
    "longitude": {"standard_name": "longitude", "units": "degrees_east"},
    "solar_zenith_angle": {"standard_name": "solar_zenith_angle", "units": "degree"},
    "viewing_zenith_angle": {"standard_name": "sensor_zenith_angle", "units": "degree"},
    "relative_azimuth_angle": {"long_name": "relative azimuth angle", "units": "degree"},
    "time": {"standard_name": "time", "units": "seconds since 1970-01-01T00:00:00Z"},
}


class ZWriter:
    """Writes a scene's ``z`` in pieces; a shard is complete only once the writer is left without error.

    Args:
        folder: the scene's group.
        shape: (y, x, channel).
        dtype: float16 or float32.
        attributes: of the array.

    Attributes:
        sha256: digest of what was written, without the shard's index; known once the writer is left.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], dtype: str, attributes: Mapping[str, Any]) -> None:
        self._shape = ny, nx, nc = shape
        zarr.create_array(
            folder / "z",
            shape=shape,
            chunks=(1, nx, nc),
            shards=shape,
            dtype=dtype,
            compressors=None,
            filters=None,
            fill_value=float("nan"),
            dimension_names=("y", "x", "channel"),
            attributes=dict(attributes),
            overwrite=True,
        )
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._missing, self._counting = ny * nx, Lock()
        self.sha256 = ""
        self._path = shard_file(folder)
        self._path.parent.mkdir(parents=True)
        self._file = self._path.open("wb+")

    def write(self, y: int, x: int, z: NDArray[Any]) -> None:
        """Write the (rows, columns, channel) piece whose first pixel is (y, x); several threads may."""
        stored = np.ascontiguousarray(z, dtype=self._dtype)
        _, nx, nc = self._shape
        runs = [stored] if stored.shape[1] == nx else list(stored)
        for i, run in enumerate(runs):
            data, offset = run.reshape(-1).view(np.uint8).data, ((y + i) * nx + x) * nc * self._dtype.itemsize
            while data:
                n = os.pwrite(self._file.fileno(), data, offset)
                data, offset = data[n:], offset + n
        with self._counting:
            self._missing -= stored.shape[0] * stored.shape[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._file:
            if error is not None:
                return
            assert self._missing == 0, f"{self._missing} pixels of z are missing"
            ny, nx, nc = self._shape
            self._file.seek(0)
            self.sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()
            self._file.seek(0, os.SEEK_END)
            self._file.write(shard_index(ny, nx * nc * self._dtype.itemsize))
            self._file.flush()
            os.fsync(self._file.fileno())


def shard_index(n_chunks: int, chunk_bytes: int) -> bytes:
    """The index at the end of a shard whose chunks stand in order without gaps (Zarr v3, sharding_indexed).

    (offset, length) of each chunk as little-endian uint64, then the CRC-32C of these.
    """
    entries = np.empty((n_chunks, 2), "<u8")
    entries[:, 0] = np.arange(n_chunks, dtype=np.uint64) * np.uint64(chunk_bytes)
    entries[:, 1] = chunk_bytes
    index = entries.tobytes()
    assert len(index) + 4 == index_bytes(n_chunks)
    return index + struct.pack("<I", google_crc32c.value(index))


def write_n_invalid(folder: Path, n_invalid: NDArray[Any], n_channels: int) -> None:
    """Write the (y, x) counts of a scene such that their file is the plain row-major array, in as few bytes as do."""
    _write_plain(folder / "n_invalid", n_invalid.astype(count_dtype(n_channels)), ATTRIBUTES["n_invalid"])


def write_field(folder: Path, product: str, values: NDArray[Any], attributes: Mapping[str, Any]) -> None:
    """Write the (y, x) level-2 field of a scene such that its file is the plain row-major array."""
    _write_plain(field_folder(folder, product), values.astype(FIELD_DTYPE), attributes)


def _write_plain(path: Path, values: NDArray[Any], attributes: Mapping[str, Any]) -> None:
    array = zarr.create_array(
        path,
        shape=values.shape,
        chunks=values.shape,
        dtype=values.dtype,
        compressors=None,
        filters=None,
        fill_value=0,
        dimension_names=("y", "x"),
        attributes=dict(attributes),
        config={"write_empty_chunks": True},  # else an array of zeros has no file
        overwrite=True,
    )
    array[...] = values
    assert plain_file(path).is_file()


def write_array(path: Path, dims: tuple[str, ...], values: NDArray[Any], attributes: Mapping[str, Any]) -> None:
    """Write an array that stands beside ``z``."""
    zarr.create_array(
        path,
        data=np.ascontiguousarray(values),
        dimension_names=dims,
        attributes=dict(attributes),
        overwrite=True,
    )


def write_group(folder: Path, attributes: Mapping[str, Any]) -> None:
    """Write a group's own metadata, those of its members included; it comes after them."""
    write_atomic(folder / "zarr.json", group_json(folder, attributes))


def group_json(folder: Path, attributes: Mapping[str, Any]) -> str:
    """A group's metadata, with those of all its members."""
    members = {
        str(path.parent.relative_to(folder)): json.loads(path.read_text())
        for path in sorted(folder.rglob("zarr.json"))
        if path.parent != folder
    }
    return _group_json(attributes, members)


def scene_attributes(record: SceneRecord) -> dict[str, Any]:
    """Of a scene's group. The table of scenes has all of the record, and is parsed at every opening; so are these."""
    return {key: value for key, value in asdict(record).items() if key in GROUP_ATTRIBUTES}


def write_scene_group(folder: Path, record: SceneRecord, arrays: Mapping[str, NamedArray]) -> SceneRecord:
    """Write what else stands beside ``z`` and ``n_invalid``, and then the group; returns the record with the digest."""
    for name, (dims, values) in arrays.items():
        write_array(folder / name, dims, values, ATTRIBUTES.get(name, {}))
    record = replace(record, beside_sha256=beside_digest(folder))
    write_group(folder, scene_attributes(record))
    return record


def _group_json(attributes: Mapping[str, Any], members: Mapping[str, Any]) -> str:
    group = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": attributes,
        "consolidated_metadata": {**_EMPTY, "metadata": members},
    }
    return json.dumps(group) + "\n"


def finish_store(
    path: Path,
    records: Sequence[SceneRecord],
    normalization: Normalization,
    arrays: Mapping[str, NDArray[Any]],
    dtype: str,
    **more: Any,
) -> str:
    """Write the root arrays, then the root metadata: from then on there is a store.

    Args:
        path: the store.
        records: the table of scenes.
        normalization: how z was made.
        arrays: other statistics, (channel) each, by name.
        dtype: of z.
        more: other attributes of the root.

    Returns:
        The store's hash: SHA-256 over the table of scenes (which holds the digest of every z), the
        normalisation and all root arrays.
    """
    all_arrays = {**normalization.arrays(), **arrays}
    for name, values in all_arrays.items():
        write_array(path / name, ("channel",), values, ATTRIBUTES[name])
    attributes: dict[str, Any] = {
        "Conventions": "CF-1.11",
        "title": "spectralvae store: normalised hyperspectral scenes",
        "spectralvae_store": FORMAT,
        "spectralvae_version": __version__,
        "normalization": normalization.settings(),
        "dtype": dtype,
        "arrays": sorted(all_arrays),
        **more,
        "scenes": [asdict(record) for record in records],
    }
    attributes["hash"] = content_hash(attributes, all_arrays)

    os.sync()  # the arrays beside z were written by zarr, which does not wait for the disk
    write_atomic(path / "scenes" / "zarr.json", _group_json({}, {}))
    write_atomic(path / "zarr.json", root_json(path, attributes, records))
    return str(attributes["hash"])


def root_json(path: Path, attributes: Mapping[str, Any], records: Sequence[SceneRecord]) -> str:
    """The root's metadata, with those of its arrays and of the scenes."""
    names = attributes["arrays"]
    members: dict[str, Any] = {name: json.loads((path / name / "zarr.json").read_text()) for name in names}
    members["scenes"] = {"zarr_format": 3, "node_type": "group", "attributes": {}, "consolidated_metadata": _EMPTY}
    for record in records:
        group = json.loads((scene_folder(path, record.id) / "zarr.json").read_text())
        inside = group.pop("consolidated_metadata")["metadata"]
        if len(records) <= CONSOLIDATED_SCENES:
            members |= {f"scenes/{record.id}/{name}": metadata for name, metadata in inside.items()}
            group["consolidated_metadata"] = _EMPTY
        members[f"scenes/{record.id}"] = group
    return _group_json(attributes, members)
