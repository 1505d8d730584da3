"""Many files: which process does which of them, and which are done already."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from rich.console import Console

from spectralvae.errors import ConfigError
from spectralvae.runtime.atomic import write_atomic
from spectralvae.runtime.console import new_console, new_progress, warn
from spectralvae.runtime.ranks import Ranks
from spectralvae.runtime.rundir import RunDir
from spectralvae.runtime.signals import stop_at_once

# Seconds that processes wait for each other at the end, where one may have a file more to do. One that is gone is
# noticed at once.
LONGEST_WAIT = 24 * 3600.0

_PREFIX = ".files-"

T = TypeVar("T")
Advance = Callable[[int], None]  # called with the number of pixels that are done
Facts = dict[str, dict[str, Any]]  # of the files that are done, by their names


class Model(Protocol):
    """The model that the results are made with.

    Attributes:
        path: where it was loaded from.
        identity: SHA-256 digests by name, kept in run.json: a resumed run needs the same.
    """

    path: Path
    identity: dict[str, str]

    def peak_memory(self) -> int:
        """Bytes, the most that this process has used so far on the model's device."""
        ...


class Job(Protocol):
    """A file to be made: all that can be checked without reading it whole was checked when the job was made."""

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
    def notes(self) -> Sequence[str]:
        """What a user should know of the source, a sentence each."""
        ...

    @property
    def n_pixels(self) -> int: ...

    def do(self, advance: Advance) -> dict[str, Any]:
        """Make it; returns facts for run.json, with `text` for people.

        Where there is nothing to be made of the source, `left_out` tells why.
        """
        ...


def plan(
    inputs: Sequence[tuple[Path, T]],
    make: Callable[[Path, T], Job],
    run: RunDir | None,
    ranks: Ranks,
    console: Console,
) -> list[Job]:
    """Open this process's share of the inputs; of each, everything is checked that needs no computing.

    Args:
        inputs: files, with what is needed to read each.
        make: opens one.
        run: the output directory; None in all processes but the main one.
        ranks: the processes.
        console: where to print.

    Raises:
        ConfigError, InputError: an input will not do.
    """
    jobs = []
    with ranks.together(), new_progress(quiet=not ranks.is_main) as progress:
        if run:
            for path, _ in inputs:
                run.refuse_inside("inputs", path)
        task = progress.add_task("opening the inputs", total=len(inputs[ranks.rank :: ranks.world_size]))
        for path, extra in inputs[ranks.rank :: ranks.world_size]:
            jobs.append(make(path, extra))
            progress.advance(task)
    seen: dict[str, str] = {}
    mine = [(job.result.name, str(job.source), tuple(job.notes)) for job in jobs]
    for result, source, notes in chain.from_iterable(ranks.gather(mine)):
        if result in seen:
            raise ConfigError(
                f"would give {result}, as {seen[result]} does",
                key="inputs",
                path=source,
                remedy="leave one out or rename it",
            )
        seen[result] = source
        for note in notes:
            warn(console, f"{source}: {note}")
    return jobs


