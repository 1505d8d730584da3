"""Readers of TEMPO and MATLAB: values against numpy truth, every rule of validity, laziness, and what is refused."""

from __future__ import annotations

import datetime as dt
import gc
import pickle
import struct
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse
from badfiles import BAND as UV
from badfiles import GEOMETRY, NAME, write_granule
from refusals import refused
from test_formats import (
    GIVEN,
    KINDS,
    NC,
    NO_RULE,
    NX,
    NY,
    chunk_file,
    cube,
    legacy_folder,
    overwrite_chunk,
    refuse,
    scene_variables,
    write,
    write_envi,
)

from spectralvae.errors import InputError
from spectralvae.readers import Scene, base, hdf5, open_reader
from spectralvae.readers.base import Place
from spectralvae.readers.dataset import open_scene

ALL = slice(None)
VIS = "band_540_740_nm"
DIMS = ("mirror_step", "xtrack", "spectral_channel")
ROLES = {"mirror_step": "y", "xtrack": "x", "spectral_channel": "channel"}


def wavelengths() -> np.ndarray:
    return (300 + np.arange(NX)[:, None] * 0.01 + np.arange(NC) * 0.2).astype(np.float32)


def geometry() -> dict[str, np.ndarray]:
    grid = np.arange(NY * NX, dtype=np.float32).reshape(NY, NX)
    return {name: grid + 100 * i for i, name in enumerate(GEOMETRY)}


