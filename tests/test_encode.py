"""`spectralvae encode`: what its files hold, what it refuses, and what is left of it when it is interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5netcdf
import h5py
import numpy as np
import pytest
import xarray as xr
from inferring import (
    WAVELENGTH,
    Result,
    Runs,
    call,
    check_refused,
    granule,
    names,
    open_latents,
    peak,
    radiance,
    same_results,
    write_config,
)
from tiny import N_CHANNELS, SETTINGS, tiny_model, tiny_normalization, write_tiny

from spectralvae import AutoencoderKL, cli, encode_scene, load_model, open_scene
from spectralvae.files import writer_base
from spectralvae.inference import reading
from spectralvae.weights.artifact import pack_model, write_folder

BAND, OTHER_BAND = "band_290_490_nm", "band_540_740_nm"
SUFFIXES = {"netcdf": "latents.nc", "zarr": "latents.zarr"}
DARK = np.full((9, 9, N_CHANNELS), np.nan)


@pytest.fixture
def encode(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """A function that runs the command in this process; the name is that of config and folder."""
    return lambda *inputs, name="run", **more: call("encode", inputs, tmp_path, capfd, name, **{"model": model, **more})


def expected(network: AutoencoderKL, path: Path, **arguments: Any) -> xr.Dataset:
    """What the latents of a file must be."""
    return encode_scene(network, open_scene(path, **arguments), batch_size=1, log_variance=True, overlap=4)


# --- the file -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SUFFIXES)
def encoded(
    request: pytest.FixtureRequest, model: Path, write_granule: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A granule and its latents, in either format."""
    folder = tmp_path_factory.mktemp("encoded")
    source = granule(write_granule, folder / "TEMPO_RAD_L1_V03_20240601T150000Z_S006G01.nc", 20, 18)
    more = {"format": request.param, "log_variance": True, "overlap": 4}
    assert cli.run(["encode", str(write_config(folder / "run.yaml", folder / "run", model, [source], **more))]) == 0
    latents = folder / f"run/{source.stem}.{SUFFIXES[request.param]}"
    assert names(folder / "run") == {latents.name, "run.json", "config.yaml"}
    return source, latents


def test_latents_of_a_granule(encoded: Any, network: AutoencoderKL) -> None:
    """Places, times and shares of cells against what h5py finds in the source."""
    source, latents = encoded
    found = open_latents(latents)
    xr.testing.assert_equal(found, expected(network, source))
    assert found.latent.dtype == found.log_variance.dtype == np.float32
    assert set(found.latent.coords) == {"y", "x", "latitude", "longitude", "time"}
    assert set(found.valid.coords) == {"wavelength"}
    np.testing.assert_array_equal(found["mean"], tiny_normalization().mean)
    np.testing.assert_array_equal(found["std"], tiny_normalization().std)

    with h5py.File(source) as file:
        raw = file[f"{BAND}/radiance"][...]
        latitude, longitude = (np.radians(file[f"{BAND}/{name}"][...]) for name in ("latitude", "longitude"))
        seconds = file["time"][...]
    valid = raw >= 1.5
    np.testing.assert_array_equal(found.valid, valid)
    cells = valid.reshape(10, 2, 9, 2, N_CHANNELS)
    np.testing.assert_allclose(found.valid_fraction, cells.mean(axis=(1, 3, 4)), rtol=1e-6)
    middle = np.datetime64("1980-01-06T00:00:00", "ns") + (1e9 * seconds.reshape(10, 2).mean(axis=1)).astype("m8[ns]")
    assert np.abs(found.time.values - middle).max() < np.timedelta64(1, "us")
    parallel = np.cos(latitude)
    vectors = parallel * np.cos(longitude), parallel * np.sin(longitude), np.sin(latitude)
    x, y, z = (part.reshape(10, 2, 9, 2).sum(axis=(1, 3)) for part in vectors)
    np.testing.assert_allclose(found.latitude, np.degrees(np.arctan2(z, np.hypot(x, y))), rtol=1e-5)
    np.testing.assert_allclose(found.longitude, np.degrees(np.arctan2(y, x)), rtol=1e-5)
    np.testing.assert_array_equal(found.y, np.arange(0.5, 20, 2))


