"""Configs of train and convert."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from spectralvae.config.base import (
    MAY_CHANGE,
    MAY_GROW,
    MAY_MOVE,
    CommandConfig,
    ConfigPath,
    Device,
    NormalizationConfig,
    PositiveInt,
    Product,
    Section,
    Seed,
    Wavelengths,
    refusal,
)

# --- train ------------------------------------------------------------------------------------


class DataConfig(Section):
    """What the network sees."""

    store: ConfigPath = Field(description="the store: output_dir of `prepare`", json_schema_extra=MAY_MOVE)
    batch_size: PositiveInt = Field(32, description="tiles in one step, of all processes together")
    tile_size: PositiveInt = Field(
        64,
        description="pixels of a tile along y and along x; a multiple of 2^(levels - 1): 4 with the default chs",
    )
    num_workers: Annotated[int, Field(ge=0)] = Field(
        2, description="reader threads; 0 reads between the steps", json_schema_extra=MAY_CHANGE
    )
    cache: bool = Field(
        False,
        description="read the training scenes and the validation tiles once, keep them in the memory of the device (of "
        "each process its own copy), and make the training tiles there",
        json_schema_extra=MAY_CHANGE,
    )
    max_invalid_fraction: float = Field(
        0.5, ge=0, lt=1, description="tiles with a larger share of invalid samples are not used"
    )
    n_val_tiles: PositiveInt = Field(64, description="at most so many validation tiles, always the same")
    max_scenes: PositiveInt | None = Field(None, description="use only the first so many training scenes")


class ModelConfig(Section):
    """The network (defaults: the 27.3 M parameters of the TEMPO run) and its loss."""

    shape: list[PositiveInt] | None = Field(
        None,
        min_length=3,
        max_length=3,
        description="[channel, y, x] of the input; follows from store and tile_size, so it is best left out",
    )
    chs: list[PositiveInt] = Field(
        [512, 256, 128],
        min_length=1,
        description="features at each level, full resolution first; each level halves the size of the one before",
    )
    attn_sizes: list[PositiveInt] = Field(
        [], description="sizes y (in pixels) at which residual blocks are followed by attention"
    )
    mid_attn: bool = Field(True, description="attention between the middle blocks")
    num_res_blocks: PositiveInt = Field(1, description="residual blocks at each level")
    dropout_prob: float = Field(0.0, ge=0, lt=1, description="share of features that training drops at random")
    z_channels: PositiveInt = Field(
        32, description="features of the encoder's output (mean and logvar have so many each)"
    )
    double_z: Literal[True] = Field(
        True, description="the encoder gives mean and logvar of the latents; anything else cannot work"
    )
    n_attention_heads: PositiveInt = Field(4, description="heads of each attention block; must divide the last of chs")
    norm_groups: PositiveInt = Field(
        8, description="groups of each normalisation layer; must divide every entry of chs"
    )
    norm_eps: float = Field(1e-6, gt=0, description="added to the variance in normalisation layers")
    norm_affine: bool = Field(True, description="normalisation layers learn a scale and an offset")
    act: Literal["gelu", "relu", "silu"] = Field("gelu", description="activation function")
    conv_kernel_size: PositiveInt = Field(3, description="pixels along y and x of each convolution; odd")
    conv_padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = Field(
        "zeros", description="what convolutions see beyond the edge of a tile"
    )
    embed_dim: PositiveInt = Field(32, description="latent channels")
    kl_weight: float = Field(1e-6, ge=0, description="weight of the KL term of the loss")
    nll_loss_type: Literal["l1", "l2"] = Field(
        "l1", description="the reconstruction term of the loss: absolute (l1) or squared (l2) differences of z"
    )
    logvar_init: float = Field(
        0.0, ge=-30, le=30, description="log-variance of the reconstruction term before training; it is learned"
    )


def _check_shape(shape: list[Any]) -> list[Any]:
    given = shape[:1] if all(size is None for size in shape[1:]) else shape
    if len(shape) not in (3, 4) or not all(type(size) is int and size >= 1 for size in given):
        raise refusal(limit="[C, H, W] or [C, D, H, W], whole numbers from 1, or with null for all sizes but C")
    return shape


class NetworkSettings(ModelConfig):
    """The same section of a checkpoint, an export or an mltools file, which may hold what `train` does not take."""

    shape: Annotated[list[Any], AfterValidator(_check_shape)] | None = None
    dropout_prob: float = Field(0.0, ge=0, le=1)
    logvar_init: float = 0.0


class OptimizerConfig(Section):
    """AdamW."""

    lr: float = Field(1e-4, gt=0, description="learning rate, after its warm-up and before its decay")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="steps over which the learning rate grows evenly from 0 to lr"
    )
    decay_steps: PositiveInt | None = Field(
        None,
        description="step at which the learning rate reaches 0, after its warm-up, along half a cosine; at least "
        "training.n_steps; if left out, it stays lr",
    )
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.9, 0.95],
        min_length=2,
        max_length=2,
        description="decay of the running mean of the gradient and of its square",
    )
    weight_decay: float = Field(0.05, ge=0, description="decoupled weight decay of AdamW (Loshchilov & Hutter 2019)")


class SupervisionConfig(Section):
    """Level-2 products to predict from the latents, by 1x1 convolutions on their grid.

    Targets are the store's transforms of the pixels, standardised and averaged over the pixels of a latent cell. The
    loss grows by the sum over products of weight x squared errors of the cells' targets x samples of a cell. The term
    of reconstruction is a sum over these samples, so that a weight of 1 lets the target of a cell count as much as all
    z of that cell together, if these count with their squared errors at logvar 0. In metrics.jsonl, `loss` stays that
    without supervision; supervision_PRODUCT is the mean squared error of a target.
    """

    products: dict[Product, Annotated[float, Field(ge=0)]] = Field(
        min_length=1, description="weight of each (PRODUCT: NO2, HCHO, O3TOT, CLDO4); 0 leaves it out"
    )
    hidden: list[PositiveInt] = Field(
        [512, 512], description="features of the head's hidden layers; [] makes it linear"
    )


class TrainingConfig(Section):
    """The run. Every `*_every` counts steps."""

    n_steps: PositiveInt = Field(
        200_000,
        description="updates of the weights; a larger number resumes a finished run",
        json_schema_extra=MAY_GROW,
    )
    save_every: PositiveInt = Field(
        5000,
        description="steps between checkpoints, each with a validation and a reconstruction figure",
        json_schema_extra=MAY_CHANGE,
    )
    val_every: PositiveInt = Field(
        50,
        description="steps between validations; checkpoints are validated in any case",
        json_schema_extra=MAY_CHANGE,
    )
    log_every: PositiveInt = Field(10, description="steps between rows of metrics.jsonl", json_schema_extra=MAY_CHANGE)
    plot_every: PositiveInt = Field(
        50,
        description="steps between updates of the plots in summary/; more where that takes over 2 % of the time",
        json_schema_extra=MAY_CHANGE,
    )
    grad_clip: float = Field(1.0, gt=0, description="longer gradients (norm over all weights) are scaled down to this")
    precision: Literal["32-true", "bf16-mixed"] = Field(
        "32-true",
        description="of the arithmetic: float32, or bfloat16 where it is safe (recent GPUs; faster, and "
        "fastest with tf32, for the layers that stay in float32)",
    )
    tf32: bool = Field(
        False,
        description="let float32 products on NVIDIA GPUs round their factors to 10 bits (TF32): faster, less exact",
    )
    gradient_accumulation: PositiveInt = Field(
        1, description="parts in which a step's tiles go through the network, one after the other: takes less memory"
    )
    compile: bool = Field(
        False, description="compile the network first (torch.compile): minutes at the start, faster steps"
    )
    device: Device = Field(
        "auto",
        description="auto (the GPU with the most free memory, else the CPU), cpu, cuda or cuda:N; of several "
        "processes on a machine, each takes its own GPU",
        json_schema_extra=MAY_CHANGE,
    )
    peer_timeout: float = Field(
        600,
        gt=0,
        description="seconds after which a process that does not answer the others ends the run",
        json_schema_extra=MAY_CHANGE,
    )
    init_from: ConfigPath | None = Field(
        None, description="start from these weights: a run, checkpoint, export, or mltools file"
    )
    keep_last: PositiveInt | None = Field(
        None, description="keep only so many newest checkpoints; if left out, all", json_schema_extra=MAY_CHANGE
    )
    keep_every: PositiveInt | None = Field(
        None,
        description="beside keep_last: keep the checkpoints at multiples of so many steps, too",
        json_schema_extra=MAY_CHANGE,
    )


class TrainConfig(CommandConfig):
    """`spectralvae train`."""

    resumable = True
    seed: Seed = Field(0, description="of the first weights, the choice of tiles, and the noise in the latents")
    data: DataConfig
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    supervision: SupervisionConfig | None = Field(
        None, description="level-2 products of the store to predict from the latents; if left out, none"
    )
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _learning_rate_stays_above_zero(self) -> TrainConfig:
        decay, warmup = self.optimizer.decay_steps, self.optimizer.warmup_steps
        if decay is None:
            return self
        if decay < self.training.n_steps:
            raise refusal(
                f"goes beyond optimizer.decay_steps ({decay}), where the learning rate is 0",
                key="training.n_steps",
                value=self.training.n_steps,
                remedy="raise optimizer.decay_steps, in a new output_dir if the run has begun",
            )
        if decay <= warmup:
            limit = f"larger than optimizer.warmup_steps ({warmup})"
            raise refusal(key="optimizer.decay_steps", value=decay, limit=limit)
        return self

    @model_validator(mode="after")
    def _tiles_can_be_halved(self) -> TrainConfig:
        factor = 2 ** (len(self.model.chs) - 1)
        if self.data.tile_size % factor:
            raise refusal(
                key="data.tile_size",
                value=self.data.tile_size,
                limit=f"a multiple of {factor} ({len(self.model.chs)} levels in model.chs)",
                remedy=f"the nearest is {max(1, round(self.data.tile_size / factor)) * factor}",
            )
        return self


DEBUG_OVERRIDES: dict[str, Any] = {
    "training.n_steps": 200,
    "training.plot_every": 20,
    "training.save_every": 50,
    "training.val_every": 25,
    "data.max_scenes": 2,
    "data.n_val_tiles": 8,
}


# --- convert ----------------------------------------------------------------------------------


class SpectraConfig(NormalizationConfig):
    """The statistics that belong to foreign weights."""

    mean: ConfigPath = Field(description="mean of each channel: mltools' mean_spectrum.pt")
    std: ConfigPath = Field(description="standard deviation of each channel: mltools' std_spectrum.pt")
    wavelength: list[float] | Wavelengths | ConfigPath | None = Field(
        None,
        description="channel centres in nm: a scene that the model is for, a TEMPO granule, say; or a list, or "
        "{first, last} evenly spaced. `encode` refuses scenes that differ by more than a channel, and needs to know",
    )
    band: str | None = Field(None, description="TEMPO band the model was trained on")


class ConvertConfig(CommandConfig):
    """`spectralvae convert`: a model to an export folder, or to a file for mltools."""

    source: ConfigPath = Field(description="mltools .pt/.ckpt, or a run, checkpoint or export of ours")
    model: dict[str, Any] | None = Field(None, description="mltools files: the `model:` section, as for train")
    normalization: SpectraConfig | None = Field(None, description="mltools files: the statistics of the same training")
    format: Literal["export", "mltools"] = Field(
        "export",
        description="export: a folder with weights, settings, normalisation and model card; mltools: .pt files",
    )
