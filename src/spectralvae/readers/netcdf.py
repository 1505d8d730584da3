"""Arrays in netCDF-4, HDF5, netCDF-3 and Zarr: one numeric 3-D variable is the scene, its axes in any order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectralvae.errors import ConfigError, InputError
from spectralvae.readers.arguments import GIVE_WAVELENGTHS, Window, check_wavelengths, given_wavelengths, no_wavelengths
from spectralvae.readers.base import COORDINATES, FLAG, WAVELENGTH_NAMES, Coordinate, Place, Scene, damage_named
from spectralvae.readers.containers import Container, Variable, open_container
from spectralvae.readers.packing import (
    EPOCH,
    check_packing,
    decode,
    is_declared_fill,
    nanometres,
    text,
    time_base,
    unix_seconds,
    unpack,
)

# Without `dims`, dimensions of these names (in any case) are known.
USUAL_DIMS = {
    "y": {"y", "row", "rows", "line", "lines", "lat", "latitude", "downtrack"},
    "x": {"x", "col", "cols", "column", "columns", "sample", "samples", "lon", "longitude", "crosstrack"},
    "channel": {"channel", "channels", "band", "bands", "wavelength", "wavelengths", "wl", "lambda"},
}


# A variable, and which axes of it are those wanted, in their order.
_Placed = tuple[Variable, tuple[int, ...]]


@dataclass(frozen=True)
class _Axes:
    """Which axis of a variable is which.

    Attributes:
        axis: Of "y", "x" and "channel", in the order of the variable's axes.
        name: The dimension's name, "?" where it has none.
        size: The dimension's.
    """

    axis: dict[str, int]
    name: dict[str, str]
    size: dict[str, int]

    def fit(self, variable: Variable, *roles: str) -> tuple[int, ...] | None:
        """The axes of another variable that are these, None if its dimensions are others.

        Dimensions without names fit by their sizes, and then stand as in the scene if they can.
        """
        stored = [role for role in self.axis if role in roles]
        if len(variable.shape) != len(roles) or variable.dtype.kind not in "iuf":
            return None
        for order in permutations(stored):
            if all(
                size == self.size[role] and (dim == self.name[role] or "?" in (dim, self.name[role]))
                for role, dim, size in zip(order, variable.dims, variable.shape, strict=True)
            ):
                return tuple(order.index(role) for role in roles)
        return None


class NetcdfScene(Scene):
    """A 3-D variable of a netCDF or HDF5 file.

    Its _FillValue and missing_value are fills, recognised in the numbers as stored; scale_factor and add_offset are
    applied after that. latitude, longitude, the angles (degrees) and time are read where the file has variables of
    these names along y and x (time: along y, too).

    Args:
        path: The file.
        variable: Its name or "group/name"; None takes the only numeric 3-D one.
        dims: For each of "y", "x" and "channel" the name of its dimension, or the number of its axis from 0; None
            takes the usual names (`USUAL_DIMS`).
        wavelength: nc wavelengths in nm, or {"first": nm, "last": nm} for evenly spaced channels; None takes them
            from the variable named as the channel dimension, or named wavelength(s), wl or lambda (any case, any
            group): (channel) or (x, channel), with units of nanometres or micrometres.
        region: [y0, y1, x0, x1], half-open pixel bounds; None for the full image.
        units: Of the values, where the file doesn't say.

    Raises:
        InputError: No or several variables or wavelengths; units or attributes that aren't read; damage.
        ConfigError: An argument doesn't fit the file.
    """

    format = "netcdf"

    def __init__(
        self,
        path: Path,
        *,
        variable: str | None = None,
        dims: Mapping[str, str | int] | None = None,
        wavelength: Sequence[float] | NDArray[Any] | Mapping[str, float] | None = None,
        region: Sequence[int] | None = None,
        units: str | None = None,
    ) -> None:
        with closing(open_container(path)) as container:
            with damage_named(path):
                variables = container.variables()
            chosen = _choose_variable(path, variables, variable)
            axes = _find_axes(path, chosen, dims)
            self._radiance: _Placed = chosen, (axes.axis["y"], axes.axis["x"], axes.axis["channel"])
            check_packing(path, chosen.name, chosen)
            if chosen.dtype.kind == "i" and text(chosen.attrs.get("_Unsigned", "")).lower() == "true":
                remedy = f"save it as {chosen.dtype} of type u"
                raise InputError("is _Unsigned, which is not read", key=chosen.name, path=path, remedy=remedy)
            ny, nx, nc = (axes.size[role] for role in ("y", "x", "channel"))
            self._wavelength_in_file: _Placed | None = None
            given = None
            if wavelength is not None:
                given = given_wavelengths("wavelength", wavelength, nc, path=path)
            else:
                self._wavelength_in_file = _find_wavelength(path, variables, chosen, axes)
                _read_wavelength(path, container, *self._wavelength_in_file)
            self._coordinates = _find_coordinates(variables, chosen, axes)
            for name, (found, _) in self._coordinates.items():
                check_packing(path, name, found)
            in_file = text(chosen.attrs.get("units", "")).strip()
            if in_file and units is not None and units != in_file:
                problem = f"{chosen.name} has {in_file!r}"
                raise ConfigError(problem, key="units", path=path, value=units, remedy="leave it out")
            if chosen.chunks is None:
                chunk = (ny if axes.axis["channel"] == 0 else 1, nx)
            else:
                chunk = chosen.chunks[axes.axis["y"]], chosen.chunks[axes.axis["x"]]
        super().__init__(
            path,
            (ny, nx, nc),
            region,
            absent=(FLAG, *(name for name in COORDINATES if name not in self._coordinates)),
            units=in_file or units,
            chunk=chunk,
            wavelength=given,
        )
        if "time" in self._coordinates:
            with self:
                seconds = self.coordinates()["time"][1]
            seconds = seconds[np.isfinite(seconds)]
            with damage_named(path, OverflowError):
                self.time = EPOCH + timedelta(seconds=float(seconds[0])) if seconds.size else None

    @property
    def wavelength(self) -> NDArray[np.float64]:
        if self._wavelength_in_file is None:
            return super().wavelength
        # Read on each call: kept, it would hold 17 MB for every granule of a long list.
        values = _read_wavelength(self.path, self._file, *self._wavelength_in_file)
        _, _, x0, x1 = self._window
        return values if values.ndim == 1 else values[x0:x1]

    def coordinates(self) -> dict[str, Coordinate]:
        y0, y1, x0, x1 = self._window
        coordinates: dict[str, Coordinate] = {}
        for name, (variable, axes) in self._coordinates.items():
            cut = (slice(y0, y1), slice(x0, x1))[: len(axes)]
            with damage_named(self.path):
                values = decode(variable, _slab(self._file, variable, axes, cut))
            if name == "time":
                values = unix_seconds(self.path, text(variable.attrs["units"]), values)
            coordinates[name] = ("y", "x")[: len(axes)], values
        return coordinates

    @property
    def places(self) -> dict[str, Place]:
        if "?" in self._radiance[0].dims:
            return {}
        found = {"radiance": self._radiance, **self._coordinates}
        if self._wavelength_in_file is not None:
            found["wavelength"] = self._wavelength_in_file
        places = {}
        for name, (variable, axes) in found.items():
            # Trailing roles of a wavelength, leading ones of all others.
            roles = ("x", "channel")[-len(axes) :] if name == "wavelength" else ("y", "x", "channel")[: len(axes)]
            places[name] = Place(variable.name, tuple(roles[axes.index(i)] for i in range(len(axes))))
        return places

    def probe(self) -> None:
        container: Container = self._file
        for placed in (self._radiance, *self._coordinates.values(), self._wavelength_in_file):
            if placed is not None:
                container.check(placed[0].name)
        super().probe()

    def _open(self) -> Container:
        return open_container(self.path)

    def _read_raw(self, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.bool_] | None]:
        y0, y1, x0, x1 = window
        cut = slice(y0, y1), slice(x0, x1), slice(None)
        variable, axes = self._radiance
        with damage_named(self.path):
            raw = _slab(self._file, variable, axes, cut)
            return unpack(variable, raw), is_declared_fill(variable, raw), None


class ZarrScene(NetcdfScene):
    """A 3-D array of a Zarr folder, version 2 or 3; otherwise as a variable of a netCDF file.

    All chunks must be there. In version 2, `fill_value` is the _FillValue where the array has `_ARRAY_DIMENSIONS`.
    """

    format = "zarr"


def _slab(container: Container, variable: Variable, axes: tuple[int, ...], cut: tuple[slice, ...]) -> NDArray[Any]:
    """Read a part of a variable: axes[i] of it is cut to cut[i], and becomes axis i."""
    return container.read(variable.name, tuple(cut[axes.index(i)] for i in range(len(axes)))).transpose(axes)


def _listed(variables: Sequence[Variable]) -> str:
    return ", ".join(map(str, variables[:10])) + (", ..." if len(variables) > 10 else "")


def _choose_variable(path: Path, variables: Sequence[Variable], name: str | None) -> Variable:
    """The scene's variable: the one named, or the only numeric 3-D one."""
    candidates = [v for v in variables if len(v.shape) == 3 and v.dtype.kind in "iuf"]
    listed = _listed(candidates) or "none"
    if name is not None:
        found = [v for v in variables if v.name == name.strip("/")] or [v for v in variables if v.base == name]
        if len(found) != 1:
            problem = "no such variable" if not found else "several variables of this name"
            remedy = f"what may be the scene: {listed}"
            raise ConfigError(problem, key="variable", path=path, value=name, remedy=remedy)
        if found[0] not in candidates:
            raise ConfigError(
                f"{found[0]} holds {found[0].dtype}",
                key="variable",
                path=path,
                limit="real numbers in 3-D",
                remedy=f"what may be the scene: {listed}",
            )
        return found[0]
    if not candidates:
        problem = f"no numeric 3-D variable in it; it holds {_listed(variables) or 'none at all'}"
        raise InputError(problem, key="variable", path=path)
    if len(candidates) > 1:
        largest = max(candidates, key=lambda v: np.prod(v.shape, dtype=np.float64)).name
        problem = f"{len(candidates)} variables may be the scene: {listed}"
        raise InputError(problem, key="variable", path=path, remedy=f"name one, variable: {largest}")
    return candidates[0]


