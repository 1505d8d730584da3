"""Scenes to small files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from spectralvae import __version__
from spectralvae.artifact import weights_sha256
from spectralvae.codec.coding import Coded, SceneCoder
from spectralvae.codec.container import SUFFIX, write_container
from spectralvae.codec.layouts import pack_layout
from spectralvae.codec.rates import Target
from spectralvae.codec.scratch import Scratch, bands
from spectralvae.codec.stages import LEAST_BOUND, MARGIN, Bound
from spectralvae.config import CompressConfig, InputSpec
from spectralvae.data.normalize import Normalization
from spectralvae.data.plan import expand
from spectralvae.errors import ConfigError, InputError
from spectralvae.inference.coder import Coder
from spectralvae.inference.encode import open_scene_for
from spectralvae.inference.files import Advance, Job, open_coder, plan, work_through
from spectralvae.inference.latents import check_scene
from spectralvae.inference.layout import layout_of
from spectralvae.inference.reading import z_reader
from spectralvae.readers import Scene
from spectralvae.rundir import RunDir, write_atomic
from spectralvae.training.distributed import Ranks

_OVERHEAD = 512  # bytes of the container: more than it needs for magic, lengths, checksums and the figures in the head


def compress(config: CompressConfig, run: RunDir | None, ranks: Ranks, console: Console) -> None:
    """Write a file for every input into ``run``'s directory; several processes share the inputs.

    Args:
        config: of the command.
        run: its output directory; None in all processes but the first.
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
            check_scene(str(path), scene, coder.normalization)
        return _Compressing(scene, spec, coder, target, config)

    def report(run: RunDir) -> None:
        write_atomic(run.path / "report.json", json.dumps(_report(run.record["files"], coder), indent=2) + "\n")

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
        bound = Bound("z", config.bound.z)
    else:
        assert config.bound.relative is not None
        bound = Bound("relative", config.bound.relative)
        if normalization.transform != "log_zscore":
            raise ConfigError(
                f"bound.relative: {bound.value:g} needs radiance above 0, which only the transform log_zscore grants; "
                f"the model has {normalization.transform}: give bound.z"
            )
    least = float(np.nanmin(bound.in_z(normalization)))
    if least < LEAST_BOUND * MARGIN:
        raise ConfigError(
            f"bound.{bound.kind}: {bound.value:g} is {least:.3g} in z for the channel of most spread; at least "
            f"{LEAST_BOUND * MARGIN:g} can be kept, as radiance is stored in float32"
        )
    return Target("bound", bound=bound)


