"""The page of a whole scene: its colours against scikit-learn, its axes and curves against numpy."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from drawing import assert_readable
from evaluations import NC, normalization
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.impute import SimpleImputer

from spectralvae.plotting import composite
from spectralvae.plotting.composite import COLORS, draw_scene, thinning
from spectralvae.plotting.panels import telling_pixels

PANELS = ("original", "reconstruction", "error", "channels", "z", "radiance")
MAPS = PANELS[:3]


def scene(ny: int, nx: int, nc: int = NC, seed: int = 0) -> np.ndarray:
    """Smooth spectra: three directions, each weaker than the one before, and a little noise."""
    rng = np.random.default_rng(seed)
    t = np.linspace(-1, 1, nc)
    amounts = rng.normal(size=(ny, nx, 3)) * [1.0, 0.5, 0.2]
    return (amounts @ np.stack([1 + 0.3 * t, t + 0.1, t**2 - 0.4]) + 0.02 * rng.normal(size=(ny, nx, nc))).astype("f4")


def blurred(z: np.ndarray, seed: int = 1) -> np.ndarray:
    """A reconstruction: what is invalid is finite in it."""
    noise = np.random.default_rng(seed).normal(size=z.shape)
    return (np.nan_to_num(z, nan=0.7) * 0.9 + 0.05 * noise).astype("f4")


def rmse_of(z: np.ndarray, z_hat: np.ndarray) -> np.ndarray:
    squares = np.ma.masked_invalid((z_hat - z).astype(np.float64)) ** 2
    return np.sqrt(squares.mean(axis=-1)).filled(np.nan)


def draw(z: np.ndarray, z_hat: np.ndarray, rmse: np.ndarray | None = None, **settings) -> Figure:
    settings = {"normalization": normalization(nc=z.shape[-1]), "name": "scene"} | settings
    return draw_scene(z, z_hat, rmse_of(z, z_hat) if rmse is None else rmse, **settings)


def panels(figure: Figure) -> dict[str, Axes]:
    return dict(zip(PANELS, figure.axes, strict=True))


def images(figure: Figure) -> list[np.ndarray]:
    """What the two composites show, (y, x, RGBA), and the map of errors."""
    return [np.ma.filled(panels(figure)[name].get_images()[0].get_array(), np.nan) for name in MAPS]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def sklearn_components(z: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Components (y, x, 3) of z and of others by an independent route, from 0 to 1 between z's quantiles, any sign."""
    flat = z.reshape(-1, z.shape[-1]).astype(np.float64)
    seen = np.isfinite(flat).any(axis=1)
    imputer = SimpleImputer().fit(flat)
    pca = PCA(3, svd_solver="full").fit(imputer.transform(flat[seen]))
    found = []
    for scene_ in (z, *others):
        spectra = np.where(np.isfinite(flat), scene_.reshape(flat.shape), np.nan)
        found.append(pca.transform(imputer.transform(spectra)))
    low, high = np.quantile(found[0][seen], [0.02, 0.98], axis=0)
    return [((scores - low) / (high - low)).reshape(*z.shape[:2], 3) for scores in found]


def assert_colors_are(shown: np.ndarray, expected: np.ndarray, seen: np.ndarray) -> None:
    """Wherever no colour is cut off, the components behind the colours are the expected ones, up to their sign."""
    rgb = shown[..., :3].astype(np.float64)
    whole = seen & ((rgb > 0) & (rgb < 1)).all(axis=-1)
    assert whole.mean() > 0.5
    components = 0.5 + (rgb - 0.5) @ np.linalg.inv(COLORS)
    for k in range(3):
        ours, theirs = components[whole, k], np.clip(expected[whole, k], 0, 1)
        flipped = np.clip(1 - expected[whole, k], 0, 1)
        best = min((theirs, flipped), key=lambda e: np.abs(ours - e).sum())
        np.testing.assert_allclose(ours, best, rtol=0, atol=2e-5)


@pytest.mark.parametrize("spoil", [False, True])
def test_colors_are_the_principal_components_of_scikit_learn(spoil: bool) -> None:
    """Fitted on the original, whose quantiles set the scale of the reconstruction too."""
    z = scene(30, 40)
    z_hat = blurred(z)
    if spoil:
        rng = np.random.default_rng(3)
        z[rng.random(z.shape) < 0.1] = np.nan
        z[:, 5:9] = np.nan
    seen = np.isfinite(z).any(axis=-1)
    original, reconstruction, _ = images(draw(z, z_hat))
    theirs, theirs_hat = sklearn_components(z, z_hat)
    assert_colors_are(original, theirs, seen)
    assert_colors_are(reconstruction, theirs_hat, seen)


