"""Level-2 products: paired by name, read by rule, against truth made in numpy and the real file read by xarray."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5netcdf
import h5py
import numpy as np
import pytest
import xarray as xr

from spectralvae.errors import ConfigError, InputError
from spectralvae.readers import products
from spectralvae.readers.pairing import ProductFolder
from spectralvae.readers.products import (
    PRODUCT_RULES,
    PRODUCTS,
    read_product,
)
from spectralvae.simulate import simulate_granules

NY, NX = 6, 5
STAMP = "20240601T210934Z_S012G01"
L1 = Path(f"TEMPO_RAD_L1_V03_{STAMP}.nc")
REAL = "TEMPO_NO2_L2_V03_20240601T210934Z_S012G01_subsetted.nc4"
YX = ("mirror_step", "xtrack")
QUALITY = {name: spec.quality.split("/")[1] for name, spec in PRODUCTS.items()}
UNITS = {"NO2": "molecules/cm^2", "HCHO": "molecules/cm^2", "O3TOT": "DU", "CLDO4": "1"}
FIELDS = {
    "NO2": "vertical_column_troposphere",
    "HCHO": "vertical_column",
    "O3TOT": "column_amount_o3",
    "CLDO4": "cloud_fraction",
}


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
    units: str | None = "",
    **attrs: Any,
) -> Path:
    """Write (y, x) values of a product's own field, and more fields by path; "" stands for what the product has."""
    with h5netcdf.File(path, "w") as file:
        file.dimensions = {"mirror_step": values.shape[0], "xtrack": values.shape[1], "corner": 4}
        if product_type is not None:
            file.attrs["product_type"] = product_type or product

        def put(place: str, array: np.ndarray, **attributes: Any) -> None:
            dims = (*order, "corner")[: array.ndim]
            array = array if tuple(order) == YX else array.T
            variable = file.create_variable(f"/{place}", dims, array.dtype)
            variable[...] = array
            for key, value in attributes.items():
                variable.attrs[key] = value

        unit = {} if units is None else {"units": units or UNITS[product]}
        put(f"product/{FIELDS[product]}", values, **unit, **attrs)
        if quality is not None:
            put(f"product/{QUALITY[product]}", quality, **(quality_attrs or {}))
        for place, array in (more or {}).items():
            put(place, array, units="K")
    return path


def none_rejected(**but: int) -> dict[str, int]:
    return {**dict.fromkeys(PRODUCT_RULES, 0), **but}


# --- the real file ------------------------------------------------------------------------------


def test_real_file(real_data: Path) -> None:
    """Counts and extremes as xarray, which knows nothing of us, finds them."""
    path = real_data / REAL
    with xr.open_dataset(path, group="product", engine="h5netcdf") as truth:
        expected = truth["vertical_column_stratosphere"].transpose(*YX).values
    found = read_product(path, "NO2", field="vertical_column_stratosphere", expected_shape=(132, 2048))
    assert expected.dtype == np.float64 and found.values.dtype == np.float32
    np.testing.assert_array_equal(found.values, expected.astype(np.float32))

    n_nan = int(np.isnan(expected).sum())
    assert found.counts == none_rejected(nan=n_nan)
    assert int(np.isnan(found.values).sum()) == n_nan == 6128
    assert int(np.isfinite(found.values).sum()) == 132 * 2048 - 6128
    np.testing.assert_allclose(np.nanmin(found.values), np.nanmin(expected), rtol=1e-7)
    np.testing.assert_allclose(np.nanmax(found.values), np.nanmax(expected), rtol=1e-7)
    assert (found.field, found.units) == ("product/vertical_column_stratosphere", "molecules/cm^2")
    assert (found.version, found.quality) == ("V03", None)
    assert found.absent == ("product/main_data_quality_flag",)


def test_real_file_is_found_and_lacks_the_troposphere(real_data: Path) -> None:
    path = ProductFolder(real_data, "NO2").find(L1)
    assert path == real_data / REAL
    with pytest.raises(InputError, match=r"no field 'vertical_column_troposphere'.*vertical_column_stratosphere"):
        read_product(path, "NO2")
    with pytest.raises(InputError, match=r"132 x 2048.*131 x 2048"):
        read_product(path, "NO2", field="vertical_column_stratosphere", expected_shape=(131, 2048))


