"""What only trying tells: how fast a run will be, and how much memory and time it takes."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from spectralvae.config import TrainConfig
from spectralvae.data.loader import BATCHES_AHEAD, TileStream
from spectralvae.data.sampling import CropSampler
from spectralvae.data.store import Store
from spectralvae.runtime.console import new_progress
from spectralvae.runtime.device import available_memory, peak_memory
from spectralvae.runtime.ranks import Ranks
from spectralvae.training.engine import Engine, check_shares
from spectralvae.training.objective import METRICS, means
from spectralvae.training.validation import Validation
from spectralvae.training.watch import Watch
from spectralvae.weights.checkpoint import checkpoint_path, list_checkpoints, save_checkpoint, step_of
from spectralvae.weights.settings import build_model

WARM_UP, TIMED = 2, 5  # steps
BLOWN_UP = 10.0  # times the first error
CPU_SECONDS = 40.0  # for measuring steps on a CPU: fewer tiles at a time are taken where all would take longer
CPU_VALIDATION_SECONDS = 10.0
ROWS = 600  # of metrics, for the cost of drawing them: curves are thinned from 500 on


@dataclass(frozen=True)
class Check:
    """What was found.

    Attributes:
        name: of the check.
        ok: None if it was not tried.
        text: for people; may have several lines.
        figures: for programs, as JSON values.
    """

    name: str
    ok: bool | None
    text: str
    figures: dict[str, Any] = field(default_factory=dict)


class Measured(NamedTuple):
    """A few real steps: the network that took them, seconds a step, and bytes at the peak, at the config's batch."""

    engine: Engine
    seconds: float
    peak: float


