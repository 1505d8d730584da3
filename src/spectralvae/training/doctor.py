"""`spectralvae doctor`: tries out a train config, its store and this machine; one page, and nothing is changed."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console

from spectralvae.config import TrainConfig
from spectralvae.data.loader import read_crops
from spectralvae.errors import ConfigError, RunError, SpectralvaeError
from spectralvae.runtime.ranks import find_ranks
from spectralvae.runtime.rundir import RunDir
from spectralvae.runtime.signals import stop_at_once
from spectralvae.training import record, trials
from spectralvae.training.engine import idle_parameters, out_of_memory
from spectralvae.training.network import start_from
from spectralvae.training.setup import Setup, set_up
from spectralvae.training.trials import Check, checkpoint_bytes, in_bytes
from spectralvae.weights.checkpoint import find_valid, list_checkpoints, step_of

MARKS = {True: "✓", False: "✗", None: "-"}
TILES_READ = 8


def doctor(config: TrainConfig, *, as_json: bool, console: Console) -> None:
    """Check a training run before it begins, and print the results.

    Args:
        config: of the run.
        as_json: print one JSON object.
        console: to print on.

    Raises:
        ConfigError, InputError: `train` would refuse config, store or initial weights.
        RunError: a check failed.
        Stopped: a signal came.
    """
    with stop_at_once(), _temporary_compile_cache():
        ranks = find_ranks()
        if ranks.world_size > 1:
            raise ConfigError(
                f"doctor runs in one process, not in {ranks.world_size}", remedy="start it without torchrun or srun"
            )
        setup = set_up(config, ranks, Console(quiet=True))
        if config.training.init_from is not None:
            start_from(setup.model, setup.settings, config.training.init_from)
        machine = record.describe_device(setup.device)
        if not as_json:
            console.print(f"{machine}; torch {record.versions()['torch']}")
        checks: dict[str, Check] = {}
        width = max(len(name) for name, *_ in CHECKS)
        for name, examine, needs in CHECKS:
            try:
                if failed := [need for need in needs if not checks[need].ok]:
                    checks[name] = Check(None, f"not tried: needs {', '.join(failed)}")
                else:
                    checks[name] = examine(setup, *(checks[need] for need in needs))
            except SpectralvaeError as error:
                checks[name] = Check(False, str(error))
            except torch.OutOfMemoryError:
                checks[name] = Check(False, str(out_of_memory(config, setup.device)))
            # or the network of a check, which is part of a cycle once it is compiled, would take the next one's memory
            gc.collect()
            torch.cuda.empty_cache()
            if not as_json:
                mark, text = MARKS[checks[name].ok], checks[name].text.replace("\n", f"\n{'':{width + 3}s}")
                console.print(f"{mark} {name:{width}s} {text}")
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


@contextmanager
def _temporary_compile_cache() -> Iterator[None]:
    """Let torch.compile write to a temporary folder, in this process and in those that it starts."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with TemporaryDirectory(prefix="spectralvae-doctor-") as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before


# --- the checks that take no step -------------------------------------------------------------------


