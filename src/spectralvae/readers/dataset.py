"""A lazy view of a scene in xarray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from spectralvae.readers import Wavelength, open_reader
from spectralvae.readers.base import Scene

_BLOCK_SAMPLES = 2**24

ATTRIBUTES = {
    "wavelength": {"units": "nm", "long_name": "wavelength"},
    "latitude": {"units": "degrees_north", "long_name": "latitude"},
    "longitude": {"units": "degrees_east", "long_name": "longitude"},
    "solar_zenith_angle": {"units": "degrees", "long_name": "solar zenith angle"},
    "viewing_zenith_angle": {"units": "degrees", "long_name": "viewing zenith angle"},
    "relative_azimuth_angle": {"units": "degrees", "long_name": "relative azimuth angle"},
    "time": {"long_name": "time of the scan step, by the file's own units"},
}


def open_scene(
    path: str | PathLike[str],
    *,
    variable: str | None = None,
    size: Sequence[int] | None = None,
    wavelength: Wavelength | None = None,
    region: Sequence[int] | None = None,
    band: str | None = None,
    dims: Mapping[str, str | int] | None = None,
    units: str | None = None,
) -> xr.Dataset:
    """Open a scene lazily: radiance is read when it is used, and only the rows that are.

    Args:
        path: A file or folder of one of the formats in docs/data.md; "~" is the home folder.
        variable: The array's name, where more than one may be the scene (not for TEMPO).
        size: MATLAB: [ny, nx] of a 2-D array (bands x pixels), where the file doesn't say.
        wavelength: The wavelengths in nm, or {"first": nm, "last": nm} for evenly spaced channels, where the file
            has none.
        region: [y0, y1, x0, x1], half-open pixel bounds; None for the full image.
        band: TEMPO: the band group; None takes the only one, or band_290_490_nm where there are both.
        dims: netCDF and Zarr: which dimension is "y", "x" and "channel", by name, or by number where it has none.
        units: Of the radiance, where the file doesn't say.

    Returns:
        `radiance` (y, x, channel) float32, NaN where invalid; coordinates `wavelength` in nm, (channel) or
        (x, channel), and, where the file has them, `latitude`, `longitude`, `solar_zenith_angle`,
        `viewing_zenith_angle`, `relative_azimuth_angle` (y, x) and `time` (y). The attribute `absent` names the
        optional variables that the file lacks. For TEMPO y = mirror_step, x = xtrack.

    Raises:
        InputError: The file is missing, damaged, or none that is read.
        ConfigError: An argument doesn't fit the file.
    """
    scene = open_reader(
        path,
        variable=variable,
        size=size,
        wavelength=wavelength,
        region=region,
        band=band,
        dims=dims,
        units=units,
    )
    with scene:
        wavelengths = scene.wavelength
        coordinates: dict[str, Any] = {"wavelength": (("x", "channel")[-wavelengths.ndim :], wavelengths)}
        for name, (axes, values) in scene.coordinates().items():
            if name == "time":
                # To the microsecond, which is what float64 holds of seconds since 1970; NaN becomes NaT.
                coordinates[name] = axes, np.round(values * 1e6).astype("datetime64[us]").astype("datetime64[ns]")
            else:
                coordinates[name] = axes, values
    radiance = {"long_name": "radiance"} | ({"units": scene.units} if scene.units else {})
    dataset = xr.Dataset(
        {"radiance": (("y", "x", "channel"), indexing.LazilyIndexedArray(_LazyRadiance(scene)), radiance)},
        {name: (*value, ATTRIBUTES[name]) for name, value in coordinates.items()},
        {
            "source": scene.path.name,
            "format": scene.format,
            **({"band": scene.band} if scene.band else {}),
            **({"region": list(scene.region)} if scene.region else {}),
            "absent": ", ".join(scene.absent),
        },
    )
    dataset.set_close(scene.close)
    return dataset


class _LazyRadiance(BackendArray):
    """A scene's radiance as xarray indexes it."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.shape = scene.shape
        self.dtype = np.dtype(np.float32)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.BASIC, self._read)

    def _read(self, key: tuple[int | slice, ...]) -> NDArray[np.float32]:
        """Read by whole rows, a few at a time: one column of a granule must not take the memory of all of it."""
        ny, nx, nc = self.shape
        y, *rest = key
        wanted = range(*y.indices(ny)) if isinstance(y, slice) else range(y, y + 1)
        result = np.empty((len(wanted), *np.empty((0, nx, nc))[:, *rest].shape[1:]), dtype=np.float32)
        block = max(1, _BLOCK_SAMPLES // (nx * nc)) if wanted.step == 1 else 1
        for start in range(0, len(wanted), block):
            rows = wanted[start : start + block]
            values, _ = self.scene.read(slice(rows[0], rows[-1] + 1))
            result[start : start + block] = values[:, *rest]
        return result if isinstance(y, slice) else result[0]
