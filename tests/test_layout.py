"""Files laid out like their sources: compared variable by variable as h5py and xarray read them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5netcdf
import h5py
import numpy as np
import pytest
import xarray as xr
import zarr
from inferring import peak, stored
from refusals import refused
from test_formats import KINDS, scene_variables, write

from spectralvae import open_scene
from spectralvae.codec.layouts import pack_layout, unpack_layout
from spectralvae.errors import ConfigError, InputError
from spectralvae.files import source as sources
from spectralvae.files.layout import Layout, layout_of, new_scene, read_layout, write_layout
from spectralvae.files.source import Stored
from spectralvae.files.writers import new_file
from spectralvae.readers import open_reader
from spectralvae.readers.containers import open_container

BAND, OTHER = "band_290_490_nm", "band_540_740_nm"


def remade(scene: Any, folder: Path, carry_over: Sequence[str] = (), kind: Any = "netcdf") -> Path:
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
    with new_scene(path, layout, {}, scene, carry_over) as put, scene:
        middle = scene.shape[1] // 2
        for columns in (slice(0, middle), slice(middle, scene.shape[1])):
            for row in range(0, scene.shape[0], 2):
                rows = slice(row, min(row + 2, scene.shape[0]))
                put(rows, columns, scene.read(rows, columns)[0])
    for dataset in xr.open_groups(path, engine="h5netcdf").values():
        dataset.load().close()
    return path


def assert_same(one: Layout, other: Layout) -> None:
    """To the last digit, with types; numpy's float64 is a float."""
    with np.printoptions(threshold=10**9, floatmode="unique"):
        first, second = (re.sub(r"np\.float64\((.*?)\)", r"\1", repr(layout)) for layout in (one, other))
    assert first == second


