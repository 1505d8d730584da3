"""What probes found out, and how it is written down: probes.json, tables, predictions, figures, a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectralvae.analysis.evaluation import number, write_csv
from spectralvae.analysis.probe_data import Grid, Question
from spectralvae.analysis.probe_figures import FEATURES
from spectralvae.analysis.scores import score
from spectralvae.data.store import Store
from spectralvae.data.targets import TargetTransform
from spectralvae.errors import RunError
from spectralvae.files.writers import Writer, new_file
from spectralvae.inference.coder import Coder
from spectralvae.runtime.atomic import write_atomic
from spectralvae.version import __version__

CONTROL_LIMIT = 0.05  # R2 that shuffled targets surely stay below, unless a probe sees what it must not

Key = tuple[str, str]  # probe, features
Nested = dict[str, dict[str, Any]]  # probe -> features -> something


@dataclass(frozen=True)
class Counts:
    """How much of a question's data there is, over all its scenes.

    Attributes:
        valid_pixels: with a value of the product.
        clear_pixels: of these, with few enough clouds.
        pixels: of these, with the sun high enough.
        left_out_cells: with a target that do not count, for their geometry is unknown or too few samples are valid.
        max_cloud_fraction, max_solar_zenith: the limits; None: there is none.
        fit_cells_found: cells of the scenes to fit on that count.
        fit_cells, fit_scenes: of these chosen to fit on, and their scenes.
        test_cells, test_scenes: cells to test on, and their scenes.
    """

    valid_pixels: int
    clear_pixels: int
    pixels: int
    left_out_cells: int
    max_cloud_fraction: float | None
    max_solar_zenith: float | None
    fit_cells_found: int
    fit_cells: int
    fit_scenes: int
    test_cells: int
    test_scenes: int

    def __str__(self) -> str:
        parts = [f"{self.valid_pixels:,} valid pixels"]
        if self.max_cloud_fraction is not None:
            parts.append(f"{self.clear_pixels:,} with cloud fraction <= {self.max_cloud_fraction:g}")
        if self.max_solar_zenith is not None:
            parts.append(f"{self.pixels:,} with solar zenith <= {self.max_solar_zenith:g} degrees")
        if self.left_out_cells:
            parts.append(f"{self.left_out_cells:,} cells left out (unknown geometry, or too few valid samples)")
        parts.append(f"{self.fit_cells:,} of {self.fit_cells_found:,} cells of {self.fit_scenes} scenes to fit on")
        parts.append(f"{self.test_cells:,} cells of {self.test_scenes} scenes to test on")
        return ", ".join(parts)


@dataclass(frozen=True)
class Answer:
    """What all probes predict for the test cells of a question; all arrays (cell).

    Attributes:
        truth: target, transformed and averaged.
        shuffled: that of another cell, which `shuffled` is judged by.
        scene: number of the scene in the store.
        row, column: in its grid of latents.
        latitude, longitude: degrees; NaN where unknown.
        time: seconds since 1970; NaN where unknown.
        predictions: by probe and features.
    """

    truth: NDArray[np.float64]
    shuffled: NDArray[np.float64]
    scene: NDArray[np.int32]
    row: NDArray[np.int32]
    column: NDArray[np.int32]
    latitude: NDArray[np.float32]
    longitude: NDArray[np.float32]
    time: NDArray[np.float64]
    predictions: dict[Key, NDArray[np.float32]]

    @classmethod
    def of_scene(
        cls,
        scene: int,
        grid: Grid,
        cells: NDArray[np.int64],
        targets: NDArray[np.float32],
        shuffled: NDArray[np.float64],
        predictions: dict[Key, NDArray[np.float32]],
    ) -> Answer:
        """Of the cells at these flat positions of a grid."""
        row, column = np.divmod(cells.astype(np.int32), targets.shape[1])
        return cls(
            targets.ravel()[cells].astype(np.float64),
            shuffled,
            np.full(len(cells), scene, np.int32),
            row,
            column,
            grid.latitude.ravel()[cells],
            grid.longitude.ravel()[cells],
            grid.time[row],
            predictions,
        )

    @classmethod
    def joined(cls, parts: Sequence[Answer]) -> Answer:
        """Of all scenes. The parts lose their predictions one by one, so that memory never holds them all twice."""
        names = [name for name in vars(parts[0]) if name != "predictions"]
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        keys = list(parts[0].predictions)
        return cls(
            **arrays, predictions={key: np.concatenate([part.predictions.pop(key) for part in parts]) for key in keys}
        )

    def truth_of(self, features: str) -> NDArray[np.float64]:
        """What predictions from these features are judged by."""
        return self.shuffled if features == "shuffled" else self.truth


@dataclass(frozen=True)
class Results:
    """All that `probe` finds out.

    Attributes:
        store: the scenes.
        answers: by question.
        counts: by question.
        scores: the content of probes.json.
        curves: of the probes as they were fitted, by question.
        remarks: what readers should know.
    """

    store: Store
    answers: dict[Question, Answer]
    counts: dict[Question, Counts]
    scores: dict[str, Nested]
    curves: dict[Question, Nested]
    remarks: list[str]


# --- scores ---------------------------------------------------------------------------------------


def judge(answers: Mapping[Question, Answer], seed: int) -> dict[str, Nested]:
    """product -> probe -> features -> scores of the target, `physical` ones, and both of all cells as `unfiltered`."""
    found: dict[str, dict[bool, Nested]] = {}
    for q, answer in answers.items():
        nested: Nested = {}
        for name, features in sorted(answer.predictions, key=lambda key: list(FEATURES).index(key[1])):
            truth, predicted = answer.truth_of(features), answer.predictions[name, features]
            scores = score(truth, predicted, answer.scene, seed=seed)
            physical = _physical(q.transform, truth, predicted, answer.scene, seed)
            nested.setdefault(name, {})[features] = {**scores, "physical": physical}
        found.setdefault(q.product, {})[q.filtered] = nested
    return {product: _beside(sides[True], sides.get(False, sides[True])) for product, sides in found.items()}


def _beside(filtered: Nested, unfiltered: Nested) -> Nested:
    return {
        name: {key: {**scores, "unfiltered": unfiltered[name][key]} for key, scores in by_features.items()}
        for name, by_features in filtered.items()
    }


def _physical(
    transform: TargetTransform, truth: NDArray[Any], predicted: NDArray[Any], scene: NDArray[Any], seed: int
) -> dict[str, Any]:
    """RMSE and bias in the product's units, of values transformed back; None where a prediction is beyond numbers."""
    keys = [f"{name}{end}" for name in ("rmse", "bias") for end in ("", "_low", "_high")]
    with np.errstate(over="ignore"):
        value, estimate = transform.inverse(truth), transform.inverse(predicted)
        known = bool(np.isfinite(estimate).all()) and bool(np.isfinite((estimate - value) ** 2).all())
    # A scale of order 1: squares of columns, 1e32 and more, would leave few digits to what they are compared with.
    found: Mapping[str, Any] = (
        score(value / transform.divide, estimate / transform.divide, scene, seed=seed) if known else {}
    )
    scaled = {key: found.get(key) for key in keys}
    return {"units": transform.units} | {
        key: None if value is None else number(value * transform.divide) for key, value in scaled.items()
    }


