"""Files of `compress` to radiance, in files laid out like their sources."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from spectralvae.codec.compress import parse_head
from spectralvae.codec.container import SUFFIX, read_container, read_head
from spectralvae.codec.decoding import stream_scene
from spectralvae.codec.layouts import unpack_layout
from spectralvae.codec.stages import Head
from spectralvae.config import DecompressConfig
from spectralvae.data.plan import expand
from spectralvae.errors import ConfigError, DamagedError, InputError
from spectralvae.files.jobs import Advance, Job, plan, work_through
from spectralvae.files.layout import new_scene
from spectralvae.inference.coder import Coder, open_coder
from spectralvae.runtime.ranks import Ranks
from spectralvae.runtime.rundir import RunDir
from spectralvae.version import __version__

_MOST_PIXELS = 2**28  # of a scene


def decompress(config: DecompressConfig, run: RunDir | None, ranks: Ranks, console: Console) -> None:
    """Write the scene of every file into ``run``'s directory; several processes share the files.

    Args:
        config: of the command.
        run: its output directory; None in all processes but the main one.
        ranks: the processes.
        console: where to print.

    Raises:
        ConfigError: inputs that would give one file.
        InputError: a file is corrupt, none of `compress`, or of another model.
    """
    with ranks.together():
        coder = open_coder(config, run, ranks, console)
        inputs = [(path, None) for pattern in config.inputs for path in expand(_in_folder(pattern))]

    def make(path: Path, _: None) -> Job:
        return _Decompressing(path, read_head_for(path, coder), coder, config)

    work_through(plan(inputs, make, run, ranks, console), "decompressing", coder, run, ranks, console)


def _in_folder(pattern: str) -> str:
    folder = Path(pattern).expanduser()
    return f"{glob.escape(str(folder))}/*{SUFFIX}" if folder.is_dir() else pattern


def read_head_for(path: Path, coder: Coder) -> Head:
    """The head of a file that a model is to decode.

    Raises:
        InputError: it is of another model, no file of `compress`, or of a newer version.
        DamagedError: it is corrupt.
    """
    head = parse_head(path, read_head(path))
    for name, what in (("model_sha256", "weights"), ("normalization_sha256", "normalisation")):
        ours, theirs = coder.identity[name], getattr(head, name)
        if ours != theirs:
            raise InputError(
                f"was compressed with another model (SHA-256 of its {what}: {theirs[:16]}..., of this one: "
                f"{ours[:16]}...)",
                path=path,
                remedy=f"give that model, {head.model}",
            )
    ny, nx, nc = head.shape
    if nc != coder.normalization.n_channels or head.stages.n_components > nc or ny * nx > _MOST_PIXELS:
        raise DamagedError(
            f"is corrupt: {ny} x {nx} x {nc} samples and {head.stages.n_components} components do not fit a model of "
            f"{coder.normalization.n_channels} channels",
            path=path,
        )
    return head


@dataclass(frozen=True)
class _Decompressing:
    """One file."""

    path: Path
    head: Head
    coder: Coder
    config: DecompressConfig

    @property
    def result(self) -> Path:
        return self.config.output_dir / f"{self.path.name.removesuffix(SUFFIX)}.nc"

    @property
    def source(self) -> Path:
        return self.path

    @property
    def sources(self) -> Sequence[Path]:
        return [self.path]

    @property
    def notes(self) -> Sequence[str]:
        return ()

    @property
    def n_pixels(self) -> int:
        ny, nx, _ = self.head.shape
        return ny * nx

    def do(self, advance: Advance) -> dict[str, Any]:
        _, blocks = read_container(self.path)
        head, stages = self.head, self.head.stages
        ny, nx, nc = head.shape
        try:
            if blocks.keys() != head.kinds():
                raise ValueError(f"it has blocks {', '.join(blocks)}, not {', '.join(sorted(head.kinds()))}")
            layout, coder = unpack_layout(blocks["LAYT"]), self.coder.overlapping(head.overlap)
            if layout.shape != head.shape:
                raise ValueError(f"coordinates are of {layout.shape}, radiance is {head.shape}")
            with new_scene(self.result, layout, self._attributes()) as put:
                for rows, radiance in stream_scene(stages, blocks, head.shape, coder, self.config.output_dir):
                    put(rows, slice(0, nx), radiance)
                    advance(radiance.shape[0] * nx)
        # checksums are right, so somebody made it so
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
            raise DamagedError(f"is corrupt: {type(error).__name__}: {error}", path=self.path) from error
        bound = stages.bound.model_dump() if stages.bound else None
        return {"text": f"radiance {ny} x {nx} x {nc}", **head.errors.model_dump(), "bound": bound}

    def _attributes(self) -> dict[str, Any]:
        """What tells that this is no measurement, and how far from it."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        errors, bound = self.head.errors, self.head.stages.bound
        known = f"largest error of z {errors.max_error:.6g}, mean squared error {errors.mse:.6g}"
        if bound is not None:
            known += f"; bound: {bound.value:g} ({bound.kind})"
        return {
            "spectralvae_decompressed": f"radiance is reconstructed from {self.path.name}; {known}",
            "spectralvae_model_sha256": self.head.model_sha256,
            "history": f"{now} radiance decompressed by spectralvae {__version__}",
        }
