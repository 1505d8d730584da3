"""The settings of a network: what a `model:` section may say, and the network it describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError

from spectralvae.config import NetworkSettings
from spectralvae.config.loading import describe_errors
from spectralvae.errors import ConfigError
from spectralvae.model import AutoencoderKL


def check_settings(model: Mapping[str, Any]) -> dict[str, Any]:
    """Check each setting given by itself; any of them may be left out.

    Returns:
        The settings, with lists for tuples and without a ``shape`` of null.

    Raises:
        ConfigError: for a setting that is unknown or outside its limits.
    """
    if not isinstance(model, Mapping):
        raise ConfigError(f"is a {type(model).__name__}", key="model", limit="a mapping of settings")
    given = {str(key): list(value) if isinstance(value, tuple) else value for key, value in model.items()}
    try:
        return NetworkSettings.model_validate(given).model_dump(exclude_unset=True, exclude_none=True)
    except ValidationError as error:
        first = describe_errors(NetworkSettings, error)[0]
        name, *entry = error.errors()[0]["loc"]
        if name in NetworkSettings.model_fields:  # the whole list is named where an entry is wrong
            limit = f"a list, each entry {first.limit}" if entry else first.limit
            first = first.with_parts(key=str(name), value=given[name], limit=limit)
        raise first.with_parts(key=f"model.{first.key}") from error


def construct(settings: Mapping[str, Any], device: str) -> AutoencoderKL:
    """The network of complete settings, leaving torch's global random state as it was.

    Args:
        settings: complete, and each within its limits.
        device: ``meta`` makes a network without values, which is fast and shows whether there is one.

    Raises:
        ValueError: the settings do not go together.
    """
    params = {key: value for key, value in settings.items() if key != "logvar_init"}
    rest = {key: params.pop(key) for key in ("embed_dim", "kl_weight", "nll_loss_type")}
    smallest = 2 ** (len(params["chs"]) - 1)
    params["shape"] = [smallest if size is None else size for size in params["shape"]]
    with torch.device(device), torch.random.fork_rng(devices=[]):
        return AutoencoderKL(params, **rest).float()  # whatever torch's default dtype is


def build_model(settings: Mapping[str, Any]) -> AutoencoderKL:
    """Build the network of complete settings on the CPU, leaving torch's global random state as it was.

    Args:
        settings: all keys of NetworkSettings, but ``logvar_init`` may be left out; sizes of ``shape`` that are None
            become the smallest legal ones (without attention in levels, no weight depends on them).

    Raises:
        ConfigError: for settings that are missing, unknown or out of limits.
    """
    settings = check_settings(settings)
    missing = [key for key in NetworkSettings.model_fields if key not in settings and key != "logvar_init"]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given to build the network", key="model")
    if settings["attn_sizes"] and settings["shape"][1] is None:
        limit = "given with sizes, since attn_sizes is not empty"
        raise ConfigError(key="model.shape", value=settings["shape"], limit=limit)
    try:
        model = construct(settings, "cpu")
    except ValueError as error:
        raise ConfigError(str(error), key="model") from error
    torch.nn.init.constant_(model.logvar, NetworkSettings(**settings).logvar_init)
    return model
