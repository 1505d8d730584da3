"""Configs of what comes before training: simulate, download, prepare."""

from __future__ import annotations

from datetime import UTC, date, datetime, time
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from spectralvae.config.base import (
    MAY_CHANGE,
    CommandConfig,
    ConfigPath,
    NormalizationConfig,
    PositiveInt,
    Product,
    Section,
    Seed,
    Share,
    Wavelengths,
    check_distinct,
    refusal,
)

# --- simulate ---------------------------------------------------------------------------------

PLANTED_KINDS = ("fill", "nan", "infinite", "default_fill", "flagged", "below_min_radiance")


class PlantConfig(Section):
    """Invalid samples to plant, each kind as a share of the samples that are valid before.

    All other samples stay what they are without planting, bit by bit.
    """

    fill: Share = Field(0.0, description="-1e30, the fill value")
    nan: Share = Field(0.0, description="NaN")
    infinite: Share = Field(0.0, description="infinity of either sign")
    default_fill: Share = Field(0.0, description="9.97e36, netCDF's own fill value, which no file declares")
    flagged: Share = Field(0.0, description="good values with bit 0, 1, 2 or 5 of the quality flag set")
    below_min_radiance: Share = Field(0.0, description="zeros, negative values and values between 0 and 1")
    declare_fill: bool = Field(True, description="false: the radiance has -1e30 but does not declare it as _FillValue")
    night: Annotated[list[Annotated[int, Field(ge=0)]], AfterValidator(check_distinct)] = Field(
        [], description="numbers of the granules, from 0, whose pixels are all fill, as at night"
    )
    unphysical_l2: Share = Field(
        0.0, description="level 2: share of the valid pixels with a tropospheric NO2 of 1.5e20 molecules/cm^2"
    )

    @model_validator(mode="after")
    def _something_is_left(self) -> PlantConfig:
        total = sum(getattr(self, kind) for kind in PLANTED_KINDS)
        if total >= 1:
            raise refusal(f"{' + '.join(PLANTED_KINDS)} is {total:g}", limit="below 1")
        return self


class SimulateConfig(CommandConfig):
    """`spectralvae simulate`: TEMPO-format granules with known truth."""

    seed: Seed = Field(0, description="the same seed gives the same granules")
    n_granules: PositiveInt = Field(2, le=10_000, description="how many granules; each is one scan of the same place")
    shape: list[PositiveInt] = Field(
        [131, 256],
        min_length=2,
        max_length=2,
        description="pixels [mirror_step, xtrack] of a granule; a real one has [131, 2048]",
    )
    n_channels: int = Field(1028, ge=16, description="spectral channels, evenly over 290-490 nm")
    products: Annotated[list[Product], AfterValidator(check_distinct)] = Field(
        ["NO2", "HCHO", "O3TOT", "CLDO4"], description="level-2 products to write beside level 1"
    )
    invalid_fraction: float = Field(
        0.02, ge=0, lt=1, description="share of pixels without data (fill values at the edges of the swath)"
    )
    scans_per_day: PositiveInt = Field(
        1,
        le=12,
        description="granule i is scan i % scans_per_day of day i // scans_per_day; scans of a day share its weather",
    )
    noise: bool = Field(True, description="photon noise in the radiance; radiance_error tells its size either way")
    version: Literal["V03", "V04"] = Field("V03", description="collection that names and attributes of the files give")
    plant: PlantConfig = PlantConfig()

    @model_validator(mode="after")
    def _nights_are_granules(self) -> SimulateConfig:
        for night in self.plant.night:
            if night >= self.n_granules:
                raise refusal(key="plant.night", value=night, limit=f"from 0 to n_granules - 1 ({self.n_granules - 1})")
        return self


# --- download ---------------------------------------------------------------------------------

LEVEL_1 = ("RAD", "RADT")


def _to_moment(value: str, *, end: bool = False) -> datetime:
    """UTC; a date is its first second, or its last if it is the end of a period."""
    moment = datetime.fromisoformat(value)
    if end and len(value) <= len("2024-06-01"):
        moment = datetime.combine(moment, time(23, 59, 59))
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)


def _check_moment(value: str) -> str:
    try:
        _to_moment(value)
    except (ValueError, OverflowError) as error:
        raise refusal(limit="a date or a time in UTC such as 2024-06-01 or 2024-06-01T15:00:00") from error
    return value


Moment = Annotated[str, AfterValidator(_check_moment)]


