"""Each benchmark in its smallest form: it runs, and its JSON holds what the documentation quotes."""

import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

from spectralvae.data.store import Store
from spectralvae.training import doctor

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
GOLDEN = Path(__file__).parent / "golden"
TINY = "--network tiny --repeats 1"
QUESTIONS = ["channels", "tile", "batch", "scenes", "threads", "beside"]
CASES = {  # arguments, constants of the script, keys of the JSON
    "train_step": (
        f"{TINY} --device cpu --batch-size 2 --peak-size 16 --peak-seconds 1 --profile",
        {},
        {"peaks", "flop_per_tile", "training", "rows", "profile"},
    ),
    "loader": (
        "--shape 24 20 16 --dtypes float16 --tile-size 16 --batch-size 2 --readers 0 --repeats 1 --seconds 0 "
        "--run-steps 2 --run-networks tiny --run-batch-size 2",
        {"LAYOUTS": ("store", "cache", "memmap")},
        {"rows", "runs"},
    ),
    "scaling": (
        f"{TINY} --quick --questions {' '.join(QUESTIONS)}",
        {
            "POINTS": {"channels": [4, 8], "tile": [8, 16], "batch": [1, 2], "scenes": [1, 3]},
            "NETWORKS_OF_THREADS": ("tiny",),
            "NETWORK_BESIDE": "tiny",
            "TILES_BESIDE": 2,
            "draw_reconstructions": lambda *_: Figure(figsize=(1, 1)),
        },
        {"network", *QUESTIONS},
    ),
    "encode": (
        "--shape 16 32 --channels 16 --tile 16 --chs 8 8 --repeats 1",
        {"peak_memory": lambda *_: {"memory_mb": 1.0, "imports_mb": 2.0}},
        {"shape", "float32_mb", "source_bytes", "encode", "decode", "difference"},
    ),
    "open_store": ("--scenes 3 --repeats 1", {}, {"scenes", "root_mb", "seconds"}),
}


@pytest.fixture
def run(monkeypatch, tmp_path, pictures):
    """A function that runs a benchmark; what it starts processes for is done here, where torch is imported already."""
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("steps", "scaling"):
        here = lambda function, calls: [function(*arguments) for arguments in calls]  # noqa: E731
        monkeypatch.setattr(import_module(name), "in_children", here)
    threads = torch.get_num_threads()

    def run(name, *arguments):
        path = tmp_path / "report.json"
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments), "--json", str(path)])
        code = import_module(name).main()
        return code, json.loads(path.read_text(), parse_constant=pytest.fail)

    yield run
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_smallest_form(run, monkeypatch, name):
    arguments, constants, keys = CASES[name]
    for constant, value in constants.items():
        monkeypatch.setattr(import_module(name), constant, value)
    code, report = run(name, *arguments.split())
    assert not code  # of train_step: 1 if the modes compute different things
    assert {"machine", "load_before", "load_after", *keys} <= report.keys()
    assert all(report[key] for key in keys)
    if name == "train_step":
        assert {row["mode"] for row in report["rows"]} == {"plain", "plain-two-forwards", "ours"}
        assert sum(report["profile"]["shares"].values()) == pytest.approx(1)
    if name == "encode":
        assert report["difference"] < 1e-4  # two whole tiles: the script and the command agree


def test_gpu_tiny(run):
    """Every stage that a CPU can run is ok, and its figures fit together; the last one, `doctor`, has a test below."""
    names = [stage.name for stage in import_module("gpu").STAGES][:-1]
    code, report = run("gpu", "--device", "cpu", "--tiny", "--stages", *names)
    assert code == 0
    assert {"machine", "device", "load_before", "load_after", "seconds"} <= report.keys()
    stages = report["stages"]
    assert list(stages) == names
    only_cuda = {"golden-tf32", "two-ranks", "step-ours-bf16-compile"}
    assert {name: s["status"] for name, s in stages.items()} == {
        name: "not applicable" if name in only_cuda else "ok" for name in stages
    }
    figures = {name: s["figures"] for name, s in stages.items() if name not in only_cuda}
    float32, bf16 = (figures[f"golden-{precision}"]["deviations"] for precision in ("float32", "bf16"))
    assert float32.keys() == bf16.keys() == {path.parent.name for path in GOLDEN.glob("*/case.json")}
    assert all(float32[case][quantity] < bf16[case][quantity] for case in bf16 for quantity in ("mean", "gradients"))
    for name in (name for name in figures if name.startswith("step-")):
        row = figures[name]
        assert row["compared"] and row["ms"]["median"] > 0 and row["hours"] > 0 and row["tflop_per_s"] > 0
        peak = figures["peaks"][row["precision"]]["tflop_per_s"]
        assert row["share_of_peak"] == pytest.approx(row["tflop_per_s"] / peak)
    assert 0 <= figures["train"]["shares"]["waiting for data"] < 1
    assert figures["resumed"]["from_step"] == 10
    assert figures["scenes"]["encode"]["mb_per_s"] > 0


