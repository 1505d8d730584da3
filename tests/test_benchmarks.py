"""The benchmarks of training in their smallest form: all modes compute the same, and reports hold what they should."""

import argparse
import importlib
import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from spectralvae.data.cache import SceneCache
from spectralvae.model import AttnBlock
from spectralvae.runtime.ranks import Ranks
from spectralvae.weights.artifact import verify

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """A function that imports a benchmark, whose processes are calls here: these would take most of the time."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def here(function, calls):
        return [function(*arguments) for arguments in calls]

    for name in ("steps", "scaling"):
        monkeypatch.setattr(importlib.import_module(name), "in_children", here)
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


@pytest.fixture
def run_train_step(load, tmp_path):
    """A function that runs it with a tiny network; returns the exit code and the report."""

    def run(*arguments):
        path = tmp_path / "report.json"
        smallest = ["--network", "tiny", "--device", "cpu", "--batch-size", "2", "--repeats", "2", "--peak-size", "16"]
        code = load("train_step").main([*smallest, "--json", str(path), *arguments])
        return code, json.loads(path.read_text())

    return run


def by_mode(report):
    return {row["mode"]: row for row in report["rows"]}


def test_plain_computes_what_ours_does(run_train_step, load):
    code, report = run_train_step()
    assert code == 0
    rows, steps = by_mode(report), load("steps")
    assert set(rows) == {"plain", "plain-two-forwards", "ours"}
    config = steps.make_config(steps.NETWORKS["tiny"])
    model = steps.make_model(config)
    batch = steps.make_batch(config, model, 2)
    x = batch.tiles.float().permute(0, 3, 1, 2)
    assert 0.01 < float(x.isnan().float().mean()) < 0.03
    loss, _ = model.get_loss(x, ~x.isnan(), batch.noise)
    for row in rows.values():
        assert row["first_loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["loss_deviation"] <= 1e-5
        assert row["gradient_deviation"] <= 1e-4
        assert row["same"]


def test_report_of_a_step(run_train_step):
    _, report = run_train_step("--profile")
    rows, flop = by_mode(report), report["flop_per_tile"]
    assert {"machine", "threads", "settings", "load_before", "load_after", "device", "training"} <= report.keys()
    for name, row in rows.items():
        assert len(row["ms"]["all"]) == 2
        seconds = row["ms"]["median"] / 1000
        each = flop["training"] + (flop["forward"] if name == "plain-two-forwards" else 0)
        assert row["tiles_per_s"] == pytest.approx(2 / seconds)
        assert row["tflop_per_s"] == pytest.approx(2 * each / seconds / 1e12)
        assert row["share_of_peak"] == pytest.approx(row["tflop_per_s"] / report["peaks"]["float32"]["tflop_per_s"])
        assert row["hours"] == pytest.approx(200_000 * 32 * seconds / 2 / 3600)
        assert row["ours_times_faster"]["all"] == pytest.approx(
            [theirs / ours for theirs, ours in zip(row["ms"]["all"], rows["ours"]["ms"]["all"], strict=True)]
        )
        assert "memory_mb" in row
    peak = report["peaks"]["bf16"]
    assert peak["tflop_per_s"] == peak["all"][peak["of"]] == max(peak["all"].values())
    shares = report["profile"]["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    kinds = {"convolutions forward", "convolutions backward", "GroupNorm", "activation", "attention", "optimizer"}
    assert kinds <= shares.keys()


def test_a_mode_that_computes_something_else_is_told(run_train_step, load, monkeypatch, capsys):
    """Scores that are not scaled change loss and gradients."""

    def unscaled(block, x):
        h = block.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (block.q, block.k, block.v))
        return x + block.proj_out((v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)).reshape(x.shape))

    monkeypatch.setattr(load("steps").PlainAttention, "forward", unscaled)
    code, report = run_train_step("--modes", "plain")
    assert code == 1
    assert {name: row["same"] for name, row in by_mode(report).items()} == {"plain": False, "ours": True}
    assert capsys.readouterr().out.count("COMPUTES SOMETHING ELSE") == 1


def test_tiles_out_of_a_cache_are_those_of_the_batch(load):
    """In all eight orientations, against numpy's."""
    steps = load("steps")
    config = steps.make_config(steps.NETWORKS["tiny"])
    batch = steps.make_batch(config, steps.make_model(config), 8)
    cache, crops = steps.cached(batch, torch.device("cpu"))
    scene = cache.pixels.reshape(16, 8 * 16, 16).numpy()
    assert {(crop.flip, crop.turns) for crop in crops} == {(flip, k) for flip in (False, True) for k in range(4)}
    for crop, tile in zip(crops, batch.tiles.numpy(), strict=True):
        there = scene[:, crop.x : crop.x + 16]
        np.testing.assert_array_equal(np.rot90(there[::-1] if crop.flip else there, crop.turns), tile)
        made = torch.zeros(16, 16, 16, dtype=torch.float16)
        cache.read(crop, made)
        assert made.numpy().tobytes() == tile.tobytes()


