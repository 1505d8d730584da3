"""Foreign weights in and out, against the golden tensors and against hostile files."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spectralvae.errors import ConfigError, InputError
from spectralvae.model import AutoencoderKL
from spectralvae.weights.mltools import (
    load_foreign,
    read_spectrum,
    read_weights,
    resolve_settings,
    save_weights,
)
from spectralvae.weights.settings import build_model

GOLDEN = Path(__file__).parent / "golden"
CASES = ["attention_everywhere", "default_small", "volume_3d", "wide_kernel"]
MUST_BE_GIVEN = ["n_attention_heads", "norm_groups", "act", "conv_padding_mode", "norm_eps"]


def golden_weights(name):
    return load_file(GOLDEN / name / "weights.safetensors")


def golden_settings(name):
    config = json.loads((GOLDEN / name / "case.json").read_text())["config"]
    return {**config["enc_dec_params"], **{key: config[key] for key in ("embed_dim", "kl_weight", "nll_loss_type")}}


def least_settings(name):
    """Only what weights cannot tell."""
    keys = [*MUST_BE_GIVEN, "kl_weight", "nll_loss_type"]
    if name == "attention_everywhere":
        keys += ["attn_sizes", "shape"]
    return {key: value for key, value in golden_settings(name).items() if key in keys}


def prefixed(state_dict, prefix):
    return OrderedDict((prefix + key, value) for key, value in state_dict.items())


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


def as_lightning(state_dict):
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]}
    return {
        "epoch": 3,
        "global_step": 1200,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": state_dict,
        "optimizer_states": [optimizer],
        "lr_schedulers": [],
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5), "best": "a.ckpt"}},
        "hyper_parameters": {"embed_dim": 4, "enc_dec_params": {"chs": [32, 16, 16]}},
    }


def as_training_state(state_dict):
    return {
        "model_state_dict": state_dict,
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        "step": 5000,
        "train_losses": [np.float64(3.5), np.float32(2.5), 1.0],
        "val_losses": [np.float64(3.25), np.int64(4), np.bool_(True), np.float16(1.0)],
    }


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def refused(path, *words, model=None):
    """Refused as input with one line that names the file and every one of ``words``."""
    with pytest.raises(InputError) as error:
        load_foreign(path, model)
    text = one_line(error)
    for word in (str(path), *words):
        assert word in text
    return text


def misconfigured(weights, model, *words):
    with pytest.raises(ConfigError) as error:
        resolve_settings(weights, model)
    text = one_line(error)
    for word in (str(weights.path), *words):
        assert word in text
    return text


@pytest.fixture(scope="module")
def small():
    return golden_weights("default_small")


@pytest.fixture(scope="module")
def small_file(small, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("small") / "small.pt", small)


@pytest.fixture(scope="module")
def small_weights(small_file):
    return read_weights(small_file)


@pytest.fixture(scope="module")
def attention_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("attention") / "attention.pt"
    return read_weights(saved(path, golden_weights("attention_everywhere")))


# -- reading: wrappings, prefixes, heads -------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "vae.", "module._orig_mod.vae.", "_orig_mod.module.model."])
@pytest.mark.parametrize("wrap", [dict, as_lightning, as_training_state], ids=["bare", "lightning", "training"])
@pytest.mark.parametrize("name", CASES)
def test_golden_outputs_from_every_wrapping(tmp_path, name, wrap, prefix):
    path = saved(tmp_path / "model.ckpt", wrap(prefixed(golden_weights(name), prefix)))
    model, settings, weights = load_foreign(path, least_settings(name))
    tensors = load_file(GOLDEN / name / "tensors.safetensors")
    with torch.no_grad():
        moments = model.quant_conv(model.encoder(tensors["x"]))
        decoded = model.decode(model.encode(tensors["x"]).mode())
    for ours, key in ((moments, "moments"), (decoded, "decoded_mode")):
        assert (ours - tensors[key]).abs().max() <= 1e-5 * tensors[key].abs().max()
    assert not model.training
    assert weights.left_out == ()
    assert list(weights.state_dict) == list(model.state_dict())
    expected = golden_settings(name)
    if name != "attention_everywhere":
        expected["shape"] = [expected["shape"][0], *[None] * (len(expected["shape"]) - 1)]
    assert settings == expected
    assert json.loads(json.dumps(settings)) == settings


@pytest.mark.parametrize("name", CASES)
def test_whole_golden_config_is_accepted_and_returned(tmp_path, name):
    weights = read_weights(saved(tmp_path / "model.pt", golden_weights(name)))
    given = golden_settings(name)
    assert resolve_settings(weights, {**given, "logvar_init": 6.0}) == given
    tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    assert resolve_settings(weights, tuples) == given


def test_resolved_settings_resolve_to_themselves(small_weights):
    settings = resolve_settings(small_weights, least_settings("default_small"))
    assert settings["shape"] == [12, None, None]
    assert resolve_settings(small_weights, settings) == settings


def test_legacy_format_is_read(tmp_path, small):
    path = saved(tmp_path / "old.pt", as_training_state(small), _use_new_zipfile_serialization=False)
    assert torch.equal(read_weights(path).state_dict["encoder.conv_in.weight"], small["encoder.conv_in.weight"])


def test_numpy_scalars_of_the_old_module_name_are_read(tmp_path, small):
    """Files written with numpy 1 name ``numpy.core``."""
    buffer = io.BytesIO()
    torch.save(as_training_state(small), buffer, _use_new_zipfile_serialization=False)
    assert b"numpy._core.multiarray" in buffer.getvalue()
    path = tmp_path / "numpy1.pt"
    path.write_bytes(buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert len(read_weights(path).state_dict) == len(small)


def test_what_torch_warns_of_gives_one_line_only(tmp_path, small):
    """Warnings are errors here: torch's remark about the pickle protocol would fail this test."""
    path = saved(tmp_path / "protocol4.pt", small, pickle_protocol=4)
    refused(path, "needs pickle code, which is never run")


