"""How a scene's file lays out what it holds, and new netCDF-4 files that are laid out like it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from spectralvae.errors import ConfigError, InputError
from spectralvae.files.source import Source, Stored
from spectralvae.files.writer_base import Writer, join, row_chunks
from spectralvae.files.writers import new_file
from spectralvae.readers.base import UNDECLARED_FILLS, Scene, damage_named
from spectralvae.readers.containers import Container
from spectralvae.readers.dataset import ATTRIBUTES
from spectralvae.readers.packing import text

AXES = ("y", "x", "channel")
GROUP = "source"

Put = Callable[[slice, slice, NDArray[np.float32]], None]

# Attributes of the group; a netCDF-4 file has checksums of its numbers, but not of such texts.
_LAYOUT, _DIGEST = "layout", "layout_sha256"
_OF_PACKED = ("scale_factor", "add_offset", "missing_value", "valid_min", "valid_max", "valid_range", "_Unsigned")


@dataclass(frozen=True, eq=False)
class Layout:
    """What a file laid out like a scene's holds, but for the radiance itself and for what is carried over.

    Attributes:
        shape: (ny, nx, nc) of the scene, that is of its region.
        groups: Attributes of the root "" and of each group.
        dimensions: Size of each dimension by its place "name" or "group/name", after the region.
        radiance: The radiance's variable, without values.
        axes: Which of "y", "x" and "channel" its axes are.
        missing: What an invalid sample is stored as.
        variables: The other variables that the scene is read from, and those of its dimensions.
    """

    shape: tuple[int, int, int]
    groups: Mapping[str, Mapping[str, Any]]
    dimensions: Mapping[str, int]
    radiance: Stored
    axes: tuple[str, ...]
    missing: float
    variables: tuple[Stored, ...]


def layout_of(scene: Scene) -> Layout:
    """How a scene's file lays it out.

    Of netCDF, HDF5 and Zarr files (TEMPO, too) groups, names, dimensions, attributes and fills are the file's own.
    Radiance that is stored as integers, or packed, becomes float32 with NaN as its fill; a fill that the file doesn't
    declare is -1e30 for TEMPO, else NaN. Unlimited dimensions get the size that they have. Wavelengths and units that
    the user gave are added.

    MATLAB, ENVI, tiles, and dimensions without names give a plain layout: radiance (y, x, channel), wavelength and
    coordinates as the scene has them.

    Args:
        scene: Of any format.

    Raises:
        InputError: The file is damaged, or netCDF-4 cannot hold its variables.
    """
    if not scene.places:
        return _plain_layout(scene)
    with Source(scene) as source:
        stored, missing = _as_floats(source, scene)
        kept = {place.name for place in scene.places.values()} | (set(stored.dims) & set(source.variables))
        names = [name for name in source.variables if name in kept]
        variables = {name: source.read(name) for name in names if name != source.radiance}
        if "wavelength" not in scene.places:
            place, wavelength = join(stored.group, "wavelength"), scene.wavelength
            dims = [stored.dims[source.axes.index(axis)] for axis in AXES[3 - wavelength.ndim :]]
            variables[place] = _decoded("wavelength", tuple(dims), wavelength, place)
        return Layout(
            shape=scene.shape,
            groups=source.groups(names),
            dimensions=source.dimensions(names),
            radiance=stored,
            axes=source.axes,
            missing=missing,
            variables=tuple(variables.values()),
        )


def _as_floats(source: Source, scene: Scene) -> tuple[Stored, float]:
    """The radiance's variable as it takes floats, and what stands for an invalid sample."""
    stored = source.describe(source.radiance)
    attributes = dict(stored.attributes)
    if scene.units and not text(attributes.get("units", "")).strip():
        attributes["units"] = scene.units
    if stored.dtype not in ("f4", "f8") or {"scale_factor", "add_offset"} & attributes.keys():
        attributes = {key: value for key, value in attributes.items() if key not in _OF_PACKED}
        dtype = "f8" if stored.dtype == "f8" else "f4"
        return replace(stored, dtype=dtype, attributes=attributes, fill=np.dtype(dtype).type(np.nan)), math.nan
    undeclared = UNDECLARED_FILLS["undeclared_fill"] if scene.format == "tempo" else math.nan
    declared = np.ravel(attributes.get("missing_value", ()))
    missing = stored.fill if stored.fill is not None else declared[0] if declared.size else undeclared
    return replace(stored, attributes=attributes), float(np.dtype(stored.dtype).type(missing))


