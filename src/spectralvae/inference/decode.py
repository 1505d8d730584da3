"""Files of latents to radiance, in files laid out like their sources."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console

from spectralvae import __version__
from spectralvae.analysis.composite import draw_scene, thinning
from spectralvae.config import DecodeConfig, InputSpec
from spectralvae.data.normalize import Normalization
from spectralvae.data.plan import expand
from spectralvae.errors import ConfigError, InputError
from spectralvae.inference.coder import Coder, Float32
from spectralvae.inference.encode import open_scene_for
from spectralvae.inference.files import Advance, Job, open_coder, plan, work_through
from spectralvae.inference.latents import check_latents, stream_radiance, z_reader
from spectralvae.inference.layout import Layout, new_scene, read_layout
from spectralvae.readers import Scene
from spectralvae.readers.base import check_file, damage_named
from spectralvae.readers.containers import Container, is_zarr, open_container
from spectralvae.rundir import RunDir
from spectralvae.training.distributed import Ranks
from spectralvae.training.plots import save_figure


def decode(config: DecodeConfig, run: RunDir | None, ranks: Ranks, console: Console) -> None:
    """Write the scene of every file of latents into ``run``'s directory; several processes share the files.

    Args:
        config: of the command.
        run: its output directory; None in all processes but the first.
        ranks: the processes.
        console: where to print.

    Raises:
        ConfigError: inputs that would give one file, or a source that is not among those given.
        InputError: the model cannot be used, or a file holds no latents of it.
    """
    with ranks.together():
        coder = open_coder(config, run, ranks, console)
        inputs = [(path, None) for pattern in config.inputs for path in expand(pattern)]
        sources = {path.name: path for pattern in config.sources for path in expand(pattern)}

    def make(path: Path, _: None) -> Job:
        latents = LatentsFile(path, coder)
        source = None
        if sources:
            if latents.attributes["source"] not in sources:
                raise ConfigError(
                    f"sources: none of them is {latents.attributes['source']}, from which {path} was made"
                )
            source = open_source(sources[latents.attributes["source"]], latents, coder.normalization)
        return _Decoding(latents, source, coder, config)

    work_through(plan(inputs, make, run, ranks), "decoding", coder, run, ranks, console)


class LatentsFile:
    """A file of `encode`, checked against the model that is to decode it.

    Args:
        path: the file.
        coder: the network.

    Attributes:
        attributes: of the whole.
        layout: of the source.
        shape: (ny, nx, C) of the scene.

    Raises:
        InputError: it is damaged, holds no latents, or those of another model.
    """

    def __init__(self, path: Path, coder: Coder) -> None:
        self.path = path
        check_file(path)
        if path.is_dir() and not is_zarr(path):
            raise InputError(f"{path}: a folder that is no Zarr group; give files of `spectralvae encode`")
        container = open_container(path)
        try:
            self._check(container, coder)
        finally:
            container.close()

    def _check(self, container: Container, coder: Coder) -> None:
        path = self.path
        with damage_named(path):
            self.attributes: Mapping[str, Any] = container.attributes("")
            found = {v.name: v for v in container.variables()}
        lacks = [name for name in ("latent", "valid") if name not in found]
        if lacks or "spectralvae_latents" not in self.attributes:
            raise InputError(f"{path}: is no file of `spectralvae encode`: it lacks {', '.join(lacks) or 'its mark'}")
        for name in ("latent", "valid"):
            container.check(name)
        check_latents(str(path), self.attributes, found["latent"].shape[0], coder)
        self.layout: Layout = read_layout(container)
        self.shape = ny, nx, nc = self.layout.shape
        s = coder.scale
        expected = {"latent": (coder.model.embed_dim, -(-ny // s), -(-nx // s)), "valid": (ny, nx, nc)}
        for name, shape in expected.items():
            if found[name].shape != shape or nc != coder.normalization.n_channels:
                raise InputError(
                    f"{path}: {name} has shape {found[name].shape}; a scene of {ny} x {nx} pixels and "
                    f"{coder.normalization.n_channels} channels needs {shape}"
                )

    def open(self) -> Container:
        """The file, open for reading."""
        return open_container(self.path)


def open_source(path: Path, latents: LatentsFile, normalization: Normalization) -> Scene:
    """Open the scene that latents were made from.

    Raises:
        InputError: it is another file.
    """
    given = json.loads(latents.attributes["source_arguments"])
    scene = open_scene_for(path, InputSpec(path=str(path), **given), normalization)
    if (found := scene.sha256()) != latents.attributes["source_sha256"]:
        raise InputError(
            f"{path}: is not the file that {latents.path} was made from: its SHA-256 is {found[:16]}..., that file's "
            f"was {latents.attributes['source_sha256'][:16]}..."
        )
    return scene


@dataclass(frozen=True)
class _Decoding:
    """One file of latents."""

    latents: LatentsFile
    scene: Scene | None
    coder: Coder
    config: DecodeConfig

    @property
    def result(self) -> Path:
        return self.config.output_dir / f"{self._name}.nc"

    @property
    def _name(self) -> str:
        name = self.latents.path.name
        return name.removesuffix(".nc").removesuffix(".zarr").removesuffix(".latents")

    @property
    def source(self) -> Path:
        return self.latents.path

    @property
    def sources(self) -> Sequence[Path]:
        path = self.latents.path
        return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]

    @property
    def n_pixels(self) -> int:
        ny, nx, _ = self.latents.shape
        return ny * nx

    def do(self, advance: Advance) -> dict[str, Any]:
        ny, nx, _ = self.latents.shape
        facts = {"latents": str(self.latents.path), "text": f"radiance {' x '.join(map(str, self.latents.shape))}"}
        with ExitStack() as stack:
            container = self.latents.open()
            stack.callback(container.close)
            comparison = None
            if self.scene:
                stack.enter_context(self.scene)
                comparison = Comparison(self.scene, self.coder.normalization)

            def read(rows: slice, columns: slice) -> Float32:
                with damage_named(self.latents.path):
                    part = container.read("latent", (slice(None), rows, columns))
                values = np.moveaxis(part, 0, -1).astype(np.float32)
                if not np.isfinite(values).all():
                    raise InputError(f"{self.latents.path}: latent holds values that are not finite: it is damaged")
                return values

            def valid(rows: slice, columns: slice) -> NDArray[np.bool_]:
                with damage_named(self.latents.path):
                    return np.asarray(container.read("valid", (rows, columns, slice(None))) == 1)

            with new_scene(
                self.result, self.latents.layout, self._attributes(), self.scene, self.config.carry_over
            ) as put:
                for rows, columns, radiance, z in stream_radiance(read, valid, (ny, nx), self.coder):
                    put(rows, columns, radiance)
                    if comparison:
                        comparison.add(rows, columns, z)
                    advance(radiance.shape[0] * radiance.shape[1])
        if comparison:
            figure = self.config.output_dir / "figures" / f"{self._name}.png"
            figure.parent.mkdir(exist_ok=True)
            save_figure(comparison.draw(self._name), figure)
            facts |= comparison.facts()
            facts["text"] += f", MSE in z {facts['z_mse']:.4g}; {figure}"
        return facts

    def _attributes(self) -> dict[str, Any]:
        """What tells that this is no measurement."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return {
            "spectralvae_decoded": f"radiance is reconstructed from {self.latents.path.name}",
            "spectralvae_model_sha256": self.latents.attributes["model_sha256"],
            "history": f"{now} radiance decoded from latents by spectralvae {__version__}",
        }


