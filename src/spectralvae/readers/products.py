"""TEMPO level-2 products: one field read on the pixels of its level-1 granule.

Shapes: ny mirror steps, nx cross-track pixels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from spectralvae.errors import ConfigError, InputError
from spectralvae.readers import guard, hdf5
from spectralvae.readers.arguments import check_region
from spectralvae.readers.base import check_file, damage_named, invalidate
from spectralvae.readers.packing import check_packing, is_declared_fill, text, unpack
from spectralvae.readers.tempo import X, Y, dims_of, is_rejected, slab, version_of

# In order: a pixel is counted under the first rule that rejects it.
PRODUCT_RULES = ("fill", "undeclared_fill", "default_fill", "nan", "infinite", "quality", "out_of_range")

_GROUPS = ("product", "support_data", "geolocation")
FILE_NAME = re.compile(r"TEMPO_([A-Z0-9]+)_L2_V[^_]+_(\d{8}T\d{6}Z)_(S\d{3}G\d{2})(?![0-9A-Za-z]).*\.nc4?")
_COLLECTION = re.compile(r"TEMPO_([A-Z0-9]+)_L2")


@dataclass(frozen=True)
class ProductSpec:
    """What is known of a product beforehand.

    Attributes:
        name: As file names and configs have it.
        field: The variable read by default.
        units: Of `field`; range, divide and transform hold for values in these units.
        valid_range: Physical limits, both of them still valid.
        divide: Makes the values of order 1.
        transform: For learning: asinh, zscore or logit.
        quality: The quality variable.
        rejected_bits: Of the quality variable, where it holds bits; None where it holds levels: 0 normal,
            1 suspicious, 2 bad.
    """

    name: str
    field: str
    units: str
    valid_range: tuple[float, float]
    divide: float
    transform: str
    quality: str
    rejected_bits: int | None = None

    def holds_for(self, field: str, units: str | None) -> bool:
        """Do range, divide and transform hold for a field (name or path)? For a quantity in the default one's units."""
        usual = field.rsplit("/", 1)[-1] == self.field
        return (units == self.units and (usual or self.units != "1")) or (usual and units is None)


