"""What users say of a scene, checked: regions, sizes, wavelengths."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spectralvae.errors import ConfigError, InputError

Window = tuple[int, int, int, int]

GIVE_WAVELENGTHS = "give them in nm, wavelength: [...] or wavelength: {first: 401, last: 889}"
_MICROMETRES_BELOW = 20.0


def no_wavelengths(path: Path, nc: int) -> InputError:
    """What to raise for a file without wavelengths for its nc channels."""
    problem = f"no wavelengths for its {nc} channels, and they are never invented"
    return InputError(problem, key="wavelength", path=path, remedy=GIVE_WAVELENGTHS)


def check_region(path: Path, region: Sequence[int], ny: int, nx: int) -> Window:
    """Check pixel bounds [y0, y1, x0, x1], half-open, against a scene of ny x nx pixels.

    Raises:
        ConfigError: They aren't four whole numbers with 0 <= y0 < y1 <= ny and 0 <= x0 < x1 <= nx.
    """
    y0, y1, x0, x1 = whole_numbers(path, "region", region, "[y0, y1, x0, x1]")
    if not (0 <= y0 < y1 <= ny and 0 <= x0 < x1 <= nx):
        limit = f"[y0, y1, x0, x1] with 0 <= y0 < y1 <= {ny} and 0 <= x0 < x1 <= {nx}, the scene's pixels"
        raise ConfigError(key="region", path=path, value=[y0, y1, x0, x1], limit=limit)
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
        raise ConfigError(key=key, path=path, value=value, limit=f"{count} whole numbers, {form}")
    return numbers


def given_wavelengths(key: str, given: object, nc: int, *, path: Path | None = None) -> NDArray[np.float64]:
    """The wavelengths that a user gave, as a checked vector.

    Args:
        key: Of the config, or the argument's name.
        given: nc numbers in nm, or {"first": nm, "last": nm} for evenly spaced channels.
        nc: Number of channels.
        path: The scene's file.

    Raises:
        ConfigError: They are neither, or not wavelengths (see `check_wavelengths`).
    """
    if isinstance(given, Mapping) and set(given) != {"first", "last"}:
        raise ConfigError(f"has the keys {sorted(map(str, given))}", key=key, path=path, limit="first and last (nm)")
    try:
        if isinstance(given, Mapping):
            values = np.linspace(float(given["first"]), float(given["last"]), nc)
        else:
            values = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        limit = f"{nc} numbers in nm, or first and last"
        raise ConfigError(key=key, path=path, value=given, limit=limit) from error
    if values.ndim != 1:
        raise ConfigError(f"has shape {values.shape}", key=key, path=path, limit=f"{nc} numbers in nm")
    return check_wavelengths(key, values, nc, path=path)


def check_wavelengths(
    key: str, values: NDArray[np.float64], nc: int, *, path: Path | None = None
) -> NDArray[np.float64]:
    """Check that values are wavelengths of nc channels in nm; return them.

    Args:
        key: Of the config, the argument's name, or the variable's name in the file.
        values: (n,) numbers.
        nc: Number of channels.
        path: The scene's file.

    Raises:
        ConfigError: Their number is wrong, or they aren't finite, positive and strictly increasing, or not in nm.
    """
    if values.size != nc:
        raise ConfigError(f"{values.size} values for {nc} channels", key=key, path=path, remedy=f"give {nc}, in nm")
    if bad := int(np.count_nonzero(~np.isfinite(values))):
        raise ConfigError(f"{bad} of {nc} values are not finite", key=key, path=path, remedy="give all of them, in nm")
    if bad := int(np.count_nonzero(values <= 0)):
        raise ConfigError(f"{bad} of {nc} values are not above 0", key=key, path=path, remedy="give them in nm")
    steps = np.diff(values)
    if bad := int(np.count_nonzero(steps <= 0)):
        first = int(np.argmax(steps <= 0))
        problem = f"{bad} of {nc - 1} steps do not increase, first {values[first]:g} to {values[first + 1]:g} nm"
        raise ConfigError(problem, key=key, path=path, limit="increasing from channel to channel")
    if values.max() < _MICROMETRES_BELOW:
        problem = f"ends at {values.max():g}, so it seems to be in micrometres"
        raise ConfigError(problem, key=key, path=path, remedy="give nm, wavelength: [...]")
    return values
