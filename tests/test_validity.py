"""Invalid samples: each is NaN in the store and counted under its rule, and none is in a statistic or a tile."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preparing import (
    NC,
    NX,
    NY,
    REFLECTANCE,
    YXC,
    WriteGranule,
    add_errors,
    name,
    radiance,
    rearrange,
    refused,
    root_array,
    run_prepare,
    z_of,
)

from spectralvae.data import scenes as scenes_module
from spectralvae.data.loader import TileStream, make_sampler
from spectralvae.data.store import Store
from spectralvae.data.validity import CONFIGURED_RULES, Validity
from spectralvae.errors import ConfigError, InputError
from spectralvae.readers.base import RULES

REJECTED, WARNING = (0, 1, 2, 5), (3, 4, 6, 7, 11)  # bits of TEMPO's pixel_quality_flag
LOW, HIGH = 0.5, 1e16
LIMITS = {"valid_range": [LOW, HIGH], "max_solar_zenith": 80.0}

# What stands in the file for each kind, in the order of the rules.
KINDS: dict[str, list[float]] = {
    "fill": [-1e30],
    "default_fill": [9.969209968386869e36],
    "nan": [np.nan],
    "infinite": [np.inf, -np.inf],
    "out_of_range": [2e16, 0.0, -3.0, 0.49, 1e30],
    "below_min_radiance": [0.5, 0.7, 0.999],
}


class Planted:
    """Scans of three days with invalid samples of every kind, some of two kinds at once, and much flagged as warning.

    Attributes:
        paths: training scenes a and b, validation scene v, fifty times as bright.
        values: (y, x, channel) of each, NaN where invalid.
        counts: of each, by rule.
    """

    def __init__(self, folder: Path, write_granule: WriteGranule, *, declared: bool = True) -> None:
        self.paths, self.values, self.counts = [], [], []
        for i in range(3):
            rng = np.random.default_rng(20 + i)
            values = radiance(10 + i) * np.float32(50 if i == 2 else 1)
            rule = np.full(values.shape, "", object)
            kind = rng.choice(["", *KINDS], values.shape, p=[0.7] + [0.05] * 6)
            for key, numbers in KINDS.items():
                here = kind == key
                values[here] = rng.choice(np.array(numbers, np.float32), here.sum())
                rule[here] = key if key != "fill" or declared else "undeclared_fill"
            flag = np.where(rng.random(values.shape) < 0.5, sum(1 << bit for bit in WARNING), 0).astype(np.uint16)
            bad = rng.random(values.shape) < 0.1
            flag[bad] |= 1 << rng.choice(REJECTED, bad.sum()).astype(np.uint16)
            angle = rng.uniform(20, 79.9, (NY, NX))
            angle[rng.random((NY, NX)) < 0.1] = 80.1
            angle[3, 2] = np.nan
            angle[4, 5] = 80.0
            dark = np.broadcast_to((~(angle <= 80))[..., None], values.shape)
            readers = np.isin(rule, ["fill", "undeclared_fill", "default_fill", "nan", "infinite"])
            rule[bad & ~readers] = "flagged"
            rule[dark & ~bad & ~readers] = "solar_zenith"
            path = folder / name(f"2024060{i + 1}T180000")
            fill = -1e30 if declared else None
            write_granule(path, values, flag=flag, fill=fill, geometry={"solar_zenith_angle": angle})
            self.paths.append(path)
            self.values.append(np.where(rule == "", values, np.nan).astype(np.float64))
            self.counts.append({key: int((rule == key).sum()) for key in (*RULES, *CONFIGURED_RULES, "no_statistics")})

    def training_logs(self) -> np.ndarray:
        """(samples, channel) log radiance of a and b, NaN where invalid."""
        return np.log(np.concatenate([v.reshape(-1, NC) for v in self.values[:2]]))


SPLIT = {"train": ["*20240601*", "*20240602*"], "val": ["*20240603*"]}


def check_statistics(store: Store, logs: np.ndarray) -> None:
    np.testing.assert_array_equal(root_array(store, "count"), np.isfinite(logs).sum(axis=0))
    for key, truth in (("mean", np.nanmean), ("std", np.nanstd), ("minimum", np.nanmin), ("maximum", np.nanmax)):
        np.testing.assert_allclose(root_array(store, key), truth(logs, axis=0), rtol=1e-10, err_msg=key)


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_planted_samples(tmp_path: Path, write_granule: WriteGranule, declared: bool, dtype: str) -> None:
    planted = Planted(tmp_path, write_granule, declared=declared)
    planted_kinds = {key for counts in planted.counts for key, n in counts.items() if n}
    assert planted_kinds == {*RULES, *CONFIGURED_RULES} - {"undeclared_fill" if declared else "fill", "ambiguous"}
    store = run_prepare(tmp_path / "store", planted.paths, split=SPLIT, dtype=dtype, validity=LIMITS)
    logs = planted.training_logs()
    check_statistics(store, logs)
    mean, std = np.nanmean(logs, axis=0), np.nanstd(logs, axis=0)
    assert [s.split for s in store.scenes] == ["train", "train", "val"]
    for i, scene in enumerate(store.scenes):
        assert scene.invalid == planted.counts[i]
        z = z_of(store, scene.id)
        assert z.dtype == dtype
        exact = np.clip((np.log(planted.values[i]) - mean) / (std + 1e-8), -10, 10)
        invalid = np.isnan(exact)
        assert scene.n_invalid == sum(planted.counts[i].values()) == invalid.sum()
        np.testing.assert_array_equal(np.isnan(z), invalid)
        np.testing.assert_array_equal(store.n_invalid(i), invalid.sum(axis=-1))
        # half of the spacing of the type, and what an error of 1e-10 in the statistics makes
        bound = np.abs(exact) * 2.0 ** (-11 if dtype == "float16" else -24) + 1e-7
        assert (np.abs(z.astype(np.float64) - exact) <= bound)[~invalid].all()
    assert np.nanmax(z) > 5  # the validation scene is far from the mean, so it was not in the statistics


@pytest.mark.parametrize(
    ("chunks", "order"),
    [
        ((1, NX, NC), YXC),
        ((4, 3, NC), YXC),
        ((3, 5, 2), YXC),
        (None, YXC),
        ((4, 3, NC), YXC[::-1]),
        ((2, NX, 4), ("xtrack", "spectral_channel", "mirror_step")),
    ],
)
@pytest.mark.parametrize("samples", [1, 3 * NX * NC + 1])
def test_chunks_blocks_and_order_change_nothing(
    tmp_path: Path,
    write_granule: WriteGranule,
    monkeypatch: pytest.MonkeyPatch,
    chunks: tuple[int, int, int] | None,
    order: tuple[str, ...],
    samples: int,
) -> None:
    planted = Planted(tmp_path, write_granule)
    for path, values in zip(planted.paths, planted.values, strict=True):
        add_errors(path, 0.01 * np.nan_to_num(values, nan=1.0))
        rearrange(path, chunks, order)
    monkeypatch.setattr(scenes_module, "BLOCK_SAMPLES", samples)
    store = run_prepare(tmp_path / "store", planted.paths[::-1], split=SPLIT, validity=LIMITS)
    check_statistics(store, planted.training_logs())
    np.testing.assert_allclose(root_array(store, "noise"), 0.01, rtol=0.01)
    assert [s.invalid for s in store.scenes] == planted.counts[::-1]
    for scene, values in zip(store.scenes, planted.values[::-1], strict=True):
        np.testing.assert_array_equal(np.isnan(z_of(store, scene.id)), np.isnan(values))


def test_no_planted_sample_in_a_thousand_tiles(tmp_path: Path, write_granule: WriteGranule) -> None:
    """Through the loader: NaN just where a sample was planted, z of the clean value everywhere else."""
    shape, paths, clean = (24, 20, NC), [], []
    for i in range(2):
        rng = np.random.default_rng(i)
        values, flag = radiance(i, shape), np.zeros(shape, np.uint16)
        kind = rng.choice(5, shape, p=[0.95, 0.02, 0.01, 0.01, 0.01])
        clean.append(np.where(kind == 0, np.log(values.astype(np.float64)), np.nan))
        values[kind == 1], values[kind == 2], values[kind == 4] = -1e30, np.nan, 0.3
        flag[kind == 3] = 1
        paths.append(write_granule(tmp_path / name(f"2024060{i + 1}T180000"), values, flag=flag, fill=-1e30))
    store = run_prepare(tmp_path / "store", paths, split={"val_fraction": 0})
    logs = np.concatenate([c.reshape(-1, NC) for c in clean])
    truth = [(c - np.nanmean(logs, axis=0)) / np.nanstd(logs, axis=0) for c in clean]
    size, seen = 8, 0
    sampler = make_sampler(store, [0, 1], seed=3, tile_size=size, max_invalid_fraction=0.5)
    stream = TileStream(store, sampler, batch_size=50, tile_size=size, noise_shape=(1, 1, 1), num_workers=2)
    for batch in islice(stream, 20):
        for crop, tile in zip(batch.crops, batch.tiles.numpy(), strict=True):
            expected = truth[crop.scene][crop.y : crop.y + size, crop.x : crop.x + size]
            expected = np.rot90(np.flipud(expected) if crop.flip else expected, crop.turns)
            np.testing.assert_array_equal(np.isnan(tile), np.isnan(expected))
            np.testing.assert_allclose(tile, expected, rtol=2.0**-10, atol=1e-6)
            seen += 1
    assert seen == 1000
    assert np.isnan(truth[0]).mean() == pytest.approx(0.05, abs=0.01)


# --- the keys of validity -------------------------------------------------------------------------


@pytest.fixture
def scans(tmp_path: Path, write_granule: WriteGranule) -> list[Path]:
    """Clean, of two days."""
    return [write_granule(tmp_path / name(f"2024060{i}T180000"), radiance(i)) for i in (1, 2)]


def test_valid_range_includes_its_limits(tmp_path: Path, scans: list[Path]) -> None:
    values = np.stack([radiance(1), radiance(2)])
    low, high = (float(v) for v in np.quantile(values, [0.1, 0.9], method="nearest"))
    store = run_prepare(tmp_path / "store", scans, split={"val_fraction": 0}, validity={"valid_range": [low, high]})
    outside = (values < low) | (values > high)
    for i, scene in enumerate(store.scenes):
        np.testing.assert_array_equal(np.isnan(z_of(store, scene.id)), outside[i])
        assert scene.invalid["out_of_range"] == outside[i].sum() > 0
    assert (values == low).any() and (values == high).any()


def test_valid_range_of_reflectance(tmp_path: Path, scans: list[Path]) -> None:
    """Under zscore nothing is below min_radiance, and zeros are valid unless the range says otherwise."""
    rule = Validity("zscore", None, (0.0, 1.0), None)
    values = np.array([[[-0.1, 0.0, 0.5, 1.0, 1.1, np.nan]]], np.float32)
    assert rule.reject(values, None) == {"solar_zenith": 0, "out_of_range": 2, "below_min_radiance": 0}
    np.testing.assert_array_equal(values[0, 0], np.array([np.nan, 0.0, 0.5, 1.0, np.nan, np.nan], np.float32))


def test_most_of_a_scene_out_of_range(tmp_path: Path, write_granule: WriteGranule) -> None:
    """What valid_range rejects does not tell against the logarithm."""
    values = radiance(1)
    values[:, :6] = 0.0
    path = write_granule(tmp_path / name("20240601T180000"), values)
    refused(ConfigError, tmp_path / "store", [path], "log_zscore does not fit")
    store = run_prepare(tmp_path / "store", [path], validity={"valid_range": [1e9, 1e20]}, split={"val_fraction": 0})
    assert store.scenes[0].invalid["out_of_range"] == NY * 6 * NC


@pytest.mark.parametrize("bits", [None, [3], [0, 4, 11], []])
def test_flag_bits(tmp_path: Path, write_granule: WriteGranule, bits: list[int] | None) -> None:
    rng = np.random.default_rng(0)
    flag = (1 << rng.integers(0, 12, (NY, NX, NC))).astype(np.uint16) * (rng.random((NY, NX, NC)) < 0.6)
    path = write_granule(tmp_path / name("20240601T180000"), radiance(1), flag=flag)
    store = run_prepare(tmp_path / "store", [path], validity={"flag_bits": bits}, split={"val_fraction": 0})
    mask = sum(1 << bit for bit in (REJECTED if bits is None else bits))
    np.testing.assert_array_equal(np.isnan(z_of(store, path.stem)), (flag & mask) != 0)


def test_sun_without_an_angle(tmp_path: Path, scans: list[Path], write_granule: WriteGranule) -> None:
    """Refused before anything is written, also where only one scene lacks it."""
    with_angle = write_granule(
        tmp_path / name("20240603T180000"), radiance(3), geometry={"solar_zenith_angle": np.full((NY, NX), 30.0)}
    )
    words = ("validity.max_solar_zenith", str(scans[1]), "solar_zenith_angle")
    refused(ConfigError, tmp_path / "store", [with_angle, scans[1]], *words, validity={"max_solar_zenith": 70.0})


@pytest.fixture
def night(tmp_path: Path, write_granule: WriteGranule) -> Path:
    """A scan of a fourth day that is all fill."""
    values = np.full((NY, NX, NC), -1e30)
    return write_granule(tmp_path / name("20240604T060000"), values, fill=-1e30)


@pytest.mark.parametrize("split", ["train", "val"])
def test_scene_without_a_valid_sample_is_refused(tmp_path: Path, scans: list[Path], night: Path, split: str) -> None:
    lists = {"train": ["*0601*"], "val": ["*0602*"]}
    lists[split] = [*lists[split], "*0604*"]
    words = (str(night), f"scene {night.stem}", f"fill {NY * NX * NC}", "validity.all_invalid: leave_out")
    refused(InputError, tmp_path / "store", [*scans, night], *words, made=True, split=lists)
    assert (tmp_path / "store" / "scenes").exists() == (split == "val")  # of training, it is known before


@pytest.mark.parametrize("split", ["train", "val"])
def test_scene_without_a_valid_sample_is_left_out(
    tmp_path: Path, scans: list[Path], night: Path, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = {"train": ["*0601*"], "val": ["*0602*"]}
    without = run_prepare(tmp_path / "without", scans, split=lists)
    lists = lists | {split: [*lists[split], "*0604*"]}
    capsys.readouterr()
    store = run_prepare(tmp_path / "store", [night, *scans], split=lists, validity={"all_invalid": "leave_out"})
    assert [s.id for s in store.scenes] == [p.stem for p in scans]
    assert store.attributes["left_out"] == [night.stem]
    assert not (store.path / "scenes" / night.stem).exists()
    assert f"WARNING: left out, for they have no valid sample: {night.stem}" in capsys.readouterr().out
    for key in without.arrays:
        np.testing.assert_array_equal(store.arrays[key], without.arrays[key], err_msg=key)
    assert without.attributes["left_out"] == []


def test_all_training_scenes_left_out(tmp_path: Path, scans: list[Path], night: Path) -> None:
    settings: dict[str, Any] = {"split": {"train": ["*0604*"], "val": ["*0601*"]}}
    settings["validity"] = {"all_invalid": "leave_out"}
    refused(ConfigError, tmp_path / "store", [scans[0], night], "no valid sample", made=True, **settings)
    other = run_prepare(tmp_path / "other", scans, split={"val_fraction": 0})
    settings["normalization"] = {"statistics": str(other.path)}
    refused(ConfigError, tmp_path / "foreign", [scans[0], night], "no scene of the train split", made=True, **settings)


# --- noise, rounding, clipping ----------------------------------------------------------------------


def test_noise_is_the_median_of_relative_errors(tmp_path: Path, write_granule: WriteGranule) -> None:
    """Of valid training samples of files that have it."""
    shape, ratios, paths = (40, 30, NC), [], []
    for i in range(4):
        rng = np.random.default_rng(i)
        values = radiance(i, shape).astype(np.float64)
        ratio = rng.lognormal(0, 1, shape) * 10.0 ** np.linspace(-6, 0.5, NC) * (100 if i == 3 else 1)
        invalid = rng.random(shape) < 0.3
        errors = np.where(invalid, 1e3, 1) * ratio * values
        unknown = rng.random(shape) < 0.3
        errors[unknown] = rng.choice([np.nan, 0.0, -5.0, -1e30, 9.969209968386869e36], unknown.sum())
        path = write_granule(tmp_path / name(f"2024060{i + 1}T180000"), np.where(invalid, -1e30, values), fill=-1e30)
        if i != 1:  # this file does not have it
            add_errors(path, errors)
            ratios.append(np.where(invalid | unknown, np.nan, ratio))
        paths.append(path)
    lists = {"train": ["*0601*", "*0602*", "*0603*"], "val": ["*0604*"]}
    store = run_prepare(tmp_path / "store", paths, split=lists)
    truth = np.nanmedian(np.concatenate(ratios[:2]).reshape(-1, NC), axis=0)
    np.testing.assert_allclose(root_array(store, "noise"), truth, rtol=0.01)
    assert [("radiance_error" in s.absent) for s in store.scenes] == [False, True, False, False]


def test_no_noise_without_errors(tmp_path: Path, scans: list[Path]) -> None:
    """Nor from a file that is only validated on."""
    errors = radiance(2)
    add_errors(scans[1], errors)
    store = run_prepare(tmp_path / "store", scans, split={"train": ["*0601*"], "val": ["*0602*"]})
    assert "noise" not in store.arrays
    assert not (store.path / "noise").exists()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rounding_and_clipping(tmp_path: Path, write_granule: WriteGranule, dtype: str) -> None:
    clip, values, paths = 1.3, [], []
    for i in range(3):
        scene = radiance(i)
        scene[np.random.default_rng(i).random(scene.shape) < 0.1] = np.nan
        values.append(scene.astype(np.float64))
        paths.append(write_granule(tmp_path / name(f"2024060{i + 1}T180000"), scene))
    store = run_prepare(tmp_path / "store", paths, split=SPLIT, dtype=dtype, normalization={"clip": clip})
    mean, std = store.normalization.mean, store.normalization.std
    exact = (np.log(np.concatenate(values).reshape(-1, NC)) - mean) / (std + 1e-8)
    z = np.concatenate([z_of(store, s.id) for s in store.scenes]).reshape(-1, NC).astype(np.float64)
    change = z - np.clip(exact, -clip, clip)
    np.testing.assert_array_equal(root_array(store, "n_clipped"), (np.abs(exact) > clip).sum(axis=0))
    np.testing.assert_allclose(root_array(store, "rounding_max"), np.nanmax(np.abs(change), axis=0), rtol=1e-6)
    np.testing.assert_allclose(root_array(store, "rounding_rms"), np.sqrt(np.nanmean(change**2, axis=0)), rtol=1e-6)
    spacing = 2.0 ** (-10 if dtype == "float16" else -23)
    assert 0 < root_array(store, "rounding_max").max() <= spacing / 2


def test_radiance_may_be_z_scored(tmp_path: Path, scans: list[Path]) -> None:
    """The transform is judged by the values, not by the format."""
    store = run_prepare(tmp_path / "store", scans, normalization=REFLECTANCE, split={"val_fraction": 0})
    flat = np.stack([radiance(1), radiance(2)]).astype(np.float64).reshape(-1, NC)
    np.testing.assert_allclose(root_array(store, "mean"), flat.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(root_array(store, "std"), flat.std(axis=0), rtol=1e-10)
