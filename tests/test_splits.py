"""Splits: no pixel, and as a rule no day, is in training and in validation."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preparing import (
    NC,
    NX,
    NY,
    REFLECTANCE,
    WriteGranule,
    name,
    radiance,
    reflectance_file,
    refused,
    run_prepare,
    splits,
    z_of,
)

from spectralvae.data.store import Store
from spectralvae.errors import ConfigError, InputError


def check_no_pixel_twice(store: Store) -> None:
    """Count how often each pixel of each source is in a scene."""
    for source in {s.source for s in store.scenes}:
        scenes = [s for s in store.scenes if s.source == source]
        regions = [s.region or [0, s.shape[0], 0, s.shape[1]] for s in scenes]
        times = np.zeros((max(r[1] for r in regions), max(r[3] for r in regions)), int)
        for (y0, y1, x0, x1), scene in zip(regions, scenes, strict=True):
            assert [y1 - y0, x1 - x0] == scene.shape[:2]
            times[y0:y1, x0:x1] += 1
        assert times.max() == 1


@pytest.fixture
def granules(tmp_path: Path, write_granule: WriteGranule) -> list[Path]:
    """Clean scans of three days."""
    return [write_granule(tmp_path / name(f"2024060{i}T180000"), radiance(i)) for i in (1, 2, 3)]


@pytest.fixture
def scans(tmp_path: Path, write_granule: WriteGranule) -> list[Path]:
    """Three scans of one day."""
    return [write_granule(tmp_path / name(f"20240601T1{i}0000"), radiance(i)) for i in range(3)]


# --- days and scenes ------------------------------------------------------------------------------

# The local day of each scan: UTC - 6 h, so that an afternoon goes on past UTC's midnight.
DAYS = {
    "20240601T140000": 1,
    "20240601T233000": 1,
    "20240602T003000": 1,
    "20240602T055959": 1,
    "20240602T060000": 2,
    "20240603T010000": 2,
    "20240603T150000": 3,
    "20240604T020000": 3,
    "20240605T180000": 5,
}


@pytest.fixture
def week(tmp_path: Path, write_granule: WriteGranule) -> list[Path]:
    return [write_granule(tmp_path / name(stamp), radiance(i)) for i, stamp in enumerate(DAYS)]


def validation_days(store: Store, week: list[Path]) -> set[int]:
    """The days of the validation scenes; none of them may be a training scene's."""
    of = {split: {day for p, day in zip(week, DAYS.values(), strict=True) if splits(store)[p.stem] == split}
          for split in ("train", "val")}  # fmt: skip
    assert not of["train"] & of["val"]
    assert of["train"] | of["val"] == {1, 2, 3, 5}
    return of["val"]


@pytest.mark.parametrize("by", [None, "day"])
def test_days_are_not_divided(tmp_path: Path, week: list[Path], by: str | None) -> None:
    chosen = set()
    for seed in range(4):
        store = run_prepare(tmp_path / f"store{seed}", week, split={"by": by, "val_fraction": 0.25, "seed": seed})
        days = validation_days(store, week)
        assert len(days) == 1
        chosen |= days
        check_no_pixel_twice(store)
    assert len(chosen) > 1  # the seed chooses
    again = run_prepare(tmp_path / "again", week[::-1], split={"by": by, "val_fraction": 0.25, "seed": seed})
    assert splits(again) == splits(store)  # and not the order of the files


@pytest.mark.parametrize(
    ("dates", "days"),
    [
        (["2024-06-02"], {2}),
        (["2024-06-01", "2024-06-05"], {1, 5}),
        (["2024-06-02/2024-06-04"], {2, 3}),
        (["2024-06-03/2024-06-03", "2024-05-01/2024-06-01"], {1, 3}),
    ],
)
def test_dates(tmp_path: Path, week: list[Path], dates: list[str], days: set[int]) -> None:
    store = run_prepare(tmp_path / "store", week, split={"val_dates": dates})
    assert validation_days(store, week) == days


