"""`spectralvae decode`: its files beside their sources, what it refuses, and what is left when it is cut off."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import matplotlib.image
import numpy as np
import pytest
import scipy.io
import torch
import xarray as xr
from inferring import FILL, WAVELENGTH, Result, Runs, contents, granule, names, radiance, write_config
from matplotlib.figure import Figure
from tiny import N_CHANNELS, SETTINGS, flip, tiny_model, tiny_normalization, write_tiny

from spectralvae import cli, decode_scene, load_model, open_scene
from spectralvae.files import writer_base
from spectralvae.inference import decode as decode_module
from spectralvae.inference.coder import Coder
from spectralvae.inference.decode import LatentsFile
from spectralvae.simulate import simulate_granules
from spectralvae.weights.artifact import pack_model, write_folder
from spectralvae.weights.loading import load_artifact
from spectralvae.weights.normalization import Normalization

BAND = "band_290_490_nm"
BOOKKEEPING = {"CLASS", "NAME", "DIMENSION_LIST", "REFERENCE_LIST", "_Netcdf4Dimid", "_Netcdf4Coordinates"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "export")


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Pictures take most of a tiny run's time."""
    if "pictures" not in request.keywords:
        monkeypatch.setattr(decode_module, "draw_scene", lambda *_, **__: Figure(figsize=(1, 1)))


