"""Invalid samples: each is NaN in the store and counted under its rule, and none is in a statistic or a tile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from preparing import (
    NC,
    NX,
    NY,
    SPLIT_OF_THREE,
    YXC,
    WriteGranule,
    add_errors,
    name,
    radiance,
    rearrange,
    refused,
    run_prepare,
    z_of,
)

from spectralvae.data import blocks as blocks_module
from spectralvae.data.validity import CONFIGURED_RULES
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


Planted = list[tuple[Path, np.ndarray, dict[str, int]]]


def plant(folder: Path, write_granule: WriteGranule, *, declared: bool = True) -> Planted:
    """Scans of three days with invalid samples of every kind, some of two kinds at once, and much flagged as warning.

    Returns:
        Of training scenes a and b and validation scene v, fifty times as bright: its file, (y, x, channel) values with
        NaN where invalid, and how many are by rule.
    """
    planted = []
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
        angle[3, 2:4] = np.nan, 80.0
        dark = np.broadcast_to((~(angle <= 80))[..., None], values.shape)
        readers = np.isin(rule, ["fill", "undeclared_fill", "default_fill", "nan", "infinite"])
        rule[bad & ~readers] = "flagged"
        rule[dark & ~bad & ~readers] = "solar_zenith"
        path, fill = folder / name(f"2024060{i + 1}T180000"), -1e30 if declared else None
        write_granule(path, values, flag=flag, fill=fill, geometry={"solar_zenith_angle": angle})
        counts = {key: int((rule == key).sum()) for key in (*RULES, *CONFIGURED_RULES, "no_statistics")}
        planted.append((path, np.where(rule == "", values, np.nan).astype(np.float64), counts))
    return planted


@pytest.mark.parametrize(
    ("declared", "dtype", "chunks", "order", "samples"),
    [
        (False, "float32", None, YXC, 1),
        (True, "float16", (1, NX, NC), YXC, 3 * NX * NC + 1),
        (True, "float16", (4, 3, 2), YXC[::-1], 3 * NX * NC + 1),
        (True, "float32", (2, NX, 4), ("xtrack", "spectral_channel", "mirror_step"), 1),
    ],
)
def test_planted_samples(
    tmp_path: Path,
    write_granule: WriteGranule,
    monkeypatch: pytest.MonkeyPatch,
    declared: bool,
    dtype: str,
    chunks: tuple[int, int, int] | None,
    order: tuple[str, ...],
    samples: int,
) -> None:
    """In any chunks, blocks and order of dimensions and of scenes."""
    planted = plant(tmp_path, write_granule, declared=declared)
    kinds = {key for _, _, counts in planted for key, n in counts.items() if n}
    assert kinds == {*RULES, *CONFIGURED_RULES} - {"undeclared_fill" if declared else "fill", "ambiguous"}
    for path, values, _ in planted:
        add_errors(path, 0.01 * np.nan_to_num(values, nan=1.0))
        if chunks:
            rearrange(path, chunks, order)
    monkeypatch.setattr(blocks_module, "BLOCK_SAMPLES", samples)
    paths = [path for path, _, _ in planted[::-1]]
    store = run_prepare(tmp_path / "store", paths, split=SPLIT_OF_THREE, dtype=dtype, validity=LIMITS)
    logs = np.log(np.concatenate([values.reshape(-1, NC) for _, values, _ in planted[:2]]))
    np.testing.assert_array_equal(store.arrays["count"], np.isfinite(logs).sum(axis=0))
    for key, truth in (("mean", np.nanmean), ("std", np.nanstd), ("minimum", np.nanmin), ("maximum", np.nanmax)):
        np.testing.assert_allclose(store.arrays[key], truth(logs, axis=0), rtol=1e-10, err_msg=key)
    np.testing.assert_allclose(store.arrays["noise"], 0.01, rtol=0.01)
    for i, (_, values, counts) in enumerate(planted[::-1]):
        scene = store.scenes[i]
        assert scene.invalid == counts
        z = z_of(store, scene.id)
        assert z.dtype == dtype
        exact = np.clip((np.log(values) - store.arrays["mean"]) / (store.arrays["std"] + 1e-8), -10, 10)
        invalid = np.isnan(exact)
        assert scene.n_invalid == sum(counts.values()) == invalid.sum()
        np.testing.assert_array_equal(np.isnan(z), invalid)
        np.testing.assert_array_equal(store.n_invalid(i), invalid.sum(axis=-1))
        # half of the spacing of the type, and what an error of 1e-10 in the statistics makes
        bound = np.abs(exact) * 2.0 ** (-11 if dtype == "float16" else -24) + 1e-7
        assert (np.abs(z.astype(np.float64) - exact) <= bound)[~invalid].all()


# --- the keys of validity -------------------------------------------------------------------------


@pytest.fixture
def scans(tmp_path: Path, write_granule: WriteGranule) -> list[Path]:
    """Clean, of two days."""
    return [write_granule(tmp_path / name(f"2024060{i}T180000"), radiance(i)) for i in (1, 2)]


def test_most_of_a_scene_out_of_range(tmp_path: Path, write_granule: WriteGranule) -> None:
    """What valid_range rejects does not tell against the logarithm."""
    values = radiance(1)
    values[:, :6] = 0.0
    values[0, 6:] = 2.0**67  # a limit itself is valid
    values[1, 6:] = 2.0**30
    path = write_granule(tmp_path / name("20240601T180000"), values)
    refused(ConfigError, tmp_path / "store", [path], key="normalization.transform")
    store = run_prepare(
        tmp_path / "store", [path], validity={"valid_range": [2.0**30, 2.0**67]}, split={"val_fraction": 0}
    )
    assert store.scenes[0].invalid["out_of_range"] == NY * 6 * NC


@pytest.mark.parametrize("bits", [None, [0, 4, 11], []])
def test_flag_bits(tmp_path: Path, write_granule: WriteGranule, bits: list[int] | None) -> None:
    rng = np.random.default_rng(0)
    flag = (1 << rng.integers(0, 12, (NY, NX, NC))).astype(np.uint16) * (rng.random((NY, NX, NC)) < 0.6)
    path = write_granule(tmp_path / name("20240601T180000"), radiance(1), flag=flag)
    store = run_prepare(tmp_path / "store", [path], validity={"flag_bits": bits}, split={"val_fraction": 0})
    mask = sum(1 << bit for bit in (REJECTED if bits is None else bits))
    np.testing.assert_array_equal(np.isnan(z_of(store, path.stem)), (flag & mask) != 0)


@pytest.fixture
def night(tmp_path: Path, write_granule: WriteGranule) -> Path:
    """A scan of a fourth day that is all fill."""
    return write_granule(tmp_path / name("20240604T060000"), np.full((NY, NX, NC), -1e30), fill=-1e30)


@pytest.mark.parametrize("split", ["train", "val"])
def test_scene_without_a_valid_sample(
    tmp_path: Path, scans: list[Path], night: Path, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused, or left out where that is asked for: then it changes nothing."""
    lists = {"train": ["*0601*"], "val": ["*0602*"]}
    without = run_prepare(tmp_path / "without", scans, split=lists)
    lists = lists | {split: [*lists[split], "*0604*"]}
    words = (night.stem, f"fill {NY * NX * NC}", "validity.all_invalid: leave_out")
    refused(InputError, tmp_path / "refused", [*scans, night], *words, made=True, path=night, split=lists)
    assert (tmp_path / "refused" / "scenes").exists() == (split == "val")  # of training, it is known before
    capsys.readouterr()
    store = run_prepare(tmp_path / "store", [night, *scans], split=lists, validity={"all_invalid": "leave_out"})
    assert [s.id for s in store.scenes] == [p.stem for p in scans]
    assert (without.attributes["left_out"], store.attributes["left_out"]) == ([], [night.stem])
    assert not (store.path / "scenes" / night.stem).exists()
    output = capsys.readouterr().out
    assert "WARNING" in output and night.stem in output
    for key, values in without.arrays.items():
        np.testing.assert_array_equal(store.arrays[key], values, err_msg=key)