def test_colors_are_like_true_ones() -> None:
    """Bright is light, more at long wavelengths is yellow, more in the middle is green; and the other way round."""
    t = np.linspace(-1, 1, NC)
    shapes = np.stack([np.ones(NC), t, 1 / 3 - t**2])
    rng = np.random.default_rng(0)
    amounts = rng.normal(size=(20, 20, 3)) * [1.0, 0.7, 0.7]
    amounts[:3, 0] = np.diag([1.0, 0.7, 0.7])
    amounts[3:6, 0] = -amounts[:3, 0]
    for sign in (1, -1):  # whatever the sign that the eigenvectors come with
        image, _, _ = images(draw(*[(sign * amounts @ shapes).astype("f4")] * 2))
        bright, yellow, green, dark, blue, red = np.roll(image[:6, 0, :3], 0 if sign > 0 else 3, axis=0)
        assert bright.min() > dark.max() + 0.2
        assert yellow[:2].min() > yellow[2] + 0.1
        assert blue[2] > blue[:2].max() + 0.1
        assert green[1] - green[0] > 0.1 and red[0] - red[1] > 0.1


def test_invalid_pixels_are_hatched_grey() -> None:
    z = scene(20, 30)
    z[4:9, 10:20] = np.nan
    z[0, 0, 1:] = np.nan  # one sample is left: the pixel is shown
    figure = draw(z, blurred(z))
    lost = np.isnan(z).all(axis=-1)
    original, reconstruction, errors = images(figure)
    for image in (original, reconstruction):
        np.testing.assert_array_equal(image[..., 3], np.where(lost, 0.0, 1.0))
    np.testing.assert_array_equal(np.isnan(errors), lost)
    pixels = rendered(figure)
    for name in MAPS:
        axes = panels(figure)[name]
        assert axes.patch.get_hatch()
        x, y = axes.transData.transform([[10, 4], [19, 8]]).astype(int).T
        inside = pixels[y[1] : y[0], x[0] : x[1]].reshape(-1, 3).astype(float)
        assert np.ptp(inside, axis=1).max() < 2  # grey
        assert np.median(inside) == pytest.approx(255 * 0.6, abs=1)