def test_heads_are_named_and_left_out(tmp_path, small):
    heads = {
        "l2_head.0.weight": torch.zeros(2),
        "module.l2_head.bias": torch.zeros(2),
        "vae.no2_probe.weight": torch.full((2,), torch.nan),
    }
    weights = read_weights(saved(tmp_path / "heads.pt", {**prefixed(small, "vae."), **heads}))
    assert weights.left_out == tuple(heads)
    assert weights.state_dict.keys() == small.keys()


def test_weights_are_plain_contiguous_float32(tmp_path, small):
    def converted(dtype):
        return {key: value.to(dtype) for key, value in small.items()}

    last = {
        key: value.to(memory_format=torch.channels_last) if value.ndim == 4 else value for key, value in small.items()
    }
    contents = [converted(torch.float16), converted(torch.bfloat16), converted(torch.float64), last]
    contents.append({key: torch.nn.Parameter(value) for key, value in small.items()})
    for i, content in enumerate(contents):
        state_dict = read_weights(saved(tmp_path / f"{i}.pt", content)).state_dict
        for key, value in state_dict.items():
            assert type(value) is torch.Tensor
            assert value.dtype == torch.float32
            assert value.is_contiguous()
            assert not value.requires_grad
            assert torch.equal(value, content[key].float())


# -- reading: refusals -------------------------------------------------------------------------------------------


class Malicious:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["alone", "beside", "inside"])
def test_pickle_code_is_refused_and_never_run(tmp_path, small, place, legacy):
    trap = tmp_path / "trap"
    evil = Malicious(trap)
    content = {
        "alone": evil,
        "beside": {**as_lightning(small), "hyper_parameters": {"path": [evil]}},
        "inside": as_training_state({**small, "extra": evil}),
    }[place]
    path = saved(tmp_path / "evil.pt", content, _use_new_zipfile_serialization=not legacy)
    refused(path, "pickle code (posix.mkdir), which is never run")
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # the trap works


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_plain_pickle_is_refused_and_never_run(tmp_path, protocol):
    trap = tmp_path / "trap"
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(Malicious(trap), protocol=protocol))
    words = {0: "not a file of torch.save", 2: "pickle code (posix.mkdir), which is never run"}
    refused(path, words.get(protocol, "is a plain pickle, whose code is never run"))
    with pytest.raises(InputError):
        read_spectrum(path)
    assert not trap.exists()


