"""The report of a step whose loss or gradient is not finite: enough to find the cause without repeating the run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectralvae.data.loader import Batch
from spectralvae.data.store import Store
from spectralvae.rundir import write_atomic
from spectralvae.training.engine import Engine


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """The norm of the gradients in each module of the network with weights of its own."""
    norms = {}
    for name, module in model.named_modules():
        gradients = [p.grad for p in module.parameters(recurse=False) if p.grad is not None]
        if gradients:
            norms[name or "logvar"] = float(nn.utils.get_total_norm(gradients))
    return norms


@torch.no_grad()
def describe_tiles(engine: Engine, store: Store, batch: Batch) -> list[dict[str, Any]]:
    """Where the tiles of a batch come from, and what each costs alone: the one that is not finite stands out.

    Args:
        engine: with the weights before the step.
        store: of the tiles.
        batch: this process's share.
    """
    described = []
    model = engine.model.eval()
    for i, crop in enumerate(batch.crops):
        x, mask, noise = engine.to_device(batch.tiles[i : i + 1], batch.noise[i : i + 1])
        with engine.autocast():
            loss, _ = model.get_loss(x, mask, noise)
        scene = store.scenes[crop.scene]
        described.append(
            {
                "process": engine.ranks.rank,
                "scene": scene.id,
                "source": scene.source,
                "y": crop.y,
                "x": crop.x,
                "valid_fraction": float(mask.float().mean()),
                "z_min": float(x.masked_fill(~mask, math.inf).min()),
                "z_max": float(x.masked_fill(~mask, -math.inf).max()),
                "loss": float(loss),
            }
        )
    model.train()
    return described


def write_report(run: Path, step: int, report: Mapping[str, Any]) -> Path:
    """Write failures/step=NNNNNN.json; numbers that are not finite are strings, as JSON has none."""
    folder = run / "failures"
    folder.mkdir(exist_ok=True)
    path = folder / f"step={step:06d}.json"
    write_atomic(path, json.dumps(_in_json({"step": step, **report}), indent=2) + "\n")
    return path


def _in_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _in_json(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_in_json(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
