"""docs/latents.md: its commands and programs run, one after the other, as they stand there, on smaller granules."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
import xarray as xr
from tiny import N_CHANNELS, tiny_model

from spectralvae import open_scene
from spectralvae.cli import run

ROOT = Path(__file__).parents[1]
SMALLER = {
    "simulate": ["--set", "n_granules=4", "--set", "shape=[33, 41]", "--set", "n_channels=24"],
    "train": ["--set", "training.n_steps=10", "--set", "training.save_every=10", "--set", "training.device=cpu"],
}


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "latents.md").read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / "docs" / target).exists(), target
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    names: dict[str, object] = {}
    ran = []

    for language, block in re.findall(r"^```(console|python)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        if language == "python":
            exec(compile(block, "docs/latents.md", "exec"), names)
            ran.append(language)
            continue
        for line in block.splitlines():
            tool, command, *arguments = shlex.split(line)
            assert tool == "spectralvae"
            assert run([command, *arguments, *SMALLER.get(command, [])]) == 0, line
            ran.append(command)

    assert ran == ["simulate", "prepare", "train", "encode", "python", "python", "decode", "python", "python"]
    decoded = sorted((tmp_path / "demo" / "decoded").glob("*.nc"))
    assert len(decoded) == 4
    assert len(list((tmp_path / "demo" / "decoded" / "figures").glob("*.png"))) == 4
    scene = names["scene"]
    assert isinstance(scene, xr.Dataset) and scene.radiance.shape == (33, 41, 24)


def test_a_checkpoint_of_mltools_by_the_three_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_granule: Callable[..., Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    model, channels = tiny_model(), np.arange(N_CHANNELS)
    torch.save({"state_dict": {f"vae.{key}": value for key, value in model.state_dict().items()}}, "old.ckpt")
    mean, std = torch.linspace(1.0, 2.0, N_CHANNELS), torch.linspace(0.5, 0.7, N_CHANNELS)
    torch.save(mean, "mean_spectrum.pt")
    torch.save(std, "std_spectrum.pt")
    radiance = np.exp(np.random.default_rng(0).normal(1.5, 0.5, (8, 8, N_CHANNELS))).astype(np.float32)
    radiance[2, 3, 4] = -1e30
    (tmp_path / "data" / "tempo").mkdir(parents=True)
    granule = write_granule(
        tmp_path / "data" / "tempo" / "TEMPO_RAD_L1_V03_20240601T150000Z_S006G01.nc",
        radiance,
        wavelength=np.broadcast_to(300 + 0.2 * channels**1.1, (8, N_CHANNELS)),  # not evenly spaced
    )
    smaller = {"shape": [N_CHANNELS, 8, 8], "n_attention_heads": 2, "norm_groups": 2}

    settings = [part for key, value in smaller.items() for part in ("--set", f"model.{key}={value}")]
    assert run(["convert", str(ROOT / "configs/mltools/convert.yaml"), *settings]) == 0
    for command in ("encode", "decode"):
        assert run([command, str(ROOT / f"configs/mltools/{command}.yaml")]) == 0

    valid = radiance >= 1  # smaller is invalid unless the config says otherwise
    with np.errstate(invalid="ignore"):
        z = np.where(valid, (np.log(radiance) - mean.numpy()) / std.numpy(), 0.0)
    with torch.no_grad():
        posterior = model.eval().encode(torch.from_numpy(z).float().permute(2, 0, 1)[None])
        z_hat = model.decode(posterior.mode())[0].permute(1, 2, 0).numpy()
    with xr.open_dataset(f"runs/mltools/latents/{granule.stem}.latents.nc") as latents:
        np.testing.assert_allclose(latents.latent, posterior.mean[0], atol=1e-5)
    decoded = open_scene(f"runs/mltools/decoded/{granule.name}")
    expected = np.where(valid, np.exp(z_hat * std.numpy() + mean.numpy()), np.nan)
    np.testing.assert_allclose(decoded.radiance.values, expected, rtol=1e-4)
