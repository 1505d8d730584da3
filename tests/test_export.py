"""`spectralvae convert`: foreign models in, ours out, and nothing half-written where it cannot be done."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import yaml
from tiny import (
    N_CHANNELS,
    SETTINGS,
    equal_weights,
    flip,
    tiny_latents,
    tiny_model,
    tiny_normalization,
    tiny_provenance,
    write_tiny,
)

import spectralvae
from spectralvae import load_model
from spectralvae.cli import run
from spectralvae.weights.artifact import read_artifact, weights_sha256
from spectralvae.weights.provenance import Scenes

FOREIGN = {key: value for key, value in SETTINGS.items() if key not in ("shape", "logvar_init")}
MEAN = torch.linspace(1, 3, N_CHANNELS, dtype=torch.float64).div(3).float().double()
STD = torch.linspace(0.1, 2, N_CHANNELS, dtype=torch.float64).div(7).float().double()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """What someone has who trained with mltools; paths in the configs are relative to it."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {f"vae.{key}": value for key, value in tiny_model(5).state_dict().items()}}, "model.ckpt")
    torch.save(MEAN, "mean_spectrum.pt")
    torch.save(STD, "std_spectrum.pt")
    return tmp_path


SPECTRA = {"mean": "mean_spectrum.pt", "std": "std_spectrum.pt"}


def convert(*options, **config):
    """Run the command; the exit code."""
    Path("config.yaml").write_text(yaml.safe_dump({"output_dir": "out", "source": "model.ckpt", **config}))
    return run(["convert", "config.yaml", *options])


def is_model(model, seed):
    return equal_weights(model.state_dict(), tiny_model(seed).state_dict())


