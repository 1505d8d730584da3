"""Files laid out like their sources: compared variable by variable as h5py and xarray read them."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5netcdf
import h5py
import numpy as np
import pytest
import scipy.io
import xarray as xr
import yaml
import zarr
from test_formats import KINDS, scene_variables, write, write_envi

from spectralvae import open_scene
from spectralvae.cli import run
from spectralvae.codec.layouts import pack_layout, unpack_layout
from spectralvae.errors import ConfigError, InputError
from spectralvae.files import layout as layouts
from spectralvae.files import source as sources
from spectralvae.files.layout import Layout, layout_of, new_scene, read_layout, write_layout
from spectralvae.files.source import Stored
from spectralvae.files.writers import new_file
from spectralvae.readers import open_reader
from spectralvae.readers.containers import open_container

BOOKKEEPING = {
    *("DIMENSION_LIST", "REFERENCE_LIST", "CLASS", "NAME", "_Netcdf4Dimid", "_Netcdf4Coordinates", "_NCProperties"),
}
BAND, OTHER = "band_290_490_nm", "band_540_740_nm"
Content = dict[str, Any]


def content(path: Path) -> Content:
    """All that h5py sees of a netCDF-4 file: of each group its attributes, of each dataset everything."""
    found: Content = {}

    def visit(name: str, item: Any) -> None:
        attributes = {
            key: None if isinstance(value, h5py.Empty) else (type(value), np.asarray(value).tolist())
            for key, value in item.attrs.items()
            if key not in BOOKKEEPING
        }
        if isinstance(item, h5py.Group):
            found[name] = attributes
        elif not bytes(item.attrs.get("NAME", b"")).startswith(b"This is a netCDF dimension but not"):
            dims = ["itself"] if item.is_scale else [axis[0].name for axis in item.dims]
            values = np.asarray(item[()])
            raw = values.tolist() if values.dtype.kind == "O" else values.tobytes()
            found[name] = (dims, item.shape, item.dtype.str, attributes, raw)

    with h5py.File(path) as file:
        visit("/", file)
        file.visititems(visit)
    return found


def cropped(path: Path, target: Path, parts: Mapping[str, slice]) -> Path:
    """A copy of a netCDF-4 file whose dimensions of some names are cut, by h5netcdf."""

    def copy(old: Any, new: Any) -> None:
        new.attrs.update(old.attrs)
        for name, dim in old.dimensions.items():
            new.dimensions[name] = len(range(dim.size)[parts.get(name, slice(None))])
        for name, variable in old.variables.items():
            key = tuple(parts.get(dim, slice(None)) for dim in variable.dimensions)
            attributes = dict(variable.attrs)
            fill = attributes.pop("_FillValue", None)
            made = new.create_variable(
                name, variable.dimensions, variable.dtype, data=variable[key], fillvalue=fill, chunks=None
            )
            made.attrs.update(attributes)
        for name, group in old.groups.items():
            copy(group, new.create_group(name))

    with h5netcdf.File(path) as old, h5netcdf.File(target, "w") as new:
        copy(old, new)
    return target


def remade(
    scene: Any, folder: Path, carry_over: Sequence[str] = (), kind: Any = "netcdf", attributes: Mapping[str, Any] = {}
) -> Path:
    """Write the scene's layout to a file of latents and read it back; write its own radiance in that layout."""
    latents = folder / ("latents.nc" if kind == "netcdf" else "latents.zarr")
    with new_file(latents, kind) as writer:
        for name, size in {"y": 2, "x": 3, "channel": 4}.items():
            writer.dimension(name, size)
        writer.create("y", ("y",), "f8", {}, values=[0.5, 1.5])
        writer.create("latitude", ("y", "x"), "f4", {}, values=np.zeros((2, 3)))
        write_layout(writer, layout_of(scene))
    with xr.open_datatree(latents, engine="h5netcdf" if kind == "netcdf" else "zarr") as tree:
        tree.load()
    with closing(open_container(latents)) as container:
        layout = read_layout(container)
    assert_same(layout, layout_of(scene))
    assert_same(unpack_layout(pack_layout(layout)), layout)
    path = folder / "decoded.nc"
    with new_scene(path, layout, attributes, scene, carry_over) as put, scene:
        middle = scene.shape[1] // 2
        for columns in (slice(0, middle), slice(middle, scene.shape[1])):
            for row in range(0, scene.shape[0], 2):
                rows = slice(row, min(row + 2, scene.shape[0]))
                put(rows, columns, scene.read(rows, columns)[0])
    for dataset in xr.open_groups(path, engine="h5netcdf").values():
        dataset.load().close()
    return path


