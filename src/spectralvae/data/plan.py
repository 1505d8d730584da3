"""Which scenes a store will hold, and which of them are kept for validation: decided before anything is written."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from spectralvae.config import InputSpec, PrepareConfig, SplitConfig
from spectralvae.console import warn
from spectralvae.errors import ConfigError, InputError
from spectralvae.readers import Scene, open_reader

DAY_OFFSET = timedelta(hours=6)  # local days of North America, in UTC


@dataclass
class PlannedScene:
    """A scene and its place in the store."""

    scene: Scene
    spec: InputSpec
    split: str = ""

    @property
    def id(self) -> str:
        """The scene's name, as the name of a folder."""
        return re.sub(r"[^A-Za-z0-9._-]|^\.", "_", self.scene.name)


def plan_scenes(config: PrepareConfig, console: Console) -> list[PlannedScene]:
    """Open every input far enough to know that it is a scene, check that all go together, and split them.

    Raises:
        ConfigError, InputError: as `prepare`.
    """
    planned = [
        PlannedScene(_open(path, spec, config.band, spec.region), spec)
        for spec in config.inputs
        for path in _expand(spec.path)
    ]
    planned = split_scenes(planned, config, console)
    _check_distinct(planned)
    first = planned[0].scene
    for p in planned[1:]:
        for what, ours, theirs in (
            ("channels", p.scene.shape[2], first.shape[2]),
            ("band", p.scene.band, first.band),
            ("units", p.scene.units, first.units),
        ):
            if ours != theirs:
                raise ConfigError(f"inputs: {what} of {p.scene.path} is {ours}, but of {first.path} {theirs}")
    return planned


def _expand(pattern: str) -> list[Path]:
    pattern = os.path.expanduser(pattern)  # noqa: PTH111 (pathlib's raises over an unknown user)
    if Path(pattern).exists() or not glob.has_magic(pattern):
        return [Path(pattern)]
    paths = sorted(Path(path) for path in glob.iglob(pattern, recursive=True))  # noqa: PTH207
    if not paths:
        raise InputError(f"inputs: no file matches {pattern}")
    return paths


def _open(path: Path, spec: InputSpec, band: str | None, region: Sequence[int] | None) -> Scene:
    wavelength = spec.wavelength
    return open_reader(
        path,
        variable=spec.variable,
        size=spec.size,
        wavelength=wavelength if wavelength is None or isinstance(wavelength, list) else wavelength.model_dump(),
        region=region,
        band=band,
    )


def _check_distinct(planned: Sequence[PlannedScene]) -> None:
    """No pixel may be in two scenes, else the validation would see what was trained on."""
    by_file: dict[Path, list[PlannedScene]] = {}
    by_id: dict[str, PlannedScene] = {}
    for p in planned:
        others = by_file.setdefault(p.scene.path.resolve(), [])
        if any(_overlap(p.scene, other.scene) for other in others):
            raise ConfigError(f"inputs: {p.scene.path} is given twice, and the regions share pixels")
        others.append(p)
        twin = by_id.setdefault(p.id, p)
        if twin is not p:
            raise ConfigError(
                f"inputs: {twin.scene.path} and {p.scene.path} give two scenes named {p.id}: rename one or leave it out"
            )


def _overlap(a: Scene, b: Scene) -> bool:
    if a.region is None or b.region is None:
        return True
    (ay0, ay1, ax0, ax1), (by0, by1, bx0, bx1) = a.region, b.region
    return ay0 < by1 and by0 < ay1 and ax0 < bx1 and bx0 < ax1


def split_scenes(planned: list[PlannedScene], config: PrepareConfig, console: Console) -> list[PlannedScene]:
    """Give every scene its split; a lone scene is cut in two.

    Raises:
        ConfigError: lists that miss a scene or name it twice, or days asked of scenes without a time.
    """
    split = config.split
    if split.train is not None and split.val is not None:
        for p in planned:
            p.split = _listed_split(p, split.train, split.val)
        for pattern in (*split.train, *split.val):
            if not any(_matches(p, pattern) for p in planned):
                raise ConfigError(f"split: no scene matches {pattern!r}; take it out, or correct it")
    elif split.val_fraction == 0:
        for p in planned:
            p.split = "train"
    elif len(planned) == 1:
        planned = _cut(planned[0], config.band, split.val_fraction)
        train, val = (p.scene for p in planned)
        assert train.region and val.region
        along_y = train.region[0] != val.region[0]
        kept = f"{val.shape[0]} rows" if along_y else f"{val.shape[1]} columns"
        console.print(f"one scene only: its last {kept} are kept for validation")
    else:
        groups = _groups(planned, split, console)
        names = sorted(set(groups))
        n_val = min(max(1, round(split.val_fraction * len(names))), len(names) - 1)
        order = np.random.Generator(np.random.Philox(key=split.seed)).permutation(len(names))
        chosen = {names[i] for i in order[:n_val]}
        for p, group in zip(planned, groups, strict=True):
            p.split = "val" if group in chosen else "train"
    if not any(p.split == "train" for p in planned):
        raise ConfigError("split: no scene is left for training")
    return planned


