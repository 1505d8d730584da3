"""`spectralvae doctor`: tries out a train config, its store and this machine; one page, and nothing is changed."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console

from spectralvae.config import TrainConfig, may_change_on_resume
from spectralvae.data.loader import read_crops
from spectralvae.errors import ConfigError, RunError, SpectralvaeError
from spectralvae.runtime.ranks import find_ranks
from spectralvae.runtime.rundir import RunDir
from spectralvae.runtime.signals import stop_at_once
from spectralvae.training import proofs, record, trials
from spectralvae.training.engine import idle_parameters, out_of_memory
from spectralvae.training.network import start_from
from spectralvae.training.trainer import admit
from spectralvae.training.trials import Check, Patient, in_bytes
from spectralvae.weights.artifact import verify
from spectralvae.weights.checkpoint import list_checkpoints, step_of
from spectralvae.weights.settings import construct

MARKS = {True: "✓", False: "✗", None: "-"}
TILES_LOOKED_AT = 8


def doctor(config: TrainConfig, *, as_json: bool, console: Console) -> None:
    """Examine a training run before it begins, and print what was found.

    Args:
        config: of the run.
        as_json: print one JSON object.
        console: to print on.

    Raises:
        ConfigError, InputError: config, store or initial weights will not do.
        RunError: a check failed.
        Stopped: a signal came.
    """
    with stop_at_once(), TemporaryDirectory(prefix="spectralvae-doctor-") as scratch, _compiled_in(Path(scratch)):
        patient = _admit(config, Path(scratch))
        proofs.check_room(patient)
        machine = record.describe_device(patient.device)
        if not as_json:
            console.print(f"{machine}; torch {record.versions()['torch']}")
        checks: dict[str, Check] = {}
        for name, examine, needs in EXAMINATIONS:
            checks[name] = _examine(name, examine, patient, [need for need in needs if not checks[need].ok])
            if not as_json:
                _show(checks[name], console)
    wrong = [name for name, check in checks.items() if not check.ok]
    if as_json:
        found = {name: {"ok": c.ok, "text": c.text, "figures": _plain(c.figures)} for name, c in checks.items()}
        console.print_json(json.dumps({"ok": not wrong, "machine": machine, "checks": found}))
    if wrong:
        raise RunError(f"doctor: failed checks: {', '.join(wrong)}")


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _admit(config: TrainConfig, scratch: Path) -> Patient:
    """Set up what `train` sets up before it touches its directory: what it refuses is refused here."""
    ranks = find_ranks()
    if ranks.world_size > 1:
        raise ConfigError(f"doctor starts its own processes: start it once, not {ranks.world_size} times")
    t = admit(config, ranks, Console(quiet=True))
    if config.training.init_from is not None:
        start_from(t.model, t.settings, config.training.init_from)
    # weights, and two moments of those that are trained; statistics and text are small beside them
    idle = sum(parameter.numel() for parameter in idle_parameters(t.model))
    of_head = sum(parameter.numel() for parameter in t.supervision.parameters()) if t.supervision is not None else 0
    n_bytes = 4 * (3 * (t.n_parameters + of_head) - 2 * idle)
    return Patient(config, t.settings, t.store, t.device, t.sampler, t.validation, n_bytes, scratch)


@contextmanager
def _compiled_in(folder: Path) -> Iterator[None]:
    """Let torch.compile keep what it compiles in ``folder``, in this process and in those that it starts."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    os.environ[name] = str(folder / "compiled")
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _examine(name: str, examine: Callable[[Patient], Check], patient: Patient, lacking: Sequence[str]) -> Check:
    if lacking:
        return Check(name, None, f"not tried: needs {', '.join(lacking)}")
    try:
        return examine(patient)
    except SpectralvaeError as error:
        return Check(name, False, str(error))
    except torch.OutOfMemoryError:
        return Check(name, False, str(out_of_memory(patient.config, patient.device)))


def _show(check: Check, console: Console) -> None:
    first, *more = check.text.splitlines()
    console.print(f"{MARKS[check.ok]} {check.name:{_NAME_WIDTH}s} {first}")
    for line in more:
        console.print(f"{'':{_NAME_WIDTH + 3}s}{line}")


# --- what can be seen without trying ----------------------------------------------------------------


def _check_store(p: Patient) -> Check:
    """Its files are there: sampler and validation have looked."""
    tile, scenes = p.config.data.tile_size, [p.store.scenes[i] for i in p.sampler.scenes]
    positions = 0
    for ny, nx, piece in ((*scene.shape[:2], scene.stack or scene.shape[0]) for scene in scenes):
        positions += ny // piece * (piece - tile + 1) * (nx - tile + 1)
    invalid = sum(scene.n_invalid for scene in scenes) / sum(int(np.prod(scene.shape)) for scene in scenes)
    crops = [p.sampler.crop(i) for i in range(TILES_LOOKED_AT)]
    tiles = read_crops(p.store, crops, tile).double().numpy()
    z, n = tiles[np.isfinite(tiles)], p.store.normalization
    problems = []
    if bad := int((~(n.std > 0) & ~np.isnan(n.mean)).sum()):
        problems.append(f"{bad} of {n.n_channels} channels have no spread")
    if np.isnan(n.mean).all():
        problems.append("no channel has statistics")
    if not len(z) or not z.std() > 0:
        problems.append(f"nothing varies in {TILES_LOOKED_AT} tiles")
    elif np.abs(z).max() > n.clip * 1.001:  # float16 rounds
        problems.append(f"z reaches {np.abs(z).max():.3g}, beyond its clip of {n.clip:g}")
    n_val = len(p.store.indices("val"))
    text = (
        f"{p.store.path}: {len(scenes)} training scenes ({positions:,} positions of tiles), {n_val} for validation "
        f"({len(p.validation.crops)} tiles)\n{invalid:.2%} of the training samples invalid, in {n.transform}"
    )
    if len(z):
        text += (
            f"; z of {TILES_LOOKED_AT} tiles: mean {z.mean():.3f}, std {z.std():.3f}, {z.min():.2f} to {z.max():.2f}"
        )
    text += f"\ndigests were not read: spectralvae inspect {p.store.path} --verify"
    figures = {
        "training_scenes": len(scenes),
        "validation_scenes": n_val,
        "positions": positions,
        "validation_tiles": len(p.validation.crops),
        "invalid_share": invalid,
    }
    if problems:
        text += f"\nwrong: {'; '.join(problems)}; prepare the store again"
    return Check("store", not problems, text, figures)


