"""The configs of all commands: their keys, limits and defaults.

Relative paths are taken from the folder the command is started in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator


def _to_path(value: Any) -> Path:
    if isinstance(value, Path) or (isinstance(value, str) and value):
        return Path(value).expanduser()
    raise ValueError("must be a path")


ConfigPath = Annotated[Path, BeforeValidator(_to_path), PlainSerializer(str)]
PositiveInt = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Product = Literal["NO2", "HCHO", "O3TOT", "CLDO4"]


class Section(BaseModel):
    """Part of a config: no unknown keys, no silent conversions, no changes after reading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class CommandConfig(Section):
    """What every command's config has."""

    output_dir: ConfigPath = Field(description="the command's own folder; must not hold anything else")


class Wavelengths(Section):
    """Evenly spaced channel centres."""

    first: float = Field(gt=0, description="centre of the first channel, nm")
    last: float = Field(gt=0, description="centre of the last channel, nm")


# --- simulate ---------------------------------------------------------------------------------


class SimulateConfig(CommandConfig):
    """`spectralvae simulate`: TEMPO-format granules with known truth."""

    seed: Seed = Field(0, description="the same seed gives the same granules")
    n_granules: PositiveInt = Field(2, description="one scan a day each")
    shape: list[PositiveInt] = Field(
        [131, 256], min_length=2, max_length=2, description="[mirror_step, xtrack]; a real granule has [131, 2048]"
    )
    n_channels: int = Field(1028, ge=16, description="spectral channels over 290-490 nm")
    products: list[Product] = Field(
        ["NO2", "HCHO", "O3TOT", "CLDO4"], description="level-2 products to write beside level 1"
    )
    invalid_fraction: float = Field(0.02, ge=0, lt=1, description="share of pixels that are swath-edge fill")


# --- prepare ----------------------------------------------------------------------------------


class InputSpec(Section):
    """A file or glob with what is needed to read it; a bare string is its path."""

    path: str = Field(min_length=1, description="file or glob")
    variable: str | None = Field(None, description="name of the array, where a file has several")
    size: list[PositiveInt] | None = Field(
        None, min_length=2, max_length=2, description="[y, x] of a bands x pixels array"
    )
    wavelength: list[float] | Wavelengths | None = Field(
        None, description="channel centres in nm: a list, or {first, last} evenly spaced; for files without"
    )
    region: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, min_length=4, max_length=4, description="[y0, y1, x0, x1]; disjoint regions of one file are scenes"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, data: Any) -> Any:
        return {"path": data} if isinstance(data, str) else data


class NormalizationConfig(Section):
    """How radiance becomes z."""

    transform: Literal["log_zscore", "zscore"] = Field(
        "log_zscore", description="log_zscore for radiance over decades; zscore for reflectance"
    )
    min_radiance: float | None = Field(
        None, gt=0, description="log_zscore only: smaller values are invalid; default 1.0"
    )
    clip: float = Field(10.0, gt=0, description="z is clipped to [-clip, clip]")

    @model_validator(mode="before")
    @classmethod
    def _resolve_min_radiance(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("transform", "log_zscore") == "log_zscore":
            return {**data, "min_radiance": 1.0 if data.get("min_radiance") is None else data["min_radiance"]}
        return data

    @model_validator(mode="after")
    def _only_log_has_min_radiance(self) -> NormalizationConfig:
        if self.transform == "zscore" and self.min_radiance is not None:
            raise ValueError("min_radiance belongs to log_zscore; under zscore zeros and negatives are valid")
        return self


class SplitConfig(Section):
    """Which scenes are kept for validation."""

    by: Literal["scene", "day"] | None = Field(
        None, description="what is never divided; default: day (UTC - 6 h) for TEMPO, else scene"
    )
    val_fraction: float = Field(0.2, ge=0, lt=1, description="share of scenes or days; 0 = no validation")
    seed: Seed = Field(0, description="of the choice")
    train: list[str] | None = Field(None, description="instead: names or globs of the training scenes")
    val: list[str] | None = Field(None, description="... and of the validation scenes")

    @model_validator(mode="after")
    def _lists_come_in_pairs(self) -> SplitConfig:
        if (self.train is None) != (self.val is None):
            raise ValueError("train and val are given together or not at all")
        return self


class PrepareConfig(CommandConfig):
    """`spectralvae prepare`: scenes to a store (output_dir is the store)."""

    inputs: list[InputSpec] = Field(min_length=1, description="files, globs, or {path, variable, ...}")
    band: str | None = Field(None, description="TEMPO: band_290_490_nm (default) or band_540_740_nm")
    normalization: NormalizationConfig = NormalizationConfig()
    split: SplitConfig = SplitConfig()
    dtype: Literal["float16", "float32"] = Field("float16", description="of z in the store")


# --- train ------------------------------------------------------------------------------------


class DataConfig(Section):
    """What the network sees."""

    store: ConfigPath = Field(description="output_dir of `prepare`")
    batch_size: PositiveInt = Field(32, description="tiles a step")
    tile_size: PositiveInt = Field(64, description="pixels along y and x")
    num_workers: Annotated[int, Field(ge=0)] = Field(2, description="reader threads; 0 reads between the steps")
    max_invalid_fraction: float = Field(0.5, ge=0, le=1, description="tiles with more invalid samples are not drawn")
    n_val_tiles: PositiveInt = Field(64, description="at most so many validation tiles, evenly over the fixed grid")
    max_scenes: PositiveInt | None = Field(None, description="use only the first so many training scenes")


class ModelConfig(Section):
    """The network (defaults: the 27.3 M parameters of the TEMPO run) and its loss."""

    shape: list[PositiveInt] | None = Field(
        None, min_length=3, max_length=3, description="[channel, y, x]; follows from store and tile_size"
    )
    chs: list[PositiveInt] = Field([512, 256, 128], min_length=1, description="channels a level, full size first")
    attn_sizes: list[PositiveInt] = Field([], description="sizes at which residual blocks are followed by attention")
    mid_attn: bool = Field(True, description="attention between the middle blocks")
    num_res_blocks: PositiveInt = Field(1, description="residual blocks a level")
    dropout_prob: float = Field(0.0, ge=0, lt=1)
    z_channels: PositiveInt = Field(32, description="channels of the encoder's output")
    double_z: Literal[True] = Field(True, description="mean and logvar; false cannot work")
    n_attention_heads: PositiveInt = Field(4, description="must divide the last of chs")
    norm_groups: PositiveInt = Field(8, description="of every GroupNorm; must divide every entry of chs")
    norm_eps: float = Field(1e-6, gt=0)
    norm_affine: bool = True
    act: Literal["gelu", "relu", "silu"] = "gelu"
    conv_kernel_size: PositiveInt = Field(3, description="odd")
    conv_padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros"
    embed_dim: PositiveInt = Field(32, description="channels of the latents")
    kl_weight: float = Field(1e-6, ge=0)
    nll_loss_type: Literal["l1", "l2"] = "l1"
    logvar_init: float = Field(0.0, description="start of the learned log-variance of the likelihood")


class OptimizerConfig(Section):
    """AdamW."""

    lr: float = Field(1e-4, gt=0)
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.95], min_length=2, max_length=2)
    weight_decay: float = Field(0.05, ge=0)


