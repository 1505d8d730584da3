"""What the overlap of tiles costs and gives: errors and steps where tiles meet, in latents and in reconstructions.

    python benchmarks/seams.py --model RUN --scenes FILE ... [--region Y0 Y1 X0 X1] [--json FILE]
        [--variable NAME --size Y X --wavelength FIRST LAST]        # for files that don't say

A tile's latents depend on all of it (GroupNorm, attention, zeros beyond its border). For each overlap the scene is
encoded and decoded, and measured are, as means over the scenes,

- `z_mse`: error of the reconstruction, and its ratio between the quarter of the pixels nearest to a seam and the
  quarter farthest from any (1 is the best). A seam is the line where two neighbouring tiles count alike.
- `step`: root mean square of the change of that error from one pixel to the next across seams, divided by that across
  lines in the middle between them (1: nobody sees a seam); likewise for the latents themselves.
- `latent_deviation`: distance of the latents from those that the same place has in the middle of a tile, in standard
  deviations of the latents, near seams and far from them.
- `tiles`: how many there are; time goes with their number.

Then the other question at borders: what the network should be shown beyond the end of a scene that is smaller than a
tile. Pieces are cut out of the scene, and encoded and decoded with the rest of the tile mirrored (as `encode` does) or
zero (as invalid samples are); beside it the error of the same piece within its whole tile.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine

from spectralvae import load_model, open_scene
from spectralvae.data.tiling import Cover
from spectralvae.inference.coder import Coder
from spectralvae.weights.loading import artifact_of

SHARES = (0, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)  # of a tile


def seams(cover: Cover) -> np.ndarray:
    """Where neighbouring tiles count alike, in pixels."""
    starts = cover.starts
    return np.array([(a + cover.tile + b) / 2 for a, b in pairwise(starts)])


def shared(cover: Cover) -> float:
    """Pixels that neighbouring tiles share on the average: more than asked for where the tiles don't go up."""
    starts = cover.starts
    return float(np.mean([a + cover.tile - b for a, b in pairwise(starts)])) if len(starts) > 1 else 0.0


def near_and_far(covers: tuple[Cover, Cover], shape: tuple[int, int], unit: int) -> tuple[np.ndarray, np.ndarray]:
    """(y, x) bool each: the quarter of the cells nearest to a seam, and the quarter farthest from any."""
    distances = []
    for cover, n in zip(covers, shape, strict=True):
        lines = seams(cover)
        middles = (np.arange(n) + 0.5) * unit
        far = np.full(n, np.inf)
        distances.append(np.abs(middles[:, None] - lines).min(axis=1) if len(lines) else far)
    distance = np.minimum(distances[0][:, None], distances[1])
    low, high = np.quantile(distance, [0.25, 0.75])
    return distance <= low, distance >= high


def step(values: np.ndarray, covers: tuple[Cover, Cover], unit: int) -> float:
    """Changes of (y, x, n) across seams beside those across the lines in the middle between them."""
    across: list[np.ndarray] = []
    between: list[np.ndarray] = []
    for axis, cover in enumerate(covers):
        change = np.nanmean(np.diff(values, axis=axis) ** 2, axis=(1 - axis, 2))
        lines = seams(cover)
        middles = (lines[1:] + lines[:-1]) / 2
        for found, places in ((across, lines), (between, middles)):
            index = np.round(places / unit).astype(int) - 1
            found.append(change[index[(index >= 0) & (index < len(change))]])
    return float(np.sqrt(np.nanmean(np.concatenate(across)) / np.nanmean(np.concatenate(between))))


