"""A model on disk: nothing is lost, nothing damaged is read, nothing half-written is seen."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    N_CHANNELS,
    SETTINGS,
    VOLUME,
    equal_weights,
    flip,
    tiny_latents,
    tiny_model,
    tiny_normalization,
    tiny_provenance,
    write_tiny,
)

from spectralvae import load_model
from spectralvae.errors import DamagedError, InputError, NoRoomError
from spectralvae.model import AutoencoderKL
from spectralvae.weights import artifact
from spectralvae.weights.artifact import pack_model, read_artifact, verify, weights_sha256, write_files, write_folder

FILES = ["config.json", "manifest.json", "model.safetensors", "normalization.safetensors"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("whole") / "step=000005", step=5)


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(folder, *words):
    """Refused with one line that holds every one of ``words``."""
    with pytest.raises(InputError) as error:
        read_artifact(folder)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def rewritten(folder, change):
    """Write the folder anew with another config.json: what its manifest holds is true, but not what is in it."""
    files = dict(verify(folder))
    config = json.loads(files["config.json"])
    change(config)
    shutil.rmtree(folder)
    write_folder(folder, {**files, "config.json": json.dumps(config).encode()})


def signed(manifest):
    """The manifest's file with its digest, by the rule as it is written down, not by the code."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "digest": digest}, indent=2) + "\n"


# -- round trip --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "layout"),
    [(SETTINGS, torch.contiguous_format), (SETTINGS, torch.channels_last), (VOLUME, torch.channels_last_3d)],
    ids=["contiguous", "channels_last", "volume"],
)
def test_round_trip_is_bit_equal(tmp_path, settings, layout):
    model = tiny_model(1, settings).to(memory_format=layout)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    assert model.encoder.conv_in.weight.is_contiguous() == (layout is torch.contiguous_format)
    folder = tmp_path / "runs" / "a"
    normalization = tiny_normalization(mean=np.array([np.nan, 1, 2, 3, 4, 1 / 3]))
    write_folder(folder, pack_model(model, settings, normalization, 7))
    assert files_in(folder) == FILES
    assert files_in(folder.parent) == ["a"]

    found, contents = read_artifact(folder)
    assert equal_weights(found.model.state_dict(), weights)
    assert not found.model.training
    assert (found.settings, found.step, found.path, found.left_out) == (settings, 7, folder, ())
    assert found.normalization.settings() == normalization.settings()
    for name, values in normalization.arrays().items():
        np.testing.assert_array_equal(found.normalization.arrays()[name], values)
        assert found.normalization.arrays()[name].dtype == np.float64
    assert contents == {name: (folder / name).read_bytes() for name in FILES if name != "manifest.json"}


