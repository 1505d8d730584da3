"""Foreign weights in and out, against the golden tensors and against hostile files."""

import io
import json
import math
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refused
from safetensors.torch import load_file

from spectralvae.errors import ConfigError, InputError
from spectralvae.model import AutoencoderKL
from spectralvae.weights.mltools import load_foreign, read_spectrum, read_weights, resolve_settings, save_weights
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
    return {prefix + key: value for key, value in state_dict.items()}


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


def as_lightning(state_dict):
    return {
        "pytorch-lightning_version": "2.4.0",
        "state_dict": state_dict,
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.95)}]}],
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5), "best": "a.ckpt"}},
        "hyper_parameters": {"embed_dim": 4, "enc_dec_params": {"chs": [32, 16, 16]}},
    }


def as_training_state(state_dict):
    losses = [np.float64(3.5), np.float32(2.5), 1.0, np.int64(4), np.bool_(True), np.float16(1.0)]
    return {"model_state_dict": state_dict, "optimizer_state_dict": {"state": {}}, "step": 5000, "losses": losses}


def misconfigured(weights, model, *words, **parts):
    with refused(ConfigError, *words, path=weights.path, **parts) as caught:
        resolve_settings(weights, model)
    return caught.value


def refuses(path, content, *words, read=read_weights):
    with refused(InputError, *words, path=saved(path, content)):
        read(path)


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


# -- what is read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (dict, ""),
        (as_lightning, "vae."),
        (as_training_state, "module._orig_mod.vae."),
        (as_lightning, "_orig_mod.module.model."),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_golden_outputs_from_every_wrapping_and_back(tmp_path, name, wrap, prefix):
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
    assert settings == json.loads(json.dumps(settings)) == expected

    copy = tmp_path / "copy.pt"
    copy.write_text("an older file")
    save_weights(model.to(memory_format=torch.channels_last) if model.encoder.dim == 2 else model, copy)
    loaded = torch.load(copy, weights_only=True)
    assert all(torch.equal(loaded[key], value) for key, value in golden_weights(name).items())
    assert all(value.is_contiguous() and value.dtype == torch.float32 for value in loaded.values())
    config = json.loads((GOLDEN / name / "case.json").read_text())["config"]
    AutoencoderKL(**config).load_state_dict(loaded, strict=True)
    assert resolve_settings(read_weights(copy), settings) == settings
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copy.pt", "model.ckpt"]
    given = golden_settings(name)  # the whole config is accepted
    tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    assert resolve_settings(weights, {**tuples, "logvar_init": 6.0}) == given


