"""Forward, backward, update: the network and its optimizer on their device, in one process or many."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from spectralvae.config import OptimizerConfig, TrainConfig
from spectralvae.data import sampling
from spectralvae.data.loader import Batch
from spectralvae.errors import ConfigError, RunError
from spectralvae.model import AttnBlock, AutoencoderKL
from spectralvae.runtime.placement import place, set_arithmetic
from spectralvae.runtime.ranks import Ranks
from spectralvae.training.objective import Objective, Outcome, Sums, add, to_host
from spectralvae.training.supervision import Supervision


def check_shares(config: TrainConfig, ranks: Ranks) -> int:
    """How many tiles go through the network at a time in each process.

    Raises:
        ConfigError: a step's tiles cannot be shared out evenly.
    """
    parts = ranks.world_size * config.training.gradient_accumulation
    if config.data.batch_size % parts:
        raise ConfigError(
            key="data.batch_size",
            value=config.data.batch_size,
            limit=f"a multiple of {parts}: number of processes ({ranks.world_size}) times "
            f"training.gradient_accumulation ({config.training.gradient_accumulation})",
        )
    return config.data.batch_size // parts


def idle_parameters(model: AutoencoderKL) -> list[nn.Parameter]:
    """Weights on which the output does not depend, in mltools' network as in ours.

    The two layers that it has but never uses have no gradient, and DistributedDataParallel would wait for them. A key
    bias adds the same to all scores of a query, which the softmax takes away again: its gradient is rounding noise,
    which AdamW would blow up to full steps, others with every number of processes.
    """
    never_used = (model.encoder.downs[-1].get_submodule("down"), model.decoder.ups[-1].get_submodule("up"))
    keys = [module.k for module in model.modules() if isinstance(module, AttnBlock)]
    return [p for layer in never_used for p in layer.parameters()] + [layer.get_parameter("bias") for layer in keys]


def out_of_memory(config: TrainConfig, device: torch.device) -> RunError:
    """What to say when the device's memory has run out."""
    kept = "leave data.cache false; or " if config.data.cache else ""
    return RunError(
        f"{device} is out of memory",
        key="data.batch_size",
        value=config.data.batch_size,
        remedy=f"{kept}lower it or raise training.gradient_accumulation ({config.training.gradient_accumulation}), in "
        f"a new output_dir; training.init_from: {config.output_dir} keeps what was learned",
    )


class Gradients(NamedTuple):
    """What a backward pass found; the gradients themselves are in the parameters.

    Attributes:
        sums: of this process's metrics, on the host.
        norm: scalar on the device, over all weights, the same in every process.
    """

    sums: dict[str, tuple[float, float]]
    norm: Tensor


