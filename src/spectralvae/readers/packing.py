"""What the attributes of netCDF variables say about stored numbers: fills, packing, units."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spectralvae.errors import InputError
from spectralvae.readers.base import is_undeclared_fill

EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
NUMERIC_ATTRIBUTES = ("_FillValue", "missing_value", "scale_factor", "add_offset")

_NANOMETRES = {"nm", "nanometer", "nanometers", "nanometre", "nanometres"}
_MICROMETRES = {"um", "µm", "μm", "micrometer", "micrometers", "micrometre", "micrometres", "micron", "microns"}
_TIME_UNITS = re.compile(r"(s|seconds?|minutes?|hours?|days?) since (.+)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Attributed(Protocol):
    """A variable of h5py, zarr or our own, as far as it is needed here."""

    @property
    def attrs(self) -> Mapping[str, Any]: ...


def check_packing(path: Path, place: str, variable: Attributed) -> None:
    """Check that the attributes that tell fills and packing are numbers.

    Args:
        path: The file.
        place: The variable's, in it.
        variable: With its attributes.

    Raises:
        InputError: They aren't.
    """
    for key in NUMERIC_ATTRIBUTES:
        if np.asarray(value := variable.attrs.get(key, 0)).dtype.kind not in "iuf":
            problem = f"its {key} is {text(value)!r}"
            raise InputError(problem, key=place, path=path, limit="a number", remedy="correct or remove it")


def is_declared_fill(variable: Attributed, raw: NDArray[Any]) -> NDArray[np.bool_]:
    """Which raw values equal the variable's _FillValue or one of its missing_values; broadcasts to raw."""
    fills = [fill for name in ("_FillValue", "missing_value") for fill in np.ravel(variable.attrs.get(name, ()))]
    masks = [equals_fill(raw, fill) for fill in fills]
    filled: NDArray[np.bool_] = reduce(np.logical_or, masks or [np.zeros((), dtype=np.bool_)])
    return filled


def equals_fill(raw: NDArray[Any], fill: Any) -> NDArray[np.bool_]:
    """Which raw values are a declared fill, which may be NaN; same shape."""
    if raw.dtype.kind != "f":
        return np.asarray(raw == fill, dtype=np.bool_)
    if np.isnan(fill):
        return np.asarray(np.isnan(raw), dtype=np.bool_)
    # In float32, for -1e30 declared in one precision and stored in the other is still the fill.
    with np.errstate(over="ignore"):
        return np.asarray(raw.astype(np.float32, copy=False) == np.float32(fill), dtype=np.bool_)


def unpack(variable: Attributed, raw: NDArray[Any]) -> NDArray[Any]:
    """Apply the variable's scale_factor and add_offset, where it has them; undeclared fills stay what they are."""
    if "scale_factor" not in variable.attrs and "add_offset" not in variable.attrs:
        return raw
    scale, offset = (float(np.ravel(variable.attrs.get(k, d))[0]) for k, d in (("scale_factor", 1), ("add_offset", 0)))
    return scaled(raw, scale, offset)


def scaled(
    raw: NDArray[Any],
    scale: float | NDArray[np.float64],
    offset: float | NDArray[np.float64],
    divisor: float = 1.0,
) -> NDArray[np.float64]:
    """(raw * scale + offset) / divisor in float64, but undeclared fills stay what they are, so that they are known."""
    values = raw.astype(np.float64)
    return np.where(is_undeclared_fill(values), values, (values * scale + offset) / divisor)


def decode(variable: Attributed, raw: NDArray[Any]) -> NDArray[Any]:
    """Raw values as float32 or float64, unpacked, NaN where they are fill or not finite; same shape."""
    unpacked = unpack(variable, raw)
    values = unpacked.astype(np.float32 if unpacked.dtype == np.float32 else np.float64)
    values[is_declared_fill(variable, raw) | is_undeclared_fill(values) | ~np.isfinite(values)] = np.nan
    return values


def nanometres(units: str) -> float | None:
    """How many nm one of the units is; None if it isn't a length that wavelengths are given in."""
    units = units.strip().lower()
    return 1.0 if units in _NANOMETRES else 1000.0 if units in _MICROMETRES else None


def unix_seconds(path: Path, units: str, values: NDArray[Any]) -> NDArray[np.float64]:
    """Times in units of CF ("seconds since 1980-01-06") as seconds since 1970-01-01 UTC.

    Leap seconds are not counted, as in CF; real granules count them since 1980, and so run 18 s ahead of UTC (2024).

    Raises:
        InputError: The units aren't of that form.
    """
    base = time_base(units)
    if base is None:
        limit = "seconds (minutes, hours, days) since YYYY-MM-DD"
        raise InputError(f"its units are {units!r}", key="time", path=path, limit=limit)
    return values.astype(np.float64) * _SECONDS[units.strip()[0]] + (base - EPOCH).total_seconds()


def time_base(units: str) -> dt.datetime | None:
    """The moment since which units of CF count, UTC where they name no zone; None for other units."""
    match = _TIME_UNITS.fullmatch(units.strip())
    try:
        base = dt.datetime.fromisoformat(match[2].removesuffix("UTC").strip()) if match else None
    except ValueError:
        return None
    return base.replace(tzinfo=base.tzinfo or dt.UTC) if base else None


def text(attribute: Any) -> str:
    """An attribute as text; files hold them as str, bytes or arrays of one, and HDF5 an empty one as h5py.Empty."""
    empty = getattr(attribute, "shape", ()) is None or np.size(attribute) == 0
    value = "" if empty else np.ravel(attribute)[0]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
