"""Weights of the research library mltools, in and out.

Its checkpoints are files of ``torch.save`` that hold the weights of one AutoencoderKL in some wrapping,
without the settings of the network. What the shapes of the weights tell is inferred and compared with the
settings given; what they cannot tell must be given. Nothing is guessed, and no code from a file is run.

Levels that hold attention are counted by ``n``: encoder level i is n = i, decoder level j (in the order of
``decoder.ups``) is n = L - 1 + j. The network compares ``shape[1] // 2**n`` with ``attn_sizes`` in both: the
decoder goes on halving where the encoder ended (see the second oddity in model.py), so that n = L - 1 stands
for the deepest level of each.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectralvae.config import NetworkSettings
from spectralvae.errors import ConfigError, InputError
from spectralvae.model import AutoencoderKL
from spectralvae.weights.settings import build_model, check_settings, construct
from spectralvae.weights.torchfile import check_size, load_torch_file, save_torch_file

CONTAINERS = ("state_dict", "model_state_dict")
PREFIXES = ("vae", "model", "module", "_orig_mod")
HEADS = ("l2_head", "no2_probe")
EXACT_IN_FLOAT32 = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class ForeignWeights:
    """The weights of one AutoencoderKL from a file.

    Args:
        path: the file.
        state_dict: the key names of ``AutoencoderKL.state_dict()`` in its order; float32, contiguous, on the CPU.
        left_out: the keys, as in the file, of the original's extra heads, which are not part of the network.
    """

    path: Path
    state_dict: dict[str, Tensor]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Structure:
    """What the shapes of the weights tell: the settings in ``told`` outright, the others in part."""

    told: dict[str, Any]
    channels: int
    dim: int
    dropout: bool
    attended: frozenset[int]

    @property
    def n_levels(self) -> int:
        return len(self.told["chs"])

    @property
    def has_attention(self) -> bool:
        return bool(self.told["mid_attn"] or self.attended)

    def level_names(self, attended: frozenset[int]) -> str:
        """The levels whose blocks are followed by attention, in words."""
        last = self.n_levels - 1
        names = [f"encoder.downs.{n}" for n in sorted(attended) if n <= last]
        names += [f"decoder.ups.{n - last}" for n in sorted(attended) if n >= last]
        return ", ".join(names) or "no level"

    def __str__(self) -> str:
        told = ", ".join(f"{key} {value}" for key, value in self.told.items())
        dropout = "with dropout" if self.dropout else "no dropout"
        attention = f"attention in {self.level_names(self.attended)}"
        return f"{told}, {self.channels} input channels, {self.dim}-D, {dropout}, {attention}"


def _listed(keys: list[str]) -> str:
    """The first few of ``keys`` as one line, however many and however odd they are."""
    return ", ".join(key[:120] for key in keys[:5]) + (", ..." if len(keys) > 5 else "")


def _find_state_dict(path: Path, content: Any) -> dict[Any, Any]:
    """The state dict in what a file holds: bare, or inside one of CONTAINERS."""
    if not isinstance(content, dict):
        problem = f"holds a {type(content).__name__}, not a state dict"
        raise InputError(problem, path=path, remedy="give a file of weights")
    inside = [name for name in CONTAINERS if name in content]
    if len(inside) > 1:
        problem = f"holds two sets of weights, {' and '.join(inside)}"
        raise InputError(problem, path=path, remedy="save the wanted one alone")
    found = content[inside[0]] if inside else content
    if not isinstance(found, dict) or not (inside or any(isinstance(value, Tensor) for value in found.values())):
        raise InputError(
            f"holds no state dict, neither bare nor as a dict under {' or '.join(CONTAINERS)}; "
            f"its keys: {_listed([repr(key) for key in content]) or 'none'}",
            path=path,
        )
    return found


def _exact_float32(path: Path, key: str, value: Any) -> Tensor:
    """``value`` as a float32 tensor of the same numbers (float64 is taken only if nothing is lost)."""
    if not isinstance(value, Tensor):
        raise InputError(f"key {key!r} of the state dict is a {type(value).__name__}, not a tensor", path=path)
    if value.layout != torch.strided or value.device.type != "cpu":
        raise InputError(f"key {key!r} is not an ordinary tensor with values (sparse, or of device meta)", path=path)
    if value.dtype not in (*EXACT_IN_FLOAT32, torch.float64):
        raise InputError(f"key {key!r} is of {value.dtype}", path=path, limit="float16, bfloat16 or float32")
    if not value.isfinite().all():
        remedy = "give a checkpoint from before them"
        raise InputError(f"key {key!r} holds values that are not finite", path=path, remedy=remedy)
    exact = value.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if value.dtype == torch.float64 and not torch.equal(exact.double(), value):
        problem = f"key {key!r} is of float64 and would lose digits in float32"
        raise InputError(problem, path=path, remedy="save it as float32")
    return exact


def _clean_keys(path: Path, state_dict: dict[Any, Any]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Strip PREFIXES, and part the network's keys (clean name -> name in the file) from those of HEADS."""
    names: dict[str, str] = {}
    left_out: list[str] = []
    for key in state_dict:
        if not isinstance(key, str):
            raise InputError(f"key {key!r} of the state dict is of type {type(key).__name__}, not text", path=path)
        parts = key.split(".")
        while parts[0] in PREFIXES and len(parts) > 1:
            del parts[0]
        clean = ".".join(parts)
        if parts[0] in HEADS:
            left_out.append(key)
        elif clean in names:
            problem = f"{names[clean]!r} and {key!r} are both {clean!r}"
            raise InputError(problem, path=path, remedy="save the wanted weights alone")
        else:
            names[clean] = key
    return names, tuple(left_out)