def _plain_layout(scene: Scene) -> Layout:
    wavelength = scene.wavelength
    variables = [_decoded("wavelength", AXES[3 - wavelength.ndim :], wavelength)]
    variables += [_decoded(name, dims, values) for name, (dims, values) in scene.coordinates().items()]
    attributes = {"long_name": "radiance"} | ({"units": scene.units} if scene.units else {})
    return Layout(
        shape=scene.shape,
        groups={"": {"Conventions": "CF-1.11"}},
        dimensions=dict(zip(AXES, scene.shape, strict=True)),
        radiance=Stored("radiance", AXES, "f4", attributes, np.float32(np.nan)),
        axes=AXES,
        missing=math.nan,
        variables=tuple(variables),
    )


def _decoded(name: str, dims: tuple[str, ...], values: NDArray[Any], place: str | None = None) -> Stored:
    """A variable of what a scene reads: in its units, NaN where invalid."""
    units = {"units": "seconds since 1970-01-01T00:00:00Z"} if name == "time" else {}
    values = values.astype(values.dtype.newbyteorder("="))
    fill = values.dtype.type(np.nan) if np.isnan(values).any() else None
    return Stored(place or name, dims, values.dtype.str[1:], ATTRIBUTES[name] | units, fill, values)


def write_layout(writer: Writer, layout: Layout) -> None:
    """Write a layout as the group "source" of a file whose own root dimensions are there already.

    The group holds what the layout does, in its own groups and by its own names, but a dimension named as one of the
    root is called "source_NAME"; its attribute `layout` (JSON) tells the rest.
    """
    above = {name for name in writer.dimensions if "/" not in name}
    homes = {}
    for place, size in layout.dimensions.items():
        group, _, name = place.rpartition("/")
        homes[place] = join(join(GROUP, group) if group else GROUP, f"source_{name}" if name in above else name)
        writer.dimension(homes[place], size)
    for place, attributes in layout.groups.items():
        writer.group(join(GROUP, place) if place else GROUP, attributes)
    for stored in layout.variables:
        moved = replace(stored, place=join(GROUP, stored.place), dims=tuple(homes[dim] for dim in stored.dims))
        moved.create(writer)
    content = to_json(layout)
    writer.group(GROUP, {_LAYOUT: content, _DIGEST: _sha256(content)})


def read_layout(container: Container) -> Layout:
    """Read the layout that `write_layout` wrote.

    Args:
        container: The open file.

    Raises:
        InputError: It holds none, or the file is damaged.
    """
    with damage_named(container.path, AttributeError):
        attributes = container.attributes(GROUP) if GROUP in container.groups() else {}
        content = attributes.get(_LAYOUT)
        if not isinstance(content, str):
            raise InputError(
                "holds no layout of a source", path=container.path, remedy="give a file that `encode` wrote"
            )
        if _sha256(content) != attributes.get(_DIGEST):
            raise ValueError(f"the SHA-256 of {GROUP}'s attribute {_LAYOUT} differs")
        layout = from_json(content)
        variables = []
        for stored in layout.variables:
            place, shape = join(GROUP, stored.place), tuple(layout.dimensions[dim] for dim in stored.dims)
            container.check(place)
            values = container.read(place, (slice(None),) * len(shape))
            if values.shape != shape:
                raise ValueError(f"{place} is {values.shape}, not {shape}")
            variables.append(replace(stored, values=values if stored.dtype == "str" else values.astype(stored.dtype)))
    return replace(layout, variables=tuple(variables))


@contextmanager
def new_scene(
    path: Path,
    layout: Layout,
    attributes: Mapping[str, Any],
    carried: Scene | None = None,
    carry_over: Sequence[str] = (),
) -> Iterator[Put]:
    """Write a netCDF-4 file laid out as a layout says; it appears once the block is left without error.

    Args:
        path: The file.
        layout: Of the scene.
        attributes: Added to those of the root; a `history` is appended to the one there.
        carried: The scene that the layout is of.
        carry_over: Patterns ("*" any text, "/" included) of places in its file: variables that are copied as they are
            stored, cropped to the scene's region.

    Yields:
        A function that takes rows, columns and their radiance (rows, columns, nc) float32, NaN where invalid.

    Raises:
        ConfigError: Nothing in the file matches a pattern.
        InputError: The source is damaged, or netCDF-4 cannot hold what is to be copied.
        NoRoomError: The disk is full.
    """
    if carry_over:
        assert carried is not None and carried.shape == layout.shape
        if not carried.places:
            raise ConfigError(
                f"nothing can be copied from a file of format {carried.format}",
                key="carry_over",
                path=carried.path,
                remedy="leave it out",
            )
    with new_file(path, "netcdf") as writer:
        for place, size in layout.dimensions.items():
            writer.dimension(place, size)
        root = {**layout.groups[""], **attributes}
        if "history" in attributes and "history" in layout.groups[""]:
            root["history"] = f"{text(layout.groups['']['history'])}\n{attributes['history']}"
        for place, own in {**layout.groups, "": root}.items():
            writer.group(place, own)
        for stored in layout.variables:
            stored.create(writer)
        if carried is not None and carry_over:
            _carry_over(writer, layout, carried, carry_over)
        yield _create_radiance(writer, layout)


