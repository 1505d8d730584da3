"""`spectralvae encode`: what its files hold, what it refuses, and what is left of it when it is cut off."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5netcdf
import h5py
import numpy as np
import pytest
import scipy.io
import xarray as xr
from inferring import WAVELENGTH, Result, Runs, contents, granule, names, radiance, write_config
from tiny import N_CHANNELS, SETTINGS, tiny_model, tiny_normalization, write_tiny

from spectralvae import cli, encode_scene, load_model, open_scene
from spectralvae.files import writer_base
from spectralvae.inference import reading
from spectralvae.simulate import simulate_granules
from spectralvae.weights.artifact import pack_model, write_folder
from spectralvae.weights.normalization import Normalization

BAND, OTHER_BAND = "band_290_490_nm", "band_540_740_nm"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "export", step=12)


@pytest.fixture
def make(write_granule: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a granule into tmp_path."""
    return lambda name, *size, **changes: granule(write_granule, tmp_path / name, *size, **changes)


@pytest.fixture
def encode(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """A function that runs the command in this process; the name is that of config and folder."""

    def run(*inputs: Any, name: str = "run", options: tuple[str, ...] = (), **more: Any) -> Result:
        config = write_config(tmp_path / f"{name}.yaml", tmp_path / name, inputs=inputs, **{"model": model, **more})
        capfd.readouterr()
        code = cli.run(["encode", str(config), *options])
        return Result(code, *capfd.readouterr(), tmp_path / name)

    return run


def expected(model: Path, path: Path, **options: Any) -> xr.Dataset:
    """What the latents of a file must be."""
    arguments = {key: options.pop(key) for key in ("region", "band") if key in options}
    return encode_scene(load_model(model), open_scene(path, **arguments), batch_size=1, **options)


def opened(path: Path) -> xr.Dataset:
    with xr.open_dataset(path) as dataset:
        return dataset.load()


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "suffix"), [("netcdf", "nc"), ("zarr", "zarr")])
def test_latents_of_a_granule(encode: Any, make: Any, model: Path, kind: str, suffix: str) -> None:
    source = make("scene.nc", 21, 19)
    done = encode(source, format=kind, log_variance=True)

    assert done.code == 0 and done.err == ""
    assert names(done.folder) == {f"scene.latents.{suffix}", "run.json", "config.yaml"}
    found, wanted = opened(done.folder / f"scene.latents.{suffix}"), expected(model, source, log_variance=True)
    xr.testing.assert_equal(found, wanted)
    assert found.latent.dtype == found.log_variance.dtype == np.float32
    assert set(found.latent.coords) == {"y", "x", "latitude", "longitude", "time"}
    assert set(found.valid.coords) == {"wavelength"}
    np.testing.assert_array_equal(found["mean"], tiny_normalization().mean)
    np.testing.assert_array_equal(found["std"], tiny_normalization().std)


def test_places_times_and_shares_of_cells(encode: Any, make: Any, tmp_path: Path) -> None:
    """Against what h5py finds in the source."""
    encode(make("scene.nc", 8, 8))
    with h5py.File(tmp_path / "scene.nc") as file:
        raw = file[f"{BAND}/radiance"][...]
        latitude, longitude = (file[f"{BAND}/{name}"][...].astype(float) for name in ("latitude", "longitude"))
        seconds = file["time"][...]
    found = opened(tmp_path / "run/scene.latents.nc")

    valid = raw >= 1.5
    np.testing.assert_array_equal(found.valid, valid)
    cells = valid.reshape(4, 2, 4, 2, N_CHANNELS)
    np.testing.assert_allclose(found.valid_fraction, cells.mean(axis=(1, 3, 4)), rtol=1e-6)
    middle = np.datetime64("1980-01-06T00:00:00", "ns") + (1e9 * seconds.reshape(4, 2).mean(axis=1)).astype("m8[ns]")
    assert np.abs(found.time.values - middle).max() < np.timedelta64(1, "us")
    # On the sphere the middle of four points is nearly, over these 50 degrees not exactly, the mean of their angles.
    for name, angles in (("latitude", latitude), ("longitude", longitude)):
        assert np.abs(found[name] - angles.reshape(4, 2, 4, 2).mean(axis=(1, 3))).max() < 8
    x, y, z = (
        part.reshape(4, 2, 4, 2).sum(axis=(1, 3))
        for part in (
            np.cos(np.radians(latitude)) * np.cos(np.radians(longitude)),
            np.cos(np.radians(latitude)) * np.sin(np.radians(longitude)),
            np.sin(np.radians(latitude)),
        )
    )
    np.testing.assert_allclose(found.latitude, np.degrees(np.arctan2(z, np.hypot(x, y))), rtol=1e-5)
    np.testing.assert_allclose(found.longitude, np.degrees(np.arctan2(y, x)), rtol=1e-5)
    np.testing.assert_array_equal(found.y, [0.5, 2.5, 4.5, 6.5])