def _check_batch(p: Patient) -> Check:
    """The arithmetic has been checked; what it comes to."""
    batch, parts, tile = p.config.data.batch_size, p.config.training.gradient_accumulation, p.config.data.tile_size
    processes = [n for n in range(1, batch // parts + 1) if batch % (n * parts) == 0]
    text = f"{batch} tiles of {tile} x {tile} pixels a step, {batch // parts} at a time in one process"
    text += f"; can be shared by {', '.join(map(str, processes))} processes" if len(processes) > 1 else ""
    return Check("batch", True, text, {"batch_size": batch, "at_a_time": batch // parts, "processes": processes})


def _check_network(p: Patient) -> Check:
    """The forward pass of a batch has been tried on the meta device."""
    model = construct(p.settings, "meta")
    n = sum(parameter.numel() for parameter in model.parameters())
    idle = sum(parameter.numel() for parameter in idle_parameters(model))
    text = f"{n:,} parameters ({idle:,} of them without use, as in mltools); takes {p.settings['shape']}"
    if p.config.training.init_from is not None:
        text += f"; starts from {p.config.training.init_from}"
    return Check("network", True, text, {"parameters": n, "idle_parameters": idle})


def _check_output_dir(p: Patient) -> Check:
    """Whether `train` would take it; nothing is made.

    Raises:
        ConfigError: it would not.
        InputError: its newest checkpoint is corrupt.
    """
    path = p.config.output_dir
    run = RunDir("train", p.config, overwrite=False, resumable=True, may_differ=may_change_on_resume)
    if run.in_use():
        raise ConfigError("is in use by a running `train`", key="output_dir", value=path)
    if run.record.get("store_hash", p.store.hash) != p.store.hash:
        raise ConfigError(
            f"holds a run on a store other than {p.store.path}: its hash differs", key="output_dir", value=path
        )
    checkpoints = list_checkpoints(path)
    if run.finished:
        return Check(
            "output_dir", True, f"{path}: holds this run, finished; `train` will do nothing", {"state": "finished"}
        )
    if not run.resuming:
        return Check("output_dir", True, f"{path}: free", {"state": "free"})
    if checkpoints:
        verify(checkpoints[-1])
    text = f"{path}: holds this run (state: {run.record['state']}); `train` goes on"
    text += f" from {checkpoints[-1].name}" if checkpoints else " from the start: there is no checkpoint yet"
    return Check("output_dir", True, text, {"state": run.record["state"], "checkpoints": len(checkpoints)})


def _check_disk(p: Patient) -> Check:
    training, path = p.config.training, p.config.output_dir
    checkpoints = list_checkpoints(path)
    done = step_of(checkpoints[-1]) if checkpoints else 0
    n = -(-training.n_steps // training.save_every) - done // training.save_every
    if training.keep_last is not None:
        kept = training.n_steps // training.keep_every if training.keep_every else 0
        stay = training.keep_last + kept + 1 - len(checkpoints)  # the best one, too
        n = min(n, max(stay, 0) + 1)  # an old one goes after the new one
    n = max(n, 1)
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    needed, free = n * p.checkpoint_bytes, shutil.disk_usage(nearest).free
    text = (
        f"{n} checkpoints of {in_bytes(p.checkpoint_bytes)} to come: {in_bytes(needed)}; "
        f"{in_bytes(free)} free on the disk of {nearest}"
    )
    if needed > free:
        text += ": too little; set training.keep_last, raise training.save_every, or make room"
    figures = {"checkpoints": n, "checkpoint_bytes": p.checkpoint_bytes, "needed_bytes": needed, "free_bytes": free}
    return Check("disk", needed <= free, text, figures)


Examination = tuple[str, Callable[[Patient], Check], Sequence[str]]
EXAMINATIONS: list[Examination] = [  # name, what to call, what must be well before
    ("store", _check_store, ()),
    ("batch", _check_batch, ()),
    ("network", _check_network, ()),
    ("output_dir", _check_output_dir, ()),
    ("disk", _check_disk, ()),
    ("steps", trials.measure_steps, ()),
    ("memory", trials.forecast_memory, ("steps",)),
    ("hours", trials.forecast_hours, ("steps",)),
    ("overfit", proofs.overfit, ()),
    ("processes", proofs.compare_processes, ()),
    ("resume", proofs.prove_resume, ()),
]
_NAME_WIDTH = max(len(name) for name, *_ in EXAMINATIONS)