def as_before(path: Path, decoded: Path, **arguments: Any) -> None:
    """The two files open as the same scene; other formats than TEMPO have become plain netCDF."""
    with open_scene(path, **arguments) as before, open_scene(decoded, band=arguments.get("band")) as after:
        xr.testing.assert_identical(after.drop_attrs(deep=False), before.drop_attrs(deep=False))
        assert after.attrs["format"] == ("tempo" if before.attrs["format"] == "tempo" else "netcdf")
        assert after.attrs.get("band") == before.attrs.get("band")


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
        for name, nc, order in ((BAND, 8, (0, 1, 2)), (OTHER, 6, (2, 0, 1))):
            band = file.create_group(name)
            band.attrs["note"] = name
            band.dimensions["spectral_channel"] = nc
            values = rng.normal(1e12, 1e11, (5, 6, nc)).astype(np.float32)
            values[1, 2] = values[3, :, 4] = np.float32(-1e30)
            dims = ("mirror_step", "xtrack", "spectral_channel")
            turned = tuple(dims[axis] for axis in order)
            fillvalue = None if fill is None else np.float32(fill)
            radiance = band.create_variable(
                "radiance", turned, np.float32, fillvalue=fillvalue, chunks=(1, 4, 3), compression="gzip"
            )
            radiance[...] = values.transpose(order)
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
    def test_what_is_kept(self, tmp_path: Path, fill: float | None) -> None:
        path = write_rich(tmp_path / "TEMPO_RAD_L1_V03_20240601T210934Z_S012G01.nc", fill)
        if fill == -7.5:
            with h5py.File(path, "r+") as file:
                file[BAND]["radiance"][...] = np.where(file[BAND]["radiance"][...] < 0, fill, file[BAND]["radiance"])
        decoded = remade(open_reader(path), tmp_path)
        before = stored(path)
        assert stored(decoded) == {place: before[place] for place in KEPT}
        as_before(path, decoded)

    @pytest.mark.parametrize("band", [BAND, OTHER])
    @pytest.mark.parametrize("kind", ["netcdf", "zarr"])
    def test_everything(self, granule: Path, tmp_path: Path, kind: str, band: str) -> None:
        decoded = remade(open_reader(granule, band=band), tmp_path, ["*"], kind)
        assert stored(decoded) == stored(granule)
        as_before(granule, decoded, band=band)

    def test_region(self, granule: Path, tmp_path: Path) -> None:
        decoded = remade(open_reader(granule, region=[1, 4, 2, 5]), tmp_path, ["*"])
        assert stored(decoded) == stored(granule, {"/mirror_step": slice(1, 4), "/xtrack": slice(2, 5)})
        as_before(granule, decoded, region=[1, 4, 2, 5])


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
        as_before(path, decoded, region=region)
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
        if kind == "netcdf4" and not packed:
            assert stored(decoded) == stored(path)

    @pytest.mark.filterwarnings("ignore:variable 'cube' has multiple fill values")  # xarray's, over the source, too
    @pytest.mark.parametrize(
        ("dtype", "attributes", "kept", "fill"),
        [
            ("f4", {}, "f4", np.nan),
            ("f4", {"missing_value": np.float32(9)}, "f4", 9),
            ("f4", {"missing_value": np.array([9, 8], np.float32)}, "f4", 9),
            ("f4", {"missing_value": np.float32(8), "_FillValue": np.float32(9)}, "f4", 9),
            ("f4", {"_FillValue": np.float32(np.nan)}, "f4", np.nan),
            ("f8", {"missing_value": np.float64(9)}, "f8", 9),
            (">f4", {"missing_value": np.array(9, ">f4")}, "f4", 9),
            ("i4", {"missing_value": np.int32(9)}, "f4", np.nan),
            ("u2", {"missing_value": np.uint16(9)}, "f4", np.nan),
            ("f8", {"missing_value": np.float64(9), "scale_factor": 0.5}, "f8", np.nan),
        ],
    )
    def test_types_and_fills(
        self, tmp_path: Path, dtype: str, attributes: dict[str, Any], kept: str, fill: Any
    ) -> None:
        values = (np.arange(140).reshape(5, 7, 4) + 20).astype(dtype)
        values[2] = 9 if attributes.keys() - {"_FillValue"} else np.nan
        path = write(tmp_path, "netcdf4", scene_variables(values, **attributes))
        with xr.open_dataset(remade(open_reader(path), tmp_path), mask_and_scale=False) as raw:
            assert raw["cube"].dtype == kept
            np.testing.assert_array_equal(raw["cube"][2], fill)
            np.testing.assert_array_equal(raw["cube"][3:], values[3:] * attributes.get("scale_factor", 1.0))
            changed = dtype[0] in "iu" or "scale_factor" in attributes
            assert raw["cube"].attrs.keys() == ({"_FillValue"} if changed else attributes.keys())

    def test_given_wavelengths_and_units(self, tmp_path: Path) -> None:
        path = write(tmp_path, "netcdf4", {"g/cube": (("y", "x", "channel"), np.ones((5, 7, 4), np.float32), {})})
        given = {"wavelength": [401.0, 402.0, 404.0, 408.0], "units": "W"}
        decoded = remade(open_reader(path, **given), tmp_path)
        as_before(path, decoded, **given)
        with xr.open_dataset(decoded, group="g") as dataset:
            assert (dataset["cube"].attrs["units"], dataset["wavelength"].attrs["units"]) == ("W", "nm")

    def test_groups_with_dimensions_of_one_name(self, tmp_path: Path) -> None:
        path, groups = tmp_path / "a.zarr", {}
        for group, ny in (("one", 5), ("two", 3)):
            cube = ("y", "x", "channel"), np.random.default_rng(ny).random((ny, 7, 4), np.float32)
            wavelength = "channel", 400.0 + np.arange(4), {"units": "nm"}
            groups[group] = xr.Dataset({"cube": cube}, {"wavelength": wavelength, "y": np.arange(ny)})
        xr.DataTree.from_dict(groups).to_zarr(path, consolidated=False)
        decoded = remade(open_reader(path, variable="two/cube", region=[1, 3, 0, 5]), tmp_path, ["*"])
        for group, crop in (("one", slice(None)), ("two", slice(1, 3))):
            with xr.open_dataset(decoded, group=group) as after:  # x is of one size everywhere, so the same dimension
                xr.testing.assert_equal(after, groups[group].isel(y=crop, x=slice(0, 5)))
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
        with refused(InputError, "odd", "3", "5", path=path):
            remade(open_reader(path), tmp_path, ["*"])

    def test_dimension_behind_another_of_its_name(self, granule: Path, tmp_path: Path) -> None:
        with h5py.File(granule, "r+") as file:
            band = file[BAND]
            band["deep/w"] = np.zeros(8)
            band["deep/w"].dims[0].attach_scale(band["spectral_channel"])
        with refused(InputError, "deep/w", f"{BAND}/spectral_channel", path=granule):
            remade(open_reader(granule), tmp_path, ["*"])