@pytest.fixture
def make(write_granule: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a granule into tmp_path."""
    return lambda name, *size, **changes: granule(write_granule, tmp_path / name, *size, **changes)


@pytest.fixture
def call(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """A function that runs a command in this process; the name is that of config and folder."""

    def run(command: str, *inputs: Any, name: str, options: tuple[str, ...] = (), **more: Any) -> Result:
        config = write_config(tmp_path / f"{name}.yaml", tmp_path / name, inputs=inputs, **{"model": model, **more})
        capfd.readouterr()
        code = cli.run([command, str(config), *options])
        return Result(code, *capfd.readouterr(), tmp_path / name)

    return run


@pytest.fixture
def encode(call: Callable[..., Result]) -> Callable[..., list[Path]]:
    """A function that encodes scenes; returns the files of latents."""

    def run(*inputs: Any, name: str = "latents", **more: Any) -> list[Path]:
        done = call("encode", *inputs, name=name, **more)
        assert done.code == 0, done
        return [done.folder / name for name in done.record["files"]]

    return run


@pytest.fixture
def decode(call: Callable[..., Result]) -> Callable[..., Result]:
    """A function that decodes files of latents."""

    def run(*inputs: Any, name: str = "run", sources: Any = (), **more: Any) -> Result:
        given = {"sources": [str(source) for source in sources]} if sources else {}
        return call("decode", *inputs, name=name, **given, **more)

    return run


def expected(model: Path, latents: Path, **options: Any) -> Any:
    """(y, x, channel) radiance of a file of latents."""
    with xr.open_dataset(latents) as dataset:
        return decode_scene(load_model(model), dataset, batch_size=1, **options).radiance.values


def reconstruction(path: Path, **arguments: Any) -> Any:
    """(y, x, channel) radiance of a file, read by the project's own reader."""
    return open_scene(path, **arguments).radiance.values


def variables(path: Path) -> dict[str, dict[str, Any]]:
    """All that a netCDF-4 file's variables are, by h5py."""
    found = {}

    def note(place: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and not str(item.attrs.get("NAME", "")).startswith("b'This is a netCDF dim"):
            found[place] = {
                "dims": [axis[0].name if len(axis) else None for axis in item.dims],
                "dtype": item.dtype,
                "values": item[...],
                "attributes": {key: item.attrs[key] for key in set(item.attrs) - BOOKKEEPING},
            }

    with h5py.File(path) as file:
        file.visititems(note)
    return found


def check_equal(ours: dict[str, Any], theirs: dict[str, Any], place: str) -> None:
    assert ours["dims"] == theirs["dims"] and ours["dtype"] == theirs["dtype"], place
    np.testing.assert_array_equal(ours["values"], theirs["values"], err_msg=place)
    check_attributes(ours["attributes"], theirs["attributes"], place)


def check_attributes(ours: Any, theirs: Any, place: str) -> None:
    assert ours.keys() == theirs.keys(), place
    for key in theirs:
        np.testing.assert_array_equal(np.ravel(ours[key]), np.ravel(theirs[key]), err_msg=f"{place}: {key}")


# --- the file beside its source -------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A simulated granule, and a model for it."""
    folder = tmp_path_factory.mktemp("simulated")
    options = {"seed": 3, "n_granules": 1, "shape": (13, 17), "n_channels": 16, "products": (), "invalid_fraction": 0.1}
    (source,) = simulate_granules(folder, **options)
    scene = open_scene(source)
    log = np.log(scene.radiance.values.reshape(-1, 16))
    statistics = np.nanmean(log, axis=0, dtype=float), np.nanstd(log, axis=0, dtype=float)
    wavelength = scene.wavelength.values.mean(axis=0)
    normalization = Normalization("log_zscore", *statistics, 10.0, 1.0, BAND, wavelength)
    settings = {**SETTINGS, "shape": [16, 8, 8]}
    write_folder(folder / "model", pack_model(tiny_model(settings=settings), settings, normalization, None))
    return source, folder / "model"


def test_a_simulated_granule_with_all_that_it_has(encode: Any, decode: Any, simulated: Any) -> None:
    source, model = simulated
    (latents,) = encode(source, model=model)
    done = decode(latents, model=model, sources=[source], carry_over=["*"])

    assert done.code == 0 and done.err == ""
    result = done.folder / source.name
    assert names(done.folder) == {source.name, "figures", "run.json", "config.yaml"}
    ours, theirs = variables(result), variables(source)
    assert ours.keys() == theirs.keys()
    for place in theirs.keys() - {f"{BAND}/radiance"}:
        check_equal(ours[place], theirs[place], place)
    ours, theirs = ours[f"{BAND}/radiance"], theirs[f"{BAND}/radiance"]
    assert ours["dims"] == theirs["dims"] and ours["dtype"] == theirs["dtype"]
    check_attributes(ours["attributes"], theirs["attributes"], "radiance")
    wanted = expected(model, latents)
    np.testing.assert_array_equal(ours["values"], np.where(np.isnan(wanted), np.float32(FILL), wanted))
    np.testing.assert_array_equal(np.isnan(wanted), theirs["values"] < 1.0)

    with h5py.File(source) as before, h5py.File(result) as after:
        own = dict(after.attrs)
        assert own.pop("spectralvae_decoded").endswith(latents.name)
        assert own.pop("spectralvae_model_sha256") == json.loads((done.folder / "run.json").read_text())["model_sha256"]
        assert "decoded from latents" in own.pop("history")
        check_attributes(own | {"_NCProperties": 0}, dict(before.attrs) | {"_NCProperties": 0}, "root")
        assert set(after) == set(before) and set(after[BAND]) == set(before[BAND])


def test_read_by_xarray_and_by_the_projects_own_reader(encode: Any, decode: Any, simulated: Any) -> None:
    source, model = simulated
    result = decode(*encode(source, model=model), model=model).folder / source.name

    ours, theirs = open_scene(result), open_scene(source)
    xr.testing.assert_equal(ours.drop_vars("radiance"), theirs.drop_vars("radiance"))
    same = ("band", "format", "time", "version", "units")
    assert {key: ours.attrs.get(key) for key in same} == {key: theirs.attrs.get(key) for key in same}
    assert ours.radiance.shape == theirs.radiance.shape and ours.radiance.attrs == theirs.radiance.attrs
    for group in (None, BAND):
        with xr.open_dataset(result, group=group) as found, xr.open_dataset(source, group=group) as wanted:
            for name in found.variables:
                assert found[name].dims == wanted[name].dims and found[name].attrs == wanted[name].attrs
                if name != "radiance":
                    xr.testing.assert_equal(found[name], wanted[name])
    with xr.open_datatree(result) as tree:
        radiance = tree[BAND]["radiance"].values
    np.testing.assert_array_equal(radiance, ours.radiance)


@pytest.mark.parametrize(
    ("patterns", "more"),
    [
        ((), set()),
        ((f"{BAND}/radiance_error",), {f"{BAND}/radiance_error"}),
        ((f"{BAND}/pixel_*", "exposure_time"), {f"{BAND}/pixel_quality_flag", "exposure_time"}),
    ],
)
def test_what_is_carried_over(encode: Any, decode: Any, simulated: Any, patterns: Any, more: set[str]) -> None:
    """Wavelengths, places, angles and times always are."""
    source, model = simulated
    given = {"sources": [source], "carry_over": list(patterns)} if patterns else {}
    result = decode(*encode(source, model=model), model=model, **given).folder / source.name

    angles = {f"{BAND}/{name}_angle" for name in ("solar_zenith", "viewing_zenith", "relative_azimuth")}
    always = {f"{BAND}/{name}" for name in ("radiance", "nominal_wavelength", "latitude", "longitude")} | angles
    ours, theirs = variables(result), variables(source)
    assert ours.keys() == always | {"time", "mirror_step", "xtrack"} | more
    for place in more:
        check_equal(ours[place], theirs[place], place)


def test_a_region(encode: Any, decode: Any, make: Any, model: Path) -> None:
    source = make("scene.nc", 20, 20, flag=np.arange(20 * 20 * N_CHANNELS).reshape(20, 20, N_CHANNELS) * 64)
    (latents,) = encode({"path": str(source), "region": [3, 14, 5, 20]})
    done = decode(latents, sources=[source], carry_over=["*flag"])

    assert done.code == 0, done
    result = done.folder / "scene_y3-14_x5-20.nc"
    np.testing.assert_array_equal(reconstruction(result), expected(model, latents))
    ours, theirs = open_scene(result), open_scene(source, region=(3, 14, 5, 20))
    for name in ("wavelength", "latitude", "longitude", "time"):
        np.testing.assert_array_equal(ours[name], theirs[name])
    place = f"{BAND}/pixel_quality_flag"
    np.testing.assert_array_equal(variables(result)[place]["values"], variables(source)[place]["values"][3:14, 5:20])
    z, z_hat = (tiny_normalization().normalize(scene.radiance.values) for scene in (theirs, ours))
    check_facts(done.record["files"][result.name], z, z_hat)


def test_plain_netcdf_with_its_axes_in_another_order(encode: Any, decode: Any, tmp_path: Path, model: Path) -> None:
    """Float64 under names of its own, with a fill of its own."""
    values = radiance(11, 14).astype(float)
    source = tmp_path / "plain.nc"
    xr.Dataset(
        {
            "L": (("bands", "line", "sample"), values.transpose(2, 0, 1), {"units": "W", "long_name": "light"}),
            "quality": (("line", "sample"), np.arange(154).reshape(11, 14)),
        },
        {"bands": ("bands", WAVELENGTH, {"units": "nm", "standard_name": "radiation_wavelength"})},
        {"title": "a scene", "history": "flown"},
    ).to_netcdf(source, engine="h5netcdf", encoding={"L": {"_FillValue": -9.0, "dtype": "f8"}})
    given = {"dims": {"y": "line", "x": "sample", "channel": "bands"}, "variable": "L"}
    (latents,) = encode({"path": str(source), **given})
    done = decode(latents, sources=[source], carry_over=["qual*"])

    assert done.code == 0, done
    wanted = expected(model, latents)
    with xr.open_dataset(done.folder / "plain.nc") as found, xr.open_dataset(source) as before:
        assert found.L.dims == before.L.dims and found.L.attrs == before.L.attrs and found.L.dtype == np.float64
        assert found.L.encoding["_FillValue"] == -9.0
        np.testing.assert_array_equal(found.L.transpose("line", "sample", "bands"), wanted.astype(float))
        xr.testing.assert_identical(found.bands.variable, before.bands.variable)
        np.testing.assert_array_equal(found.quality, before.quality)
        assert found.attrs["title"] == "a scene" and found.attrs["history"].startswith("flown\n")
    np.testing.assert_array_equal(reconstruction(done.folder / "plain.nc", **given), wanted)


def test_zarr(encode: Any, decode: Any, tmp_path: Path, model: Path) -> None:
    source = tmp_path / "cube.zarr"
    values = radiance(9, 12)
    scene = xr.Dataset(
        {
            "radiance": (("y", "x", "channel"), values, {"units": "W"}),
            "height": (("y", "x"), np.arange(108.0).reshape(9, 12)),
        },
        {"wavelength": ("channel", WAVELENGTH, {"units": "nm"})},
    )
    scene.to_zarr(source, consolidated=False)
    (latents,) = encode(source, format="zarr")
    assert latents.name == "cube.latents.zarr"
    done = decode(latents, sources=[source], carry_over=["height"])

    assert done.code == 0, done
    with xr.open_dataset(done.folder / "cube.nc") as found:
        np.testing.assert_array_equal(found.radiance, expected(model, latents))
        xr.testing.assert_equal(found.drop_vars("radiance").load(), scene.drop_vars("radiance"))
        assert found.radiance.dims == ("y", "x", "channel") and found.radiance.attrs["units"] == "W"
    np.testing.assert_array_equal(reconstruction(done.folder / "cube.nc"), expected(model, latents))


def test_matlab(encode: Any, decode: Any, tmp_path: Path, model: Path) -> None:
    """Whose files lay nothing out: radiance (y, x, channel) with wavelengths."""
    scipy.io.savemat(tmp_path / "cube.mat", {"cube": radiance(9, 12)})
    given = {"first": float(WAVELENGTH[0]), "last": float(WAVELENGTH[-1])}
    (latents,) = encode({"path": str(tmp_path / "cube.mat"), "wavelength": given, "units": "W"})
    done = decode(latents, sources=[tmp_path / "cube.mat"])

    assert done.code == 0, done
    scene = open_scene(done.folder / "cube.nc")
    np.testing.assert_array_equal(scene.radiance, expected(model, latents))
    np.testing.assert_allclose(scene.wavelength, WAVELENGTH, rtol=1e-12)
    assert scene.radiance.attrs["units"] == "W" and scene.radiance.dims == ("y", "x", "channel")
    refused = decode(latents, sources=[tmp_path / "cube.mat"], carry_over=["*"], name="other")
    assert refused.code == 2 and "cube.mat: carry_over: of a matlab file nothing is" in refused.message


# --- shapes and samples ---------------------------------------------------------------------------


def test_scenes_of_any_shape(encode: Any, decode: Any, make: Any, model: Path, tmp_path: Path) -> None:
    """Smaller than a tile of 8 x 8, of prime sizes, of one row, one column, one pixel; all of a folder."""
    shapes = [(3, 5), (7, 13), (1, 30), (30, 1), (1, 1), (23, 19)]
    half = radiance(12, 12)
    half[:, 6:] = np.nan
    sources = [make(f"{ny}_{nx}.nc", ny, nx, values=radiance(ny, nx, 1) + 1) for ny, nx in shapes]
    sources += [make("half.nc", 12, 12, values=half)]
    latents = encode(*sources, overlap=4)
    done = decode(tmp_path / "latents", overlap=4)

    assert done.code == 0
    assert names(done.folder) == {*(source.name for source in sources), "run.json", "config.yaml"}
    for source, path in zip(sources, latents, strict=True):
        ours, theirs = reconstruction(done.folder / source.name), reconstruction(source)
        assert ours.shape == theirs.shape
        np.testing.assert_array_equal(ours, expected(model, path, overlap=4))
        np.testing.assert_array_equal(np.isnan(ours), ~(theirs >= 1.5))


# --- beside its source ----------------------------------------------------------------------------


def check_facts(facts: dict[str, Any], z: Any, z_hat: Any) -> None:
    """`z_hat` went through a file of float32 radiance."""
    squares = np.square(z_hat - z)
    assert facts["n_valid"] == np.isfinite(z).sum()
    assert facts["z_mse"] == pytest.approx(np.nanmean(squares), rel=1e-5)
    assert facts["z_largest_error"] == pytest.approx(np.sqrt(np.nanmax(squares)), rel=1e-5)


@pytest.mark.pictures
def test_a_reconstruction_is_compared_with_its_source(encode: Any, decode: Any, make: Any) -> None:
    source = make("scene.nc", 21, 19)
    done = decode(*encode(source), sources=[source])

    assert done.code == 0, done
    result = done.folder / "scene.nc"
    z, z_hat = (tiny_normalization().normalize(reconstruction(path)) for path in (source, result))
    facts = done.record["files"]["scene.nc"]
    check_facts(facts, z, z_hat)
    figure = done.folder / "figures/scene.png"
    assert f"MSE in z {facts['z_mse']:.4g}; {figure}" in done.out
    assert np.ptp(matplotlib.image.imread(figure)[..., :3]) > 0.9


def test_sources_of_a_folder_and_of_many(encode: Any, decode: Any, make: Any, tmp_path: Path) -> None:
    """Each finds its own, whatever else is there."""
    for folder in ("level1", "other"):
        (tmp_path / folder).mkdir()
    stamps = [f"TEMPO_RAD_L1_V03_20240601T15{minute}00Z_S001G01.nc" for minute in ("00", "10")]
    sources = [make(f"level1/{name}", 9, 9, seed=i) for i, name in enumerate(stamps)]
    make("other/unrelated.nc", 9, 9, seed=5)
    latents = encode(tmp_path / "level1")
    done = decode(*latents, sources=[tmp_path / "level1", tmp_path / "other/*.nc"])

    assert done.code == 0, done
    for source in sources:
        z, z_hat = (tiny_normalization().normalize(reconstruction(p)) for p in (source, done.folder / source.name))
        check_facts(done.record["files"][source.name], z, z_hat)


# --- refusals -------------------------------------------------------------------------------------


def refused(done: Result, *parts: str, folder: bool = False) -> None:
    """One line, exit code 2, and no file."""
    assert done.code == 2, done
    for part in parts:
        assert part in done.message
    assert done.folder.exists() is folder
    if folder:
        assert names(done.folder) == {"run.json", "config.yaml"}


def test_inputs_that_are_no_latents(decode: Any, make: Any, tmp_path: Path) -> None:
    source = make("scene.nc", 9, 9)
    refused(decode(source), "scene.nc: is no file of `spectralvae encode`", "lacks latent, valid", "NAME.latents.nc")
    refused(decode(tmp_path), f"inputs: no file matches {tmp_path}/*.latents.*")
    refused(decode(tmp_path / "none*.nc"), f"inputs: no file matches {tmp_path}/none*.nc")
    refused(decode(tmp_path / "none.latents.nc"), "none.latents.nc: no such file")
    (tmp_path / "empty.latents.nc").touch()
    refused(decode(tmp_path / "empty.latents.nc"), "empty.latents.nc: the file is empty (0 bytes)")


def test_latents_of_another_model(encode: Any, decode: Any, make: Any, tmp_path: Path) -> None:
    (latents,) = encode(make("scene.nc", 9, 9))
    done = decode(latents, model=write_tiny(tmp_path / "other", seed=1))
    refused(done, f"{latents}: was encoded by another model (SHA-256", "decode it with that one")


def test_models_that_cannot_be_used(encode: Any, decode: Any, make: Any, tmp_path: Path) -> None:
    (latents,) = encode(make("scene.nc", 9, 9))
    write_folder(tmp_path / "bare", pack_model(tiny_model(), SETTINGS, None, None))
    refused(decode(latents, model=tmp_path / "bare"), "bare: holds no normalisation", "convert it again with")
    refused(decode(latents, model=tmp_path / "none"), "none: no such file or folder")
    refused(decode(latents, overlap=3), "overlap: 3 must be a multiple of 2", "below 8")


def test_two_of_one_name(encode: Any, decode: Any, make: Any) -> None:
    source = make("scene.nc", 9, 9)
    one, two = *encode(source), *encode(source, name="more", format="zarr")
    refused(decode(one, two), f"{one} and {two} would both give scene.nc: leave one out")


def test_sources_that_are_others(encode: Any, decode: Any, make: Any, tmp_path: Path) -> None:
    (tmp_path / "twins").mkdir()
    (tmp_path / "large").mkdir()
    source, twin = make("scene.nc", 9, 9), make("twins/scene.nc", 9, 9, seed=1)
    large = make("large/scene.nc", 9, 10)
    (latents,) = encode(source)
    other = make("other.nc", 9, 9)
    refused(decode(latents, sources=[other]), f"sources: none of them is scene.nc, from which {latents}", "add it, or")
    refused(
        decode(latents, sources=[large]), f"{large}: is not the file that {latents} was made from: it has (9, 10, 6)"
    )
    refused(decode(latents, sources=[source, twin]), f"{source} and {twin} are both named scene.nc", str(latents))
    refused(decode(latents, carry_over=["*"]), "carry_over: ['*'] can only be copied from `sources`")
    done = decode(latents, sources=[twin])
    refused(done, f"{twin}: is not the file that {latents} was made from: its SHA-256 is", "give that one", folder=True)
    done = decode(latents, sources=[source], carry_over=["nothing*"], name="other")
    refused(done, f"{source}: carry_over: 'nothing*' matches nothing; it has: {BAND}/latitude", folder=True)
    assert decode(latents, sources=[source, tmp_path / "sc*.nc"], name="same").code == 0  # given twice


def test_a_source_that_is_gone(encode: Any, decode: Any, make: Any) -> None:
    source = make("scene.nc", 9, 9)
    (latents,) = encode(source)
    source.unlink()
    assert decode(latents).code == 0  # who does not ask for it does not need it
    refused(decode(latents, sources=[source], name="other"), "scene.nc: no such file")


def changed(latents: Path, name: str, change: Callable[[Any], None]) -> Path:
    """A copy of a file of latents with something changed."""
    path = Path(shutil.copy(latents, latents.with_name(f"{name}.latents.nc")))
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def _replace(file: Any, name: str, values: Any) -> None:
    del file[name]
    file[name] = values


def _set(attributes: Any, key: str, value: Any) -> None:
    attributes[key] = value


def _edit(attributes: Any, key: str, old: str, new: str) -> None:
    assert old in attributes[key]
    attributes[key] = attributes[key].replace(old, new)


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "no_source": (lambda file: file.attrs.pop("source_sha256"), "lacks source_sha256"),
    "format": (lambda file: _set(file.attrs, "spectralvae_latents", 9), "has format 9, but this version"),
    "no_layout": (lambda file: file["source"].attrs.pop("layout"), "no layout of a source"),
    "layout": (lambda file: _set(file["source"].attrs, "layout", '{"shape": 3'), "damaged"),
    "text": (lambda file: _edit(file["source"].attrs, "layout", "photons", "phOtons"), "damaged"),
    "no_valid": (lambda file: file.pop("valid"), "lacks valid"),
    "scalar": (lambda file: _replace(file, "latent", 3.0), "lacks latent"),
    "small": (lambda file: _replace(file, "latent", file["latent"][:, :4]), "latent has shape (3, 4, 5); a scene of"),
    "few": (lambda file: _replace(file, "latent", file["latent"][:2]), "has 2 latent channels, but the model has 3"),
    "mask": (lambda file: _replace(file, "valid", file["valid"][:8]), "valid has shape (8, 9, 6); a scene of 9 x 9"),
    "copies": (lambda file: file["source"].pop("time"), "damaged"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_latents_that_were_changed(encode: Any, decode: Any, make: Any, name: str) -> None:
    change, message = CHANGES[name]
    (latents,) = encode(make("scene.nc", 9, 9))
    refused(decode(changed(latents, name, change)), f"{name}.latents.nc: ", message)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_latents_that_are_not_finite(encode: Any, decode: Any, make: Any, value: float) -> None:
    """Nothing stays of that file, and all of those before."""

    def spoil(file: Any) -> None:
        file["latent"][1, 4, 3] = value

    good, latents = encode(make("a.nc", 9, 9), make("scene.nc", 9, 9))
    done = decode(good, changed(latents, "spoiled", spoil))

    assert done.code == 2
    assert "spoiled.latents.nc: latent holds values that are not finite, so it is damaged; encode it" in done.message
    assert names(done.folder) == {"a.nc", "run.json", "config.yaml"}
    assert done.record["state"] == "failed" and list(done.record["files"]) == ["a.nc"]


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_latents(encode: Any, decode: Any, make: Any, share: float) -> None:
    (latents,) = encode(make("scene.nc", 9, 9))
    content = latents.read_bytes()
    latents.write_bytes(content[: int(share * len(content))])
    refused(decode(latents), "scene.latents.nc: damaged or truncated")


def test_flipped_bits_are_told_or_change_nothing(
    encode: Any, decode: Any, make: Any, amount: Callable[[int, int], int]
) -> None:
    (latents,) = encode(make("scene.nc", 9, 9))
    content = latents.read_bytes()
    wanted = contents(decode(latents, name="whole").folder / "scene.nc")
    random = np.random.default_rng(0)
    told = 0
    for position in random.integers(len(content), size=amount(25, 2000)):
        latents.write_bytes(content)
        flip(latents, int(position), int(random.integers(8)))
        done = decode(latents, options=("--overwrite",))
        if done.code == 0:
            assert contents(done.folder / "scene.nc") == wanted, position
        else:
            assert done.code == 2 and "scene.latents.nc" in done.message, position
            told += 1
    assert told


@pytest.mark.parametrize("variable", ["latent", "valid"])
@pytest.mark.parametrize("kind", ["netcdf", "zarr"])
def test_a_flipped_bit_in_a_chunk(encode: Any, decode: Any, make: Any, kind: str, variable: str) -> None:
    (latents,) = encode(make("scene.nc", 9, 9), format=kind)
    if kind == "netcdf":
        with h5py.File(latents) as file:
            chunk = file[variable].id.get_chunk_info(0)
        flip(latents, chunk.byte_offset + chunk.size // 2)
    else:
        (path,) = (path for path in (latents / variable / "c").rglob("*") if path.is_file())
        flip(path, 0.5)

    done = decode(latents)
    assert done.code == 2 and f"{latents}: damaged" in done.message
    assert not done.folder.exists() or names(done.folder) == {"run.json", "config.yaml"}


def test_a_lost_chunk_is_not_zero(encode: Any, decode: Any, make: Any) -> None:
    (latents,) = encode(make("scene.nc", 9, 9), format="zarr")
    (path,) = (path for path in (latents / "latent/c").rglob("*") if path.is_file())
    path.unlink()

    refused(decode(latents), f"{latents}: 1 of 1 chunks of latent are not there")


# --- started again --------------------------------------------------------------------------------


def half_done(encode: Any, decode: Any, make: Any) -> list[Path]:
    """A run that failed at the second of two files, which is then mended."""
    one, two = encode(make("a.nc", 9, 9), make("b.nc", 9, 9, seed=1))
    content = two.read_bytes()

    def spoil(file: Any) -> None:
        file["latent"][0, 0, 0] = np.nan

    with h5py.File(two, "r+") as file:
        spoil(file)
    assert decode(one, two).code == 2
    two.write_bytes(content)
    return [one, two]


def test_it_goes_on_and_says_when_it_is_finished(encode: Any, decode: Any, make: Any) -> None:
    latents = half_done(encode, decode, make)
    done = decode(*latents)
    assert done.code == 0 and "1 of 2 files are done already" in done.out
    again = decode(*latents)
    assert again.code == 0 and "this run is finished; nothing to do" in again.out


def test_latents_that_have_changed_are_refused(encode: Any, decode: Any, make: Any, tmp_path: Path) -> None:
    latents = half_done(encode, decode, make)
    after = (tmp_path / "run/a.nc").stat().st_mtime_ns + 10**9
    os.utime(latents[0], ns=(after, after))

    done = decode(*latents)
    assert done.code == 2
    assert f"{latents[0]} has changed since {done.folder}/a.nc was made: start afresh with --overwrite" in done.message


def test_overwriting_keeps_latents_and_sources(encode: Any, decode: Any, make: Any) -> None:
    """Whoever keeps them in the folder of the results would lose them."""
    source = make("scene.nc", 9, 9)
    (latents,) = encode(source)
    folder = decode(latents).folder
    (folder / "more").mkdir()
    own, granule = (Path(shutil.copy(path, folder / "more")) for path in (latents, source))

    done = decode(own, options=("--overwrite",))
    assert done.code == 2 and f"inputs: {own} lies in output_dir" in done.message
    done = decode(latents, sources=[granule], options=("--overwrite",))
    assert done.code == 2 and f"sources: {granule} lies in output_dir" in done.message
    assert own.exists() and granule.exists() and (folder / "scene.nc").exists()
    folder = latents.parent
    assert decode(latents, name=folder.name, options=("--overwrite",)).code == 2  # encode's folder is not decode's
    assert latents.exists()


# --- cut off --------------------------------------------------------------------------------------

NAMES = ("a.nc", "b.nc", "c.nc")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_cut_off_in_the_middle_of_a_file(
    encode: Any, decode: Any, make: Any, starter: Runs, model: Path, tmp_path: Path, number: int
) -> None:
    latents = encode(*(make(name, 20, 20, seed=i) for i, name in enumerate(NAMES)))
    whole = decode(*latents, name="whole")
    config = write_config(tmp_path / "run.yaml", tmp_path / "run", model, latents)

    child = starter.start("decode", config, ("at_file", "b.nc", number, 5))

    run = tmp_path / "run"
    if number == signal.SIGKILL:
        assert child.wait() == -number
        assert names(run) == {"a.nc", ".b.nc.part", "run.json", "config.yaml"}
    else:
        assert child.wait() == 75 and child.errors == []
        assert names(run) == {"a.nc", "run.json", "config.yaml"}
        assert json.loads((run / "run.json").read_text())["state"] == "stopped"
    before = (run / "a.nc").stat().st_mtime_ns

    done = decode(*latents)
    assert done.code == 0 and "1 of 3 files are done already" in done.out
    assert (run / "a.nc").stat().st_mtime_ns == before
    assert names(run) == {*NAMES, "run.json", "config.yaml"}
    assert done.record["state"] == "finished" and set(done.record["files"]) == set(NAMES)
    for name in NAMES:
        assert contents(run / name) == contents(whole.folder / name)


def test_a_file_is_done_when_all_of_it_is(
    encode: Any, decode: Any, make: Any, starter: Runs, model: Path, tmp_path: Path
) -> None:
    """Its figure, too: killed right before the file has its name."""
    source = make("a.nc", 9, 9)
    (latents,) = encode(source)
    run = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", run, model, [latents], sources=[str(source)])

    assert starter.start("decode", config, ("at_rename", "a.nc")).wait() == -signal.SIGKILL

    assert names(run) == {".a.nc.part", "figures", "run.json", "config.yaml"}
    done = decode(latents, sources=[source])
    assert done.code == 0 and "z_mse" in done.record["files"]["a.nc"]
    assert names(run) == {"a.nc", "figures", "run.json", "config.yaml"}


def test_two_processes(encode: Any, decode: Any, make: Any, starter: Runs, model: Path, tmp_path: Path) -> None:
    """One of which is killed; then both go on, and all is as if nothing had been."""
    sources = [make(f"{i}.nc", 11, 9 + i, seed=i) for i in range(4)]
    latents = encode(*sources)
    whole = decode(*latents, name="whole", sources=sources)
    given = {"sources": [str(source) for source in sources]}
    config = write_config(tmp_path / "run.yaml", tmp_path / "run", model, latents, **given)

    cut = starter.start_ranks("decode", config, 2, ("at_file", "3.nc", signal.SIGKILL, 1, 1), to_the_end=True)
    assert [child.wait() for child in cut] == [1, -signal.SIGKILL]
    children = starter.start_ranks("decode", config, 2)

    assert [child.wait() for child in children] == [0, 0]
    assert "3 of 4 files are done already" in children[0].output
    assert names(tmp_path / "run") == names(whole.folder)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["state"] == "finished" and set(record["files"]) == {f"{i}.nc" for i in range(4)}
    for name, facts in whole.record["files"].items():
        assert record["files"][name]["z_mse"] == facts["z_mse"]
        assert contents(tmp_path / "run" / name) == contents(whole.folder / name)


# --- memory and lines -----------------------------------------------------------------------------


def peak(call: Callable[[], Any]) -> int:
    """Bytes of Python and numpy at most."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_a_scene(
    encode: Any, decode: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_base, "CHUNK_BYTES", 2**15)  # a chunk is held whole
    plain = {"geometry": None, "seconds": None}
    short, long = encode(make("short.nc", 64, 400, **plain), make("long.nc", 512, 400, **plain), batch_size=50)
    decode(*encode(make("first.nc", 9, 9), name="first"), name="second")  # what is made once
    before = peak(lambda: decode(short, name="one", batch_size=50))

    after = peak(lambda: decode(long, name="eight", batch_size=50))

    assert after < before + 2e6  # of 4.9 MB


def test_memory_does_not_grow_with_the_number_of_files(encode: Any, make: Any, model: Path) -> None:
    """Whose wavelengths and places would soon fill it."""
    (latents,) = encode(make("a.nc", 1, 6000), batch_size=50)
    coder = Coder(load_artifact(model), torch.device("cpu"), overlap=None, batch_size=1)
    LatentsFile(latents, coder)
    tracemalloc.start()
    try:
        kept = [LatentsFile(latents, coder) for _ in range(10)]
        gc.collect()
        size = tracemalloc.get_traced_memory()[0] / len(kept)
    finally:
        tracemalloc.stop()

    assert size < 30_000  # of 216,000 bytes for each


def test_what_a_user_reads(encode: Any, decode: Any, make: Any, tmp_path: Path) -> None:
    done = decode(*encode(make("a.nc", 9, 9), make("b.nc", 20, 30)))

    model, device, first, second, last = done.out.splitlines()
    assert model.startswith("model: ") and device == "device: cpu (named in the config)"
    assert first.startswith(f"{done.folder}/a.nc: radiance 9 x 9 x 6; ")
    assert second.startswith(f"{done.folder}/b.nc: radiance 20 x 30 x 6; ")
    assert last == f"{done.folder}: 2 files"
