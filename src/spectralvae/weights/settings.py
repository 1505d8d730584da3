"""The settings of a network: what a `model:` section may say, and the network it describes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from spectralvae.errors import ConfigError
from spectralvae.model import ACTIVATIONS, NLL_LOSS_TYPES, PADDING_MODES, AutoencoderKL


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_shape(value: Any) -> bool:
    known = isinstance(value, list) and len(value) in (3, 4) and _is_whole(value[0])
    return known and (all(map(_is_whole, value[1:])) or all(size is None for size in value[1:]))


def _is_wholes(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value))


def _one_of(choices: tuple[str, ...]) -> tuple[str, Callable[[Any], bool]]:
    return f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices


_WHOLE = ("a whole number from 1", _is_whole)
_BOOL: tuple[str, Callable[[Any], bool]] = ("true or false", lambda value: isinstance(value, bool))
# name -> the limit in words, and its test
LIMITS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "shape": ("[C, H, W] or [C, D, H, W], whole numbers from 1, or with null for all sizes but C", _is_shape),
    "chs": ("a list of whole numbers from 1", lambda value: _is_wholes(value) and len(value) > 0),
    "attn_sizes": ("a list of whole numbers from 1", _is_wholes),
    "mid_attn": _BOOL,
    "num_res_blocks": _WHOLE,
    "dropout_prob": ("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1),
    "z_channels": _WHOLE,
    "double_z": ("true (the only choice)", lambda value: value is True),
    "n_attention_heads": _WHOLE,
    "norm_groups": _WHOLE,
    "norm_eps": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "norm_affine": _BOOL,
    "act": _one_of(tuple(ACTIVATIONS)),
    "conv_kernel_size": _WHOLE,
    "conv_padding_mode": _one_of(PADDING_MODES),
    "embed_dim": _WHOLE,
    "kl_weight": ("a number from 0", lambda value: _is_number(value) and value >= 0),
    "nll_loss_type": _one_of(NLL_LOSS_TYPES),
    "logvar_init": ("a number", _is_number),
}


def check_settings(model: Mapping[str, Any]) -> dict[str, Any]:
    """Check each setting given by itself; any of them may be left out.

    Returns:
        The settings, with lists for tuples and without a ``shape`` of null.

    Raises:
        ConfigError: for a setting that is unknown or outside its limits.
    """
    if not isinstance(model, Mapping):
        raise ConfigError(f"is a {type(model).__name__}", key="model", limit="a mapping of settings")
    given: dict[str, Any] = {}
    for key, value in model.items():
        if key not in LIMITS:
            near = difflib.get_close_matches(str(key), LIMITS, n=1) or list(LIMITS)
            hint = f"did you mean {near[0]}?" if len(near) == 1 else f"known keys: {', '.join(near)}"
            raise ConfigError("unknown key", key=f"model.{key}", remedy=hint)
        value = list(value) if isinstance(value, tuple) else value
        if key == "shape" and value is None:
            continue
        limit, is_legal = LIMITS[key]
        if not is_legal(value):
            raise ConfigError(key=f"model.{key}", value=value, limit=limit)
        given[key] = value
    return given


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
        settings: all of LIMITS, but ``logvar_init`` may be left out; sizes of ``shape`` that are None become the
            smallest legal ones (without attention in levels, no weight depends on them).

    Raises:
        ConfigError: for settings that are missing, unknown or out of limits.
    """
    settings = check_settings(settings)
    missing = [key for key in LIMITS if key not in settings and key != "logvar_init"]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given to build the network", key="model")
    if settings["attn_sizes"] and settings["shape"][1] is None:
        limit = "given with sizes, since attn_sizes is not empty"
        raise ConfigError(key="model.shape", value=settings["shape"], limit=limit)
    try:
        model = construct(settings, "cpu")
    except ValueError as error:
        raise ConfigError(str(error), key="model") from error
    torch.nn.init.constant_(model.logvar, settings.get("logvar_init", 0.0))
    return model
