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
from refusals import refused
from safetensors.numpy import save as save_arrays
from safetensors.torch import load_file
from tiny import (
    N_CHANNELS,
    SETTINGS,
    VOLUME,
    equal_weights,
    flip,
    signed,
    tiny_latents,
    tiny_model,
    tiny_normalization,
    tiny_provenance,
    write_tiny,
)

from spectralvae import load_model
from spectralvae.errors import DamagedError, InputError
from spectralvae.model import AutoencoderKL
from spectralvae.weights.artifact import pack_model, read_artifact, verify, weights_sha256, write_folder

FILES = ["config.json", "manifest.json", "model.safetensors", "normalization.safetensors"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("whole") / "step=000005", step=5)


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def rewritten(source, folder, change):
    """A copy with another config.json: what its manifest holds is true, but not what is in it."""
    files = verify(source)
    config = json.loads(files["config.json"])
    change(config)
    write_folder(folder, {**files, "config.json": json.dumps(config).encode()})
    return folder


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
    latents, provenance = tiny_latents(), tiny_provenance()
    write_folder(folder, pack_model(model, settings, normalization, 7, latents, provenance))
    assert files_in(folder) == FILES
    assert files_in(folder.parent) == ["a"]

    found, contents = read_artifact(folder)
    assert equal_weights(found.model.state_dict(), weights)
    assert not found.model.training
    assert (found.settings, found.step, found.path, found.left_out) == (settings, 7, folder, ())
    assert found.normalization.settings() == normalization.settings()
    pairs = [(found.normalization.arrays()[name], values) for name, values in normalization.arrays().items()]
    for ours, values in [*pairs, (found.latents.mean, latents.mean), (found.latents.std, latents.std)]:
        np.testing.assert_array_equal(ours, values)
        assert ours.dtype == np.float64
    assert (found.latents.n_tiles, found.latents.n_positions, found.provenance) == (5, 79, provenance)
    assert contents == {name: (folder / name).read_bytes() for name in FILES if name != "manifest.json"}


def test_files_are_what_they_are_said_to_be(whole):
    """safetensors with mltools' names, JSON, and a manifest that sha256sum confirms."""
    rest = ("embed_dim", "kl_weight", "nll_loss_type", "logvar_init")
    network = AutoencoderKL({key: value for key, value in SETTINGS.items() if key not in rest}, embed_dim=3)
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


def test_what_may_be_absent(tmp_path):
    known = tiny_provenance(metrics=None, baselines=None, initial_weights="unknown")
    write_tiny(tmp_path / "b", normalization=tiny_normalization(wavelength=None), provenance=known)
    found = read_artifact(tmp_path / "b")[0]
    assert (found.normalization.wavelength, found.latents, found.provenance) == (None, None, known)
    old = rewritten(
        tmp_path / "b", tmp_path / "old", lambda config: [config.pop(key) for key in ("latents", "provenance")]
    )
    found = read_artifact(old)[0]
    assert (found.latents, found.provenance) == (None, None)


def test_weights_are_known_by_the_digest_of_their_file(whole):
    model, digest = load_model(whole), hashlib.sha256((whole / "model.safetensors").read_bytes()).hexdigest()
    for layout in (torch.contiguous_format, torch.channels_last):
        assert weights_sha256(model.to(memory_format=layout).train()) == digest
    with torch.no_grad():
        model.logvar += 1e-6
    assert weights_sha256(model) != digest


CHANGES = [  # of config.json, and what the line must name
    (lambda config: config["model"].update(embed_dim=4), "quant_conv"),
    (lambda config: config.pop("model"), "'model'"),
    (lambda config: config["normalization"].update(transform="log"), "'log'"),
    (lambda config: config["normalization"].update(extra=1), "extra"),
    (lambda config: config["latents"]["std"].append(1.0), "(4,)"),
    (lambda config: config["latents"].pop("n_tiles"), "n_tiles"),
    (lambda config: config["provenance"].update(place="moon"), "place"),
]
SETTINGS_CHANGES = [  # of its model section, and the key at fault
    (lambda config: config["model"].update(width=3), "model.width"),
    (lambda config: config.update(model=None), "model"),
]


