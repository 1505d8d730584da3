"""Splits: no pixel, and as a rule no day, is in training and in validation."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import refusals
import spectral
from preparing import NC, NX, NY, WriteGranule, name, radiance, refused, run_prepare, z_of

from spectralvae.config import SplitConfig
from spectralvae.data.splits import PlannedScene, split_scenes
from spectralvae.errors import ConfigError
from spectralvae.runtime.console import new_console


def scene(stamp: str, **more: Any) -> Any:
    """A scene named after the time at which it begins, without a file."""
    time = datetime.strptime(stamp, "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
    parts = {"format": "tempo", "shape": (10, 8, 6), "region": None, "stack": None, "time": time, **more}
    return SimpleNamespace(name=stamp, path=Path(f"{stamp}.nc"), **parts)


def crop(p: PlannedScene, region: tuple[int, int, int, int]) -> PlannedScene:
    y0, y1, x0, x1 = region
    part = SimpleNamespace(**{**vars(p.scene), "region": region, "shape": (y1 - y0, x1 - x0, 6)})
    return PlannedScene(part, p.spec)


def planned(scenes: Sequence[Any], **settings: Any) -> list[PlannedScene]:
    split = SplitConfig.model_validate(settings)
    return split_scenes([PlannedScene(s, None) for s in scenes], split, crop, new_console())


def split_of(scenes: Sequence[Any], **settings: Any) -> dict[str, str]:
    return {p.id: p.split for p in planned(scenes, **settings)}


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
WEEK = [scene(stamp) for stamp in DAYS]
ONE_DAY = WEEK[:4]


def validation_days(**settings: Any) -> set[int]:
    """The days of the validation scenes; none of them may be a training scene's."""
    found = split_of(WEEK, **settings)
    assert found == split_of(WEEK[::-1], **settings)  # the order of the files does not matter
    train, val = ({day for stamp, day in DAYS.items() if found[stamp] == side} for side in ("train", "val"))
    assert not train & val
    assert train | val == {1, 2, 3, 5}
    return val


@pytest.mark.parametrize("by", [None, "day"])
@pytest.mark.parametrize(("fraction", "n_days"), [(0.01, 1), (0.25, 1), (0.5, 2), (0.99, 3)])
def test_days_are_not_divided(by: str | None, fraction: float, n_days: int) -> None:
    chosen = [validation_days(by=by, val_fraction=fraction, seed=seed) for seed in range(8)]
    assert {len(days) for days in chosen} == {n_days}
    assert len({tuple(days) for days in chosen}) > 1  # the seed chooses


def test_dates() -> None:
    assert validation_days(val_dates=["2024-06-02/2024-06-04"]) == {2, 3}
    assert validation_days(val_dates=["2024-06-03/2024-06-03", "2024-05-01/2024-06-01", "2024-06-05"]) == {1, 3, 5}


def test_by_scene_and_none() -> None:
    found = split_of([scene(f"20240601T1{i}0000") for i in range(10)], by="scene", val_fraction=0.3)
    assert sorted(found.values()) == ["train"] * 7 + ["val"] * 3
    (lone,) = planned(WEEK[:1], val_fraction=0)
    assert (lone.split, lone.scene.region) == ("train", None)


def test_scans_of_one_day_are_split_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    """But not where days were asked for."""
    assert sorted(split_of(ONE_DAY).values()) == ["train"] * 3 + ["val"]
    warning = capsys.readouterr().out
    assert "WARNING" in warning and "2024-06-01" in warning
    with refusals.refused(ConfigError, "2024-06-01", key="split.by", value="day"):
        split_of(ONE_DAY, by="day")
    assert capsys.readouterr().out == ""


TIMELESS = scene("20240601T140000", time=None)


@pytest.mark.parametrize(
    ("scenes", "settings", "parts"),
    [
        (WEEK, {"val_dates": ["2024-06-06"]}, {"key": "split.val_dates", "value": "2024-06-06"}),
        (WEEK, {"val_dates": ["2024-06-01", "2024-06-04"]}, {"key": "split.val_dates", "value": "2024-06-04"}),
        (WEEK, {"val_dates": ["2024-06-01/2024-06-30"]}, {"key": "split"}),  # nothing to train on
        (WEEK, {"train": [], "val": ["*"]}, {"key": "split"}),
        (WEEK[:1], {"by": "scene"}, {"key": "split.by", "value": "scene"}),
        ([*WEEK, TIMELESS], {"by": "day"}, {"key": "split.by", "path": TIMELESS.path}),
        ([*WEEK, TIMELESS], {"val_dates": ["2024-06-01"]}, {"key": "split.val_dates", "path": TIMELESS.path}),
        ([scene("20240601T140000", shape=(1, 1, 6))], {}, {"key": "split", "path": TIMELESS.path}),
        ([scene("20240601T140000", shape=(4, 40, 6), stack=4)], {}, {"key": "split", "path": TIMELESS.path}),
        # a mistyped validation list beside `train: ["*"]` would leave no validation, without a word
        (WEEK, {"train": ["*"], "val": ["*0609*"]}, {"key": "split.val", "value": "*0609*"}),
        (WEEK, {"train": ["*2024*", "x.nc"], "val": []}, {"key": "split.train", "value": "x.nc"}),
    ],
)
def test_impossible_splits(scenes: list[Any], settings: dict[str, Any], parts: dict[str, Any]) -> None:
    with refusals.refused(ConfigError, **parts):
        split_of(scenes, **settings)


