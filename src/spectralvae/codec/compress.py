"""Scenes to small files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from pydantic import ValidationError
from rich.console import Console

from spectralvae.codec.coding import SceneCoder
from spectralvae.codec.container import SUFFIX, container_size, read_container, write_container
from spectralvae.codec.layouts import pack_layout, unpack_layout
from spectralvae.codec.rates import Target
from spectralvae.codec.scratch import Scratch, bands
from spectralvae.codec.stages import LEAST_BOUND, MARGIN, Bound, Head
from spectralvae.config import CompressConfig, InputSpec
from spectralvae.data.plan import expand
from spectralvae.errors import ConfigError, DamagedError
from spectralvae.files.jobs import Advance, Job, plan, work_through
from spectralvae.files.layout import layout_of
from spectralvae.inference.coder import Coder, open_coder
from spectralvae.inference.encode import SceneJob, open_scene_for
from spectralvae.inference.latents import check_scene
from spectralvae.inference.reading import z_reader
from spectralvae.readers import Scene
from spectralvae.runtime.atomic import write_atomic
from spectralvae.runtime.ranks import Ranks
from spectralvae.runtime.rundir import RunDir
from spectralvae.version import __version__
from spectralvae.weights.normalization import Normalization

_KINDS = ("LAYT", "MASK", "LATN", "SPEC", "COMP", "RESD")
_LARGEST = float(np.finfo(np.float32).max)
_READING = 0.2  # of the work


def compress(config: CompressConfig, run: RunDir | None, ranks: Ranks, console: Console) -> None:
    """Write a file for every input into ``run``'s directory; several processes share the inputs.

    Args:
        config: of the command.
        run: its output directory; None in all processes but the main one.
        ranks: the processes.
        console: where to print.

    Raises:
        ConfigError: a bound that float32 or the model cannot keep, inputs that would give one file, or a source that
            has changed since it was compressed.
        InputError: the model cannot be used on scenes, or a scene is not one it is for.
        RunError: what is asked for cannot be met.
    """
    with ranks.together():
        coder = open_coder(config, run, ranks, console)
        target = target_of(config, coder.normalization)
        inputs = [(path, spec) for spec in config.inputs for path in expand(spec.path)]

    def make(path: Path, spec: InputSpec) -> Job:
        scene = open_scene_for(path, spec, coder.normalization)
        with scene:
            check_scene(path, scene, coder.normalization)
        return _Compressing(scene, spec, coder, config, target)

    def report(run: RunDir) -> None:
        content = _report(run.path, run.record["files"], coder, fewest=target.kind in ("bound", "mse"))
        write_atomic(run.path / "report.json", json.dumps(content, indent=2, allow_nan=False) + "\n")

    work_through(plan(inputs, make, run, ranks, console), "compressing", coder, run, ranks, console, report)


def target_of(config: CompressConfig, normalization: Normalization) -> Target:
    """What a config asks for.

    Raises:
        ConfigError: a bound that is too small, or of radiance that may be 0.
    """
    if config.rate is not None:
        rate = config.rate
        if rate.step is not None:
            return Target("step", rate.step)
        return Target("bytes", rate.bytes) if rate.bytes is not None else Target("mse", rate.mse or 0.0)
    assert config.bound is not None
    if config.bound.z is not None:
        bound = Bound(kind="z", value=config.bound.z)
    else:
        assert config.bound.relative is not None
        bound = Bound(kind="relative", value=config.bound.relative)
        if normalization.transform != "log_zscore":
            raise ConfigError(
                "a relative bound needs radiance above 0, which only the transform log_zscore ensures; the model has "
                f"{normalization.transform}",
                key="bound.relative",
                value=bound.value,
                remedy="give bound.z",
            )
    least = float(np.nanmin(bound.in_z(normalization)))
    if least < LEAST_BOUND * MARGIN:
        raise ConfigError(
            f"is {least:.3g} in z for the channel with the largest spread; radiance in float32 can keep "
            f"{LEAST_BOUND * MARGIN:g} or more",
            key=f"bound.{bound.kind}",
            value=bound.value,
        )
    return Target("bound", bound=bound)


@dataclass(frozen=True)
class _Compressing(SceneJob):
    """One scene."""

    config: CompressConfig
    target: Target

    @property
    def result(self) -> Path:
        return self.config.output_dir / f"{self.scene.name}{SUFFIX}"

    def do(self, advance: Advance) -> dict[str, Any]:
        scene, folder = self.scene, self.config.output_dir
        counts: dict[str, int] = {}
        progress = _Progress(advance, self.n_pixels)
        with scene, Scratch(folder, scene.shape) as z:
            # beyond the clip, too
            read = z_reader(scene, replace(self.coder.normalization, clip=_LARGEST), counts)
            for rows in bands(scene.shape):
                everywhere = slice(0, scene.shape[1])
                z.write(rows, everywhere, read(rows, everywhere))
                progress.add(_READING * (rows.stop - rows.start) / scene.shape[0])
            layout = pack_layout(layout_of(scene))
            unpack_layout(layout)  # what cannot be read back is not written
            about = self._about()
            fixed = len(layout) + container_size(_longest(about), len(_KINDS), 0)
            scene_coder = SceneCoder(
                z,
                self.coder,
                self.target,
                fixed,
                folder,
                str(scene.path),
                lambda share: progress.add((1 - _READING) * share),
            )
            if not scene_coder.n_valid:
                return self.left_out(counts)
            coded = scene_coder.code()
        head = Head(**about, stages=coded.stages, errors=coded.errors, estimated_bytes=coded.estimated_bytes)
        assert coded.blocks.keys() | {"LAYT"} == head.kinds()
        write_container(self.result, head.model_dump(), [("LAYT", layout), *coded.blocks.items()])
        facts = facts_of(self.result)
        return {"text": _text(facts), **facts, "invalid": counts}

    def _about(self) -> dict[str, Any]:
        """What the head says of scene and model."""
        coder = self.coder
        return {
            "spectralvae_version": __version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "shape": self.scene.shape,
            **self.origin(),
            "radiance_bytes": _stored_bytes(self.scene),
            "model": "/".join(coder.path.absolute().parts[-3:]),
            **coder.identity,
            "overlap": coder.overlap,
        }


class _Progress:
    """Pixels of a bar, from shares of the work."""

    def __init__(self, advance: Advance, n_pixels: int) -> None:
        self._advance, self._n_pixels, self._share, self._shown = advance, n_pixels, 0.0, 0

    def add(self, share: float) -> None:
        self._share += share
        now = round(self._share * self._n_pixels)
        self._advance(now - self._shown)
        self._shown = now


def _stored_bytes(scene: Scene) -> int | None:
    """What radiance takes in a file of HDF5 (netCDF-4), as it is packed there; of a region its share."""
    if "radiance" not in scene.places or not scene.path.is_file() or not h5py.is_hdf5(scene.path):
        return None
    with h5py.File(scene.path) as file:
        variable = file[scene.places["radiance"].name]
        n_bytes: int = variable.id.get_storage_size()
        return round(n_bytes * math.prod(scene.shape) / int(variable.size))


def _longest(about: dict[str, Any]) -> dict[str, Any]:
    """A head that is no shorter than any of the file's will be."""
    figure, count = 1.2345678901234567e-100, 12345678901234567
    bound = {"kind": "relative", "value": figure}
    stages = {"step": figure, "n_components": count, "network_step": figure, "bound": bound, "margin": figure}
    figures = ("mse", "max_error", "max_relative_error")
    errors = {
        "n_valid": count,
        "n_beyond_clip": count + 9,
        **{name: figure * (i + 7) for i, name in enumerate(figures)},
    }
    return {
        **about,
        "stages": stages,
        "errors": errors,
        "estimated_bytes": {"components": count, "network": count // 7},
    }


def facts_of(path: Path) -> dict[str, Any]:
    """What report.json says of a file.

    Raises:
        DamagedError: it is corrupt.
    """
    content, blocks = read_container(path)
    head, n_bytes = parse_head(path, content), path.stat().st_size
    n_samples = math.prod(head.shape)
    sizes = {kind: len(block) for kind, block in blocks.items()}
    stored = head.radiance_bytes
    return {
        "source": head.source,
        "bytes": n_bytes,
        "ratio": 4 * n_samples / n_bytes,
        "radiance_bytes": stored,
        "ratio_to_source": None if stored is None else stored / n_bytes,
        "blocks": sizes,
        "bytes_without_coordinates": n_bytes - sizes["LAYT"],
        "n_samples": n_samples,
        **head.errors.model_dump(),
        "stages": head.stages.model_dump(),
        "estimated_bytes": head.estimated_bytes,
    }


def parse_head(path: Path, content: Mapping[str, Any]) -> Head:
    """The head of a file, checked.

    Raises:
        DamagedError: it is no head of this version.
    """
    try:
        return Head.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedError(f"is corrupt: {where} of its header: {first['msg']}", path=path) from error


def _text(facts: Mapping[str, Any]) -> str:
    way = "network and components" if facts["stages"]["network_step"] is not None else "components"
    relative = facts["max_relative_error"]
    return (
        f"{facts['bytes']:,} bytes, {facts['ratio']:.1f} times fewer than float32, by {way}; RMS error of z "
        f"{math.sqrt(facts['mse']):.3g}, largest {facts['max_error']:.3g}"
        + ("" if relative is None else f", {relative:.3g} of radiance")
    )


def _report(folder: Path, noted: Mapping[str, Mapping[str, Any]], coder: Coder, fewest: bool) -> dict[str, Any]:
    """All files, and what the model adds to them, for whoever has not got it.

    Args:
        folder: where they are.
        noted: what run.json knows of them.
        coder: the model.
        fewest: they have the fewest bytes that meet an error, so that the network may save some.
    """
    # of a file that was made right before a kill, nothing else was noted
    files = {
        name: facts if "bytes" in facts or "left_out" in facts else {**facts, **facts_of(folder / name)}
        for name, facts in noted.items()
    }
    made = [facts for facts in files.values() if "bytes" in facts]
    n_model = sum(4 * p.numel() for p in coder.model.parameters())
    stored = [facts["radiance_bytes"] for facts in made]
    n_bytes = sum(facts["bytes"] for facts in made)
    n_stored = None if None in stored else sum(stored)
    saved = 0.0 if n_stored is None else (n_stored - n_bytes) / max(1, len(made))
    by_network = [
        facts["estimated_bytes"]["components"] - facts["estimated_bytes"]["network"]
        for facts in made
        if fewest and facts["stages"]["network_step"] is not None
    ]
    each = sum(by_network) / max(1, len(made))
    return {
        "files": files,
        "bytes": n_bytes,
        "radiance_bytes": n_stored,
        "model_bytes": n_model,
        "model_sha256": coder.identity["model_sha256"],
        # from how many such files on they and the model are smaller than the radiance in the sources; None: never
        "break_even_files": math.ceil(n_model / saved) if saved > 0 else None,
        # the same, than files without the network
        "break_even_files_of_network": math.ceil(n_model / each) if each > 0 else None,
    }
