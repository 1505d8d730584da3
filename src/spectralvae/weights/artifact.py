"""A model on disk, complete in itself: weights, settings, normalisation, and a manifest of them.

Checkpoints and export folders have these files; a checkpoint has the optimizer's and trainer's state beside them::

    model.safetensors           weights, with mltools' names
    config.json                 settings of the network and of the normalisation; where known, statistics of the latents
                                and what the weights were trained on
    normalization.safetensors   mean, std (channel), wavelength where known; absent without normalisation
    manifest.json               size and SHA-256 of every file, and a digest of these
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
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

from spectralvae.errors import ConfigError, DamagedError, InputError
from spectralvae.model import AutoencoderKL
from spectralvae.runtime.atomic import room_for, write_atomic
from spectralvae.version import __version__
from spectralvae.weights.normalization import Normalization
from spectralvae.weights.provenance import LatentStatistics, Provenance
from spectralvae.weights.settings import build_model

FORMAT = 1
MANIFEST = "manifest.json"

# What a file system says of itself, or of something else in a file's place. A lost permission or connection is no
# damage: the file may be whole.
_DAMAGE = {errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.EISDIR, errno.ENOTDIR, errno.ELOOP}


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
        latents: statistics of its latents; None if they were not measured.
        provenance: what it was trained on, and its metrics; None if the source does not say.
    """

    model: AutoencoderKL
    settings: dict[str, Any]
    normalization: Normalization | None
    step: int | None
    path: Path
    left_out: tuple[str, ...] = ()
    latents: LatentStatistics | None = None
    provenance: Provenance | None = None


def pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """safetensors bytes of tensors in any memory layout, from any device."""
    return bytes(save_tensors({name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}))


def weights_sha256(model: AutoencoderKL) -> str:
    """What a network is known by: SHA-256 of its ``model.safetensors``, in hexadecimal.

    A checkpoint, its export and the network loaded from either agree, on whatever device and in whatever memory layout.
    """
    return _sha256(pack_tensors(model.state_dict()))


