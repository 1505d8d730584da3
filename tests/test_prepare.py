"""Preparation: what stands in a store, what is refused, level 2, and that a restart is exact."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import refusals
import scipy.io
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
    refused,
    run_prepare,
    write_level2,
    z_of,
)

from spectralvae.config import PrepareConfig
from spectralvae.config.loading import load_config
from spectralvae.data import plan
from spectralvae.data.store import Store
from spectralvae.data.targets import fit_transform
from spectralvae.errors import ConfigError, InputError
from spectralvae.readers import Scene
from spectralvae.readers.products import PRODUCTS
from spectralvae.runtime.console import new_console

NO_VALIDATION = {"val_fraction": 0}


@pytest.fixture
def granules(tmp_path: Path, write_granule: WriteGranule) -> list[Path]:
    """Clean scans of three days."""
    return [write_granule(tmp_path / name(f"2024060{i}T180000"), radiance(i)) for i in (1, 2, 3)]


def test_what_stands_beside_z(tmp_path: Path, write_granule: WriteGranule) -> None:
    """Whoever encodes scenes later must apply the same rules of validity again."""
    paths = []
    for i in range(3):
        geometry = {"latitude": np.full((NY, NX), 40.0 + i), "solar_zenith_angle": np.full((NY, NX), 30.0)}
        seconds = 1.4e9 + 2.5 * np.arange(NY)
        paths.append(write_granule(tmp_path / name(f"2024060{i + 1}T180000"), radiance(i), seconds=seconds,
                                   geometry=geometry))  # fmt: skip
    validity = {"valid_range": [1.0, 1e20], "flag_bits": [0, 5], "max_solar_zenith": 70.0}
    settings = {"split": {"val_fraction": 0.3}, "validity": validity, "band": "band_290_490_nm"}
    store = run_prepare(tmp_path / "store", paths, **settings)
    for i, path in enumerate(paths):
        scene = store.scenes[i]
        with xr.open_zarr(store.path, group=f"scenes/{scene.id}", chunks=None) as ds:
            np.testing.assert_array_equal(ds["latitude"], np.full((NY, NX), np.float32(40 + i)))
            assert ds["wavelength"].dims == ("x", "channel")
            assert ds["time"][0] == np.datetime64("1980-01-06") + np.timedelta64(1_400_000_000, "s")
            assert set(ds.variables) == {"z", "n_invalid", "latitude", "solar_zenith_angle", "wavelength", "time"}
        assert (scene.source, scene.source_bytes) == (path.name, path.stat().st_size)
        assert scene.time == f"2024-06-0{i + 1}T18:00:00+00:00"
        assert (scene.shape, scene.region) == ([NY, NX, NC], None)
        assert "longitude" in scene.absent and "latitude" not in scene.absent
    assert store.normalization.settings() == {
        **{"transform": "log_zscore", "clip": 10.0, "min_radiance": 1.0, "units": "photons/s/cm^2/nm/sr"},
        **{"valid_range": (1.0, 1e20), "flag_bits": (0, 5), "max_solar_zenith": 70.0, "band": settings["band"]},
    }
    np.testing.assert_allclose(store.normalization.wavelength, 300 + 0.2 * np.arange(NC), rtol=1e-6)
    assert not (store.path / ".partial").exists()
    record = json.loads((store.path / "run.json").read_text())
    assert (record["state"], record["store_hash"]) == ("finished", store.hash)
    # inputs inside the directory survive --overwrite
    inside = paths[0].rename(store.path / paths[0].name)
    with refusals.refused(ConfigError, inside.name):
        run_prepare(store.path, [inside, *paths[1:]], overwrite=True, **settings)
    assert inside.is_file() and Store(store.path).hash == store.hash
    dark = write_granule(tmp_path / OTHER, radiance(4))  # without an angle
    where = {"key": "validity.max_solar_zenith", "path": dark}
    refused(ConfigError, tmp_path / "other", [*paths[1:], dark], **where, **settings)


# --- inputs that do not go together ---------------------------------------------------------------


def wavelengths(first: float) -> np.ndarray:
    return np.broadcast_to(first + 0.2 * np.arange(NC), (NX, NC))


OTHER, SAME_SCAN = name("20240604T180000"), name("20240601T180000")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"path": OTHER, "radiance": radiance(4)[..., :5]}, ("5", "6")),
        ({"path": OTHER, "units": "W/m^2"}, ("W/m^2",)),
        ({"path": OTHER, "band": "band_540_740_nm"}, ("band_540_740_nm",)),
        ({"path": OTHER, "wavelength": wavelengths(300.21)}, ("300.21-301.21 nm", "300.00-301.00 nm")),
        ({"path": OTHER.replace("V03", "V04")}, ("V03", "V04", "mixed_versions: true")),
        # processed twice, it is not byte-identical
        ({"path": SAME_SCAN.replace("V03", "V04")}, ("scan",)),
        ({"path": SAME_SCAN.replace(".nc", "-034.nc")}, ("scan",)),
    ],
)
def test_granules_that_do_not_go_together(
    tmp_path: Path, granules: list[Path], write_granule: WriteGranule, other: dict[str, Any], words: tuple[str, ...]
) -> None:
    path = write_granule(**{"radiance": radiance(4), **other, "path": tmp_path / other["path"]})
    settings = {"mixed_versions": "scan" in words, "key": "inputs", "path": path}
    refused(ConfigError, tmp_path / "store", [*granules, path], granules[0].name, *words, **settings)


def test_only_what_may_be_a_copy_is_read_in_full(tmp_path: Path, write_granule: WriteGranule) -> None:
    """Not files of one size, as of an instrument whose granules all have it."""
    shape = (NY, NX, 200)
    paths = [write_granule(tmp_path / name(f"2024060{i}T180000"), radiance(i, shape)) for i in (1, 2, 3)]
    assert len({path.stat().st_size for path in paths}) == 1
    assert paths[0].stat().st_size > 2 * plan.EXCERPT_BLOCKS * plan.EXCERPT_BYTES
    similar, copy, hard_link = (tmp_path / name(f"2024060{i}T180000") for i in (4, 5, 6))
    content = bytearray(paths[0].read_bytes())
    at = content.index(radiance(1, shape)[6].tobytes())  # a sample where nobody looks
    content[at : at + 4] = np.float32(1e12).tobytes()
    similar.write_bytes(content)
    shutil.copyfile(paths[1], copy)
    hard_link.hardlink_to(paths[2])

    def plan_of(*inputs: Path) -> None:
        config = {"output_dir": str(tmp_path / "store"), "inputs": list(map(str, inputs))}
        plan.plan_scenes(PrepareConfig.model_validate(config), new_console())

    with patch.object(Scene, "sha256", autospec=True, side_effect=Scene.sha256) as sha256:
        plan_of(*paths)
        assert sha256.call_count == 0
        plan_of(*paths, similar)
        assert [scene.path for (scene,), _ in sha256.call_args_list] == [paths[0], similar]
        for twin, original in ((copy, paths[1]), (hard_link, paths[2])):
            with refusals.refused(ConfigError, str(original), key="inputs", path=twin):
                plan_of(*paths, twin)


def test_versions_and_wavelengths_may_differ_a_little(
    tmp_path: Path, granules: list[Path], write_granule: WriteGranule
) -> None:
    other = OTHER.replace("V03", "V04").replace(".nc", "[1].nc")  # a path may look like a glob
    inputs = [*granules, write_granule(tmp_path / other, radiance(4), wavelength=wavelengths(300.19))]
    store = run_prepare(tmp_path / "store", inputs, mixed_versions=True, split=NO_VALIDATION)
    assert [s.version for s in store.scenes] == ["V03", "V03", "V03", "V04"]


def test_a_granule_alone_is_refused(tmp_path: Path, granules: list[Path], write_granule: WriteGranule) -> None:
    """Another band than the config's, wavelengths that decrease."""
    out = tmp_path / "store"
    refused(ConfigError, out, granules, "band_540_740_nm", granules[0].name, band="band_540_740_nm")
    write_granule(granules[0], radiance(1), wavelength=wavelengths(300)[:, ::-1])
    refused(ConfigError, out, granules[:1], "wavelength", path=granules[0])