# --- simulated files ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two granules, each followed by its four products."""
    return simulate_granules(
        tmp_path_factory.mktemp("simulated"),
        seed=3,
        n_granules=2,
        shape=(9, 40),
        n_channels=16,
        products=list(PRODUCTS),
        invalid_fraction=0.1,
    )


@pytest.mark.parametrize("product", PRODUCTS)
def test_simulated(simulated: list[Path], product: str) -> None:
    for scene in simulated[::5]:
        path = ProductFolder(scene.parent, product).find(scene)
        with h5py.File(path) as file:
            stored = file["product"][FIELDS[product]][...]
            flag = file["product"][QUALITY[product]][...]
        found = read_product(path, product, expected_shape=(9, 40))
        filled = np.isclose(stored, -1e30)
        assert filled.any()
        valid = ~filled & (flag == 0)
        np.testing.assert_array_equal(found.values, np.where(valid, stored, np.nan).astype(np.float32))
        n_quality = int((~filled & (flag != 0)).sum())
        assert found.counts == none_rejected(fill=int(filled.sum()), quality=n_quality)
        assert (found.units, found.absent, found.version) == (UNITS[product], (), "V03")
        if product in ("NO2", "HCHO"):
            assert n_quality > 0, "the simulation marks pixels under clouds as suspicious"
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


def test_absent_quality_is_reported(tmp_path: Path) -> None:
    found = read_product(level2(tmp_path / "a.nc", "O3TOT", grid(200, 400)), "O3TOT")
    assert found.absent == ("product/quality_flag",)
    assert found.quality is None
    assert found.counts == none_rejected()


@pytest.mark.parametrize(
    ("product", "inside", "outside"),
    [
        ("NO2", (-1e16, 0, 1e17, 5e17), (-1e18, 1.5e20)),
        ("HCHO", (-1e17, 0, 5e17), (-1e19, 1e19)),
        ("O3TOT", (50, 70, 300, 700), (0, 49, -1, 701)),
        ("CLDO4", (0, 0.5, 1), (-0.001, 1.001)),
    ],
)
def test_physical_range(tmp_path: Path, product: str, inside: tuple[float, ...], outside: tuple[float, ...]) -> None:
    values = np.array([[*inside, *outside]])
    found = read_product(level2(tmp_path / "a.nc", product, values), product)
    expected = np.array([[*inside, *[np.nan] * len(outside)]], np.float32)
    np.testing.assert_array_equal(found.values, expected)
    assert found.counts == none_rejected(out_of_range=len(outside))


def test_range_of_the_users(tmp_path: Path) -> None:
    path = level2(tmp_path / "a.nc", "O3TOT", np.array([[100.0, 200, 300, 400]]))
    found = read_product(path, "O3TOT", valid_range=[200, 300])
    np.testing.assert_array_equal(found.values, [[np.nan, 200, 300, np.nan]])
    assert found.valid_range == (200, 300)


def test_field_in_other_units_needs_its_range(tmp_path: Path) -> None:
    """A column's limits mean nothing for a temperature; another column has them."""
    temperature = grid(200, 300, "f4")
    path = level2(tmp_path / "a.nc", "NO2", grid(1e15, 2e15), more={"support_data/temperature": temperature})
    with pytest.raises(ConfigError, match=r"l2\.NO2\.valid_range: .*support_data/temperature.*'K'"):
        read_product(path, "NO2", field="temperature")
    found = read_product(path, "NO2", field="temperature", valid_range=[200, 290])
    np.testing.assert_array_equal(found.values, np.where(temperature <= 290, temperature, np.nan))
    for field in ("support_data/temperature", "/support_data/temperature"):
        assert read_product(path, "NO2", field=field, valid_range=[0, 1e3]).field == "support_data/temperature"
    assert PRODUCTS["NO2"].holds_for("product/vertical_column_stratosphere", "molecules/cm^2")
    assert PRODUCTS["NO2"].holds_for("product/vertical_column_troposphere", None)
    assert not PRODUCTS["NO2"].holds_for("product/vertical_column_stratosphere", "mol/m^2")


def test_groups_are_searched_in_order(tmp_path: Path) -> None:
    more = {"product/t": grid(1, 2), "support_data/t": grid(3, 4), "geolocation/t": grid(5, 6), "own/u": grid(7, 8)}
    path = level2(tmp_path / "a.nc", "NO2", grid(), more=more)
    anything = [-1e9, 1e9]
    assert read_product(path, "NO2", field="t", valid_range=anything).field == "product/t"
    assert read_product(path, "NO2", field="geolocation/t", valid_range=anything).values[0, 0] == 5
    assert read_product(path, "NO2", field="own/u", valid_range=anything).values[0, 0] == 7
    with pytest.raises(InputError, match="no field 'u'"):
        read_product(path, "NO2", field="u", valid_range=anything)


