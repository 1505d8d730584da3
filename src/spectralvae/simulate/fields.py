"""The simulated world: one place with its surface and cities, and the weather of each day above it.

Every random draw comes from its own stream, keyed by (seed, purpose, day or granule), so that no granule depends on how
many others are made, nor one field on another. The scans of one day share its weather, which drifts with the wind of
the day and changes slowly with the hour; some of their clouds differ from scan to scan. Shape letters: y mirror step
(east to west), x cross-track pixel (north to south), c spectral channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from spectralvae.simulate.physics import BAND_NM, DOBSON_UNIT, Array, Optics, Pixels, radiance

LATITUDE = (50.0, 22.0)  # of the first and the last cross-track pixel
LONGITUDE = (-87.0, -97.0)  # of the first and the last mirror step
SATELLITE_LONGITUDE = -91.0
ORBIT_RADII = 42164.0 / 6371.0  # geostationary orbit, in earth radii
SECONDS_PER_STEP = 3.0
LONGEST_SCAN = 1800.0  # seconds, so that scans of a day do not overlap; with more mirror steps, each is shorter
FIRST_DAY = datetime(2024, 6, 1, tzinfo=UTC)
DAYLIGHT = (15.0, 21.0)  # UTC; the sun is up over the whole place all year
MAX_SCANS_PER_DAY = 12
HOURS = (15, 18, 21)  # UTC of the scans where a day has one
HIDING_CLOUD = 0.5  # above this cloud fraction too little of the lowest layer is seen

PIECE_SAMPLES = 30_000  # samples whose radiance is worked out at a time
_N_CITIES = 24
# Reflectance of ocean, vegetation and bare soil at the short and at the long end of the band
_SURFACE_ENDS = np.array([(0.075, 0.040), (0.020, 0.050), (0.050, 0.200)])


class Purpose(IntEnum):
    """What a random stream is for: the first word of its key."""

    LAND = 0
    VEGETATION = 1
    BRIGHTNESS = 2
    CITIES = 3
    EDGE = 4
    CLOUD = 5
    OZONE = 6
    NO2 = 7
    HCHO = 8
    NOISE = 9
    WIND = 10
    CLOUD_CHANGE = 11
    PLANT = 12
    PLANT_L2 = 13


def random_stream(seed: int, purpose: Purpose, number: int = 0) -> np.random.Generator:
    """Random numbers that depend on these three arguments and nothing else; number is of the day or the granule."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(purpose, number))))


def smooth_field(
    random: np.random.Generator, shape: tuple[int, int], exponent: float, drift: tuple[float, float] = (0.0, 0.0)
) -> Array:
    """Gaussian random field of mean 0 and deviation 1, its power falling as wavenumber^-exponent.

    White noise filtered by FFT on twice the grid, of which a quarter is kept: otherwise opposite edges would match.
    Structures stop growing at the grid's shorter side. A grid of one pixel gives 0.

    Args:
        random: the stream to draw from.
        shape: (y, x).
        exponent: the larger, the smoother.
        drift: how far the field has moved along y and x, as a share of the grid; between -1 and 1.
    """
    rows, columns = 2 * shape[0], 2 * shape[1]
    square = np.fft.fftfreq(rows)[:, None] ** 2 + np.fft.rfftfreq(columns) ** 2 + 1.0 / min(rows, columns) ** 2
    spectrum = np.fft.rfft2(random.standard_normal((rows, columns))) * square ** (-exponent / 4.0)
    moved = round(drift[0] * shape[0]), round(drift[1] * shape[1])
    field = np.roll(np.fft.irfft2(spectrum, s=(rows, columns)), moved, axis=(0, 1))[: shape[0], : shape[1]]
    field -= field.mean()
    return np.asarray(field / max(float(field.std()), 1e-300))


@dataclass(frozen=True)
class Place:
    """What stays the same from granule to granule; every array ends in (y, x)."""

    latitude: Array  # degrees north
    longitude: Array  # degrees east
    surface: Array  # (3, y, x): weights of ocean, vegetation and bare soil, their sum being the brightness
    vegetation: Array  # share of the pixel, 0 ... 1
    cities: Array  # (city, 4): latitude, longitude, NO2 at the core in molecules/cm^2, radius in degrees