def test_a_format_that_lays_nothing_out(tmp_path: Path) -> None:
    """HDF5 without names: (y, x, channel) with wavelengths, and nothing is carried over."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["cube"] = np.random.default_rng(0).random((4, 5, 7), np.float32)
        file["wavelength"] = 400.0 + np.arange(4)
        file["latitude"] = np.arange(35.0).reshape(5, 7)
        file["time"] = np.array([0.0, 1, np.nan, 3, 4])
        for name, units in (("wavelength", "nm"), ("latitude", "degrees"), ("time", "days since 2000-01-01")):
            file[name].attrs["units"] = units
    given: dict[str, Any] = {"dims": {"channel": 0, "y": 1, "x": 2}, "region": [0, 4, 2, 5], "units": "W"}
    decoded = remade(open_reader(path, **given), tmp_path, kind="zarr")
    as_before(path, decoded, **given)
    with xr.open_dataset(decoded) as dataset:
        assert dataset["radiance"].dims == ("y", "x", "channel") and dataset["radiance"].attrs["units"] == "W"
        assert dataset["latitude"].dims == ("y", "x")
        assert dataset["time"].dtype.kind == "M"
    with refused(ConfigError, "netcdf", key="carry_over", path=path):
        remade(open_reader(path, **given), tmp_path, ["*"])


# --- carrying over --------------------------------------------------------------------------------


class TestCarryOver:
    def test_what_cannot_be_copied(self, granule: Path, tmp_path: Path) -> None:
        with h5py.File(granule, "r+") as file:
            file["compound"] = np.zeros(3, [("a", "f4"), ("b", "i2")])
            file.create_dataset("hollow", (10**6, 10**6), "f8")
        with refused(ConfigError, "crs", key="carry_over", path=granule, value="geometry/*"):
            remade(open_reader(granule), tmp_path, ["*/latitude", "geometry/*"])
        for pattern, word in (("comp*", "compound"), ("hol*", "8000000000000")):
            with refused(InputError, word, str(granule)):
                remade(open_reader(granule), tmp_path, [pattern])
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

        def carry_over() -> None:
            with new_scene(decoded, layout, {}, scene, ["large"]):
                pass

        assert peak(carry_over) < 6e6
        y, x = (slice(None), slice(None)) if region is None else (slice(3, 38), slice(11, 290))
        with h5py.File(decoded) as file:
            np.testing.assert_array_equal(file["large"], values[y, x])


# --- files of latents -----------------------------------------------------------------------------


class TestLayoutInFiles:
    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: text[:-20],
            lambda text: "{}",
            lambda text: text.replace('"mirror_step": 5', '"mirror_step": 6'),
            lambda text: text.replace('"latitude"', '"altitude"').replace("/latitude", "/altitude"),
            lambda text: text.replace(
                '"place": "time", "dims": ["mirror_step"]', '"place": "time", "dims": ["xtrack"]'
            ),
            lambda text: text.replace('"axes"', '"boxes"'),
            lambda text: text.replace("[5, 6, 8]", "[5, 6]"),
        ],
    )
    def test_damage(self, granule: Path, tmp_path: Path, damage: Callable[[str], str]) -> None:
        """Under a digest that fits: such a file comes from another program."""
        path = tmp_path / "latents.nc"
        with new_file(path, "netcdf") as writer:
            write_layout(writer, layout_of(open_reader(granule)))
        with h5py.File(path, "r+") as file:
            attributes = file["source"].attrs
            damaged = damage(attributes["layout"])
            assert damaged != attributes["layout"]
            attributes.update(layout=damaged, layout_sha256=hashlib.sha256(damaged.encode()).hexdigest())
        with closing(open_container(path)) as container, pytest.raises(InputError) as error:
            read_layout(container)
        assert str(path) in str(error.value)


class TestNewScene:
    @pytest.mark.parametrize("link", ["radiance", "nominal_wavelength"])
    def test_links(self, granule: Path, link: str) -> None:
        with h5py.File(granule, "r+") as file:
            file[BAND].move(link, "elsewhere")
            file[BAND][link] = h5py.SoftLink(f"/{BAND}/elsewhere")
        with refused(InputError, f"{BAND}/{link}", path=granule):
            layout_of(open_reader(granule))


# --- as bytes -------------------------------------------------------------------------------------


class TestBytes:
    @pytest.fixture
    def layout(self, granule: Path) -> Layout:
        with open_reader(granule) as scene:
            return layout_of(scene)

    def test_every_bit_of_the_values(self, layout: Layout, tmp_path: Path) -> None:
        first = layout.variables[0]
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
        assert len(again.variables) > 7 and again.variables[0].place == first.place
        for before, after in zip(layout.variables, again.variables, strict=True):
            assert before.values is not None and after.values is not None
            assert after.values.dtype.str == before.values.dtype.str
            if before.dtype != "str":
                assert after.values.tobytes() == before.values.tobytes()
        given = np.full(layout.shape, np.nan, np.float32)
        with new_scene(tmp_path / "a.nc", again, {}) as put:
            put(slice(0, 5), slice(0, 6), given)
        assert np.isnan(given).all()
        with h5py.File(tmp_path / "a.nc") as file:
            assert file["odd"][:].tobytes() == more[0].values.tobytes()  # type: ignore[union-attr]

    def test_damage(self, layout: Layout) -> None:
        data = pack_layout(layout)
        for length in [*range(0, len(data), 97), len(data) - 1]:
            with pytest.raises(ValueError, match=r"."):
                unpack_layout(data[:length])
        for more in (b"\0", bytes(8), data):
            with pytest.raises(ValueError, match=r"damaged|corrupt"):
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
        with pytest.raises(ValueError, match=r"damaged|corrupt|, not "):
            unpack_layout(pack_layout(replace(layout, variables=tuple(variables))))