@pytest.mark.parametrize(
    "value",
    [Path("a"), np.zeros(2), np.zeros(1, dtype="i4,i4")[0], np.dtype("O"), torch.nn.Linear(1, 1)],
    ids=lambda value: type(value).__name__,
)
def test_only_tensors_plain_values_and_numpy_scalars_are_read(tmp_path, small, value):
    refused(saved(tmp_path / "a.pt", {"state_dict": small, "extra": value}), "needs pickle code")


def test_missing_file_and_directory(tmp_path):
    refused(tmp_path / "nothing.pt", "does not exist")
    refused(tmp_path, "is a directory")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files(tmp_path, small, kept, legacy):
    path = saved(tmp_path / "cut.pt", small, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    refused(path, "damaged or cut short")


def test_flipped_bit(tmp_path, small_file):
    path = tmp_path / "flipped.pt"
    content = bytearray(small_file.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # torch sees nothing
    refused(path, "is damaged: the checksum of")


def test_not_a_torch_file(tmp_path, small, small_file):
    for i, content in enumerate(
        (b"", b"hello world, this is text", b"\x89HDF\r\n\x1a\n", struct.pack("<Q", 8) + b"{}")
    ):
        path = tmp_path / f"{i}.pt"
        path.write_bytes(content)
        refused(path, "not a file of torch.save")
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    refused(tmp_path / "a.npz", "zip file, but not of torch.save")
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(small_file) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
        target.writestr("archive/zeros", bytes(10**6))
    refused(packed, "compressed archive")


def test_huge_tensor_in_a_small_file(tmp_path, small):
    huge = {**small, "encoder.conv_in.weight": torch.zeros(1).expand(10**12)}
    refused(saved(tmp_path / "huge.pt", huge), "larger than the file")
    with pytest.raises(InputError, match="larger than the file"):
        read_spectrum(saved(tmp_path / "spectrum.pt", torch.zeros(1).expand(10**12)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.zeros(3), "holds a Tensor, not a state dict"),
        ([1, 2], "holds a list"),
        ({}, "no state dict"),
        ({"epoch": 3, "weights": {"a": torch.zeros(1)}}, "its keys: 'epoch', 'weights'"),
        ({"state_dict": None}, "no state dict"),
        ({"state_dict": {}, "model_state_dict": {}}, "two sets of weights"),
        ({"state_dict": {}}, "'encoder.conv_in.weight' is missing"),
        ({"net.weight": torch.zeros(1)}, "it holds 1 keys: 'net.weight'"),
        ({"state_dict": {3: torch.zeros(1)}}, "key 3 of the state dict is of type int"),
    ],
)
def test_no_state_dict(tmp_path, content, words):
    refused(saved(tmp_path / "a.pt", content), words)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3.0, "is a float, not a tensor"),
        (torch.full((4,), torch.nan), "not finite"),
        (torch.full((4,), -torch.inf), "not finite"),
        (torch.zeros(4, dtype=torch.int64), "torch.int64"),
        (torch.zeros(4, dtype=torch.complex64), "torch.complex64"),
        (torch.zeros(4, dtype=torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (torch.full((4,), 0.1, dtype=torch.float64), "would lose digits"),
        (torch.full((4,), 1e300, dtype=torch.float64), "would lose digits"),
        (torch.zeros(4).to_sparse(), "not an ordinary tensor"),
        (torch.zeros(4, device="meta"), "not an ordinary tensor"),
    ],
)
def test_unusable_values_are_refused_by_key(tmp_path, small, value, words):
    content = {**prefixed(small, "vae."), "vae.post_quant_conv.bias": value}
    refused(saved(tmp_path / "a.pt", content), "'vae.post_quant_conv.bias'", words)


def test_stray_missing_and_misshapen_keys_are_listed(tmp_path, small):
    content = {f"loss.{i}": torch.zeros(1) for i in range(7)} | small
    del content["decoder.ups.1.up.bias"], content["encoder.mid1.net1.0.weight"]
    content["quant_conv.bias"] = torch.zeros(9)
    content["logvar"] = torch.zeros(1)
    text = refused(
        saved(tmp_path / "a.pt", content),
        "7 stray ('loss.0', 'loss.1', 'loss.2', 'loss.3', 'loss.4', ...)",
        "2 missing ('encoder.mid1.net1.0.weight', 'decoder.ups.1.up.bias')",
        "2 misshapen (",
        "'quant_conv.bias' is (9,), not (8,)",
        "'logvar' is (1,), not ()",
    )
    assert "loss.5" not in text


