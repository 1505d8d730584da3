"""The objective: one forward pass, its loss and its metrics. Training, validation, figures and `evaluate` call it.

Shapes: B tiles, C channels, (y, x) pixels; E latent channels on (h, w) cells; P level-2 products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spectralvae.model import AutoencoderKL, DiagonalGaussianDistribution
from spectralvae.training.supervision import Supervision

# A metric by its name, as the sum over what it is a mean of, and how many there are: tensors on the device until
# `to_host`, then numbers. Both add up over batches and processes. loss, nll_loss and kl_loss are means over tiles,
# pixel_mse over valid samples, supervision_* over targets.
Sums = dict[str, tuple[Any, Any]]


class Reconstruction(NamedTuple):
    """A forward pass.

    Attributes:
        x: (B, C, y, x) what the network was given, 0 where invalid.
        mask: the same shape, True = valid.
        posterior: of the latents.
        latents: (B, E, h, w) what was decoded.
        x_hat: (B, C, y, x) the reconstruction.
    """

    x: Tensor
    mask: Tensor
    posterior: DiagonalGaussianDistribution
    latents: Tensor
    x_hat: Tensor


class Outcome(NamedTuple):
    """A forward pass with its loss.

    Attributes:
        loss: scalar, in nats a tile, to be differentiated.
        sums: of the metrics, detached.
        reconstruction: of the tiles.
    """

    loss: Tensor
    sums: Sums
    reconstruction: Reconstruction


class Objective(nn.Module):
    """The network, and what is trained beside it; DistributedDataParallel and torch.compile wrap ``forward``.

    Args:
        model: the network.
        supervision: the head of a supervised run. In training it predicts from the sampled latents, in eval mode from
            the posterior's mode.
    """

    def __init__(self, model: AutoencoderKL, supervision: Supervision | None = None) -> None:
        super().__init__()
        self.model, self.supervision = model, supervision

    def reconstruct(self, x: Tensor, mask: Tensor, noise: Tensor) -> Reconstruction:
        """Encode and decode.

        Args:
            x: (B, C, y, x) z; may hold anything, NaN included, where ``mask`` is False.
            mask: the same shape, True = valid.
            noise: (B, E, h, w), standard normal; zeros decode the posterior's mode.
        """
        x = x.masked_fill(~mask, 0.0)
        posterior: DiagonalGaussianDistribution = self.model.encode(x)
        latents = posterior.sample(noise)
        return Reconstruction(x, mask, posterior, latents, self.model.decode(latents))

    def forward(self, x: Tensor, mask: Tensor, noise: Tensor, targets: Tensor | None = None) -> Outcome:
        """The loss of a batch and its metrics.

        A further term is added to ``loss`` as a mean over tiles, so that neither the parts of a step nor the processes
        change it, and logged under a name of its own in ``sums``, a tensor on the device: the metric ``loss`` stays
        that of the network.

        Args:
            x, mask, noise: as of ``reconstruct``.
            targets: (B, P, h, w), standardised, NaN = invalid; None leaves the head out.
        """
        found = self.reconstruct(x, mask, noise)
        loss, parts = self.model.loss_of(found.x, found.x_hat, found.posterior, mask)
        n_valid = parts["n_valid"]
        n_tiles = torch.full_like(n_valid, len(x))
        sums: Sums = {name: (parts[name].double() * n_tiles, n_tiles) for name in ("loss", "nll_loss", "kl_loss")}
        sums["pixel_mse"] = (parts["pixel_mse"].double() * n_valid, n_valid)
        if self.supervision is not None and targets is not None:
            latents = found.latents if self.training else found.posterior.mode()
            errors = self.supervision(latents, targets)
            loss = loss + self.supervision.loss_of(errors, found.x, latents)
            for product, (squares, n_targets) in zip(self.supervision.products, errors.detach(), strict=True):
                sums[f"supervision_{product}"] = (squares, n_targets)
        return Outcome(loss, sums, found)


def add(first: Sums, second: Sums) -> Sums:
    """Sums over two batches; ``first`` may be empty."""
    nothing = (0.0, 0.0)
    return {
        name: (first.get(name, nothing)[0] + total, first.get(name, nothing)[1] + weight)
        for name, (total, weight) in second.items()
    }


def to_host(sums: Sums) -> dict[str, tuple[float, float]]:
    """Sums as numbers; waits for the device once."""
    values = torch.stack([value.double() for pair in sums.values() for value in pair]).tolist()
    return dict(zip(sums, zip(values[::2], values[1::2], strict=True), strict=True))


def means(sums: Mapping[str, Any]) -> dict[str, float]:
    """The metrics; one of nothing (a product without a valid target) is left out."""
    found = {}
    for name, (total, weight) in sums.items():
        if weight or total:  # not-a-number of nothing is kept: such a step must stop
            found[name] = float(total / weight) if weight else math.nan
    return found