def sections(card):
    """The text of each section of a model card, by title."""
    parts = re.split(r"^## (.*)\n\n", card, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def refused(capsys, folder, *words, **config):
    """Refused with one line on stderr, and without an output directory."""
    assert convert(**config) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert text.startswith("spectralvae: error: ")
    for word in words:
        assert word in text
    assert not (folder / config.get("output_dir", "out")).exists()


# -- mltools -> export -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_from_mltools_with_its_statistics(folder, capsys, dtype):
    mean, std = MEAN.to(dtype), STD.to(dtype).reshape(1, -1, 1, 1)
    torch.save(mean, "mean_spectrum.pt")
    torch.save(std, "std_spectrum.pt")
    extra = {"clip": 8.0, "min_radiance": 0.5, "band": "band_540_740_nm", "wavelength": {"first": 540, "last": 740}}
    assert convert(model=FOREIGN, normalization={**SPECTRA, **extra}) == 0
    assert is_model(load_model("out"), 5)
    found = read_artifact(folder / "out")[0]
    normalization = found.normalization
    np.testing.assert_array_equal(normalization.mean, mean.double().numpy())
    np.testing.assert_array_equal(normalization.std, std.double().reshape(-1).numpy())
    assert normalization.mean.dtype == normalization.std.dtype == np.float64
    np.testing.assert_allclose(normalization.wavelength, [540, 580, 620, 660, 700, 740], rtol=1e-14)
    given = {"transform": "log_zscore", "clip": 8.0, "min_radiance": 0.5, "band": "band_540_740_nm", "units": None}
    assert normalization.settings().items() >= given.items()
    assert found.settings == {**FOREIGN, "shape": [N_CHANNELS, None, None]}
    assert found.step is None
    shown, card = capsys.readouterr().out, (folder / "out" / "README.md").read_text()
    assert "no normalisation" not in shown + card
    assert "out: export folder; load it with spectralvae.load_model('out')" in shown
    n_weights = sum(parameter.numel() for parameter in tiny_model().parameters())
    for words in (f"{n_weights:,} parameters", "6 channels to 3 latent channels", "540.00-740.00 nm", "model.ckpt"):
        assert words in card
    assert (found.latents, found.provenance) == (None, None)
    for title in ("Training data", "Validation", "Latents and how to scale them"):
        assert sections(card)[title].startswith("Unknown")
    assert "units of radiance: unknown" in card
    assert "a training tile" not in card  # whose size mltools' files do not tell
    assert "no loss counted it" not in card  # nor what happened to missing samples
    assert "WARNING" not in shown
    assert json.loads((folder / "out" / "run.json").read_text())["state"] == "finished"
    assert (folder / "out" / "config.yaml").is_file()


def test_a_finished_conversion_is_not_repeated(folder, capsys):
    assert convert(model=FOREIGN) == 0
    before = (folder / "out" / "manifest.json").stat().st_mtime_ns
    capsys.readouterr()
    assert convert(model=FOREIGN) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (folder / "out" / "manifest.json").stat().st_mtime_ns == before
    assert convert("--overwrite", model=FOREIGN) == 0
    assert (folder / "out" / "manifest.json").stat().st_mtime_ns > before
    assert is_model(load_model("out"), 5)


def test_from_mltools_without_statistics(folder, capsys):
    assert convert(model=FOREIGN) == 0
    assert read_artifact(folder / "out")[0].normalization is None
    assert not (folder / "out" / "normalization.safetensors").exists()
    sentence = "This export holds no normalisation: it cannot encode scenes."
    assert sentence in capsys.readouterr().out
    assert sentence in (folder / "out" / "README.md").read_text()
    assert is_model(load_model("out"), 5)


def test_statistics_can_be_added_to_an_export_later(folder, capsys):
    assert convert(model=FOREIGN) == 0
    assert convert(source="out", output_dir="again", normalization=SPECTRA) == 0
    found = read_artifact(folder / "again")[0]
    assert is_model(found.model, 5)
    np.testing.assert_array_equal(found.normalization.std, STD.numpy())


def test_zscore_and_a_list_of_wavelengths(folder):
    wavelength = [400.0, 410, 425, 430, 500, 600.5]
    assert convert(model=FOREIGN, normalization={**SPECTRA, "transform": "zscore", "wavelength": wavelength}) == 0
    normalization = read_artifact(folder / "out")[0].normalization
    assert (normalization.transform, normalization.min_radiance) == ("zscore", None)
    assert normalization.wavelength.tolist() == wavelength


def test_heads_are_named(folder, capsys):
    heads = {"l2_head.0.weight": torch.zeros(2), "vae.no2_probe[x].bias": torch.zeros(1)}
    torch.save({**tiny_model(5).state_dict(), **heads}, "heads.pt")
    code = convert(source="heads.pt", model=FOREIGN)
    assert code == 2  # not a head, but for its first letters
    del heads["vae.no2_probe[x].bias"]
    torch.save({**tiny_model(5).state_dict(), **heads, "vae.no2_probe.[x].bias": torch.zeros(1)}, "heads.pt")
    capsys.readouterr()
    assert convert(source="heads.pt", model=FOREIGN) == 0
    assert "left out, not part of the network: l2_head.0.weight, vae.no2_probe.[x].bias" in capsys.readouterr().out
    assert is_model(load_model("out"), 5)


def test_paths_that_look_like_markup(folder, capsys):
    assert convert(output_dir="a[red]b[/x]", model=FOREIGN) == 0
    assert "a[red]b[/x]: export folder; load it with spectralvae.load_model('a[red]b[/x]')" in capsys.readouterr().out
    assert convert(output_dir="c[red]d[/x]", model=FOREIGN, format="mltools") == 0
    assert "c[red]d[/x]/model.pt: " in capsys.readouterr().out


# -- to mltools --------------------------------------------------------------------------------------------------


def loaded(path):
    return torch.load(path, weights_only=True)


def test_to_mltools_and_back_is_bit_equal(folder, capsys):
    assert convert(model=FOREIGN, normalization=SPECTRA) == 0
    assert convert(source="out", output_dir="foreign", format="mltools") == 0
    assert equal_weights(loaded("foreign/model.pt"), tiny_model(5).state_dict())
    for name, values in (("mean", MEAN), ("std", STD)):
        found = loaded(f"foreign/{name}_spectrum.pt")
        assert found.dtype == torch.float32  # float64 would promote mltools' tiles, which its weights refuse
        assert torch.equal(found.double(), values)
    spectra = {"mean": "foreign/mean_spectrum.pt", "std": "foreign/std_spectrum.pt"}
    assert convert(source="foreign/model.pt", output_dir="back", model=FOREIGN, normalization=spectra) == 0
    for name in ("model.safetensors", "normalization.safetensors"):
        assert (folder / "back" / name).read_bytes() == (folder / "out" / name).read_bytes()


def test_spectra_are_whole_or_not_there(folder, monkeypatch, capsys):
    write_tiny(folder / "export")

    def fail(values, file):
        with Path(file).open("wb") if isinstance(file, (str, Path)) else file as opened:
            opened.write(b"half a spectrum")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", fail)
    assert convert(source="export", format="mltools") == 1
    assert "No space left" in capsys.readouterr().err
    assert not list((folder / "out").glob("*spectrum*"))


def test_to_mltools_without_statistics(folder, capsys):
    assert convert(model=FOREIGN, format="mltools") == 0
    assert "out/model.pt: " in capsys.readouterr().out
    assert sorted(path.name for path in (folder / "out").glob("[!.]*")) == ["config.yaml", "model.pt", "run.json"]


def test_channels_without_samples_are_pointed_out(folder, capsys):
    empty = tiny_normalization(mean=np.array([1, np.nan, 2, 3, np.nan, 4]), std=np.array([1, np.nan, 2, 3, np.nan, 4]))
    write_tiny(folder / "export", normalization=empty)
    assert convert(source="export", format="mltools") == 0
    assert "WARNING: channels [1, 4] had no valid sample" in capsys.readouterr().out


# -- from ours ---------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(folder):
    write_tiny(folder / "run" / "checkpoints" / "step=000005", seed=1, step=5)
    write_tiny(folder / "run" / "checkpoints" / "step=000010", seed=2, step=10)
    return folder / "run"


@pytest.mark.parametrize(
    ("source", "seed", "step"), [("run", 2, 10), ("run/checkpoints/step=000005", 1, 5)], ids=["run", "checkpoint"]
)
def test_from_ours(folder, trained, source, seed, step):
    assert convert(source=source) == 0
    found = read_artifact(folder / "out")[0]
    assert is_model(found.model, seed)
    assert (found.step, found.settings) == (step, SETTINGS)
    ours = tiny_normalization()
    assert found.normalization.settings() == ours.settings()
    for name, values in ours.arrays().items():
        np.testing.assert_array_equal(found.normalization.arrays()[name], values)
    card = (folder / "out" / "README.md").read_text()
    assert f"from step={step:06d}, step {step}" in card
    for words in ("clipped to ±9.5", "300.00-301.67 nm", "TEMPO band: band_290_490_nm", "radiance below 1.5"):
        assert words in sections(card)["Normalisation"]

    assert convert(source=source, output_dir="foreign", format="mltools") == 0
    assert equal_weights(loaded("foreign/model.pt"), tiny_model(seed).state_dict())
    np.testing.assert_array_equal(loaded("foreign/mean_spectrum.pt").numpy(), ours.mean.astype(np.float32))
    np.testing.assert_array_equal(loaded("foreign/std_spectrum.pt").numpy(), ours.std.astype(np.float32))


def test_an_export_needs_nothing_of_the_run(folder, trained):
    assert convert(source="run") == 0
    shutil.rmtree(trained)
    assert is_model(load_model("out"), 2)


# -- what is known of the weights ---------------------------------------------------------------------------------


def write_checkpoint(folder, step, **known):
    return write_tiny(folder / "run" / "checkpoints" / f"step={step:06d}", seed=step, step=step, **known)


KNOWN = {"latents": tiny_latents(), "provenance": tiny_provenance()}
UNVALIDATED = {"provenance": tiny_provenance(metrics=None)}


def test_what_a_checkpoint_knows_its_export_knows(folder, capsys):
    """And the export of the export; nothing is lost on the way."""
    write_checkpoint(folder, 10, **KNOWN)
    assert convert(source="run") == 0
    assert convert(source="out", output_dir="again") == 0
    assert "WARNING" not in capsys.readouterr().out
    for name in ("out", "again"):
        found = read_artifact(folder / name)[0]
        assert found.provenance == tiny_provenance()
        for key in ("mean", "std"):
            np.testing.assert_array_equal(getattr(found.latents, key), getattr(tiny_latents(), key))
        assert weights_sha256(found.model) == weights_sha256(tiny_model(10))
    cards = [(folder / name / "README.md").read_text() for name in ("out", "again")]
    assert cards[1] == cards[0].replace("from step=000010", "from out")


def test_card_for_model_hubs(folder, capsys):
    """Markdown with a header in YAML; every number in it against what was written to the checkpoint."""
    write_checkpoint(folder, 10, **KNOWN)
    assert convert(source="run") == 0
    card = (folder / "out" / "README.md").read_text()
    assert card.startswith("---\n")
    header, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(header) == {
        "library_name": "spectralvae",
        "tags": ["hyperspectral", "variational-autoencoder", "tempo"],
    }
    digest = hashlib.sha256((folder / "out" / "model.safetensors").read_bytes()).hexdigest()
    for words in (digest, spectralvae.__version__, "step 10", "tile of 8 x 8 pixels has latents of shape (3, 4, 4)"):
        assert words in body
    found = sections(card)
    for words in ("`small_store`, hash `abc123`", "3 scenes from 2 files, 2024-06-01", "to 2024-06-03", "version V03"):
        assert words in found["Training data"]
    for words in ("validation: 1 scene from 1 file", "10 steps of 4 tiles of 8 x 8", "seed 7", "l1 of z", "random"):
        assert words in found["Training data"]
    table = dict(re.findall(r"^\| (.*) \| ([\d.]+) \|$", found["Validation"], flags=re.MULTILINE))
    assert [float(value) for value in table.values()] == [0.0123, 1.01, 0.5, 0.25]
    assert list(table)[1:] == ["predicting the mean", "PCA, 1 component", "PCA, 2 components"]
    assert "On 5 tiles" in found["Validation"]
    latents = re.findall(r"^\| (\d+) \| (\S+) \| (\S+) \|$", found["Latents and how to scale them"], flags=re.MULTILINE)
    np.testing.assert_allclose([float(mean) for _, mean, _ in latents], tiny_latents().mean, rtol=1e-3)
    np.testing.assert_allclose([float(std) for _, _, std in latents], tiny_latents().std, rtol=1e-3)
    assert found["Licence"].startswith("Not stated yet")


def test_code_of_the_card_works(folder, capsys):
    """Each piece as it stands there, on this export and a scene; scaled latents are what they are said to be."""
    write_checkpoint(folder, 10, **KNOWN)
    assert convert(source="run") == 0
    pieces = re.findall(r"```python\n(.*?)```", (folder / "out" / "README.md").read_text(), flags=re.DOTALL)
    assert len(pieces) == 2
    radiance = np.random.default_rng(0).uniform(2, 9, size=(8, 12, N_CHANNELS)).astype(np.float32)
    scene = xr.Dataset(
        {"radiance": (("y", "x", "channel"), radiance)},
        coords={"wavelength": ("channel", tiny_normalization().wavelength)},
    )
    names = {}
    for piece in pieces:
        piece = piece.replace("path/to/this/folder", "out").replace('open_scene("scene.nc")', "opened")
        exec(piece, names | {"opened": scene}, names)
    assert names["scene"].radiance.shape == radiance.shape
    latents = names["latents"].latent.values
    assert latents.shape == (3, 4, 6)
    for k in range(3):
        np.testing.assert_allclose(names["scaled"][k], (latents[k] - k / 3) / (1 + k / 3), rtol=1e-6)


@pytest.mark.parametrize(
    ("began", "words"),
    [(None, "weights: random"), ("unknown", "of another model, which is unknown"), ("beef", "SHA-256 `beef`")],
)
def test_card_tells_of_initial_weights(folder, began, words):
    write_checkpoint(folder, 10, latents=tiny_latents(), provenance=tiny_provenance(initial_weights=began))
    assert convert(source="run") == 0
    assert words in sections((folder / "out" / "README.md").read_text())["Training data"]


@pytest.mark.parametrize(
    ("began", "ancestors", "words"),
    [
        ("beef", ["x", "y"], "- 1 of the 2 scenes kept apart for validation were trained on by the initial weights"),
        ("beef", None, "- whether the initial weights were trained on scenes kept apart for validation is unknown"),
        ("beef", ["y"], None),
        (None, [], None),
        (None, None, None),  # of an earlier version
    ],
)
def test_card_tells_of_validation_scenes_among_the_ancestors(folder, began, ancestors, words):
    validation = Scenes(2, 2, None, None, [], ["x", "z"])
    known = tiny_provenance(initial_weights=began, ancestors=ancestors, validation=validation)
    write_checkpoint(folder, 10, latents=tiny_latents(), provenance=known)
    assert convert(source="run") == 0
    told = sections((folder / "out" / "README.md").read_text())["Training data"]
    found = [line for line in told.splitlines() if "initial weights were" in line or "by the initial weights" in line]
    assert found == ([words] if words else [])


def test_checkpoint_without_validation_is_warned_of(folder, capsys):
    """Naming the newest good one before it that has it; 15 is damaged, 12 was not validated either."""
    write_checkpoint(folder, 5, **KNOWN)
    write_checkpoint(folder, 10, **KNOWN)
    write_checkpoint(folder, 12, **UNVALIDATED)
    flip(write_checkpoint(folder, 15, **KNOWN) / "config.json", 0.5)
    write_checkpoint(folder, 17, **UNVALIDATED)
    assert convert(source="run") == 0
    shown = capsys.readouterr().out
    assert re.search(r"WARNING: run/checkpoints/step=000017 holds neither .*: it was saved at a signal", shown)
    assert f"convert {folder}/run/checkpoints/step=000010, which was validated, or let its run go on" in shown
    card = sections((folder / "out" / "README.md").read_text())
    assert "step 17 was saved without it" in card["Validation"]
    assert card["Latents and how to scale them"].startswith("Unknown")
    assert "small_store" in card["Training data"]
    found = read_artifact(folder / "out")[0]
    assert (found.latents, found.provenance) == (None, UNVALIDATED["provenance"])
    assert convert(source="run/checkpoints/step=000005", output_dir="older") == 0
    assert "WARNING" not in capsys.readouterr().out


def test_other_reasons_for_no_validation(folder, capsys):
    nothing_kept = tiny_provenance(metrics=None, baselines=None, n_val_tiles=0)
    write_checkpoint(folder, 5, provenance=nothing_kept)
    assert convert(source="run") == 0
    assert "its store keeps no scene for validation; prepare one with split.val_fraction" in capsys.readouterr().out
    assert "the store keeps no scene for it" in sections((folder / "out" / "README.md").read_text())["Validation"]
    write_checkpoint(folder, 10)
    assert convert(source="run", output_dir="old") == 0
    shown = capsys.readouterr().out
    assert "it was written by an older version; let its run go on to its next checkpoint" in shown
    assert "training.n_steps" in shown
    assert convert(source="old", output_dir="again") == 0  # there is no run that could go on
    assert "WARNING" not in capsys.readouterr().out


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mean", "std"])
def test_spectra_of_other_channels(folder, capsys, name):
    torch.save(torch.ones(7), "other.pt")
    words = f"normalization.{name}: other.pt has 7 channels, but the weights take 6"
    refused(capsys, folder, words, model=FOREIGN, normalization={**SPECTRA, name: "other.pt"})


@pytest.mark.parametrize("value", [0.0, -0.5])
def test_std_that_is_not_positive(folder, capsys, value):
    std = STD.clone()
    std[3] = value
    torch.save(std, "std_spectrum.pt")
    words = f"normalization.std: std_spectrum.pt holds {value} at channel 3: not > 0"
    refused(capsys, folder, words, model=FOREIGN, normalization=SPECTRA)


def test_spectra_that_are_none(folder, capsys):
    refused(
        capsys,
        folder,
        "none.pt: does not exist",
        model=FOREIGN,
        normalization={"mean": "mean_spectrum.pt", "std": "none.pt"},
    )
    refused(capsys, folder, "normalization.std: this key is required", model=FOREIGN, normalization={"mean": "a.pt"})
    std = STD.clone()
    std[2] = torch.nan
    torch.save(std, "std_spectrum.pt")
    refused(capsys, folder, "std_spectrum.pt", "not finite", model=FOREIGN, normalization=SPECTRA)
    flip(folder / "mean_spectrum.pt", 0.5)
    refused(capsys, folder, "mean_spectrum.pt", "damaged", model=FOREIGN, normalization=SPECTRA)


@pytest.mark.parametrize(
    ("wavelength", "words"),
    [
        ([300.0, 301.0], "has 2 values for 6 channels"),
        ([705.0, 704, 703, 702, 701, 700], "must increase from channel to channel"),
        ({"first": 740, "last": 540}, "must increase from channel to channel"),
        ([0.54, 0.55, 0.56, 0.57, 0.58, 0.59], "micrometres"),
        ([-1.0, 550, 560, 570, 580, 590], "1 of 6 values aren't above 0"),
        ([540, 550, 560, 570, 580, float("nan")], "must be a finite number"),
    ],
)
def test_wavelengths_that_are_none(folder, capsys, wavelength, words):
    normalization = {**SPECTRA, "wavelength": wavelength}
    refused(capsys, folder, "normalization.wavelength", words, model=FOREIGN, normalization=normalization)


def test_settings_of_foreign_weights(folder, capsys):
    refused(capsys, folder, "model.ckpt", "give also model: {n_attention_heads, norm_groups")
    refused(capsys, folder, "model.ckpt", "model.act = 'tanh'", model={**FOREIGN, "act": "tanh"})
    refused(capsys, folder, "model.ckpt", "model.chs is [8, 8]", model={**FOREIGN, "chs": [8, 8]})


@pytest.mark.parametrize("source", ["run", "run/checkpoints/step=000005"])
def test_what_a_source_of_ours_has_of_its_own(folder, trained, capsys, source):
    refused(capsys, folder, source, "holds its own model settings", source=source, model=FOREIGN)
    refused(capsys, folder, source, "normalization", "holds its own", source=source, normalization=SPECTRA)


@pytest.mark.parametrize("format", ["export", "mltools"])
def test_damaged_and_missing_sources(folder, trained, capsys, format):
    flip(trained / "checkpoints" / "step=000010" / "normalization.safetensors", 0.8)
    weight = tiny_model(5).quant_conv.weight.detach().numpy().tobytes()
    words = ("step=000010/normalization.safetensors", "is damaged", "the newest good one before it is", "step=000005")
    refused(capsys, folder, *words, source="run", format=format)
    flip(folder / "model.ckpt", (folder / "model.ckpt").read_bytes().index(weight))
    refused(capsys, folder, "model.ckpt", "is damaged", model=FOREIGN, format=format)
    refused(capsys, folder, "none.pt: no such file or folder", source="none.pt", model=FOREIGN, format=format)
    refused(capsys, folder, "neither a checkpoint nor an export folder", source=str(folder), format=format)


def test_overwrite_never_clears_the_source(folder, capsys):
    assert convert(model=FOREIGN, format="mltools") == 0
    for source, options in (("out/model.pt", {"model": FOREIGN}), ("out", {})):
        assert convert("--overwrite", source=source, **options) == 2
        assert f"source: {source} lies in output_dir" in capsys.readouterr().err
    torch.save(MEAN, "out/mean.pt")
    spectra = {**SPECTRA, "mean": "out/mean.pt"}
    assert convert("--overwrite", model=FOREIGN, normalization=spectra, format="mltools") == 2
    assert "normalization.mean: out/mean.pt lies in output_dir" in capsys.readouterr().err
    assert equal_weights(loaded("out/model.pt"), tiny_model(5).state_dict())


def test_a_failed_write_is_no_export(folder, monkeypatch, capsys):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spectralvae.weights.artifact.write_atomic", fail)
    assert convert(model=FOREIGN) == 1
    assert "No space left" in capsys.readouterr().err
    assert json.loads((folder / "out" / "run.json").read_text())["state"] == "failed"
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert convert(model=FOREIGN) == 2
    assert convert("--overwrite", model=FOREIGN) == 0
    assert is_model(load_model("out"), 5)