def _structure(path: Path, state_dict: Mapping[str, Tensor]) -> _Structure:
    """What the shapes tell about the network.

    Raises:
        InputError: if a key that tells it is missing or has another number of axes than the first convolution.
    """

    def shape_of(key: str, ndims: tuple[int, ...]) -> torch.Size:
        if key not in state_dict:
            held = f"it holds {len(state_dict)} keys: {_listed([repr(held) for held in state_dict])}"
            raise InputError(f"is not a whole AutoencoderKL: {key!r} is missing; {held}", path=path)
        if state_dict[key].ndim not in ndims:
            shape = tuple(state_dict[key].shape)
            raise InputError(f"{key!r} has shape {shape}: not a convolution of 2 or 3 axes as the others", path=path)
        return state_dict[key].shape

    def any_key(part: str) -> bool:
        return any(part in key for key in state_dict)

    def count(part: str) -> int:
        return len({key[len(part) :].split(".")[0] for key in state_dict if key.startswith(part)})

    conv_in = shape_of("encoder.conv_in.weight", (4, 5))
    ndim = (len(conv_in),)
    n_levels = count("encoder.downs.")
    attended = {n for n in range(n_levels) if any_key(f"encoder.downs.{n}.attention_blocks.")}
    attended |= {n_levels - 1 + n for n in range(n_levels) if any_key(f"decoder.ups.{n}.attention_blocks.")}
    blocks = [f"encoder.downs.{i}.resnet_blocks.0.net1.2.weight" for i in range(n_levels)]
    told = {
        "chs": [shape_of(block, ndim)[0] for block in blocks],
        "mid_attn": any_key("coder.mid_attn1."),
        "num_res_blocks": count("encoder.downs.0.resnet_blocks."),
        "z_channels": shape_of("decoder.conv_in.weight", ndim)[1],
        "norm_affine": any_key(".net1.0."),
        "conv_kernel_size": conv_in[2],
        "embed_dim": shape_of("post_quant_conv.weight", ndim)[1],
    }
    return _Structure(told, conv_in[1], len(conv_in) - 2, any_key(".net2.3."), frozenset(attended))


