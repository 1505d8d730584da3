"""Preparation: the store holds what numpy finds in the clean samples, splits do not leak, and a restart is exact."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import xarray as xr
import zarr

from spectralvae.config import PrepareConfig
from spectralvae.console import new_console
from spectralvae.data import prepare as prepare_module
from spectralvae.data.prepare import prepare
from spectralvae.data.store import Store
from spectralvae.errors import ConfigError, InputError, UserError
from spectralvae.readers import Scene
from spectralvae.rundir import RunDir, Stopped

NY, NX, NC = 10, 8, 6
REJECTED, WARNING = (0, 1, 2, 5), (3, 4, 6, 7, 11)  # bits of TEMPO's pixel_quality_flag
WriteGranule = Callable[..., Path]
REFLECTANCE = {"transform": "zscore"}


def run_prepare(out: Path, inputs: list[Any], *, overwrite: bool = False, **settings: Any) -> Store:
    inputs = [str(i) if isinstance(i, Path) else i for i in inputs]
    config = PrepareConfig.model_validate({"output_dir": str(out), "inputs": inputs, **settings})
    prepare(config, RunDir("prepare", config, overwrite=overwrite, resumable=True), new_console())
    return Store(out)


def refused(
    error: type[UserError], out: Path, inputs: list[Any], *words: str, made: bool = False, **settings: Any
) -> str:
    """Check that a preparation is refused in one line with all words, before (or after) its directory is made."""
    with pytest.raises(error) as caught:
        run_prepare(out, inputs, **settings)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} not in: {message}"
    assert out.exists() == made
    with pytest.raises(InputError):
        Store(out)
    return message


def name(stamp: str, number: int = 1) -> str:
    return f"TEMPO_RAD_L1_V03_{stamp}Z_S{number:03d}G01.nc"


def radiance(seed: int) -> np.ndarray:
    """(NY, NX, NC) float32, of the size of real radiance, every channel with a mean of its own."""
    rng = np.random.default_rng(seed)
    return (rng.lognormal(0, 0.5, (NY, NX, NC)) * 10.0 ** np.linspace(10.5, 13, NC)).astype(np.float32)


def z_of(store: Store, scene: str) -> np.ndarray:
    return zarr.open_array(store.path / "scenes" / scene / "z", mode="r")[:]


def splits(store: Store) -> dict[str, str]:
    return {s.id: s.split for s in store.scenes}


@pytest.fixture
def granules(tmp_path: Path, write_granule: WriteGranule) -> list[Path]:
    """Clean scans of three days."""
    return [write_granule(tmp_path / name(f"2024060{i}T180000"), radiance(i)) for i in (1, 2, 3)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows at a time."""
    monkeypatch.setattr(prepare_module, "BLOCK_BYTES", 3 * 4 * NX * NC)


# --- planted invalid samples ----------------------------------------------------------------------


