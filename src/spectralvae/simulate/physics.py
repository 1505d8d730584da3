"""Backscattered sunlight in the 290-490 nm band: pure numpy, float64, no files and no randomness from outside.

Enough physics that the columns really are in the spectra, and no more. Each pixel is a plane-parallel Rayleigh
atmosphere in eight layers over a Lambertian surface, mixed with an opaque Lambertian cloud. The path radiance is
single scattering; multiple scattering enters only through the total transmittance and the spherical albedo.

In the order in which light meets it: `solar_irradiance`; `air_mass` of the way in and out; `beer_lambert` absorption by
the gases; `rayleigh_optical_depth` of the air, its `spherical_albedo` and `total_transmittance`;
`lambertian_reflectance` of surface and cloud, mixed in `radiance`; `noise_sigma` of the photons that are counted.

THE CROSS SECTIONS AND THE SOLAR LINES ARE STYLISED: right in magnitude, position and shape, but not laboratory data.
Use them to try out methods, never to retrieve anything from real measurements.

Shape letters: y mirror step, x cross-track pixel, c spectral channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BAND_NM = (290.0, 490.0)
DOBSON_UNIT = 2.6867e16  # molecules/cm^2
CLOUD_PRESSURE = 0.7  # cloud top, as a share of the surface pressure
CLOUD_ALBEDO = 0.4  # a cloud of optical depth about 10; thicker ones would outshine the instrument's usual range

# Layer boundaries as shares of the surface pressure, and the share of the ozone column above each of them (a
# mid-latitude profile: the maximum near 22 km). The last layer is the one that a cloud hides.
LAYER_PRESSURE = np.array([0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, CLOUD_PRESSURE, 1.0])
OZONE_ABOVE = np.array([0.0, 0.003, 0.02, 0.12, 0.42, 0.78, 0.91, 0.965, 1.0])

# Centre (nm), depth (share of the continuum at 0.6 nm resolution) and full width (nm) of the strong Fraunhofer lines.
_STRONG_LINES = np.array(
    [
        (299.44, 0.25, 0.4),  # Ni
        (302.11, 0.30, 0.5),  # Fe
        (328.68, 0.20, 0.4),  # Fe
        (336.11, 0.35, 0.6),  # Ti II
        (344.10, 0.35, 0.5),  # Fe
        (358.12, 0.45, 0.7),  # Fe
        (371.99, 0.35, 0.5),  # Fe
        (373.49, 0.40, 0.6),  # Fe
        (374.95, 0.35, 0.5),  # Fe
        (382.04, 0.40, 0.6),  # Fe
        (383.83, 0.45, 0.7),  # Mg
        (388.30, 0.40, 1.2),  # CN band
        (393.37, 0.65, 1.5),  # Ca II K
        (396.85, 0.60, 1.4),  # Ca II H
        (404.58, 0.20, 0.3),  # Fe
        (410.17, 0.30, 0.5),  # H delta
        (422.67, 0.30, 0.4),  # Ca
        (430.80, 0.45, 1.2),  # G band (CH, Fe, Ca)
        (434.05, 0.40, 0.8),  # H gamma
        (438.35, 0.30, 0.4),  # Fe
        (466.81, 0.10, 0.3),  # Fe
        (486.13, 0.30, 0.6),  # H beta
    ]
)
_WEAK_LINES = 500
_LINE_SEED = 1814  # the lines belong to the sun, not to the user's seed

# nm, cm^2: Hartley band, Huggins bands, the gap, and the rise towards the Chappuis band
_OZONE_NM = np.array([280, 290, 300, 310, 320, 330, 340, 350, 360, 380, 400, 430, 460, 500.0])
_OZONE_CM2 = np.array(
    [4e-18, 1.4e-18, 4e-19, 1e-19, 3e-20, 7e-21, 1e-21, 3e-22, 6e-23, 2e-23, 1e-23, 5e-23, 3e-22, 1.2e-21]
)
# nm, cm^2
_HCHO_NM = np.array([303.6, 308.0, 314.3, 317.0, 326.0, 330.0, 339.5, 343.0, 353.2])
_HCHO_CM2 = np.array([4.0e-20, 3.0e-20, 5.2e-20, 4.2e-20, 5.8e-20, 3.4e-20, 4.4e-20, 2.0e-20, 1.8e-20])


@dataclass(frozen=True)
class Optics:
    """What depends on the wavelength alone; every array is (x, c)."""

    wavelength: Array  # nm
    irradiance: Array  # photons/s/cm^2/nm, at 1 astronomical unit
    rayleigh: Array  # optical depth of the whole atmosphere
    albedo_below: Array  # spherical albedo of the whole atmosphere, seen from the surface
    albedo_below_cloud_top: Array  # the same for the atmosphere above the cloud
    ozone: Array  # cm^2, as are the next two
    no2: Array
    hcho: Array


@dataclass(frozen=True)
class Pixels:
    """What depends on the place; every array is (y, x). Angles in degrees, columns in molecules/cm^2."""

    solar_zenith: Array
    viewing_zenith: Array
    relative_azimuth: Array  # 0: sun and satellite stand on the same side
    ozone: Array
    no2_stratosphere: Array  # above all scattering layers
    no2_troposphere: Array  # in the lowest layer, below the cloud top
    hcho: Array  # in the lowest layer
    cloud_fraction: Array  # 0 ... 1


def wavelength_grid(n_xtrack: int, n_channels: int) -> Array:
    """Nominal wavelengths: even steps over the band, shifted a little along the slit as a grating's smile does.

    Returns:
        (x, c) in nm; the shift is -0.02 nm at the centre of the slit and at most 0.06 nm at its ends.
    """
    across = np.linspace(-1.0, 1.0, n_xtrack)
    smile = 0.07 * across**2 + 0.01 * across - 0.02
    return np.linspace(*BAND_NM, n_channels) + smile[:, None]


def solar_irradiance(wavelength: Array) -> Array:
    """Sunlight at 1 astronomical unit, seen at a resolution of 0.6 nm.

    Planck's law at 5778 K times the solid angle of the solar disc, pi (R_sun / AU)^2 = 6.794e-5 sr,
    with line blanketing towards the ultraviolet and Fraunhofer lines. The strong lines stand at their true
    positions; the weak ones are pseudo-random, the same for everybody.

    Args:
        wavelength: any shape, nm.

    Returns:
        photons/s/cm^2/nm, the same shape.
    """
    planck, boltzmann, light_speed = 6.62607015e-34, 1.380649e-23, 2.99792458e8
    disc = np.pi * (6.957e8 / 1.495978707e11) ** 2
    metres = wavelength * 1e-9
    photons = 2 * light_speed / metres**4 / np.expm1(planck * light_speed / (metres * boltzmann * 5778.0))
    per_cm2_per_nm = 1e-4 * 1e-9
    blanketing = 1.0 - 0.45 / (1.0 + np.exp((wavelength - 375.0) / 25.0))
    fine_grid, lines = _fraunhofer_lines()
    return np.asarray(disc * per_cm2_per_nm * photons * blanketing * np.interp(wavelength, fine_grid, lines))


@cache
def _fraunhofer_lines() -> tuple[Array, Array]:
    """Transmittance of the sun's own atmosphere on a 0.02 nm grid, convolved to 0.6 nm full width."""
    grid = np.arange(BAND_NM[0] - 5.0, BAND_NM[1] + 5.0, 0.02)
    random = np.random.Generator(np.random.Philox(_LINE_SEED))
    centre = random.uniform(grid[0], grid[-1], _WEAK_LINES)
    depth = 0.10 * random.exponential(size=_WEAK_LINES) * (BAND_NM[0] / centre) ** 2
    weak = np.stack([centre, np.minimum(depth, 0.2), random.uniform(0.1, 0.5, _WEAK_LINES)], axis=1)

    transmittance = np.ones_like(grid)
    for line_centre, line_depth, width in np.concatenate([_STRONG_LINES, weak]):
        transmittance *= 1.0 - line_depth * _gaussian(grid - line_centre, width)
    slit = _gaussian(np.arange(-1.5, 1.5 + 0.01, 0.02), 0.6)
    padded = np.pad(transmittance, slit.size // 2, mode="edge")
    return grid, np.convolve(padded, slit / slit.sum(), mode="valid")


def _gaussian(offset: Array, full_width: float) -> Array:
    """Gaussian of height 1 and the given full width at half maximum."""
    return np.asarray(np.exp(-4.0 * np.log(2.0) * (offset / full_width) ** 2))


def rayleigh_optical_depth(wavelength: Array) -> Array:
    """Optical depth of the whole clear atmosphere: Bodhaine et al. (1999), eq. 30, J. Atmos. Ocean. Tech. 16, 1854.

    For sea level, 45 degrees north and 360 ppm CO2. Args: nm, any shape. Returns: the same shape, no unit.
    """
    square = (wavelength * 1e-3) ** 2
    numerator = 1.0455996 - 341.29061 / square - 0.90230850 * square
    return np.asarray(0.0021520 * numerator / (1.0 + 0.0027059889 / square - 85.968563 * square))


def ozone_cross_section(wavelength: Array) -> Array:
    """Stylised O3: log-interpolated table with Huggins band wiggles between 312 and 350 nm. nm -> cm^2."""
    smooth = np.interp(wavelength, _OZONE_NM, np.log(_OZONE_CM2))
    window = np.clip((wavelength - 310.0) / 12.0, 0.0, 1.0) * np.clip((355.0 - wavelength) / 10.0, 0.0, 1.0)
    return np.asarray(np.exp(smooth + 0.3 * window * _vibration(wavelength, 250.0)))


def no2_cross_section(wavelength: Array) -> Array:
    """Stylised NO2: a broad band of 6e-19 cm^2 around 400 nm with two vibrational progressions. nm -> cm^2."""
    bands = 1.0 + 0.14 * _vibration(wavelength, 360.0) + 0.08 * _vibration(wavelength, 213.0)
    return np.asarray(6.0e-19 * np.exp(-0.5 * ((wavelength - 405.0) / 55.0) ** 2) * bands)


def hcho_cross_section(wavelength: Array) -> Array:
    """Stylised formaldehyde: Gaussian bands at the positions of the real ones, 300-360 nm. nm -> cm^2."""
    total = 0.8e-20 * np.exp(-0.5 * ((wavelength - 318.0) / 18.0) ** 2)
    for centre, height in zip(_HCHO_NM, _HCHO_CM2, strict=True):
        total = total + height * _gaussian(wavelength - centre, 1.8)
    return np.asarray(total)


def _vibration(wavelength: Array, spacing: float) -> Array:
    """Wave between -1 and 1, even in wavenumber as vibrational levels are; spacing in 1/cm, wavelength in nm."""
    return np.asarray(np.sin(2.0 * np.pi * 1e7 / wavelength / spacing))


def make_optics(wavelength: Array) -> Optics:
    """Work out everything that depends on the wavelength alone; wavelength is (x, c) in nm."""
    rayleigh = rayleigh_optical_depth(wavelength)
    return Optics(
        wavelength=wavelength,
        irradiance=solar_irradiance(wavelength),
        rayleigh=rayleigh,
        albedo_below=spherical_albedo(rayleigh),
        albedo_below_cloud_top=spherical_albedo(CLOUD_PRESSURE * rayleigh),
        ozone=ozone_cross_section(wavelength),
        no2=no2_cross_section(wavelength),
        hcho=hcho_cross_section(wavelength),
    )


def spherical_albedo(depth: Array) -> Array:
    """Share of light from below that a Rayleigh layer throws back: (3 t - 4 E3(t) + 6 E4(t)) / (4 + 3 t).

    Vermote and Tanré (1992), J. Quant. Spectrosc. Radiat. Transfer 47, 305. Args: optical depth t, any shape.
    """
    nodes, weights = np.polynomial.legendre.leggauss(24)
    cosine, weights = (nodes + 1.0) / 2.0, weights / 2.0
    flux = np.zeros_like(depth)
    for mu, weight in zip(cosine, weights, strict=True):
        # E_n(t) = integral of mu^(n-2) exp(-t/mu) over mu from 0 to 1
        flux += weight * (6.0 * mu**2 - 4.0 * mu) * np.exp(-depth / mu)
    return np.asarray((3.0 * depth + flux) / (4.0 + 3.0 * depth))


def total_transmittance(depth: Array, cosine: Array) -> Array:
    """Direct and diffuse transmittance of a Rayleigh layer, ((2/3 + mu) + (2/3 - mu) exp(-t/mu)) / (4/3 + t).

    Vermote and Tanré (1992), as for `spherical_albedo`. Args: optical depth t and cosine mu of the zenith angle,
    shapes that broadcast.
    """
    return np.asarray(((2 / 3 + cosine) + (2 / 3 - cosine) * np.exp(-depth / cosine)) / (4 / 3 + depth))


def air_mass(cos_sun: Array, cos_view: Array) -> Array:
    """Length of the way in and out through a plane-parallel layer, in units of its thickness: m = 1/mu0 + 1/mu.

    The geometric approximation: Platt and Stutz (2008), Differential Optical Absorption Spectroscopy, ch. 9. Args:
    cosines of the solar and the viewing zenith angle, shapes that broadcast.
    """
    return np.asarray(1.0 / cos_sun + 1.0 / cos_view)


def beer_lambert(mass: Array, cross_section: Array, column: Array) -> Array:
    """Share of light that a gas lets through: exp(-sigma S), where S = m N is the effective (slant) column.

    Args:
        mass: m, the air mass, (y, x, 1).
        cross_section: sigma in cm^2, (x, c).
        column: N, the vertical column in molecules/cm^2, (y, x).

    Returns:
        (y, x, c).
    """
    return np.asarray(np.exp(-cross_section * (mass * column[..., None])))


def lambertian_reflectance(albedo: Array | float, above: Array, depth: Array, cos_sun: Array, cos_view: Array) -> Array:
    """What a Lambertian reflector below scattering air adds at the top: A T(mu0) T(mu) / (1 - A S).

    Vermote and Tanré (1992), as for `spherical_albedo`.

    Args:
        albedo: A of the reflector.
        above: S, the spherical albedo of the air above it.
        depth: Rayleigh optical depth of that air, for the transmittances T.
        cos_sun: mu0.
        cos_view: mu.
    """
    transmitted = total_transmittance(depth, cos_sun) * total_transmittance(depth, cos_view)
    return np.asarray(transmitted * (albedo / (1.0 - albedo * above)))


def radiance(optics: Optics, pixels: Pixels, surface: Array, earth_sun_distance: float) -> Array:
    """Noise-free radiance at the top of the atmosphere.

    L = E mu0 / (pi d^2) * rho, with the reflectance rho = rho_path + (1 - f) rho_surface + f rho_cloud of the
    independent pixel approximation, the cloud being an opaque Lambertian reflector: Koelemeijer et al. (2001), J.
    Geophys. Res. 106, 3475. Ozone and stratospheric NO2 absorb above both; HCHO and tropospheric NO2 only below the
    cloud top, so that a cloud hides them.

    Args:
        optics: made for the same x and c.
        pixels: (y, x) each; both zenith angles below 90 degrees.
        surface: Lambertian reflectance, (y, x, c).
        earth_sun_distance: d in astronomical units.

    Returns:
        (y, x, c), photons/s/cm^2/nm/sr.
    """
    sun, view = (np.cos(np.radians(a))[..., None] for a in (pixels.solar_zenith, pixels.viewing_zenith))
    mass = air_mass(sun, view)
    cloud = pixels.cloud_fraction[..., None]
    low_gases = beer_lambert(mass, optics.no2, pixels.no2_troposphere) * beer_lambert(mass, optics.hcho, pixels.hcho)

    ground = lambertian_reflectance(surface, optics.albedo_below, optics.rayleigh, sun, view)
    ground *= low_gases * (1.0 - cloud)
    cloud_depth = CLOUD_PRESSURE * optics.rayleigh
    top = lambertian_reflectance(CLOUD_ALBEDO, optics.albedo_below_cloud_top, cloud_depth, sun, view)
    reflectance = (ground + cloud * top) * beer_lambert(mass, optics.ozone, pixels.ozone)
    reflectance += _path_reflectance(optics, pixels, mass, np.sqrt(low_gases))
    reflectance *= beer_lambert(mass, optics.no2, pixels.no2_stratosphere)
    return np.asarray(reflectance * optics.irradiance * (sun / (np.pi * earth_sun_distance**2)))


def _path_reflectance(optics: Optics, pixels: Pixels, mass: Array, low_half_way: Array) -> Array:
    """Light scattered once, P(Theta) / (4 mu0 mu) * sum over layers of dtau exp(-m tau), without stratospheric NO2.

    Each layer scatters at its middle, and Rayleigh's phase function is P = 3/4 (1 + cos^2 Theta): Liou (2002), An
    Introduction to Atmospheric Radiation, ch. 3 and 6. The cloud hides the lowest layer, half of whose gases the light
    that is scattered there has met.

    Args:
        optics: made for the same x and c.
        pixels: (y, x) each.
        mass: air mass, (y, x, 1).
        low_half_way: share of light that the upper half of the lowest layer's gases lets through, (y, x, c).

    Returns:
        (y, x, c).
    """
    sun, view = np.radians(pixels.solar_zenith), np.radians(pixels.viewing_zenith)
    cos_scattering = -np.cos(sun) * np.cos(view) - np.sin(sun) * np.sin(view) * np.cos(
        np.radians(pixels.relative_azimuth)
    )
    phase = 0.75 * (1.0 + cos_scattering**2) / (4.0 * np.cos(sun) * np.cos(view))
    clear = (1.0 - pixels.cloud_fraction)[..., None]

    thickness = np.diff(LAYER_PRESSURE)
    middle = (LAYER_PRESSURE[1:] + LAYER_PRESSURE[:-1]) / 2.0
    ozone_above = (OZONE_ABOVE[1:] + OZONE_ABOVE[:-1]) / 2.0
    ozone = optics.ozone * pixels.ozone[..., None]
    total = np.zeros_like(low_half_way)
    for layer, (share, pressure, above) in enumerate(zip(thickness, middle, ozone_above, strict=True)):
        light = share * np.exp(-mass * (pressure * optics.rayleigh + above * ozone))
        total += light * low_half_way * clear if layer == thickness.size - 1 else light
    return np.asarray(phase[..., None] * optics.rayleigh * total)


def noise_sigma(signal: Array) -> Array:
    """Standard deviation of photon noise: proportional to sqrt(signal), signal-to-noise 1000 at 1e13.

    Photons arrive as a Poisson process, whose variance is its mean; so many are counted that it is as good as normal.
    Args and returns: photons/s/cm^2/nm/sr, any shape.
    """
    return np.asarray(np.sqrt(signal * 1e13) / 1000.0)
