"""Level-2 files are found beside a level-1 granule by the time and scan in their names."""

from __future__ import annotations

import os
import re
from pathlib import Path

from spectralvae.errors import ConfigError, InputError
from spectralvae.readers.base import damage_named
from spectralvae.readers.products import FILE_NAME, product_spec

_GRANULE = re.compile(r"_(\d{8}T\d{6}Z)_(S\d{3}G\d{2})(?![0-9A-Za-z])")


def granule_key(path: Path) -> str | None:
    """Time and scan (SsssGgg) in a granule's name, which tell scans apart; None where it has none."""
    match = _GRANULE.search(path.name)
    return None if match is None else "_".join(match.groups())


class ProductFolder:
    """The files of one product in a folder; its listing is read once, for it may be long.

    Args:
        folder: Holds files TEMPO_<PRODUCT>_L2_V<nn>_<time>_<SsssGgg>[suffix].nc or .nc4; others are passed over.
        product: One of `PRODUCTS`.

    Raises:
        ConfigError: There is no such product.
        InputError: There is no such folder.
    """

    def __init__(self, folder: Path, product: str) -> None:
        self.product = product_spec(product).name
        self.folder = folder
        if not folder.is_dir():
            raise InputError("no such folder", key=f"l2.{product}.folder", path=folder, remedy="correct it")
        self._paths: dict[str, list[Path]] = {}
        with damage_named(folder):
            names = sorted(os.listdir(folder))  # noqa: PTH208 (names only: thousands of them)
        for name in names:
            match = FILE_NAME.fullmatch(name)
            if match and match[1] == product:
                self._paths.setdefault(f"{match[2]}_{match[3]}", []).append(folder / name)

    def find(self, scene_path: Path) -> Path:
        """The file that was made from a level-1 granule: the one of the same time and scan in its name.

        Raises:
            ConfigError: The granule's name has no time and scan.
            InputError: There is no such file, or several.
        """
        key = f"l2.{self.product}"
        granule = granule_key(scene_path)
        if granule is None:
            problem = "no time and scan (YYYYMMDDTHHMMSSZ_SsssGgg) in its name, by which level 2 is found"
            remedy = "give the file its original name, or leave out the product"
            raise ConfigError(problem, key=key, path=scene_path, remedy=remedy)
        found = self._paths.get(granule, [])
        if not found:
            problem = f"no TEMPO_{self.product}_L2_V*_{granule}*.nc or .nc4 for {scene_path.name}"
            remedy = "fetch it, or leave out this scene or the product"
            raise InputError(problem, key=key, path=self.folder, remedy=remedy)
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            problem = f"{len(found)} files of {self.product} for {scene_path.name}"
            raise InputError(problem, key=key, path=self.folder, remedy=f"keep one: {names}")
        return found[0]
