"""What train_step.py and scaling.py share: networks, tiles, steps of ours and plain ones, and how to measure them."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from machine import machine
from progress import say
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from spectralvae.config import TrainConfig
from spectralvae.config.loading import dump_config
from spectralvae.data import sampling
from spectralvae.data.cache import SceneCache
from spectralvae.data.loader import Batch
from spectralvae.data.sampling import Crop
from spectralvae.model import AttnBlock, AutoencoderKL
from spectralvae.training.engine import Engine
from spectralvae.training.objective import means
from spectralvae.weights.settings import build_model, construct

T = TypeVar("T")
WEIGHT_SPREAD = 0.02  # added to all weights: a fresh network ends in zeros, and most gradients would be 0
INVALID = 0.02  # share of the samples
NCHW, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


class Network(NamedTuple):
    """`model:` section (what differs from the defaults), and the batches on which it is measured if not told."""

    model: dict[str, Any]
    n_channels: int
    tile_size: int
    batch_size: int


NETWORKS = {
    "full": Network({}, 1028, 64, 2),
    "small": Network({"chs": [64, 64, 64]}, 256, 32, 8),
    "tiny": Network({"chs": [16, 8]}, 16, 16, 2),
}


def make_config(network: Network, **training: Any) -> TrainConfig:
    """The config that `spectralvae train` would run it with."""
    shape = [network.n_channels, network.tile_size, network.tile_size]
    return TrainConfig.model_validate(
        {
            "output_dir": "run",
            "data": {"store": "store", "batch_size": network.batch_size, "tile_size": network.tile_size},
            "model": {**network.model, "shape": shape},
            "training": training,
        }
    )


def make_model(config: TrainConfig) -> AutoencoderKL:
    """With weights that are always the same, none of them zero."""
    torch.manual_seed(config.seed)
    model = build_model(dump_config(config.model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(WEIGHT_SPREAD * torch.randn(parameter.shape))
    return model


def make_batch(config: TrainConfig, model: AutoencoderKL, n_tiles: int, pin_memory: bool = False) -> Batch:
    """Tiles as a TileStream gives them: float16, some NaN; always the same."""
    assert config.model.shape is not None
    torch.manual_seed(config.seed + 1)
    n_channels, size, _ = config.model.shape
    tiles = torch.randn(n_tiles, size, size, n_channels)
    tiles[torch.rand(tiles.shape) < INVALID] = torch.nan
    noise = torch.randn(n_tiles, config.model.embed_dim, size // model.scale, size // model.scale)
    tiles = tiles.half()
    return Batch(0, tiles.pin_memory(), noise.pin_memory(), []) if pin_memory else Batch(0, tiles, noise, [])


def cached(batch: Batch, device: torch.device) -> tuple[SceneCache, list[Crop]]:
    """A scene in a cache, and the crops that give the tiles of a batch, in all eight orientations."""
    n_tiles, size, _, n_channels = batch.tiles.shape
    crops = [Crop(0, 0, j * size, flip=j % 2 == 1, turns=j // 2 % 4) for j in range(n_tiles)]
    scene = np.empty((size, n_tiles * size, n_channels), np.float16)
    for crop, tile in zip(crops, batch.tiles.numpy(), strict=True):
        scene[:, crop.x : crop.x + size] = sampling.as_read(tile, crop)
    return SceneCache(torch.from_numpy(scene).view(-1, n_channels).to(device), {0: (0, n_tiles * size)}), crops


def cached_step(engine: Engine, cache: SceneCache, crops: Sequence[Crop], batch: Batch) -> float:
    """As ``our_step``, of tiles that are made on the device first."""
    tiles = torch.empty(batch.tiles.shape, dtype=batch.tiles.dtype, device=cache.pixels.device)
    for crop, tile in zip(crops, tiles, strict=True):
        cache.read(crop, tile)
    return our_step(engine, replace(batch, tiles=tiles))


def our_step(engine: Engine, batch: Batch) -> float:
    """One step as the Trainer makes it; returns the loss before it."""
    sums, norm = engine.gradients(batch)
    metrics = means(engine.ranks.add(sums))
    engine.update(norm, batch.step)
    return metrics["loss"]


# --- the straightforward implementation -------------------------------------------------------


class PlainAttention(AttnBlock):
    """The same attention, with its matrix of scores in memory."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, K, H, W) -> (B, K, H, W)"""
        normed = self.norm(x)
        shape = (len(x), -1, self.n_attention_heads, x.shape[2] * x.shape[3])
        q, k, v = (layer(normed).reshape(shape) for layer in (self.q, self.k, self.v))  # (B, K/heads, heads, P)
        scores = torch.einsum("bchi,bchj->bhij", q, k) * q.shape[1] ** -0.5
        h = torch.einsum("bhij,bchj->bchi", scores.softmax(-1), v)
        return cast(Tensor, x + self.proj_out(h.reshape(x.shape)))


