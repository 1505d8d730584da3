"""Which scenes are kept for validation: no pixel, and as a rule no day, is on both sides."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console

from spectralvae.config import InputSpec, SplitConfig
from spectralvae.errors import ConfigError
from spectralvae.readers import Scene
from spectralvae.readers.arguments import Window
from spectralvae.runtime.console import warn

DAY_OFFSET = timedelta(hours=6)  # local days of North America, in UTC
Split = Literal["train", "val"]


@dataclass
class PlannedScene:
    """A scene and its place in the store.

    Attributes:
        scene: where its samples come from.
        spec: the input it belongs to.
        split: train or val; empty until that is decided.
        products: file of each level-2 product.
    """

    scene: Scene
    spec: InputSpec
    split: Split | Literal[""] = ""
    products: dict[str, Path] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The scene's name, as the name of a folder."""
        return re.sub(r"[^A-Za-z0-9._-]|^\.", "_", self.scene.name)


Crop = Callable[[PlannedScene, Window], PlannedScene]


def split_scenes(
    planned: Sequence[PlannedScene], split: SplitConfig, crop: Crop, console: Console
) -> list[PlannedScene]:
    """Give every scene its split.

    Args:
        planned: all scenes.
        split: how to.
        crop: makes the planned scene of a region of another.
        console: for what the user should know.

    Returns:
        The scenes; where they are split by region, or where there is only one, the two parts of each.

    Raises:
        ConfigError: lists that miss a scene or name it twice, days asked of scenes without a time, or nothing left
            for training.
    """
    scenes = list(planned)
    if split.train is not None and split.val is not None:
        _split_by_lists(scenes, split.train, split.val)
    elif split.val_dates is not None:
        _split_by_dates(scenes, split.val_dates)
    elif split.val_fraction == 0:
        for p in scenes:
            p.split = "train"
    elif split.by == "region" or (split.by is None and len(scenes) == 1):
        scenes = [part for p in scenes for part in _cut(p, split.val_fraction, crop)]
        if len(planned) == 1:
            whole, val = planned[0].scene.shape, scenes[1].scene.shape
            kept = f"{val[0]} rows" if val[1] == whole[1] else f"{val[1]} columns"
            console.print(f"one scene only: its last {kept} are kept for validation")
    else:
        _split_by_groups(scenes, split, console)
    if not any(p.split == "train" for p in scenes):
        raise ConfigError("no scene is left for training", key="split")
    return scenes


def _split_by_lists(planned: Sequence[PlannedScene], train: Sequence[str], val: Sequence[str]) -> None:
    for p in planned:
        in_train, in_val = (any(_matches(p, pattern) for pattern in patterns) for patterns in (train, val))
        if in_train == in_val:
            problem = f"scene {p.id} is in {'both' if in_train else 'neither'} of train and val"
            raise ConfigError(problem, key="split", remedy="name it in exactly one")
        p.split = "train" if in_train else "val"
    for split, pattern in [("train", pattern) for pattern in train] + [("val", pattern) for pattern in val]:
        if not any(_matches(p, pattern) for p in planned):
            remedy = "correct it or take it out"
            raise ConfigError("matches no scene", key=f"split.{split}", value=pattern, remedy=remedy)


def _matches(p: PlannedScene, pattern: str) -> bool:
    return fnmatchcase(p.id, pattern) or fnmatchcase(p.scene.path.name, pattern)


def _split_by_dates(planned: Sequence[PlannedScene], val_dates: Sequence[str]) -> None:
    days = [_day(p, "split.val_dates") for p in planned]
    spans = []
    for text in val_dates:
        first, _, last = text.partition("/")
        spans.append((text, date.fromisoformat(first), date.fromisoformat(last or first)))
    for p, day in zip(planned, days, strict=True):
        p.split = "val" if any(first <= day <= last for _, first, last in spans) else "train"
    for text, begin, end in spans:
        if not any(begin <= day <= end for day in days):
            problem = f"matches no scene; the scenes are of {min(days)} to {max(days)} (UTC - 6 h)"
            raise ConfigError(problem, key="split.val_dates", value=text)


def _split_by_groups(planned: Sequence[PlannedScene], split: SplitConfig, console: Console) -> None:
    """By day or by scene, neither of which is ever divided between training and validation."""
    groups = [p.id for p in planned]
    if split.by == "day" or (split.by is None and all(p.scene.format == "tempo" for p in planned)):
        days = [str(_day(p, "split.by")) for p in planned]
        if len(set(days)) == 1 and split.by is None:
            warn(
                console,
                f"all scenes are of {days[0]}: split by scan, so validation sees places and weather that training saw",
            )
        else:
            groups = days
    names = sorted(set(groups))
    if len(names) == 1:
        raise ConfigError(
            f"there is only one {split.by} ({names[0]}), which is never divided",
            key="split.by",
            value=split.by,
            remedy="use `by: region`, lists, or `val_fraction: 0`",
        )
    n_val = min(max(1, round(split.val_fraction * len(names))), len(names) - 1)
    order = np.random.Generator(np.random.Philox(key=split.seed)).permutation(len(names))
    chosen = {names[i] for i in order[:n_val]}
    for p, group in zip(planned, groups, strict=True):
        p.split = "val" if group in chosen else "train"


def _day(p: PlannedScene, key: str) -> date:
    """The date of UTC - 6 h: scans of one North American day are never divided by UTC's midnight."""
    if p.scene.time is None:
        raise ConfigError("has no time", key=key, path=p.scene.path, remedy="use `by: scene` or lists")
    return (p.scene.time - DAY_OFFSET).date()


def _cut(p: PlannedScene, val_fraction: float, crop: Crop) -> list[PlannedScene]:
    """The two parts of a scene, cut across its longer axis, but never through a tile of a stack."""
    ny, nx, _ = p.scene.shape
    y0, y1, x0, x1 = p.scene.region or (0, ny, 0, nx)
    unit = p.scene.stack or 1
    along_y = ny >= nx or p.scene.stack is not None
    size = (ny if along_y else nx) // unit
    if size < 2:
        what = "a single tile" if p.scene.stack else "a single pixel"
        raise ConfigError(f"is {what} and cannot be cut in two", key="split", path=p.scene.path)
    n_val = unit * min(max(1, round(val_fraction * size)), size - 1)
    regions: tuple[Window, Window] = (
        ((y0, y1 - n_val, x0, x1), (y1 - n_val, y1, x0, x1))
        if along_y
        else ((y0, y1, x0, x1 - n_val), (y0, y1, x1 - n_val, x1))
    )
    train, val = (crop(p, region) for region in regions)
    train.split, val.split = "train", "val"
    return [train, val]
