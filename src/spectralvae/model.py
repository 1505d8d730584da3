"""The KL-regularised variational autoencoder for hyperspectral scenes: the whole network.

This is the ``AutoencoderKL`` of the research library mltools, key for key and number for
number: weights trained there load here and the other way round. It imports torch only.

Shape letters
    B  samples in a batch                 C  spectral channels of a scene
    H  W  height and width (y, x)         D  depth, for 3-D volumes: (C, D, H, W)
    S  "the spatial axes": H, W for images, D, H, W for volumes
    K  channels inside a block            L  levels of the pyramid, ``len(chs)``
    h  w  the spatial axes of the latents: H / 2^(L-1), W / 2^(L-1)
    Z  ``z_channels``: channels of the encoder's output before ``quant_conv``
    E  ``embed_dim``: channels of the latents
    P  positions an attention block looks at: its height times its width

    image (B, C, S) -> Encoder -> (B, 2Z, s) -> quant_conv -> moments (B, 2E, s)
    -> posterior mean, logvar (B, E, s) -> latents (B, E, s)
    -> post_quant_conv -> (B, Z, s) -> Decoder -> (B, C, S)

Two oddities are kept because trained checkpoints depend on them. (1) The last ``down`` of the
encoder and the last ``up`` of the decoder are built and saved but never used, so they get no
gradient. (2) The decoder looks for its attention levels with a size that is halved, not
doubled, from level to level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
NLL_LOSS_TYPES = ("l1", "l2")


def get_conv(
    ch_in: int,
    ch_out: int,
    *,
    dim: int = 2,
    kernel_size: int = 3,
    stride: int = 1,
    padding: int = 0,
    padding_mode: str = "zeros",
    transposed: bool = False,
) -> nn.Module:
    """A (transposed) convolution of 2 or 3 spatial dimensions.

    Raises:
        ValueError: for another number of dimensions.
    """
    if dim not in (2, 3):
        raise ValueError(f"convolutions have 2 or 3 spatial dimensions, not {dim}")
    if transposed:
        up = nn.ConvTranspose2d if dim == 2 else nn.ConvTranspose3d
        return up(ch_in, ch_out, kernel_size, stride=stride, padding=padding)
    conv = nn.Conv2d if dim == 2 else nn.Conv3d
    mode = cast(Literal["zeros", "reflect", "replicate", "circular"], padding_mode)
    return conv(ch_in, ch_out, kernel_size, stride, padding, padding_mode=mode)


def _same_conv(ch_in: int, ch_out: int, dim: int, kernel_size: int, padding_mode: str) -> nn.Module:
    """A convolution that keeps the size."""
    if kernel_size % 2 == 0:
        raise ValueError(f"conv_kernel_size = {kernel_size} must be odd, to keep the size")
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"conv_padding_mode = {padding_mode!r} is not one of {', '.join(PADDING_MODES)}")
    return get_conv(
        ch_in, ch_out, dim=dim, kernel_size=kernel_size, padding=kernel_size // 2, padding_mode=padding_mode
    )


def zero_init(module: nn.Module) -> nn.Module:
    """Set every parameter of ``module`` to zero, after it drew its initial values as usual."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _in_full_precision(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer in the precision of its weights, under autocast too: posterior and loss are made of what comes out."""
    if not torch.amp.is_autocast_available(x.device.type):  # torch's meta device
        return cast(Tensor, layer(x))
    with torch.autocast(x.device.type, enabled=False):
        return cast(Tensor, layer(x.to(next(layer.parameters()).dtype)))


def _group_norm(ch: int, groups: int, eps: float, affine: bool) -> nn.GroupNorm:
    if ch % groups:
        raise ValueError(f"{ch} channels cannot be split into norm_groups = {groups}: not a multiple")
    return nn.GroupNorm(groups, ch, eps=eps, affine=affine)


