"""A model on disk, complete in itself: weights, settings, normalisation, and a manifest of them.

Checkpoints and export folders have these files; a checkpoint has the optimizer's and trainer's state beside them::

    model.safetensors           weights, with mltools' names
    config.json                 settings of the network and of the normalisation
    normalization.safetensors   mean, std (channel), wavelength where known; absent without normalisation
    manifest.json               size and SHA-256 of every file
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from spectralvae import __version__
from spectralvae.data.normalize import Normalization
from spectralvae.errors import InputError
from spectralvae.mltools import build_model
from spectralvae.model import AutoencoderKL
from spectralvae.rundir import write_atomic

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """A model with all that belongs to it.

    Attributes:
        model: in eval mode, on the CPU.
        settings: the `model:` section; sizes in its shape are None where the training tile is unknown.
        normalization: what its input must go through; None if the source had none.
        step: of the training run, where known.
        path: where it came from.
        left_out: keys of an mltools file that are no part of the network.
    """

    model: AutoencoderKL
    settings: dict[str, Any]
    normalization: Normalization | None
    step: int | None
    path: Path
    left_out: tuple[str, ...] = ()


def pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """safetensors bytes of tensors in any memory layout, from any device."""
    return bytes(save_tensors({name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}))


def pack_model(
    model: AutoencoderKL, settings: Mapping[str, Any], normalization: Normalization | None, step: int | None
) -> dict[str, bytes]:
    """The files of an artifact, less the manifest: name -> content."""
    config = {
        "format": FORMAT,
        "spectralvae_version": __version__,
        "step": step,
        "model": dict(settings),
        "normalization": normalization.settings() if normalization else None,
    }
    files = {
        "model.safetensors": pack_tensors(model.state_dict()),
        "config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }
    if normalization:
        arrays = {name: np.ascontiguousarray(a) for name, a in normalization.arrays().items()}
        files["normalization.safetensors"] = bytes(save_arrays(arrays))
    return files


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write an artifact so that ``folder`` is either whole or not there.

    Temporary name, fsync of every file and of the folder, check of what was written, rename. A folder of that
    name is replaced.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    write_files(temporary, files)
    if folder.exists():
        shutil.rmtree(folder)  # a folder cannot be renamed onto one that is not empty
    temporary.rename(folder)
    _fsync_folder(folder.parent)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write an artifact's files into a folder that is there, the manifest last, and check what was written."""
    entries = {name: {"bytes": len(content), "sha256": _sha256(content)} for name, content in files.items()}
    manifest = {"format": FORMAT, "files": entries, "digest": _digest(entries)}
    for name, content in files.items():
        write_atomic(folder / name, content)
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    verify(folder)
    _fsync_folder(folder)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest(entries: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(entries, sort_keys=True).encode())


def verify(folder: Path) -> dict[str, bytes]:
    """Read all files of an artifact and compare them with the manifest.

    Returns:
        name -> content.

    Raises:
        InputError: a file is missing or damaged, the manifest included.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        entries = manifest["files"]
        if manifest["digest"] != _digest(entries):
            raise InputError(f"{folder / MANIFEST}: is damaged: its digest does not fit")
        if manifest["format"] != FORMAT:
            raise InputError(f"{folder}: has format {manifest['format']}; this version reads format {FORMAT}")
        contents = {name: (folder / name).read_bytes() for name in entries}
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: is missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: is damaged ({type(error).__name__}: {error})") from error
    for name, content in contents.items():
        if _sha256(content) != entries[name]["sha256"]:
            raise InputError(
                f"{folder / name}: is damaged: its {len(content)} bytes are not the "
                f"{entries[name]['bytes']} bytes that were written (SHA-256 differs)"
            )
    return contents


def read_artifact(folder: Path) -> tuple[Artifact, dict[str, bytes]]:
    """Load a model from a checkpoint or export folder.

    Returns:
        The model, and the verified content of all its files.

    Raises:
        InputError: something is missing, damaged or does not fit.
    """
    contents = verify(folder)
    try:
        config = json.loads(contents["config.json"])
        model = build_model(config["model"])
        model.load_state_dict(load_tensors(contents["model.safetensors"]))
        normalization = None
        if config["normalization"] is not None:
            arrays = load_arrays(contents["normalization.safetensors"])
            normalization = Normalization.from_parts(config["normalization"], arrays)
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{folder}: does not hold a model of this version ({type(error).__name__}: {error})"
        ) from error
    return Artifact(model.eval(), config["model"], normalization, config["step"], folder), contents


def tensors_of(content: bytes) -> dict[str, Tensor]:
    """The tensors in safetensors bytes, on the CPU."""
    return dict(load_tensors(content))


def is_artifact(folder: Path) -> bool:
    """Whether a folder is a checkpoint or an export."""
    return (folder / MANIFEST).is_file()
