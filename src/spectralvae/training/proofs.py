"""What can be proved in minutes: that the network learns, that two processes compute what one does, and that a killed
run goes on exactly."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from spectralvae.config import TrainConfig
from spectralvae.config.loading import dump_config, to_yaml
from spectralvae.data.loader import TileStream, make_sampler
from spectralvae.errors import ConfigError, RunError
from spectralvae.training.objective import means
from spectralvae.training.supervision import supervised_products
from spectralvae.training.trials import Check, Patient, changed, in_bytes
from spectralvae.weights.checkpoint import checkpoint_path

TRAIN = (sys.executable, "-m", "spectralvae", "train")
REHEARSAL = (sys.executable, "-m", "spectralvae.training.rehearsal")
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "GROUP_RANK", "TORCHELASTIC_", "SLURM_")  # who is who

OVERFIT_TILES = 2
OVERFIT_LR = 1e-3  # at 3e-3 the loss of the full network first rises
OVERFIT_STEPS = 150  # where tiles of pure noise took 40, real scenes 15 to 25
OVERFIT_SHARE = 0.5  # of the error to beat

GRADIENT_LIMIT = 1e-3  # float32 sums in another order differ by 1e-6 to 1e-4; a factor left out by 0.1 and more
LOSS_LIMIT = 1e-5

STEPS, SAVE_EVERY, KILL_AT = 4, 2, 3
PATIENCE = 3600.0  # seconds for a handful of steps: more, and a process hangs
TRIES = 3  # to kill a run before it ends
BESIDE = 50_000_000  # bytes of pictures, tables and what torch.compile keeps
CHECKPOINTS_AT_ONCE = 4  # two runs', of which the older one goes when the newer one is there
FILES = ("model.safetensors", "optimizer.safetensors", "trainer.json")
HEAD_FILES = ("supervision.safetensors", "supervision_optimizer.safetensors")
CUDA_LIMIT = 0.05  # of the optimizer's moments, where rounding may differ from start to start


# --- does it learn ----------------------------------------------------------------------------------


def overfit(p: Patient) -> Check:
    """Train the fresh network on one small batch, without dropout, until it beats the best constant spectrum by far.

    Its output begins as 0, so the first error must be the data's own; and the samples that count must be those that
    the store's table calls valid.

    Raises:
        RunError: memory ran out.
    """
    size, scenes = p.piece_size, p.sampler.scenes
    config = changed(
        p.config,
        data={"batch_size": OVERFIT_TILES, "tile_size": size},
        optimizer={"lr": OVERFIT_LR, "warmup_steps": 0, "decay_steps": None},
        training={"gradient_accumulation": 1, "compile": False},
    )
    invalid = p.config.data.max_invalid_fraction
    sampler = make_sampler(p.store, scenes, seed=config.seed, tile_size=size, max_invalid_fraction=invalid)
    noise_shape = p.noise_shape(size)
    batch = next(iter(TileStream(p.store, sampler, batch_size=OVERFIT_TILES, tile_size=size, noise_shape=noise_shape)))
    zero, mean = _constant_errors(batch.tiles.double().numpy())
    n_valid = batch.tiles.numel() - sum(p.store.count_invalid(c.scene, c.y, c.x, size) for c in batch.crops)
    limit = OVERFIT_SHARE * min(zero, mean)
    engine = p.fresh_engine(config, {**p.settings, "dropout_prob": 0.0})
    errors: list[float] = []
    with p.progress("overfitting one batch", OVERFIT_STEPS) as advance:
        while True:
            sums, norm = engine.gradients(batch)
            errors.append(means(sums)["pixel_mse"])
            if errors[-1] < limit or len(errors) > OVERFIT_STEPS or not np.isfinite(errors[-1]):
                break
            engine.update(norm, len(errors) - 1)
            advance()
    figures = {"first": errors[0], "last": errors[-1], "steps": len(errors) - 1, "limit": limit}
    text = (
        f"pixel MSE of {OVERFIT_TILES} tiles of {size} x {size} pixels: {errors[0]:.4g} -> {errors[-1]:.4g} in "
        f"{len(errors) - 1} steps with lr {OVERFIT_LR:g}"
    )
    if int(sums["pixel_mse"][1]) != n_valid:
        wrong = f"{int(sums['pixel_mse'][1])} samples count, but {n_valid} are valid"
    elif not np.isclose(errors[0], zero, rtol=1e-3):
        wrong = f"an untrained network must begin with the data's mean square, {zero:.4g}"
    elif not errors[-1] < limit:
        wrong = f"must fall below {limit:.4g} within {OVERFIT_STEPS} steps, half the error of a constant spectrum"
    else:
        return Check("overfit", True, f"{text} (limit {limit:.4g}: half the error of a constant spectrum)", figures)
    return Check("overfit", False, f"{text}: {wrong}", figures)


def _constant_errors(z: NDArray[np.float64]) -> tuple[float, float]:
    """Mean squared errors of predicting 0, and of each tile's mean spectrum: (B, y, x, channel), NaN = invalid."""
    valid = ~np.isnan(z)
    z = np.where(valid, z, 0.0)
    count = np.maximum(valid.sum((1, 2), keepdims=True), 1)
    from_mean = np.where(valid, z - z.sum((1, 2), keepdims=True) / count, 0.0)
    n = max(int(valid.sum()), 1)
    return float((z**2).sum() / n), float((from_mean**2).sum() / n)


