"""Level-2 products: paired by name, read by rule, against truth made in numpy and the real file read by xarray."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xarray as xr
from badfiles import own_brothers
from refusals import refused
from test_formats import overwrite_chunk, write

from spectralvae.errors import ConfigError, InputError, UserError
from spectralvae.readers import guard
from spectralvae.readers.pairing import ProductFolder
from spectralvae.readers.products import PRODUCT_RULES, PRODUCTS, read_product
from spectralvae.simulate import simulate_granules

NY, NX = 6, 5
STAMP = "20240601T210934Z_S012G01"
L1 = Path(f"TEMPO_RAD_L1_V03_{STAMP}.nc")
YX = ("mirror_step", "xtrack")
FIELD = "product/vertical_column_troposphere"


def grid(low: float = 0.1, high: float = 0.9, dtype: str = "f8") -> np.ndarray:
    return np.linspace(low, high, NY * NX).reshape(NY, NX).astype(dtype)


def level2(
    path: Path,
    product: str,
    values: np.ndarray,
    *,
    quality: np.ndarray | None = None,
    order: Sequence[str] = YX,
    quality_attrs: dict[str, Any] | None = None,
    more: dict[str, np.ndarray] | None = None,
    product_type: str | None = "",
    **attrs: Any,
) -> Path:
    """Write (y, x) values of a product's own field, and more fields by path; "" stands for what the product has."""
    fields = {f"product/{PRODUCTS[product].field}": (values, {"units": PRODUCTS[product].units, **attrs})}
    if quality is not None:
        fields[PRODUCTS[product].quality] = quality, quality_attrs or {}
    fields |= {place: (array, {"units": "K"}) for place, array in (more or {}).items()}
    dims = (*order, "corner")
    turned = {n: (dims[: v.ndim], v if order == YX else v.T, has) for n, (v, has) in fields.items()}
    write(path.parent, "netcdf4", turned, path.name)
    if product_type is not None:
        with h5py.File(path, "r+") as file:
            file.attrs["product_type"] = product_type or product
    return path


def none_rejected(**but: int) -> dict[str, int]:
    return {**dict.fromkeys(PRODUCT_RULES, 0), **but}


def refuse(
    path: Path, key: str | None, *words: str, error: type[UserError] = InputError, product: str = "NO2", **given: Any
) -> None:
    """Check that a product file is refused with this key; the error of an argument names no file."""
    with refused(error, *words, key=key, path=path):
        read_product(path, product, **given)


def attach(variable: h5py.Dataset) -> h5py.Dataset:
    """Give a variable that h5py wrote its dimensions."""
    for axis, name in zip(variable.dims, YX, strict=True):
        axis.attach_scale(variable.parent[name])
    return variable


# --- the real file ------------------------------------------------------------------------------


def test_real_file(real_data: Path) -> None:
    """Counts and extremes as xarray, which knows nothing of us, finds them."""
    path = ProductFolder(real_data, "NO2").find(L1)
    refuse(path, None, "'vertical_column_troposphere'", "vertical_column_stratosphere")
    with xr.open_dataset(path, group="product", engine="h5netcdf") as truth:
        expected = truth["vertical_column_stratosphere"].transpose(*YX).values
    place = "product/vertical_column_stratosphere"
    found = read_product(path, "NO2", field="vertical_column_stratosphere", expected_shape=(132, 2048))
    refuse(path, place, "132 x 2048", "131 x 2048", field=place, expected_shape=(131, 2048))
    assert expected.dtype == np.float64 and found.values.dtype == np.float32
    np.testing.assert_array_equal(found.values, expected.astype(np.float32))

    n_nan = int(np.isnan(expected).sum())
    assert found.counts == none_rejected(nan=n_nan)
    assert int(np.isnan(found.values).sum()) == n_nan == 6128
    assert (found.field, found.units, found.version, found.quality) == (place, "molecules/cm^2", "V03", None)
    assert found.absent == ("product/main_data_quality_flag",)


