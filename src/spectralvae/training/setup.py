"""What a training run is made of: store, tiles, network and device, checked before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from spectralvae.config import TrainConfig
from spectralvae.data.cache import SceneCache, scene_bytes
from spectralvae.data.loader import TargetReader, TileStream, make_sampler
from spectralvae.data.sampling import CropSampler
from spectralvae.data.store import Store
from spectralvae.model import AutoencoderKL
from spectralvae.runtime.device import choose_device
from spectralvae.runtime.ranks import Ranks
from spectralvae.training.engine import check_shares
from spectralvae.training.memory import check_batch_fits, check_cache
from spectralvae.training.network import check_forward, network_settings
from spectralvae.training.supervision import Supervision, build_supervision
from spectralvae.training.validation import Validation
from spectralvae.weights.settings import build_model


@dataclass(frozen=True)
class Setup:
    """A run, before its first step.

    Attributes:
        config: of the run.
        settings: the complete `model:` section.
        store: the data.
        device: where the network is to be moved.
        ranks: the processes.
        sampler: of the training tiles.
        model: the network with its first weights, on the CPU.
        supervision: the head that is trained with it; None without supervision.
        targets: reads the head's targets; None without supervision.
        validation: the validation tiles.
    """

    config: TrainConfig
    settings: dict[str, Any]
    store: Store
    device: torch.device
    ranks: Ranks
    sampler: CropSampler
    model: AutoencoderKL
    supervision: Supervision | None
    targets: TargetReader | None
    validation: Validation

    @property
    def n_parameters(self) -> int:
        """Number of parameters of the network."""
        return sum(p.numel() for p in self.model.parameters())

    def stream(self, first_step: int, num_workers: int, cache: SceneCache | None = None) -> TileStream:
        """This process's share of the training batches, from a step on."""
        return TileStream(
            self.store,
            self.sampler,
            batch_size=self.config.data.batch_size,
            tile_size=self.config.data.tile_size,
            noise_shape=self.validation.noise_shape,
            first_step=first_step,
            num_workers=num_workers,
            pin_memory=self.device.type == "cuda",
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            targets=self.targets,
            cache=cache,
        )


def set_up(config: TrainConfig, ranks: Ranks, console: Console) -> Setup:
    """A checked run, ready to start; nothing is written.

    Args:
        config: of the run.
        ranks: the processes.
        console: where to print which device was chosen.

    Raises:
        ConfigError, InputError: config or store will not do.
    """
    data, store = config.data, Store(config.data.store)
    settings = network_settings(config, store)
    batch_size = check_shares(config, ranks)
    check_forward(settings, batch_size)
    device = choose_device(config.training.device, ranks, console)
    check_batch_fits(batch_size, settings["shape"], device)
    scenes = store.indices("train")[: data.max_scenes]
    if data.cache:
        sizes = scene_bytes(store, scenes)
        check_cache(sizes, batch_size, settings["shape"], device, ranks.world_size, n_val_tiles=data.n_val_tiles)
    sampler = make_sampler(
        store,
        scenes,
        seed=config.seed,
        tile_size=data.tile_size,
        max_invalid_fraction=data.max_invalid_fraction,
    )
    torch.manual_seed(config.seed)
    model = build_model(settings)
    supervision = build_supervision(config)
    targets = None
    if supervision is not None:
        targets = TargetReader(store, supervision.products, [*scenes, *store.indices("val")], model.scale)
    latent_size = data.tile_size // model.scale
    validation = Validation(
        store,
        sampler,
        batch_size=batch_size,
        max_invalid_fraction=data.max_invalid_fraction,
        at_most=data.n_val_tiles,
        noise_shape=(settings["embed_dim"], latent_size, latent_size),
        targets=targets,
        keep_on=device if data.cache else None,
    )
    return Setup(config, settings, store, device, ranks, sampler, model, supervision, targets, validation)