def _find_axes(path: Path, variable: Variable, dims: Mapping[str, str | int] | None) -> _Axes:
    """Which axis of the scene's variable is y, x and channel."""
    remedy = f"give the dimensions of {variable}, by name or by number, dims: {{y: 0, x: 1, channel: 2}}"
    if dims is None:
        matches = {
            role: [i for i, d in enumerate(variable.dims) if d.lower() in USUAL_DIMS[role]] for role in USUAL_DIMS
        }
        if any(len(found) != 1 for found in matches.values()):
            problem = "the names of the dimensions do not tell y, x and channel"
            raise ConfigError(problem, key="dims", path=path, remedy=remedy)
        axis = {role: found[0] for role, found in matches.items()}
    else:
        if not isinstance(dims, Mapping) or set(dims) != set(USUAL_DIMS):
            raise ConfigError(key="dims", path=path, value=dims, limit="a mapping of y, x and channel", remedy=remedy)
        for role, dim in dims.items():
            by_number = isinstance(dim, int) and not isinstance(dim, bool) and 0 <= dim < 3
            if not by_number and (dim == "?" or variable.dims.count(str(dim)) != 1 or not isinstance(dim, str)):
                problem = "is no dimension, or several"
                raise ConfigError(problem, key=f"dims.{role}", path=path, value=dim, remedy=remedy)
        axis = {role: dim if isinstance(dim, int) else variable.dims.index(dim) for role, dim in dims.items()}
        if len(set(axis.values())) < 3:
            raise ConfigError("one dimension twice", key="dims", path=path, value=dict(dims), remedy=remedy)
    axis = dict(sorted(axis.items(), key=lambda item: item[1]))
    return _Axes(
        axis,
        {role: variable.dims[i] for role, i in axis.items()},
        {role: variable.shape[i] for role, i in axis.items()},
    )