def assert_same(one: Layout, other: Layout) -> None:
    def plain(value: Any) -> Any:
        if isinstance(value, Stored | Layout):
            return {key: plain(item) for key, item in vars(value).items()}
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        if isinstance(value, h5py.Empty):
            return "empty", value.dtype
        if isinstance(value, float):  # numpy's float64 is one
            return float(value).hex()
        if isinstance(value, np.ndarray | np.generic) and not isinstance(value, np.bytes_):
            return value.dtype, value.shape, repr(value.tolist())
        return repr(value)

    assert plain(one) == plain(other)


def as_before(path: Path, decoded: Path, **arguments: Any) -> None:
    """The two files open as the same scene."""
    with open_scene(path, **arguments) as before, open_scene(decoded, band=arguments.get("band")) as after:
        xr.testing.assert_identical(after.drop_attrs(deep=False), before.drop_attrs(deep=False))
        assert (after.attrs["format"], after.attrs.get("band")) == (before.attrs["format"], before.attrs.get("band"))


# --- TEMPO ----------------------------------------------------------------------------------------


def write_rich(path: Path, fill: float | None = -1e30) -> Path:
    """A granule with two bands and all that may stand beside them."""
    rng = np.random.default_rng(0)
    with h5netcdf.File(path, "w") as file:
        file.dimensions = {"mirror_step": 5, "xtrack": 6, "n": 2, "named": 3, "none": 0}
        file.attrs.update(
            title="a granule", history="made", empty="", bytes=np.bytes_(b"abc"), no_bytes=h5py.Empty("S1"),
            number=np.int16(3), vector=np.array([1, 2], np.uint8), texts=["a", "ü"], nothing=np.array([], np.float32),
        )  # fmt: skip
        file.create_variable("time", ("mirror_step",), data=np.arange(5.0), fillvalue=-1e30).attrs["units"] = (
            "seconds since 1980-01-06T00:00:00Z"
        )
        file.create_variable("xtrack", ("xtrack",), data=np.arange(6, dtype=np.int32)).attrs["a"] = "b"
        file.create_variable("mirror_step", ("mirror_step",), data=np.arange(5, dtype=np.int32))
        file.create_variable("earth_sun_distance", (), data=np.float32(1.01))
        file.create_variable("crs", (), np.int32).attrs["grid_mapping_name"] = "none"  # never written
        file.create_variable("names", ("n",), h5py.string_dtype(), data=np.array(["one", "ü"], dtype=object))
        file.create_variable("name", (), h5py.string_dtype(), data=np.array("scalar", dtype=object))
        file.create_variable("letters", ("n", "named"), "S1", data=np.array([list("abc"), list("xyz")], "S1"))
        file.create_variable("named", ("xtrack",), data=np.arange(6.0))  # named as a dimension, and not along it
        file.create_variable("of_none", ("none", "xtrack"), np.float32)
        for name, nc in ((BAND, 8), (OTHER, 6)):
            band = file.create_group(name)
            band.attrs["note"] = name
            band.dimensions["spectral_channel"] = nc
            values = rng.normal(1e12, 1e11, (5, 6, nc)).astype(np.float32)
            values[1, 2] = values[3, :, 4] = np.float32(-1e30)
            dims = ("mirror_step", "xtrack", "spectral_channel")
            fillvalue = None if fill is None else np.float32(fill)
            radiance = band.create_variable(
                "radiance", dims, np.float32, fillvalue=fillvalue, chunks=(1, 4, nc), compression="gzip"
            )
            radiance[...] = values
            radiance.attrs.update(
                units="photons/s/cm^2/nm/sr", coordinates="longitude latitude", valid_min=[np.float32(0)]
            )
            wavelength = np.broadcast_to(300 + np.arange(nc, dtype=np.float32), (6, nc))
            band.create_variable("nominal_wavelength", dims[1:], data=wavelength).attrs["units"] = "nm"
            band.create_variable("latitude", dims[:2], data=rng.random((5, 6), np.float32), fillvalue=np.float32(-1e30))
            packed = band.create_variable(
                "solar_zenith_angle", dims[:2], data=np.arange(30, dtype=np.int16).reshape(5, 6)
            )
            packed.attrs.update(scale_factor=0.1, add_offset=30.0)
            flag = rng.integers(0, 2, (5, 6, nc), np.uint16) << 3
            band.create_variable("pixel_quality_flag", dims, data=flag, fillvalue=np.uint16(65535), chunks=(2, 3, nc))
            band.create_variable("spectral_channel", dims[2:], data=np.arange(nc, dtype=np.int16))
            deep = band.create_group("deep")
            deep.dimensions["spectral_channel"] = 4  # another one
            deep.create_variable("v", ("spectral_channel", "xtrack"), data=np.arange(24).reshape(4, 6))
            band.create_group("empty").attrs["a"] = 1.5
    return path


KEPT = {
    "/", "mirror_step", "xtrack", "time",
    *(f"{BAND}{name}" for name in ("", "/radiance", "/nominal_wavelength", "/latitude", "/solar_zenith_angle",
                                   "/spectral_channel")),
}  # fmt: skip


