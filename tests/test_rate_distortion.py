"""What the benchmark of compression compares with keeps what it promises, and its measures are what they are called."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from spectralvae.errors import InputError
from spectralvae.weights.normalization import EPSILON, Normalization
from spectralvae.weights.provenance import Provenance, Scenes

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CODECS = ("constriction", "imagecodecs", "numcodecs", "pysz", "scipy")
SHAPE = (16, 20, 12)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports a benchmark."""
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def rivals(load: Any) -> Any:
    for name in CODECS:
        pytest.importorskip(name)
    return load("rivals")


@pytest.fixture
def components(load: Any) -> Any:
    pytest.importorskip("constriction")
    return load("components")


@pytest.fixture
def benchmark(rivals: Any, load: Any) -> Any:
    threads = torch.get_num_threads()
    yield load("rate_distortion")
    torch.set_num_threads(threads)


@pytest.fixture
def measures(load: Any) -> Any:
    return load("distortion")


def smooth_scene(rank: int = 12, noise: float = 0.05) -> np.ndarray:
    """Maps that vary slowly, each with a spectrum of its own."""
    random = np.random.default_rng(1)
    y, x = np.meshgrid(*(np.linspace(0, 1, n) for n in SHAPE[:2]), indexing="ij")
    maps = [np.cos(3 * (y * np.cos(k) + x * np.sin(k)) + k) / (1 + k) for k in range(rank)]
    z = np.stack(maps, axis=-1) @ random.normal(size=(rank, SHAPE[2]))
    return (z + noise * random.normal(size=SHAPE)).astype(np.float32)


def masked(z: np.ndarray) -> np.ndarray:
    """With whole pixels and single samples invalid."""
    z = z.copy()
    z[:2] = z[9, 7] = np.nan
    z[5, 3, 4:7] = z[8, :, 0] = z[11, 11, -1] = np.nan
    return z


# --- the codecs -------------------------------------------------------------------------------


@pytest.mark.parametrize("holes", ["none", "pixels", "samples"])
def test_mask_and_what_stands_in_for_invalid_samples(rivals: Any, holes: str) -> None:
    z = smooth_scene()
    if holes == "pixels":
        z[3:5, 2:] = np.nan
    if holes == "samples":
        z = masked(z)
    valid = ~np.isnan(z)
    packed = rivals.pack_mask(valid)
    np.testing.assert_array_equal(rivals.unpack_mask(packed, z.shape), valid)
    filled = rivals.filled(z, valid)
    assert np.isfinite(filled).all()
    np.testing.assert_array_equal(filled[valid], z[valid])
    if holes == "samples":
        np.testing.assert_allclose(filled[5, 3, 3:8], np.linspace(z[5, 3, 3], z[5, 3, 7], 5), rtol=1e-6)
        np.testing.assert_array_equal(filled[0, 4], z[2, 4])
    else:
        assert len(packed) < 100


def promises(rivals: Any, z: np.ndarray) -> list[tuple[str, Any, float, Any]]:
    """Name, a function that makes the codec, parameter, and the largest error of each sample that it may make."""
    span = float(np.nanmax(z) - np.nanmin(z))
    rounding = 1e-6 * span
    all_components = math.sqrt(SHAPE[2]) / 2  # orthonormal, each half a step off
    return [
        ("sz3", rivals.Sz3, 0.01, 0.01 + rounding),
        ("sz3", rivals.Sz3, 1.0, 1.0 + rounding),
        ("zfp", rivals.Zfp, 2.0**-6, 2.0**-6),
        ("pca", rivals.Pca, 1e-4, 1e-4 * all_components * 1.01 + rounding),
        ("pca", rivals.Pca, 1e-6, 1e-6 * all_components * 1.01 + 2 * rounding),
        ("pca-jpeg2000", rivals.PcaJpeg2000, 1e-6, 40 * span / 2**16),
        ("bitround", lambda: rivals.BitRound(3), 2.0**-5, np.abs(z) * 2.0**-6 + 1e-12),
        ("bitround", lambda: rivals.BitRound(19), 2.0**-12, np.abs(z) * 2.0**-13 + 1e-12),
        ("zstd", lambda: rivals.Zstd(3), 2.0**-23, 0.0),
    ]


