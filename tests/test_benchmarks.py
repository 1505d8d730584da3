"""Each benchmark in its smallest form: it runs, and its JSON holds what the documentation quotes."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from spectralvae.data.store import Store

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = "--network tiny --repeats 1"
QUESTIONS = ["channels", "tile", "batch", "scenes", "threads", "beside"]
CASES = {  # arguments, constants of the script, keys of the JSON
    "train_step": (
        f"{TINY} --device cpu --batch-size 2 --peak-size 16 --profile",
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
