"""What the stages of `prepare` hand to workers, and how these keep the result of a scene.

A stage works on one scene alone and leaves its result in a scratch folder. So any worker can do any scene in any order,
and an interrupted preparation resumes with the scenes that are not done.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from spectralvae.config import ProductConfig
from spectralvae.data.splits import PlannedScene
from spectralvae.data.validity import Validity
from spectralvae.errors import InputError
from spectralvae.readers.products import ProductField, read_product

BELOW_MINIMUM = "below_min_radiance"
NO_STATISTICS = "no_statistics"  # the rule of samples whose channel has no valid training sample


@dataclass(frozen=True)
class Task:
    """How scenes are worked on.

    Attributes:
        root: the store.
        scratch: for results of each scene.
        validity: which samples may be used.
        products: the level-2 products.
        dtype: of z.
        leave_out: whether a scene without any valid sample is left out; otherwise it is refused.
        measured: whether training scenes are measured: for mean and std, or to know which of them are left out.
        n_threads: that work on one scene.
    """

    root: Path
    scratch: Path
    validity: Validity
    products: Mapping[str, ProductConfig]
    dtype: str
    leave_out: bool
    measured: bool
    n_threads: int

    def result_file(self, p: PlannedScene, what: str) -> Path:
        """Where a result of a scene is kept."""
        return self.scratch / f"{p.id}.{what}.npz"

    def keep(self, p: PlannedScene, what: str, **arrays: Any) -> None:
        """Keep a result of a scene; under a temporary name first, as another worker may be at the same scene."""
        path = self.result_file(p, what)
        temporary = path.with_name(f".{uuid4().hex}.npz")
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def product_field(self, p: PlannedScene, product: str) -> ProductField:
        """Read a level-2 field on the pixels of a scene."""
        wanted = self.products[product]
        return read_product(
            p.products[product],
            product,
            field=wanted.field,
            max_quality=wanted.max_quality,
            valid_range=wanted.valid_range,
            region=p.scene.region,
            expected_shape=p.scene.full_shape[:2],
        )


def all_invalid(p: PlannedScene, counts: Mapping[str, int]) -> InputError:
    """The error that a scene has no valid sample."""
    by_rule = ", ".join(f"{rule} {n}" for rule, n in counts.items() if n)
    return InputError(
        f"scene {p.id} has no valid sample ({by_rule})",
        path=p.scene.path,
        remedy="take it out of inputs, or set validity.all_invalid: leave_out",
    )
