"""The checks of `spectralvae doctor` that take steps: what a run costs, and whether it learns and resumes."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from safetensors.numpy import load_file

from spectralvae.config import TrainConfig
from spectralvae.config.loading import dump_config, to_yaml
from spectralvae.data.cache import SceneCache, load_scenes
from spectralvae.data.loader import BATCHES_AHEAD
from spectralvae.errors import ConfigError, RunError
from spectralvae.plotting.figures import save_figure
from spectralvae.runtime.console import new_progress
from spectralvae.runtime.device import available_memory, peak_memory
from spectralvae.runtime.ranks import Ranks
from spectralvae.training.engine import Engine, check_shares, idle_parameters
from spectralvae.training.objective import means
from spectralvae.training.setup import Setup, set_up
from spectralvae.weights.checkpoint import checkpoint_path, list_checkpoints, save_checkpoint, step_of

WARM_UP, TIMED = 2, 5  # steps
DIVERGED = 10.0  # times the first error
CPU_SECONDS = 40.0  # for the measured steps on a CPU: where a batch takes longer, fewer tiles are measured

OVERFIT_TILES = 2
OVERFIT_LR = 1e-3  # at 3e-3 the loss of the full network first rises
OVERFIT_STEPS = 150  # tiles of pure noise take 40, real scenes 15 to 25
OVERFIT_SHARE = 0.5  # of the error of a constant spectrum

TRAIN = (sys.executable, "-m", "spectralvae", "train")
STEPS, STOP_AT = 4, 2  # of the runs that are compared
CHECKPOINTS = 4  # of the two runs together
OTHER_BYTES = 50_000_000  # of figures, tables and compiled code
CUDA_LIMIT = 0.05  # relative deviation of the optimizer's moments, where rounding may differ from start to start


@dataclass(frozen=True)
class Check:
    """The result of a check.

    Attributes:
        ok: None if it was not tried.
        text: for people; may have several lines.
        figures: for programs, as JSON values.
    """

    ok: bool | None
    text: str
    figures: dict[str, Any] = field(default_factory=dict)


def changed(config: TrainConfig, **sections: dict[str, Any]) -> TrainConfig:
    """A config with some keys of its sections changed."""
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    )


def in_bytes(n: float) -> str:
    """A size with its unit."""
    return f"{n / 1e9:.3g} GB" if n >= 1e9 else f"{n / 1e6:.3g} MB"


def in_time(seconds: float) -> str:
    """A duration with its unit."""
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def checkpoint_bytes(setup: Setup) -> int:
    """Size of a checkpoint: the weights, and two moments of those that are trained; the rest is small."""
    idle = sum(parameter.numel() for parameter in idle_parameters(setup.model))
    head = sum(p.numel() for p in setup.supervision.parameters()) if setup.supervision is not None else 0
    return 4 * (3 * (setup.n_parameters + head) - 2 * idle)


# --- what a run costs -------------------------------------------------------------------------------


class _Steps(NamedTuple):
    """Steps of a fresh network.

    Attributes:
        setup, engine: that took them.
        seconds: (steps, 3) waiting for data, gradients, update; without the warm-up.
        errors: pixel MSE of each step, with the warm-up.
    """

    setup: Setup
    engine: Engine
    seconds: NDArray[np.float64]
    errors: list[float]


def _take_steps(run: Setup, n_tiles: int, n_steps: int, cache: SceneCache | None) -> _Steps:
    """Steps of ``n_tiles``: in the parts of the config if this is its batch size, else all at a time.

    Args:
        run: as it is to be.
        n_tiles: per step; so many tiles are validated, too.
        n_steps: that are timed, after the warm-up.
        cache: of the training scenes; None reads tiles from the store.
    """
    parts = run.config.training.gradient_accumulation if n_tiles == run.config.data.batch_size else 1
    config = changed(
        run.config,
        # the cache is in memory already, so that set_up must not look for room for it again
        data={"batch_size": n_tiles, "n_val_tiles": min(n_tiles, run.config.data.n_val_tiles), "cache": False},
        training={"gradient_accumulation": parts, "device": str(run.device)},
    )
    setup = set_up(config, Ranks(), Console(quiet=True))
    engine = Engine(setup.model, config, setup.device, setup.ranks, setup.supervision)
    batches = iter(setup.stream(0, config.data.num_workers, cache))
    seconds, errors = np.zeros((n_steps, 3)), list[float]()
    with new_progress() as progress:
        for i in progress.track(range(-WARM_UP, n_steps), description=f"measuring steps of {n_tiles} tiles"):
            clock = [time.perf_counter()]
            batch = next(batches)
            clock.append(time.perf_counter())
            sums, norm = engine.gradients(batch)  # waits for the device
            errors.append(means(sums)["pixel_mse"])
            clock.append(time.perf_counter())
            engine.update(norm, max(i, 0))
            if setup.device.type == "cuda":
                torch.cuda.synchronize(setup.device)
            clock.append(time.perf_counter())
            if i >= 0:
                seconds[i] = np.diff(clock)
    return _Steps(setup, engine, seconds, errors)


def measure_steps(setup: Setup) -> Check:
    """Seconds and memory of real steps, and seconds of all else that a run does.

    On a CPU where a batch would take too long or too much memory, fewer tiles are measured, and the results scaled.

    Raises:
        RunError: the network diverges.
    """
    config, device = setup.config, setup.device
    batch_size, at_a_time = config.data.batch_size, check_shares(config, setup.ranks)
    tile_bytes = setup.store.dtype.itemsize * math.prod(setup.settings["shape"])
    cache, costs = None, dict[str, float]()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if config.data.cache:
        began = time.perf_counter()
        # a console that shows the progress bar on stderr, but prints nothing to stdout, where --json prints its object
        cache = load_scenes(setup.store, setup.sampler.scenes, device, Console(file=io.StringIO()))
        costs["cache"] = time.perf_counter() - began
    n, peak_of_one = batch_size, 0
    if device.type == "cpu":
        before, free = _resident_bytes(), available_memory(device)
        seconds_of_one = _take_steps(setup, 1, 1, cache).seconds[0].sum()
        peak_of_one = peak_memory(device)
        affordable = CPU_SECONDS / (WARM_UP + TIMED) / seconds_of_one
        affordable = min(affordable, 0.5 * free / max(peak_of_one - before, 1))
        if affordable < batch_size:
            n = min(max(2, int(affordable)), at_a_time)  # memory grows evenly from one tile to two and on
    steps = _take_steps(setup, n, TIMED, cache)
    peak = float(peak_memory(device))
    if n < batch_size:
        queued = (1 + BATCHES_AHEAD) * tile_bytes * (batch_size - at_a_time)
        peak = peak_of_one + (peak - peak_of_one) / max(n - 1, 1) * (at_a_time - 1) + queued
    if config.data.cache:
        peak += tile_bytes * len(setup.validation.crops)
    first, last = steps.errors[0], steps.errors[-1]
    if not last < DIVERGED * first:  # so that NaN is refused, too
        problem = f"pixel MSE went from {first:.4g} to {last:.4g} in {len(steps.errors)} steps"
        raise RunError(problem, key="optimizer.lr", value=config.optimizer.lr, remedy="lower it")
    per_step = steps.seconds * [batch_size / n, batch_size / n, 1]  # an update takes as long for any batch
    seconds = float(np.median(per_step.sum(1)))
    waiting = float(per_step[:, 0].sum() / per_step.sum())
    how = f"measured with {n} tiles, scaled to {batch_size}" if n < batch_size else f"{batch_size} tiles each"
    text = (
        f"{seconds:.3g} s a step ({how}; median of {TIMED}), {batch_size / seconds:.3g} tiles/s, "
        f"{waiting:.0%} of the time waiting for data"
    )
    figures = {
        "seconds_per_step": seconds,
        "tiles_per_second": batch_size / seconds,
        "waiting_share": waiting,
        "measured_tiles": n,
        "tiles": batch_size,
        "peak_bytes": int(peak),
        "seconds_of": costs | _measure_costs(steps, len(setup.validation.crops)),
    }
    return Check(True, text, figures)


def _resident_bytes() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) * 1024


def _measure_costs(steps: _Steps, n_val_tiles: int) -> dict[str, float]:
    """Seconds of a validation of ``n_val_tiles``, of a figure of reconstructions, and of a checkpoint.

    Curves and page are left out: a run draws them in at most 2 % of its time.
    """
    setup, engine, costs = steps.setup, steps.engine, dict[str, float]()
    validation, of_checkpoint = setup.validation, (engine.model, setup.settings, setup.store.normalization)
    with TemporaryDirectory(prefix="spectralvae-doctor-") as name, new_progress() as progress:
        folder = Path(name)
        works: dict[str, Callable[[], object]] = {
            "figure": lambda: save_figure(validation.draw(engine, 0), folder / "figure.png"),
            "checkpoint": lambda: save_checkpoint(
                folder, 0, *of_checkpoint, engine.optimizer, {}, supervision=setup.supervision
            ),
        }
        if validation.crops:
            validation.run(engine)  # warms up
            works["validation"] = lambda: validation.run(engine)
        for kind, work in progress.track(list(works.items()), description="validation, figure and checkpoint"):
            began = time.perf_counter()
            work()
            costs[kind] = time.perf_counter() - began
    if validation.crops:
        costs["validation"] *= n_val_tiles / len(validation.crops)
    return costs


def forecast_memory(setup: Setup, steps: Check) -> Check:
    """The peak of the measured steps against the memory that is available.

    Args:
        setup: of the run.
        steps: by ``measure_steps``.
    """
    device, peak = setup.device, steps.figures["peak_bytes"]
    # what this process holds is free again when training begins
    mine = torch.cuda.memory_reserved(device) if device.type == "cuda" else _resident_bytes()
    free = available_memory(device) + mine
    text = f"{in_bytes(peak)} at the peak, {in_bytes(free)} available on {device}"
    if setup.config.data.cache:
        text += "; the peak includes the scenes of data.cache"
    figures = {"peak_bytes": peak, "available_bytes": free}
    if peak > free:
        remedy = "raise training.gradient_accumulation, or lower data.batch_size"
        remedy += ", or leave data.cache false" if setup.config.data.cache else ""
        return Check(False, f"{text}: too little; {remedy}", figures)
    return Check(True, text + (": tight" if peak > 0.9 * free else ""), figures)


def forecast_hours(setup: Setup, steps: Check) -> Check:
    """How long the run takes from its newest checkpoint to its end, in one process.

    Args:
        setup: of the run.
        steps: by ``measure_steps``.
    """
    training, costs = setup.config.training, steps.figures["seconds_of"]
    n_steps = training.n_steps
    done = max(map(step_of, list_checkpoints(setup.config.output_dir)), default=0)

    def due(*every: int) -> int:
        """How often something is due at multiples of these, and at the end."""
        return len({n_steps}.union(*(range(done - done % each + each, n_steps, each) for each in every)))

    times = {
        "cache": 1,
        "validation": (done == 0) + due(training.val_every, training.save_every),
        "figure": due(training.save_every),
        "checkpoint": due(training.save_every),
    }
    times = {name: times[name] for name in costs}
    hours = {"steps": (n_steps - done) * steps.figures["seconds_per_step"] / 3600}
    hours |= {name: times[name] * costs[name] / 3600 for name in costs}
    total = sum(hours.values())
    shares = ", ".join(f"{name} {hours[name] / total:.0%}" for name in hours)
    once = ", ".join(f"{name} {in_time(seconds)}" for name, seconds in costs.items())
    text = f"{in_time(3600 * total)} for {n_steps - done:,} steps in one process: {shares}\n(each: {once})"
    return Check(True, text, {"hours": total, "hours_of": hours, "seconds_of": costs, "times": times})


# --- whether it learns, and resumes -----------------------------------------------------------------


def overfit(setup: Setup) -> Check:
    """Whether the fresh network, without dropout, learns one small batch far better than the best constant spectrum.

    Its output begins as 0, so the first error must be the mean square of the data, over the samples that the store's
    table calls valid.
    """
    scale: int = setup.model.scale
    cells = max(4, setup.config.model.conv_kernel_size, -(-16 // scale))  # small, but enough for any padding
    tile = setup.config.data.tile_size
    size = min(tile, scale * cells)
    # attention is chosen by the size of a level, which shrinks with the tile
    attn_sizes = [n * size // tile for n in setup.config.model.attn_sizes if n * size % tile == 0]
    config = changed(
        setup.config,
        data={"batch_size": OVERFIT_TILES, "tile_size": size, "cache": False},
        model={"dropout_prob": 0.0, "shape": None, "attn_sizes": attn_sizes},
        optimizer={"lr": OVERFIT_LR, "warmup_steps": 0, "decay_steps": None},
        training={"gradient_accumulation": 1, "compile": False, "device": str(setup.device)},
    ).model_copy(update={"supervision": None})
    trial = set_up(config, Ranks(), Console(quiet=True))
    batch = next(iter(trial.stream(0, 0)))
    z = batch.tiles.double()
    of_zero = float(z.square().nanmean())
    of_spectrum = float((z - z.nanmean((1, 2), keepdim=True)).square().nanmean())
    n_valid = z.numel() - sum(trial.store.count_invalid(c.scene, c.y, c.x, size) for c in batch.crops)
    limit = OVERFIT_SHARE * min(of_zero, of_spectrum)
    engine, errors = Engine(trial.model, config, trial.device, trial.ranks), list[float]()
    with new_progress() as progress:
        for step in progress.track(range(OVERFIT_STEPS + 1), description="overfitting one batch"):
            sums, norm = engine.gradients(batch)
            errors.append(means(sums)["pixel_mse"])
            if errors[-1] < limit or not math.isfinite(errors[-1]):
                break
            engine.update(norm, step)
    figures = {"first": errors[0], "last": errors[-1], "steps": len(errors) - 1, "limit": limit}
    text = (
        f"pixel MSE of {OVERFIT_TILES} tiles of {size} x {size} pixels: {errors[0]:.4g} -> {errors[-1]:.4g} in "
        f"{len(errors) - 1} steps with lr {OVERFIT_LR:g}"
    )
    if int(sums["pixel_mse"][1]) != n_valid:
        return Check(False, f"{text}: the loss counts {int(sums['pixel_mse'][1])} of {n_valid} valid samples", figures)
    if not np.isclose(errors[0], of_zero, rtol=1e-3):
        return Check(False, f"{text}: an untrained network must begin at the mean square, {of_zero:.4g}", figures)
    text += f" (limit {limit:.4g}: half the error of a constant spectrum)"
    return Check(errors[-1] < limit, text, figures)


def resume(setup: Setup) -> Check:
    """Whether a run that is stopped and resumed in a fresh process ends with the bytes of one that never stopped.

    All is as the config says, but for few steps of a small batch.

    Raises:
        ConfigError: the temporary folder is too small.
        RunError: a run failed.
    """
    config, files = setup.config, ["metrics.jsonl"]
    heads = ("supervision", "supervision_optimizer") if setup.supervision is not None else ()
    of_checkpoint = [*(f"{name}.safetensors" for name in ("model", "optimizer", *heads)), "trainer.json"]
    files += [str(checkpoint_path(Path(), STEPS) / name) for name in of_checkpoint]
    n_parts = min(config.training.gradient_accumulation, 2)
    at_a_time = min(config.data.batch_size // config.training.gradient_accumulation, 2)
    data = {"batch_size": n_parts * at_a_time, "n_val_tiles": 2, "cache": False}  # the cache changes no result
    every = {"save_every": STOP_AT, "val_every": STOP_AT, "plot_every": STEPS, "log_every": 1}
    with TemporaryDirectory(prefix="spectralvae-doctor-") as folder:
        needed, free = CHECKPOINTS * checkpoint_bytes(setup) + OTHER_BYTES, shutil.disk_usage(folder).free
        if free < needed:
            problem = f"{in_bytes(free)} are free, temporary files need {in_bytes(needed)}"
            raise ConfigError(problem, path=Path(folder).parent, remedy="set TMPDIR to a folder on a larger disk")
        whole, stopped = Path(folder) / "whole", Path(folder) / "stopped"
        path = Path(folder) / "train.yaml"
        with new_progress() as progress:
            runs = [(whole, STEPS), (stopped, STOP_AT), (stopped, STEPS)]
            for output_dir, n_steps in progress.track(runs, description="stopping a run and resuming it"):
                more = {"n_steps": n_steps, "gradient_accumulation": n_parts, "device": str(setup.device)}
                short = changed(config, data=data, training={**every, **more})
                path.write_text(to_yaml(dump_config(short.model_copy(update={"output_dir": output_dir}))))
                done = subprocess.run([*TRAIN, path], stdin=subprocess.DEVNULL, capture_output=True, check=False)
                if done.returncode:
                    *_, line = ["no message", *done.stderr.decode(errors="replace").strip().splitlines()]
                    raise RunError(f"`train` ended with exit code {done.returncode}: {line}")
        from_step = json.loads((stopped / "run.json").read_text())["starts"][-1]["from_step"]
        differing = [name for name in files if (whole / name).read_bytes() != (stopped / name).read_bytes()]
        deviation = _moments_deviation(checkpoint_path(whole, STEPS), checkpoint_path(stopped, STEPS))
    figures = {"from_step": from_step, "differing": differing, "moments": deviation}
    text = f"a run that was stopped at step {STOP_AT} of {STEPS} resumed from step {from_step}"
    if from_step != STOP_AT:
        return Check(False, f"{text}, not from its checkpoint", figures)
    if not differing:
        same = "weights, optimizer and metrics are bit-identical to those of an uninterrupted run"
        return Check(True, f"{text}: {same}", figures)
    ok = setup.device.type == "cuda" and deviation <= CUDA_LIMIT
    names = ", ".join(Path(name).name for name in differing)
    text += f"; {names} differ from a run that was not, the optimizer's moments by {deviation:.2g}"
    if ok:
        text += f": expected, as cuDNN may round differently from start to start (limit {CUDA_LIMIT:g})"
    return Check(ok, text, figures)


def _moments_deviation(expected: Path, found: Path) -> float:
    """Relative deviation (of norms) of all first or all second moments of two checkpoints, the larger of the two.

    Infinite if the numbers of updates differ, which is more than rounding.
    """
    a, b = (load_file(folder / "optimizer.safetensors") for folder in (expected, found))
    if a.keys() != b.keys() or any((a[name] != b[name]).any() for name in a if name.startswith("step.")):
        return math.inf
    deviations = []
    for kind in ("exp_avg.", "exp_avg_sq."):
        names = [name for name in a if name.startswith(kind)]
        squares = sum(float(np.square(a[name] - b[name], dtype=np.float64).sum()) for name in names)
        deviations.append(math.sqrt(squares / sum(float(np.square(a[name], dtype=np.float64).sum()) for name in names)))
    return max(deviations)