@pytest.fixture
def granule(tmp_path: Path) -> Path:
    return write_rich(tmp_path / "TEMPO_RAD_L1_V03_20240601T210934Z_S012G01.nc")


class TestTempo:
    @pytest.mark.parametrize("fill", [-1e30, None, -7.5])
    @pytest.mark.parametrize("kind", ["netcdf", "zarr"])
    def test_what_is_kept(self, tmp_path: Path, kind: str, fill: float | None) -> None:
        path = write_rich(tmp_path / "TEMPO_RAD_L1_V03_20240601T210934Z_S012G01.nc", fill)
        if fill == -7.5:
            with h5py.File(path, "r+") as file:
                file[BAND]["radiance"][...] = np.where(file[BAND]["radiance"][...] < 0, fill, file[BAND]["radiance"])
        decoded = remade(open_reader(path), tmp_path, kind=kind)
        before, after = content(path), content(decoded)
        assert after.keys() == KEPT
        for place in KEPT:
            assert after[place] == before[place], place
        as_before(path, decoded)

    @pytest.mark.parametrize("band", [BAND, OTHER])
    @pytest.mark.parametrize("kind", ["netcdf", "zarr"])
    def test_everything(self, granule: Path, tmp_path: Path, kind: str, band: str) -> None:
        decoded = remade(open_reader(granule, band=band), tmp_path, ["*"], kind)
        before, after = content(granule), content(decoded)
        assert after.keys() == before.keys()
        for place in before:
            assert after[place] == before[place], place
        as_before(granule, decoded, band=band)

    def test_region(self, granule: Path, tmp_path: Path) -> None:
        decoded = remade(open_reader(granule, region=[1, 4, 2, 5]), tmp_path, ["*"])
        expected = cropped(granule, tmp_path / "expected.nc", {"mirror_step": slice(1, 4), "xtrack": slice(2, 5)})
        before, after = content(expected), content(decoded)
        assert after.keys() == before.keys()
        before["/"] = content(granule)["/"]
        for place in before:
            assert after[place] == before[place], place
        as_before(granule, decoded, region=[1, 4, 2, 5])

    def test_what_the_name_tells(self, granule: Path, tmp_path: Path) -> None:
        decoded = remade(open_reader(granule), tmp_path)
        (tmp_path / "decoded").mkdir()
        before, after = open_reader(granule), open_reader(decoded.rename(tmp_path / "decoded" / granule.name))
        for key in ("band", "units", "shape", "time", "version"):
            assert getattr(after, key) == getattr(before, key)
        assert {*after.absent} == {*before.absent, "pixel_quality_flag"}

    def test_patterns(self, granule: Path, tmp_path: Path) -> None:
        decoded = remade(open_reader(granule), tmp_path, [f"{BAND}/pixel*", "earth_sun_distance"])
        assert content(decoded).keys() == KEPT | {f"{BAND}/pixel_quality_flag", "earth_sun_distance"}

    def test_dimensions_in_another_order(self, tmp_path: Path) -> None:
        path, values = tmp_path / "a.nc", np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
        with h5netcdf.File(path, "w") as file:
            file.dimensions = {"xtrack": 6, "mirror_step": 5}
            band = file.create_group(BAND)
            band.dimensions["spectral_channel"] = 4
            dims = ("spectral_channel", "mirror_step", "xtrack")
            band.create_variable("radiance", dims, data=values)
            band.create_variable("nominal_wavelength", dims[::2], data=300 + np.arange(24.0).reshape(6, 4).T)
        decoded = remade(open_reader(path, region=[1, 5, 2, 4]), tmp_path)
        with h5py.File(decoded) as file:
            np.testing.assert_array_equal(file[BAND]["radiance"], values[:, 1:5, 2:4])
            assert [axis[0].name for axis in file[BAND]["radiance"].dims] == [
                f"/{BAND}/spectral_channel", "/mirror_step", "/xtrack",
            ]  # fmt: skip
        as_before(path, decoded, region=[1, 5, 2, 4])

    def test_simulated(self, tmp_path: Path) -> None:
        config = {"output_dir": str(tmp_path / "granules"), "n_granules": 1, "shape": [7, 40], "n_channels": 33}
        (tmp_path / "simulate.yaml").write_text(yaml.safe_dump(config))
        assert run(["simulate", str(tmp_path / "simulate.yaml")]) == 0
        (path,) = (tmp_path / "granules").glob("TEMPO_RAD*.nc")
        decoded = remade(open_reader(path), tmp_path, ["*"])
        assert content(decoded) == content(path)
        with xr.open_dataset(path, group=BAND) as before, xr.open_dataset(decoded, group=BAND) as after:
            xr.testing.assert_identical(after, before)
            assert np.isnan(after["radiance"]).any()

    def test_test_granule(self, tmp_path: Path, write_granule: Callable[..., Path]) -> None:
        values = np.random.default_rng(0).normal(1e12, 1e11, (4, 5, 6))
        path = write_granule(
            tmp_path / "a.nc", values, flag=np.zeros(values.shape), fill=-1e30, seconds=np.arange(4),
            geometry={"latitude": np.zeros((4, 5)), "longitude": np.ones((4, 5))},
        )  # fmt: skip
        assert content(remade(open_reader(path), tmp_path, ["*"])) == content(path)