# --- simulated files ----------------------------------------------------------------------------


def test_simulated(tmp_path: Path) -> None:
    scene, *_ = simulate_granules(
        tmp_path, seed=3, n_granules=2, shape=(9, 40), n_channels=16, products=list(PRODUCTS), invalid_fraction=0.1
    )
    for product, spec in PRODUCTS.items():
        path = ProductFolder(tmp_path, product).find(scene)
        with h5py.File(path) as file:
            stored = file["product"][spec.field][...]
            flag = file[spec.quality][...]
        found = read_product(path, product, expected_shape=(9, 40))
        filled = np.isclose(stored, -1e30)
        assert filled.any()
        valid = ~filled & (flag == 0)
        np.testing.assert_array_equal(found.values, np.where(valid, stored, np.nan).astype(np.float32))
        n_quality = int((~filled & (flag != 0)).sum())
        assert found.counts == none_rejected(fill=int(filled.sum()), quality=n_quality)
        assert (found.units, found.absent, found.version) == (spec.units, (), "V03")
        if product in ("NO2", "HCHO"):
            assert n_quality > 0  # the simulation marks pixels under clouds as suspicious
            lenient = read_product(path, product, max_quality=1)
            assert lenient.counts == none_rejected(fill=int(filled.sum()))


# --- rules --------------------------------------------------------------------------------------


def test_every_rule_counts_each_pixel_once(tmp_path: Path) -> None:
    values = grid(1e15, 2e15)
    flag = np.zeros((NY, NX), np.int16)
    values[0] = -999.0  # declared
    values[1, :3] = np.float32(-1e30)
    values[1, 3:] = 9.969209968386869e36
    values[2, :2] = np.nan
    values[2, 2:4] = np.inf, -np.inf
    values[3, :3] = 1.5e20, -2e17, 1.5e20
    values[3, 3:] = -9e16, 9e17  # noise and a plume: valid
    flag[0, 0] = flag[1, 0] = flag[1, 3] = flag[2, 0] = flag[2, 2] = flag[3, 2] = 2  # the first rule has them, but one
    flag[4] = 1, 2, 3, -1, 0
    path = level2(tmp_path / "a.nc", "NO2", values, quality=flag, _FillValue=np.float64(-999.0))
    found = read_product(path, "NO2")
    assert found.counts == {
        "fill": 5, "undeclared_fill": 3, "default_fill": 2, "nan": 2, "infinite": 2, "quality": 5, "out_of_range": 2,
    }  # fmt: skip
    valid = np.ones((NY, NX), bool)
    valid[:2] = valid[2, :4] = valid[3, :3] = valid[4, :4] = False
    np.testing.assert_array_equal(found.values, np.where(valid, values, np.nan).astype(np.float32))
    assert found.values.dtype == np.float32 and found.values.flags.c_contiguous
    assert found.quality == "product/main_data_quality_flag <= 0"


@pytest.mark.parametrize(("max_quality", "n_rejected"), [(0, 4), (1, 3), (2, 2)])
def test_quality_levels(tmp_path: Path, max_quality: int, n_rejected: int) -> None:
    """Levels beyond 2 and fill, whatever it is, are never accepted."""
    flag = np.zeros((NY, NX), np.int16)
    flag[0, :4] = 1, 2, 7, -32767
    attrs = {"_FillValue": np.int16(-32767)}
    for kind, fill in (("i2", -32767), ("f4", np.nan), ("f4", -1e30)):  # subsetted files may hold flags as floats
        stored = np.where(flag == -32767, fill, flag).astype(kind)
        path = level2(tmp_path / "a.nc", "HCHO", grid(), quality=stored, quality_attrs=attrs if kind == "i2" else {})
        found = read_product(path, "HCHO", max_quality=max_quality)
        assert found.counts == none_rejected(quality=n_rejected)


