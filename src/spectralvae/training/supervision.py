"""Supervised latents: a head that predicts level-2 products from the latents, and its part of the loss.

The head is trained with the network and stays with the run: it is no part of the model, which is loaded, exported and
used without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from spectralvae.config import TrainConfig
from spectralvae.data import sampling
from spectralvae.model import get_conv, zero_init


class Supervision(nn.Module):
    """1x1 convolutions on the grid of the latents, with GELU between them: (B, E, h, w) -> (B, P, h, w).

    The last layer begins as 0, so that the first prediction is the mean of the training scenes.

    Args:
        weights: of each product in the loss, above 0, in the order of the targets.
        embed_dim: E.
        hidden: features of the hidden layers; none for a linear head.
        seed: of the first weights; torch's global random state stays as it was.

    Attributes:
        products: their names.
    """

    weights: Tensor

    def __init__(self, weights: Mapping[str, float], embed_dim: int, hidden: Sequence[int], seed: int) -> None:
        super().__init__()
        self.products = list(weights)
        self.register_buffer("weights", torch.tensor(list(weights.values())), persistent=False)
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(sampling.head_seed(seed))  # torch.manual_seed would seed GPUs, too
            for ch_in, ch_out in zip([embed_dim, *hidden], hidden, strict=False):
                layers += [get_conv(ch_in, ch_out, kernel_size=1), nn.GELU()]
            layers.append(zero_init(get_conv([embed_dim, *hidden][-1], len(weights), kernel_size=1)))
        self.layers = nn.Sequential(*layers)

    @property
    def described(self) -> str:
        """In words: the products with their weights, and how large the head is."""
        weights = zip(self.products, self.weights.tolist(), strict=True)
        n = sum(p.numel() for p in self.parameters())
        return f"{', '.join(f'{product} {weight:g}' for product, weight in weights)}; {n:,} parameters of its own"

    def forward(self, latents: Tensor, targets: Tensor) -> Tensor:
        """Errors of the predictions, in float32, as the targets are, under autocast, too.

        Args:
            latents: (B, E, h, w).
            targets: (B, P, h, w), standardised, NaN = invalid.

        Returns:
            (P, 2) by product: the sum of squared differences over valid targets, and their number.
        """
        invalid = torch.isnan(targets)
        # masked before they are squared: a square's gradient would be 0 times NaN
        difference = (self.layers(latents) - targets).masked_fill(invalid, 0.0)
        return torch.stack([difference.square().sum((0, 2, 3)), (~invalid).sum((0, 2, 3))], dim=1)

    def loss_of(self, errors: Tensor, x: Tensor, latents: Tensor) -> Tensor:
        """The head's part of a loss that is a sum over the samples of a tile and a mean over tiles.

        A target counts as its weight times the C s^2 samples of its cell. As the rest of the loss, it is a sum over
        tiles over their number, so that neither the parts of a step nor the processes change it.

        Args:
            errors: (P, 2), as of ``forward``.
            x: (B, C, y, x).
            latents: (B, E, h, w); y = h s, x = w s.
        """
        n_tiles, samples_of_cell = len(x), x[0].numel() // latents[0, 0].numel()
        return (self.weights * errors[:, 0]).sum() * (samples_of_cell / n_tiles)


def supervised_products(config: TrainConfig) -> dict[str, float]:
    """The weights above 0, in the order of their names: that of a config's keys means nothing."""
    weights = config.supervision.products if config.supervision else {}
    return {product: weight for product, weight in sorted(weights.items()) if weight > 0}


def build_supervision(config: TrainConfig) -> Supervision | None:
    """The head of a run with its first weights; None for a run without supervision."""
    weights = supervised_products(config)
    if not weights:
        return None
    assert config.supervision is not None
    return Supervision(weights, config.model.embed_dim, config.supervision.hidden, config.seed)
