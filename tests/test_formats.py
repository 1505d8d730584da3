"""Readers of generic scenes: files written by other libraries come back number by number, or are refused in a line."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import h5netcdf
import h5py
import numpy as np
import pytest
import scipy.io
import torch
import xarray as xr
import zarr
from preparing import run_prepare, z_of
from refusals import refused
from spectral.io import envi

from spectralvae import open_scene
from spectralvae.config import PrepareConfig
from spectralvae.errors import ConfigError, InputError, UserError
from spectralvae.readers import RULES, open_reader
from spectralvae.readers.base import Place
from spectralvae.readers.containers import open_container
from spectralvae.readers.netcdf import NetcdfScene
from spectralvae.readers.packing import text

NY, NX, NC = 6, 5, 4
NM = [400.0, 500.0, 600.0, 700.0]
GIVEN = {"first": 400, "last": 700}
NO_RULE = dict.fromkeys(RULES, 0)


def cube(dtype: Any = np.float32) -> np.ndarray:
    """(NY, NX, NC), every value once, within one byte."""
    return (1 + np.arange(NY * NX * NC)).reshape(NY, NX, NC).astype(dtype)


def refuse(
    path: Path,
    key: str | None,
    *words: str,
    error: type[UserError] = ConfigError,
    at: Path | None = None,
    **given: Any,
) -> None:
    """Check that a file is refused with this key, and `at` (by default its own path)."""
    with refused(error, *words, key=key, path=at or path):
        open_reader(path, **given)


# --- ENVI -----------------------------------------------------------------------------------------

HEADER = {"wavelength": NM, "wavelength units": "Nanometers"}
INTERLEAVES = pytest.mark.parametrize("interleave", ["bil", "bip", "bsq"])


def write_envi(path: Path, values: np.ndarray, *, interleave: str = "bil", order: int = 0, **header: Any) -> Path:
    """Write NAME.hdr and NAME.img; header entries have "_" for blanks, and None leaves one of HEADER out."""
    entries = HEADER | {key.replace("_", " "): value for key, value in header.items()}
    metadata = {key: value for key, value in entries.items() if value is not None}
    envi.save_image(
        str(path), values, dtype=values.dtype, interleave=interleave, byteorder=order, metadata=metadata, force=True
    )
    return path


def edit(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


class TestEnvi:
    @INTERLEAVES
    @pytest.mark.parametrize("order", [0, 1])
    @pytest.mark.parametrize("kind", ["u1", "i2", "i4", "f4", "f8", "u2", "u4", "i8", "u8"])
    def test_every_layout(self, tmp_path: Path, interleave: str, order: int, kind: str) -> None:
        file = write_envi(tmp_path / "a.hdr", cube(kind), interleave=interleave, order=order)
        edit(file, "header offset = 0", "header offset = 7")
        (tmp_path / "a.img").write_bytes(b"1234567" + (tmp_path / "a.img").read_bytes())
        with open_reader(file, region=[1, 5, 1, 4]) as scene:
            values, counts = scene.read(slice(1, 3), slice(1, 3))
            np.testing.assert_array_equal(values, cube()[2:4, 2:4])
            assert counts == NO_RULE
            assert scene.read(slice(2, 2))[0].shape == (0, 3, NC)
            assert scene.chunk == ((NY, NX) if interleave == "bsq" else (1, NX))

    def test_scene(self, tmp_path: Path) -> None:
        file = write_envi(tmp_path / "a.hdr", cube())
        with open_reader(file, units="W/m^2/sr/um") as scene:
            assert scene.path == tmp_path / "a.img"
            assert scene.files() == [tmp_path / "a.hdr", tmp_path / "a.img"]
            assert (scene.name, scene.units, scene.band, scene.time) == ("a", "W/m^2/sr/um", None, None)
            assert scene.coordinates() == {}
            np.testing.assert_array_equal(pickle.loads(pickle.dumps(scene)).read(slice(None))[0], cube())
        with open_scene(file) as ds:
            np.testing.assert_array_equal(ds.radiance.values, cube())
            np.testing.assert_array_equal(ds.wavelength.values, NM)
            assert ds.attrs["format"] == "envi"

    @pytest.mark.parametrize(
        ("header", "binary"),
        [("a.hdr", "a.img"), ("a.img.hdr", "a.img"), ("a.HDR", "a.DAT"), ("a.hdr", "a"), ("a.b.hdr", "a.b.bil")],
    )
    def test_header_and_binary_find_each_other(self, tmp_path: Path, header: str, binary: str) -> None:
        made = write_envi(tmp_path / "made.hdr", cube())
        made.rename(tmp_path / header)
        (tmp_path / "made.img").rename(tmp_path / binary)
        for given in (header, binary):
            with open_reader(tmp_path / given) as scene:
                assert scene.path == tmp_path / binary
                np.testing.assert_array_equal(scene.read(slice(None))[0], cube())

    def test_header_and_binary_that_do_not(self, tmp_path: Path) -> None:
        file = write_envi(tmp_path / "a.hdr", cube())
        (tmp_path / "a.dat").write_bytes((tmp_path / "a.img").read_bytes())
        refuse(file, None, "a.img, a.dat", error=InputError)
        assert open_reader(tmp_path / "a.dat").path == tmp_path / "a.dat"
        for name in ("a.img", "a.dat"):
            (tmp_path / name).unlink()
        refuse(file, None, "a.img", error=InputError)
        (tmp_path / "lone.img").write_bytes(bytes(1000))
        refuse(tmp_path / "lone.img", None, "unknown format", error=InputError)
        (tmp_path / "lone.hdr").write_text("BYTEORDER I")  # as of other formats
        refuse(tmp_path / "lone.img", None, "unknown format", error=InputError)

    @INTERLEAVES
    def test_large_and_truncated(self, tmp_path: Path, interleave: str) -> None:
        """2 GB, nearly all of it a hole, are not read whole; cut short while open, a map would end the process."""
        ny, row = 2 * 10**7, NX * NC * 4
        file, binary = write_envi(tmp_path / "a.hdr", cube()[:1], interleave=interleave), tmp_path / "a.img"
        edit(file, "lines = 1\n", f"lines = {ny}\n")
        os.truncate(binary, ny * row + 1)
        with open_reader(file) as scene:
            assert scene.shape == (ny, NX, NC)
            assert not scene.read(slice(ny - 2, ny))[0].any()
            if interleave != "bsq":
                np.testing.assert_array_equal(scene.read(slice(0, 1))[0], cube()[:1])
            os.truncate(binary, ny * row - 1)
            with refused(InputError, path=binary):
                scene.read(slice(ny - 2, ny))
        refuse(file, None, f"{ny * row - 1} ", f" {ny * row}", error=InputError, at=binary)
        edit(file, f"lines = {ny}", "lines = 60000000000")
        refuse(file, None, "60000000000", error=InputError, at=binary)

    def test_wavelengths(self, tmp_path: Path) -> None:
        file = tmp_path / "a.hdr"
        um = [0.4, 0.5, 0.6, 2.5]
        for units in ("Micrometers", "um", "microns"):
            scene = open_reader(write_envi(file, cube(), wavelength=um, wavelength_units=units))
            np.testing.assert_allclose(scene.wavelength, [400, 500, 600, 2500], rtol=1e-12)
        for units in ("Wavenumber", None):
            write_envi(file, cube(), wavelength_units=units)
            refuse(file, "wavelength units", units or "missing", error=InputError)
            np.testing.assert_array_equal(open_reader(file, wavelength=GIVEN).wavelength, NM)
        refuse(write_envi(file, cube(), wavelength=None), "wavelength", "4 channels", error=InputError)
        assert open_scene(file, wavelength=NM).wavelength.dims == ("channel",)
        refuse(write_envi(file, cube(), wavelength=NM[::-1]), "wavelength", "3 of 3")
        refuse(write_envi(file, cube(), wavelength=[1, 2, 3, "x"]), "wavelength", "'x'", error=InputError)

    def test_fill_scale_and_bad_bands(self, tmp_path: Path) -> None:
        values = cube("f8")
        values[0, 0, 0] = values[5, 4, 1] = values[1, 1, 2] = -9999
        values[2, 0] = (-1e30, 0.0, 1.0, 9.969209968386869e36)
        values[3, 0, 0] = np.nan
        gain, offset = [1.0, 2.0, 3.0, 0.5], [0.0, 1.0, -1.0, 8.0]
        file = write_envi(
            tmp_path / "a.hdr",
            values,
            data_ignore_value=-9999,
            data_gain_values=gain,
            data_offset_values=offset,
            reflectance_scale_factor=10000.0,
            bbl=[1, 1, 0, 1],
        )
        read, counts = open_reader(file).read(slice(None))
        truth = ((values * gain + offset) / 10000).astype(np.float32)
        truth[(values == -9999) | (abs(values) > 1e20)] = np.nan
        truth[..., 2] = np.nan
        np.testing.assert_array_equal(read, truth)
        rules = {"fill": 3, "flagged": NY * NX - 1, "undeclared_fill": 1, "default_fill": 1, "nan": 1}
        assert counts == NO_RULE | rules

    @pytest.mark.parametrize(
        ("old", "new", "key", "word"),
        [
            ("data type = 4", "data type = 6", "data type", "complex"),
            ("data type = 4", "data type = 7", "data type", "unknown"),
            ("interleave = bil", "interleave = tile", "interleave", "'tile'"),
            ("byte order = 0", "byte order = 2", "byte order", "'2'"),
            ("byte order = 0", "", "byte order", "missing"),
            ("lines = 6", "lines = 0", "lines", "'0'"),
            ("samples = 5", "samples = 5.0", "samples", "'5.0'"),
            ("samples = 5", f"samples = {'9' * 5000}", "samples", "999"),
            ("header offset = 0", "header offset = x", "header offset", "'x'"),
            ("ENVI Standard", "ENVI Spectral Library", "file type", "Library"),
            ("lines = 6", "lines = 6\nfile compression = 1", "file compression", "compressed"),
            ("lines = 6", "lines = 6\nmajor frame offsets = {0, 8}", "major frame offsets", ""),
            ("lines = 6", "lines = 6\nbbl = {1, 1, 0}", "bbl", "4 finite numbers"),
            ("lines = 6", "lines = 6\nbbl = {1, 1, 0, 2}", "bbl", "(bad)"),
            ("lines = 6", "lines = 6\ndata ignore value = none", "data ignore value", "'none'"),
            ("lines = 6", "lines = 6\ndata ignore value = {1, 2}", "data ignore value", "2 values"),
            ("lines = 6", "lines = 6\ndata gain values = {1, 1, nan, 1}", "data gain values", "finite"),
            ("lines = 6", "lines = 6\nreflectance scale factor = 0", "reflectance scale factor", "= 0.0"),
            ("wavelength units = Nanometers", "description = {", None, "brace"),
        ],
    )
    def test_headers_refused(self, tmp_path: Path, old: str, new: str, key: str | None, word: str) -> None:
        refuse(edit(write_envi(tmp_path / "a.hdr", cube()), old, new), key, word, error=InputError)

    def test_header_in_capitals_or_not_text(self, tmp_path: Path) -> None:
        file = edit(write_envi(tmp_path / "a.hdr", cube()), "lines = 6", "Lines = 6")
        edit(file, "interleave = bil", "interleave = Bil")
        np.testing.assert_array_equal(open_scene(file).radiance.values, cube())
        file.write_bytes(file.read_bytes() + b"description = {\xb5m}\n")
        refuse(file, None, "UTF-8", error=InputError)
        os.truncate(file, 2**24 + 1)
        refuse(file, None, f"{2**24} bytes", error=InputError)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write_envi(tmp_path / "a.hdr", cube()), write(tmp_path, "classic", scene_variables()), tmp_path / "a.mat"]
    scipy.io.savemat(files[2], {"Y": cube()})
    for module in ("spectral.io", "scipy.io"):
        monkeypatch.setitem(sys.modules, module, None)
    for file in files:
        refuse(file, None, "spectralvae[formats]", error=InputError, wavelength=GIVEN)


# --- netCDF, HDF5, Zarr ---------------------------------------------------------------------------
Variables = Mapping[str, tuple[Sequence[str], np.ndarray, Mapping[str, Any]]]
KINDS = {"netcdf4": "a.nc", "classic": "a.nc", "offset64": "a.nc", "zarr2": "a.zarr", "zarr3": "a.zarr"}
FORMATS = {"netcdf4": "NETCDF4", "classic": "NETCDF3_CLASSIC", "offset64": "NETCDF3_64BIT"}
STORED: dict[str, Callable[[tuple[int, ...]], dict[str, Any]]] = {
    "netcdf4": lambda chunks: {"chunksizes": chunks, "zlib": True},
    **dict.fromkeys(("classic", "offset64"), lambda chunks: {}),
    **dict.fromkeys(("zarr2", "zarr3"), lambda chunks: {"chunks": chunks}),
}
ZARRS = pytest.mark.parametrize("kind", ["zarr2", "zarr3"])
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
GROUPED = pytest.mark.parametrize("kind", ["netcdf4", "zarr2", "zarr3"])
YXC = ("y", "x", "channel")
PICKLE = {"chunk_shape": [1, 5, 4], "codecs": [{"name": "numcodecs.pickle"}], "index_codecs": []}


def write(folder: Path, kind: str, variables: Variables, name: str = "") -> Path:
    """Write variables, "name" or "group/name", each (dimensions, values, attributes); a chunk is one index of dim 0."""
    path = folder / (name or KINDS[kind])
    groups: dict[str, dict[str, xr.Variable]] = {"": {}}
    for place, (dims, values, attrs) in variables.items():
        group, _, base = place.rpartition("/")
        groups.setdefault(group, {})[base] = xr.Variable(tuple(dims), values, dict(attrs))
    for group, content in groups.items():
        encoding = {
            n: STORED[kind]((1, *v.shape[1:])) | ({} if "_FillValue" in v.attrs else {"_FillValue": None})
            for n, v in content.items()
        }
        options: dict[str, Any] = {"group": group or None, "mode": "a" if group else "w", "encoding": encoding}
        if "zarr" in kind:
            options |= {"zarr_format": int(kind[-1]), "consolidated": False, "write_empty_chunks": True}
            xr.Dataset(content).to_zarr(path, **options)
        else:
            engine = "h5netcdf" if kind == "netcdf4" else "scipy"
            xr.Dataset(content).to_netcdf(path, engine=engine, format=FORMATS[kind], **options)
    return path


def scene_variables(values: np.ndarray | None = None, dims: Sequence[str] = YXC, **attrs: Any) -> dict[str, Any]:
    """A cube with its axes in an order, and wavelengths."""
    values = cube() if values is None else values
    return {
        "cube": (dims, values.transpose([YXC.index(d) for d in dims]), attrs),
        "wavelength": (("channel",), np.array(NM), {"units": "nm"}),
    }


class TestArrays:
    @EVERY_KIND
    def test_scene(self, tmp_path: Path, kind: str) -> None:
        variables = scene_variables(units="W m-2 sr-1 um-1")
        grid = np.arange(NY * NX, dtype=np.float64).reshape(NY, NX)
        variables["latitude"] = (("y", "x"), grid.astype("f4"), {"units": "degrees_north"})
        variables["longitude"] = (("x", "y"), grid.T + 100, {})
        variables["solar_zenith_angle"] = (("y", "x"), grid, {"units": "radian"})  # not what it must be in
        variables["viewing_zenith_angle"] = (("x",), grid[0], {})
        variables["time"] = (("y",), np.arange(NY) * 2.0, {"units": "hours since 2024-01-01"})
        file = write(tmp_path, kind, variables)
        with open_scene(file) as ds:
            np.testing.assert_array_equal(ds.radiance.values, cube())
            assert ds.radiance.attrs["units"] == "W m-2 sr-1 um-1"
            np.testing.assert_array_equal(ds.wavelength.values, NM)
            np.testing.assert_array_equal(ds.latitude.values, grid)
            np.testing.assert_array_equal(ds.longitude.values, grid + 100)
            assert ds.time.values[3] == np.datetime64("2024-01-01T06")
            assert ds.attrs["format"] == ("zarr" if "zarr" in kind else "netcdf")
            angles = {"solar_zenith_angle", "viewing_zenith_angle", "relative_azimuth_angle"}
            assert set(ds.attrs["absent"].split(", ")) == {"pixel_quality_flag"} | angles
        assert open_reader(file).places == {
            "radiance": Place("cube", YXC),
            "wavelength": Place("wavelength", ("channel",)),
            "latitude": Place("latitude", ("y", "x")),
            "longitude": Place("longitude", ("x", "y")),
            "time": Place("time", ("y",)),
        }
        assert "wavelength" not in open_reader(file, wavelength=NM).places
        with open_reader(file, region=[1, 5, 2, 4]) as scene:
            assert str(scene.time) == "2024-01-01 02:00:00+00:00"
            values, counts = scene.read(slice(1, 3), slice(1, 2))
            np.testing.assert_array_equal(values, cube()[2:4, 3:4])
            assert values.flags.c_contiguous
            assert counts == NO_RULE
            assert scene.read(slice(1, 1))[0].shape == (0, 2, NC)
            assert scene.coordinates()["longitude"][1][0, 0] == 107
            np.testing.assert_array_equal(pickle.loads(pickle.dumps(scene)).read(slice(0, 1))[0], cube()[1:2, 2:4])

    @EVERY_KIND
    @pytest.mark.parametrize("dims", list(itertools.permutations(YXC)))
    def test_any_order_of_axes(self, tmp_path: Path, kind: str, dims: tuple[str, ...]) -> None:
        """Where all sizes are equal names must count."""
        values = cube()[:4, :4]
        variables = scene_variables(values, dims) | {"latitude": (("x", "y"), values[..., 0].T, {})}
        file = write(tmp_path, kind, variables)
        with open_scene(file, region=[1, 4, 2, 4]) as ds:
            np.testing.assert_array_equal(ds.radiance.values, values[1:4, 2:4])
            np.testing.assert_array_equal(ds.latitude.values, values[1:4, 2:4, 0])
            np.testing.assert_array_equal(ds.wavelength.values, NM)
        given = {role: dims.index(role) for role in YXC}
        np.testing.assert_array_equal(open_reader(file, dims=given).read(slice(None))[0], values)

    def test_dims(self, tmp_path: Path) -> None:
        file = write(tmp_path, "netcdf4", {"cube": (("u", "v", "band"), cube(), {})})
        refuse(file, "dims", "(u: 6, v: 5, band: 4)", wavelength=NM)
        dims = {"y": "u", "x": "v", "channel": "band"}
        np.testing.assert_array_equal(open_scene(file, dims=dims, wavelength=NM).radiance.values, cube())
        swapped = open_scene(file, dims={"y": "v", "x": 0, "channel": 2}, wavelength=NM)
        np.testing.assert_array_equal(swapped.radiance.values, cube().transpose(1, 0, 2))
        for y in ("w", 3, -1, True):
            refuse(file, "dims.y", "(u: 6, v: 5, band: 4)", wavelength=NM, dims=dims | {"y": y})
        for wrong in ({"y": "u"}, dims | {"y": "v"}):
            refuse(file, "dims", "(u: 6, v: 5, band: 4)", wavelength=NM, dims=wrong)
        for names in ("downtrack crosstrack bands", "lat lon wavelength", "Rows Cols Band"):
            usual = write(tmp_path, "zarr2", {"cube": (names.split(), cube(), {})})
            np.testing.assert_array_equal(open_reader(usual, wavelength=NM).read(slice(None))[0], cube())
        two = write(tmp_path, "zarr3", {"cube": (("y", "rows", "band"), cube(), {})})
        refuse(two, "dims", "(y: 6, rows: 5, band: 4)", wavelength=NM)

    @pytest.mark.parametrize("square", [False, True])
    def test_without_names(self, tmp_path: Path, square: bool) -> None:
        """HDF5 knows arrays whose axes have no names; geometry then stands as in the scene."""
        values = cube()[:5] if square else cube()
        grid = values[..., 0]
        dims = {"y": 1, "x": 2, "channel": 0}
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file["g/cube"] = values.transpose(2, 0, 1)
            file["g/latitude"] = grid
            file["wl"] = np.array(NM)
            file["wl"].attrs["units"] = "nm"
        refuse(tmp_path / "a.h5", "dims", "g/cube (?: 4,")
        with open_scene(tmp_path / "a.h5", dims=dims) as ds:
            np.testing.assert_array_equal(ds.radiance.values, values)
            np.testing.assert_array_equal(ds.latitude.values, grid)
            np.testing.assert_array_equal(ds.wavelength.values, NM)

    @pytest.mark.parametrize("version", [2, 3])
    def test_one_zarr_array(self, tmp_path: Path, version: int) -> None:
        """Zarr gives every array a fill value, 0 mostly, which says nothing about zeros that were written."""
        values = cube()
        values[0, 0, 0] = 0
        zarr.create_array(tmp_path / "a.zarr", data=values, zarr_format=version, fill_value=0)
        with open_reader(tmp_path / "a.zarr", dims=dict(zip(YXC, range(3), strict=True)), wavelength=NM) as scene:
            assert (scene.format, scene.name) == ("zarr", "a")
            assert (len(scene.files()), scene.places) == ({2: 3, 3: 2}[version], {})  # metadata and one chunk
            read, counts = scene.read(slice(None))
        np.testing.assert_array_equal(read, values)
        assert counts == NO_RULE

    @EVERY_KIND
    def test_fills_and_packing(self, tmp_path: Path, kind: str) -> None:
        raw = cube("i2")
        raw[0, 0, 0] = raw[3, 2, 1] = -999
        truth = np.where(raw == -999, np.nan, raw * 0.5 + 10)
        for key in ("_FillValue", "missing_value"):
            attrs = {key: np.int16(-999), "scale_factor": 0.5, "add_offset": 10.0}
            read, counts = open_reader(write(tmp_path, kind, scene_variables(raw, **attrs))).read(slice(None))
            np.testing.assert_array_equal(read, truth)
            assert counts == NO_RULE | {"fill": 2}
        raw = cube("f8")
        raw[0, 0] = (-9999, -1e30, np.nan, np.inf)
        raw[1, 0] = (0, 9.96921e36, 1e39, -9998)
        attrs = {"missing_value": np.array([-9999.0, -9998]), "scale_factor": 0.5, "add_offset": 10.0}
        read, counts = open_reader(write(tmp_path, kind, scene_variables(raw, **attrs))).read(slice(None))
        assert counts == NO_RULE | dict.fromkeys(RULES[:5], 1) | {"fill": 2, "infinite": 2}
        assert read[1, 0, 0] == 10
        np.testing.assert_array_equal(read[2:], raw[2:] * 0.5 + 10)
        for key in ("missing_value", "scale_factor"):
            file = write(tmp_path, kind, scene_variables(**{key: "n/a"}))
            refuse(file, "cube", key, "'n/a'", error=InputError)

    @pytest.mark.parametrize("fill", [np.nan, -9999.0, 0.1])
    @pytest.mark.parametrize("dtype", ["f4", "f8"])
    def test_fill_of_zarr_3_is_encoded(self, tmp_path: Path, fill: float, dtype: str) -> None:
        raw = cube(dtype)
        raw[0, 0, 0] = fill
        file = write(tmp_path, "zarr3", scene_variables(raw, _FillValue=fill))
        assert open_reader(file).read(slice(None))[1] == NO_RULE | {"fill": 1}
        zarr.open_group(file, mode="a", use_consolidated=False)["cube"].attrs["_FillValue"] = "n/a"
        refuse(file, "cube", "_FillValue", "'n/a'", error=InputError)

    def test_units(self, tmp_path: Path) -> None:
        file = write(tmp_path, "netcdf4", scene_variables(units="K"))
        assert open_reader(file, units="K").units == "K"
        refuse(file, "units", "'K'", units="W")
        with h5py.File(file, "r+") as h5:
            h5["cube"].attrs["units"] = h5py.Empty("S1")  # as the netCDF library writes ""
        assert NetcdfScene(file, units="1").units == "1"
        assert NetcdfScene(file).units is None
        unsigned = write(tmp_path, "classic", scene_variables(cube("i2"), _Unsigned="true"))
        refuse(unsigned, "cube", "_Unsigned", error=InputError)

    @GROUPED
    def test_variable(self, tmp_path: Path, kind: str) -> None:
        variables = {
            "a/cube": (YXC, cube(), {}),
            "b/cube": (YXC, cube() + 1, {}),
            "b/other": (YXC, cube() + 2, {}),
            "flat": (("y", "x"), cube()[..., 0], {}),
        }
        file = write(tmp_path, kind, variables)
        for name, more in (("a/cube", 0), ("/b/cube", 1), ("other", 2)):
            values, _ = open_reader(file, variable=name, wavelength=NM).read(slice(None))
            np.testing.assert_array_equal(values, cube() + more)
        with refused(InputError, "a/cube (y: 6, x: 5, channel: 4)", key="variable", path=file) as caught:
            open_reader(file)
        assert "flat" not in str(caught.value)
        for name, word in (("cube", "several"), ("none", "b/other"), ("flat", "flat (y: 6, x: 5)")):
            refuse(file, "variable", word, variable=name)

    def test_no_or_empty_variable(self, tmp_path: Path) -> None:
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file["z"] = cube().astype(complex)
            file["t"] = np.full((2, 2, 2), "a", dtype="S1")
        refuse(tmp_path / "a.h5", "variable", "z (?: 6", error=InputError)
        with h5py.File(tmp_path / "a.h5", "a") as file:
            file["cube"] = np.ones((0, 5, 4))
        given = {"dims": dict(zip(YXC, range(3), strict=True)), "wavelength": NM}
        refuse(tmp_path / "a.h5", None, "(0, 5, 4)", error=InputError, **given)


class TestWavelengthsOfArrays:
    @EVERY_KIND
    def test_found(self, tmp_path: Path, kind: str) -> None:
        variables = scene_variables()
        for units, factor in (("nm", 1), ("nanometers", 1), ("um", 1000), ("Micrometers", 1000)):
            variables["wavelength"] = (("channel",), np.array(NM) / factor, {"units": units})
            with open_reader(write(tmp_path, kind, variables)) as scene:
                np.testing.assert_allclose(scene.wavelength, NM, rtol=1e-12)
        values = np.array(NM) + np.arange(NX)[:, None]
        values[1, 1] = -999
        variables["wavelength"] = (("channel", "x"), values.T, {"units": "nm", "_FillValue": -999.0})
        with open_reader(write(tmp_path, kind, variables), region=[0, 6, 1, 4]) as scene:
            np.testing.assert_array_equal(scene.wavelength, np.where(values == -999, np.nan, values)[1:4])
        variables = {"cube": (("y", "x", "band"), cube(), {}), "band": (("band",), np.array(NM), {"units": "nm"})}
        np.testing.assert_array_equal(open_reader(write(tmp_path, kind, variables)).wavelength, NM)

    @GROUPED
    def test_groups(self, tmp_path: Path, kind: str) -> None:
        """Those of the scene's own group come first."""
        variables = scene_variables()
        other = variables | {"other/wavelength": (("channel",), np.array(NM) + 1, {"units": "nm"})}
        np.testing.assert_array_equal(open_reader(write(tmp_path, kind, other)).wavelength, NM)
        variables["sensor/wavelengths"] = variables.pop("wavelength")
        np.testing.assert_array_equal(open_reader(write(tmp_path, kind, variables)).wavelength, NM)

    @pytest.mark.parametrize(
        ("changed", "word", "error"),
        [
            ({"wavelength": (("channel",), NM, {"units": "cm-1"})}, "cm-1", InputError),
            ({"wavelength": (("channel",), NM, {})}, "missing", InputError),
            ({"wl": (("channel",), NM, {"units": "nm"})}, "wl (channel: 4)", InputError),
            # of as many, by chance, and numbers of bands
            ({"cube": (("y", "x", "b"), cube(), {}), "b": (("b",), NM, {})}, "4 channels", InputError),
            ({"wavelength": (("x", "channel"), [NM[::-1]] * NX, {"units": "nm"})}, "increasing", InputError),
            ({"wavelength": (("channel",), NM[::-1], {"units": "nm"})}, "3 of 3", ConfigError),
        ],
    )
    def test_refused(self, tmp_path: Path, changed: Any, word: str, error: type[UserError]) -> None:
        dims = {"y": 0, "x": 1, "channel": 2}
        file = write(tmp_path, "netcdf4", scene_variables() | changed)
        refuse(file, "wavelength", word, error=error, dims=dims)
        np.testing.assert_array_equal(open_reader(file, wavelength=GIVEN, dims=dims).wavelength, NM)