def test_explicit_lists() -> None:
    """By id, by file name, or by glob; whatever is not named exactly once is refused."""
    a, b, c = (s.name for s in WEEK[:3])
    assert split_of(WEEK[:3], train=[a, f"{b}.nc"], val=["*02T*"]) == {a: "train", b: "train", c: "val"}
    assert set(split_of(WEEK, train=["*"], val=[]).values()) == {"train"}
    for train, wrong, word in (([a], c, "neither"), (["*"], b, "both")):
        with refusals.refused(ConfigError, wrong, word, key="split"):
            split_of(WEEK[:3], train=train, val=[b])


# --- regions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "settings", "train", "val"),
    [
        ({"shape": (10, 8, 6)}, {}, (0, 8, 0, 8), (8, 10, 0, 8)),
        ({"shape": (6, 20, 6)}, {}, (0, 6, 0, 16), (0, 6, 16, 20)),  # across the longer axis
        ({"shape": (7, 4, 6), "region": (2, 9, 1, 5)}, {}, (2, 8, 1, 5), (8, 9, 1, 5)),
        # between the tiles of a stack, also where it is wider than high: columns belong to the same places
        ({"shape": (20, 40, 3), "stack": 4}, {"val_fraction": 0.45}, (0, 12, 0, 40), (12, 20, 0, 40)),
    ],
)
def test_where_a_lone_scene_is_cut(
    parts: dict[str, Any], settings: dict[str, Any], train: tuple[int, ...], val: tuple[int, ...]
) -> None:
    found = planned([scene("20240601T140000", **parts)], **settings)
    assert [(p.scene.region, p.split) for p in found] == [(train, "train"), (val, "val")]


@pytest.fixture
def granules(tmp_path: Path, write_granule: WriteGranule) -> list[Path]:
    """Clean scans of three days."""
    return [write_granule(tmp_path / name(f"2024060{i}T180000"), radiance(i)) for i in (1, 2, 3)]


def test_by_region_every_scene_is_cut(tmp_path: Path, granules: list[Path], write_granule: WriteGranule) -> None:
    wide = radiance(4, (4, 15, NC))
    inputs = [*granules, write_granule(tmp_path / name("20240604T180000"), wide)]
    store = run_prepare(tmp_path / "store", inputs, split={"by": "region", "val_fraction": 0.3})
    regions = [[[0, 7, 0, NX], [7, NY, 0, NX]]] * 3 + [[[0, 4, 0, 11], [0, 4, 11, 15]]]  # 3 of 10 rows, 4 of 15 columns
    expected = [(path.name, region) for path, pair in zip(inputs, regions, strict=True) for region in pair]
    assert [(s.source, s.region) for s in store.scenes] == expected
    assert [s.split for s in store.scenes] == ["train", "val"] * 4
    training = [*(radiance(i)[:7] for i in (1, 2, 3)), wide[:, :11]]
    logs = np.concatenate([np.log(values.astype(np.float64)).reshape(-1, NC) for values in training])
    np.testing.assert_allclose(store.normalization.mean, logs.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(store.normalization.std, logs.std(axis=0), rtol=1e-6)
    z = (np.log(wide[:, 11:].astype(np.float64)) - logs.mean(axis=0)) / logs.std(axis=0)
    np.testing.assert_allclose(z_of(store, store.scenes[-1].id), z, rtol=2.0**-10, atol=1e-6)


def test_regions_and_copies_of_one_file(tmp_path: Path, granules: list[Path]) -> None:
    def region(*bounds: int, path: Path = granules[0]) -> dict[str, Any]:
        return {"path": str(path), "region": list(bounds)}

    parts = [region(0, 5, 0, 8), region(5, 10, 0, 4), region(5, 10, 4, 8)]
    store = run_prepare(tmp_path / "good", parts, split={"by": "scene", "val_fraction": 0.3})
    assert [s.region for s in store.scenes] == [p["region"] for p in parts]
    assert sorted(s.split for s in store.scenes) == ["train", "train", "val"]
    assert len({p.stat().st_size for p in granules}) == 1  # that alone makes no copies
    assert [s.id for s in run_prepare(tmp_path / "all", granules).scenes] == [p.stem for p in granules]
    link = tmp_path / name("20240601T190000", 9)
    link.symlink_to(granules[0])
    twins = [tmp_path / "a" / "scene.nc", tmp_path / "b" / "scene.nc"]  # two files, but scenes of one name
    copy = tmp_path / name("20240607T180000")
    for granule, new in ((granules[0], twins[0]), (granules[1], twins[1]), (granules[0], copy)):
        new.parent.mkdir(exist_ok=True)
        shutil.copyfile(granule, new)
    envi = [tmp_path / "a.hdr", tmp_path / "b.hdr"]  # with a file of numbers each
    for header in envi:
        metadata = {"wavelength": ["400", "500", "600"], "wavelength units": "Nanometers"}
        spectral.envi.save_image(str(header), np.ones((12, 9, 3), np.float32), ext="img", metadata=metadata)
    for inputs, path in (
        (twins, twins[1]),
        ([*granules, copy], copy),
        (envi, tmp_path / "b.img"),
        ([region(0, 6, 0, 8), region(5, 10, 0, 8)], granules[0]),
        ([region(0, 6, 0, 8), granules[0]], granules[0]),
        ([region(0, 5, 0, 8)] * 2, granules[0]),
        ([granules[0], link], link),
        ([region(0, 6, 0, 8), region(5, 10, 0, 8, path=link)], link),
        ([str(tmp_path / "*S001*.nc"), granules[1]], granules[1]),
    ):
        refused(ConfigError, tmp_path / "store", inputs, key="inputs", path=path)