def _find_wavelength(path: Path, variables: Sequence[Variable], scene: Variable, axes: _Axes) -> _Placed:
    """The variable of the wavelengths, and its axes (channel) or (x, channel)."""
    found = []
    for variable in variables:
        named = variable.base.lower() in WAVELENGTH_NAMES
        along_channel = variable.base == axes.name["channel"] and nanometres(text(variable.attrs.get("units", "")))
        fit = axes.fit(variable, "channel") or axes.fit(variable, "x", "channel")
        if (named or along_channel) and fit is not None:
            found.append((variable, fit))
    found = [(v, fit) for v, fit in found if v.group == scene.group] or found
    if not found:
        raise no_wavelengths(path, axes.size["channel"])
    if len(found) > 1:
        problem = f"several may be the wavelengths: {_listed([v for v, _ in found])}"
        raise InputError(problem, key="wavelength", path=path, remedy=GIVE_WAVELENGTHS)
    return found[0]


def _read_wavelength(
    path: Path, container: Container, variable: Variable, axes: tuple[int, ...]
) -> NDArray[np.float64]:
    """Wavelengths of the file in nm, (nc,), or (nx, nc) with NaN where it has fill."""
    units = text(variable.attrs.get("units", "missing"))
    factor = nanometres(units)
    if factor is None:
        raise InputError(
            f"its units are {units}", key=variable.name, path=path, limit="nm or um", remedy=GIVE_WAVELENGTHS
        )
    check_packing(path, variable.name, variable)
    with damage_named(path):
        raw = _slab(container, variable, axes, (slice(None),) * len(axes))
        values = decode(variable, raw).astype(np.float64) * factor
    if values.ndim == 1:
        return check_wavelengths(variable.name, values, values.size, path=path)
    if (np.diff(values, axis=1) <= 0).any() or (values <= 0).any():
        limit = "above 0 and increasing from channel to channel"
        raise InputError(key=variable.name, path=path, limit=limit, remedy=GIVE_WAVELENGTHS)
    return values


def _find_coordinates(variables: Sequence[Variable], scene: Variable, axes: _Axes) -> dict[str, _Placed]:
    """Of `COORDINATES` those that the file has: the variable, and its axes (y, x), of time (y) or (y, x)."""
    coordinates = {}
    for name in COORDINATES:
        found = []
        for variable in (v for v in variables if v.base == name):
            units = text(variable.attrs.get("units", ""))
            if name == "time":
                fit = (axes.fit(variable, "y") or axes.fit(variable, "y", "x")) if time_base(units) else None
            else:
                fit = axes.fit(variable, "y", "x") if not units or units.lower().startswith("deg") else None
            if fit is not None:
                found.append((variable, fit))
        found = [(v, fit) for v, fit in found if v.group == scene.group] or found
        if len(found) == 1:
            coordinates[name] = found[0]
    return coordinates
