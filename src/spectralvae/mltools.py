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

import difflib
import math
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectralvae.errors import ConfigError, InputError
from spectralvae.model import ACTIVATIONS, NLL_LOSS_TYPES, PADDING_MODES, AutoencoderKL

CONTAINERS = ("state_dict", "model_state_dict")
PREFIXES = ("vae", "model", "module", "_orig_mod")
HEADS = ("l2_head", "no2_probe")
EXACT_IN_FLOAT32 = (torch.float16, torch.bfloat16, torch.float32)

# Metric lists beside the weights hold numpy scalars. The function that restores them is found through a scalar,
# since its module is private and was renamed in numpy 2. Numbers and booleans only: the state of a
# void or object dtype from a stranger's file could make numpy follow forged pointers.
_NUMPY_SCALAR: Any = np.float64(0).__reduce__()[0]
_NUMPY_GLOBALS: list[Any] = [
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(code)) for code in "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]},
]


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


def _check_zip(path: Path) -> None:
    """Compare every byte with its checksum, which ``torch.load`` does not: a flipped bit is a wrong weight."""
    with zipfile.ZipFile(path) as archive:
        members = {name.rpartition("/")[2] for name in archive.namelist()}
        if "data.pkl" not in members or "constants.pkl" in members:
            raise InputError(f"{path}: is a zip file, but not of torch.save (nor may it be TorchScript)")
        # torch.save never compresses; a file that unpacks to more than its size is a trap for memory
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise InputError(
                f"{path}: is a compressed archive, which torch.save never writes; save it anew with torch.save"
            )
        damaged = archive.testzip()
    if damaged is not None:
        raise InputError(f"{path}: is damaged: the checksum of {damaged!r} does not match; copy the file again")


def _load(path: Path) -> Any:
    """Whatever ``torch.save`` put into ``path``: tensors, plain values and numpy scalars only.

    Raises:
        InputError: for a file that is missing, damaged, not of torch.save, or needs pickle code, which is not run.
    """
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise InputError(f"{path}: {what}; give a file written by torch.save (.pt, .pth, .ckpt)")
    advice = "save the bare weights in the program that wrote it: torch.save(model.state_dict(), FILE)"
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic == b"PK\x03\x04":
            _check_zip(path)
        elif magic[:1] == b"\x80" and magic[:2] != b"\x80\x02":
            raise InputError(f"{path}: is a plain pickle, whose code is never run; {advice}")
        elif magic[:1] != b"\x80":
            raise InputError(f"{path}: is not a file of torch.save; give a .pt, .pth or .ckpt written by torch.save")
        with torch.serialization.safe_globals(_NUMPY_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about oddities of the file; the user gets one line
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        needs = f" ({name[1]})" if name else ""
        raise InputError(f"{path}: needs pickle code{needs}, which is never run; {advice}") from error
    except Exception as error:  # damaged bytes make torch and zipfile raise almost any class
        raise InputError(f"{path}: is damaged or cut short ({type(error).__name__}); copy the file again") from error


def _find_state_dict(path: Path, content: Any) -> dict[Any, Any]:
    """The state dict in what a file holds: bare, or inside one of CONTAINERS."""
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a state dict; give a file of weights")
    inside = [name for name in CONTAINERS if name in content]
    if len(inside) > 1:
        raise InputError(f"{path}: holds two sets of weights, {' and '.join(inside)}; save the wanted one alone")
    found = content[inside[0]] if inside else content
    if not isinstance(found, dict) or not (inside or any(isinstance(value, Tensor) for value in found.values())):
        raise InputError(
            f"{path}: holds no state dict, neither bare nor as a dict under {' or '.join(CONTAINERS)}; "
            f"its keys: {_listed([repr(key) for key in content]) or 'none'}"
        )
    return found


def _check_size(path: Path, values: list[Any]) -> None:
    """A small file can claim huge tensors by repeating one value: refuse before any of them is unfolded."""
    if sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor)) > path.stat().st_size:
        raise InputError(f"{path}: claims tensors larger than the file; save contiguous copies with torch.save")


def _exact_float32(path: Path, key: str, value: Any) -> Tensor:
    """``value`` as a float32 tensor of the same numbers (float64 is taken only if nothing is lost)."""
    if not isinstance(value, Tensor):
        raise InputError(f"{path}: key {key!r} of the state dict is a {type(value).__name__}, not a tensor")
    if value.layout != torch.strided or value.device.type != "cpu":
        raise InputError(f"{path}: key {key!r} is not an ordinary tensor with values (sparse, or of device meta)")
    if value.dtype not in (*EXACT_IN_FLOAT32, torch.float64):
        raise InputError(f"{path}: key {key!r} is of {value.dtype}; weights must be float16, bfloat16 or float32")
    if not value.isfinite().all():
        raise InputError(f"{path}: key {key!r} holds values that are not finite; give a checkpoint from before them")
    exact = value.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if value.dtype == torch.float64 and not torch.equal(exact.double(), value):
        raise InputError(f"{path}: key {key!r} is of float64 and would lose digits in float32; save it as float32")
    return exact


