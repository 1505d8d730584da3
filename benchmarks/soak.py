"""Whether a long run takes ever more memory, files or threads.

    python benchmarks/soak.py [--json FILE] [--steps N]

A tiny network trains on a made-up store with everything on: rows, validation, plots, checkpoints of which two are kept,
reader threads. The process looks at itself at regular steps; straight lines are fitted to what it saw after the first
third, in which caches fill. It fails (exit code 1) where memory clearly grows by more than LIMIT_MB in 10,000 steps, or
where files or threads become more.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from machine import machine
from numpy.typing import NDArray
from progress import say

from spectralvae.cli import run
from spectralvae.training.trainer import Trainer

LIMIT_MB = 20.0  # in 10,000 steps: 400 MB in a run of 200,000
CLEARLY = 3.0  # standard errors
WARM_UP = 1 / 3
QUANTITIES = ("rss_mb", "uss_mb", "files", "threads")


def make_store(folder: Path) -> Path:
    """Two simulated granules of 16 channels as a store; one is kept for validation."""
    settings: dict[str, dict[str, Any]] = {
        "simulate": {
            "output_dir": str(folder / "granules"),
            "n_granules": 2,
            "shape": [24, 32],
            "n_channels": 16,
            "products": [],
        },
        "prepare": {
            "output_dir": str(folder / "store"),
            "inputs": [str(folder / "granules")],
            "split": {"by": "scene", "val_fraction": 0.5},
        },
    }
    for command, config in settings.items():
        path = folder / f"{command}.yaml"
        path.write_text(json.dumps(config))
        assert run([command, str(path)]) == 0
    return folder / "store"


class Watcher:
    """Looks at this process at every so many steps of a run, and says how far it is."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.rows: list[dict[str, float]] = []
        self._process = psutil.Process()
        self._started = time.monotonic()
        original = Trainer._follow_up

        def follow_up(trainer: Trainer, *arguments: Any, **options: Any) -> None:
            original(trainer, *arguments, **options)
            if trainer.step % every == 0:
                self.look(trainer.step)

        Trainer._follow_up = follow_up  # type: ignore[method-assign]

    def look(self, step: int) -> None:
        gc.collect()  # what waits for the collector is no leak
        memory = self._process.memory_full_info()
        say(f"step {step}: {memory.rss / 1e6:.0f} MB")
        self.rows.append(
            {
                "step": step,
                "seconds": round(time.monotonic() - self._started, 1),
                "rss_mb": memory.rss / 1e6,
                "uss_mb": memory.uss / 1e6,
                "files": self._process.num_fds(),
                "threads": self._process.num_threads(),
            }
        )


def fit(steps: NDArray[np.float64], values: NDArray[np.float64]) -> tuple[float, float]:
    """Slope of a straight line in 10,000 steps, and its standard error."""
    x = (steps - steps.mean()) / 10_000
    slope = float(x @ values / (x @ x))
    residuals = values - values.mean() - slope * x
    return slope, float(np.sqrt(residuals @ residuals / (len(x) - 2) / (x @ x)))


def judge(rows: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """By quantity: how it grows in 10,000 steps, and whether that is too much."""
    steps = np.array([row["step"] for row in rows])
    late = steps > WARM_UP * steps[-1]
    found: dict[str, dict[str, Any]] = {}
    for key in QUANTITIES:
        values = np.array([row[key] for row in rows])[late]
        slope, error = fit(steps[late], values)
        thirds = np.array_split(values, 3)
        grows = slope - CLEARLY * error > LIMIT_MB if key.endswith("_mb") else thirds[2].min() > thirds[0].max()
        found[key] = {
            "per_10000_steps": slope,
            "standard_error": error,
            "first": float(values[0]),
            "last": float(values[-1]),
            "grows": bool(grows),
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results there, too")
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--looks", type=int, default=150, help="how often to look at the process")
    parser.add_argument("--directory", type=Path, help="where the temporary folder is made")
    options = parser.parse_args()
    if options.steps < 10 * options.looks:
        parser.error("--steps: at least 10 between two looks")
    training = {
        "n_steps": options.steps,
        "log_every": 10,
        "val_every": 50,
        "plot_every": 500,
        "save_every": 1000,
        "keep_last": 2,
        "device": "cpu",
    }
    load_before = os.getloadavg()
    watcher = Watcher(options.steps // options.looks)
    with tempfile.TemporaryDirectory(prefix="soak-", dir=options.directory) as folder:
        config = {
            "output_dir": str(Path(folder) / "run"),
            "data": {"store": str(make_store(Path(folder))), "batch_size": 2, "tile_size": 8, "n_val_tiles": 4},
            "model": {"chs": [8], "z_channels": 2, "embed_dim": 2, "n_attention_heads": 1, "dropout_prob": 0.1},
            "training": training,
        }
        path = Path(folder) / "train.yaml"
        path.write_text(json.dumps(config))
        assert run(["train", str(path)]) == 0
        page = (Path(folder) / "run/summary/index.html").stat().st_size
    found = judge(watcher.rows)
    print(f"{options.steps} steps in {watcher.rows[-1]['seconds']:.0f} s; summary/index.html: {page / 1e6:.2f} MB")
    for key, row in found.items():
        print(
            f"{key:8s} {row['first']:9.2f} -> {row['last']:9.2f}   in 10,000 steps {row['per_10000_steps']:+8.3f} "
            f"+- {row['standard_error']:.3f}{'   GROWS' if row['grows'] else ''}"
        )
    if options.json:
        load = {"load_before": load_before, "load_after": os.getloadavg()}
        packages = machine(["torch", "numpy", "matplotlib", "tensorboard"])
        report = {"machine": packages, "training": training, **load, "page_bytes": page, **found, "rows": watcher.rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(row["grows"] for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
