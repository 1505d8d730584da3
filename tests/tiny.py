"""A network of a few thousand weights, and what belongs to it on disk."""

import numpy as np
import torch

from spectralvae.artifact import pack_model, write_folder
from spectralvae.data.normalize import Normalization
from spectralvae.settings import build_model

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


def write_tiny(folder, seed=0, step=None, normalization=None):
    """An artifact of the model of ``seed``; returns the folder."""
    write_folder(folder, pack_model(tiny_model(seed), SETTINGS, normalization or tiny_normalization(), step))
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
