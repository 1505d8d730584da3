"""Checkpoints of a run: a resumed run computes what an uninterrupted one would have computed."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from refusals import refused
from rich.console import Console
from safetensors.torch import load_file
from tiny import SETTINGS, equal_weights, flip, signed, tiny_model, tiny_normalization, write_tiny

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


def set_up(layout=torch.contiguous_format, fused=True, seed=0):
    model = tiny_model(seed).to(memory_format=layout).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05, fused=fused)
    return model, optimizer


def update(model, optimizer, n_steps):
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
def test_a_resumed_run_is_bit_identical(tmp_path, layout, fused):
    model, optimizer = set_up(layout, fused)
    update(model, optimizer, 3)
    path = save(tmp_path, 3, model, optimizer, seed=4, store_hash="abc")
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(11)
    update(model, optimizer, 3)

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
    update(again, second, 3)
    assert equal_weights(again.state_dict(), model.state_dict())
    moments = zip(optimizer.state.values(), second.state.values(), strict=True)
    assert all(torch.equal(a[key], b[key]) for a, b in moments for key in ("step", "exp_avg", "exp_avg_sq"))


def test_restoring_forgets_what_the_optimizer_knew(tmp_path):
    """A checkpoint before the first update has no moments, and nor has the optimizer after it."""
    model, optimizer = set_up()
    path = save(tmp_path, 0, model, optimizer)
    update(model, optimizer, 1)
    restore(path, model, optimizer)
    assert len(optimizer.state) == 0


def test_files_of_a_checkpoint(tmp_path):
    model, optimizer = set_up(torch.channels_last)
    update(model, optimizer, 2)
    path = save(tmp_path, 123, model, optimizer, seed=1)
    assert path == tmp_path / "checkpoints" / "step=000123"
    tensors = [f"{name}.safetensors" for name in ("model", "normalization", "optimizer")]
    assert sorted(verify(path)) == ["config.json", *tensors, "trainer.json"]
    assert json.loads((path / "trainer.json").read_text()) == {"step": 123, "seed": 1}
    moments = load_file(path / "optimizer.safetensors")
    with_gradient = {name: p for name, p in model.named_parameters() if p.grad is not None}
    assert set(moments) == {f"{key}.{name}" for name in with_gradient for key in ("step", "exp_avg", "exp_avg_sq")}
    assert len(with_gradient) == len(list(model.parameters())) - 4  # last down and up: never used
    for name, parameter in with_gradient.items():
        assert moments[f"step.{name}"].item() == 2
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(moments[f"{key}.{name}"], optimizer.state[parameter][key])


def test_an_export_cannot_be_resumed(tmp_path):
    """Not even with another file beside it, which its manifest does not name."""
    model, optimizer = set_up()
    export = write_tiny(tmp_path / "export")
    shutil.copy(save(tmp_path, 5, model, optimizer) / "optimizer.safetensors", export)
    with refused(InputError, path=export):
        restore(export, model, optimizer)


# -- find --------------------------------------------------------------------------------------------------------


def test_list_is_by_number_and_knows_what_a_checkpoint_is_called(tmp_path, console):
    assert list_checkpoints(tmp_path) == []
    assert newest_valid(tmp_path, console) is None
    names = ["step=1000000", "step=999999", "step=000005", ".step=000010.tmp", ".step=000007.old"]
    for name in (*names, "step=12", "step=00001x", "step=000010.tmp", "damaged_step=000020", "last"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step=000005", "step=999999", "step=1000000"]
    assert list_checkpoints(tmp_path)[-1] == checkpoint_path(tmp_path, 1000000)


def test_corrupt_ones_are_passed_over_with_a_warning_each(tmp_path, console):
    run = write_run(tmp_path / "a[red]b[/x]", 5, 10, 15)  # what looks like markup is a path
    flip(checkpoint_path(run, 15) / "model.safetensors", 0.5)
    (checkpoint_path(run, 10) / "config.json").unlink()
    assert newest_valid(run, console) == checkpoint_path(run, 5)
    warnings = [line for line in console.file.getvalue().splitlines() if line.startswith("WARNING")]
    for line, named in zip(warnings, ("step=000015/model.safetensors", "step=000010/config.json"), strict=True):
        assert f": {run}/checkpoints/{named}: " in line
    assert names_in(run) == ["damaged_step=000010", "damaged_step=000015", "step=000005"]
    assert str(run / "checkpoints" / "damaged_step=000015") in console.file.getvalue()


def test_a_newer_format_is_not_damage(tmp_path, console):
    """Renaming it and resuming from an older one would throw good steps away."""
    run = write_run(tmp_path, 5, 10)
    path = checkpoint_path(run, 10) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    path.write_text(signed({**manifest, "format": 2}))
    with refused(InputError, path=path, key="format", value=2):
        newest_valid(run, console)
    assert names_in(run) == ["step=000005", "step=000010"]


def test_what_was_passed_over_never_outlives_the_good_ones(tmp_path, console):
    """Resumed at 5, stopped by a signal at 7: were 10 still the newest, it would be kept and 7 deleted."""
    run = write_run(tmp_path, 5)
    for _ in range(2):  # a second corrupt 10 takes the place of the first
        write_run(run, 10)
        flip(checkpoint_path(run, 10) / "model.safetensors", 0.5)
        assert newest_valid(run, console) == checkpoint_path(run, 5)
    write_run(run, 7)
    thin_out(run, 1, None, None)
    assert names_in(run) == ["damaged_step=000010", "step=000007"]


# -- thin out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "best", "kept"),
    [
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
        patch.setattr(shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            thin_out(run, 1, None, None)
    assert steps_in(run) == [10]