TELLING = [f"encoder.downs.{i}.resnet_blocks.0.net1.2.weight" for i in range(3)]  # of the network's sizes
TELLING += ["decoder.conv_in.weight", "encoder.conv_in.weight", "post_quant_conv.weight"]


@pytest.mark.parametrize("key", TELLING)
def test_every_key_that_tells_counts(tmp_path, small, key):
    without = {name: value for name, value in small.items() if name != key}
    refused(saved(tmp_path / "a.pt", without), repr(key))
    refused(saved(tmp_path / "b.pt", {**small, key: torch.zeros(2, 3)}), repr(key))


@pytest.mark.parametrize("i", range(25))
def test_every_other_key_counts(tmp_path, small, i):
    """As many at a time as a message names."""
    keys = sorted(small.keys() - TELLING)[i::25]
    assert len(keys) == 5
    without = {name: value for name, value in small.items() if name not in keys}
    refused(saved(tmp_path / "a.pt", without), "5 missing", *map(repr, keys))
    misshapen = dict.fromkeys(keys, torch.zeros(2, 3))
    refused(saved(tmp_path / "b.pt", {**small, **misshapen}), "5 misshapen", *map(repr, keys))


def test_attention_that_no_network_has(tmp_path, small):
    heads = golden_weights("attention_everywhere")
    partial = {key: value for key, value in heads.items() if "ups.0.attention_blocks.1." not in key}
    refused(saved(tmp_path / "partial.pt", partial), "10 missing ('decoder.ups.0.attention_blocks.1.norm.weight'")
    volume = golden_weights("volume_3d")
    volume["encoder.mid_attn1.q.bias"] = torch.zeros(16)
    refused(saved(tmp_path / "volume.pt", volume), "no AutoencoderKL", "attention works on images")


def test_keys_with_line_breaks_stay_on_one_line(tmp_path, small):
    refused(saved(tmp_path / "a.pt", {**small, "a\nb": torch.zeros(1)}), r"'a\nb'")


def test_two_prefixes_for_one_key(tmp_path, small):
    content = {**prefixed(small, "vae."), "model.vae.logvar": small["logvar"]}
    refused(saved(tmp_path / "a.pt", content), "'vae.logvar' and 'model.vae.logvar' are both 'logvar'")


# -- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", MUST_BE_GIVEN)
def test_what_weights_cannot_tell_must_be_given(small_weights, key):
    given = golden_settings("default_small")
    del given[key]
    misconfigured(small_weights, given, f"give also model: {{{key}}}")


@pytest.mark.parametrize("model", [None, {}])
def test_without_settings_everything_is_listed(small_weights, small_file, model):
    words = (f"{{{', '.join(MUST_BE_GIVEN)}}}", "inferred chs [32, 16, 16]", "z_channels 4", "12 input channels, 2-D")
    misconfigured(small_weights, model, *words)
    with pytest.raises(ConfigError):
        load_foreign(small_file, model)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shape", [13, 16, 16]),
        ("shape", [12, 16, 16, 16]),
        ("shape", [13, None, None]),
        ("chs", [32, 16]),
        ("chs", [16, 32, 16]),
        ("attn_sizes", [8]),
        ("mid_attn", False),
        ("num_res_blocks", 2),
        ("dropout_prob", 0.1),
        ("z_channels", 8),
        ("norm_affine", False),
        ("conv_kernel_size", 5),
        ("embed_dim", 8),
    ],
)
def test_settings_that_the_weights_contradict(small_weights, key, value):
    text = misconfigured(small_weights, {**golden_settings("default_small"), key: value}, f"model.{key} is {value}")
    assert text.count("model.") == 1


def test_all_contradictions_and_gaps_in_one_line(small_weights):
    given = {**golden_settings("default_small"), "z_channels": 8, "embed_dim": 7, "dropout_prob": 0.2}
    del given["act"]
    held = ("z_channels is 8, but the weights hold 4", "embed_dim is 7, but the weights hold 4", "dropout_prob is 0.2")
    misconfigured(small_weights, given, *held, "missing are act")


