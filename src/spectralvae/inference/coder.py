"""A trained network over scenes of any size: tile by tile, and no more of a scene in memory than a strip of it.

Shapes: a scene is (ny, nx, C) in z, its latents (ceil(ny/s), ceil(nx/s), E) with s pixels a cell along each axis.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from spectralvae.config import InferenceConfig, ModelConfig
from spectralvae.data.tiling import Cover, Panel, mirrored
from spectralvae.errors import ConfigError, InputError
from spectralvae.runtime.device import choose_device, peak_memory
from spectralvae.runtime.placement import exact_float32, place
from spectralvae.runtime.ranks import Ranks
from spectralvae.runtime.rundir import RunDir
from spectralvae.weights.artifact import Artifact, weights_sha256
from spectralvae.weights.loading import load_artifact
from spectralvae.weights.normalization import Normalization

OVERLAP = 0.25  # of a tile; benchmarks/seams.py shows why
STRIP_SAMPLES = 150_000_000  # 600 MB of float32: as high as a tile of 64, as wide as a TEMPO granule

Float32 = NDArray[np.float32]
Read = Callable[[slice, slice], Float32]  # rows, columns -> (rows, columns, channel) of a scene


@dataclass(frozen=True)
class Piece:
    """A part of a scene that is done. Both arrays are overwritten as soon as the next piece is asked for.

    Attributes:
        rows, columns: cells of the result.
        result: (rows, columns, n).
        seen: what the network was given there: (rows, columns, m) in cells of its own.
    """

    rows: slice
    columns: slice
    result: Float32
    seen: Float32


class Coder:
    """The network of a model on a device, and the tiles it is used with.

    Args:
        artifact: the model, with its normalisation and the size of its tiles.
        device: where to compute.
        overlap: pixels that neighbouring tiles share; None for a quarter of a tile.
        batch_size: tiles at a time.
        borrowed: the network is somebody else's, who may train it: on the CPU its layers and layout stay as they are.

    Raises:
        InputError: the model has no normalisation, no wavelengths, or no size of tiles; or it is one for volumes.
        ConfigError: the overlap does not fit the tiles.
    """

    def __init__(
        self, artifact: Artifact, device: torch.device, *, overlap: int | None, batch_size: int, borrowed: bool = False
    ) -> None:
        self.normalization, self.tile = _requirements(artifact)
        self.device, self.batch_size = device, batch_size
        if wrong := {str(p.dtype) for p in artifact.model.parameters()} - {"torch.float32"}:
            raise ConfigError(
                f"has weights in {', '.join(wrong)}", key="model", path=artifact.path, remedy="use model.float()"
            )
        self.path, self.step, self.latents = artifact.path, artifact.step, artifact.latents
        # what latents must be decoded with
        self.identity = {
            "model_sha256": weights_sha256(artifact.model),
            "normalization_sha256": self.normalization.sha256(),
        }
        self.model = artifact.model.eval()
        self._layout = place(self.model, device, plain=borrowed)
        self.scale: int = self.model.scale
        self.overlap = default_overlap(self.tile, self.scale) if overlap is None else overlap
        self._check_overlap()

    def overlapping(self, overlap: int) -> Coder:
        """The same network, with tiles that share another number of pixels.

        Raises:
            ConfigError: that does not fit the tiles.
        """
        other = copy.copy(self)
        other.overlap = overlap
        other._check_overlap()
        return other

    def peak_memory(self) -> int:
        """Bytes, the most that this process has used so far on the network's device."""
        return peak_memory(self.device)

    def _check_overlap(self) -> None:
        if not 0 <= self.overlap < self.tile or self.overlap % self.scale:
            raise ConfigError(
                key="overlap",
                value=self.overlap,
                limit=f"a multiple of {self.scale} (pixels of a cell) from 0 to below {self.tile} (pixels of a tile)",
            )

    # --- pieces of scenes ------------------------------------------------------------------------

    def encode(self, read: Read, shape: tuple[int, int], *, log_variance: bool = False) -> Iterator[Piece]:
        """Latents of a scene.

        Args:
            read: gives z of a part, NaN = invalid: a sample that the network sees as 0, as in training.
            shape: (ny, nx) of the scene.
            log_variance: whether to give the posterior's, too.

        Yields:
            Pieces with the posterior's mean, E numbers a cell, then, if asked for, its log variance, E more. Both are
            blended where tiles overlap. What was seen is z.
        """
        n = self.model.embed_dim * (1 + log_variance)

        def apply(tiles: Float32) -> torch.Tensor:
            posterior = self.model.encode(self._to_device(np.nan_to_num(tiles, nan=0.0)))
            return torch.cat([posterior.mean, posterior.logvar], 1) if log_variance else posterior.mean

        return self._stream(read, shape, apply, unit_in=1, unit_out=self.scale, n_out=n)

    def decode(self, read: Read, shape: tuple[int, int]) -> Iterator[Piece]:
        """A scene from its latents.

        Args:
            read: gives the latents of a part, (rows, columns, E) in cells.
            shape: (ny, nx) of the scene, in pixels.

        Yields:
            Pieces of z, of all samples. What was seen are the latents.
        """

        def apply(tiles: Float32) -> torch.Tensor:
            x_hat: torch.Tensor = self.model.decode(self._to_device(tiles))
            return x_hat

        n = self.normalization.n_channels
        return self._stream(read, shape, apply, unit_in=self.scale, unit_out=1, n_out=n)

    def _to_device(self, tiles: Float32) -> torch.Tensor:
        """(B, y, x, channel) -> (B, channel, y, x) in the network's memory layout."""
        x = torch.from_numpy(tiles).to(self.device).permute(0, 3, 1, 2)
        return x.contiguous(memory_format=self._layout)

    def _stream(
        self,
        read: Read,
        shape: tuple[int, int],
        apply: Callable[[Float32], torch.Tensor],
        *,
        unit_in: int,
        unit_out: int,
        n_out: int,
    ) -> Iterator[Piece]:
        """From the top to the bottom; where a strip of full width is too much, panel by panel."""
        y, x = (Cover(size, self.tile, self.overlap, self.scale) for size in shape)
        widest = STRIP_SAMPLES // (self.tile * self.normalization.n_channels)
        for panel in x.panels(widest):
            yield from _Strips(self, read, (y, x), panel, apply, unit_in, unit_out, n_out).run()

    @torch.no_grad()
    def run_network(self, apply: Callable[[Float32], torch.Tensor], tiles: Float32) -> Float32:
        """(B, y, x, m) -> (B, y', x', n) through the network, in float32.

        Raises:
            InputError: what comes out is not finite.
        """
        with exact_float32():
            result: Float32 = apply(tiles).permute(0, 2, 3, 1).float().cpu().numpy()
        if not np.isfinite(result).all():
            raise InputError("gives values that are not finite: its weights or its input are corrupt", path=self.path)
        return result


