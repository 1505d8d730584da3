"""The settings of a network: one schema for configs, checkpoints and foreign files."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from refusals import refused
from tiny import SETTINGS, VOLUME

from spectralvae import model as network
from spectralvae.config import NetworkSettings, TrainConfig
from spectralvae.errors import ConfigError
from spectralvae.weights.settings import build_model, check_settings


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        (VOLUME, {}),
        ({"shape": (6, 8, 8), "chs": (8, 4), "attn_sizes": ()}, {"shape": [6, 8, 8], "chs": [8, 4], "attn_sizes": []}),
        ({"shape": [6, None, None]}, {}),
        ({"shape": [6, None, None, None], "mid_attn": False}, {}),
        ({"dropout_prob": 1.0}, {}),
        ({"dropout_prob": 1, "kl_weight": 0, "norm_eps": 1, "logvar_init": -1}, {}),
        ({"logvar_init": 100.0}, {}),
        ({"act": "relu", "conv_padding_mode": "circular", "nll_loss_type": "l2", "norm_affine": False}, {}),
    ],
)
def test_whatever_a_checkpoint_may_hold_is_built(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    settings = {**SETTINGS, **changes}
    assert check_settings(settings) == {**settings, **expected}
    model = build_model(settings)
    assert torch.equal(model.logvar, torch.tensor(float(settings["logvar_init"])))
    assert model.encoder.shape == tuple(size or 2 for size in settings["shape"])


def test_settings_may_be_given_in_part() -> None:
    assert check_settings({}) == {}
    assert check_settings({"shape": None, "act": "silu"}) == {"act": "silu"}, "a shape of null is not given"
    settings = {key: value for key, value in SETTINGS.items() if key != "logvar_init"}
    assert check_settings(settings) == settings
    assert build_model(settings).logvar == 0
    del settings["kl_weight"]
    with refused(ConfigError, "kl_weight", key="model"):
        build_model(settings)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("shape", [[6, 8], [6, 8, 8, 8, 8], [6, 8, None], [None, 8, 8], [6, 0, 8], [6.0, 8, 8], [True, 8, 8], 6, []]),
        ("chs", [[], [8, 0], [8, 4.0], [8, True], [None], "84", 8]),
        ("attn_sizes", [[0], [None], None, {2}]),
        ("mid_attn", [1, "true", None]),
        ("num_res_blocks", [0, True, 1.0, "1", None]),
        ("dropout_prob", [-0.1, 1.1, math.nan, True, "0", None]),
        ("double_z", [False, None]),
        ("norm_eps", [0, -1e-6, math.inf, math.nan]),
        ("act", ["tanh", ["gelu"], {"gelu": 1}, None]),
        ("conv_kernel_size", [0, 3.0]),
        ("conv_padding_mode", ["same"]),
        ("kl_weight", [-1, math.inf, False]),
        ("nll_loss_type", ["l3", 1]),
        ("logvar_init", [math.nan, math.inf, "6", None]),
    ],
)
def test_what_no_network_has_is_refused_by_key(key: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError) as caught:
            check_settings({**SETTINGS, key: value})
        found = caught.value
        assert (found.key, repr(found.value)) == (f"model.{key}", repr(value))
        assert found.limit


def test_unknown_settings_are_refused_with_the_nearest() -> None:
    for key, word in (("norm_group", "norm_groups?"), ("chs.0", "chs"), ("x[0]", "chs"), (3, "chs")):
        with refused(ConfigError, word, key=f"model.{key}"):
            check_settings({**SETTINGS, key: 8})
    with refused(ConfigError, "list", key="model"):
        check_settings([("act", "gelu")])  # type: ignore[arg-type]


def test_the_schema_offers_what_the_network_has() -> None:
    """The schema must not import torch, so that it cannot read the network's tables."""
    for key, table in (
        ("act", network.ACTIVATIONS),
        ("conv_padding_mode", network.PADDING_MODES),
        ("nll_loss_type", network.NLL_LOSS_TYPES),
    ):
        assert set(get_args(NetworkSettings.model_fields[key].annotation)) == set(table)


def test_wider_limits_have_the_same_defaults() -> None:
    trained = TrainConfig.model_validate({"output_dir": "run", "data": {"store": "store"}}).model
    assert NetworkSettings().model_dump() == trained.model_dump()