class TrainingConfig(Section):
    """The run. Every `*_every` counts steps."""

    n_steps: PositiveInt = 200_000
    save_every: PositiveInt = Field(5000, description="checkpoint and reconstruction figure")
    val_every: PositiveInt = 50
    log_every: PositiveInt = 10
    plot_every: PositiveInt = Field(50, description="rewrite the plots in summary/")
    grad_clip: float = Field(1.0, gt=0, description="largest norm of all gradients together")
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    compile: bool = Field(False, description="torch.compile the loss")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    init_from: ConfigPath | None = Field(
        None, description="start from these weights: a run, checkpoint, export, or mltools file"
    )
    keep_last: PositiveInt | None = Field(None, description="keep so many newest checkpoints; default: all")
    keep_every: PositiveInt | None = Field(None, description="also keep those at multiples of this")


class TrainConfig(CommandConfig):
    """`spectralvae train`."""

    seed: Seed = Field(0, description="of weights, tiles and noise")
    data: DataConfig
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()


DEBUG_OVERRIDES: dict[str, Any] = {
    "training.n_steps": 200,
    "training.plot_every": 20,
    "training.save_every": 50,
    "training.val_every": 25,
    "data.max_scenes": 2,
    "data.n_val_tiles": 8,
}


def may_change_on_resume(key: str, old: Any, new: Any) -> bool:
    """Whether a training run may go on with another value of a key (a moved store must have the same hash)."""
    if key == "training.n_steps":
        return bool(new > old)
    section, _, name = key.rpartition(".")
    return key in ("data.num_workers", "data.store", "training.device") or (
        section == "training" and (name.endswith("_every") or name.startswith("keep_"))
    )


# --- convert ----------------------------------------------------------------------------------


class SpectraConfig(NormalizationConfig):
    """The statistics that belong to foreign weights."""

    mean: ConfigPath = Field(description="mltools' mean_spectrum.pt")
    std: ConfigPath = Field(description="mltools' std_spectrum.pt")
    wavelength: list[float] | Wavelengths | None = Field(
        None, description="channel centres in nm: a list, or {first, last} evenly spaced"
    )
    band: str | None = Field(None, description="TEMPO band the model was trained on")


class ConvertConfig(CommandConfig):
    """`spectralvae convert`: a model to an export folder, or to a file for mltools."""

    source: ConfigPath = Field(description="mltools .pt/.ckpt, or a run, checkpoint or export of ours")
    model: dict[str, Any] | None = Field(None, description="mltools files: the `model:` section, as for train")
    normalization: SpectraConfig | None = Field(None, description="mltools files: the statistics of the same training")
    format: Literal["export", "mltools"] = "export"