class Comparison:
    """A reconstruction beside its source, which is read alongside.

    Args:
        scene: the source.
        normalization: of the model.
    """

    def __init__(self, scene: Scene, normalization: Normalization) -> None:
        ny, nx, nc = self._shape = scene.shape
        self.normalization = normalization
        self._read = z_reader(scene, normalization, {})
        self._steps = thinning(ny, nx)
        kept = (len(range(0, ny, self._steps[0])), len(range(0, nx, self._steps[1])), nc)
        self._original, self._reconstruction = (np.full(kept, np.nan, np.float32) for _ in range(2))
        self._rmse = np.full((ny, nx), np.nan, np.float32)
        self._squares, self._n_valid, self._largest = 0.0, 0, 0.0

    def add(self, rows: slice, columns: slice, z_hat: Float32) -> None:
        """Compare a part.

        Args:
            rows, columns: where it lies.
            z_hat: (rows, columns, channel), NaN where invalid.
        """
        z = self._read(rows, columns)
        squares = np.square(z_hat - z)
        n = np.isfinite(squares).sum(axis=2)
        sums = np.nansum(squares, axis=2, dtype=np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            self._rmse[rows, columns] = np.sqrt(sums / n)
        self._squares += float(sums.sum())
        self._n_valid += int(n.sum())
        self._largest = max(self._largest, float(np.sqrt(np.nanmax(squares, initial=0.0))))
        (fy, ty), (fx, tx) = (_thinned(part, step) for part, step in zip((rows, columns), self._steps, strict=True))
        for kept, values in ((self._original, z), (self._reconstruction, z_hat)):
            kept[ty, tx] = values[fy, fx]

    def facts(self) -> dict[str, Any]:
        """Errors in z over all valid samples."""
        return {
            "n_valid": self._n_valid,
            "z_mse": self._squares / self._n_valid if self._n_valid else None,
            "z_largest_error": self._largest,
        }

    def draw(self, name: str) -> Figure:
        """The figure."""
        return draw_scene(
            self._original,
            self._reconstruction,
            self._rmse,
            normalization=self.normalization,
            name=name,
            pixels_per_sample=self._steps,
        )


def _thinned(part: slice, step: int) -> tuple[slice, slice]:
    """Of every step-th position of an axis those in a part: where they are in the part, and among all of them."""
    first = -(-part.start // step)
    return slice(first * step - part.start, None, step), slice(first, -(-part.stop // step))
