"""The scenes that rate_distortion.py codes, with all that is known of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from distortion import Question, Spectra, noise_in_z, read_z
from numpy.typing import NDArray

from spectralvae.config.data import InputSpec
from spectralvae.data.statistics import RatioHistogram
from spectralvae.errors import ConfigError, InputError
from spectralvae.inference.encode import open_scene_for
from spectralvae.readers import Scene
from spectralvae.readers.base import file_sha256
from spectralvae.weights.artifact import Artifact
from spectralvae.weights.loading import load_artifact
from spectralvae.weights.normalization import Float64, Normalization

FIT_GRANULES, FIT_PIXELS = 12, 2000  # for regressions, pixels of each granule and product
SAMSON = {"variable": "Y", "size": [95, 95], "wavelength": {"first": 401, "last": 889}}
DEFLATE = {"compression": "gzip", "compression_opts": 4, "shuffle": True}  # as netCDF-4 does, if asked to compress

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Subject:
    """A scene that is coded.

    Attributes:
        name: for tables.
        spec: what to give to `compress` as an input.
        model: folder of the network's weights.
        normalization: the model's.
        radiance, z: (y, x, C) float32, NaN = invalid.
        stored: how HDF5 stores the radiance: keywords of h5py's create_dataset.
        deflated_bytes: of the radiance in its file; None where the source is no HDF5 file.
        noise: (C) in z; None where nothing is known of it.
        questions: by product; none without products.
        remarks: what readers should know.
    """

    name: str
    spec: dict[str, Any]
    model: Path
    normalization: Normalization
    radiance: Float32
    z: Float32
    stored: dict[str, Any]
    deflated_bytes: int | None
    noise: Float64 | None
    questions: dict[str, Question]
    remarks: list[str]


def normalization_of(artifact: Artifact) -> Normalization:
    """The model's."""
    if artifact.normalization is None:
        raise ConfigError(f"{artifact.path}: has no normalisation; give a run or an export of this package")
    return artifact.normalization


def storage(scene: Scene) -> tuple[dict[str, Any], int | None]:
    """As of `Subject`: how the radiance is stored, and in how many bytes."""
    if "radiance" not in scene.places or scene.region is not None:
        return {**DEFLATE, "chunks": (1, *scene.shape[1:])}, None
    with h5py.File(scene.path) as file:
        values = file[scene.places["radiance"].name]
        how = {key: getattr(values, key) for key in ("chunks", "compression", "compression_opts", "shuffle")}
        return how, int(values.id.get_storage_size())


def simulated(folder: Path, model: Path) -> Subject:
    """The first granule that a model was validated on, with what granules of its training tell."""
    artifact = load_artifact(model)
    normalization, provenance = normalization_of(artifact), artifact.provenance
    if provenance is None or not provenance.validation.identities or not provenance.training.identities:
        raise InputError(f"{model}: does not tell which granules it was trained and validated on: train it anew")
    paths = {path: file_sha256(path) for path in sorted(folder.glob("TEMPO_RAD*.nc"))}
    coded = [path for path, digest in paths.items() if digest in provenance.validation.identities]
    fit = [path for path, digest in paths.items() if digest in provenance.training.identities]
    if not coded or len(fit) < 2:
        raise InputError(
            f"{folder}: has {len(coded)} granules of the validation of {model} and {len(fit)} of its training; needed "
            "are 1 and 2: give the granules of its store"
        )
    random = np.random.default_rng(0)
    spectra, noise = Spectra(folder, FIT_PIXELS, seed=0), RatioHistogram.empty(normalization.n_channels)
    chosen = sorted(random.permutation(len(fit))[:FIT_GRANULES])  # at even distances, hours of the day might repeat
    for path in (fit[i] for i in chosen):
        z, found = read_z(open_scene_for(path, InputSpec(path=str(path)), normalization), normalization)
        spectra.add(path, z)
        noise = noise if found is None else noise.merge(found)
    scene = open_scene_for(coded[0], InputSpec(path=str(coded[0])), normalization)
    remarks = [f"regressions and noise are those of {len(chosen)} granules of the training"]
    return _subject(scene, {"path": str(coded[0].absolute())}, artifact, spectra, noise, remarks)


def samson(path: Path, model: Path, region: Sequence[int]) -> Subject:
    """A region of the Samson scene that the model was not trained on."""
    artifact = load_artifact(model)
    spec = {"path": str(path.absolute()), **SAMSON, "region": list(region)}
    scene = open_scene_for(path, InputSpec.model_validate(spec), normalization_of(artifact))
    provenance, remarks = artifact.provenance, []
    if provenance is None or provenance.training.identities is None:
        remarks = ["the model does not tell what it was trained on"]
    elif f"{file_sha256(path)}[{','.join(map(str, region))}]" in provenance.training.identities:
        raise InputError(f"{model}: was trained on the region {list(region)}: give another --samson-region")
    return _subject(scene, spec, artifact, None, None, remarks)


def _subject(
    scene: Scene,
    spec: dict[str, Any],
    artifact: Artifact,
    spectra: Spectra | None,
    noise: RatioHistogram | None,
    remarks: list[str],
) -> Subject:
    normalization = normalization_of(artifact)
    z, _ = read_z(scene, normalization)
    with scene:
        radiance = scene.read(slice(0, scene.shape[0]))[0]
    radiance[np.isnan(z)] = np.nan
    known = noise is not None and noise.counts.any()
    stored, deflated = storage(scene)
    return Subject(
        scene.name,
        spec,
        artifact.path,
        normalization,
        radiance,
        z,
        stored,
        deflated,
        noise_in_z(noise, normalization) if noise is not None and known else None,
        spectra.questions(scene.path, z) if spectra else {},
        remarks,
    )