def check_config(setup: Setup) -> Check:
    """The network, and how a batch can be shared out; ``set_up`` has refused what is wrong."""
    config = setup.config
    batch, parts, tile = config.data.batch_size, config.training.gradient_accumulation, config.data.tile_size
    processes = [n for n in range(1, batch // parts + 1) if batch % (n * parts) == 0]
    idle = sum(parameter.numel() for parameter in idle_parameters(setup.model))
    text = f"{setup.n_parameters:,} parameters ({idle:,} of them unused, as in mltools)"
    if config.training.init_from is not None:
        text += f"; starts from {config.training.init_from}"
    text += f"\n{batch} tiles of {tile} x {tile} pixels per step, {batch // parts} at a time in one process"
    if len(processes) > 1:
        text += f"; can be shared by {', '.join(map(str, processes))} processes"
    figures = {
        "parameters": setup.n_parameters,
        "idle_parameters": idle,
        "batch_size": batch,
        "at_a_time": batch // parts,
        "processes": processes,
    }
    return Check(True, text, figures)


def check_store(setup: Setup) -> Check:
    """Statistics and a few tiles of the store, all of whose files ``set_up`` has found."""
    store, n = setup.store, setup.store.normalization
    tile, scenes = setup.config.data.tile_size, [store.scenes[i] for i in setup.sampler.scenes]
    positions = 0
    for ny, nx, piece in ((*scene.shape[:2], scene.stack or scene.shape[0]) for scene in scenes):
        positions += ny // piece * (piece - tile + 1) * (nx - tile + 1)
    invalid = sum(scene.n_invalid for scene in scenes) / sum(math.prod(scene.shape) for scene in scenes)
    tiles = read_crops(store, [setup.sampler.crop(i) for i in range(TILES_READ)], tile).double().numpy()
    z = tiles[np.isfinite(tiles)]
    problems = []
    if bad := int((~(n.std > 0) & ~np.isnan(n.mean)).sum()):
        problems.append(f"{bad} of {n.n_channels} channels have no spread")
    if np.isnan(n.mean).all():
        problems.append("no channel has statistics")
    if not len(z) or not z.std() > 0:
        problems.append(f"all samples of {TILES_READ} tiles are equal")
    elif np.abs(z).max() > n.clip * 1.001:  # float16 rounds
        problems.append(f"z reaches {np.abs(z).max():.3g}, beyond its clip of {n.clip:g}")
    figures = {
        "training_scenes": len(scenes),
        "validation_scenes": len(store.indices("val")),
        "positions": positions,
        "validation_tiles": len(setup.validation.crops),
        "invalid_share": invalid,
    }
    text = (
        f"{store.path}: {len(scenes)} training scenes ({positions:,} positions of tiles), "
        f"{figures['validation_scenes']} for validation ({figures['validation_tiles']} tiles)\n"
        f"{invalid:.2%} of the training samples invalid, transform {n.transform}"
    )
    if len(z):
        text += f"; z of {TILES_READ} tiles: mean {z.mean():.3f}, std {z.std():.3f}, {z.min():.2f} to {z.max():.2f}"
    text += f"\ndigests are checked by `spectralvae inspect {store.path} --verify`"
    if problems:
        text += f"\nwrong: {'; '.join(problems)}; prepare the store again"
    return Check(not problems, text, figures)


def check_output_dir(setup: Setup) -> Check:
    """Whether `train` would use the directory; nothing is made.

    Raises:
        ConfigError: it would not.
        RunError: none of its checkpoints is valid.
    """
    path = setup.config.output_dir
    run = RunDir("train", setup.config, overwrite=False)
    if run.in_use():
        raise ConfigError("is in use by a running `train`", key="output_dir", value=path)
    record.check_store(run.record, setup.store)
    if run.opens_as == "finished":
        return Check(True, f"{path}: this run is finished; `train` has nothing to do", {"state": "finished"})
    if run.opens_as == "fresh":
        return Check(True, f"{path}: free", {"state": "free"})
    checkpoints = list_checkpoints(path)
    newest, corrupt = find_valid(path)
    if newest is None:
        record.check_never_saved(path, run.record)
    start = newest.name if newest else "the start, as there is no checkpoint yet"
    if corrupt:
        start += f", as {', '.join(bad.name for bad, _ in corrupt)} cannot be read"
    text = f"{path}: holds this run (state: {run.record['state']}); `train` resumes it from {start}"
    return Check(True, text, {"state": run.record["state"], "checkpoints": len(checkpoints)})


def check_disk(setup: Setup) -> Check:
    """Whether the checkpoints still to come fit on the disk of the output directory."""
    training, path = setup.config.training, setup.config.output_dir
    checkpoints, size = list_checkpoints(path), checkpoint_bytes(setup)
    done = step_of(checkpoints[-1]) if checkpoints else 0
    n = -(-training.n_steps // training.save_every) - done // training.save_every
    if training.keep_last is not None:
        kept = training.n_steps // training.keep_every if training.keep_every else 0
        stay = training.keep_last + kept + 1 - len(checkpoints)  # the best one, too
        n = min(n, max(stay, 0) + 1)  # an old one is deleted after the new one is written
    n = max(n, 1)
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    needed, free = n * size, shutil.disk_usage(nearest).free
    text = f"{n} checkpoints of {in_bytes(size)} to come: {in_bytes(needed)}; {in_bytes(free)} free at {nearest}"
    if needed > free:
        text += ": too little; set training.keep_last, raise training.save_every, or make room"
    figures = {"checkpoints": n, "checkpoint_bytes": size, "needed_bytes": needed, "free_bytes": free}
    return Check(needed <= free, text, figures)


CHECKS: list[tuple[str, Callable[..., Check], tuple[str, ...]]] = [  # name, function, the checks that it is given
    ("config", check_config, ()),
    ("store", check_store, ()),
    ("output_dir", check_output_dir, ()),
    ("disk", check_disk, ()),
    ("steps", trials.measure_steps, ()),
    ("memory", trials.forecast_memory, ("steps",)),
    ("hours", trials.forecast_hours, ("steps",)),
    ("overfit", trials.overfit, ()),
    ("resume", trials.resume, ()),
]
