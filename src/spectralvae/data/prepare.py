"""Scenes to a store: plan, statistics of the training scenes, then every scene normalised and written."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from spectralvae.config import NormalizationConfig, PrepareConfig
from spectralvae.console import new_progress, warn
from spectralvae.data import store
from spectralvae.data.normalize import Float64, Normalization, reject_small, transform_values
from spectralvae.data.plan import PlannedScene, check_wavelengths, plan_scenes
from spectralvae.data.statistics import Moments
from spectralvae.data.store import SceneRecord, ZWriter
from spectralvae.errors import ConfigError
from spectralvae.readers import Scene
from spectralvae.rundir import RunDir, write_atomic
from spectralvae.signals import stop_at_once

BLOCK_BYTES = 16e6  # of float32 read at a time
BELOW_MINIMUM = "below_min_radiance"


def prepare(config: PrepareConfig, run: RunDir, console: Console) -> None:
    """Make the store that ``config`` describes in ``run``'s directory.

    Raises:
        ConfigError: inputs that do not go together, an impossible split, or the wrong transform.
        InputError: a file that cannot be read.
    """
    planned = plan_scenes(config, console)
    training = [p for p in planned if p.split == "train"]
    wavelength = check_wavelengths(planned, training[0])
    check_transform(training[0].scene, config.normalization)
    for p in planned:
        run.refuse_inside("inputs", p.scene.path)
    with run, stop_at_once():
        scratch = run.path / ".partial"
        scratch.mkdir(exist_ok=True)
        check_same_plan(planned, run.path, scratch)
        with new_progress() as progress:
            moments = training_moments(training, config.normalization, scratch, progress)
            normalization = Normalization(
                config.normalization.transform,
                *checked_statistics(moments, wavelength, console),
                clip=config.normalization.clip,
                min_radiance=config.normalization.min_radiance,
                band=planned[0].scene.band,
                wavelength=wavelength,
                units=planned[0].scene.units,
            )
            task = progress.add_task("writing the store", total=sum(p.scene.shape[0] for p in planned))
            advance = partial(progress.advance, task)
            records = [write_scene(run.path, p, normalization, config.dtype, advance) for p in planned]
        check_sources(records)
        run.note(store_hash=store.finish_store(run.path, records, normalization, moments, config.dtype))
        report(records, run.path, console)
    shutil.rmtree(scratch)  # last: without it a preparation that is not known as finished begins anew


def check_same_plan(planned: Sequence[PlannedScene], root: Path, scratch: Path) -> None:
    """An interrupted preparation goes on only from the same files, split alike.

    A file that appeared under a glob meanwhile would move scenes between training and validation, and change the
    statistics, while scenes already written keep the old ones.

    Raises:
        ConfigError: a file is new, gone or changed since the preparation began.
    """
    plan = {
        p.id: [str(p.scene.path), p.split, p.scene.path.stat().st_size, p.scene.path.stat().st_mtime_ns]
        for p in planned
    }
    begun = scratch / "plan.json"
    if begun.is_file():
        before = json.loads(begun.read_text())
        changed = {scene for scene in before.keys() & plan.keys() if before[scene] != plan[scene]}
        for how, scenes in (
            ("is new", plan.keys() - before.keys()),
            ("is gone", before.keys() - plan.keys()),
            ("has changed", changed),
        ):
            if scenes:
                raise ConfigError(
                    f"inputs: scene {min(scenes)} {how} since the preparation in {root} began: "
                    "start afresh with --overwrite"
                )
        return
    shutil.rmtree(scratch)
    scratch.mkdir()
    (root / "zarr.json").unlink(missing_ok=True)
    if (root / "scenes").exists():
        shutil.rmtree(root / "scenes")
    write_atomic(begun, json.dumps(plan))


def check_sources(records: Sequence[SceneRecord]) -> None:
    """One file under two names is one scene: it may not be trained on and judged with.

    Raises:
        ConfigError: two scenes are copies of the same pixels.
    """
    seen: dict[tuple[str, str], SceneRecord] = {}
    for record in records:
        twin = seen.setdefault((record.sha256, str(record.region)), record)
        if twin is not record:
            raise ConfigError(f"inputs: scenes {twin.id} and {record.id} are copies of one file: give it once")


def check_transform(scene: Scene, normalization: NormalizationConfig) -> None:
    """Look at the middle of a scene before anything is written.

    Raises:
        ConfigError: log_zscore was asked for values most of which lie below min_radiance.
    """
    middle = scene.shape[0] // 2
    with scene:
        values, _ = scene.read(slice(middle, middle + 1))
    n_valid = int(np.count_nonzero(np.isfinite(values)))
    _check_share(reject_small(values, normalization.transform, normalization.min_radiance), n_valid, normalization)


def _check_share(n_small: int, n_valid: int, normalization: NormalizationConfig) -> None:
    if 2 * n_small > n_valid:
        raise ConfigError(
            f"normalization.transform: log_zscore does not fit: {n_small} of {n_valid} valid samples lie below "
            f"min_radiance = {normalization.min_radiance:g}; use `transform: zscore` (reflectance) or a smaller limit"
        )


def blocks(scene: Scene) -> Iterator[slice]:
    """The scene's rows in pieces of about BLOCK_BYTES."""
    ny, nx, nc = scene.shape
    step = max(1, int(BLOCK_BYTES / (4 * nx * nc)))
    return (slice(y, min(y + step, ny)) for y in range(0, ny, step))