@pytest.mark.parametrize("holes", [False, True])
def test_rivals_decode_from_their_bytes_alone_within_what_they_promise(rivals: Any, holes: bool) -> None:
    z = masked(smooth_scene()) if holes else smooth_scene()
    for name, make, parameter, promise in promises(rivals, z):
        codec = make()
        assert codec.snap(parameter) == parameter, name
        data = bytes(bytearray(codec.encode(z, parameter)))
        assert codec.encode(z, parameter) == data, name
        decoded = make().decode(data)
        assert decoded.shape == z.shape and decoded.dtype == np.float32, name
        np.testing.assert_array_equal(np.isnan(decoded), np.isnan(z), name)
        error = np.abs(decoded.astype(np.float64) - z)
        assert not (error > promise).any(), (name, parameter, np.nanmax(error))
        coarse = max(parameter, 1e-3)
        if name not in ("zstd", "bitround"):
            assert np.nanmax(error) > 0 and len(codec.encode(z, 30 * coarse)) < len(data), name


def test_errors_of_components_are_those_of_the_step(rivals: Any) -> None:
    """White noise, all of whose components are worth coding: a step's error is that of rounding, in z as in them."""
    z = np.random.default_rng(2).normal(size=(40, 50, 12)).astype(np.float32)
    for codec, step in ((rivals.Pca(), 0.2), (rivals.PcaJpeg2000(), 0.2), (rivals.PcaJpeg2000(), 0.02)):
        error = codec.decode(codec.encode(z, step)) - z
        assert np.sqrt(np.mean(error**2)) == pytest.approx(step / math.sqrt(12), rel=0.15)


def test_only_components_that_are_worth_their_bits_are_kept(components: Any) -> None:
    z = smooth_scene(rank=3, noise=1e-6).reshape(-1, 12).astype(np.float64)
    assert components.Spectra.fit(z, 0.01).basis.shape == (3, 12)
    assert components.Spectra.fit(z, 1e-7).basis.shape == (12, 12)
    assert components.Spectra.fit(z, 1e3).basis.shape == (0, 12)
    coarse, fine = (components.Spectra.fit(z, step) for step in (0.5, 1e-7))
    assert len(coarse.data) == 5 + 2 * 12 * (1 + len(coarse.basis))  # float16 is enough
    assert len(fine.data) > 5 + 4 * 12 * 4
    centred = z - z.mean(axis=0)
    values = np.linalg.svd(centred, compute_uv=False)
    rest = centred - (
        components.Spectra.fit(z, 0.01).spectra(components.Spectra.fit(z, 0.01).scores(z)) - z.mean(axis=0)
    )
    assert np.sum(rest**2) == pytest.approx(np.sum(values[3:] ** 2), rel=0.5, abs=1e-5 * np.sum(values**2))


def test_a_component_that_few_spectra_need_is_not_worth_its_own(components: Any) -> None:
    """Of 4 times the variance of the error it saves 3 n of it, and costs 2 ln 2 (n + 16 bits for each channel)."""
    direction = np.full(12, 12**-0.5)
    for n, expected in ((100, 0), (200, 1), (10_000, 1)):
        scores = np.where(np.arange(n) % 2, 1.0, -1.0) * 2 * 0.5 / math.sqrt(12)
        assert len(components.Spectra.fit(scores[:, None] * direction, 0.5).basis) == expected
    least = 2 * math.log(2) * 16 * 12 / (3 - 2 * math.log(2))
    assert 100 < least < 200


def test_two_components_are_those_of_a_singular_value_decomposition(rivals: Any) -> None:
    z = smooth_scene()
    data = rivals.TwoComponents().encode(z, 1.0)
    assert len(data) == pytest.approx(4 * (2 * 320 + 3 * 12), abs=60)
    spectra = z.reshape(-1, 12).astype(np.float64)
    mean = spectra.mean(axis=0)
    u, s, v = np.linalg.svd(spectra - mean, full_matrices=False)
    expected = (u[:, :2] * s[:2]) @ v[:2] + mean
    np.testing.assert_allclose(rivals.TwoComponents().decode(data).reshape(-1, 12), expected, atol=2e-6)