class DownloadConfig(CommandConfig):
    """`spectralvae download`: TEMPO granules from NASA Earthdata, level 1 with level 2."""

    resumable = True
    box: list[float] = Field(
        min_length=4,
        max_length=4,
        description="[west, south, east, north] in degrees; granules that touch it are taken, whole",
    )
    start: Moment = Field(description="date or time (UTC); granules that reach into the period are taken")
    end: Moment = Field(description="date (that day is included) or time (UTC)")
    version: Literal["V03", "V04"] = Field("V03", description="of the collections")
    products: Annotated[
        list[Literal["RAD", "RADT", "NO2", "HCHO", "O3TOT", "CLDO4"]], AfterValidator(check_distinct)
    ] = Field(
        ["RAD", "NO2", "HCHO", "O3TOT", "CLDO4"],
        min_length=1,
        description="level 1 first (RAD, or RADT: twilight), then level 2; granules that lack one are left out",
    )

    @model_validator(mode="after")
    def _box_has_an_area(self) -> DownloadConfig:
        west, south, east, north = self.box
        if not (-180 <= west < east <= 180 and -90 <= south < north <= 90):
            limit = "[west, south, east, north] with -180 <= west < east <= 180 and -90 <= south < north <= 90"
            raise refusal(key="box", value=self.box, limit=limit)
        return self

    @model_validator(mode="after")
    def _ends_after_it_starts(self) -> DownloadConfig:
        first, last = self.period
        if last < first:
            raise refusal(key="end", value=self.end, limit=f"at or after start ({self.start})")
        return self

    @model_validator(mode="after")
    def _level_1_comes_first(self) -> DownloadConfig:
        if [product in LEVEL_1 for product in self.products] != [i == 0 for i in range(len(self.products))]:
            limit = "a list that begins with RAD or RADT and holds only one of them"
            raise refusal(key="products", value=self.products, limit=limit)
        return self

    @property
    def period(self) -> tuple[datetime, datetime]:
        """First and last second, in UTC."""
        return _to_moment(self.start), _to_moment(self.end, end=True)


# --- prepare ----------------------------------------------------------------------------------


def _check_dims(value: dict[str, str | int]) -> dict[str, str | int]:
    if set(value) != {"y", "x", "channel"}:
        raise refusal(f"has the keys {', '.join(value) or '(none)'}", limit="a mapping of y, x and channel")
    return value


class InputSpec(Section):
    """A file or glob with what is needed to read it; a bare string is its path."""

    path: str = Field(min_length=1, description="file or glob")
    variable: str | None = Field(None, description="name of the array, where a file has several")
    size: list[PositiveInt] | None = Field(
        None, min_length=2, max_length=2, description="[y, x] of a bands x pixels array"
    )
    wavelength: list[float] | Wavelengths | None = Field(
        None, description="channel centres in nm: a list, or {first, last} evenly spaced; for files without"
    )
    region: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, min_length=4, max_length=4, description="[y0, y1, x0, x1]; disjoint regions of one file are scenes"
    )
    dims: Annotated[dict[str, str | int], AfterValidator(_check_dims)] | None = Field(
        None,
        description="netCDF, HDF5, Zarr: {y, x, channel}, the name of each dimension or the number of its axis from 0, "
        "for files whose names don't tell",
    )
    units: str | None = Field(None, min_length=1, description="of the values; for files that don't say")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, data: Any) -> Any:
        return {"path": data} if isinstance(data, str) else data


class PrepareNormalizationConfig(NormalizationConfig):
    """How radiance becomes z, and by whose statistics."""

    statistics: ConfigPath | None = Field(
        None,
        description="take mean and std from another store, or from a folder with mltools' mean_spectrum.pt and "
        "std_spectrum.pt; if left out, they are those of the training scenes",
    )


class ValidityConfig(Section):
    """Which samples may be used, beyond what a reader knows to be missing. Rejected ones are counted by rule."""

    valid_range: list[float] | None = Field(
        None, min_length=2, max_length=2, description="[low, high] of valid samples, in the units of the file"
    )
    flag_bits: list[Annotated[int, Field(ge=0, le=31)]] | None = Field(
        None,
        description="TEMPO: bits of pixel_quality_flag that reject a sample; if left out, [0, 1, 2, 5]: missing, bad "
        "pixel, processing error, saturated",
    )
    max_solar_zenith: float | None = Field(
        None, gt=0, le=180, description="degrees; pixels with a lower sun, or with an unknown one, are rejected whole"
    )
    all_invalid: Literal["refuse", "leave_out"] = Field(
        "refuse", description="what to do with a scene without any valid sample (at night, say); both name it"
    )

    @model_validator(mode="after")
    def _range_is_ordered(self) -> ValidityConfig:
        if self.valid_range is not None and self.valid_range[0] >= self.valid_range[1]:
            raise refusal(key="valid_range", value=self.valid_range, limit="[low, high] with low < high")
        return self


