"""Baselines: PCA of spectra against scikit-learn's, and the errors against direct computation."""

from __future__ import annotations

import numpy as np
import pytest
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
    """Some samples of a fifth of the pixels are NaN; what stood there would have ruled the fit."""
    rng = np.random.default_rng(seed)
    spoiled = []
    for tile in made:
        tile = tile.copy()
        pixels = rng.random(tile.shape[:2]) < 0.2
        tile[pixels] *= 100
        lost = rng.random(tile.shape) < 0.3
        lost[..., 0] = True
        tile[pixels[..., None] & lost] = np.nan
        spoiled.append(tile)
    return spoiled


def complete(made: list[np.ndarray]) -> np.ndarray:
    pixels = np.concatenate([t.reshape(-1, t.shape[-1]) for t in made]).astype(np.float64)
    return pixels[np.isfinite(pixels).all(axis=1)]


@pytest.mark.parametrize("k", [1, 2, 5, NC])
def test_against_scikit_learn(k: int) -> None:
    training, validation = tiles(0), complete(tiles(1))
    theirs = PCA(k, svd_solver="full").fit(complete(training))
    ours = PixelPCA.fit(training, k)
    np.testing.assert_allclose(ours.mean, theirs.mean_, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours.components @ ours.components.T, np.eye(k), atol=1e-12)
    truth = theirs.inverse_transform(theirs.transform(validation))
    np.testing.assert_allclose(ours.reconstruct(validation, k), truth, rtol=0, atol=1e-8)


def test_fewer_components_than_fitted() -> None:
    training, validation = tiles(0), complete(tiles(1))
    ours = PixelPCA.fit(training, 6)
    for k in (1, 3, 6):
        theirs = PCA(k, svd_solver="full").fit(complete(training))
        truth = theirs.inverse_transform(theirs.transform(validation))
        np.testing.assert_allclose(ours.reconstruct(validation, k), truth, atol=1e-8)
    np.testing.assert_array_equal(ours.reconstruct(validation, 0), np.broadcast_to(ours.mean, validation.shape))


def test_invalid_sample_counts_as_zero() -> None:
    """Zero is the mean of the training scenes in z; pixels without any valid sample are left out of the fit."""
    spoiled = with_nan(tiles(0), 5)
    spoiled[0][:3] = np.nan
    pixels = np.concatenate([t.reshape(-1, NC) for t in spoiled])
    seen = pixels[np.isfinite(pixels).any(axis=1)]
    assert len(seen) < len(pixels)
    assert np.isnan(seen).any()
    theirs = PCA(3, svd_solver="full").fit(np.nan_to_num(seen))
    ours = PixelPCA.fit(spoiled, 3)
    validation = with_nan(tiles(1), 6)[0]
    truth = theirs.inverse_transform(theirs.transform(np.nan_to_num(validation.reshape(-1, NC))))
    np.testing.assert_allclose(ours.reconstruct(validation, 3).reshape(-1, NC), truth, atol=1e-8)


def test_no_complete_pixel_is_needed() -> None:
    """Every pixel may lack a channel, each another one: a line to compare with must not stop a run."""
    training = tiles(0)
    for tile in training:
        for i, pixel in enumerate(tile.reshape(-1, NC)):
            pixel[i % NC] = np.nan
    assert np.isfinite(PixelPCA.fit(training, 2).components).all()


def test_float16_tiles() -> None:
    """As they come from a store: sums are made in float64."""
    training = [t.astype(np.float16) for t in tiles(0)]
    validation = complete(tiles(1)).astype(np.float16)
    theirs = PCA(2, svd_solver="full").fit(complete(training))
    truth = theirs.inverse_transform(theirs.transform(validation.astype(np.float64)))
    np.testing.assert_allclose(PixelPCA.fit(iter(training), 2).reconstruct(validation, 2), truth, atol=1e-8)


@pytest.mark.parametrize("shape", [(0, 4, 4, NC), (1, 1, 3, NC)])
def test_too_few_pixels(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="3 components"):
        PixelPCA.fit(np.random.default_rng(0).normal(size=shape), 3)


def test_nothing_but_nan() -> None:
    with pytest.raises(InputError, match="too few pixels"):
        PixelPCA.fit([np.full((5, 5, NC), np.nan)], 2)


@pytest.mark.parametrize("spoil", [False, True])
def test_reference_errors(spoil: bool) -> None:
    """Over valid samples only, of all tiles together, whatever their sizes."""
    training, validation = tiles(0), [*tiles(1, 2), *tiles(2, 1, size=4)]
    if spoil:
        training, validation = with_nan(training, 5), with_nan(validation, 6)
    found = reference_errors(training, validation, (1, 2, 4))
    pixels = np.concatenate([t.reshape(-1, NC) for t in validation])
    valid = np.isfinite(pixels)
    expected = {"mean": np.mean(pixels[valid] ** 2)}
    fitted = np.concatenate([t.reshape(-1, NC) for t in training])
    for k in (1, 2, 4):
        pca = PCA(k, svd_solver="full").fit(np.nan_to_num(fitted))
        rebuilt = pca.inverse_transform(pca.transform(np.nan_to_num(pixels)))
        expected[f"pca_{k}"] = np.mean((rebuilt - pixels)[valid] ** 2)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-8), name
    if not spoil:
        assert found["mean"] > found["pca_1"] > found["pca_2"] > found["pca_4"]


def test_reference_errors_without_validation_samples() -> None:
    for validation in ([], [np.full((3, 3, NC), np.nan)]):
        with pytest.raises(InputError, match="validation"):
            reference_errors(tiles(0), validation)
