"""`spectralvae decode`: its files beside their sources, what it refuses, and what is left when it is interrupted."""

from __future__ import annotations

import gc
import hashlib
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
from inferring import (
    FILL,
    WAVELENGTH,
    Result,
    Runs,
    call,
    check_refused,
    contents,
    granule,
    names,
    open_latents,
    peak,
    radiance,
    same_results,
    stored,
    write_config,
)
from matplotlib.figure import Figure
from tiny import N_CHANNELS, flip, tiny_normalization, write_tiny

from spectralvae import AutoencoderKL, cli, decode_scene, open_scene
from spectralvae.files import writer_base
from spectralvae.inference import decode as decode_module
from spectralvae.inference.coder import Coder
from spectralvae.inference.decode import LatentsFile
from spectralvae.weights.loading import load_artifact

BAND = "band_290_490_nm"


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Pictures take most of a tiny run's time."""
    if "pictures" not in request.keywords:
        monkeypatch.setattr(decode_module, "draw_scene", lambda *_, **__: Figure(figsize=(1, 1)))


@pytest.fixture
def encode(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., list[Path]]:
    """A function that encodes scenes; returns the files of latents."""

    def run(*inputs: Any, name: str = "latents", **more: Any) -> list[Path]:
        done = call("encode", inputs, tmp_path, capfd, name, **{"model": model, **more})
        assert done.code == 0, done
        return [done.folder / name for name in done.record["files"]]

    return run