@pytest.mark.parametrize("value", [[], [32, 16, 8], [32, 16, 8, 4, 2], [16, 8, 4]])
def test_attention_levels_must_agree(attention_weights, value):
    given = golden_settings("attention_everywhere")
    misconfigured(attention_weights, {**given, "attn_sizes": value}, "attn_sizes is", "decoder.ups.0")


def test_attention_levels_are_those_of_the_network(tmp_path):
    """Every choice of sizes, the decoder's halved ones too, with sizes that halve to an odd number."""
    base = golden_settings("attention_everywhere")
    for height, sizes in ((32, [32]), (32, [8]), (32, [4]), (32, [2]), (32, [16, 4]), (12, [3]), (12, [1]), (4, [1])):
        given = {**base, "shape": [6, height, 8], "attn_sizes": sizes, "num_res_blocks": 1}
        network = build_model(given)
        path = tmp_path / "a.pt"
        save_weights(network, path)
        assert load_foreign(path, given)[1] == given
        misconfigured(read_weights(path), {**given, "attn_sizes": [99]}, "attn_sizes is [99]")


def test_attention_in_levels_needs_sizes(attention_weights, small_weights):
    given = golden_settings("attention_everywhere")
    for gap in ({"shape": None}, {"shape": [6, None, None]}):
        misconfigured(attention_weights, {**given, **gap}, "give also model: {shape}")
    del given["attn_sizes"]
    misconfigured(attention_weights, given, "give also model: {attn_sizes}")
    misconfigured(small_weights, {**least_settings("default_small"), "attn_sizes": [2]}, "give also model: {shape}")


def test_attn_sizes_that_meet_no_level_are_allowed(small_weights):
    given = {**golden_settings("default_small"), "attn_sizes": [7]}
    assert resolve_settings(small_weights, given) == given


def test_dropout_is_told_by_its_layer(tmp_path):
    given = {**golden_settings("default_small"), "dropout_prob": 0.25}
    path = tmp_path / "dropout.pt"
    save_weights(build_model(given), path)
    weights = read_weights(path)
    assert "encoder.mid1.net2.3.weight" in weights.state_dict
    assert resolve_settings(weights, given) == given
    misconfigured(weights, {**given, "dropout_prob": 0.0}, "dropout_prob is 0.0", "with a dropout layer")
    del given["dropout_prob"]
    misconfigured(weights, given, "give also model: {dropout_prob}")


def test_norms_without_affine_and_no_attention_at_all(tmp_path):
    given = {**golden_settings("default_small"), "norm_affine": False, "mid_attn": False}
    path = tmp_path / "plain.pt"
    save_weights(build_model(given), path)
    del given["norm_affine"], given["mid_attn"], given["n_attention_heads"]
    settings = resolve_settings(read_weights(path), given)
    assert (settings["norm_affine"], settings["mid_attn"], settings["n_attention_heads"]) == (False, False, 1)


def test_defaults_of_what_is_no_architecture(small_weights):
    given = {key: value for key, value in golden_settings("default_small").items() if key in MUST_BE_GIVEN}
    settings = resolve_settings(small_weights, given)
    reference = AutoencoderKL({"shape": [8, 4, 4], "chs": [8]})
    assert settings["kl_weight"] == reference.kl_weight
    assert settings["nll_loss_type"] == reference.nll_loss_type


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("norm_group", 8, "did you mean norm_groups?"),
        ("enc_dec_parms_x", {}, "the known ones are shape, chs"),
        (3, 8, "model.3 is not a setting"),
        ("norm_groups", "8", "model.norm_groups = '8' must be a whole number"),
        ("norm_groups", True, "must be a whole number"),
        ("norm_groups", 0, "must be a whole number from 1"),
        ("norm_groups", 7, "cannot be split into norm_groups = 7"),
        ("n_attention_heads", 5, "cannot be split into n_attention_heads = 5"),
        ("n_attention_heads", None, "model.n_attention_heads = None"),
        ("norm_eps", 0, "above 0"),
        ("norm_eps", float("nan"), "above 0"),
        ("act", "tanh", "one of gelu, relu, silu"),
        ("act", ["gelu"], "one of gelu"),
        ("conv_padding_mode", "same", "one of zeros"),
        ("double_z", False, "model.double_z = False must be true"),
        ("mid_attn", 1, "true or false"),
        ("dropout_prob", 1.5, "from 0 to 1"),
        ("chs", [], "must be a list"),
        ("chs", 32, "must be a list"),
        ("attn_sizes", None, "must be a list"),
        ("shape", [12, 16], "must be [C, H, W]"),
        ("shape", [12, 16, None], "must be [C, H, W]"),
        ("shape", [12, 18, 16], "multiple of 4"),
        ("kl_weight", -1, "from 0"),
        ("nll_loss_type", "l3", "one of l1, l2"),
        ("logvar_init", "6", "must be a number"),
    ],
)
def test_illegal_settings(small_weights, key, value, words):
    misconfigured(small_weights, {**golden_settings("default_small"), key: value}, words)