def test_bits_of_cloud_and_ozone(tmp_path: Path) -> None:
    """CLDO4: errors reject, warnings don't. O3TOT: every bit rejects."""
    flag = np.zeros((4, 4), np.uint16)
    flag.ravel()[:] = 1 << np.arange(16)
    cloud = read_product(level2(tmp_path / "a.nc", "CLDO4", np.full((4, 4), 0.5), quality=flag), "CLDO4")
    rejected = np.isnan(cloud.values).ravel()
    assert np.flatnonzero(rejected).tolist() == [0, 3, 6, 8, 9, 12, 13, 14]
    assert cloud.counts == none_rejected(quality=8)
    flag[0, 0] = 0
    ozone = read_product(level2(tmp_path / "b.nc", "O3TOT", np.full((4, 4), 300.0), quality=flag), "O3TOT")
    assert np.flatnonzero(~np.isnan(ozone.values)).tolist() == [0]


def test_the_files_own_words_on_bits_come_first(tmp_path: Path) -> None:
    flag = np.zeros((NY, NX), np.int16)
    flag[0] = np.array([1, 2, 4, 8, 1 << 15], np.uint16).view(np.int16)
    words = {
        "flag_masks": np.array([1, 2, 4, 1 << 15], np.uint16).view(np.int16),
        "flag_meanings": "geometry_warning retrieval_error snow late_ERROR",
    }

    def valid(**attrs: Any) -> list[bool]:
        path = level2(tmp_path / "a.nc", "CLDO4", grid(), quality=flag, quality_attrs=attrs)
        return np.isfinite(read_product(path, "CLDO4").values[0]).tolist()

    assert valid() == [False, True, True, False, True]
    assert valid(**words) == [True, False, True, False, False]
    assert read_product(tmp_path / "a.nc", "CLDO4").quality == "product/processing_quality_flag & 0xf34a == 0"
    # Words that don't belong to single bits say nothing of them.
    assert valid(**{**words, "flag_meanings": "geometry_warning"}) == valid()
    assert valid(**words, flag_values=np.arange(4, dtype=np.int16)) == valid()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("product", "inside", "outside"),
    [
        ("NO2", (-1e16, 0, 1e17, 5e17), (-1e18, 1.5e20)),
        ("HCHO", (-1e17, 0, 5e17), (-1e19, 1e19)),
        ("O3TOT", (50, 70, 300, 700), (0, 49, -1, 701)),
        ("CLDO4", (0, 0.5, 1), (-0.001, 1.001)),
    ],
)
def test_physical_range(
    tmp_path: Path, product: str, inside: tuple[float, ...], outside: tuple[float, ...], packed: bool
) -> None:
    values = np.array([[*inside, *outside]])
    attrs = {"scale_factor": 0.5, "_FillValue": -2e9} if packed else {}
    found = read_product(level2(tmp_path / "a.nc", product, values * 2 if packed else values, **attrs), product)
    expected = np.array([[*inside, *[np.nan] * len(outside)]], np.float32)
    np.testing.assert_array_equal(found.values, expected)
    assert found.counts == none_rejected(out_of_range=len(outside))
    assert (found.quality, found.absent) == (None, (PRODUCTS[product].quality,))


def test_fields(tmp_path: Path) -> None:
    """A column's limits mean nothing for a temperature; another column has them. Groups are searched in order."""
    t = grid(1, 2)
    more = {"product/t": t, "support_data/t": grid(3, 4), "geolocation/t": grid(5, 6), "own/u": grid(7, 8)}
    path = level2(tmp_path / "a.nc", "NO2", grid(1e15, 2e15), more=more)
    with refused(ConfigError, "product/t", "'K'", key="l2.NO2.valid_range"):
        read_product(path, "NO2", field="t")
    found = read_product(path, "NO2", field="t", valid_range=[1, 1.5])
    np.testing.assert_array_equal(found.values, np.where(t <= 1.5, t, np.nan).astype("f4"))
    assert (found.field, found.valid_range) == ("product/t", (1, 1.5))
    for field, first in (("geolocation/t", 5), ("/geolocation/t", 5), ("own/u", 7)):
        assert read_product(path, "NO2", field=field, valid_range=[0, 9]).values[0, 0] == first
    refuse(path, None, "'u'", "geolocation/t", field="u", valid_range=[0, 9])
    assert PRODUCTS["NO2"].holds_for("product/vertical_column_stratosphere", "molecules/cm^2")
    assert PRODUCTS["NO2"].holds_for("product/vertical_column_troposphere", None)
    assert not PRODUCTS["NO2"].holds_for("product/vertical_column_stratosphere", "mol/m^2")


