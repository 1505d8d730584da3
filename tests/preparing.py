"""What the tests of preparation share: tiny granules, preparing them, and reading what came out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5netcdf
import numpy as np
import pytest
import refusals
import xarray as xr
import zarr

from spectralvae.config import PrepareConfig
from spectralvae.data.prepare import prepare
from spectralvae.data.store import Store
from spectralvae.errors import InputError, SpectralvaeError
from spectralvae.readers.products import PRODUCTS
from spectralvae.runtime.console import new_console
from spectralvae.runtime.rundir import RunDir

NY, NX, NC = 10, 8, 6
BAND = "band_290_490_nm"
YXC = ("mirror_step", "xtrack", "spectral_channel")
REFLECTANCE = {"transform": "zscore"}
SPLIT_OF_THREE = {"train": ["*0601*", "*0602*"], "val": ["*0603*"]}
WriteGranule = Callable[..., Path]


def run_prepare(out: Path, inputs: Sequence[Any], *, overwrite: bool = False, **settings: Any) -> Store:
    inputs = [str(i) if isinstance(i, Path) else i for i in inputs]
    config = PrepareConfig.model_validate({"output_dir": str(out), "inputs": inputs, **settings})
    prepare(config, RunDir("prepare", config, overwrite=overwrite), new_console())
    return Store(out)


def refused(
    error: type[SpectralvaeError], out: Path, inputs: Sequence[Any], *words: str, made: bool = False, **settings: Any
) -> None:
    """Check that a preparation is refused with this key and path, before (or after) its directory is made."""
    parts = {part: settings.pop(part) for part in ("key", "path") if part in settings}
    with refusals.refused(error, *words, **parts):
        run_prepare(out, inputs, **settings)
    assert out.exists() == made
    with pytest.raises(InputError):
        Store(out)


def name(stamp: str, number: int = 1, version: str = "V03") -> str:
    return f"TEMPO_RAD_L1_{version}_{stamp}Z_S{number:03d}G01.nc"


def radiance(seed: int, shape: tuple[int, int, int] = (NY, NX, NC)) -> np.ndarray:
    """(y, x, channel) float32, of the size of real radiance, every channel with a mean of its own."""
    rng = np.random.default_rng(seed)
    return (rng.lognormal(0, 0.5, shape) * 10.0 ** np.linspace(10.5, 13, shape[2])).astype(np.float32)


def add_errors(path: Path, errors: np.ndarray) -> None:
    """Add radiance_error to a granule."""
    with h5netcdf.File(path, "a") as file:
        file[BAND].create_variable("radiance_error", YXC, data=errors.astype(np.float32))


def rearrange(path: Path, chunks: tuple[int, int, int] | None, order: Sequence[str] = YXC) -> None:
    """Store the (y, x, channel) variables of a granule anew: in other chunks, or with their dimensions in any order."""
    ds = xr.load_dataset(path, group=BAND, decode_cf=False, engine="h5netcdf")
    encoding = {}
    for key in (key for key in ds if ds[key].ndim == 3):
        ds[key] = ds[key].transpose(*order)
        if chunks:
            encoding[key] = {"chunksizes": tuple(chunks[YXC.index(dim)] for dim in order), "zlib": True}
    ds.to_netcdf(path, group=BAND, engine="h5netcdf", encoding=encoding)


def write_level2(folder: Path, granule: Path, product: str, values: np.ndarray, units: str = "") -> Path:
    """Write the (y, x) field of a product that belongs to a granule."""
    spec = PRODUCTS[product]
    folder.mkdir(exist_ok=True)
    path = folder / granule.name.replace("RAD_L1", f"{product}_L2")
    with h5netcdf.File(path, "w") as file:
        file.attrs["product_type"] = product
        file.dimensions = dict(zip(YXC, values.shape, strict=False))
        group = file.create_group("product")
        group.create_variable(spec.field, YXC[:2], data=values).attrs["units"] = units or spec.units
    return path


def z_of(store: Store, scene: str) -> np.ndarray:
    return np.asarray(zarr.open_array(store.path / "scenes" / scene / "z", mode="r")[:])


def content(store: Path) -> dict[str, bytes]:
    """Every file but the record of the run, whose times differ."""
    unlike = ("run.json", "config.yaml", ".lock")
    paths = (path for path in store.rglob("*") if path.is_file() and path.name not in unlike)
    return {str(path.relative_to(store)): path.read_bytes() for path in paths}


def same_content(a: Path, b: Path) -> bool:
    return content(a) == content(b)


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("not in a minute")


def nothing_opens(store: Path) -> bool:
    """Neither as a store nor in zarr."""
    with pytest.raises(InputError):
        Store(store)
    with pytest.raises(FileNotFoundError):
        zarr.open_group(store, mode="r")
    return True