def test_legacy_format_with_scalars_of_numpy_1(tmp_path, small):
    """Files written with numpy 1 name ``numpy.core``."""
    buffer = io.BytesIO()
    torch.save(as_training_state(small), buffer, _use_new_zipfile_serialization=False)
    assert b"numpy._core.multiarray" in buffer.getvalue()
    path = tmp_path / "numpy1.pt"
    path.write_bytes(buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    found = read_weights(path).state_dict
    assert found.keys() == small.keys()
    assert all(torch.equal(found[key], value) for key, value in small.items())


def test_weights_are_plain_contiguous_float32(tmp_path, small):
    for convert in (
        torch.Tensor.half,
        torch.Tensor.bfloat16,
        torch.Tensor.double,
        lambda value: value.to(memory_format=torch.channels_last) if value.ndim == 4 else value,
        torch.nn.Parameter,
    ):
        content = {key: convert(value) for key, value in small.items()}
        for key, value in read_weights(saved(tmp_path / "a.pt", content)).state_dict.items():
            assert (type(value), value.dtype) == (torch.Tensor, torch.float32)
            assert value.is_contiguous() and not value.requires_grad
            assert torch.equal(value, content[key].float())


# -- files that are refused --------------------------------------------------------------------------------------


class Malicious:
    """Unpickling it creates a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["alone", "beside", "inside"])
def test_pickle_code_is_refused_and_never_run(tmp_path, small, monkeypatch, place, legacy):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # of the user, for a tool that needs it
    trap = tmp_path / "trap"
    evil = Malicious(trap)
    content = {
        "alone": evil,
        "beside": {**as_lightning(small), "hyper_parameters": {"path": [evil]}},
        "inside": as_training_state({**small, "extra": evil}),
    }[place]
    path = saved(tmp_path / "evil.pt", content, _use_new_zipfile_serialization=not legacy)
    with refused(InputError, "posix.mkdir", path=path):
        load_foreign(path, None)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # the trap works


@pytest.mark.parametrize(("protocol", "word"), [(0, "torch.save"), (2, "posix.mkdir"), (4, "plain"), (5, "plain")])
def test_plain_pickle_is_refused_and_never_run(tmp_path, protocol, word):
    trap, path = tmp_path / "trap", tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(Malicious(trap), protocol=protocol))
    for read in (read_weights, read_spectrum):
        with refused(InputError, word, path=path):
            read(path)
    assert not trap.exists()


@pytest.mark.parametrize(
    "value",
    [Path("a"), np.zeros(2), np.zeros(1, dtype="i4,i4")[0], np.dtype("O"), torch.nn.Linear(1, 1)],
    ids=lambda value: type(value).__name__,
)
def test_only_tensors_plain_values_and_numpy_scalars_are_read(tmp_path, small, value):
    refuses(tmp_path / "a.pt", {"state_dict": small, "extra": value}, "pickle code")


def zipped(members, compression):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def test_what_is_no_whole_file_of_torch_save(tmp_path, small, small_file):
    whole, buffer = small_file.read_bytes(), io.BytesIO()
    torch.save(small, buffer, _use_new_zipfile_serialization=False)
    legacy, flipped = buffer.getvalue(), bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    with zipfile.ZipFile(small_file) as given:
        members = {name: given.read(name) for name in given.namelist()}
    contents = [(b"", "torch.save"), (b"\x89HDF\r\n\x1a\n", "torch.save"), (flipped, "checksum")]
    contents += [(zipped({"a.npy": b""}, zipfile.ZIP_STORED), "zip")]
    contents += [(zipped({**members, "archive/zeros": bytes(10**6)}, zipfile.ZIP_DEFLATED), "compressed")]
    contents += [(file[: int(kept * len(file))], "truncated") for kept in (0.1, 0.999) for file in (whole, legacy)]
    path = tmp_path / "a.pt"
    for content, word in contents:
        path.write_bytes(content)
        with refused(InputError, word, path=path):
            load_foreign(path, None)
    path.write_bytes(flipped)
    torch.load(path, weights_only=True)  # torch sees nothing
    huge = {**small, "encoder.conv_in.weight": torch.zeros(1).expand(10**12)}
    refuses(path, huge, "larger")
    with refused(InputError, "pickle", path=saved(path, small, pickle_protocol=4)):  # torch warns of it
        load_foreign(path, None)
    for path, word in ((tmp_path, "directory"), (tmp_path / "b.pt", "exist")):
        with refused(InputError, word, path=path):
            load_foreign(path, None)


# -- state dicts that are refused --------------------------------------------------------------------------------


def test_what_is_no_set_of_weights(tmp_path, small):
    attention = golden_weights("attention_everywhere")
    for content, *words in (
        (torch.zeros(3), "Tensor"),
        ([1, 2], "list"),
        ({}, "none"),
        ({"epoch": 3, "weights": {"a": torch.zeros(1)}}, "'epoch', 'weights'"),
        ({"state_dict": None}, "'state_dict'"),
        ({"state_dict": {}, "model_state_dict": {}}, "two"),
        ({"net.weight": torch.zeros(1)}, "1 keys", "'net.weight'"),
        ({"state_dict": {3: torch.zeros(1)}}, "key 3", "int"),
        ({**prefixed(small, "vae."), "model.vae.logvar": small["logvar"]}, "'vae.logvar'", "'model.vae.logvar'"),
        ({key: value for key, value in attention.items() if "ups.0.attention_blocks.1." not in key}, "10 missing"),
        ({**golden_weights("volume_3d"), "encoder.mid_attn1.q.bias": torch.zeros(16)}, "attention"),
    ):
        refuses(tmp_path / "a.pt", content, *words)


def test_unusable_values_are_refused_by_key(tmp_path, small):
    for value, word in (
        (3.0, "float"),
        (torch.full((4,), torch.nan), "finite"),
        (torch.zeros(4, dtype=torch.int64), "torch.int64"),
        (torch.zeros(4, dtype=torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (torch.full((4,), 0.1, dtype=torch.float64), "float64"),
        (torch.zeros(4).to_sparse(), "sparse"),
        (torch.zeros(4, device="meta"), "meta"),
    ):
        content = {**prefixed(small, "vae."), "vae.post_quant_conv.bias": value}
        refuses(tmp_path / "a.pt", content, "'vae.post_quant_conv.bias'", word)


def test_stray_missing_and_misshapen_keys_are_listed(tmp_path, small):
    content = {f"loss.{i}": torch.zeros(1) for i in range(6)} | {"a\nb": torch.zeros(1)} | small
    missing = ["encoder.mid1.net1.0.weight", "decoder.ups.1.up.bias"]
    for key in missing:
        del content[key]
    content |= {"quant_conv.bias": torch.zeros(9), "logvar": torch.zeros(1)}
    words = ["7 stray", "'loss.4'", "2 missing", *map(repr, missing), "2 misshapen", "(9,), not (8,)", "(1,), not ()"]
    path = saved(tmp_path / "a.pt", content)
    with refused(InputError, *words, path=path) as caught:
        read_weights(path)
    assert "loss.5" not in str(caught.value)
    refuses(tmp_path / "b.pt", {**small, "a\nb": torch.zeros(1)}, r"'a\nb'")  # stays on one line


def test_every_key_counts(tmp_path, small):
    """Those that tell the network's sizes one by one, the others as many at a time as a message names."""
    telling = [f"encoder.downs.{i}.resnet_blocks.0.net1.2.weight" for i in range(3)]
    telling += ["decoder.conv_in.weight", "encoder.conv_in.weight", "post_quant_conv.weight"]
    others = sorted(small.keys() - telling)
    for keys in [[key] for key in telling] + [others[i : i + 5] for i in range(0, len(others), 5)]:
        without = {name: value for name, value in small.items() if name not in keys}
        for content in (without, {**small, **dict.fromkeys(keys, torch.zeros(2, 3))}):
            refuses(tmp_path / "a.pt", content, *map(repr, keys))


# -- settings ----------------------------------------------------------------------------------------------------


def test_what_weights_cannot_tell_must_be_given(small_weights, small_file):
    for key in MUST_BE_GIVEN:
        given = golden_settings("default_small")
        del given[key]
        misconfigured(small_weights, given, f"{{{key}}}", key="model")
    words = [f"{{{', '.join(MUST_BE_GIVEN)}}}", "chs [32, 16, 16]", "z_channels 4", "12 input channels", "2-D"]
    for nothing in (None, {}):
        misconfigured(small_weights, nothing, *words, key="model")
        with refused(ConfigError, path=small_file, key="model"):
            load_foreign(small_file, nothing)


CONTRADICTED = {
    "shape": [[13, 16, 16], [12, 16, 16, 16], [13, None, None]],
    "chs": [[32, 16], [16, 32, 16]],
    "attn_sizes": [[8]],
    "mid_attn": [False],
    "num_res_blocks": [2],
    "dropout_prob": [0.1],
    "z_channels": [8],
    "norm_affine": [False],
    "conv_kernel_size": [5],
    "embed_dim": [8],
}
ILLEGAL = {
    "norm_groups": ["8", True, 0],
    "n_attention_heads": [None],
    "norm_eps": [0, math.inf],
    "act": ["tanh", ["gelu"]],
    "conv_padding_mode": ["same"],
    "double_z": [False],
    "mid_attn": [1],
    "dropout_prob": [1.5],
    "chs": [[], 32],
    "attn_sizes": [None],
    "shape": [[12, 16], [12, 16, None]],
    "kl_weight": [-1],
    "nll_loss_type": ["l3"],
    "logvar_init": ["6"],
}


@pytest.mark.parametrize("table", [CONTRADICTED, ILLEGAL], ids=["contradicted", "illegal"])
def test_settings_that_are_refused(small_weights, table):
    for key, values in table.items():
        for value in values:
            given = {**golden_settings("default_small"), key: value}
            error = misconfigured(small_weights, given, key=f"model.{key}", value=value)
            assert (error.limit is not None) == (table is ILLEGAL)


def test_settings_that_are_none_of_a_network(small_weights):
    given = golden_settings("default_small")
    for key, word in (("norm_group", "norm_groups"), ("enc_dec_parms_x", "chs"), (3, "chs")):
        misconfigured(small_weights, {**given, key: 8}, word, key=f"model.{key}")
    for key, value, word in (("norm_groups", 7, "7"), ("n_attention_heads", 5, "5"), ("shape", [12, 18, 16], "18")):
        misconfigured(small_weights, {**given, key: value}, key, word, key="model")
    misconfigured(small_weights, ["act"], "list", key="model")
    given |= {"z_channels": 8, "embed_dim": 7, "dropout_prob": 0.2}  # all contradictions and gaps in one line
    del given["act"]
    words = ["model.embed_dim = 7", "model.dropout_prob = 0.2", "act"]
    misconfigured(small_weights, given, *words, key="model.z_channels", value=8)


def test_attention_levels_are_those_of_the_network(tmp_path, attention_weights):
    """Every choice of sizes, the decoder's halved ones too, with sizes that halve to an odd number."""
    base = golden_settings("attention_everywhere")
    for sizes in ([], [32, 16, 8], [32, 16, 8, 4, 2], [16, 8, 4]):
        given = {**base, "attn_sizes": sizes}
        misconfigured(attention_weights, given, "decoder.ups.0", key="model.attn_sizes", value=sizes)
    path = tmp_path / "a.pt"
    for height, sizes in ((32, [32]), (32, [8]), (32, [4]), (32, [2]), (32, [16, 4]), (12, [3]), (12, [1]), (4, [1])):
        given = {**base, "shape": [6, height, 8], "attn_sizes": sizes, "num_res_blocks": 1}
        save_weights(build_model(given), path)
        weights = read_weights(path)
        assert resolve_settings(weights, given) == given
        misconfigured(weights, {**given, "attn_sizes": [99]}, key="model.attn_sizes", value=[99])


def test_attention_in_levels_needs_sizes(attention_weights, small_weights):
    given = golden_settings("attention_everywhere")
    for gap in ({"shape": None}, {"shape": [6, None, None]}):
        misconfigured(attention_weights, {**given, **gap}, "{shape}", key="model")
    del given["attn_sizes"]
    misconfigured(attention_weights, given, "{attn_sizes}", key="model")
    misconfigured(small_weights, {**least_settings("default_small"), "attn_sizes": [2]}, "{shape}", key="model")
    given = {**golden_settings("default_small"), "attn_sizes": [7]}  # meets no level
    assert resolve_settings(small_weights, given) == given


def test_dropout_is_told_by_its_layer(tmp_path):
    given = {**golden_settings("default_small"), "dropout_prob": 0.25}
    save_weights(build_model(given), tmp_path / "dropout.pt")
    weights = read_weights(tmp_path / "dropout.pt")
    assert "encoder.mid1.net2.3.weight" in weights.state_dict
    assert resolve_settings(weights, given) == given
    misconfigured(weights, {**given, "dropout_prob": 0.0}, key="model.dropout_prob", value=0.0)
    del given["dropout_prob"]
    misconfigured(weights, given, "{dropout_prob}", key="model")


def test_defaults_of_what_weights_need_not_tell(tmp_path):
    """No attention needs no heads; the loss is as the network's own."""
    save_weights(
        build_model({**golden_settings("default_small"), "norm_affine": False, "mid_attn": False}), tmp_path / "a.pt"
    )
    given = {key: golden_settings("default_small")[key] for key in MUST_BE_GIVEN if key != "n_attention_heads"}
    settings = resolve_settings(read_weights(tmp_path / "a.pt"), given)
    assert (settings["norm_affine"], settings["mid_attn"], settings["n_attention_heads"]) == (False, False, 1)
    reference = AutoencoderKL({"shape": [8, 4, 4], "chs": [8]})
    assert (settings["kl_weight"], settings["nll_loss_type"]) == (reference.kl_weight, reference.nll_loss_type)


def test_build_model_takes_complete_settings_only():
    settings = golden_settings("default_small")
    assert build_model({**settings, "logvar_init": 6.0}).logvar.item() == 6.0
    assert build_model({**settings, "shape": [12, None, None]}).encoder.shape == (12, 4, 4)
    sizeless = {"shape": [12, None, None], "attn_sizes": [4]}
    for change, key in (({"norm_groups": 7}, "model"), ({"width": 3}, "model.width"), (sizeless, "model.shape")):
        with refused(ConfigError, key=key):
            build_model({**settings, **change})
    del settings["act"]
    with refused(ConfigError, "act", key="model"):
        build_model(settings)


# -- spectra -----------------------------------------------------------------------------------------------------


def test_spectrum_refused(tmp_path):
    for content, word in (
        ({"mean": torch.zeros(5)}, "dict"),
        (torch.zeros(5, dtype=torch.int64), "torch.int64"),
        (torch.zeros(5, 2), "(5, 2)"),
        (torch.zeros(()), "()"),
        (torch.zeros(0), "(0,)"),
        (torch.zeros(5).to_sparse(), "(5,)"),
        (torch.zeros(5, device="meta"), "(5,)"),
        (torch.tensor([1.0, torch.nan]), "finite"),
        (torch.zeros(1).expand(10**12), "larger"),
    ):
        refuses(tmp_path / "std_spectrum.pt", content, word, read=read_spectrum)
