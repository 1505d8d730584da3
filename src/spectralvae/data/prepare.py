"""Scenes to a store: plan, statistics of the training scenes, then every scene normalised and written."""

from __future__ import annotations

import glob
import json
import resource
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from rich.console import Console
from rich.progress import Progress

from spectralvae.config import PrepareConfig
from spectralvae.data.plan import plan_scenes
from spectralvae.data.scenes import (
    NO_STATISTICS,
    Bench,
    Written,
    load_measured,
    load_product_values,
    load_written,
    measure,
    product_field,
    write,
)
from spectralvae.data.splits import PlannedScene
from spectralvae.data.store import FORMAT, SceneRecord
from spectralvae.data.store_statistics import Statistics, check_transform, given_statistics, own_statistics
from spectralvae.data.store_writer import finish_store
from spectralvae.data.targets import TargetTransform, fit_transform
from spectralvae.data.validity import Validity
from spectralvae.data.workers import Runner, workers
from spectralvae.errors import ConfigError, RunError
from spectralvae.readers import Scene
from spectralvae.readers.base import FLAG
from spectralvae.readers.products import PRODUCTS
from spectralvae.runtime.atomic import write_atomic
from spectralvae.runtime.console import new_progress, warn
from spectralvae.runtime.rundir import RunDir
from spectralvae.runtime.signals import stop_at_once
from spectralvae.version import __version__
from spectralvae.weights.normalization import Float64, Normalization


def prepare(config: PrepareConfig, run: RunDir, console: Console) -> None:
    """Make the store that ``config`` describes in ``run``'s directory.

    Raises:
        ConfigError: inputs that do not go together, an impossible split, or the wrong transform.
        InputError: a file that cannot be read.
    """
    stages = Stages()
    with stages.timed("planning"):
        planned, wavelength = plan_scenes(config, console)
        given = given_statistics(config, planned, wavelength)
        validity = Validity.of(config)
        check_transform(next(p for p in planned if p.split == "train").scene, validity, config.normalization)
    for p in planned:
        for note in p.scene.notes:
            warn(console, f"{p.scene.path}: {note}")
        for path in (p.scene.path, *p.products.values()):
            run.refuse_inside("inputs", path)
    if config.normalization.statistics:
        run.refuse_inside("normalization.statistics", config.normalization.statistics)
    with run, stop_at_once():
        scratch = run.path / ".partial"
        scratch.mkdir(exist_ok=True)
        folder = resumable_scratch(planned, given.source if given else None, run.path, scratch)
        bench = Bench(
            root=run.path.absolute(),
            scratch=folder.absolute(),
            validity=validity,
            products={str(product): wanted for product, wanted in config.l2.items()},
            dtype=config.dtype,
            leave_out=config.validity.all_invalid == "leave_out",
            measured=given is None or (config.validity.all_invalid == "leave_out" and bool(config.l2)),
        )
        with workers(config.cluster, config.n_workers) as work, new_progress() as progress:
            training = [p for p in planned if p.split == "train"]
            if given is None or config.l2:
                with stages.timed("statistics"):
                    _work(work, progress, "statistics of the training scenes", partial(measure, bench), training)
            if bench.leave_out and bench.products:  # level 2 of a scene that is left out does not count
                training = [p for p in training if load_measured(bench, p).n_valid] or training
            statistics = given or own_statistics(bench, training, config.normalization, wavelength, console)
            normalization = _normalization(config, planned[0].scene, statistics, wavelength)
            targets = fit_targets(bench, training)
            with stages.timed("writing"):
                _work(work, progress, "writing the store", partial(write, bench, normalization, targets), planned)
        written = [load_written(bench, p) for p in planned]
        records = [w.record for w in written if w.record is not None]
        left_out = [p.id for p, w in zip(planned, written, strict=True) if w.record is None]
        for split in {p.split for p in planned} - {record.split for record in records}:
            problem = f"no scene of the {split} split has a valid sample ({', '.join(left_out[:5])})"
            raise ConfigError(problem, key="split", remedy="split otherwise")
        arrays = {**statistics.more, **_written_arrays(written, statistics)}
        store_hash = finish_store(
            run.path,
            records,
            normalization,
            arrays,
            config.dtype,
            statistics_from=statistics.source,
            left_out=left_out,
            targets={product: target.to_attributes() for product, target in targets.items()},
        )
        run.note(store_hash=store_hash, stages=stages.facts)
        report(run.path, records, left_out, arrays, console)
    shutil.rmtree(scratch)  # last: without it a preparation that is not known as finished begins anew