def check_control(scores: Mapping[str, Nested]) -> None:
    """Check that nothing can be learnt from targets of other cells.

    Raises:
        RunError: it was, for certain.
    """
    for product, probes in scores.items():
        for name, by_features in probes.items():
            control = by_features["shuffled"]
            for which, found in (("", control), (".unfiltered", control["unfiltered"])):
                if found["r2_low"] is not None and found["r2_low"] > CONTROL_LIMIT:
                    raise RunError(
                        f"the control with shuffled targets has R2 {interval(found)}, so the probe is broken",
                        key=f"{product}.{name}.shuffled{which}.r2_low",
                        value=found["r2_low"],
                        limit=f"at most {CONTROL_LIMIT}",
                        remedy="the results are written, but do not use them",
                    )


def interval(found: Mapping[str, Any]) -> str:
    """R2 with its interval."""
    if found["r2"] is None:
        return "-"
    ends = "" if found["r2_low"] is None else f" [{found['r2_low']:.3f}, {found['r2_high']:.3f}]"
    return f"{found['r2']:.3f}{ends}"


# --- writing --------------------------------------------------------------------------------------


def write_numbers(folder: Path, results: Results, coder: Coder) -> None:
    """probes.json, probes.csv and predictions.nc."""
    write_atomic(folder / "probes.json", json.dumps(results.scores, indent=2, allow_nan=False) + "\n")
    _write_table(folder / "probes.csv", results.scores)
    _write_predictions(folder / "predictions.nc", results, coder)


