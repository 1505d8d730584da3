"""Checkpoints of a run: what goes on after them is what would have gone on without them."""

import hashlib
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny import SETTINGS, equal_weights, flip, tiny_model, tiny_normalization, write_tiny

from spectralvae.errors import InputError
from spectralvae.weights.artifact import verify
from spectralvae.weights.checkpoint import (
    checkpoint_path,
    list_checkpoints,
    newest_valid,
    restore,
    save_checkpoint,
    thin_out,
)

BATCH = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(1))


def set_up(layout, fused, seed=0):
    model = tiny_model(seed).to(memory_format=layout).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05, fused=fused)
    return model, optimizer


def go_on(model, optimizer, n_steps):
    """Some updates whose noise comes from the global generator."""
    for _ in range(n_steps):
        loss, _ = model.get_loss(BATCH)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def save(run, step, model, optimizer, **state):
    return save_checkpoint(run, step, model, SETTINGS, tiny_normalization(), optimizer, state)


def write_run(run, *steps):
    for step in steps:
        write_tiny(checkpoint_path(run, step), seed=step, step=step)
    return run


def steps_in(run):
    return [int(path.name.partition("=")[2]) for path in list_checkpoints(run)]


def names_in(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture
def console():
    return Console(file=io.StringIO(), highlight=False, soft_wrap=True, markup=False)


# -- save and restore --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
def test_going_on_is_as_if_nothing_had_been(tmp_path, layout, fused):
    model, optimizer = set_up(layout, fused)
    go_on(model, optimizer, 3)
    path = save(tmp_path, 3, model, optimizer, seed=4, store_hash="abc")
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(11)
    go_on(model, optimizer, 3)

    again, second = set_up(layout, fused, seed=7)
    strides = {name: parameter.stride() for name, parameter in again.named_parameters()}
    assert restore(path, again, second) == {"step": 3, "seed": 4, "store_hash": "abc"}
    assert equal_weights(again.state_dict(), saved)
    assert any(not p.is_contiguous() for p in again.parameters()) == (layout is torch.channels_last)
    for name, parameter in again.named_parameters():
        assert parameter.stride() == strides[name]
        for key in ("exp_avg", "exp_avg_sq"):
            if parameter in second.state:
                assert second.state[parameter][key].stride() == parameter.stride()
    torch.manual_seed(11)
    go_on(again, second, 3)
    assert equal_weights(again.state_dict(), model.state_dict())
    moments = zip(optimizer.state.values(), second.state.values(), strict=True)
    assert all(torch.equal(a[key], b[key]) for a, b in moments for key in ("step", "exp_avg", "exp_avg_sq"))


def test_restoring_forgets_what_the_optimizer_knew(tmp_path):
    """A checkpoint before the first update has no moments, and nor has the optimizer after it."""
    model, optimizer = set_up(torch.contiguous_format, True)
    path = save(tmp_path, 0, model, optimizer)
    go_on(model, optimizer, 1)
    restore(path, model, optimizer)
    assert len(optimizer.state) == 0


def test_files_of_a_checkpoint(tmp_path):
    model, optimizer = set_up(torch.channels_last, True)
    go_on(model, optimizer, 2)
    path = save(tmp_path, 123, model, optimizer, seed=1)
    assert path == tmp_path / "checkpoints" / "step=000123"
    assert sorted(verify(path)) == [
        "config.json",
        "model.safetensors",
        "normalization.safetensors",
        "optimizer.safetensors",
        "trainer.json",
    ]
    assert json.loads((path / "trainer.json").read_text()) == {"step": 123, "seed": 1}
    moments = load_file(path / "optimizer.safetensors")
    with_gradient = {name: p for name, p in model.named_parameters() if p.grad is not None}
    assert set(moments) == {f"{key}.{name}" for name in with_gradient for key in ("step", "exp_avg", "exp_avg_sq")}
    assert len(with_gradient) == len(list(model.parameters())) - 4  # last down and up: never used
    for name, parameter in with_gradient.items():
        assert moments[f"step.{name}"].item() == 2
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(moments[f"{key}.{name}"], optimizer.state[parameter][key])


@pytest.mark.parametrize("name", ["optimizer.safetensors", "trainer.json", "model.safetensors"])
def test_damaged_checkpoints_are_not_restored(tmp_path, name):
    model, optimizer = set_up(torch.contiguous_format, True)
    go_on(model, optimizer, 1)
    path = save(tmp_path, 1, model, optimizer)
    flip(path / name, 0.6)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match=name):
        restore(path, model, optimizer)
    assert equal_weights(model.state_dict(), before)


def test_an_export_cannot_be_gone_on_from(tmp_path):
    with pytest.raises(InputError, match="without optimizer state"):
        restore(write_tiny(tmp_path / "export"), *set_up(torch.contiguous_format, True))


# -- find --------------------------------------------------------------------------------------------------------