# --- other formats --------------------------------------------------------------------------------


def variables_of(dims: tuple[str, ...], packed: bool) -> dict[str, Any]:
    values = np.random.default_rng(0).normal(100, 10, (5, 7, 4)).astype(np.float32)
    values[1, 2] = values[0, :, 3] = -5
    attributes: dict[str, Any] = {"units": "W", "_FillValue": np.float32(-5), "comment": "c"}
    if packed:
        values = np.where(values == -5, -999, values * 10).astype(np.int16)
        attributes |= {"_FillValue": np.int16(-999), "scale_factor": 0.1, "add_offset": 2.0, "valid_max": np.int16(9)}
    return {
        **scene_variables(values, dims, **attributes),
        "latitude": (("y", "x"), np.arange(35.0).reshape(5, 7), {"units": "degrees_north"}),
        "time": (("y",), np.arange(5.0), {"units": "seconds since 2000-01-01"}),
        "y": (("y",), np.arange(5, dtype=np.int32), {"long_name": "row"}),
        "beside": (("x", "y"), np.arange(35, dtype=np.int16).reshape(7, 5), {"a": "b"}),
    }


class TestArrays:
    @pytest.mark.parametrize(("packed", "region"), [(False, None), (True, [1, 4, 2, 6])])
    @pytest.mark.parametrize("dims", [("y", "x", "channel"), ("channel", "y", "x"), ("x", "channel", "y")])
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind(
        self, tmp_path: Path, kind: str, dims: tuple[str, ...], packed: bool, region: list[int] | None
    ) -> None:
        path = write(tmp_path, kind, variables_of(dims, packed))
        decoded = remade(open_reader(path, region=region), tmp_path, ["*"], "zarr" if packed else "netcdf")
        with open_scene(path, region=region) as before, open_scene(decoded) as after:
            xr.testing.assert_identical(after.drop_attrs(deep=False), before.drop_attrs(deep=False))
        engine = {"classic": "scipy", "offset64": "scipy", "netcdf4": "h5netcdf"}.get(kind, "zarr")
        more = {"consolidated": False} if engine == "zarr" else {}
        crop = {} if region is None else {"y": slice(1, 4), "x": slice(2, 6)}
        with xr.open_dataset(path, engine=engine, **more) as before, xr.open_dataset(decoded) as after:
            assert after.variables.keys() == before.variables.keys()
            before = before.isel(crop)
            for name, variable in before.variables.items():
                assert after[name].dims == variable.dims
                assert after[name].attrs.items() <= variable.attrs.items()
                if name == "cube" and packed:
                    np.testing.assert_allclose(after[name], variable, rtol=1e-6)
                else:
                    np.testing.assert_array_equal(after[name], variable)
            assert before["cube"].attrs.keys() - after["cube"].attrs.keys() == ({"valid_max"} if packed else set())
            assert after["cube"].dtype == np.float32
            assert np.isnan(after["cube"].encoding["_FillValue"]) == packed

    def test_identical(self, tmp_path: Path) -> None:
        path = write(tmp_path, "netcdf4", variables_of(("channel", "y", "x"), False))
        assert content(remade(open_reader(path), tmp_path, ["*"])) == content(path)

    @pytest.mark.filterwarnings("ignore:variable 'cube' has multiple fill values")  # xarray's, over the source, too
    @pytest.mark.parametrize(
        ("attributes", "stored"),
        [
            ({}, np.nan),
            ({"missing_value": np.float32(-9)}, -9),
            ({"missing_value": np.array([-9, -8], np.float32)}, -9),
            ({"missing_value": np.float32(-9), "_FillValue": np.float32(-5)}, -5),
            ({"_FillValue": np.float32(np.nan)}, np.nan),
        ],
    )
    def test_fill(self, tmp_path: Path, attributes: dict[str, Any], stored: float) -> None:
        values = np.ones((5, 7, 4), np.float32)
        values[2] = np.nan
        path = write(tmp_path, "netcdf4", scene_variables(values, **attributes))
        with xr.open_dataset(remade(open_reader(path), tmp_path), mask_and_scale=False) as raw:
            np.testing.assert_array_equal(raw["cube"][2], stored)
            assert raw["cube"].attrs.keys() == attributes.keys()

    @pytest.mark.parametrize(("dtype", "kept"), [("f8", "f8"), (">f4", "f4"), ("i4", "f4"), ("u2", "f4")])
    def test_types(self, tmp_path: Path, dtype: str, kept: str) -> None:
        values = np.arange(140).reshape(5, 7, 4).astype(dtype)
        path = write(tmp_path, "netcdf4", scene_variables(values, missing_value=np.array(-1 if dtype[0] != "u" else 9)))
        with xr.open_dataset(remade(open_reader(path), tmp_path), mask_and_scale=False) as raw:
            assert raw["cube"].dtype == kept
            valid = values != 9 if dtype == "u2" else values != -1
            np.testing.assert_array_equal(raw["cube"], np.where(valid, values, np.nan))

    def test_packed_floats(self, tmp_path: Path) -> None:
        values = np.arange(140).reshape(5, 7, 4).astype(np.float64)
        path = write(tmp_path, "netcdf4", scene_variables(values, scale_factor=0.5, missing_value=np.float64(3)))
        with xr.open_dataset(remade(open_reader(path), tmp_path), mask_and_scale=False) as raw:
            assert raw["cube"].dtype == np.float64
            np.testing.assert_array_equal(raw["cube"], np.where(values == 3, np.nan, values / 2))
            assert raw["cube"].attrs.keys() == {"_FillValue"}

    def test_given_wavelengths_and_units(self, tmp_path: Path) -> None:
        values = np.ones((5, 7, 4), np.float32)
        path = write(tmp_path, "netcdf4", {"g/cube": (("y", "x", "channel"), values, {})})
        given = {"wavelength": [401.0, 402.0, 404.0, 408.0], "units": "W"}
        decoded = remade(open_reader(path, **given), tmp_path)
        with open_scene(path, **given) as before, open_scene(decoded) as after:
            xr.testing.assert_identical(after.drop_attrs(deep=False), before.drop_attrs(deep=False))
        with xr.open_dataset(decoded, group="g") as dataset:
            assert dataset["cube"].attrs["units"] == "W"
            assert dataset["wavelength"].attrs["units"] == "nm"

    def test_groups_with_dimensions_of_one_name(self, tmp_path: Path) -> None:
        path = tmp_path / "a.zarr"
        root = zarr.create_group(path)
        for group, ny in (("one", 5), ("two", 3)):
            for name, dims, values in (
                ("cube", ("y", "x", "channel"), np.random.default_rng(ny).random((ny, 7, 4), np.float32)),
                ("wavelength", ("channel",), 400.0 + np.arange(4)),
                ("y", ("y",), np.arange(ny)),
            ):
                array = root.create_array(
                    f"{group}/{name}", shape=values.shape, dtype=values.dtype, dimension_names=dims,
                    attributes={"units": "nm"} if name == "wavelength" else {}, config={"write_empty_chunks": True},
                )  # fmt: skip
                array[...] = values
        scene = open_reader(path, variable="two/cube", region=[1, 3, 0, 5])
        decoded = remade(scene, tmp_path, ["*"])
        for group, crop in (("one", slice(None)), ("two", slice(1, 3))):
            with xr.open_dataset(decoded, group=group) as after:
                np.testing.assert_array_equal(after["y"], root[f"{group}/y"][crop])
                x = slice(0, 5)  # of one size everywhere, so the same dimension
                np.testing.assert_array_equal(after["cube"], root[f"{group}/cube"][crop, x])
        with h5py.File(decoded) as file:
            assert [axis[0].name for axis in file["two/cube"].dims] == ["/two/y", "/x", "/channel"]

    def test_dimensions_of_a_sibling(self, tmp_path: Path) -> None:
        """HDF5 attaches scales from anywhere, netCDF only from the groups above."""
        path = tmp_path / "a.h5"
        with h5py.File(path, "w") as file:
            for name, n in (("y", 5), ("x", 7), ("channel", 4)):
                file[f"dims/{name}"] = np.arange(n)
                file[f"dims/{name}"].make_scale(name)
            file["data/cube"] = np.random.default_rng(0).random((5, 7, 4), np.float32)
            file["data/wavelength"] = 400.0 + np.arange(4)
            file["data/wavelength"].attrs["units"] = "nm"
            for variable, names in (("cube", ("y", "x", "channel")), ("wavelength", ("channel",))):
                for axis, name in enumerate(names):
                    file[f"data/{variable}"].dims[axis].attach_scale(file[f"dims/{name}"])
            cube = file["data/cube"][...]
        decoded = remade(open_reader(path, region=[0, 5, 1, 3]), tmp_path)
        with xr.open_dataset(decoded, group="data") as dataset:
            assert dataset["cube"].dims == ("y", "x", "channel")
            np.testing.assert_array_equal(dataset["cube"], cube[:, 1:3])

    def test_two_dimensions_of_one_name_in_a_group(self, tmp_path: Path) -> None:
        variables = variables_of(("y", "x", "channel"), False)
        path = write(tmp_path, "zarr3", variables)
        zarr.open_group(path).create_array(
            "odd", shape=(3,), dtype="f4", dimension_names=("y",), config={"write_empty_chunks": True}
        )[...] = 0
        remade(open_reader(path), tmp_path)
        with pytest.raises(InputError, match=r"a\.zarr: odd has 3 along y, other variables 5, which netCDF-4 cannot"):
            remade(open_reader(path), tmp_path, ["*"])

    def test_dimension_behind_another_of_its_name(self, granule: Path, tmp_path: Path) -> None:
        with h5py.File(granule, "r+") as file:
            band = file[BAND]
            band["deep/w"] = np.zeros(8)
            band["deep/w"].dims[0].attach_scale(band["spectral_channel"])
        with pytest.raises(
            InputError, match=r"deep/w has the dimension band_290_490_nm/spectral_channel, and a nearer"
        ):
            remade(open_reader(granule), tmp_path, ["*"])