class Planted:
    """Scenes with invalid samples of every kind in known places, and a warning flag on half of the good ones."""

    def __init__(self, folder: Path, write_granule: WriteGranule, *, declared: bool) -> None:
        self.paths, self.clean, self.invalid, self.counts = [], [], [], []
        for i in range(3):
            values, flag = radiance(10 + i), np.zeros((NY, NX, NC), np.uint16)
            if i == 2:
                values *= 50  # the validation scene must not matter to the statistics
            rng = np.random.default_rng(20 + i)
            sample = rng.permutation(values.size)
            sizes = {"fill": 40, "nan": 30 + i, "flagged": 25, "small": 11, "infinite": 3, "flagged_fill": 5}
            places = dict(zip(sizes, np.split(sample[: sum(sizes.values())], np.cumsum(list(sizes.values()))[:-1])))  # noqa: B905
            flat, flat_flag = values.reshape(-1), flag.reshape(-1)
            flat[places["fill"]] = flat[places["flagged_fill"]] = -1e30
            flat[places["nan"]] = np.nan
            flat[places["infinite"]] = np.inf
            flat[places["small"]] = np.resize([0.999, 0.0, -3.0, 1e-20, -1e29], 11)
            flat_flag[rng.permutation(values.size)[: values.size // 2]] = sum(1 << bit for bit in WARNING)
            for k in (*places["flagged"], *places["flagged_fill"]):
                flat_flag[k] |= 1 << int(rng.choice(REJECTED))
            invalid = np.zeros(values.size, bool)
            invalid[sample[: sum(sizes.values())]] = True
            seconds = 1.4e9 + 2.5 * np.arange(NY)
            path = folder / name(f"2024060{i + 1}T180000")
            geometry = {"latitude": np.full((NY, NX), 40.0 + i)}
            fill = -1e30 if declared else None
            write_granule(path, values, flag=flag, fill=fill, seconds=seconds, geometry=geometry)
            self.paths.append(path)
            self.clean.append(values)
            self.invalid.append(invalid.reshape(values.shape))
            self.counts.append(
                {
                    "fill": 45 if declared else 0,
                    "undeclared_fill": 0 if declared else 45,
                    "nan": 30 + i,
                    "infinite": 3,
                    "flagged": 25,
                    "below_min_radiance": 11,
                }
            )

    def training_logs(self) -> np.ndarray:
        """(samples, channel) float64 log radiance of the first two scenes, NaN where invalid."""
        values = np.stack(self.clean[:2]).astype(np.float64)
        invalid = np.stack(self.invalid[:2])
        values[invalid] = 1
        return np.where(invalid, np.nan, np.log(values)).reshape(-1, NC)


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_planted_samples(
    tmp_path: Path, write_granule: WriteGranule, small_blocks: None, declared: bool, dtype: str
) -> None:
    planted = Planted(tmp_path, write_granule, declared=declared)
    split = {"train": ["*20240601*", "*20240602*"], "val": [planted.paths[2].name]}
    store = run_prepare(tmp_path / "store", planted.paths, split=split, dtype=dtype)

    logs = planted.training_logs()
    mean, std = np.nanmean(logs, axis=0), np.nanstd(logs, axis=0)
    np.testing.assert_allclose(store.normalization.mean, mean, rtol=1e-10)
    np.testing.assert_allclose(store.normalization.std, std, rtol=1e-10)
    root = zarr.open_group(store.path, mode="r")
    np.testing.assert_array_equal(root["count"][:], np.isfinite(logs).sum(axis=0))
    np.testing.assert_allclose(root["minimum"][:], np.nanmin(logs, axis=0), rtol=1e-12)
    np.testing.assert_allclose(root["maximum"][:], np.nanmax(logs, axis=0), rtol=1e-12)

    assert [s.split for s in store.scenes] == ["train", "train", "val"]
    for i, scene in enumerate(store.scenes):
        assert scene.invalid == planted.counts[i]
        z = z_of(store, scene.id)
        assert z.dtype == dtype
        np.testing.assert_array_equal(np.isnan(z), planted.invalid[i])
        np.testing.assert_array_equal(store.n_invalid(i), planted.invalid[i].sum(axis=-1))
        good = ~planted.invalid[i]
        values = np.where(good, planted.clean[i], 1).astype(np.float64)
        exact = np.clip((np.log(values) - mean) / (std + 1e-8), -10, 10)[good]
        # half of the spacing of the type, and what an error of 1e-10 in the statistics makes
        bound = np.abs(exact) * 2.0 ** (-11 if dtype == "float16" else -24) + 1e-7
        assert (np.abs(z[good].astype(np.float64) - exact) <= bound).all()
    assert np.nanmax(np.abs(z)) > 5  # the validation scene is far from the mean, so it was not in the statistics
    assert splits(store) == dict(zip([p.stem for p in planted.paths], ["train", "train", "val"], strict=True))


def test_what_stands_beside_z(tmp_path: Path, write_granule: WriteGranule) -> None:
    planted = Planted(tmp_path, write_granule, declared=True)
    store = run_prepare(tmp_path / "store", planted.paths, split={"val_fraction": 0.3})
    for i, (scene, path) in enumerate(zip(store.scenes, planted.paths, strict=True)):
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
    }
    np.testing.assert_allclose(store.normalization.wavelength, 300 + 0.2 * np.arange(NC), rtol=1e-6)
    assert not (store.path / ".partial").exists()
    record = json.loads((store.path / "run.json").read_text())
    assert (record["state"], record["store_hash"]) == ("finished", store.hash)


@pytest.mark.parametrize("rows", [1, 3, 4, 100])
def test_size_of_the_blocks_changes_nothing(
    tmp_path: Path, granules: list[Path], monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    whole = run_prepare(tmp_path / "whole", granules)
    monkeypatch.setattr(prepare_module, "BLOCK_BYTES", rows * 4 * NX * NC)
    blocks = run_prepare(tmp_path / "blocks", granules)
    np.testing.assert_allclose(blocks.normalization.mean, whole.normalization.mean, rtol=1e-13)
    np.testing.assert_allclose(blocks.normalization.std, whole.normalization.std, rtol=1e-12)
    for scene in whole.scenes:
        np.testing.assert_allclose(z_of(blocks, scene.id), z_of(whole, scene.id), rtol=2.0**-10)


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


# --- splits ---------------------------------------------------------------------------------------


def test_days_are_not_divided(tmp_path: Path, write_granule: WriteGranule) -> None:
    """A day of scans, in UTC - 6 h, goes on past UTC's midnight: 23:30 and 00:30 UTC see the same afternoon."""
    stamps = ("20240601T140000", "20240601T233000", "20240602T003000", "20240602T055959", "20240602T060000")
    days = dict(zip(stamps, (1, 1, 1, 1, 2), strict=True))
    days |= {"20240603T010000": 2, "20240603T150000": 3, "20240604T020000": 3, "20240605T180000": 5}
    paths = [write_granule(tmp_path / name(s), radiance(i)) for i, s in enumerate(days)]
    chosen = set()
    for seed in range(8):
        store = run_prepare(tmp_path / f"store{seed}", paths, split={"val_fraction": 0.25, "seed": seed})
        val = {day for p, day in zip(paths, days.values(), strict=True) if splits(store)[p.stem] == "val"}
        train = {day for p, day in zip(paths, days.values(), strict=True) if splits(store)[p.stem] == "train"}
        assert not val & train
        assert val | train == {1, 2, 3, 5}
        assert len(val) == 1
        chosen |= val
    assert len(chosen) > 1  # the seed chooses
    again = run_prepare(tmp_path / "again", paths[::-1], split={"val_fraction": 0.25, "seed": 7})
    assert splits(again) == splits(store)  # and not the order of the files


def test_by_scene(tmp_path: Path, write_granule: WriteGranule) -> None:
    paths = [write_granule(tmp_path / name(f"20240601T1{i}0000"), radiance(i)) for i in range(10)]
    store = run_prepare(tmp_path / "store", paths, split={"by": "scene", "val_fraction": 0.3})
    assert sorted(splits(store).values()) == ["train"] * 7 + ["val"] * 3


def test_scans_of_one_day_are_split_with_a_warning(
    tmp_path: Path, write_granule: WriteGranule, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [write_granule(tmp_path / name(f"20240601T1{i}0000"), radiance(i)) for i in range(3)]
    store = run_prepare(tmp_path / "store", paths)
    assert sorted(splits(store).values()) == ["train", "train", "val"]
    assert "WARNING: all scenes are of 2024-06-01" in capsys.readouterr().out


def test_no_validation(tmp_path: Path, granules: list[Path]) -> None:
    store = run_prepare(tmp_path / "store", granules, split={"val_fraction": 0})
    assert set(splits(store).values()) == {"train"}
    assert store.indices("val") == []
    lone = run_prepare(tmp_path / "lone", granules[:1], split={"val_fraction": 0})
    assert lone.scenes[0].shape == [NY, NX, NC]


def test_explicit_lists(tmp_path: Path, granules: list[Path]) -> None:
    """By id, by file name, or by glob; whatever is not named exactly once is refused."""
    out = tmp_path / "store"
    a, b, c = (p.stem for p in granules)
    store = run_prepare(tmp_path / "good", granules, split={"train": [a, granules[1].name], "val": ["*20240603*"]})
    assert splits(store) == {a: "train", b: "train", c: "val"}
    no_val = run_prepare(tmp_path / "no_val", granules, split={"train": ["*"], "val": []})
    assert set(splits(no_val).values()) == {"train"}
    refused(ConfigError, out, granules, c, "neither in train nor in val", split={"train": [a], "val": [b]})
    refused(ConfigError, out, granules, b, "in train and in val", split={"train": ["*"], "val": [b]})
    refused(ConfigError, out, granules, "no scene is left for training", split={"train": [], "val": ["*"]})


def test_name_that_matches_nothing(tmp_path: Path, granules: list[Path]) -> None:
    """A mistyped validation list beside `train: ["*"]` would leave no validation, without a word."""
    for lists in ({"train": ["*"], "val": ["*20240609*"]}, {"train": ["*2024*", "x.nc"], "val": []}):
        wrong = (lists["val"] or lists["train"])[-1]
        refused(ConfigError, tmp_path / "store", granules, repr(wrong), "no scene matches", split=lists)


@pytest.mark.parametrize("shape", [(10, 8), (6, 20)])
def test_lone_scene_is_cut_in_two(
    tmp_path: Path, write_granule: WriteGranule, capsys: pytest.CaptureFixture[str], shape: tuple[int, int]
) -> None:
    """Across its longer axis: 2 of 10 rows, or 4 of 20 columns."""
    rng = np.random.default_rng(0)
    values = rng.lognormal(25, 0.5, (*shape, NC)).astype(np.float32)
    path = write_granule(tmp_path / name("20240601T180000"), values)
    store = run_prepare(tmp_path / "store", [path])
    rows = shape[0] > shape[1]
    parts = ([0, 8, 0, 8], [8, 10, 0, 8]) if rows else ([0, 6, 0, 16], [0, 6, 16, 20])
    assert [s.region for s in store.scenes] == list(parts)
    assert [s.split for s in store.scenes] == ["train", "val"]
    y0, y1, x0, x1 = parts[0]
    logs = np.log(values[y0:y1, x0:x1].astype(np.float64)).reshape(-1, NC)
    np.testing.assert_allclose(store.normalization.mean, logs.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(store.normalization.std, logs.std(axis=0), rtol=1e-10)
    for scene, (y0, y1, x0, x1) in zip(store.scenes, parts, strict=True):
        z = (np.log(values[y0:y1, x0:x1].astype(np.float64)) - logs.mean(axis=0)) / logs.std(axis=0)
        np.testing.assert_allclose(z_of(store, scene.id), z, rtol=2.0**-10, atol=1e-6)
    assert f"its last {'2 rows' if rows else '4 columns'} are kept" in capsys.readouterr().out


def test_lone_region_is_cut_within_itself(tmp_path: Path, granules: list[Path]) -> None:
    store = run_prepare(tmp_path / "store", [{"path": str(granules[0]), "region": [2, 9, 1, 5]}])
    assert [s.region for s in store.scenes] == [[2, 8, 1, 5], [8, 9, 1, 5]]


def test_regions_of_one_file(tmp_path: Path, granules: list[Path]) -> None:
    def region(*bounds: int, path: Path = granules[0]) -> dict[str, Any]:
        return {"path": str(path), "region": list(bounds)}

    parts = [region(0, 5, 0, 8), region(5, 10, 0, 4), region(5, 10, 4, 8)]
    store = run_prepare(tmp_path / "good", parts, split={"by": "scene", "val_fraction": 0.3})
    assert [s.region for s in store.scenes] == [p["region"] for p in parts]
    assert sorted(splits(store).values()) == ["train", "train", "val"]
    out = tmp_path / "store"
    path = str(granules[0])
    refused(ConfigError, out, [region(0, 6, 0, 8), region(5, 10, 0, 8)], path, "share pixels")
    refused(ConfigError, out, [region(0, 6, 0, 8), path], path, "share pixels")
    refused(ConfigError, out, [region(0, 5, 0, 8)] * 2, path)
    link = tmp_path / name("20240601T190000", 9)
    link.symlink_to(granules[0])
    refused(ConfigError, out, [granules[0], link], "share pixels")
    refused(ConfigError, out, [region(0, 6, 0, 8), region(5, 10, 0, 8, path=link)], "share pixels")


def test_same_file_twice(tmp_path: Path, granules: list[Path]) -> None:
    out = tmp_path / "store"
    refused(ConfigError, out, [granules[0], granules[0]], str(granules[0]))
    refused(ConfigError, out, [str(tmp_path / "*.nc"), granules[1]], str(granules[1]))
    other = tmp_path / "other" / granules[0].name  # another file that would be a scene of the same name
    other.parent.mkdir()
    other.write_bytes(granules[1].read_bytes())
    refused(ConfigError, out, [granules[0], other], str(granules[0]), str(other))


def test_globs(tmp_path: Path, granules: list[Path]) -> None:
    store = run_prepare(tmp_path / "store", [str(tmp_path / "TEMPO*.nc")])
    assert [s.id for s in store.scenes] == [p.stem for p in granules]
    refused(InputError, tmp_path / "none", [str(tmp_path / "MODIS*.nc")], "MODIS*.nc")


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


def reflectance_file(path: Path, values: np.ndarray) -> dict[str, Any]:
    scipy.io.savemat(path, {"scene": values})
    return {"path": str(path), "wavelength": {"first": 400, "last": 900}}


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


def test_days_of_scenes_without_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scenes = [reflectance_file(tmp_path / f"{i}.mat", rng.uniform(0, 1, (6, 7, 5))) for i in range(2)]
    words = ("split.by", "has no time", "0.mat")
    refused(ConfigError, tmp_path / "store", scenes, *words, normalization=REFLECTANCE, split={"by": "day"})


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
    refused(ConfigError, tmp_path / "store", [path], "no valid sample", made=True)


# --- interruption ---------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def at_scene_2(monkeypatch: pytest.MonkeyPatch, granules: list[Path]) -> None:
    """Before the second scene is written."""
    write_scene = prepare_module.write_scene

    def write(root: Path, p: Any, *rest: Any) -> Any:
        if p.scene.path == granules[1]:
            raise Interrupted
        return write_scene(root, p, *rest)

    monkeypatch.setattr(prepare_module, "write_scene", write)


def in_the_middle_of_scene_2(monkeypatch: pytest.MonkeyPatch, granules: list[Path], second_pass: bool = True) -> None:
    """While rows of the second scene are read: in the pass that writes, or in that of the statistics."""
    read = Scene.read
    calls = iter(range(1000))

    def interrupted_read(self: Scene, rows: slice) -> Any:
        if self.path == granules[1] and rows.start == 6 and (next(calls) == 1 if second_pass else True):
            raise Interrupted
        return read(self, rows)

    monkeypatch.setattr(Scene, "read", interrupted_read)


def in_the_statistics(monkeypatch: pytest.MonkeyPatch, granules: list[Path]) -> None:
    in_the_middle_of_scene_2(monkeypatch, granules, second_pass=False)


def before_the_marker(monkeypatch: pytest.MonkeyPatch, granules: list[Path]) -> None:
    """All scenes are written, the store is not."""

    def finish_store(*_: Any) -> str:
        raise Interrupted

    monkeypatch.setattr(prepare_module.store, "finish_store", finish_store)


def content(store: Path) -> Iterator[tuple[str, bytes]]:
    """Every file but the record of the run, whose times differ."""
    for path in sorted(store.rglob("*")):
        if path.is_file() and path.name not in ("run.json", "config.yaml", ".lock"):
            yield str(path.relative_to(store)), path.read_bytes()


SPLIT_OF_THREE = {"train": ["*0601*", "*0602*"], "val": ["*0603*"]}


@pytest.mark.parametrize("where", [in_the_statistics, at_scene_2, in_the_middle_of_scene_2, before_the_marker])
def test_interrupted_and_started_again(
    tmp_path: Path,
    granules: list[Path],
    small_blocks: None,
    monkeypatch: pytest.MonkeyPatch,
    where: Callable[[pytest.MonkeyPatch, list[Path]], None],
) -> None:
    whole = run_prepare(tmp_path / "whole", granules, split=SPLIT_OF_THREE)
    out = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        where(patch, granules)
        with pytest.raises(Interrupted):
            run_prepare(out, granules, split=SPLIT_OF_THREE)
    with pytest.raises(InputError, match="not finished"):
        Store(out)
    first_scene = out / "scenes" / granules[0].stem / "z" / "c" / "0" / "0" / "0"
    written = first_scene.stat().st_mtime_ns if where is not in_the_statistics else None

    again = run_prepare(out, granules, split=SPLIT_OF_THREE)
    assert again.hash == whole.hash
    assert dict(content(out)) == dict(content(whole.path))
    assert written in (None, first_scene.stat().st_mtime_ns)  # what was done was not done again


def test_statistics_are_not_read_twice(
    tmp_path: Path, granules: list[Path], small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "store"
    with monkeypatch.context() as patch:
        at_scene_2(patch, granules)
        with pytest.raises(Interrupted):
            run_prepare(out, granules, split=SPLIT_OF_THREE)
    read = Scene.read
    passes: list[str] = []
    monkeypatch.setattr(
        Scene, "read", lambda self, rows: (rows.start == 0 and passes.append(self.path.name)) or read(self, rows)
    )
    run_prepare(out, granules, split=SPLIT_OF_THREE)
    assert passes == [granules[1].name, granules[2].name]


@pytest.mark.parametrize("change", ["new", "gone", "changed"])
def test_other_files_after_an_interruption_are_refused(
    tmp_path: Path, granules: list[Path], write_granule: WriteGranule, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Statistics and scenes that were made already belong to the old files."""
    out = tmp_path / "store"
    pattern = str(tmp_path / "*.nc")
    with monkeypatch.context() as patch:
        at_scene_2(patch, granules)
        with pytest.raises(Interrupted):
            run_prepare(out, [pattern])
    if change == "new":
        write_granule(tmp_path / name("20240605T180000"), radiance(5))
    elif change == "gone":
        granules[2].unlink()
    else:
        write_granule(granules[0], radiance(8))
        os.utime(granules[0], ns=(1, 1))
    refused(ConfigError, out, [pattern], change, "--overwrite", made=True)
    store = run_prepare(out, [pattern], overwrite=True)
    fresh = run_prepare(tmp_path / "fresh", [pattern])
    assert store.hash == fresh.hash


def test_interrupted_after_the_marker(
    tmp_path: Path, granules: list[Path], write_granule: WriteGranule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is whole but not known as finished: the same inputs finish it, others are not mixed in."""
    out = tmp_path / "store"
    pattern = str(tmp_path / "*.nc")
    note = RunDir.note

    def interrupted_note(self: RunDir, **facts: Any) -> None:
        if "store_hash" in facts:
            raise Interrupted
        note(self, **facts)

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "note", interrupted_note)
        with pytest.raises(Interrupted):
            run_prepare(out, [pattern])
    added = tmp_path / name("20240605T180000")
    write_granule(added, radiance(5))
    with pytest.raises(ConfigError, match="is new since the preparation"):
        run_prepare(out, [pattern])
    added.unlink()
    written = (out / "scenes").stat().st_ino
    assert run_prepare(out, [pattern]).hash == run_prepare(tmp_path / "fresh", [pattern]).hash
    assert (out / "scenes").stat().st_ino == written
    assert not (out / ".partial").exists()


def test_scratch_without_its_plan_is_not_trusted(tmp_path: Path, granules: list[Path]) -> None:
    """A kill while it was deleted leaves statistics that may be of other files."""
    truth = run_prepare(tmp_path / "fresh", granules)
    out = tmp_path / "store"
    config = PrepareConfig.model_validate({"output_dir": str(out), "inputs": [str(g) for g in granules]})
    with RunDir("prepare", config, overwrite=False, resumable=True) as run:
        (out / ".partial").mkdir()
        for scene in truth.scenes:
            (out / ".partial" / f"{scene.id}.npz").write_bytes(b"stale")
    run.note(state="failed")
    assert run_prepare(out, granules).hash == truth.hash


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_stopped_by_a_signal_it_goes_on(
    tmp_path: Path, granules: list[Path], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    out = tmp_path / "store"
    read = Scene.read
    handler = signal.getsignal(number)

    def signalled_read(self: Scene, rows: slice) -> Any:
        if self.path == granules[1]:
            signal.raise_signal(number)
        return read(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Scene, "read", signalled_read)
        with pytest.raises(Stopped) as stopped:
            run_prepare(out, granules)
    assert stopped.value.exit_code == 75
    assert json.loads((out / "run.json").read_text())["state"] == "stopped"
    assert signal.getsignal(number) == handler
    assert run_prepare(out, granules).hash == run_prepare(tmp_path / "fresh", granules).hash


def test_copies_of_one_file_are_refused(tmp_path: Path, granules: list[Path]) -> None:
    """Under another name it would be trained on and judged with."""
    copy = tmp_path / name("20240607T180000")
    copy.write_bytes(granules[0].read_bytes())
    refused(ConfigError, tmp_path / "store", [*granules, copy], "copies of one file", made=True)


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
    odd = granules[0].with_name("TEMPO_RAD[1].nc")
    granules[0].rename(odd)
    assert len(run_prepare(tmp_path / "store", [odd, *granules[1:]], split={"by": "scene"}).scenes) == 3


def test_same_config_same_store(tmp_path: Path, granules: list[Path]) -> None:
    one, two = (run_prepare(tmp_path / f"store{i}", granules) for i in range(2))
    assert one.hash == two.hash
    assert dict(content(one.path)) == dict(content(two.path))


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
