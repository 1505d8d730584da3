"""The statistics of latents: against their definition tile by tile, and against samples of the posterior."""

import numpy as np
import pytest
import torch
import zarr
from rich.console import Console

from spectralvae.config import TrainConfig
from spectralvae.runtime.ranks import Ranks
from spectralvae.training.engine import Engine
from spectralvae.training.setup import set_up

TILE, SCALE, N_LATENTS = 8, 2, 4
PLACES = [(y, x) for y in (0, 8, 11) for x in (0, 8, 16)]


@pytest.fixture
def trained(tmp_path, make_store):
    """A setup whose network has random weights, its engine, and z of the validation scene: (19, 24, 6), much NaN.

    A block of pixels has no valid sample, and lies across tiles and latent positions; so has a channel; others lack
    samples here and there.
    """
    random = np.random.default_rng(3)
    scenes = {name: random.normal(size=(19, 24, 6)) for name in ("a", "v")}
    for z in scenes.values():
        z[random.random(z.shape) < 0.2] = np.nan
        z[3:14, 5:14] = np.nan
        z[9, 12, 1] = 0.5  # one sample is enough
        z[..., 4] = np.nan
    path = make_store(tmp_path / "store", scenes, val=("v",)).path
    config = TrainConfig.model_validate(
        {
            "output_dir": str(tmp_path / "run"),
            "data": {"store": str(path), "batch_size": 4, "tile_size": TILE, "max_invalid_fraction": 0.95},
            "model": {"chs": [16, 8], "z_channels": 4, "embed_dim": N_LATENTS, "n_attention_heads": 2},
            "training": {"device": "cpu"},
        }
    )
    setup = set_up(config, Ranks(), Console(quiet=True))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in setup.model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    engine = Engine(setup.model, config, torch.device("cpu"), Ranks())
    return setup, engine, zarr.open_array(path / "scenes/v/z", mode="r")[:].astype(np.float32)


def posteriors(model, z):
    """(n, E) float64 each: mean and variance at all positions that see a valid sample, found pixel by pixel."""
    means, variances = [], []
    for y, x in PLACES:
        tile = z[y : y + TILE, x : x + TILE]
        with torch.no_grad():
            found = model.eval().encode(torch.from_numpy(np.nan_to_num(tile)).permute(2, 0, 1)[None])
        for i in range(TILE // SCALE):
            for j in range(TILE // SCALE):
                beneath = tile[SCALE * i : SCALE * (i + 1), SCALE * j : SCALE * (j + 1)]
                if np.isfinite(beneath).any():
                    means.append(found.mean[0, :, i, j].double().numpy())
                    variances.append(np.exp(found.logvar[0, :, i, j].double().numpy()))
    return np.array(means), np.array(variances)


def test_statistics_of_latents_by_hand(trained):
    setup, engine, z = trained
    assert [(crop.y, crop.x) for crop in setup.validation.crops] == PLACES
    found = setup.validation.run(engine).latents
    means, variances = posteriors(setup.model, z)
    assert (found.n_tiles, found.n_positions) == (len(PLACES), len(means))
    assert len(means) < len(PLACES) * (TILE // SCALE) ** 2 - 10  # some don't count
    between, within = means.var(axis=0), variances.mean(axis=0)
    assert (between > 0.01 * within).all()  # both parts can be seen
    assert (within > 0.01 * between).all()
    np.testing.assert_allclose(found.mean, means.mean(axis=0), rtol=0, atol=1e-6 * np.sqrt(between + within).min())
    np.testing.assert_allclose(found.std, np.sqrt(between + within), rtol=1e-6)


def test_statistics_of_latents_are_those_of_samples(trained):
    """Drawn from the posteriors of all positions: what a diffusion model would be shown."""
    setup, engine, z = trained
    found = setup.validation.run(engine).latents
    means, variances = posteriors(setup.model, z)
    noise = np.random.default_rng(4).standard_normal((4000, *means.shape))
    samples = (means + np.sqrt(variances) * noise).reshape(-1, N_LATENTS)
    error = 5 / np.sqrt(len(samples))  # five standard errors of a mean
    np.testing.assert_allclose(found.mean, samples.mean(axis=0), rtol=0, atol=error * found.std.max())
    np.testing.assert_allclose(found.std, samples.std(axis=0), rtol=2 * error)


def test_what_a_position_does_not_see_does_not_count(trained):
    """Weights that make the latents of nothing enormous: statistics of latents and of the page stay as they are."""
    setup, engine, z = trained
    before = setup.validation.run(engine)
    original = setup.model.encode
    seen = np.stack([np.isfinite(z[y : y + TILE, x : x + TILE]) for y, x in PLACES]).any(axis=-1)  # (9, 8, 8)
    blocks = seen.reshape(len(PLACES), TILE // SCALE, SCALE, TILE // SCALE, SCALE)
    nothing = torch.from_numpy(~blocks.any(axis=(2, 4)))[:, None]
    starts = iter(range(0, len(PLACES), 4))

    def encode(x):
        posterior, start = original(x), next(starts)
        where = nothing[start : start + len(x)]
        for name in ("mean", "var", "std"):
            setattr(posterior, name, getattr(posterior, name).masked_fill(where, 1e3))
        return posterior

    setup.model.encode = encode
    after = setup.validation.run(engine)
    np.testing.assert_array_equal(after.latents.mean, before.latents.mean)
    np.testing.assert_array_equal(after.latents.std, before.latents.std)
    assert after.description["latents"] == before.description["latents"]
    assert after.metrics["val_kl_loss"] != before.metrics["val_kl_loss"]  # the loss counts as in training