def test_integers_come_back_and_take_about_their_entropy(components: Any) -> None:
    random = np.random.default_rng(3)
    rows = np.stack(
        [
            np.zeros(5000),
            np.full(5000, -7),
            random.normal(scale=3, size=5000).round(),
            random.normal(scale=1e12, size=5000).round(),
            random.standard_cauchy(5000).round().clip(-1e6, 1e6),
        ]
    ).astype(np.int64)
    data = components.encode_integers(rows)
    np.testing.assert_array_equal(components.decode_integers(data, rows.shape), rows)
    empty = components.encode_integers(rows[:0])
    assert components.decode_integers(empty, (0, 5000)).shape == (0, 5000)
    normal = random.normal(scale=5, size=(1, 30_000)).round().astype(np.int64)
    share = np.unique(normal, return_counts=True)[1] / normal.size
    entropy = -normal.size * np.sum(share * np.log2(share)) / 8
    assert entropy < len(components.encode_integers(normal)) < 1.01 * entropy + 100
    wide = (1000 * normal) + random.integers(1000, size=normal.shape)  # 3 digits as good as random
    least = entropy + normal.size * math.log2(1000) / 8
    assert len(components.encode_integers(wide)) < 1.01 * least + 100


# --- the measures -----------------------------------------------------------------------------


def normalization(transform: str, n_channels: int) -> Normalization:
    mean, std = 1.0 + np.arange(n_channels), 0.5 + 0.1 * np.arange(n_channels)
    small = 1.0 if transform == "log_zscore" else None
    return Normalization(transform, mean, std, 10.0, small, None, 400.0 + np.arange(n_channels))


def test_distortion_of_a_scene_done_by_hand(measures: Any) -> None:
    plain = Normalization("zscore", np.zeros(2), np.ones(2) - EPSILON, 10.0, None, None, None)  # radiance is z
    z = np.array([[[3.0, 4.0], [1.0, 0.0], [np.nan, 2.0]]], np.float32)
    z_hat = np.array([[[4.0, 3.0], [1.0, 1.0], [np.nan, 4.0]]], np.float32)
    found = measures.distortion(z, z_hat, plain, np.array([0.5, np.nan]))
    assert found["rmse"] == pytest.approx(math.sqrt((1 + 1 + 0 + 1 + 4) / 5))
    assert found["largest"] == 2
    assert found["psnr"] == pytest.approx(10 * math.log10(4**2 / (7 / 5)))
    between = [math.degrees(math.acos(24 / 25)), 45.0, 0.0]
    assert found["angle_median"] == pytest.approx(np.median(between))
    assert found["angle_99"] == pytest.approx(np.quantile(between, 0.99))
    relative = [1 / 3, 1 / 4, 0, 1]  # what was 0 has none
    assert found["relative_median"] == pytest.approx(np.median(relative))
    assert found["relative_99"] == pytest.approx(np.quantile(relative, 0.99))
    assert found["relative_largest"] == pytest.approx(1)
    assert found["noise_ratio"] == pytest.approx(math.sqrt((2**2 + 0) / 2))
    exact = measures.distortion(z, z, plain, None)
    assert exact["psnr"] == math.inf and exact["rmse"] == exact["largest"] == exact["angle_99"] == 0
    assert math.isnan(exact["noise_ratio"])
    with pytest.raises(AssertionError, match="mask"):
        measures.distortion(z, np.nan_to_num(z_hat), plain, None)


@pytest.mark.parametrize("transform", ["log_zscore", "zscore"])
def test_distortion_agrees_with_evaluate(measures: Any, transform: str) -> None:
    from spectralvae.analysis.metrics import Errors, Observed, Radiance, Truth, metrics_of

    n = normalization(transform, 12)
    z, random = masked(smooth_scene()), np.random.default_rng(4)
    z_hat = z + 0.1 * random.normal(size=z.shape).astype(np.float32)
    noise = np.where(np.arange(12) % 3, 0.02 * (1 + np.arange(12)), np.nan)
    found = measures.distortion(z, z_hat, n, noise)
    radiance = Radiance.of(n.mean, n.std + EPSILON, logarithmic=transform == "log_zscore", device=torch.device("cpu"))
    flat, flat_hat = (torch.from_numpy(a.reshape(-1, 12).T.copy()) for a in (z, z_hat))
    truth, errors = Truth.empty(12, 1), Errors.empty(12, 1)
    observed = Observed(flat, radiance)
    truth.add(0, observed)
    errors.add(0, *observed.errors(flat_hat.nan_to_num()))
    expected = metrics_of(truth, errors, radiance, noise)
    assert found["psnr"] == pytest.approx(expected["psnr"], rel=1e-5)
    assert found["rmse"] == pytest.approx(math.sqrt(expected["mse"]), rel=1e-5)
    assert found["noise_ratio"] == pytest.approx(expected["noise_ratio"], rel=1e-5)
    valid = ~np.isnan(z)
    before, after = (np.where(valid, n.denormalize(a), 0)[valid.any(axis=-1)] for a in (z, z_hat))
    assert np.mean(measures.angles(before, after)) == pytest.approx(expected["spectral_angle"], rel=1e-4)


