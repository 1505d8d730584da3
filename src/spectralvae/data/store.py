"""The prepared data set on disk: a Zarr v3 group that xarray opens and tiles are read from fast.

Layout (C channels; a scene is ny x nx)::

    zarr.json                       written last: without it there is no store
    mean, std, wavelength,
    count, minimum, maximum         (channel)
    scenes/<id>/z                   (y, x, channel) float16 | float32: normalised, clipped, NaN = invalid
    scenes/<id>/n_invalid           (y, x) how many channels are invalid
    scenes/<id>/latitude, ...       (y, x), time (y), wavelength (channel) or (x, channel)

``z`` is one uncompressed shard of (1, nx, C) chunks. The shard's file therefore begins with the plain
row-major array, so a crop is read with ``preadv`` past zarr, and rows can be written as they come.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray

from spectralvae import __version__
from spectralvae.data.normalize import Normalization
from spectralvae.data.statistics import Moments
from spectralvae.errors import InputError
from spectralvae.rundir import command_of, write_atomic

FORMAT = 1
UNITS = {
    "latitude": "degrees_north",
    "longitude": "degrees_east",
    "solar_zenith_angle": "degrees",
    "viewing_zenith_angle": "degrees",
    "relative_azimuth_angle": "degrees",
    "time": "seconds since 1970-01-01T00:00:00Z",
    "wavelength": "nm",
}

ROOT_ARRAYS = ("mean", "std", "wavelength", "count", "minimum", "maximum")

NamedArray = tuple[tuple[str, ...], NDArray[Any]]  # dimensions and values


@dataclass(frozen=True)
class SceneRecord:
    """One row of the table of scenes.

    Attributes:
        id: the scene's name in the store.
        source: name of its file.
        region: [y0, y1, x0, x1] of the file's image, or None for all of it.
        shape: [y, x, channel].
        source_bytes, sha256: size and digest of the source file.
        time: start of the scan, ISO 8601 UTC, where known.
        split: train or val.
        invalid: rejected samples by rule.
        absent: optional variables that the source lacks.
        z_sha256: digest of z, without the shard's index.
        n_invalid: samples of z that are NaN.
    """

    id: str
    source: str
    region: list[int] | None
    shape: list[int]
    source_bytes: int
    sha256: str
    time: str | None
    split: str
    invalid: dict[str, int]
    absent: list[str]
    z_sha256: str
    n_invalid: int


class ZWriter:
    """Writes a scene's ``z`` row by row; a shard is complete only once the writer is left without error.

    Args:
        folder: the scene's group.
        shape: (y, x, channel).
        dtype: float16 or float32.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], dtype: str, attributes: Mapping[str, Any]) -> None:
        ny, nx, nc = shape
        array = zarr.create_array(
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
        self._row_bytes = nx * nc * array.dtype.itemsize
        self._n_rows, self._rows_left = ny, ny
        self._digest = hashlib.sha256()
        path = _shard(folder)
        path.parent.mkdir(parents=True)
        self._file = path.open("wb")

    def write(self, z: NDArray[Any]) -> NDArray[Any]:
        """Append rows (rows, x, channel); returns them as they are stored."""
        stored = np.ascontiguousarray(z, dtype=self._dtype)
        self._rows_left -= len(stored)
        self._digest.update(stored.data)
        self._file.write(stored.data)
        return stored

    @property
    def sha256(self) -> str:
        """Digest of what was written so far."""
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                assert self._rows_left == 0, f"{self._rows_left} rows of z are missing"
                self._file.write(shard_index(self._n_rows, self._row_bytes))
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
    return index + struct.pack("<I", google_crc32c.value(index))


def _shard(scene_folder: Path) -> Path:
    return scene_folder / "z" / "c" / "0" / "0" / "0"


def scene_folder(store: Path, scene_id: str) -> Path:
    """Where a scene lies in a store."""
    return store / "scenes" / scene_id


def write_scene_group(folder: Path, record: SceneRecord, arrays: Mapping[str, NamedArray]) -> None:
    """Write what stands beside ``z``, and the group's own metadata last: it marks the scene as complete."""
    for name, (dims, values) in arrays.items():
        _create_array(folder / name, values, dims)
    write_atomic(folder / "zarr.json", _group_json(asdict(record), _member_metadata(folder)))


def _create_array(path: Path, values: NDArray[Any], dims: tuple[str, ...], **attributes: Any) -> None:
    if path.name in UNITS:
        attributes["units"] = UNITS[path.name]
    zarr.create_array(
        path, data=np.ascontiguousarray(values), dimension_names=dims, attributes=attributes, overwrite=True
    )


def finished_scene(folder: Path) -> SceneRecord | None:
    """The record of a scene that was written completely, else None."""
    path = folder / "zarr.json"
    return SceneRecord(**json.loads(path.read_text())["attributes"]) if path.is_file() else None


def _member_metadata(folder: Path) -> dict[str, Any]:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/zarr.json"))}


def _group_json(attributes: Mapping[str, Any], members: Mapping[str, Any]) -> str:
    group = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": attributes,
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": members},
    }
    return json.dumps(group) + "\n"


