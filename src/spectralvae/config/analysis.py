"""Configs of what judges a trained network: evaluate, probe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from spectralvae.config.base import (
    CommandConfig,
    ConfigPath,
    Device,
    PositiveInt,
    Product,
    Section,
    Seed,
    check_distinct,
)


class EvaluateConfig(CommandConfig):
    """`spectralvae evaluate`: how good the checkpoints of a run are, in figures and pictures."""

    run: ConfigPath = Field(description="output_dir of a `train`; its store must be where it was")
    checkpoints: (
        Literal["all", "newest", "best"]
        | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(check_distinct)]
    ) = Field("all", description="all, newest, best (lowest validation loss), or a list of steps")
    batch_size: PositiveInt = Field(4, description="tiles that go through the network at a time; each takes memory")
    device: Device = Field(
        "auto", description="auto (the GPU with the most free memory, else the CPU), cpu, cuda or cuda:N"
    )


class FilterConfig(Section):
    """Which pixels count for gases, beside the good quality that `prepare` asked for; null: all of them."""

    max_cloud_fraction: float | None = Field(
        0.2, ge=0, le=1, description="largest cloud fraction; needs l2/CLDO4 in the store"
    )
    max_solar_zenith: float | None = Field(70.0, gt=0, le=180, description="degrees: largest solar zenith angle")


class ProbeConfig(CommandConfig):
    """`spectralvae probe`: what latents tell of level-2 products."""

    model: ConfigPath = Field(description="a run (its newest checkpoint), a checkpoint, or an export")
    store: ConfigPath = Field(
        description="a store with level-2 products and with the scenes that the model was validated on"
    )
    products: Annotated[list[Product], AfterValidator(check_distinct)] = Field(
        ["NO2", "HCHO", "O3TOT", "CLDO4"], min_length=1, description="what to predict; l2 of the store must have them"
    )
    probes: Annotated[list[Literal["linear", "mlp"]], AfterValidator(check_distinct)] = Field(
        ["linear", "mlp"],
        min_length=1,
        description="linear: ridge regression; mlp: two hidden layers of 512",
    )
    filter: FilterConfig = FilterConfig()
    n_cells: PositiveInt = Field(
        50_000,
        description="at most so many latent cells of the training scenes to fit on; all test cells are predicted",
    )
    seed: Seed = Field(0, description="of the choice of cells, the first weights, the shuffling and the bootstrap")
    batch_size: PositiveInt = Field(4, description="tiles that go through the network at a time; each takes memory")
    device: Device = Field(
        "auto", description="auto (the GPU with the most free memory, else the CPU), cpu, cuda or cuda:N"
    )
