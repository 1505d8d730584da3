"""Synthetic TEMPO granules with known truth."""

from spectralvae.simulate.granules import PRODUCTS, simulate_granules

__all__ = ["PRODUCTS", "simulate_granules"]