def test_a_step_out_of_a_cache_is_the_same(run_train_step, monkeypatch):
    read, made = SceneCache.read, []
    monkeypatch.setattr(SceneCache, "read", lambda self, crop, out: (made.append(crop), read(self, crop, out)))
    code, report = run_train_step("--modes", "ours-bf16", "ours-bf16-cache", "--batch-size", "8")
    rows = by_mode(report)
    assert code == 0
    assert rows["ours-bf16-cache"]["first_loss"] == rows["ours-bf16"]["first_loss"] != rows["ours"]["first_loss"]
    assert rows["ours-bf16-cache"]["gradient_deviation"] == rows["ours-bf16"]["gradient_deviation"]
    assert len(made) == 8 * (2 + 2 + 2)  # tiles of each step: two before the repeats, two repeats, two for the memory


def test_report_of_the_loader(load, monkeypatch, tmp_path, pictures):
    """With runs of `train`, of which one is out of a cache."""
    loader, path = load("loader"), tmp_path / "report.json"
    monkeypatch.setattr(loader, "LAYOUTS", ("store", "cache", "memmap"))
    read, made = SceneCache.read, []
    monkeypatch.setattr(SceneCache, "read", lambda self, crop, out: (made.append(crop), read(self, crop, out)))
    seconds_of_run, used = loader.seconds_of_run, []

    def counted(*arguments):
        made.clear()
        found = seconds_of_run(*arguments)
        used.append(bool(made))
        return found

    monkeypatch.setattr(loader, "seconds_of_run", counted)
    sizes = ["--shape", "24", "20", "16", "--dtypes", "float16", "--tile-size", "16", "--batch-size", "2"]
    short = ["--readers", "0", "--repeats", "2", "--seconds", "0", "--run-steps", "2", "--run-networks", "tiny"]
    loader.main([*sizes, *short, "--run-batch-size", "2", "--directory", str(tmp_path), "--json", str(path)])
    report = json.loads(path.read_text())
    assert {"transparent_hugepage", "cpu", "numpy", "torch", "zarr", "numcodecs"} <= report["machine"].keys()
    rows = {(row["layout"], row["cache"]): row for row in report["rows"]}
    assert set(rows) == {
        ("store", "warm"),
        ("cache", "warm"),
        ("memmap", "warm"),
        ("store", "cold"),
        ("memmap", "cold"),
    }
    for row in rows.values():
        assert len(row["tiles_per_s_all"]) == 2 and row["gb_per_s"] > 0
    assert [row["data"] for row in report["runs"]] == list(loader.RUNS)
    assert used == [False, False, True]
    for row in report["runs"]:
        assert set(row["shares"]) == {"waiting for data", "validation", "saving", "drawing"}
        assert (row["steps"], row["network"], row["batch_size"]) == (2, "tiny", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_shares_of_runs_are_those_of_their_loops(load, monkeypatch, tmp_path):
    loader = load("loader")
    seen = []

    def pretend(folder, network, device, data, n_steps):
        seen.append((network, data.get("num_workers"), data.get("cache"), n_steps))
        return {"all": 8.0, "waiting for data": 2.0, "saving": 0.5}

    monkeypatch.setattr(loader, "seconds_of_run", pretend)
    options = argparse.Namespace(tile_size=16, run_batch_size=3, run_networks=["small", "full"], run_steps=7)
    rows = loader.shares_of_runs(tmp_path, options)
    assert seen == [(n, *how, 7) for n in ("small", "full") for how in ((0, None), (None, None), (None, True))]
    assert all(row["shares"] == {"waiting for data": 0.25, "saving": 0.0625} for row in rows)


def test_plain_attention_is_ours(load):
    torch.manual_seed(0)
    block = AttnBlock(16, 4).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(3.0)
    x = torch.randn(2, 16, 4, 8, dtype=torch.float64)
    expected = block(x)
    load("steps").use_plain_attention(block)
    assert type(block) is not AttnBlock
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)
    assert (expected - x).abs().max().item() > 0.1


