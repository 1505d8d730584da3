"""Gradients of two processes against those of one: what each of the two does, started by `spectralvae doctor`.

``python -m spectralvae.training.rehearsal CONFIG TILE_SIZE RESULT``, with the launcher's variables in the environment.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectralvae.config import TrainConfig
from spectralvae.config.loading import load_config
from spectralvae.data.loader import TileStream, make_sampler
from spectralvae.data.store import Store
from spectralvae.errors import SpectralvaeError
from spectralvae.runtime.atomic import write_atomic
from spectralvae.runtime.ranks import Ranks, find_ranks
from spectralvae.training.engine import Engine
from spectralvae.training.network import network_settings
from spectralvae.training.objective import means
from spectralvae.weights.settings import build_model

WEIGHT_SPREAD = 0.02  # added to all weights: a fresh network ends in zeros, so most gradients would be 0
NEGLIGIBLE = 1e-5  # of the whole gradient: what is shorter is rounding


class _Gradients(NamedTuple):
    loss: float
    of: dict[str, Tensor]


def _gradients(config: TrainConfig, store: Store, tile_size: int, ranks: Ranks) -> _Gradients:
    """Of the first step, averaged over the processes."""
    data = config.data
    settings = {**network_settings(config, store), "dropout_prob": 0.0}
    torch.manual_seed(config.seed)
    model = build_model(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(WEIGHT_SPREAD * torch.randn(parameter.shape))
    engine = Engine(model, config, torch.device("cpu"), ranks)
    scenes = store.indices("train")[: data.max_scenes]
    sampler = make_sampler(
        store, scenes, seed=config.seed, tile_size=tile_size, max_invalid_fraction=data.max_invalid_fraction
    )
    stream = TileStream(
        store,
        sampler,
        batch_size=data.batch_size,
        tile_size=tile_size,
        noise_shape=(settings["embed_dim"], tile_size // model.scale, tile_size // model.scale),
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    loss = means(ranks.add(engine.gradients(next(iter(stream))).sums))["loss"]
    return _Gradients(loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def compare(config: TrainConfig, tile_size: int, ranks: Ranks) -> dict[str, Any]:
    """Largest relative deviation of the loss and, by weight tensor, of the gradients, in any process."""
    store = Store(config.data.store)
    together = _gradients(config, store, tile_size, ranks)
    alone = _gradients(config, store, tile_size, Ranks())
    assert together.of.keys() == alone.of.keys()
    whole = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in alone.of.values()]))
    deviations = {
        name: float(
            torch.linalg.vector_norm(together.of[name] - gradient)
            / torch.linalg.vector_norm(gradient).clamp(min=NEGLIGIBLE * whole)
        )
        for name, gradient in alone.of.items()
    }
    # max() passes over NaN
    worst = max(deviations, key=lambda name: (deviations[name] != deviations[name], deviations[name]))
    found = {
        "gradient": deviations[worst],
        "tensor": worst,
        "loss": abs(together.loss - alone.loss) / abs(alone.loss),
        "tensors": len(deviations),
    }
    return max(ranks.gather(found), key=lambda f: (f["gradient"] != f["gradient"], f["gradient"]))


def main(path: str, tile_size: str, result: str) -> int:
    """Compare, and write what was found as JSON; returns the exit code."""
    try:
        config = load_config(TrainConfig, Path(path))
        ranks = find_ranks()
        with ranks.joined(config.training.peer_timeout):
            found = compare(config, int(tile_size), ranks)
        if ranks.leads:
            write_atomic(Path(result), json.dumps(found))
    except SpectralvaeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
