"""Models for others: an export folder, or files that mltools loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from spectralvae.config import ConvertConfig, SpectraConfig, Wavelengths
from spectralvae.convert.modelcard import NO_NORMALIZATION, model_card
from spectralvae.data.wavelengths import channel_means
from spectralvae.errors import ConfigError, InputError
from spectralvae.runtime.atomic import write_atomic
from spectralvae.runtime.console import warn
from spectralvae.runtime.rundir import RunDir
from spectralvae.weights import mltools
from spectralvae.weights.artifact import Artifact, pack_model, read_artifact, write_files
from spectralvae.weights.checkpoint import list_checkpoints
from spectralvae.weights.loading import load_artifact
from spectralvae.weights.normalization import Float64, Normalization
from spectralvae.weights.torchfile import save_torch_file


def convert(config: ConvertConfig, run: RunDir, console: Console) -> None:
    """Convert ``config.source`` into ``run``'s directory, which is touched only once all inputs are known to be good.

    Args:
        config: of the command.
        run: its output directory.
        console: where to print.

    Raises:
        InputError: a file is missing or damaged.
        ConfigError: settings or statistics do not fit the weights, or the source lies where the result is to go.
    """
    run.refuse_inside("source", config.source)
    if config.normalization is not None:
        run.refuse_inside("normalization.mean", config.normalization.mean)
        run.refuse_inside("normalization.std", config.normalization.std)
    artifact = load_artifact(config.source, config.model)
    if config.normalization is not None:
        if artifact.normalization is not None:
            problem = "this source holds its own normalisation"
            raise ConfigError(problem, key="normalization", path=config.source, remedy="leave the section out")
        normalization = foreign_normalization(config.normalization, artifact.model.encoder.shape[0])
        artifact = replace(artifact, normalization=normalization)
    if artifact.left_out:
        console.print(f"left out, not part of the network: {', '.join(artifact.left_out)}")
    with run:
        if config.format == "mltools":
            write_mltools(run.path, artifact, console)
        else:
            write_export(run.path, artifact)
            console.print(f"{run.path}: export folder; load it with spectralvae.load_model('{run.path}')")
            if artifact.normalization is None:
                warn(console, NO_NORMALIZATION)
            if missing := lacking_statistics(artifact):
                warn(console, missing)


def foreign_normalization(config: SpectraConfig, n_channels: int) -> Normalization:
    """The normalisation of mltools' two files.

    Args:
        config: names the files, and what they don't say.
        n_channels: of the weights.

    Raises:
        InputError: a file is missing, damaged or no spectrum.
        ConfigError: the number of channels differs, the spectra cannot normalise, or the wavelengths are none.
    """
    spectra = {"mean": mltools.read_spectrum(config.mean), "std": mltools.read_spectrum(config.std)}
    for name, path in (("mean", config.mean), ("std", config.std)):
        if len(spectra[name]) != n_channels:
            problem = f"has {len(spectra[name])} channels, but the weights take {n_channels}"
            raise ConfigError(problem, key=f"normalization.{name}", path=path)
    if (spectra["std"] <= 0).any():
        channel = int(np.argmin(spectra["std"]))
        problem, value = f"at channel {channel}", spectra["std"][channel]
        raise ConfigError(problem, key="normalization.std", path=config.std, value=value, limit="above 0")
    return Normalization(
        transform=config.transform,
        mean=spectra["mean"],
        std=spectra["std"],
        clip=config.clip,
        min_radiance=config.min_radiance,
        band=config.band,
        wavelength=_wavelengths(config.wavelength, config.band, n_channels),
    )


def _wavelengths(given: list[float] | Wavelengths | Path | None, band: str | None, n_channels: int) -> Float64 | None:
    if given is None:
        return None
    from spectralvae.readers import open_reader
    from spectralvae.readers.arguments import check_wavelengths, given_wavelengths

    if isinstance(given, Path):
        with open_reader(given, band=band) as scene:
            means = channel_means(given, scene.wavelength)
        return check_wavelengths("normalization.wavelength", means, n_channels, path=given)
    plain = given.model_dump() if isinstance(given, Wavelengths) else given
    return given_wavelengths("normalization.wavelength", plain, n_channels)


def write_export(folder: Path, artifact: Artifact) -> None:
    """Write an export folder: weights, settings, normalisation, what is known of them, manifest, model card.

    The card is not in the manifest: its licence is for the owner to add.
    """
    write_atomic(folder / "README.md", model_card(artifact))
    files = pack_model(
        artifact.model,
        artifact.settings,
        artifact.normalization,
        artifact.step,
        artifact.latents,
        artifact.provenance,
    )
    write_files(folder, files)


def lacking_statistics(artifact: Artifact) -> str | None:
    """Why a run's checkpoint has no statistics of its latents, and the remedy; None if it has, or is no checkpoint."""
    path = artifact.path.absolute()
    checkpoints = list_checkpoints(path.parent.parent)
    if artifact.latents is not None or path not in checkpoints:
        return None
    missing = f"{artifact.path} holds neither statistics of the latents nor validation metrics"
    if artifact.provenance is not None and artifact.provenance.n_val_tiles == 0:
        return f"{missing}: its store keeps no scene for validation; prepare one with split.val_fraction above 0"
    why = "it was saved at a signal, which does not wait for a validation"
    if artifact.provenance is None:
        why = "it was written by an older version"
    older = _validated(checkpoints[: checkpoints.index(path)])
    instead = f"convert {older}, which was validated, or " if older else ""
    go_on = "let its run go on to its next checkpoint (a finished one with a larger training.n_steps)"
    return f"{missing}: {why}; {instead}{go_on}"


def _validated(checkpoints: list[Path]) -> Path | None:
    """The newest that is whole and has statistics of its latents."""
    for checkpoint in reversed(checkpoints):
        try:
            if read_artifact(checkpoint)[0].latents is not None:
                return checkpoint
        except InputError:  # no remedy, then
            continue
    return None


def write_mltools(folder: Path, artifact: Artifact, console: Console) -> None:
    """Write the weights, and the statistics where there are any, as mltools loads them."""
    normalization = artifact.normalization
    if normalization is not None:
        empty = np.flatnonzero(np.isnan(normalization.mean))
        if len(empty):
            warn(
                console,
                f"channels {empty.tolist()} had no valid sample: their statistics are NaN, and so is all that "
                "mltools makes of them, since it knows no mask",
            )
        for name, values in (("mean_spectrum", normalization.mean), ("std_spectrum", normalization.std)):
            save_torch_file(torch.from_numpy(values).float(), folder / f"{name}.pt")
    mltools.save_weights(artifact.model, folder / "model.pt")
    n_tensors = len(artifact.model.state_dict())
    console.print(f"{folder / 'model.pt'}: {n_tensors} tensors with mltools' names")