def test_gpu_golden_beyond_its_limit(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    gpu = import_module("gpu")
    case = gpu.Case("cpu", tmp_path, **gpu.TINY)
    assert gpu.golden(case, {}, "float32").ok
    monkeypatch.setitem(gpu.GOLDEN_LIMITS, "float32", gpu.GOLDEN_LIMITS["float32"] | {"gradients": 1e-12})
    assert not gpu.golden(case, {}, "float32").ok


def test_gpu_resumed_with_other_bytes(monkeypatch, tmp_path):
    """The weights are equal; one moment is off by a quarter of the largest, and the trainer counted otherwise."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    gpu = import_module("gpu")
    moments = {"whole": [1.0, -4.0], "stopped": [1.0, -3.0]}
    for name, values in moments.items():
        folder = tmp_path / name / "checkpoints/step=000020"
        folder.mkdir(parents=True)
        save_file({"w": torch.ones(2)}, folder / "model.safetensors")
        save_file({"exp_avg.w": torch.tensor(values)}, folder / "optimizer.safetensors")
        (folder / "trainer.json").write_text(json.dumps({"rows": len(name)}))
    monkeypatch.setattr(gpu, "train_to", lambda *_: gpu.Result("", {"from_step": 10}))
    text, figures, ok = gpu.resume(gpu.Case("cpu", tmp_path), {})
    assert not ok
    assert figures["model.safetensors"] == {"same": True, "largest_deviation": 0}
    assert figures["optimizer.safetensors"] == {"same": False, "largest_deviation": 0.25}
    assert figures["trainer.json"] == {"same": False, "whole": {"rows": 5}, "resumed": {"rows": 7}}
    assert "optimizer.safetensors" in text and "model.safetensors" not in text


def test_gpu_doctor(monkeypatch, tmp_path):
    """Without the checks that take steps, which take half a minute."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    gpu = import_module("gpu")
    monkeypatch.setattr(doctor, "CHECKS", [check for check in doctor.CHECKS if check[0] in ("config", "store")])
    text, figures, ok = gpu.doctor(gpu.Case("cpu", tmp_path, **gpu.TINY), {})
    assert ok and figures["ok"]
    assert figures["checks"].keys() == {"config", "store"}
    assert "store ok" in text


def troubled(case, found, trouble):
    """A stage of gpu.py that does not end well."""
    if trouble == "error":
        raise ValueError(str(found))
    if trouble == "package":
        import_module("none_of_this_name")
    if trouble == "death":
        os._exit(3)
    time.sleep(600)


@pytest.mark.parametrize(
    ("trouble", "limit", "left", "status", "word"),
    [
        ("error", 60, 100, "failed", "step-ours"),
        ("package", 60, 100, "skipped", "none_of_this_name"),
        ("death", 60, 100, "failed", "3"),
        ("hang", 3, 100, "failed", "3 s"),
        ("hang", 60, 3, "skipped", "budget"),
        ("error", 60, 1, "skipped", "budget"),
    ],
)
def test_gpu_stage_in_trouble(monkeypatch, tmp_path, trouble, limit, left, status, word):
    """Whatever happens in a stage, the script goes on, soon enough, and says what it was."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    gpu = import_module("gpu")
    stage = gpu.Stage("troubled", troubled, limit, (trouble,))
    began = time.monotonic()
    outcome = gpu.outcome_of(stage, gpu.Case("cpu", tmp_path), {"step-ours": {}}, left)
    assert time.monotonic() - began < 30
    assert outcome["status"] == status
    assert word in outcome["text"]
    assert ("ValueError" in str(outcome.get("traceback"))) == (trouble == "error" and left > 1)


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_imports(monkeypatch, path):
    """What a script takes from the package is there; other packages may be missing."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    try:
        import_module(path.stem)
    except ModuleNotFoundError as error:
        if error.name.startswith("spectralvae"):
            raise
        pytest.skip(f"needs {error.name}")


def test_smallest_form_of_rate_distortion(run, tmp_path):
    """The scene that is coded is the one that the model was validated on."""
    for name in ("constriction", "imagecodecs", "numcodecs", "pysz", "scipy"):
        pytest.importorskip(name)
    command = import_module("encode").command
    granules = command("simulate", tmp_path, n_granules=4, shape=[16, 24], n_channels=16, invalid_fraction=0.1)
    split = {"by": "scene", "val_fraction": 0.25}
    store = command("prepare", tmp_path, inputs=[f"{granules}/TEMPO_RAD*.nc"], split=split)
    data, model = {"store": str(store), "tile_size": 8, "batch_size": 1}, {"chs": [8, 8]}
    model = command("train", tmp_path, data=data, model=model, training={"n_steps": 1, "device": "cpu"})
    methods = ["ours", "pca", "pca-2-floats", "sz3", "zstd3", "deflate"]
    options = ["--granules", granules, "--model", model, "--ratios", "4", "--repeats", "1", "--methods", *methods]
    _, report = run("rate_distortion", *options, "--figure", tmp_path / "figure.png")
    (scene,) = report["scenes"]
    assert [record.source for record in Store(store).scenes if record.split == "val"] == [f"{scene['scene']}.nc"]
    points = {point["method"]: point for point in scene["points"]}
    assert list(points) == methods
    for name, point in points.items():
        assert point["ratio"] == pytest.approx(16 * 24 * 16 * 4 / point["bytes"])
        assert {"psnr", "largest", "angle_99", "noise_ratio", "retrieval", "encode_mb_per_s"} <= point.keys()
        assert point["largest"] == 0 or name not in ("zstd3", "deflate")
    assert points["deflate"]["bytes"] == pytest.approx(scene["deflated_bytes"], rel=0.01)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