# --- layout -------------------------------------------------------------------------------------


def test_dimensions_in_either_order(tmp_path: Path) -> None:
    values = grid(1e15, 2e15)
    flag = (np.arange(NY * NX) % 3).reshape(NY, NX).astype(np.int16)
    one = read_product(level2(tmp_path / "a.nc", "NO2", values, quality=flag), "NO2")
    path = level2(tmp_path / "b.nc", "NO2", values, quality=flag, order=YX[::-1])
    other = read_product(path, "NO2", expected_shape=(NY, NX))
    np.testing.assert_array_equal(one.values, np.where(flag == 0, values, np.nan).astype(np.float32))
    np.testing.assert_array_equal(other.values, one.values)
    assert other.counts == one.counts
    with pytest.raises(InputError, match=r"6 x 5.*5 x 6"):
        read_product(path, "NO2", expected_shape=(NX, NY))


@pytest.mark.parametrize("order", [YX, YX[::-1]])
def test_region(tmp_path: Path, order: Sequence[str]) -> None:
    values = grid(1e15, 2e15)
    values[0, 0] = values[3, 2] = np.nan
    flag = np.zeros((NY, NX), np.int16)
    flag[2, 4] = flag[5, 4] = 2
    path = level2(tmp_path / "a.nc", "NO2", values, quality=flag, order=order)
    found = read_product(path, "NO2", region=[1, 5, 2, 5], expected_shape=(NY, NX))
    np.testing.assert_array_equal(found.values, np.where(flag == 0, values, np.nan)[1:5, 2:5].astype(np.float32))
    assert found.counts == none_rejected(nan=1, quality=1)
    with pytest.raises(ConfigError, match="region"):
        read_product(path, "NO2", region=[0, NY + 1, 0, NX])


def test_packed_integers(tmp_path: Path) -> None:
    stored = np.array([[0, 50, 100, -1, 120]], np.int16)
    path = level2(tmp_path / "a.nc", "CLDO4", stored, scale_factor=0.01, _FillValue=np.int16(-1))
    found = read_product(path, "CLDO4")
    np.testing.assert_allclose(found.values, [[0, 0.5, 1, np.nan, np.nan]], rtol=1e-7)
    assert found.counts == none_rejected(fill=1, out_of_range=1)


def test_only_the_region_is_read(tmp_path: Path) -> None:
    """A chunk whose bytes are spoilt matters only to the regions that it is part of."""
    path = level2(tmp_path / "a.nc", "NO2", np.ones((4, 5)))
    with h5py.File(path, "r+") as file:
        del file["product/vertical_column_troposphere"]
        noise = np.random.default_rng(0).random((4, 5)) * 1e15
        variable = file["product"].create_dataset(
            "vertical_column_troposphere", data=noise, chunks=(1, 5), compression="gzip", fletcher32=True
        )
        variable.attrs["units"] = "molecules/cm^2"
        for axis, name in enumerate(YX):
            variable.dims[axis].attach_scale(file[name])
        offset = variable.id.get_chunk_info(3).byte_offset
    content = bytearray(path.read_bytes())
    content[offset + 4] ^= 0xFF
    path.write_bytes(content)
    np.testing.assert_array_equal(read_product(path, "NO2", region=[0, 3, 0, 5]).values, noise[:3].astype(np.float32))
    with pytest.raises(InputError, match=r"a\.nc: damaged"):
        read_product(path, "NO2")


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
@pytest.mark.parametrize(
    "scene", [L1, Path("/x") / L1, Path(f"TEMPO_RADT_L1_V04_{STAMP}.nc"), Path(f"TEMPO_RAD_L1_V03_{STAMP}-034.nc")]
)
def test_paired_by_time_and_scan(tmp_path: Path, name: str, scene: Path) -> None:
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
    assert ProductFolder(tmp_path, "NO2").find(scene) == tmp_path / name