def test_attributes_are_those_of_cf_and_tell_where_latents_come_from(encoded: Any, model: Path) -> None:
    source, latents = encoded
    found = open_latents(latents).attrs
    digest = json.loads((model / "manifest.json").read_text())["files"]["model.safetensors"]["sha256"]
    assert found["source"] == source.name and found["source_format"] == "tempo"
    assert found["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert digest == found["model_sha256"] == json.loads((latents.parent / "run.json").read_text())["model_sha256"]
    assert (found["tile_size"], found["overlap"], found["pixels_per_cell"]) == (8, 4, 2)
    assert found["band"] == BAND and found["units"] == "photons/s/cm^2/nm/sr"
    assert found["scan_start"] == "2024-06-01T15:00:00+00:00"
    settings = json.loads(found["normalization"])
    assert (settings["transform"], settings["clip"], settings["min_radiance"]) == ("log_zscore", 9.5, 1.5)

    with xr.open_dataset(latents, decode_cf=False) as raw:
        for name, variable in raw.variables.items():
            for other in variable.attrs.get("coordinates", "").split():
                assert set(raw[other].dims) <= set(variable.dims), (name, other)
        np.testing.assert_array_equal(raw.valid.attrs["flag_values"], [0, 1])
        assert np.isnan(raw.latent.attrs["_FillValue"]) and np.isfinite(raw.latent).all()


# --- scenes ---------------------------------------------------------------------------------------


SHAPES = [(3, 5), (7, 13), (1, 30), (30, 1), (1, 1), (8, 8), (23, 19)]
REGIONS = [(0, 9, 3, 20), (9, 20, 0, 20)]


def test_scenes_of_any_shape_and_regions(encode: Any, make: Any, network: AutoencoderKL) -> None:
    """Smaller than a tile of 8 x 8, of prime sizes, one row, one column, one pixel; without places and times, too."""
    scenes: dict[str, Any] = {f"{ny}_{nx}": (make(f"{ny}_{nx}.nc", ny, nx), {}) for ny, nx in SHAPES}
    scenes["bare"] = make("bare.nc", 9, 9, geometry=None, seconds=None), {}
    large = make("large.nc", 20, 20)
    scenes |= {"large_y{}-{}_x{}-{}".format(*region): (large, {"region": list(region)}) for region in REGIONS}
    inputs = [{"path": str(source), **given} for source, given in scenes.values()]
    done = encode(*inputs, log_variance=True, overlap=4)

    assert done.code == 0 and done.err == ""
    for name, (source, given) in scenes.items():
        assert str(done.folder / f"{name}.latents.nc") in done.out
        found = open_latents(done.folder / f"{name}.latents.nc")
        xr.testing.assert_equal(found, expected(network, source, **given))
        assert json.loads(found.attrs["source_arguments"]) == given
        assert ("latitude" in found.variables and "time" in found.variables) == (name != "bare")


@pytest.mark.parametrize("kind", SUFFIXES)
def test_nothing_valid_is_refused_or_left_out(
    encode: Any, make: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that are done before stay; that one never has its name, or after a kill it would be taken for done."""
    a, night, z = (f"{name}.{SUFFIXES[kind]}" for name in ("a", "night", "z"))
    inputs = [make("a.nc", 9, 9), make("night.nc", 9, 9, values=DARK), make("z.nc", 9, 9)]
    done = encode(*inputs, format=kind)
    check_refused(done, "night.nc", 486, "all_invalid", left=[a])
    assert done.record["state"] == "failed" and "night.nc" in done.record["error"]
    assert list(done.record["files"]) == [a]

    seen: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: seen.append(Path(target).name) or replace(self, target))
    done = encode(*inputs, format=kind, all_invalid="leave_out")

    assert done.code == 0 and done.err == ""
    assert z in seen and not {a, night} & set(seen)
    (warning,) = (line for line in done.out.splitlines() if line.startswith("WARNING"))
    assert "night.nc" in warning and "486" in warning
    assert names(done.folder) == {a, z, "run.json", "config.yaml"}
    assert "486" in done.record["files"][night]["left_out"]


def test_the_models_band_and_flags_are_used(encode: Any, make: Any, tmp_path: Path) -> None:
    """Not the file's first band, and not the reader's own choice of flags."""
    flag = np.zeros((9, 9, N_CHANNELS), int)
    flag[2], flag[3] = 1 << 3, 1 << 0
    values = radiance(9, 9, 1, invalid=0) + 1
    values[:, 6:], values[0, 0, 3] = np.nan, 1.2
    source = make("scene.nc", 9, 9, flag=flag, values=values)
    with h5netcdf.File(source, "a") as file:
        group = file.create_group(OTHER_BAND)
        group.dimensions = {"spectral_channel": N_CHANNELS}
        dims = ("mirror_step", "xtrack", "spectral_channel")
        group.create_variable("radiance", dims, data=radiance(9, 9, 2, invalid=0))
        wavelength = np.broadcast_to(WAVELENGTH + 250, (9, N_CHANNELS)).astype(np.float32)
        group.create_variable("nominal_wavelength", dims[1:], data=wavelength)
    normalization = tiny_normalization(band=OTHER_BAND, wavelength=WAVELENGTH + 250, min_radiance=1e-3)
    other = write_tiny(tmp_path / "other", normalization=normalization)
    warnings = write_tiny(tmp_path / "flags", normalization=tiny_normalization(flag_bits=(3,)))

    first, second = encode(source, model=other, overlap=4), encode(source, model=warnings, name="second")

    assert (first.code, second.code) == (0, 0), (first, second)
    found = open_latents(first.folder / "scene.latents.nc")
    xr.testing.assert_equal(found, expected(load_model(other), source, band=OTHER_BAND).drop_vars("log_variance"))
    assert found.attrs["band"] == OTHER_BAND
    valid = (flag != 1 << 3) & (values >= 1.5)
    np.testing.assert_array_equal(open_latents(second.folder / "scene.latents.nc").valid, valid)
    facts = second.record["files"]["scene.latents.nc"]
    assert facts["n_samples"] == valid.size and facts["n_valid"] == valid.sum()
    rejected = {"fill": 9 * 3 * N_CHANNELS, "flagged": 6 * N_CHANNELS, "below_min_radiance": 1}
    assert {rule: n for rule, n in facts["invalid"].items() if n} == rejected


# --- refusals -------------------------------------------------------------------------------------


def test_scenes_that_the_model_is_not_for(encode: Any, make: Any) -> None:
    other = {"values": radiance(9, 9), "wavelength": np.broadcast_to(WAVELENGTH + 250, (9, 6)), "band": OTHER_BAND}
    check_refused(encode(make("other.nc", 9, 9, **other)), "other.nc", "550.00", "551.67", "300.00", "0.333")
    check_refused(encode(make("renamed.nc", 9, 9, band=OTHER_BAND)), "renamed.nc", BAND, OTHER_BAND)
    # the last of many is refused before the first is encoded
    bad = make("z.nc", 9, 9, wavelength=np.broadcast_to(WAVELENGTH + 1, (9, 6)))
    check_refused(encode(make("a.nc", 9, 9), bad), "z.nc", "1.000")


def test_a_model_and_an_overlap_that_cannot_be_used(encode: Any, make: Any, tmp_path: Path) -> None:
    source = make("scene.nc", 9, 9)
    write_folder(tmp_path / "bare", pack_model(tiny_model(), SETTINGS, None, None))
    check_refused(encode(source, model=tmp_path / "bare"), tmp_path / "bare", "normalization")
    check_refused(encode(source, model=tmp_path / "none"), tmp_path / "none")
    for overlap in (3, -2):
        check_refused(encode(source, overlap=overlap), "overlap", overlap)


def test_inputs_that_are_none(encode: Any, make: Any, tmp_path: Path) -> None:
    (tmp_path / "twins").mkdir()
    first, second = make("scene.nc", 9, 9), make("twins/scene.nc", 9, 9)
    check_refused(encode(tmp_path / "none*.nc"), "inputs", tmp_path / "none*.nc")
    check_refused(encode(tmp_path / "none.nc"), tmp_path / "none.nc")
    check_refused(encode("https://example.org/a.nc"), "inputs", "example.org")
    check_refused(encode(first, second), "inputs", first, second, "scene.latents.nc")
    check_refused(encode(first, tmp_path / "sc*.nc"), "inputs", first)
    for kind, suffix in SUFFIXES.items():
        latents = encode(first, name=kind, format=kind).folder / f"scene.{suffix}"
        check_refused(encode(latents), latents, "decode")
    second.write_bytes(second.read_bytes()[:5000])
    check_refused(encode(second), second)


# --- started again --------------------------------------------------------------------------------


def test_a_finished_run(encode: Any, make: Any, model: Path) -> None:
    """Neither is it done again nor may its config differ; what `--overwrite` would delete of the user's is kept."""
    source = make("scene.nc", 9, 9)
    done = encode(source)
    before = {path: path.stat().st_mtime_ns for path in done.folder.iterdir()}
    again = encode(source)
    assert again.code == 0 and again.err == ""
    other = encode(source, log_variance=True)
    assert other.code == 2 and "log_variance" in other.message
    assert {path: path.stat().st_mtime_ns for path in done.folder.iterdir()} == before

    inside, own = shutil.copy(source, done.folder / "inside.nc"), shutil.copytree(model, done.folder / "model")
    left = ["scene.latents.nc", "inside.nc", "model"]
    check_refused(encode(source, inside, options=("--overwrite",)), "inputs", inside, left=left)
    check_refused(encode(source, model=own, options=("--overwrite",)), "model", own, left=left)


def make_younger(path: Path, other: Path) -> None:
    after = other.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(after, after))


def test_a_source_or_a_model_that_has_changed(encode: Any, make: Any, tmp_path: Path) -> None:
    """A run that failed at its second file, by a model that goes on training: it has another newest checkpoint soon."""
    model, result = tmp_path / "train", tmp_path / "run/a.latents.nc"
    write_tiny(model / "checkpoints/step=000010", seed=0, step=10)
    inputs = [make("a.nc", 9, 9), make("b.nc", 9, 9, values=DARK)]
    assert encode(*inputs, model=model).code == 2
    make("b.nc", 9, 9, seed=1)
    made = inputs[0].stat().st_mtime_ns

    make_younger(inputs[0], result)
    check_refused(encode(*inputs, model=model), "inputs", inputs[0], result, "--overwrite", left=[result.name])
    os.utime(inputs[0], ns=(made, made))
    newer = write_tiny(model / "checkpoints/step=000020", seed=1, step=20)
    check_refused(encode(*inputs, model=model), "model", newer.name, "--overwrite", left=[result.name])
    shutil.rmtree(newer)
    assert encode(*inputs, model=model).code == 0


# --- interrupted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SUFFIXES)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_interrupted_in_the_middle_of_a_file(
    encode: Any, make: Any, starter: Runs, model: Path, tmp_path: Path, number: int, kind: str
) -> None:
    inputs = [make(f"{name}.nc", 20, 20, seed=i) for i, name in enumerate("abc")]
    whole = encode(*inputs, name="whole", format=kind)
    config = write_config(tmp_path / "run.yaml", tmp_path / "run", model, inputs, format=kind)

    child = starter.start("encode", config, ("at_tile", 9 + 5, number))

    files = [f"{name}.{SUFFIXES[kind]}" for name in "abc"]
    first, run = tmp_path / "run" / files[0], tmp_path / "run"
    part = {f".{files[1]}.part"} if number == signal.SIGKILL else set()
    assert child.wait() == (-number if part else 75)
    assert child.errors == []
    assert names(run) == {first.name, "run.json", "config.yaml"} | part
    assert json.loads((run / "run.json").read_text())["state"] == ("running" if part else "stopped")
    before = first.stat().st_mtime_ns

    done = encode(*inputs, format=kind)
    assert done.code == 0 and first.stat().st_mtime_ns == before
    assert same_results(run, whole)
    assert done.record["state"] == "finished" and set(done.record["files"]) == set(files)


