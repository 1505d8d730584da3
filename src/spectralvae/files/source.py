"""The file that a scene was read from: its variables are described, and copied as they are stored.

Places are "name" or "group/name", "" is the root.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from spectralvae.errors import ConfigError, InputError
from spectralvae.files.writer_base import Writer, attribute, home_of, join, row_chunks, stored_dtype
from spectralvae.readers import guard
from spectralvae.readers.base import Scene, damage_named
from spectralvae.readers.containers import Variable, open_container

_BLOCK_BYTES = 2**24


@dataclass(frozen=True, eq=False)
class Stored:
    """A variable as a file has it.

    Attributes:
        place: Where.
        dims: Places of its dimensions.
        dtype: As numpy has it, "f4" say, or "str".
        attributes: All but `_FillValue`.
        fill: `_FillValue`, None where none is declared.
        values: As stored, neither unpacked nor masked, cropped to the scene's region; None where they are not read.
    """

    place: str
    dims: tuple[str, ...]
    dtype: str
    attributes: Mapping[str, Any]
    fill: Any = None
    values: NDArray[Any] | None = None

    @property
    def group(self) -> str:
        return self.place.rpartition("/")[0]

    def create(self, writer: Writer, chunks: tuple[int, ...] | None = None) -> None:
        """Make it, with its values if they are known; its dimensions are there."""
        names = tuple(dim.rpartition("/")[2] for dim in self.dims)
        writer.create(self.place, names, self.dtype, self.attributes, fill=self.fill, chunks=chunks, values=self.values)


class Source:
    """A file of named variables, open while a ``with`` block runs.

    Args:
        scene: Read from it, with `places`.
        patterns: What else is going to be copied, see `chosen`.

    Attributes:
        variables: All of the file, by their places.

    Raises:
        InputError: The file is damaged.
    """

    def __init__(self, scene: Scene, patterns: Sequence[str] = ()) -> None:
        self.path = scene.path
        self.places = scene.places
        self._region = scene.region
        self.radiance = self.places["radiance"].name
        arguments = {"radiance": self.radiance, "patterns": list(patterns)}
        guard.try_out(self.path, arguments, f"{__name__}:{check_source.__name__}")

    def __enter__(self) -> Self:
        with damage_named(self.path):
            self._container = open_container(self.path)
            self.variables = {variable.name: variable for variable in self._container.variables()}
        for place in self.places.values():
            if place.name not in self.variables:
                self._container.close()
                raise InputError(
                    f"{place.name} is a link to another variable", path=self.path, remedy="store a copy in its place"
                )
        stored = self.variables[self.radiance]
        self.axes = self.places["radiance"].axes
        self._axis = {role: (stored.dims[i], stored.shape[i], stored.homes[i]) for i, role in enumerate(self.axes)}
        y0, y1, x0, x1 = self._region or (0, self._axis["y"][1], 0, self._axis["x"][1])
        self._cuts = {"y": slice(y0, y1), "x": slice(x0, x1)}
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def _roles(self, variable: Variable) -> list[str | None]:
        """Which axis of the scene each of a variable's axes is: by the name and size of its dimension."""
        for place in self.places.values():
            if place.name == variable.name:
                return list(place.axes)
        known = {(dim, size): role for role, (dim, size, _) in self._axis.items()}
        return [known.get(key) for key in zip(variable.dims, variable.shape, strict=True)]

    def _homes(self, variable: Variable) -> Iterator[str]:
        """Places of a variable's dimensions, such that they are in its group or above it, and have names."""
        for i, (dim, home, role) in enumerate(zip(variable.dims, variable.homes, self._roles(variable), strict=True)):
            above = home.rpartition("/")[0]
            if dim == "?":
                yield self._axis[role][2] if role else join(variable.group, f"{variable.base}_dim_{i}")
            elif not above or f"{variable.group}/".startswith(f"{above}/"):
                yield home
            else:
                yield join(variable.group, dim)

    def _cut(self, variable: Variable) -> tuple[slice, ...]:
        """The part of a variable that lies in the scene's region."""
        return tuple(
            self._cuts.get(str(role), slice(0, size))
            for role, size in zip(self._roles(variable), variable.shape, strict=True)
        )

    def dimensions(self, places: Sequence[str]) -> dict[str, int]:
        """The dimensions of some variables, cropped to the scene's region.

        Raises:
            InputError: netCDF-4 cannot hold them: two in a group have one name.
        """
        sizes: dict[str, int] = {}
        homes = {place: list(self._homes(self.variables[place])) for place in places}
        for place, dims in homes.items():
            for home, part in zip(dims, self._cut(self.variables[place]), strict=True):
                if sizes.setdefault(home, part.stop - part.start) != part.stop - part.start:
                    raise InputError(
                        f"{place} has {part.stop - part.start} along {home}, other variables {sizes[home]}, which "
                        "netCDF-4 cannot hold",
                        path=self.path,
                        remedy="rename one of the dimensions",
                    )
        for place, dims in homes.items():
            for home in dims:
                if home_of(sizes, self.variables[place].group, home.rpartition("/")[2]) != home:
                    raise InputError(
                        f"{place} has the dimension {home}, and a nearer group another one of its name, which "
                        "netCDF-4 cannot hold",
                        path=self.path,
                        remedy="rename one of them",
                    )
        return sizes

    def describe(self, place: str) -> Stored:
        """A variable without its values.

        Raises:
            InputError: netCDF-4 has no type for what it holds.
        """
        variable = self.variables[place]
        dtype = stored_dtype(variable.dtype)
        if dtype is None:
            raise InputError(
                f"{place} holds {variable.dtype}, for which netCDF-4 has no type",
                path=self.path,
                remedy="name only others in carry_over",
            )
        attributes = self.attributes(place)
        fill = _fill(attributes.pop("_FillValue", None), dtype)
        return Stored(place, tuple(self._homes(variable)), dtype, attributes, fill)

    def read(self, place: str) -> Stored:
        """A variable with its values."""
        stored, variable = self.describe(place), self.variables[place]
        return replace(stored, values=self._values(variable, stored, self._cut(variable)))

    def _values(self, variable: Variable, stored: Stored, key: tuple[slice, ...]) -> NDArray[Any]:
        with damage_named(self.path):
            values = self._container.read(variable.name, key)
        return values if stored.dtype == "str" else values.astype(stored.dtype)

    def attributes(self, place: str) -> dict[str, Any]:
        """Those of a variable or a group."""
        with damage_named(self.path):
            return {key: attribute(value) for key, value in self._container.attributes(place).items()}

    def groups(self, places: Sequence[str], patterns: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
        """Attributes of the root, of all groups above some variables, and of those that patterns match."""
        named = [group for group in self._container.groups() if _matches(group, patterns)]
        above = [place.rpartition("/")[0] for place in places]
        needed = {"", *(name for group in (*above, *named) for name in itertools.accumulate(group.split("/"), join))}
        return {group: self.attributes(group) for group in sorted(needed)}

    def chosen(self, patterns: Sequence[str]) -> list[str]:
        """The places that patterns match ("*" any text, "/" included).

        Raises:
            ConfigError: A pattern matches none.
        """
        for pattern in patterns:
            if not any(_matches(place, [pattern]) for place in self.variables):
                raise ConfigError(
                    f"matches nothing in it; it has: {', '.join(self.variables)}",
                    key="carry_over",
                    path=self.path,
                    value=pattern,
                )
        return [place for place in self.variables if _matches(place, patterns)]

    def copy(self, place: str, writer: Writer) -> None:
        """Copy a variable, a block at a time; its dimensions are there."""
        variable, stored, cut = self.variables[place], self.describe(place), self._cut(self.variables[place])
        shape = tuple(part.stop - part.start for part in cut)
        itemsize = variable.dtype.itemsize
        chunks = tuple(max(1, min(pair)) for pair in zip(variable.chunks or shape, shape, strict=True))
        if variable.chunks is None or math.prod(chunks) * itemsize > _BLOCK_BYTES:
            chunks = row_chunks(shape, itemsize)
        stored.create(writer, chunks)
        for key in _blocks(shape, chunks, itemsize):
            moved = tuple(
                slice(part.start + where.start, part.start + where.stop) for part, where in zip(cut, key, strict=True)
            )
            writer.write(place, key, self._values(variable, stored, moved))


def check_source(path: Path, radiance: str, patterns: Sequence[str]) -> None:
    """What the guard tries out: the file's structure, all attributes, and what of it will be copied.

    Raises:
        InputError: It is damaged.
    """
    with damage_named(path), closing(open_container(path)) as container:
        variables = {variable.name: variable for variable in container.variables()}
        for place in ("", *container.groups(), *variables):
            container.attributes(place)
        homes = variables[radiance].homes if radiance in variables else ()
        for place in variables:
            if (place in homes or _matches(place, patterns)) and stored_dtype(variables[place].dtype) is not None:
                container.check(place)


def _matches(place: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(place, pattern) for pattern in patterns)


def _fill(value: Any, dtype: str) -> Any:
    """A _FillValue in the variable's type; None where it is none that the variable could hold."""
    if value is None or dtype == "str":
        return value if isinstance(value, str) else None
    number = np.ravel(value)[:1]
    with np.errstate(all="ignore"):
        fill = number.astype(dtype)
    lost = fill.dtype.kind in "iu" and (fill != number).any()
    return None if lost or not number.size else fill[0]


def _blocks(shape: tuple[int, ...], chunks: tuple[int, ...], itemsize: int) -> Iterator[tuple[slice, ...]]:
    """Cut a variable into blocks of whole chunks, each of `_BLOCK_BYTES` at most or of one chunk."""
    sizes = list(chunks)
    for axis in reversed(range(len(shape))):
        times = max(1, _BLOCK_BYTES // (math.prod(sizes) * itemsize))
        sizes[axis] = min(max(1, shape[axis]), sizes[axis] * times)
    axes = [[slice(i, min(i + size, n)) for i in range(0, n, size)] for n, size in zip(shape, sizes, strict=True)]
    yield from itertools.product(*axes)