class ProductConfig(Section):
    """A level-2 product, paired with level 1 by time and SsssGgg in the names of the files."""

    folder: ConfigPath = Field(description="where its files are")
    field: str | None = Field(None, description="name of the variable; if left out, the product's usual one")
    max_quality: Annotated[int, Field(ge=0)] = Field(
        0, description="NO2, HCHO: largest accepted main_data_quality_flag (0 normal, 1 suspicious, 2 bad)"
    )
    valid_range: list[float] | None = Field(
        None, min_length=2, max_length=2, description="[low, high] of valid values; if left out, the physical range"
    )


def _check_dates(values: list[str]) -> list[str]:
    for value in values:
        first, _, last = value.partition("/")
        if date.fromisoformat(first) > date.fromisoformat(last or first):
            raise refusal(f"{value} ends before it begins")
    return values


class SplitConfig(Section):
    """Which scenes are kept for validation."""

    by: Literal["scene", "day", "region"] | None = Field(
        None,
        description="what is never divided between training and validation: a scene, or all scenes of a day (of UTC - "
        "6 h); region: every scene is cut in two; if left out, day for TEMPO, else scene",
    )
    val_fraction: float = Field(
        0.2, ge=0, lt=1, description="share of scenes, days or rows kept for validation; 0 = no validation"
    )
    val_dates: Annotated[list[str], AfterValidator(_check_dates)] | None = Field(
        None,
        min_length=1,
        description="instead of by and val_fraction: the days kept for validation, YYYY-MM-DD or "
        "YYYY-MM-DD/YYYY-MM-DD (both included)",
    )
    seed: Seed = Field(0, description="another seed chooses other scenes or days")
    train: list[str] | None = Field(
        None, description="instead of by and val_fraction: names or globs of the training scenes"
    )
    val: list[str] | None = Field(
        None, description="given together with train: names or globs of the validation scenes"
    )

    @model_validator(mode="after")
    def _lists_come_in_pairs(self) -> SplitConfig:
        if (self.train is None) != (self.val is None):
            given, other = ("train", "val") if self.val is None else ("val", "train")
            raise refusal(f"is given without {other}", key=given, remedy="give both or neither")
        if self.by is not None and (self.val is not None or self.val_dates is not None):
            raise refusal(
                "is given together with val_dates or lists, which replace it", key="by", remedy="keep one of them"
            )
        if self.val is not None and self.val_dates is not None:
            raise refusal("is given together with train and val", key="val_dates", remedy="keep one of them")
        return self


class PrepareConfig(CommandConfig):
    """`spectralvae prepare`: scenes to a store (output_dir is the store)."""

    resumable = True
    inputs: list[InputSpec] = Field(min_length=1, description="files, globs, folders, or mappings with the keys below")
    band: str | None = Field(None, description="TEMPO: band_290_490_nm (default) or band_540_740_nm")
    mixed_versions: bool = Field(False, description="TEMPO: take files of several processing versions (V03 and V04)")
    validity: ValidityConfig = ValidityConfig()
    normalization: PrepareNormalizationConfig = PrepareNormalizationConfig()
    split: SplitConfig = SplitConfig()
    l2: dict[Product, ProductConfig] = Field(
        {}, description="level-2 products (PRODUCT: NO2, HCHO, O3TOT, CLDO4) to store beside each scene"
    )
    dtype: Literal["float16", "float32"] = Field("float16", description="type of z in the store")
    cluster: str | None = Field(
        None,
        description="local: worker processes on this machine; or the address of a Dask scheduler, tcp://host:port; if "
        "left out, one scene after the other in this process. The store is the same, bit for bit",
        json_schema_extra=MAY_CHANGE,
    )
    n_workers: PositiveInt | None = Field(
        None,
        description="worker processes of `cluster: local`; if left out, one for each CPU core",
        json_schema_extra=MAY_CHANGE,
    )

    @model_validator(mode="after")
    def _cluster_is_known(self) -> PrepareConfig:
        if self.cluster not in (None, "local") and "://" not in str(self.cluster):
            raise refusal(key="cluster", value=self.cluster, limit="local or an address such as tcp://host:8786")
        if self.n_workers is not None and self.cluster != "local":
            raise refusal("belongs to `cluster: local`", key="n_workers", value=self.n_workers)
        return self