@dataclass
class Patient:
    """What is examined.

    Attributes:
        config: of the run.
        settings: the complete `model:` section.
        store: the data.
        device: where the run computes.
        sampler: of the training tiles.
        validation: the validation tiles.
        checkpoint_bytes: what a checkpoint takes.
        scratch: a folder for temporary files.
        measured: by `measure_steps`.
    """

    config: TrainConfig
    settings: dict[str, Any]
    store: Store
    device: torch.device
    sampler: CropSampler
    validation: Validation
    checkpoint_bytes: int
    scratch: Path
    measured: Measured | None = None

    @property
    def done(self) -> int:
        """Steps that the run has behind it."""
        return max(map(step_of, list_checkpoints(self.config.output_dir)), default=0)

    @property
    def piece_size(self) -> int:
        """Pixels along y and x of tiles that are as small as the network takes them."""
        scale: int = 2 ** (len(self.config.model.chs) - 1)
        latents = max(4, self.config.model.conv_kernel_size, -(-16 // scale))
        return min(self.config.data.tile_size, scale * latents)

    def noise_shape(self, tile_size: int) -> tuple[int, int, int]:
        """(E, h, w)"""
        size = tile_size // 2 ** (len(self.config.model.chs) - 1)
        return self.config.model.embed_dim, size, size

    def fresh_engine(self, config: TrainConfig, settings: dict[str, Any]) -> Engine:
        """With the weights of the config's seed."""
        torch.manual_seed(config.seed)
        return Engine(build_model(settings), config, self.device, Ranks())

    @contextmanager
    def progress(self, what: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """Show a progress bar while the block runs; gives what to call after each part."""
        with new_progress() as progress:
            task = progress.add_task(what, total=total)
            yield lambda: progress.advance(task)


def changed(config: TrainConfig, **sections: dict[str, Any]) -> TrainConfig:
    """A config with some keys of its sections changed."""
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    )


def in_bytes(n: float) -> str:
    """For people."""
    return f"{n / 1e9:.3g} GB" if n >= 1e9 else f"{n / 1e6:.3g} MB"


def in_time(seconds: float) -> str:
    """For people."""
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


# --- seconds and memory of a step -----------------------------------------------------------------


class _Times(NamedTuple):
    """(steps) seconds of each part of a step."""

    waiting: NDArray[np.float64]
    gradients: NDArray[np.float64]
    update: NDArray[np.float64]
    errors: list[float]  # pixel MSE, that of the warm-up first


def _timed_steps(p: Patient, engine: Engine, n_tiles: int, n_steps: int, advance: Callable[[], None]) -> _Times:
    """Steps of so many tiles; the warm-up before them is not told of."""
    data = p.config.data
    stream = TileStream(
        p.store,
        p.sampler,
        batch_size=n_tiles,
        tile_size=data.tile_size,
        noise_shape=p.noise_shape(data.tile_size),
        num_workers=data.num_workers,
        pin_memory=p.device.type == "cuda",
    )
    times, errors = np.zeros((n_steps, 3)), list[float]()
    batches = iter(stream)
    for i in range(-WARM_UP, n_steps):
        clock = [time.perf_counter()]
        batch = next(batches)
        clock.append(time.perf_counter())
        sums, norm = engine.gradients(batch)  # waits for the device
        errors.append(means(sums)["pixel_mse"])
        clock.append(time.perf_counter())
        engine.update(norm, max(i, 0))
        if p.device.type == "cuda":
            torch.cuda.synchronize(p.device)
        clock.append(time.perf_counter())
        if i >= 0:
            times[i] = np.diff(clock)
        advance()
    waiting, gradients, update = times.T
    return _Times(waiting, gradients, update, errors)


def _fewer(config: TrainConfig, n_tiles: int) -> TrainConfig:
    """A config for steps of fewer tiles, all at a time; of all tiles, the config itself."""
    if n_tiles == config.data.batch_size:
        return config
    return changed(config, data={"batch_size": n_tiles}, training={"gradient_accumulation": 1})


class _One(NamedTuple):
    """Steps of one tile on a CPU: bytes at the peak, and how many tiles can be afforded."""

    peak: float
    affordable: float


def _try_one_tile(p: Patient) -> _One:
    before, free = _resident_bytes(), available_memory(p.device)
    engine = p.fresh_engine(_fewer(p.config, 1), p.settings)
    times = _timed_steps(p, engine, 1, 1, lambda: None)
    peak = peak_memory(p.device)
    affordable = CPU_SECONDS / (WARM_UP + TIMED) / float(times.gradients[0])
    return _One(peak, min(affordable, 0.5 * free / max(peak - before, 1)))


def measure_steps(p: Patient) -> Check:
    """Take a few real steps; ``p.measured`` is set.

    On a CPU, where all tiles at a time would take too long, with fewer: then seconds and memory are scaled.

    Raises:
        RunError: memory ran out.
    """
    batch_size, at_a_time = p.config.data.batch_size, check_shares(p.config, Ranks())
    n, one = batch_size, None
    if p.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(p.device)
    with p.progress("measuring steps", WARM_UP + TIMED) as advance:
        if p.device.type == "cpu":
            one = _try_one_tile(p)
            # at least two where there are: from one to n tiles memory grows as it goes on to grow
            n = batch_size if one.affordable >= batch_size else min(max(2, int(one.affordable)), at_a_time)
        engine = p.fresh_engine(_fewer(p.config, n), p.settings)
        times = _timed_steps(p, engine, n, TIMED, advance)
    peak = float(peak_memory(p.device))
    if one is not None and n < batch_size:
        tile = (peak - one.peak) / max(n - 1, 1)
        ahead = (1 + BATCHES_AHEAD) * p.store.dtype.itemsize * math.prod(p.settings["shape"])  # a tile's, in the queue
        peak = one.peak + tile * (at_a_time - 1) + ahead * (batch_size - at_a_time)
    scale = batch_size / n
    per_step = (times.waiting + times.gradients) * scale + times.update
    seconds = float(np.median(per_step))
    waiting = float(times.waiting.sum() * scale / per_step.sum())
    p.measured = Measured(engine, seconds, peak)
    how = f"measured with {n} tiles, scaled to {batch_size}" if n < batch_size else f"{batch_size} tiles each"
    text = (
        f"{seconds:.3g} s a step ({how}; median of {TIMED}), {batch_size / seconds:.3g} tiles/s, "
        f"{waiting:.0%} of it waiting for data"
    )
    figures = {
        "seconds_per_step": seconds,
        "tiles_per_second": batch_size / seconds,
        "waiting_share": waiting,
        "measured_tiles": n,
        "tiles": batch_size,
    }
    first, last = times.errors[0], times.errors[-1]
    if not last < BLOWN_UP * first:  # NaN is not, either
        text += f"\npixel MSE went from {first:.4g} to {last:.4g} in {len(times.errors)} steps: lower optimizer.lr"
        return Check("steps", False, text, figures)
    return Check("steps", True, text, figures)


def forecast_memory(p: Patient) -> Check:
    """Compare the peak of the measured steps with what there is."""
    assert p.measured is not None
    # what this process holds will be free again when training begins
    mine = torch.cuda.memory_reserved(p.device) if p.device.type == "cuda" else _resident_bytes()
    peak, free = p.measured.peak, available_memory(p.device) + mine
    text = f"{in_bytes(peak)} at the peak, {in_bytes(free)} available on {p.device}"
    figures = {"peak_bytes": int(peak), "available_bytes": int(free)}
    if peak > free:
        remedy = "raise training.gradient_accumulation, or lower data.batch_size"
        return Check("memory", False, f"{text}: too little; {remedy}", figures)
    return Check("memory", True, text + (": tight" if peak > 0.9 * free else ""), figures)


def _resident_bytes() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) * 1024


# --- hours ----------------------------------------------------------------------------------------


def forecast_hours(p: Patient) -> Check:
    """Do once what a run does beside its steps, and forecast how long it will take from where it is.

    The network that took the steps is let go.
    """
    assert p.measured is not None
    training, (engine, seconds, _), p.measured = p.config.training, p.measured, None
    n_steps, done = training.n_steps, p.done

    def due(*every: int) -> int:
        """How often something is due at multiples of these, and at the end."""
        return len({n_steps}.union(*(range(done - done % each + each, n_steps, each) for each in every)))

    costs = _costs(p, engine)
    times = {
        "validation": (done == 0) + due(training.val_every, training.save_every) if p.validation.crops else 0,
        "figure": due(training.save_every),
        "plot": due(training.save_every, training.plot_every),
        "checkpoint": due(training.save_every),
    }
    hours = {"steps": (n_steps - done) * seconds / 3600} | {name: times[name] * costs[name] / 3600 for name in costs}
    total = sum(hours.values())
    parts = ", ".join(f"{name} {hours[name] / total:.0%}" for name in hours)
    once = ", ".join(f"a {name} {in_time(seconds)}" for name, seconds in costs.items() if times[name])
    size = sum(file.stat().st_size for file in checkpoint_path(p.scratch / "run", ROWS).iterdir())
    shutil.rmtree(p.scratch / "run")  # the disk may be small
    text = (
        f"{in_time(3600 * total)} for {n_steps - done:,} steps in one process: {parts}\n({once} for {in_bytes(size)})"
    )
    figures = {"hours": total, "hours_of": hours, "seconds_of": costs, "times": times, "checkpoint_bytes": size}
    return Check("hours", True, text, figures)


def _costs(p: Patient, engine: Engine) -> dict[str, float]:
    """Seconds of a validation, of drawing curves and page, of a figure of reconstructions, and of a checkpoint."""
    run = p.scratch / "run"
    run.mkdir()
    n_steps, batch_size = p.config.training.n_steps, p.config.data.batch_size
    costs = {}
    with p.progress("what a run does beside its steps", 4) as advance:
        watch = Watch(run, 0, n_steps=n_steps, batch_size=batch_size, facts={}, spikes={})
        costs["validation"] = _validation_seconds(p, engine, watch)
        advance()
        for step in range(ROWS):
            row = {f"{kind}{key}": 1.0 / (1 + step) for kind in ("", "val_") for key in METRICS}
            watch.log.log({"step": step, **row}, 1.0)
        costs["figure"] = _seconds(lambda: watch.reconstructions(p.validation.draw(engine, ROWS), ROWS))
        advance()
        costs["plot"] = _seconds(lambda: watch.draw(ROWS, "running"))
        advance()
        watch.log.close()
        normalization, optimizer = p.store.normalization, engine.optimizer
        costs["checkpoint"] = _seconds(
            lambda: save_checkpoint(run, ROWS, engine.model, p.settings, normalization, optimizer, {})
        )
        advance()
    return costs


def _validation_seconds(p: Patient, engine: Engine, watch: Watch) -> float:
    """Of all tiles; on a CPU forecast from some, if it would take long."""
    crops = p.validation.crops
    if not crops:
        return 0.0
    p.validation.crops = crops[:1]  # this one warms up
    seconds = _seconds(lambda: watch.validated(1, p.validation.run(engine).description))
    affordable = CPU_VALIDATION_SECONDS / seconds if p.device.type == "cpu" else len(crops)
    p.validation.crops = crops[: max(1, int(affordable))]
    seconds = _seconds(lambda: p.validation.run(engine)) * len(crops) / len(p.validation.crops)
    p.validation.crops = crops
    return seconds


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