def chunk_file(path: Path, row: int) -> Path:
    """Where a Zarr array of a written file keeps a row."""
    return path / (f"cube/c/{row}/0/0" if (path / "zarr.json").is_file() else f"cube/{row}.0.0")


def overwrite_chunk(path: Path, name: str, *start: int) -> None:
    """Spoil the chunk of an HDF5 variable that begins at an index."""
    with h5py.File(path) as h5:
        chunk = h5[name].id.get_chunk_info_by_coord(start)
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(b"\xff" * chunk.size)


class TestDamagedArrays:
    def test_classic(self, tmp_path: Path) -> None:
        """3 GB, nearly all of it a hole."""
        records = 10**6
        with scipy.io.netcdf_file(str(tmp_path / "a.nc"), "w", version=2) as file:
            for dim, size in zip(YXC, (None, 50, 16), strict=True):
                file.createDimension(dim, size)
            file.createVariable("cube", "f4", YXC)[:] = np.ones((1, 50, 16), np.float32)
        with (tmp_path / "a.nc").open("r+b") as raw:
            start = raw.seek(0, os.SEEK_END)
            raw.seek(4)
            raw.write(struct.pack(">i", records))
        os.truncate(tmp_path / "a.nc", start + (records - 1) * 50 * 16 * 4)
        with open_reader(tmp_path / "a.nc", wavelength=GIVEN) as scene:
            assert scene.shape == (records, 50, 16)
            assert scene.read(slice(0, 1))[0].all()
            assert not scene.read(slice(records - 2, records))[0].any()

    @pytest.mark.parametrize("kind", ["classic", "offset64"])
    def test_damaged_classic(self, tmp_path: Path, kind: str) -> None:
        file = write(tmp_path, kind, scene_variables())
        for part in (0.99, 0.6, 0.3, 0.5):
            os.truncate(file, int(part * file.stat().st_size))
            refuse(file, None, "truncated", error=InputError)
        file.write_bytes(b"CDF\5" + bytes(100))
        refuse(file, None, "CDF-5", "nccopy", error=InputError)

    @ZARRS
    def test_damaged_chunks(self, tmp_path: Path, kind: str) -> None:
        """zarr itself reads a chunk that is missing as zeros; the size in a header is not to be believed."""
        file = write(tmp_path, kind, scene_variables())
        chunk, elsewhere = chunk_file(file, 2), tmp_path / "elsewhere"
        chunk.rename(elsewhere)
        refuse(file, "cube", "1 of 6", error=InputError)
        for replace in (lambda: chunk.symlink_to(elsewhere), lambda: os.mkfifo(chunk)):
            replace()
            refuse(file, None, "link", error=InputError, at=chunk)
            chunk.unlink()
        content = elsewhere.read_bytes()
        chunk.write_bytes(content[:4] + b"\xff" * 4 + content[8:])
        with open_reader(file) as scene, refused(InputError, path=file):
            scene.read(slice(2, 3))

    @pytest.mark.parametrize(
        ("kind", "change", "word"),
        [
            ("zarr2", {"chunks": [0, 5, 4]}, ""),
            ("zarr3", {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 5, 4]}}}, ""),
            ("zarr2", {"shape": [6, 5], "filters": 5}, ""),
            ("zarr3", {"shape": [6, 5]}, ""),
            ("zarr3", {"codecs": 5}, ""),
            ("zarr2", {"filters": [{"id": "pickle", "protocol": 5}]}, "'pickle'"),  # would run programs
            ("zarr2", {"dtype": "|O"}, "'|O'"),
            ("zarr3", {"codecs": [{"name": "sharding_indexed", "configuration": PICKLE}]}, "'numcodecs.pickle'"),
        ],
    )
    def test_damaged_and_hostile_metadata(self, tmp_path: Path, kind: str, change: Any, word: str) -> None:
        file = write(tmp_path, kind, scene_variables())
        metadata = file / "cube" / ("zarr.json" if kind == "zarr3" else ".zarray")
        changed = json.dumps(json.loads(metadata.read_text()) | change)
        where = {"path": metadata} if word else {}
        for content, words, parts in ((changed, [word], where), ("{", [], {}), ("[1]", [], {})):
            metadata.write_text(content)
            with refused(InputError, "a.zarr", *words, **parts):
                open_reader(file)

    def test_shards_and_large_chunks(self, tmp_path: Path) -> None:
        """A chunk that a shard lacks reads as the fill value, 0 by default: as data."""
        options: dict[str, Any] = {"name": "cube", "dtype": "f4", "dimension_names": YXC}
        path = tmp_path / "a.zarr"
        array = zarr.create_array(path, shape=cube().shape, chunks=(1, 5, 4), shards=(2, 5, 4), **options)
        array[::2] = cube()[::2]
        refuse(path, "cube", "sharded", error=InputError, wavelength=NM)
        shape = (1000, 1000, 1000)
        zarr.create_array(tmp_path / "b.zarr", shape=shape, chunks=shape, **options)
        refuse(tmp_path / "b.zarr", "cube", "4000000000", error=InputError, wavelength={"first": 400, "last": 900})