def test_list_is_by_number_and_knows_what_a_checkpoint_is_called(tmp_path):
    assert list_checkpoints(tmp_path) == []
    folder = tmp_path / "checkpoints"
    for name in ("step=1000000", "step=999999", "step=000005", ".step=000010.tmp", ".step=000007.old"):
        (folder / name).mkdir(parents=True)
    for name in ("step=12", "step=00001x", "step=000010.tmp", "damaged_step=000020", "last"):
        (folder / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step=000005", "step=999999", "step=1000000"]
    assert list_checkpoints(tmp_path)[-1] == checkpoint_path(tmp_path, 1000000)


def test_newest_valid(tmp_path, console):
    assert newest_valid(tmp_path, console) is None
    run = write_run(tmp_path, 5, 10)
    assert newest_valid(run, console) == checkpoint_path(run, 10)
    assert console.file.getvalue() == ""
    assert names_in(run) == ["step=000005", "step=000010"]


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json", "config.json"])
def test_damaged_ones_are_passed_over_with_a_loud_warning(tmp_path, console, name):
    run = write_run(tmp_path / "a[red]b[/x]", 5, 10, 15)  # what looks like markup is a path
    flip(checkpoint_path(run, 15) / name, 0.5)
    (checkpoint_path(run, 10) / name).unlink()
    assert newest_valid(run, console) == checkpoint_path(run, 5)
    text = console.file.getvalue()
    assert text.count("WARNING: damaged checkpoint passed over: ") == 2
    for step in (10, 15):
        assert str(checkpoint_path(run, step) / name) in text
    assert names_in(run) == ["damaged_step=000010", "damaged_step=000015", "step=000005"]
    assert str(run / "checkpoints" / "damaged_step=000015") in text


def test_a_newer_format_is_not_damage(tmp_path, console):
    """Renaming it and going on from an older one would throw good steps away."""
    run = write_run(tmp_path, 5, 10)
    path = checkpoint_path(run, 10) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["format"] += 1
    manifest.pop("digest")
    manifest["digest"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(manifest, indent=2) + "\n")
    with pytest.raises(InputError, match="update spectralvae"):
        newest_valid(run, console)
    assert names_in(run) == ["step=000005", "step=000010"]


def test_what_was_passed_over_never_outlives_the_good_ones(tmp_path, console):
    """Resumed at 5, stopped by a signal at 7: were 10 still the newest, it would be kept and 7 deleted."""
    run = write_run(tmp_path, 5, 10)
    for _ in range(2):  # a second damaged 10 takes the place of the first
        flip(checkpoint_path(run, 10) / "model.safetensors", 0.5)
        assert newest_valid(run, console) == checkpoint_path(run, 5)
        write_run(run, 10)
    flip(checkpoint_path(run, 10) / "model.safetensors", 0.5)
    newest_valid(run, console)
    write_run(run, 7)
    thin_out(run, 1, None, None)
    assert steps_in(run) == [7]


def test_all_damaged(tmp_path, console):
    """They keep their names, so that they are not taken for a run that has not begun."""
    run = write_run(tmp_path, 5, 10)
    for path in list_checkpoints(run):
        flip(path / "model.safetensors", 0.5)
    assert newest_valid(run, console) is None
    assert steps_in(run) == [5, 10]


# -- thin out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "best", "kept"),
    [
        (None, None, None, [5, 10, 15, 20, 25, 1000000]),
        (None, 10, 5, [5, 10, 15, 20, 25, 1000000]),
        (1, None, None, [1000000]),
        (1, None, 15, [15, 1000000]),
        (2, None, 25, [25, 1000000]),
        (3, None, None, [20, 25, 1000000]),
        (9, None, None, [5, 10, 15, 20, 25, 1000000]),
        (1, 10, None, [10, 20, 1000000]),
        (2, 15, None, [15, 25, 1000000]),
    ],
)
def test_thin_out(tmp_path, keep_last, keep_every, best, kept):
    for step in (5, 10, 15, 20, 25, 1000000):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
        (checkpoint_path(tmp_path, step) / "file").touch()
    thin_out(tmp_path, keep_last, keep_every, best)
    assert steps_in(tmp_path) == kept
    assert len(names_in(tmp_path)) == len(kept)


def test_a_kill_while_thinning_out_leaves_none_half_deleted(tmp_path, monkeypatch):
    run = write_run(tmp_path, 5, 10)

    def stop(path):
        (Path(path) / "config.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("spectralvae.weights.checkpoint.shutil.rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            thin_out(run, 1, None, None)
    assert steps_in(run) == [10]
    verify(checkpoint_path(run, 10))


def test_saving_clears_what_a_kill_left(tmp_path):
    model, optimizer = set_up(torch.contiguous_format, True)
    for name in (".step=000003.tmp", ".step=000002.old", "damaged_step=000004"):
        (tmp_path / "checkpoints" / name / "sub").mkdir(parents=True)
    save(tmp_path, 5, model, optimizer)
    assert names_in(tmp_path) == ["damaged_step=000004", "step=000005"]