def test_folders_and_globs(tmp_path: Path, granules: list[Path], write_granule: WriteGranule) -> None:
    """Level 1 is taken, also twilight and .nc4, and nothing else that lies there."""
    folder = tmp_path / "folder"
    folder.mkdir()
    refused(InputError, tmp_path / "store", [folder], "TEMPO_RAD*_L1_*.nc", key="inputs", path=folder)
    write_level2(folder, granules[0], "NO2", np.ones((NY, NX)))
    (folder / "readme.txt").write_text("")
    refused(InputError, tmp_path / "store", [folder], key="inputs", path=folder)
    for pattern in ("MODIS*.nc", "https://example.org/a.nc", "~nobody-of-this-name/*.nc"):
        refused(InputError, tmp_path / "store", [pattern], pattern, key="inputs")
    refused(InputError, tmp_path / "store", ["~nobody-of-this-name/x.nc"], "~nobody-of-this-name/x.nc")
    names = [granules[0].name, "TEMPO_RADT_L1_V03_20240602T010000Z_S001G01.nc", name("20240603T180000") + "4"]
    for path, new in zip(granules, names, strict=True):
        path.rename(folder / new)
    store = run_prepare(tmp_path / "store", [folder], split={"by": "scene"})
    assert [s.source for s in store.scenes] == sorted(names)


