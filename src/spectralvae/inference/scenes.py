"""Scenes to latents and back, in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from spectralvae.errors import ConfigError, InputError
from spectralvae.inference.coder import Coder, Float32
from spectralvae.inference.latents import (
    COORDINATES,
    PIXELS,
    check_latents,
    check_scene,
    contents,
    stream_latents,
    stream_radiance,
)
from spectralvae.model import AutoencoderKL
from spectralvae.readers.base import COORDINATES as OF_SCENES
from spectralvae.readers.base import Coordinate, invalidate
from spectralvae.readers.tempo import REJECTED_FLAG_BITS
from spectralvae.weights.loading import artifact_of

DIMS = ("y", "x", "channel")
LAZY_SAMPLES = 2**24  # read at a time


def encode_scene(
    model: AutoencoderKL,
    scene: xr.Dataset | NDArray[Any],
    *,
    log_variance: bool = False,
    overlap: int | None = None,
    batch_size: int = 4,
) -> xr.Dataset:
    """Encode a scene of any size, tile by tile, on the device the model is on.

    >>> model = load_model("exports/tempo")
    >>> latents = encode_scene(model, open_scene("TEMPO_RAD_L1_V03_20240601T210934Z_S012G01.nc"))
    >>> latents.latent.sel(latent_channel=0).plot()

    Args:
        model: from `load_model`, which brings the normalisation and the size of the tiles.
        scene: as `open_scene` gives it: `radiance` (y, x, channel), NaN = invalid, with `wavelength`. Or radiance
            alone, an array (y, x, channel), whose wavelengths are then taken to be the model's. It is read in strips
            of a tile's height.
        log_variance: give the log variance of the latents' posterior, too.
        overlap: pixels that neighbouring tiles share; None for the default, a quarter of a tile.
        batch_size: tiles that go through the network at a time.

    Returns:
        `latent` (latent_channel, y, x): the posterior's mean; `log_variance` if asked for; `valid_fraction` (y, x);
        `valid` (row, column, channel) bool; latitude, longitude, time of the latent cells where the scene has them;
        wavelength; mean and std of the normalisation. A cell has s x s pixels, s = model.scale; the grid has
        ceil(ny / s) x ceil(nx / s). What a cell without any valid pixel holds means nothing.

    Raises:
        InputError: the scene is not one the model is for, or the model cannot be used on scenes.
        ConfigError: the model is not from `load_model`, or the overlap does not fit.
    """
    with _coder(model, overlap, batch_size) as coder:
        source = _Scene(scene, coder)
        try:
            check_scene(source.path, source, coder.normalization)
        except ConfigError as error:
            raise error.with_parts(key=f"scene.{error.key}") from error
        except InputError as error:
            raise error.with_parts(key="scene") from error
        return _encoded(source, coder, log_variance)


def _encoded(source: _Scene, coder: Coder, log_variance: bool) -> xr.Dataset:
    will_be = contents(source, coder, log_variance, {"source": source.name})
    values = {
        **will_be.small,
        **{name: np.empty(will_be.shape(name), will_be.layout(name)[1]) for name in will_be.streamed},
    }

    def write(name: str, part: tuple[slice, ...], piece: NDArray[Any]) -> None:
        values[name][part] = piece

    counts = stream_latents(source, coder, log_variance, write, lambda n_pixels: None)
    if not counts["valid"]:
        raise InputError(f"none of its {math.prod(source.shape)} samples is valid", key="scene", path=source.path)
    found = {}
    for name, array in values.items():
        dims, _, attributes = will_be.layout(name)
        kept = {key: value for key, value in attributes.items() if key not in ("dtype", "coordinates")}
        if name == "time":
            found[name] = xr.Variable(dims, array, attributes)
        else:
            found[name] = xr.Variable(dims, array.view(np.bool_) if name == "valid" else array, kept)
    dataset = xr.Dataset(found, attrs=will_be.attributes)
    return xr.decode_cf(dataset).set_coords([name for name in COORDINATES if name in found])


def decode_scene(
    model: AutoencoderKL,
    latents: xr.Dataset | NDArray[Any],
    *,
    overlap: int | None = None,
    batch_size: int = 4,
) -> xr.Dataset:
    """Decode latents to a scene.

    >>> scene = decode_scene(model, latents)
    >>> scene.radiance.isel(y=60, x=10).plot(x="wavelength")

    Args:
        model: the one that made the latents, from `load_model`.
        latents: from `encode_scene`, or from a file of `spectralvae encode` (`xarray.open_dataset`). Or latents alone,
            an array (latent_channel, y, x).
        overlap, batch_size: as of `encode_scene`.

    Returns:
        `radiance` (y, x, channel) float32 with `wavelength`: of the shape that was encoded, NaN where that was invalid.
        From an array of latents all samples, at the wavelengths of the model's training.

    Raises:
        InputError: the latents are of another model, or are none.
        ConfigError: as `encode_scene`.
    """
    with _coder(model, overlap, batch_size) as coder:
        return _decoded(latents, coder)


def _decoded(latents: xr.Dataset | NDArray[Any], coder: Coder) -> xr.Dataset:
    if isinstance(latents, str | PathLike):
        raise InputError("is a path", key="latents", value=str(latents), remedy="open it with xarray.open_dataset")
    if isinstance(latents, xr.DataArray):
        raise InputError(
            "are a DataArray", key="latents", remedy="give the Dataset that encode_scene returns, or the values alone"
        )
    given = latents if isinstance(latents, xr.Dataset) else _dataset_of(latents, coder)
    missing = {"latent", "valid", "wavelength"} - set(given.variables)
    if missing or given.latent.dims != ("latent_channel", "y", "x"):
        lacks = f"lack {', '.join(sorted(missing))}" if missing else f"have dimensions {given.latent.dims}"
        raise InputError(
            lacks, key="latents", remedy="give what encode_scene returns, or an array (latent_channel, y, x)"
        )
    if set(given.valid.dims) != set(PIXELS):
        raise InputError(f"valid has dimensions {given.valid.dims}; needed: {PIXELS}", key="latents")
    given = given.transpose(*PIXELS, "latent_channel", "y", "x", missing_dims="ignore")
    check_latents(given.attrs, given.sizes["latent_channel"], coder, key="latents")
    ny, nx, nc = given.valid.shape
    s = coder.scale
    if given.latent.shape[1:] != (-(-ny // s), -(-nx // s)) or nc != coder.normalization.n_channels:
        raise InputError(
            f"a grid of {' x '.join(map(str, given.latent.shape[1:]))} cells does not fit a scene of {ny} x {nx} "
            f"pixels and {nc} channels; the model has {s} x {s} pixels a cell and {coder.normalization.n_channels} "
            "channels",
            key="latents",
        )

    def read(rows: slice, columns: slice) -> Float32:
        return np.moveaxis(given.latent[:, rows, columns].values.astype(np.float32), 0, -1)

    def valid(rows: slice, columns: slice) -> NDArray[np.bool_]:
        return np.asarray(given.valid[rows, columns].values, np.bool_)

    radiance = np.empty((ny, nx, nc), np.float32)
    for rows, columns, values, _ in stream_radiance(read, valid, (ny, nx), coder):
        radiance[rows, columns] = values
    units = coder.normalization.units
    wavelength = given.wavelength.rename({"column": "x"}) if "column" in given.wavelength.dims else given.wavelength
    return xr.Dataset(
        {"radiance": (DIMS, radiance, {"long_name": "radiance", **({"units": units} if units else {})})},
        {"wavelength": wavelength.variable},
        {"source": given.attrs.get("source", "latents"), "model_sha256": given.attrs.get("model_sha256", "")},
    )


@contextmanager
def _coder(model: AutoencoderKL, overlap: int | None, batch_size: int) -> Iterator[Coder]:
    """The model in eval mode while the block runs."""
    if batch_size < 1:
        raise ConfigError(key="batch_size", value=batch_size, limit="at least 1")
    artifact, device, training = artifact_of(model), next(model.parameters()).device, model.training
    try:
        yield Coder(artifact, device, overlap=overlap, batch_size=batch_size, borrowed=True)
    finally:
        model.train(training)


class _Scene:
    """A scene in memory, or opened lazily, as `spectralvae.inference.reading.Source`."""

    def __init__(self, scene: xr.Dataset | NDArray[Any], coder: Coder) -> None:
        self.name = "scene"
        self.path: Path | None = None
        assert coder.normalization.wavelength is not None
        if isinstance(scene, str | PathLike):
            raise InputError("is a path", key="scene", value=str(scene), remedy="open it with open_scene")
        if isinstance(scene, xr.DataArray):
            scene = scene.to_dataset(name="radiance")
        if not isinstance(scene, xr.Dataset):
            if np.ndim(scene) != 3:
                raise InputError(f"has shape {np.shape(scene)}; needed: (y, x, channel)", key="scene")
            if isinstance(scene, np.ma.MaskedArray):  # what the netCDF4 library gives
                scene = np.ma.filled(scene.astype(np.float32), np.nan)
            scene = xr.Dataset({"radiance": (DIMS, np.asarray(scene))})
            if scene.sizes["channel"] == coder.normalization.n_channels:
                scene = scene.assign_coords(wavelength=("channel", coder.normalization.wavelength))
        elif "source" in scene.attrs:
            self.name = str(scene.attrs["source"])
            self.path = Path(self.name)
        if "radiance" not in scene or set(scene.radiance.dims) != set(DIMS):
            has = f"has radiance {scene.radiance.dims}" if "radiance" in scene else "has no radiance"
            raise InputError(f"{has}; needed: radiance (y, x, channel), as of open_scene", key="scene", path=self.path)
        self._radiance = scene.radiance.transpose(*DIMS)
        self._scene = scene
        self.shape: tuple[int, int, int] = self._radiance.shape
        if 0 in self.shape:
            raise InputError(f"is empty: its shape is {self.shape}", key="scene", path=self.path)
        # More than a row, for a file that is read lazily may have chunks of many rows.
        self.chunk = (max(1, LAZY_SAMPLES // math.prod(self.shape[1:])), self.shape[1])
        self.units = self._radiance.attrs.get("units")
        self.region = scene.attrs.get("region")
        flag_bits = coder.normalization.flag_bits
        if scene.attrs.get("format") == "tempo" and flag_bits and set(flag_bits) != set(REJECTED_FLAG_BITS):
            raise InputError(
                f"open_scene rejects samples by bits {list(REJECTED_FLAG_BITS)} of the quality flag, the model's "
                f"training by {list(flag_bits)}",
                key="scene",
                path=self.path,
                remedy="use the command `spectralvae encode`",
            )

    @property
    def wavelength(self) -> NDArray[np.float64]:
        """(channel) or (x, channel), nm."""
        if "wavelength" not in self._scene:
            raise InputError(
                "has no wavelength; needed: a coordinate wavelength (channel), in nm", key="scene", path=self.path
            )
        wavelength = self._scene.wavelength
        if wavelength.dims not in (("channel",), ("x", "channel"), ("channel", "x")):
            raise InputError(
                f"wavelength has dimensions {wavelength.dims}; needed: (channel) or (x, channel)",
                key="scene",
                path=self.path,
            )
        return np.asarray(wavelength.transpose(*DIMS[-wavelength.ndim :]).values, np.float64)

    def coordinates(self) -> dict[str, Coordinate]:
        """As of `spectralvae.readers.Scene`."""
        found: dict[str, Coordinate] = {}
        pixels = self._radiance.isel(channel=0, drop=True)
        for name in OF_SCENES:
            if name not in self._scene:
                continue
            given = self._scene[name]
            if name == "time":
                if given.dims == ("y",):
                    found[name] = ("y",), self._seconds(given.values)
            elif set(given.dims) <= {"y", "x"}:
                found[name] = ("y", "x"), given.broadcast_like(pixels).transpose("y", "x").values
        return found

    def _seconds(self, time: NDArray[Any]) -> NDArray[np.float64]:
        """Since 1970."""
        if time.dtype.kind != "M":
            raise InputError(
                f"time is {time.dtype}; needed: datetime64, as xarray.decode_cf makes it", key="scene", path=self.path
            )
        return np.where(np.isnat(time), np.nan, time.astype("datetime64[ns]").astype(np.int64) / 1e9)

    def blocks(self, max_samples: int) -> Iterator[tuple[slice, slice]]:
        """As of `spectralvae.readers.Scene`: some rows each."""
        ny, nx, nc = self.shape
        height = max(1, max_samples // (nx * nc))
        for top in range(0, ny, height):
            yield slice(top, min(top + height, ny)), slice(0, nx)

    def read(self, rows: slice, columns: slice) -> tuple[Float32, dict[str, int]]:
        """As of `spectralvae.readers.Scene`: what is not finite is invalid, and fills that files do not declare."""
        values = self._radiance[rows, columns].values.copy()
        return invalidate(values, np.zeros((1, 1, 1), np.bool_), None)


def _dataset_of(latents: NDArray[Any], coder: Coder) -> xr.Dataset:
    """Latents alone, with what else is needed to decode them."""
    if np.ndim(latents) != 3 or 0 in np.shape(latents):
        raise InputError(f"have shape {np.shape(latents)}; needed: (latent_channel, y, x)", key="latents")
    _, height, width = np.shape(latents)
    shape = (height * coder.scale, width * coder.scale, coder.normalization.n_channels)
    return xr.Dataset(
        {
            "latent": (("latent_channel", "y", "x"), np.asarray(latents)),
            "valid": (("row", "column", "channel"), np.broadcast_to(np.True_, shape)),
        },
        {"wavelength": ("channel", coder.normalization.wavelength)},
    )