class TestContainers:
    @EVERY_KIND
    def test_attributes_and_groups(self, tmp_path: Path, kind: str) -> None:
        given = {"units": "W", "number": np.float64(2.5), "vector": np.int32([1, 2]), "_FillValue": np.float32(-1)}
        inside = "" if kind in ("classic", "offset64") else "a/b/"
        path = write(tmp_path, kind, {inside + name: of for name, of in scene_variables(cube(), **given).items()})
        with closing(open_container(path)) as container:
            found = container.attributes(f"{inside}cube")
            assert found.keys() == given.keys()
            for key in given.keys() - {"units"}:
                np.testing.assert_array_equal(np.ravel(found[key]), given[key])
            assert text(found["units"]) == "W"
            assert container.attributes("") == container.attributes(inside.strip("/")) == {}
            assert container.groups() == (["a", "a/b"] if inside else [])
            homes = {variable.name: variable.homes for variable in container.variables()}
        assert homes[f"{inside}cube"] == (f"{inside}y", f"{inside}x", f"{inside}channel")

    def test_hdf5_alone(self, tmp_path: Path) -> None:
        """Attributes that mean nothing in another file, and what was never written: only a scalar need not be."""
        path = tmp_path / "a.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("vector", (2,), "i4").make_scale("v")
            file.create_dataset("scalar", (), "i4")
            file.attrs.update(empty=h5py.Empty("S1"), texts=["a", "b"], compound=np.zeros(1, [("a", "f4")]))
            file.attrs["reference"] = file.ref
        with closing(open_container(path)) as container:
            assert container.attributes("").keys() == {"empty", "texts"}
            assert container.attributes("vector") == {}
            container.check("scalar")
            with refused(InputError, "8 bytes", key="vector", path=path):
                container.check("vector")

    def test_coordinates_with_two_dimensions(self, tmp_path: Path) -> None:
        with h5netcdf.File(tmp_path / "a.nc", "w") as file:
            file.dimensions = {"name": 2, "length": 3}
            file.create_variable("name", ("name", "length"), "S1", data=np.array([list("abc"), list("xyz")], "S1"))
        with closing(open_container(tmp_path / "a.nc")) as container:
            (variable,) = container.variables()
            assert (variable.name, variable.homes) == ("name", ("name", "length"))
            assert container.read("name", (slice(1, 2), slice(None))).tolist() == [[b"x", b"y", b"z"]]

    @pytest.mark.parametrize("kind", ["netcdf4", "zarr3"])
    def test_texts(self, tmp_path: Path, kind: str) -> None:
        """Beside a scene, which is read."""
        path = write(tmp_path, kind, scene_variables())
        texts = {"v": ("n", np.array(["a", "", "ü"], dtype=object)), "s": ((), "one")}
        if kind == "netcdf4":
            xr.Dataset(texts).to_netcdf(path, mode="a", engine="h5netcdf")
        else:
            options = {"dtype": str, "config": {"write_empty_chunks": True}}
            zarr.create_array(path, name="v", shape=(3,), **options)[...] = texts["v"][1]
            zarr.create_array(path, name="s", shape=(), **options)[...] = "one"
        with open_reader(path) as scene:
            np.testing.assert_array_equal(scene.read(slice(1, 5))[0], cube()[1:5])
        with closing(open_container(path)) as container:
            container.check("v")
            assert container.read("v", (slice(1, 3),)).tolist() == ["", "ü"]
            assert container.read("v", (slice(0, 1),)).dtype == object
            assert container.read("s", ()).item() == "one"


