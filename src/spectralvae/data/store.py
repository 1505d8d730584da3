"""The prepared data set on disk: a Zarr v3 group that xarray opens and tiles are read from fast.

Layout (C channels; a scene is ny x nx)::

    zarr.json                       written last: without it there is no store; its attributes hold the table of scenes
    mean, std, wavelength, ...      (channel); all root arrays with their meaning: store_writer.ATTRIBUTES
    scenes/<id>/z                   (y, x, channel) float16 | float32: normalised, clipped, NaN = invalid
    scenes/<id>/n_invalid           (y, x) how many channels are invalid, uint8 | uint16 | uint32
    scenes/<id>/latitude, ...       (y, x), time (y), wavelength (channel) or (x, channel)
    scenes/<id>/l2/<PRODUCT>        (y, x) float32 in the product's units, NaN = invalid; transform in the attributes

``z`` is one uncompressed shard of (1, nx, C) chunks. The shard's file therefore begins with the plain
row-major array, so a crop is read with ``preadv`` past zarr, and rows can be written as they come.
``n_invalid`` and the level-2 fields are one uncompressed chunk each, which is always written: their files are plain
arrays as well. (Earlier versions compressed the fields: such a store serves all but supervised latents.)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from spectralvae.errors import InputError
from spectralvae.runtime.rundir import command_of
from spectralvae.weights.normalization import Normalization

FORMAT = 2
MAX_CHANNELS = 1_000_000
FIELD_DTYPE = np.dtype("<f4")
REQUIRED_ARRAYS = (
    "mean",
    "std",
    "wavelength",
    "count",
    "rounding_rms",
    "rounding_max",
    "n_clipped",
    "lost_mean",
    "lost_square",
)


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
        stack: height of the tiles that make up a scene of (N * height, x, channel); None for an image.
        version: of the processing that made the source, where known.
        products: of each level-2 product its source, digest and valid pixels; the rest is with the array.
        beside_sha256: digest of the files of all arrays beside z.
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
    stack: int | None = None
    version: str | None = None
    products: dict[str, dict[str, Any]] = field(default_factory=dict)
    beside_sha256: str = ""

    @property
    def identity(self) -> str:
        """What a scene is known by in any store: digest of its file, and its part of the image."""
        return self.sha256 if self.region is None else f"{self.sha256}[{','.join(map(str, self.region))}]"


def shard_file(scene_folder: Path) -> Path:
    """The shard of a scene's z: the plain (y, x, channel) array, then the index."""
    return scene_folder / "z" / "c" / "0" / "0" / "0"


def counts_file(scene_folder: Path) -> Path:
    """The plain (y, x) array of a scene's n_invalid."""
    return plain_file(scene_folder / "n_invalid")


def field_folder(scene_folder: Path, product: str) -> Path:
    """The array of a level-2 field of a scene."""
    return scene_folder / "l2" / product


def plain_file(array: Path) -> Path:
    """The file of a (y, x) array that is one uncompressed chunk: the plain row-major array."""
    return array / "c" / "0" / "0"


def count_dtype(n_channels: int) -> np.dtype[Any]:
    """Of n_invalid."""
    return np.dtype(np.min_scalar_type(n_channels)).newbyteorder("<")


def index_bytes(n_chunks: int) -> int:
    """Length of a shard's index."""
    return 16 * n_chunks + 4


def scene_folder(store: Path, scene_id: str) -> Path:
    """Where a scene lies in a store."""
    return store / "scenes" / scene_id


