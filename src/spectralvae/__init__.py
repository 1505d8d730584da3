"""KL-autoencoders for hyperspectral scenes: prepare granules, train, judge, use the latents."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectralvae.inference import load_model
    from spectralvae.inference.scenes import decode_scene, encode_scene
    from spectralvae.model import AutoencoderKL
    from spectralvae.readers.dataset import open_scene

__version__ = "0.1.0"
__all__ = ["AutoencoderKL", "decode_scene", "encode_scene", "load_model", "open_scene"]

_HOMES = {
    "AutoencoderKL": "spectralvae.model",
    "decode_scene": "spectralvae.inference.scenes",
    "encode_scene": "spectralvae.inference.scenes",
    "load_model": "spectralvae.inference",
    "open_scene": "spectralvae.readers.dataset",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch and xarray take seconds, ``--help`` must not."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
