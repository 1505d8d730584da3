"""`evaluate`: its figures against numpy over whole scenes, and what it refuses before it touches anything."""

import csv
import json
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
import zarr
from sklearn.decomposition import PCA
from sklearn.metrics import mean_absolute_error, mean_squared_error
from tiny import tiny_provenance

from spectralvae import load_model
from spectralvae.analysis import evaluate as command
from spectralvae.analysis.baselines import Baselines
from spectralvae.analysis.evaluation import METRICS
from spectralvae.analysis.judging import Tiles
from spectralvae.cli import run as cli
from spectralvae.data.pca import PixelPCA
from spectralvae.data.store import REQUIRED_ARRAYS, Store
from spectralvae.data.store_writer import finish_store
from spectralvae.model import AutoencoderKL
from spectralvae.weights.checkpoint import save_checkpoint
from spectralvae.weights.normalization import EPSILON, Normalization
from spectralvae.weights.provenance import Scenes
from spectralvae.weights.settings import build_model

TILE, SCALE, NC, STEPS = 8, 2, 6, (5, 10)
SETTINGS = {
    "shape": [NC, TILE, TILE],
    "chs": [16, 8],
    "attn_sizes": [],
    "mid_attn": True,
    "num_res_blocks": 1,
    "dropout_prob": 0.0,
    "z_channels": 4,
    "double_z": True,
    "n_attention_heads": 2,
    "norm_groups": 8,
    "norm_eps": 1e-6,
    "norm_affine": True,
    "act": "gelu",
    "conv_kernel_size": 3,
    "conv_padding_mode": "zeros",
    "embed_dim": 4,
    "kl_weight": 1e-6,
    "nll_loss_type": "l1",
}
NOISE = np.array([0.01, 0.02, 0.03, np.nan, 0.02, 0.01])


def scenes():
    """Scenes of z, whose grids of tiles overlap; channel 4 is dead.

    The tile of v at (8, 8) is left out as too invalid; the one moved back to the edge, at (11, 8), has some of its
    pixels. w is a stack of two pieces, 10 pixels high.
    """
    random = np.random.default_rng(0)
    made = {
        name: random.normal(size=(*shape, NC)) for name, shape in (("a", (20, 24)), ("v", (19, 24)), ("w", (20, 9)))
    }
    for z in made.values():
        z += 0.8 * random.normal(size=(*z.shape[:2], 1))
        z[random.random(z.shape) < 0.1] = np.nan
        z[..., 4] = np.nan
    made["v"][8:12, 8:16] = np.nan
    return made


@pytest.fixture(scope="module")
def stores(tmp_path_factory, make_store):
    """By transform: a store in radiance, and one in its logarithm, whose noise is known."""
    folder = tmp_path_factory.mktemp("stores")
    plain = make_store(folder / "plain", scenes(), val=("v", "w"))
    found = {}
    for name in ("zscore", "log_zscore"):
        path = folder / name
        (path / "scenes").parent.mkdir()
        shutil.copytree(plain.path / "scenes", path / "scenes")
        logarithmic = name == "log_zscore"
        mean, std = np.linspace(9, 14, NC), np.ones(NC)
        if logarithmic:
            mean, std = np.linspace(26, 28, NC), np.linspace(0.2, 0.4, NC)
        mean[4] = std[4] = np.nan
        normalization = Normalization(name, mean, std, 10.0, 1.0 if logarithmic else None, None, 400.0 + np.arange(NC))
        arrays = {key: np.zeros(NC) for key in REQUIRED_ARRAYS if key not in normalization.arrays()}
        records = [replace(record, stack=10 if record.id == "w" else None) for record in plain.scenes]
        finish_store(path, records, normalization, arrays | ({"noise": NOISE} if logarithmic else {}), "float16")
        found[name] = Store(path)
    return found


def make_run(path, store, steps=STEPS, provenance=None, training=None, **changes):
    """A training run with random weights."""
    for step in steps:
        model = build_model(SETTINGS)
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        optimizer = torch.optim.AdamW(model.parameters())
        save_checkpoint(path, step, model, SETTINGS, store.normalization, optimizer, {}, provenance=provenance)
    data = {"store": str(store.path), "tile_size": TILE}
    record = {
        "tool": "spectralvae",
        "command": "train",
        "state": "finished",
        "config": {"data": data, "training": training or {}},
        "starts": [],
        "store_hash": store.hash,
        "best": {"step": STEPS[0]},
    }
    path.mkdir(exist_ok=True)
    (path / "run.json").write_text(json.dumps(record | changes))
    return path


