"""`evaluate`: its figures against numpy over whole scenes, and what it refuses before it touches anything."""

import csv
import json
import math
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
import zarr
from evaluations import angles, channels_by_hand, in_radiance, metrics_by_hand
from probing import strict_json
from sklearn.decomposition import PCA
from stores import finish, write_scene
from tiny import SETTINGS, tiny_provenance
from torch.distributions import Normal, kl_divergence

from spectralvae import load_model
from spectralvae.analysis import evaluate as command
from spectralvae.analysis.evaluation import METRICS
from spectralvae.analysis.judging import Judge, Tiles
from spectralvae.cli import run as cli
from spectralvae.model import AutoencoderKL
from spectralvae.weights.artifact import read_artifact
from spectralvae.weights.checkpoint import save_checkpoint
from spectralvae.weights.normalization import EPSILON, Normalization
from spectralvae.weights.provenance import Scenes
from spectralvae.weights.settings import build_model

TILE, SCALE, NC, STEPS = 8, 2, 6, (5, 10)
SETTINGS = SETTINGS | {"shape": [NC, TILE, TILE], "chs": [16, 8], "norm_groups": 8, "z_channels": 4, "embed_dim": 4}
NOISE = np.array([0.01, 0.02, 0.03, np.nan, 0.02, 0.01])


def scenes():
    """Scenes of z, whose grids of tiles overlap; channel 4 is dead.

    The tile of v at (8, 8) is left out as too invalid; the one moved back to the edge, at (11, 8), has some of its
    pixels. w is a stack of two pieces, 10 pixels high; its first pixels lie at the clip, and so beyond it in PCA.
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
    made["a"][..., 0] *= 2
    made["w"][:2, :4, [0, 1, 2, 3, 5]] = 10.0
    return made


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """By transform: a store in radiance, and one in its logarithm, whose noise is known."""
    found = {}
    for name in ("zscore", "log_zscore"):
        path, logarithmic = tmp_path_factory.mktemp("stores") / name, name == "log_zscore"
        mean, std = (
            (np.linspace(26, 28, NC), np.linspace(0.2, 0.4, NC))
            if logarithmic
            else (np.linspace(9, 14, NC), np.ones(NC))
        )
        mean[4] = std[4] = np.nan
        normalization = Normalization(name, mean, std, 10.0, 1.0 if logarithmic else None, None, 400.0 + np.arange(NC))
        records = [
            write_scene(path, i, z, {}, split="train" if i == "a" else "val", stack=10 if i == "w" else None)
            for i, z in scenes().items()
        ]
        found[name] = finish(path, records, normalization, arrays={"noise": NOISE} if logarithmic else {})
    return found


def make_run(path, store, steps=STEPS, provenance=None, training=None, spoil=None, **changes):
    """A training run with random weights; ``spoil`` changes them, ``changes`` its run.json."""
    for step in steps:
        model = build_model(SETTINGS)
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            if spoil:
                spoil(model)
        optimizer = torch.optim.AdamW(model.parameters())
        save_checkpoint(path, step, model, SETTINGS, store.normalization, optimizer, {}, provenance=provenance)
    record = {
        "tool": "spectralvae",
        "command": "train",
        "state": "finished",
        "config": {"data": {"store": str(store.path), "tile_size": TILE}, "training": training or {}},
        "starts": [],
        "store_hash": store.hash,
        "best": {"step": STEPS[0]},
    }
    path.mkdir(exist_ok=True)
    (path / "run.json").write_text(json.dumps(record | changes))
    return path


def call(run, folder, *options, **changes):
    """Exit code of the command on a run."""
    path = folder.with_name("config.yaml")
    path.write_text(yaml.safe_dump({"output_dir": str(folder), "run": str(run), "device": "cpu", **changes}))
    return cli(["evaluate", str(path), *options])


def without_pictures(patch):
    """Pictures and page take most of the time. Few pixels are summed up together: that must not be seen."""
    patch.setattr("spectralvae.analysis.judging.BLOCK_SAMPLES", 7 * NC)
    patch.setattr(command, "save_figures", lambda *_: {})
    patch.setattr(command, "write_evaluation_report", lambda *_: None)


@pytest.fixture
def evaluate(tmp_path, monkeypatch, request):
    """Run the command on a run; returns exit code and output directory. Pictures and page only where asked for."""
    if "pictures" not in request.keywords:
        without_pictures(monkeypatch)
    return lambda run, name="results", *options, **changes: (
        call(run, tmp_path / name, *options, **changes),
        tmp_path / name,
    )


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, stores):
    """By transform: a store, a run, the results' directory, and report.json."""
    found = {}
    for name, store in stores.items():
        folder = tmp_path_factory.mktemp(name)
        run = make_run(folder / "run", store)
        with pytest.MonkeyPatch.context() as patch:
            without_pictures(patch)
            assert call(run, folder / "results", batch_size=3) == 0
        found[name] = SimpleNamespace(
            store=store, run=run, folder=folder / "results", report=report(folder / "results")
        )
    return found