def centred_latents(coder: Coder, z: np.ndarray) -> np.ndarray:
    """Latents of which each cell comes from a tile that has it in its middle; NaN near the scene's own border."""
    tile, s = coder.tile, coder.scale
    quarter = tile // 4 // s * s
    y, x = (Cover(size, tile, tile - quarter, s) for size in z.shape[:2])
    latents = np.full((y.n_cells, x.n_cells, coder.model.embed_dim), np.nan, np.float32)
    inner = slice((tile - quarter) // 2 // s, (tile + quarter) // 2 // s)
    for top in y.starts:
        for left in x.starts:
            part = z[top : top + tile, left : left + tile]
            if part.shape[:2] == (tile, tile):
                cells = encode(coder, part)
                latents[top // s :, left // s :][inner, inner] = cells[inner, inner]
    return latents


def encode(coder: Coder, z: np.ndarray) -> np.ndarray:
    """All latents of a scene."""
    ny, nx = z.shape[:2]
    latents = np.empty((-(-ny // coder.scale), -(-nx // coder.scale), coder.model.embed_dim), np.float32)
    for piece in coder.encode(lambda rows, columns: z[rows, columns], (ny, nx)):
        latents[piece.rows, piece.columns] = piece.result
    return latents


def decode(coder: Coder, latents: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """All of a scene, z."""
    z = np.empty((*shape, coder.normalization.n_channels), np.float32)
    for piece in coder.decode(lambda rows, columns: latents[rows, columns], shape):
        z[piece.rows, piece.columns] = piece.result
    return z


def measure(coder: Coder, z: np.ndarray, centred: np.ndarray) -> dict[str, float]:
    """All figures of one overlap."""
    shape: tuple[int, int] = z.shape[:2]
    covers = tuple(Cover(size, coder.tile, coder.overlap, coder.scale) for size in shape)
    latents = encode(coder, z)
    z_hat = decode(coder, latents, shape)
    error = z_hat - z
    near, far = near_and_far(covers, shape, 1)
    deviation = np.nanmean((latents - centred) ** 2, axis=2) / np.nanvar(centred, axis=(0, 1)).mean()
    near_cells, far_cells = near_and_far(covers, latents.shape[:2], coder.scale)
    return {
        "overlap": coder.overlap,
        "shared_y": shared(covers[0]),
        "shared_x": shared(covers[1]),
        "z_mse": float(np.nanmean(error**2)),
        "z_mse_near_by_far": float(np.nanmean(error[near] ** 2) / np.nanmean(error[far] ** 2)),
        "step": step(error, covers, 1),
        "latent_step": step(latents, covers, coder.scale),
        "latent_deviation_near": float(np.sqrt(np.nanmean(deviation[near_cells]))),
        "latent_deviation_far": float(np.sqrt(np.nanmean(deviation[far_cells]))),
        "tiles": float(math.prod(len(cover.starts) for cover in covers)),
    }


def measure_ends(coder: Coder, scenes: list[np.ndarray], n_pieces: int = 64) -> dict[str, dict[str, float]]:
    """Errors of pieces smaller than a tile, by what the network sees beyond them."""
    tile, s = coder.tile, coder.scale
    random = np.random.default_rng(0)
    sizes = ((tile // 2, tile // 2), (tile // 4, tile), (1, tile), (tile - s + 1, tile - s + 1))
    found = {}
    for height, width in sizes:
        errors: dict[str, list[float]] = {"mirrored": [], "zeros": [], "whole tile": []}
        for attempt in range(100 * n_pieces):
            if len(errors["zeros"]) == n_pieces:
                break
            z = scenes[attempt % len(scenes)]
            top, left = (int(random.integers(0, size - tile + 1)) for size in z.shape[:2])
            whole = z[top : top + tile, left : left + tile]
            if not np.isfinite(whole).all():
                continue
            piece, zeros = whole[:height, :width], np.zeros_like(whole)
            zeros[:height, :width] = piece
            for name, given in (("mirrored", piece), ("zeros", zeros), ("whole tile", whole)):
                back = decode(coder, encode(coder, given), given.shape[:2])[:height, :width]
                errors[name].append(float(np.mean((back - piece) ** 2)))
        if len(errors["zeros"]) < n_pieces:
            raise SystemExit("too few tiles without an invalid sample in these scenes")
        found[f"{height} x {width}"] = {name: float(np.mean(values)) for name, values in errors.items()}
    return found


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--scenes", type=Path, nargs="+", required=True)
    parser.add_argument("--variable")
    parser.add_argument("--size", type=int, nargs=2)
    parser.add_argument("--wavelength", type=float, nargs=2)
    parser.add_argument("--region", type=int, nargs=4)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure, print, save."""
    args = arguments()
    artifact = artifact_of(load_model(args.model))
    plain = Coder(artifact, torch.device("cpu"), overlap=0, batch_size=8)
    wavelength = args.wavelength and dict(zip(("first", "last"), args.wavelength, strict=True))
    scenes = []
    for path in args.scenes:
        scene = open_scene(path, variable=args.variable, size=args.size, wavelength=wavelength, region=args.region)
        scenes.append(plain.normalization.normalize(scene.radiance.values).astype(np.float32))
    centred = [centred_latents(plain, z) for z in scenes]
    rows: list[dict[str, Any]] = []
    for share in SHARES:
        overlap = round(share * plain.tile / plain.scale) * plain.scale
        coder = Coder(artifact, torch.device("cpu"), overlap=overlap, batch_size=8)
        found = [measure(coder, z, c) for z, c in zip(scenes, centred, strict=True)]
        row: dict[str, Any] = {name: float(np.mean([figures[name] for figures in found])) for name in found[0]}
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
        rows.append({**row, "z_mse_of_each_scene": [figures["z_mse"] for figures in found]})
    ends = measure_ends(plain, scenes)
    for size, errors in ends.items():
        print(f"a scene of {size}: " + ", ".join(f"{name} {value:.4g}" for name, value in errors.items()))
    if args.json:
        result: dict[str, Any] = {
            "machine": machine(["torch", "numpy"]),
            "model": {"step": artifact.step, "shape": artifact.settings["shape"], "scale": plain.scale},
            "scenes": [{"name": p.name, "shape": list(z.shape)} for p, z in zip(args.scenes, scenes, strict=True)],
            "overlaps": rows,
            "ends": ends,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