def use_plain_attention(model: AutoencoderKL) -> None:
    """Weights and keys stay as they are."""
    for module in model.modules():
        if isinstance(module, AttnBlock):
            module.__class__ = PlainAttention


def plain_loss(model: AutoencoderKL, x: Tensor, mask: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the reconstruction (B, C, H, W); mask is 1 where x counts, and x is finite."""
    posterior = model.encode(x)
    x_hat = model.decode(posterior.sample(noise))
    nll = (((x - x_hat).abs() / model.logvar.exp() + model.logvar) * mask).sum() / len(x)
    return nll + model.kl_weight * posterior.kl().sum() / len(x), x_hat


def plain_steps(
    model: AutoencoderKL, batch: Batch, config: TrainConfig, device: torch.device, second_forward: bool
) -> Callable[[], float]:
    """A function that makes a step and returns the loss before it.

    Args:
        model: is trained.
        batch: that all steps see.
        config: of the run.
        device: where to compute.
        second_forward: for the pixel error, as one does whose loss does not give it.
    """
    use_plain_attention(model)
    model, optimizer = model.to(device).train(), config.optimizer
    adam = torch.optim.AdamW(
        model.parameters(),
        lr=optimizer.lr,
        betas=(optimizer.betas[0], optimizer.betas[1]),
        weight_decay=optimizer.weight_decay,
        fused=False,
        foreach=False,
    )

    def step() -> float:
        x, noise = batch.tiles.to(device).permute(0, 3, 1, 2).contiguous().float(), batch.noise.to(device)
        mask = torch.isfinite(x).float()
        x = torch.nan_to_num(x)
        adam.zero_grad()
        loss, x_hat = plain_loss(model, x, mask, noise)
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            if second_forward:
                x_hat = model.decode(model.encode(x).sample(noise))
            (((x - x_hat) ** 2 * mask).sum() / mask.sum()).item()
        nn.utils.clip_grad_norm_(model.parameters(), config.training.grad_clip)
        adam.step()
        return loss.item()

    return step


def flop_per_tile(config: TrainConfig) -> dict[str, int]:
    """Of a forward pass, and of a training step; counted on torch's meta device, without arithmetic."""
    model = construct(dump_config(config.model), "meta")
    use_plain_attention(model)
    assert config.model.shape is not None
    x = torch.empty(1, *config.model.shape, device="meta")
    size = config.data.tile_size // model.scale
    noise = torch.empty(1, config.model.embed_dim, size, size, device="meta")
    with FlopCounterMode(display=False) as counter:
        loss, _ = plain_loss(model, x, torch.ones_like(x), noise)
        forward = counter.get_total_flops()
        loss.backward()  # type: ignore[no-untyped-call]
    return {"forward": forward, "training": counter.get_total_flops()}


# --- measuring --------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least, most, and all."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "all": list(values)}


def seconds(function: Callable[[], Any], device: torch.device, n: int) -> float:
    """Of one call, of n that follow each other."""
    begun = time.perf_counter()
    for _ in range(n):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / n


def flags() -> tuple[bool, ...]:
    """torch's settings, of the whole process, that the modes differ in."""
    cudnn = torch.backends.cudnn
    return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark


def set_flags(values: tuple[bool, ...]) -> None:
    """As ``flags`` gives them."""
    cudnn = torch.backends.cudnn
    torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = values


Product = tuple[str, Callable[[], Any], float]  # its name, what computes it, its FLOP


def matrix_product(device: torch.device, dtype: torch.dtype, size: int) -> Product:
    """Of two square matrices."""
    n = 8 * size
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return f"matrices of {n} x {n}", partial(torch.matmul, a, b), 2 * n**3


def convolution(
    kernel: int, layout: torch.memory_format, device: torch.device, dtype: torch.dtype, size: int
) -> Product:
    """Of two images of 64 x 64."""
    x = torch.randn(2, size, 64, 64, device=device, dtype=dtype).to(memory_format=layout)
    w = torch.randn(size, size, kernel, kernel, device=device, dtype=dtype).to(memory_format=layout)
    name = f"{kernel}x{kernel} convolution of {size} channels, {'NCHW' if layout == NCHW else 'channels_last'}"
    return name, partial(F.conv2d, x, w, padding=kernel // 2), 2 * x.numel() * size * kernel**2


def measure_rates(make: Callable[[int], Product], device: torch.device, size: int, budget: float) -> dict[str, float]:
    """TFLOP/s of a product in four sizes, by name.

    Sizes grow, and one that would take too long at the rate of the last is left out: a precision without instructions
    of its own can be a hundred times slower.

    Args:
        make: gives the product of a size.
        device: where it is computed.
        size: the largest.
        budget: seconds for all sizes.
    """
    end, rates, rate = time.perf_counter() + budget, dict[str, float](), 0.0
    for part in (8, 4, 2, 1):
        name, compute, flop = make(max(1, size // part))
        if rates and 5 * flop / rate > end - time.perf_counter():
            break
        seconds(compute, device, 1)  # what happens once
        once = seconds(compute, device, 1)
        n = max(1, int(budget / 20 / once))
        rate = flop / min(once, *(seconds(compute, device, n) for _ in range(3)))
        rates[name] = rate / 1e12
    return rates


def measure_peaks(device: torch.device, size: int, budget: float) -> dict[str, dict[str, Any]]:
    """TFLOP/s by precision: the highest, of which product that is, and of all that were tried.

    Args:
        device: where to compute.
        size: scale of the largest products.
        budget: seconds.
    """
    kinds = [matrix_product]
    if device.type == "cpu":
        kinds += [partial(convolution, *each) for each in product((1, 3), (NCHW, CHANNELS_LAST))]
    precisions = ("float32", "tf32", "bf16") if device.type == "cuda" else ("float32", "bf16")
    found: dict[str, dict[str, Any]] = {}
    for precision in precisions:
        say(f"the peak in {precision}")
        tf32 = precision == "tf32"
        set_flags((tf32, tf32, False, False))
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        share, rates = budget / len(precisions) / len(kinds), dict[str, float]()
        for kind in kinds:
            rates |= measure_rates(partial(kind, device, dtype), device, size, share)
        best = max(rates, key=lambda name: rates[name])
        found[precision] = {"tflop_per_s": rates[best], "of": best, "all": rates}
    return found


def in_children(function: Callable[..., T], calls: Sequence[tuple[Any, ...]]) -> list[T]:
    """Call a function with each of several arguments, at the same time, in a process of its own each.

    The processes are forked from one that has imported everything and done nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["spectralvae.training.engine", "torch.distributed.nn"])
    with ProcessPoolExecutor(len(calls), mp_context=context) as pool:
        futures = [pool.submit(function, *arguments) for arguments in calls]
        return [future.result() for future in futures]


def peak_memory(function: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """Peak RSS of a process that makes a call: what it has more than before, and what it had before."""
    [found] = in_children(_peak_memory, [(torch.get_num_threads(), function, *arguments)])
    return found


def _peak_memory(n_threads: int, function: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    torch.set_num_threads(n_threads)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    function(*arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"memory_mb": (peak - before) / 1e6, "imports_mb": before / 1e6}


def write_report(path: Path, settings: dict[str, Any], load_before: Sequence[float], found: dict[str, Any]) -> None:
    """What was found, beside all that it depends on."""
    report = {
        "machine": machine(["torch", "numpy"]),
        "threads": torch.get_num_threads(),
        "settings": {key: value for key, value in settings.items() if key != "json"},
        "load_before": load_before,
        "load_after": os.getloadavg(),
        **found,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