def _clean_keys(path: Path, state_dict: dict[Any, Any]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Strip PREFIXES, and part the network's keys (clean name -> name in the file) from those of HEADS."""
    names: dict[str, str] = {}
    left_out: list[str] = []
    for key in state_dict:
        if not isinstance(key, str):
            raise InputError(f"{path}: key {key!r} of the state dict is of type {type(key).__name__}, not text")
        parts = key.split(".")
        while parts[0] in PREFIXES and len(parts) > 1:
            del parts[0]
        clean = ".".join(parts)
        if parts[0] in HEADS:
            left_out.append(key)
        elif clean in names:
            raise InputError(f"{path}: {names[clean]!r} and {key!r} are both {clean!r}; save the wanted weights alone")
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
            raise InputError(f"{path}: is not a whole AutoencoderKL: {key!r} is missing; {held}")
        if state_dict[key].ndim not in ndims:
            shape = tuple(state_dict[key].shape)
            raise InputError(f"{path}: {key!r} has shape {shape}: not a convolution of 2 or 3 axes as the others")
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


def _construct(settings: Mapping[str, Any], device: str) -> AutoencoderKL:
    """The network of complete settings on ``device``; raises the ValueErrors of the network."""
    params = {key: value for key, value in settings.items() if key != "logvar_init"}
    rest = {key: params.pop(key) for key in ("embed_dim", "kl_weight", "nll_loss_type")}
    smallest = 2 ** (len(params["chs"]) - 1)
    params["shape"] = [smallest if size is None else size for size in params["shape"]]
    with torch.device(device), torch.random.fork_rng(devices=[]):
        return AutoencoderKL(params, **rest)


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
        expected = {key: value.shape for key, value in _construct(settings, "meta").state_dict().items()}
    except ValueError as error:
        raise InputError(f"{path}: the shapes of its weights are of no AutoencoderKL: {error}") from error
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
        raise InputError(f"{path}: is not the weights of one AutoencoderKL and nothing else: keys {report}")
    return list(expected)


def read_weights(path: str | os.PathLike[str]) -> ForeignWeights:
    """Read the weights of one AutoencoderKL from a file of ``torch.save``, in any wrapping mltools used.

    Args:
        path: a bare state dict, or one inside ``state_dict`` or ``model_state_dict``; keys may be prefixed.

    Raises:
        InputError: for a file that cannot be read safely, and for stray, missing, misshapen or unusable weights.
    """
    path = Path(path)
    state_dict = _find_state_dict(path, _load(path))
    names, left_out = _clean_keys(path, state_dict)
    _check_size(path, [state_dict[name] for name in names.values()])
    weights = {key: _exact_float32(path, name, state_dict[name]) for key, name in names.items()}
    return ForeignWeights(path, {key: weights[key] for key in _check_keys(path, weights)}, left_out)


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
_LIMITS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "shape": ("[C, H, W] or [C, D, H, W], whole numbers from 1, or with null for all sizes but C", _is_shape),
    "chs": ("a list of whole numbers from 1", lambda value: _is_wholes(value) and len(value) > 0),
    "attn_sizes": ("a list of whole numbers from 1", _is_wholes),
    "mid_attn": _BOOL,
    "num_res_blocks": _WHOLE,
    "dropout_prob": ("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1),
    "z_channels": _WHOLE,
    "double_z": ("true (the network knows nothing else)", lambda value: value is True),
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


def _check_values(model: Mapping[str, Any]) -> dict[str, Any]:
    """The settings given, with lists for tuples and without a ``shape`` of null."""
    if not isinstance(model, Mapping):
        raise ConfigError(f"model must be a mapping of settings, not a {type(model).__name__}")
    given: dict[str, Any] = {}
    for key, value in model.items():
        if key not in _LIMITS:
            near = difflib.get_close_matches(str(key), _LIMITS, n=1) or list(_LIMITS)
            hint = f"did you mean {near[0]}?" if len(near) == 1 else f"the known ones are {', '.join(near)}"
            raise ConfigError(f"model.{key} is not a setting of the network; {hint}")
        value = list(value) if isinstance(value, tuple) else value
        if key == "shape" and value is None:
            continue
        limit, is_legal = _LIMITS[key]
        if not is_legal(value):
            raise ConfigError(f"model.{key} = {value!r} must be {limit}")
        given[key] = value
    return given


def _mismatches(found: _Structure, given: dict[str, Any]) -> list[str]:
    """Every setting given that the weights contradict."""
    wrong = [
        f"{key} is {given[key]}, but the weights hold {value}"
        for key, value in found.told.items()
        if given.get(key, value) != value
    ]
    shape, size = given.get("shape"), given.get("shape", [None, None])[1]
    if shape and (shape[0], len(shape) - 1) != (found.channels, found.dim):
        wrong.append(f"shape is {shape}, but the weights are of {found.channels} channels and {found.dim} spatial axes")
    dropout = given.get("dropout_prob")
    if dropout is not None and (dropout > 0) != found.dropout:
        layers = "with a dropout layer" if found.dropout else "without dropout"
        wrong.append(f"dropout_prob is {dropout}, but the weights hold blocks {layers}")
    if size is not None and ("attn_sizes" in given or not found.attended):
        sizes = given.get("attn_sizes", [])
        asked = frozenset(n for n in range(2 * found.n_levels - 1) if size >> n in sizes)
        if asked != found.attended:
            levels = f"{found.level_names(asked)}, but the weights hold it in {found.level_names(found.attended)}"
            wrong.append(f"attn_sizes is {sizes}, which with shape {shape} asks for attention in {levels}")
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
        given = _check_values({} if model is None else model)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    needed = ["n_attention_heads"] * found.has_attention + ["norm_groups", "act", "conv_padding_mode", "norm_eps"]
    needed += ["dropout_prob"] * found.dropout + ["attn_sizes"] * bool(found.attended)
    missing = [key for key in needed if key not in given]
    if (found.attended or given.get("attn_sizes")) and given.get("shape", [None, None])[1] is None:
        missing.append("shape")  # only a size can say which levels attn_sizes means
    wrong = _mismatches(found, given)
    if wrong:
        also = f"; missing are {', '.join(missing)}" if missing else ""
        raise ConfigError(f"{path}: model.{'; model.'.join(wrong)}; correct or leave out what the weights tell{also}")
    if missing:
        raise ConfigError(
            f"{path}: give also model: {{{', '.join(missing)}}}, which weights cannot tell; inferred {found}"
        )
    defaults = {
        "shape": [found.channels, *[None] * found.dim],
        "attn_sizes": [],
        "dropout_prob": 0.0,
        "double_z": True,
        "n_attention_heads": 1,  # needed above if it has any effect
        "kl_weight": 1e-6,  # this and the next as in AutoencoderKL
        "nll_loss_type": "l1",
    }
    settings = defaults | found.told | given
    settings = {key: settings[key] for key in _LIMITS if key != "logvar_init"}
    try:
        _construct(settings, "meta")
    except ValueError as error:
        raise ConfigError(f"{path}: model: {error}") from error
    return settings


def build_model(settings: Mapping[str, Any]) -> AutoencoderKL:
    """Build the network of complete settings, leaving torch's global random state as it was.

    Args:
        settings: as from ``resolve_settings``; sizes of ``shape`` that are None become the smallest legal ones
            (without attention in levels, no weight depends on them). ``logvar_init`` may be among them.

    Raises:
        ConfigError: for settings that are missing, unknown or out of limits.
    """
    settings = _check_values(settings)
    missing = [key for key in _LIMITS if key not in settings and key != "logvar_init"]
    if missing:
        raise ConfigError(f"model: {', '.join(missing)} must be given to build the network")
    if settings["attn_sizes"] and settings["shape"][1] is None:
        raise ConfigError(f"model.shape = {settings['shape']} must hold sizes, since attn_sizes is not empty")
    try:
        model = _construct(settings, "cpu")
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    torch.nn.init.constant_(model.logvar, settings.get("logvar_init", 0.0))
    return model


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
    path = Path(path)
    state_dict = {
        key: value.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
        for key, value in model.state_dict().items()
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state_dict, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_spectrum(path: str | os.PathLike[str]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Read an old ``mean_spectrum.pt`` or ``std_spectrum.pt``.

    Args:
        path: a tensor of shape (C,), or with further axes of size 1.

    Returns:
        (C,) float64, finite.

    Raises:
        InputError: for anything else.
    """
    path = Path(path)
    spectrum = _load(path)
    if not isinstance(spectrum, Tensor) or spectrum.dtype not in (*EXACT_IN_FLOAT32, torch.float64):
        what = str(spectrum.dtype) if isinstance(spectrum, Tensor) else type(spectrum).__name__
        raise InputError(f"{path}: holds {what}, not one tensor of floating-point numbers, the spectrum (channels,)")
    _check_size(path, [spectrum])
    plain = spectrum.layout == torch.strided and not spectrum.is_meta
    if not plain or spectrum.numel() == 0 or spectrum.numel() != max(spectrum.shape, default=0):
        raise InputError(f"{path}: a tensor of shape {tuple(spectrum.shape)} is not a spectrum (channels,)")
    if not spectrum.isfinite().all():
        raise InputError(f"{path}: the spectrum holds values that are not finite; compute it again")
    values: np.ndarray[tuple[int], np.dtype[np.float64]] = spectrum.detach().to(torch.float64).reshape(-1).numpy()
    return values