def training_moments(
    training: Sequence[PlannedScene], normalization: NormalizationConfig, scratch: Path, progress: Progress
) -> Moments:
    """Moments of the transformed training scenes, one scene after the other.

    What is done is kept in ``scratch``, so that an interrupted preparation goes on from there.

    Raises:
        ConfigError: most samples lie below min_radiance.
    """
    task = progress.add_task("statistics of the training scenes", total=sum(p.scene.shape[0] for p in training))
    total = Moments.empty(training[0].scene.shape[2])
    n_small = n_valid = 0
    for p in training:
        kept = scratch / f"{p.id}.npz"
        if not kept.is_file():
            moments = Moments.empty(p.scene.shape[2])
            small = 0
            with p.scene:
                for rows in blocks(p.scene):
                    values, _ = p.scene.read(rows)
                    small += reject_small(values, normalization.transform, normalization.min_radiance)
                    moments = moments.merge(Moments.of(transform_values(values, normalization.transform)))
                    progress.advance(task, rows.stop - rows.start)
            buffer = io.BytesIO()
            np.savez(buffer, small=small, **vars(moments))
            write_atomic(kept, buffer.getvalue())
        else:
            progress.advance(task, p.scene.shape[0])
        with np.load(kept) as saved:
            moments = Moments(**{name: saved[name] for name in saved if name != "small"})
            n_small += int(saved["small"])
        n_valid += int(moments.count.sum())
        total = total.merge(moments)
    _check_share(n_small, n_valid + n_small, normalization)
    return total


def checked_statistics(moments: Moments, wavelength: Float64, console: Console) -> tuple[Float64, Float64]:
    """Mean and std per channel, NaN for channels without a valid sample, which are named.

    Raises:
        ConfigError: no valid sample at all, or a channel has no spread.
    """
    dead = np.flatnonzero(moments.count == 0)
    if len(dead) == len(moments.count):
        raise ConfigError("inputs: the training scenes hold no valid sample")
    # not m2 == 0: rounding of the mean leaves a little of it
    flat = np.flatnonzero((moments.count > 0) & (moments.minimum == moments.maximum))
    if len(flat):
        raise ConfigError(
            f"inputs: channel {flat[0]} ({wavelength[flat[0]]:.2f} nm) has the same value in all its "
            f"{moments.count[flat[0]]} valid training samples and cannot be normalised ({len(flat)} such channels)"
        )
    if len(dead):
        named = ", ".join(f"{c} ({wavelength[c]:.2f} nm)" for c in dead[:10]) + (", ..." if len(dead) > 10 else "")
        warn(console, f"{len(dead)} channels have no valid training sample and stay masked: {named}")
    mean = np.where(moments.count > 0, moments.mean, np.nan)
    return mean, moments.std


def write_scene(
    root: Path, p: PlannedScene, normalization: Normalization, dtype: str, advance: Callable[[int], None]
) -> SceneRecord:
    """Write one scene, or find that an earlier start of the same preparation has.

    Args:
        root: the store.
        p: the scene.
        normalization: of the store.
        dtype: of z.
        advance: called with the number of rows that are done.
    """
    folder = store.scene_folder(root, p.id)
    done = store.finished_scene(folder)
    if done is not None:
        advance(p.scene.shape[0])
        return done
    if folder.exists():
        shutil.rmtree(folder)  # cut off in the middle: only the group's metadata, written last, says otherwise
    folder.mkdir(parents=True)
    attributes = {"long_name": f"normalised radiance ({normalization.transform})", "units": "1"}
    n_invalid = np.zeros(p.scene.shape[:2], np.int32)
    invalid: dict[str, int] = {}
    with p.scene, ZWriter(folder, p.scene.shape, dtype, attributes) as writer:
        for rows in blocks(p.scene):
            values, counts = p.scene.read(rows)
            counts = {
                **counts,
                BELOW_MINIMUM: reject_small(values, normalization.transform, normalization.min_radiance),
            }
            invalid = {rule: invalid.get(rule, 0) + n for rule, n in counts.items()}
            stored = writer.write(normalization.normalize(values))
            n_invalid[rows] = np.isnan(stored).sum(axis=-1)
            advance(rows.stop - rows.start)
        wavelength = p.scene.wavelength
        arrays: dict[str, store.NamedArray] = {
            **p.scene.coordinates(),
            "n_invalid": (("y", "x"), n_invalid),
            "wavelength": (("x", "channel")[-wavelength.ndim :], wavelength),
        }
    record = SceneRecord(
        id=p.id,
        source=p.scene.path.name,
        region=list(p.scene.region) if p.scene.region else None,
        shape=list(p.scene.shape),
        source_bytes=p.scene.path.stat().st_size,
        sha256=file_sha256(p.scene.path),
        time=p.scene.time.isoformat() if p.scene.time else None,
        split=p.split,
        invalid=invalid,
        absent=list(p.scene.absent),
        z_sha256=writer.sha256,
        n_invalid=int(n_invalid.sum()),
    )
    store.write_scene_group(folder, record, arrays)
    return record


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def report(records: Sequence[SceneRecord], path: Path, console: Console) -> None:
    """Print what was made, with the invalid samples by rule."""
    total = sum(int(np.prod(r.shape)) for r in records)
    rules = {rule: sum(r.invalid[rule] for r in records) for rule in records[0].invalid}
    by_rule = ", ".join(f"{rule} {n / total:.2%}" for rule, n in rules.items() if n) or "none"
    n_val = sum(r.split == "val" for r in records)
    console.print(f"invalid samples: {by_rule}")
    absent = sorted({name for r in records for name in r.absent})
    if absent:
        console.print(f"absent in some scenes: {', '.join(absent)}")
    console.print(
        f"store {path}: {len(records) - n_val} training and {n_val} validation scenes, {total / 1e6:.1f} M samples"
    )