# --- several processes ----------------------------------------------------------------------------


@pytest.fixture
def ranks(starter: Runs, model: Path, tmp_path: Path) -> Callable[..., Any]:
    """A function that encodes into "run" by two processes and returns them and their exit codes."""

    def start(inputs: Any, *put: Any, options: Any = (), to_the_end: bool = False, **more: Any) -> Any:
        config = write_config(tmp_path / "run.yaml", tmp_path / "run", model, inputs, **more)
        children = starter.start_ranks("encode", config, 2, *put, options=options, to_the_end=to_the_end)
        return children, [child.wait() for child in children]

    return start


def test_two_processes_make_what_one_does(encode: Any, make: Any, ranks: Any, tmp_path: Path) -> None:
    inputs = [make(f"{i}.nc", 11, 9 + i, seed=i) for i in range(3)] + [make("night.nc", 9, 9, values=DARK)]
    whole = encode(*inputs, name="whole", all_invalid="leave_out")

    children, codes = ranks(inputs, all_invalid="leave_out")

    assert codes == [0, 0]
    assert same_results(tmp_path / "run", whole)
    record = json.loads((tmp_path / "run/run.json").read_text())
    untimed = [
        {name: {k: v for k, v in facts.items() if k not in ("seconds", "peak_memory_gb")} for name, facts in r.items()}
        for r in (record["files"], whole.record["files"])
    ]
    assert untimed[0] == untimed[1] and len(untimed[0]) == 4
    assert children[1].output == ""  # the first speaks for both
    assert "WARNING" in children[0].output and "night.nc" in children[0].output


