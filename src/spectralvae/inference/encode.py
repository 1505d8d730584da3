"""Scenes to files of latents."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from spectralvae.config import EncodeConfig, InputSpec, ScenesConfig
from spectralvae.data.plan import expand, open_input
from spectralvae.errors import ConfigError, InputError
from spectralvae.files.jobs import Advance, Job, plan, work_through
from spectralvae.files.layout import layout_of, write_layout
from spectralvae.files.writer_base import Writer, row_chunks
from spectralvae.files.writers import new_file
from spectralvae.inference.coder import Coder, open_coder
from spectralvae.inference.latents import VARIABLES, Contents, check_scene, contents, stream_latents
from spectralvae.readers import Scene
from spectralvae.runtime.ranks import Ranks
from spectralvae.runtime.rundir import RunDir
from spectralvae.version import __version__
from spectralvae.weights.normalization import Normalization

SUFFIXES = {"netcdf": ".latents.nc", "zarr": ".latents.zarr"}


def encode(config: EncodeConfig, run: RunDir | None, ranks: Ranks, console: Console) -> None:
    """Write the latents of every input into ``run``'s directory; several processes share the inputs.

    Args:
        config: of the command.
        run: its output directory; None in all processes but the main one.
        ranks: the processes.
        console: where to print.

    Raises:
        ConfigError: inputs that would give one file, or a source that has changed since it was encoded.
        InputError: the model cannot be used on scenes, or a scene is not one it is for.
    """
    with ranks.together():
        coder = open_coder(config, run, ranks, console)
        inputs = [(path, spec) for spec in config.inputs for path in expand(spec.path)]

    def make(path: Path, spec: InputSpec) -> Job:
        scene = open_scene_for(path, spec, coder.normalization)
        with scene:
            check_scene(path, scene, coder.normalization)
        return _Encoding(scene, spec, coder, config)

    work_through(plan(inputs, make, run, ranks, console), "encoding", coder, run, ranks, console)


def open_scene_for(path: Path, spec: InputSpec, normalization: Normalization) -> Scene:
    """Open a scene as the model's training saw such: of TEMPO its band, with its quality flags.

    Raises:
        InputError, ConfigError: as `open_reader`; it is a file of latents, or one of TEMPO without that band.
    """
    if path.name.endswith(tuple(SUFFIXES.values())):
        raise InputError("is a file of latents, not a scene", path=path, remedy="give scenes only, or use `decode`")
    scene = open_input(path, spec, spec.region, band=None, flag_bits=None)
    band, flag_bits = normalization.band, normalization.flag_bits
    if scene.format != "tempo" or (band in (None, scene.band) and flag_bits is None):
        return scene
    try:
        return open_input(path, spec, spec.region, band=band, flag_bits=flag_bits)
    except ConfigError:  # without that band; the wavelengths that it has say more than a name
        with scene:
            check_scene(path, scene, normalization)
        raise


@dataclass(frozen=True)
class SceneJob:
    """One scene, of which a file is to be made."""

    scene: Scene
    spec: InputSpec
    coder: Coder
    config: ScenesConfig

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

    def left_out(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """What is said of a scene without any valid sample.

        Raises:
            InputError: such a scene is to be refused.
        """
        n_samples = int(np.prod(self.scene.shape))
        rules = ", ".join(f"{rule} {n}" for rule, n in counts.items() if n)
        why = f"none of its {n_samples} samples is valid ({rules})"
        if self.config.all_invalid == "refuse":
            raise InputError(why, path=self.scene.path, remedy="leave the file out, or set all_invalid: leave_out")
        return {"left_out": why, "n_samples": n_samples, "n_valid": 0, "invalid": counts}

    def origin(self) -> dict[str, Any]:
        """Which scene it is, and how it was read."""
        scene = self.scene
        return {
            "source": scene.path.name,
            "source_sha256": scene.sha256(),
            "source_format": scene.format,
            "source_arguments": self.spec.model_dump(mode="json", exclude={"path"}, exclude_none=True),
            "band": scene.band,
            "scan_start": scene.time.isoformat() if scene.time else None,
            "units": scene.units,
        }


@dataclass(frozen=True)
class _Encoding(SceneJob):
    """One scene."""

    config: EncodeConfig

    @property
    def result(self) -> Path:
        return self.config.output_dir / f"{self.scene.name}{SUFFIXES[self.config.format]}"

    def do(self, advance: Advance) -> dict[str, Any]:
        scene, config = self.scene, self.config
        counts: dict[str, int] = {}
        try:
            with scene, new_file(self.result, config.format) as writer:
                will_be = contents(scene, self.coder, config.log_variance, self._attributes())
                create(writer, will_be)
                write_layout(writer, layout_of(scene))
                counts = stream_latents(scene, self.coder, config.log_variance, writer.write, advance)
                n_valid = counts.pop("valid")
                if not n_valid:
                    raise _NothingValidError
        except _NothingValidError:
            return self.left_out(counts)
        n_samples = int(np.prod(scene.shape))
        grid = " x ".join(str(will_be.sizes[dim]) for dim in ("latent_channel", "y", "x"))
        return {
            "text": f"latents {grid}, {n_valid / n_samples:.1%} of the samples valid",
            "n_samples": n_samples,
            "n_valid": n_valid,
            "invalid": counts,
        }

    def _attributes(self) -> dict[str, Any]:
        """Where the latents come from."""
        origin, now = self.origin(), datetime.now(UTC).isoformat(timespec="seconds")
        facts = {
            **origin,
            "source_arguments": json.dumps(origin["source_arguments"]),
            "history": f"{now} encoded by spectralvae {__version__}",
        }
        return {key: value for key, value in facts.items() if value is not None}


class _NothingValidError(Exception):
    """Leaves the block in which a file is written, so that there is none."""


def create(writer: Writer, will_be: Contents) -> None:
    """Make all variables of a file of latents, and write those that are known."""
    writer.group("", will_be.attributes)
    for dim, size in will_be.sizes.items():
        writer.dimension(dim, size)
    for name in VARIABLES:
        if name not in will_be.small and name not in will_be.streamed:
            continue
        dims, dtype, attributes = will_be.layout(name)
        fill = np.float32(np.nan) if dtype == "f4" else None
        chunks = None
        if name in will_be.streamed:
            row = 1 if dims[0] == "latent_channel" else 0
            chunks = row_chunks(will_be.shape(name), np.dtype(dtype).itemsize, row, row + 1)
        writer.create(name, dims, dtype, attributes, fill=fill, chunks=chunks, values=will_be.small.get(name))