# --- processes --------------------------------------------------------------------------------------


class _Child:
    """A process, and what it says on stderr."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log

    def complaint(self) -> str:
        """Why it failed."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"exit code {self.process.returncode}: {lines[-1] if lines else 'without a word'}"


@contextmanager
def _started(p: Patient, commands: Sequence[tuple[Sequence[str], Mapping[str, str]]]) -> Iterator[list[_Child]]:
    """Processes with more variables in their environment; none outlives the block."""
    base = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    children: list[_Child] = []
    try:
        for i, (command, variables) in enumerate(commands):
            log = p.scratch / f"stderr-{i}"
            with log.open("wb") as stderr:
                process = subprocess.Popen(
                    command,
                    env={**base, **variables},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    start_new_session=True,
                )
            children.append(_Child(process, log))
        yield children
    finally:
        for child in children:
            if child.process.poll() is None:
                os.killpg(child.process.pid, signal.SIGKILL)  # with what it has started itself
                child.process.wait()


def _wait(children: Sequence[_Child], until: Callable[[], bool] = lambda: False) -> None:
    """Until all have ended, or ``until`` says so.

    Raises:
        RunError: one failed, or hangs.
    """
    started = time.monotonic()
    while not until():
        if time.monotonic() - started > PATIENCE:
            raise RunError(f"a process has not ended after {PATIENCE:g} s: {children[0].process.args!r}")
        codes = [child.process.poll() for child in children]
        for child, code in zip(children, codes, strict=True):
            if code:
                raise RunError(child.complaint())
        if all(code == 0 for code in codes):
            return
        time.sleep(0.005)


def _write_config(path: Path, config: TrainConfig) -> str:
    path.write_text(to_yaml(dump_config(config)))
    return str(path)


# --- two processes ----------------------------------------------------------------------------------


