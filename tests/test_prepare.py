"""Preparation: what stands in a store, what is refused, level 2, and that a restart is exact."""

from __future__ import annotations

import hashlib
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from preparing import (
    NC,
    NX,
    NY,
    REFLECTANCE,
    SPLIT_OF_THREE,
    WriteGranule,
    name,
    radiance,
    reflectance_file,
    refused,
    root_array,
    run_prepare,
    same_content,
    write_level2,
    z_of,
)

from spectralvae.config import PrepareConfig
from spectralvae.config.loading import load_config
from spectralvae.data import scenes as scenes_module
from spectralvae.data.store import Store
from spectralvae.data.targets import TargetTransform
from spectralvae.errors import ConfigError, InputError
from spectralvae.readers import Scene
from spectralvae.readers.products import PRODUCT_RULES


@pytest.fixture
def granules(tmp_path: Path, write_granule: WriteGranule) -> list[Path]:
    """Clean scans of three days."""
    return [write_granule(tmp_path / name(f"2024060{i}T180000"), radiance(i)) for i in (1, 2, 3)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows at a time."""
    monkeypatch.setattr(scenes_module, "BLOCK_SAMPLES", 3 * NX * NC)


def test_what_stands_beside_z(tmp_path: Path, write_granule: WriteGranule) -> None:
    paths = []
    for i in range(3):
        arguments = {"seconds": 1.4e9 + 2.5 * np.arange(NY), "geometry": {"latitude": np.full((NY, NX), 40.0 + i)}}
        paths.append(write_granule(tmp_path / name(f"2024060{i + 1}T180000"), radiance(i), **arguments))
    store = run_prepare(tmp_path / "store", paths, split={"val_fraction": 0.3})
    for i, (scene, path) in enumerate(zip(store.scenes, paths, strict=True)):
        with xr.open_zarr(store.path, group=f"scenes/{scene.id}", chunks=None) as ds:
            np.testing.assert_array_equal(ds["latitude"], np.full((NY, NX), np.float32(40 + i)))
            assert ds["wavelength"].dims == ("x", "channel")
            assert ds["time"][0] == np.datetime64("1980-01-06") + np.timedelta64(1_400_000_000, "s")
            assert set(ds.variables) == {"z", "n_invalid", "latitude", "wavelength", "time"}
        assert (scene.source, scene.source_bytes) == (path.name, path.stat().st_size)
        assert scene.time == f"2024-06-0{i + 1}T18:00:00+00:00"
        assert scene.shape == [NY, NX, NC]
        assert scene.region is None
        assert "longitude" in scene.absent
        assert "latitude" not in scene.absent
    settings = store.normalization.settings()
    assert settings == {
        "transform": "log_zscore",
        "clip": 10.0,
        "min_radiance": 1.0,
        "band": "band_290_490_nm",
        "units": "photons/s/cm^2/nm/sr",
        "valid_range": None,
        "flag_bits": None,
        "max_solar_zenith": None,
    }
    np.testing.assert_allclose(store.normalization.wavelength, 300 + 0.2 * np.arange(NC), rtol=1e-6)
    assert not (store.path / ".partial").exists()
    record = json.loads((store.path / "run.json").read_text())
    assert (record["state"], record["store_hash"]) == ("finished", store.hash)


def test_a_store_keeps_the_rules_of_validity(tmp_path: Path, write_granule: WriteGranule) -> None:
    """Whoever encodes scenes later must apply them again."""
    geometry = {"solar_zenith_angle": np.full((NY, NX), 30.0)}
    paths = [write_granule(tmp_path / name(f"2024060{i}T180000"), radiance(i), geometry=geometry) for i in (1, 2)]
    validity = {"valid_range": [1.0, 1e20], "flag_bits": [0, 5], "max_solar_zenith": 70.0}

    normalization = run_prepare(tmp_path / "store", paths, validity=validity).normalization

    assert normalization.valid_range == (1.0, 1e20)
    assert normalization.flag_bits == (0, 5)
    assert normalization.max_solar_zenith == 70.0


def test_limits_of_the_config(tmp_path: Path, granules: list[Path]) -> None:
    """min_radiance decides what is valid, clip what z can be."""
    limit = 3e10
    store = run_prepare(
        tmp_path / "store", granules, normalization={"min_radiance": limit, "clip": 1.5}, split={"val_fraction": 0}
    )
    values = np.stack([radiance(i) for i in (1, 2, 3)]).astype(np.float64)
    small = values < limit
    assert small.any()
    logs = np.where(small, np.nan, np.log(values)).reshape(-1, NC)
    np.testing.assert_allclose(store.normalization.mean, np.nanmean(logs, axis=0), rtol=1e-10)
    np.testing.assert_allclose(store.normalization.std, np.nanstd(logs, axis=0), rtol=1e-10)
    z = np.stack([z_of(store, s.id) for s in store.scenes])
    np.testing.assert_array_equal(np.isnan(z), small)
    assert [s.invalid["below_min_radiance"] for s in store.scenes] == small.sum(axis=(1, 2, 3)).tolist()
    assert np.nanmax(z) == 1.5
    assert np.nanmin(z) == -1.5


# --- inputs that do not go together ---------------------------------------------------------------


def test_wavelengths_off_by_more_than_a_channel(
    tmp_path: Path, granules: list[Path], write_granule: WriteGranule
) -> None:
    def shifted(by: float) -> Path:
        wavelength = np.broadcast_to(300 + by + 0.2 * np.arange(NC), (NX, NC))
        return write_granule(tmp_path / name("20240604T180000"), radiance(4), wavelength=wavelength)

    split = {"train": ["*0601*", "*0602*", "*0603*"], "val": ["*0604*"]}
    run_prepare(tmp_path / "good", [*granules, shifted(0.19)], split=split)
    moved = shifted(0.21)
    refused(
        ConfigError, tmp_path / "store", [*granules, moved], str(moved), "300.21-301.21 nm", "300.00-301.00 nm",
        split=split,
    )  # fmt: skip


def test_channels_bands_and_units_must_be_the_same(
    tmp_path: Path, granules: list[Path], write_granule: WriteGranule
) -> None:
    out = tmp_path / "store"
    other = tmp_path / name("20240604T180000")
    for what, arguments in (
        (("channels", "6", "5"), {"radiance": radiance(4)[..., :5]}),
        (("units", "W/m^2"), {"radiance": radiance(4), "units": "W/m^2"}),
        (("band", "band_540_740_nm"), {"radiance": radiance(4), "band": "band_540_740_nm"}),
    ):
        write_granule(other, **arguments)
        refused(ConfigError, out, [*granules, other], str(granules[0]), str(other), *what)


def test_band_of_the_config(tmp_path: Path, granules: list[Path]) -> None:
    words = ("band_540_740_nm", str(granules[0]))
    refused(ConfigError, tmp_path / "store", granules, *words, band="band_540_740_nm")
    store = run_prepare(tmp_path / "good", granules, band="band_290_490_nm")
    assert store.normalization.band == "band_290_490_nm"


def test_damaged_file_is_refused_not_passed_over(tmp_path: Path, granules: list[Path]) -> None:
    granules[1].write_bytes(granules[1].read_bytes()[:3000])
    refused(InputError, tmp_path / "store", granules, str(granules[1]))
    refused(InputError, tmp_path / "store", [*granules[:1], tmp_path / "no.nc"], "no.nc")


# --- transforms and channels ----------------------------------------------------------------------


def test_reflectance(tmp_path: Path) -> None:
    """log_zscore is refused before anything is written; zscore takes zeros and negatives as they are."""
    rng = np.random.default_rng(0)
    values = rng.uniform(-0.02, 0.8, (12, 9, 5))
    values[rng.random(values.shape) < 0.1] = 0
    scene = reflectance_file(tmp_path / "scene.mat", values)
    message = refused(ConfigError, tmp_path / "store", [scene], "normalization.transform", "zscore")
    assert re.search(r"`transform: zscore`", message)
    store = run_prepare(tmp_path / "store", [scene], normalization=REFLECTANCE, split={"val_fraction": 0})
    flat = values.astype(np.float32).astype(np.float64).reshape(-1, 5)
    np.testing.assert_allclose(store.normalization.mean, flat.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(store.normalization.std, flat.std(axis=0), rtol=1e-10)
    z = z_of(store, "scene")
    assert np.isfinite(z).all()
    exact = ((flat - flat.mean(axis=0)) / (flat.std(axis=0) + 1e-8)).reshape(values.shape)
    np.testing.assert_allclose(z, exact, rtol=2.0**-11, atol=1e-6)
    assert store.normalization.settings()["min_radiance"] is None
    assert store.scenes[0].time is None


def test_log_zscore_that_fits_only_the_middle_row(tmp_path: Path, write_granule: WriteGranule) -> None:
    """The first look is at one row; all of the training data are judged once they were read."""
    values = np.full((NY, NX, NC), 0.1, np.float32)
    values[NY // 2] = radiance(0)[0]
    path = write_granule(tmp_path / name("20240601T180000"), values)
    split = {"val_fraction": 0}
    refused(ConfigError, tmp_path / "store", [path], "zscore", "min_radiance", made=True, split=split)


@pytest.mark.parametrize("value", [0.1, 5.0, 1.3e12])
def test_constant_channel_is_refused_by_name(
    tmp_path: Path, granules: list[Path], write_granule: WriteGranule, small_blocks: None, value: float
) -> None:
    """Also where rounding makes the mean differ from the value, and so the variance from zero."""
    scenes = [radiance(i) for i in (1, 2, 3)]
    for path, values in zip(granules, scenes, strict=True):
        values[..., 2] = value
        values[3, 4, 2] = np.nan
        write_granule(path, values)
    words = ("channel 2", "300.40 nm", "same value")
    normalization = {"min_radiance": 1e-3}
    refused(ConfigError, tmp_path / "store", granules, *words, made=True, normalization=normalization)


def test_dead_channels_stay_masked_and_are_named(
    tmp_path: Path, granules: list[Path], write_granule: WriteGranule, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a valid training sample a channel has no z, not even in a validation scene that has samples."""
    for i, path in enumerate(granules):
        values = radiance(i + 1)
        if i < 2:
            values[..., 1] = -1e30
            values[..., 4] = np.nan
        write_granule(path, values)
    split = {"train": ["*0601*", "*0602*"], "val": ["*0603*"]}
    store = run_prepare(tmp_path / "store", granules, split=split)
    dead = np.zeros(NC, bool)
    dead[[1, 4]] = True
    np.testing.assert_array_equal(np.isnan(store.normalization.mean), dead)
    np.testing.assert_array_equal(np.isnan(store.normalization.std), dead)
    for i, scene in enumerate(store.scenes):
        np.testing.assert_array_equal(np.isnan(z_of(store, scene.id)), np.broadcast_to(dead, (NY, NX, NC)))
        assert (store.n_invalid(i) == 2).all()
    output = capsys.readouterr().out
    assert "2 channels" in output
    assert "1 (300.20 nm), 4 (300.80 nm)" in output


def test_nothing_valid_at_all(tmp_path: Path, write_granule: WriteGranule) -> None:
    path = write_granule(tmp_path / name("20240601T180000"), np.full((NY, NX, NC), -1e30))
    refused(InputError, tmp_path / "store", [path], "no valid sample", made=True)


# --- versions, folders ----------------------------------------------------------------------------


def test_versions_are_not_mixed_unasked(tmp_path: Path, granules: list[Path], write_granule: WriteGranule) -> None:
    newer = write_granule(tmp_path / name("20240604T180000", version="V04"), radiance(4))
    words = (str(granules[0]), "V03", str(newer), "V04", "mixed_versions: true")
    refused(ConfigError, tmp_path / "store", [*granules, newer], *words)
    store = run_prepare(tmp_path / "store", [*granules, newer], mixed_versions=True)
    assert [s.version for s in store.scenes] == ["V03", "V03", "V03", "V04"]


def test_folder_of_granules(tmp_path: Path, granules: list[Path], write_granule: WriteGranule) -> None:
    """Level 1 is taken, also twilight and .nc4, and nothing else that lies there."""
    folder = tmp_path / "folder"
    folder.mkdir()
    names = [granules[0].name, "TEMPO_RADT_L1_V03_20240602T010000Z_S001G01.nc", name("20240603T180000") + "4"]
    for path, new in zip(granules, names, strict=True):
        path.rename(folder / new)
    write_level2(folder, folder / names[0], "NO2", np.ones((NY, NX)))
    (folder / "readme.txt").write_text("")
    store = run_prepare(tmp_path / "store", [folder], split={"by": "scene"})
    assert [s.source for s in store.scenes] == sorted(names)


def test_folder_without_scenes(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    refused(InputError, tmp_path / "store", [folder], str(folder), "TEMPO_RAD*_L1_*.nc")
    (folder / "TEMPO_NO2_L2_V03_20240601T180000Z_S001G01.nc").write_text("")
    refused(InputError, tmp_path / "store", [folder], str(folder))


# --- level 2 --------------------------------------------------------------------------------------


def level2(product: str, seed: int, shape: tuple[int, int] = (NY, NX)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(y, x) values and quality as a file holds them, and which of them are valid."""
    rng = np.random.default_rng(seed)
    values = {
        "NO2": rng.normal(2e15, 3e15, shape),
        "HCHO": rng.normal(5e15, 1e16, shape),
        "O3TOT": rng.normal(300 + 10 * seed, 20, shape),
        "CLDO4": rng.uniform(0, 1, shape),
    }[product]
    kind = rng.choice(4, shape, p=[0.85, 0.05, 0.05, 0.05])
    values[kind == 1], values[kind == 2] = np.nan, -1e30
    values[kind == 3] = {"NO2": 1.5e20, "HCHO": -2e18, "O3TOT": 900.0, "CLDO4": 1.2}[product]
    quality = (rng.random(shape) < 0.1).astype(np.uint16)  # suspicious, or bit 0: an error
    return values, quality, (kind == 0) & (quality == 0)


def write_products(folder: Path, granules: list[Path], products: tuple[str, ...]) -> dict[str, Any]:
    """Level 2 of all granules, granule i with seed i; returns the section of the config."""
    for i, granule in enumerate(granules):
        for product in products:
            values, quality, _ = level2(product, i)
            write_level2(folder, granule, product, values, quality)
    return {product: {"folder": str(folder)} for product in products}


def found_invalid(product: str, seed: int) -> dict[str, int]:
    """By rule: what a pixel holds comes before what its quality says, and that before its range."""
    values, quality, good = level2(product, seed)
    fill, nan = values == -1e30, np.isnan(values)
    bad = (quality > 0) & ~fill & ~nan
    return {
        "undeclared_fill": int(fill.sum()),
        "nan": int(nan.sum()),
        "quality": int(bad.sum()),
        "out_of_range": int((~good & ~fill & ~nan & ~bad).sum()),
    }


def targets_of(product: str, values: np.ndarray, training: np.ndarray) -> np.ndarray:
    """What is to be learned: the transforms as they are defined, with the statistics of the training values."""
    if product == "O3TOT":
        return (values - training.mean()) / training.std()
    if product == "CLDO4":
        share = 0.01 + 0.98 * values
        return np.log(share / (1 - share))
    divide = {"NO2": 1e15, "HCHO": 1e16}[product]
    scale = 1.4826 * np.median(np.abs(training - np.median(training))) / divide
    return np.arcsinh(values / divide / scale)


@pytest.mark.parametrize("product", ["NO2", "HCHO", "O3TOT", "CLDO4"])
def test_level_2_beside_z(tmp_path: Path, granules: list[Path], product: str) -> None:
    section = write_products(tmp_path / "l2", granules, (product,))
    store = run_prepare(tmp_path / "store", granules, split=SPLIT_OF_THREE, l2=section)
    truth = [np.where(good, v, np.nan).astype(np.float32) for v, _, good in (level2(product, i) for i in range(3))]
    training = np.concatenate([t[np.isfinite(t)] for t in truth[:2]]).astype(np.float64)
    for i, scene in enumerate(store.scenes):
        group = f"scenes/{scene.id}/l2"
        with xr.open_zarr(store.path, group=group, chunks=None) as ds:
            found = ds[product].load()
        assert (found.dims, found.dtype) == (("y", "x"), np.float32)
        np.testing.assert_array_equal(found, truth[i])
        target = TargetTransform.from_attributes(found.attrs["transform"])
        assert found.attrs["units"] == target.units == {"O3TOT": "DU", "CLDO4": "1"}.get(product, "molecules/cm^2")
        expected = targets_of(product, truth[i].astype(np.float64), training)
        np.testing.assert_allclose(target.transform(truth[i]), expected, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(target.inverse(expected), truth[i], rtol=1e-5, atol=1e-6 * np.nanmax(truth[i]))
        learned = targets_of(product, training, training)
        found_statistics = (target.n, target.mean, target.std, target.minimum, target.maximum)
        statistics = (len(training), learned.mean(), learned.std(), learned.min(), learned.max())
        np.testing.assert_allclose(found_statistics, statistics, rtol=1e-6, atol=1e-9)
        assert store.attributes["targets"] == {product: target.to_attributes()}
        origin = scene.products[product]
        assert origin["source"] == granules[i].name.replace("RAD_L1", f"{product}_L2")
        assert origin["sha256"] == hashlib.sha256((tmp_path / "l2" / origin["source"]).read_bytes()).hexdigest()
        assert origin["n_valid"] == np.isfinite(truth[i]).sum()
        assert origin["n_valid"] + sum(found.attrs["invalid"].values()) == NY * NX
        assert found.attrs["invalid"] == {**dict.fromkeys(PRODUCT_RULES, 0), **found_invalid(product, i)}
    assert set(xr.open_zarr(store.path, group=f"scenes/{scene.id}", chunks=None).variables) >= {"z", "n_invalid"}


def test_level_2_of_regions(tmp_path: Path, granules: list[Path]) -> None:
    section = write_products(tmp_path / "l2", granules[:1], ("NO2", "O3TOT"))
    store = run_prepare(tmp_path / "store", [{"path": str(granules[0]), "region": [1, 9, 2, 7]}], l2=section)
    for product in section:
        values, _, good = level2(product, 0)
        truth = np.where(good, values, np.nan).astype(np.float32)
        for scene in store.scenes:
            y0, y1, x0, x1 = scene.region or []
            with xr.open_zarr(store.path, group=f"scenes/{scene.id}/l2", chunks=None) as ds:
                np.testing.assert_array_equal(ds[product], truth[y0:y1, x0:x1])
    assert [s.split for s in store.scenes] == ["train", "val"]
    y0, y1, x0, x1 = store.scenes[0].region or []
    assert store.attributes["targets"]["O3TOT"]["n"] == np.isfinite(truth[y0:y1, x0:x1]).sum()


@pytest.mark.parametrize("scene", [0, 2])  # of training, of validation
def test_level_2_that_does_not_fit(tmp_path: Path, granules: list[Path], scene: int) -> None:
    """All of it before anything is written."""
    out, section = tmp_path / "store", write_products(tmp_path / "l2", granules, ("NO2",))
    settings = {"split": SPLIT_OF_THREE, "l2": section}
    path = tmp_path / "l2" / granules[scene].name.replace("RAD_L1", "NO2_L2")
    write_level2(tmp_path / "l2", granules[scene], "NO2", np.ones((NY, NX + 1)))
    refused(InputError, out, granules, str(path), f"{NY} x {NX + 1}", f"{NY} x {NX}", **settings)
    write_level2(tmp_path / "l2", granules[scene], "NO2", np.ones((NY, NX)), units="mol/m^2")
    refused(ConfigError, out, granules, "'mol/m^2'", "molecules/cm^2", "l2.NO2.valid_range", **settings)
    given = {"split": SPLIT_OF_THREE, "l2": {"NO2": {**section["NO2"], "valid_range": [-1.0, 1e18]}}}
    refused(InputError, out, granules, "'mol/m^2'", "'molecules/cm^2'", "must be alike", **given)
    path.write_bytes(path.read_bytes()[:1000])
    refused(InputError, out, granules, str(path), **settings)
    path.unlink()
    refused(InputError, out, granules, "no NO2 for", granules[scene].name, **settings)


@pytest.mark.parametrize("foreign", [False, True])
def test_level_2_of_a_scene_that_is_left_out_does_not_count(
    tmp_path: Path, granules: list[Path], write_granule: WriteGranule, foreign: bool
) -> None:
    other = run_prepare(tmp_path / "other", granules, split={"val_fraction": 0})
    section = write_products(tmp_path / "l2", granules, ("O3TOT",))
    night = write_granule(granules[0], np.full((NY, NX, NC), np.nan))
    settings: dict[str, Any] = {"split": SPLIT_OF_THREE, "l2": section, "validity": {"all_invalid": "leave_out"}}
    if foreign:
        settings["normalization"] = {"statistics": str(other.path)}
    store = run_prepare(tmp_path / "store", granules, **settings)
    assert store.attributes["left_out"] == [night.stem]
    values, _, good = level2("O3TOT", 1)
    target = store.attributes["targets"]["O3TOT"]
    assert target["n"] == good.sum()
    assert target["center"] == pytest.approx(values[good].mean(), rel=1e-6)


# --- statistics of others -------------------------------------------------------------------------


def passes_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose beginning is read from now on, in turn."""
    read, found = Scene.read, []

    def counted(self: Scene, rows: slice, columns: slice = slice(None)) -> Any:
        if rows.start == 0:
            found.append(self.path.name)
        return read(self, rows, columns)

    monkeypatch.setattr(Scene, "read", counted)
    return found


def test_statistics_of_another_store(
    tmp_path: Path, granules: list[Path], small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken as they are, and nothing is read twice to get them."""
    first = run_prepare(tmp_path / "first", granules[:1], split={"val_fraction": 0}, normalization={"clip": 5.0})
    passes = passes_of(monkeypatch)
    statistics = {"statistics": str(first.path)}
    store = run_prepare(tmp_path / "store", granules[1:], split={"val_fraction": 0}, normalization=statistics)
    assert passes == [p.name for p in granules[1:]]
    logs = np.log(radiance(1).astype(np.float64)).reshape(-1, NC)
    for key in ("mean", "std", "minimum", "maximum"):
        np.testing.assert_array_equal(root_array(store, key), root_array(first, key))
    np.testing.assert_allclose(store.normalization.mean, logs.mean(axis=0), rtol=1e-10)
    for i, scene in enumerate(store.scenes):
        exact = (np.log(radiance(i + 2).astype(np.float64)) - logs.mean(axis=0)) / logs.std(axis=0)
        np.testing.assert_allclose(z_of(store, scene.id), np.clip(exact, -10, 10), rtol=2.0**-10, atol=1e-6)
    assert (root_array(store, "count") == 2 * NY * NX).all()
    assert store.attributes["statistics_from"] == f"store {first.hash}"
    assert first.attributes["statistics_from"] is None


def write_spectra(folder: Path, mean: np.ndarray, std: np.ndarray) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    torch.save(torch.from_numpy(mean), folder / "mean_spectrum.pt")
    torch.save(torch.from_numpy(std), folder / "std_spectrum.pt")
    return {"statistics": str(folder)}


def test_statistics_of_mltools(tmp_path: Path, granules: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    mean, std = np.linspace(24, 30, NC), np.linspace(0.5, 2, NC)
    statistics = write_spectra(tmp_path / "spectra", mean, std)
    passes = passes_of(monkeypatch)
    store = run_prepare(tmp_path / "store", granules, split=SPLIT_OF_THREE, normalization=statistics, dtype="float32")
    assert passes == [p.name for p in granules]
    np.testing.assert_array_equal(store.normalization.mean, mean)
    np.testing.assert_array_equal(store.normalization.std, std)
    for i, scene in enumerate(store.scenes):
        exact = np.clip((np.log(radiance(i + 1).astype(np.float64)) - mean) / (std + 1e-8), -10, 10)
        np.testing.assert_allclose(z_of(store, scene.id), exact, rtol=1e-6)
    assert (root_array(store, "count") == 2 * NY * NX).all()
    assert "mean_spectrum.pt" in store.attributes["statistics_from"]
    short = write_spectra(tmp_path / "spectra", mean[1:], std[1:])
    words = ("normalization.statistics", "mean_spectrum.pt has 5 channels", "have 6")
    refused(ConfigError, tmp_path / "short", granules, *words, normalization=short)


def test_statistics_that_do_not_belong(tmp_path: Path, granules: list[Path], write_granule: WriteGranule) -> None:
    other = tmp_path / "other" / name("20240604T180000")
    other.parent.mkdir()

    def statistics(key: str, values: np.ndarray, normalization: dict[str, Any], **arguments: Any) -> dict[str, str]:
        write_granule(other, values, **arguments)
        made = run_prepare(tmp_path / key, [other], split={"val_fraction": 0}, normalization=normalization)
        return {"statistics": str(made.path)}

    far = np.broadcast_to(300.3 + 0.2 * np.arange(NC), (NX, NC))
    for key, arguments, words in (
        ("transform", (radiance(4), REFLECTANCE), ("zscore", "log_zscore")),
        ("min_radiance", (radiance(4), {"min_radiance": 2.0}), ("2.0", "1.0")),
        ("number of channels", (radiance(4)[..., 1:], {}), ("5", "6")),
    ):
        found = statistics(key, *arguments)
        words = ("normalization.statistics", f"{key} of {found['statistics']} is", *words)
        refused(ConfigError, tmp_path / "store", granules, *words, normalization=found)
    for key, more, words in (
        ("band", {"band": "band_540_740_nm"}, ("band_540_740_nm", "band_290_490_nm")),
        ("units", {"units": "W/m^2"}, ("W/m^2", "photons/s/cm^2/nm/sr")),
        ("wavelengths", {"wavelength": far}, ("0.300 nm", "0.200 nm")),
    ):
        found = statistics(key, radiance(4), {}, **more)
        refused(ConfigError, tmp_path / "store", granules, f"{key} of", *words, normalization=found)
    nowhere = {"statistics": str(tmp_path / "nowhere")}
    refused(InputError, tmp_path / "store", granules, "nowhere", normalization=nowhere)


# --- the same again -------------------------------------------------------------------------------


def test_inputs_inside_the_directory_survive_overwrite(tmp_path: Path, granules: list[Path]) -> None:
    store = run_prepare(tmp_path / "store", granules)
    inside = store.path / granules[0].name
    granules[0].rename(inside)
    with pytest.raises(ConfigError, match="lies in output_dir"):
        run_prepare(store.path, [inside, *granules[1:]], overwrite=True)
    assert inside.is_file()
    assert Store(store.path).hash == store.hash


@pytest.mark.parametrize("pattern", ["~nobody-of-this-name/x.nc", "~nobody-of-this-name/*.nc"])
def test_the_home_of_nobody(tmp_path: Path, pattern: str) -> None:
    refused(InputError, tmp_path / "store", [pattern], pattern)


def test_a_path_may_look_like_a_glob(tmp_path: Path, granules: list[Path]) -> None:
    odd = granules[0].with_name("TEMPO_RAD_L1_V03_a[1].nc")
    granules[0].rename(odd)
    assert len(run_prepare(tmp_path / "store", [odd, *granules[1:]], split={"by": "scene"}).scenes) == 3


def test_same_config_same_store(tmp_path: Path, granules: list[Path]) -> None:
    one, two = (run_prepare(tmp_path / f"store{i}", granules) for i in range(2))
    assert one.hash == two.hash
    assert same_content(one.path, two.path)


def test_hash_follows_the_data(tmp_path: Path, granules: list[Path], write_granule: WriteGranule) -> None:
    hashes = [run_prepare(tmp_path / "0", granules).hash]
    hashes.append(run_prepare(tmp_path / "1", granules, normalization={"clip": 9.0}).hash)
    hashes.append(run_prepare(tmp_path / "2", granules, dtype="float32").hash)
    values = radiance(2)
    values[4, 4, 4] *= 1.5
    write_granule(granules[1], values)
    hashes.append(run_prepare(tmp_path / "3", granules).hash)
    assert all(a != b for a, b in pairwise(hashes))
    assert len(set(hashes)) == 4


# --- one scene, whatever its files are called ------------------------------------------------------


def test_a_scan_in_two_files_is_refused(tmp_path: Path, granules: list[Path], write_granule: WriteGranule) -> None:
    """Processed twice, it is not byte-identical, and would still be trained on and judged with."""
    for again in (granules[0].name.replace("V03", "V04"), granules[0].name.replace(".nc", "-034.nc")):
        other = write_granule(tmp_path / again, radiance(9))
        refused(ConfigError, tmp_path / "store", [*granules, other], "of one scan", again, mixed_versions=True)
        other.unlink()


def test_copies_of_scenes_of_several_files(tmp_path: Path) -> None:
    """ENVI has two files, which are called alike."""
    envi = pytest.importorskip("spectral").io.envi
    inputs = []
    for scene in ("a", "b"):
        metadata = {"wavelength": ["400", "500", "600"], "wavelength units": "Nanometers"}
        cube = np.random.default_rng(0).uniform(1, 2, (12, 9, 3)).astype(np.float32)
        envi.save_image(str(tmp_path / f"{scene}.hdr"), cube, ext="img", metadata=metadata)
        inputs.append(tmp_path / f"{scene}.hdr")
    refused(ConfigError, tmp_path / "store", inputs, "copies of one file", normalization=REFLECTANCE)


def test_level_2_of_another_version(tmp_path: Path, granules: list[Path]) -> None:
    section = write_products(tmp_path / "l2", granules, ("NO2",))
    path = tmp_path / "l2" / granules[1].name.replace("RAD_L1", "NO2_L2")
    path.rename(path.with_name(path.name.replace("V03", "V04")))
    refused(ConfigError, tmp_path / "store", granules, "l2.NO2: version", "V04", l2=section)
    assert run_prepare(tmp_path / "mixed", granules, l2=section, mixed_versions=True).scenes


def test_wavelengths_that_do_not_increase(tmp_path: Path, granules: list[Path], write_granule: WriteGranule) -> None:
    wrong = np.broadcast_to(300 + 0.2 * np.arange(NC)[::-1], (NX, NC))
    paths = [write_granule(path, radiance(i), wavelength=wrong) for i, path in enumerate(granules)]
    refused(ConfigError, tmp_path / "store", paths, "must increase", paths[0].name)


def test_a_std_of_zero_is_refused(tmp_path: Path, granules: list[Path]) -> None:
    for name_, values in (("mean", torch.ones(NC)), ("std", torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0]))):
        torch.save(values, tmp_path / f"{name_}_spectrum.pt")
    settings = {"normalization": {"statistics": str(tmp_path)}}
    refused(ConfigError, tmp_path / "store", granules, "std_spectrum.pt", "channel 2", **settings)


def test_no_validation_scene_is_left(tmp_path: Path, granules: list[Path], write_granule: WriteGranule) -> None:
    """A validation that was asked for does not vanish."""
    write_granule(granules[2], np.full((NY, NX, NC), np.nan))
    settings = {"split": SPLIT_OF_THREE, "validity": {"all_invalid": "leave_out"}}
    refused(ConfigError, tmp_path / "store", granules, "no scene of the val split", made=True, **settings)


def test_a_url_is_refused(tmp_path: Path) -> None:
    refused(InputError, tmp_path / "store", ["https://example.org/a.nc"], "URL", "only local files")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"split": {"by": "day", "val_dates": ["2024-06-01"]}}, "by: given together"),
        ({"split": {"val_dates": ["2024-06-31"]}}, "split.val_dates"),
        ({"split": {"val_dates": ["2024-06-03/2024-06-01"]}}, "must end after it begins"),
        ({"cluster": "somewhere"}, "neither local nor an address"),
        ({"n_workers": 2}, "belongs to `cluster: local`"),
        ({"validity": {"valid_range": [2.0, 1.0]}}, "is not [low, high]"),
        ({"l2": {"NO2": {"folder": "x", "quality": 1}}}, "l2.NO2.quality: unknown key, did you mean max_quality"),
        ({"l2": {"NO2": {"dir": "x"}}}, "l2.NO2.folder: this key is required"),
        ({"l2": {"SO2": {"folder": "x"}}}, "l2"),
    ],
)
def test_mistakes_in_the_config(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    config = tmp_path / "prepare.yaml"
    config.write_text(json.dumps({"output_dir": str(tmp_path / "store"), "inputs": ["x.nc"], **settings}))
    with pytest.raises(ConfigError) as caught:
        load_config(PrepareConfig, config)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