def test_dates_that_match_nothing(tmp_path: Path, week: list[Path]) -> None:
    for dates in (["2024-06-06"], ["2024-06-01", "2024-06-04"], ["2023-06-01/2023-06-30"]):
        words = ("split.val_dates", f"no scene is of {dates[-1]}", "2024-06-01 to 2024-06-05")
        refused(ConfigError, tmp_path / "store", week, *words, split={"val_dates": dates})
    everything = {"val_dates": ["2024-06-01/2024-06-30"]}
    refused(ConfigError, tmp_path / "store", week, "no scene is left for training", split=everything)


def test_by_scene(tmp_path: Path, write_granule: WriteGranule) -> None:
    paths = [write_granule(tmp_path / name(f"20240601T1{i}0000"), radiance(i)) for i in range(10)]
    store = run_prepare(tmp_path / "store", paths, split={"by": "scene", "val_fraction": 0.3})
    assert sorted(splits(store).values()) == ["train"] * 7 + ["val"] * 3
    check_no_pixel_twice(store)


def test_scans_of_one_day_are_split_with_a_warning(
    tmp_path: Path, scans: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    store = run_prepare(tmp_path / "store", scans)
    assert sorted(splits(store).values()) == ["train", "train", "val"]
    assert "WARNING: all scenes are of 2024-06-01" in capsys.readouterr().out


def test_days_asked_of_one_day_are_refused(
    tmp_path: Path, scans: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("one day (2024-06-01)", "by: region", "lists", "val_fraction: 0")
    refused(ConfigError, tmp_path / "store", scans, *words, split={"by": "day"})
    assert "WARNING" not in capsys.readouterr().out
    refused(ConfigError, tmp_path / "store", scans[:1], "one scene", "by: region", split={"by": "scene"})


def test_days_of_scenes_without_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scenes = [reflectance_file(tmp_path / f"{i}.mat", rng.uniform(0, 1, (6, 7, 5))) for i in range(2)]
    for split, key in (({"by": "day"}, "split.by"), ({"val_dates": ["2024-06-01"]}, "split.val_dates")):
        words = (key, "has no time", "0.mat")
        refused(ConfigError, tmp_path / "store", scenes, *words, normalization=REFLECTANCE, split=split)


# --- lists and fractions --------------------------------------------------------------------------


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


# --- regions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(10, 8), (6, 20)])
def test_lone_scene_is_cut_in_two(
    tmp_path: Path, write_granule: WriteGranule, capsys: pytest.CaptureFixture[str], shape: tuple[int, int]
) -> None:
    """Across its longer axis: 2 of 10 rows, or 4 of 20 columns."""
    values = radiance(0, (*shape, NC))
    path = write_granule(tmp_path / name("20240601T180000"), values)
    store = run_prepare(tmp_path / "store", [path])
    rows = shape[0] > shape[1]
    parts = ([0, 8, 0, 8], [8, 10, 0, 8]) if rows else ([0, 6, 0, 16], [0, 6, 16, 20])
    assert [s.region for s in store.scenes] == list(parts)
    assert [s.split for s in store.scenes] == ["train", "val"]
    check_no_pixel_twice(store)
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


def test_by_region_every_scene_is_cut(tmp_path: Path, granules: list[Path], write_granule: WriteGranule) -> None:
    wide = write_granule(tmp_path / name("20240604T180000"), radiance(4, (4, 15, NC)))
    store = run_prepare(tmp_path / "store", [*granules, wide], split={"by": "region", "val_fraction": 0.3})
    assert len(store.scenes) == 8
    for train, val in zip(store.scenes[::2], store.scenes[1::2], strict=True):
        assert (train.source, train.split, val.split) == (val.source, "train", "val")
        ny, nx = (4, 15) if train.source == wide.name else (NY, NX)
        cut = [0, ny, 11, nx] if train.source == wide.name else [7, 10, 0, nx]  # 4 of 15 columns, 3 of 10 rows
        assert val.region == cut
        assert np.prod(train.shape[:2]) + np.prod(val.shape[:2]) == ny * nx
    check_no_pixel_twice(store)
    logs = [np.log(radiance(i)[:7].astype(np.float64)).reshape(-1, NC) for i in (1, 2, 3)]
    logs.append(np.log(radiance(4, (4, 15, NC))[:, :11].astype(np.float64)).reshape(-1, NC))
    np.testing.assert_allclose(store.normalization.mean, np.concatenate(logs).mean(axis=0), rtol=1e-10)


def test_a_pixel_cannot_be_cut(tmp_path: Path, write_granule: WriteGranule) -> None:
    path = write_granule(tmp_path / name("20240601T180000"), radiance(0, (1, 1, NC)))
    refused(ConfigError, tmp_path / "store", [path], str(path), "a single pixel", split={"by": "region"})


@pytest.mark.parametrize(("n", "n_val"), [(2, 1), (5, 2), (9, 4)])
def test_stacks_are_cut_between_tiles(tmp_path: Path, n: int, n_val: int) -> None:
    """Also where they are wider than high: columns belong to the same places."""
    rng = np.random.default_rng(0)
    tiles = rng.normal(0, 1, (n, 4, 40, 3)).astype(np.float32)
    torch.save(torch.from_numpy(tiles), tmp_path / "00000.pt")
    mean, std = np.array([20.0, 25.0, 30.0]), np.array([0.5, 1.0, 2.0])
    torch.save(torch.from_numpy(mean), tmp_path / "mean_spectrum.pt")
    torch.save(torch.from_numpy(std), tmp_path / "std_spectrum.pt")
    scene = {"path": str(tmp_path / "00000.pt"), "wavelength": [300.0, 301.0, 302.0]}
    store = run_prepare(tmp_path / "store", [scene], split={"by": "region", "val_fraction": 0.45})
    train, val = store.scenes
    cut = 4 * (n - n_val)
    assert (train.region, val.region) == ([0, cut, 0, 40], [cut, 4 * n, 0, 40])
    assert train.stack == val.stack == 4
    logs = (tiles.astype(np.float64) * (std + 1e-8) + mean)[: n - n_val].reshape(-1, 3)
    np.testing.assert_allclose(store.normalization.mean, logs.mean(axis=0), rtol=1e-6)


def test_a_lone_tile_cannot_be_cut(tmp_path: Path) -> None:
    torch.save(torch.zeros(1, 4, 40, 3), tmp_path / "00000.pt")
    for key in ("mean", "std"):
        torch.save(torch.arange(1.0, 4.0), tmp_path / f"{key}_spectrum.pt")
    scene = {"path": str(tmp_path / "00000.pt"), "wavelength": [300.0, 301.0, 302.0]}
    refused(ConfigError, tmp_path / "store", [scene], "00000.pt", "a single tile")


def test_regions_of_one_file(tmp_path: Path, granules: list[Path]) -> None:
    def region(*bounds: int, path: Path = granules[0]) -> dict[str, Any]:
        return {"path": str(path), "region": list(bounds)}

    parts = [region(0, 5, 0, 8), region(5, 10, 0, 4), region(5, 10, 4, 8)]
    store = run_prepare(tmp_path / "good", parts, split={"by": "scene", "val_fraction": 0.3})
    assert [s.region for s in store.scenes] == [p["region"] for p in parts]
    assert sorted(splits(store).values()) == ["train", "train", "val"]
    check_no_pixel_twice(store)
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


@pytest.mark.parametrize("split", [{}, {"val_fraction": 0}, {"by": "scene"}, {"train": ["*"], "val": []}])
def test_copies_of_one_file_are_refused(tmp_path: Path, granules: list[Path], split: dict[str, Any]) -> None:
    """Under another name it would be trained on and judged with."""
    copy = tmp_path / name("20240607T180000")
    copy.write_bytes(granules[0].read_bytes())
    words = ("copies of one file", str(granules[0]), str(copy))
    refused(ConfigError, tmp_path / "store", [*granules, copy], *words, split=split)


def test_equal_size_is_no_copy(tmp_path: Path, granules: list[Path]) -> None:
    assert len({p.stat().st_size for p in granules}) == 1
    for a, b in combinations(granules, 2):
        assert a.read_bytes() != b.read_bytes()
    assert len(run_prepare(tmp_path / "store", granules).scenes) == 3


def test_globs(tmp_path: Path, granules: list[Path]) -> None:
    store = run_prepare(tmp_path / "store", [str(tmp_path / "TEMPO*.nc")])
    assert [s.id for s in store.scenes] == [p.stem for p in granules]
    refused(InputError, tmp_path / "none", [str(tmp_path / "MODIS*.nc")], "MODIS*.nc")
