"""What every reader gives: one hyperspectral image of one file, read lazily, NaN where a sample is invalid.

Shapes: ny rows, nx columns, nc channels; a scene is (ny, nx, nc).
"""

from __future__ import annotations

import datetime as dt
import hashlib
import struct
import threading
import unicodedata
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from spectralvae.errors import InputError
from spectralvae.readers.arguments import Window, check_region

READABLE = "TEMPO L1 radiance (netCDF-4), MATLAB .mat (v5, v7.3), ENVI, netCDF, HDF5, Zarr and tiles (NNNNN.pt)"

# In order: a sample is counted under the first rule that rejects it.
# "ambiguous" is what may be fill or a clipped value: see readers/tiles.py.
RULES = ("fill", "undeclared_fill", "default_fill", "nan", "infinite", "flagged", "ambiguous")

# Fills that files hold without declaring them: TEMPO's own, and the default of netCDF for floats.
UNDECLARED_FILLS = {"undeclared_fill": -1e30, "default_fill": 9.969209968386869e36}

# Optional in every format: where a file has them they are read, else they are reported in `Scene.absent`.
ANGLES = ("solar_zenith_angle", "viewing_zenith_angle", "relative_azimuth_angle")
COORDINATES = ("latitude", "longitude", *ANGLES, "time")
FLAG = "pixel_quality_flag"

# Vectors of these names (in any case) hold wavelengths.
WAVELENGTH_NAMES = {"wavelength", "wavelengths", "wl", "lambda"}

# What HDF5 and scipy raise over cut and overwritten files.
_DAMAGE: tuple[type[Exception], ...] = (
    *(OSError, RuntimeError, KeyError, ValueError, TypeError, IndexError, EOFError),
    *(struct.error, zlib.error),
)

# One lock for all scenes: a scene with a lock of its own could not be pickled.
_OPENING = threading.Lock()

_BLOCK_SAMPLES = 2**18  # that are examined at a time: more would leave the processor's cache between two operations

Coordinate = tuple[tuple[str, ...], NDArray[Any]]


@dataclass(frozen=True)
class Place:
    """Where a file keeps something of a scene.

    Attributes:
        name: The variable, "name" or "group/name".
        axes: Which of "y", "x" and "channel" its axes are, in the order of the file.
    """

    name: str
    axes: tuple[str, ...]