# --- legacy tiles ---------------------------------------------------------------------------------

N, H, W = 5, 4, 3


def legacy_folder(folder: Path, radiance: np.ndarray, *, healthy: bool, files: int = 1) -> Path:
    """Write (N, H, W, NC) radiance with fills of -1e30 as the original did, which knew no mask.

    healthy: the statistics are those of the valid samples; else, as really happened, of all, fills as 1.
    """
    folder.mkdir()
    logs = torch.from_numpy(radiance).float().clamp(min=1.0).log()
    used = torch.where(torch.from_numpy(radiance < 0), torch.nan, logs) if healthy else logs
    samples = used.reshape(-1, NC)
    mean = samples.nanmean(0)
    std = (samples - mean).square().nanmean(0).sqrt()
    torch.save(mean, folder / "mean_spectrum.pt")
    torch.save(std, folder / "std_spectrum.pt")
    z = ((logs - mean) / (std + 1e-8)).clamp(-10, 10)
    for i, part in enumerate(z.chunk(files)):
        torch.save(part.clone(), folder / f"{i:05d}.pt")
    return folder


def save_tiles(folder: Path, tiles: Any, mean: Any = None, std: Any = None) -> Path:
    """Write one tile file and its spectra, by default of ones."""
    ones = torch.ones(NC)
    for name, values in (("00000", tiles), ("mean_spectrum", mean), ("std_spectrum", std)):
        torch.save(ones if values is None else values, folder / f"{name}.pt")
    return folder / "00000.pt"