@pytest.fixture
def decode(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """A function that decodes files of latents."""

    def run(*inputs: Any, name: str = "run", sources: Any = (), **more: Any) -> Result:
        given = {"sources": [str(source) for source in sources]} if sources else {}
        return call("decode", inputs, tmp_path, capfd, name, **{"model": model, **given, **more})

    return run


@pytest.fixture(scope="module")
def encoded(model: Path, write_granule: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A granule of 9 x 9, and its latents in either format; not to be changed."""
    folder = tmp_path_factory.mktemp("encoded")
    flag = np.arange(9 * 9 * N_CHANNELS).reshape(9, 9, N_CHANNELS) << 6  # bits that reject nothing
    source = granule(write_granule, folder / "scene.nc", 9, 9, flag=flag)
    for kind in ("netcdf", "zarr"):
        config = write_config(folder / "a.yaml", folder / kind, model, [source], format=kind)
        assert cli.run(["encode", str(config)]) == 0
    return source, {"netcdf": folder / "netcdf/scene.latents.nc", "zarr": folder / "zarr/scene.latents.zarr"}


@pytest.fixture
def latents(encoded: Any, tmp_path: Path) -> Path:
    """A copy of the file of latents."""
    return Path(shutil.copy(encoded[1]["netcdf"], tmp_path))


def expected(network: AutoencoderKL, latents: Path, **options: Any) -> Any:
    """(y, x, channel) radiance of a file of latents."""
    return decode_scene(network, open_latents(latents), batch_size=1, **options).radiance.values


def reconstruction(path: Path, **arguments: Any) -> Any:
    """(y, x, channel) radiance of a file, read by the project's own reader."""
    return open_scene(path, **arguments).radiance.values


# --- the file beside its source -------------------------------------------------------------------


def test_a_granule_with_all_that_it_has(decode: Any, encoded: Any, network: AutoencoderKL) -> None:
    """Wavelengths, places, angles and times are always there, the rest where a pattern matches it."""
    source, latents = encoded[0], encoded[1]["netcdf"]
    done = decode(latents, sources=[source], carry_over=["*"])

    assert done.code == 0 and done.err == ""
    result = done.folder / source.name
    assert names(done.folder) == {source.name, "figures", "run.json", "config.yaml"}
    ours, theirs = stored(result), stored(source)
    root, place, flag = ours.pop("/"), f"{BAND}/radiance", f"{BAND}/pixel_quality_flag"
    assert root.pop("spectralvae_decoded")[1].endswith(latents.name)
    assert root.pop("spectralvae_model_sha256")[1] == done.record["model_sha256"]
    assert "spectralvae" in root.pop("history")[1]
    assert root == theirs.pop("/")
    described, wanted = ours.pop(place), expected(network, latents)
    assert described[:-1] == theirs.pop(place)[:-1]
    assert ours == theirs
    with h5py.File(source) as before, h5py.File(result) as after:
        np.testing.assert_array_equal(after[place], np.where(np.isnan(wanted), np.float32(FILL), wanted))
        np.testing.assert_array_equal(np.isnan(wanted), before[place][...] < 1.5)

    plain = decode(latents, name="plain").folder / source.name
    xr.testing.assert_equal(open_scene(plain).drop_vars("radiance"), open_scene(source).drop_vars("radiance"))
    assert stored(plain).keys() == stored(result).keys() - {flag}
    more = decode(latents, sources=[source], carry_over=[f"{BAND}/pixel_*"], name="more")
    assert stored(more.folder / source.name).keys() == stored(result).keys()


def test_a_region(encode: Any, decode: Any, make: Any, network: AutoencoderKL) -> None:
    source = make("scene.nc", 20, 20)
    (latents,) = encode({"path": str(source), "region": [3, 14, 5, 20]})
    done = decode(latents, sources=[source])
    assert done.code == 0, done
    result = done.folder / "scene_y3-14_x5-20.nc"
    np.testing.assert_array_equal(reconstruction(result), expected(network, latents))
    ours, theirs = open_scene(result), open_scene(source, region=(3, 14, 5, 20))
    z, z_hat = (tiny_normalization().normalize(scene.radiance.values) for scene in (theirs, ours))
    check_facts(done.record["files"][result.name], z, z_hat)


def test_zarr_and_matlab(encode: Any, decode: Any, tmp_path: Path, network: AutoencoderKL) -> None:
    """From latents in Zarr; MATLAB files lay nothing out: radiance (y, x, channel) with wavelengths."""
    zarr, matlab = tmp_path / "cube.zarr", tmp_path / "matlab.mat"
    scene = xr.Dataset(
        {
            "radiance": (("y", "x", "channel"), radiance(9, 12), {"units": "W"}),
            "height": (("y", "x"), np.arange(108.0).reshape(9, 12)),
        },
        {"wavelength": ("channel", WAVELENGTH, {"units": "nm"})},
        {"title": "a scene", "history": "flown"},
    )
    scene.to_zarr(zarr, consolidated=False)
    scipy.io.savemat(matlab, {"cube": radiance(9, 12)})
    given = {"wavelength": {"first": float(WAVELENGTH[0]), "last": float(WAVELENGTH[-1])}, "units": "W"}
    latents = encode(zarr, {"path": str(matlab), **given}, format="zarr")
    one = decode(latents[0], sources=[zarr], carry_over=["height"])
    two = decode(latents[1], sources=[matlab], name="two")

    assert (one.code, two.code) == (0, 0), (one, two)
    for path, name in ((one.folder / "cube.nc", "cube"), (two.folder / "matlab.nc", "matlab")):
        found, wanted = open_scene(path), expected(network, tmp_path / f"latents/{name}.latents.zarr")
        np.testing.assert_array_equal(found.radiance, wanted)
        np.testing.assert_allclose(found.wavelength, WAVELENGTH, rtol=1e-12)
        assert found.radiance.dims == ("y", "x", "channel") and found.radiance.attrs["units"] == "W"
    with xr.open_dataset(one.folder / "cube.nc") as found:
        xr.testing.assert_equal(found.drop_vars("radiance").load(), scene.drop_vars("radiance"))
        files = sorted(path for path in zarr.rglob("*") if path.is_file())
        lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(zarr)}\n" for path in files)
        digest = hashlib.sha256("".join(lines).encode()).hexdigest()
        assert open_latents(latents[0]).attrs["source_sha256"] == digest
        assert found.attrs["title"] == "a scene" and found.attrs["history"].startswith("flown\n")
    done = decode(latents[1], sources=[matlab], carry_over=["*"], name="other")
    check_refused(done, matlab, "carry_over", "matlab", left=())


# --- beside its source ----------------------------------------------------------------------------


def check_facts(facts: dict[str, Any], z: Any, z_hat: Any) -> None:
    """`z_hat` went through a file of float32 radiance."""
    squares = np.square(z_hat - z)
    assert facts["n_valid"] == np.isfinite(z).sum()
    assert facts["z_mse"] == pytest.approx(np.nanmean(squares), rel=1e-5)
    assert facts["z_largest_error"] == pytest.approx(np.sqrt(np.nanmax(squares)), rel=1e-5)


@pytest.mark.pictures
def test_a_reconstruction_is_compared_with_its_source(decode: Any, encoded: Any) -> None:
    source, latents = encoded
    done = decode(latents["netcdf"], sources=[source])

    assert done.code == 0, done
    result = done.folder / "scene.nc"
    z, z_hat = (tiny_normalization().normalize(reconstruction(path)) for path in (source, result))
    facts = done.record["files"]["scene.nc"]
    check_facts(facts, z, z_hat)
    figure = done.folder / "figures/scene.png"
    assert f"{facts['z_mse']:.4g}" in done.out and str(figure) in done.out
    assert np.ptp(matplotlib.image.imread(figure)[..., :3]) > 0.9


def test_sources_of_a_folder_and_of_many(
    encode: Any, decode: Any, make: Any, network: AutoencoderKL, tmp_path: Path
) -> None:
    """Each finds its own, whatever else is there; of one row, one column, one pixel."""
    for folder in ("level1", "other"):
        (tmp_path / folder).mkdir()
    stamps = (f"TEMPO_RAD_L1_V03_20240601T15{minute}00Z_S001G01.nc" for minute in (10, 20, 30))
    shapes = dict(zip(stamps, [(1, 30), (30, 1), (1, 1)], strict=True))
    sources = [make(f"level1/{name}", *shape, values=radiance(*shape) + 1) for name, shape in shapes.items()]
    make("other/unrelated.nc", 9, 9, seed=5)
    latents = encode(tmp_path / "level1", overlap=4)
    done = decode(tmp_path / "latents", overlap=4, sources=[tmp_path / "level1", tmp_path / "other/*.nc"])

    assert done.code == 0, done
    assert names(done.folder) == {*shapes, "figures", "run.json", "config.yaml"}
    for source, path in zip(sources, latents, strict=True):
        found = reconstruction(done.folder / source.name)
        np.testing.assert_array_equal(found, expected(network, path, overlap=4))
        z, z_hat = (tiny_normalization().normalize(values) for values in (reconstruction(source), found))
        check_facts(done.record["files"][source.name], z, z_hat)


# --- refusals -------------------------------------------------------------------------------------


def test_inputs_that_are_no_latents(decode: Any, encoded: Any, tmp_path: Path) -> None:
    source, latents = encoded
    check_refused(decode(source), source, "latent, valid")
    check_refused(decode(tmp_path), "inputs", tmp_path / "*.latents.*")
    (tmp_path / "empty.latents.nc").touch()
    check_refused(decode(tmp_path / "empty.latents.nc"), tmp_path / "empty.latents.nc", "0 bytes")
    check_refused(decode(*latents.values()), "inputs", *latents.values(), "scene.nc")  # both would give it


def test_models_that_cannot_be_used(decode: Any, latents: Path, tmp_path: Path) -> None:
    check_refused(decode(latents, model=write_tiny(tmp_path / "other", seed=1)), latents, "SHA-256")


def test_sources_that_are_others(decode: Any, make: Any, encoded: Any, latents: Path, tmp_path: Path) -> None:
    (tmp_path / "twins").mkdir()
    (tmp_path / "large").mkdir()
    source, twin = Path(shutil.copy(encoded[0], tmp_path)), make("twins/scene.nc", 9, 9, seed=1)
    large, other = make("large/scene.nc", 9, 10), make("other.nc", 9, 9)
    check_refused(decode(latents, sources=[other]), latents, "sources", "scene.nc")
    check_refused(decode(latents, sources=[large]), large, "sources", latents, "(9, 10, 6)", "(9, 9, 6)")
    check_refused(decode(latents, sources=[source, twin]), "sources", source, twin, latents)
    check_refused(decode(latents, carry_over=["*"]), "carry_over", "sources")
    check_refused(decode(latents, sources=[twin]), twin, "sources", latents, "SHA-256", left=())
    done = decode(latents, sources=[source], carry_over=["nothing*"], name="other")
    check_refused(done, source, "carry_over", "'nothing*'", f"{BAND}/latitude", left=())
    assert decode(latents, sources=[source, tmp_path / "sc*.nc"], name="same").code == 0  # given twice
    source.unlink()
    check_refused(decode(latents, sources=[source], name="gone"), source)


def _replace(file: Any, name: str, values: Any) -> None:
    del file[name]
    file[name] = values


def _edit(attributes: Any, key: str, old: str, new: str) -> None:
    assert old in attributes[key]
    attributes[key] = attributes[key].replace(old, new)


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "no_source": (lambda file: file.attrs.pop("source_sha256"), "source_sha256"),
    "format": (lambda file: file.attrs.update(spectralvae_latents=9), "format 9"),
    "no_group": (lambda file: file.pop("source"), "layout"),
    "no_layout": (lambda file: file["source"].attrs.pop("layout"), "layout"),
    "text": (lambda file: _edit(file["source"].attrs, "layout", "photons", "phOtons"), "SHA-256"),
    "scalar": (lambda file: _replace(file, "latent", 3.0), "lacks latent"),
    "small": (lambda file: _replace(file, "latent", file["latent"][:, :4]), "(3, 4, 5)"),
    "few": (lambda file: _replace(file, "latent", file["latent"][:2]), "2 latent channels"),
    "mask": (lambda file: _replace(file, "valid", file["valid"][:8]), "(8, 9, 6)"),
    "copies": (lambda file: file["source"].pop("time"), "time"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_latents_that_were_changed(decode: Any, latents: Path, name: str) -> None:
    change, word = CHANGES[name]
    with h5py.File(latents, "r+") as file:
        change(file)
    check_refused(decode(latents), latents, word)


def test_latents_that_are_not_finite(encode: Any, decode: Any, make: Any, latents: Path) -> None:
    """Nothing stays of that file, and all of those before."""
    with h5py.File(latents, "r+") as file:
        file["latent"][1, 4, 3] = np.inf
    done = decode(*encode(make("a.nc", 9, 9)), latents)

    check_refused(done, latents, "finite", left=["a.nc"])
    assert done.record["state"] == "failed" and list(done.record["files"]) == ["a.nc"]


def test_truncated_latents_and_flipped_bits(decode: Any, latents: Path, amount: Callable[[int, int], int]) -> None:
    """They are told, or change nothing."""
    content = latents.read_bytes()
    wanted = contents(decode(latents, name="whole").folder / "scene.nc")
    for share in (0.001, 0.1, 0.5, 0.9, 0.999):
        latents.write_bytes(content[: int(share * len(content))])
        check_refused(decode(latents), latents)
    random = np.random.default_rng(0)
    told = 0
    for position in random.integers(len(content), size=amount(25, 2000)):
        latents.write_bytes(content)
        flip(latents, int(position), int(random.integers(8)))
        done = decode(latents, options=("--overwrite",))
        if done.code == 0:
            assert contents(done.folder / "scene.nc") == wanted, position
        else:
            assert done.code == 2 and str(latents) in done.message, position
            told += 1
    assert told


@pytest.mark.parametrize("variable", ["latent", "valid"])
@pytest.mark.parametrize("kind", ["netcdf", "zarr"])
def test_a_flipped_bit_in_a_chunk(decode: Any, encoded: Any, latents: Path, kind: str, variable: str) -> None:
    if kind == "netcdf":
        with h5py.File(latents) as file:
            chunk = file[variable].id.get_chunk_info(0)
        flip(latents, chunk.byte_offset + chunk.size // 2)
    else:
        latents = Path(shutil.copytree(encoded[1]["zarr"], latents.with_suffix(".zarr")))
        (path,) = (path for path in (latents / variable / "c").rglob("*") if path.is_file())
        flip(path, 0.5)

    done = decode(latents)
    assert done.code == 2 and str(latents) in done.message
    assert not done.folder.exists() or names(done.folder) == {"run.json", "config.yaml"}


# --- started again --------------------------------------------------------------------------------


def test_overwriting_keeps_sources(decode: Any, encoded: Any, latents: Path) -> None:
    """Whoever keeps them in the folder of the results would lose them."""
    source = Path(shutil.copy(encoded[0], decode(latents).folder / "source.nc"))
    done = decode(latents, sources=[source], options=("--overwrite",))
    check_refused(done, "sources", source, left=["scene.nc", "source.nc"])


# --- interrupted ----------------------------------------------------------------------------------


def test_a_file_is_done_when_all_of_it_is(
    encode: Any, decode: Any, make: Any, starter: Runs, model: Path, tmp_path: Path
) -> None:
    """Its figure, too: killed right before the second of two has its name, a run is resumed with the first as it is."""
    sources, run = [make("a.nc", 11, 9), make("b.nc", 9, 11, seed=1)], tmp_path / "run"
    latents = encode(*sources)
    whole = decode(*latents, name="whole", sources=sources)
    config = write_config(tmp_path / "run.yaml", run, model, latents, sources=[str(source) for source in sources])

    assert starter.start("decode", config, ("at_rename", "b.nc")).wait() == -signal.SIGKILL

    assert names(run) == {"a.nc", ".b.nc.part", "figures", "run.json", "config.yaml"}
    before = (run / "a.nc").stat().st_mtime_ns
    done = decode(*latents, sources=sources)
    assert done.code == 0 and (run / "a.nc").stat().st_mtime_ns == before
    assert same_results(run, whole)
    for name, facts in whole.record["files"].items():
        assert done.record["files"][name]["z_mse"] == facts["z_mse"]


# --- memory -----------------------------------------------------------------------------------------


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
