"""The network of a run, and the weights that it starts from."""

from types import SimpleNamespace

import pytest
import torch
from refusals import refused
from tiny import N_CHANNELS, SETTINGS, equal_weights, flip, tiny_model, write_tiny

from spectralvae.config import TrainConfig
from spectralvae.errors import ConfigError, DamagedError, InputError
from spectralvae.training.network import network_settings, start_from
from spectralvae.weights.artifact import pack_model, write_folder
from spectralvae.weights.mltools import save_weights


def config_of(tile_size=8, **model):
    return TrainConfig.model_validate(
        {"output_dir": "a", "data": {"store": "b", "tile_size": tile_size}, "model": {"chs": [8, 4], **model}}
    )


STORE = SimpleNamespace(normalization=SimpleNamespace(n_channels=N_CHANNELS))


@pytest.fixture(params=["run", "checkpoint", "export", "mltools"])
def source(request, tmp_path):
    """The same weights in every form, and what `start_from` says of where they came from."""
    if request.param == "export":
        return (write_tiny(tmp_path / "export", seed=3),) * 2
    if request.param == "mltools":
        save_weights(tiny_model(3), tmp_path / "model.pt")
        return (tmp_path / "model.pt",) * 2
    write_tiny(tmp_path / "run" / "checkpoints" / "step=000005", seed=2, step=5)
    newest = write_tiny(tmp_path / "run" / "checkpoints" / "step=000010", seed=3, step=10)
    return (tmp_path / "run" if request.param == "run" else newest), newest


def written(folder, **changes):
    """An export of a network of other settings."""
    settings = {**SETTINGS, **changes}
    write_folder(folder, pack_model(tiny_model(1, settings), settings, None, None))
    return folder


def refuses(path, *words, error=ConfigError, **changes):
    settings = {**SETTINGS, **changes}
    model = tiny_model(0, settings)
    with refused(error, path.name, *words):
        start_from(model, settings, path)
    assert equal_weights(model.state_dict(), tiny_model(0, settings).state_dict())


def takes(path, **changes):
    """The weights of `written`."""
    settings = {**SETTINGS, **changes}
    model = tiny_model(0, settings)
    start_from(model, settings, path)
    assert equal_weights(model.state_dict(), tiny_model(1, settings).state_dict())


def test_shape_follows_from_store_and_tile_size():
    settings = network_settings(config_of(norm_groups=2), STORE)
    assert settings["shape"] == [N_CHANNELS, 8, 8]
    assert settings.keys() == SETTINGS.keys()
    assert network_settings(config_of(shape=[N_CHANNELS, 8, 8]), STORE)["shape"] == [N_CHANNELS, 8, 8]
    with refused(ConfigError, "model.shape", "[6, 16, 16]", "[6, 8, 8]"):
        network_settings(config_of(shape=[N_CHANNELS, 16, 16]), STORE)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weights_from_every_form(source, layout):
    """What is no part of the weights may differ."""
    path, came_from = source
    free = {"kl_weight": 1e-3, "nll_loss_type": "l2", "logvar_init": 3.0, "shape": [N_CHANNELS, 16, 16]}
    for settings in (SETTINGS, {**SETTINGS, **free}):
        model = tiny_model(0, settings).to(memory_format=layout).train()
        strides = [parameter.stride() for parameter in model.parameters()]
        assert start_from(model, settings, path).path == came_from
        assert equal_weights(model.state_dict(), tiny_model(3).state_dict())
        assert [parameter.stride() for parameter in model.parameters()] == strides
        assert model.training


def test_another_architecture_is_refused_by_key(tmp_path):
    folder, file = write_tiny(tmp_path / "export"), tmp_path / "model.pt"
    save_weights(tiny_model(3), file)
    for changes, *words in (
        ({"act": "relu"}, "act", "gelu", "relu"),  # weights alone could not tell
        ({"n_attention_heads": 4, "conv_padding_mode": "reflect"}, "n_attention_heads", "conv_padding_mode"),
        ({"chs": [8, 8]}, "chs", "[8, 4]", "[8, 8]"),
        ({"shape": [5, 8, 8]}, "channels", "6", "5"),
    ):
        refuses(folder, "training.init_from", *words, **changes)
    for changes, *words in (
        ({"chs": [8, 8]}, "model.chs", "[8, 8]", "[8, 4]"),
        ({"embed_dim": 4}, "model.embed_dim"),
        ({"shape": [5, 8, 8]}, "model.shape", "6 channels"),
        ({"dropout_prob": 0.1}, "model.dropout_prob", "0.1"),
    ):
        refuses(file, *words, **changes)


def test_dropout_may_differ_but_not_come_or_go(tmp_path):
    """The layer counts in the names of the weights after it."""
    with_dropout = written(tmp_path / "a", dropout_prob=0.25)
    takes(with_dropout, dropout_prob=0.5)
    refuses(with_dropout, "dropout_prob", "encoder.downs.0.resnet_blocks.0.net2.3.weight")


def test_a_tile_size_that_moves_the_attention(tmp_path):
    """attn_sizes counts pixels: with another tile size the same list means other levels, and another list the same."""
    folder = written(tmp_path / "a", attn_sizes=[4])
    takes(folder, attn_sizes=[8], shape=[N_CHANNELS, 16, 16])
    refuses(folder, "attn_sizes", "encoder.downs.1.att")
    refuses(folder, "encoder.downs.1.att", attn_sizes=[4], shape=[N_CHANNELS, 16, 16])


def test_damaged_and_missing_sources(tmp_path):
    refuses(tmp_path / "nothing", error=InputError)
    folder = write_tiny(tmp_path / "export")
    flip(folder / "model.safetensors", 0.5)
    refuses(folder, "model.safetensors", error=DamagedError)