class Scene(ABC):
    """One hyperspectral image of one file (or of one region of it).

    Making one reads only the file's structure and leaves no file open. Whatever reads data opens the file, `close`
    (or leaving the ``with`` block) closes it, and a later read opens it again. A pickled scene has no open file.
    Several threads may read one scene at the same time.

    Attributes:
        path: The file.
        format: "tempo", "matlab", "envi", "netcdf", "zarr" or "tiles".
        band: The band group's name, None where the format has no bands.
        region: (y0, y1, x0, x1), half-open pixel bounds in the file's full image, or None for all of it.
        full_shape: (ny, nx, nc) of the file's full image.
        shape: (ny, nx, nc) of this scene, that is after `region`.
        units: Units of the radiance, None where the file doesn't say.
        time: Start of the scan, UTC, where known.
        version: Of the processing that made the file ("V03"), where known.
        absent: The optional variables that the file lacks.
        chunk: (rows, columns) that the file stores together and that are best read together.
        stack: Height of each tile where the scene is a stack of tiles that don't adjoin, else None.
        notes: What a user should know of the values, a sentence each.
    """

    format: ClassVar[str]
    stack: int | None = None
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        path: Path,
        full_shape: tuple[int, int, int],
        region: Sequence[int] | None,
        *,
        absent: tuple[str, ...],
        band: str | None = None,
        units: str | None = None,
        time: dt.datetime | None = None,
        version: str | None = None,
        chunk: tuple[int, int] | None = None,
        wavelength: NDArray[np.float64] | None = None,
    ) -> None:
        self.full_shape = ny, nx, nc = full_shape
        if 0 in full_shape:
            problem = f"the image is empty: (y, x, channel) = {full_shape}"
            raise InputError(problem, path=path, limit="at least 1 along every axis")
        self.path = path
        self.region = None if region is None else check_region(path, region, ny, nx)
        self._window: Window = self.region or (0, ny, 0, nx)
        y0, y1, x0, x1 = self._window
        self.shape = (y1 - y0, x1 - x0, nc)
        self.band = band
        self.units = units
        self.time = time
        self.version = version
        self.absent = absent
        self.chunk = chunk or (1, nx)
        self._wavelength = wavelength
        self._handle: Any = None

    @property
    def name(self) -> str:
        """The file's stem, with the region's bounds where there is one."""
        if self.region is None:
            return self.path.stem
        y0, y1, x0, x1 = self.region
        return f"{self.path.stem}_y{y0}-{y1}_x{x0}-{x1}"

    def files(self) -> list[Path]:
        """All files that the scene is read from, sorted; they are what identifies it."""
        if not self.path.is_dir():
            return [self.path]
        return sorted(file for file in self.path.rglob("*") if file.is_file())

    def sha256(self) -> str:
        """SHA-256 of the file, hexadecimal; of several files that of their digests, and of their names in a folder.

        It doesn't depend on the scene's own name: a copy under another one has the same.
        """
        files = self.files()
        if files == [self.path]:
            return file_sha256(self.path)
        inside = self.path if self.path.is_dir() else None
        lines = [f"{file_sha256(file)}  {file.relative_to(inside) if inside else ''}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def places(self) -> dict[str, Place]:
        """Where "radiance", "wavelength" and each of `COORDINATES` that the file has are read from.

        Empty where the format has no named variables, or the radiance's dimensions no names. Wavelengths that were
        given are read from nowhere.
        """
        return {}

    @property
    def wavelength(self) -> NDArray[np.float64]:
        """Wavelengths in nm, (nc,) or (nx, nc), NaN where the file has fill."""
        assert self._wavelength is not None
        return self._wavelength

    def coordinates(self) -> dict[str, Coordinate]:
        """Read geometry and time, of this scene's region.

        Returns:
            For each of `COORDINATES` that the file has: its dimensions, ("y", "x") or ("y",), and the float array,
            NaN where invalid; degrees, and for `time` seconds since 1970-01-01 UTC.
        """
        return {}

    def probe(self) -> None:
        """Read everything but the samples, so that what is wrong with the file shows.

        Raises:
            InputError, ConfigError: What is wrong.
        """
        _ = self.wavelength
        self.coordinates()

    @abstractmethod
    def _open(self) -> Any:
        """Open the file; what comes back has a `close` method."""

    @abstractmethod
    def _read_raw(self, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.bool_] | None]:
        """Read a window of the file's full image.

        Returns:
            values: (rows, columns, nc), any real dtype; the caller may change them.
            filled: Which values are declared fills; broadcasts to values.
            flagged: Which samples the quality flag rejects, as values; None without a flag.
        """

    def read(self, rows: slice, columns: slice = slice(None)) -> tuple[NDArray[np.float32], dict[str, int]]:
        """Read some rows, or a part of them, and only those.

        Args:
            rows: A slice without step over this scene's ny rows.
            columns: A slice without step over its nx columns.

        Returns:
            radiance: (rows, columns, nc) float32 in C order, NaN where invalid.
            counts: How many samples each of `RULES` rejected.

        Raises:
            InputError: The data cannot be read: the file is damaged.
        """
        return invalidate(*self._read_raw(self._in_file(rows, columns)))

    def read_noise(self, rows: slice, columns: slice = slice(None)) -> NDArray[np.float32] | None:
        """Standard deviation of the noise of some samples, as the file states it.

        Returns:
            (rows, columns, nc) float32 in the units of the radiance, NaN where unknown; None if the file has none.

        Raises:
            InputError: The data cannot be read: the file is damaged.
        """
        return None

    def blocks(self, max_samples: int) -> Iterator[tuple[slice, slice]]:
        """Cut the scene into (rows, columns) that follow the chunks of the file, so that none is decompressed twice.

        Args:
            max_samples: How large a block may be; a chunk that is larger is cut along y, and read several times.
        """
        y0, y1, x0, x1 = self._window
        nc = self.shape[2]
        height, width = self.chunk
        height = min(height, max(1, max_samples // (width * nc)))
        width *= max(1, max_samples // (height * width * nc))
        if width >= self.shape[1]:
            height *= max(1, max_samples // (height * self.shape[1] * nc))
        for top in range(y0 - y0 % height, y1, height):
            rows = slice(max(top, y0) - y0, min(top + height, y1) - y0)
            for left in range(x0 - x0 % width, x1, width):
                yield rows, slice(max(left, x0) - x0, min(left + width, x1) - x0)

    def _in_file(self, rows: slice, columns: slice) -> Window:
        """The window of the file's full image that rows and columns of this scene are."""
        y0, _, x0, _ = self._window
        top, bottom, y_step = rows.indices(self.shape[0])
        left, right, x_step = columns.indices(self.shape[1])
        assert y_step == x_step == 1, f"read without a step, not {rows}, {columns}"
        return y0 + top, y0 + max(top, bottom), x0 + left, x0 + max(left, right)

    @property
    def _file(self) -> Any:
        with _OPENING:
            if self._handle is None:
                self._handle = self._open()
            return self._handle

    def close(self) -> None:
        """Close the file, if it is open; the scene stays usable."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: (y, x, channel) = {self.shape}>"


def invalidate(
    raw: NDArray[Any],
    filled: NDArray[np.bool_],
    flagged: NDArray[np.bool_] | None,
    ambiguous: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.float32], dict[str, int]]:
    """Set every invalid sample to NaN and count them by rule.

    Args:
        raw: (rows, columns, nc), any real dtype; what is float32 in C order is changed in place.
        filled: Declared fills; broadcasts to raw.
        flagged: Samples rejected by a quality flag, as raw; None without a flag.
        ambiguous: Samples of which nobody can tell whether they are fill, as raw; None where that can be told.

    Returns:
        values: As raw, float32 in C order.
        counts: How many samples each of `RULES` rejected, each sample under the first rule that rejects it.
    """
    # Beyond float32 a number becomes infinite, and is then counted as such.
    with np.errstate(over="ignore"):
        values = np.require(raw, np.float32, ("C", "W"))
    given: dict[str, Any] = {"fill": filled, "flagged": flagged, "ambiguous": ambiguous}
    marks = {rule: np.broadcast_to(mark, values.shape).reshape(-1) for rule, mark in given.items() if np.any(mark)}
    counts = dict.fromkeys(RULES, 0)
    samples = values.reshape(-1)
    for start in range(0, samples.size, _BLOCK_SAMPLES):
        block = slice(start, start + _BLOCK_SAMPLES)
        part = samples[block]
        unsuspected = np.abs(part) < _SMALLEST_SUSPECT
        if "fill" in marks:
            unsuspected |= marks["fill"][block]
        any_suspect = not unsuspected.all()
        rejected = np.zeros(part.shape, dtype=np.bool_)
        total = 0
        for rule in RULES:
            if rule in marks:
                rejected |= marks[rule][block]
            elif rule in _TESTS and any_suspect:
                rejected |= _TESTS[rule](part)
            else:
                continue
            before, total = total, int(np.count_nonzero(rejected))
            counts[rule] += total - before
        part[rejected] = np.nan
    return values, counts


def is_undeclared_fill(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Which values are, within float32 rounding, a fill that files hold without declaring it; same shape."""
    invalid = np.zeros(values.shape, dtype=np.bool_)
    for fill in UNDECLARED_FILLS.values():
        invalid |= _equals_rounded(values, fill)
    return invalid


def _equals_rounded(values: NDArray[Any], number: float) -> NDArray[np.bool_]:
    """Which values equal a number within float32 rounding; same shape."""
    low, high = sorted((number * (1 - 2**-22), number * (1 + 2**-22)))
    return (values >= low) & (values <= high)


# The rules of `invalidate` that look at the value itself.
_TESTS: dict[str, Callable[[NDArray[np.float32]], NDArray[np.bool_]]] = {
    **{rule: partial(_equals_rounded, number=fill) for rule, fill in UNDECLARED_FILLS.items()},
    "nan": np.isnan,
    "infinite": np.isinf,
}
# None of them rejects a smaller magnitude.
_SMALLEST_SUSPECT = 0.9 * min(map(abs, UNDECLARED_FILLS.values()))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path) -> None:
    """Check that there is a file with something in it, or a folder.

    Raises:
        InputError: There isn't; a pipe or a device, of which a read may never end, is neither.
    """
    if any(unicodedata.category(c) == "Cc" for c in str(path)):
        raise InputError("a line break or control character in its name", value=str(path), remedy="rename it")
    with damage_named(path):
        found = path.exists()
    if path.is_dir():
        return
    if not found:
        raise InputError("no such file", path=path, remedy="check the path")
    if not path.is_file():
        raise InputError("neither a file nor a folder", path=path, remedy=f"formats read now: {READABLE}")
    if path.stat().st_size == 0:
        raise InputError("is empty (0 bytes), so it is truncated", path=path, remedy="fetch it again")


@contextmanager
def formats_extra(path: Path, problem: str) -> Iterator[None]:
    """Turn a failed import of an optional library into an InputError that says how to install it.

    Args:
        path: The file that needs the library.
        problem: What needs which library.
    """
    try:
        yield
    except ImportError as error:
        raise InputError(problem, path=path, remedy='install it: pip install "spectralvae[formats]"') from error


@contextmanager
def damage_named(path: Path, *more: type[Exception]) -> Iterator[None]:
    """Turn what libraries raise over a damaged file into an InputError that names the file.

    Args:
        path: The file.
        more: A library's own exception classes.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise InputError("no such file", path=path, remedy="check the path") from error
    except PermissionError as error:
        raise InputError("no permission to read it", path=path) from error
    except (*_DAMAGE, *more) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"is corrupt or truncated ({reason})", path=path, remedy="fetch it again") from error