def test_an_error_in_one_process(make: Any, ranks: Any, tmp_path: Path) -> None:
    """The others do their own files, learn of it, and end; so they do when it comes before any work."""
    inputs, run = [make(f"{i}.nc", 9, 9, **({"values": DARK} if i == 3 else {})) for i in range(4)], tmp_path / "run"

    children, codes = ranks(inputs, to_the_end=True)
    assert codes == [1, 2]
    for child in children:
        (line,) = child.errors
        assert "3.nc" in line and "486" in line
    assert "3.nc" in children[1].output  # at once, for the others may take long
    record = json.loads((run / "run.json").read_text())
    assert record["state"] == "failed" and "InputError" in record["error"]
    left = {"0.latents.nc", "1.latents.nc", "2.latents.nc", "run.json", "config.yaml"}
    assert names(run) == {*left, ".files-1.json"}

    make("3.nc", 9, 9)
    make_younger(inputs[1], run / "1.latents.nc")
    (run / "0.latents.nc").unlink()
    children, codes = ranks(inputs, to_the_end=True)
    assert codes == [1, 2]
    assert all("inputs" in child.errors[0] and str(inputs[1]) in child.errors[0] for child in children)
    assert names(run) == left - {"0.latents.nc"}  # none has begun another file

    inside = Path(shutil.copy(inputs[0], run))
    children, codes = ranks([inputs[1], inside], options=["--overwrite"])
    assert codes == [2, 1]
    assert "inputs" in children[0].errors[0] and str(inside) in children[0].errors[0]
    assert inside.exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed(encode: Any, make: Any, ranks: Any, tmp_path: Path, rank: int) -> None:
    """Nobody waits for it, and what both have done is known to the run that resumes."""
    inputs = [make(f"{i}.nc", 11, 11, seed=i) for i in range(4)]
    whole = encode(*inputs, name="whole")

    children, codes = ranks(inputs, ("at_tile", 4 + 1, signal.SIGKILL, rank), to_the_end=True)

    assert codes == ([-signal.SIGKILL, 1] if rank == 0 else [1, -signal.SIGKILL])
    assert len(children[1 - rank].errors) == 1
    state = json.loads((tmp_path / "run/run.json").read_text())["state"]
    assert state == ("stopped" if rank else "running")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*.latents.nc")}
    assert len(before) == 3

    if rank:  # alone or again by two
        assert ranks(inputs)[1] == [0, 0]
    done = encode(*inputs)
    assert done.code == 0
    assert {name: (done.folder / name).stat().st_mtime_ns for name in before} == before
    assert same_results(done.folder, whole)
    n_valid = [{name: facts["n_valid"] for name, facts in run.record["files"].items()} for run in (done, whole)]
    assert n_valid[0] == n_valid[1]


