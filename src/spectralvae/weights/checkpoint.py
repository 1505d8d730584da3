"""Checkpoints of a run: write, find, restore, thin out."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from spectralvae.errors import DamagedError, InputError
from spectralvae.model import AutoencoderKL
from spectralvae.runtime.console import warn
from spectralvae.weights.artifact import (
    hidden_old,
    pack_model,
    pack_tensors,
    read_artifact,
    verify,
    write_folder,
)
from spectralvae.weights.normalization import Normalization
from spectralvae.weights.provenance import LatentStatistics, Provenance

_NAME = re.compile(r"step=(\d{6,})")
_HEAD = "supervision."  # before the names of the head's weights


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step={step:06d}"


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint or of a figure."""
    return int(path.stem.rpartition("step=")[2])


def list_checkpoints(run: Path) -> list[Path]:
    """All checkpoints of a run, by step; whether they are whole is not looked at."""
    found = [(int(m[1]), p) for p in (run / "checkpoints").glob("step=*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def save_checkpoint(
    run: Path,
    step: int,
    model: AutoencoderKL,
    settings: Mapping[str, Any],
    normalization: Normalization,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    latents: LatentStatistics | None = None,
    provenance: Provenance | None = None,
    supervision: nn.Module | None = None,
) -> Path:
    """Write the checkpoint of a step.

    Args:
        run: the run's directory.
        step: how many updates the weights have seen.
        model, settings, normalization: what `load_model` needs.
        optimizer: AdamW over ``model.parameters()`` and those of ``supervision``.
        state: whatever else the trainer wants back, as JSON values.
        latents, provenance: as of an `Artifact`.
        supervision: the head that is trained with the model; it has files of its own, which no model needs.

    Returns:
        Where it lies.
    """
    files = pack_model(model, settings, normalization, step, latents, provenance)
    files["optimizer.safetensors"] = pack_tensors(_moments(optimizer, model.named_parameters()))
    if supervision is not None:
        weights = {f"{_HEAD}{name}": p for name, p in supervision.named_parameters()}
        files["supervision.safetensors"] = pack_tensors(weights)
        files["supervision_optimizer.safetensors"] = pack_tensors(_moments(optimizer, weights.items()))
    files["trainer.json"] = (json.dumps({"step": step, **state}, indent=2) + "\n").encode()
    path = checkpoint_path(run, step)
    write_folder(path, files)
    for leftover in path.parent.glob(".step=*"):  # of a kill; only now, when what they may hold is not needed
        shutil.rmtree(leftover)
    return path


def _moments(optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """What the optimizer keeps of some parameters: "exp_avg.NAME", "exp_avg_sq.NAME", "step.NAME"."""
    return {
        f"{key}.{name}": value
        for name, parameter in parameters
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def newest_valid(run: Path, console: Console) -> Path | None:
    """The newest checkpoint that is whole, None if there is none.

    A damaged one is passed over with a warning: resuming is the one place where that is right, since the
    alternative is a run that cannot go on. It is renamed, or it would stay the run's newest, and `thin_out` would
    delete the good ones in its favour. One that is whole but cannot be used (of a newer format) ends the run.
    """
    path, corrupt = find_valid(run)
    for bad, error in corrupt:
        warn(console, f"corrupt checkpoint passed over: {error}")
        if path is None:
            continue
        aside = bad.with_name(f"damaged_{bad.name}")
        if aside.exists():
            shutil.rmtree(aside)
        bad.rename(aside)
        console.print(f"renamed to {aside}")
    return path


def find_valid(run: Path) -> tuple[Path | None, list[tuple[Path, DamagedError]]]:
    """The newest checkpoint that is whole, None if there is none; and those after it, which are corrupt."""
    corrupt = []
    for path in reversed(list_checkpoints(run)):
        try:
            verify(path)
        except DamagedError as error:
            corrupt.append((path, error))
        else:
            return path, corrupt
    return None, corrupt


def restore(
    path: Path, model: AutoencoderKL, optimizer: torch.optim.Optimizer, supervision: nn.Module | None = None
) -> dict[str, Any]:
    """Put weights and optimizer back as they were. There is no random state: all randomness is a function of the step.

    Args:
        path: the checkpoint.
        model: of the same settings, where and in the memory layout in which it is to train.
        optimizer: AdamW over ``model.parameters()`` and those of ``supervision``.
        supervision: the head that is trained with the model, where and in the layout in which it is to train.

    Returns:
        ``state`` as it was saved, with ``step``.

    Raises:
        InputError: the checkpoint is damaged, or an export, which holds no optimizer.
    """
    artifact, contents = read_artifact(path)
    if "optimizer.safetensors" not in contents:
        raise InputError("is an export without optimizer state: a run can start from it, but not resume", path=path)
    model.load_state_dict(artifact.model.state_dict())  # copies into the tensors that are there: layout kept
    optimizer.state.clear()
    _restore_moments(optimizer, model.named_parameters(), load_tensors(contents["optimizer.safetensors"]))
    if supervision is not None:
        parameters = {f"{_HEAD}{name}": p for name, p in supervision.named_parameters()}
        weights = load_tensors(contents["supervision.safetensors"])
        supervision.load_state_dict({key.removeprefix(_HEAD): weight for key, weight in weights.items()})
        moments = load_tensors(contents["supervision_optimizer.safetensors"])
        _restore_moments(optimizer, parameters.items(), moments)
    state: dict[str, Any] = json.loads(contents["trainer.json"])
    return state


def _restore_moments(
    optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[str, nn.Parameter]], moments: Mapping[str, Tensor]
) -> None:
    """The inverse of ``_moments``."""
    for name, parameter in parameters:
        if f"step.{name}" not in moments:
            continue  # never had a gradient
        # AdamW steps, as its state is kept, want "step" as it is, and the moments laid out as the parameter:
        # contiguous moments beside a channels_last parameter give wrong updates without an error.
        entries = {"step": moments[f"step.{name}"]}
        if optimizer.defaults.get("fused"):
            entries["step"] = entries["step"].to(parameter.device)
        for key in ("exp_avg", "exp_avg_sq"):
            entries[key] = torch.empty_like(parameter).copy_(moments[f"{key}.{name}"])
            assert entries[key].stride() == parameter.stride()
        optimizer.state[parameter] = entries


def best_of(run: Path, losses: Mapping[int, float]) -> int | None:
    """The step of the checkpoint of least validation loss; None if none was validated."""
    return min(
        (step for step in map(step_of, list_checkpoints(run)) if step in losses), key=losses.__getitem__, default=None
    )


def thin_out(run: Path, keep_last: int | None, keep_every: int | None, best: int | None) -> None:
    """Delete old checkpoints; the newest was verified when it was written, or `newest_valid` has renamed it.

    Args:
        run: the run's directory.
        keep_last: keep so many newest; None keeps all.
        keep_every: keep those at multiples of this, too.
        best: keep the one of this step, too.
    """
    if keep_last is None:
        return
    for path in list_checkpoints(run)[:-keep_last]:
        step = step_of(path)
        if step != best and (keep_every is None or step % keep_every):
            doomed = hidden_old(path)
            path.rename(doomed)
            shutil.rmtree(doomed)