def test_small_angles_are_not_lost(measures: Any) -> None:
    tiny = 1e-9
    found = measures.angles(
        np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([[math.cos(tiny), math.sin(tiny)], [1.0, 0.0]])
    )
    assert found[0] == pytest.approx(math.degrees(tiny), rel=1e-6) and math.isnan(found[1])


def test_change_of_a_retrieval_done_by_hand(measures: Any) -> None:
    from spectralvae.analysis.regressors import Fitted

    z = np.zeros((1, 4, 2), np.float32)
    z[0, :, 0] = 1, 2, 3, 9
    pixels = np.array([[True, True, True, False]])
    first = Fitted(lambda x: x[:, 0].astype(np.float64), {}, {})
    question = measures.Question(pixels, np.array([1.0, 2.0, 6.0]), first.predict(z[pixels]), first)
    assert question.ask(z)["change"] == 0
    found = question.ask(z + 0.5)  # the original is wrong by 0, 0, 3
    assert found["change"] == pytest.approx(0.5 / math.sqrt(9 / 3))
    assert found["r2_before"] == pytest.approx(1 - 9 / 14)
    assert found["r2"] == pytest.approx(1 - (0.25 + 0.25 + 6.25) / 14)


# --- the search -------------------------------------------------------------------------------


def test_search_meets_a_target_or_ends_at_the_nearest(benchmark: Any, rivals: Any) -> None:
    z = np.zeros((2, 2, 2), np.float32)

    class Fake(rivals.Codec):
        parameter = "step"
        tried: list[float]

        def limits(self, z: np.ndarray) -> tuple[float, float]:
            return 1e-6, 1e3

        def encode(self, z: np.ndarray, parameter: float) -> bytes:
            assert 1e-6 <= parameter <= 1e3
            self.tried.append(parameter)
            return bytes(300 + int(20_000 * max(0.0, 6 - math.log10(parameter)) ** 2) + 7)

        def decode(self, data: bytes) -> np.ndarray:
            raise NotImplementedError

        def beside(self, data: bytes) -> int:
            return 7

    class Whole(Fake):
        def snap(self, parameter: float) -> float:
            return 2.0 ** round(math.log2(parameter))

    codec, sizes = Fake(), {}
    for target in (2_000_000, 1_000_000, 500_000, 200_500):
        codec.tried = []
        parameter = benchmark.search(codec, z, target, sizes)
        assert sizes[parameter] == pytest.approx(target, rel=0.05) and len(codec.tried) <= 12
        assert sizes[parameter] == 300 + int(20_000 * (6 - math.log10(parameter)) ** 2)  # what is beside is not counted
    assert benchmark.search(codec, z, 100, sizes) == pytest.approx(1e3)
    assert benchmark.search(codec, z, 10**8, sizes) == pytest.approx(1e-6)
    codec, sizes = Whole(), {}
    codec.tried = []
    parameter = benchmark.search(codec, z, 513_000, sizes)
    best = min((2.0**k for k in range(-19, 9)), key=lambda p: abs(math.log(len(codec.encode(z, p)) / 513_000)))
    assert parameter == best


def test_search_leaves_no_parameter_between_out(benchmark: Any, rivals: Any) -> None:
    """The bytes fall so steeply that what lies between the nearest two is taken for one that is known already."""

    class Steep(rivals.Codec):
        parameter = "step"

        def limits(self, z: np.ndarray) -> tuple[float, float]:
            return 2.0**-20, 2.0**10

        def snap(self, parameter: float) -> float:
            return 2.0 ** round(math.log2(parameter))

        def encode(self, z: np.ndarray, parameter: float) -> bytes:
            return bytes(10**7 if parameter < 2 else int(1e5 * 0.8 ** math.log2(parameter)))

        def decode(self, data: bytes) -> np.ndarray:
            raise NotImplementedError

    assert benchmark.search(Steep(), np.zeros(1), 80_000, {}) == 2