# --- transforms and channels ----------------------------------------------------------------------


def test_reflectance(tmp_path: Path) -> None:
    """log_zscore is refused before anything is written; zscore takes zeros and negatives as they are."""
    values = np.random.default_rng(0).uniform(-0.02, 0.8, (12, 9, 5))
    values[:, 2] = 0
    scipy.io.savemat(tmp_path / "scene.mat", {"scene": values})
    scene = {"path": str(tmp_path / "scene.mat"), "wavelength": {"first": 400, "last": 900}}
    refused(ConfigError, tmp_path / "store", [scene], "zscore", key="normalization.transform")
    store = run_prepare(tmp_path / "store", [scene], normalization=REFLECTANCE, split=NO_VALIDATION)
    flat = values.astype(np.float32).astype(np.float64).reshape(-1, 5)
    np.testing.assert_allclose(store.normalization.mean, flat.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(store.normalization.std, flat.std(axis=0), rtol=1e-10)
    exact = ((flat - flat.mean(axis=0)) / (flat.std(axis=0) + 1e-8)).reshape(values.shape)
    np.testing.assert_allclose(z_of(store, "scene"), exact, rtol=2.0**-11, atol=1e-6)


@pytest.mark.parametrize("value", [0.1, 1.3e12])
def test_statistics_that_are_refused(
    tmp_path: Path, granules: list[Path], write_granule: WriteGranule, value: float
) -> None:
    """Once they were read: a constant channel by name, even where rounding makes the mean differ from the value.

    And log_zscore that fits only the middle row, at which there was a first look.
    """
    for i, path in enumerate(granules):
        values = radiance(i)
        values[..., 2] = value
        values[3, 4, 2] = np.nan
        write_granule(path, values)
    settings = {"key": "inputs", "normalization": {"min_radiance": 1e-3}}
    refused(ConfigError, tmp_path / "store", granules, "channel 2", "300.40 nm", made=True, **settings)
    values = np.full((NY, NX, NC), value / 1e13, np.float32)
    values[NY // 2] = radiance(0)[0]
    path = write_granule(granules[0], values)
    refused(ConfigError, tmp_path / "other", [path], made=True, key="normalization.transform", split=NO_VALIDATION)


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
    store = run_prepare(tmp_path / "store", granules, split=SPLIT_OF_THREE)
    dead = np.isin(np.arange(NC), [1, 4])
    np.testing.assert_array_equal(np.isnan([store.normalization.mean, store.normalization.std]), [dead, dead])
    for scene in store.scenes:
        np.testing.assert_array_equal(np.isnan(z_of(store, scene.id)), np.broadcast_to(dead, (NY, NX, NC)))
    assert "1 (300.20 nm), 4 (300.80 nm)" in capsys.readouterr().out


# --- level 2 --------------------------------------------------------------------------------------


def level2(product: str, seed: int) -> np.ndarray:
    """(y, x) float32 values, NaN = invalid."""
    sizes = {"NO2": (2e15, 3e15), "HCHO": (5e15, 1e16), "O3TOT": (300 + 10 * seed, 20), "CLDO4": (0.5, 0.1)}
    values = np.random.default_rng(seed).normal(*sizes[product], (NY, NX)).astype(np.float32)
    values[seed:, ::7] = np.nan
    return values


def write_products(folder: Path, granules: list[Path], products: tuple[str, ...]) -> dict[str, Any]:
    """Level 2 of all granules, granule i with seed i; returns the section of the config."""
    for i, granule in enumerate(granules):
        for product in products:
            write_level2(folder, granule, product, np.nan_to_num(level2(product, i), nan=-1e30))
    return {product: {"folder": str(folder)} for product in products}


def test_level_2_beside_z(tmp_path: Path, granules: list[Path]) -> None:
    section = write_products(tmp_path / "l2", granules, tuple(PRODUCTS))
    inputs = [{"path": str(granules[0]), "region": [1, 9, 2, 7]}, *granules[1:]]
    store = run_prepare(tmp_path / "store", inputs, split=SPLIT_OF_THREE, l2=section)
    assert set(store.attributes["targets"]) == set(PRODUCTS)
    for product, spec in PRODUCTS.items():
        truth = [level2(product, 0)[1:9, 2:7], level2(product, 1), level2(product, 2)]
        for i, scene in enumerate(store.scenes):
            with xr.open_zarr(store.path, group=f"scenes/{scene.id}/l2", chunks=None) as ds:
                found = ds[product].load()
            assert (found.dims, found.dtype) == (("y", "x"), np.float32)
            np.testing.assert_array_equal(found, truth[i])
            target = fit_transform(spec, found.attrs["field"], spec.units, lambda truth=truth: truth[:2])
            assert found.attrs["transform"] == store.attributes["targets"][product] == target.to_attributes()
            assert found.attrs["units"] == {"O3TOT": "DU", "CLDO4": "1"}.get(product, "molecules/cm^2")
            origin = scene.products[product]
            assert origin["source"] == granules[i].name.replace("RAD_L1", f"{product}_L2")
            assert origin["sha256"] == hashlib.sha256((tmp_path / "l2" / origin["source"]).read_bytes()).hexdigest()
            assert origin["n_valid"] == np.isfinite(truth[i]).sum()
            assert found.attrs["invalid"]["undeclared_fill"] == truth[i].size - origin["n_valid"]


@pytest.mark.parametrize("scene", [0, 2])  # of training, of validation
def test_level_2_that_does_not_fit(tmp_path: Path, granules: list[Path], scene: int) -> None:
    """All of it before anything is written."""
    out, folder = tmp_path / "store", tmp_path / "l2"
    settings = {"split": SPLIT_OF_THREE, "l2": write_products(folder, granules, ("NO2",))}
    path = folder / granules[scene].name.replace("RAD_L1", "NO2_L2")
    newer = path.rename(path.with_name(path.name.replace("V03", "V04")))
    other = folder / granules[1].name.replace("RAD_L1", "NO2_L2")  # all are compared with the first one
    refused(ConfigError, out, granules, "V03", "V04", key="l2.NO2", path=newer if scene else other, **settings)
    if scene == 0:
        assert run_prepare(tmp_path / "mixed", granules, **settings, mixed_versions=True).scenes
    newer.unlink()
    write_level2(folder, granules[scene], "NO2", np.ones((NY, NX + 1)))
    refused(InputError, out, granules, str(path), f"{NY} x {NX + 1}", f"{NY} x {NX}", **settings)
    write_level2(folder, granules[scene], "NO2", np.ones((NY, NX)), units="mol/m^2")
    given = {"split": SPLIT_OF_THREE, "l2": {"NO2": {"folder": str(folder), "valid_range": [-1.0, 1e18]}}}
    refused(InputError, out, granules, "mol/m^2", key="l2.NO2", path=path if scene else other, **given)
    path.unlink()
    refused(InputError, out, granules, "NO2", granules[scene].name, **settings)


def test_level_2_of_a_scene_that_is_left_out_does_not_count(
    tmp_path: Path, granules: list[Path], write_granule: WriteGranule
) -> None:
    other = run_prepare(tmp_path / "other", granules, split=NO_VALIDATION)
    section = write_products(tmp_path / "l2", granules, ("O3TOT",))
    night = write_granule(granules[0], np.full((NY, NX, NC), np.nan))
    values = level2("O3TOT", 1).astype(np.float64)
    settings = {"split": SPLIT_OF_THREE, "l2": section, "validity": {"all_invalid": "leave_out"}}
    for statistics in (None, str(other.path)):
        normalization = {"statistics": statistics}
        store = run_prepare(tmp_path / f"{bool(statistics)}", granules, normalization=normalization, **settings)
        assert store.attributes["left_out"] == [night.stem]
        target = store.attributes["targets"]["O3TOT"]
        assert target["n"] == np.isfinite(values).sum()
        assert target["center"] == pytest.approx(np.nanmean(values), rel=1e-6)


# --- statistics of others -------------------------------------------------------------------------


def test_statistics_of_another_store(tmp_path: Path, granules: list[Path]) -> None:
    """Taken as they are, and nothing is read twice to get them."""
    first = run_prepare(tmp_path / "first", granules[:1], split=NO_VALIDATION, normalization={"clip": 5.0})
    section = write_products(tmp_path / "l2", granules, ("NO2",))
    settings = {"normalization": {"statistics": str(first.path)}, "l2": section, "split": NO_VALIDATION}
    with patch.object(Scene, "read", autospec=True, side_effect=Scene.read) as read:
        store = run_prepare(tmp_path / "store", granules[1:], **settings)
    assert [scene.path for (scene, rows, *_), _ in read.call_args_list if rows.start == 0] == granules[1:]
    logs = np.log(radiance(1).astype(np.float64)).reshape(-1, NC)
    for key in ("mean", "std", "minimum", "maximum"):
        np.testing.assert_array_equal(store.arrays[key], first.arrays[key])
    np.testing.assert_allclose(store.normalization.mean, logs.mean(axis=0), rtol=1e-10)
    for i, scene in enumerate(store.scenes):
        exact = (np.log(radiance(i + 2).astype(np.float64)) - logs.mean(axis=0)) / logs.std(axis=0)
        np.testing.assert_allclose(z_of(store, scene.id), np.clip(exact, -10, 10), rtol=2.0**-10, atol=1e-6)
    assert (store.arrays["count"] == 2 * NY * NX).all()
    assert (first.attributes["statistics_from"], store.attributes["statistics_from"]) == (None, f"store {first.hash}")
    nowhere = tmp_path / "nowhere"
    refused(InputError, tmp_path / "bad", granules, path=nowhere, normalization={"statistics": str(nowhere)})


def test_statistics_of_mltools(tmp_path: Path, granules: list[Path]) -> None:
    mean, std = np.linspace(24, 30, NC), np.linspace(0.5, 2, NC)
    for key, values in (("mean", mean), ("std", std)):
        torch.save(torch.from_numpy(values), tmp_path / f"{key}_spectrum.pt")
    statistics = {"statistics": str(tmp_path)}
    store = run_prepare(tmp_path / "store", granules, split=SPLIT_OF_THREE, normalization=statistics)
    np.testing.assert_array_equal(store.normalization.mean, mean)
    np.testing.assert_array_equal(store.normalization.std, std)
    assert (store.arrays["count"] == 2 * NY * NX).all()
    assert "mean_spectrum.pt" in store.attributes["statistics_from"]
    for file, values, words in (
        ("std", std * (np.arange(NC) != 2), ("channel 2",)),
        ("mean", mean[1:], ("5 channels", "6")),
    ):
        where = {"key": "normalization.statistics", "path": tmp_path / f"{file}_spectrum.pt"}
        torch.save(torch.from_numpy(values), where["path"])
        refused(ConfigError, tmp_path / "bad", granules, *words, **where, normalization=statistics)


@pytest.mark.parametrize(
    ("normalization", "other", "words"),
    [
        (REFLECTANCE, {}, ("transform", "zscore", "log_zscore")),
        ({"min_radiance": 2.0}, {}, ("min_radiance", "2.0", "1.0")),
        ({}, {"radiance": radiance(4)[..., 1:]}, ("channels", "5", "6")),
        ({}, {"band": "band_540_740_nm"}, ("band", "band_540_740_nm", "band_290_490_nm")),
        ({}, {"units": "W/m^2"}, ("units", "W/m^2", "photons/s/cm^2/nm/sr")),
        ({}, {"wavelength": wavelengths(300.3)}, ("0.300 nm", "0.200 nm")),
    ],
)
def test_statistics_that_do_not_belong(
    tmp_path: Path, write_granule: WriteGranule, normalization: dict[str, Any], other: dict[str, Any], words: Any
) -> None:
    paths = [write_granule(tmp_path / name(f"2024060{i}T180000"), radiance(i)) for i in (1, 2)]
    foreign = write_granule(tmp_path / "other.nc", **{"radiance": radiance(4), **other})
    theirs = run_prepare(tmp_path / "theirs", [foreign], split=NO_VALIDATION, normalization=normalization).path
    settings = {"normalization": {"statistics": str(theirs)}, "key": "normalization.statistics", "path": theirs}
    refused(ConfigError, tmp_path / "store", paths, *words, **settings)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"split": {"by": "day", "val_dates": ["2024-06-01"]}}, "split.by"),
        ({"split": {"val_dates": ["2024-06-31"]}}, "split.val_dates"),
        ({"split": {"val_dates": ["2024-06-03/2024-06-01"]}}, "split.val_dates"),
        ({"cluster": "somewhere"}, "cluster"),
        ({"n_workers": 2}, "n_workers"),
        ({"validity": {"valid_range": [2.0, 1.0]}}, "validity.valid_range"),
        ({"l2": {"NO2": {"folder": "x", "quality": 1}}}, "l2.NO2.quality"),
        ({"l2": {"NO2": {"dir": "x"}}}, "l2.NO2.folder"),
        ({"l2": {"SO2": {"folder": "x"}}}, "l2.SO2"),
    ],
)
def test_mistakes_in_the_config(tmp_path: Path, settings: dict[str, Any], key: str) -> None:
    config = tmp_path / "prepare.yaml"
    config.write_text(json.dumps({"output_dir": str(tmp_path / "store"), "inputs": ["x.nc"], **settings}))
    with refusals.refused(ConfigError, key=key, path=config):
        load_config(PrepareConfig, config)
