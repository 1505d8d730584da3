"""Baselines: PCA of spectra against scikit-learn's, and the errors against direct computation."""

from __future__ import annotations

import numpy as np
import pytest
from refusals import refused
from sklearn.decomposition import PCA

from spectralvae.data.pca import PixelPCA, reference_errors
from spectralvae.errors import InputError

NC = 12


def tiles(seed: int, n: int = 4, size: int = 9) -> list[np.ndarray]:
    """Tiles of z: three strong directions, noise, and a mean that is not zero."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(99).normal(size=(3, NC))
    made = []
    for _ in range(n):
        amounts = rng.normal(size=(size, size, 3)) * [3, 1.5, 0.7]
        made.append(amounts @ directions + 0.1 * rng.normal(size=(size, size, NC)) + np.linspace(-1, 1, NC))
    return made


def with_nan(made: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """Each pixel lacks a channel, a fifth of them more, and some all; what stood there would have ruled the fit."""
    rng = np.random.default_rng(seed)
    spoiled = []
    for tile in made:
        lost = rng.random(tile.shape) < 0.3 * (rng.random(tile.shape[:2]) < 0.2)[..., None]
        lost |= np.arange(NC) == np.arange(tile[..., 0].size).reshape(*tile.shape[:2], 1) % NC
        lost[:1] = True
        spoiled.append(np.where(lost, np.nan, np.where(lost.sum(axis=-1, keepdims=True) > 1, 100 * tile, tile)))
    return spoiled


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_against_scikit_learn(dtype: type) -> None:
    """Of tiles as they come from a store, too: sums are made in float64."""
    training, validation = ([tile.astype(dtype) for tile in tiles(seed)] for seed in (0, 1))
    pixels, given = (np.concatenate(made).reshape(-1, NC).astype(np.float64) for made in (training, validation))
    ours = PixelPCA.fit(iter(training), NC)
    np.testing.assert_allclose(ours.mean, pixels.mean(axis=0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours.components @ ours.components.T, np.eye(NC), atol=1e-12)
    for k in (1, 2, 5, NC):
        theirs = PCA(k, svd_solver="full").fit(pixels)
        truth = theirs.inverse_transform(theirs.transform(given)).reshape(-1, 9, 9, NC)
        found = ours.reconstruct(np.stack(validation), k)
        np.testing.assert_allclose(found, truth, rtol=0, atol=1e-8)
    np.testing.assert_array_equal(ours.reconstruct(given, 0), np.broadcast_to(ours.mean, given.shape))


@pytest.mark.parametrize("spoil", [False, True])
def test_reference_errors(spoil: bool) -> None:
    """Over valid samples only, of all tiles together, whatever their sizes.

    An invalid sample counts as zero, the mean in z; pixels without a valid one are left out of the fit.
    """
    training, validation = tiles(0), [*tiles(1, 2), *tiles(2, 1, size=4)]
    if spoil:
        training, validation = with_nan(training, 5), with_nan(validation, 6)
    found = reference_errors(training, validation, (1, 2, 4))
    pixels = np.concatenate([t.reshape(-1, NC) for t in validation])
    valid = np.isfinite(pixels)
    expected = {"mean": np.mean(pixels[valid] ** 2)}
    fitted = np.concatenate([t.reshape(-1, NC) for t in training])
    fitted = fitted[np.isfinite(fitted).any(axis=1)]
    for k in (1, 2, 4):
        pca = PCA(k, svd_solver="full").fit(np.nan_to_num(fitted))
        rebuilt = pca.inverse_transform(pca.transform(np.nan_to_num(pixels)))
        expected[f"pca_{k}"] = np.mean((rebuilt - pixels)[valid] ** 2)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-8), name
    if not spoil:
        assert found["mean"] > found["pca_1"] > found["pca_2"] > found["pca_4"]


def test_too_little_to_fit_or_judge() -> None:
    for z in (np.zeros((0, 4, 4, NC)), tiles(0)[0][None, :1, :3], np.full((1, 5, 5, NC), np.nan)):
        with refused(InputError, "3 components"):
            PixelPCA.fit(z, 3)
    for validation in ([], [np.full((3, 3, NC), np.nan)]):
        with refused(InputError, "baselines"):
            reference_errors(tiles(0), validation)
