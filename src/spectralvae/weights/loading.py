"""Models from wherever they are stored."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from spectralvae.errors import ConfigError, InputError
from spectralvae.model import AutoencoderKL
from spectralvae.weights import mltools
from spectralvae.weights.artifact import Artifact, is_artifact, read_artifact, verify
from spectralvae.weights.checkpoint import list_checkpoints

_ARTIFACT = "_spectralvae_artifact"


def load_model(path: str | PathLike[str], model: Mapping[str, Any] | None = None) -> AutoencoderKL:
    """Load a trained network.

    Args:
        path: a run directory (its newest checkpoint), one checkpoint, an export folder, or an mltools
            ``.pt`` / ``.ckpt`` file.
        model: for mltools files only: the `model:` section of a train config, as a dict. What the weights cannot
            tell must be in it: n_attention_heads, norm_groups, norm_eps, act, conv_padding_mode.

    Returns:
        The network in eval mode, on the CPU, in float32.

    Raises:
        InputError: the file is missing or damaged; nothing older is taken in its place, but named.
        ConfigError: ``model`` is missing, incomplete, or does not fit the weights.
    """
    artifact = load_artifact(path, model)
    if artifact.left_out:
        warnings.warn(f"{path}: left out, not part of the network: {', '.join(artifact.left_out)}", stacklevel=2)
    object.__setattr__(artifact.model, _ARTIFACT, artifact)  # a plain attribute, no part of the network
    return artifact.model


def artifact_of(model: AutoencoderKL) -> Artifact:
    """What a network was loaded with: normalisation, settings.

    Raises:
        ConfigError: it is not from `load_model`.
    """
    artifact = getattr(model, _ARTIFACT, None)
    if not isinstance(artifact, Artifact):
        problem = "is not from load_model, so its normalisation is unknown"
        raise ConfigError(problem, key="model", remedy="load it from a folder")
    return artifact


def load_artifact(path: str | PathLike[str], model: Mapping[str, Any] | None = None) -> Artifact:
    """As `load_model`, with the normalisation, the settings and the step.

    Args:
        path, model: as of `load_model`.

    Raises:
        InputError, ConfigError: as `load_model`.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError("no such file or folder", path=path)
    if path.is_file():
        network, settings, weights = mltools.load_foreign(path, model)
        return Artifact(network, settings, None, None, path, weights.left_out)
    checkpoints = [] if is_artifact(path) else list_checkpoints(path)
    if not checkpoints and not is_artifact(path):
        raise InputError("is neither a checkpoint nor an export folder, nor a run with checkpoints/", path=path)
    if model is not None:
        problem = "is for mltools files only; this source holds its own settings"
        raise ConfigError(problem, key="model", path=path, remedy="leave it out")
    folder = checkpoints[-1] if checkpoints else path
    try:
        return read_artifact(folder)[0]
    except InputError as error:
        remedies = [remedy for remedy in (error.remedy, _remedy(folder)) if remedy]
        raise error.with_parts(remedy="; ".join(remedies) or None) from error


def _remedy(damaged: Path) -> str | None:
    """Which older checkpoint of the same run is good; None for an export."""
    damaged = damaged.absolute()
    checkpoints = list_checkpoints(damaged.parent.parent)
    if damaged not in checkpoints:
        return None
    for checkpoint in reversed(checkpoints[: checkpoints.index(damaged)]):
        try:
            verify(checkpoint)
        except InputError:
            continue
        return f"the newest good checkpoint before it is {checkpoint}"
    return "no older checkpoint is good"