def test_flop_are_those_of_the_layers(load):
    """A convolution makes a product of each output value with each weight that leads to it; two FLOP a product."""
    steps = load("steps")
    config = steps.make_config(steps.NETWORKS["tiny"])
    model, counted = steps.make_model(config), []

    def count(layer, inputs, output):
        if isinstance(layer, nn.Conv2d):
            counted.append(2 * output.numel() * layer.weight[0].numel())
        elif isinstance(layer, nn.ConvTranspose2d):
            counted.append(2 * inputs[0].numel() * layer.weight[0].numel())
        elif isinstance(layer, AttnBlock):
            pixels = output.shape[2] * output.shape[3]
            counted.append(2 * 2 * pixels**2 * output.shape[1])

    for module in model.modules():
        module.register_forward_hook(count)
    model.get_loss(torch.zeros(1, *config.model.shape))
    assert steps.flop_per_tile(config)["forward"] == sum(counted)


def test_report_of_scaling(load, monkeypatch, tmp_path):
    scaling, path = load("scaling"), tmp_path / "report.json"
    points = {"channels": [4, 8, 16], "tile": [8, 16], "batch": [1, 2], "scenes": [1, 3]}
    monkeypatch.setattr(scaling, "POINTS", points)
    questions = list(points)
    smallest = ["--network", "tiny", "--quick", "--repeats", "2", "--json", str(path)]
    scaling.main([*smallest, "--questions", *questions])
    report = json.loads(path.read_text())
    for question in questions:
        assert [row[question] for row in report[question]] == points[question][:2]
        assert all("memory_mb" in row for row in report[question])
    for question in questions[:3]:
        assert all(len(row["ms_per_tile"]["all"]) == 2 for row in report[question])
    assert {"open_ms", "sampler_ms", "first_batch_ms"} <= report["scenes"][0].keys()
    assert "ranks" not in report


def test_ranks_are_given_their_shares(load, monkeypatch):
    """Of threads and tiles; the processes themselves are not started."""
    scaling, steps, seen = load("scaling"), load("steps"), []

    def pretend(function, calls):
        assert function is scaling.steps_of_rank
        seen.append([(int(e["RANK"]), int(e["WORLD_SIZE"]), n_threads) for e, _, n_threads in calls])
        return [[20.0 / len(calls)] * 3] * len(calls)

    monkeypatch.setattr(scaling, "in_children", pretend)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    one, two = scaling.cost_of_ranks(steps.NETWORKS["tiny"], repeats=2)
    assert seen == [[(0, 1, 4)], [(0, 2, 2), (1, 2, 2)]] * 2
    assert (one["batch_each"], two["batch_each"]) == (2, 1)
    assert (one["ms_per_tile"]["median"], two["ms_per_tile"]["median"]) == (10.0, 5.0)
    assert two["times_faster"]["median"] == 2.0
    times = scaling.time_steps(Ranks(), steps.NETWORKS["tiny"])
    assert len(times) == scaling.STEPS_OF_RANKS and min(times) > 0