PRODUCTS = {
    spec.name: spec
    for spec in (
        # The thickest plumes reach some 1e17; ten times that leaves room, and 1.5e20 (seen in real files) lies far
        # beyond. Columns scatter around 0 by some 1e15, so negative ones are noise and stay, down to -1e17.
        ProductSpec(
            "NO2", "vertical_column_troposphere", "molecules/cm^2", (-1e17, 1e18), 1e15, "asinh",
            "product/main_data_quality_flag",
        ),
        # Fires reach some 1e17; the noise of one pixel is 1e16 and more, ten times that of NO2.
        ProductSpec(
            "HCHO", "vertical_column", "molecules/cm^2", (-1e18, 1e18), 1e16, "asinh",
            "product/main_data_quality_flag",
        ),
        # The deepest ozone hole left about 70 DU, the thickest columns are some 650 DU. Any bit of the flag rejects.
        ProductSpec(
            "O3TOT", "column_amount_o3", "DU", (50.0, 700.0), 1.0, "zscore",
            "product/quality_flag", (1 << 64) - 1,
        ),
        # A fraction. Bits 0, 3, 6, 8, 9 and 12-14 are errors; the others are warnings over usable pixels.
        ProductSpec(
            "CLDO4", "cloud_fraction", "1", (0.0, 1.0), 1.0, "logit",
            "product/processing_quality_flag", sum(1 << bit for bit in (0, 3, 6, 8, 9, 12, 13, 14)),
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class ProductField:
    """One field of one product file, on the pixels of its granule or of a region of it.

    Attributes:
        path: The file.
        product: The product's name.
        field: Path of the variable in the file.
        values: (ny, nx) float32, NaN where invalid. A float32 is exact to 6e-8, columns are to some percent.
        counts: How many pixels each of `PRODUCT_RULES` rejected.
        valid_range: The limits behind `out_of_range`.
        quality: The quality variable with the rule that was applied; None where the file has none.
        units: As the file has them, None where it doesn't say.
        version: Of the processing that made the file ("V03"), where known.
        absent: The quality variable, where the file lacks it.
    """

    path: Path
    product: str
    field: str
    values: NDArray[np.float32]
    counts: dict[str, int]
    valid_range: tuple[float, float]
    quality: str | None
    units: str | None
    version: str | None
    absent: tuple[str, ...]


def product_spec(product: str) -> ProductSpec:
    """What is known of a product.

    Raises:
        ConfigError: There is no such product.
    """
    if product not in PRODUCTS:
        raise ConfigError(key="l2", value=product, limit=f"one of {', '.join(PRODUCTS)}")
    return PRODUCTS[product]


def read_product(
    path: Path,
    product: str,
    *,
    field: str | None = None,
    max_quality: int = 0,
    valid_range: Sequence[float] | None = None,
    region: Sequence[int] | None = None,
    expected_shape: tuple[int, int] | None = None,
) -> ProductField:
    """Read one field of a product file; pixels that break a rule become NaN and are counted.

    Args:
        path: The file.
        product: One of `PRODUCTS`; the file must be of it.
        field: A variable of the groups product, support_data or geolocation, or a path "group/name"; None for the
            product's own.
        max_quality: NO2, HCHO: the worst level that is accepted: 0 normal, 1 suspicious, 2 bad.
        valid_range: [lowest, highest] valid value; None for the product's own limits.
        region: [y0, y1, x0, x1], half-open pixel bounds; None for all.
        expected_shape: (ny, nx) of the granule's full image; None where it isn't known.

    Raises:
        InputError: Another product, no such field, a shape that is not the granule's, or damage.
        ConfigError: No such product, or an argument doesn't fit it.
    """
    spec = product_spec(product)
    key = f"l2.{product}"
    if spec.rejected_bits is not None and max_quality != 0:
        problem = f"{spec.quality} holds bits, not levels"
        raise ConfigError(problem, key=f"{key}.max_quality", value=max_quality, remedy="leave it out")
    if max_quality not in (0, 1, 2):
        limit = "0 (normal), 1 (suspicious, too) or 2 (bad, too)"
        raise ConfigError(key=f"{key}.max_quality", value=max_quality, limit=limit)
    with _open_product(path) as file:
        told = _told_products(path, file)
        if product not in told:
            others = " or ".join(sorted(told))
            what = f"a file of {others}" if told else "a file that does not say of what product it is"
            limit = f"a file of TEMPO {product} level 2"
            raise InputError(what, key=key, path=path, limit=limit, remedy="correct the folder")
        place = _find_field(path, file, field or spec.field)
        places = [place, spec.quality] if spec.quality in file else [place]
        variable, *flags = variables = [_check_variable(path, file, name) for name in places]
        hdf5.check_variables(path, dict(zip(places, variables, strict=True)))
        shape = _check_shapes(path, places, variables, expected_shape)
        window = (0, shape[0], 0, shape[1]) if region is None else check_region(path, region, *shape)
        units = text(variable.attrs.get("units", "")) or None
        low, high = _limits(spec, place, units, valid_range)

        rejected = quality = None
        for flag in flags:
            rejected, quality = _quality(spec, flag, slab(flag, (Y, X), window), max_quality)
        raw = slab(variable, (Y, X), window)
        values, counts = invalidate(unpack(variable, raw), is_declared_fill(variable, raw), rejected)
        version = version_of(path, file)

    outside = (values < low) | (values > high)
    values[outside] = np.nan
    counts.update(quality=counts["flagged"], out_of_range=int(np.count_nonzero(outside)))
    return ProductField(
        path=path,
        product=product,
        field=place,
        values=values,
        counts={rule: counts[rule] for rule in PRODUCT_RULES},
        valid_range=(low, high),
        quality=quality,
        units=units,
        version=version,
        absent=() if quality else (spec.quality,),
    )


@contextmanager
def _open_product(path: Path) -> Iterator[h5py.File]:
    """The open file, whose structure another process has tried out."""
    check_file(path)
    if path.is_dir():
        raise InputError("a folder, not a file of TEMPO level 2", path=path, remedy="give the file")
    guard.try_out(path, {}, f"{__name__}:{check_structure.__name__}")
    with damage_named(path), h5py.File(path, "r") as file:
        yield file


def check_structure(path: Path) -> None:
    """What the guard tries out: all that reading a file needs to know of it.

    Raises:
        InputError: It is damaged, or leads into another file.
    """
    with damage_named(path), h5py.File(path, "r") as file:
        dict(file.attrs)
        for place in _fields(file):
            dict(file[place].attrs)
            hdf5.check_variables(path, {place: file[place]})


def product_of(path: Path) -> str | None:
    """Which of `PRODUCTS` a file is of; None for any other file."""
    if not h5py.is_hdf5(path):
        return None
    with _open_product(path) as file:
        return next(iter(_told_products(path, file) & PRODUCTS.keys()), None)


def describe_fields(path: Path) -> dict[str, dict[str, Any]]:
    """All fields of a product file: units, valid pixels whatever the quality, pixels without value, least, largest."""
    described = {}
    with _open_product(path) as file, damage_named(path):
        for place in _fields(file):
            variable = _check_variable(path, file, place)
            hdf5.check_variables(path, {place: variable})
            shape = _check_shapes(path, [place], [variable], None)
            raw = slab(variable, (Y, X), (0, shape[0], 0, shape[1]))
            values, counts = invalidate(unpack(variable, raw), is_declared_fill(variable, raw), None)
            n_missing = sum(counts.values())
            described[place] = {
                "units": text(variable.attrs.get("units", "")) or None,
                "valid": values.size - n_missing,
                "missing": n_missing,
                "minimum": float(np.fmin.reduce(values, axis=None)),
                "maximum": float(np.fmax.reduce(values, axis=None)),
            }
    return described


def _told_products(path: Path, file: h5py.File) -> set[str]:
    """What a file says it is of, in its attributes or else by its name."""
    collection = _COLLECTION.search(text(file.attrs.get("collection_shortname", "")))
    told = {text(file.attrs.get("product_type", "")), collection[1] if collection else ""} - {""}
    match = FILE_NAME.fullmatch(path.name)
    return told or ({match[1]} if match else set())


def _find_field(path: Path, file: h5py.File, field: str) -> str:
    """The path of a field in the file."""
    places = [f"{group}/{field}" for group in _GROUPS]
    if "/" in field:
        places.append(field.strip("/"))
    for place in places:
        if place in file and isinstance(file[place], h5py.Dataset):
            return place
    raise InputError(f"no field {field!r} in it", path=path, remedy=f"its fields: {', '.join(_fields(file)) or 'none'}")


def _fields(file: h5py.File) -> list[str]:
    """The paths of all variables over mirror_step and xtrack alone."""
    return [
        f"{group}/{name}"
        for group in _GROUPS
        if isinstance(file.get(group), h5py.Group)
        for name, item in file[group].items()
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "iuf" and set(dims_of(item)) == {Y, X}
    ]


def _check_variable(path: Path, file: h5py.File, place: str) -> h5py.Dataset:
    """A variable of numbers over mirror_step and xtrack, in either order."""
    variable = file[place]
    if not isinstance(variable, h5py.Dataset) or sorted(dims_of(variable)) != [Y, X]:
        dims = ", ".join(dims_of(variable)) if isinstance(variable, h5py.Dataset) else ""
        raise InputError(f"has dimensions ({dims})", key=place, path=path, limit=f"{Y}, {X}, in any order")
    if variable.dtype.kind not in "iuf":
        raise InputError(f"holds {variable.dtype}, not numbers", key=place, path=path)
    check_packing(path, place, variable)
    return variable


def _check_shapes(
    path: Path, places: Sequence[str], variables: Sequence[h5py.Dataset], expected: tuple[int, int] | None
) -> tuple[int, int]:
    """Check that variables have the expected shape (mirror_step, xtrack), or all the first one's; return it."""
    for place, variable in zip(places, variables, strict=True):
        sizes = dict(zip(dims_of(variable), variable.shape, strict=True))
        ny, nx = sizes[Y], sizes[X]
        whose = f"but {places[0]}" if expected and place != places[0] else "but the level-1 granule"
        expected = expected or (ny, nx)
        if (ny, nx) != tuple(expected):
            problem = f"has {ny} x {nx} pixels ({Y}, {X}), {whose} has {expected[0]} x {expected[1]}"
            raise InputError(problem, key=place, path=path, remedy="fetch both files again")
    assert expected is not None
    return expected


def _limits(
    spec: ProductSpec, place: str, units: str | None, valid_range: Sequence[float] | None
) -> tuple[float, float]:
    """The lowest and the highest valid value of a field."""
    key = f"l2.{spec.name}.valid_range"
    known = spec.holds_for(place, units)
    if valid_range is None:
        if not known:
            problem = f"none is known for {place}, which is in {units!r}, not in {spec.units}"
            raise ConfigError(problem, key=key, remedy="give [lowest, highest]")
        return spec.valid_range
    if len(valid_range) != 2 or not valid_range[0] < valid_range[1]:
        raise ConfigError(key=key, value=list(valid_range), limit="[lowest, highest] with lowest < highest")
    low, high = map(float, valid_range)
    if known and spec.transform == "logit" and not (spec.valid_range[0] <= low and high <= spec.valid_range[1]):
        limit = f"within {list(spec.valid_range)} for its transform (logit)"
        raise ConfigError(key=key, value=[low, high], limit=limit)
    return low, high


def _quality(
    spec: ProductSpec, variable: h5py.Dataset, flags: NDArray[Any], max_quality: int
) -> tuple[NDArray[np.bool_], str]:
    """Which pixels the quality variable rejects (also where it is itself fill), and the rule in words."""
    if spec.rejected_bits is None:
        missing = is_rejected(variable, flags, 0)
        return missing | (flags < 0) | (flags > max_quality), f"{spec.quality} <= {max_quality}"
    # What the file itself calls an error or a warning overrides the table.
    bits = spec.rejected_bits
    masks = np.ravel(variable.attrs.get("flag_masks", ()))
    meanings = text(variable.attrs.get("flag_meanings", "")).lower().split()
    # With flag_values a mask spans several bits, and a meaning belongs to a value.
    if masks.dtype.kind in "iu" and len(masks) == len(meanings) and "flag_values" not in variable.attrs:
        for mask, meaning in zip(masks, meanings, strict=True):
            named = int(mask) % (1 << 8 * masks.dtype.itemsize)  # bit 15 of an int16 is negative
            if "error" in meaning:
                bits |= named
            elif "warning" in meaning:
                bits &= ~named
    return is_rejected(variable, flags, bits), f"{spec.quality} & {bits:#x} == 0"