@pytest.fixture
def evaluate(tmp_path, monkeypatch, request):
    """Run the command on a run; returns exit code and output directory. Pictures and page only where asked for."""
    if "pictures" not in request.keywords:
        monkeypatch.setattr(command, "save_figures", lambda *_: {})
        monkeypatch.setattr(command, "write_evaluation_report", lambda *_: None)

    def call(run, name="results", *options, **changes):
        config = {"output_dir": str(tmp_path / name), "run": str(run), "device": "cpu", **changes}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return cli(["evaluate", str(path), *options]), tmp_path / name

    return call


def report(folder):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads((folder / "report.json").read_text(), parse_constant=refuse)


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def places(size):
    return [0, 8, 16, 24][: size // TILE] + ([size - TILE] if size % TILE else [])


def truth(store, step_folder):
    """z, reconstruction and latents of each validation scene, all by hand; z is NaN where not judged.

    Returns:
        scene -> z, z_hat (ny, nx, C); tiles as (scene, y, x, mse); posteriors of the tiles, their cells that count.
    """
    model = load_model(step_folder) if step_folder else None
    found, tiles, posteriors = {}, [], []
    for scene, pieces in (("v", [(0, 19)]), ("w", [(0, 10), (10, 20)])):
        z = zarr.open_array(store.path / f"scenes/{scene}/z", mode="r")[:].astype(np.float64)
        judged, z_hat = np.full_like(z, np.nan), np.zeros_like(z)
        taken = np.zeros(z.shape[:2], bool)
        for top, bottom in pieces:
            for y in places(bottom - top):
                for x in places(z.shape[1]):
                    here = np.s_[top + y : top + y + TILE, x : x + TILE]
                    tile, mine = z[here], ~taken[here]
                    if np.isnan(tile).mean() > 0.5:
                        continue
                    taken[here] = True
                    judged[here][mine] = tile[mine]
                    if model is None:
                        continue
                    with torch.no_grad():
                        given = torch.from_numpy(np.nan_to_num(tile)).float().permute(2, 0, 1)[None]
                        posterior = model.encode(given)
                        made = model.decode(posterior.mean)[0].permute(1, 2, 0).double().numpy()
                    made = made.clip(-10, 10)
                    z_hat[here][mine] = made[mine]
                    tiles.append((scene, top + y, x, np.nanmean((made - tile) ** 2)))
                    seen = (np.isfinite(tile).any(-1) & mine).reshape(4, 2, 4, 2).any(axis=(1, 3))
                    posteriors.append((posterior.mean[0].double(), posterior.logvar[0].double(), seen))
        found[scene] = (judged, z_hat)
    return found, tiles, posteriors


def pixels(found):
    """z and z_hat of all scenes, (P, C), pixels that were judged."""
    z, z_hat = (np.concatenate([pair[i].reshape(-1, NC) for pair in found.values()]) for i in range(2))
    seen = np.isfinite(z).any(axis=1)
    return z[seen], z_hat[seen]


def expected_metrics(store, z, z_hat):
    valid, normalization = np.isfinite(z), store.normalization
    logarithmic = normalization.transform == "log_zscore"
    mse = mean_squared_error(z[valid], z_hat[valid])
    a, b = normalization.denormalize(z), normalization.denormalize(z_hat)
    a0, b0 = np.where(valid, a, 0.0), np.where(valid, b, 0.0)
    cosine = (a0 * b0).sum(1) / np.linalg.norm(a0, axis=1) / np.linalg.norm(b0, axis=1)
    alive = np.arange(NC) != 4
    deviation = z[:, alive] - np.nanmean(z[:, alive], axis=0)
    in_noise = (z_hat - z) / (NOISE / (normalization.std + EPSILON))
    return {
        "mse": mse,
        "mae": mean_absolute_error(z[valid], z_hat[valid]),
        "psnr": 10 * np.log10((np.nanmax(z) - np.nanmin(z)) ** 2 / mse),
        "spectral_angle": np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean(),
        "explained_variance": 1 - np.nansum((z_hat - z) ** 2) / np.nansum(deviation**2),
        "rmse_radiance": np.sqrt(np.nanmean((b - a) ** 2)),
        "relative_rmse": np.sqrt(np.nanmean((b / a - 1) ** 2)) if logarithmic else None,
        "noise_ratio": np.sqrt(np.nanmean(in_noise**2)) if logarithmic else None,
    }


def close(found, expected, rel=1e-5):
    assert list(expected) == list(METRICS)
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            assert found[name] == pytest.approx(value, rel=rel), name


# --- what it finds --------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["zscore", "log_zscore"])
def test_against_whole_scenes(tmp_path, stores, evaluate, transform):
    store = stores[transform]
    run = make_run(tmp_path / "run", store)
    code, folder = evaluate(run)
    assert code == 0
    found = report(folder)
    assert list(found)[:2] == ["checkpoints", "baselines"]
    assert list(found["checkpoints"]) == ["5", "10"]
    for step in STEPS:
        by_scene, tiles, posteriors = truth(store, run / f"checkpoints/step={step:06d}")
        z, z_hat = pixels(by_scene)
        entry = found["checkpoints"][str(step)]
        close(entry, expected_metrics(store, z, z_hat))
        for score in entry["scenes"]:
            judged, made = by_scene[score["id"]]
            assert score["n_samples"] == np.isfinite(judged).sum()
            assert score["mse"] == pytest.approx(np.nanmean((made - judged) ** 2), rel=1e-5)
            assert score["mae"] == pytest.approx(np.nanmean(np.abs(made - judged)), rel=1e-5)
        kl = [0.5 * (m**2 + v.exp() - 1 - v)[:, s].numpy() for m, v, s in posteriors]
        bits = np.concatenate(kl, axis=1).mean(axis=1) / np.log(2)
        means = np.concatenate([m[:, s].numpy() for m, _, s in posteriors], axis=1)
        np.testing.assert_allclose(entry["latents"]["bits"], bits, rtol=1e-5)
        assert entry["latents"]["bits_per_pixel"] == pytest.approx(bits.sum() / SCALE**2, rel=1e-5)
        assert entry["latents"]["active_units"] == (means.var(axis=1) > 0.01).sum()
    assert found["n_samples"] == np.isfinite(z).sum()
    assert found["peak"] == pytest.approx(np.nanmax(z) - np.nanmin(z))
    assert (found["n_tiles"], found["n_left_out"]) == (len(tiles), 9 + 8 - len(tiles))
    assert found["n_left_out"] == 1
    mse = {step: found["checkpoints"][str(step)]["mse"] for step in STEPS}
    assert found["shown"] == min(mse, key=mse.get)
    assert (found["run"], found["store"], found["store_hash"]) == (str(run), str(store.path), store.hash)


@pytest.mark.parametrize("transform", ["zscore", "log_zscore"])
def test_baselines(tmp_path, stores, evaluate, monkeypatch, transform):
    """PCA against scikit-learn's, fitted on the tiles that it was fitted on."""
    store, fitted = stores[transform], []

    def fit(tiles, k):
        fitted.extend(tile.copy() for tile in tiles)
        return PixelPCA.fit(fitted, k)

    monkeypatch.setattr(command, "PixelPCA", type("Watched", (), {"fit": staticmethod(fit)}))
    code, folder = evaluate(make_run(tmp_path / "run", store))
    assert code == 0
    whole = zarr.open_array(store.path / "scenes/a/z", mode="r")[:]  # the training scene
    grid = [whole[y : y + TILE, x : x + TILE] for y in (0, 8, 12) for x in (0, 8, 16)]
    np.testing.assert_array_equal(fitted, grid)
    seen = np.concatenate([tile.reshape(-1, NC) for tile in fitted]).astype(np.float64)
    seen = np.nan_to_num(seen[np.isfinite(seen).any(axis=1)])
    z, _ = pixels(truth(store, None)[0])
    found = report(folder)["baselines"]
    assert list(found) == ["mean", "pca_1", "pca_2", "pca_4"]  # 8 is more than there are channels
    close(found["mean"], expected_metrics(store, z, np.zeros_like(z)))
    for k in (1, 2, 4):
        pca = PCA(k, svd_solver="full").fit(seen)
        z_hat = pca.inverse_transform(pca.transform(np.nan_to_num(z))).clip(-10, 10)
        close(found[f"pca_{k}"], expected_metrics(store, z, z_hat), rel=1e-4)


def test_pca_is_fitted_on_tiles_from_everywhere(tmp_path, stores, evaluate, monkeypatch):
    """Every third tile would be of one column."""
    store, fitted = stores["zscore"], []
    monkeypatch.setattr(command, "REFERENCE_TILES", 3)
    monkeypatch.setattr(command, "FIT_PIXELS", 0)
    original = command.read_crops
    monkeypatch.setattr(command, "read_crops", lambda s, crops, t: fitted.extend(crops) or original(s, crops, t))
    for name in ("one", "other"):
        assert evaluate(make_run(tmp_path / "run", store, steps=(5,)), name)[0] == 0
    assert len(fitted) == 6
    assert fitted[:3] == fitted[3:]
    assert len(set(fitted)) == 3
    assert len({crop.x for crop in fitted}) > 1


def test_tables(tmp_path, stores, evaluate):
    store = stores["log_zscore"]
    run = make_run(tmp_path / "run", store)
    code, folder = evaluate(run)
    assert code == 0
    found = report(folder)
    judged = {f"step_{step}": entry for step, entry in found["checkpoints"].items()} | found["baselines"]
    rows = {row["name"]: row for row in table(folder / "metrics.csv")}
    assert list(rows) == list(judged)
    for name, entry in judged.items():
        assert {key: float(rows[name][key]) for key in METRICS} == {key: entry[key] for key in METRICS}
    assert rows["mean"]["bits_per_pixel"] == rows["mean"]["step"] == ""
    assert rows["step_10"]["step"] == "10"
    assert len(table(folder / "scenes.csv")) == 2 * len(judged)
    channels = table(folder / "channels.csv")
    z, z_hat = pixels(truth(store, run / "checkpoints/step=000010")[0])
    a, b = store.normalization.denormalize(z), store.normalization.denormalize(z_hat)
    noise = NOISE / (store.normalization.std + EPSILON)
    for c, row in enumerate(channels):
        assert float(row["wavelength_nm"]) == 400 + c
        if c == 4:
            assert row["rmse_z step_10"] == row["mean_radiance"] == row["rmse_in_noise step_10"] == ""
            continue
        rmse = np.sqrt(np.nanmean((z_hat - z)[:, c] ** 2))
        assert float(row["rmse_z step_10"]) == pytest.approx(rmse, rel=1e-5)
        assert float(row["mean_radiance"]) == pytest.approx(np.nanmean(a[:, c]), rel=1e-5)
        assert float(row["rmse_radiance step_10"]) == pytest.approx(np.sqrt(np.nanmean((b - a)[:, c] ** 2)), rel=1e-5)
        assert float(row["relative_rmse step_10"]) == pytest.approx(
            np.sqrt(np.nanmean((b / a - 1)[:, c] ** 2)), rel=1e-5
        )
        assert row["rmse_in_noise step_10"] == "" if c == 3 else float(row["noise_z"]) == pytest.approx(noise[c])
        if c != 3:
            assert float(row["rmse_in_noise step_10"]) == pytest.approx(rmse / noise[c], rel=1e-5)


def test_views(tmp_path, stores, evaluate, monkeypatch):
    """What pictures are made of."""
    seen = []
    store = stores["zscore"]
    run = make_run(tmp_path / "run", store)
    code, folder = evaluate(run)
    monkeypatch.setattr(command, "save_figures", lambda e, _: seen.append(e) or {})
    assert evaluate(run, "--overwrite", "--overwrite")[0] == code == 0
    (e,) = seen
    by_scene, tiles, _ = truth(store, run / f"checkpoints/step={report(folder)['shown']:06d}")
    assert [view.id for view in e.views] == ["v", "w"]
    for view in e.views:
        z, z_hat = by_scene[view.id]
        judged = np.isfinite(z).any(axis=-1)
        np.testing.assert_array_equal(np.isfinite(view.rmse), judged)
        rmse = np.sqrt(np.nanmean((z_hat - z)[judged] ** 2, axis=-1))
        np.testing.assert_allclose(view.rmse[judged], rmse, rtol=1e-4)
    first = e.views[0]
    z, z_hat = by_scene["v"]
    judged = np.isfinite(z).any(axis=-1)
    np.testing.assert_array_equal(first.z, z.astype(np.float32))
    np.testing.assert_allclose(first.z_hat[judged], z_hat[judged], rtol=1e-4, atol=1e-5)
    assert first.latents.shape == (4, 10, 12)
    assert e.views[1].z is e.views[1].z_hat is e.views[1].latents is None
    tiles.sort(key=lambda tile: -tile[3])
    apart = []
    for tile in tiles:
        if not any(o[0] == tile[0] and max(abs(o[1] - tile[1]), abs(o[2] - tile[2])) < TILE for o in apart):
            apart.append(tile)
    assert [(view.scene, view.y, view.x) for view in e.worst] == [tile[:3] for tile in apart[:3]]
    for view, (*_, mse) in zip(e.worst, apart, strict=False):
        assert view.mse == pytest.approx(mse, rel=1e-5)
        assert np.nanmean((view.z_hat - view.z) ** 2) == pytest.approx(mse, rel=1e-5)
        assert np.isfinite(view.z_hat).all()


def test_latents_of_a_view_lie_where_they_belong(tmp_path, stores, evaluate, monkeypatch):
    """A cell shows the latents of the tile in which its centre counts."""
    seen = []
    store = stores["zscore"]
    run = make_run(tmp_path / "run", store, steps=(5,))
    monkeypatch.setattr(command, "save_figures", lambda e, _: seen.append(e) or {})
    assert evaluate(run)[0] == 0
    model = load_model(run)
    z = np.nan_to_num(zarr.open_array(store.path / "scenes/v/z", mode="r")[:].astype(np.float32))

    def latents(y, x):
        with torch.no_grad():
            return model.encode(torch.from_numpy(z[y : y + 8, x : x + 8]).permute(2, 0, 1)[None]).mean[0].numpy()

    found = seen[0].views[0].latents
    np.testing.assert_allclose(found[:, 0:4, 4:8], latents(0, 8), atol=1e-5)
    np.testing.assert_allclose(found[:, 8, 0:4], latents(11, 0)[:, 3], atol=1e-5)  # centre 17 of the tile from 11 on
    np.testing.assert_allclose(found[:, 9, 0:4], latents(11, 0)[:, 3], atol=1e-5)  # row 18 is the last
    np.testing.assert_allclose(found[:, 6, 4:8], latents(11, 8)[:, 1], atol=1e-5)  # for that from 8 on is left out
    assert np.isnan(found[:, 4, 4:8]).all()


def test_every_pixel_counts_once(stores):
    """In the first tile that it is in, of those that are judged; no tile lies across two pieces of a stack."""
    tiles = Tiles(stores["zscore"], TILE, 0.5)
    counted = {scene: np.zeros(tiles.store.scenes[scene].shape[:2], int) for scene in tiles.scenes}
    covered = {scene: np.zeros(tiles.store.scenes[scene].shape[:2], bool) for scene in tiles.scenes}
    for crop, mask in zip(tiles.crops, tiles.counting(tiles.crops), strict=True):
        counted[crop.scene][crop.y : crop.y + TILE, crop.x : crop.x + TILE] += mask
        covered[crop.scene][crop.y : crop.y + TILE, crop.x : crop.x + TILE] = True
    for scene in tiles.scenes:
        np.testing.assert_array_equal(counted[scene], covered[scene])
    v, w = tiles.scenes
    assert covered[w].all()
    assert not covered[v][8:11, 8:16].any()
    assert covered[v].sum() == 19 * 24 - 3 * 8


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_batches_change_nothing_but_rounding(tmp_path, stores, evaluate, batch_size):
    run = make_run(tmp_path / "run", stores["log_zscore"])
    (_, one), (_, other) = evaluate(run, "one"), evaluate(run, "other", batch_size=batch_size)
    one, other = report(one), report(other)
    assert one["baselines"] == other["baselines"]
    for step in ("5", "10"):
        for name in METRICS:
            assert other["checkpoints"][step][name] == pytest.approx(one["checkpoints"][step][name], rel=1e-6)


def test_the_same_bytes_again(tmp_path, stores, evaluate):
    run = make_run(tmp_path / "run", stores["log_zscore"])
    folders = [evaluate(run, name)[1] for name in ("one", "other")]
    for name in ("report.json", "metrics.csv", "channels.csv", "scenes.csv"):
        first, second = ((folder / name).read_bytes() for folder in folders)
        assert first == second, name


def test_small_blocks(tmp_path, stores, evaluate, monkeypatch):
    """Pixels may be summed up in any portions."""
    run = make_run(tmp_path / "run", stores["log_zscore"])
    whole = report(evaluate(run, "whole")[1])
    monkeypatch.setattr("spectralvae.analysis.judging.BLOCK_SAMPLES", 7 * NC)
    parts = report(evaluate(run, "parts")[1])
    for kind in ("checkpoints", "baselines"):
        for name, entry in whole[kind].items():
            close(parts[kind][name], {key: entry[key] for key in METRICS}, rel=1e-5)


def test_baselines_one_after_the_other():
    """Each is what it is alone."""
    random = np.random.default_rng(0)
    pca = PixelPCA.fit([random.normal(size=(100, NC)) @ random.normal(size=(NC, NC))], 5)
    z = random.normal(size=(30, NC))
    given = torch.from_numpy(z.T.copy()).float()
    for name, z_hat in Baselines(pca, (1, 3, 5), torch.device("cpu")).reconstruct(given):
        k = 0 if name == "mean" else int(name.removeprefix("pca_"))
        expected = pca.reconstruct(z, k).T if k else np.zeros((NC, 30))
        np.testing.assert_allclose(z_hat.numpy(), expected, atol=1e-5)


@pytest.mark.pictures
def test_all_files(tmp_path, stores, evaluate, capsys):
    code, folder = evaluate(make_run(tmp_path / "run", stores["log_zscore"]))
    assert code == 0
    names = {path.name for path in folder.iterdir()} - {".lock"}
    files = "config.yaml run.json report.json report.html metrics.csv channels.csv scenes.csv figures"
    assert names == set(files.split())
    assert list((folder / "figures").glob("*.png"))
    out = capsys.readouterr().out
    assert str(folder / "report.html") in out
    assert str(folder / "report.json") in out
    found = report(folder)
    rows = [line for line in out.splitlines() if line.startswith(("step", "PCA", "mean"))]
    shown = [found["checkpoints"][str(found["shown"])], *(found["baselines"][n] for n in ("pca_1", "pca_2", "mean"))]
    assert [row.split()[-3:] for row in rows] == [
        [f"{entry[name]:.4g}" for name in ("mse", "noise_ratio", "spectral_angle")] for entry in shown
    ]
    assert json.loads((folder / "run.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("transform", ["zscore", "log_zscore"])
def test_what_lies_beyond_the_clip_is_judged_as_users_get_it(tmp_path, stores, evaluate, monkeypatch, transform):
    """1e20 is decoded as 10, with an error that has a logarithm."""
    monkeypatch.setattr(AutoencoderKL, "decode", lambda self, z: torch.full((len(z), NC, TILE, TILE), 1e20))
    store = stores[transform]
    code, folder = evaluate(make_run(tmp_path / "run", store, steps=(5,)))
    assert code == 0
    z, _ = pixels(truth(store, None)[0])
    found = report(folder)
    close(found["checkpoints"]["5"], expected_metrics(store, z, np.full_like(z, 10.0)))


def test_baselines_are_clipped_as_well(tmp_path, stores, evaluate, monkeypatch):
    monkeypatch.setattr(Baselines, "reconstruct", lambda self, z: ((n, torch.full_like(z, -1e20)) for n in self.names))
    code, folder = evaluate(make_run(tmp_path / "run", stores["log_zscore"], steps=(5,)))
    assert code == 0
    z, _ = pixels(truth(stores["log_zscore"], None)[0])
    expected = expected_metrics(stores["log_zscore"], z, np.full_like(z, -10.0))
    close(report(folder)["baselines"]["pca_2"], expected, rel=1e-4)


# --- which checkpoints ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "steps"),
    [("all", ["5", "10"]), ("newest", ["10"]), ("best", ["5"]), ([10], ["10"]), ([10, 5], ["5", "10"])],
)
def test_checkpoints(tmp_path, stores, evaluate, wanted, steps):
    code, folder = evaluate(make_run(tmp_path / "run", stores["zscore"]), checkpoints=wanted)
    assert code == 0
    assert list(report(folder)["checkpoints"]) == steps


@pytest.fixture
def store(stores):
    """What `train` of conftest trains on."""
    return stores["zscore"].path


def test_a_run_as_train_makes_it(train, evaluate):
    code, run = train(n_steps=6, save_every=3, val_every=3, data={"n_val_tiles": 100})
    assert code == 0
    code, folder = evaluate(run, checkpoints="best")
    assert code == 0
    best = json.loads((run / "run.json").read_text())["best"]["step"]
    found = report(folder)
    assert list(found["checkpoints"]) == [str(best)]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (mse,) = (row["val_pixel_mse"] for row in rows if row["step"] == best)
    # training counts overlaps twice and samples the posterior
    assert found["checkpoints"][str(best)]["mse"] == pytest.approx(mse, rel=0.2)
    baselines = json.loads((run / "baselines.json").read_text())
    assert found["baselines"]["mean"]["mse"] == pytest.approx(baselines["mean"], rel=0.1)


# --- what readers should know -------------------------------------------------------------------


KNOWN_SCENES, UNKNOWN = "validation scenes judged are among those", "were trained on is unknown"


@pytest.mark.pictures
@pytest.mark.parametrize(
    ("init_from", "changes", "words"),
    [
        (None, {"initial_weights": None, "ancestors": []}, None),
        (None, None, None),  # of an earlier version
        ("other", {"initial_weights": "beef", "ancestors": ["elsewhere"]}, None),
        ("other", {"initial_weights": "beef", "ancestors": ["elsewhere", "0" * 64]}, f"1 of the 1 {KNOWN_SCENES}"),
        ("other", {"initial_weights": "beef", "ancestors": None}, UNKNOWN),
        ("other", None, UNKNOWN),
    ],
)
def test_initial_weights_that_know_judged_scenes(
    tmp_path, stores, evaluate, monkeypatch, capsys, init_from, changes, words
):
    """On the page and on the terminal, for all scenes of the store have one digest."""
    monkeypatch.setattr(command, "save_figures", lambda *_: {})
    provenance = changes and tiny_provenance(**changes, training=Scenes(1, 1, None, None, [], ["mine"]))
    run = make_run(tmp_path / "run", stores["zscore"], provenance=provenance, training={"init_from": init_from})
    code, folder = evaluate(run)
    assert code == 0
    for text in (capsys.readouterr().out, (folder / "report.html").read_text()):
        for known in (KNOWN_SCENES, UNKNOWN):
            assert (known in text) == (words is not None and known in words)
        assert words is None or words in text


@pytest.mark.parametrize(
    ("state", "keep_last", "wanted", "warned"),
    [
        ("running", 2, "all", True),
        ("running", None, "all", False),
        ("running", 2, "best", False),
        ("finished", 2, "all", False),
    ],
)
def test_a_run_that_may_delete_what_is_judged(tmp_path, stores, evaluate, capsys, state, keep_last, wanted, warned):
    run = make_run(tmp_path / "run", stores["zscore"], state=state, training={"keep_last": keep_last})
    assert evaluate(run, checkpoints=wanted)[0] == 0
    told = capsys.readouterr().out
    assert ("training.keep_last may delete" in told) == ("`checkpoints: best` or a list" in told) == warned


# --- what is refused ------------------------------------------------------------------------------


def refused(evaluate, capsys, run, *words, **changes):
    """The one line of the error names all words; nothing was made."""
    capsys.readouterr()
    code, folder = evaluate(run, "refused", **changes)
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.count("\n") == 1
    for word in words:
        assert word in err, (word, err)
    assert not folder.exists()


def test_no_run(tmp_path, stores, evaluate, capsys):
    refused(evaluate, capsys, tmp_path / "nowhere", "run: ", "nowhere", "no such folder", "spectralvae train")
    refused(evaluate, capsys, stores["zscore"].path, "no training run", "no run.json")
    run = make_run(tmp_path / "run", stores["zscore"], command="encode")
    refused(evaluate, capsys, run, "no training run", "spectralvae encode")
    run = make_run(tmp_path / "run", stores["zscore"], config={})
    refused(evaluate, capsys, run, "run.json", "damaged")


def test_no_checkpoints(tmp_path, stores, evaluate, capsys):
    refused(evaluate, capsys, make_run(tmp_path / "run", stores["zscore"], steps=()), "has no checkpoints")


def test_no_such_checkpoint(tmp_path, stores, evaluate, capsys):
    run = make_run(tmp_path / "run", stores["zscore"])
    refused(evaluate, capsys, run, "checkpoints: ", "none of step 7, 9", "there are 5, 10", checkpoints=[7, 5, 9])
    run = make_run(tmp_path / "run", stores["zscore"], best={"step": 7})
    refused(evaluate, capsys, run, "none of step 7", "there are 5, 10", checkpoints="best")


def test_no_best(tmp_path, stores, evaluate, capsys):
    run = make_run(tmp_path / "run", stores["zscore"])
    record = json.loads((run / "run.json").read_text())
    del record["best"]
    (run / "run.json").write_text(json.dumps(record))
    refused(evaluate, capsys, run, "best", "run.json", "use newest", checkpoints="best")


@pytest.mark.parametrize("name", ["model.safetensors", "normalization.safetensors", "manifest.json"])
def test_a_damaged_checkpoint(tmp_path, stores, evaluate, capsys, name):
    """Nothing older is taken in its place, and `all` is refused with it; those that are whole can be named."""
    run = make_run(tmp_path / "run", stores["zscore"])
    path = run / "checkpoints/step=000010" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for wanted in ("all", "newest", [10]):
        refused(evaluate, capsys, run, str(path), "damaged", checkpoints=wanted)
    assert evaluate(run, checkpoints=[5])[0] == 0


def test_a_checkpoint_of_another_run(tmp_path, stores, evaluate, capsys):
    run = make_run(tmp_path / "run", stores["zscore"])
    other = make_run(tmp_path / "other", stores["log_zscore"])
    shutil.rmtree(run / "checkpoints/step=000010")
    shutil.copytree(other / "checkpoints/step=000010", run / "checkpoints/step=000010")
    refused(evaluate, capsys, run, "step=000010", "normalisation", "another run")


def test_another_store(tmp_path, stores, evaluate, capsys):
    run = make_run(tmp_path / "run", stores["zscore"], store_hash="f" * 64)
    refused(evaluate, capsys, run, "not trained on", str(stores["zscore"].path), "f" * 16)
    run = make_run(
        tmp_path / "run", stores["zscore"], config={"data": {"store": str(tmp_path / "gone"), "tile_size": 8}}
    )
    refused(evaluate, capsys, run, "its store", "gone", "is not there", "move it back")


def test_no_validation_scenes(tmp_path, make_store, evaluate, capsys):
    store = make_store(tmp_path / "store", {"a": scenes()["a"]})
    refused(evaluate, capsys, make_run(tmp_path / "run", store), "no validation scenes", "val_fraction")


def test_no_tile_is_valid_enough(tmp_path, stores, evaluate, capsys):
    data = {"store": str(stores["zscore"].path), "tile_size": 8, "max_invalid_fraction": 0.01}
    run = make_run(tmp_path / "run", stores["zscore"], config={"data": data})
    refused(evaluate, capsys, run, "max_invalid_fraction", "0.01")


def test_too_few_pixels_for_pca(tmp_path, stores, evaluate, capsys, monkeypatch):
    monkeypatch.setattr(PixelPCA, "fit", lambda tiles, k: original([next(iter(tiles))[0, :2]], k))
    original = Original.fit
    refused(evaluate, capsys, make_run(tmp_path / "run", stores["zscore"]), "too few pixels")


class Original(PixelPCA):
    fit = PixelPCA.fit


def test_output_inside_of_inputs(tmp_path, stores, evaluate, capsys):
    run = make_run(tmp_path / "run", stores["zscore"])
    for place in (run / "results", stores["zscore"].path / "results"):
        refused(evaluate, capsys, run, "output_dir", str(place), "lies in", output_dir=str(place))
        assert not place.exists()


def test_inputs_inside_of_output(tmp_path, stores, evaluate, capsys):
    """--overwrite would delete them."""
    run = make_run(tmp_path / "run", stores["zscore"])
    code, folder = evaluate(run)
    assert code == 0
    shutil.copytree(run, folder / "run")
    capsys.readouterr()
    assert evaluate(folder / "run", "results", "--overwrite")[0] == 2
    assert "lies in output_dir" in capsys.readouterr().err
    assert (folder / "run/run.json").exists()
    shutil.copytree(stores["zscore"].path, folder / "store")
    data = {"store": str(folder / "store"), "tile_size": TILE}
    make_run(tmp_path / "run", stores["zscore"], config={"data": data})
    assert evaluate(run, "results", "--overwrite")[0] == 2
    assert "lies in output_dir" in capsys.readouterr().err
    assert (folder / "store/zarr.json").exists()


def test_weights_that_give_nothing_finite(tmp_path, stores, evaluate, capsys):
    """Found while running: exit code 1, and no report."""
    run, store = make_run(tmp_path / "run", stores["zscore"]), stores["zscore"]
    model = load_model(run)
    with torch.no_grad():
        model.decoder.conv_out.weight.fill_(3e38)
    shutil.rmtree(run / "checkpoints/step=000010")
    save_checkpoint(run, 10, model, SETTINGS, store.normalization, torch.optim.AdamW(model.parameters()), {})
    code, folder = evaluate(run)
    assert code == 1
    err = capsys.readouterr().err
    assert "step=000010" in err
    assert "not finite" in err
    assert not (folder / "report.json").exists()
    assert json.loads((folder / "run.json").read_text())["state"] == "failed"


def test_finished(tmp_path, stores, evaluate, capsys):
    """Starting it again does nothing and says so."""
    run = make_run(tmp_path / "run", stores["zscore"])
    evaluate(run)
    shutil.rmtree(run)
    capsys.readouterr()
    assert evaluate(run)[0] == 0
    assert "finished" in capsys.readouterr().out


def test_a_signal_stops_it(tmp_path, stores, evaluate, monkeypatch):
    monkeypatch.setattr(command, "_judge_all", lambda *_: signal.raise_signal(signal.SIGTERM))
    code, folder = evaluate(make_run(tmp_path / "run", stores["zscore"]))
    assert code == 75
    assert json.loads((folder / "run.json").read_text())["state"] == "stopped"