def test_threads_are_set_and_compared_with_one(load, monkeypatch):
    scaling, seen = load("scaling"), []

    def pretend(step, device, n):
        seen.append(torch.get_num_threads())
        return 8.0 / torch.get_num_threads()

    monkeypatch.setattr(scaling, "seconds", pretend)
    torch.set_num_threads(3)
    one, two = scaling.cost_of_threads("tiny", [1, 2], repeats=2)
    assert seen == [1, 2] * 3
    assert torch.get_num_threads() == 3
    assert (one["threads"], one["ms_per_tile"]["all"], one["times_faster"]["all"]) == (1, [4000.0] * 2, [1.0] * 2)
    assert (two["threads"], two["ms_per_tile"]["all"], two["times_faster"]["all"]) == (2, [2000.0] * 2, [2.0] * 2)
    for cores, counts in ((1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])):
        monkeypatch.setattr(scaling.os, "cpu_count", lambda cores=cores: cores)
        assert scaling.thread_counts() == counts


def test_what_is_beside_the_steps(load, monkeypatch, tmp_path):
    """As a run does it: all the validation tiles of the default, a whole checkpoint, a picture."""
    scaling, steps = load("scaling"), load("steps")
    with scaling.beside(tmp_path, steps.NETWORKS["tiny"]) as calls:
        assert list(calls) == ["step", "validation", "reading", "checkpoint", "figure", "drawing"]
        assert calls["step"]() > 0
        for _ in range(2):
            calls["checkpoint"]()
        read = []
        with monkeypatch.context() as patched:
            patched.setattr(scaling, "deque", lambda batches, maxlen: read.extend(tiles for _, tiles, _ in batches))
            calls["reading"]()
        assert sum(map(len, read)) == 64 and read[0].shape[1:] == (16, 16, 16)
        calls["validation"]()
        for name in ("drawing", "figure"):
            calls[name]()
    assert {"model.safetensors", "optimizer.safetensors"} <= verify(tmp_path / "run/checkpoints/step=000000").keys()
    assert json.loads((tmp_path / "run/summary/validation.json").read_text())["active_units"] >= 0
    assert (tmp_path / "run/figures/reconstructions_step=000000.png").read_bytes().startswith(b"\x89PNG")


def test_shares_of_what_is_beside_the_steps(load, monkeypatch):
    """Of a run: one of them, and the steps until the next."""
    scaling, steps = load("scaling"), load("steps")
    taken = {"step": 0.5, "validation": 25.0, "reading": 0.25, "checkpoint": 2.5, "figure": 1.0, "drawing": 0.5}
    calls = {name: lambda n=name: n for name in taken}
    monkeypatch.setattr(scaling, "beside", lambda folder, network: nullcontext(calls))
    monkeypatch.setattr(scaling, "seconds", lambda call, device, n: taken[call()])
    rows = {row["what"]: row for row in scaling.cost_beside(steps.NETWORKS["tiny"], repeats=2)}
    assert {name: row["every"] for name, row in rows.items()} == {
        "validation": 50,
        "reading": 50,
        "checkpoint": 5000,
        "figure": 5000,
        "drawing": 5000,
    }
    assert rows["validation"]["share_percent"] == pytest.approx(50.0)  # 25 s after 50 steps of 0.5 s
    assert rows["validation"]["share_at_45_ms_percent"] is rows["figure"]["share_at_45_ms_percent"] is None
    assert rows["reading"]["share_at_45_ms_percent"] == pytest.approx(10.0)  # 0.25 s after 2.25 s
    assert rows["checkpoint"]["share_at_45_ms_percent"] == pytest.approx(100 * 2.5 / 227.5)
    assert rows["drawing"]["share_at_45_ms_percent"] == pytest.approx(100 * 0.5 / 225.5)
    assert rows["figure"]["share_percent"] == pytest.approx(100 / 2501)
    assert "checkpoint" in scaling.table(list(rows.values()))
