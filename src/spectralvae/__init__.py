"""KL-autoencoders for hyperspectral scenes: prepare granules, train, judge, use the latents."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spectralvae.version import __version__

if TYPE_CHECKING:
    from spectralvae.inference.scenes import decode_scene, encode_scene
    from spectralvae.model import AutoencoderKL
    from spectralvae.readers.dataset import open_scene
    from spectralvae.weights.loading import load_artifact, load_model

__all__ = ["AutoencoderKL", "__version__", "decode_scene", "encode_scene", "load_artifact", "load_model", "open_scene"]

_HOMES = {
    "AutoencoderKL": "spectralvae.model",
    "decode_scene": "spectralvae.inference.scenes",
    "encode_scene": "spectralvae.inference.scenes",
    "load_artifact": "spectralvae.weights.loading",
    "load_model": "spectralvae.weights.loading",
    "open_scene": "spectralvae.readers.dataset",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch and xarray take seconds, ``--help`` must not."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
