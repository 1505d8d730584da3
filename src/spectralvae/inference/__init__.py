"""What trained networks are for: radiance to latents and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectralvae.inference.loading import load_artifact, load_model

__all__ = ["load_artifact", "load_model"]


def __getattr__(name: str) -> Any:
    """Import on first use: a file is tried out in a process with little time, which needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from spectralvae.inference import loading

    return getattr(loading, name)