def test_nothing_to_pair_with(tmp_path: Path) -> None:
    (tmp_path / f"TEMPO_HCHO_L2_V03_{STAMP}.nc").touch()
    with pytest.raises(InputError) as caught:
        ProductFolder(tmp_path, "NO2").find(L1)
    for part in (str(tmp_path), "NO2", f"TEMPO_NO2_L2_V*_{STAMP}*.nc", L1.name):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_to_pair_with(tmp_path: Path) -> None:
    names = [f"TEMPO_NO2_L2_V03_{STAMP}.nc", f"TEMPO_NO2_L2_V04_{STAMP}.nc"]
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=rf"2 files of NO2.*{names[0]}, {names[1]}"):
        ProductFolder(tmp_path, "NO2").find(L1)


def test_unpairable(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scene\.nc: no time and scan .*YYYYMMDDTHHMMSSZ_SsssGgg"):
        ProductFolder(tmp_path, "NO2").find(Path("scene.nc"))
    with pytest.raises(InputError, match=r"no such folder; correct l2\.NO2\.folder"):
        ProductFolder(tmp_path / "none", "NO2").find(L1)
    with pytest.raises(ConfigError, match="no product 'SO2'; choose among NO2, HCHO, O3TOT, CLDO4"):
        ProductFolder(tmp_path, "SO2").find(L1)


def test_a_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for scan in range(1, 9):
        (tmp_path / f"TEMPO_NO2_L2_V03_20240601T210934Z_S{scan:03d}G01.nc").touch()
    listings = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listings.append(path) or listdir(path))
    folder = ProductFolder(tmp_path, "NO2")
    for scan in range(1, 9):
        stamp = f"20240601T210934Z_S{scan:03d}G01"
        assert stamp in folder.find(Path(f"TEMPO_RAD_L1_V03_{stamp}.nc")).name
    assert listings == [tmp_path]


# --- refusals -----------------------------------------------------------------------------------


def test_another_product(tmp_path: Path) -> None:
    path = level2(tmp_path / f"TEMPO_NO2_L2_V03_{STAMP}.nc", "HCHO", grid())
    with pytest.raises(InputError, match=r"a file of HCHO, where l2\.NO2 needs TEMPO NO2"):
        read_product(path, "NO2")


def test_product_is_told_by_attributes_or_name(tmp_path: Path) -> None:
    named = level2(tmp_path / f"TEMPO_NO2_L2_V03_{STAMP}.nc", "NO2", grid(), product_type=None)
    assert read_product(named, "NO2").product == "NO2"
    with pytest.raises(InputError, match="a file of NO2"):
        read_product(named, "HCHO")
    collected = level2(tmp_path / "a.nc", "NO2", grid(), product_type=None)
    with pytest.raises(InputError, match="does not say of what product"):
        read_product(collected, "NO2")
    with h5py.File(collected, "r+") as file:
        file.attrs["collection_shortname"] = "TEMPO_NO2_L2"
    assert read_product(collected, "NO2").product == "NO2"


def test_shape_unlike_the_granules(tmp_path: Path) -> None:
    path = level2(tmp_path / "a.nc", "NO2", grid())
    with pytest.raises(InputError, match=r"a\.nc: product/vertical_column_troposphere has 6 x 5 .* has 6 x 7"):
        read_product(path, "NO2", expected_shape=(NY, NX + 2))


def test_no_such_field(tmp_path: Path) -> None:
    path = level2(tmp_path / "a.nc", "NO2", grid(), quality=grid(0, 0, "i2"), more={"support_data/amf": grid()})
    with pytest.raises(InputError) as caught:
        read_product(path, "NO2", field="product/none")
    for part in ("a.nc", "'product/none'", "product/vertical_column_troposphere", "support_data/amf"):
        assert part in str(caught.value)


def test_variables_that_are_no_maps(tmp_path: Path) -> None:
    bounds, text = np.zeros((NY, NX, 4)), np.full((NY, NX), b"a", "S1")
    more = {"geolocation/bounds": bounds, "product/text": text}
    path = level2(tmp_path / "a.nc", "NO2", grid(), more=more)
    with pytest.raises(InputError, match=r"bounds has dimensions \(mirror_step, xtrack, corner\)"):
        read_product(path, "NO2", field="bounds")
    with pytest.raises(InputError, match=r"product/text holds .* not numbers"):
        read_product(path, "NO2", field="text")
    with pytest.raises(InputError, match=r"scale_factor = 'a'"):
        read_product(level2(tmp_path / "b.nc", "NO2", grid(), scale_factor="a"), "NO2")