def granule(
    path: Path,
    *,
    bands: Sequence[str] = (UV,),
    without: Sequence[str] = (),
    order: Sequence[str] = DIMS,
    attrs: dict[str, dict[str, Any]] | None = None,
    **replaced: np.ndarray,
) -> Path:
    """Write a small granule, its dimensions in some order; the second band holds ten times the first's radiance."""
    attrs = {"time": {"units": "seconds since 1980-01-06T00:00:00Z"}, **(attrs or {})}
    arrays: dict[str, np.ndarray] = {
        "time": 1.4e9 + np.arange(NY) * 2.5,
        "radiance": cube(),
        "nominal_wavelength": wavelengths(),
        "pixel_quality_flag": np.zeros((NY, NX, NC), np.uint16),
        "radiance_error": np.sqrt(cube()),
        **geometry(),
        **replaced,
    }
    variables = {}
    for name in arrays.keys() - set(without):
        values = arrays[name]
        dims = {"time": DIMS[:1], "nominal_wavelength": DIMS[1:][-values.ndim :]}.get(name, DIMS[: values.ndim])
        stored = [d for d in order if d in dims]
        for i, band in enumerate(bands):
            turned = (values * 10**i if name == "radiance" else values).transpose([dims.index(d) for d in stored])
            variables["time" if name == "time" else f"{band}/{name}"] = stored, turned, attrs.get(name, {})
    return write(path.parent, "netcdf4", variables, path.name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return granule(tmp_path / NAME, attrs={"radiance": {"units": "photons/s/cm^2/nm/sr"}})


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
            values, counts = scene.read(slice(1, 3))
            np.testing.assert_array_equal(values, cube()[1:3])
            assert values.dtype == np.float32
            assert values.flags.c_contiguous
            assert counts == NO_RULE
            np.testing.assert_array_equal(scene.read_noise(slice(1, 3)), np.sqrt(cube())[1:3])
            assert scene.places["radiance"] == Place(f"{UV}/radiance", ("y", "x", "channel"))
        with open_scene(file) as ds:
            assert ds.radiance.dims == ("y", "x", "channel")
            assert ds.radiance.attrs == {"long_name": "radiance", "units": "photons/s/cm^2/nm/sr"}
            np.testing.assert_array_equal(ds.radiance.values, cube())
            assert ds.wavelength.dims == ("x", "channel")
            assert ds.wavelength.attrs["units"] == "nm"
            assert ds.time.dims == ("y",)
            seconds = np.round((1.4e9 + np.arange(NY) * 2.5) * 1e3).astype("timedelta64[ms]")
            np.testing.assert_array_equal(ds.time.values, np.datetime64("1980-01-06") + seconds)
            for name, truth in geometry().items():
                np.testing.assert_array_equal(ds[name].values, truth)
            assert ds.attrs == {"source": NAME, "format": "tempo", "band": UV, "absent": ""}

    @pytest.mark.parametrize("block", [1, 2**24])
    def test_any_index(self, file: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("spectralvae.readers.dataset._BLOCK_SAMPLES", block)
        several, blocks = (np.s_[::-2, ::-1, 1:3], np.s_[1:6:2, [0, 4]], np.s_[[4, 0, 0]]), (np.s_[2:4], np.s_[3:3])
        with open_scene(file) as ds:
            for key in (*several, *blocks, np.s_[5], np.s_[:, 3, 2], np.s_[-1, -1, -1]):
                np.testing.assert_array_equal(ds.radiance[key].values, cube()[key])

    @pytest.mark.parametrize("order", [DIMS, DIMS[::-1], (DIMS[2], DIMS[0], DIMS[1]), (DIMS[1], DIMS[0], DIMS[2])])
    def test_region_and_dimensions_in_any_order(self, tmp_path: Path, order: Sequence[str]) -> None:
        flag = np.zeros((NY, NX, NC), np.uint16)
        flag[1, 2, 3] = 1
        truth = cube()
        truth[1, 2, 3] = np.nan
        path = granule(tmp_path / NAME, order=order, pixel_quality_flag=flag, without=("longitude",))
        with open_reader(path, region=np.array([1, 4, 2, 5])) as scene:
            assert scene.region == (1, 4, 2, 5)
            assert scene.name.endswith("G01_y1-4_x2-5")
            values, counts = scene.read(ALL)
            np.testing.assert_array_equal(values, truth[1:4, 2:5])
            assert counts["flagged"] == 1
            assert values.flags.c_contiguous
            assert scene.read(slice(2, 1))[0].shape == (0, 3, NC)
            assert scene.places["radiance"].axes == tuple(ROLES[dim] for dim in order)
        with open_scene(path, region=[1, 4, 2, 5]) as ds:
            np.testing.assert_array_equal(ds.wavelength.values, wavelengths()[2:5])
            np.testing.assert_array_equal(ds.latitude.values, geometry()["latitude"][1:4, 2:5])
            assert ds.attrs["region"] == [1, 4, 2, 5] and ds.time.size == 3

    def test_arguments_refused(self, file: Path) -> None:
        for region in ([0, 7, 0, 5], [0, 6, 0, 6], [3, 3, 0, 5], [-1, 3, 0, 5]):
            with refused(key="region", path=file, value=region):
                open_reader(file, region=region)
        for value in ([0, 1, 2], "0123", [0, 1.5, 0, 1], 3):
            refuse(file, "region", region=value)
        for key, value, word in (("wavelength", GIVEN, "own"), ("dims", {}, "Zarr"), ("size", [], "MATLAB")):
            refuse(file, key, word, **{key: value})

    def test_both_bands(self, tmp_path: Path) -> None:
        file = granule(tmp_path / NAME, bands=(UV, VIS))
        assert open_reader(file).band == UV
        np.testing.assert_array_equal(open_scene(file, band=VIS).radiance.values, cube() * 10)
        refuse(file, "band", "'band_1_2_nm'", UV, VIS, band="band_1_2_nm")
        assert open_reader(granule(tmp_path / "one.nc", bands=(VIS,))).band == VIS
        refuse(granule(tmp_path / "others.nc", bands=("band_1_2_nm", VIS)), "band", "band_1_2_nm", VIS)

    def test_what_stands_beside_is_unpacked_and_masked(self, tmp_path: Path) -> None:
        packed = np.arange(NY * NX, dtype=np.int16).reshape(NY, NX)
        latitude = geometry()["latitude"]
        latitude[0, :4] = (-1e30, 9.969209968386869e36, np.nan, np.inf)
        file = granule(
            tmp_path / NAME,
            nominal_wavelength=np.array([300.0, -1e30, 302.0, -999.0]),  # one for all columns
            solar_zenith_angle=packed,
            latitude=latitude,
            time=np.array([-1e30, *range(5)]),
            attrs={
                "nominal_wavelength": {"_FillValue": -999.0, "units": "nm"},
                "solar_zenith_angle": {"_FillValue": np.int16(3), "scale_factor": 0.5, "add_offset": 10.0},
                "latitude": {"scale_factor": 0.5, "add_offset": 3.0},
                "time": {"units": "hours since 2024-01-01 00:00:00"},
            },
        )
        with open_scene(file) as ds:
            truth = packed * 0.5 + 10
            truth[0, 3] = np.nan
            np.testing.assert_array_equal(ds.solar_zenith_angle.values, truth)
            assert np.isnan(ds.latitude.values[0, :4]).all()
            np.testing.assert_array_equal(ds.latitude.values[1:], latitude[1:] * 0.5 + 3)
            assert np.isnat(ds.time.values[0])
            assert ds.time.values[2] == np.datetime64("2024-01-01T01")
            assert ds.wavelength.dims == ("channel",)
            np.testing.assert_array_equal(ds.wavelength.values, [300, np.nan, 302, np.nan])
        file = granule(tmp_path / "um.nc", attrs={"nominal_wavelength": {"units": "um"}})
        refuse(file, f"{UV}/nominal_wavelength", "'um'", error=InputError)

    @pytest.mark.parametrize("name", ["radiance", "nominal_wavelength", "pixel_quality_flag", "latitude"])
    @pytest.mark.parametrize("attribute", ["_FillValue", "missing_value", "scale_factor", "add_offset"])
    def test_attributes_that_are_no_numbers(self, tmp_path: Path, name: str, attribute: str) -> None:
        file = granule(tmp_path / NAME)
        with h5py.File(file, "r+") as h5:
            h5[UV][name].attrs[attribute] = "n/a"
        refuse(file, f"{UV}/{name}", attribute, "'n/a'", error=InputError)

    def test_time_without_a_name(self, tmp_path: Path) -> None:
        start = dt.datetime(1980, 1, 6, tzinfo=dt.UTC) + dt.timedelta(seconds=1.4e9)
        time = 1.4e9 + np.arange(NY)
        time[0] = -1e30
        file = granule(tmp_path / "a.nc", time=time)
        assert open_reader(file).time == start + dt.timedelta(seconds=1)
        assert open_reader(granule(tmp_path / "b.nc", without=["time"])).time is None
        assert open_reader(granule(tmp_path / "c.nc", time=np.full(NY, -1e30))).time is None
        suffixed = granule(tmp_path / "TEMPO_RADT_L1_V04_20240601T210934Z_S012G01-034.nc")
        assert open_reader(suffixed).time == dt.datetime(2024, 6, 1, 21, 9, 34, tzinfo=dt.UTC)
        refuse(granule(tmp_path / "X_20241301T210934Z_S1.nc"), None, "20241301T210934Z", error=InputError)
        unknown = granule(tmp_path / "d.nc", attrs={"time": {"units": "fortnights since 1980-01-06"}})
        refuse(unknown, "time", "fortnights", error=InputError)

    def test_absent(self, tmp_path: Path) -> None:
        """What is optional is reported, what is required refused."""
        file = granule(tmp_path / "bare.nc", without=["pixel_quality_flag", "radiance_error", "time", *GEOMETRY])
        with open_scene(file) as ds:
            assert set(ds.coords) == {"wavelength"}
            assert ds.attrs["absent"] == ", ".join(("pixel_quality_flag", "radiance_error", *GEOMETRY, "time"))
            np.testing.assert_array_equal(ds.radiance.values, cube())
        assert open_reader(granule(tmp_path / "t.nc", attrs={"time": {}})).absent == ("time",)
        for name in ("radiance", "nominal_wavelength"):
            refuse(granule(tmp_path / NAME, without=[name]), f"{UV}/{name}", error=InputError)

    @pytest.mark.parametrize("name", ["nominal_wavelength", "pixel_quality_flag", "latitude"])
    def test_dimensions_that_do_not_fit(self, tmp_path: Path, name: str) -> None:
        file = granule(tmp_path / NAME)
        with h5py.File(file, "r+") as h5:
            scales = [axis[0] for axis in h5[UV][name].dims]
            shape = [n + (n == NX) for n in h5[UV][name].shape]
            del h5[UV][name]
            for axis, scale in zip(h5[UV].create_dataset(name, shape, "u2").dims, scales, strict=True):
                axis.attach_scale(scale)
        refuse(file, f"{UV}/{name}", f" {NX + 1} ", f" {NX}", error=InputError)
        with h5py.File(file, "r+") as h5:
            h5[f"{UV}/corner"] = np.zeros(NX)
            h5[f"{UV}/corner"].make_scale("corner")
            h5[UV][name].dims[0].attach_scale(h5[f"{UV}/corner"])
        refuse(file, f"{UV}/{name}", "(corner, ", error=InputError)
        bare = tmp_path / "bare.nc"
        with h5py.File(bare, "w") as h5:
            h5[f"{UV}/radiance"] = cube()
            h5[f"{UV}/nominal_wavelength"] = wavelengths()
        refuse(bare, f"{UV}/radiance", "(?, ?, ?)", "mirror_step", error=InputError)

    def test_opens_closes_and_pickles(self, file: Path) -> None:
        scene = open_reader(file)
        scene.read(slice(0, 1))
        copy: Scene = pickle.loads(pickle.dumps(scene))
        np.testing.assert_array_equal(copy.read(ALL)[0], cube())
        with open_scene(file) as ds, pickle.loads(pickle.dumps(ds)) as again:
            np.testing.assert_array_equal(again.radiance.values, cube())
        for opened in (scene, copy):
            opened.close()
        gc.collect()
        with h5py.File(file, "r+"):  # refused by HDF5 while any reader holds the file
            pass
        scene.read(slice(0, 1))
        scene.close()
        file.unlink()
        with refused(InputError, path=file):
            scene.read(slice(0, 1))


class TestRules:
    """A sample of each kind, counted under the first rule that rejects it."""

    @pytest.mark.parametrize(("fill", "kind"), [("_FillValue", np.uint16), ("missing_value", np.float32)])
    def test_every_rule(self, tmp_path: Path, fill: str, kind: type[np.number]) -> None:
        radiance, flag = cube(), np.zeros((NY, NX, NC), np.uint16)
        radiance[0, 0, 0] = radiance[0, 0, 1] = -999
        radiance[0, 1] = (-1e30, np.nextafter(np.float32(-1e30), np.float32(0)), 9.96921e36, 9.969209968386869e36)
        radiance[1, 0, 0] = np.nan
        radiance[2, 0, :3] = (np.inf, -np.inf, np.inf)
        radiance[3, 0] = (0, -1, 1e-30, -1e29)  # valid
        flag[4, 4] = (1, 2, 4, 32)
        flag[5, 4] = (8, 16, 64, 0b1111_1000_0000)  # warnings, but 64 is declared the flag's fill below
        flag[0, 0, 0] = flag[1, 0, 0] = flag[2, 0, 0] = 1  # rejected before, so not counted here
        file = granule(
            tmp_path / NAME,
            radiance=radiance,
            pixel_quality_flag=flag.astype(kind),
            attrs={
                "radiance": {fill: np.float32(-999), "scale_factor": 0.5},
                "pixel_quality_flag": {"_FillValue": kind(64)},
            },
        )
        values, counts = open_reader(file).read(ALL)
        expected = {"fill": 2, "undeclared_fill": 2, "default_fill": 2, "nan": 1, "infinite": 3, "flagged": 4 + 1}
        assert counts == NO_RULE | expected
        truth = radiance / 2
        truth[0, 0, :2] = truth[0, 1] = truth[1, 0, 0] = truth[2, 0, :3] = truth[4, 4] = np.nan
        truth[5, 4, 2] = np.nan
        np.testing.assert_array_equal(values, truth)

    @pytest.mark.parametrize("seed", range(80))
    def test_random_arrays(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Against one sample after the other, in blocks that end anywhere."""
        monkeypatch.setattr(base, "_BLOCK_SAMPLES", 1 + seed % 7)
        random = np.random.default_rng(seed)
        raw = random.normal(0, 1e9, random.integers(1, 9, 3)).astype(random.choice(["<f4", ">f4", "<f8", "<i8"]))
        if raw.dtype.kind == "f":
            odd = [-1e30, 9.969209968386869e36, np.nan, np.inf, -np.inf, 1e30, -9.99e29, -1.01e30, 1e37, 0, -999]
            odd += [1e300] * (raw.itemsize == 8)
            chosen = random.random(raw.shape) < random.choice([0, 0.1, 1])
            raw[chosen] = random.choice(odd, chosen.sum())

        def mask(*others: Any) -> Any:
            share = random.choice([0, 0.1, 1])
            whole = random.random(raw.shape) < share
            return [whole, whole[:1, :1], np.array(share == 1), *others][random.integers(3 + len(others))]

        filled, ambiguous = mask(), mask(None)
        flagged = mask(None)
        masks = [np.broadcast_to(False if m is None else m, raw.shape) for m in (filled, flagged, ambiguous)]
        truth, expected = np.full(raw.shape, np.nan, np.float32), dict(NO_RULE)
        for index in np.ndindex(raw.shape):
            with np.errstate(over="ignore"):
                value = np.float32(raw[index])
            fill, flag, unsure = (m[index] for m in masks)
            tests = {
                "fill": fill,
                "undeclared_fill": abs(float(value) / -1e30 - 1) < 1e-6,
                "default_fill": abs(float(value) / 9.969209968386869e36 - 1) < 1e-6,
                "nan": np.isnan(value),
                "infinite": np.isinf(value),
                "flagged": flag,
                "ambiguous": unsure,
            }
            rule = next((rule for rule, applies in tests.items() if applies), None)
            if rule is None:
                truth[index] = value
            else:
                expected[rule] += 1
        given = raw.copy() if seed % 3 else np.asfortranarray(raw)
        given.flags.writeable = bool(seed % 2)
        values, counts = base.invalidate(given, filled, flagged, ambiguous)
        np.testing.assert_array_equal(values, truth)
        assert counts == expected
        assert values.flags.c_contiguous
        if not given.flags.writeable:
            np.testing.assert_array_equal(given, raw)


def write_filtered(path: Path, values: np.ndarray, chunks: tuple[int, ...], filters: Sequence[str]) -> h5py.Dataset:
    """A variable with filters in any order; its file stays open."""
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_chunk(chunks)
    for name in filters:
        getattr(layout, f"set_{name}")(*[1] * (name == "deflate"))
    space = h5py.h5s.create_simple(values.shape)
    file = h5py.File(path, "w")
    variable = h5py.Dataset(h5py.h5d.create(file.id, b"v", h5py.h5t.py_create(values.dtype), space, layout))
    variable[...] = values
    return variable


class TestChunks:
    """HDF5's chunks as their filters are undone here, against h5py and zlib."""

    @pytest.mark.parametrize("dtype", ["u1", "<u2", ">f4", "<f4", "<f8"])
    @pytest.mark.parametrize(
        "filters", ["", "shuffle deflate fletcher32", "fletcher32 shuffle deflate", "deflate shuffle"]
    )
    def test_any_part(self, tmp_path: Path, dtype: str, filters: str) -> None:
        values = np.random.default_rng(0).normal(100, 30, (5, 7, 6)).astype(dtype)
        for chunks in ((1, 7, 6), (2, 3, 6), (5, 4, 2), (1, 1, 1)):
            variable = write_filtered(tmp_path / "a.h5", values, chunks, filters.split())
            for cut in (
                (slice(5), slice(7), slice(6)),
                (slice(1, 4), slice(7), slice(6)),
                (slice(5), slice(2, 7), slice(1, 5)),
            ):
                found = hdf5.read(variable, *cut)
                np.testing.assert_array_equal(found, values[cut])
                assert found.dtype == values.dtype
            variable.file.close()

    def test_what_zlib_refuses_is_refused(self, tmp_path: Path) -> None:
        random = np.random.default_rng(0)
        values = random.normal(100, 30, (1, 40, 16)).astype(np.float32)
        variable = write_filtered(tmp_path / "a.h5", values, values.shape, ("shuffle", "deflate"))
        _, whole = variable.id.read_direct_chunk((0, 0, 0))
        streams = [whole[:n] for n in range(1, len(whole), 97)] + [whole, whole[:-1], whole + b"\0", whole + whole]
        for first in range(256):  # each header whose check is right
            second = next(second for second in range(32) if (first * 256 + second) % 31 == 0)
            streams.append(bytes([first, second]) + whole[2:])
        for position in random.integers(0, 8 * len(whole), 400):
            flipped = bytearray(whole)
            flipped[position // 8] ^= 1 << position % 8
            streams.append(bytes(flipped))
        for size in (values.nbytes - 1, values.nbytes, values.nbytes + 1, values.nbytes + 5, 2**22):
            streams.append(zlib.compress(bytes(size)))
        n_refused = 0
        for stream in streams:
            inflater = zlib.decompressobj()
            try:
                content = inflater.decompress(stream)
                sound = inflater.eof and not inflater.unused_data and len(content) == values.nbytes
            except zlib.error:
                sound = False
            variable.id.write_direct_chunk((0, 0, 0), stream)
            if sound:
                unshuffled = np.frombuffer(content, np.uint8).reshape(4, -1).T
                assert hdf5.read(variable).tobytes() == unshuffled.tobytes()
            else:
                n_refused += 1
                with pytest.raises(ValueError, match="chunk"):
                    hdf5.read(variable)
        assert 500 < n_refused < len(streams)
        variable.file.close()


class TestThreads:
    """Blocks of one scene, read by four threads at the same time."""

    @pytest.fixture(autouse=True)
    def _switch_often(self) -> Iterator[None]:
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        yield
        sys.setswitchinterval(interval)

    @pytest.mark.parametrize("kind", ["tempo", "mat 5", "mat 7.3", "envi bil", "envi bip", "envi bsq", *KINDS, "tiles"])
    def test_as_one_thread(self, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        values = np.tile(cube(), (8, 1, 1)) * np.linspace(1, 2, 8 * NY, dtype=np.float32)[:, None, None]
        given: dict[str, Any] = {}
        if kind == "tempo":
            path = write_granule(tmp_path / NAME)
        elif kind.startswith("mat"):
            path, given = write_mat(tmp_path / "a.mat", kind[4:], {"Y": values}), {"wavelength": GIVEN}
        elif kind.startswith("envi"):
            path = write_envi(tmp_path / "a.hdr", values, interleave=kind[5:])
        elif kind == "tiles":
            path = legacy_folder(tmp_path / "tiles", values.reshape(8, NY, NX, NC), healthy=True) / "00000.pt"
            given = {"wavelength": GIVEN}
        else:
            path = write(tmp_path, kind, scene_variables(values))
        with open_reader(path, **given) as scene:
            ny, nx, _ = scene.shape
            windows = [(slice(y, y + 2), slice(x, x + 3)) for y in range(0, ny, 2) for x in range(0, nx, 3)] * 4
            serial = [(*scene.read(*window), scene.read_noise(*window)) for window in windows]
        opened = []
        open_file = type(scene)._open

        def open_slowly(self: Scene) -> Any:
            opened.append(1)
            time.sleep(0.05)
            return open_file(self)

        loaded = []
        load = scipy.io.loadmat
        monkeypatch.setattr(scipy.io, "loadmat", lambda *a, **k: (loaded.append(1), time.sleep(0.05), load(*a, **k))[2])
        monkeypatch.setattr(type(scene), "_open", open_slowly)
        with scene, ThreadPoolExecutor(4) as pool:
            parallel = list(pool.map(lambda window: (*scene.read(*window), scene.read_noise(*window)), windows))
        for (radiance, counts, noise), (expected, n, level) in zip(parallel, serial, strict=True):
            np.testing.assert_array_equal(radiance, expected)
            assert counts == n
            np.testing.assert_array_equal(noise, level)
        assert len(opened) == 1
        assert len(loaded) == (kind == "mat 5")


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
    def test_reading_again(self, tmp_path: Path, version: str) -> None:
        """What was invalid in the numbers that are kept is so again."""
        values = cube()
        values[1, 0, 2] = -1e30
        path = write_mat(tmp_path / "a.mat", version, {"Y": flat(values), "lines": NY, "cols": NX})
        with open_reader(path, wavelength=GIVEN) as scene:
            for _ in range(2):
                assert scene.read(ALL, slice(0, 1))[1] == NO_RULE | {"undeclared_fill": 1}

    @VERSIONS
    def test_three_dimensional(self, tmp_path: Path, version: str) -> None:
        values = cube().astype(np.float64)
        values[0, 0] = (np.nan, np.inf, -1e30, 0)
        truth = values.astype(np.float32)
        truth[0, 0, :3] = np.nan
        file = write_mat(tmp_path / "a.mat", version, {"scene": values})
        with open_scene(file, wavelength=GIVEN) as ds:
            np.testing.assert_array_equal(ds.radiance.values, truth)
            np.testing.assert_array_equal(ds.wavelength.values, [400, 500, 600, 700])
            assert ds.wavelength.dims == ("channel",)
            assert ds.attrs["format"] == "matlab"
        with open_reader(file, wavelength=[1.0, 30, 40, 50], region=[0, 5, 0, 3]) as scene:
            assert (scene.format, scene.band, scene.units, scene.time) == ("matlab", None, None, None)
            assert scene.name == "a_y0-5_x0-3"
            assert scene.coordinates() == scene.places == {}
            read, counts = scene.read(slice(0, 2))
            np.testing.assert_array_equal(read, truth[0:2, 0:3])
            assert counts == NO_RULE | {"undeclared_fill": 1, "nan": 1, "infinite": 1}
            assert scene.read(slice(3, 3))[0].shape == (0, 3, NC)

    @VERSIONS
    @pytest.mark.parametrize("names", [("lines", "cols"), ("nRow", "nCol"), ("ROWS", "Cols"), None])
    def test_bands_by_pixels(self, tmp_path: Path, version: str, names: tuple[str, str] | None) -> None:
        arrays: dict[str, Any] = {"Y": flat(cube()), "other": np.ones((3, 7))}
        size = None if names else [NY, NX]
        if names:
            arrays |= {names[0]: np.uint8(NY), names[1]: np.float64(NX)}
        file = write_mat(tmp_path / "a.mat", version, arrays)
        with open_reader(file, size=size, wavelength=GIVEN) as scene:
            assert scene.shape == (NY, NX, NC)
            values, counts = scene.read(ALL)
            np.testing.assert_array_equal(values, cube())
            assert values.flags.c_contiguous
            assert counts == NO_RULE
            np.testing.assert_array_equal(scene.read(slice(2, 5))[0], cube()[2:5])
            np.testing.assert_array_equal(pickle.loads(pickle.dumps(scene)).read(slice(2, 5))[0], cube()[2:5])
            if version != "7.3":
                file = file.rename(tmp_path / "b.mat")  # loaded once, and kept
            np.testing.assert_array_equal(scene.read(slice(5, 6))[0], cube()[5:])
        with open_reader(file, size=size, wavelength=GIVEN, region=[1, 5, 2, 4]) as scene:
            np.testing.assert_array_equal(scene.read(slice(1, 3))[0], cube()[2:4, 2:4])
            assert scene.read(slice(0, 0))[0].shape == (0, 2, NC)

    @VERSIONS
    def test_several_candidates(self, tmp_path: Path, version: str) -> None:
        arrays = {"truth": cube()[..., :2], "Y": flat(cube()), "lines": NY, "cols": NX, "M": np.ones((NC, 3))}
        file = write_mat(tmp_path / "a.mat", version, arrays)
        with refused(InputError, "truth (6 x 5 x 2)", "Y (4 x 30)", key="variable", path=file) as caught:
            open_reader(file, wavelength=GIVEN)
        assert "M (" not in str(caught.value)
        with open_reader(file, wavelength=GIVEN, variable="Y") as scene:
            np.testing.assert_array_equal(scene.read(ALL)[0], cube())
        refuse(file, "variable", "'Z'", "truth (6 x 5 x 2)", variable="Z", wavelength=GIVEN)
        refuse(file, "size", "4 x 3", "6 x 5", "30", variable="M", wavelength=GIVEN)

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
        with open_reader(file, wavelength=GIVEN) as scene:
            np.testing.assert_array_equal(scene.read(ALL)[0], cube())
        for name in ("Z", "mask", "S", "text"):
            refuse(file, "variable", f"'{name}'", "Y (6 x 5 x 4)", variable=name, wavelength=GIVEN)
        only = write_mat(tmp_path / "b.mat", version, {"Z": arrays["Z"], "v": arrays["v"]})
        refuse(only, "variable", "Z (6 x 5 x 4 complex", "v (40 x 1", error=InputError, wavelength=GIVEN)

    def test_size(self, tmp_path: Path) -> None:
        file = write_mat(tmp_path / "a.mat", "5", {"Y": flat(cube())})
        refuse(file, "size", "4 x 30", wavelength=GIVEN)
        refuse(file, "size", "4 x 30", "7 x 5", wavelength=GIVEN, size=[7, 5], variable="Y")
        refuse(file, "variable", "Y (4 x 30", "7 x 5", error=InputError, wavelength=GIVEN, size=[7, 5])
        for size in ([6], [0, 5], "65", [6.0, 5], [True, 30]):
            refuse(file, "size", "[ny, nx]", wavelength=GIVEN, size=size)
        cubic = write_mat(tmp_path / "b.mat", "5", {"Y": cube()})
        refuse(cubic, "size", "[5, 6]", "6 x 5 x 4", wavelength=GIVEN, size=[5, 6])
        assert open_reader(cubic, wavelength=GIVEN, size=[6, 5]).shape == (NY, NX, NC)
        two = write_mat(tmp_path / "c.mat", "5", {"Y": flat(cube()), "lines": 6, "cols": 5, "nRow": 5, "nCol": 6})
        refuse(two, "size", "(6, 5), (5, 6)", error=InputError, wavelength=GIVEN)

    @VERSIONS
    def test_vectors_and_scalars_of_the_file(self, tmp_path: Path, version: str) -> None:
        for name in ("wavelength", "Wavelengths", "WL", "lambda"):
            file = write_mat(tmp_path / "a.mat", version, {"Y": cube(), name: np.array([[401, 402, 403, 404.5]]).T})
            np.testing.assert_array_equal(open_reader(file).wavelength, [401, 402, 403, 404.5])
            np.testing.assert_array_equal(open_reader(file, wavelength=GIVEN).wavelength, [400, 500, 600, 700])
        for value in (np.nan, np.inf, 2.5, 0.0):
            file = write_mat(tmp_path / "a.mat", version, {"Y": flat(cube()), "nRow": NY, "nCol": value})
            refuse(file, "nCol", f"= {value} ", error=InputError, wavelength=GIVEN)

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ([400, 500, 600], ["3 values", "4 channels"]),
            ([400, 500, np.nan, 700], ["1 of 4", "finite"]),
            ([0, -1, 600, 700], ["2 of 4", "above 0"]),
            ([400, 500, 500, 450], ["2 of 3", "500 to 500"]),
            ([0.4, 0.5, 0.6, 2.5], ["2.5", "micrometres"]),
        ],
    )
    def test_wavelengths_refused(self, tmp_path: Path, values: list[float], words: list[str]) -> None:
        bare = write_mat(tmp_path / "a.mat", "5", {"Y": cube()})
        refuse(bare, "wavelength", *words, wavelength=values)
        refuse(write_mat(tmp_path / "b.mat", "5", {"Y": cube(), "wl": np.array(values)}), "wl", *words)

    def test_wavelengths_never_invented(self, tmp_path: Path) -> None:
        file = write_mat(tmp_path / "a.mat", "5", {"Y": cube()})
        refuse(file, "wavelength", "4 channels", error=InputError)
        for given, word in (({"first": 1}, "['first']"), ("400..700", "'400..700'"), (np.ones((1, 4)), "(1, 4)")):
            refuse(file, "wavelength", word, wavelength=given)
        two = write_mat(tmp_path / "b.mat", "5", {"Y": cube(), "wl": np.ones(4), "lambda": np.ones(4)})
        refuse(two, "wavelength", "wl, lambda", error=InputError)
        square = write_mat(tmp_path / "c.mat", "5", {"Y": cube(), "wl": np.ones((2, 2))})
        refuse(square, "wl", "(2, 2)", error=InputError)

    def test_version_4(self, tmp_path: Path) -> None:
        file = tmp_path / "a.mat"
        scipy.io.savemat(file, {"Y": flat(cube())}, format="4")
        refuse(file, None, "version 4", "-v7.3", error=InputError, wavelength=GIVEN)
        content = file.read_bytes()
        header = struct.unpack("<5i", content[:20])
        file.write_bytes(struct.pack(">5i", 1000 + header[0], *header[1:]) + content[20:])  # as another machine wrote
        refuse(file, None, "version 4", error=InputError, wavelength=GIVEN)
        file.write_bytes(bytes(1000))
        refuse(file, None, "version 5", error=InputError, wavelength=GIVEN)


class TestDamage:
    @pytest.mark.parametrize("kind", ["tempo", "matlab", "netcdf4", "zarr2", "zarr3"])
    def test_damaged_rows_harm_only_themselves(self, tmp_path: Path, kind: str) -> None:
        """The surest proof of laziness: with one row's chunk overwritten, the other rows are still read."""
        given: dict[str, Any] = {}
        if kind == "tempo":
            path = granule(tmp_path / NAME)
            overwrite_chunk(path, f"{UV}/radiance", 4, 0, 0)
        elif kind == "matlab":
            path, given = tmp_path / "a.mat", {"wavelength": GIVEN}
            with h5py.File(path, "w") as h5:
                h5.create_dataset("Y", data=cube().T, chunks=(NC, NX, 1), compression="gzip")
            overwrite_chunk(path, "Y", 0, 0, 4)
        else:
            path = write(tmp_path, kind, scene_variables())
            if kind == "netcdf4":
                overwrite_chunk(path, "cube", 4, 0, 0)
            else:
                chunk_file(path, 4).write_bytes(b"\xff" * 20)
        with open_reader(path, **given) as scene:
            np.testing.assert_array_equal(scene.read(slice(0, 4))[0], cube()[:4])
            with refused(InputError, path=path):
                scene.read(slice(4, 5))
        with open_scene(path, **given) as ds:
            np.testing.assert_array_equal(ds.radiance[5:].values, cube()[5:])
            with refused(InputError, path=path):
                ds.radiance.load()

    @pytest.mark.parametrize("version", ["5", "5 compressed"])
    def test_damaged_mat_5(self, tmp_path: Path, version: str) -> None:
        path = write_mat(tmp_path / "a.mat", version, {"Y": np.random.default_rng(0).random((60, 50, NC))})
        content = path.read_bytes()
        for cut in (1, 8, 100, 400):
            path.write_bytes(content[:-cut])
            refuse(path, None, "ends at", error=InputError, wavelength=GIVEN)
        if version == "5 compressed":
            path.write_bytes(content[:-2000] + bytes(1000) + content[-1000:])
            refuse(path, None, "corrupt", error=InputError, wavelength=GIVEN)


class TestPaths:
    def test_urls_and_homes(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for url in ("s3://bucket/a.zarr", f"file://{file.parent}/a.zarr"):
            with refused(InputError, "local", value=url):
                open_reader(url)
        monkeypatch.setenv("HOME", str(file.parent))
        with open_scene(f"~/{NAME}") as ds:
            np.testing.assert_array_equal(ds.radiance.values, cube())
        assert open_reader(Path("~") / NAME).path == file
        monkeypatch.chdir(file.parent)
        assert open_reader(file.rename("~copy.nc")).shape == (NY, NX, NC)  # no user of that name: a file's own name

    def test_format_is_told_by_content(self, tmp_path: Path) -> None:
        assert open_reader(granule(tmp_path / "granule.dat")).format == "tempo"
        for version in ("5", "7.3"):
            file = write_mat(tmp_path / f"a{version}.dat", version, {"Y": cube()})
            assert open_reader(file, wavelength=GIVEN).format == "matlab"


def test_real_file(real_data: Path) -> None:
    file = real_data / "Samson.mat"
    refuse(file, "variable", "S_GT (95 x 95 x 3)", "Y (156 x 9025)", error=InputError, wavelength=GIVEN)
    refuse(file, "wavelength", "156 channels", error=InputError, variable="Y")
    truth = scipy.io.loadmat(file)["Y"].T.reshape(95, 95, 156, order="F").astype(np.float32)
    with open_scene(file, variable="Y", wavelength={"first": 401, "last": 889}) as ds:
        np.testing.assert_array_equal(ds.radiance.values, truth)
        assert int((ds.radiance == 0).sum()) == 1146
        assert not np.isnan(ds.radiance.values).any()
        np.testing.assert_allclose(ds.wavelength.values, np.linspace(401, 889, 156))
