"""How long it takes until something happens: `--help`, imports, and the first batch of a training run.

    python benchmarks/startup.py [--json FILE] [--scenes N]

Everything is measured in fresh processes, in turn, with all files in the page cache. The first batch counts from where
all that a run imports is imported; its parts are those of `training.trainer` up to there, for the network of the
default config: with a store of one scene for training and one for validation, and with one of many. Stores are made
up, of one scene that has many names (hard links), so that they need the space of one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from progress import say

COMMANDS = {
    "nothing": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import spectralvae": ["-c", "import spectralvae"],
    "import spectralvae.model": ["-c", "from spectralvae.model import AutoencoderKL"],
    "import all of a run": ["-c", "import spectralvae.training.trainer, torch.utils.tensorboard, torch._dynamo"],
    "--help": ["-m", "spectralvae", "--help"],
    "train --help": ["-m", "spectralvae", "train", "--help"],
}
BEYOND = {"import spectralvae": "nothing", "import spectralvae.model": "import torch"}  # what only the second takes
PARTS = {
    "Store": "open the store",
    "check_forward": "try the network without arithmetic",
    "make_sampler": "look at the scenes' files, make the sampler",
    "build_model": "initial weights",
    "Validation": "choose validation tiles",
    "newest_valid": "look for checkpoints",
    "Engine": "engine and optimizer",
    "Watch": "logs",
}
VAL_SHARE = 8  # every so many-th scene is for validation


def make_store(path: Path, n_scenes: int, shape: tuple[int, int, int]) -> Path:
    """A store of n scenes (y, x, channel) of float16, which are one and the same."""
    from loader import write_store

    from spectralvae.data.store import content_hash

    arrays = write_store(path, 1, shape, "float16").arrays
    root = json.loads((path / "zarr.json").read_text())
    attributes = root["attributes"]
    (record,) = attributes["scenes"]
    for i in range(1, n_scenes):
        row = {**record, "id": str(i), "split": "train" if i % VAL_SHARE != 1 else "val"}
        attributes["scenes"].append(row)
        shutil.copytree(path / "scenes" / record["id"], path / "scenes" / row["id"], copy_function=os.link)
    attributes["hash"] = content_hash(attributes, arrays)
    (path / "zarr.json").write_text(json.dumps(root))
    return path


def command_seconds(arguments: list[str]) -> float:
    """Wall time of a process."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def first_batch_parts(store: Path, batch_size: int, tile_size: int) -> dict[str, float]:
    """Seconds of a run in a process of its own, from its imports to its first batch, in all and by part."""
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        config = Path(folder) / "train.yaml"
        data = {"store": str(store), "batch_size": batch_size, "tile_size": tile_size}
        training = {"n_steps": 10, "device": "cpu"}
        config.write_text(json.dumps({"output_dir": f"{folder}/run", "data": data, "training": training}))
        done = subprocess.run(
            [sys.executable, __file__, "--until-first-batch", str(config)], check=True, capture_output=True, text=True
        )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_until_first_batch(config: str) -> None:
    """Print what the parts of a run took until its first batch; the process ends there."""
    import torch._dynamo  # every optimizer of torch does, and tensors without memory do before
    import torch.utils.tensorboard  # noqa: F401

    from spectralvae.cli import app
    from spectralvae.training import setup, trainer

    parts: dict[str, float] = {}
    begun = time.perf_counter()

    def timed(name: str, part: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return part(*arguments, **options)
            finally:
                parts[PARTS[name]] = time.perf_counter() - start

        return call

    class Stream(setup.TileStream):
        def __iter__(self) -> Any:
            batches = super().__iter__()
            start = time.perf_counter()
            next(batches)
            end = time.perf_counter()
            parts["read the batch"] = end - start
            parts["the rest"] = end - begun - sum(parts.values())
            print(json.dumps(parts | {"first batch": end - begun}), flush=True)
            os._exit(0)

    for name in PARTS:
        module = setup if hasattr(setup, name) else trainer
        setattr(module, name, timed(name, getattr(module, name)))
    setup.TileStream = Stream  # type: ignore[misc]
    app(["train", config], standalone_mode=False)


def summary(seconds: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds), "all": seconds}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Seconds by group and name; the groups are the commands, and the stores whose first batch is waited for."""
    large, many = f"2 scenes of {options.shape}", f"{options.scenes} scenes of {options.small}"
    say("the stores")
    stores = {
        large: make_store(folder / "large", 2, tuple(options.shape)),
        many: make_store(folder / "many", options.scenes, tuple(options.small)),
    }
    found: dict[str, dict[str, list[float]]] = {"commands": {}, large: {}, many: {}}
    for repeat in range(options.repeats + 1):
        say(f"repeat {repeat} of {options.repeats}")
        times = {"commands": {name: command_seconds(arguments) for name, arguments in COMMANDS.items()}}
        for name, store in stores.items():
            times[name] = first_batch_parts(store, options.batch_size, options.tile_size)
        for name, without in BEYOND.items():
            times["commands"][f"{name}, beyond that of {without}"] = (
                times["commands"][name] - times["commands"][without]
            )
        if repeat:  # the first one fills the page cache
            for group, row in times.items():
                for name, seconds in row.items():
                    found[group].setdefault(name, []).append(seconds)
    return {group: {name: summary(each) for name, each in rows.items()} for group, rows in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results there, too")
    parser.add_argument("--scenes", type=int, default=500, help="of the store of many")
    parser.add_argument("--small", type=int, nargs=3, default=[64, 64, 1028], metavar=("Y", "X", "CHANNEL"))
    parser.add_argument("--shape", type=int, nargs=3, default=[131, 2048, 1028], metavar=("Y", "X", "CHANNEL"))
    parser.add_argument("--tile-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--directory", type=Path, help="where the temporary folder is made")
    parser.add_argument("--until-first-batch", metavar="CONFIG", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.until_first_batch:
        run_until_first_batch(options.until_first_batch)
        return
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="startup-", dir=options.directory) as folder:
        groups = measure(options, Path(folder))
    for group, rows in groups.items():
        print(f"{group}, load {load_before[0]:.1f}")
        for name, found in rows.items():
            print(f"  {name:48s} {found['median']:6.3f} s ({found['least']:.3f} - {found['most']:.3f})")
    if options.json:
        from machine import machine

        settings = {key: value for key, value in vars(options).items() if key not in ("json", "directory")}
        load = {"load_before": load_before, "load_after": os.getloadavg()}
        report = {"machine": machine(["torch", "typer", "pydantic"]), "settings": settings, **load, "seconds": groups}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