def test_all_scenes_of_a_split_left_out(tmp_path: Path, scans: list[Path], night: Path) -> None:
    """A validation that was asked for does not vanish, and there must be something to train on."""
    other = run_prepare(tmp_path / "other", scans, split={"val_fraction": 0})
    foreign = {"normalization": {"statistics": str(other.path)}}
    dark, bright = ["*0604*"], ["*0601*"]
    for i, (train, val, key, more) in enumerate(
        ((dark, bright, "inputs", {}), (dark, bright, "split", foreign), (bright, dark, "split", {}))
    ):
        settings = {"split": {"train": train, "val": val}, "validity": {"all_invalid": "leave_out"}, "key": key, **more}
        refused(ConfigError, tmp_path / f"store{i}", [scans[0], night], made=True, **settings)


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
    store = run_prepare(tmp_path / "store", paths, split={"train": ["*060[123]*"], "val": ["*0604*"]})
    truth = np.nanmedian(np.concatenate(ratios[:2]).reshape(-1, NC), axis=0)
    np.testing.assert_allclose(store.arrays["noise"], truth, rtol=0.01)
    assert [("radiance_error" in s.absent) for s in store.scenes] == [False, True, False, False]
    # nor from a file that is only validated on
    store = run_prepare(tmp_path / "none", paths, split={"train": ["*0602*"], "val": ["*060[134]*"]})
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
    settings = {"dtype": dtype, "normalization": {"clip": clip, "min_radiance": 3e10}}
    store = run_prepare(tmp_path / "store", paths, split=SPLIT_OF_THREE, **settings)
    small = np.array(values) < 3e10
    np.testing.assert_array_equal([s.invalid["below_min_radiance"] for s in store.scenes], small.sum(axis=(1, 2, 3)))
    logs = np.log(np.where(small, np.nan, values)).reshape(-1, NC)
    exact = (logs - store.normalization.mean) / (store.normalization.std + 1e-8)
    z = np.concatenate([z_of(store, s.id) for s in store.scenes]).reshape(-1, NC).astype(np.float64)
    change = z - np.clip(exact, -clip, clip)
    np.testing.assert_array_equal(store.arrays["n_clipped"], (np.abs(exact) > clip).sum(axis=0))
    np.testing.assert_allclose(store.arrays["rounding_max"], np.nanmax(np.abs(change), axis=0), rtol=1e-6)
    np.testing.assert_allclose(store.arrays["rounding_rms"], np.sqrt(np.nanmean(change**2, axis=0)), rtol=1e-6)
    spacing = 2.0 ** (-10 if dtype == "float16" else -23)
    assert 0 < store.arrays["rounding_max"].max() <= spacing / 2