class Engine:
    """A network in training. Weights on which its output does not depend (``idle_parameters``) stay as they are.

    Args:
        model: the network; it is moved to the device.
        config: of the run.
        device: where to compute.
        ranks: the processes.
        supervision: the head that is trained with it, and moved with it; its batches have targets.
    """

    def __init__(
        self,
        model: AutoencoderKL,
        config: TrainConfig,
        device: torch.device,
        ranks: Ranks,
        supervision: Supervision | None = None,
    ) -> None:
        training, optimizer = config.training, config.optimizer
        self.config, self.device, self.ranks = config, device, ranks
        set_arithmetic(device, tf32=training.tf32)
        self.memory_format = place(model, device, plain=training.compile or training.precision != "32-true")
        self.model = model.train()
        for idle in idle_parameters(model):
            idle.requires_grad_(False)
        self.supervision = supervision
        if supervision is not None:
            supervision.to(device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self.objective = Objective(model, supervision)
        self.parameters = [p for p in self.objective.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.objective.parameters(),
            lr=optimizer.lr,
            betas=(optimizer.betas[0], optimizer.betas[1]),
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        if training.compile:
            self.objective.compile()
        self._wrapped: Objective | DistributedDataParallel = self.objective
        if ranks.world_size > 1:
            devices = [device] if device.type == "cuda" else None
            with ranks.listening():
                self._wrapped = DistributedDataParallel(
                    self.objective, device_ids=devices, gradient_as_bucket_view=True
                )

    def to_device(self, tiles: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, y, x, C) with NaN -> x (B, C, y, x) float32, mask, noise, on the device; tiles may be there already."""
        x = tiles.to(self.device, non_blocking=True).permute(0, 3, 1, 2)  # a view, and channels_last
        x = x.to(torch.float32, memory_format=self.memory_format)
        return x, ~torch.isnan(x), noise.to(self.device, non_blocking=True)

    def autocast(self) -> torch.autocast:
        """The precision of the run; posterior and loss are float32 in any case."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.training.precision == "bf16-mixed")

    def gradients(self, batch: Batch) -> Gradients:
        """Forward and backward; the gradients, averaged over all processes, are in the parameters afterwards.

        Dropout, if there is any, is a pure function of (seed, step, rank).

        Args:
            batch: this process's share of a step.

        Returns:
            The sums of this process's metrics, grad_norm among them, and the norm for ``update``.

        Raises:
            LostPeerError: another process is gone.
        """
        torch.manual_seed(sampling.dropout_seed(self.config.seed, batch.step, self.ranks.rank))
        n_parts = self.config.training.gradient_accumulation
        sums: Sums = {}
        self.optimizer.zero_grad()
        for i, (tiles, noise, targets) in enumerate(self._parts(batch)):
            # processes average their gradients once a step, after the last part
            ddp = self._wrapped if isinstance(self._wrapped, DistributedDataParallel) else None
            alone = ddp.no_sync() if ddp and i < n_parts - 1 else nullcontext()
            with alone, self.ranks.listening():
                with self.autocast():
                    loss, more = self._wrapped(*self.to_device(tiles, noise), targets)[:2]  # the rest would take memory
                (loss / n_parts).backward()
            sums = add(sums, more)
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        return Gradients(to_host({**sums, "grad_norm": (norm, torch.ones_like(norm))}), norm)

    def _parts(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Tiles and noise that go through the network at a time, and their targets, which are on the device."""
        n_parts = self.config.training.gradient_accumulation
        targets: Sequence[Tensor | None] = [None] * n_parts
        if self.supervision is not None:
            assert batch.targets is not None
            targets = batch.targets.to(self.device, non_blocking=True).chunk(n_parts)
        return zip(batch.tiles.chunk(n_parts), batch.noise.chunk(n_parts), targets, strict=True)

    def order_buckets(self, batch: Batch) -> None:
        """Compute gradients that are thrown away, before the first step of a start of several processes.

        DistributedDataParallel rearranges its buckets after its first backward pass, and in which order gradients of
        three processes and more are added up follows from their places there: without this, the first step after each
        start would round otherwise than the same step of a run that was not interrupted.
        """
        if isinstance(self._wrapped, DistributedDataParallel):
            self.gradients(batch)

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, tuple[float, float]]:
        """As ``gradients``, of the network in eval mode and without any."""
        sums: Sums = {}
        for tiles, noise, targets in self._parts(batch):
            sums = add(sums, self.judge(tiles, noise, targets).sums)
        return to_host(sums)

    @torch.no_grad()
    def judge(self, tiles: Tensor, noise: Tensor, targets: Tensor | None = None) -> Outcome:
        """The objective in eval mode.

        Args:
            tiles: (B, y, x, C) with NaN.
            noise: (B, E, h, w).
            targets: (B, P, h, w) on the device; None leaves the head out.
        """
        self.objective.eval()
        with self.autocast():
            outcome: Outcome = self.objective.forward(*self.to_device(tiles, noise), targets)
        self.objective.train()
        return outcome

    def update(self, norm: Tensor, step: int) -> None:
        """Clip the gradients, whose norm is given, and let the optimizer take its step, after ``step`` others."""
        clip_grads_with_norm_(self.parameters, self.config.training.grad_clip, norm)
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.config.optimizer, step)
        self.optimizer.step()


def learning_rate(optimizer: OptimizerConfig, step: int) -> float:
    """Of the update after ``step`` others: a pure function of the config, so that no state of it need be kept.

    It grows evenly over the warm-up, and then falls along half a cosine (Loshchilov and Hutter 2017, without
    restarts) to 0 at ``decay_steps``.
    """
    warmup, decay = optimizer.warmup_steps, optimizer.decay_steps
    if step < warmup:
        return optimizer.lr * (step + 1) / warmup
    if decay is None:
        return optimizer.lr
    return optimizer.lr * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (decay - warmup)))