# --- all of it --------------------------------------------------------------------------------


def scenes_of(identities: list[str]) -> Scenes:
    return Scenes(len(identities), len(identities), None, None, [], identities)


def write_model(load: Any, folder: Path, n: Normalization, training: list[str] | None, validation: list[str]) -> Path:
    from spectralvae.config.loading import dump_config
    from spectralvae.weights.artifact import pack_model, write_folder

    steps = load("steps")
    config = steps.make_config(steps.Network({"chs": [8, 8]}, n.n_channels, 8, 1))
    known = None
    if training is not None:
        sides = scenes_of(training), scenes_of(validation)
        known = Provenance("store", "0", *sides, 8, 1, 0, None, 1, None, None)
    settings = dump_config(config.model)
    write_folder(folder, pack_model(steps.make_model(config), settings, n, None, None, known))
    return folder


@pytest.fixture
def granules(benchmark: Any, load: Any, tmp_path: Path) -> tuple[Path, Path]:
    """Four granules and a model that was trained on all but the second, which it was validated on."""
    encode = load("encode")
    size = {"n_granules": 4, "shape": [16, 24], "n_channels": 16, "invalid_fraction": 0.1}
    folder = encode.command("simulate", tmp_path, **size)
    paths = sorted(folder.glob("TEMPO_RAD*.nc"))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    with h5py.File(paths[0]) as file:
        band = file["band_290_490_nm"]
        log = np.log(np.where(band["radiance"][...] > 1, band["radiance"][...], np.nan).astype(np.float64))
        wavelength = band["nominal_wavelength"][...].mean(axis=0).astype(np.float64)
    mean, std = np.nanmean(log, axis=(0, 1)), np.nanstd(log, axis=(0, 1))
    n = Normalization("log_zscore", mean, std, 10.0, 1.0, "band_290_490_nm", wavelength)
    return folder, write_model(load, tmp_path / "model", n, [digests[i] for i in (0, 2, 3)], [digests[1]])