# --- layout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [YX, YX[::-1]])
def test_region(tmp_path: Path, order: Sequence[str]) -> None:
    values = grid(1e15, 2e15)
    values[0, 0] = values[3, 2] = np.nan
    flag = np.zeros((NY, NX), np.int16)
    flag[2, 4] = flag[5, 4] = 2
    path = level2(tmp_path / "a.nc", "NO2", values, quality=flag, order=order)
    valid = np.where(flag == 0, values, np.nan).astype(np.float32)
    np.testing.assert_array_equal(read_product(path, "NO2", expected_shape=(NY, NX)).values, valid)
    found = read_product(path, "NO2", region=[1, 5, 2, 5], expected_shape=(NY, NX))
    np.testing.assert_array_equal(found.values, valid[1:5, 2:5])
    assert found.counts == none_rejected(nan=1, quality=1)
    refuse(path, "region", error=ConfigError, region=[0, NY + 1, 0, NX])
    refuse(path, FIELD, "6 x 5", "5 x 6", expected_shape=(NX, NY))
    overwrite_chunk(path, FIELD, 0, 0)  # of the first row or column
    np.testing.assert_array_equal(read_product(path, "NO2", region=[1, 5, 2, 5]).values, valid[1:5, 2:5])
    refuse(path, None)


