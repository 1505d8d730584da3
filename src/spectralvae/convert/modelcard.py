"""The model card of an export folder: what its user should know, as Markdown with the header that model hubs read."""

from __future__ import annotations

import numpy as np

from spectralvae.data.pca import REFERENCE_LABELS
from spectralvae.data.wavelengths import span
from spectralvae.version import __version__
from spectralvae.weights.artifact import Artifact, weights_sha256
from spectralvae.weights.normalization import EPSILON, Normalization
from spectralvae.weights.provenance import LatentStatistics, Provenance, Scenes

NO_NORMALIZATION = (
    "This export holds no normalisation: it cannot encode scenes. Convert it again with "
    "`normalization: {mean: mean_spectrum.pt, std: std_spectrum.pt}`."
)


def model_card(artifact: Artifact) -> str:
    """README.md of an export; what is not known is said to be unknown."""
    sections = {
        "How to load it": _loading(artifact.normalization),
        "Normalisation": _normalization(artifact.normalization),
        "Training data": _training(artifact),
        "Validation": _validation(artifact.provenance, artifact.step),
        "Latents and how to scale them": _latents(artifact.latents),
        "Intended use and limits": _limits(artifact),
        "Licence": [
            "Not stated yet: the owner of the weights is to write it here, and as `license:` in this file's header."
        ],
    }
    lines = [*_header(artifact), *_summary(artifact)]
    for title, content in sections.items():
        lines += ["", f"## {title}", "", *content]
    return "\n".join(lines) + "\n"


def _header(artifact: Artifact) -> list[str]:
    """YAML front matter."""
    tags = ["hyperspectral", "variational-autoencoder"]
    if artifact.normalization is not None and artifact.normalization.band:
        tags.append("tempo")
    return ["---", "library_name: spectralvae", "tags:", *(f"- {tag}" for tag in tags), "---", ""]


