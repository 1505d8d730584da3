"""What run.json, the page and a checkpoint say of where a run and its weights come from."""

from __future__ import annotations

import hashlib
import json
import platform
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spectralvae.data.sampling import Crop
from spectralvae.data.store import Store
from spectralvae.errors import ConfigError, RunError
from spectralvae.training.setup import Setup
from spectralvae.version import __version__
from spectralvae.weights.checkpoint import list_checkpoints
from spectralvae.weights.provenance import Provenance, Scenes


def versions() -> dict[str, str]:
    """Of all that decides about a result's bits."""
    found = {
        "spectralvae": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": platform.platform(),
    }
    if torch.version.cuda:
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        found |= {"cuda": torch.version.cuda, "cudnn": str(cudnn)}
    return found


def git_revision() -> str | None:
    """The revision of the sources that run, with "+changes" where they are not quite it; None if git has none."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            found = subprocess.run(["git", "-C", here.parent, *arguments], capture_output=True, text=True, check=False)
        except FileNotFoundError:  # no git on this machine
            return None
        return found.stdout.strip() if found.returncode == 0 else None

    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no", "..")
    return f"{git('rev-parse', 'HEAD')}{'+changes' if changed else ''}"


# how the forward pass is computed, by training.precision; changed wherever results would round otherwise
ARITHMETIC = {"32-true": "float32", "bf16-mixed": "bf16, posterior and reconstruction in float32"}
FORMER_ARITHMETIC = {"32-true": "float32", "bf16-mixed": "bf16"}  # of runs that did not note it


def environment(setup: Setup) -> dict[str, Any]:
    """Facts about a start that affect rounding, for run.json. A collective: every process must call it."""
    return {
        "arithmetic": ARITHMETIC[setup.config.training.precision],
        "versions": versions(),
        "git_revision": git_revision(),
        "n_processes": setup.ranks.world_size,
        "devices": setup.ranks.gather(describe_device(setup.device)),
    }


def describe_device(device: torch.device) -> str:
    """Machine, device and threads of this process."""
    if device.type == "cuda":
        name = f"{device} ({torch.cuda.get_device_name(device)})"
    else:
        name = f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})"
    return f"{socket.gethostname()}: {name}, {torch.get_num_threads()} threads"


def hash_of(config: Mapping[str, Any]) -> str:
    """SHA-256 of a config, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def check_store(run_record: Mapping[str, Any], store: Store) -> None:
    """Refuse to resume a run on another store.

    Raises:
        ConfigError: the run was made on a store with another hash.
    """
    if run_record.get("store_hash", store.hash) != store.hash:
        raise ConfigError("is not the store of this run: its hash differs", key="data.store", path=store.path)


def check_never_saved(run: Path, run_record: Mapping[str, Any]) -> None:
    """Refuse to start a run anew that has no valid checkpoint, but has saved some.

    Raises:
        RunError: they are corrupt or gone.
    """
    if list_checkpoints(run) or run_record.get("newest_checkpoint"):
        problem = "all checkpoints are corrupt" if list_checkpoints(run) else "every checkpoint is gone"
        remedy = "restore a valid one, or start afresh with --overwrite"
        raise RunError(problem, path=run / "checkpoints", remedy=remedy)


def other_tiles(state: Mapping[str, Any], crops: Sequence[Crop]) -> str | None:
    """What to warn of where versions differ in which validation tiles they choose; earlier ones did not note it."""
    if not crops or state.get("validation_tiles") == tiles_digest(crops):
        return None
    return (
        f"the validation tiles up to step {state['step']} were chosen by another version and may differ: val_* before "
        "and after are not comparable, nor is `best`; `spectralvae evaluate` compares all checkpoints on the same tiles"
    )


def tiles_digest(crops: Sequence[Crop]) -> str:
    """What a choice of tiles of a store is known by."""
    places = [[crop.scene, crop.y, crop.x] for crop in crops]
    return hashlib.sha256(json.dumps(places).encode()).hexdigest()[:16]


def rounding_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two starts that lets results round otherwise, in words.

    Args:
        before: run.json as the earlier start left it.
        now: as of ``environment``.
    """
    if not before.keys() >= {"versions", "n_processes", "devices"}:  # killed before it was noted
        return []
    former = FORMER_ARITHMETIC[before["config"]["training"]["precision"]]

    def decisive(facts: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "torch": facts["versions"]["torch"],
            "processes": facts["n_processes"],
            "devices": sorted(device.partition(": ")[2] for device in facts["devices"]),  # on whatever machine
            "arithmetic": facts.get("arithmetic", former),
        }

    old, new = decisive(before), decisive(now)
    return [f"{key}: {old[key]} before, {new[key]} now" for key in old if old[key] != new[key]]


def facts(setup: Setup, run_record: Mapping[str, Any], from_step: int) -> dict[str, str]:
    """What the page says of a run, by its label.

    Args:
        setup: of the run.
        run_record: its run.json.
        from_step: where this start resumes.
    """
    data, training, optimizer = setup.config.data, setup.config.training, setup.config.optimizer
    warmup = f", {optimizer.warmup_steps} steps of warm-up" if optimizer.warmup_steps else ""
    decay = f", cosine decay to 0 at step {optimizer.decay_steps:,}" if optimizer.decay_steps else ""
    return {
        "store": f"{setup.store.path} ({len(setup.store.indices('train'))} training scenes)",
        "parameters": f"{setup.n_parameters:,}",
        "batch": f"{data.batch_size} tiles of {data.tile_size} x {data.tile_size} pixels",
        "learning rate": f"{optimizer.lr:g}{warmup}{decay}",
        **({"supervision": setup.supervision.described} if setup.supervision is not None else {}),
        "precision": f"{training.precision}{', TF32' if training.tf32 else ''}",
        "devices": "; ".join(run_record["devices"]),
        "versions": ", ".join(f"{name} {version}" for name, version in run_record["versions"].items()),
        "git revision": str(run_record["git_revision"]),
        "seed": str(setup.config.seed),
        "start": f"number {len(run_record['starts'])}, from step {from_step}",
    }


def provenance(
    setup: Setup,
    run_record: Mapping[str, Any],
    *,
    metrics: dict[str, float] | None,
    baselines: dict[str, float] | None,
) -> Provenance:
    """What a checkpoint says of its training.

    Args:
        setup: of the run.
        run_record: its run.json, with what is known of the weights of `training.init_from`.
        metrics, baselines: as of a `Provenance`.
    """

    config, store = setup.config, setup.store
    initial = config.training.init_from is not None
    return Provenance(
        store=store.path.resolve().name,
        store_hash=store.hash,
        training=scenes_of(store, setup.sampler.scenes),
        validation=scenes_of(store, store.indices("val")),
        tile_size=config.data.tile_size,
        batch_size=config.data.batch_size,
        seed=config.seed,
        initial_weights=(run_record.get("initial_weights") or "unknown") if initial else None,
        n_val_tiles=len(setup.validation.crops),
        metrics=metrics,
        baselines=baselines,
        ancestors=run_record.get("ancestors") if initial else [],
    )


def scenes_of(store: Store, indices: Sequence[int]) -> Scenes:
    """What a checkpoint says of some scenes of a store."""
    records = [store.scenes[i] for i in indices]
    times = [record.time for record in records if record.time]
    return Scenes(
        n_scenes=len(records),
        n_sources=len({(record.source, record.sha256) for record in records}),
        identities=[record.identity for record in records],
        first=min(times, default=None),
        last=max(times, default=None),
        versions=sorted({record.version for record in records if record.version}),
    )
