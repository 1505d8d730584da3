"""What the configs of all commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from spectralvae.errors import ConfigError

T = TypeVar("T")

# `json_schema_extra` of the keys that may differ when a run is resumed; all others must stay as they are
MAY_CHANGE: JsonDict = {"on_resume": "may change"}
MAY_GROW: JsonDict = {"on_resume": "may grow"}
MAY_MOVE: JsonDict = {"on_resume": "may move"}


def refusal(problem: str = "", **parts: Any) -> PydanticCustomError:
    """What a validator raises: the parts of a `ConfigError`, whose key is relative to the section that is checked."""
    error = ConfigError(problem, **parts)
    return PydanticCustomError("refused", "{text}", {"text": str(error), "parts": error.parts()})


def _to_path(value: Any) -> Path:
    if isinstance(value, Path) or (isinstance(value, str) and value and "\0" not in value):
        try:
            return Path(value).expanduser()
        except RuntimeError as error:  # ~nobody
            raise refusal("its home directory is unknown") from error
    raise refusal(limit="a path")


def check_distinct(values: list[T]) -> list[T]:
    if len(set(values)) < len(values):
        raise refusal("names something twice", remedy="name each once")
    return values


def _check_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value):
        raise refusal(limit="auto, cpu, cuda or cuda:N")
    return value


ConfigPath = Annotated[Path, BeforeValidator(_to_path), PlainSerializer(str)]
PositiveInt = Annotated[int, Field(ge=1)]
Device = Annotated[str, AfterValidator(_check_device)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Product = Literal["NO2", "HCHO", "O3TOT", "CLDO4"]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Part of a config: no unknown keys, no silent conversions, no changes after reading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class CommandConfig(Section):
    """What every command's config has.

    Attributes:
        resumable: whether the command resumes an unfinished run.
    """

    resumable: ClassVar[bool] = False
    output_dir: ConfigPath = Field(description="folder for the results of this command and of nothing else")


class Wavelengths(Section):
    """Evenly spaced channel centres."""

    first: float = Field(gt=0, description="centre of the first channel in nm")
    last: float = Field(gt=0, description="centre of the last channel in nm")


class NormalizationConfig(Section):
    """How radiance becomes z."""

    transform: Literal["log_zscore", "zscore"] = Field(
        "log_zscore",
        description="log_zscore (z-score of the logarithm) for radiance, which spans decades; zscore for reflectance",
    )
    min_radiance: float | None = Field(
        None,
        gt=0,
        description="log_zscore only: smaller values are invalid; in the units of the file; if left out, 1.0",
    )
    clip: float = Field(10.0, gt=0, le=1000, description="z is clipped to [-clip, clip], in standard deviations")

    @model_validator(mode="before")
    @classmethod
    def _resolve_min_radiance(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("transform", "log_zscore") == "log_zscore":
            return {**data, "min_radiance": 1.0 if data.get("min_radiance") is None else data["min_radiance"]}
        return data

    @model_validator(mode="after")
    def _only_log_has_min_radiance(self) -> NormalizationConfig:
        if self.transform == "zscore" and self.min_radiance is not None:
            raise refusal(
                "belongs to transform: log_zscore; under zscore zeros and negatives are valid",
                key="min_radiance",
                value=self.min_radiance,
                remedy="leave it out",
            )
        return self
