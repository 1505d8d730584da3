"""What users say of a scene, checked: regions, sizes, wavelengths."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spectralvae.errors import ConfigError

Window = tuple[int, int, int, int]

_MICROMETRES_BELOW = 20.0


def check_region(path: Path, region: Sequence[int], ny: int, nx: int) -> Window:
    """Check pixel bounds [y0, y1, x0, x1], half-open, against a scene of ny x nx pixels.

    Raises:
        ConfigError: They aren't four whole numbers with 0 <= y0 < y1 <= ny and 0 <= x0 < x1 <= nx.
    """
    y0, y1, x0, x1 = whole_numbers(path, "region", region, "[y0, y1, x0, x1]")
    if not (0 <= y0 < y1 <= ny and 0 <= x0 < x1 <= nx):
        raise ConfigError(
            f"{path}: region {[y0, y1, x0, x1]} doesn't fit: the scene has {ny} x {nx} pixels (y, x);"
            f" give [y0, y1, x0, x1] with 0 <= y0 < y1 <= {ny} and 0 <= x0 < x1 <= {nx}"
        )
    return y0, y1, x0, x1


def whole_numbers(path: Path, key: str, value: object, form: str) -> tuple[int, ...]:
    """Check that a value is a sequence of whole numbers of the given form, "[ny, nx]" say; return them.

    Raises:
        ConfigError: It isn't.
    """
    count = form.count(",") + 1
    try:
        if isinstance(value, str) or any(isinstance(v, bool) for v in value):  # type: ignore[attr-defined]
            raise TypeError
        numbers = tuple(operator.index(v) for v in value)  # type: ignore[attr-defined]
    except TypeError:
        numbers = ()
    if len(numbers) != count:
        raise ConfigError(f"{path}: {key} is {value!r}; give {count} whole numbers, {key}: {form}")
    return numbers


def given_wavelengths(what: str, given: object, nc: int) -> NDArray[np.float64]:
    """The wavelengths that a user gave, as a checked vector.

    Args:
        what: Whose they are, as messages begin: file and variable, or key.
        given: nc numbers in nm, or {"first": nm, "last": nm} for evenly spaced channels.
        nc: Number of channels.

    Raises:
        ConfigError: They are neither, or not wavelengths (see `check_wavelengths`).
    """
    if isinstance(given, Mapping) and set(given) != {"first", "last"}:
        raise ConfigError(f"{what} has the keys {sorted(map(str, given))}; needed: first, last (nm)")
    try:
        if isinstance(given, Mapping):
            values = np.linspace(float(given["first"]), float(given["last"]), nc)
        else:
            values = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what} is {given!r}; needed: {nc} numbers in nm, or first and last") from error
    if values.ndim != 1:
        raise ConfigError(f"{what} has shape {values.shape}; needed: {nc} numbers in nm")
    return check_wavelengths(what, values, nc)


def check_wavelengths(what: str, values: NDArray[np.float64], nc: int) -> NDArray[np.float64]:
    """Check that values are wavelengths of nc channels in nm; return them.

    Args:
        what: Whose they are, as messages begin: file and variable, or key.
        values: (n,) numbers.
        nc: Number of channels.

    Raises:
        ConfigError: Their number is wrong, or they aren't finite, positive and strictly increasing, or not in nm.
    """
    if values.size != nc:
        raise ConfigError(f"{what} has {values.size} values for {nc} channels; give {nc}, in nm")
    if bad := int(np.count_nonzero(~np.isfinite(values))):
        raise ConfigError(f"{what}: {bad} of {nc} values aren't finite; give all of them, in nm")
    if bad := int(np.count_nonzero(values <= 0)):
        raise ConfigError(f"{what}: {bad} of {nc} values aren't above 0; give them in nm")
    steps = np.diff(values)
    if bad := int(np.count_nonzero(steps <= 0)):
        first = int(np.argmax(steps <= 0))
        raise ConfigError(
            f"{what} must increase from channel to channel, but doesn't at {bad} of {nc - 1} steps, first from"
            f" {values[first]:g} to {values[first + 1]:g} nm"
        )
    if values.max() < _MICROMETRES_BELOW:
        raise ConfigError(
            f"{what} ends at {values.max():g}, under {_MICROMETRES_BELOW:g} nm, so it seems to be in"
            " micrometres; give nm, wavelength: [...]"
        )
    return values