@dataclass(frozen=True)
class _Compressing:
    """One scene."""

    scene: Scene
    spec: InputSpec
    coder: Coder
    target: Target
    config: CompressConfig

    @property
    def result(self) -> Path:
        return self.config.output_dir / f"{self.scene.name}{SUFFIX}"

    @property
    def source(self) -> Path:
        return self.scene.path

    @property
    def sources(self) -> Sequence[Path]:
        return self.scene.files()

    @property
    def n_pixels(self) -> int:
        return self.scene.shape[0] * self.scene.shape[1]

    @property
    def notes(self) -> Sequence[str]:
        return self.scene.notes

    def do(self, advance: Advance) -> dict[str, Any]:
        scene, folder = self.scene, self.config.output_dir
        counts: dict[str, int] = {}
        with scene, Scratch(folder, scene.shape) as z:
            # beyond the clip, too
            read = z_reader(scene, replace(self.coder.normalization, clip=math.inf), counts)
            for rows in bands(scene.shape):
                everywhere = slice(0, scene.shape[1])
                z.write(rows, everywhere, read(rows, everywhere))
                advance((rows.stop - rows.start) * scene.shape[1] // 2)
            layout = pack_layout(layout_of(scene))
            head = self._head()
            fixed = len(layout) + len(json.dumps(head)) + _OVERHEAD
            scene_coder = SceneCoder(z, self.coder, self.target, fixed, folder, str(scene.path))
            if not scene_coder.n_valid:
                return self._left_out(counts)
            coded = scene_coder.code()
        head |= {"stages": coded.stages.values(), "errors": coded.errors.values()}
        write_container(self.result, head, [("LAYT", layout), *coded.blocks.items()])
        advance(self.n_pixels - self.n_pixels // 2)
        return self._facts(coded, len(layout), counts)

    def _head(self) -> dict[str, Any]:
        """All that is known before anything is coded."""
        scene, given = self.scene, self.spec.model_dump(mode="json", exclude={"path"}, exclude_none=True)
        coder = self.coder
        return {
            "spectralvae_version": __version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "shape": list(scene.shape),
            "source": scene.path.name,
            "source_sha256": scene.sha256(),
            "source_format": scene.format,
            "source_arguments": given,
            "band": scene.band,
            "scan_start": scene.time.isoformat() if scene.time else None,
            "units": scene.units,
            "model": coder.path.name if coder.step is None else f"{coder.path.name}, step {coder.step}",
            **coder.identity,
            "overlap": coder.overlap,
        }

    def _left_out(self, counts: Mapping[str, int]) -> dict[str, Any]:
        n_samples = math.prod(self.scene.shape)
        rules = ", ".join(f"{rule} {n}" for rule, n in counts.items() if n)
        why = f"none of its {n_samples} samples is valid ({rules})"
        if self.config.all_invalid == "refuse":
            raise InputError(f"{self.scene.path}: {why}: leave the file out, or set all_invalid: leave_out")
        return {"left_out": why, "n_samples": n_samples}

    def _facts(self, coded: Coded, n_layout: int, counts: Mapping[str, int]) -> dict[str, Any]:
        n_bytes = self.result.stat().st_size
        blocks = {kind: len(content) for kind, content in coded.blocks.items()} | {"LAYT": n_layout}
        n_samples = math.prod(self.scene.shape)
        n_source = sum(file.stat().st_size for file in self.sources)
        errors = coded.errors
        way = "network and components" if coded.stages.network_step is not None else "components"
        relative = "" if errors.max_relative_error is None else f", {errors.max_relative_error:.3g} of radiance"
        return {
            "text": f"{n_bytes:,} bytes, {4 * n_samples / n_bytes:.1f} times fewer than float32, by {way}; RMS error "
            f"of z {math.sqrt(errors.mse):.3g}, largest {errors.max_error:.3g}{relative}",
            "bytes": n_bytes,
            "ratio": 4 * n_samples / n_bytes,
            "source_bytes": n_source,
            "ratio_to_source": n_source / n_bytes,
            "blocks": blocks,
            "bytes_without_coordinates": n_bytes - n_layout,
            "n_samples": n_samples,
            **errors.values(),
            "stages": coded.stages.values(),
            "blocks_bytes_linear": coded.n_bytes_linear,
            "blocks_bytes_network": coded.n_bytes_network,
            "invalid": dict(counts),
        }


def _report(files: Mapping[str, Mapping[str, Any]], coder: Coder) -> dict[str, Any]:
    """All files, and what the model adds to them, for whoever has not got it."""
    made = {name: facts for name, facts in files.items() if "bytes" in facts}
    n_model = sum(4 * p.numel() for p in coder.model.parameters())
    n_bytes, n_source = (sum(facts[key] for facts in made.values()) for key in ("bytes", "source_bytes"))
    saved = (n_source - n_bytes) / len(made) if made else 0.0
    by_network = [
        facts["blocks_bytes_linear"] - facts["blocks_bytes_network"]
        for facts in made.values()
        if facts["stages"]["network_step"] is not None
    ]
    each = sum(by_network) / len(made) if made else 0.0
    return {
        "files": files,
        "bytes": n_bytes,
        "source_bytes": n_source,
        "model_bytes": n_model,
        "model_sha256": weights_sha256(coder.model),
        # from how many such files on files and model together are smaller than the sources; None: never
        "break_even_files": math.ceil(n_model / saved) if saved > 0 else None,
        # the same, than files without the network
        "break_even_files_of_network": math.ceil(n_model / each) if each > 0 else None,
    }