@pytest.fixture
def plain(evaluated):
    """A store in radiance with its run."""
    return evaluated["zscore"]


def report(folder):
    return strict_json(folder / "report.json")


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def places(size):
    return [0, 8, 16, 24][: size // TILE] + ([size - TILE] if size % TILE else [])


def encoded(model, tile):
    with torch.no_grad():
        return model.encode(torch.from_numpy(np.nan_to_num(tile)).float().permute(2, 0, 1)[None])


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
                    posterior = encoded(model, tile)
                    with torch.no_grad():
                        made = model.decode(posterior.mean)[0].permute(1, 2, 0).double().numpy().clip(-10, 10)
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


def statistics(store):
    """What metrics by hand ask for: mean, spread, whether of the logarithm, noise of z."""
    normalization = store.normalization
    spread, logarithmic = normalization.std + EPSILON, normalization.transform == "log_zscore"
    return normalization.mean, spread, logarithmic, NOISE / spread if logarithmic else np.full(NC, np.nan)


def numbers(found):
    """NaN is null in JSON, and empty in tables."""
    return {name: math.nan if found[name] in (None, "") else float(found[name]) for name in METRICS}


def check(found, store, z, z_hat, rel=1e-5):
    expected = metrics_by_hand(z, z_hat, *statistics(store))
    assert numbers(found) == pytest.approx(expected, rel=rel, nan_ok=True)


# --- what it finds --------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["zscore", "log_zscore"])
def test_against_whole_scenes(evaluated, transform):
    """Checkpoints by hand; baselines by scikit-learn's PCA of the training scene's grid of tiles."""
    this = evaluated[transform]
    store, found = this.store, this.report
    assert list(found)[:2] == ["checkpoints", "baselines"]
    assert list(found["checkpoints"]) == ["5", "10"]
    for step in STEPS:
        by_scene, tiles, posteriors = truth(store, this.run / f"checkpoints/step={step:06d}")
        z, z_hat = pixels(by_scene)
        entry = found["checkpoints"][str(step)]
        check(entry, store, z, z_hat)
        for score in entry["scenes"]:
            judged, made = by_scene[score["id"]]
            assert score["n_samples"] == np.isfinite(judged).sum()
            assert score["mse"] == pytest.approx(np.nanmean((made - judged) ** 2), rel=1e-5)
            assert score["mae"] == pytest.approx(np.nanmean(np.abs(made - judged)), rel=1e-5)
            spectra = (in_radiance(v.reshape(-1, NC), *statistics(store)[:3]) for v in (judged, made))
            assert score["spectral_angle"] == pytest.approx(angles(*spectra).mean(), rel=1e-5)
        unit = Normal(0.0, 1.0)
        kl = [kl_divergence(Normal(m, (0.5 * v).exp()), unit)[:, s].numpy() for m, v, s in posteriors]
        bits = np.concatenate(kl, axis=1).mean(axis=1) / np.log(2)
        means = np.concatenate([m[:, s].numpy() for m, _, s in posteriors], axis=1)
        np.testing.assert_allclose(entry["latents"]["bits"], bits, rtol=1e-5)
        assert entry["latents"]["bits_per_pixel"] == pytest.approx(bits.sum() / SCALE**2, rel=1e-5)
        assert entry["latents"]["active_units"] == (means.var(axis=1) > 0.01).sum()
    assert found["n_samples"] == np.isfinite(z).sum()
    assert found["peak"] == pytest.approx(np.nanmax(z) - np.nanmin(z))
    assert (found["n_tiles"], found["n_left_out"]) == (len(tiles), 1)
    mse = {step: found["checkpoints"][str(step)]["mse"] for step in STEPS}
    assert found["shown"] == min(mse, key=mse.get)
    assert (found["run"], found["store"], found["store_hash"]) == (str(this.run), str(store.path), store.hash)

    whole = zarr.open_array(store.path / "scenes/a/z", mode="r")[:]
    grid = [whole[y : y + TILE, x : x + TILE].reshape(-1, NC) for y in (0, 8, 12) for x in (0, 8, 16)]
    seen = np.concatenate(grid).astype(np.float64)
    seen = np.nan_to_num(seen[np.isfinite(seen).any(axis=1)])
    baselines = found["baselines"]
    assert list(baselines) == ["mean", "pca_1", "pca_2", "pca_4"]  # 8 is more than there are channels
    check(baselines["mean"], store, z, np.zeros_like(z))
    for k in (1, 2, 4):
        pca = PCA(k, svd_solver="full").fit(seen)
        rebuilt = pca.inverse_transform(pca.transform(np.nan_to_num(z)))
        assert rebuilt.max() > 10.4, "it is clipped, as reconstructions are"
        check(baselines[f"pca_{k}"], store, z, rebuilt.clip(-10, 10), rel=1e-4)


@pytest.mark.parametrize("transform", ["zscore", "log_zscore"])
def test_tables(evaluated, transform):
    this = evaluated[transform]
    store = this.store
    judged = {f"step_{step}": e for step, e in this.report["checkpoints"].items()} | this.report["baselines"]
    rows = {row["name"]: row for row in table(this.folder / "metrics.csv")}
    assert list(rows) == list(judged)
    for name, entry in judged.items():
        assert numbers(rows[name]) == pytest.approx(numbers(entry), rel=0, nan_ok=True)
    assert rows["mean"]["bits_per_pixel"] == rows["mean"]["step"] == ""
    assert rows["step_10"]["step"] == "10"
    assert len(table(this.folder / "scenes.csv")) == 2 * len(judged)
    z, z_hat = pixels(truth(store, this.run / "checkpoints/step=000010")[0])
    by_hand, noise = channels_by_hand(z, z_hat, *statistics(store)), statistics(store)[-1]
    expected = {"wavelength_nm": 400.0 + np.arange(NC), "mean_radiance": by_hand["mean"], "noise_z": noise} | {
        f"{column} step_10": by_hand[key]
        for column, key in (
            *(("rmse_z", "rmse"), ("rmse_radiance", "rmse_radiance")),
            *(("relative_rmse", "relative"), ("rmse_in_noise", "noise")),
        )
    }
    channels = table(this.folder / "channels.csv")
    for key, values in expected.items():  # channel 4 is dead, and of channel 3 the noise is unknown
        found = [float(row.get(key) or "nan") for row in channels]
        np.testing.assert_allclose(found, values, rtol=1e-5, err_msg=key)


def test_views(plain):
    """What pictures are made of."""
    judge, step = Judge(Tiles(plain.store, TILE, 0.5), torch.device("cpu"), 4), plain.report["shown"]
    folder = plain.run / f"checkpoints/step={step:06d}"
    artifact, _ = read_artifact(folder)
    by_scene, tiles, _ = truth(plain.store, folder)
    with torch.no_grad():
        views = [judge.view(artifact, scene, in_full=i == 0) for i, scene in enumerate(judge.tiles.scenes)]
        worst = judge.worst(artifact, judge.network(artifact, lambda _: None).tile_mse, 3)
    assert [view.id for view in views] == ["v", "w"]
    for view in reversed(views):
        z, z_hat = by_scene[view.id]
        judged = np.isfinite(z).any(axis=-1)
        rmse = np.sqrt(np.ma.masked_invalid((z_hat - z) ** 2).mean(axis=-1).filled(np.nan))
        np.testing.assert_allclose(view.rmse, rmse, rtol=1e-4)
    np.testing.assert_array_equal(views[0].z, z.astype(np.float32))
    np.testing.assert_allclose(views[0].z_hat[judged], z_hat[judged], rtol=1e-4, atol=1e-5)
    assert views[1].z is views[1].z_hat is views[1].latents is None

    tiles.sort(key=lambda tile: -tile[3])
    apart = []
    for tile in tiles:
        if not any(o[0] == tile[0] and max(abs(o[1] - tile[1]), abs(o[2] - tile[2])) < TILE for o in apart):
            apart.append(tile)
    assert [(view.scene, view.y, view.x) for view in worst] == [tile[:3] for tile in apart[:3]]
    for view, (*_, mse) in zip(worst, apart, strict=False):
        assert view.mse == pytest.approx(mse, rel=1e-5)
        assert np.nanmean((view.z_hat - view.z) ** 2) == pytest.approx(mse, rel=1e-5)
        assert np.isfinite(view.z_hat).all()

    # a cell shows the latents of the tile in which its centre counts
    whole = zarr.open_array(plain.store.path / "scenes/v/z", mode="r")[:]

    def latents(y, x):
        return encoded(artifact.model, whole[y : y + TILE, x : x + TILE]).mean[0].numpy()

    found = views[0].latents
    assert found.shape == (4, 10, 12)
    # rows 8 and 9: centre 17 of the tile from 11 on, of which row 18 is the last; row 6: the tile from 8 on is left out
    for row, x, tile, of_tile in ((0, 8, 0, 0), (8, 0, 11, 3), (9, 0, 11, 3), (6, 8, 11, 1)):
        np.testing.assert_allclose(found[:, row, x // 2 : x // 2 + 4], latents(tile, x)[:, of_tile], atol=1e-5)
    assert np.isnan(found[:, 4, 4:8]).all()


@pytest.mark.pictures
def test_all_files(evaluated, evaluate, monkeypatch, capsys):
    """With the same bytes as another time; the terminal shows the best checkpoint and the baselines."""
    this = evaluated["log_zscore"]
    monkeypatch.setattr("spectralvae.analysis.judging.BLOCK_SAMPLES", 7 * NC)
    code, folder = evaluate(this.run, batch_size=3)
    assert code == 0
    assert {"config.yaml", "report.html"} < {path.name for path in folder.iterdir()}
    assert list((folder / "figures").glob("*.png"))
    for name in ("report.json", "metrics.csv", "channels.csv", "scenes.csv"):
        assert (folder / name).read_bytes() == (this.folder / name).read_bytes(), name
    out = capsys.readouterr().out
    assert str(folder / "report.html") in out and str(folder / "report.json") in out
    shown = [this.report["checkpoints"][str(this.report["shown"])], *this.report["baselines"].values()][:4]
    rows = [[f"{entry[name]:.4g}" for name in ("mse", "noise_ratio", "spectral_angle")] for entry in shown]
    assert all(row in [line.split()[-3:] for line in out.splitlines()] for row in rows)
    assert json.loads((folder / "run.json").read_text())["state"] == "finished"


def decodes_to(value):
    """Weights with which every sample is decoded as this."""

    def spoil(model):
        model.decoder.conv_out.weight.zero_()
        model.decoder.conv_out.bias.fill_(value)

    return spoil


@pytest.mark.parametrize("transform", ["zscore", "log_zscore"])
def test_what_lies_beyond_the_clip_is_judged_as_users_get_it(tmp_path, stores, evaluate, transform):
    """1e20 is decoded as 10, with an error that has a logarithm."""
    store = stores[transform]
    code, folder = evaluate(make_run(tmp_path / "run", store, steps=(5,), spoil=decodes_to(1e20)))
    assert code == 0
    z, _ = pixels(truth(store, None)[0])
    check(report(folder)["checkpoints"]["5"], store, z, np.full_like(z, 10.0))


# --- which checkpoints ----------------------------------------------------------------------------


@pytest.fixture
def store(stores):
    """What `train` of conftest trains on."""
    return stores["zscore"].path


def test_a_run_as_train_makes_it(train, evaluate):
    code, run = train(n_steps=6, save_every=3, val_every=3, data={"n_val_tiles": 100})
    assert code == 0
    code, folder = evaluate(run, checkpoints="best")
    assert code == 0
    best, found = json.loads((run / "run.json").read_text())["best"], report(folder)
    assert list(found["checkpoints"]) == [str(best["step"])]
    # training counts overlaps twice and samples the posterior
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    mse = {row["step"]: row["val_pixel_mse"] for row in rows if "val_pixel_mse" in row}[best["step"]]
    assert found["checkpoints"][str(best["step"])]["mse"] == pytest.approx(mse, rel=0.2)
    baselines = json.loads((run / "baselines.json").read_text())
    assert found["baselines"]["mean"]["mse"] == pytest.approx(baselines["mean"], rel=0.1)


# --- what readers should know -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "changes", "word"),
    [
        ({}, {"initial_weights": None, "ancestors": []}, None),
        ({"keep_last": 2}, None, None),  # of an earlier version
        ({"init_from": "other"}, {"initial_weights": "beef", "ancestors": ["elsewhere"]}, None),
        ({"init_from": "other"}, {"initial_weights": "beef", "ancestors": ["elsewhere", "0" * 64]}, "1 of the 1"),
        ({"init_from": "other"}, {"initial_weights": "beef", "ancestors": None}, "unknown"),
        ({"init_from": "other"}, None, "unknown"),
    ],
)
def test_initial_weights_that_know_judged_scenes(
    tmp_path, stores, evaluate, monkeypatch, capsys, training, changes, word
):
    """Both the page and the terminal say so; all scenes of the store have one digest."""
    pages = []
    monkeypatch.setattr(command, "write_evaluation_report", lambda path, e, _: pages.append(e))
    provenance = changes and tiny_provenance(**changes, training=Scenes(1, 1, None, None, [], ["mine"]))
    run = make_run(tmp_path / "run", stores["zscore"], steps=(5,), provenance=provenance, training=training)
    assert evaluate(run)[0] == 0
    (page,) = pages
    out = capsys.readouterr().out
    assert len(page.remarks) == ("WARNING" in out) == (word is not None)
    assert all(word in text for text in (out, *page.remarks) if word)


@pytest.mark.parametrize(("keep_last", "wanted"), [(2, "all"), (None, "all"), (2, "best")])
def test_a_run_that_may_delete_what_is_judged(tmp_path, stores, evaluate, capsys, keep_last, wanted):
    run = make_run(tmp_path / "run", stores["zscore"], (5,), state="running", training={"keep_last": keep_last})
    assert evaluate(run, checkpoints=wanted)[0] == 0
    assert ("training.keep_last" in capsys.readouterr().out) == ((keep_last, wanted) == (2, "all"))


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture
def refused(evaluate, capsys):
    """A function that expects one line with these words, and that nothing is made."""

    def refuse(run, *words, **changes):
        capsys.readouterr()
        code, folder = evaluate(run, "refused", **changes)
        err = capsys.readouterr().err
        assert code == 2 and err.count("\n") == 1, err
        assert all(str(word) in err for word in words), (words, err)
        assert not folder.exists()

    return refuse


def test_no_run(tmp_path, plain, refused):
    refused(tmp_path / "nowhere", f"{tmp_path / 'nowhere'}: run:", "spectralvae train")
    refused(plain.store.path, f"{plain.store.path}: run:", "run.json")
    for steps, changes, place, word in (
        ((), {"command": "encode"}, "", "spectralvae encode"),
        ((), {"config": {}}, "/run.json", "config.data"),
        ((), {"config": {"data": {"store": 3}}}, "/run.json", "config.data"),
        ((), {}, "", "no checkpoints"),
    ):
        run = make_run(tmp_path / "run", plain.store, steps=steps, **changes)
        refused(run, f"{run}{place}: run:", word)


def test_no_such_checkpoint(tmp_path, plain, refused):
    refused(plain.run, plain.run, "checkpoints = [7, 9]", "5, 10", checkpoints=[7, 5, 9])
    run = make_run(tmp_path / "run", plain.store, best={"step": 7})
    refused(run, run, "checkpoints = [7]", "5, 10", checkpoints="best")
    record = json.loads((run / "run.json").read_text())
    del record["best"]
    (run / "run.json").write_text(json.dumps(record))
    refused(run, run / "run.json", "checkpoints = 'best'", "newest", checkpoints="best")


def test_a_corrupt_checkpoint(tmp_path, stores, evaluate, refused):
    """Nothing older is taken in its place, and `all` is refused with it; those that are whole can be named."""
    run = make_run(tmp_path / "run", stores["zscore"])
    path = run / "checkpoints/step=000010/normalization.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for wanted in ("all", "newest", [10]):
        refused(run, path, checkpoints=wanted)
    code, folder = evaluate(run, checkpoints=[5])
    assert code == 0 and list(report(folder)["checkpoints"]) == ["5"]


def test_a_checkpoint_of_another_run(tmp_path, evaluated, refused):
    run, name = make_run(tmp_path / "run", evaluated["zscore"].store, steps=(5,)), "checkpoints/step=000010"
    shutil.copytree(evaluated["log_zscore"].run / name, run / name)
    refused(run, f"{run / name}: run:", "normalisation", evaluated["zscore"].store.path)


def test_a_store_that_will_not_do(tmp_path, plain, make_store, refused):
    path, gone = tmp_path / "run", tmp_path / "gone"

    def run_on(store, steps=(), **changes):
        data = {"store": str(store.path), "tile_size": 8} | changes.pop("data", {})
        return make_run(path, store, steps=steps, config={"data": data}, **changes)

    make_run(path, plain.store, steps=(5,))  # found before the store is looked at
    refused(run_on(plain.store, store_hash="f" * 64), f"{plain.store.path}: run:", path, "f" * 16)
    refused(run_on(plain.store, data={"store": str(gone)}), f"{gone}: run:", path)
    refused(run_on(plain.store, data={"max_invalid_fraction": 0.01}), "max_invalid_fraction", "0.01")
    store = make_store(tmp_path / "store", {"a": scenes()["a"]})
    refused(run_on(store, (5,)), f"{store.path}: run:", path, "split.val_fraction")
    few = np.full((8, 8, NC), np.nan)
    few[0, :3] = 1.0
    store = make_store(tmp_path / "few", {"a": few, "v": scenes()["v"]}, val=("v",))
    shutil.rmtree(path)
    refused(run_on(store, (5,), data={"max_invalid_fraction": 0.99}), "(3)", "4 components")


def test_inputs_and_output_inside_of_each_other(tmp_path, plain, evaluate, refused, capsys):
    """--overwrite would delete them."""
    for place in (plain.run / "results", plain.store.path / "results"):
        refused(plain.run, f"output_dir = {place}", place.parent, output_dir=str(place))
        assert not place.exists()
    code, folder = evaluate(plain.run, checkpoints=[10, 5])
    assert code == 0 and list(report(folder)["checkpoints"]) == ["5", "10"]
    shutil.copytree(plain.run, folder / "run")
    shutil.copytree(plain.store.path, folder / "store")
    data = {"store": str(folder / "store"), "tile_size": TILE}
    inside = make_run(tmp_path / "run", plain.store, steps=(5,), config={"data": data})
    for run, place in ((folder / "run", folder / "run"), (inside, folder / "store")):
        capsys.readouterr()
        assert evaluate(run, "results", "--overwrite")[0] == 2
        assert str(place) in capsys.readouterr().err
    assert (folder / "run/run.json").exists() and (folder / "store/zarr.json").exists()


def test_weights_that_give_nothing_finite(tmp_path, stores, evaluate, capsys):
    """Found while running: exit code 1, and no report."""
    run = make_run(tmp_path / "run", stores["zscore"], steps=(10,), spoil=decodes_to(np.inf))
    code, folder = evaluate(run)
    assert code == 1
    err = capsys.readouterr().err
    assert f"{run / 'checkpoints/step=000010'}: " in err and "v at (0, 0)" in err
    assert not (folder / "report.json").exists()
    assert json.loads((folder / "run.json").read_text())["state"] == "failed"


def test_a_signal_stops_it(plain, evaluate, monkeypatch):
    monkeypatch.setattr(AutoencoderKL, "encode", lambda *_: signal.raise_signal(signal.SIGTERM))
    code, folder = evaluate(plain.run)
    assert code == 75
    assert json.loads((folder / "run.json").read_text())["state"] == "stopped"