def test_smallest_form(
    benchmark: Any,
    load: Any,
    granules: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from scipy.io import savemat

    folder, model = granules
    samson = tmp_path / "Samson.mat"
    random = np.random.default_rng(5)
    savemat(samson, {"Y": (np.linspace(0.1, 1, 8)[:, None] * random.random(95 * 95)), "GT": np.ones((3, 8))})
    n = replace(normalization("zscore", 8), wavelength=np.linspace(401, 889, 8))
    of_samson = write_model(
        load, tmp_path / "samson", n, [f"{hashlib.sha256(samson.read_bytes()).hexdigest()}[0,60,0,95]"], ["x"]
    )
    methods = ["pca", "sz3", "pca-2-floats", "zstd3", "deflate"]
    places = [str(tmp_path / name) for name in ("report.json", "figure.png")]
    scenes = [
        "--granules",
        str(folder),
        "--model",
        str(model),
        "--samson",
        str(samson),
        "--samson-model",
        str(of_samson),
    ]
    rest = ["--ratios", "4", "1000000", "--repeats", "1", "--json", places[0], "--figure", places[1]]
    benchmark.main([*scenes, "--methods", *methods, *rest])

    report = json.loads(Path(places[0]).read_text())
    tempo, other = report["scenes"]
    coded = sorted(folder.glob("TEMPO_RAD*.nc"))[1]
    assert tempo["scene"] == coded.stem and tempo["shape"] == [16, 24, 16]
    with h5py.File(coded) as file:
        stored = file["band_290_490_nm/radiance"]
        assert tempo["deflated_bytes"] == stored.id.get_storage_size()
        valid = float((stored[...] > 0).mean())
    assert tempo["valid_share"] == pytest.approx(valid) and tempo["valid_share"] < 0.95
    assert other["shape"] == [35, 95, 8] and other["r2_before"] == {}
    for scene in (tempo, other):
        float32 = math.prod(scene["shape"]) * 4
        assert scene["float32_bytes"] == float32
        points = {(p["method"], p["target"]): p for p in scene["points"]}
        assert set(points) >= {("zstd3", None), ("deflate", None), ("pca-2-floats", None), ("pca", 4.0), ("sz3", 4.0)}
        for (method, target), point in points.items():
            assert point["ratio"] == pytest.approx(float32 / point["bytes"])
            assert point["bits_per_sample"] == pytest.approx(32 / point["ratio"])
            assert point["ratio_to_deflated"] == pytest.approx(scene["deflated_bytes"] / point["bytes"])
            assert len(point["encode_seconds"]["all"]) == 1 and point["decode_mb_per_s"] > 0
            assert point["reached"] == (target is None or abs(point["ratio"] / target - 1) < 0.06)
            assert target != 1e6 or not point["reached"]
            if method in ("zstd3", "deflate"):
                assert point["largest"] == 0 and point["psnr"] is None
        assert points["deflate", None]["bytes"] == pytest.approx(scene["deflated_bytes"], rel=0.01)
    assert set(tempo["r2_before"]) == {"NO2", "HCHO", "O3TOT", "CLDO4"}
    exact = next(p for p in tempo["points"] if p["method"] == "zstd3")
    assert all(found["change"] == 0 for found in exact["retrieval"].values())
    assert all(p["noise_ratio"] is not None for p in tempo["points"])
    assert all(p["noise_ratio"] is None for p in other["points"])
    printed = capsys.readouterr().out
    assert sum(line.startswith("| ") for line in printed.splitlines()) == 4 + sum(
        len(scene["points"]) for scene in (tempo, other)
    )
    assert Path(places[1]).read_bytes().startswith(b"\x89PNG")


def test_what_was_trained_on_is_not_coded(
    benchmark: Any, load: Any, granules: tuple[Path, Path], tmp_path: Path
) -> None:
    from scipy.io import savemat

    folder, _ = granules
    n = normalization("log_zscore", 16)
    unknown = write_model(load, tmp_path / "unknown", n, None, [])
    with pytest.raises(InputError, match="does not tell"):
        benchmark.simulated(folder, unknown)
    others = write_model(load, tmp_path / "others", n, ["a"], ["b"])
    with pytest.raises(InputError, match="has 0 granules of the validation"):
        benchmark.simulated(folder, others)
    samson = tmp_path / "Samson.mat"
    savemat(samson, {"Y": np.ones((8, 95 * 95))})
    n = replace(normalization("zscore", 8), wavelength=np.linspace(401, 889, 8))
    region = f"{hashlib.sha256(samson.read_bytes()).hexdigest()}[60,95,0,95]"
    of_region = write_model(load, tmp_path / "region", n, [region], [])
    with pytest.raises(InputError, match=r"was trained on the region \[60, 95, 0, 95\]"):
        benchmark.samson(samson, of_region, [60, 95, 0, 95])


def test_ours_is_called_by_its_keys_and_counted_without_coordinates(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import xarray as xr

    n, z, called = normalization("zscore", 12), smooth_scene(), []

    def pretend(name: str, folder: Path, **config: Any) -> Path:
        called.append((name, config))
        made = folder / name
        made.mkdir(exist_ok=True)
        if name == "compress":
            (made / "scene.svae").write_bytes(b"x" * 100)
            row = {"bytes": 100, "bytes_without_coordinates": 65}
            (made / "report.json").write_text(json.dumps({"files": {"scene.nc": row}}))
            return made
        assert Path(config["inputs"][0]).read_bytes() == b"x" * 100
        radiance = ("y", "x", "channel"), n.denormalize(z).astype(np.float32)
        wavelength = xr.Variable("channel", n.wavelength, {"units": "nm"})
        xr.Dataset({"radiance": radiance}, {"wavelength": wavelength}).to_netcdf(made / "scene.nc", engine="h5netcdf")
        return made

    monkeypatch.setattr(benchmark, "command", pretend)
    nothing = np.empty(0, np.float32)
    subject = benchmark.Subject("s", {"path": "p"}, tmp_path, n, nothing, z, {}, None, None, {}, [])
    for method, key in (("ours", {"rate": {"step": 0.5}}), ("ours-bounded", {"bound": {"z": 0.5}})):
        ours = benchmark.METHODS[method](subject, tmp_path, "cpu")
        data = ours.encode(z, 0.5)
        assert len(data) - ours.beside(data) == 65
        np.testing.assert_allclose(ours.decode(data), z, atol=1e-5)
        (first, given), (second, _) = called[-2:]
        assert (first, second) == ("compress", "decompress")
        assert given == {"inputs": [{"path": "p"}], "model": str(tmp_path), "device": "cpu", **key}
