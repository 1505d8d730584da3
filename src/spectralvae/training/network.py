"""The network of a run: its settings, and weights to start from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectralvae.config import TrainConfig
from spectralvae.config.loading import dump_config
from spectralvae.data.store import Store
from spectralvae.errors import ConfigError
from spectralvae.model import AutoencoderKL
from spectralvae.weights.artifact import Artifact
from spectralvae.weights.loading import load_artifact
from spectralvae.weights.settings import construct

# May differ between a run and the weights it starts from: they are no part of the weights' meaning. The first three
# decide which layers there are, but only together: the layers are compared instead.
FREE_SETTINGS = ("shape", "attn_sizes", "dropout_prob", "kl_weight", "nll_loss_type", "logvar_init")


def network_settings(config: TrainConfig, store: Store) -> dict[str, Any]:
    """The complete `model:` section: its shape follows from store and tile size.

    Args:
        config: of the run.
        store: the data.

    Raises:
        ConfigError: a given shape says otherwise.
    """
    settings = dump_config(config.model)
    shape = [store.normalization.n_channels, config.data.tile_size, config.data.tile_size]
    if settings["shape"] not in (None, shape):
        raise ConfigError(
            key="model.shape",
            value=settings["shape"],
            limit=f"{shape}, as the store's channels and data.tile_size give",
            remedy="leave it out",
        )
    return {**settings, "shape": shape}


def check_forward(settings: dict[str, Any], batch_size: int) -> None:
    """Run one batch through the network without memory or arithmetic (torch's meta device).

    Raises:
        ConfigError: the network cannot take it: padding wider than its smallest level, too few values to normalise.
    """
    try:
        network = construct(settings, "meta").train()
        network.get_loss(torch.empty(batch_size, *settings["shape"], device="meta"))
    except (ValueError, RuntimeError) as error:
        size = settings["shape"][-1]
        raise ConfigError(
            f"cannot take batches of {batch_size} tiles of {size} x {size} pixels ({error})",
            key="model",
            remedy="change data.tile_size, data.batch_size or the model",
        ) from error


def start_from(model: AutoencoderKL, settings: dict[str, Any], path: Path) -> Artifact:
    """Put the weights of another run, checkpoint, export or mltools file into the network.

    Args:
        model: takes the weights, into the tensors that it has.
        settings: its complete `model:` section.
        path: where the weights come from.

    Returns:
        The model that they came from, with the path of its checkpoint or file.

    Raises:
        InputError: ``path`` is missing or corrupt.
        ConfigError: it holds a different network.
    """
    source = load_artifact(path, settings if path.is_file() else None)
    differing = [
        f"{key}: {source.settings[key]} there, {settings[key]} here"
        for key in source.settings.keys() & settings.keys() - set(FREE_SETTINGS)
        if source.settings[key] != settings[key]
    ]
    channels = source.model.encoder.shape[0], model.encoder.shape[0]
    if channels[0] != channels[1]:
        differing.append(f"channels: {channels[0]} there, {channels[1]} here")
    if not differing:
        differing = _differing_weights(source.model.state_dict(), model.state_dict())
    if differing:
        raise ConfigError(
            f"holds a different network ({'; '.join(sorted(differing))})",
            key="training.init_from",
            path=path,
            remedy="give the settings of the source in `model:`",
        )
    model.load_state_dict(source.model.state_dict())
    return source


def _differing_weights(there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> list[str]:
    """The layers that only one of two networks has, in words."""
    found = [
        f"{len(keys)} weights only {where}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
        for where, keys in (
            ("there", [key for key in there if key not in here]),
            ("here", [key for key in here if key not in there]),
        )
        if keys
    ]
    return ["other layers by attn_sizes, shape or dropout_prob", *found] if found else []
