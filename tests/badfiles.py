"""Makers of granules and of files that must be refused, for tests and benchmarks."""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

NY, NX, NC = 8, 24, 64
NAME = "TEMPO_RAD_L1_V03_20240601T210934Z_S012G01.nc"
BAND = "band_290_490_nm"
RADIANCE = f"{BAND}/radiance"
GEOMETRY = ("latitude", "longitude", "solar_zenith_angle", "viewing_zenith_angle", "relative_azimuth_angle")
SECRET = b"the secret of another file of this machine "
FILL = np.float32(-1e30)

# How HDF5 files are laid out: "oldest" as h5py does by itself, without any checksums but those of deflated chunks;
# "netCDF-C" as real granules are, with checksums in headers but not in chunk indices; "newest" with both.
LAYOUTS = {"oldest": ("earliest", "v108"), "netCDF-C": ("v108", "v108"), "newest": ("v200", "v200")}


def write_granule(path: Path, *, layout: str = "netCDF-C", fletcher32: bool = False) -> Path:
    """A granule of 8 x 24 x 64 with the groups, variables, attributes and filters of a real one."""
    random = np.random.default_rng(0)
    packed: dict[str, Any] = {"compression": "gzip", "compression_opts": 4, "shuffle": True, "fletcher32": fletcher32}
    dims = ("mirror_step", "xtrack", "spectral_channel")
    radiance = np.exp(random.normal(28, 0.5, (NY, NX, NC))).astype(np.float32)
    radiance[:, :2] = FILL
    flag = (random.random(radiance.shape) < 0.02).astype(np.uint16)
    wavelength = (290 + 0.2 * np.arange(NC) + 0.001 * np.arange(NX)[:, None]).astype(np.float32)
    with h5py.File(path, "w", libver=LAYOUTS[layout], track_order=layout != "oldest") as file:

        def put(place: str, values: Any, axes: tuple[str, ...], chunks: Any = None, **attributes: Any) -> None:
            options = {"chunks": chunks, **packed} if chunks else {}
            fill = FILL if values.dtype.kind == "f" else None
            variable = file.create_dataset(place, data=values, fillvalue=fill, **options)
            if fill is not None:
                variable.attrs["_FillValue"] = np.array([fill], dtype=values.dtype)
            variable.attrs.update({"coverage_content_type": "physicalMeasurement", "comment": "none", **attributes})
            for axis, dim in zip(variable.dims, axes, strict=True):
                axis.attach_scale(file[f"{BAND}/{dim}" if dim == dims[2] else dim])

        file.attrs.update({f"global_attribute_{i}": f"text {i}" for i in range(12)}, title="simulated", scan_num=1)
        for place, size in ((dims[0], NY), (dims[1], NX), (f"{BAND}/{dims[2]}", NC)):
            file.create_dataset(place, data=np.arange(size, dtype=np.int32)).make_scale(place.rpartition("/")[2])
        time = 1.4e9 + 2.5 * np.arange(NY)
        put("time", time, dims[:1], (NY,), units="seconds since 1980-01-06T00:00:00Z")
        put("earth_sun_distance", np.array(1.0, dtype=np.float32), (), units="AU")
        more = {"units": "photons/s/cm^2/nm/sr", "valid_min": np.float32(0), "valid_max": np.float32(1e16)}
        chunks = (1, NX // 2, NC)
        put(RADIANCE, radiance, dims, chunks, **more)
        put(f"{BAND}/radiance_error", radiance * np.float32(0.01), dims, chunks, **more)
        put(f"{BAND}/pixel_quality_flag", flag, dims, chunks, flag_meanings="missing bad_pixel")
        put(f"{BAND}/nominal_wavelength", wavelength, dims[1:], (NX, NC), units="nm")
        for name in GEOMETRY:
            values = random.uniform(0, 60, (NY, NX)).astype(np.float32)
            put(f"{BAND}/{name}", values, dims[:2], (NY, NX), units="degrees")
    return path


def replace(file: h5py.File, make: Callable[[], h5py.Dataset]) -> h5py.Dataset:
    """Put another radiance in the place of a granule's, with the dimensions of the old one."""
    scales = [axis[0] for axis in file[RADIANCE].dims]
    del file[RADIANCE]
    new = make()
    for axis, scale in zip(new.dims, scales, strict=False):
        axis.attach_scale(scale)
    return new


def recreate(file: h5py.File, values: Any = None, **arguments: Any) -> h5py.Dataset:
    return replace(file, lambda: file.create_dataset(RADIANCE, data=values, **arguments))


def recreate_raw(file: h5py.File, stored: Any, layout: Any = None) -> h5py.Dataset:
    """The same through HDF5's own interface."""
    space = h5py.h5s.create_simple(SHAPE)
    return replace(file, lambda: h5py.Dataset(h5py.h5d.create(file[BAND].id, b"radiance", stored, space, layout)))


def relink(file: h5py.File, place: str, to: Any) -> None:
    del file[place]
    file[place] = to


def write_chunk(radiance: h5py.Dataset, content: bytes, filter_mask: int = 0) -> None:
    radiance.id.write_direct_chunk((2, 0, 0), content, filter_mask)


def flip(content: bytes, at: int, bits: int) -> bytes:
    return overwrite(content, at, bytes([content[at] ^ bits]))


def overwrite(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def own_brothers(content: bytes) -> bytes:
    """An HDF5 file whose chunk indices never end: each leaf names itself as the one to its right."""
    for leaf in re.finditer(rb"TREE\x01\x00", content):
        content = overwrite(content, leaf.start() + 16, struct.pack("<Q", leaf.start()))
    return content


def move_chunk(content: bytes, chunk: Any, to: int) -> bytes:
    """A file whose chunk index has another address for a chunk."""
    return content.replace(struct.pack("<Q", chunk.byte_offset), struct.pack("<Q", to), 1)


# Makers of a file at a path; they return another path where it isn't there.

HTML = "<html>please log in</html>\n" * 100
MAKERS: dict[str, Callable[[Path], Any]] = {
    "no such file": lambda path: None,
    "empty file": Path.touch,
    "text named .nc": lambda path: path.write_text(HTML),
    "text named .mat": lambda path: path.write_text(HTML),
    "empty folder": Path.mkdir,
    "pipe that nobody writes to": os.mkfifo,
    "symbolic link to a device": lambda path: path.symlink_to("/dev/zero"),
    "symbolic link to itself": lambda path: path.symlink_to(path),
    "name with a line break": lambda path: write_granule(path).rename(path.with_name("a\nb.nc")),
}

# Granules with bytes changed: of the content, and of the radiance's chunks.

Patch = Callable[[bytes, list[Any]], bytes]
PATCHES: dict[str, Patch] = {
    "cut within the superblock": lambda c, _: c[:20],
    "cut by one byte": lambda c, _: c[:-1],
    "zeros over the first object header": lambda c, _: overwrite(c, c.index(b"OHDR"), bytes(64)),
    "chunk index: an address beyond the end": lambda c, chunks: move_chunk(c, chunks[1], len(c) - 4),
    "chunk index: two chunks at one address": lambda c, chunks: move_chunk(c, chunks[1], chunks[2].byte_offset),
    "chunk content overwritten": lambda c, chunks: overwrite(c, chunks[3].byte_offset, os.urandom(chunks[3].size)),
    "one bit of a chunk flipped": lambda c, chunks: flip(c, chunks[3].byte_offset + chunks[3].size // 2, 1),
}
PATCHES_OF_OLDEST: dict[str, Patch] = {
    "superblock: root address flipped": lambda c, _: flip(c, 64, 0x20),
    "shuffle: parameter flipped": lambda c, _: re.sub(rb"(?s)(?<=shuffle\0).", lambda m: bytes([m[0][0] ^ 2]), c),
}

# Granules changed through h5py.

SHAPE = NY, NX, NC
CHUNK_BYTES = NX // 2 * NC * 4
EDITS: dict[str, Callable[[h5py.File], Any]] = {
    # leading elsewhere
    "external link in a corner": lambda f: f.update({"notes/more": h5py.ExternalLink("/etc/passwd", "/")}),
    "soft link in a circle": lambda f: relink(f, f"{BAND}/latitude", h5py.SoftLink(f"/{BAND}/latitude")),
    # declaring too much, or what isn't there
    "radiance that was never written": lambda f: recreate(f, shape=SHAPE, dtype="<f4"),
    "deflated bomb in a chunk": lambda f: write_chunk(
        recreate(f, f[RADIANCE][...], chunks=(1, NX, NC), compression="gzip"), zlib.compress(bytes(2**22), 9)
    ),
    "chunk that inflates to too little": lambda f: write_chunk(f[RADIANCE], zlib.compress(bytes(NX * NC))),
    "chunk stored in 100 times its size": lambda f: write_chunk(
        f[RADIANCE], zlib.compress(bytes(CHUNK_BYTES)) + os.urandom(100 * CHUNK_BYTES)
    ),
    "chunk that skips its filters": lambda f: write_chunk(f[RADIANCE], bytes(CHUNK_BYTES), filter_mask=3),
    "attribute of 8 MiB": lambda f: f[RADIANCE].attrs.create("comment", np.zeros(2**20)),
    # of another kind than numbers
    "texts as radiance": lambda f: recreate(f, np.full(SHAPE, b"12.5")),
    "references as radiance": lambda f: recreate(f, shape=SHAPE, dtype=h5py.ref_dtype),
    "a group as radiance": lambda f: relink(f, RADIANCE, f.create_group("other")),
    "byte order that is not the others'": lambda f: recreate(f, f[RADIANCE][...], dtype=">f4"),
    "text as a fill value": lambda f: f[RADIANCE].attrs.update(_FillValue="none"),
    "variable of other sizes": lambda f: recreate(f, np.ones((NY, NX + 1, NC), dtype="<f4")),
}


def maker(kind: str) -> Callable[[Callable[[Path], None]], Any]:
    return lambda function: MAKERS.setdefault(kind, function)


def edit(kind: str) -> Callable[[Callable[[h5py.File], None]], Any]:
    return lambda function: EDITS.setdefault(kind, function)


@maker("chunk index: a node is its own brother")
def _index_brother(path: Path) -> None:
    with h5py.File(write_granule(path), "r+") as file:
        recreate(file, file[RADIANCE][...], chunks=(1, 1, 16), compression="gzip")
    path.write_bytes(own_brothers(path.read_bytes()))


@maker("groups 5,000 deep")
def _deep(path: Path) -> None:
    with h5py.File(path, "w", libver="v110") as file:
        group = file
        for _ in range(5000):
            group = group.create_group("g")


@edit("external storage")
def _external_storage(file: h5py.File) -> None:
    secret = Path(file.filename).with_name("secret")
    secret.write_bytes(SECRET * (NY * NX * NC * 4 // len(SECRET) + 1))
    recreate(file, shape=SHAPE, dtype="<f4", external=[(str(secret), 0, h5py.h5f.UNLIMITED)])


@edit("virtual dataset")
def _virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(SHAPE, "<f4")
    layout[...] = h5py.VirtualSource(write_granule(Path(file.filename).with_name("other.nc")), RADIANCE, SHAPE)
    replace(file, lambda: file.create_virtual_dataset(RADIANCE, layout))


@edit("chunk of 1 GiB")
def _large_chunk(file: h5py.File) -> None:
    layout = {"shape": SHAPE, "maxshape": (None, None, None), "chunks": (64, 2**16, 64), "compression": "gzip"}
    recreate(file, dtype="<f4", **layout).id.write_direct_chunk((0, 0, 0), zlib.compress(bytes(2**20)))


@edit("missing chunk")
def _missing_chunk(file: h5py.File) -> None:
    values = file[RADIANCE][...]
    recreate(file, shape=SHAPE, dtype="<f4", chunks=(1, NX, NC), compression="gzip")[:-1] = values[:-1]


@edit("unknown filter")
def _unknown_filter(file: h5py.File) -> None:
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_chunk(SHAPE)
    layout.set_filter(32099, h5py.h5z.FLAG_OPTIONAL, (1,))
    recreate_raw(file, h5py.h5t.IEEE_F32LE, layout).id.write_direct_chunk((0, 0, 0), bytes(NY * NX * NC * 4))


@edit("floats of an odd layout")
def _odd_floats(file: h5py.File) -> None:
    odd = h5py.h5t.IEEE_F32LE.copy()
    odd.set_ebias(100)
    recreate_raw(file, odd).id.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ones(SHAPE, dtype="<f4"))


@edit("units that hold a terminal's control characters")
def _control_characters(file: h5py.File) -> None:
    del file[BAND]
    file.create_group("product")
    file.attrs["collection_shortname"] = "TEMPO\x1b[2J\nwelcome" + "!" * 10000


# MATLAB


def _element(kind: int, content: bytes) -> bytes:
    return struct.pack("<2I", kind, len(content)) + content + bytes(-len(content) % 8)


def _huge_matrix() -> tuple[bytes, int]:
    """The beginning of a matrix, and how many bytes of numbers it declares: 3 GiB."""
    flags, shape, name = struct.pack("<2I", 6, 0), struct.pack("<3i", 100, 4000, 1000), b"Y"
    head, size = _element(6, flags) + _element(5, shape) + _element(1, name), 3_200_000_000
    return struct.pack("<2I", 14, len(head) + 8 + size) + head + struct.pack("<2I", 9, size), size


def _mat_5(path: Path, element: bytes) -> None:
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + element)


@maker("MATLAB 5: deflated bomb of 3 GiB")
def _mat_bomb(path: Path) -> None:
    start, size = _huge_matrix()
    deflater = zlib.compressobj(9)
    deflated = deflater.compress(start) + deflater.flush(zlib.Z_FULL_FLUSH)
    piece = deflater.compress(bytes(size // 200)) + deflater.flush(zlib.Z_FULL_FLUSH)
    _mat_5(path, struct.pack("<2I", 15, len(deflated + 200 * piece)) + deflated + 200 * piece)


def _mat_73(path: Path, *shape: int, **arguments: Any) -> None:
    with h5py.File(path, "w", userblock_size=512) as file:
        file.create_dataset("Y", shape, "<f8", **arguments)


def _patch_size(path: Path) -> None:
    _mat_73(path, 5, 4, 3, data=np.ones((5, 4, 3)))
    path.write_bytes(path.read_bytes().replace(struct.pack("<Q", 5), struct.pack("<Q", 5000)))


MAKERS |= {
    "MATLAB 5: declares 3 GiB": lambda path: _mat_5(path, _huge_matrix()[0] + bytes(1000)),
    "MATLAB 7.3: declares more than is stored": _patch_size,
    "MATLAB 7.3: declares 8 EB": lambda path: _mat_73(path, 2**20, 2**20, 2**20),
}


def _make(kind: str, folder: Path) -> Path:
    path = folder / ("a.mat" if "MATLAB" in kind or ".mat" in kind else NAME)
    if kind in MAKERS:
        made = MAKERS[kind](path)
        return made if isinstance(made, Path) else path
    write_granule(path, layout="oldest" if kind in PATCHES_OF_OLDEST else "netCDF-C")
    if kind in EDITS:
        with h5py.File(path, "r+") as file:
            EDITS[kind](file)
    else:
        chunks: list[Any] = []
        with h5py.File(path) as file:
            file[RADIANCE].id.chunk_iter(chunks.append)
        path.write_bytes((PATCHES | PATCHES_OF_OLDEST)[kind](path.read_bytes(), chunks))
    return path


KINDS = {kind: partial(_make, kind) for kind in (*MAKERS, *PATCHES, *PATCHES_OF_OLDEST, *EDITS)}


def execute(path: Path, body: str) -> None:
    """What the guard's child process may be asked to do in place of opening a file."""
    exec(body, {"path": path})


ARGUMENTS: dict[str, dict[str, Any]] = {".mat": {"wavelength": {"first": 400, "last": 700}}}


def read_all(path: Path) -> dict[str, Any]:
    """Open a file and read all there is, as users do.

    Returns:
        Every array by name.

    Raises:
        UserError: The file is refused.
    """
    from spectralvae.readers import open_reader

    with open_reader(path, **ARGUMENTS.get(path.suffix, {})) as scene:
        values = {"wavelength": scene.wavelength}
        values |= {name: array for name, (_, array) in scene.coordinates().items()}
        blocks = [scene.read(rows, columns)[0].ravel() for rows, columns in scene.blocks(2**20)]
        values["radiance"] = np.concatenate(blocks)
        noise = scene.read_noise(slice(None))
        if noise is not None:
            values["noise"] = noise
        facts = (scene.shape, scene.units, scene.band, scene.absent, scene.version)
        values["facts"] = np.array(repr(facts))
    return values