class Stages:
    """How long each stage took, and the most memory that this process had needed by its end.

    Attributes:
        facts: stage -> seconds and peak_memory_mb, for run.json.
    """

    def __init__(self) -> None:
        self.facts: dict[str, dict[str, float]] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Time a stage."""
        begun = time.monotonic()
        yield
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        self.facts[stage] = {"seconds": round(time.monotonic() - begun, 2), "peak_memory_mb": round(peak)}


def _normalization(config: PrepareConfig, scene: Scene, statistics: Statistics, wavelength: Float64) -> Normalization:
    validity, flag_bits = Validity.of(config), config.validity.flag_bits
    return Normalization(
        config.normalization.transform,
        statistics.mean,
        statistics.std,
        clip=config.normalization.clip,
        min_radiance=config.normalization.min_radiance,
        band=scene.band,
        wavelength=wavelength,
        units=scene.units,
        valid_range=validity.valid_range,
        flag_bits=None if flag_bits is None else tuple(flag_bits),
        max_solar_zenith=validity.max_solar_zenith,
    )


def _work(work: Runner, progress: Progress, text: str, what: Any, scenes: Sequence[PlannedScene]) -> None:
    task = progress.add_task(f"{text} (pixels)", total=sum(p.scene.shape[0] * p.scene.shape[1] for p in scenes))
    work(what, scenes, partial(progress.advance, task))


def resumable_scratch(planned: Sequence[PlannedScene], statistics: str | None, root: Path, scratch: Path) -> Path:
    """Where the results of this preparation are, or will be: it goes on only from the same files, split alike.

    A file that appeared under a glob meanwhile would move scenes between training and validation, and change the
    statistics, while scenes already written keep the old ones. Only a file of which nothing was kept yet may have
    changed: a damaged one that was mended.

    Returns:
        A folder in ``scratch`` that no other preparation has ever used: a worker that was lost may still be at work.

    Raises:
        ConfigError: a file is new, gone or changed since the preparation began.
    """
    plan: dict[str, Any] = {}
    for p in planned:
        files = [(path, path.stat()) for path in (*p.scene.files(), *p.products.values())]
        identities = [[str(path.absolute()), status.st_size, status.st_mtime_ns] for path, status in files]
        plan[f"inputs: scene {p.id}"] = [p.split, *identities]
    plan["normalization.statistics: the source"] = statistics
    plan["spectralvae: the version"] = [__version__, FORMAT]
    begun = scratch / "plan.json"
    if begun.is_file():
        before = json.loads(begun.read_text())
        folder = scratch / str(before.pop("folder"))
        kept = {f"inputs: scene {p.id}" for p in planned if any(folder.glob(f"{glob.escape(p.id)}.*.npz"))}
        changed = {what for what in before.keys() & plan.keys() if before[what] != plan[what]}
        mended = {what for what in changed - kept if what.startswith("inputs") and before[what][0] == plan[what][0]}
        for how, found in (
            ("is new", plan.keys() - before.keys()),
            ("is gone", before.keys() - plan.keys()),
            ("has changed", changed - mended),
        ):
            if found:
                key, _, what = min(found).partition(": ")
                problem = f"{what} {how} since the preparation began"
                raise ConfigError(problem, key=key, path=root, remedy="start afresh with --overwrite")
    else:
        shutil.rmtree(scratch)
        folder = scratch / uuid4().hex
        folder.mkdir(parents=True)
        (root / "zarr.json").unlink(missing_ok=True)
        if (root / "scenes").exists():
            shutil.rmtree(root / "scenes")
    write_atomic(begun, json.dumps({**plan, "folder": folder.name}))
    return folder


def fit_targets(bench: Bench, training: Sequence[PlannedScene]) -> dict[str, TargetTransform]:
    """The transform of every level-2 product, with statistics of the training scenes.

    Raises:
        ConfigError: a product has nothing that can be learned.
    """
    targets = {}
    for product in bench.products:
        first = product_field(bench, training[0], product)
        targets[product] = fit_transform(
            PRODUCTS[product],
            first.field,
            first.units,
            lambda product=product: (load_product_values(bench, p, product) for p in training),  # type: ignore[misc]
        )
    return targets


def _written_arrays(written: Sequence[Written], statistics: Statistics) -> dict[str, Any]:
    """Root arrays that only writing could tell.

    Raises:
        RunError: not the samples were written that had been measured.
    """
    training = [w for w in written if w.record and w.record.split == "train"]
    count = sum((w.n_valid for w in training), np.int64(0))
    if "count" in statistics.more and not np.array_equal(count, statistics.more["count"]):
        problem = "a file changed between the statistics and the writing"
        raise RunError(problem, key="inputs", remedy="start afresh with --overwrite")
    n_valid = sum((w.n_valid for w in written), np.int64(0))
    lost = np.sum([w.lost for w in training], axis=0)
    return {
        "count": count,
        "n_clipped": sum((w.n_clipped for w in written), np.int64(0)),
        "rounding_max": np.max([w.rounding_max for w in written], axis=0),
        "rounding_rms": np.sqrt(sum(w.rounding_sum for w in written) / np.maximum(n_valid, 1)),
        "lost_mean": lost[0] / np.maximum(count, 1),
        "lost_square": lost[1] / np.maximum(count, 1),
    }


def report(
    path: Path,
    records: Sequence[SceneRecord],
    left_out: Sequence[str],
    arrays: Mapping[str, Any],
    console: Console,
) -> None:
    """Print what was made, with the invalid samples by rule."""
    total = sum(int(np.prod(r.shape)) for r in records)
    rules = {rule: sum(r.invalid[rule] for r in records) for rule in records[0].invalid}
    by_rule = ", ".join(f"{rule} {n / total:.2%}" for rule, n in rules.items() if n) or "none"
    console.print(f"invalid samples: {by_rule}")
    for product in records[0].products:
        pixels = sum(r.shape[0] * r.shape[1] for r in records)
        valid = sum(r.products[product]["n_valid"] for r in records)
        console.print(f"{product}: {valid} of {pixels} pixels are valid ({valid / pixels:.1%})")
    if left_out:
        warn(console, f"left out, for they have no valid sample: {', '.join(left_out)}")
    if any(FLAG in r.absent and r.version for r in records):
        warn(console, f"some granules have no {FLAG}: their bad samples count as valid")
    absent = sorted({name for r in records for name in r.absent})
    if absent:
        console.print(f"absent in some scenes: {', '.join(absent)}")
    if unknown := rules.get(NO_STATISTICS, 0):
        warn(console, f"{unknown} samples are of channels without statistics, and stay masked")
    if clipped := int(arrays["n_clipped"].sum()):
        console.print(f"clipped: {clipped} samples ({clipped / total:.2g} of all)")
    console.print(
        f"rounding of z: rms {np.sqrt(np.mean(arrays['rounding_rms'] ** 2)):.1e}, at most "
        f"{arrays['rounding_max'].max():.1e}"
    )
    n_val = sum(r.split == "val" for r in records)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and ".partial" not in file.parts)
    source = sum({r.sha256: r.source_bytes for r in records}.values())  # regions share their file
    console.print(
        f"store {path}: {len(records) - n_val} training and {n_val} validation scenes, {total / 1e6:.1f} M samples, "
        f"{size / 1e6:.1f} MB ({size / source:.2f} of the sources)"
    )