def pack_model(
    model: AutoencoderKL,
    settings: Mapping[str, Any],
    normalization: Normalization | None,
    step: int | None,
    latents: LatentStatistics | None = None,
    provenance: Provenance | None = None,
) -> dict[str, bytes]:
    """The files of an artifact, less the manifest.

    Args:
        model: the weights, in any memory layout, on any device.
        settings: the complete `model:` section.
        normalization: what its input must go through, where known.
        step: of the training run, where known.
        latents, provenance: as of an `Artifact`.

    Returns:
        name -> content.
    """
    config = {
        "format": FORMAT,
        "spectralvae_version": __version__,
        "step": step,
        "model": dict(settings),
        "normalization": normalization.settings() if normalization else None,
        "latents": latents.values() if latents else None,
        "provenance": provenance.values() if provenance else None,
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

    Temporary name, fsync of every file and of the folder, check of what was written, rename. A killed process may
    leave folders next to it whose names begin with a dot.

    A valid folder of that name stays as it is, and nothing is written: one folder cannot take another's name in a
    single step, so a kill between two steps would lose it. A corrupt one is replaced.

    Args:
        folder: where it is to lie.
        files: name -> content, as from ``pack_model``.

    Raises:
        InputError: what was written is not what is read back, or the folder of that name is of another format.
        NoRoomError: it does not fit; nothing of it stays.
    """
    if os.path.lexists(folder):
        with suppress(DamagedError):
            verify(folder)
            return
    temporary = folder.with_name(f".{folder.name}.tmp")
    with room_for(folder, sum(map(len, files.values()))):
        try:
            if temporary.exists():
                shutil.rmtree(temporary)
            temporary.mkdir(parents=True)
            write_files(temporary, files)
            old = hidden_old(folder)
            if os.path.lexists(folder):  # corrupt; a folder cannot be renamed onto one that is not empty
                if old.exists():
                    shutil.rmtree(old)
                folder.rename(old)
            temporary.rename(folder)
            _fsync_folder(folder.parent)
            if os.path.lexists(old):
                shutil.rmtree(old)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def hidden_old(folder: Path) -> Path:
    """The name under which a folder waits for its deletion, so that it is never seen half deleted."""
    return folder.with_name(f".{folder.name}.old")


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write an artifact's files into a folder that is there, the manifest last, and check what was written.

    Args:
        folder: which becomes an artifact.
        files: name -> content, as from ``pack_model``.

    Raises:
        InputError: what was written is not what is read back.
        NoRoomError: a file does not fit.
    """
    entries = {name: {"bytes": len(content), "sha256": _sha256(content)} for name, content in files.items()}
    manifest = {"format": FORMAT, "files": entries}
    for name, content in files.items():
        write_atomic(folder / name, content)
    write_atomic(folder / MANIFEST, _signed(manifest))
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


def _signed(manifest: Mapping[str, Any]) -> bytes:
    """A manifest's file, with the digest of the rest at its end."""
    digest = _sha256(json.dumps(manifest, sort_keys=True).encode())
    return (json.dumps({**manifest, "digest": digest}, indent=2) + "\n").encode()


def verify(folder: Path) -> dict[str, bytes]:
    """Read all files of an artifact and compare them with the manifest.

    Returns:
        name -> content.

    Raises:
        DamagedError: a file is missing or damaged, the manifest included.
        InputError: the folder is of another format, or cannot be read.
    """
    contents = {}
    for name, entry in _read_manifest(folder / MANIFEST).items():
        content = _read_bytes(folder / name)
        if _sha256(content) != entry["sha256"]:
            problem = f"is corrupt: its SHA-256 differs ({len(content)} bytes, {entry['bytes']} were written)"
            raise DamagedError(problem, path=folder / name)
        contents[name] = content
    return contents


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DamagedError("is missing: the folder is incomplete", path=path) from error
    except OSError as error:
        kind = DamagedError if error.errno in _DAMAGE else InputError
        raise kind(f"cannot be read: {error.strerror}", path=path) from error


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a manifest, name -> bytes and sha256."""
    content = _read_bytes(path)
    try:
        manifest = json.loads(content)
        del manifest["digest"]
        signed = _signed(manifest)  # the same rule in every format
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"is corrupt ({type(error).__name__}: {error})", path=path) from error
    if content != signed:  # compared as bytes: what JSON may say in many ways counts, too
        raise DamagedError("is corrupt: its digest does not match", path=path)
    _check_format(path, manifest.get("format"))
    entries: dict[str, dict[str, Any]] = manifest["files"]
    for name in entries:
        if name != Path(name).name:  # a name from a stranger must not lead out of the folder
            raise InputError("is no file of its folder", path=path, key="files", value=name)
    return entries


def _check_format(path: Path, found: Any) -> None:
    if found != FORMAT:
        problem = f"this version ({__version__}) reads format {FORMAT}"
        raise InputError(problem, path=path, key="format", value=found, remedy="update spectralvae")


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
        _check_format(folder / "config.json", config["format"])
        model = build_model(config["model"])
        model.load_state_dict(load_tensors(contents["model.safetensors"]))
        normalization = None
        if config["normalization"] is not None:
            arrays = load_arrays(contents["normalization.safetensors"])
            shape = (model.encoder.shape[0],)
            for name in ("mean", "std", *(["wavelength"] if "wavelength" in arrays else [])):
                if arrays[name].shape != shape:
                    raise ValueError(f"{name} of the normalisation has shape {arrays[name].shape}, not {shape}")
            if (transform := config["normalization"]["transform"]) not in ("log_zscore", "zscore"):
                raise ValueError(f"the normalisation has an unknown transform, {transform!r}")
            normalization = Normalization.from_parts(config["normalization"], arrays)
        latents, provenance = config.get("latents"), config.get("provenance")  # older versions have none
        return Artifact(
            model.eval(),
            config["model"],
            normalization,
            config["step"],
            folder,
            latents=None if latents is None else LatentStatistics.from_values(latents, model.embed_dim),
            provenance=None if provenance is None else Provenance.from_values(provenance),
        ), contents
    except ConfigError as error:
        raise InputError(**{**error.parts(), "path": folder / "config.json"}) from error
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        problem = f"does not hold a model of this version ({type(error).__name__}: {' '.join(str(error).split())})"
        raise InputError(problem, path=folder) from error


def is_artifact(folder: Path) -> bool:
    """Whether a folder is a checkpoint or an export, be it damaged."""
    return any((folder / name).exists() for name in (MANIFEST, "config.json", "model.safetensors"))
