"""Makers of granules and of files that must be refused, for tests and benchmarks."""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Callable
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

Maker = Callable[[Path], Path]


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
        put("exposure_time", np.full(NY, 0.9, dtype=np.float32), dims[:1], (NY,), units="s")
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


def recreate(file: h5py.File, values: Any = None, **arguments: Any) -> h5py.Dataset:
    """Put another radiance in the place of a granule's, with the dimensions of the old one."""
    old = file[RADIANCE]
    scales = [axis[0] for axis in old.dims]
    del file[RADIANCE]
    new = file.create_dataset(RADIANCE, data=values, **arguments)
    for axis, scale in zip(new.dims, scales, strict=False):
        axis.attach_scale(scale)
    return new


KINDS: dict[str, Maker] = {}


def kind(name: str) -> Callable[[Maker], Maker]:
    def add(maker: Maker) -> Maker:
        KINDS[name] = maker
        return maker

    return add


def edited(name: str, **layout: Any) -> Callable[[Callable[[h5py.File], Any]], Callable[[h5py.File], Any]]:
    """A kind that is a granule with something done to it through h5py."""

    def add(edit: Callable[[h5py.File], Any]) -> Callable[[h5py.File], Any]:
        @kind(name)
        def make(folder: Path) -> Path:
            path = write_granule(folder / NAME, **layout)
            with h5py.File(path, "r+") as file:
                edit(file)
            return path

        return edit

    return add


def patched(name: str, **layout: Any) -> Callable[[Callable[[bytearray, Path], Any]], Callable[[bytearray, Path], Any]]:
    """A kind that is a granule with bytes changed."""

    def add(patch: Callable[[bytearray, Path], Any]) -> Callable[[bytearray, Path], Any]:
        @kind(name)
        def make(folder: Path) -> Path:
            path = write_granule(folder / NAME, **layout)
            content = bytearray(path.read_bytes())
            patch(content, path)
            path.write_bytes(content)
            return path

        return patch

    return add


def chunks_of(path: Path, name: str) -> list[Any]:
    found: list[Any] = []
    with h5py.File(path) as file:
        file[name].id.chunk_iter(found.append)
    return found


# Files that are none


@kind("no such file")
def _missing(folder: Path) -> Path:
    return folder / NAME


@kind("empty file")
def _empty(folder: Path) -> Path:
    (folder / NAME).touch()
    return folder / NAME


@kind("text named .nc")
def _text(folder: Path) -> Path:
    (folder / NAME).write_text("<html>please log in</html>\n" * 100)
    return folder / NAME


@kind("text named .mat")
def _text_mat(folder: Path) -> Path:
    (folder / "a.mat").write_text("<html>please log in</html>\n" * 100)
    return folder / "a.mat"


@kind("empty folder")
def _folder(folder: Path) -> Path:
    (folder / "a.nc").mkdir()
    return folder / "a.nc"


@kind("pipe that nobody writes to")
def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / NAME)
    return folder / NAME


@kind("device without end")
def _device(folder: Path) -> Path:
    return Path("/dev/zero")


@kind("symbolic link to a device")
def _link_to_device(folder: Path) -> Path:
    (folder / NAME).symlink_to("/dev/zero")
    return folder / NAME


@kind("symbolic link to nothing")
def _dangling(folder: Path) -> Path:
    (folder / NAME).symlink_to(folder / "gone.nc")
    return folder / NAME


@kind("symbolic link to itself")
def _self_link(folder: Path) -> Path:
    (folder / NAME).symlink_to(folder / NAME)
    return folder / NAME


@kind("name with a line break")
def _line_break(folder: Path) -> Path:
    return write_granule(folder / "a.nc").rename(folder / "a\nb.nc")


# Cut and overwritten


@patched("cut within the superblock")
def _cut_head(content: bytearray, path: Path) -> None:
    del content[20:]


