"""The report of a step whose loss or gradient is not finite: enough to find the cause without repeating the run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import get_total_norm

from spectralvae.data.loader import Batch
from spectralvae.data.store import Store
from spectralvae.errors import RunError
from spectralvae.runtime.atomic import write_atomic
from spectralvae.training.engine import Engine, learning_rate
from spectralvae.training.objective import Objective


def check_finite(engine: Engine, store: Store, batch: Batch, metrics: Mapping[str, float]) -> None:
    """All metrics of a step must be finite; else a report is written, and nothing more.

    Args:
        engine: with the weights before the step, and its gradients.
        store: of the tiles.
        batch: this process's share of the step.
        metrics: of the step, the same in all processes.

    Raises:
        RunError: they are not.
    """
    if all(map(math.isfinite, metrics.values())):
        return
    ranks, run = engine.ranks, engine.config.output_dir
    with ranks.together():
        share = describe_tiles(engine, store, batch)
    shares = ranks.gather(share)
    with ranks.together():
        if ranks.is_main:
            report = {
                "step": batch.step + 1,
                "metrics": metrics,
                "learning_rate": learning_rate(engine.config.optimizer, batch.step),
                "gradient_norms": gradient_norms(engine.objective),
                "tiles": [tile for share in shares for tile in share],
            }
            path = write_report(run, report)
            raise RunError(
                f"step {report['step']}: {summary(report)}; stopped before the update, nothing was saved",
                path=path,
                remedy=f"the same step would fail again: continue in a new output_dir with training.init_from: {run}, "
                "and a lower optimizer.lr or a store without that scene",
            )


def gradient_norms(objective: Objective) -> dict[str, float]:
    """The norm of the gradients in each module of the network, and of its head, with weights of its own."""
    norms = {}
    for name, module in objective.named_modules():
        gradients = [p.grad for p in module.parameters(recurse=False) if p.grad is not None]
        if gradients:
            norms["logvar" if name == "model" else name.removeprefix("model.")] = float(get_total_norm(gradients))
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
    for i, crop in enumerate(batch.crops):
        loss, _, found = engine.judge(batch.tiles[i : i + 1], batch.noise[i : i + 1])
        scene = store.scenes[crop.scene]
        described.append(
            {
                "process": engine.ranks.rank,
                "scene": scene.id,
                "source": scene.source,
                "y": crop.y,
                "x": crop.x,
                "valid_fraction": float(found.mask.float().mean()),
                "z_min": float(found.x.masked_fill(~found.mask, math.inf).min()),
                "z_max": float(found.x.masked_fill(~found.mask, -math.inf).max()),
                "loss": float(loss),
            }
        )
    return described


def summary(report: Mapping[str, Any]) -> str:
    """A report in a line: what is not finite, and the tiles whose own loss is not."""
    numbers = ", ".join(f"{key} {value}" for key, value in report["metrics"].items() if not math.isfinite(value))
    guilty = [tile for tile in report["tiles"] if not math.isfinite(tile["loss"])]
    if not guilty:
        return f"{numbers}: not finite, while the loss of each tile alone is"
    if len(guilty) == len(report["tiles"]) > 1:
        return (
            f"{numbers}: not finite, with every tile: the weights have blown up, most often by too high a learning rate"
        )
    named = ", ".join(f"{tile['scene']} at ({tile['y']}, {tile['x']})" for tile in guilty[:4])
    return f"{numbers}: not finite, with the tiles {named}{f' and {len(guilty) - 4} more' if len(guilty) > 4 else ''}"


def write_report(run: Path, report: Mapping[str, Any]) -> Path:
    """Write failures/step=NNNNNN.json; numbers that are not finite are strings, as JSON has none."""
    folder = run / "failures"
    folder.mkdir(exist_ok=True)
    path = folder / f"step={report['step']:06d}.json"
    write_atomic(path, json.dumps(_in_json(report), indent=2) + "\n")
    return path


def _in_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _in_json(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_in_json(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