def test_quality_of_another_shape(tmp_path: Path) -> None:
    path = level2(tmp_path / "a.nc", "NO2", grid())
    with h5py.File(path, "r+") as file:
        flag = file["product"].create_dataset("main_data_quality_flag", data=np.zeros((NY, NX - 1), np.int16))
        for axis, name in enumerate(YX):
            flag.dims[axis].attach_scale(file[name])
    with pytest.raises(InputError, match=r"main_data_quality_flag has 6 x 4 .* has 6 x 5"):
        read_product(path, "NO2")


@pytest.mark.parametrize(
    ("product", "arguments", "message"),
    [
        ("SO2", {}, "no product 'SO2'"),
        ("NO2", {"max_quality": 3}, r"l2\.NO2\.max_quality is 3; give 0"),
        ("NO2", {"max_quality": -1}, r"l2\.NO2\.max_quality is -1"),
        ("CLDO4", {"max_quality": 1}, r"l2\.CLDO4\.max_quality is 1, but .* bits"),
        ("CLDO4", {"valid_range": [-0.5, 1]}, r"valid_range is \[-0\.5, 1\.0\].*logit"),
        ("CLDO4", {"valid_range": [0, 1, 2]}, r"l2\.CLDO4\.valid_range is \[0, 1, 2\]"),
        ("CLDO4", {"valid_range": [1, 0]}, "lowest < highest"),
        ("CLDO4", {"valid_range": [0, float("nan")]}, "lowest < highest"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path: Path, product: str, arguments: dict[str, Any], message: str) -> None:
    path = level2(tmp_path / "a.nc", "CLDO4", grid())
    with pytest.raises(ConfigError, match=message):
        read_product(path, product, **arguments)


def test_no_file_and_damage(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_product(tmp_path / "none.nc", "NO2")
    path = level2(tmp_path / "a.nc", "NO2", grid())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"a\.nc: damaged or truncated"):
        read_product(path, "NO2")
    path.write_bytes(b"")
    with pytest.raises(InputError, match="empty"):
        read_product(path, "NO2")
    with pytest.raises(InputError, match="a folder, not a file"):
        read_product(tmp_path, "NO2")


def test_variables_are_checked_before_they_are_read(tmp_path: Path) -> None:
    """A chunk index that lacks a chunk: HDF5 would give zeros, which are valid columns."""
    path = level2(tmp_path / "a.nc", "NO2", grid())
    with h5py.File(path, "r+") as file:
        del file["product/vertical_column_troposphere"]
        variable = file.create_dataset("product/vertical_column_troposphere", (NY, NX), "f8", chunks=(1, NX))
        variable[:4] = 1e15
        for axis, name in enumerate(YX):
            variable.dims[axis].attach_scale(file[name])
    with pytest.raises(InputError, match=r"a\.nc: product/vertical_column_troposphere: 4 of 6 chunks"):
        read_product(path, "NO2")


def test_rules_follow_the_readers() -> None:
    assert PRODUCT_RULES == (
        "fill", "undeclared_fill", "default_fill", "nan", "infinite", "quality", "out_of_range",
    )  # fmt: skip
    assert {name: spec.field for name, spec in products.PRODUCTS.items()} == FIELDS


@pytest.mark.parametrize("kind", ["external link", "external storage", "virtual"])
def test_nothing_leads_into_another_file(tmp_path: Path, kind: str) -> None:
    """A product may not show what other local files hold."""
    other = level2(tmp_path / "other.nc", "NO2", np.full((NY, NX), 1e15))
    raw = tmp_path / "raw.bin"
    raw.write_bytes(np.full((NY, NX), 1e15).tobytes())
    path = level2(tmp_path / "a.nc", "NO2", grid())
    place = "product/vertical_column_troposphere"
    with h5py.File(path, "r+") as file:
        del file[place]
        if kind == "external link":
            file[place] = h5py.ExternalLink(str(other), place)
        else:
            if kind == "virtual":
                layout = h5py.VirtualLayout((NY, NX), "f8")
                layout[:] = h5py.VirtualSource(str(other), place, (NY, NX))
                variable = file.create_virtual_dataset(place, layout)
            else:
                variable = file.create_dataset(place, (NY, NX), "f8", external=[(str(raw), 0, h5py.h5f.UNLIMITED)])
            for axis, name in enumerate(YX):
                variable.dims[axis].attach_scale(file[name])
    with pytest.raises(InputError, match=rf"a\.nc: {place} .* another file"):
        read_product(path, "NO2")