def test_what_does_not_belong_together_is_refused(tmp_path):
    source = write_tiny(tmp_path / "a", latents=tiny_latents(), provenance=tiny_provenance())
    for i, (change, word) in enumerate(CHANGES):
        folder = rewritten(source, tmp_path / str(i), change)
        with refused(InputError, word, path=folder):
            read_artifact(folder)
    for i, (change, key) in enumerate(SETTINGS_CHANGES):
        folder = rewritten(source, tmp_path / f"settings {i}", change)
        with refused(InputError, path=folder / "config.json", key=key):
            read_artifact(folder)
    for name in ("mean", "std", "wavelength"):
        arrays = {**tiny_normalization().arrays(), name: np.ones(N_CHANNELS + 1)}
        write_folder(tmp_path / name, {**verify(source), "normalization.safetensors": save_arrays(arrays)})
        with refused(InputError, name, f"({N_CHANNELS + 1},)", path=tmp_path / name):
            read_artifact(tmp_path / name)


# -- damage ------------------------------------------------------------------------------------------------------


def test_every_byte_of_the_manifest_counts(copy):
    path = copy / "manifest.json"
    content = path.read_bytes()
    for index in range(len(content)):
        flip(path, index, bit=index % 8)
        with refused(DamagedError, path=path):
            verify(copy)
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
    with refused(DamagedError, path=path):
        read_artifact(copy)


@pytest.mark.parametrize(
    ("code", "kind"), [("EIO", DamagedError), ("EBADMSG", DamagedError), ("EACCES", InputError), ("ESTALE", InputError)]
)
def test_only_what_cannot_be_whole_is_called_damaged(copy, monkeypatch, code, kind):
    """A bad sector is damage; behind a lost permission or connection lies what may be the newest good checkpoint."""

    def fail(path):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with refused(kind, path=copy / "manifest.json"):
        verify(copy)


def test_newer_formats_are_refused(copy):
    files, path = verify(copy), copy / "manifest.json"
    newer = rewritten(copy, copy.with_name("newer"), lambda config: config.update(format=2))
    with refused(InputError, path=newer / "config.json", key="format", value=2):
        read_artifact(newer)
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    path.write_text(signed({**manifest, "format": 2}))
    for use in (read_artifact, lambda folder: write_folder(folder, files)):
        with refused(InputError, path=path, key="format", value=2):
            use(copy)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/file"])
def test_names_that_lead_out_of_the_folder(copy, name):
    (copy.parent / "outside").write_bytes(b"")
    (copy / "sub").mkdir()
    (copy / "sub" / "file").write_bytes(b"")
    entries = {name: {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}}
    (copy / "manifest.json").write_text(signed({"format": 1, "files": entries}))
    with refused(InputError, path=copy / "manifest.json", value=name):
        read_artifact(copy)


# -- writing -----------------------------------------------------------------------------------------------------


def test_a_whole_folder_of_that_name_stays(copy):
    """It could only be replaced in two steps, and a kill between them would cost it."""
    before = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    write_tiny(copy, seed=3, step=8)
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == before
    assert read_artifact(copy)[0].step == 5
    assert files_in(copy.parent) == ["copy"]


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
def test_a_damaged_folder_of_that_name_is_replaced(copy, name):
    (copy / "stray.txt").write_text("of the older one")
    flip(copy / name, 0.5)
    write_tiny(copy, seed=3, step=8)
    found = read_artifact(copy)[0]
    assert found.step == 8
    assert equal_weights(found.model.state_dict(), tiny_model(3).state_dict())
    assert files_in(copy) == FILES
    assert files_in(copy.parent) == ["copy"]


def test_what_was_written_is_read_back(tmp_path, monkeypatch):
    """A disk that keeps other bytes than it was given."""
    size = len(pack_model(tiny_model(), SETTINGS, None, None)["model.safetensors"])

    def spoil(descriptor):
        if os.fstat(descriptor).st_size == size:
            os.pwrite(descriptor, b"?", size - 1)

    monkeypatch.setattr(os, "fsync", spoil)
    with refused(DamagedError, "model.safetensors"):
        write_tiny(tmp_path / "a")
    assert files_in(tmp_path) == []
