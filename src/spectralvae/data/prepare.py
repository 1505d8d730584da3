"""Scenes to a store, in four stages: plan, measure, write, finish."""

from __future__ import annotations

import glob
import json
import os
import resource
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.console import Console

from spectralvae.config import PrepareConfig
from spectralvae.data.finish import finish
from spectralvae.data.measure import fit_targets, load_measured, measure, own_statistics
from spectralvae.data.plan import plan_scenes
from spectralvae.data.splits import PlannedScene
from spectralvae.data.store import FORMAT
from spectralvae.data.store_statistics import Statistics, check_transform, given_statistics
from spectralvae.data.tasks import Task
from spectralvae.data.validity import Validity
from spectralvae.data.workers import Work, workers
from spectralvae.data.write import write
from spectralvae.errors import ConfigError
from spectralvae.readers import Scene
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
        training = [p for p in planned if p.split == "train"]
        check_transform(training[0].scene, Validity.of(config), config.normalization)
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
        leave_out = config.validity.all_invalid == "leave_out"
        task = Task(
            root=run.path.absolute(),
            scratch=folder.absolute(),
            validity=Validity.of(config),
            products={str(product): wanted for product, wanted in config.l2.items()},
            dtype=config.dtype,
            leave_out=leave_out,
            measured=given is None or (leave_out and bool(config.l2)),
            n_threads=1 if config.cluster else len(os.sched_getaffinity(0)),
        )
        with workers(config.cluster, config.n_workers) as run_on, new_progress() as progress:

            def work(text: str, what: Work, scenes: Sequence[PlannedScene]) -> None:
                n_pixels = sum(p.scene.shape[0] * p.scene.shape[1] for p in scenes)
                run_on(what, scenes, partial(progress.advance, progress.add_task(f"{text} (pixels)", total=n_pixels)))

            if given is None or config.l2:
                with stages.timed("statistics"):
                    work("statistics of the training scenes", partial(measure, task), training)
            if task.leave_out and task.products:  # level 2 of a scene that is left out does not count
                training = [p for p in training if load_measured(task, p).n_valid] or training
            statistics = given or own_statistics(task, training, config.normalization, wavelength, console)
            normalization = _normalization(config, planned[0].scene, statistics, wavelength)
            targets = fit_targets(task, training)
            with stages.timed("writing"):
                work("writing the store", partial(write, task, normalization, targets), planned)
        store_hash = finish(task, planned, statistics, normalization, targets, console)
        run.note(store_hash=store_hash, stages=stages.facts)
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