def test_attributes_tell_where_latents_come_from(encode: Any, make: Any, model: Path) -> None:
    source = make("scene.nc", 9, 9)
    done = encode(source, overlap=4)
    found = opened(done.folder / "scene.latents.nc").attrs

    manifest = json.loads((model / "manifest.json").read_text())
    assert found["source"] == "scene.nc" and found["source_format"] == "tempo"
    assert found["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert found["model_sha256"] == manifest["files"]["model.safetensors"]["sha256"]
    assert (found["tile_size"], found["overlap"], found["pixels_per_cell"]) == (8, 4, 2)
    assert found["band"] == BAND and found["units"] == "photons/s/cm^2/nm/sr"
    assert found["Conventions"].startswith("CF-1.") and "encoded by spectralvae" in found["history"]
    settings = json.loads(found["normalization"])
    assert (settings["transform"], settings["clip"], settings["min_radiance"]) == ("log_zscore", 9.5, 1.5)
    assert done.record["model_sha256"] == found["model_sha256"]


@pytest.mark.parametrize("kind", ["netcdf", "zarr"])
def test_attributes_of_variables_are_those_of_cf(encode: Any, make: Any, kind: str) -> None:
    done = encode(make("scene.nc", 9, 9), format=kind)
    (path,) = done.folder.glob("*.latents.*")
    with xr.open_dataset(path, decode_cf=False) as raw:
        for name, variable in raw.variables.items():
            assert "long_name" in variable.attrs or "standard_name" in variable.attrs, name
            for other in variable.attrs.get("coordinates", "").split():
                assert set(raw[other].dims) <= set(variable.dims), (name, other)
        assert raw.latitude.attrs["standard_name"] == "latitude" and raw.latitude.attrs["units"] == "degrees_north"
        assert raw.longitude.attrs["standard_name"] == "longitude" and raw.longitude.attrs["units"] == "degrees_east"
        assert raw.time.attrs["standard_name"] == "time" and raw.time.attrs["units"].startswith("seconds since")
        assert raw.wavelength.attrs["units"] == "nm"
        np.testing.assert_array_equal(raw.valid.attrs["flag_values"], [0, 1])
        assert raw.valid.attrs["flag_meanings"].split() == ["invalid", "valid"]
        assert np.isnan(raw.latent.attrs["_FillValue"]) and np.isfinite(raw.latent).all()


@pytest.mark.parametrize("kind", ["netcdf", "zarr"])
def test_copies_of_the_sources_own_variables(encode: Any, make: Any, kind: str) -> None:
    """The group `source`, which opens in xarray with all others."""
    source = make("scene.nc", 9, 7)
    done = encode(source, format=kind)
    (path,) = done.folder.glob("*.latents.*")
    with xr.open_datatree(path, decode_cf=False) as found, xr.open_datatree(source, decode_cf=False) as wanted:
        for group in ("", BAND):
            ours, theirs = found[f"source/{group}"].dataset, wanted[f"/{group}"].dataset
            for name in set(theirs.variables) - {"radiance"}:
                np.testing.assert_array_equal(ours[name].values, theirs[name].values)
                assert ours[name].attrs == theirs[name].attrs and ours[name].dims == theirs[name].dims
            assert "radiance" not in ours


def test_a_simulated_granule(encode: Any, tmp_path: Path) -> None:
    """Of another size of network, with all that such a file has."""
    options = {"seed": 3, "n_granules": 1, "shape": (13, 17), "n_channels": 16, "products": (), "invalid_fraction": 0.1}
    (source,) = simulate_granules(tmp_path / "granules", **options)
    settings = {**SETTINGS, "shape": [16, 8, 8]}
    scene = open_scene(source)
    log = np.log(scene.radiance.values.reshape(-1, 16))
    wavelength = scene.wavelength.values.mean(axis=0)
    statistics = np.nanmean(log, axis=0, dtype=float), np.nanstd(log, axis=0, dtype=float)
    normalization = Normalization("log_zscore", *statistics, 10.0, 1.0, BAND, wavelength, flag_bits=(0, 1, 2, 5))
    other = tmp_path / "other"
    write_folder(other, pack_model(tiny_model(settings=settings), settings, normalization, None))

    done = encode(source, model=other)

    assert done.code == 0
    found = opened(done.folder / f"{source.stem}.latents.nc")
    xr.testing.assert_equal(found, expected(other, source))
    assert found.attrs["scan_start"] == "2024-06-01T15:00:00+00:00"
    assert 0.85 < float(found.valid_fraction.mean()) < 0.95


def test_a_scene_without_places_and_times(encode: Any, make: Any, model: Path) -> None:
    source = make("scene.nc", 9, 9, geometry=None, seconds=None)
    done = encode(source)

    found = opened(done.folder / "scene.latents.nc")
    xr.testing.assert_equal(found, expected(model, source))
    assert not {"latitude", "longitude", "time"} & set(found.variables)


# --- shapes and samples ---------------------------------------------------------------------------


SHAPES = [(3, 5), (7, 13), (1, 30), (30, 1), (1, 1), (8, 8), (23, 19)]


def test_scenes_of_any_shape(encode: Any, make: Any, model: Path) -> None:
    """Smaller than a tile of 8 x 8, of prime sizes, of one row, one column, one pixel."""
    sources = {shape: make(f"scene_{shape[0]}_{shape[1]}.nc", *shape) for shape in SHAPES}
    done = encode(*sources.values(), log_variance=True)

    assert done.code == 0
    for shape, source in sources.items():
        found = opened(done.folder / f"{source.stem}.latents.nc")
        assert found.latent.shape == (3, -(-shape[0] // 2), -(-shape[1] // 2))
        assert found.valid.shape == (*shape, N_CHANNELS)
        xr.testing.assert_equal(found, expected(model, source, log_variance=True))


def test_half_of_a_scene_is_invalid(encode: Any, make: Any, model: Path) -> None:
    values = radiance(12, 12, invalid=0)
    values[:, 6:] = np.nan
    values[2, 2, 3] = 1.0  # less than min_radiance
    flag = np.zeros((12, 12, N_CHANNELS), int)
    flag[0, 0] = 1
    source = make("scene.nc", 12, 12, values=values, flag=flag)
    done = encode(source)

    found = opened(done.folder / "scene.latents.nc")
    xr.testing.assert_equal(found, expected(model, source))
    valid = np.isfinite(values) & (values >= 1.5) & (flag == 0)
    np.testing.assert_array_equal(found.valid, valid)
    facts = done.record["files"]["scene.latents.nc"]
    assert facts["n_samples"] == valid.size and facts["n_valid"] == valid.sum()
    small = int((np.where(flag == 0, values, 9) < 1.5).sum())
    assert {rule: n for rule, n in facts["invalid"].items() if n} == {
        "fill": 12 * 6 * N_CHANNELS,
        "flagged": N_CHANNELS,
        "below_min_radiance": small,
    }


@pytest.mark.parametrize("kind", ["netcdf", "zarr"])
def test_nothing_valid_is_refused(encode: Any, make: Any, kind: str) -> None:
    """Files that are done before stay, and of that one nothing does."""
    dark = np.full((9, 9, N_CHANNELS), np.nan)
    done = encode(make("a.nc", 9, 9), make("night.nc", 9, 9, values=dark), make("z.nc", 9, 9), format=kind)

    assert done.code == 2
    assert "night.nc: none of its 486 samples is valid (fill 486): leave the file out, or set" in done.message
    suffix = "nc" if kind == "netcdf" else kind
    assert names(done.folder) == {f"a.latents.{suffix}", "run.json", "config.yaml"}
    assert done.record["state"] == "failed" and "night.nc" in done.record["error"]
    assert list(done.record["files"]) == [f"a.latents.{suffix}"]


@pytest.mark.parametrize("kind", ["netcdf", "zarr"])
def test_nothing_valid_is_left_out(encode: Any, make: Any, kind: str) -> None:
    dark = np.full((9, 9, N_CHANNELS), np.nan)
    inputs = [make("a.nc", 9, 9), make("night.nc", 9, 9, values=dark), make("z.nc", 9, 9)]
    refused = encode(*inputs, format=kind)
    assert refused.code == 2

    done = encode(*inputs, format=kind, all_invalid="leave_out")  # it goes on where it stopped

    suffix = "nc" if kind == "netcdf" else kind
    assert done.code == 0 and done.err == ""
    assert "1 of 3 files are done already" in done.out
    (warning,) = (line for line in done.out.splitlines() if line.startswith("WARNING"))
    assert "night.nc: left out: none of its 486 samples is valid (fill 486)" in warning
    assert done.out.endswith("2 files, 1 left out\n")
    assert names(done.folder) == {f"a.latents.{suffix}", f"z.latents.{suffix}", "run.json", "config.yaml"}
    assert "none of its 486" in done.record["files"][f"night.latents.{suffix}"]["left_out"]


def test_a_scene_that_turns_out_empty_never_has_its_name(
    encode: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in between, it would be taken for done."""
    seen: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: seen.append(Path(target).name) or replace(self, target))

    done = encode(make("a.nc", 3, 3, values=np.full((3, 3, N_CHANNELS), np.nan)), all_invalid="leave_out")

    assert done.code == 0 and "run.json" in seen
    assert "a.latents.nc" not in seen


# --- which part of which file ---------------------------------------------------------------------


def test_regions_are_scenes(encode: Any, make: Any, model: Path) -> None:
    source = make("scene.nc", 20, 20)
    regions = [[0, 9, 3, 20], [9, 20, 0, 20]]
    done = encode(*({"path": str(source), "region": region} for region in regions))

    assert done.code == 0
    for (y0, y1, x0, x1), region in zip(regions, regions, strict=True):
        found = opened(done.folder / f"scene_y{y0}-{y1}_x{x0}-{x1}.latents.nc")
        xr.testing.assert_equal(found, expected(model, source, region=region))
        assert json.loads(found.attrs["source_arguments"]) == {"region": region}


def test_the_models_band_and_flags_are_used(encode: Any, make: Any, tmp_path: Path) -> None:
    """Not the file's first band, and not the reader's own choice of flags."""
    flag = np.zeros((9, 9, N_CHANNELS), int)
    flag[2], flag[3] = 1 << 3, 1 << 0
    source = make("scene.nc", 9, 9, flag=flag, seed=1, values=radiance(9, 9, 1, invalid=0))
    with h5netcdf.File(source, "a") as file:
        group = file.create_group(OTHER_BAND)
        group.dimensions = {"spectral_channel": N_CHANNELS}
        dims = ("mirror_step", "xtrack", "spectral_channel")
        group.create_variable("radiance", dims, data=radiance(9, 9, 2, invalid=0))
        wavelength = np.broadcast_to(WAVELENGTH + 250, (9, N_CHANNELS)).astype(np.float32)
        group.create_variable("nominal_wavelength", dims[1:], data=wavelength)
    normalization = tiny_normalization(band=OTHER_BAND, wavelength=WAVELENGTH + 250, min_radiance=1e-3)
    other = write_tiny(tmp_path / "other", normalization=normalization)
    warnings = write_tiny(tmp_path / "flags", normalization=tiny_normalization(flag_bits=(3,), min_radiance=1e-3))

    first, second = encode(source, model=other, name="first"), encode(source, model=warnings, name="second")

    assert (first.code, second.code) == (0, 0), (first, second)
    found = opened(first.folder / "scene.latents.nc")
    xr.testing.assert_equal(found, expected(other, source, band=OTHER_BAND))
    assert found.attrs["band"] == OTHER_BAND
    np.testing.assert_array_equal(opened(second.folder / "scene.latents.nc").valid, flag != 1 << 3)


def test_other_formats(encode: Any, tmp_path: Path, model: Path) -> None:
    """netCDF with its axes in another order, Zarr, and MATLAB: the same scene, the same latents."""
    values = radiance(11, 14)
    dims = ("channel", "y", "x")
    scene = xr.Dataset(
        {"radiance": (dims, values.transpose(2, 0, 1), {"units": "W"})},
        {"wavelength": ("channel", WAVELENGTH, {"units": "nm"})},
    )
    scene.to_netcdf(tmp_path / "plain.nc", engine="h5netcdf")
    scene.to_zarr(tmp_path / "cube.zarr", consolidated=False, encoding={"radiance": {"chunks": (6, 11, 14)}})
    scipy.io.savemat(tmp_path / "matlab.mat", {"cube": values})
    given = {"first": float(WAVELENGTH[0]), "last": float(WAVELENGTH[-1])}

    inputs = [
        tmp_path / "plain.nc",
        tmp_path / "cube.zarr",
        {"path": str(tmp_path / "matlab.mat"), "wavelength": given},
    ]
    done = encode(*inputs)

    assert done.code == 0, done
    wanted = encode_scene(load_model(model), values, batch_size=1)
    for name in ("plain", "cube", "matlab"):
        found = opened(done.folder / f"{name}.latents.nc")
        np.testing.assert_array_equal(found.latent, wanted.latent)
        np.testing.assert_array_equal(found.valid, wanted.valid)
        np.testing.assert_allclose(found.wavelength, WAVELENGTH, rtol=1e-12)
    assert json.loads(opened(done.folder / "matlab.latents.nc").attrs["source_arguments"]) == {"wavelength": given}
    digest = opened(done.folder / "cube.latents.nc").attrs["source_sha256"]
    files = sorted(path for path in (tmp_path / "cube.zarr").rglob("*") if path.is_file())
    lines = [f"{_sha256(path)}  {path.relative_to(tmp_path / 'cube.zarr')}\n" for path in files]
    assert digest == hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- refusals -------------------------------------------------------------------------------------


def refused(done: Result, *parts: str) -> None:
    """One line, exit code 2, and nothing made."""
    assert done.code == 2, done
    for part in parts:
        assert part in done.message
    assert not done.folder.exists()


def test_scenes_that_the_model_is_not_for(encode: Any, make: Any) -> None:
    values = radiance(9, 9)
    other = {"values": values, "wavelength": np.broadcast_to(WAVELENGTH + 250, (9, 6)), "band": OTHER_BAND}
    refused(
        encode(make("other.nc", 9, 9, **other)),
        *("other.nc", "(550.00-551.67 nm)", "of the training (300.00-301.67 nm)", "at most one channel (0.333 nm)"),
        "give scenes of that band, or a model of this one",
    )
    shifted = np.broadcast_to(WAVELENGTH + 0.34, (9, 6))
    refused(
        encode(make("shifted.nc", 9, 9, wavelength=shifted)), "shifted.nc", "0.340 nm", "(300.34-302.01 nm)", "0.333 nm"
    )
    few = {"values": values[..., :5], "wavelength": np.broadcast_to(WAVELENGTH[:5], (9, 5))}
    refused(encode(make("few.nc", 9, 9, **few)), "few.nc: has 5 channels, but the model takes 6 (300.00-301.67 nm)")
    refused(encode(make("renamed.nc", 9, 9, band=OTHER_BAND)), f"no '{BAND}' in it; its bands: {OTHER_BAND}")


def test_a_shift_of_less_than_a_channel_is_the_same_band(encode: Any, make: Any) -> None:
    assert encode(make("scene.nc", 9, 9, wavelength=np.broadcast_to(WAVELENGTH + 0.33, (9, 6)))).code == 0


def test_the_last_of_many_is_refused_before_the_first_is_done(encode: Any, make: Any) -> None:
    bad = make("z.nc", 9, 9, wavelength=np.broadcast_to(WAVELENGTH + 1, (9, 6)))
    refused(encode(make("a.nc", 9, 9), bad), "z.nc")


def test_models_that_cannot_be_used(encode: Any, make: Any, tmp_path: Path) -> None:
    source = make("scene.nc", 9, 9)
    bare = tmp_path / "bare"
    write_folder(bare, pack_model(tiny_model(), SETTINGS, None, None))
    refused(encode(source, model=bare), "bare: holds no normalisation", "convert it again with `normalization:")
    blind = write_tiny(tmp_path / "blind", normalization=tiny_normalization(wavelength=None))
    refused(encode(source, model=blind), "blind: its normalisation has no wavelengths", "convert it again with")
    unsized = tmp_path / "unsized"
    settings = {**SETTINGS, "shape": [N_CHANNELS, None, None]}
    write_folder(unsized, pack_model(tiny_model(), settings, tiny_normalization(), None))
    refused(encode(source, model=unsized), "unsized: the size of its training tiles is [None, None]", "convert it")
    refused(encode(source, model=tmp_path), f"{tmp_path}: is neither a checkpoint nor an export folder")
    refused(encode(source, model=tmp_path / "none"), "none: no such file or folder")
    refused(encode(source, model=source), "scene.nc: is not a file of torch.save")


def test_an_overlap_that_does_not_fit(encode: Any, make: Any) -> None:
    source = make("scene.nc", 9, 9)
    for overlap in (3, 8):
        refused(encode(source, overlap=overlap), f"overlap: {overlap} must be a multiple of 2", "below 8")
    refused(encode(source, overlap=-2), "overlap: -2", "greater than or equal to 0")


def test_inputs_that_are_none(encode: Any, make: Any, tmp_path: Path) -> None:
    refused(encode(tmp_path / "none*.nc"), f"inputs: no file matches {tmp_path}/none*.nc")
    refused(encode(tmp_path / "none.nc"), "none.nc: no such file")
    refused(encode("https://example.org/a.nc"), "is a URL; only local files are read")
    (tmp_path / "twins").mkdir()
    first, second = make("scene.nc", 9, 9), make("twins/scene.nc", 9, 9)
    refused(encode(first, second), f"{first} and {second} would both give scene.latents.nc")
    refused(encode(first, tmp_path / "sc*.nc"), f"{first} and {first} would both give scene.latents.nc")


@pytest.mark.parametrize("kind", ["netcdf", "zarr"])
def test_latents_are_no_scene(encode: Any, make: Any, kind: str, tmp_path: Path) -> None:
    encode(make("scene.nc", 9, 9), name="before", format=kind)
    (latents,) = (tmp_path / "before").glob("*.latents.*")
    refused(encode(latents), f"{latents}: is a file of latents, which `decode` takes")


def test_a_damaged_granule(encode: Any, make: Any) -> None:
    source = make("scene.nc", 40, 30)
    content = bytearray(source.read_bytes())
    source.write_bytes(content[: len(content) // 2])
    refused(encode(source), "scene.nc: damaged or truncated")


# --- started again --------------------------------------------------------------------------------


def test_a_finished_run_says_so(encode: Any, make: Any) -> None:
    source = make("scene.nc", 9, 9)
    done = encode(source)
    before = {path: path.stat().st_mtime_ns for path in done.folder.iterdir()}
    again = encode(source)

    assert again.code == 0 and again.err == ""
    assert "this run is finished; nothing to do (--overwrite starts it afresh)" in again.out
    assert {path: path.stat().st_mtime_ns for path in done.folder.iterdir()} == before


def test_another_config_is_refused(encode: Any, make: Any) -> None:
    source = make("scene.nc", 9, 9)
    encode(source)
    done = encode(source, log_variance=True)

    assert done.code == 2
    assert "log_variance: False there, True here" in done.message


def half_done(encode: Any, make: Any, **options: Any) -> list[Path]:
    """A run that failed at the second of two files, which is then mended."""
    dark = np.full((9, 9, N_CHANNELS), np.nan)
    inputs = [make("a.nc", 9, 9), make("b.nc", 9, 9, values=dark)]
    assert encode(*inputs, **options).code == 2
    make("b.nc", 9, 9, seed=1)
    return inputs


def test_a_source_that_has_changed_is_refused(encode: Any, make: Any) -> None:
    inputs = half_done(encode, make)
    after = (inputs[0].parent / "run/a.latents.nc").stat().st_mtime_ns + 10**9
    os.utime(inputs[0], ns=(after, after))

    done = encode(*inputs)
    assert done.code == 2
    assert f"{inputs[0]} has changed since {done.folder}/a.latents.nc was made: start afresh with --ov" in done.message
    assert encode(*inputs, options=("--overwrite",)).code == 0


def test_a_model_that_has_changed_is_refused(encode: Any, make: Any, tmp_path: Path) -> None:
    """The newest checkpoint of a run that goes on is another one by and by."""
    checkpoints = tmp_path / "train/checkpoints"
    write_tiny(checkpoints / "step=000010", seed=0, step=10)
    inputs = half_done(encode, make, model=tmp_path / "train")
    write_tiny(checkpoints / "step=000020", seed=1, step=20)

    done = encode(*inputs, model=tmp_path / "train")
    assert done.code == 2
    assert "step=000020" in done.message and "is not the one that" in done.message and "--overwrite" in done.message
    assert names(done.folder) == {"a.latents.nc", "run.json", "config.yaml"}
    shutil.rmtree(checkpoints / "step=000020")
    assert encode(*inputs, model=tmp_path / "train").code == 0


def test_overwriting_keeps_inputs_and_model(encode: Any, make: Any, model: Path, tmp_path: Path) -> None:
    """Whoever keeps them in the folder of the results would lose them."""
    source = make("scene.nc", 9, 9)
    folder = encode(source).folder
    inside, own = shutil.copy(source, folder / "inside.nc"), shutil.copytree(model, folder / "model")

    done = encode(source, inside, options=("--overwrite",))
    assert done.code == 2
    assert f"inputs: {inside} lies in output_dir" in done.message and "move it" in done.message
    done = encode(source, model=own, options=("--overwrite",))
    assert done.code == 2
    assert f"model: {own} lies in output_dir" in done.message
    assert inside.exists() and own.exists() and (folder / "scene.latents.nc").exists()


def test_a_folder_of_other_things_is_refused(encode: Any, make: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    source = make("run/scene.nc", 9, 9)
    for options in ((), ("--overwrite",)):
        done = encode(source, options=options)
        assert done.code == 2
        assert "is not empty and was not made by this tool" in done.message
    assert source.exists()


# --- cut off --------------------------------------------------------------------------------------

FILES = ("a.nc", "b.nc", "c.nc")


@pytest.mark.parametrize("kind", ["netcdf", "zarr"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_cut_off_in_the_middle_of_a_file(
    encode: Any, make: Any, starter: Runs, model: Path, tmp_path: Path, number: int, kind: str
) -> None:
    inputs = [make(name, 20, 20, seed=i) for i, name in enumerate(FILES)]
    a, b, c = (f"{Path(name).stem}.latents.{'nc' if kind == 'netcdf' else kind}" for name in FILES)
    whole = encode(*inputs, name="whole", format=kind)
    config = write_config(tmp_path / "run.yaml", tmp_path / "run", model, inputs, format=kind)

    child = starter.start("encode", config, ("at_file", b, number, 5))

    run = tmp_path / "run"
    if number == signal.SIGKILL:
        assert child.wait() == -number
        assert names(run) == {a, f".{b}.part", "run.json", "config.yaml"}
    else:
        assert child.wait() == 75 and child.errors == []
        assert names(run) == {a, "run.json", "config.yaml"}
        assert json.loads((run / "run.json").read_text())["state"] == "stopped"
    before = (run / a).stat().st_mtime_ns

    done = encode(*inputs, format=kind)
    assert done.code == 0 and "1 of 3 files are done already" in done.out
    assert (run / a).stat().st_mtime_ns == before
    assert names(run) == {a, b, c, "run.json", "config.yaml"}
    assert done.record["state"] == "finished" and set(done.record["files"]) == {a, b, c}
    assert done.record["files"][a]["n_valid"] == whole.record["files"][a]["n_valid"]
    for name in (a, b, c):
        assert contents(run / name) == contents(whole.folder / name)


# --- several processes ----------------------------------------------------------------------------


def codes(children: Any) -> list[int | None]:
    return [child.wait() for child in children]


def test_two_processes_make_what_one_does(encode: Any, make: Any, starter: Runs, model: Path, tmp_path: Path) -> None:
    dark = np.full((9, 9, N_CHANNELS), np.nan)
    inputs = [make(f"{i}.nc", 11, 9 + i, seed=i) for i in range(3)] + [make("night.nc", 9, 9, values=dark)]
    whole = encode(*inputs, name="whole", all_invalid="leave_out")
    config = write_config(tmp_path / "run.yaml", tmp_path / "run", model, inputs, all_invalid="leave_out")

    children = starter.start_ranks("encode", config, 2)

    assert codes(children) == [0, 0]
    assert names(tmp_path / "run") == names(whole.folder)
    for i in range(3):
        name = f"{i}.latents.nc"
        assert contents(tmp_path / "run" / name) == contents(whole.folder / name)
    record = json.loads((tmp_path / "run/run.json").read_text())
    untimed = [
        {name: {k: v for k, v in facts.items() if k not in ("seconds", "peak_memory_gb")} for name, facts in r.items()}
        for r in (record["files"], whole.record["files"])
    ]
    assert untimed[0] == untimed[1] and len(untimed[0]) == 4
    assert children[1].output == ""  # one of them speaks for all
    assert "WARNING" in children[0].output and "night.nc: left out" in children[0].output
    assert children[0].output.endswith("3 files, 1 left out\n")


def test_an_error_in_one_process(make: Any, starter: Runs, model: Path, tmp_path: Path) -> None:
    """The others do their own files, learn of it, and end."""
    dark = np.full((9, 9, N_CHANNELS), np.nan)
    inputs = [make("0.nc", 9, 9), make("1.nc", 9, 9, values=dark), make("2.nc", 9, 9), make("3.nc", 9, 9)]
    config = write_config(tmp_path / "run.yaml", tmp_path / "run", model, inputs)

    children = starter.start_ranks("encode", config, 2, to_the_end=True)

    assert codes(children) == [1, 2]
    for child in children:
        (line,) = child.errors
        assert "1.nc: none of its 486 samples is valid" in line
    assert "it waits for the others" in children[1].output
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["state"] == "failed" and "process 1: InputError" in record["error"]
    assert {"0.latents.nc", "2.latents.nc"} <= names(tmp_path / "run")
    assert not names(tmp_path / "run") & {"1.latents.nc", "3.latents.nc", ".1.latents.nc.part"}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed(
    encode: Any, make: Any, starter: Runs, model: Path, tmp_path: Path, rank: int
) -> None:
    """Nobody waits for it, and what both have done is known to whoever goes on."""
    inputs = [make(f"{i}.nc", 11, 11, seed=i) for i in range(4)]
    whole = encode(*inputs, name="whole")
    config = write_config(tmp_path / "run.yaml", tmp_path / "run", model, inputs)

    cut = ("at_file", f"{2 + rank}.latents.nc", signal.SIGKILL, 1, rank)
    children = starter.start_ranks("encode", config, 2, cut, to_the_end=True)

    assert children[rank].wait() == -signal.SIGKILL
    assert children[1 - rank].wait() == 1
    (line,) = children[1 - rank].errors
    assert "another process is gone" in line
    state = json.loads((tmp_path / "run/run.json").read_text())["state"]
    assert state == ("stopped" if rank else "running")

    done = encode(*inputs)  # alone
    assert done.code == 0 and "3 of 4 files are done already" in done.out
    assert names(done.folder) == names(whole.folder)
    assert set(done.record["files"]) == {f"{i}.latents.nc" for i in range(4)}
    for name, facts in whole.record["files"].items():
        assert done.record["files"][name]["n_valid"] == facts["n_valid"]
        assert contents(done.folder / name) == contents(whole.folder / name)


def test_all_inputs_are_looked_at_before_a_folder_is_cleared(
    encode: Any, make: Any, starter: Runs, model: Path, tmp_path: Path
) -> None:
    """Those of other processes, too."""
    source = make("scene.nc", 9, 9)
    folder = encode(source).folder
    inside = Path(shutil.copy(source, folder / "inside.nc"))
    config = write_config(tmp_path / "run.yaml", folder, model, [source, inside])

    children = starter.start_ranks("encode", config, 2, options=["--overwrite"])

    assert codes(children) == [2, 1]
    assert f"inputs: {inside} lies in output_dir" in children[0].errors[0]
    assert inside.exists()


def test_a_source_of_another_process_that_has_changed(
    encode: Any, make: Any, starter: Runs, model: Path, tmp_path: Path
) -> None:
    """All of them end, and none has gone on with the rest."""
    inputs = [make(f"{i}.nc", 9, 9, seed=i) for i in range(3)]
    config = write_config(tmp_path / "run.yaml", tmp_path / "run", model, inputs)
    cut = starter.start("encode", config, ("at_file", "2.latents.nc", signal.SIGTERM, 0))
    assert cut.wait() == 75
    after = (tmp_path / "run/1.latents.nc").stat().st_mtime_ns + 10**9
    os.utime(inputs[1], ns=(after, after))

    children = starter.start_ranks("encode", config, 2, to_the_end=True)

    assert codes(children) == [1, 2]
    assert all("1.nc has changed since" in child.errors[0] for child in children)
    assert names(tmp_path / "run") == {"0.latents.nc", "1.latents.nc", "run.json", "config.yaml"}


# --- memory and lines -----------------------------------------------------------------------------


def peak(call: Callable[[], Any]) -> int:
    """Bytes of Python and numpy at most."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_a_scene(make: Any, encode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK_SAMPLES", 2**14)  # a block is held whole
    plain = {"geometry": None, "seconds": None}
    short, long = make("short.nc", 64, 400, **plain), make("long.nc", 512, 400, **plain)
    encode(make("first.nc", 9, 9), name="first")  # what is made once
    before = peak(lambda: encode(short, name="one", batch_size=50))

    after = peak(lambda: encode(long, name="eight", batch_size=50))

    assert long.stat().st_size > 4e6  # which all of it would add
    assert after < before + 2e6


@pytest.mark.parametrize("kind", ["netcdf", "zarr"])
def test_a_row_of_cells_is_a_chunk(encode: Any, make: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Else each strip of a long scene would change all chunks that there are."""
    monkeypatch.setattr(writer_base, "CHUNK_BYTES", 2000)
    done = encode(make("scene.nc", 40, 30), log_variance=True, format=kind)
    (path,) = done.folder.glob("*.latents.*")

    with xr.open_dataset(path) as found:
        chunks = {name: found[name].encoding["chunks" if kind == "zarr" else "chunksizes"] for name in found.variables}
    assert chunks["latent"] == chunks["log_variance"] == (3, 1, 15)
    assert chunks["valid"] == (1, 30, N_CHANNELS)


def test_what_a_user_reads(encode: Any, make: Any) -> None:
    done = encode(make("a.nc", 9, 9, values=radiance(9, 9, invalid=0) + 2), make("b.nc", 20, 30), name="latents")

    model, device, first, second, last = done.out.splitlines()
    assert model.startswith("model: ") and model.endswith("export, step 12")
    assert device == "device: cpu (named in the config)"
    assert first.startswith(f"{done.folder}/a.latents.nc: latents 3 x 5 x 5, 100.0% of the samples valid; ")
    share = np.mean(radiance(20, 30) >= 1.5)
    assert second.startswith(f"{done.folder}/b.latents.nc: latents 3 x 10 x 15, {share:.1%} of the samples valid; ")
    assert last == f"{done.folder}: 2 files"
    assert done.record["state"] == "finished"