def work_through(
    jobs: Sequence[Job],
    text: str,
    model: Model,
    run: RunDir | None,
    ranks: Ranks,
    console: Console,
    report: Callable[[RunDir], None] | None = None,
) -> None:
    """Do what is left to be done of this process's jobs, and wait for the others.

    Args:
        jobs: of this process.
        text: what is done, for the progress bar.
        model: that makes the results.
        run: the output directory; None in all processes but the main one.
        ranks: the processes.
        console: where to print.
        report: called by the main process once all files are there, and run.json knows of them.

    Raises:
        ConfigError: a source has changed since its result was made.
        InputError: a source cannot be read, or holds nothing.
        PeerError: so it was for another process.
    """
    if any(identity != model.identity for identity in ranks.gather(model.identity)):
        raise ConfigError(
            "is not the model of every process", key="model", path=model.path, remedy="name a checkpoint, not its run"
        )
    with stop_at_once(), ExitStack() as stack:
        with ranks.together():
            if run:
                stack.enter_context(run)
                _take_over(run, model.identity)
        with ranks.together():  # a block of its own, for the main process may have cleared the directory just now
            left = [job for job in jobs if not _is_done(job)]
        n_files, n_left = ranks.sum(np.array([len(jobs), len(left)], np.float64))
        if n_left < n_files:
            console.print(f"{n_files - n_left:.0f} of {n_files:.0f} files are done already")
        facts: Facts = {}
        with ranks.together():
            try:
                _do_all(left, text, model, facts, run, ranks, console)
            except Exception as error:
                if ranks.world_size > 1:  # it may take long until all leave the block
                    new_console().print(f"process {ranks.rank}: {error}; it waits for the others to do their files")
                raise
        everything = ranks.gather(({job.result.name: str(job.source) for job in jobs}, facts))
        if run:
            _conclude(run, everything, console)
            if report:
                report(run)
        elif facts:
            _beside(left[0], ranks).unlink()


def _do_all(
    left: Sequence[Job], text: str, model: Model, facts: Facts, run: RunDir | None, ranks: Ranks, console: Console
) -> None:
    """Make the files that are left to this process; `facts` are added to as each is done."""
    with new_progress(quiet=not ranks.is_main) as progress:
        task = progress.add_task(f"{text} (pixels)", total=sum(job.n_pixels for job in left))
        for job in left:
            begun = time.monotonic()
            found = job.do(partial(progress.advance, task))
            seconds = time.monotonic() - begun
            if "left_out" in found:
                warn(console, f"{job.source}: left out: {found['left_out']}")
            else:
                console.print(f"{job.result}: {found.pop('text')}; {seconds:.1f} s")
            facts[job.result.name] = {
                "source": str(job.source),
                **found,
                "seconds": round(seconds, 2),
                "peak_memory_gb": round(model.peak_memory() / 1e9, 2),
            }
            if run:
                run.note(files={**run.record["files"], **facts})
            else:
                write_atomic(_beside(job, ranks), json.dumps(facts))


def _beside(job: Job, ranks: Ranks) -> Path:
    """Where a process that must not write run.json keeps what belongs there, lest a stop should cost it."""
    return job.result.with_name(f"{_PREFIX}{ranks.rank}.json")


def _take_over(run: RunDir, identity: Mapping[str, str]) -> None:
    """Put into run.json what other processes have left, and which model it is."""
    files: Facts = dict(run.record.get("files", {}))
    others = sorted(run.path.glob(f"{_PREFIX}*.json"))
    for path in others:
        files |= json.loads(path.read_text())
    run.note(**identity, files=files)
    for path in others:
        path.unlink()


def _conclude(run: RunDir, everything: Sequence[tuple[dict[str, str], Facts]], console: Console) -> None:
    """Put into run.json what all processes have done, and say what the others could not."""
    files: Facts = run.record["files"]
    for rank, (sources, facts) in enumerate(everything):
        for name, source in sources.items():
            # Nothing more is known where a process was killed right after it had made the file.
            files[name] = facts.get(name) or files.get(name) or {"source": source}
            if rank and "left_out" in facts.get(name, {}):
                warn(console, f"{source}: left out: {facts[name]['left_out']}")
    run.note(files=files)
    n_left_out = sum("left_out" in files[name] for sources, _ in everything for name in sources)
    n_files = sum(len(sources) for sources, _ in everything) - n_left_out
    console.print(f"{run.path}: {n_files} files" + (f", {n_left_out} left out" if n_left_out else ""))


def _is_done(job: Job) -> bool:
    """Whether a job's result is there; it is, once it has its name.

    Raises:
        ConfigError: the source is younger.
    """
    if not job.result.exists():
        return False
    if max(file.stat().st_mtime_ns for file in job.sources) > job.result.stat().st_mtime_ns:
        raise ConfigError(
            f"has changed since {job.result} was made",
            key="inputs",
            path=job.source,
            remedy="start afresh with --overwrite",
        )
    return True