# --- pairing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        f"TEMPO_NO2_L2_V03_{STAMP}.nc",
        f"TEMPO_NO2_L2_V04_{STAMP}.nc",
        f"TEMPO_NO2_L2_V03_{STAMP}-034.nc",
        f"TEMPO_NO2_L2_V03_{STAMP}_subsetted.nc4",
    ],
)
def test_paired_by_time_and_scan(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one listing of the folder, which may be long."""
    others = (
        f"TEMPO_HCHO_L2_V03_{STAMP}.nc",
        f"TEMPO_RAD_L1_V03_{STAMP}.nc",
        "TEMPO_NO2_L2_V03_20240601T210934Z_S012G02.nc",
        "TEMPO_NO2_L2_V03_20240601T210935Z_S012G01.nc",
        "TEMPO_NO2_L2_V03_20240601T210934Z_S012G011.nc",
        f"TEMPO_NO2_L2_V03_{STAMP}.nc.part",
        f".TEMPO_NO2_L2_V03_{STAMP}.nc",
    )
    for other in (name, *others):
        (tmp_path / other).touch()
    listings = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listings.append(path) or listdir(path))
    folder = ProductFolder(tmp_path, "NO2")
    for scene in (L1, Path("/x") / L1, Path(f"TEMPO_RADT_L1_V04_{STAMP}.nc"), Path(f"TEMPO_RAD_L1_V03_{STAMP}-034.nc")):
        assert folder.find(scene) == tmp_path / name
    assert listings == [tmp_path]


def test_unpairable(tmp_path: Path) -> None:
    names = [f"TEMPO_NO2_L2_V03_{STAMP}.nc", f"TEMPO_NO2_L2_V04_{STAMP}.nc"]
    for words in ([f"TEMPO_NO2_L2_V*_{STAMP}*.nc", L1.name], names):
        with refused(InputError, *words, key="l2.NO2", path=tmp_path):
            ProductFolder(tmp_path, "NO2").find(L1)
        for name in names:
            (tmp_path / name).touch()
    with refused(ConfigError, "YYYYMMDDTHHMMSSZ_SsssGgg", key="l2.NO2", path="scene.nc"):
        ProductFolder(tmp_path, "NO2").find(Path("scene.nc"))
    with refused(InputError, key="l2.NO2.folder", path=tmp_path / "none"):
        ProductFolder(tmp_path / "none", "NO2")
    with refused(ConfigError, "O3TOT", "CLDO4", key="l2", value="SO2"):
        ProductFolder(tmp_path, "SO2")


# --- refusals -----------------------------------------------------------------------------------


def test_product_is_told_by_attributes_or_name(tmp_path: Path) -> None:
    named = tmp_path / f"TEMPO_NO2_L2_V03_{STAMP}.nc"
    refuse(level2(named, "HCHO", grid()), "l2.NO2", "HCHO")
    assert read_product(level2(named, "NO2", grid(), product_type=None), "NO2").product == "NO2"
    refuse(named, "l2.HCHO", "NO2", product="HCHO")
    collected = level2(tmp_path / "a.nc", "NO2", grid(), product_type=None)
    refuse(collected, "l2.NO2")
    with h5py.File(collected, "r+") as file:
        file.attrs["collection_shortname"] = "TEMPO_NO2_L2"
    assert read_product(collected, "NO2").product == "NO2"


def test_variables_that_do_not_fit(tmp_path: Path) -> None:
    more = {"geolocation/bounds": np.zeros((NY, NX, 4)), "support_data/amf": grid()}
    path = level2(tmp_path / "a.nc", "NO2", grid(), more=more)
    refuse(path, "geolocation/bounds", "(mirror_step, xtrack, corner)", field="bounds")
    refuse(path, None, "'product/none'", FIELD, "support_data/amf", field="product/none")
    refuse(path, FIELD, "6 x 5", "6 x 7", expected_shape=(NY, NX + 2))
    with h5py.File(path, "r+") as file:
        attach(file.create_dataset("product/text", data=np.full((NY, NX), b"a", "S1")))
        attach(file.create_dataset("product/main_data_quality_flag", data=np.zeros((NY, NX - 1), np.int16)))
    refuse(path, "product/text", "S1", field="text")
    refuse(path, "product/main_data_quality_flag", "6 x 4", "6 x 5")
    refuse(level2(tmp_path / "b.nc", "NO2", grid(), scale_factor="a"), FIELD, "scale_factor", "'a'")


@pytest.mark.parametrize(
    ("product", "argument", "value", "word"),
    [
        ("NO2", "max_quality", 3, "2 (bad"),
        ("CLDO4", "max_quality", 1, "bits"),
        ("CLDO4", "valid_range", [-0.5, 1], "logit"),
        ("CLDO4", "valid_range", [0, 1, 2], "<"),
        ("CLDO4", "valid_range", [0, float("nan")], "<"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path: Path, product: str, argument: str, value: Any, word: str) -> None:
    path = level2(tmp_path / "a.nc", "CLDO4", grid())
    with refused(ConfigError, word, key=f"l2.{product}.{argument}", value=value):
        read_product(path, product, **{argument: value})


def test_variables_are_checked_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The structure is first read in the sandboxed child process."""
    refuse(tmp_path / "none.nc", None)
    refuse(tmp_path, None, "folder")
    values = np.full((32, 32), 1e15)
    path = level2(tmp_path / "a.nc", "NO2", values)
    with h5py.File(path, "r+") as file:
        del file[FIELD]
        attach(file.create_dataset(FIELD, values.shape, "f8", chunks=(8, 32)))[:24] = values[:24]
    refuse(path, FIELD, "3 of 4")  # HDF5 would give zeros, which are valid columns
    with h5py.File(path, "r+") as file:
        del file[FIELD]
        attach(file.create_dataset(FIELD, data=values, chunks=(1, 1), compression="gzip"))
    path.write_bytes(own_brothers(path.read_bytes()))
    monkeypatch.setattr(guard, "SECONDS", 1)
    refuse(path, None, "1 s")
