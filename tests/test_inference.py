"""Models from runs, checkpoints, exports and foreign files; nothing damaged, and nothing in its place."""

import os

import pytest
import torch
from tiny import SETTINGS, equal_weights, flip, tiny_model, write_tiny

import spectralvae
from spectralvae.errors import ConfigError, InputError
from spectralvae.weights.loading import load_artifact, load_model

FOREIGN = {
    key: SETTINGS[key]
    for key in ("n_attention_heads", "norm_groups", "norm_eps", "act", "conv_padding_mode", "embed_dim")
}


@pytest.fixture
def run(tmp_path):
    """A run whose newest checkpoint by number is the last neither by name nor by time."""
    run = tmp_path / "run"
    for seed, step in enumerate((999999, 1000000, 100000)):
        folder = write_tiny(run / "checkpoints" / f"step={step:06d}", seed=seed, step=step)
        os.utime(folder, (1e9 + seed, 1e9 + seed))
    (run / "run.json").write_text("{}")
    (run / "config.yaml").write_text("{}")
    os.utime(run / "checkpoints" / "step=1000000", (1, 1))
    return run


@pytest.fixture
def foreign(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({f"vae.{key}": value for key, value in tiny_model(5).state_dict().items()}, path)
    return path


def is_model(model, seed):
    return equal_weights(model.state_dict(), tiny_model(seed).state_dict())


def refused(path, *words, error=InputError, model=None):
    with pytest.raises(error) as found:
        load_model(path, model)
    for word in words:
        assert str(word) in str(found.value)
    assert "\n" not in str(found.value)
    return str(found.value)


# -- what is loaded ----------------------------------------------------------------------------------------------


def test_a_run_gives_its_newest_checkpoint_by_number(run):
    assert is_model(load_model(run), 1)
    found = load_artifact(run)
    assert (found.step, found.path) == (1000000, run / "checkpoints" / "step=1000000")


def test_one_checkpoint(run):
    assert is_model(load_model(run / "checkpoints" / "step=100000"), 2)
    assert is_model(load_model(str(run / "checkpoints" / "step=999999") + "/"), 0)


def test_export_folder_and_the_lazy_name(tmp_path):
    folder = write_tiny(tmp_path / "export", seed=4)
    assert is_model(spectralvae.load_model(folder), 4)
    assert load_artifact(folder).normalization.min_radiance == 1.5


def test_foreign_file(foreign):
    assert is_model(load_model(foreign, FOREIGN), 5)
    found = load_artifact(foreign, FOREIGN)
    assert (found.normalization, found.step, found.path) == (None, None, foreign)


@pytest.mark.parametrize("kind", ["run", "foreign"])
def test_in_eval_mode_on_the_cpu_in_float32(run, foreign, kind):
    torch.set_default_dtype(torch.float64)
    try:
        model = load_model(run) if kind == "run" else load_model(foreign, FOREIGN)
    finally:
        torch.set_default_dtype(torch.float32)
    assert not any(module.training for module in model.modules())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(parameter.device.type == "cpu" and parameter.requires_grad for parameter in model.parameters())
    assert is_model(model, 1 if kind == "run" else 5)
    x = torch.randn(1, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    reference = tiny_model(1 if kind == "run" else 5).eval()
    with torch.no_grad():
        assert torch.equal(model.encode(x).mean, reference.encode(x).mean)


def test_the_random_state_is_left_alone(run):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_model(run)
    assert torch.equal(torch.rand(4), expected)


def test_paths_with_a_tilde(run, foreign, monkeypatch):
    monkeypatch.setenv("HOME", str(run.parent))
    assert is_model(load_model("~/run"), 1)
    assert is_model(load_model("~/model.pt", FOREIGN), 5)


def test_heads_left_out_are_named_in_a_warning(tmp_path):
    path = tmp_path / "heads.pt"
    torch.save(
        {**tiny_model(5).state_dict(), "l2_head.0.weight": torch.zeros(2), "no2_probe.bias": torch.zeros(1)}, path
    )
    with pytest.warns(UserWarning, match=r"heads\.pt: left out.*: l2_head\.0\.weight, no2_probe\.bias") as caught:
        model = load_model(path, FOREIGN)
    assert [warning.filename for warning in caught] == [__file__]
    assert is_model(model, 5)


# -- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json", "normalization.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_newest_is_refused_and_the_older_good_one_named(run, name, damage):
    checkpoints = run / "checkpoints"
    newest, middle, oldest = (checkpoints / f"step={step}" for step in (1000000, 999999, 100000))
    flip(newest / name, 0.5) if damage == "flip" else (newest / name).unlink()
    for path in (run, newest):
        refused(path, newest / name, f"the newest good one before it is {middle}")
    flip(middle / name, 0.3)
    refused(run, newest / name, f"the newest good one before it is {oldest}")
    assert is_model(load_model(oldest), 2)  # to ask for it by name is no fallback
    flip(oldest / name, 0.3)
    refused(run, newest / name, "no older checkpoint is good")


def test_a_damaged_older_one_does_not_matter(run):
    flip(run / "checkpoints" / "step=999999" / "model.safetensors", 0.5)
    assert is_model(load_model(run), 1)
    text = refused(run / "checkpoints" / "step=999999", "step=999999", f"is {run / 'checkpoints' / 'step=100000'}")
    assert "step=1000000" not in text  # newer than what was asked for


def test_a_damaged_export_has_no_older_one(tmp_path):
    folder = write_tiny(tmp_path / "export")
    flip(folder / "model.safetensors", 0.7)
    assert "good" not in refused(folder, folder / "model.safetensors", "is damaged")


def test_relative_paths(run, monkeypatch):
    flip(run / "checkpoints" / "step=1000000" / "config.json", 0.5)
    monkeypatch.chdir(run / "checkpoints")
    refused("step=1000000", "step=1000000/config.json", f"is {run / 'checkpoints' / 'step=999999'}")
    monkeypatch.chdir(run / "checkpoints" / "step=1000000")
    refused(".", "config.json", f"is {run / 'checkpoints' / 'step=999999'}")


def test_missing_paths_and_folders_of_something_else(tmp_path):
    refused(tmp_path / "nothing", tmp_path / "nothing", "no such file or folder")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    refused(tmp_path / "run", tmp_path / "run", "neither a checkpoint nor an export folder")
    (tmp_path / "run" / "checkpoints" / ".step=000005.tmp").mkdir()
    refused(tmp_path / "run", "neither a checkpoint")


def test_settings_for_what_holds_its_own(run, tmp_path):
    for path in (run, run / "checkpoints" / "step=100000", write_tiny(tmp_path / "export")):
        refused(path, path, "holds its own model settings", error=ConfigError, model=SETTINGS)


def test_settings_missing_for_a_foreign_file(foreign):
    refused(foreign, foreign, "give also model: {n_attention_heads, norm_groups", error=ConfigError)


def test_one_file_of_an_artifact_is_no_model(tmp_path):
    path = write_tiny(tmp_path / "export") / "model.safetensors"
    refused(path, path, "not a file of torch.save", model=FOREIGN)