def _write_table(path: Path, scores: Mapping[str, Nested]) -> None:
    rows = []
    for product, name, features, found in _flat(scores):
        for which, side in (("filtered", found), ("unfiltered", found["unfiltered"])):
            plain = {key: value for key, value in side.items() if key not in ("physical", "unfiltered")}
            physical = {f"{key}_physical" if key != "units" else key: v for key, v in side["physical"].items()}
            rows.append({"product": product, "probe": name, "features": features, "pixels": which, **plain, **physical})
    write_csv(path, list(rows[0]), [list(row.values()) for row in rows])


def _flat(scores: Mapping[str, Nested]) -> list[tuple[str, str, str, dict[str, Any]]]:
    return [
        (product, name, features, found)
        for product, probes in scores.items()
        for name, by_features in probes.items()
        for features, found in by_features.items()
    ]


def _write_predictions(path: Path, results: Results, coder: Coder) -> None:
    """A group for each question; a variable for each probe and kind of features."""
    with new_file(path, "netcdf") as writer:
        writer.group(
            "",
            {
                "Conventions": "CF-1.11",
                "title": "level-2 products predicted from features of latent cells",
                "spectralvae_version": __version__,
                "pixels_per_cell": coder.scale,
                "store_hash": results.store.hash,
                **coder.identity,
            },
        )
        writer.dimension("scene", len(results.store.scenes))
        names = [scene.id for scene in results.store.scenes]
        writer.create("scene_id", ("scene",), str, {"long_name": "scene in the store"}, values=np.array(names))
        for q, answer in results.answers.items():
            _write_answer(writer, f"{'filtered' if q.filtered else 'unfiltered'}/{q.product}", q, answer)


def _write_answer(writer: Writer, group: str, q: Question, answer: Answer) -> None:
    target = {"long_name": label_of(q), "units": "1"}
    variables: dict[str, tuple[Any, dict[str, str]]] = {
        "truth": (answer.truth, target),
        "truth_shuffled": (answer.shuffled, {**target, "comment": "of other cells: what `shuffled` is judged by"}),
        "scene_number": (answer.scene, {"long_name": "position in scene_id"}),
        "row": (answer.row, {"long_name": "row of the cell in the scene's grid of latents"}),
        "column": (answer.column, {"long_name": "column of the cell in the scene's grid of latents"}),
        "latitude": (answer.latitude, {"standard_name": "latitude", "units": "degrees_north"}),
        "longitude": (answer.longitude, {"standard_name": "longitude", "units": "degrees_east"}),
        "time": (answer.time, {"standard_name": "time", "units": "seconds since 1970-01-01", "calendar": "standard"}),
    } | {f"{name}_{features}": (values, target) for (name, features), values in answer.predictions.items()}
    writer.group(group, {"transform": json.dumps(q.transform.to_attributes())})
    writer.dimension(f"{group}/cell", len(answer.truth))
    for name, (values, attributes) in variables.items():
        fill = np.nan if name in ("latitude", "longitude", "time") else None
        writer.create(f"{group}/{name}", ("cell",), values.dtype, attributes, fill=fill, values=values)


def label_of(q: Question) -> str:
    """The target of a question, for axes."""
    t = q.transform
    units = "" if t.units in (None, "1") else f" {t.units}"
    if t.kind == "asinh":
        return f"asinh({q.product} / {t.scale * t.divide:.3g}{units})"
    if t.kind == "logit":
        return f"logit of {q.product}"
    return f"({q.product} - {t.center * t.divide:.4g}) / {t.scale * t.divide:.3g}{units}"