@dataclass(frozen=True)
class Granule:
    """One scan: the truth and the geometry."""

    index: int
    start: datetime
    time: Array  # (y) seconds after the start
    earth_sun_distance: float  # astronomical units
    pixels: Pixels


def make_place(seed: int, shape: tuple[int, int]) -> Place:
    """Draw the surface and the cities.

    Args:
        seed: of the whole simulation.
        shape: (y, x).
    """
    longitude, latitude = np.meshgrid(
        np.linspace(*LONGITUDE, shape[0]), np.linspace(*LATITUDE, shape[1]), indexing="ij"
    )
    land = np.clip(0.7 + 2.0 * smooth_field(random_stream(seed, Purpose.LAND), shape, 3.5), 0.0, 1.0)
    green = np.clip(0.5 + 0.6 * smooth_field(random_stream(seed, Purpose.VEGETATION), shape, 3.0), 0.0, 1.0)
    brightness = np.exp(0.2 * smooth_field(random_stream(seed, Purpose.BRIGHTNESS), shape, 2.0))
    surface = np.stack([1.0 - land, land * green, land * (1.0 - green)]) * np.clip(brightness, 0.6, 1.6)

    random = random_stream(seed, Purpose.CITIES)
    cities = np.stack(
        [
            random.uniform(min(LATITUDE), max(LATITUDE), _N_CITIES),
            random.uniform(min(LONGITUDE), max(LONGITUDE), _N_CITIES),
            np.clip(1.2e16 * np.exp(0.6 * random.standard_normal(_N_CITIES)), 3e15, 4e16),
            random.uniform(0.3, 0.8, _N_CITIES),
        ],
        axis=1,
    )
    return Place(latitude, longitude, surface, land * green, cities)


def surface_reflectance(weights: Array, wavelength: Array) -> Array:
    """Mix the surface types, each with a straight spectral slope.

    Args:
        weights: (3, y, x) as in `Place.surface`.
        wavelength: (x, c) in nm.

    Returns:
        (y, x, c), within 0 ... 1.
    """
    position = (wavelength - BAND_NM[0]) / (BAND_NM[1] - BAND_NM[0])
    start, end = np.einsum("kyx,ke->eyx", weights, _SURFACE_ENDS)
    return np.asarray(start[..., None] + (end - start)[..., None] * position)


def scan_start(index: int, scans_per_day: int) -> datetime:
    """When a granule's first mirror step is taken: its day's scans are spread evenly over the daylight.

    Where a day has one scan, the hour goes round `HOURS` from day to day.
    """
    day, scan = divmod(index, scans_per_day)
    if scans_per_day == 1:
        return FIRST_DAY + timedelta(days=day, hours=HOURS[day % len(HOURS)])
    hours = DAYLIGHT[0] + (DAYLIGHT[1] - DAYLIGHT[0]) * scan / (scans_per_day - 1)
    return FIRST_DAY + timedelta(days=day, minutes=round(60.0 * hours))


def make_granule(place: Place, seed: int, index: int, scans_per_day: int = 1) -> Granule:
    """Draw the weather and the columns of one scan, and work out where sun and satellite stand.

    Args:
        place: made with the same seed.
        seed: of the whole simulation.
        index: number of the granule: scan index % scans_per_day of day index // scans_per_day.
        scans_per_day: how many granules share a day.
    """
    shape = (place.latitude.shape[0], place.latitude.shape[1])
    day, start = index // scans_per_day, scan_start(index, scans_per_day)
    hour = start.hour + start.minute / 60.0
    local_hour = hour + SATELLITE_LONGITUDE / 15.0
    towards, drift = _wind(seed, day, hour - DAYLIGHT[0])

    def field(purpose: Purpose, exponent: float) -> Array:
        return smooth_field(random_stream(seed, purpose, day), shape, exponent, drift)

    time = min(SECONDS_PER_STEP, LONGEST_SCAN / shape[0]) * np.arange(shape[0], dtype=np.float64)
    solar_zenith, solar_azimuth, distance = sun_position(start, time[:, None], place.latitude, place.longitude)
    viewing_zenith, viewing_azimuth = satellite_position(place.latitude, place.longitude)
    between = np.abs((solar_azimuth - viewing_azimuth + 180.0) % 360.0 - 180.0)

    season = np.cos(2.0 * np.pi * (start.timetuple().tm_yday - 100) / 365.0)
    north = (place.latitude - min(LATITUDE)) / (max(LATITUDE) - min(LATITUDE))
    ozone = 275.0 + 40.0 * north + 20.0 * season * north + 18.0 * field(Purpose.OZONE, 4.5)
    hcho = (3e15 + 1.2e16 * place.vegetation) * np.exp(0.3 * field(Purpose.HCHO, 3.0))
    # The sun makes formaldehyde and breaks NO2, both most by early afternoon; in the stratosphere it frees NO2 all day
    afternoon = np.cos(2.0 * np.pi * (local_hour - 14.0) / 24.0)
    pixels = Pixels(
        solar_zenith=solar_zenith,
        viewing_zenith=viewing_zenith,
        relative_azimuth=between,
        ozone=np.clip(ozone, 180.0, 500.0) * DOBSON_UNIT,
        no2_stratosphere=2.5e15 + 1.0e15 * north + 0.4e15 * season + 0.1e15 * (local_hour - 12.0),
        no2_troposphere=_tropospheric_no2(place, random_stream(seed, Purpose.NO2, day), towards, drift)
        * (1.3 - 0.3 * afternoon),
        hcho=hcho * (0.85 + 0.15 * afternoon),
        cloud_fraction=_cloud_fraction(seed, day, index, shape, drift),
    )
    return Granule(index, start, time, distance, pixels)