class TestPlain:
    def check(self, tmp_path: Path, path: Path, **given: Any) -> xr.Dataset:
        scene = open_reader(path, **given)
        decoded = remade(scene, tmp_path, kind="zarr")
        with open_scene(path, **given) as before, open_scene(decoded) as after:
            xr.testing.assert_identical(after.drop_attrs(deep=False), before.drop_attrs(deep=False))
            assert after.attrs["format"] == "netcdf"
        with pytest.raises(ConfigError, match=f"{scene.path.name}: carry_over: of a {scene.format} file nothing is"):
            remade(scene, tmp_path, ["*"])
        with xr.open_dataset(decoded) as dataset:
            return dataset.load()

    @pytest.mark.parametrize("region", [None, [1, 4, 2, 6]])
    def test_matlab(self, tmp_path: Path, region: list[int] | None) -> None:
        values = np.random.default_rng(0).random((5, 7, 4))
        values[1, 2] = np.nan
        scipy.io.savemat(tmp_path / "a.mat", {"cube": values, "wavelength": [401.0, 402, 403, 404]})
        dataset = self.check(tmp_path, tmp_path / "a.mat", region=region, units="W")
        assert dataset["radiance"].dims == ("y", "x", "channel")
        assert dataset["radiance"].attrs["units"] == "W"
        assert dataset["wavelength"].values.tolist() == [401, 402, 403, 404]

    def test_envi(self, tmp_path: Path) -> None:
        values = np.random.default_rng(0).random((5, 7, 4)).astype(np.float32)
        path = write_envi(tmp_path / "a.hdr", values, wavelength=[401, 402, 403, 404], wavelength_units="nm")
        np.testing.assert_array_equal(self.check(tmp_path, path)["radiance"], values)

    def test_without_names(self, tmp_path: Path) -> None:
        path = tmp_path / "a.h5"
        with h5py.File(path, "w") as file:
            file["cube"] = np.random.default_rng(0).random((4, 5, 7), np.float32)
            file["wavelength"] = 400.0 + np.arange(4)
            file["latitude"] = np.arange(35.0).reshape(5, 7)
            file["time"] = np.array([0.0, 1, np.nan, 3, 4])
            for name, units in (("wavelength", "nm"), ("latitude", "degrees"), ("time", "days since 2000-01-01")):
                file[name].attrs["units"] = units
        dims = {"channel": 0, "y": 1, "x": 2}
        dataset = self.check(tmp_path, path, dims=dims, region=[0, 4, 2, 5])
        assert dataset["latitude"].dims == ("y", "x")
        assert dataset["time"].dtype.kind == "M"


