"""Which recipe learns fastest: one setting changed at a time, the same data, the same number of steps.

    python benchmarks/recipe.py --dir DIR [--recipes NAME ...] [--json FILE] [--figure FILE]

Simulates 24 granules (one a day, 128 x 256 pixels, 256 channels, 8 days for validation) in DIR, prepares a store, and
trains a small network (chs [64, 64, 64], tiles of 32, 2,000 steps: seven minutes each on one CPU core) with every
recipe, one after the other, and evaluates it on all validation tiles, beside PCA. What is finished in DIR/runs and
DIR/evaluations is not done again; without --recipes all that is finished there is reported. `supervised` needs all of
that and level 2; for what its latents know, see `spectralvae probe`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import machine
from matplotlib.figure import Figure

BASE: dict[str, Any] = {
    "seed": 1,
    "data.batch_size": 8,
    "data.tile_size": 32,
    "data.n_val_tiles": 64,
    "data.num_workers": 1,
    "model.chs": [64, 64, 64],
    "training.n_steps": 2000,
    "training.save_every": 2000,
    "training.val_every": 200,
    "training.plot_every": 1000,
    "training.log_every": 20,
    "training.device": "cpu",
}
COLORS = ("#004488", "#bb5566", "#ddaa33", "#228833", "#66ccee", "#aa3377", "#000000", "#999999")
L2 = {"model.nll_loss_type": "l2"}
SCHEDULE = {"optimizer.warmup_steps": 100, "optimizer.decay_steps": 2000}
BEST = {**L2, "optimizer.lr": 2e-3, **SCHEDULE}
RECIPES: dict[str, dict[str, Any]] = {
    "l1_1e-4": {"optimizer.lr": 1e-4},
    "l1_1e-3": {"optimizer.lr": 1e-3},
    "l1_2e-3_w_cos": {"optimizer.lr": 2e-3, **SCHEDULE},
    "l2_2e-3": {**L2, "optimizer.lr": 2e-3},
    "l2_2e-3_w_cos": BEST,
    "l2_2e-3_w_cos_b2": {  # as many tiles in smaller steps
        **BEST,
        "data.batch_size": 2,
        "optimizer.decay_steps": 8000,
        "training.n_steps": 8000,
        "training.save_every": 8000,
        "training.val_every": 800,
    },
    "supervised": {**BEST, "supervision": {"products": dict.fromkeys(("NO2", "HCHO", "O3TOT", "CLDO4"), 1.0)}},
}
JUDGED = ("mse", "noise_ratio", "spectral_angle", "explained_variance")


def spectralvae(command: str, folder: Path, settings: dict[str, Any]) -> None:
    """Run a command with a config of its own in ``folder``."""
    config = folder / f"{command}.yaml"
    config.write_text("{}\n")
    pairs = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    subprocess.run([sys.executable, "-m", "spectralvae", command, str(config), *pairs], check=True)


def prepare(folder: Path) -> Path:
    """Granules and the store, unless they are there."""
    granules, store = folder / "granules", folder / "store"
    size = {"seed": 6, "n_granules": 24, "shape": [128, 256], "n_channels": 256}
    spectralvae("simulate", folder, {"output_dir": str(granules), **size})
    split = {"split.by": "day", "split.val_fraction": 0.334, "split.seed": 0}
    products = {f"l2.{name}.folder": str(granules) for name in ("NO2", "HCHO", "O3TOT", "CLDO4")}
    inputs = {"output_dir": str(store), "inputs": [str(granules / "TEMPO_RAD*.nc")]}
    spectralvae("prepare", folder, {**inputs, **split, **products})
    return store


def finished(run: Path) -> bool:
    """Whether a training run is."""
    record = run / "run.json"
    return record.is_file() and json.loads(record.read_text())["state"] == "finished"


def result(run: Path, evaluation: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Validation errors by step as training saw them, and in the end on all tiles, with those of PCA."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    errors = {row["step"]: row["val_pixel_mse"] for row in rows if "val_pixel_mse" in row}
    report = json.loads((evaluation / "report.json").read_text())
    (judged,) = report["checkpoints"].values()
    baselines = {name: {key: found[key] for key in JUDGED} for name, found in report["baselines"].items()}
    judged = {key: judged[key] for key in JUDGED}
    return {"settings": settings, "val_pixel_mse": errors, "judged": judged, "baselines": baselines}


def draw(results: dict[str, dict[str, Any]]) -> Figure:
    """Validation error against step, of every recipe."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    order = sorted(results, key=lambda name: float(results[name]["judged"]["mse"]))
    for color, name in zip(COLORS, order, strict=False):
        batch = RECIPES[name].get("data.batch_size", BASE["data.batch_size"])
        errors = {step * batch: e for step, e in results[name]["val_pixel_mse"].items() if step}
        label = f"{name}: {results[name]['judged']['mse']:.4f}"
        axes.plot(list(errors), list(errors.values()), color=color, marker=".", label=label)
    for name in ("pca_1", "pca_2", "pca_4"):
        axes.axhline(results[order[0]]["baselines"][name]["mse"], color="0.5", linestyle=":")
        error = results[order[0]]["baselines"][name]["mse"]
        axes.text(1.01, error, name, va="center", color="0.4", transform=axes.get_yaxis_transform())
    axes.set(xlabel="tiles seen", ylabel="MSE of z, validation tiles", yscale="log", title="One change at a time")
    axes.set_ylim(8e-4, 0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.1, 0.5), frameon=False, title="recipe: MSE on all tiles")
    axes.grid(color="0.9")
    return figure


def main() -> None:
    """Train, measure, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    folder: Path = options.dir
    folder.mkdir(parents=True, exist_ok=True)
    wanted = options.recipes or [name for name in RECIPES if finished(folder / "runs" / name)] or list(RECIPES)
    results = {}
    for name in wanted:
        run = folder / "runs" / name
        if not finished(run):
            store = prepare(folder)
            settings = {"output_dir": str(run), "data.store": str(store), **BASE, **RECIPES[name]}
            spectralvae("train", folder, settings)
        evaluation = folder / "evaluations" / name
        if not finished(evaluation):
            spectralvae("evaluate", folder, {"output_dir": str(evaluation), "run": str(run), "batch_size": 16})
        results[name] = result(run, evaluation, RECIPES[name])
        print(f"{name:24} {results[name]['judged']['mse']:.4f}")
    if options.json:
        report = {"machine": machine(["torch", "numpy"]), "base": BASE, "recipes": results}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.figure:
        draw(results).savefig(options.figure, dpi=110)


if __name__ == "__main__":
    main()