def rendered(figure: Figure) -> np.ndarray:
    """(y, x, RGB) of the page as it is seen, y upwards as in matplotlib's coordinates."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[::-1, :, :3]


@pytest.mark.parametrize(
    ("size", "steps", "whole"),
    [
        ((40, 61), (3, 2), False),
        ((90, 31), (1, 1), True),
        ((13, 200), (1, 3), True),
        ((301, 12), (2, 1), False),
    ],
)
def test_axes_count_pixels_of_the_scene(size: tuple[int, int], steps: tuple[int, int], whole: bool) -> None:
    """The rectangle of large errors and dark spectra is seen where it is, with the longer axis to the right."""
    ny, nx = size
    rmse = np.full(size, 0.02)
    top, left = ny // 3, nx // 4
    rmse[:top, :left] = 1.0
    z = scene(ny, nx)
    z[:top, :left] -= 6.0
    z, z_hat = (part[:: steps[0], :: steps[1]] for part in (z, blurred(z)))
    given = rmse if whole else rmse[:: steps[0], :: steps[1]]
    figure = draw(z, z_hat, given, pixels_per_sample=steps)
    if not whole:  # the scene's own size is not told
        ny, nx = len(given) * steps[0], len(given[0]) * steps[1]
    turned = ny > 1.5 * nx
    pixels = rendered(figure)
    for name in MAPS:
        axes = panels(figure)[name]
        across, down = (ny, nx) if turned else (nx, ny)
        assert axes.get_xlim() == (-0.5, across - 0.5), "never mirrored"
        assert axes.get_ylim() == ((-0.5, down - 0.5) if turned else (down - 0.5, -0.5))
        width, height = axes.get_window_extent().size
        assert 0.6 * height < width < 8.1 * height
        for y, x in itertools.product((0.15, 0.9), (0.12, 0.9)):
            place = (y * ny, x * nx) if turned else (x * nx, y * ny)
            column, row = axes.transData.transform(place).astype(int)
            is_large = pixels[row, column].astype(int).sum() > 600  # the light end of colours
            is_dark = pixels[row, column].astype(int).sum() < 250
            assert (is_large if name == "error" else is_dark) == ((y, x) == (0.15, 0.12)), (name, y, x)
    assert panels(figure)["error"].get_xlabel()[0] == "xy"[turned]
    assert panels(figure)["original"].get_ylabel()[0] == "yx"[turned]
    text = figure.get_suptitle()
    assert f"{ny} x {nx} x {NC}" in text
    assert ("turned" in text) == turned
    for axis, k in zip("yx", steps, strict=True):
        assert (f"in {k} along {axis}" in text) == (k > 1)


def test_errors_by_channel_and_in_the_title() -> None:
    z = scene(25, 31)
    z[np.random.default_rng(0).random(z.shape) < np.linspace(0, 0.9, NC)] = np.nan
    z[..., 4] = np.nan
    z_hat = blurred(z) + np.linspace(0, 0.5, NC, dtype="f4")
    figure = draw(z, z_hat)
    flat = np.ma.masked_invalid(z.reshape(-1, NC).astype(np.float64))
    squares = (z_hat.reshape(-1, NC) - flat) ** 2
    drawn = {line.get_linestyle(): line for line in panels(figure)["channels"].get_lines()}
    for style, values in (("--", flat.std(axis=0)), ("-", np.sqrt(squares.mean(axis=0)))):
        np.testing.assert_allclose(drawn[style].get_ydata(), np.ma.filled(values, np.nan), rtol=1e-9)
    np.testing.assert_array_equal(drawn["-"].get_xdata(), normalization().wavelength)
    assert np.isnan(drawn["-"].get_ydata()[4])
    spread = np.sqrt((flat.var(axis=0) * flat.count(axis=0)).sum() / flat.count())
    imputed = SimpleImputer(keep_empty_features=True).fit_transform(z.reshape(-1, NC))
    shares = 100 * PCA(3, svd_solver="full").fit(imputed).explained_variance_ratio_
    numbers = [f"{np.sqrt(squares.mean()):.3g}", f"{spread:.3g}", *(f"{share:.3g} %" for share in shares)]
    assert all(f" {number}" in figure.get_suptitle() for number in numbers)


@pytest.mark.parametrize("transform", ["log_zscore", "zscore"])
def test_spectra_of_telling_pixels(transform: str) -> None:
    """Dark, middling, bright and worst, in this order; original and reconstruction; in z and in the file's units."""
    z = np.broadcast_to(np.linspace(-1, 1, 101, dtype="f4")[:, None], (101, NC)).reshape(1, 101, NC).copy()
    z_hat = z + np.linspace(0, 0.1, NC, dtype="f4")
    z_hat[0, 33] += 1
    z[0, 33, 2] = np.nan
    figure = draw(z, z_hat, normalization=normalization(transform=transform))
    radiance_axes = panels(figure)["radiance"]
    drawn, radiance = ([line.get_ydata() for line in axes.get_lines()] for axes in (panels(figure)["z"], radiance_axes))
    # of 100 pixels that are complete, the 5 % and 95 % quantiles and the median, between two neighbours
    for number, x in enumerate((4, 50, 95, 33)):
        expected = np.where(np.isnan(z[0, x]), np.nan, z_hat[0, x])
        np.testing.assert_array_equal(drawn[2 * number], z[0, x])
        np.testing.assert_array_equal(drawn[2 * number + 1], expected)
        for line, values in ((radiance[2 * number], z[0, x]), (radiance[2 * number + 1], expected)):
            truth = values.astype(np.float64) * (0.5 + 1e-8) + np.linspace(26.0, 30.0, NC)
            np.testing.assert_allclose(line, np.exp(truth) if transform == "log_zscore" else truth, rtol=1e-12)
    assert radiance_axes.get_yscale() == ("log" if transform == "log_zscore" else "linear")
    assert all(f"y 0, x {x}" in label for label, x in zip(legend(figure), (4, 50, 95, 33), strict=False))


def test_telling_pixels_where_none_is_complete() -> None:
    """One pixel has fewer invalid samples than all others: it must not be dark, middling and bright at once."""
    z = scene(20, 20)
    z[np.random.default_rng(0).random(z.shape) < 0.2] = np.nan
    z[..., 0] = np.nan
    z[7, 7] = 0.0
    assert len(set(telling_pixels(z).values())) == 3
    brightness = [np.nanmean(z[place]) for place in telling_pixels(z).values()]
    assert brightness == sorted(brightness)