def _wind(seed: int, day: int, hours: float) -> tuple[float, tuple[float, float]]:
    """The wind of a day: 4 to 12 m/s in one direction.

    Returns:
        Where it blows, radians from east towards north, and how far it has carried the air after some hours, as a
        share of the grid along y and x.
    """
    random = random_stream(seed, Purpose.WIND, day)
    towards = random.uniform(0.0, 2.0 * np.pi)
    degrees = random.uniform(4.0, 12.0) * 3600.0 * hours / 111e3
    north = degrees * np.sin(towards)
    east = degrees * np.cos(towards) / np.cos(np.radians(np.mean(LATITUDE)))
    return towards, (east / (LONGITUDE[1] - LONGITUDE[0]), north / (LATITUDE[1] - LATITUDE[0]))


def _cloud_fraction(seed: int, day: int, index: int, shape: tuple[int, int], drift: tuple[float, float]) -> Array:
    """Clouds of the day, carried by its wind, and others that come and go from scan to scan: 0 ... 1, (y, x)."""
    random = random_stream(seed, Purpose.CLOUD, day)
    threshold = random.uniform(-0.1, 0.4)
    lasting = smooth_field(random, shape, 3.0, drift)
    passing = smooth_field(random_stream(seed, Purpose.CLOUD_CHANGE, index), shape, 3.0)
    return np.clip((0.8 * lasting + 0.6 * passing - threshold) / 1.2, 0.0, 1.0)


def _tropospheric_no2(place: Place, random: np.random.Generator, towards: float, drift: tuple[float, float]) -> Array:
    """Background plus, for each city, a core and a plume that widens and thins with the wind of the day."""
    shape = (place.latitude.shape[0], place.latitude.shape[1])
    length = random.uniform(1.0, 2.5)  # degrees
    emission = np.exp(0.3 * random.standard_normal(len(place.cities)))
    column = 8e14 * np.exp(0.4 * smooth_field(random, shape, 3.0, drift))
    for (latitude, longitude, core, radius), today in zip(place.cities, emission, strict=True):
        north = place.latitude - latitude
        east = (place.longitude - longitude) * np.cos(np.radians(latitude))
        along = east * np.cos(towards) + north * np.sin(towards)
        across = north * np.cos(towards) - east * np.sin(towards)
        downwind = np.maximum(along, 0.0)
        centre = np.exp(-0.5 * (along**2 + across**2) / radius**2)
        tail = 0.7 * np.exp(-downwind / length - 0.5 * (across / (radius + 0.25 * downwind)) ** 2)
        column += core * today * np.where(along > 0.0, np.maximum(centre, tail), centre)
    return np.asarray(column)


