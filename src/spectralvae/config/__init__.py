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
    NetworkSettings,
    OptimizerConfig,
    SpectraConfig,
    SupervisionConfig,
    TrainConfig,
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
    "NetworkSettings",
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
]