def _create_radiance(writer: Writer, layout: Layout) -> Put:
    stored, axes = layout.radiance, layout.axes
    shape = tuple(layout.dimensions[dim] for dim in stored.dims)
    dtype = np.dtype(stored.dtype)
    stored.create(writer, row_chunks(shape, dtype.itemsize, axes.index("y"), axes.index("x")))
    order = [AXES.index(axis) for axis in axes]

    def put(rows: slice, columns: slice, radiance: NDArray[np.float32]) -> None:
        values = radiance.astype(dtype)
        values[np.isnan(values)] = layout.missing
        key = (rows, columns, slice(None))
        writer.write(stored.place, tuple(key[axis] for axis in order), values.transpose(order))

    return put


def _carry_over(writer: Writer, layout: Layout, scene: Scene, patterns: Sequence[str]) -> None:
    there = {layout.radiance.place, *(stored.place for stored in layout.variables)}
    with Source(scene, patterns) as source:
        names = [name for name in source.chosen(patterns) if name not in there]
        dimensions = source.dimensions([name for name in source.variables if name in (*there, *names)])
        for place, size in dimensions.items():
            if place not in writer.dimensions:
                writer.dimension(place, size)
        for place, attributes in source.groups(names, patterns).items():
            if place not in layout.groups:
                writer.group(place, attributes)
        for name in names:
            source.copy(name, writer)


def _sha256(content: str) -> str:
    return hashlib.sha256(content.encode("utf-8", "backslashreplace")).hexdigest()


def to_json(layout: Layout) -> str:
    """All of a layout but the values."""
    variables = [asdict(replace(stored, values=None)) for stored in (layout.radiance, *layout.variables)]
    content = {**asdict(replace(layout, variables=())), "radiance": variables[0], "variables": variables[1:]}
    return json.dumps(content, default=_encode)


def _encode(value: Any) -> dict[str, Any]:
    """What JSON has no type for, such that `_decode` gives it back."""
    if isinstance(value, bytes):
        return {"@bytes": value.decode("latin-1")}
    if isinstance(value, h5py.Empty):
        return {"@empty": value.dtype.str}
    array = np.asarray(value)
    items = [item.decode("latin-1") if isinstance(item, bytes) else item for item in array.ravel().tolist()]
    return {"@dtype": array.dtype.str, "@values": items if array.ndim else items[0]}


def _decode(value: dict[str, Any]) -> Any:
    if value.keys() == {"@bytes"}:
        return np.bytes_(value["@bytes"].encode("latin-1"))
    if value.keys() == {"@empty"}:
        return h5py.Empty(np.dtype(value["@empty"]))
    if value.keys() == {"@dtype", "@values"}:
        dtype = np.dtype(value["@dtype"])
        array = np.array(value["@values"], dtype=dtype)
        return array if array.ndim else array[()]
    return value


def from_json(content: str) -> Layout:
    """What `to_json` wrote, without values.

    Raises:
        ValueError, KeyError, TypeError: It is damaged.
    """
    found = json.loads(content, object_hook=_decode)
    ny, nx, nc = found["shape"]
    radiance, *variables = (
        Stored(**{**stored, "dims": tuple(stored["dims"])}) for stored in (found["radiance"], *found["variables"])
    )
    axes = tuple(found["axes"])
    layout = Layout(
        **{**found, "shape": (ny, nx, nc), "axes": axes, "radiance": radiance, "variables": tuple(variables)}
    )
    sizes = {axis: layout.dimensions[dim] for axis, dim in zip(axes, radiance.dims, strict=True)}
    if tuple(sizes[axis] for axis in AXES) != layout.shape:
        raise ValueError(f"{sizes} are not {layout.shape}")
    return layout