def test_files_are_what_they_are_said_to_be(whole):
    """safetensors with mltools' names, JSON, and a manifest that sha256sum confirms."""
    params = {key: value for key, value in SETTINGS.items() if key not in ("embed_dim", "kl_weight", "nll_loss_type")}
    del params["logvar_init"]
    network = AutoencoderKL(params, embed_dim=3)
    network.load_state_dict(load_file(whole / "model.safetensors"), strict=True)
    assert equal_weights(network.state_dict(), tiny_model(0).state_dict())
    config = json.loads((whole / "config.json").read_text())
    assert (config["model"], config["step"]) == (SETTINGS, 5)
    manifest = json.loads((whole / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        content = (whole / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert sorted([*manifest["files"], "manifest.json"]) == FILES
    del manifest["digest"]
    assert signed(manifest) == (whole / "manifest.json").read_text()


def test_without_normalization_and_wavelength(tmp_path):
    write_folder(tmp_path / "a", pack_model(tiny_model(), SETTINGS, None, None))
    assert files_in(tmp_path / "a") == ["config.json", "manifest.json", "model.safetensors"]
    found = read_artifact(tmp_path / "a")[0]
    assert (found.normalization, found.step) == (None, None)
    write_tiny(tmp_path / "b", normalization=tiny_normalization(wavelength=None))
    assert read_artifact(tmp_path / "b")[0].normalization.wavelength is None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_weights_are_known_by_the_digest_of_their_file(whole, layout):
    model = load_model(whole).to(memory_format=layout).train()
    digest = hashlib.sha256((whole / "model.safetensors").read_bytes()).hexdigest()
    assert weights_sha256(model) == digest
    with torch.no_grad():
        model.logvar += 1e-6
    assert weights_sha256(model) != digest


def test_statistics_of_latents_and_provenance(tmp_path):
    """Every bit of a float64 comes back."""
    found = read_artifact(write_tiny(tmp_path / "a", latents=tiny_latents(), provenance=tiny_provenance()))[0]
    assert found.provenance == tiny_provenance()
    for name in ("mean", "std"):
        np.testing.assert_array_equal(getattr(found.latents, name), getattr(tiny_latents(), name))
        assert getattr(found.latents, name).dtype == np.float64
    assert (found.latents.n_tiles, found.latents.n_positions) == (5, 79)
    unvalidated = tiny_provenance(metrics=None, baselines=None, initial_weights="unknown")
    found = read_artifact(write_tiny(tmp_path / "b", provenance=unvalidated))[0]
    assert (found.latents, found.provenance) == (None, unvalidated)


def test_folders_of_before_there_were_statistics(copy):
    rewritten(copy, lambda config: [config.pop(key) for key in ("latents", "provenance")])
    found = read_artifact(copy)[0]
    assert (found.latents, found.provenance) == (None, None)
    assert equal_weights(found.model.state_dict(), tiny_model(0).state_dict())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: config["latents"]["std"].append(1.0), ("std of the latents has shape (4,), not (3,)",)),
        (lambda config: config["latents"].pop("mean"), ("KeyError", "mean")),
        (lambda config: config["latents"].pop("n_tiles"), ("n_tiles",)),
        (lambda config: config["provenance"].pop("training"), ("KeyError", "training")),
        (lambda config: config["provenance"].update(place="moon"), ("place",)),
    ],
)
def test_statistics_of_another_shape_are_refused(tmp_path, change, words):
    folder = write_tiny(tmp_path / "a", latents=tiny_latents(), provenance=tiny_provenance())
    rewritten(folder, change)
    refused(folder, str(folder), *words)


# -- damage ------------------------------------------------------------------------------------------------------

DAMAGES = {
    "first bit": lambda path: flip(path, 0),
    "early bit": lambda path: flip(path, 0.1, 5),
    "middle bit": lambda path: flip(path, 0.5, 7),
    "late bit": lambda path: flip(path, 0.9, 2),
    "last bit": lambda path: flip(path, 1.0, 3),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one byte less": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_every_damage_is_refused_by_name(copy, name, damage):
    DAMAGES[damage](copy / name)
    refused(copy, f"{copy / name}: ")


def test_every_byte_of_the_manifest_counts(copy):
    path = copy / "manifest.json"
    content = path.read_bytes()
    for index in range(len(content)):
        flip(path, index, bit=index % 8)
        refused(copy, f"{path}: ")
        path.write_bytes(content)
    verify(copy)


@pytest.mark.parametrize(
    ("old", "new"),
    [("  ", "\t"), ('": ', '" : '), ("{\n", "{ \n"), ('"format": 1', '"format": 1e0'), ("format", "\\u0066ormat")],
)
def test_a_manifest_that_says_the_same_otherwise_is_refused(copy, old, new):
    path = copy / "manifest.json"
    text = path.read_text()
    changed = text.replace(old, new, 1)
    assert json.loads(changed) == json.loads(text)
    path.write_text(changed)
    refused(copy, f"{path}: is damaged: its digest does not fit")


@pytest.mark.parametrize(
    ("code", "kind"), [("EIO", DamagedError), ("EBADMSG", DamagedError), ("EACCES", InputError), ("ESTALE", InputError)]
)
def test_only_what_cannot_be_whole_is_called_damaged(copy, monkeypatch, code, kind):
    """A bad sector is damage; behind a lost permission or connection lies what may be the newest good checkpoint."""

    def fail(path):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(InputError, match=r"manifest\.json: cannot be read: ") as error:
        verify(copy)
    assert type(error.value) is kind


def test_newer_formats_are_refused(copy, monkeypatch):
    files = verify(copy)
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "FORMAT", 2)
        shutil.rmtree(copy)
        write_folder(copy, files)
    refused(copy, f"{copy / 'manifest.json'}: has format 2", "reads format 1", "update")
    with pytest.raises(InputError, match="update"):
        write_folder(copy, files)
    shutil.rmtree(copy)
    write_folder(copy, files)
    rewritten(copy, lambda config: config.update(format=2))
    refused(copy, str(copy), "config.json has format 2", "update")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/file"])
