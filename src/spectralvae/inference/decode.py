"""Files of latents to radiance, in files laid out like their sources."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console

from spectralvae.config import DecodeConfig, InputSpec
from spectralvae.data.plan import expand
from spectralvae.errors import ConfigError, InputError
from spectralvae.files.jobs import Advance, Job, plan, work_through
from spectralvae.files.layout import new_scene, read_layout
from spectralvae.files.source import check_source
from spectralvae.inference.coder import Coder, Float32, open_coder
from spectralvae.inference.encode import open_scene_for
from spectralvae.inference.latents import check_latents, stream_radiance
from spectralvae.inference.reading import z_reader
from spectralvae.plotting.composite import draw_scene, thinning
from spectralvae.plotting.figures import save_figure
from spectralvae.readers import Scene, guard
from spectralvae.readers.base import check_file, damage_named
from spectralvae.readers.containers import Container, is_zarr, open_container
from spectralvae.runtime.ranks import Ranks
from spectralvae.runtime.rundir import RunDir
from spectralvae.version import __version__
from spectralvae.weights.normalization import Normalization

# Those of a file of `encode` without which it cannot be decoded.
_ATTRIBUTES = ("spectralvae_latents", "model_sha256", "source", "source_sha256", "source_arguments")


def decode(config: DecodeConfig, run: RunDir | None, ranks: Ranks, console: Console) -> None:
    """Write the scene of every file of latents into ``run``'s directory; several processes share the files.

    Args:
        config: of the command.
        run: its output directory; None in all processes but the main one.
        ranks: the processes.
        console: where to print.

    Raises:
        ConfigError: inputs that would give one file, or a source that is not among those given.
        InputError: the model cannot be used, or a file holds no latents of it.
    """
    with ranks.together():
        coder = open_coder(config, run, ranks, console)
        inputs = [(path, None) for pattern in config.inputs for path in expand(_in_folder(pattern))]
        sources = [path for pattern in config.sources for path in expand(pattern, "sources")]
        if run:
            for path in sources:
                run.refuse_inside("sources", path)

    def make(path: Path, _: None) -> Job:
        latents = LatentsFile(path, coder)
        source = open_source(sources, latents, coder.normalization) if sources else None
        return _Decoding(latents, source, coder, config)

    work_through(plan(inputs, make, run, ranks, console), "decoding", coder, run, ranks, console)


def _in_folder(pattern: str) -> str:
    """A pattern of the files of latents in a folder; other patterns as they are."""
    folder = Path(pattern).expanduser()
    return f"{glob.escape(str(folder))}/*.latents.*" if folder.is_dir() and not is_zarr(folder) else pattern


class LatentsFile:
    """A file of `encode`, checked against the model that is to decode it.

    Args:
        path: the file.
        coder: the network.

    Attributes:
        attributes: those of the whole that are needed.
        shape: (ny, nx, C) of the scene.

    Raises:
        InputError: it is damaged, holds no latents, or those of another model.
    """

    def __init__(self, path: Path, coder: Coder) -> None:
        self.path = path
        check_file(path)
        arguments = {"radiance": "latent", "patterns": ["*"]}
        guard.try_out(path, arguments, f"{check_source.__module__}:{check_source.__name__}")
        with closing(open_container(path)) as container:
            self._check(container, coder)

    def _check(self, container: Container, coder: Coder) -> None:
        path = self.path
        with damage_named(path):
            attributes = container.attributes("")
            shapes = {variable.name: variable.shape for variable in container.variables()}
        lacks = [name for name in ("latent", "valid") if len(shapes.get(name, ())) != 3]
        lacks += [name for name in _ATTRIBUTES if name not in attributes]
        if lacks:
            raise InputError(
                f"is no file of `spectralvae encode`: it lacks {', '.join(lacks)}",
                path=path,
                remedy="give NAME.latents.nc or NAME.latents.zarr",
            )
        # No more is kept, for of many files it would fill the memory.
        self.attributes: Mapping[str, Any] = {name: attributes[name] for name in _ATTRIBUTES}
        check_latents(attributes, shapes["latent"][0], coder, path=path)
        self.shape = ny, nx, nc = read_layout(container).shape
        s, n_channels = coder.scale, coder.normalization.n_channels
        expected = {"latent": (coder.model.embed_dim, -(-ny // s), -(-nx // s)), "valid": (ny, nx, n_channels)}
        for name, shape in expected.items():
            if shapes[name] != shape or nc != n_channels:
                raise InputError(
                    f"{name} has shape {shapes[name]}; a scene of {ny} x {nx} pixels and {nc} channels needs {shape} "
                    "with this model",
                    path=path,
                )

    def open(self) -> Container:
        """The file, open for reading."""
        return open_container(self.path)


def open_source(sources: Sequence[Path], latents: LatentsFile, normalization: Normalization) -> Scene:
    """Open the scene that latents were made from, as far as its name tells.

    Raises:
        ConfigError: no file has that name, or several have.
        InputError: it is not a scene that the model is for.
    """
    name = latents.attributes["source"]
    found = list({path.resolve(): path for path in sources if path.name == name}.values())
    if not found:
        raise ConfigError(
            f"none of them is {name}, the scene that was encoded",
            key="sources",
            path=latents.path,
            remedy="add it, or leave `sources` out",
        )
    if len(found) > 1:
        raise ConfigError(
            f"{found[0]} has the same name",
            key="sources",
            path=found[1],
            remedy=f"give the one that {latents.path} was made from",
        )
    with damage_named(latents.path):
        given = InputSpec(path=str(found[0]), **json.loads(latents.attributes["source_arguments"]))
    scene = open_scene_for(found[0], given, normalization)
    if scene.shape != latents.shape:
        raise InputError(
            f"is not the file that {latents.path} was made from: its shape is {scene.shape}, not {latents.shape}",
            key="sources",
            path=found[0],
            remedy="give that file, or leave `sources` out",
        )
    return scene


def check_identity(scene: Scene, latents: LatentsFile) -> None:
    """Check that latents were made from a scene; all of its file is read.

    Raises:
        InputError: it is another file.
    """
    found, expected = scene.sha256(), latents.attributes["source_sha256"]
    if found != expected:
        raise InputError(
            f"is not the file that {latents.path} was made from: its SHA-256 is {found[:16]}..., not "
            f"{expected[:16]}...",
            key="sources",
            path=scene.path,
            remedy="give that file, or leave `sources` out",
        )


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
    def notes(self) -> Sequence[str]:
        return ()

    @property
    def n_pixels(self) -> int:
        ny, nx, _ = self.latents.shape
        return ny * nx

    def do(self, advance: Advance) -> dict[str, Any]:
        facts: dict[str, Any] = {"text": f"radiance {' x '.join(map(str, self.latents.shape))}"}
        with ExitStack() as stack:
            container = stack.enter_context(closing(self.latents.open()))
            layout = read_layout(container)
            comparison = None
            if self.scene:
                check_identity(self.scene, self.latents)
                stack.enter_context(self.scene)
                comparison = Comparison(self.scene, self.coder.normalization)
            carried = self.scene if self.config.carry_over else None
            put = stack.enter_context(
                new_scene(self.result, layout, self._attributes(), carried, self.config.carry_over)
            )
            for rows, columns, radiance, z in self._radiance(container):
                put(rows, columns, radiance)
                if comparison:
                    comparison.add(rows, columns, z)
                advance(radiance.shape[0] * radiance.shape[1])
            if comparison:  # before the file has its name, with which all of it is done
                facts |= comparison.facts()
                facts["text"] += self._drawn(comparison)
        return facts

    def _radiance(self, container: Container) -> Iterator[tuple[slice, slice, Float32, Float32]]:
        """As `stream_radiance`."""
        path = self.latents.path

        def read(rows: slice, columns: slice) -> Float32:
            with damage_named(path):
                part = container.read("latent", (slice(None), rows, columns))
                values = np.moveaxis(part, 0, -1).astype(np.float32)
            if not np.isfinite(values).all():
                raise InputError("is corrupt: latent is not finite everywhere", path=path, remedy="encode it again")
            return values

        def valid(rows: slice, columns: slice) -> NDArray[np.bool_]:
            with damage_named(path):
                return np.asarray(container.read("valid", (rows, columns, slice(None))) == 1)

        ny, nx, _ = self.latents.shape
        return stream_radiance(read, valid, (ny, nx), self.coder)

    def _drawn(self, comparison: Comparison) -> str:
        """Save the figure; returns what is said of it."""
        figure = self.config.output_dir / "figures" / f"{self._name}.png"
        figure.parent.mkdir(exist_ok=True)
        save_figure(comparison.draw(self._name), figure)
        mse = comparison.facts()["z_mse"]
        return f", MSE in z {mse:.4g}; {figure}" if mse is not None else f", nothing valid to compare; {figure}"

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
