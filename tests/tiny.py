"""A network of a few thousand weights, and what belongs to it on disk."""

import hashlib
import json

import numpy as np
import torch

from spectralvae.weights.artifact import pack_model, write_folder
from spectralvae.weights.normalization import Normalization
from spectralvae.weights.provenance import LatentStatistics, Provenance, Scenes
from spectralvae.weights.settings import build_model

N_CHANNELS = 6
SETTINGS = {
    "shape": [N_CHANNELS, 8, 8],
    "chs": [8, 4],
    "attn_sizes": [],
    "mid_attn": True,
    "num_res_blocks": 1,
    "dropout_prob": 0.0,
    "z_channels": 2,
    "double_z": True,
    "n_attention_heads": 2,
    "norm_groups": 2,
    "norm_eps": 1e-6,
    "norm_affine": True,
    "act": "gelu",
    "conv_kernel_size": 3,
    "conv_padding_mode": "zeros",
    "embed_dim": 3,
    "kl_weight": 1e-6,
    "nll_loss_type": "l1",
    "logvar_init": 0.5,
}
VOLUME = {**SETTINGS, "shape": [N_CHANNELS, 4, 4, 4], "mid_attn": False}


def tiny_model(seed=0, settings=SETTINGS):
    """Every weight random: a fresh network ends in zeros, which would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    model = build_model(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_normalization(**changes):
    channels = np.arange(N_CHANNELS)
    return Normalization(
        **{
            "transform": "log_zscore",
            "mean": np.log(channels + 3.0),
            "std": np.sqrt(channels + 0.1),
            "clip": 9.5,
            "min_radiance": 1.5,
            "band": "band_290_490_nm",
            "wavelength": 300.0 + channels / 3,
            **changes,
        }
    )


def tiny_latents():
    """Statistics of the latents; thirds, since these have no end in any notation."""
    return LatentStatistics(np.arange(3) / 3, 1 + np.arange(3) / 3, n_tiles=5, n_positions=79)


def tiny_provenance(**changes):
    """Of weights that were validated."""
    return Provenance(
        **{
            "store": "small_store",
            "store_hash": "abc123",
            "training": Scenes(3, 2, "2024-06-01T18:00:00+00:00", "2024-06-03T18:00:00+00:00", ["V03"]),
            "validation": Scenes(1, 1, "2024-06-04T18:00:00+00:00", "2024-06-04T18:00:00+00:00", ["V03"]),
            "tile_size": 8,
            "batch_size": 4,
            "seed": 7,
            "initial_weights": None,
            "n_val_tiles": 5,
            "metrics": {"val_loss": 1 / 3, "val_nll_loss": 0.25, "val_kl_loss": 1 / 12, "val_pixel_mse": 0.0123},
            "baselines": {"mean": 1.01, "pca_1": 0.5, "pca_2": 0.25},
            **changes,
        }
    )


def write_tiny(folder, seed=0, step=None, normalization=None, latents=None, provenance=None):
    """An artifact of the model of ``seed``; returns the folder."""
    normalization = normalization or tiny_normalization()
    write_folder(folder, pack_model(tiny_model(seed), SETTINGS, normalization, step, latents, provenance))
    return folder


def equal_weights(first, second):
    """Whether two state dicts are bit-equal, keys and types included."""
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first
    )


def flip(path, position, bit=0):
    """Flip one bit of the file; ``position`` is a share of its length, or an index."""
    content = bytearray(path.read_bytes())
    index = int(position * (len(content) - 1)) if isinstance(position, float) else position
    content[index] ^= 1 << bit
    path.write_bytes(content)


def signed(manifest):
    """The file of a manifest without digest, with its digest, by the rule as it is written down, not by the code."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "digest": digest}, indent=2) + "\n"