def _listed_split(p: PlannedScene, train: Sequence[str], val: Sequence[str]) -> str:
    found = [
        name for name, patterns in (("train", train), ("val", val)) if any(_matches(p, pattern) for pattern in patterns)
    ]
    if len(found) != 1:
        where = "neither in train nor in val" if not found else "in train and in val"
        raise ConfigError(f"split: scene {p.id} is {where}: every scene belongs to exactly one")
    return found[0]


def _matches(p: PlannedScene, pattern: str) -> bool:
    return fnmatchcase(p.id, pattern) or fnmatchcase(p.scene.path.name, pattern)


def _groups(planned: Sequence[PlannedScene], split: SplitConfig, console: Console) -> list[str]:
    """What is never divided between training and validation: a day or a scene."""
    by = split.by or ("day" if all(p.scene.format == "tempo" for p in planned) else "scene")
    if by == "scene":
        return [p.id for p in planned]
    days = []
    for p in planned:
        if p.scene.time is None:
            raise ConfigError(f"split.by: day, but {p.scene.path} has no time; use `by: scene` or lists")
        days.append(str(local_day(p)))
    if len(set(days)) == 1:
        warn(
            console,
            f"all scenes are of {days[0]}: split by scan, so validation sees places and weather that training saw",
        )
        return [p.id for p in planned]
    return days


def local_day(p: PlannedScene) -> date:
    """The date of UTC - 6 h: scans of one North American day are never divided by UTC's midnight."""
    assert p.scene.time is not None
    return (p.scene.time - DAY_OFFSET).date()


def _cut(p: PlannedScene, band: str | None, val_fraction: float) -> list[PlannedScene]:
    """The two parts of a lone scene, cut across its longer axis."""
    ny, nx, _ = p.scene.shape
    y0, y1, x0, x1 = p.scene.region or (0, ny, 0, nx)
    size = max(ny, nx)
    if size < 2:
        raise ConfigError(f"split: {p.scene.path} is a single pixel and cannot be cut in two")
    n_val = min(max(1, round(val_fraction * size)), size - 1)
    regions = (
        ([y0, y1 - n_val, x0, x1], [y1 - n_val, y1, x0, x1])
        if ny >= nx
        else ([y0, y1, x0, x1 - n_val], [y0, y1, x1 - n_val, x1])
    )
    return [
        PlannedScene(_open(p.scene.path, p.spec, band, region), p.spec, split)
        for region, split in zip(regions, ("train", "val"), strict=True)
    ]


def check_wavelengths(planned: Sequence[PlannedScene], reference: PlannedScene) -> NDArray[np.float64]:
    """All scenes must have the reference's wavelengths within one channel spacing.

    Returns:
        The reference's wavelengths, (channel), nm, averaged over x where they depend on it.

    Raises:
        ConfigError: a scene has others.
    """
    expected = _channel_means(reference.scene)
    limit = float(np.nanmedian(np.abs(np.diff(expected)))) if len(expected) > 1 else np.inf
    for p in planned:
        found = _channel_means(p.scene)
        worst = float(np.nanmax(np.abs(found - expected)))
        if worst > limit:
            raise ConfigError(
                f"inputs: wavelengths of {p.scene.path} ({_span(found)}) differ by up to {worst:.3f} nm from those of "
                f"{reference.scene.path} ({_span(expected)}); at most one channel ({limit:.3f} nm) is allowed"
            )
    return expected


def _span(wavelength: NDArray[np.float64]) -> str:
    return f"{wavelength.min():.2f}-{wavelength.max():.2f} nm"


def _channel_means(scene: Scene) -> NDArray[np.float64]:
    with scene:
        wavelength = scene.wavelength.reshape(-1, scene.shape[2])
    known = np.isfinite(wavelength)
    if not known.any(axis=0).all():
        missing = int(np.argmin(known.any(axis=0)))
        raise InputError(f"{scene.path}: channel {missing} has no wavelength anywhere")
    return np.asarray(np.nanmean(wavelength, axis=0), np.float64)