# --- memory ---------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_a_scene(make: Any, encode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK_SAMPLES", 2**14)  # a block is held whole
    plain = {"geometry": None, "seconds": None}
    short, long = make("short.nc", 64, 400, **plain), make("long.nc", 512, 400, **plain)
    encode(make("first.nc", 9, 9), name="first")  # what is made once
    before = peak(lambda: encode(short, name="one", batch_size=50))

    after = peak(lambda: encode(long, name="eight", batch_size=50))

    assert long.stat().st_size > 4e6  # which all of it would add
    assert after < before + 2e6


@pytest.mark.parametrize("kind", SUFFIXES)
def test_a_row_of_cells_is_a_chunk(encode: Any, make: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Else each strip of a long scene would change all chunks that there are."""
    monkeypatch.setattr(writer_base, "CHUNK_BYTES", 2000)
    done = encode(make("scene.nc", 40, 30), log_variance=True, format=kind)

    with xr.open_dataset(done.folder / f"scene.{SUFFIXES[kind]}") as found:
        chunks = {name: found[name].encoding["chunks" if kind == "zarr" else "chunksizes"] for name in found.variables}
    assert chunks["latent"] == chunks["log_variance"] == (3, 1, 15)
    assert chunks["valid"] == (1, 30, N_CHANNELS)