# --- carrying over --------------------------------------------------------------------------------


class TestCarryOver:
    def test_nothing_of_that_name(self, granule: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"S012G01\.nc: carry_over: 'geometry/\*' matches nothing; it has: .*crs"):
            remade(open_reader(granule), tmp_path, ["*/latitude", "geometry/*"])
        assert not (tmp_path / "decoded.nc").exists()

    def test_what_netcdf_cannot_hold(self, granule: Path, tmp_path: Path) -> None:
        with h5py.File(granule, "r+") as file:
            file["compound"] = np.zeros(3, [("a", "f4"), ("b", "i2")])
        remade(open_reader(granule), tmp_path)
        with pytest.raises(
            InputError, match=r"S012G01\.nc: compound holds .*, for which netCDF-4 has no type; name only others"
        ):
            remade(open_reader(granule), tmp_path, ["*"])

    def test_damage(self, granule: Path, tmp_path: Path) -> None:
        with h5py.File(granule, "r+") as file:
            file.create_dataset("hollow", (10**6, 10**6), "f8")
        with pytest.raises(InputError, match="hollow declares 8000000000000 bytes, but none is stored"):
            remade(open_reader(granule), tmp_path, ["hol*"])
        assert not (tmp_path / "decoded.nc").exists()
        remade(open_reader(granule), tmp_path, ["crs"])

    @pytest.mark.parametrize("chunks", [None, (1, 300, 400), (3, 100, 50)])
    @pytest.mark.parametrize("region", [None, [3, 38, 11, 290]])
    def test_bounded_memory(
        self, tmp_path: Path, chunks: tuple[int, ...] | None, region: list[int] | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, rng = tmp_path / "a.nc", np.random.default_rng(0)
        values = rng.integers(0, 9, (40, 300, 400), np.int32)  # 19 MB
        with h5netcdf.File(path, "w") as file:
            file.dimensions = {"y": 40, "x": 300, "channel": 2, "more": 400}
            file.create_variable("cube", ("y", "x", "channel"), data=rng.random((40, 300, 2), np.float32))
            file.create_variable("wavelength", ("channel",), data=np.array([400.0, 500.0])).attrs["units"] = "nm"
            file.create_variable("large", ("y", "x", "more"), data=values, chunks=chunks)
        monkeypatch.setattr(sources, "_BLOCK_BYTES", 2**19)
        scene, decoded = open_reader(path, variable="cube", region=region), tmp_path / "decoded.nc"
        layout = layout_of(scene)
        tracemalloc.start()
        try:
            with new_scene(decoded, layout, {}, scene, ["large"]):
                pass
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 6e6
        y, x = (slice(None), slice(None)) if region is None else (slice(3, 38), slice(11, 290))
        with h5py.File(decoded) as file:
            np.testing.assert_array_equal(file["large"], values[y, x])


# --- files of latents -----------------------------------------------------------------------------


class TestLayoutInFiles:
    @pytest.mark.parametrize("kind", ["netcdf", "zarr"])
    def test_readable_copies(self, granule: Path, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "latents"
        with new_file(path, kind) as writer:  # type: ignore[arg-type]
            writer.dimension("xtrack", 3)
            writer.create("xtrack", ("xtrack",), "f4", {}, values=[1, 2, 3])
            write_layout(writer, layout_of(open_reader(granule, region=[0, 5, 1, 3])))
        with xr.open_datatree(path, engine="h5netcdf" if kind == "netcdf" else "zarr") as tree:
            assert tree["source"].attrs["title"] == "a granule"
            band = tree["source"][BAND]
            assert band.attrs["note"] == BAND
            assert "radiance" not in band
            assert band["latitude"].dims == ("mirror_step", "source_xtrack")
            with xr.open_dataset(granule, group=BAND) as before:
                np.testing.assert_array_equal(band["latitude"], before["latitude"][:, 1:3])
                np.testing.assert_array_equal(band["solar_zenith_angle"], before["solar_zenith_angle"][:, 1:3])

    @pytest.mark.parametrize("kind", ["netcdf", "zarr"])
    def test_none(self, granule: Path, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "latents"
        with new_file(path, kind) as writer:  # type: ignore[arg-type]
            writer.group("other", {"layout": "{}"})
        with closing(open_container(path)) as container, pytest.raises(InputError, match="latents: no layout of a"):
            read_layout(container)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: text[:-20],
            lambda text: "{}",
            lambda text: "[]",
            lambda text: text.replace('"mirror_step": 5', '"mirror_step": 6'),
            lambda text: text.replace('"shape": [5', '"shape": [4'),
            lambda text: text.replace('"latitude"', '"altitude"').replace("/latitude", "/altitude"),
            lambda text: text.replace(
                '"place": "time", "dims": ["mirror_step"]', '"place": "time", "dims": ["xtrack"]'
            ),
            lambda text: text.replace('"axes"', '"boxes"'),
            lambda text: text.replace("[5, 6, 8]", "[5, 6]"),
        ],
    )
    @pytest.mark.parametrize("kind", ["netcdf", "zarr"])
    def test_damage(
        self, granule: Path, tmp_path: Path, kind: str, damage: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, to_json = tmp_path / "latents", layouts.to_json

        def damaged(layout: Layout) -> str:
            text = to_json(layout)
            assert damage(text) != text
            return damage(text)

        monkeypatch.setattr(layouts, "to_json", damaged)
        with new_file(path, kind) as writer:  # type: ignore[arg-type]
            write_layout(writer, layout_of(open_reader(granule)))
        with closing(open_container(path)) as container, pytest.raises(InputError, match="latents: damaged"):
            read_layout(container)


class TestNewScene:
    @pytest.mark.parametrize("link", ["radiance", "nominal_wavelength"])
    def test_links(self, granule: Path, link: str) -> None:
        with h5py.File(granule, "r+") as file:
            file[BAND].move(link, "elsewhere")
            file[BAND][link] = h5py.SoftLink(f"/{BAND}/elsewhere")
        with pytest.raises(InputError, match=rf"S012G01\.nc: {BAND}/{link} is a second name \(link\)"):
            layout_of(open_reader(granule))

    def test_attributes(self, granule: Path, tmp_path: Path) -> None:
        added = {"title": "decoded", "model_sha256": "ab", "history": "decoded today"}
        decoded = remade(open_reader(granule), tmp_path, attributes=added)
        with xr.open_dataset(decoded) as dataset:
            assert dataset.attrs.items() >= {"title": "decoded", "model_sha256": "ab", "number": 3}.items()
            assert dataset.attrs["history"] == "made\ndecoded today"

    def test_failure_leaves_nothing(self, granule: Path, tmp_path: Path) -> None:
        layout = layout_of(open_reader(granule))
        target = tmp_path / "out"
        target.mkdir()

        def fail() -> None:
            with new_scene(target / "decoded.nc", layout, {}) as put:
                put(slice(0, 1), slice(0, 6), np.ones((1, 6, 8), np.float32))
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fail()
        assert list(target.iterdir()) == []

    def test_what_is_given_stays(self, granule: Path, tmp_path: Path) -> None:
        layout, values = layout_of(open_reader(granule)), np.full((5, 6, 8), np.nan, np.float32)
        with new_scene(tmp_path / "decoded.nc", layout, {}) as put:
            put(slice(0, 5), slice(0, 6), values)
        assert np.isnan(values).all()
        with open_scene(tmp_path / "decoded.nc") as scene:
            assert np.isnan(scene["radiance"]).all()


# --- as bytes -------------------------------------------------------------------------------------


class TestBytes:
    @pytest.fixture
    def layout(self, tmp_path: Path) -> Layout:
        config = {"output_dir": str(tmp_path / "granules"), "n_granules": 1, "shape": [9, 70], "n_channels": 40}
        (tmp_path / "simulate.yaml").write_text(yaml.safe_dump(config))
        assert run(["simulate", str(tmp_path / "simulate.yaml")]) == 0
        (path,) = (tmp_path / "granules").glob("TEMPO_RAD*.nc")
        with open_reader(path) as scene:
            return layout_of(scene)

    def test_every_bit_of_the_values(self, layout: Layout, tmp_path: Path) -> None:
        stored = layout.variables[0]
        odd = np.array([0x7FC00001, 0x7F800001, 0xFFC00000, 0x80000000], "<u4").view("<f4")  # NaN of all kinds, -0.0
        texts = np.array(["a", "ü", "", "\n"], object)
        more = [
            Stored("odd", ("four",), "f4", {"note": h5py.Empty("S1")}, np.float32(np.nan), odd),
            Stored("texts", ("four",), "str", {}, None, texts),
            Stored("scalar", (), "i2", {}, None, np.array(3, np.int16)),
            Stored("none", ("none",), "f8", {}, None, np.zeros(0)),
        ]
        dimensions = {**layout.dimensions, "four": 4, "none": 0}
        layout = replace(layout, dimensions=dimensions, variables=(*layout.variables, *more))
        again = unpack_layout(pack_layout(layout))
        assert_same(again, layout)
        assert len(again.variables) > 10 and again.variables[0].place == stored.place
        for before, after in zip(layout.variables, again.variables, strict=True):
            assert before.values is not None and after.values is not None
            assert after.values.dtype.str == before.values.dtype.str
            if before.dtype != "str":
                assert after.values.tobytes() == before.values.tobytes()
        with new_scene(tmp_path / "a.nc", again, {}) as put:
            put(slice(0, 9), slice(0, 70), np.ones(layout.shape, np.float32))
        with h5py.File(tmp_path / "a.nc") as file:
            assert file["odd"][:].tobytes() == more[0].values.tobytes()  # type: ignore[union-attr]

    def test_damage(self, layout: Layout) -> None:
        data = pack_layout(layout)
        for length in [*range(0, len(data), 97), len(data) - 1]:
            with pytest.raises(ValueError, match=r"."):
                unpack_layout(data[:length])
        for more in (b"\0", bytes(8), data):
            with pytest.raises(ValueError, match="damaged"):
                unpack_layout(data + more)
        random = np.random.default_rng(0)
        for position in random.integers(0, len(data), 100):
            damaged = bytearray(data)
            damaged[position] ^= 1 << random.integers(8)
            with suppress(ValueError):
                unpack_layout(bytes(damaged))

    @pytest.mark.parametrize("change", [{"dtype": "f8"}, {"dims": ()}, {"dtype": "str"}, {"dims": ("absent",)}])
    def test_values_that_are_not_what_the_layout_says(self, layout: Layout, change: dict[str, Any]) -> None:
        i = [stored.dtype for stored in layout.variables].index("f4")
        variables = list(layout.variables)
        variables[i] = replace(variables[i], **change)
        with pytest.raises(ValueError, match=r"packed layout is damaged|, not "):
            unpack_layout(pack_layout(replace(layout, variables=tuple(variables))))