def _activation(act: str) -> nn.Module:
    if act not in ACTIVATIONS:
        raise ValueError(f"act = {act!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[act]()


class ResNetBlock(nn.Module):
    """x -> skip(x) + net2(net1(x)), where net2 starts as zero.

    Raises:
        ValueError: for channels that ``norm_groups`` does not divide, an even kernel, or an
            unknown activation or padding mode.
    """

    def __init__(
        self,
        ch_in: int,
        ch_out: int,
        *,
        dim: int = 2,
        dropout_prob: float = 0.0,
        norm_groups: int = 8,
        norm_eps: float = 1e-6,
        norm_affine: bool = True,
        act: str = "gelu",
        conv_kernel_size: int = 3,
        conv_padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        self.net1 = nn.Sequential(
            _group_norm(ch_in, norm_groups, norm_eps, norm_affine),
            _activation(act),
            _same_conv(ch_in, ch_out, dim, conv_kernel_size, conv_padding_mode),
        )
        dropout = [nn.Dropout(dropout_prob)] if dropout_prob > 0 else []
        self.net2 = nn.Sequential(
            _group_norm(ch_out, norm_groups, norm_eps, norm_affine),
            _activation(act),
            *dropout,
            zero_init(_same_conv(ch_out, ch_out, dim, conv_kernel_size, conv_padding_mode)),
        )
        if ch_in != ch_out:
            self.skip_conv = get_conv(ch_in, ch_out, dim=dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ch_in, S) -> (B, ch_out, S)"""
        h = self.net2(self.net1(x))
        return cast(Tensor, (self.skip_conv(x) if hasattr(self, "skip_conv") else x) + h)


class AttnBlock(nn.Module):
    """Self-attention over the pixels of an image, added to its input.

    The channel axis splits as (channels per head, head): the head index runs fastest.

    Raises:
        ValueError: for channels that ``n_attention_heads`` or ``norm_groups`` does not divide,
            and for volumes.
    """

    def __init__(
        self,
        ch: int,
        n_attention_heads: int = 1,
        *,
        dim: int = 2,
        norm_groups: int = 8,
        norm_eps: float = 1e-6,
        norm_affine: bool = True,
    ) -> None:
        super().__init__()
        if dim != 2:
            raise ValueError("attention works on images (C, H, W) only: set mid_attn to false and attn_sizes to []")
        if ch % n_attention_heads:
            raise ValueError(f"{ch} channels cannot be split into n_attention_heads = {n_attention_heads}")
        self.n_attention_heads = n_attention_heads
        self.norm = _group_norm(ch, norm_groups, norm_eps, norm_affine)
        self.q = get_conv(ch, ch, kernel_size=1)
        self.k = get_conv(ch, ch, kernel_size=1)
        self.v = get_conv(ch, ch, kernel_size=1)
        self.proj_out = get_conv(ch, ch, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, K, H, W) -> (B, K, H, W)"""
        if x.ndim != 4:
            raise ValueError(f"attention takes (B, K, H, W), not a tensor of shape {tuple(x.shape)}")

        def split(t: Tensor) -> Tensor:
            t = t.reshape(t.shape[0], -1, self.n_attention_heads, t.shape[2] * t.shape[3])  # (B, K/heads, heads, P)
            return t.permute(0, 2, 3, 1).contiguous()  # (B, heads, P, K/heads); as views, torch.compile misreads them

        normed = self.norm(x)
        q, k, v = split(self.q(normed)), split(self.k(normed)), split(self.v(normed))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, heads, P, K/heads), scores times (K/heads)^-1/2
        h = h.permute(0, 3, 1, 2).reshape(x.shape)  # (B, K/heads, heads, P) -> (B, K, H, W)
        return cast(Tensor, x + self.proj_out(h))


def _attention_block(ch: int, n_attention_heads: int, dim: int, block: dict[str, Any]) -> AttnBlock:
    norm = {key: value for key, value in block.items() if key.startswith("norm_")}
    return AttnBlock(ch, n_attention_heads, dim=dim, **norm)


class _Level(nn.Module):
    """The residual blocks of one level, each followed by attention if asked for.

    Args:
        ch_in, ch_out: channels before and after the first block.
        num_res_blocks: how many.
        attention: whether each is followed by attention of ``n_attention_heads`` heads.
        dim: 2 for images, 3 for volumes.
        block: keyword arguments of ResNetBlock.
    """

    def __init__(
        self,
        ch_in: int,
        ch_out: int,
        *,
        num_res_blocks: int = 1,
        attention: bool = False,
        n_attention_heads: int = 1,
        dim: int = 2,
        **block: Any,
    ) -> None:
        super().__init__()
        self.resnet_blocks = nn.ModuleList()
        self.attention_blocks = nn.ModuleList()
        for i in range(num_res_blocks):  # built in turn: the order decides the initial weights
            self.resnet_blocks.append(ResNetBlock(ch_in if i == 0 else ch_out, ch_out, dim=dim, **block))
            attn = _attention_block(ch_out, n_attention_heads, dim, block) if attention else None
            self.attention_blocks.append(cast(nn.Module, attn))  # a ModuleList takes None and keeps its place

    def run_blocks(self, x: Tensor) -> Tensor:
        """(B, ch_in, S) -> (B, ch_out, S)"""
        for resnet_block, attention_block in zip(self.resnet_blocks, self.attention_blocks, strict=True):
            x = resnet_block(x)
            if attention_block is not None:
                x = attention_block(x)
        return x


class ResNetDown(_Level):
    """One level of the encoder: its blocks (ch_in -> ch_out), then half the size."""

    def __init__(self, ch_in: int, ch_out: int, *, dim: int = 2, **level: Any) -> None:
        super().__init__(ch_in, ch_out, dim=dim, **level)
        self.down = get_conv(ch_out, ch_out, dim=dim, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ch_in, S) -> (B, ch_out, S/2)"""
        return cast(Tensor, self.down(self.run_blocks(x)))


class ResNetUp(_Level):
    """One level of the decoder: its blocks (ch_in -> ch_in), then twice the size in ch_out channels."""

    def __init__(self, ch_in: int, ch_out: int, *, dim: int = 2, **level: Any) -> None:
        super().__init__(ch_in, ch_in, dim=dim, **level)
        self.up = get_conv(ch_in, ch_out, dim=dim, kernel_size=2, stride=2, transposed=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ch_in, S) -> (B, ch_out, 2S)"""
        return cast(Tensor, self.up(self.run_blocks(x)))


class _Coder(nn.Module):
    """What Encoder and Decoder share: their settings (``enc_dec_params``), and the checks of these.

    Args:
        shape: (C, H, W), or (C, D, H, W) for volumes: what the network is trained on. Other sizes
            may pass through it; ``attn_sizes`` is compared with ``shape[1]``.
        chs: channels of each level, from full size to the smallest.
        attn_sizes: sizes, counted on ``shape[1]``, at which every residual block is followed by attention.
        mid_attn: attention between the two middle blocks.
        num_res_blocks: residual blocks a level.
        dropout_prob: dropout inside the residual blocks; 0 leaves the layer out.
        z_channels: Z.
        double_z: must be true: ``quant_conv`` takes a mean and a logvar for each of the Z channels.
        n_attention_heads, norm_groups: divisors of every channel count they meet.
        norm_eps, norm_affine: of every GroupNorm.
        act: gelu, relu or silu.
        conv_kernel_size: odd.
        conv_padding_mode: zeros, reflect, replicate or circular.

    Raises:
        ValueError: for a setting outside these limits.
    """

    def __init__(
        self,
        shape: Sequence[int],
        chs: Sequence[int] = (48, 96, 192),
        attn_sizes: Sequence[int] = (),
        mid_attn: bool = False,
        num_res_blocks: int = 1,
        dropout_prob: float = 0.0,
        z_channels: int = 4,
        double_z: bool = True,
        n_attention_heads: int = 1,
        norm_groups: int = 8,
        norm_eps: float = 1e-6,
        norm_affine: bool = True,
        act: str = "gelu",
        conv_kernel_size: int = 3,
        conv_padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        if len(shape) not in (3, 4):
            raise ValueError(f"shape = {list(shape)} must be (C, H, W), or (C, D, H, W) for volumes")
        if not chs or min(*shape, *chs, num_res_blocks, z_channels, n_attention_heads, norm_groups) < 1:
            raise ValueError(
                "shape, chs, num_res_blocks, z_channels, n_attention_heads and norm_groups must be at least 1"
            )
        if not double_z:
            raise ValueError("double_z = false cannot work: quant_conv takes a mean and a logvar for each z channel")
        self.shape, self.chs, self.z_channels = tuple(shape), tuple(chs), z_channels
        self.attn_sizes, self.mid_attn, self.num_res_blocks = tuple(attn_sizes), mid_attn, num_res_blocks
        self.n_attention_heads = n_attention_heads
        self.dim = len(shape) - 1
        self.scale = 2 ** (len(chs) - 1)
        self.block: dict[str, Any] = {
            "dropout_prob": dropout_prob,
            "norm_groups": norm_groups,
            "norm_eps": norm_eps,
            "norm_affine": norm_affine,
            "act": act,
            "conv_kernel_size": conv_kernel_size,
            "conv_padding_mode": conv_padding_mode,
        }
        if any(size % self.scale for size in shape[1:]):
            raise ValueError(
                f"shape = {list(shape)}: the {len(chs)} levels need every size to be a multiple of {self.scale}"
            )

    def _conv(self, ch_in: int, ch_out: int) -> nn.Module:
        return _same_conv(ch_in, ch_out, self.dim, self.block["conv_kernel_size"], self.block["conv_padding_mode"])

    def _level(self, size: int) -> dict[str, Any]:
        """The settings of the level whose size is counted as ``size``."""
        return {
            "num_res_blocks": self.num_res_blocks,
            "attention": size in self.attn_sizes,
            "n_attention_heads": self.n_attention_heads,
            "dim": self.dim,
            **self.block,
        }

    def _build_mid(self, ch: int) -> None:
        self.mid1 = ResNetBlock(ch, ch, dim=self.dim, **self.block)
        if self.mid_attn:
            self.mid_attn1 = _attention_block(ch, self.n_attention_heads, self.dim, self.block)
        self.mid2 = ResNetBlock(ch, ch, dim=self.dim, **self.block)

    def _run_mid(self, x: Tensor) -> Tensor:
        """(B, K, s) -> (B, K, s)"""
        x = self.mid1(x)
        if self.mid_attn:
            x = self.mid_attn1(x)
        return cast(Tensor, self.mid2(x))

    def _build_out(self, ch: int, ch_out: int) -> None:
        self.norm_out = _group_norm(ch, self.block["norm_groups"], self.block["norm_eps"], self.block["norm_affine"])
        self.act_out = _activation(self.block["act"])
        self.conv_out = zero_init(self._conv(ch, ch_out))

    def _run_out(self, x: Tensor) -> Tensor:
        """(B, K, S) -> (B, ch_out, S)"""
        return _in_full_precision(self.conv_out, self.act_out(self.norm_out(x)))


class Encoder(_Coder):
    """Image to moments before ``quant_conv``. Takes ``enc_dec_params`` (see the arguments of _Coder)."""

    def __init__(self, shape: Sequence[int], **settings: Any) -> None:
        super().__init__(shape, **settings)
        chs = self.chs
        self.conv_in = self._conv(self.shape[0], chs[0])
        self.downs = nn.ModuleList()
        for i, ch in enumerate(chs):
            size = self.shape[1] // 2**i
            self.downs.append(ResNetDown(chs[max(i - 1, 0)], ch, **self._level(size)))
        self._build_mid(chs[-1])
        self._build_out(chs[-1], 2 * self.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, S) -> (B, 2Z, s)

        Raises:
            ValueError: for other channels or dimensions, and for sizes that the levels cannot halve evenly.
        """
        if x.ndim != self.dim + 2 or x.shape[1] != self.shape[0]:
            axes = "height, width" if self.dim == 2 else "depth, height, width"
            raise ValueError(
                f"the network takes (batch, {self.shape[0]} channels, {axes}), not a tensor of shape {tuple(x.shape)}"
            )
        if any(size % self.scale for size in x.shape[2:]):
            raise ValueError(
                f"an input of {' x '.join(map(str, x.shape[2:]))} does not fit the network: "
                f"its {len(self.chs)} levels need every size to be a multiple of {self.scale}"
            )
        h = self.conv_in(x)  # (B, chs[0], S)
        *downs, last = cast(list[ResNetDown], list(self.downs))
        for down in downs:
            h = down(h)  # (B, chs[i], S / 2^(i+1))
        h = last.run_blocks(h)  # (B, chs[-1], s): oddity 1, last.down is never used
        return self._run_out(self._run_mid(h))


class Decoder(_Coder):
    """Latents after ``post_quant_conv`` to an image. Takes ``enc_dec_params`` (see the arguments of _Coder)."""

    def __init__(self, shape: Sequence[int], **settings: Any) -> None:
        super().__init__(shape, **settings)
        chs = self.chs
        self.conv_in = self._conv(self.z_channels, chs[-1])
        self._build_mid(chs[-1])
        self.ups = nn.ModuleList()
        size = self.shape[1] // self.scale
        for i in reversed(range(len(chs))):
            self.ups.append(ResNetUp(chs[i], chs[max(i - 1, 0)], **self._level(size)))
            size //= 2  # oddity 2: the true size doubles here
        self._build_out(chs[0], self.shape[0])

    def forward(self, z: Tensor) -> Tensor:
        """(B, Z, s) -> (B, C, S)"""
        h = self._run_mid(self.conv_in(z))  # (B, chs[-1], s)
        *ups, last = cast(list[ResNetUp], list(self.ups))
        for up in ups:
            h = up(h)  # (B, chs[i-1], 2^(L-i) s)
        h = last.run_blocks(h)  # (B, chs[0], S): oddity 1, last.up is never used
        return self._run_out(h)


class DiagonalGaussianDistribution:
    """A normal distribution with independent components, one a latent value.

    Args:
        moments: (B, 2E, s): mean and logvar, halves of the channel axis; logvar is clamped to [-30, 20].
    """

    def __init__(self, moments: Tensor) -> None:
        self.mean, logvar = moments.chunk(2, dim=1)  # (B, E, s) each
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """mean + std * noise, (B, E, s); without ``noise`` it is drawn from torch's global generator."""
        if noise is None:
            noise = torch.randn(self.mean.shape, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """(B, E, s)"""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """Kullback-Leibler divergence from ``other`` (default: the standard normal), in nats, (B,).

        Kingma & Welling 2014, arXiv 1312.6114, appendix B; summed over all but the batch.
        """
        if other is None:
            terms = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            terms = (self.mean - other.mean) ** 2 / other.var + self.var / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.flatten(1).sum(1)

    def nll(self, sample: Tensor) -> Tensor:
        """Negative log-likelihood of ``sample`` (B, E, s), in nats, (B,)."""
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * terms.flatten(1).sum(1)


class AutoencoderKL(nn.Module):
    """Encoder, posterior, decoder and loss.

    Args:
        enc_dec_params: keyword arguments of both Encoder and Decoder (see the arguments of _Coder).
        embed_dim: E.
        learning_rate, weight_decay: not used; taken so that construction code written for mltools runs.
        nll_loss_type: l1, |x - x_hat|, or l2, (x - x_hat)^2.
        kl_weight: factor of the KL term.

    Raises:
        ValueError: for a setting outside its limits.
        TypeError: for an argument that the network does not know.
    """

    def __init__(
        self,
        enc_dec_params: dict[str, Any],
        embed_dim: int = 8,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-5,
        nll_loss_type: str = "l1",
        kl_weight: float = 1e-6,
    ) -> None:
        super().__init__()
        if nll_loss_type not in NLL_LOSS_TYPES:
            raise ValueError(f"nll_loss_type = {nll_loss_type!r} is not one of {', '.join(NLL_LOSS_TYPES)}")
        if embed_dim < 1:
            raise ValueError(f"embed_dim = {embed_dim} must be at least 1")
        self.embed_dim = embed_dim
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.nll_loss_type = nll_loss_type
        self.kl_weight = kl_weight
        # built in the order of mltools: it decides the initial weights
        self.encoder = Encoder(**enc_dec_params)
        self.decoder = Decoder(**enc_dec_params)
        self.scale = self.encoder.scale  # how many times smaller the latents are along each spatial axis
        z_channels, dim = self.encoder.z_channels, self.encoder.dim
        self.quant_conv = get_conv(2 * z_channels, 2 * embed_dim, dim=dim, kernel_size=1)
        self.post_quant_conv = get_conv(embed_dim, z_channels, dim=dim, kernel_size=1)
        self.logvar = nn.Parameter(torch.tensor(0.0))

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """(B, C, S) -> the posterior of the latents, (B, E, s), in the precision of the weights"""
        return DiagonalGaussianDistribution(_in_full_precision(self.quant_conv, self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """(B, E, s) -> (B, C, S), in the precision of the weights"""
        return cast(Tensor, self.decoder(self.post_quant_conv(z)))

    def forward(self, x: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """(B, C, S) -> reconstruction (B, C, S) from a sample of the posterior (or its mode), and the posterior"""
        posterior = self.encode(x)
        return self.decode(posterior.sample() if sample_posterior else posterior.mode()), posterior

    def get_loss(
        self, x: Tensor, mask: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss from one forward pass.

        nll = sum over valid samples of (rec / exp(logvar) + logvar) / B, with rec = |x - x_hat| (l1)
        or (x - x_hat)^2 (l2); loss = nll + kl_weight * sum(KL) / B.

        Args:
            x: (B, C, S); may hold anything, NaN included, where ``mask`` is False.
            mask: bool (B, C, S), True = valid. The network sees 0 elsewhere, and neither term of the nll
                counts it; B stays the divisor. Default: all valid.
            noise: (B, E, s), standard normal, in place of a draw from torch's global generator.

        Returns:
            The loss, and detached scalars: ``loss``, ``nll_loss``, ``kl_loss``, ``pixel_mse`` (mean of
            (x - x_hat)^2 over valid samples; NaN if there are none) and ``n_valid``.

        Raises:
            ValueError: for a mask or noise of another shape or type.
        """
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != x.shape:
                raise ValueError(
                    f"mask must be bool of shape {tuple(x.shape)}, not {mask.dtype} of shape {tuple(mask.shape)}"
                )
            x = x.masked_fill(~mask, 0.0)
        posterior = self.encode(x)
        if noise is not None and noise.shape != posterior.mean.shape:
            raise ValueError(f"noise must have shape {tuple(posterior.mean.shape)}, not {tuple(noise.shape)}")
        return self.loss_of(x, self.decode(posterior.sample(noise)), posterior, mask)

    def loss_of(
        self, x: Tensor, x_hat: Tensor, posterior: DiagonalGaussianDistribution, mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a reconstruction, as `get_loss` defines and returns it.

        Args:
            x, x_hat: (B, C, S), finite.
            posterior: of the latents, (B, E, s).
            mask: bool (B, C, S), True = valid.
        """
        difference = x - x_hat
        if mask is not None:
            difference = difference.masked_fill(~mask, 0.0)
            n_valid = mask.sum()
        else:
            n_valid = torch.tensor(x.numel(), device=x.device)
        squared = difference.detach().square().sum() if self.nll_loss_type == "l1" else difference.square().sum()
        rec = difference.abs().sum() if self.nll_loss_type == "l1" else squared
        nll = (rec / self.logvar.exp() + n_valid * self.logvar) / x.shape[0]
        kl = self.kl_weight * posterior.kl().sum() / x.shape[0]
        loss = nll + kl
        metrics = {
            "loss": loss.detach(),
            "nll_loss": nll.detach(),
            "kl_loss": kl.detach(),
            "pixel_mse": squared.detach() / n_valid,
            "n_valid": n_valid,
        }
        return loss, metrics