@pytest.mark.parametrize("size", [(1, 1), (131, 2048), (2048, 131), (5000, 7000), (1, 10**6), (500, 500)])
def test_thinning(size: tuple[int, int]) -> None:
    """As many pixels as are allowed, or nearly: steps along both axes as even as can be."""
    ky, kx = thinning(*size)
    ny, nx = (-(-n // k) for n, k in zip(size, (ky, kx), strict=True))
    assert ny * nx <= composite.MAX_PIXELS
    assert (ky, kx) == (1, 1) or ny * nx > 0.6 * composite.MAX_PIXELS
    assert min(size) > 400 or min(ky, kx) == 1


def test_what_is_drawn_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """More pixels than are drawn may be given; axes and labels still count those of the scene."""
    monkeypatch.setattr(composite, "MAX_PIXELS", 300)
    monkeypatch.setattr(composite, "FIT_PIXELS", 97)
    fitted: list[int] = []
    fit = composite.PixelPCA.fit
    monkeypatch.setattr(
        composite.PixelPCA, "fit", lambda tiles, k: fit((fitted.append(len(tile)) or tile for tile in tiles), k)
    )
    z = scene(40, 60)
    z[3:6, 7:30] = np.nan
    z_hat = blurred(z)
    z_hat[36, 56] = z[36, 56] - 5
    figure = draw(z, z_hat, pixels_per_sample=(1, 2))
    original, reconstruction, errors = images(figure)
    assert original.shape[:2] == reconstruction.shape[:2]
    assert 150 < original.shape[0] * original.shape[1] <= 300
    assert errors.shape == (40, 60)
    assert sum(fitted) == 97
    assert "y 36, x 112" in legend(figure)[3]


ODD = {
    "oblong": scene(13, 60),
    "turned": scene(200, 13),
    "one row": scene(1, 50),
    "one column": scene(50, 1),
    "one pixel": scene(1, 1),
    "constant": np.full((20, 20, NC), 0.5, "f4"),
    "all pixels but one are the same": np.where(np.arange(400).reshape(20, 20, 1) == 5, 4, np.ones(NC)).astype("f4"),
    "one channel": scene(20, 20, 1),
    "two channels": scene(20, 20, 2),
    "all invalid": np.full((20, 20, NC), np.nan, "f4"),
    "long, all invalid": np.full((8, 50, NC), np.nan, "f4"),
    "half invalid": np.where(np.arange(20)[:, None, None] < 10, np.nan, scene(20, 20)),
    "a channel is never valid": np.where(np.arange(NC) == 3, np.nan, scene(20, 20)),
    "one valid sample": np.where(np.arange(400 * NC).reshape(20, 20, NC) == 50, 1.0, np.nan).astype("f4"),
}


@pytest.mark.parametrize("z", ODD.values(), ids=ODD)
def test_odd_scenes(z: np.ndarray) -> None:
    """They are drawn without a warning; texts neither overlap nor leave the page, and tell how much is invalid."""
    figure = draw(z, blurred(z), name="a" * 60)
    assert_readable(figure)
    invalid = np.isnan(z).mean()
    assert f" {100 * invalid:.3g} %" in figure.get_suptitle()
    assert [len(axes.texts) for axes in figure.axes] == [invalid == 1] * 6


@pytest.mark.parametrize("nc", [2, NC])
def test_without_wavelengths_channels_are_numbered(nc: int) -> None:
    z = scene(10, 12, nc)
    for axes in draw(z, blurred(z), normalization=replace(normalization(nc=nc), wavelength=None)).axes[3:]:
        assert axes.get_lines()[0].get_xdata().tolist() == list(range(nc))
        assert all(float(place).is_integer() for place in axes.get_xticks())


def test_components_of_rounding_are_not_shown() -> None:
    """A scene with one direction only: what float32 leaves in the others would be stretched to full colours."""
    z = (np.random.default_rng(0).normal(size=(20, 20, 1)) * np.linspace(1, 2, NC)).astype("f4")
    figure = draw(z, z)
    assert "yellow" not in figure.get_suptitle()
    image = images(figure)[0]
    assert np.ptp(image[..., :3], axis=-1).max() == 0
    low, high = panels(figure)["error"].get_images()[0].get_clim()
    assert low == 0 < high, "even where there is no error"
