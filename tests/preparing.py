"""What the tests of preparation share: tiny granules, preparing them, and reading what came out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5netcdf
import h5py
import numpy as np
import pytest
import scipy.io
import zarr

from spectralvae.config import PrepareConfig
from spectralvae.data.prepare import prepare
from spectralvae.data.store import Store
from spectralvae.errors import InputError, SpectralvaeError
from spectralvae.runtime.console import new_console
from spectralvae.runtime.rundir import RunDir

NY, NX, NC = 10, 8, 6
BAND = "band_290_490_nm"
YXC = ("mirror_step", "xtrack", "spectral_channel")
REFLECTANCE = {"transform": "zscore"}
SPLIT_OF_THREE = {"train": ["*0601*", "*0602*"], "val": ["*0603*"]}
FIELDS = {
    "NO2": ("vertical_column_troposphere", "molecules/cm^2", "main_data_quality_flag"),
    "HCHO": ("vertical_column", "molecules/cm^2", "main_data_quality_flag"),
    "O3TOT": ("column_amount_o3", "DU", "quality_flag"),
    "CLDO4": ("cloud_fraction", "1", "processing_quality_flag"),
}

WriteGranule = Callable[..., Path]


def run_prepare(out: Path, inputs: Sequence[Any], *, overwrite: bool = False, **settings: Any) -> Store:
    inputs = [str(i) if isinstance(i, Path) else i for i in inputs]
    config = PrepareConfig.model_validate({"output_dir": str(out), "inputs": inputs, **settings})
    prepare(config, RunDir("prepare", config, overwrite=overwrite, resumable=True), new_console())
    return Store(out)


def refused(
    error: type[SpectralvaeError], out: Path, inputs: Sequence[Any], *words: str, made: bool = False, **settings: Any
) -> str:
    """Check that a preparation is refused in one line with all words, before (or after) its directory is made."""
    with pytest.raises(error) as caught:
        run_prepare(out, inputs, **settings)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} not in: {message}"
    assert out.exists() == made
    with pytest.raises(InputError):
        Store(out)
    return message


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
    with h5py.File(path, "r+") as file:
        group = file[BAND]
        for key in ("radiance", "pixel_quality_flag", "radiance_error"):
            if key not in group:
                continue
            old = group[key]
            values, attributes = old[...], {k: old.attrs[k] for k in ("_FillValue", "units") if k in old.attrs}
            scales = {dim: old.dims[i][0] for i, dim in enumerate(YXC)}
            del group[key]
            axes = [YXC.index(dim) for dim in order]
            cut = chunks and tuple(chunks[axis] for axis in axes)
            new = group.create_dataset(key, data=values.transpose(axes), chunks=cut, compression=cut and "gzip")
            new.attrs.update(attributes)
            for i, dim in enumerate(order):
                new.dims[i].attach_scale(scales[dim])


def write_level2(
    folder: Path,
    granule: Path,
    product: str,
    values: np.ndarray,
    quality: np.ndarray | None = None,
    units: str | None = None,
) -> Path:
    """Write the (y, x) field of a product that belongs to a granule."""
    field, known, flag = FIELDS[product]
    folder.mkdir(exist_ok=True)
    path = folder / granule.name.replace("RAD_L1", f"{product}_L2")
    with h5netcdf.File(path, "w") as file:
        file.attrs["product_type"] = product
        file.dimensions = dict(zip(YXC, values.shape, strict=False))
        group = file.create_group("product")
        variable = group.create_variable(field, YXC[:2], data=values)
        variable.attrs["units"] = units or known
        if quality is not None:
            group.create_variable(flag, YXC[:2], data=quality)
    return path


def reflectance_file(path: Path, values: np.ndarray) -> dict[str, Any]:
    """Write (y, x, channel) values as a MATLAB file; returns its entry in inputs."""
    scipy.io.savemat(path, {"scene": values})
    return {"path": str(path), "wavelength": {"first": 400, "last": 900}}


def z_of(store: Store, scene: str) -> np.ndarray:
    return np.asarray(zarr.open_array(store.path / "scenes" / scene / "z", mode="r")[:])


def root_array(store: Store, key: str) -> np.ndarray:
    return np.asarray(zarr.open_array(store.path / key, mode="r")[:])


def splits(store: Store) -> dict[str, str]:
    return {s.id: s.split for s in store.scenes}


def content(store: Path) -> Iterator[tuple[str, bytes]]:
    """Every file but the record of the run, whose times differ."""
    for path in sorted(store.rglob("*")):
        if path.is_file() and path.name not in ("run.json", "config.yaml", ".lock"):
            yield str(path.relative_to(store)), path.read_bytes()


def same_content(a: Path, b: Path) -> bool:
    return dict(content(a)) == dict(content(b))


def nothing_opens(store: Path) -> bool:
    """Neither as a store nor in zarr."""
    with pytest.raises(InputError):
        Store(store)
    with pytest.raises(FileNotFoundError):
        zarr.open_group(store, mode="r")
    return True