@pytest.fixture
def radiance() -> np.ndarray:
    """(N, H, W, NC), 2.3 % of it fill in whole pixels."""
    rng = np.random.default_rng(5)
    values = (1e12 * rng.lognormal(0, 0.4, (N, H, W, NC)) * (1 + np.arange(NC))).astype(np.float32)
    values[1, 2, 1] = values[3, 0] = -1e30
    return values


class TestTiles:
    @pytest.mark.parametrize("healthy", [False, True])
    def test_radiance_comes_back(self, tmp_path: Path, radiance: np.ndarray, healthy: bool) -> None:
        folder = legacy_folder(tmp_path / "old", radiance, healthy=healthy)
        truth = np.where(radiance < 0, np.nan, radiance).reshape(N * H, W, NC)
        with open_reader(folder / "00000.pt", wavelength=NM, units="photons") as scene:
            assert (scene.format, scene.shape, scene.stack) == ("tiles", (N * H, W, NC), H)
            assert (scene.name, scene.units, scene.chunk) == ("00000", "photons", (H, W))
            assert [file.name for file in scene.files()] == ["00000.pt", "mean_spectrum.pt", "std_spectrum.pt"]
            values, counts = scene.read(slice(None))
            assert str(folder / "00000.pt") in Path("/proc/self/maps").read_text()  # not loaded
            # log of 3e12 in float32 has steps of 2e-6
            np.testing.assert_allclose(values, truth, rtol=5e-6)
            rule = "ambiguous" if healthy else "fill"
            assert counts == NO_RULE | {rule: int(np.isnan(truth).sum())}
            np.testing.assert_array_equal(scene.read(slice(3, 9), slice(1, 3))[0], values[3:9, 1:3])
            assert scene.read(slice(3, 3))[0].shape == (0, W, NC)
            assert len(scene.notes) == healthy and all(" 0-3" in note for note in scene.notes)
            np.testing.assert_array_equal(pickle.loads(pickle.dumps(scene)).read(slice(0, 1))[0], values[:1])
        with open_scene(folder / "00000.pt", wavelength=NM, region=[4, 12, 0, 2]) as ds:
            np.testing.assert_array_equal(ds.radiance.values, values[4:12, :2])

    def test_ambiguity_by_channel(self, tmp_path: Path) -> None:
        """Channels 1 and 3 reach the clip; in them, what lies at -10 may be either, what lies at 10 is no fill."""
        mean, std = np.array([20.0, 20, 30, 30]), np.array([4.0, 1, 4, 2])
        z = np.zeros((1, 2, 2, NC), np.float32)
        z[0, 0, 0] = -10
        z[0, 1, 1] = 10
        z[0, 1, 0, 0] = np.nan
        z[0, 0, 1] = (-mean / (std + 1e-8)).clip(-10, 10)
        file = save_tiles(tmp_path, *map(torch.from_numpy, (z, mean, std)))
        with open_reader(file, wavelength=NM) as scene:
            values, counts = scene.read(slice(None))
            assert " 1, 3" in scene.notes[0]
        assert counts == NO_RULE | {"fill": 2, "ambiguous": 4, "nan": 1}
        np.testing.assert_array_equal(np.isnan(values[0, 0]), [False, True, False, True])
        assert np.isnan(values[0, 1]).all()
        np.testing.assert_allclose(values[1, 1], np.exp(10 * (std + 1e-8) + mean), rtol=1e-6)
        np.testing.assert_allclose(values[0, 0, ::2], np.exp(-10 * (std + 1e-8) + mean)[::2], rtol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_fills_are_found_whatever_the_rounding(self, tmp_path: Path, dtype: torch.dtype) -> None:
        """Whether the original computed in float32 or float64: every fill, and nothing but fills."""
        nc = 2000
        rng = np.random.default_rng(7)
        mean, std = (torch.from_numpy(rng.uniform(*limits, nc)).to(dtype) for limits in ((20, 30), (3.1, 6)))
        radiance = torch.from_numpy(rng.lognormal(np.asarray(mean), 0.4, (1, 8, 8, nc))).clamp(min=2.0)
        radiance[0, :4] = 1.0
        radiance[0, 4] = 1.001
        z = ((radiance.to(dtype).log() - mean) / (std + 1e-8)).clamp(-10, 10).float()
        file = save_tiles(tmp_path, z, mean.float(), std.float())
        values, counts = open_reader(file, wavelength=GIVEN).read(slice(None))
        assert counts == NO_RULE | {"fill": 4 * 8 * nc}
        np.testing.assert_array_equal(np.isnan(values), radiance[0].numpy() == 1)

    @pytest.mark.parametrize("name", ["mean_spectrum.pt", "std_spectrum.pt"])
    def test_spectra(self, tmp_path: Path, name: str) -> None:
        file, spectrum = save_tiles(tmp_path, torch.zeros(1, 2, 2, NC), std=-torch.ones(NC)), tmp_path / name
        refuse(file, None, "negative", error=InputError, at=tmp_path / "std_spectrum.pt", wavelength=NM)
        for values, words in ((torch.ones(NC + 1), ("5 channels", "00000.pt")), (torch.full((NC,), torch.nan), ())):
            torch.save(values, spectrum)
            with refused(InputError, name, *words):
                open_reader(file, wavelength=NM)
        spectrum.unlink()
        refuse(file, None, name, error=InputError, wavelength=NM)

    @pytest.mark.parametrize(
        ("content", "word"),
        [
            (torch.zeros(2, 3, 4), "[2, 3, 4]"),
            (torch.zeros(0, 2, 2, NC), "[0, 2, 2, 4]"),
            (torch.zeros(1, 2, 2, NC, dtype=torch.float64), "float64"),
            (torch.zeros(1, NC, 2, 2).permute(0, 2, 3, 1), "contiguous"),
            (torch.zeros(1).expand(99, 99, 99, NC), "larger"),
            ({"z": torch.zeros(1, 2, 2, NC)}, "dict"),
            (Path("a"), "pickle"),
        ],
    )
    def test_other_content(self, tmp_path: Path, content: Any, word: str) -> None:
        with refused(InputError, "00000.pt", word):
            open_reader(save_tiles(tmp_path, content), wavelength=NM)

    def test_refused(self, tmp_path: Path, radiance: np.ndarray) -> None:
        folder = legacy_folder(tmp_path / "old", radiance, healthy=False)
        file = folder / "00000.pt"
        refuse(folder, None, "1 tile", f"{folder}/[0-9]*.pt", error=InputError, wavelength=NM)
        refuse(file, "wavelength", "4 channels", error=InputError)
        refuse(file, "region", "multiples of 4", wavelength=NM, region=[0, 6, 0, 3])
        (tmp_path / "new").mkdir()
        beyond = save_tiles(tmp_path / "new", torch.full((1, 2, 2, NC), 11.0))
        with open_reader(beyond, wavelength=NM) as scene, refused(InputError, "11", path=beyond):
            scene.read(slice(0, 1))
        for cut in (10, 190, 700):
            os.truncate(file, file.stat().st_size - cut)
            with refused(InputError, "00000.pt"):
                open_reader(file, wavelength=NM)
        torch.save(torch.zeros(1, 2, 2, NC), file, _use_new_zipfile_serialization=False)
        with refused(InputError, "00000.pt", "1.6"):
            open_reader(file, wavelength=NM)
        with file.open("wb") as other:
            np.savez(other, a=cube())
        refuse(file, None, "unknown format", error=InputError, wavelength=NM)


# --- through prepare ------------------------------------------------------------------------------


def test_prepare(tmp_path: Path) -> None:
    """A scene with a fill, given by config: the store holds (value - mean) / std of the valid samples."""
    values = cube()
    values[1, 2, 3] = -9999
    path = write(tmp_path, "netcdf4", {"cube": (("u", "v", "w"), values, {"_FillValue": np.float32(-9999)})})
    spec: dict[str, Any] = {"wavelength": GIVEN, "units": "1", "variable": "cube"}
    spec["dims"] = {"y": "u", "x": "v", "channel": 2}
    settings = {"normalization": {"transform": "zscore"}, "split": {"val_fraction": 0}, "dtype": "float32"}
    store = run_prepare(tmp_path / "store", [{"path": str(path), **spec}], **settings)
    truth = np.where(values == -9999, np.nan, values).astype(np.float64)
    mean, std = np.nanmean(truth, axis=(0, 1)), np.nanstd(truth, axis=(0, 1))
    np.testing.assert_allclose(z_of(store, "a"), (truth - mean) / (std + 1e-8), rtol=1e-5)
    np.testing.assert_array_equal(store.normalization.wavelength, NM)
    assert store.normalization.units == "1"
    assert store.scenes[0].invalid["fill"] == 1


def test_prepare_takes_a_folder_of_tiles(tmp_path: Path, radiance: np.ndarray) -> None:
    """The store holds z of the valid samples' own statistics, not the old ones that fills had spoiled."""
    folder = legacy_folder(tmp_path / "old", radiance, healthy=False, files=3)
    spec = {"path": str(folder), "wavelength": GIVEN, "units": "photons/s/cm^2/nm/sr"}
    store = run_prepare(tmp_path / "store", [spec], split={"val_fraction": 0}, dtype="float32")
    logs = np.log(np.where(radiance < 0, np.nan, radiance).astype(np.float64))
    mean, std = (statistic(logs, axis=(0, 1, 2)) for statistic in (np.nanmean, np.nanstd))
    np.testing.assert_allclose(store.normalization.std, std, rtol=1e-5)
    z = np.concatenate([z_of(store, f"0000{i}") for i in range(3)])
    np.testing.assert_allclose(z, ((logs - mean) / (std + 1e-8)).reshape(-1, W, NC), rtol=1e-4, atol=1e-4)
    assert sum(scene.invalid["fill"] for scene in store.scenes) == int(np.isnan(logs).sum())
    assert {scene.stack for scene in store.scenes} == {H}


def test_prepare_config(tmp_path: Path) -> None:
    for dims in ({"y": "a"}, {"y": 0, "x": 1, "channel": 2, "z": 3}, {"y": 0.5, "x": 1, "channel": 2}):
        with pytest.raises(ValueError, match="dims"):
            PrepareConfig.model_validate({"output_dir": "a", "inputs": [{"path": "b", "dims": dims}]})