@patched("cut in the middle")
def _cut_half(content: bytearray, path: Path) -> None:
    del content[len(content) // 2 :]


@patched("cut by one byte")
def _cut_end(content: bytearray, path: Path) -> None:
    del content[-1:]


@patched("superblock: version flipped")
def _superblock_version(content: bytearray, path: Path) -> None:
    content[8] ^= 0x10


@patched("superblock: root address flipped", layout="oldest")
def _superblock_root(content: bytearray, path: Path) -> None:
    content[64] ^= 0x20


@patched("zeros over the first object header")
def _zeroed_header(content: bytearray, path: Path) -> None:
    start = content.index(b"OHDR")
    content[start : start + 64] = bytes(64)


@patched("chunk index: an address beyond the end")
def _chunk_beyond(content: bytearray, path: Path) -> None:
    _replace_address(content, path, lambda chunks: (chunks[1].byte_offset, len(content) - 4))


@patched("chunk index: two chunks at one address")
def _chunk_twice(content: bytearray, path: Path) -> None:
    _replace_address(content, path, lambda chunks: (chunks[1].byte_offset, chunks[2].byte_offset))


def _replace_address(content: bytearray, path: Path, choose: Callable[[list[Any]], tuple[int, int]]) -> None:
    old, new = choose(chunks_of(path, RADIANCE))
    place = content.index(struct.pack("<Q", old))
    content[place : place + 8] = struct.pack("<Q", new)


@kind("chunk index: leads into itself")
def _index_circle(folder: Path) -> Path:
    path = write_granule(folder / NAME)
    with h5py.File(path, "r+") as file:
        recreate(file, file[RADIANCE][...], chunks=(1, 1, 16), compression="gzip")
    content = bytearray(path.read_bytes())
    root = content.index(b"TREE\x01\x01")
    # Signature, type, level, count, siblings, then the first key: size, mask, three offsets and that of the item.
    place = root + 4 + 2 + 2 + 16 + 8 + 4 * 8
    content[place : place + 8] = struct.pack("<Q", root)
    path.write_bytes(content)
    return path


@kind("chunk index: a node is its own brother")
def _index_brother(folder: Path) -> Path:
    path = write_granule(folder / NAME)
    with h5py.File(path, "r+") as file:
        recreate(file, file[RADIANCE][...], chunks=(1, 1, 16), compression="gzip")
    path.write_bytes(own_brothers(path.read_bytes()))
    return path


def own_brothers(content: bytes) -> bytes:
    """An HDF5 file whose chunk indices never end: each leaf names itself as the one to its right."""
    changed = bytearray(content)
    for leaf in re.finditer(rb"TREE\x01\x00", content):
        changed[leaf.start() + 16 : leaf.start() + 24] = struct.pack("<Q", leaf.start())
    return bytes(changed)


@patched("chunk content overwritten")
def _chunk_content(content: bytearray, path: Path) -> None:
    chunk = chunks_of(path, RADIANCE)[3]
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = os.urandom(chunk.size)


@patched("one bit of a chunk flipped")
def _chunk_bit(content: bytearray, path: Path) -> None:
    chunk = chunks_of(path, RADIANCE)[3]
    content[chunk.byte_offset + chunk.size // 2] ^= 1


@patched("shuffle: parameter flipped", layout="oldest")
def _shuffle(content: bytearray, path: Path) -> None:
    place = 0
    while (place := content.find(b"shuffle\x00", place)) >= 0:
        content[place + 8] ^= 2
        place += 8


@kind("byte order of a type flipped")
def _byte_order(folder: Path) -> Path:
    path = write_granule(folder / NAME, layout="oldest")
    content = path.read_bytes()
    # Version 1, class 1 (float), little-endian, 32 bits, wherever it stands: one of them is the radiance's
    for match in re.finditer(rb"\x11\x20\x1f\x00\x04\x00\x00\x00\x00\x00\x20\x00\x17\x08\x00\x17\x7f", content):
        path.write_bytes(content[: match.start() + 1] + b"\x21" + content[match.start() + 2 :])
        with h5py.File(path) as file:
            if file[RADIANCE].dtype == ">f4":
                return path
    raise AssertionError("the type was not found")


# Leading elsewhere


@edited("external link as radiance")
def _external_link(file: h5py.File) -> None:
    other = write_granule(Path(file.filename).with_name("other.nc"))
    del file[RADIANCE]
    file[RADIANCE] = h5py.ExternalLink(other, RADIANCE)


@edited("external link in a corner")
def _external_link_unused(file: h5py.File) -> None:
    file["notes/more"] = h5py.ExternalLink("/etc/passwd", "/")


@edited("external storage")
def _external_storage(file: h5py.File) -> None:
    secret = Path(file.filename).with_name("secret")
    secret.write_bytes((SECRET * (NY * NX * NC * 4 // len(SECRET) + 1))[: NY * NX * NC * 4])
    recreate(file, shape=(NY, NX, NC), dtype="<f4", external=[(str(secret), 0, h5py.h5f.UNLIMITED)])


@edited("virtual dataset")
def _virtual(file: h5py.File) -> None:
    other = write_granule(Path(file.filename).with_name("other.nc"))
    layout = h5py.VirtualLayout((NY, NX, NC), "<f4")
    layout[...] = h5py.VirtualSource(other, RADIANCE, (NY, NX, NC))
    scales = [axis[0] for axis in file[RADIANCE].dims]
    del file[RADIANCE]
    virtual = file.create_virtual_dataset(RADIANCE, layout)
    for axis, scale in zip(virtual.dims, scales, strict=True):
        axis.attach_scale(scale)


@edited("soft link in a circle")
def _soft_circle(file: h5py.File) -> None:
    del file[f"{BAND}/latitude"]
    file[f"{BAND}/latitude"] = h5py.SoftLink(f"/{BAND}/latitude")


@edited("soft link to nothing")
def _soft_dangling(file: h5py.File) -> None:
    del file[f"{BAND}/latitude"]
    file[f"{BAND}/latitude"] = h5py.SoftLink("/geometry/latitude")


@kind("groups in a circle")
def _group_circle(folder: Path) -> Path:
    with h5py.File(folder / NAME, "w") as file:
        file["a/b/c"] = file["/"]
        file["a/b/d"] = file.require_group("a")
    return folder / NAME


@kind("groups 5,000 deep")
def _deep(folder: Path) -> Path:
    with h5py.File(folder / NAME, "w", libver="v110") as file:
        group = file
        for _ in range(5000):
            group = group.create_group("g")
    return folder / NAME


# Declaring too much, or what isn't there


@edited("radiance of 4 EB, never written")
def _declared(file: h5py.File) -> None:
    recreate(file, shape=(2**20, 2**20, 2**20), dtype="<f4")


@edited("all dimensions of 64 GB, never written")
def _declared_all(file: h5py.File) -> None:
    for key in list(file):
        del file[key]
    for dim, size in (("mirror_step", 2**11), ("xtrack", 2**11), ("spectral_channel", 2**12)):
        file.create_dataset(f"{BAND}/{dim}", (size,), "<f4").make_scale(dim)
    for variable, dims in (("radiance", 3), ("nominal_wavelength", 2)):
        scales = [file[f"{BAND}/{d}"] for d in ("mirror_step", "xtrack", "spectral_channel")[-dims:]]
        made = file.create_dataset(f"{BAND}/{variable}", [s.size for s in scales], "<f4")
        for axis, scale in zip(made.dims, scales, strict=True):
            axis.attach_scale(scale)


@edited("chunk of 1 GiB")
def _large_chunk(file: h5py.File) -> None:
    shape = (NY, NX, NC)
    radiance = recreate(file, shape=shape, maxshape=(None, None, None), chunks=(64, 2**16, 64), dtype="<f4",
                        compression="gzip")  # fmt: skip
    radiance.id.write_direct_chunk((0, 0, 0), zlib.compress(bytes(2**20)))


@edited("deflated bomb in a chunk")
def _bomb(file: h5py.File) -> None:
    bomb = zlib.compress(bytes(2**22), 9)
    radiance = recreate(file, file[RADIANCE][...], chunks=(1, NX, NC), compression="gzip")
    radiance.id.write_direct_chunk((2, 0, 0), bomb)


@edited("chunk that inflates to too little")
def _short_chunk(file: h5py.File) -> None:
    file[RADIANCE].id.write_direct_chunk((2, 0, 0), zlib.compress(bytes(NX * NC)))


@edited("chunk stored in 100 times its size")
def _stuffed_chunk(file: h5py.File) -> None:
    chunk = zlib.compress(bytes(NX // 2 * NC * 4))
    file[RADIANCE].id.write_direct_chunk((2, 0, 0), chunk + os.urandom(100 * NX // 2 * NC * 4))


@edited("chunk that skips its filters")
def _filter_mask(file: h5py.File) -> None:
    file[RADIANCE].id.write_direct_chunk((2, 0, 0), bytes(NX // 2 * NC * 4), filter_mask=3)


@edited("missing chunk")
def _missing_chunk(file: h5py.File) -> None:
    values = file[RADIANCE][...]
    radiance = recreate(file, shape=values.shape, dtype="<f4", chunks=(1, NX, NC), compression="gzip")
    radiance[:-1] = values[:-1]


@edited("unknown filter")
def _unknown_filter(file: h5py.File) -> None:
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_chunk((NY, NX, NC))
    layout.set_filter(32099, h5py.h5z.FLAG_OPTIONAL, (1,))
    _replace_raw(file, h5py.h5t.IEEE_F32LE, layout).id.write_direct_chunk((0, 0, 0), bytes(NY * NX * NC * 4))


def _replace_raw(file: h5py.File, stored: Any, layout: Any = None) -> h5py.Dataset:
    scales = [axis[0] for axis in file[RADIANCE].dims]
    del file[RADIANCE]
    space = h5py.h5s.create_simple((NY, NX, NC))
    made = h5py.Dataset(h5py.h5d.create(file[BAND].id, b"radiance", stored, space, layout))
    for axis, scale in zip(made.dims, scales, strict=True):
        axis.attach_scale(scale)
    return made


@edited("attribute of 8 MiB")
def _large_attribute(file: h5py.File) -> None:
    file[RADIANCE].attrs.create("comment", np.zeros(2**20))


@edited("units that hold a terminal's control characters")
def _control_characters(file: h5py.File) -> None:
    del file[BAND]
    file.create_group("product")
    file.attrs["collection_shortname"] = "TEMPO\x1b[2J\nwelcome" + "!" * 10000


# Of another kind than numbers


@edited("texts as radiance")
def _texts(file: h5py.File) -> None:
    recreate(file, np.full((NY, NX, NC), b"12.5"))


@edited("texts of any length as radiance")
def _long_texts(file: h5py.File) -> None:
    recreate(file, np.full((NY, NX, NC), "12.5", dtype=object), dtype=h5py.string_dtype())


@edited("references as radiance")
def _references(file: h5py.File) -> None:
    recreate(file, shape=(NY, NX, NC), dtype=h5py.ref_dtype)


@edited("records as radiance")
def _records(file: h5py.File) -> None:
    recreate(file, np.zeros((NY, NX, NC), dtype=[("real", "<f4"), ("imag", "<f4")]))


@edited("floats of an odd layout")
def _odd_floats(file: h5py.File) -> None:
    odd = h5py.h5t.IEEE_F32LE.copy()
    odd.set_ebias(100)
    _replace_raw(file, odd).id.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ones((NY, NX, NC), dtype="<f4"))


@edited("a group as radiance")
def _group(file: h5py.File) -> None:
    del file[RADIANCE]
    file.create_group(RADIANCE)


@edited("text as a fill value")
def _text_fill(file: h5py.File) -> None:
    file[RADIANCE].attrs["_FillValue"] = "none"


@edited("variable of other sizes")
def _other_size(file: h5py.File) -> None:
    recreate(file, np.ones((NY, NX + 1, NC), dtype="<f4"))


# MATLAB


def _element(kind: int, content: bytes) -> bytes:
    return struct.pack("<2I", kind, len(content)) + content + bytes(-len(content) % 8 if kind != 15 else 0)


def _matrix_head(shape: tuple[int, ...]) -> bytes:
    return (
        _element(6, struct.pack("<2I", 6, 0))  # flags: class double
        + _element(5, struct.pack(f"<{len(shape)}i", *shape))
        + _element(1, b"Y")
    )


def _mat_5(path: Path, element: bytes) -> Path:
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + element)
    return path


@kind("MATLAB 5: declares 3 GiB")
def _mat_declared(folder: Path) -> Path:
    head = _matrix_head((100, 4000, 1000))
    size = 3_200_000_000
    return _mat_5(
        folder / "a.mat",
        struct.pack("<2I", 14, len(head) + 8 + size) + head + struct.pack("<2I", 9, size) + bytes(1000),
    )


@kind("MATLAB 5: deflated bomb of 3 GiB")
def _mat_bomb(folder: Path) -> Path:
    head = _matrix_head((100, 4000, 1000))
    size = 3_200_000_000
    deflater = zlib.compressobj(9)
    start = struct.pack("<2I", 14, len(head) + 8 + size) + head + struct.pack("<2I", 9, size)
    deflated = deflater.compress(start) + deflater.flush(zlib.Z_FULL_FLUSH)
    piece = deflater.compress(bytes(size // 200)) + deflater.flush(zlib.Z_FULL_FLUSH)
    return _mat_5(folder / "a.mat", _element(15, deflated + 200 * piece))


@kind("MATLAB 5: cut")
def _mat_cut(folder: Path) -> Path:
    head = _matrix_head((3, 4, 5))
    content = head + _element(9, np.arange(60.0).tobytes())
    path = _mat_5(folder / "a.mat", _element(14, content))
    path.write_bytes(path.read_bytes()[:-200])
    return path


@kind("MATLAB 7.3: external storage")
def _mat_external(folder: Path) -> Path:
    secret = folder / "secret"
    secret.write_bytes((SECRET * 100)[: 3 * 4 * 5 * 8])
    with h5py.File(folder / "a.mat", "w", userblock_size=512) as file:
        file.create_dataset("Y", (5, 4, 3), "<f8", external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
    return folder / "a.mat"


@kind("MATLAB 7.3: declares more than is stored")
def _mat_73_more(folder: Path) -> Path:
    path = folder / "a.mat"
    with h5py.File(path, "w") as file:
        file["Y"] = np.ones((5, 4, 3))
    path.write_bytes(path.read_bytes().replace(struct.pack("<Q", 5), struct.pack("<Q", 5000)))
    return path


@kind("MATLAB 7.3: declares 8 EB")
def _mat_73_declared(folder: Path) -> Path:
    with h5py.File(folder / "a.mat", "w", userblock_size=512) as file:
        file.create_dataset("Y", (2**20, 2**20, 2**20), "<f8")
    return folder / "a.mat"


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
