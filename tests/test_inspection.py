"""`inspect`: it tells what a path holds and, asked to verify, finds every change to a store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from inferring import granule, write_config

from spectralvae.cli import run
from spectralvae.data.store import Store, scene_folder, shard_file
from spectralvae.data.verify import verify_store
from spectralvae.errors import InputError
from tests.preparing import name, radiance, run_prepare
from tests.tiny import N_CHANNELS, flip, tiny_latents, tiny_provenance, write_tiny

WriteGranule = Callable[..., Path]


@pytest.fixture
def store(tmp_path: Path, write_granule: WriteGranule) -> Store:
    """Three scans, some of whose samples are missing, with geometry."""
    paths = []
    for i in (1, 2, 3):
        values = radiance(i)
        values[i, 2, 3] = np.nan
        geometry = {"latitude": np.full(values.shape[:2], 40.0 + i)}
        paths.append(write_granule(tmp_path / name(f"2024060{i}T180000"), values, geometry=geometry))
    return run_prepare(tmp_path / "store", list(paths))


def facts(capsys: pytest.CaptureFixture[str], path: Path, *options: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run(["inspect", str(path), "--json", *options]) == 0
    return dict(json.loads(capsys.readouterr().out))


def problems(store: Store) -> list[str]:
    return verify_store(Store(store.path), lambda n_pixels: None)


def test_a_store(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, store.path, "--verify")
    assert (found["kind"], found["hash"], found["problems"]) == ("store", store.hash, [])
    assert found["invalid_samples"] == {"nan": 3}
    assert (found["training_scenes"], found["validation_scenes"]) == (2, 1)
    assert [scene["id"] for scene in found["scenes"]] == [scene.id for scene in store.scenes]


def test_it_changes_nothing(store: Store) -> None:
    def content() -> dict[Path, tuple[bytes, int]]:
        files = (path for path in store.path.rglob("*") if path.is_file())
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before = content()
    assert run(["inspect", str(store.path), "--verify"]) == 0
    assert content() == before


@pytest.mark.parametrize("position", [0, 17, 0.5, 0.999])
def test_a_flipped_bit_of_z_is_found(store: Store, position: float) -> None:
    flip(shard_file(scene_folder(store.path, store.scenes[0].id)), position)
    assert len(problems(store)) >= 1
    assert run(["inspect", str(store.path), "--verify"]) == 2


@pytest.mark.parametrize("array", ["latitude", "wavelength", "n_invalid"])
def test_arrays_beside_z(store: Store, array: str) -> None:
    folder = scene_folder(store.path, store.scenes[1].id)
    for file in sorted((folder / array).rglob("*")):
        if file.is_file():
            kept = file.read_bytes()
            flip(file, 0.5)
            assert any(str(folder) in problem for problem in problems(store)), file
            file.write_bytes(kept)
    assert problems(store) == []


@pytest.mark.parametrize("file", ["z/zarr.json", "zarr.json", "../../zarr.json"])
@pytest.mark.parametrize("change", [('"float16"', '"int16"'), ('"latitude"', '"longitude"')])
def test_metadata(store: Store, file: str, change: tuple[str, str]) -> None:
    """z as another type, or an array under another name: what the numbers mean."""
    path = scene_folder(store.path, store.scenes[0].id) / file
    text = path.read_text()
    if change[0] not in text:
        pytest.skip("not in this file")
    path.write_text(text.replace(*change))
    try:
        found = problems(store)
    except InputError:  # the root says that it isn't what it was
        return
    assert found != []


def test_a_lost_shard_and_a_cut_one(store: Store) -> None:
    first, second, third = (shard_file(scene_folder(store.path, scene.id)) for scene in store.scenes)
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    found = problems(store)
    assert [str(path) in problem for path, problem in zip((first, second), found, strict=True)] == [True, True]
    assert not any(str(third) in problem for problem in found)


def rewrite_root(store: Store, **arrays: np.ndarray) -> None:
    """Other statistics, with a root whose hash fits them: as a wrong preparation would have left it."""
    from spectralvae.data.store_writer import finish_store

    normalization = store.normalization
    for which in ("mean", "std"):
        if which in arrays:
            object.__setattr__(normalization, which, arrays.pop(which))
    extra = {key: value for key, value in store.arrays.items() if key not in ("mean", "std", "wavelength")}
    finish_store(store.path, store.scenes, normalization, {**extra, **arrays}, store.dtype.name)


def test_statistics_that_do_not_belong_to_z(store: Store) -> None:
    assert problems(store) == []
    count = store.arrays["count"].copy()
    count[3] += 1
    rewrite_root(store, count=count)
    assert [problem.split(": ")[1] for problem in problems(store)] == ["is wrong in 1 channels, first in 3"]


@pytest.mark.parametrize("factor", [1.05, 0.95])
def test_z_made_with_other_statistics(
    tmp_path: Path, write_granule: WriteGranule, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """As if the normalisation had used another std than the store says: the digests all fit, the statistics do not."""
    from spectralvae.data import scenes
    from spectralvae.weights.normalization import Normalization

    standardize = Normalization.standardize
    monkeypatch.setattr(scenes.Normalization, "standardize", lambda self, values: factor * standardize(self, values))
    paths = [write_granule(tmp_path / name(f"2024060{i}T180000"), radiance(i)) for i in (1, 2, 3)]
    wrong = run_prepare(tmp_path / "wrong", list(paths))
    assert any("its mean square is" in problem for problem in problems(wrong))


def test_a_scene(tmp_path: Path, write_granule: WriteGranule, capsys: pytest.CaptureFixture[str]) -> None:
    values = radiance(0)
    values[0, 0] = np.nan
    values[1, 1] = -1e30
    path = write_granule(tmp_path / name("20240601T180000"), values)
    found = facts(capsys, path)
    ny, nx, nc = values.shape
    assert (found["kind"], found["shape"], found["version"]) == ("scene (tempo)", [ny, nx, nc], "V03")
    assert "valid_samples" not in found
    found = facts(capsys, path, "--verify")
    assert found["invalid_samples"] == {"undeclared_fill": nc, "nan": nc}
    assert found["valid_samples"] == values.size - 2 * nc
    values[1, 1] = np.nan
    np.testing.assert_allclose(found["least_and_largest"], [np.nanmin(values), np.nanmax(values)], rtol=1e-6)


def test_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny(tmp_path / "model")
    found = facts(capsys, folder, "--verify")
    assert (found["kind"], found["problems"]) == ("model", [])
    assert (found["latents"], found["provenance"]) == (None, None)
    flip(folder / "model.safetensors", 0.5)
    assert run(["inspect", str(folder), "--verify"]) == 2
    assert str(folder) in capsys.readouterr().err


def test_what_a_model_was_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny(tmp_path / "model", latents=tiny_latents(), provenance=tiny_provenance())
    found = facts(capsys, folder)
    config = json.loads((folder / "config.json").read_text())
    for key in ("latents", "provenance"):
        assert found[key] == config[key]
    assert found["latents"]["std"] == tiny_latents().std.tolist()
    assert found["provenance"]["metrics"]["val_pixel_mse"] == 0.0123
    assert found["weights_sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert run(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert found["weights_sha256"] in shown
    for words in ("store: small_store", "abc123", "val_pixel_mse 0.0123", "pca_2 0.25", "1.33333"):
        assert words in shown


def test_what_is_none_of_these(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("hello")
    for path in (tmp_path / "text.txt", tmp_path / "nothing", tmp_path):
        assert run(["inspect", str(path)]) == 2
        error = capsys.readouterr().err
        assert str(path) in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("kind", ["netcdf", "zarr"])
def test_latents(kind: str, tmp_path: Path, write_granule: WriteGranule, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = write_tiny(tmp_path / "model"), tmp_path / "TEMPO_RAD_L1_V03_20240601T150000Z_S006G01.nc"
    granule(write_granule, path, 9, 7)
    config = write_config(tmp_path / "encode.yaml", tmp_path / "latents", model, [path], format=kind)
    assert run(["encode", str(config)]) == 0
    (latents,) = (tmp_path / "latents").glob("*.latents.*")

    found = facts(capsys, latents, "--verify")

    assert found["kind"] == "latents" and found["source"] == path.name
    assert found["model_sha256"] == hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert (found["latent_channels"], found["grid"], found["scene"]) == (3, [5, 4], [9, 7, N_CHANNELS])
    with xr.open_dataset(path, group="band_290_490_nm") as source:
        valid = source.radiance.notnull() & (source.radiance >= 1.5)
        assert found["valid_fraction"] == pytest.approx(float(valid.mean()))
    assert found["problems"] == []