def content_hash(attributes: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of the root's attributes (but for the hash itself) and of its arrays."""
    hashed = {name: value for name, value in attributes.items() if name != "hash"}
    digest = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def finish_store(
    path: Path, records: list[SceneRecord], normalization: Normalization, moments: Moments, dtype: str
) -> str:
    """Write the root arrays, then the root metadata: from then on there is a store.

    Returns:
        The store's hash: SHA-256 over the table of scenes (which holds the digest of every z), the
        normalisation and its arrays.
    """
    arrays = {
        **normalization.arrays(),
        "count": moments.count,
        "minimum": moments.minimum,
        "maximum": moments.maximum,
    }
    for name, values in arrays.items():
        _create_array(path / name, values, ("channel",))
    table = [asdict(record) for record in records]
    attributes: dict[str, Any] = {
        "title": "spectralvae store: normalised hyperspectral scenes",
        "spectralvae_store": FORMAT,
        "spectralvae_version": __version__,
        "normalization": normalization.settings(),
        "dtype": dtype,
        "scenes": table,
    }
    attributes["hash"] = content_hash(attributes, arrays)

    members: dict[str, Any] = {name: json.loads((path / name / "zarr.json").read_text()) for name in arrays}
    empty = {"kind": "inline", "must_understand": False, "metadata": {}}
    members["scenes"] = {"zarr_format": 3, "node_type": "group", "attributes": {}, "consolidated_metadata": empty}
    for record in records:
        folder = scene_folder(path, record.id)
        group = json.loads((folder / "zarr.json").read_text())
        for name, metadata in group["consolidated_metadata"]["metadata"].items():
            members[f"scenes/{record.id}/{name}"] = metadata
        members[f"scenes/{record.id}"] = {**group, "consolidated_metadata": empty}
    write_atomic(path / "scenes" / "zarr.json", _group_json({}, {}))
    write_atomic(path / "zarr.json", _group_json(attributes, members))
    return str(attributes["hash"])


class Store:
    """A finished store, open for reading.

    Attributes:
        path: its folder.
        scenes: the table of scenes.
        normalization: how its z was made.
        hash: identifies its content.
        dtype: of z.

    Raises:
        InputError: when made from something else than a finished store.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        root = path / "zarr.json"
        if not path.is_dir():
            what = "is a file, not a folder" if path.exists() else "no such folder"
            raise InputError(f"store {path}: {what}; give the output_dir of a `spectralvae prepare`")
        if not root.is_file():
            command = command_of(path)
            if command == "prepare":
                raise InputError(f"store {path}: is not finished; start its `spectralvae prepare` again")
            what = f"was made by `spectralvae {command}`" if command else "holds no zarr.json"
            raise InputError(f"store {path}: is no store ({what}); give the output_dir of a `spectralvae prepare`")
        try:
            attributes = json.loads(root.read_text())["attributes"]
            if attributes.get("spectralvae_store") != FORMAT:
                raise InputError(f"store {path}: is a Zarr group, but no spectralvae store of format {FORMAT}")
            arrays = {name: np.asarray(zarr.open_array(path / name, mode="r")[:]) for name in ROOT_ARRAYS}
            self.normalization = Normalization.from_parts(attributes["normalization"], arrays)
            self.scenes = [SceneRecord(**scene) for scene in attributes["scenes"]]
            self.hash: str = attributes["hash"]
            self.dtype = np.dtype(attributes["dtype"])
        except (KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
            raise InputError(f"store {path}: is damaged ({type(error).__name__}: {error}); prepare it again") from error
        # zarr reads a lost chunk as zeros, without a word
        if content_hash(attributes, arrays) != self.hash:
            raise InputError(f"store {path}: is damaged (statistics or table do not match its hash); prepare it again")

    def indices(self, split: str) -> list[int]:
        """Which scenes belong to a split."""
        return [i for i, scene in enumerate(self.scenes) if scene.split == split]

    def n_invalid(self, scene: int) -> NDArray[np.int64]:
        """(y, x): how many channels of each pixel are invalid.

        Raises:
            InputError: the array is lost or damaged, or z is not as long as it was written.
        """
        record = self.scenes[scene]
        folder = scene_folder(self.path, record.id)
        ny, nx, nc = record.shape
        z_bytes = ny * nx * nc * self.dtype.itemsize + len(shard_index(ny, 1))
        try:
            n_invalid = np.asarray(zarr.open_array(folder / "n_invalid", mode="r")[:], np.int64)
            found = _shard(folder).stat().st_size
        except (KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
            raise InputError(f"{folder}: is damaged ({type(error).__name__}: {error}); prepare it again") from error
        if n_invalid.sum() != record.n_invalid:  # zarr reads a lost chunk as zeros, without a word
            raise InputError(f"{folder / 'n_invalid'}: is damaged (its sum is not the table's); prepare it again")
        if found != z_bytes:
            raise InputError(f"{_shard(folder)}: has {found} bytes instead of {z_bytes}; prepare it again")
        return n_invalid

    def read_tile(self, scene: int, y: int, x: int, out: NDArray[Any]) -> None:
        """Read the tile whose first pixel is (y, x) into ``out`` (tile_y, tile_x, channel), C-contiguous.

        Raises:
            InputError: the file is shorter than it was written (a memory map would die by SIGBUS).
        """
        record = self.scenes[scene]
        ny, nx, nc = record.shape
        height, width, channels = out.shape
        assert channels == nc and 0 <= y <= ny - height and 0 <= x <= nx - width
        assert out.flags.c_contiguous and out.dtype == self.dtype
        path = _shard(scene_folder(self.path, record.id))
        pixel_bytes = nc * self.dtype.itemsize
        rows: list[Any] = list(out.reshape(height, -1).view(np.uint8))
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        try:
            for i, row in enumerate(rows):
                offset = ((y + i) * nx + x) * pixel_bytes
                if os.preadv(file, [row], offset) != row.nbytes:
                    raise InputError(f"{path}: is shorter than the {ny} x {nx} x {nc} samples it should hold")
        finally:
            os.close(file)
