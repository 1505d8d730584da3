"""What trained networks are for: radiance to latents and back."""

from spectralvae.inference.loading import load_artifact, load_model

__all__ = ["load_artifact", "load_model"]