def clean_radiance(optics: Optics, place: Place, granule: Granule, rows: slice) -> Array:
    """Noise-free radiance of some mirror steps: (y, x, c) in photons/s/cm^2/nm/sr."""
    channels = optics.wavelength.shape[1]
    light = np.empty((*granule.pixels.ozone[rows].shape, channels))
    # Pieces that fit into the processor's cache: faster, and the dozen intermediate arrays stay small
    width = max(1, PIECE_SAMPLES // (light.shape[0] * channels))
    for x in range(0, light.shape[1], width):
        columns = slice(x, x + width)
        local = Optics(**{name: values[columns] for name, values in vars(optics).items()})
        pixels = Pixels(**{name: values[rows, columns] for name, values in vars(granule.pixels).items()})
        surface = surface_reflectance(place.surface[:, rows, columns], local.wavelength)
        light[:, columns] = radiance(local, pixels, surface, granule.earth_sun_distance)
    return light


def sun_position(start: datetime, seconds: Array, latitude: Array, longitude: Array) -> tuple[Array, Array, float]:
    """Solar zenith and azimuth, and the distance to the sun: Spencer (1971), Fourier series, Search 2(5), 172.

    Args:
        start: UTC.
        seconds: after the start; broadcasts against latitude and longitude (degrees).

    Returns:
        Zenith angle and azimuth (clockwise from north) in degrees; distance in astronomical units.
    """
    midnight = datetime(start.year, start.month, start.day, tzinfo=UTC)
    hour = ((start - midnight).total_seconds() + seconds) / 3600.0
    g = 2.0 * np.pi * (start.timetuple().tm_yday - 1) / 365.0
    c1, s1, c2, s2 = np.cos(g), np.sin(g), np.cos(2 * g), np.sin(2 * g)
    declination = (
        0.006918 - 0.399912 * c1 + 0.070257 * s1 - 0.006758 * c2 + 0.000907 * s2
        - 0.002697 * np.cos(3 * g) + 0.00148 * np.sin(3 * g)
    )  # fmt: skip
    minutes = 229.18 * (0.000075 + 0.001868 * c1 - 0.032077 * s1 - 0.014615 * c2 - 0.040849 * s2)
    inverse_square = 1.00011 + 0.034221 * c1 + 0.00128 * s1 + 0.000719 * c2 + 0.000077 * s2

    hour_angle = np.radians(15.0 * (hour + minutes / 60.0 - 12.0) + longitude)
    phi = np.radians(latitude)
    east = -np.cos(declination) * np.sin(hour_angle)
    north = np.sin(declination) * np.cos(phi) - np.cos(declination) * np.cos(hour_angle) * np.sin(phi)
    up = np.sin(declination) * np.sin(phi) + np.cos(declination) * np.cos(hour_angle) * np.cos(phi)
    zenith = np.degrees(np.arccos(np.clip(up, -1.0, 1.0)))
    return zenith, np.degrees(np.arctan2(east, north)) % 360.0, float(inverse_square**-0.5)


def satellite_position(latitude: Array, longitude: Array) -> tuple[Array, Array]:
    """Viewing zenith and azimuth of a geostationary satellite over a spherical earth.

    Soler and Eisemann (1994), Determination of look angles to geostationary communication satellites, J. Surveying
    Eng. 120, 115. Args and returns: degrees; the azimuth is clockwise from north.
    """
    phi, beside = np.radians(latitude), np.radians(SATELLITE_LONGITUDE - longitude)
    cosine = np.cos(phi) * np.cos(beside)
    zenith = 90.0 - np.degrees(np.arctan2(cosine - 1.0 / ORBIT_RADII, np.sqrt(1.0 - cosine**2)))
    azimuth = np.degrees(np.arctan2(np.sin(beside), -np.sin(phi) * np.cos(beside)))
    return zenith, azimuth % 360.0


def missing_pixels(seed: int, index: int, shape: tuple[int, int], fraction: float) -> NDArray[np.bool_]:
    """Choose the pixels outside the swath: a smoothly jagged border along both ends of the slit.

    Returns:
        Boolean (y, x) with exactly round(fraction * y * x) True.
    """
    across = np.arange(shape[1])
    depth = np.minimum(across, across[::-1]) / shape[1]
    border = 0.2 * fraction * smooth_field(random_stream(seed, Purpose.EDGE, index), shape, 4.0)
    order = np.argsort(depth + border, axis=None, kind="stable")
    missing = np.zeros(shape, dtype=np.bool_)
    missing.reshape(-1)[order[: round(fraction * shape[0] * shape[1])]] = True
    return missing
