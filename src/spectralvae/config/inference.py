"""Configs of what a trained network is used for: encode, decode, compress, decompress."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from spectralvae.config.base import MAY_CHANGE, CommandConfig, ConfigPath, Device, PositiveInt, Section, refusal
from spectralvae.config.data import InputSpec

Text = Annotated[str, Field(min_length=1)]


class ModelConfig(CommandConfig):
    """What all of these share."""

    resumable = True
    model: ConfigPath = Field(
        description="a run (its newest checkpoint), a checkpoint, or an export; with normalisation and wavelengths"
    )
    batch_size: PositiveInt = Field(
        4,
        description="tiles that go through the network at a time; each takes memory",
        json_schema_extra=MAY_CHANGE,
    )
    device: Device = Field(
        "auto",
        description="auto (the GPU with the most free memory, else the CPU), cpu, cuda or cuda:N; of several "
        "processes on a machine, each takes its own GPU",
        json_schema_extra=MAY_CHANGE,
    )


class InferenceConfig(ModelConfig):
    """What cuts scenes into tiles."""

    overlap: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="pixels that neighbouring tiles share, where their results are blended; a multiple of the pixels "
        "of a latent cell; if left out, a quarter of a tile",
    )


class ScenesConfig(InferenceConfig):
    """What makes one file of each scene."""

    inputs: list[InputSpec] = Field(
        min_length=1, description="scenes: paths or globs, or mappings as below; folders as of `prepare`"
    )
    all_invalid: Literal["refuse", "leave_out"] = Field(
        "refuse",
        description="what to do with a scene without any valid sample (at night, say); both name it",
        json_schema_extra=MAY_CHANGE,
    )


class EncodeConfig(ScenesConfig):
    """`spectralvae encode`: scenes to latents, one file each."""

    log_variance: bool = Field(False, description="write the log variance of the latents' posterior, too")
    format: Literal["netcdf", "zarr"] = Field(
        "netcdf", description="of the files: NAME.latents.nc or NAME.latents.zarr"
    )


class DecodeConfig(InferenceConfig):
    """`spectralvae decode`: latents to radiance, in files laid out like their sources."""

    inputs: list[Text] = Field(min_length=1, description="files of `encode`: paths or globs")
    sources: list[Text] = Field(
        [],
        description="the files that were encoded: paths, globs or folders. Where given, each reconstruction is "
        "compared with its source: errors in run.json, and a figure",
    )
    carry_over: list[Text] = Field(
        [],
        description='other variables of the sources to copy: patterns of their places, such as "*" for all, '
        '"band_290_490_nm/radiance_error", "geometry/*"; wavelength, places, angles and time are always there',
    )

    @model_validator(mode="after")
    def _carried_from_somewhere(self) -> DecodeConfig:
        if self.carry_over and not self.sources:
            raise refusal("copies from sources, which are not given", key="carry_over", remedy="give sources, too")
        return self


class OneOf(Section):
    """A section of which exactly one key is given."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [key for key, value in self if value is not None]
        if len(given) != 1:
            keys = ", ".join(type(self).model_fields)
            raise refusal(f"gives {' and '.join(given) or 'none of its keys'}", remedy=f"give exactly one of {keys}")
        return self


class BoundConfig(OneOf):
    """The largest error of any valid sample; one of the two."""

    z: Annotated[float, Field(gt=0, le=1000)] | None = Field(None, description="absolute, in z, beyond the clip, too")
    relative: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="of radiance, as a share of its true value; of models with log_zscore only"
    )


class RateConfig(OneOf):
    """How much is coded, of z within the clip; one of the three."""

    step: Annotated[float, Field(ge=1e-6, le=1000)] | None = Field(
        None, description="quantisation step, in z, of components and latents"
    )
    bytes: PositiveInt | None = Field(None, description="of a file at most; the error is as small as they allow")
    mse: Annotated[float, Field(ge=1e-12)] | None = Field(None, description="mean squared error of z at most")


class CompressConfig(ScenesConfig):
    """`spectralvae compress`: scenes to small files, one each."""

    bound: BoundConfig | None = Field(None, description="how large an error may be; this or `rate`")
    rate: RateConfig | None = Field(None, description="how much is coded; this or `bound`")

    @model_validator(mode="after")
    def _bound_or_rate(self) -> CompressConfig:
        if self.bound is None and self.rate is None:
            raise refusal("this key or rate is required", key="bound")
        if self.bound is not None and self.rate is not None:
            raise refusal("is given together with bound", key="rate", remedy="keep one of them")
        return self


class DecompressConfig(ModelConfig):
    """`spectralvae decompress`: files of `compress` to radiance, in files laid out like their sources."""

    inputs: list[Text] = Field(min_length=1, description="files of `compress`: paths, globs or folders")
