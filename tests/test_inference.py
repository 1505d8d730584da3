"""Models from runs, checkpoints, exports and foreign files; nothing damaged, and nothing in its place."""

import os

import pytest
import torch
from refusals import refused
from tiny import SETTINGS, equal_weights, flip, tiny_model, write_tiny

import spectralvae
from spectralvae.errors import ConfigError, DamagedError, InputError
from spectralvae.weights.loading import artifact_of, load_artifact, load_model

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


def test_what_is_loaded(run, foreign, tmp_path, monkeypatch):
    """A run gives its newest checkpoint by number."""
    export = write_tiny(tmp_path / "export", seed=4)
    monkeypatch.setenv("HOME", str(tmp_path))
    checkpoints = run / "checkpoints"
    for path, seed in (
        (run, 1),
        ("~/run", 1),
        (checkpoints / "step=100000", 2),
        (f"{checkpoints}/step=999999/", 0),
        (export, 4),
    ):
        assert is_model(load_model(path), seed)
    for path in (foreign, "~/model.pt"):
        assert is_model(load_model(path, FOREIGN), 5)
    found = load_artifact(run)
    assert (found.step, found.path) == (1000000, checkpoints / "step=1000000")
    assert artifact_of(spectralvae.load_model(export)).normalization.min_radiance == 1.5
    found = load_artifact(foreign, FOREIGN)
    assert (found.normalization, found.step, found.path) == (None, None, foreign)


@pytest.mark.parametrize("kind", ["run", "foreign"])
def test_in_eval_mode_on_the_cpu_in_float32_and_the_random_state_left_alone(run, foreign, kind):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    torch.set_default_dtype(torch.float64)
    try:
        model = load_model(run) if kind == "run" else load_model(foreign, FOREIGN)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.rand(4), expected)
    assert not any(module.training for module in model.modules())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(parameter.device.type == "cpu" and parameter.requires_grad for parameter in model.parameters())
    x = torch.randn(1, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    reference = tiny_model(1 if kind == "run" else 5).eval()
    with torch.no_grad():
        assert torch.equal(model.encode(x).mean, reference.encode(x).mean)


def test_heads_left_out_are_named_in_a_warning(tmp_path):
    heads = {"l2_head.0.weight": torch.zeros(2), "no2_probe.bias": torch.zeros(1)}
    torch.save({**tiny_model(5).state_dict(), **heads}, tmp_path / "heads.pt")
    with pytest.warns(UserWarning, match="no2_probe") as caught:
        model = load_model(tmp_path / "heads.pt", FOREIGN)
    assert [warning.filename for warning in caught] == [__file__]
    assert all(name in str(caught[0].message) for name in heads)
    assert is_model(model, 5)


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_newest_is_refused_and_the_older_good_one_named(run, monkeypatch, name, damage):
    newest, middle, oldest = (run / "checkpoints" / f"step={step}" for step in (1000000, 999999, 100000))
    flip(newest / name, 0.5) if damage == "flip" else (newest / name).unlink()
    monkeypatch.chdir(newest.parent)
    for path in (run, newest, newest.name):
        with refused(DamagedError) as error:
            load_model(path)
        assert error.value.path.resolve() == newest / name
        assert error.value.remedy.split()[-1] == str(middle)
    flip(middle / name, 0.3)
    for path, damaged in ((run, newest), (middle, middle)):  # only what is older than the one asked for
        with refused(DamagedError, path=damaged / name) as error:
            load_model(path)
        assert error.value.remedy.split()[-1] == str(oldest)
    assert is_model(load_model(oldest), 2)  # to ask for it by name is no fallback
    flip(oldest / name, 0.3)
    with refused(DamagedError, path=newest / name) as error:
        load_model(run)
    assert "step=" not in error.value.remedy


def test_a_damaged_older_one_does_not_matter(run):
    flip(run / "checkpoints" / "step=999999" / "model.safetensors", 0.5)
    assert is_model(load_model(run), 1)


def test_a_damaged_export_has_no_older_one(tmp_path):
    folder = write_tiny(tmp_path / "export")
    flip(folder / "model.safetensors", 0.7)
    with refused(DamagedError, path=folder / "model.safetensors", remedy=None):
        load_model(folder)


def test_what_is_no_model(run, foreign, tmp_path):
    empty = tmp_path / "empty"
    (empty / "checkpoints" / ".step=000005.tmp").mkdir(parents=True)
    for path in (tmp_path / "nothing", empty):
        with refused(InputError, path=path):
            load_model(path)
    export = write_tiny(tmp_path / "export")
    with refused(InputError, path=export / "model.safetensors"):  # one file of a model
        load_model(export / "model.safetensors", FOREIGN)
    for path in (run, run / "checkpoints" / "step=100000", export):  # hold their own settings
        with refused(ConfigError, path=path, key="model"):
            load_model(path, SETTINGS)
    with refused(ConfigError, "n_attention_heads", "norm_groups", path=foreign, key="model"):
        load_model(foreign)
    with refused(ConfigError, key="model"):
        artifact_of(tiny_model())
