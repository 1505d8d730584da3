"""`inspect`: it tells what a path holds and, asked to verify, finds every change to a store."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from inferring import granule, write_config
from preparing import content, name, radiance, run_prepare
from tiny import N_CHANNELS, flip, tiny_latents, tiny_provenance, write_tiny

from spectralvae.cli import run
from spectralvae.data.store import Store, scene_folder, shard_file
from spectralvae.data.store_writer import finish_store
from spectralvae.data.verify import verify_store

WriteGranule = Callable[..., Path]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, write_granule: WriteGranule) -> Path:
    """Three scans, some of whose samples are missing, with geometry."""
    folder, paths = tmp_path_factory.mktemp("sound"), []
    for i in (1, 2, 3):
        values = radiance(i)
        values[i, 2, 3] = np.nan
        geometry = {"latitude": np.full(values.shape[:2], 40.0 + i)}
        paths.append(write_granule(folder / name(f"2024060{i}T180000"), values, geometry=geometry))
    return run_prepare(folder / "store", paths).path


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Store:
    """A copy to be spoiled."""
    return Store(shutil.copytree(sound, tmp_path / "store"))


def facts(capsys: pytest.CaptureFixture[str], path: Path, *options: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run(["inspect", str(path), "--json", *options]) == 0
    return dict(json.loads(capsys.readouterr().out))


def problems(store: Store) -> list[str]:
    return verify_store(Store(store.path), lambda n_pixels: None)


def test_a_store_is_described_and_not_changed(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(store.path)
    found = facts(capsys, store.path, "--verify")
    assert (found["kind"], found["hash"], found["problems"]) == ("store", store.hash, [])
    assert found["invalid_samples"] == {"nan": 3}
    assert (found["training_scenes"], found["validation_scenes"]) == (2, 1)
    assert [scene["id"] for scene in found["scenes"]] == [scene.id for scene in store.scenes]
    assert content(store.path) == before


@pytest.mark.parametrize("position", [0, 0.5, 0.999])
def test_a_flipped_bit_in_any_file_of_a_scene_is_found(store: Store, position: float) -> None:
    folder = scene_folder(store.path, store.scenes[1].id)
    for file in (file for file in sorted(folder.rglob("*")) if file.is_file()):
        kept = file.read_bytes()
        flip(file, position)
        assert any(str(folder) in problem for problem in problems(store)), file
        file.write_bytes(kept)
    assert problems(store) == []


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("z/zarr.json", '"float16"', '"int16"'),
        ("zarr.json", '"float16"', '"int16"'),
        ("zarr.json", '"latitude"', '"longitude"'),
        ("../../zarr.json", '"float16"', '"int16"'),
        ("../../zarr.json", '"latitude"', '"longitude"'),
    ],
)
def test_metadata(store: Store, file: str, old: str, new: str) -> None:
    """z as another type, or an array under another name: what the numbers mean."""
    path = scene_folder(store.path, store.scenes[0].id) / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert run(["inspect", str(store.path), "--verify"]) == 2


def test_a_lost_shard_and_a_cut_one(store: Store) -> None:
    first, second, third = (shard_file(scene_folder(store.path, scene.id)) for scene in store.scenes)
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    found = problems(store)
    assert [str(path) in problem for path, problem in zip((first, second), found, strict=True)] == [True, True]
    assert not any(str(third) in problem for problem in found)


@pytest.mark.parametrize(("array", "change"), [("count", 1), ("lost_mean", 0.1), ("lost_square", -0.1)])
def test_statistics_that_do_not_belong_to_z(store: Store, array: str, change: float) -> None:
    """With a root whose hash fits them: as a wrong preparation would have left it."""
    arrays = {key: values.copy() for key, values in store.arrays.items() if key not in ("mean", "std", "wavelength")}
    arrays[array][3] += change
    finish_store(store.path, store.scenes, store.normalization, arrays, store.dtype.name)
    (found,) = problems(store)
    assert found.startswith(str(store.path / "count" if array == "count" else store.path))
    assert re.search(r"\b3\b", found.removeprefix(str(store.path))), "the channel"


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
    assert facts(capsys, write_tiny(tmp_path / "plain"))["provenance"] is None
    folder = write_tiny(tmp_path / "model", latents=tiny_latents(), provenance=tiny_provenance())
    found = facts(capsys, folder, "--verify")
    config = json.loads((folder / "config.json").read_text())
    assert (found["kind"], found["problems"]) == ("model", [])
    assert {key: found[key] for key in ("latents", "provenance")} == {k: config[k] for k in ("latents", "provenance")}
    assert found["latents"]["std"] == tiny_latents().std.tolist()
    assert found["provenance"]["metrics"]["val_pixel_mse"] == 0.0123
    assert found["weights_sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert run(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in (found["weights_sha256"], "small_store", "abc123", "pca_2 0.25", "1.33333"))
    flip(folder / "model.safetensors", 0.5)
    assert run(["inspect", str(folder), "--verify"]) == 2
    assert str(folder) in capsys.readouterr().err


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