def beside_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of all files of a scene's group, but for z's numbers and its own metadata."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.parts[:2] != ("z", "c") and str(name) != "zarr.json":
            content = path.read_bytes()
            digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def content_hash(attributes: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of the root's attributes (but for the hash itself) and of its arrays."""
    hashed = {name: value for name, value in attributes.items() if name != "hash"}
    digest = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _root_array(folder: Path) -> NDArray[Any]:
    """A statistic, if it is stored as this tool stores it: other codecs may run code, other sizes fill the memory."""
    metadata = json.loads((folder / "zarr.json").read_text())
    plain = {"bytes", "zstd"}
    if (
        metadata["zarr_format"] != 3
        or metadata["data_type"] not in ("float64", "int64")
        or not {codec["name"] for codec in metadata["codecs"]} <= plain
        or len(metadata["shape"]) != 1
        or metadata["shape"][0] > MAX_CHANNELS
        or metadata["chunk_grid"]["configuration"]["chunk_shape"] != metadata["shape"]
    ):
        raise ValueError(f"{folder.name} is no statistic of at most {MAX_CHANNELS} channels")
    return np.asarray(zarr.open_array(folder, mode="r")[:])


class Store:
    """A finished store, open for reading.

    Attributes:
        path: its folder.
        scenes: the table of scenes.
        normalization: how its z was made.
        hash: identifies its content.
        dtype: of z.
        arrays: the root arrays, (channel) each, by name.
        attributes: of the root, but for the table of scenes.

    Raises:
        InputError: when made from something else than a finished store.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        root = path / "zarr.json"
        if not path.is_dir():
            what = "is a file, not a folder" if path.exists() else "no such folder"
            raise InputError(what, path=path, remedy="give the output_dir of a `spectralvae prepare`")
        if not root.is_file():
            command = command_of(path)
            if command == "prepare":
                problem = "this store is not finished"
                raise InputError(problem, path=path, remedy="start its `spectralvae prepare` again")
            what = f"was made by `spectralvae {command}`" if command else "holds no zarr.json"
            problem = f"is no store ({what})"
            raise InputError(problem, path=path, remedy="give the output_dir of a `spectralvae prepare`")
        try:
            attributes = json.loads(root.read_text())["attributes"]
            if (found := attributes.get("spectralvae_store")) != FORMAT:
                what = f"is a store of format {found}" if found else "is a Zarr group, but no spectralvae store"
                limit = f"a store of format {FORMAT}"
                raise InputError(what, path=path, limit=limit, remedy="prepare it with this version")
            names = {*REQUIRED_ARRAYS, *attributes["arrays"]}
            arrays = {name: _root_array(path / name) for name in names}
            if len({array.shape for array in arrays.values()}) > 1:
                raise ValueError("root arrays of several lengths")
            self.arrays = arrays
            self.attributes = {name: value for name, value in attributes.items() if name != "scenes"}
            self.normalization = Normalization.from_parts(attributes["normalization"], arrays)
            self.scenes = [SceneRecord(**scene) for scene in attributes["scenes"]]
            self.hash: str = attributes["hash"]
            self.dtype = np.dtype(attributes["dtype"])
        except (KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
            problem = f"this store is corrupt ({type(error).__name__}: {error})"
            raise InputError(problem, path=path, remedy="prepare it again") from error
        # zarr reads a lost chunk as zeros, without a word
        if content_hash(attributes, arrays) != self.hash:
            problem = "this store is corrupt: its statistics or its table of scenes do not match its hash"
            raise InputError(problem, path=path, remedy="prepare it again")

    def indices(self, split: str) -> list[int]:
        """Which scenes belong to a split."""
        return [i for i, scene in enumerate(self.scenes) if scene.split == split]

    def check_files(self, scene: int) -> None:
        """Ask the file system whether z and n_invalid are there and as long as they were written.

        Raises:
            InputError: one is lost, cut off, or of another layout.
        """
        record = self.scenes[scene]
        folder = scene_folder(self.path, record.id)
        ny, nx, nc = record.shape
        for path, expected in (
            (shard_file(folder), ny * nx * nc * self.dtype.itemsize + index_bytes(ny)),
            (counts_file(folder), ny * nx * count_dtype(nc).itemsize),
        ):
            try:
                found = path.stat().st_size
            except OSError as error:
                problem = f"cannot be read: {error.strerror}"
                raise InputError(problem, path=path, remedy="prepare the store again") from error
            if found != expected:
                problem = f"has {found} bytes instead of {expected}"
                raise InputError(problem, path=path, remedy="prepare the store again")

    def n_invalid(self, scene: int) -> NDArray[np.int64]:
        """(y, x): how many channels of each pixel are invalid.

        Raises:
            InputError: the array is lost or damaged, or z is not as long as it was written.
        """
        self.check_files(scene)
        record = self.scenes[scene]
        n_invalid = self._read_counts(scene, 0, record.shape[0]).astype(np.int64)
        if n_invalid.sum() != record.n_invalid:
            path = counts_file(scene_folder(self.path, record.id))
            problem = "is corrupt: its sum is not that in the table of scenes"
            raise InputError(problem, path=path, remedy="prepare the store again")
        return n_invalid

    def count_invalid(self, scene: int, y: int, x: int, tile_size: int) -> int:
        """How many samples of the square tile whose first pixel is (y, x) are invalid.

        Raises:
            InputError: the counts are lost or shorter than they were written.
        """
        return int(self._read_counts(scene, y, tile_size)[:, x : x + tile_size].sum(dtype=np.int64))

    def _read_counts(self, scene: int, y: int, height: int) -> NDArray[np.unsignedinteger[Any]]:
        """Whole rows of n_invalid in one read: apart, the parts of a tile would be one read for each row."""
        record = self.scenes[scene]
        path = counts_file(scene_folder(self.path, record.id))
        return self._read_rows(path, scene, count_dtype(record.shape[2]), y, height)

    def _read_rows(self, path: Path, scene: int, dtype: np.dtype[Any], y: int, height: int) -> NDArray[Any]:
        """(height, x): whole rows, from row y on, of a plain array beside z."""
        ny, nx, _ = self.scenes[scene].shape
        assert 0 <= y <= ny - height
        row_bytes = nx * dtype.itemsize
        with _opened(path) as file:
            rows = os.pread(file, height * row_bytes, y * row_bytes)
        if len(rows) != height * row_bytes:
            raise InputError(f"is shorter than the {ny} x {nx} values it should hold", path=path)
        return np.frombuffer(rows, dtype).reshape(height, nx)

    def check_field(self, scene: int, product: str) -> None:
        """A level-2 field that the table of scenes names must be the plain array that ``read_field`` reads.

        Raises:
            InputError: it is lost, cut off, or compressed, as earlier versions wrote it.
        """
        record = self.scenes[scene]
        ny, nx, _ = record.shape
        array = field_folder(scene_folder(self.path, record.id), product)
        try:
            metadata = json.loads((array / "zarr.json").read_text())
            codecs = [codec["name"] for codec in metadata["codecs"]]
            chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"]
            if codecs != ["bytes"] or (chunk, metadata["data_type"]) != ([ny, nx], "float32"):
                raise InputError(
                    f"is not the plain array that a tile can be read from fast, but has chunks of {chunk} "
                    f"({', '.join(codecs)}), as earlier versions wrote it",
                    path=array,
                    remedy="prepare the store again",
                )
            found = plain_file(array).stat().st_size
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"cannot be read ({error})"
            raise InputError(problem, path=array, remedy="prepare the store again") from error
        if found != ny * nx * FIELD_DTYPE.itemsize:
            problem = f"is shorter or longer than its {ny} x {nx} values"
            raise InputError(problem, path=plain_file(array), remedy="prepare the store again")

    def read_field(self, scene: int, product: str, y: int, x: int, tile_size: int) -> NDArray[np.float32]:
        """The level-2 field under the square tile whose first pixel is (y, x): in the product's units, NaN = invalid.

        Raises:
            InputError: the file is lost or shorter than it was written.
        """
        path = plain_file(field_folder(scene_folder(self.path, self.scenes[scene].id), product))
        return self._read_rows(path, scene, FIELD_DTYPE, y, tile_size)[:, x : x + tile_size]

    def read_tile(self, scene: int, y: int, x: int, out: NDArray[Any]) -> None:
        """Read the tile whose first pixel is (y, x) into ``out`` (tile_y, tile_x, channel).

        ``out`` may be a turned view; rows that are not contiguous in it go through a buffer of one row, which
        stays in the processor's cache.

        Raises:
            InputError: the file is shorter than it was written (a memory map would die by SIGBUS).
        """
        record = self.scenes[scene]
        ny, nx, nc = record.shape
        height, width, channels = out.shape
        assert channels == nc and 0 <= y <= ny - height and 0 <= x <= nx - width
        assert out.dtype == self.dtype
        path = shard_file(scene_folder(self.path, record.id))
        pixel_bytes = nc * self.dtype.itemsize
        buffer = np.empty((width, nc), self.dtype)
        with _opened(path) as file:
            for i, row in enumerate(out):
                contiguous = row if row.flags.c_contiguous else buffer
                offset = ((y + i) * nx + x) * pixel_bytes
                if os.preadv(file, [contiguous.data], offset) != contiguous.nbytes:
                    raise InputError(f"is shorter than the {ny} x {nx} x {nc} samples it should hold", path=path)
                if contiguous is buffer:
                    row[...] = buffer


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A file's descriptor, for reads without a position of their own.

    Raises:
        InputError: there is no such file, or it may not be read.
    """
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", path=path) from error
    try:
        yield file
    finally:
        os.close(file)
