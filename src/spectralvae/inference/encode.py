"""Scenes to files of latents."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from spectralvae import __version__
from spectralvae.config import EncodeConfig, InputSpec
from spectralvae.console import warn
from spectralvae.data.normalize import Normalization
from spectralvae.data.plan import expand, open_input
from spectralvae.errors import InputError
from spectralvae.inference.coder import Coder
from spectralvae.inference.files import Advance, Job, open_coder, plan, work_through
from spectralvae.inference.latents import VARIABLES, Contents, check_scene, contents, stream_latents
from spectralvae.inference.layout import layout_of, write_layout
from spectralvae.inference.writers import Writer, new_file
from spectralvae.readers import Scene
from spectralvae.rundir import RunDir
from spectralvae.training.distributed import Ranks

SUFFIXES = {"netcdf": ".latents.nc", "zarr": ".latents.zarr"}


def encode(config: EncodeConfig, run: RunDir | None, ranks: Ranks, console: Console) -> None:
    """Write the latents of every input into ``run``'s directory; several processes share the inputs.

    Args:
        config: of the command.
        run: its output directory; None in all processes but the first.
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
            check_scene(str(path), scene, coder.normalization)
        for note in scene.notes:
            warn(console, f"{path}: {note}")
        return _Encoding(scene, spec, coder, config, console)

    work_through(plan(inputs, make, run, ranks), "encoding", coder, run, ranks, console)


def open_scene_for(path: Path, spec: InputSpec, normalization: Normalization) -> Scene:
    """Open a scene as the model's training saw such: of TEMPO its band, with its quality flags.

    Raises:
        InputError, ConfigError: as `open_reader`.
    """
    scene = open_input(path, spec, spec.region, band=None, flag_bits=None)
    band, flag_bits = normalization.band, normalization.flag_bits
    if scene.format != "tempo" or (band in (None, scene.band) and flag_bits is None):
        return scene
    return open_input(path, spec, spec.region, band=band, flag_bits=flag_bits)


@dataclass(frozen=True)
class _Encoding:
    """One scene."""

    scene: Scene
    spec: InputSpec
    coder: Coder
    config: EncodeConfig
    console: Console

    @property
    def result(self) -> Path:
        return self.config.output_dir / f"{self.scene.name}{SUFFIXES[self.config.format]}"

    @property
    def source(self) -> Path:
        return self.scene.path

    @property
    def sources(self) -> Sequence[Path]:
        return self.scene.files()

    @property
    def n_pixels(self) -> int:
        return self.scene.shape[0] * self.scene.shape[1]

    def do(self, advance: Advance) -> dict[str, Any]:
        scene, config = self.scene, self.config
        with scene, new_file(self.result, config.format) as writer:
            will_be = contents(scene, self.coder, config.log_variance, self._attributes())
            create(writer, will_be)
            write_layout(writer, layout_of(scene))

            def write(name: str, part: tuple[slice, ...], values: NDArray[Any]) -> None:
                writer.write(name, part, values)

            counts = stream_latents(scene, self.coder, config.log_variance, write, advance)
            n_samples = int(np.prod(scene.shape))
            n_valid = counts.pop("valid")
            if not n_valid and config.all_invalid == "refuse":
                rules = ", ".join(f"{rule} {n}" for rule, n in counts.items() if n)
                raise InputError(
                    f"{scene.path}: none of its {n_samples} samples is valid ({rules}): leave the file out, or set "
                    "all_invalid: leave_out"
                )
        facts = {"source": str(scene.path), "n_samples": n_samples, "n_valid": n_valid, "invalid": counts}
        if not n_valid:
            shutil.rmtree(self.result) if self.result.is_dir() else self.result.unlink()
            warn(self.console, f"{scene.path}: left out, for it has no valid sample")
            return {**facts, "text": "left out"}
        grid = " x ".join(str(will_be.sizes[dim]) for dim in ("latent_channel", "y", "x"))
        return {**facts, "text": f"latents {grid}, {n_valid / n_samples:.1%} of the samples valid"}

    def _attributes(self) -> dict[str, Any]:
        """Where the latents come from."""
        scene, given = self.scene, self.spec.model_dump(mode="json", exclude={"path"}, exclude_none=True)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        facts = {
            "source": scene.path.name,
            "source_sha256": scene.sha256(),
            "source_format": scene.format,
            "source_arguments": json.dumps(given),
            "band": scene.band,
            "scan_start": scene.time.isoformat() if scene.time else None,
            "units": scene.units,
            "history": f"{now} encoded by spectralvae {__version__}",
        }
        return {key: value for key, value in facts.items() if value is not None}


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
        writer.create(name, dims, dtype, attributes, fill=fill, values=will_be.small.get(name))