def test_names_that_lead_out_of_the_folder(copy, name):
    (copy.parent / "outside").write_bytes(b"")
    (copy / "sub").mkdir()
    (copy / "sub" / "file").write_bytes(b"")
    entries = {name: {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}}
    (copy / "manifest.json").write_text(signed({"format": 1, "files": entries}))
    refused(copy, f"manifest.json: names {name!r}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: config["model"].update(embed_dim=4), "embed_dim|size mismatch|quant_conv"),
        (lambda config: config["model"].update(norm_groups=3), "norm_groups = 3"),
        (lambda config: config["model"].update(width=3), "model.width"),
        (lambda config: config["model"].pop("act"), "act must be given"),
        (lambda config: config.pop("model"), "KeyError"),
        (lambda config: config.update(model=None), "model must be a mapping"),
        (lambda config: config["normalization"].update(transform="log"), "unknown transform, 'log'"),
        (lambda config: config["normalization"].update(extra=1), "extra"),
        (lambda config: config["normalization"].pop("clip"), "clip"),
    ],
)
def test_what_does_not_belong_together_is_refused(copy, change, words):
    rewritten(copy, change)
    with pytest.raises(InputError, match=words) as error:
        read_artifact(copy)
    assert str(copy) in str(error.value)


@pytest.mark.parametrize("name", ["mean", "std", "wavelength"])
def test_normalization_of_other_channels_is_refused(tmp_path, name):
    wrong = tiny_normalization()
    object.__setattr__(wrong, name, np.ones(N_CHANNELS + 1))
    write_folder(tmp_path / "a", pack_model(tiny_model(), SETTINGS, wrong, None))
    refused(tmp_path / "a", f"{name} of the normalisation has shape ({N_CHANNELS + 1},), not ({N_CHANNELS},)")


# -- writing -----------------------------------------------------------------------------------------------------


def test_a_whole_folder_of_that_name_stays(copy):
    """It could only be replaced in two steps, and a kill between them would cost it."""
    before = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    write_tiny(copy, seed=3, step=8)
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == before
    assert read_artifact(copy)[0].step == 5
    assert files_in(copy.parent) == ["copy"]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_folder_of_that_name_is_replaced(copy, name):
    (copy / "stray.txt").write_text("of the older one")
    flip(copy / name, 0.5)
    write_tiny(copy, seed=3, step=8)
    found = read_artifact(copy)[0]
    assert found.step == 8
    assert equal_weights(found.model.state_dict(), tiny_model(3).state_dict())
    assert files_in(copy) == FILES
    assert files_in(copy.parent) == ["copy"]


def failing(function, nth):
    """``function``, raising at its nth call."""
    calls = []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) == nth:
            raise OSError(28, "No space left on device")
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize(
    ("owner", "name", "nth"),
    [
        (os, "fsync", 1),
        (os, "fsync", 3),
        (os, "fsync", 5),
        (Path, "replace", 1),
        (Path, "replace", 4),
        (Path, "mkdir", 1),
        (Path, "rename", 1),
    ],
)
def test_failed_write_leaves_what_was_there(copy, monkeypatch, owner, name, nth):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), nth))
        with pytest.raises(NoRoomError, match="No space left"):
            write_tiny(copy.with_name("new"), seed=3, step=8)
    assert files_in(copy.parent) == ["copy"]
    assert read_artifact(copy)[0].step == 5
    assert equal_weights(read_artifact(copy)[0].model.state_dict(), tiny_model(0).state_dict())


def test_what_was_written_is_read_back(tmp_path, monkeypatch):
    """A disk that keeps other bytes than it was given."""

    def wrong(path, content):
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(data[:-1] + b"?" if path.name == "model.safetensors" else data)

    monkeypatch.setattr(artifact, "write_atomic", wrong)
    with pytest.raises(InputError, match=r"model\.safetensors: is damaged"):
        write_tiny(tmp_path / "a")
    assert files_in(tmp_path) == []


def test_write_files_puts_the_manifest_last(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "replace", failing(Path.replace, 3))
    with pytest.raises(NoRoomError, match="No space"):
        write_files(tmp_path, {"a": b"1", "b": b"2"})
    with pytest.raises(InputError, match=r"manifest\.json: is missing"):
        verify(tmp_path)