def compare_processes(p: Patient) -> Check:
    """Gradients of one small step, without dropout, of two processes on the CPU, and of one.

    Raises:
        RunError: a process failed.
    """
    n_parts = min(p.config.training.gradient_accumulation, 2)
    config = changed(
        p.config,
        data={"batch_size": 2 * n_parts},
        training={
            "gradient_accumulation": n_parts,
            "compile": False,
            "precision": "32-true",
            "device": "cpu",
            "peer_timeout": 120.0,
        },
    )
    path, result = _write_config(p.scratch / "processes.yaml", config), p.scratch / "processes.json"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    who = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    who |= {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // 2))}
    command = (*REHEARSAL, path, str(p.piece_size), str(result))
    commands = [(command, {**who, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    with p.progress("gradients of two processes"), _started(p, commands) as children:
        _wait(children)
    found = json.loads(result.read_text())
    ok = found["gradient"] <= GRADIENT_LIMIT and found["loss"] <= LOSS_LIMIT
    text = (
        f"gradients of 2 processes and of 1 differ by at most {found['gradient']:.2g} in {found['tensors']} tensors "
        f"(limit {GRADIENT_LIMIT:g}), losses by {found['loss']:.2g} (limit {LOSS_LIMIT:g})"
    )
    if not ok:
        text += f": they must agree; worst: {found['tensor']}"
    return Check("processes", ok, text, {**found, "limit": GRADIENT_LIMIT, "loss_limit": LOSS_LIMIT})


# --- resume -----------------------------------------------------------------------------------------


def check_room(p: Patient) -> None:
    """Refuse to begin where the temporary folder is too small.

    Raises:
        ConfigError: it is.
    """
    needed, free = CHECKPOINTS_AT_ONCE * p.checkpoint_bytes + BESIDE, shutil.disk_usage(p.scratch).free
    if free < needed:
        raise ConfigError(
            f"{in_bytes(free)} are free, temporary files need {in_bytes(needed)}",
            path=p.scratch.parent,
            remedy="set TMPDIR to a larger disk",
        )


def prove_resume(p: Patient) -> Check:
    """A run that is killed after a checkpoint and started again, against one that was never interrupted.

    All is as the config says, but for a small batch and few steps.

    Raises:
        RunError: a run failed.
    """
    whole, killed = p.scratch / "whole", p.scratch / "killed"
    with p.progress("killing a run and going on", 3) as advance:
        with _started(p, [((*TRAIN, _write_config(p.scratch / "whole.yaml", _short(p, whole))), {})]) as children:
            _wait(children)
        advance()
        command = (*TRAIN, _write_config(p.scratch / "killed.yaml", _short(p, killed)))
        _run_and_kill(p, command, killed)
        advance()
        with _started(p, [(command, {})]) as children:
            _wait(children)
        advance()
    return _judge(p, whole, killed)


def _short(p: Patient, output_dir: Path) -> TrainConfig:
    n_parts = min(p.config.training.gradient_accumulation, 2)
    at_a_time = min(p.config.data.batch_size // p.config.training.gradient_accumulation, 2)
    every = {"save_every": SAVE_EVERY, "val_every": SAVE_EVERY, "plot_every": STEPS, "log_every": 1}
    kept = {"keep_last": 1, "keep_every": None}
    config = changed(
        p.config,
        data={"batch_size": n_parts * at_a_time, "n_val_tiles": 2},
        training={"gradient_accumulation": n_parts, "n_steps": STEPS, "device": str(p.device), **every, **kept},
    )
    return config.model_copy(update={"output_dir": output_dir})


def _run_and_kill(p: Patient, command: Sequence[str], run: Path) -> None:
    """SIGKILL once a step after a checkpoint is logged; again from the start if the run was faster."""
    metrics = run / "metrics.jsonl"
    for _ in range(TRIES):
        with _started(p, [(command, {})]) as [child]:
            _wait([child], lambda: metrics.is_file() and metrics.read_bytes().count(b"\n") > KILL_AT)
            child.process.kill()
            if child.process.wait() == -signal.SIGKILL:
                return
        shutil.rmtree(run)
    raise RunError(f"a run of {STEPS} steps ended {TRIES} times before it could be killed: is this machine overloaded?")


def _judge(p: Patient, whole: Path, killed: Path) -> Check:
    from_step = json.loads((killed / "run.json").read_text())["starts"][-1]["from_step"]
    of_checkpoint = FILES + HEAD_FILES if supervised_products(p.config) else FILES
    files = ["metrics.jsonl", *(f"checkpoints/step={STEPS:06d}/{name}" for name in of_checkpoint)]
    differing = [name for name in files if (whole / name).read_bytes() != (killed / name).read_bytes()]
    figures = {"from_step": from_step, "differing": differing, "moments": 0.0}
    what = f"a run that was killed at step {KILL_AT} of {STEPS} went on from step {from_step}"
    if from_step != SAVE_EVERY:
        return Check("resume", False, f"{what}, not from its checkpoint of step {SAVE_EVERY}", figures)
    if not differing:
        same = "weights, optimizer and metrics are byte-equal to those of a run that was not"
        return Check("resume", True, f"{what}: {same}", figures)
    figures["moments"] = deviation = _moments_deviation(*(checkpoint_path(run, STEPS) for run in (whole, killed)))
    ok = p.device.type == "cuda" and deviation <= CUDA_LIMIT
    names = ", ".join(Path(name).name for name in differing)
    text = f"{what}; {names} differ from a run that was not, the optimizer's moments by {deviation:.2g}"
    if ok:
        text += f": cuDNN may round otherwise from start to start; expected (limit {CUDA_LIMIT:g})"
    return Check("resume", ok, text, figures)


def _moments_deviation(expected: Path, found: Path) -> float:
    """Norm of the difference of all first or all second moments, by their norm; the larger of the two.

    Infinite if the counts of updates differ, which no rounding can do.
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
