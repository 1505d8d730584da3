"""The benchmarks of training in their smallest form: all modes compute the same, and reports hold what they should."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from spectralvae.model import AttnBlock
from spectralvae.training.distributed import Ranks

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
