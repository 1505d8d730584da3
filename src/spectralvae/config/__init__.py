"""The configs of all commands: their keys, limits and defaults.

Relative paths are taken from the folder the command is started in.
"""

from spectralvae.config.analysis import EvaluateConfig, FilterConfig, ProbeConfig
from spectralvae.config.base import CommandConfig, NormalizationConfig, Section, Wavelengths
from spectralvae.config.data import (
    LEVEL_1,
    PLANTED_KINDS,
    DownloadConfig,
    InputSpec,
    PlantConfig,
    PrepareConfig,
    ProductConfig,
    SimulateConfig,
    SplitConfig,
    prepare_may_change_on_resume,
)
from spectralvae.config.inference import (
    CompressConfig,
    DecodeConfig,
    DecompressConfig,
    EncodeConfig,
    InferenceConfig,
    ModelConfig,
    ScenesConfig,
)
from spectralvae.config.training import (
    DEBUG_OVERRIDES,
    ConvertConfig,
    OptimizerConfig,
    SpectraConfig,
    SupervisionConfig,
    TrainConfig,
    may_change_on_resume,
)

__all__ = [
    "DEBUG_OVERRIDES",
    "LEVEL_1",
    "PLANTED_KINDS",
    "CommandConfig",
    "CompressConfig",
    "ConvertConfig",
    "DecodeConfig",
    "DecompressConfig",
    "DownloadConfig",
    "EncodeConfig",
    "EvaluateConfig",
    "FilterConfig",
    "InferenceConfig",
    "InputSpec",
    "ModelConfig",
    "NormalizationConfig",
    "OptimizerConfig",
    "PlantConfig",
    "PrepareConfig",
    "ProbeConfig",
    "ProductConfig",
    "ScenesConfig",
    "Section",
    "SimulateConfig",
    "SpectraConfig",
    "SplitConfig",
    "SupervisionConfig",
    "TrainConfig",
    "Wavelengths",
    "may_change_on_resume",
    "prepare_may_change_on_resume",
]