def _check_keys(path: Path, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Compare keys and shapes with those of the network that they tell of, and return its keys in order."""
    found = _structure(path, state_dict)
    top = 2 * found.n_levels - 2  # with this size, every level has another one and attn_sizes can name it
    settings = found.told | {
        "shape": [found.channels, *[2**top] * found.dim],
        "attn_sizes": [2 ** (top - n) for n in found.attended],
        "dropout_prob": 0.5 if found.dropout else 0.0,
        "norm_groups": 1,  # this and the next two change no shape
        "kl_weight": 0.0,
        "nll_loss_type": "l1",
    }
    try:
        expected = {key: value.shape for key, value in construct(settings, "meta").state_dict().items()}
    except ValueError as error:
        raise InputError(f"the shapes of its weights are of no AutoencoderKL: {error}", path=path) from error
    misshapen = [
        f"{key!r} is {tuple(value.shape)}, not {tuple(expected[key])}"
        for key, value in state_dict.items()
        if key in expected and value.shape != expected[key]
    ]
    stray = [repr(key) for key in state_dict if key not in expected]
    missing = [repr(key) for key in expected if key not in state_dict]
    wrong = {"stray": stray, "missing": missing, "misshapen": misshapen}
    if any(wrong.values()):
        report = "; ".join(f"{len(keys)} {kind} ({_listed(keys)})" for kind, keys in wrong.items() if keys)
        raise InputError(f"is not the weights of one AutoencoderKL and nothing else: keys {report}", path=path)
    return list(expected)


def read_weights(path: str | os.PathLike[str]) -> ForeignWeights:
    """Read the weights of one AutoencoderKL from a file of ``torch.save``, in any wrapping mltools used.

    Args:
        path: a bare state dict, or one inside ``state_dict`` or ``model_state_dict``; keys may be prefixed.

    Raises:
        InputError: for a file that cannot be read safely, and for stray, missing, misshapen or unusable weights.
    """
    path = Path(path).expanduser()
    state_dict = _find_state_dict(path, load_torch_file(path))
    names, left_out = _clean_keys(path, state_dict)
    check_size(path, [state_dict[name] for name in names.values()])
    weights = {key: _exact_float32(path, name, state_dict[name]) for key, name in names.items()}
    return ForeignWeights(path, {key: weights[key] for key in _check_keys(path, weights)}, left_out)


def _mismatches(found: _Structure, given: dict[str, Any]) -> list[ConfigError]:
    """Every setting given that the weights contradict."""
    wrong = [
        ConfigError(f"the weights hold {value}", key=f"model.{key}", value=given[key])
        for key, value in found.told.items()
        if given.get(key, value) != value
    ]
    shape, size = given.get("shape"), given.get("shape", [None, None])[1]
    if shape and (shape[0], len(shape) - 1) != (found.channels, found.dim):
        problem = f"the weights are of {found.channels} channels and {found.dim} spatial axes"
        wrong.append(ConfigError(problem, key="model.shape", value=shape))
    dropout = given.get("dropout_prob")
    if dropout is not None and (dropout > 0) != found.dropout:
        layers = "with a dropout layer" if found.dropout else "without dropout"
        wrong.append(ConfigError(f"the weights hold blocks {layers}", key="model.dropout_prob", value=dropout))
    if size is not None and ("attn_sizes" in given or not found.attended):
        sizes = given.get("attn_sizes", [])
        asked = frozenset(n for n in range(2 * found.n_levels - 1) if size >> n in sizes)
        if asked != found.attended:
            levels = f"{found.level_names(asked)}, but the weights hold it in {found.level_names(found.attended)}"
            problem = f"with shape {shape} this asks for attention in {levels}"
            wrong.append(ConfigError(problem, key="model.attn_sizes", value=sizes))
    return wrong


def resolve_settings(weights: ForeignWeights, model: Mapping[str, Any] | None) -> dict[str, Any]:
    """Complete the settings given with what the weights tell, and check one against the other.

    Args:
        weights: from ``read_weights``.
        model: the ``model:`` section of a train config. ``n_attention_heads`` (if there is any attention),
            ``norm_groups``, ``act``, ``conv_padding_mode`` and ``norm_eps`` must be given; ``dropout_prob`` if the
            blocks have a dropout layer; ``attn_sizes`` and ``shape`` if levels hold attention. ``logvar_init`` is
            allowed and has no effect, since the weights hold ``logvar``.

    Returns:
        All keys of ``enc_dec_params``, ``embed_dim``, ``kl_weight`` and ``nll_loss_type``, of types that JSON
        knows. ``shape`` is [C, None, None] ([C, None, None, None] for volumes) if its sizes were not given.

    Raises:
        ConfigError: for settings that are unknown, out of limits, missing, or contradicted by the weights.
    """
    path, found = weights.path, _structure(weights.path, weights.state_dict)
    try:
        given = check_settings({} if model is None else model)
    except ConfigError as error:
        raise error.with_parts(path=path) from error
    needed = ["n_attention_heads"] * found.has_attention + ["norm_groups", "act", "conv_padding_mode", "norm_eps"]
    needed += ["dropout_prob"] * found.dropout + ["attn_sizes"] * bool(found.attended)
    missing = [key for key in needed if key not in given]
    if (found.attended or given.get("attn_sizes")) and given.get("shape", [None, None])[1] is None:
        missing.append("shape")  # only a size can say which levels attn_sizes means
    wrong = _mismatches(found, given)
    if wrong:
        remedies = [*map(str, wrong[1:]), "correct or leave out what the weights tell"]
        remedies += [f"also give {', '.join(missing)}"] if missing else []
        raise wrong[0].with_parts(path=path, remedy="; ".join(remedies))
    if missing:
        problem = f"the weights cannot tell {', '.join(missing)} (inferred: {found})"
        raise ConfigError(problem, path=path, key="model", remedy=f"give also model: {{{', '.join(missing)}}}")
    defaults = NetworkSettings(
        shape=[found.channels, *[None] * found.dim],
        n_attention_heads=1,  # needed above if it has any effect
    )
    settings = defaults.model_dump() | found.told | given
    del settings["logvar_init"]
    try:
        construct(settings, "meta")
    except ValueError as error:
        raise ConfigError(str(error), path=path, key="model") from error
    return settings


def load_foreign(
    path: str | os.PathLike[str], model: Mapping[str, Any] | None
) -> tuple[AutoencoderKL, dict[str, Any], ForeignWeights]:
    """Read weights and build their network (see ``read_weights`` and ``resolve_settings``).

    Returns:
        The network in eval mode, its complete settings, and the weights as read.

    Raises:
        InputError: for the file.
        ConfigError: for the settings.
    """
    weights = read_weights(path)
    settings = resolve_settings(weights, model)
    network = build_model(settings)
    network.load_state_dict(weights.state_dict, strict=True)
    return network.eval(), settings, weights


def save_weights(model: AutoencoderKL, path: str | os.PathLike[str]) -> None:
    """Write the bare state dict as mltools reads it, replacing ``path`` only once it is complete.

    Args:
        model: any dtype, layout and device; the file holds contiguous float32 of the CPU.
        path: the .pt file; its directory must exist.
    """
    state_dict = {
        key: value.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
        for key, value in model.state_dict().items()
    }
    save_torch_file(state_dict, Path(path).expanduser())


def read_spectrum(path: str | os.PathLike[str]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Read an old ``mean_spectrum.pt`` or ``std_spectrum.pt``.

    Args:
        path: a tensor of shape (C,), or with further axes of size 1.

    Returns:
        (C,) float64, finite.

    Raises:
        InputError: for anything else.
    """
    path = Path(path).expanduser()
    spectrum = load_torch_file(path)
    if not isinstance(spectrum, Tensor) or spectrum.dtype not in (*EXACT_IN_FLOAT32, torch.float64):
        what = str(spectrum.dtype) if isinstance(spectrum, Tensor) else type(spectrum).__name__
        raise InputError(f"holds {what}, not one tensor of floating-point numbers, the spectrum (channels,)", path=path)
    check_size(path, [spectrum])
    plain = spectrum.layout == torch.strided and not spectrum.is_meta
    if not plain or spectrum.numel() == 0 or spectrum.numel() != max(spectrum.shape, default=0):
        raise InputError(f"a tensor of shape {tuple(spectrum.shape)} is not a spectrum (channels,)", path=path)
    if not spectrum.isfinite().all():
        raise InputError("the spectrum holds values that are not finite", path=path, remedy="compute it again")
    values: np.ndarray[tuple[int], np.dtype[np.float64]] = spectrum.detach().to(torch.float64).reshape(-1).numpy()
    return values
