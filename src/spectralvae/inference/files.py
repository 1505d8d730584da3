"""Many files: which process does which of them, and which are done already."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console

from spectralvae.config import InferenceConfig
from spectralvae.console import new_progress
from spectralvae.errors import ConfigError
from spectralvae.inference.coder import Coder
from spectralvae.inference.loading import load_artifact
from spectralvae.rundir import RunDir
from spectralvae.signals import stop_at_once
from spectralvae.training.device import choose_device, peak_memory
from spectralvae.training.distributed import Ranks

# Seconds that processes wait for each other at the end, where one may have a file more to do. One that is gone is
# noticed at once.
LONGEST_WAIT = 24 * 3600.0

T = TypeVar("T")
Advance = Callable[[int], None]  # called with the number of pixels that are done


class Job(Protocol):
    """A file to be made: all that can be checked beforehand was checked when the job was made."""

    @property
    def result(self) -> Path:
        """What is made; whole as soon as it is there."""
        ...

    @property
    def source(self) -> Path:
        """What it is made from."""
        ...

    @property
    def sources(self) -> Sequence[Path]:
        """All files of that."""
        ...

    @property
    def n_pixels(self) -> int: ...

    def do(self, advance: Advance) -> dict[str, Any]:
        """Make it; returns facts for run.json, with `text` for people."""
        ...


def may_change_on_resume(key: str, old: Any, new: Any) -> bool:
    """Whether the rest of the files may be done with another value of a key."""
    return key in ("device", "batch_size", "all_invalid")


def open_coder(config: InferenceConfig, run: RunDir | None, ranks: Ranks, console: Console) -> Coder:
    """The network that a config names, on its device.

    Raises:
        InputError, ConfigError: it cannot be used on scenes.
    """
    if run:
        run.refuse_inside("model", config.model)
    artifact = load_artifact(config.model)
    step = "" if artifact.step is None else f", step {artifact.step}"
    console.print(f"model: {artifact.path}{step}")
    device = choose_device(config.device, ranks, console, key="device")
    return Coder(artifact, device, overlap=config.overlap, batch_size=config.batch_size)


def plan(
    inputs: Sequence[tuple[Path, T]], make: Callable[[Path, T], Job], run: RunDir | None, ranks: Ranks
) -> list[Job]:
    """Open this process's share of the inputs; of each, everything is checked that needs no computing.

    Args:
        inputs: files, with what is needed to read each.
        make: opens one.
        run: the output directory; None in all processes but the first.
        ranks: the processes.

    Raises:
        ConfigError, InputError: an input will not do.
    """
    jobs = []
    with ranks.together(), new_progress(quiet=not ranks.leads) as progress:
        task = progress.add_task("opening the inputs", total=len(inputs[ranks.rank :: ranks.world_size]))
        for path, extra in inputs[ranks.rank :: ranks.world_size]:
            if run:
                run.refuse_inside("inputs", path)
            jobs.append(make(path, extra))
            progress.advance(task)
    seen: dict[str, str] = {}
    for result, source in chain.from_iterable(ranks.gather([(job.result.name, str(job.source)) for job in jobs])):
        if result in seen:
            raise ConfigError(
                f"inputs: {seen[result]} and {source} would both give {result}: leave one out or rename it"
            )
        seen[result] = source
    return jobs


def work_through(
    jobs: Sequence[Job], text: str, coder: Coder, run: RunDir | None, ranks: Ranks, console: Console
) -> None:
    """Do what is left to be done of this process's jobs, and wait for the others.

    Args:
        jobs: of this process.
        text: what is done, for the progress bar.
        coder: the network.
        run: the output directory; None in all processes but the first.
        ranks: the processes.
        console: where to print.

    Raises:
        ConfigError: a source has changed since its result was made.
        InputError: a source cannot be read, or holds nothing.
    """
    with stop_at_once(), ExitStack() as stack:
        with ranks.together():
            if run:
                stack.enter_context(run)
        left = [job for job in jobs if not _is_done(job)]
        if len(left) < len(jobs):
            console.print(f"{len(jobs) - len(left)} of {len(jobs)} files are done already")
        facts: dict[str, Any] = {}
        with new_progress(quiet=not ranks.leads) as progress:
            task = progress.add_task(f"{text} (pixels)", total=sum(job.n_pixels for job in left))
            for job in left:
                begun = time.monotonic()
                found = job.do(partial(progress.advance, task))
                seconds, memory = time.monotonic() - begun, peak_memory(coder.device) / 1e9
                console.print(f"{job.result}: {found.pop('text')}; {seconds:.1f} s")
                facts[job.result.name] = {**found, "seconds": round(seconds, 2), "peak_memory_gb": round(memory, 2)}
                if run:
                    run.note(files={**run.record.get("files", {}), **facts})
        everything = ranks.gather(facts)
        if run:
            run.note(
                files={**run.record.get("files", {}), **{name: f for part in everything for name, f in part.items()}}
            )


def _is_done(job: Job) -> bool:
    """Whether a job's result is there; it is, once it has its name.

    Raises:
        ConfigError: the source is younger.
    """
    if not job.result.exists():
        return False
    if max(file.stat().st_mtime_ns for file in job.sources) > job.result.stat().st_mtime_ns:
        raise ConfigError(
            f"inputs: {job.source} has changed since {job.result} was made: start afresh with --overwrite"
        )
    return True
