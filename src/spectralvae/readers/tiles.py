"""Legacy tile folders: `NNNNN.pt` of normalised tiles, beside them `mean_spectrum.pt` and `std_spectrum.pt`.

What wrote them clamped radiance r to at least 1 and kept z = clip((log r - mean) / (std + 1e-8), -10, 10) in float32,
without a mask: a fill became 1, so its z is -mean / (std + 1e-8), which identifies it. Where this z reaches the
clip, a fill can't be told from a small radiance, and everything at the clip is invalid ("ambiguous").

Shapes: N tiles of h x w pixels and C channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spectralvae.errors import ConfigError, InputError
from spectralvae.readers.arguments import Window, given_wavelengths, no_wavelengths
from spectralvae.readers.base import COORDINATES, FLAG, Scene, damage_named, invalidate

if TYPE_CHECKING:
    from torch import Tensor

MEAN, STD = "mean_spectrum.pt", "std_spectrum.pt"

_TILES = re.compile(r"\d+\.pt")
_CLIP, _EPSILON = 10.0, 1e-8

# z of a fill is right to four roundings of float32 (of mean, std, difference and quotient), 4 * 2^-24 = 2.4e-7.
_ROUNDING = 1e-6


class TilesScene(Scene):
    """The tiles of one file, one below the other: (N * h, w, C) in the radiance they were made of.

    Values that were clipped at the top stay what the clip made of them. `notes` names the ambiguous channels.

    Args:
        path: One NNNNN.pt, [N, h, w, C] float32; it is mapped into memory.
        wavelength: C wavelengths in nm, or {"first": nm, "last": nm} for evenly spaced channels; needed.
        region: [y0, y1, x0, x1], half-open pixel bounds, y0 and y1 multiples of h; None for all tiles.
        units: Of the radiance, which the file doesn't tell.

    Raises:
        InputError: No such tensor, no spectra, no wavelengths, values beyond the clip, or damage.
        ConfigError: An argument doesn't fit the file.
    """

    format = "tiles"

    def __init__(
        self,
        path: Path,
        *,
        wavelength: Sequence[float] | NDArray[Any] | Mapping[str, float] | None = None,
        region: Sequence[int] | None = None,
        units: str | None = None,
    ) -> None:
        tiles = _load(path)
        n, h, w, nc = tiles.shape
        if wavelength is None:
            raise no_wavelengths(path, nc)
        wavelengths = given_wavelengths("wavelength", wavelength, nc, path=path)
        self._mean, self._std = _read_spectra(path, nc)
        # Both (C,): z of a fill, and where it reaches the clip.
        self._fill = -self._mean / (self._std + _EPSILON)
        self._ambiguous = np.abs(self._fill) >= _CLIP * (1 - _ROUNDING)
        super().__init__(
            path,
            (n * h, w, nc),
            region,
            absent=(FLAG, *COORDINATES),
            units=units,
            chunk=(h, w),
            wavelength=wavelengths,
        )
        self.stack = h
        if self.region is not None and (self.region[0] % h or self.region[1] % h):
            limit = f"[y0, y1, x0, x1] with y0 and y1 multiples of {h}"
            raise ConfigError("cuts tiles", key="region", path=path, value=list(self.region), limit=limit)
        if self._ambiguous.any():
            channels = np.flatnonzero(self._ambiguous)
            runs = np.split(channels, np.flatnonzero(np.diff(channels) > 1) + 1)
            named = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs[:10])
            note = (
                f"{path.name}: in {len(channels)} of {nc} channels a fill can't be told from a clipped value, and all"
                f" at the clip are invalid; channels {named}{', ...' if len(runs) > 10 else ''}"
            )
            self.notes = (note,)

    def files(self) -> list[Path]:
        return sorted((self.path, self.path.with_name(MEAN), self.path.with_name(STD)))

    def _open(self) -> _Tiles:
        return _Tiles(_load(self.path))

    def read(self, rows: slice, columns: slice = slice(None)) -> tuple[NDArray[np.float32], dict[str, int]]:
        radiance, filled, _ = self._read_raw(self._in_file(rows, columns))
        return invalidate(radiance, filled & ~self._ambiguous, None, filled & self._ambiguous)

    def _read_raw(self, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.bool_] | None]:
        """As of a scene; where the fill is ambiguous, "filled" is all that may be fill."""
        y0, y1, x0, x1 = window
        tiles: _Tiles = self._file
        with damage_named(self.path):
            z = tiles.values[y0:y1, x0:x1].astype(np.float64)
        with np.errstate(invalid="ignore"):
            largest = float(np.max(np.abs(z), initial=0.0, where=~np.isnan(z)))
        if largest > _CLIP * (1 + _ROUNDING):
            problem = f"holds {largest:g}, beyond the clip of {_CLIP:g}, so it is no legacy tile file"
            raise InputError(problem, path=self.path, remedy="give the files that its tiles were made of")
        at_clip = z * np.sign(self._fill) >= _CLIP * (1 - _ROUNDING)
        filled = np.where(self._ambiguous, at_clip, np.abs(z - self._fill) <= _ROUNDING * np.abs(self._fill))
        return np.exp(z * (self._std + _EPSILON) + self._mean), filled, None


class _Tiles:
    """An open file: (N * h, w, C) in a memory map."""

    def __init__(self, tiles: Tensor) -> None:
        self.values = tiles.flatten(0, 1).numpy()

    def close(self) -> None:
        del self.values


def is_torch_file(path: Path, head: bytes) -> bool:
    """Did torch.save write a file of this head: a zip file with the name of its pickle in it, or a bare pickle?"""
    return (head.startswith(b"PK\3\4") and b"data.pkl" in head) or (head[:2] == b"\x80\x02" and path.suffix == ".pt")


def tile_files(folder: Path) -> list[Path]:
    """The tile files of a legacy folder, sorted."""
    with damage_named(folder):
        return sorted(file for file in folder.iterdir() if _TILES.fullmatch(file.name) and file.is_file())


def _load(path: Path) -> Tensor:
    """The tensor of a file, (N, h, w, C) float32, mapped into memory."""
    import torch

    from spectralvae.weights.torchfile import check_size, load_torch_file

    tiles = load_torch_file(path, mmap=True)
    limit = "tiles [N, y, x, channel] in float32, contiguous"
    if not isinstance(tiles, torch.Tensor):
        raise InputError(f"holds {type(tiles).__name__}, not a tensor", path=path, limit=limit)
    check_size(path, [tiles])
    plain = tiles.layout == torch.strided and not tiles.is_meta and tiles.is_contiguous()
    if tiles.dtype != torch.float32 or tiles.ndim != 4 or 0 in tiles.shape or not plain:
        layout = "" if plain else ", not contiguous"
        raise InputError(f"holds {tiles.dtype} of shape {list(tiles.shape)}{layout}", path=path, limit=limit)
    return tiles.detach()


def _read_spectra(path: Path, nc: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(C,) mean and standard deviation of log radiance, from the folder of a tile file."""
    from spectralvae.weights.mltools import read_spectrum

    spectra = []
    for name in (MEAN, STD):
        file = path.with_name(name)
        if not file.is_file():
            problem = f"no {name} beside it, without which its tiles are no radiance"
            raise InputError(problem, path=path, remedy="put it there")
        spectrum = read_spectrum(file)
        if spectrum.size != nc:
            problem = f"{spectrum.size} channels, but {path.name} has {nc}"
            raise InputError(problem, path=file, remedy="put the right one there")
        spectra.append(spectrum)
    if (spectra[1] < 0).any():
        problem = "is negative, so it holds no standard deviations"
        raise InputError(problem, path=path.with_name(STD), remedy="put the right one there")
    return spectra[0], spectra[1]