class _Strips:
    """One panel of a scene, a tile's height at a time."""

    def __init__(
        self,
        coder: Coder,
        read: Read,
        covers: tuple[Cover, Cover],
        panel: Panel,
        apply: Callable[[Float32], torch.Tensor],
        unit_in: int,
        unit_out: int,
        n_out: int,
    ) -> None:
        self.coder, self.read, self.panel, self.apply = coder, read, panel, apply
        self.y, self.x = covers
        self.unit_in, self.unit_out, self.n_out = unit_in, unit_out, n_out
        self.left, self.right = panel.tiles[0], panel.tiles[-1] + self.x.tile  # in pixels
        first = self.x.starts.index(panel.tiles[0])
        self.weights_y = self.y.weights(unit_out)
        self.weights_x = self.x.weights(unit_out)[first:][: len(panel.tiles)]
        unit = self.x.unit
        self.core = slice(panel.start * unit // unit_out, -(-min(panel.stop * unit, self.x.size) // unit_out))

    def run(self) -> Iterator[Piece]:
        """Rows of the result as soon as no later tile changes them."""
        starts, height = self.y.starts, self.y.tile // self.unit_out
        origin = self.core.start
        total = np.zeros((height, self.core.stop - origin, self.n_out), np.float32)
        strip = None
        for i, (top, weights) in enumerate(zip(starts, self.weights_y, strict=True)):
            strip = self._strip(strip, starts[i - 1] if i else top, top)
            self._add_tiles(strip, weights, total)
            bottom = min(starts[i + 1] if i + 1 < len(starts) else self.y.size, self.y.size)
            rows = slice(top // self.unit_out, -(-bottom // self.unit_out))
            n = rows.stop - rows.start
            seen = strip[: -(-(bottom - top) // self.unit_in), self._seen_columns()]
            yield Piece(rows, self.core, total[:n], seen)
            total[: height - n] = total[n:]
            total[height - n :] = 0.0

    def _seen_columns(self) -> slice:
        first = (self.panel.start * self.x.unit - self.left) // self.unit_in
        last = -(-(min(self.panel.stop * self.x.unit, self.x.size) - self.left) // self.unit_in)
        return slice(first, last)

    def _strip(self, before: Float32 | None, top_before: int, top: int) -> Float32:
        """What the network sees from ``top`` on, as high as a tile; rows that the last strip had are kept."""
        n_rows, n_columns = (-(-size // self.unit_in) for size in (self.y.size, self.x.size))
        height = self.y.tile // self.unit_in
        first, end = top // self.unit_in, top // self.unit_in + height
        kept = 0 if before is None else height - (top - top_before) // self.unit_in
        left, right = self.left // self.unit_in, self.right // self.unit_in
        if before is not None:
            before[:kept] = before[height - kept :]
        step = -(-height // 4)  # at a time, or there would be a second strip
        for begin in range(first + kept, min(end, n_rows), step):
            new = self.read(slice(begin, min(begin + step, end, n_rows)), slice(left, min(right, n_columns)))
            if right > n_columns:
                new = new[:, mirrored(left, right, n_columns) - left]
            if before is None:
                before = np.empty((height, *new.shape[1:]), np.float32)
            before[begin - first : begin - first + len(new)] = new
        assert before is not None
        if end > n_rows:
            before[n_rows - first :] = before[mirrored(n_rows, end, n_rows) - first]
        return before

    def _add_tiles(self, strip: Float32, weights_y: Float32, total: Float32) -> None:
        """Put a row of tiles through the network and add up what comes out."""
        coder, tile = self.coder, self.x.tile
        tiles = list(zip(self.panel.tiles, self.weights_x, strict=True))
        for k in range(0, len(tiles), coder.batch_size):
            batch = tiles[k : k + coder.batch_size]
            offsets = [(start - self.left) // self.unit_in for start, _ in batch]
            results = coder.run_network(
                self.apply, np.stack([strip[:, offset:][:, : tile // self.unit_in] for offset in offsets])
            )
            for (start, weights_x), result in zip(batch, results, strict=True):
                begin = start // self.unit_out
                inside = slice(max(begin, self.core.start), min(begin + tile // self.unit_out, self.core.stop))
                part = slice(inside.start - begin, inside.stop - begin)
                weights = weights_y[:, None, None] * weights_x[None, part, None]
                total[:, inside.start - self.core.start : inside.stop - self.core.start] += weights * result[:, part]


def default_overlap(tile: int, scale: int) -> int:
    """Pixels that tiles share if nothing else is asked for: a quarter of a tile, in whole latent cells."""
    return round(OVERLAP * tile / scale) * scale if tile > scale else 0


def _requirements(artifact: Artifact) -> tuple[Normalization, int]:
    """The normalisation and the size of tiles, which a model must have to be used on scenes."""
    settings, normalization = artifact.settings, artifact.normalization
    remedy = "convert it again with"
    if normalization is None:
        raise InputError(
            "holds no normalisation, without which radiance cannot be encoded",
            path=artifact.path,
            remedy=f"{remedy} `normalization: {{mean: mean_spectrum.pt, std: std_spectrum.pt, wavelength: ...}}`",
        )
    if normalization.wavelength is None:
        raise InputError(
            "its normalisation has no wavelengths, so nothing tells which scenes it is for",
            path=artifact.path,
            remedy=f"{remedy} `normalization: {{..., wavelength: {{first: ..., last: ...}}}}`",
        )
    sizes = settings["shape"][1:]
    if len(sizes) != 2:
        raise InputError(f"is a network for volumes of {len(sizes)} axes; scenes have two", path=artifact.path)
    if None in sizes or sizes[0] != sizes[1]:
        raise InputError(
            f"the size of its training tiles is {sizes}",
            path=artifact.path,
            limit="known, and the same along y and x",
            remedy=f"{remedy} `model: {{..., shape: [channels, y, x]}}`",
        )
    return normalization, int(sizes[0])


def open_coder(config: ModelConfig, run: RunDir | None, ranks: Ranks, console: Console) -> Coder:
    """The network that a config names, on its device.

    Raises:
        InputError, ConfigError: it cannot be used on scenes, or is not the one that the files there were made with.
    """
    if run:
        run.refuse_inside("model", config.model)
    artifact = load_artifact(config.model)
    step = "" if artifact.step is None else f", step {artifact.step}"
    console.print(f"model: {artifact.path}{step}")
    device = choose_device(config.device, ranks, console, key="device")
    overlap = config.overlap if isinstance(config, InferenceConfig) else None
    coder = Coder(artifact, device, overlap=overlap, batch_size=config.batch_size)
    for name, ours in coder.identity.items():
        theirs = run.record.get(name, ours) if run else ours
        if theirs != ours:
            raise ConfigError(
                f"is not the model that {config.output_dir} was begun with: {name} is {ours[:16]}..., not "
                f"{theirs[:16]}...",
                key="model",
                path=artifact.path,
                remedy="name that one, or start afresh with --overwrite",
            )
    return coder
