"""`spectralvae convert`: foreign models in, ours out, and nothing half-written where it cannot be done."""

import errno
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
from refusals import refused
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
from spectralvae.errors import DamagedError
from spectralvae.weights.artifact import read_artifact, verify, weights_sha256
from spectralvae.weights.provenance import Scenes

FOREIGN = {key: value for key, value in SETTINGS.items() if key not in ("shape", "logvar_init")}
MEAN = torch.linspace(1, 3, N_CHANNELS, dtype=torch.float64).div(3).float().double()
STD = torch.linspace(0.1, 2, N_CHANNELS, dtype=torch.float64).div(7).float().double()
SPECTRA = {"mean": "mean_spectrum.pt", "std": "std_spectrum.pt"}
KNOWN = {"latents": tiny_latents(), "provenance": tiny_provenance()}
UNVALIDATED = {"provenance": tiny_provenance(metrics=None)}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """What someone has who trained with mltools; paths in the configs are relative to it."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {f"vae.{key}": value for key, value in tiny_model(5).state_dict().items()}}, "model.ckpt")
    torch.save(MEAN, "mean_spectrum.pt")
    torch.save(STD, "std_spectrum.pt")
    return tmp_path


def convert(*options, **config):
    """Run the command; the exit code."""
    Path("config.yaml").write_text(yaml.safe_dump({"output_dir": "out", "source": "model.ckpt", **config}))
    return run(["convert", "config.yaml", *options])


def is_model(model, seed):
    return equal_weights(model.state_dict(), tiny_model(seed).state_dict())


def loaded(path):
    return torch.load(path, weights_only=True)


def card_of(folder):
    return (Path(folder) / "README.md").read_text()


def write_checkpoint(folder, step, **known):
    return write_tiny(folder / "run" / "checkpoints" / f"step={step:06d}", seed=step, step=step, **known)


@pytest.fixture
def refuses(folder, capsys):
    """A function: refused with one line on stderr that holds the words, and without an output directory."""

    def check(*words, **config):
        assert convert(**config) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        assert all(word in text for word in words), text
        assert not Path("out").exists()

    return check


# -- mltools -> export -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_from_mltools_with_its_statistics_and_back(folder, capsys, dtype):
    mean, std = MEAN.to(dtype), STD.to(dtype).reshape(1, -1, 1, 1)
    torch.save(mean, "mean_spectrum.pt")
    torch.save(std, "std_spectrum.pt")
    extra = {"clip": 8.0, "min_radiance": 0.5, "band": "band_540_740_nm", "wavelength": {"first": 540, "last": 740}}
    assert convert(model=FOREIGN, normalization={**SPECTRA, **extra}) == 0
    assert "WARNING" not in capsys.readouterr().out
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
    assert (found.step, found.latents, found.provenance) == (None, None, None)
    card, n_weights = card_of("out"), sum(parameter.numel() for parameter in tiny_model().parameters())
    assert all(word in card for word in (f"{n_weights:,}", "540.00-740.00 nm", "model.ckpt", "band_540_740_nm"))
    assert not re.search(r"\| \d|\d x \d", card)  # what nobody measured, and the training tile's size
    assert json.loads((folder / "out" / "run.json").read_text())["state"] == "finished"
    assert (folder / "out" / "config.yaml").is_file()

    assert convert(source="out", output_dir="foreign", format="mltools") == 0
    assert equal_weights(loaded("foreign/model.pt"), tiny_model(5).state_dict())
    for name, values in (("mean", MEAN), ("std", STD)):
        found = loaded(f"foreign/{name}_spectrum.pt")
        assert found.dtype == torch.float32  # float64 would promote mltools' tiles, which its weights refuse
        assert torch.equal(found.double(), values)
    extra |= {"mean": "foreign/mean_spectrum.pt", "std": "foreign/std_spectrum.pt"}
    assert convert(source="foreign/model.pt", output_dir="back", model=FOREIGN, normalization=extra) == 0
    for name in ("model.safetensors", "normalization.safetensors"):
        assert (folder / "back" / name).read_bytes() == (folder / "out" / name).read_bytes()


def test_without_statistics_and_not_repeated(folder, capsys):
    assert convert(model=FOREIGN) == 0
    assert "WARNING" in capsys.readouterr().out
    assert read_artifact(folder / "out")[0].normalization is None
    assert not (folder / "out" / "normalization.safetensors").exists()
    before = (folder / "out" / "manifest.json").stat().st_mtime_ns
    assert convert(model=FOREIGN) == 0
    assert (folder / "out" / "manifest.json").stat().st_mtime_ns == before
    assert convert("--overwrite", model=FOREIGN) == 0
    assert (folder / "out" / "manifest.json").stat().st_mtime_ns > before
    assert convert(source="out", output_dir="plain", normalization=SPECTRA) == 0
    assert read_artifact(folder / "plain")[0].normalization.wavelength is None
    wavelength = [400.0, 410, 425, 430, 500, 600.5]
    later = {**SPECTRA, "transform": "zscore", "wavelength": wavelength}
    assert convert(source="out", output_dir="again", normalization=later) == 0
    found = read_artifact(folder / "again")[0]
    assert is_model(found.model, 5)
    np.testing.assert_array_equal(found.normalization.std, STD.numpy())
    assert (found.normalization.transform, found.normalization.min_radiance) == ("zscore", None)
    assert found.normalization.wavelength.tolist() == wavelength


def test_heads_and_paths_are_named_even_if_they_look_like_markup(capsys):
    heads = {"l2_head.0.weight": torch.zeros(2), "vae.no2_probe.[x].bias": torch.zeros(1)}
    torch.save({**tiny_model(5).state_dict(), **heads}, "heads.pt")
    assert convert(source="heads.pt", output_dir="a[red]b[/x]", model=FOREIGN) == 0
    assert is_model(load_model("a[red]b[/x]"), 5)
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*heads, "a[red]b[/x]"))
    assert convert(output_dir="c[red]d[/x]", model=FOREIGN, format="mltools") == 0
    assert "c[red]d[/x]/model.pt" in capsys.readouterr().out
    names = [path.name for path in Path("c[red]d[/x]").iterdir() if not path.name.startswith(".")]
    assert sorted(names) == ["config.yaml", "model.pt", "run.json"]


# -- to mltools --------------------------------------------------------------------------------------------------


def test_files_of_mltools_are_whole_or_not_there(folder, monkeypatch):
    """The first is a spectrum from an export, the weights from a source without statistics."""
    write_tiny(folder / "export")

    def fail(values, file):
        with Path(file).open("wb") if isinstance(file, (str, Path)) else file as opened:
            opened.write(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.save", fail)
    for source in ({"source": "export"}, {"model": FOREIGN, "output_dir": "weights"}):
        assert convert(format="mltools", **source) == 1
    assert not [*folder.glob("out/*.pt"), *folder.glob("weights/*.pt")]


def test_channels_without_samples_are_pointed_out(folder, capsys):
    gaps = np.array([1, np.nan, 2, 3, np.nan, 4])
    write_tiny(folder / "export", normalization=tiny_normalization(mean=gaps, std=gaps))
    assert convert(source="export", format="mltools") == 0
    assert re.search(r"WARNING.* \[1, 4\] ", capsys.readouterr().out)


# -- from ours ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "step"), [("run", 10), ("run/checkpoints/step=000005", 5)], ids=["run", "checkpoint"]
)
def test_what_a_checkpoint_knows_its_export_knows(folder, capsys, source, step):
    """And the export of the export: nothing is lost on the way, and nothing needed of the run."""
    for known in (5, 10):
        write_checkpoint(folder, known, **KNOWN)
    assert convert(source=source) == 0
    shutil.rmtree(folder / "run")
    assert convert(source="out", output_dir="again") == 0
    assert "WARNING" not in capsys.readouterr().out
    for name in ("out", "again"):
        assert is_model(load_model(name), step)
        found = read_artifact(folder / name)[0]
        assert (found.step, found.settings, found.provenance) == (step, SETTINGS, tiny_provenance())
        assert found.normalization.sha256() == tiny_normalization().sha256()
        for key in ("mean", "std"):
            np.testing.assert_array_equal(getattr(found.latents, key), getattr(tiny_latents(), key))
        assert weights_sha256(found.model) == weights_sha256(tiny_model(step))
    assert card_of("again") == card_of("out").replace(f"from step={step:06d}", "from out")


def test_card_for_model_hubs(folder):
    """Markdown with a header in YAML; every number against what was written to the checkpoint; its code runs."""
    write_checkpoint(folder, 10, **KNOWN)
    assert convert(source="run") == 0
    _, header, card = card_of("out").split("---\n", 2)
    tags = ["hyperspectral", "variational-autoencoder", "tempo"]
    assert yaml.safe_load(header) == {"library_name": "spectralvae", "tags": tags}
    digest = hashlib.sha256((folder / "out" / "model.safetensors").read_bytes()).hexdigest()
    for word in (digest, spectralvae.__version__, "step=000010", "step 10", "8 x 8", "(3, 4, 4)", "seed 7", "l1"):
        assert word in card
    for word in ("±9.5", "300.00-301.67 nm", "band_290_490_nm", "1.5", "`small_store`", "`abc123`", "V03"):
        assert word in card
    for word in ("3 scenes", "2 files", "2024-06-01", "2024-06-03", "1 scene", "1 file", "4 tiles", "5 tiles"):
        assert word in card
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line[:1] == "|"]
    numbers = [[float(cell) for cell in row[-2:] if re.fullmatch(r"[\d.]+", cell)] for row in rows]
    errors, latents = ([row for row in numbers if len(row) == n] for n in (1, 2))
    assert errors == [[0.0123], [1.01], [0.5], [0.25]]
    np.testing.assert_allclose(latents, np.stack([tiny_latents().mean, tiny_latents().std], axis=1), rtol=1e-3)

    pieces = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
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
    ("began", "ancestors", "initial", "ancestry"),
    [
        (None, [], "random", None),
        (None, None, "random", None),  # of an earlier version
        ("unknown", None, "unknown", "unknown"),
        ("beef", None, "`beef`", "unknown"),
        ("beef", ["y"], "`beef`", None),
        ("beef", ["x", "y"], "`beef`", "1 of the 2 "),
    ],
)
def test_card_tells_of_initial_weights_and_what_they_were_trained_on(folder, began, ancestors, initial, ancestry):
    validation = Scenes(2, 2, None, None, [], ["x", "z"])
    known = tiny_provenance(initial_weights=began, ancestors=ancestors, validation=validation)
    write_checkpoint(folder, 10, latents=tiny_latents(), provenance=known)
    assert convert(source="run") == 0
    lines = [line for line in card_of("out").splitlines() if "initial weights" in line]
    assert len(lines) == 1 + (ancestry is not None)
    assert initial in lines[0]
    assert ancestry is None or ancestry in lines[1]


def test_checkpoint_without_validation_is_warned_of(folder, capsys):
    """Naming the newest good one before it that has it; 15 is corrupt, 12 was not validated either."""
    for step, known in ((5, KNOWN), (10, KNOWN), (12, UNVALIDATED), (15, KNOWN), (17, UNVALIDATED)):
        write_checkpoint(folder, step, **known)
    flip(folder / "run" / "checkpoints" / "step=000015" / "config.json", 0.5)
    assert convert(source="run") == 0
    shown = capsys.readouterr().out
    assert "WARNING" in shown
    assert re.findall(r"step=0000\d\d", shown) == ["step=000017", "step=000010"]
    assert "step 17" in card_of("out")
    found = read_artifact(folder / "out")[0]
    assert (found.latents, found.provenance) == (None, UNVALIDATED["provenance"])
    assert convert(source="run/checkpoints/step=000005", output_dir="older") == 0
    assert "WARNING" not in capsys.readouterr().out

    write_checkpoint(folder, 18, provenance=tiny_provenance(metrics=None, baselines=None, n_val_tiles=0))
    assert convert(source="run", output_dir="none kept") == 0
    assert "split.val_fraction" in capsys.readouterr().out
    assert not re.search(r"\| \d", card_of("none kept"))
    write_checkpoint(folder, 20)
    assert convert(source="run", output_dir="old") == 0
    shown = capsys.readouterr().out
    assert "training.n_steps" in shown and "split.val_fraction" not in shown
    assert convert(source="old", output_dir="again") == 0  # there is no run to resume
    assert "WARNING" not in capsys.readouterr().out


# -- refusals ----------------------------------------------------------------------------------------------------


def test_spectra_that_do_not_fit(refuses):
    torch.save(torch.ones(7), "other.pt")
    torch.save(torch.full((6,), torch.nan), "nan.pt")
    shutil.copy("mean_spectrum.pt", "flipped.pt")
    flip(Path("flipped.pt"), 0.5)
    for name in ("mean", "std"):
        for file, *words in (("other.pt", f"normalization.{name}", "7", "6"), ("nan.pt",), ("flipped.pt",), ("no.pt",)):
            refuses(f"{file}: ", *words, model=FOREIGN, normalization={**SPECTRA, name: file})
    for given, *words in (([300.0, 301.0], "2", "6"), ({"first": 740, "last": 540}, "increase")):
        refuses("normalization.wavelength: ", *words, model=FOREIGN, normalization={**SPECTRA, "wavelength": given})
    for value in (0.0, -0.5):
        std = STD.clone()
        std[3] = value
        torch.save(std, "std_spectrum.pt")
        words = f"std_spectrum.pt: normalization.std = {value}: ", "channel 3"
        refuses(*words, model=FOREIGN, normalization=SPECTRA)
    refuses("normalization.std", model=FOREIGN, normalization={"mean": "mean_spectrum.pt"})


def test_settings_that_do_not_fit(folder, refuses):
    refuses("model.ckpt: model: ", "n_attention_heads", "norm_groups")
    refuses("model.ckpt: model.chs = [8, 8]: ", "[8, 4]", model={**FOREIGN, "chs": [8, 8]})
    for source in ("run", str(write_checkpoint(folder, 5))):
        refuses(f"{source}: model: ", source=source, model=FOREIGN)
        refuses(f"{source}: normalization: ", source=source, normalization=SPECTRA)


def test_corrupt_and_missing_sources(folder, refuses):
    write_checkpoint(folder, 5)
    flip(write_checkpoint(folder, 10) / "normalization.safetensors", 0.8)
    weight = tiny_model(5).quant_conv.weight.detach().numpy().tobytes()
    flip(folder / "model.ckpt", (folder / "model.ckpt").read_bytes().index(weight))
    for format in ("export", "mltools"):
        refuses("step=000010/normalization.safetensors: ", "step=000005", source="run", format=format)
        refuses("model.ckpt: ", model=FOREIGN, format=format)
    refuses("none.pt: ", source="none.pt", model=FOREIGN)
    refuses(f"{folder}: ", source=str(folder))


def test_overwrite_never_clears_the_source(capsys):
    assert convert(model=FOREIGN, format="mltools") == 0
    torch.save(MEAN, "out/mean.pt")
    for key, file, config in (
        ("source", "out/model.pt", {"source": "out/model.pt", "model": FOREIGN}),
        ("source", "out", {"source": "out"}),
        ("normalization.mean", "out/mean.pt", {"model": FOREIGN, "normalization": {**SPECTRA, "mean": "out/mean.pt"}}),
        ("normalization.std", "out/mean.pt", {"model": FOREIGN, "normalization": {**SPECTRA, "std": "out/mean.pt"}}),
    ):
        assert convert("--overwrite", **config) == 2
        text = capsys.readouterr().err
        assert key in text and file in text
    assert equal_weights(loaded("out/model.pt"), tiny_model(5).state_dict())


def test_a_failed_write_is_no_export(folder, monkeypatch, capsys):
    replace = Path.replace

    def fail(source, target):
        if target.name == "manifest.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        assert convert(model=FOREIGN) == 1
    assert "manifest.json" in capsys.readouterr().err
    assert json.loads((folder / "out" / "run.json").read_text())["state"] == "failed"
    with refused(DamagedError, path=folder / "out/manifest.json"):  # written last
        verify(folder / "out")
    assert (folder / "out" / "model.safetensors").exists()
    assert convert(model=FOREIGN) == 2
    assert convert("--overwrite", model=FOREIGN) == 0
    assert is_model(load_model("out"), 5)
