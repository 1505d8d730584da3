"""Blocks of a file back to a scene."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spectralvae.codec.linear import Spectra, decode_images, decode_spectra
from spectralvae.codec.mask import unpack_mask
from spectralvae.codec.network import decode_latents, decode_scene
from spectralvae.codec.residual import ResidualDecoder
from spectralvae.codec.scratch import Scratch, bands
from spectralvae.codec.stages import Stages
from spectralvae.inference.coder import Coder

_LARGEST, _SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)  # what float32 can hold

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


def stream_scene(
    stages: Stages, blocks: Mapping[str, bytes], shape: tuple[int, int, int], coder: Coder, folder: Path
) -> Iterator[tuple[slice, Float32]]:
    """Decode a scene from the top to the bottom.

    Args:
        stages: how it was coded.
        blocks: of the file.
        shape: (ny, nx, nc).
        coder: the network and its normalisation.
        folder: where a temporary file may lie.

    Yields:
        Rows and their radiance (rows, nx, nc) float32, NaN where invalid.

    Raises:
        ValueError: the blocks are damaged.
        KeyError: one is missing.
        NoRoomError: there is no room for a temporary file.
    """
    ny, nx, nc = shape
    k, n_pixels = stages.n_components, ny * nx
    spectra = decode_spectra(blocks["SPEC"], k, nc, stages.step, n_pixels)
    seen = np.stack([row.any(axis=1) for row in unpack_mask(blocks["MASK"], shape)])
    components = BytesIO(blocks["COMP"] if k else b"")
    with Scratch(folder, shape) as scratch:
        if stages.network_step is not None:
            cells = (coder.model.embed_dim, -(-ny // coder.scale), -(-nx // coder.scale))
            latents = decode_latents(blocks["LATN"], cells, stages.network_step)
            decode_scene(latents, coder, scratch)
        within = stages.network_step is not None
        for portion in spectra.portions():
            images = decode_images(components, portion.stop - portion.start, seen, stages.step)
            if portion.stop == k:
                if components.read(1):
                    raise ValueError("there are more images than components")
                yield from _rows(stages, blocks, spectra, (portion, images), coder, scratch if within else None)
                return
            for rows in bands(shape):
                z = spectra.expand(images[:, rows], portion)
                scratch.write(rows, slice(0, nx), (z + scratch.read(rows) if within else z).astype(np.float32))
            within = True


def _rows(
    stages: Stages,
    blocks: Mapping[str, bytes],
    spectra: Spectra,
    components: tuple[slice, Float64],
    coder: Coder,
    base: Scratch | None,
) -> Iterator[tuple[slice, Float32]]:
    """As `stream_scene`, from the last portion of components and what the rest and the network add up to."""
    normalization, (portion, images) = coder.normalization, components
    shape = (*images.shape[1:], normalization.n_channels)
    masks = unpack_mask(blocks["MASK"], shape)
    residuals = ResidualDecoder(blocks["RESD"], *shape[1:]) if stages.bound is not None else None
    steps = stages.residual_steps(normalization) if stages.bound is not None else np.zeros(0)
    clip = normalization.clip if stages.bound is None else math.inf
    for rows in bands(shape):
        z = spectra.expand(images[:, rows], portion)
        if base is not None:
            z += base.read(rows)
        for row in z:
            valid = next(masks)
            if residuals is not None:
                row += residuals.decode_row(valid) * steps
            row[~valid] = np.nan
        np.clip(z, -clip, clip, out=z)
        with np.errstate(over="ignore"):
            radiance = normalization.denormalize(z)
        least = _SMALLEST if normalization.transform == "log_zscore" else -_LARGEST
        yield rows, np.clip(radiance, least, _LARGEST).astype(np.float32)
    if residuals is not None:
        residuals.finish()