def _summary(artifact: Artifact) -> list[str]:
    model = artifact.model
    n_weights, (n_channels, *tile) = sum(p.numel() for p in model.parameters()), artifact.settings["shape"]
    shape = ""
    if None not in tile:
        latent = ", ".join(str(size // model.scale) for size in tile)
        shape = f"; a training tile of {_by(tile)} pixels has latents of shape ({model.embed_dim}, {latent})"
    return [
        "# spectralvae model",
        "",
        "A KL-regularised autoencoder for hyperspectral scenes, in the architecture of mltools' `AutoencoderKL`.",
        "",
        f"- {n_weights:,} parameters",
        f"- {n_channels} channels to {model.embed_dim} latent channels on a grid {model.scale} times smaller along "
        f"each axis{shape}",
        f"- from {artifact.path.absolute().name}" + (f", step {artifact.step}" if artifact.step is not None else ""),
        f"- SHA-256 of the weights (`model.safetensors`): `{weights_sha256(model)}`",
        f"- written by spectralvae {__version__}",
    ]


def _by(sizes: list[int]) -> str:
    return " x ".join(map(str, sizes))


def _loading(normalization: Normalization | None) -> list[str]:
    names, scenes = "load_model", []
    if normalization is not None:
        names = "decode_scene, encode_scene, load_model, open_scene"
        scenes = [
            'latents = encode_scene(model, open_scene("scene.nc"))  # xarray, latent (latent_channel, y, x)',
            "scene = decode_scene(model, latents)",
        ]
    load = 'model = load_model("path/to/this/folder")  # the network, in eval mode'
    return ["```python", f"from spectralvae import {names}", "", load, *scenes, "```"]


def _normalization(normalization: Normalization | None) -> list[str]:
    if normalization is None:
        return [NO_NORMALIZATION]
    f = "log(radiance)" if normalization.transform == "log_zscore" else "radiance"
    lines = [
        f"z = ({f} - mean) / (std + {EPSILON:g}), clipped to ±{normalization.clip:g} (`{normalization.transform}`). "
        "mean and std of each channel are in `normalization.safetensors`.",
        "",
        f"- wavelengths: {_span(normalization)}",
        f"- TEMPO band: {normalization.band or 'none is named'}",
        f"- units of radiance: {normalization.units or 'unknown'}",
        f"- invalid, beside what the reader rejects (fill values, NaN, quality flags): "
        f"{'; '.join(_rules(normalization)) or 'nothing'}",
    ]
    if n_empty := int(np.isnan(normalization.mean).sum()):
        lines.append(f"- {n_empty} channels had no valid sample in training: they are always masked")
    return lines


def _span(normalization: Normalization) -> str:
    if normalization.wavelength is None:
        return "unknown"
    return span(normalization.wavelength)


def _rules(normalization: Normalization) -> list[str]:
    rules = []
    if normalization.min_radiance is not None:
        rules.append(f"radiance below {normalization.min_radiance:g}")
    if normalization.valid_range is not None:
        rules.append("values outside {:g} to {:g}".format(*normalization.valid_range))
    if normalization.flag_bits is not None:
        rules.append(f"bits {', '.join(map(str, normalization.flag_bits))} of the quality flag, and no others")
    if normalization.max_solar_zenith is not None:
        rules.append(f"solar zenith angles above {normalization.max_solar_zenith:g}°")
    return rules


def _training(artifact: Artifact) -> list[str]:
    found, settings = artifact.provenance, artifact.settings
    if found is None:
        return ["Unknown: the files that this model came from do not say what it was trained on."]
    n_steps = f"{artifact.step:,} steps" if artifact.step is not None else "an unknown number of steps"
    began = {None: "random", "unknown": "not random, but of another model, which is unknown"}.get(
        found.initial_weights, f"another model's, SHA-256 `{found.initial_weights}`; what it was trained on counts, too"
    )
    return [
        f"- store `{found.store}`, hash `{found.store_hash}` (as `spectralvae inspect` shows it)",
        f"- training: {_scenes(found.training)}",
        f"- kept apart for validation: {_scenes(found.validation)}",
        f"- {n_steps} of {found.batch_size} tiles of {found.tile_size} x {found.tile_size} pixels, seed {found.seed}",
        f"- loss: {settings['nll_loss_type']} of z, KL weight {settings['kl_weight']:g}",
        f"- initial weights: {began}",
        *_ancestry(found),
    ]


def _ancestry(found: Provenance) -> list[str]:
    """What one must know of the initial weights to believe the figures of the validation."""
    earlier, kept = found.ancestry(), found.validation.identities
    if earlier == []:
        return []
    if earlier is None or kept is None:
        return ["- whether the initial weights were trained on scenes kept apart for validation is unknown"]
    if known := len(set(kept) & set(earlier)):
        return [f"- {known} of the {len(kept)} scenes kept apart for validation were trained on by the initial weights"]
    return []


def _scenes(scenes: Scenes) -> str:
    if not scenes.n_scenes:
        return "no scene"
    what = f"{scenes.n_scenes} scene{'s' * (scenes.n_scenes > 1)} from {scenes.n_sources} file"
    what += "s" * (scenes.n_sources > 1)
    what += f", {scenes.first} to {scenes.last}" if scenes.first else ", times unknown"
    return what + (f", processing version {', '.join(scenes.versions)}" if scenes.versions else "")


def _validation(found: Provenance | None, step: int | None) -> list[str]:
    if found is None:
        return ["Unknown."]
    if found.metrics is None:
        why = "the store keeps no scene for it" if not found.n_val_tiles else f"step {step} was saved without it"
        return [f"Not done: {why}."]
    metrics = found.metrics
    lines = [
        f"On {found.n_val_tiles} tiles of the validation scenes, always the same, at step {step}:",
        "",
        "| mean squared error of z, per valid sample | |",
        "| --- | --- |",
        f"| this model, from samples of its posterior | {metrics['val_pixel_mse']:.4g} |",
        *(f"| {REFERENCE_LABELS[key]} | {value:.4g} |" for key, value in (found.baselines or {}).items()),
        "",
        f"Per tile: loss {metrics['val_loss']:.6g}, of it reconstruction {metrics['val_nll_loss']:.6g} and "
        f"KL {metrics['val_kl_loss']:.6g}.",
    ]
    return lines


def _latents(latents: LatentStatistics | None) -> list[str]:
    if latents is None:
        return ["Unknown: mean and standard deviation of the latent channels were not measured."]
    values = zip(latents.mean, latents.std, strict=True)
    return [
        f"Over {latents.n_tiles} validation tiles and those of their positions that have a valid sample beneath them "
        f"({latents.n_positions:,}): mean of the posterior's mean, and standard deviation of its samples, "
        "sqrt(var(mean) + mean(variance)). A diffusion model wants latents of mean 0 and standard deviation 1:",
        "",
        "```python",
        "from spectralvae import load_artifact",
        "",
        'statistics = load_artifact("path/to/this/folder").latents',
        "scaled = (latents.latent.values - statistics.mean[:, None, None]) / statistics.std[:, None, None]",
        "```",
        "",
        "| latent channel | mean | standard deviation |",
        "| --- | --- | --- |",
        *(f"| {i} | {mean:.4g} | {std:.4g} |" for i, (mean, std) in enumerate(values)),
    ]


def _limits(artifact: Artifact) -> list[str]:
    normalization = artifact.normalization
    n_channels, *tile = artifact.settings["shape"]
    lines = ["- Made for: latents of scenes like those it was trained on, and scenes back from latents."]
    if normalization is not None:
        others = ""
        if normalization.wavelength is not None:
            others = f"; scenes whose wavelengths differ from {_span(normalization)} by more than a channel are refused"
        lines += [
            f"- It takes {n_channels} channels, normalised as above{others}.",
            f"- What lies beyond ±{normalization.clip:g} in z is clipped before the network sees it: it is lost.",
        ]
    if None not in tile:
        lines.append(
            f"- Latents depend on all of a tile, and it was trained on tiles of {_by(tile)} pixels: other sizes give "
            "other latents, and their errors are unknown."
        )
    masked = ", and no loss counted it" if artifact.provenance is not None else ""
    return [
        *lines,
        f"- A missing sample goes into the network as z = 0, the mean of the training data{masked}: what comes out in "
        "its place is a guess that was never judged. Keep the mask.",
        "- Unknown: errors by wavelength, for bright or dark scenes, and outside of what it was trained on (other "
        "places, seasons, instruments).",
    ]
