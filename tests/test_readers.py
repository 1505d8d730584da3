"""Readers: values against numpy truth, every rule of validity, laziness, and what is refused."""

from __future__ import annotations

import datetime as dt
import gc
import os
import pickle
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5netcdf
import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse

from spectralvae.errors import ConfigError, InputError, UserError
from spectralvae.readers import RULES, Scene, open_reader
from spectralvae.readers import tempo as tempo_module
from spectralvae.readers.base import Place
from spectralvae.readers.dataset import open_scene

NY, NX, NC = 6, 5, 4
NAME = "TEMPO_RAD_L1_V03_20240601T210934Z_S012G01.nc"
UV, VIS = "band_290_490_nm", "band_540_740_nm"
DIMS = ("mirror_step", "xtrack", "spectral_channel")
GEOMETRY = ("latitude", "longitude", "solar_zenith_angle", "viewing_zenith_angle", "relative_azimuth_angle")
REAL = Path(os.environ.get("SPECTRALVAE_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
NM = {"first": 400, "last": 700}


def cube() -> np.ndarray:
    return (1e12 * (1 + np.arange(NY * NX * NC))).reshape(NY, NX, NC).astype(np.float32)


def noise() -> np.ndarray:
    return np.sqrt(cube())


def flags(value: int = 0) -> np.ndarray:
    return np.full((NY, NX, NC), value, dtype=np.uint16)


def wavelengths() -> np.ndarray:
    return (300 + np.arange(NX)[:, None] * 0.01 + np.arange(NC) * 0.2).astype(np.float32)


def geometry() -> dict[str, np.ndarray]:
    grid = np.arange(NY * NX, dtype=np.float32).reshape(NY, NX)
    return {name: grid + 100 * i for i, name in enumerate(GEOMETRY)}


def put(group: Any, name: str, values: np.ndarray, dims: Sequence[str], order: Sequence[str], **attrs: Any) -> None:
    """Write a variable whose dimensions stand as in `order`."""
    dims_here = [d for d in order if d in dims]
    values = values.transpose([list(dims).index(d) for d in dims_here])
    chunks = tuple(1 if d == "mirror_step" else n for d, n in zip(dims_here, values.shape, strict=True))
    variable = group.create_variable(name, tuple(dims_here), values.dtype, chunks=chunks, compression="gzip")
    variable[...] = values
    for key, value in attrs.items():
        variable.attrs[key] = value


def granule(
    path: Path,
    *,
    radiance: np.ndarray | None = None,
    flag: np.ndarray | None = None,
    wavelength: np.ndarray | None = None,
    bands: Sequence[str] = (UV,),
    without: Sequence[str] = (),
    order: Sequence[str] = DIMS,
    attrs: dict[str, dict[str, Any]] | None = None,
    replace: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write a small granule; the second band holds ten times the first's radiance."""
    attrs, replace = attrs or {}, replace or {}
    with h5netcdf.File(path, "w") as file:
        file.dimensions = {"mirror_step": NY, "xtrack": NX}
        if "time" not in without:
            time = replace.get("time", 1.4e9 + np.arange(NY) * 2.5)
            time_attrs = attrs.get("time", {"units": "seconds since 1980-01-06T00:00:00Z"})
            put(file, "time", time, DIMS[:1], order, **time_attrs)
        for i, band in enumerate(bands):
            group = file.create_group(band)
            group.dimensions = {"spectral_channel": NC}
            variables: dict[str, tuple[np.ndarray, tuple[str, ...]]] = {
                "radiance": ((cube() if radiance is None else radiance) * 10**i, DIMS),
                "nominal_wavelength": (wavelengths() if wavelength is None else wavelength, DIMS[1:]),
                "pixel_quality_flag": (flags() if flag is None else flag, DIMS),
                "radiance_error": (noise(), DIMS),
                **{name: (values, DIMS[:2]) for name, values in geometry().items()},
            }
            for name, (values, dims) in variables.items():
                if name not in without:
                    values = replace.get(name, values)
                    put(group, name, values, dims[-values.ndim :], order, **attrs.get(name, {}))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return granule(tmp_path / NAME, attrs={"radiance": {"units": "photons/s/cm^2/nm/sr"}})


def refused(error: type[UserError], *words: str, call: Any = open_reader, **arguments: Any) -> str:
    """Check that a call is refused in one line that holds all words; return it."""
    with pytest.raises(error) as caught:
        call(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    for word in (*words, str(arguments["path"])):
        assert word in message, f"{word!r} not in: {message}"
    return message


class TestTempo:
    def test_scene(self, file: Path) -> None:
        with open_reader(file) as scene:
            assert (scene.format, scene.band, scene.region) == ("tempo", UV, None)
            assert scene.name == "TEMPO_RAD_L1_V03_20240601T210934Z_S012G01"
            assert scene.shape == (NY, NX, NC)
            assert scene.units == "photons/s/cm^2/nm/sr"
            assert scene.time == dt.datetime(2024, 6, 1, 21, 9, 34, tzinfo=dt.UTC)
            assert scene.absent == ()
            np.testing.assert_array_equal(scene.wavelength, wavelengths().astype(np.float64))
            assert scene.wavelength.dtype == np.float64
            values, counts = scene.read(slice(1, 3))
            np.testing.assert_array_equal(values, cube()[1:3])
            assert values.dtype == np.float32
            assert values.flags.c_contiguous
            assert counts == dict.fromkeys(RULES, 0)
            np.testing.assert_array_equal(scene.read_noise(slice(1, 3)), noise()[1:3])
            coordinates = scene.coordinates()
            assert set(coordinates) == {*GEOMETRY, "time"}
            for name, truth in geometry().items():
                assert coordinates[name][0] == ("y", "x")
                np.testing.assert_array_equal(coordinates[name][1], truth)

    def test_dataset(self, file: Path) -> None:
        with open_scene(file) as ds:
            assert ds.radiance.dims == ("y", "x", "channel")
            assert ds.radiance.dtype == np.float32
            assert ds.radiance.attrs == {"long_name": "radiance", "units": "photons/s/cm^2/nm/sr"}
            np.testing.assert_array_equal(ds.radiance.values, cube())
            assert ds.wavelength.dims == ("x", "channel")
            assert ds.wavelength.attrs["units"] == "nm"
            assert ds.time.dims == ("y",)
            seconds = np.round((1.4e9 + np.arange(NY) * 2.5) * 1e3).astype("timedelta64[ms]")
            np.testing.assert_array_equal(ds.time.values, np.datetime64("1980-01-06") + seconds)
            np.testing.assert_array_equal(ds.solar_zenith_angle.values, geometry()["solar_zenith_angle"])
            assert ds.attrs == {"source": NAME, "format": "tempo", "band": UV, "absent": ""}

    @pytest.mark.parametrize(
        "key",
        [
            np.s_[2:4],
            np.s_[5],
            np.s_[:, 3, 2],
            np.s_[::-2, ::-1, 1:3],
            np.s_[1:6:2, [0, 4]],
            np.s_[[4, 0, 0]],
            np.s_[3:3],
            np.s_[-1, -1, -1],
        ],
    )
    @pytest.mark.parametrize("block", [1, 2**24])
    def test_any_index(self, file: Path, key: Any, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("spectralvae.readers.dataset._BLOCK_SAMPLES", block)
        with open_scene(file) as ds:
            np.testing.assert_array_equal(ds.radiance[key].values, cube()[key])

    def test_reads_only_the_rows_that_are_used(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        read: list[slice] = []
        slab = tempo_module.slab

        def watched(variable: Any, dims: Any, window: Any) -> np.ndarray:
            values = slab(variable, dims, window)
            if "spectral_channel" in dims and "mirror_step" in dims:
                read.append(slice(*window[:2]))
                assert values.nbytes == variable.dtype.itemsize * (window[1] - window[0]) * NX * NC
            return values

        monkeypatch.setattr(tempo_module, "slab", watched)
        with open_scene(file) as ds:
            assert read == []
            _ = ds.radiance[2:4].values
        assert read == [slice(2, 4)] * 2  # radiance and flag

    def test_damaged_rows_harm_only_themselves(self, file: Path) -> None:
        """The surest proof of laziness: with one row's chunk overwritten, the other rows are still read."""
        overwrite_chunk(file, f"{UV}/radiance", row=4)
        scene = open_reader(file)
        np.testing.assert_array_equal(scene.read(slice(0, 4))[0], cube()[:4])
        with pytest.raises(InputError, match="damaged"):
            scene.read(slice(4, 5))
        with open_scene(file) as ds:
            np.testing.assert_array_equal(ds.radiance[5:].values, cube()[5:])
            with pytest.raises(InputError, match=NAME):
                ds.radiance.load()

    @pytest.mark.parametrize("order", [DIMS[::-1], (DIMS[2], DIMS[0], DIMS[1]), (DIMS[1], DIMS[0], DIMS[2])])
    def test_dimensions_in_any_order(self, tmp_path: Path, order: Sequence[str]) -> None:
        flag = flags()
        flag[1, 2, 3] = 1
        with open_reader(granule(tmp_path / NAME, order=order, flag=flag), region=[1, 4, 2, 5]) as scene:
            values, counts = scene.read(slice(None))
            truth = cube()
            truth[1, 2, 3] = np.nan
            np.testing.assert_array_equal(values, truth[1:4, 2:5])
            assert counts["flagged"] == 1
            assert values.flags.c_contiguous
            np.testing.assert_array_equal(scene.wavelength, wavelengths()[2:5])
            np.testing.assert_array_equal(scene.coordinates()["latitude"][1], geometry()["latitude"][1:4, 2:5])

    def test_region(self, file: Path) -> None:
        with open_scene(file, region=[1, 4, 2, 5]) as ds:
            assert ds.sizes == {"y": 3, "x": 3, "channel": NC}
            np.testing.assert_array_equal(ds.radiance.values, cube()[1:4, 2:5])
            np.testing.assert_array_equal(ds.wavelength.values, wavelengths()[2:5])
            np.testing.assert_array_equal(ds.longitude.values, geometry()["longitude"][1:4, 2:5])
            assert ds.sizes["y"] == ds.time.size
            assert ds.attrs["region"] == [1, 4, 2, 5]
        scene = open_reader(file, region=np.array([1, 4, 2, 5]))
        assert scene.name.endswith("G01_y1-4_x2-5")
        assert scene.region == (1, 4, 2, 5)
        np.testing.assert_array_equal(scene.read(slice(1, 2))[0], cube()[2:3, 2:5])
        assert scene.read(slice(2, 1))[0].shape == (0, 3, NC)

    @pytest.mark.parametrize(
        "region", [[0, 7, 0, 5], [0, 6, 0, 6], [3, 3, 0, 5], [-1, 3, 0, 5], [0, 1, 2], "0123", [0, 1.5, 0, 1], 3]
    )
    def test_region_refused(self, file: Path, region: Any) -> None:
        refused(ConfigError, "region", str(region), path=file, region=region)

    def test_both_bands(self, tmp_path: Path) -> None:
        file = granule(tmp_path / NAME, bands=(UV, VIS))
        assert open_reader(file).band == UV
        np.testing.assert_array_equal(open_scene(file, band=VIS).radiance.values, cube() * 10)
        refused(ConfigError, "'band_1_2_nm'", UV, VIS, path=file, band="band_1_2_nm")
        assert open_reader(granule(tmp_path / "one.nc", bands=(VIS,))).band == VIS
        others = granule(tmp_path / "others.nc", bands=("band_1_2_nm", VIS))
        refused(ConfigError, "band: band_1_2_nm, band_540_740_nm", path=others)

    def test_wavelength_by_channel_and_fill(self, tmp_path: Path) -> None:
        values = np.array([300.0, -1e30, 302.0, -999.0])
        attrs = {"nominal_wavelength": {"_FillValue": -999.0, "units": "nm"}}
        with open_scene(granule(tmp_path / NAME, wavelength=values, attrs=attrs)) as ds:
            assert ds.wavelength.dims == ("channel",)
            np.testing.assert_array_equal(ds.wavelength.values, [300, np.nan, 302, np.nan])

    def test_geometry_is_unpacked_and_masked(self, tmp_path: Path) -> None:
        packed = np.arange(NY * NX, dtype=np.int16).reshape(NY, NX)
        latitude = geometry()["latitude"]
        latitude[0, 0], latitude[0, 1], latitude[0, 2] = -1e30, np.nan, np.inf
        file = granule(
            tmp_path / NAME,
            replace={"solar_zenith_angle": packed, "latitude": latitude, "time": np.array([-1e30, *range(5)])},
            attrs={
                "solar_zenith_angle": {"_FillValue": np.int16(3), "scale_factor": 0.5, "add_offset": 10.0},
                "time": {"units": "hours since 2024-01-01 00:00:00"},
            },
        )
        with open_scene(file) as ds:
            truth = packed * 0.5 + 10
            truth[0, 3] = np.nan
            np.testing.assert_array_equal(ds.solar_zenith_angle.values, truth)
            assert np.isnan(ds.latitude.values[0, :3]).all()
            np.testing.assert_array_equal(ds.latitude.values[0, 3:], [3, 4])
            assert np.isnat(ds.time.values[0])
            assert ds.time.values[2] == np.datetime64("2024-01-01T01")

    def test_packed_radiance_is_unpacked(self, tmp_path: Path) -> None:
        packed = np.arange(NY * NX * NC, dtype=np.int16).reshape(NY, NX, NC)
        attrs = {"radiance": {"_FillValue": np.int16(7), "scale_factor": 2.0}}
        values, counts = open_reader(granule(tmp_path / NAME, radiance=packed, attrs=attrs)).read(slice(None))
        truth = packed * np.float32(2)
        truth.ravel()[7] = np.nan
        np.testing.assert_array_equal(values, truth)
        assert counts["fill"] == 1

    def test_undeclared_fill_is_known_before_unpacking(self, tmp_path: Path) -> None:
        radiance, latitude = cube(), geometry()["latitude"]
        radiance[0, 0] = (-1e30, 9.969209968386869e36, np.nan, np.inf)
        latitude[0, :4] = (-1e30, 9.969209968386869e36, np.nan, np.inf)
        packing = {"scale_factor": 0.5, "add_offset": 3.0}
        file = granule(
            tmp_path / NAME,
            radiance=radiance,
            replace={"latitude": latitude},
            attrs={"radiance": packing, "latitude": packing},
        )
        with open_reader(file) as scene:
            values, counts = scene.read(slice(None))
            truth = (radiance.astype(np.float64) * 0.5 + 3).astype(np.float32)
            truth[0, 0] = np.nan
            np.testing.assert_array_equal(values, truth)
            assert counts == dict.fromkeys(RULES, 0) | dict.fromkeys(RULES[1:5], 1)
            read = scene.coordinates()["latitude"][1]
            assert np.isnan(read[0, :4]).all()
            np.testing.assert_array_equal(read[1:], latitude[1:] * 0.5 + 3)

    @pytest.mark.parametrize("name", ["radiance", "nominal_wavelength", "pixel_quality_flag", "latitude"])
    @pytest.mark.parametrize("attribute", ["_FillValue", "missing_value", "scale_factor", "add_offset"])
    def test_attributes_that_are_no_numbers(self, tmp_path: Path, name: str, attribute: str) -> None:
        file = granule(tmp_path / NAME)
        with h5py.File(file, "r+") as h5:
            h5[UV][name].attrs[attribute] = "n/a"
        message = refused(InputError, f"{UV}/{name}", attribute, "'n/a'", path=file)
        assert "damaged" not in message

    def test_time_without_a_name(self, tmp_path: Path) -> None:
        start = dt.datetime(1980, 1, 6, tzinfo=dt.UTC) + dt.timedelta(seconds=1.4e9)
        time = 1.4e9 + np.arange(NY)
        time[0] = -1e30
        file = granule(tmp_path / "a.nc", replace={"time": time})
        assert open_reader(file).time == start + dt.timedelta(seconds=1)
        assert open_reader(granule(tmp_path / "b.nc", without=["time"])).time is None
        assert open_reader(granule(tmp_path / "c.nc", replace={"time": np.full(NY, -1e30)})).time is None
        suffixed = granule(tmp_path / "TEMPO_RADT_L1_V04_20240601T210934Z_S012G01-034.nc")
        assert open_reader(suffixed).time == dt.datetime(2024, 6, 1, 21, 9, 34, tzinfo=dt.UTC)
        refused(InputError, "20241301T210934Z", path=granule(tmp_path / "X_20241301T210934Z_S1.nc"))
        unknown = granule(tmp_path / "d.nc", attrs={"time": {"units": "fortnights since 1980-01-06"}})
        refused(InputError, "fortnights", path=unknown)

    def test_absent_is_reported(self, tmp_path: Path) -> None:
        file = granule(tmp_path / "bare.nc", without=["pixel_quality_flag", "radiance_error", "time", *GEOMETRY])
        with open_scene(file) as ds:
            assert set(ds.coords) == {"wavelength"}
            assert ds.attrs["absent"] == ", ".join(("pixel_quality_flag", "radiance_error", *GEOMETRY, "time"))
            np.testing.assert_array_equal(ds.radiance.values, cube())
        assert open_reader(granule(tmp_path / "t.nc", attrs={"time": {}})).absent == ("time",)

    @pytest.mark.parametrize("name", ["radiance", "nominal_wavelength"])
    def test_missing_required_variable(self, tmp_path: Path, name: str) -> None:
        refused(InputError, f"{UV}/{name}", "required", path=granule(tmp_path / NAME, without=[name]))

    @pytest.mark.parametrize(
        ("name", "dims"),
        [
            ("nominal_wavelength", (("xtrack", NX + 1), ("spectral_channel", NC))),
            ("pixel_quality_flag", (("mirror_step", NY), ("xtrack", NX + 1), ("spectral_channel", NC))),
            ("latitude", (("mirror_step", NY), ("xtrack", NX + 1))),
        ],
    )
    def test_sizes_that_differ(self, tmp_path: Path, name: str, dims: tuple[tuple[str, int], ...]) -> None:
        file = granule(tmp_path / NAME, without=[name])
        with h5py.File(file, "r+") as h5:
            scale = h5.create_dataset("inner/xtrack", data=np.arange(NX + 1))
            scale.make_scale("xtrack")
            variable = h5[UV].create_dataset(name, shape=[n for _, n in dims], dtype="u2")
            for axis, (dim, _) in enumerate(dims):
                source = {"xtrack": "inner/xtrack", "spectral_channel": f"{UV}/spectral_channel"}.get(dim, dim)
                variable.dims[axis].attach_scale(h5[source])
        refused(InputError, f"{UV}/{name}", f"{NX + 1} along xtrack", f"has {NX};", path=file)

    def test_dimensions_that_are_others(self, tmp_path: Path) -> None:
        file = granule(tmp_path / NAME, without=["latitude"])
        with h5netcdf.File(file, "a") as h5:
            h5.dimensions["corner"] = NX
            h5[UV].create_variable("latitude", ("mirror_step", "corner"), "f4")
        refused(InputError, "latitude has dimensions (mirror_step, corner)", path=file)
        bare = tmp_path / "bare.nc"
        with h5py.File(bare, "w") as h5:
            h5[f"{UV}/radiance"] = cube()
            h5[f"{UV}/nominal_wavelength"] = wavelengths()
        refused(InputError, "radiance has dimensions (?, ?, ?)", "mirror_step", path=bare)

    def test_wavelength_units_and_text(self, tmp_path: Path) -> None:
        file = granule(tmp_path / NAME, attrs={"nominal_wavelength": {"units": "um"}})
        refused(InputError, "'um'", "nm", path=file)

    def test_arguments_meant_for_matlab(self, file: Path) -> None:
        refused(ConfigError, "wavelength", "its own", path=file, wavelength=NM)
        refused(ConfigError, "variable", path=file, variable="radiance")
        refused(ConfigError, "size", path=file, size=[1, 2])

    def test_opens_closes_and_pickles(self, file: Path) -> None:
        scene = open_reader(file)
        for _ in range(3):
            with scene:
                scene.read(slice(0, 1))
            assert scene._handle is None
        scene.close()
        scene.read(slice(0, 1))
        copy: Scene = pickle.loads(pickle.dumps(scene))
        assert copy._handle is None
        np.testing.assert_array_equal(copy.read(slice(None))[0], cube())
        with open_scene(file) as ds, pickle.loads(pickle.dumps(ds)) as again:
            np.testing.assert_array_equal(again.radiance.values, cube())
        for opened in (scene, copy):
            opened.close()
        gc.collect()
        with h5py.File(file, "r+"):  # refused by HDF5 while any reader holds the file
            pass


class TestPlaces:
    @pytest.mark.parametrize("order", [DIMS, DIMS[::-1]])
    def test_tempo(self, tmp_path: Path, order: Sequence[str]) -> None:
        axes = [{"mirror_step": "y", "xtrack": "x", "spectral_channel": "channel"}[dim] for dim in order]
        places = open_reader(granule(tmp_path / NAME, order=order, without=("longitude",))).places
        assert places == {
            "radiance": Place(f"{UV}/radiance", tuple(axes)),
            "wavelength": Place(f"{UV}/nominal_wavelength", tuple(a for a in axes if a != "y")),
            "time": Place("time", ("y",)),
            **{n: Place(f"{UV}/{n}", tuple(a for a in axes if a != "channel")) for n in GEOMETRY if n != "longitude"},
        }

    def test_matlab_has_none(self, tmp_path: Path) -> None:
        file = write_mat(tmp_path / "a.mat", "5", {"scene": cube().astype(np.float64)})
        assert open_reader(file, wavelength=NM).places == {}


class TestRules:
    """A sample of each kind, counted under the first rule that rejects it."""

    @pytest.mark.parametrize("fill", ["_FillValue", "missing_value"])
    def test_every_rule(self, tmp_path: Path, fill: str) -> None:
        radiance, flag = cube(), flags()
        radiance[0, 0, 0] = radiance[0, 0, 1] = -999
        radiance[0, 1] = (-1e30, np.nextafter(np.float32(-1e30), np.float32(0)), 9.96921e36, 9.969209968386869e36)
        radiance[1, 0, 0] = np.nan
        radiance[2, 0, :3] = (np.inf, -np.inf, np.inf)
        flag[4, 4] = (1, 2, 4, 32)
        flag[5, 4] = (8, 16, 64, 0b1111_1000_0000)  # warnings, but 64 is declared the flag's fill below
        flag[0, 0, 0] = flag[1, 0, 0] = flag[2, 0, 0] = 1  # rejected before, so not counted here
        file = granule(
            tmp_path / NAME,
            radiance=radiance,
            flag=flag,
            attrs={"radiance": {fill: np.float32(-999)}, "pixel_quality_flag": {"_FillValue": np.uint16(64)}},
        )
        values, counts = open_reader(file).read(slice(None))
        expected = {"fill": 2, "undeclared_fill": 2, "default_fill": 2, "nan": 1, "infinite": 3, "flagged": 4 + 1}
        assert counts == dict.fromkeys(RULES, 0) | expected
        assert int(np.isnan(values).sum()) == sum(counts.values())
        truth = radiance.copy()
        truth[0, 0, :2] = truth[0, 1] = truth[1, 0, 0] = truth[2, 0, :3] = truth[4, 4] = np.nan
        truth[5, 4, 2] = np.nan
        np.testing.assert_array_equal(values, truth)

    def test_declared_minus_1e30(self, tmp_path: Path) -> None:
        radiance = cube()
        radiance[2:4] = -1e30
        file = granule(tmp_path / NAME, radiance=radiance, attrs={"radiance": {"_FillValue": np.float32(-1e30)}})
        values, counts = open_reader(file).read(slice(2, 6))
        assert counts == dict.fromkeys(RULES, 0) | {"fill": 2 * NX * NC}
        np.testing.assert_array_equal(values[2:], cube()[4:])

    def test_declared_nan_and_several_missing_values(self, tmp_path: Path) -> None:
        radiance = cube()
        radiance[0, 0, :3] = (np.nan, 5, 6)
        attrs = {"radiance": {"_FillValue": np.float32(np.nan), "missing_value": np.float32([5, 6])}}
        _, counts = open_reader(granule(tmp_path / NAME, radiance=radiance, attrs=attrs)).read(slice(None))
        assert counts == dict.fromkeys(RULES, 0) | {"fill": 3}

    def test_double_precision(self, tmp_path: Path) -> None:
        radiance = cube().astype(np.float64)
        radiance[0, 0] = (-1e30, 1e39, np.nan, 9.969209968386869e36)
        values, counts = open_reader(granule(tmp_path / NAME, radiance=radiance)).read(slice(None))
        assert counts == dict.fromkeys(RULES, 0) | dict.fromkeys(RULES[1:5], 1)
        assert int(np.isnan(values).sum()) == 4

    def test_flags_as_floats(self, tmp_path: Path) -> None:
        flag = flags().astype(np.float32)
        flag[0, 0] = (np.nan, 1, 8, -1e30)
        _, counts = open_reader(granule(tmp_path / NAME, flag=flag)).read(slice(None))
        assert counts["flagged"] == 3

    def test_zero_and_negative_are_valid(self, tmp_path: Path) -> None:
        radiance = cube()
        radiance[0, 0] = (0, -1, 1e-30, -1e29)
        values, counts = open_reader(granule(tmp_path / NAME, radiance=radiance)).read(slice(None))
        assert sum(counts.values()) == 0
        np.testing.assert_array_equal(values, radiance)


def overwrite_chunk(path: Path, name: str, row: int) -> None:
    with h5py.File(path) as h5:
        chunk = h5[name].id.get_chunk_info_by_coord((row, 0, 0))
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(b"\xff" * chunk.size)


def write_mat(path: Path, version: str, arrays: dict[str, Any]) -> Path:
    """Write a .mat file; version 7.3 as MATLAB does: dimensions reversed, a 512-byte header, class attributes."""
    if version in ("5", "5 compressed"):
        scipy.io.savemat(path, arrays, do_compression="compressed" in version)
        return path
    with h5py.File(path, "w", userblock_size=512) as h5:
        for name, array in arrays.items():
            array = np.atleast_2d(array)
            h5[name] = array.T
            kind = {"float64": "double", "float32": "single", "bool": "logical"}.get(array.dtype.name, array.dtype.name)
            h5[name].attrs["MATLAB_class"] = np.bytes_(kind)
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")
    return path


VERSIONS = pytest.mark.parametrize("version", ["5", "5 compressed", "7.3"])


def flat(values: np.ndarray) -> np.ndarray:
    """(y, x, channel) to bands x pixels, pixel by pixel as MATLAB stores them: an independent loop."""
    ny, nx, nc = values.shape
    return np.array([[values[p % ny, p // ny, c] for p in range(ny * nx)] for c in range(nc)])


class TestMatlab:
    @VERSIONS
    def test_three_dimensional(self, tmp_path: Path, version: str) -> None:
        file = write_mat(tmp_path / "a.mat", version, {"scene": cube().astype(np.float64)})
        with open_scene(file, wavelength=NM) as ds:
            np.testing.assert_array_equal(ds.radiance.values, cube())
            np.testing.assert_array_equal(ds.wavelength.values, [400, 500, 600, 700])
            assert ds.wavelength.dims == ("channel",)
            assert ds.attrs["format"] == "matlab"
            assert "pixel_quality_flag, latitude" in ds.attrs["absent"]
        with open_reader(file, wavelength=[1.0, 30, 40, 50], region=[2, 5, 1, 3]) as scene:
            assert (scene.format, scene.band, scene.units, scene.time) == ("matlab", None, None, None)
            assert scene.name == "a_y2-5_x1-3"
            assert scene.coordinates() == {}
            np.testing.assert_array_equal(scene.read(slice(1, 2))[0], cube()[3:4, 1:3])
            assert scene.read(slice(3, 3))[0].shape == (0, 2, NC)

    @VERSIONS
    @pytest.mark.parametrize("names", [("lines", "cols"), ("nRow", "nCol"), ("ROWS", "Cols"), None])
    def test_bands_by_pixels(self, tmp_path: Path, version: str, names: tuple[str, str] | None) -> None:
        arrays: dict[str, Any] = {"Y": flat(cube()), "other": np.ones((3, 7))}
        size = None if names else [NY, NX]
        if names:
            arrays |= {names[0]: np.uint8(NY), names[1]: np.float64(NX)}
        file = write_mat(tmp_path / "a.mat", version, arrays)
        with open_reader(file, size=size, wavelength=NM) as scene:
            assert scene.shape == (NY, NX, NC)
            values, counts = scene.read(slice(None))
            np.testing.assert_array_equal(values, cube())
            assert values.flags.c_contiguous
            assert sum(counts.values()) == 0
            np.testing.assert_array_equal(scene.read(slice(2, 5))[0], cube()[2:5])
            np.testing.assert_array_equal(pickle.loads(pickle.dumps(scene)).read(slice(2, 5))[0], cube()[2:5])
        with open_reader(file, size=size, wavelength=NM, region=[1, 5, 2, 4]) as scene:
            np.testing.assert_array_equal(scene.read(slice(1, 3))[0], cube()[2:4, 2:4])
            assert scene.read(slice(0, 0))[0].shape == (0, 2, NC)

    def test_version_73_reads_by_rows(self, tmp_path: Path) -> None:
        """Chunks of one row each, one of them overwritten: the others are still read."""
        file = tmp_path / "a.mat"
        with h5py.File(file, "w") as h5:
            h5.create_dataset("Y", data=cube().T, chunks=(NC, NX, 1), compression="gzip")
            chunk = h5["Y"].id.get_chunk_info_by_coord((0, 0, 3))
        with file.open("r+b") as raw:
            raw.seek(chunk.byte_offset)
            raw.write(b"\xff" * chunk.size)
        scene = open_reader(file, wavelength=NM)
        np.testing.assert_array_equal(scene.read(slice(0, 3))[0], cube()[:3])
        with pytest.raises(InputError, match="damaged"):
            scene.read(slice(3, 4))
        scene.close()

    def test_version_5_is_loaded_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = write_mat(tmp_path / "a.mat", "5", {"Y": cube()})
        loaded: list[Any] = []
        loadmat = scipy.io.loadmat
        monkeypatch.setattr(scipy.io, "loadmat", lambda *a, **k: loaded.append(k) or loadmat(*a, **k))
        with open_reader(file, wavelength=NM) as scene:
            assert loaded == []
            scene.read(slice(0, 1))
            scene.read(slice(1, 2))
            assert len(loaded) == 1

    @VERSIONS
    def test_invalid_samples(self, tmp_path: Path, version: str) -> None:
        values = cube().astype(np.float64)
        values[0, 0] = (np.nan, np.inf, -1e30, 0)
        with open_reader(write_mat(tmp_path / "a.mat", version, {"Y": values}), wavelength=NM) as scene:
            read, counts = scene.read(slice(None))
        assert counts == dict.fromkeys(RULES, 0) | {"undeclared_fill": 1, "nan": 1, "infinite": 1}
        assert np.isnan(read[0, 0, :3]).all()
        assert read[0, 0, 3] == 0

    @VERSIONS
    def test_several_candidates(self, tmp_path: Path, version: str) -> None:
        arrays = {"truth": cube()[..., :2], "Y": flat(cube()), "lines": NY, "cols": NX, "M": np.ones((NC, 3))}
        file = write_mat(tmp_path / "a.mat", version, arrays)
        refused(InputError, "2 arrays", "truth (6 x 5 x 2)", "Y (4 x 30)", "variable: Y", path=file, wavelength=NM)
        with open_reader(file, wavelength=NM, variable="Y") as scene:
            np.testing.assert_array_equal(scene.read(slice(None))[0], cube())
        message = refused(ConfigError, "'Z'", "truth (6 x 5 x 2)", "Y (4 x 30)", path=file, variable="Z", wavelength=NM)
        assert "M (" not in message
        refused(ConfigError, "M is 4 x 3", "3 pixels", "6 x 5 makes 30", path=file, variable="M", wavelength=NM)

    @VERSIONS
    def test_what_is_no_candidate(self, tmp_path: Path, version: str) -> None:
        arrays: dict[str, Any] = {"Y": cube(), "mask": cube() > 0, "row": np.ones((1, 40)), "v": np.ones((40, 1))}
        arrays["Z"] = cube().astype(np.complex128) + 1j
        if version != "7.3":
            arrays |= {"text": "hello", "S": scipy.sparse.csc_array(np.eye(4, 9)), "r": {"a": cube()}}
            arrays["cell"] = np.array([[1, "a"]], dtype=object)
        file = write_mat(tmp_path / "a.mat", version, arrays)
        if version == "7.3":
            with h5py.File(file, "r+") as h5:
                h5["Z"].attrs.clear()
                h5["text"] = np.ones((9, 4), dtype=np.uint16)
                h5["text"].attrs["MATLAB_class"] = np.bytes_("char")
                h5["S/data"] = np.ones(4)
                h5["#refs#/a"] = cube()
                h5["none"] = np.zeros(3, dtype=np.uint64)
                h5["none"].attrs["MATLAB_empty"] = 1
        with open_reader(file, wavelength=NM) as scene:
            np.testing.assert_array_equal(scene.read(slice(None))[0], cube())
        for name in ("Z", "mask", "S", "text"):
            refused(ConfigError, f"'{name}'", "Y (6 x 5 x 4)", path=file, variable=name, wavelength=NM)
        only = write_mat(tmp_path / "b.mat", version, {"Z": arrays["Z"], "v": arrays["v"]})
        refused(InputError, "Z (6 x 5 x 4 complex", "v (40 x 1 double)", path=only, wavelength=NM)

    def test_size(self, tmp_path: Path) -> None:
        file = write_mat(tmp_path / "a.mat", "5", {"Y": flat(cube())})
        refused(ConfigError, "Y is 4 x 30", "size: [ny, nx]", path=file, wavelength=NM)
        refused(ConfigError, "Y is 4 x 30", "7 x 5 makes 35", path=file, wavelength=NM, size=[7, 5], variable="Y")
        refused(InputError, "Y (4 x 30 single)", "7 x 5", path=file, wavelength=NM, size=[7, 5])
        for size in ([6], [0, 5], "65", [6.0, 5], [True, 30]):
            refused(ConfigError, "size", "[ny, nx]", path=file, wavelength=NM, size=size)
        cubic = write_mat(tmp_path / "b.mat", "5", {"Y": cube()})
        refused(ConfigError, "[5, 6]", "Y is 6 x 5 x 4", path=cubic, wavelength=NM, size=[5, 6])
        assert open_reader(cubic, wavelength=NM, size=[6, 5]).shape == (NY, NX, NC)
        two = write_mat(tmp_path / "c.mat", "5", {"Y": flat(cube()), "lines": 6, "cols": 5, "nRow": 5, "nCol": 6})
        refused(InputError, "(6, 5), (5, 6)", "size: [ny, nx]", path=two, wavelength=NM)
        half = write_mat(tmp_path / "d.mat", "5", {"Y": flat(cube()), "lines": 1.5, "cols": 20})
        refused(InputError, "lines is 1.5", path=half, wavelength=NM)

    @VERSIONS
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2.5, 0.0])
    def test_scalars_that_are_no_size(self, tmp_path: Path, version: str, value: float) -> None:
        file = write_mat(tmp_path / "a.mat", version, {"Y": flat(cube()), "nRow": NY, "nCol": value})
        message = refused(InputError, f"nCol is {value}", "size: [ny, nx]", path=file, wavelength=NM)
        assert "nRow" not in message

    @VERSIONS
    @pytest.mark.parametrize("name", ["wavelength", "Wavelengths", "WL", "lambda"])
    def test_wavelengths_of_the_file(self, tmp_path: Path, version: str, name: str) -> None:
        file = write_mat(tmp_path / "a.mat", version, {"Y": cube(), name: np.array([[401, 402, 403, 404.5]]).T})
        np.testing.assert_array_equal(open_reader(file).wavelength, [401, 402, 403, 404.5])
        np.testing.assert_array_equal(open_reader(file, wavelength=NM).wavelength, [400, 500, 600, 700])

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ([400, 500, 600], ["3 values for 4 channels"]),
            ([400, 500, np.nan, 700], ["1 of 4", "finite"]),
            ([0, -1, 600, 700], ["2 of 4", "above 0"]),
            ([400, 500, 500, 450], ["2 of 3 steps", "from 500 to 500"]),
            ([0.4, 0.5, 0.6, 2.5], ["2.5", "micrometres"]),
        ],
    )
    def test_wavelengths_refused(self, tmp_path: Path, values: list[float], words: list[str]) -> None:
        bare = write_mat(tmp_path / "a.mat", "5", {"Y": cube()})
        refused(ConfigError, "wavelength", *words, path=bare, wavelength=values)
        own = write_mat(tmp_path / "b.mat", "5", {"Y": cube(), "wl": np.array(values)})
        refused(ConfigError, "wl", *words, path=own)

    def test_wavelengths_never_invented(self, tmp_path: Path) -> None:
        file = write_mat(tmp_path / "a.mat", "5", {"Y": cube()})
        refused(InputError, "4 channels", "wavelength: {first: 401, last: 889}", path=file)
        refused(ConfigError, "['first']", "first, last", path=file, wavelength={"first": 1})
        refused(ConfigError, "'400..700'", path=file, wavelength="400..700")
        refused(ConfigError, "(1, 4)", path=file, wavelength=np.ones((1, 4)))
        refused(ConfigError, "1 of 3 steps", path=file, wavelength=[400, 500, 600, 600])
        refused(ConfigError, "3 of 3 steps", path=file, wavelength={"first": 700, "last": 400})
        two = write_mat(tmp_path / "b.mat", "5", {"Y": cube(), "wl": np.ones(4), "lambda": np.ones(4)})
        refused(InputError, "wl, lambda", path=two)

    def test_band_is_meant_for_tempo(self, tmp_path: Path) -> None:
        file = write_mat(tmp_path / "a.mat", "5", {"Y": cube()})
        refused(ConfigError, "band", "TEMPO", path=file, wavelength=NM, band=UV)

    def test_without_scipy(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = write_mat(tmp_path / "a.mat", "5", {"Y": cube()})
        newer = write_mat(tmp_path / "b.mat", "7.3", {"Y": cube()})
        monkeypatch.setitem(sys.modules, "scipy.io", None)
        refused(InputError, 'pip install "spectralvae[formats]"', path=file, wavelength=NM)
        assert open_reader(newer, wavelength=NM).shape == (NY, NX, NC)


class TestDamage:
    def test_no_file(self, tmp_path: Path) -> None:
        refused(InputError, "no such file; check the path", path=tmp_path / "none.nc")
        refused(InputError, "a folder that is no Zarr", path=tmp_path)
        os.mkfifo(tmp_path / "pipe.nc")  # to open it would wait for a writer
        refused(InputError, "neither a file nor a folder", path=tmp_path / "pipe.nc")
        refused(InputError, "local files", path="s3://bucket/a.zarr")
        (tmp_path / "empty.nc").touch()
        refused(InputError, "0 bytes", path=tmp_path / "empty.nc")
        refused(InputError, "no such file", path=str(tmp_path / "none.mat"), call=open_scene)

    def test_file_gone_between_reads(self, file: Path) -> None:
        scene = open_reader(file)
        file.unlink()
        with pytest.raises(InputError, match="no such file"):
            scene.read(slice(0, 1))

    @pytest.mark.parametrize("suffix", ["nc", "mat"])
    @pytest.mark.parametrize("part", [0.001, 0.1, 0.5, 0.9, 0.999])
    def test_truncated(self, tmp_path: Path, suffix: str, part: float) -> None:
        path = tmp_path / f"a.{suffix}"
        _ = granule(path) if suffix == "nc" else write_mat(path, "7.3", {"Y": cube()})
        content = path.read_bytes()
        path.write_bytes(content[: max(1, int(part * len(content)))])
        refused(InputError, "damaged", path=path)

    @pytest.mark.parametrize("version", ["5", "5 compressed"])
    @pytest.mark.parametrize("cut", [1, 8, 100, 400])
    def test_truncated_mat_5(self, tmp_path: Path, version: str, cut: int) -> None:
        path = write_mat(tmp_path / "a.mat", version, {"Y": np.random.default_rng(0).random((NY, NX, NC))})
        path.write_bytes(path.read_bytes()[:-cut])
        refused(InputError, "damaged or truncated", path=path, wavelength=NM)

    def test_overwritten_mat_5(self, tmp_path: Path) -> None:
        values = np.random.default_rng(0).random((60, 50, NC))
        path = write_mat(tmp_path / "a.mat", "5 compressed", {"Y": values})
        content = bytearray(path.read_bytes())
        content[-2000:-1000] = b"\x00" * 1000
        path.write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            open_reader(path, wavelength=NM).read(slice(None))

    def test_overwritten_metadata(self, tmp_path: Path) -> None:
        """Wherever a file is overwritten, it opens or it is refused as ours: no foreign error comes through."""
        path = granule(tmp_path / NAME)
        content = path.read_bytes()
        refusals = 0
        for start in range(8, len(content), 509):
            path.write_bytes(content[:start] + b"\xa5" * 16 + content[start + 16 :])
            refusals += 1
            with suppress(UserError), open_reader(path) as scene:
                scene.read(slice(None))
                _ = scene.wavelength
                scene.coordinates()
                refusals -= 1
        assert refusals > 5

    def test_other_formats(self, tmp_path: Path) -> None:
        for name, content, words in (
            ("a.nc", b"CDF\x01" + bytes(100), ["no numeric 3-D variable"]),
            ("b.nc", b"x" * 100, ["damaged"]),
            ("c.tif", b"II*\x00" + bytes(100), ["unknown format", "TEMPO L1 radiance"]),
            ("d.mat", b"x" * 1000, ["damaged", "no MATLAB file"]),
        ):
            (tmp_path / name).write_bytes(content)
            refused(InputError, *words, path=tmp_path / name)
        with h5py.File(tmp_path / "e.h5", "w") as h5:
            h5["cube"] = cube()
        refused(ConfigError, "dims: {y: 0, x: 1, channel: 2}", path=tmp_path / "e.h5")
        with h5netcdf.File(tmp_path / "f.nc", "w") as nc:
            nc.create_group("product")
            nc.attrs["collection_shortname"] = "TEMPO_NO2_L2"
        refused(InputError, "level-2", "TEMPO_NO2_L2", path=tmp_path / "f.nc")

    @pytest.mark.parametrize("values", [flat(cube()), flat(cube()).astype(">f8"), np.ones((2, 9), dtype=np.int16)])
    def test_matlab_version_4(self, tmp_path: Path, values: np.ndarray) -> None:
        file = tmp_path / "a.mat"
        scipy.io.savemat(file, {"Y": values}, format="4")
        words = ["version 4", "save(..., '-v7')", "-v7.3"]
        assert "damaged" not in refused(InputError, *words, path=file, wavelength=NM)
        content = file.read_bytes()
        header = struct.unpack("<5i", content[:20])
        file.write_bytes(struct.pack(">5i", 1000 + header[0], *header[1:]) + content[20:])  # as another machine wrote
        refused(InputError, *words, path=file, wavelength=NM)
        file.write_bytes(bytes(1000))
        refused(InputError, "damaged", path=file, wavelength=NM)

    def test_home(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(file.parent))
        with open_scene(f"~/{NAME}") as ds:
            np.testing.assert_array_equal(ds.radiance.values, cube())
        assert open_reader(Path("~") / NAME).path == file
        monkeypatch.chdir(file.parent)
        assert open_reader(file.rename("~copy.nc")).shape == (NY, NX, NC)  # no user of that name: a file's own name

    def test_format_is_told_by_content(self, tmp_path: Path) -> None:
        renamed = granule(tmp_path / "granule.dat")
        assert open_reader(renamed).format == "tempo"
        for version in ("5", "7.3"):
            file = write_mat(tmp_path / f"a{version}.dat", version, {"Y": cube()})
            if version == "5":  # savemat's header
                assert file.read_bytes().startswith(b"MATLAB 5.0")
            assert open_reader(file, wavelength=NM).format == "matlab"


def real(name: str) -> Path:
    path = REAL / name
    if not path.is_file():
        pytest.skip(f"no {name}; set SPECTRALVAE_REAL_DATA to its folder")
    return path


class TestRealFiles:
    def test_samson(self) -> None:
        file = real("Samson.mat")
        refused(InputError, "S_GT (95 x 95 x 3)", "Y (156 x 9025)", "variable: Y", path=file, wavelength=NM)
        refused(InputError, "156 channels", path=file, variable="Y")
        truth = scipy.io.loadmat(file)["Y"].T.reshape(95, 95, 156, order="F").astype(np.float32)
        with open_scene(file, variable="Y", wavelength={"first": 401, "last": 889}) as ds:
            np.testing.assert_array_equal(ds.radiance.values, truth)
            assert int((ds.radiance == 0).sum()) == 1146
            assert not np.isnan(ds.radiance.values).any()
            np.testing.assert_allclose(ds.wavelength.values, np.linspace(401, 889, 156))
        with open_reader(file, variable="Y", wavelength={"first": 401, "last": 889}, region=[0, 64, 10, 95]) as scene:
            values, counts = scene.read(slice(5, 9))
            np.testing.assert_array_equal(values, truth[5:9, 10:])
            assert sum(counts.values()) == 0

    def test_tempo_level_2_is_refused(self) -> None:
        file = real("TEMPO_NO2_L2_V03_20240601T210934Z_S012G01_subsetted.nc4")
        refused(InputError, "TEMPO level-2 product (TEMPO_NO2_L2)", "TEMPO L1 radiance", path=file)
