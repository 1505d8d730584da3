"""ENVI images through `spectral`: a header of text (`.hdr`) and beside it the bare numbers, in any interleave."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectralvae.errors import InputError
from spectralvae.readers.arguments import GIVE_WAVELENGTHS, Window, check_wavelengths, given_wavelengths, no_wavelengths
from spectralvae.readers.base import COORDINATES, FLAG, Scene, damage_named, formats_extra
from spectralvae.readers.packing import equals_fill, nanometres, scaled

MAGIC = b"ENVI"

_MAX_HEADER_BYTES = 2**24
_SUFFIXES = ("img", "dat", "raw", "bin", "hyspex", "bil", "bip", "bsq")
_REQUIRED = ("lines", "samples", "bands", "data type", "interleave", "byte order")
_COMPLEX = ("6", "9")

Header = dict[str, Any]  # text, or a list of texts for what stands in braces


class EnviScene(Scene):
    """An ENVI image: y = lines, x = samples, channel = bands.

    A value is (number * gain + offset) / reflectance scale factor, with what the header gives of them; `data ignore
    value` is the fill, recognised in the number as stored. Bands that `bbl` calls bad are invalid as a whole
    ("flagged").

    Args:
        path: The header, or the binary beside it. The scene's `path` is the binary.
        wavelength: nc wavelengths in nm, or {"first": nm, "last": nm} for evenly spaced channels; None takes the
            header's, in nanometers or micrometers.
        region: [y0, y1, x0, x1], half-open pixel bounds; None for the full image.
        units: Of the values, which the header doesn't tell.

    Raises:
        InputError: No `spectral`; header and binary aren't both there; what the header says isn't read, or can't be.
        ConfigError: An argument doesn't fit the file.
    """

    format = "envi"

    def __init__(
        self,
        path: Path,
        *,
        wavelength: Sequence[float] | NDArray[Any] | Mapping[str, float] | None = None,
        region: Sequence[int] | None = None,
        units: str | None = None,
    ) -> None:
        self._header_path, binary = _header_and_binary(path)
        self._header = header = _read_header(self._header_path)
        ny, nx, nc = self._full_shape = _check_layout(self._header_path, header)
        self._check_size(binary)
        numbers = _Numbers(self._header_path, header, nc)
        self._fill = numbers.one("data ignore value")
        self._gain = numbers.per_band("data gain values")
        self._offset = numbers.per_band("data offset values")
        self._divisor = numbers.one("reflectance scale factor")
        if self._divisor is not None and not 0 < self._divisor < np.inf:
            key = "reflectance scale factor"
            raise InputError(key=key, path=self._header_path, value=self._divisor, limit="finite and above 0")
        good = numbers.per_band("bbl")
        if good is not None and not np.isin(good, (0, 1)).all():
            raise InputError(key="bbl", path=self._header_path, limit="a list of 1 (good) and 0 (bad)")
        self._bad_bands = None if good is None else good == 0
        if wavelength is not None:
            wavelengths = given_wavelengths("wavelength", wavelength, nc, path=path)
        else:
            wavelengths = _wavelengths(self._header_path, header, nc)
        super().__init__(
            binary,
            (ny, nx, nc),
            region,
            absent=(FLAG, *COORDINATES),
            units=units,
            chunk=(ny, nx) if header["interleave"].lower() == "bsq" else (1, nx),
            wavelength=wavelengths,
        )

    def files(self) -> list[Path]:
        return sorted((self._header_path, self.path))

    def _check_size(self, binary: Path) -> None:
        """The numbers must all be there: a memory map of a file that is too short ends the process by a signal."""
        from spectral.io import envi

        with damage_named(binary):
            size = binary.stat().st_size
        params = envi.gen_params(self._header)
        ny, nx, nc = self._full_shape
        needed = params.offset + ny * nx * nc * np.dtype(params.dtype).itemsize
        if size < needed:
            header = f"{self._header_path.name} (lines, samples, bands = {ny}, {nx}, {nc})"
            problem = f"is truncated: it has {size} bytes, but {header} needs {needed}"
            raise InputError(problem, path=binary, remedy="fetch it again, or correct the header")

    def _open(self) -> _Image:
        self._check_size(self.path)
        with damage_named(self.path):
            return _Image(self.path, self._header)

    def _read_raw(self, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.bool_] | None]:
        image: _Image = self._file
        with damage_named(self.path):
            raw = image.read(window)
        filled = np.zeros((), np.bool_) if self._fill is None else equals_fill(raw, self._fill)
        flagged = None if self._bad_bands is None else np.broadcast_to(self._bad_bands, raw.shape)
        if self._gain is not None or self._offset is not None or self._divisor is not None:
            gain = 1.0 if self._gain is None else self._gain
            raw = scaled(raw, gain, 0.0 if self._offset is None else self._offset, self._divisor or 1.0)
        return raw, filled, flagged


class _Image:
    """An open image of `spectral`."""

    def __init__(self, path: Path, header: Header) -> None:
        from spectral.io import envi
        from spectral.io.bilfile import BilFile
        from spectral.io.bipfile import BipFile
        from spectral.io.bsqfile import BsqFile

        params = envi.gen_params(header)
        params.filename = str(path)
        self._lock = threading.Lock()  # reading moves the file's position
        self._image = {"bil": BilFile, "bip": BipFile, "bsq": BsqFile}[header["interleave"].lower()](params, header)

    def read(self, window: Window) -> NDArray[Any]:
        """(rows, columns, channel) of a window, as stored."""
        y0, y1, x0, x1 = window
        # Through the file: in a memory map, a file cut short meanwhile would end the process by a signal.
        with self._lock:
            return np.asarray(self._image.read_subregion((y0, y1), (x0, x1), use_memmap=False))

    def close(self) -> None:
        self._image.fid.close()


class _Numbers:
    """Optional entries of a header as numbers."""

    def __init__(self, path: Path, header: Header, nc: int) -> None:
        self._path, self._header, self._nc = path, header, nc

    def one(self, key: str) -> float | None:
        """A number; None where the header has none."""
        values = self._parsed(key)
        if values is None:
            return None
        if values.size != 1:
            raise InputError(f"has {values.size} values", key=key, path=self._path, limit="one number")
        return float(values[0])

    def per_band(self, key: str) -> NDArray[np.float64] | None:
        """(nc,) finite numbers; None where the header has none."""
        values = self._parsed(key)
        if values is not None and (values.size != self._nc or not np.isfinite(values).all()):
            raise InputError(key=key, path=self._path, limit=f"{self._nc} finite numbers, one a band")
        return values

    def _parsed(self, key: str) -> NDArray[np.float64] | None:
        if key not in self._header:
            return None
        values = np.atleast_1d(self._header[key])
        try:
            return values.astype(np.float64)
        except ValueError as error:
            raise InputError(str(error), key=key, path=self._path, limit="numbers") from error


def find_header(path: Path) -> Path | None:
    """The ENVI header beside a binary: NAME.img.hdr before NAME.hdr; None if there is none."""
    for header in (path.with_name(f"{path.name}.hdr"), path.with_suffix(".hdr")):
        for candidate in (header, header.with_suffix(".HDR")):
            if candidate.is_file():
                with damage_named(candidate), candidate.open("rb") as file:
                    if file.read(len(MAGIC)) == MAGIC:
                        return candidate
    return None


def _header_and_binary(path: Path) -> tuple[Path, Path]:
    """The two files of an image, one of which is given."""
    with damage_named(path), path.open("rb") as file:
        is_header = file.read(len(MAGIC)) == MAGIC
    if not is_header:
        header = find_header(path)
        if header is None:
            raise InputError("no ENVI header beside it", path=path, remedy=f"put {path.name}.hdr there")
        return header, path
    base = path.with_suffix("")
    names = [base.name, *(f"{base.name}.{suffix}" for s in _SUFFIXES for suffix in (s, s.upper()))]
    found = [path.with_name(name) for name in names if path.with_name(name).is_file()]
    if not found:
        remedy = f"put {base.name} or {base.name}.img beside it"
        raise InputError("an ENVI header without its binary", path=path, remedy=remedy)
    if len(found) > 1:
        listed = ", ".join(binary.name for binary in found)
        problem = f"several files may hold its numbers: {listed}"
        raise InputError(problem, path=path, remedy="give the path of the right one")
    return path, found[0]


def _read_header(path: Path) -> Header:
    """The entries of a header, as `spectral` parses it."""
    with formats_extra(path, "ENVI images need spectral"):
        from spectral.io import envi
    with damage_named(path):
        if path.stat().st_size > _MAX_HEADER_BYTES:
            raise InputError("the ENVI header is too large", path=path, limit=f"at most {_MAX_HEADER_BYTES} bytes")
        content = path.read_bytes()
    try:
        content.decode("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it takes names in capitals, too
            header: Header = envi.read_envi_header(str(path))
    except UnicodeDecodeError as error:
        remedy = "save the header as UTF-8 text"
        raise InputError(f"byte {error.start} is no UTF-8", path=path, remedy=remedy) from error
    except envi.SpyException as error:
        raise InputError("the ENVI header cannot be parsed", path=path, remedy="is a brace left open?") from error
    return header


def _check_layout(path: Path, header: Header) -> tuple[int, int, int]:
    """Check what a header says of how the numbers lie; return (lines, samples, bands)."""
    from spectral.io import envi

    for key in _REQUIRED:
        if not isinstance(header.get(key), str):
            raise InputError("is missing or a list", key=key, path=path, remedy="correct the header")
    numbers = {}
    for key, default in (("lines", ""), ("samples", ""), ("bands", ""), ("header offset", "0")):
        number = header.get(key, default)
        known = isinstance(number, str) and number.isdecimal() and len(number) < 19
        if not known or (int(number) == 0 and not default):
            raise InputError(key=key, path=path, value=number, limit=f"a whole number{'' if default else ' above 0'}")
        numbers[key] = int(number)
    for key, read in (("interleave", ("bil", "bip", "bsq")), ("byte order", ("0", "1"))):
        if header[key].lower() not in read:
            raise InputError(key=key, path=path, value=header[key], limit=f"one of {', '.join(read)}")
    kind = header["data type"]
    if kind in _COMPLEX or kind not in envi.envi_to_dtype:
        what = "complex numbers" if kind in _COMPLEX else "unknown"
        raise InputError(what, key="data type", path=path, value=kind, limit="a real type, 1-5 or 12-15")
    if (file_type := str(header.get("file type", "ENVI Standard"))).lower() not in ("envi standard", "envi"):
        raise InputError(key="file type", path=path, value=file_type, limit="ENVI Standard")
    if str(header.get("file compression", "0")) != "0":
        remedy = "unpack it, and set this to 0"
        raise InputError("the binary is compressed", key="file compression", path=path, remedy=remedy)
    for key in ("major frame offsets", "minor frame offsets"):
        if any(np.atleast_1d(header.get(key, "0")) != "0"):
            raise InputError("is not read", key=key, path=path, remedy="write the image without frame offsets")
    return numbers["lines"], numbers["samples"], numbers["bands"]


def _wavelengths(path: Path, header: Header, nc: int) -> NDArray[np.float64]:
    """(nc,) wavelengths in nm of a header."""
    if "wavelength" not in header:
        raise no_wavelengths(path, nc)
    units = str(header.get("wavelength units", "missing"))
    factor = nanometres(units)
    if factor is None:
        limit = "Nanometers or Micrometers"
        raise InputError(key="wavelength units", path=path, value=units, limit=limit, remedy=GIVE_WAVELENGTHS)
    try:
        values = np.atleast_1d(header["wavelength"]).astype(np.float64)
    except ValueError as error:
        raise InputError(str(error), key="wavelength", path=path, limit="numbers", remedy=GIVE_WAVELENGTHS) from error
    return check_wavelengths("wavelength", values * factor, nc, path=path)