def test_settings_must_be_a_mapping(small_weights):
    misconfigured(small_weights, ["act"], "must be a mapping")


# -- building and writing ----------------------------------------------------------------------------------------


def test_building_leaves_the_random_state_alone(small_file):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_foreign(small_file, least_settings("default_small"))
    assert torch.equal(torch.rand(3), expected)


def test_build_model_takes_complete_settings_only():
    settings = golden_settings("default_small")
    assert build_model({**settings, "logvar_init": 6.0}).logvar.item() == 6.0
    assert build_model({**settings, "shape": [12, None, None]}).encoder.shape == (12, 4, 4)
    for change, words in (({"norm_groups": 7}, "norm_groups = 7"), ({"width": 3}, "model.width")):
        with pytest.raises(ConfigError, match=words):
            build_model({**settings, **change})
    with pytest.raises(ConfigError, match="must hold sizes"):
        build_model({**settings, "shape": [12, None, None], "attn_sizes": [4]})
    del settings["act"]
    with pytest.raises(ConfigError, match="act must be given"):
        build_model(settings)


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_bit_equal(tmp_path, name):
    source = saved(tmp_path / "source.pt", golden_weights(name))
    model, settings, _ = load_foreign(source, least_settings(name))
    path = tmp_path / "copy.pt"
    path.write_text("an older file")
    save_weights(model.to(memory_format=torch.channels_last) if model.encoder.dim == 2 else model, path)
    again = read_weights(path)
    assert all(torch.equal(again.state_dict[key], value) for key, value in golden_weights(name).items())
    loaded = torch.load(path, weights_only=True)
    assert all(value.is_contiguous() and value.dtype == torch.float32 for value in loaded.values())
    config = json.loads((GOLDEN / name / "case.json").read_text())["config"]
    AutoencoderKL(**config).load_state_dict(loaded, strict=True)
    assert resolve_settings(again, settings) == settings
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copy.pt", "source.pt"]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    path.write_text("the old file")

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_weights(build_model(golden_settings("wide_kernel")), path)
    assert path.read_text() == "the old file"
    assert list(tmp_path.iterdir()) == [path]


# -- spectra -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (1, 5), (1, 5, 1, 1), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_spectrum(tmp_path, shape, dtype):
    tensor = torch.arange(5).to(dtype).reshape(shape) / 3
    spectrum = read_spectrum(saved(tmp_path / "mean_spectrum.pt", tensor))
    assert spectrum.dtype == np.float64
    assert spectrum.shape == (5,)
    np.testing.assert_array_equal(spectrum, tensor.double().reshape(-1).numpy())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"mean": torch.zeros(5)}, "holds dict"),
        (torch.zeros(5, dtype=torch.int64), "holds torch.int64"),
        (torch.zeros(5, 2), "shape (5, 2)"),
        (torch.zeros(()), "shape ()"),
        (torch.zeros(0), "shape (0,)"),
        (torch.zeros(5).to_sparse(), "not a spectrum"),
        (torch.zeros(5, device="meta"), "not a spectrum"),
        (torch.tensor([1.0, torch.nan]), "not finite"),
    ],
)
def test_spectrum_refused(tmp_path, content, words):
    path = saved(tmp_path / "std_spectrum.pt", content)
    with pytest.raises(InputError) as error:
        read_spectrum(path)
    assert str(path) in one_line(error)
    assert words in one_line(error)
