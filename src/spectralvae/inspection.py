"""`spectralvae inspect`: what a file or folder is, and whether it is sound; nothing is changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from spectralvae.codec.container import SUFFIX as COMPRESSED
from spectralvae.codec.container import read_container, read_head
from spectralvae.data.blocks import BLOCK_SAMPLES
from spectralvae.data.store import Store
from spectralvae.data.verify import verify_store
from spectralvae.errors import DamagedError, InputError
from spectralvae.inference.encode import SUFFIXES
from spectralvae.readers import Scene, open_reader
from spectralvae.readers.base import check_file, damage_named
from spectralvae.readers.containers import open_container
from spectralvae.readers.products import describe_fields, product_of
from spectralvae.runtime.console import new_progress
from spectralvae.runtime.rundir import TOOL, command_of
from spectralvae.weights.artifact import is_artifact, weights_sha256
from spectralvae.weights.checkpoint import list_checkpoints
from spectralvae.weights.loading import load_artifact

_SCENES_SHOWN = 20
Facts = dict[str, Any]


def inspect(path: Path, *, verify: bool, as_json: bool, console: Console) -> None:
    """Print what a path holds: a store, a run, a checkpoint or export, latents, a scene, or a level-2 product.

    Args:
        path: file or folder.
        verify: read all of it, and compare it with what it says of itself.
        as_json: print one JSON object.
        console: to print on.

    Raises:
        InputError: it is none of these, or `verify` found something wrong.
    """
    if not path.exists():
        raise InputError("no such file or folder", path=path, remedy="check the path")
    facts, problems = _kind(path)(path, verify)
    if verify:
        facts["problems"] = problems
    if as_json:
        console.print_json(json.dumps(facts, default=_plain), indent=2)
    else:
        _show(facts, console)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InputError(f"is not sound: {problems[0]}{more}", path=path)


def _kind(path: Path) -> Callable[[Path, bool], tuple[Facts, list[str]]]:
    if path.name.endswith(COMPRESSED):
        return _compressed
    if path.name.endswith(tuple(SUFFIXES.values())):
        return _latents
    if path.is_dir():
        command = command_of(path)
        if command == "prepare" or _is_store(path):
            return _store
        if is_artifact(path):
            return _artifact
        if command is not None:
            return _run
    elif product_of(path):
        return _product
    return _scene


def _is_store(path: Path) -> bool:
    try:
        return "spectralvae_store" in json.loads((path / "zarr.json").read_text())["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _store(path: Path, verify: bool) -> tuple[Facts, list[str]]:
    store = Store(path)
    rules: dict[str, int] = {}
    for record in store.scenes:
        for rule, n in record.invalid.items():
            rules[rule] = rules.get(rule, 0) + n
    n_samples = sum(int(np.prod(record.shape)) for record in store.scenes)
    wavelength = store.arrays["wavelength"]
    facts: Facts = {
        "kind": "store",
        "path": path,
        "hash": store.hash,
        "dtype": store.dtype.name,
        "normalization": store.normalization.settings(),
        "statistics_from": store.attributes.get("statistics_from"),
        "channels": len(wavelength),
        "wavelength_nm": [float(wavelength[0]), float(wavelength[-1])],
        "training_scenes": len(store.indices("train")),
        "validation_scenes": len(store.indices("val")),
        "samples": n_samples,
        "invalid_samples": {rule: n for rule, n in rules.items() if n},
        "invalid_fraction": sum(rules.values()) / n_samples,
        "clipped_samples": int(store.arrays["n_clipped"].sum()),
        "rounding_max": float(store.arrays["rounding_max"].max()),
        "targets": store.attributes.get("targets", {}),
        "left_out": store.attributes.get("left_out", []),
        "scenes": [
            {
                "id": record.id,
                "split": record.split,
                "shape": record.shape,
                "time": record.time,
                "invalid": f"{record.n_invalid / np.prod(record.shape):.2%}",
            }
            for record in store.scenes
        ],
    }
    if "noise" in store.arrays:
        facts["noise_median"] = float(np.nanmedian(store.arrays["noise"]))
    if not verify:
        return facts, []
    with new_progress() as progress:
        n_pixels = sum(record.shape[0] * record.shape[1] for record in store.scenes)
        task = progress.add_task("reading the store (pixels)", total=n_pixels)
        return facts, verify_store(store, partial(progress.advance, task))


def _run(path: Path, verify: bool) -> tuple[Facts, list[str]]:
    record = json.loads((path / "run.json").read_text())
    checkpoints = list_checkpoints(path)
    facts: Facts = {
        "kind": f"run of {TOOL} {record['command']}",
        "path": path,
        **{key: record.get(key) for key in ("state", "version", "error") if record.get(key)},
        "starts": len(record["starts"]),
        "first_start": record["starts"][0]["time"],
        "last_end": record["starts"][-1].get("ended"),
        "checkpoints": [checkpoint.name for checkpoint in checkpoints],
    }
    problems = []
    for checkpoint in checkpoints if verify else []:
        problems += _artifact(checkpoint, True)[1]
    return facts, problems


def _artifact(path: Path, verify: bool) -> tuple[Facts, list[str]]:
    """Loading one verifies every file by its digest, always."""
    try:
        artifact = load_artifact(path)
    except InputError as error:
        if not verify:
            raise
        return {"kind": "model", "path": path}, [str(error)]
    normalization = artifact.normalization
    facts: Facts = {
        "kind": "model",
        "path": path,
        "step": artifact.step,
        "weights_sha256": weights_sha256(artifact.model),
        "parameters": sum(p.numel() for p in artifact.model.parameters()),
        "settings": artifact.settings,
        "normalization": normalization.settings() if normalization else None,
        "latents": artifact.latents.values() if artifact.latents else None,
        "provenance": artifact.provenance.values() if artifact.provenance else None,
    }
    if normalization is not None and normalization.wavelength is not None:
        facts["wavelength_nm"] = [float(normalization.wavelength[0]), float(normalization.wavelength[-1])]
    return facts, []


def _scene(path: Path, verify: bool) -> tuple[Facts, list[str]]:
    with open_reader(path) as scene:
        wavelength = scene.wavelength
        facts: Facts = {
            "kind": f"scene ({scene.format})",
            "path": path,
            "shape": scene.shape,
            "bytes": sum(file.stat().st_size for file in scene.files()),
            **{key: value for key in ("band", "units", "version", "time") if (value := getattr(scene, key))},
            "wavelength_nm": [float(np.nanmin(wavelength)), float(np.nanmax(wavelength))],
            "stored_together": scene.chunk,
            "absent": scene.absent,
            **({"notes": scene.notes} if scene.notes else {}),
        }
        if verify:
            facts |= _all_samples(scene)
    return facts, []


def _all_samples(scene: Scene) -> Facts:
    """What only reading everything tells."""
    counts: dict[str, int] = {}
    low, high = np.inf, -np.inf
    with new_progress() as progress:
        task = progress.add_task("reading the scene (pixels)", total=scene.shape[0] * scene.shape[1])
        for rows, columns in scene.blocks(BLOCK_SAMPLES):
            values, found = scene.read(rows, columns)
            counts = {rule: counts.get(rule, 0) + n for rule, n in found.items()}
            low = float(np.fmin.reduce(values, axis=None, initial=low))
            high = float(np.fmax.reduce(values, axis=None, initial=high))
            progress.advance(task, values.shape[0] * values.shape[1])
    n_samples = int(np.prod(scene.shape))
    return {
        "sha256": scene.sha256(),
        "invalid_samples": {rule: n for rule, n in counts.items() if n},
        "valid_samples": n_samples - sum(counts.values()),
        "least_and_largest": [low, high] if low <= high else None,
    }


def _latents(path: Path, verify: bool) -> tuple[Facts, list[str]]:
    check_file(path)
    with closing(open_container(path)) as container, damage_named(path):
        attributes = container.attributes("")
        variables = {variable.name: variable for variable in container.variables()}
        if "spectralvae_latents" not in attributes or "latent" not in variables or "valid" not in variables:
            raise InputError("is named as a file of `spectralvae encode`, but holds no latents", path=path)
        for name in variables if verify else ():
            container.check(name)
        plain = {key: np.ravel(v)[0] if np.size(v) == 1 else v for key, v in attributes.items()}  # numbers are vectors
        facts: Facts = {"kind": "latents", "path": path, **plain}
        facts["latent_channels"], *facts["grid"] = variables["latent"].shape
        facts["scene"] = list(variables["valid"].shape)
        if verify:
            shape = facts["scene"]
            n_valid, low, high = 0, np.inf, -np.inf
            for row in range(0, shape[0], height := max(1, BLOCK_SAMPLES // (shape[1] * shape[2]))):
                n_valid += int(
                    (container.read("valid", (slice(row, row + height), slice(None), slice(None))) == 1).sum()
                )
            for row in range(facts["grid"][0]):
                values = container.read("latent", (slice(None), slice(row, row + 1), slice(None)))
                low, high = min(low, float(values.min())), max(high, float(values.max()))
            facts["valid_fraction"] = n_valid / int(np.prod(shape))
            facts["least_and_largest"] = [low, high]
            if not (np.isfinite(low) and np.isfinite(high)):
                return facts, ["latent holds values that are not finite"]
    return facts, []


def _compressed(path: Path, verify: bool) -> tuple[Facts, list[str]]:
    """Only the checksums of what is read are checked."""
    facts: Facts = {"kind": "compressed scene", "path": path, "bytes": path.stat().st_size}
    if not verify:
        return facts | read_head(path), []
    try:
        head, blocks = read_container(path)
    except DamagedError as error:
        return facts, [str(error)]
    return facts | head | {"blocks": {kind: len(content) for kind, content in blocks.items()}}, []


def _product(path: Path, verify: bool) -> tuple[Facts, list[str]]:
    return {"kind": f"TEMPO level 2, {product_of(path)}", "path": path, "fields": describe_fields(path)}, []


def _show(facts: Facts, console: Console) -> None:
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], (dict, str)):
            console.print(f"{name:{width}s}  {len(value)}:")
            for entry in value[:_SCENES_SHOWN]:
                console.print(f"  {_line(entry)}")
            if len(value) > _SCENES_SHOWN:
                console.print(f"  ... and {len(value) - _SCENES_SHOWN} more (--json lists all)")
        elif isinstance(value, dict) and any(isinstance(entry, dict) for entry in value.values()):
            console.print(f"{name}:")
            for key, entry in value.items():
                console.print(f"  {key}: {_line(entry)}")
        else:
            console.print(f"{name:{width}s}  {_line(value)}")


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_line(entry)}" for key, entry in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_line, value)) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)
