"""How the cost of training grows, and what stands beside its steps.

    python benchmarks/scaling.py [--network full|small] [--quick] [--questions NAME ...] [--json FILE]

A table for each question:

    channels, tile, batch   one step of ours, as the trainer makes it, on the CPU, against the number of channels,
                            pixels along a side of a tile, and tiles a step; all else as the network has it. Time,
                            and how much the RSS of a process of its own that makes two steps grows at most
    scenes                  what stands before the first step: opening a store, making the sampler, the first batch;
                            against the number of scenes (tiny ones, from the page cache). Memory by tracemalloc
    ranks                   a step of one process with all threads, and of two, by gloo, with half the threads and
                            half the batch each; they are started anew at each repeat and timed after a warm-up
    threads                 a step of the small network, and of the full one, with 1, 2, 4 ... threads of torch; how
                            many times as fast as with one, repeat by repeat
    beside                  what holds up the steps of the full network: a validation of as many tiles as the default
                            has (reading: what of it is no network's), a checkpoint, a figure of reconstructions
                            (drawing: what of it is no network's); and their shares of a run with the default
                            `val_every` and `save_every`, with steps as they are here, and with steps of 45 ms, the
                            goal for a GPU, for what a GPU would not compute itself

The points of a question take turns; --network is for those that name no network of their own. Given are medians of the
repeats with the least and the most (of ranks, a repeat is the median of some steps). --quick takes the first two points
of each question. What the record and the plots of a run cost with its length is measured by watching.py; how long it
takes to open a store of 10,000 scenes, by open_store.py.
"""

from __future__ import annotations

import argparse
import gc
import os
import socket
import statistics
import tempfile
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from loader import write_store
from progress import say
from rich.console import Console
from steps import (
    NETWORKS,
    Network,
    in_children,
    make_batch,
    make_config,
    make_model,
    our_step,
    peak_memory,
    seconds,
    spread,
    write_report,
)

from spectralvae.data.loader import TileStream, make_sampler, read_crops
from spectralvae.data.store import Store
from spectralvae.plotting.reconstructions import N_TILES, draw_reconstructions
from spectralvae.runtime.ranks import Ranks, find_ranks
from spectralvae.training.engine import Engine
from spectralvae.training.setup import set_up
from spectralvae.training.watch import Watch
from spectralvae.weights.checkpoint import save_checkpoint

CPU = torch.device("cpu")
POINTS = {
    "channels": [64, 128, 256, 512, 1028],
    "tile": [16, 32, 64],
    "batch": [1, 2, 4, 8],
    "scenes": [10, 100, 1000],
}
QUESTIONS = [*POINTS, "ranks", "threads", "beside"]
FIELDS = {"channels": "n_channels", "tile": "tile_size", "batch": "batch_size"}
SCENE_SHAPE = (24, 24, 16)
NETWORKS_OF_THREADS = ("small", "full")
NETWORK_BESIDE = "full"
TILES_BESIDE = 8  # along y and x of the validation scene: the 64 of the default
WITH_NETWORK = ("validation", "figure")  # whose arithmetic would be a GPU's
MS_ON_A_GPU = 45.0  # of a step: the goal
STEPS_OF_RANKS = 5
PEER_TIMEOUT = 300.0  # seconds


# --- one step ---------------------------------------------------------------------------------


def make_step(network: Network) -> Callable[[], float]:
    """A function that makes a step of ours."""
    config = make_config(network)
    model = make_model(config)
    return partial(our_step, Engine(model, config, CPU, Ranks()), make_batch(config, model, network.batch_size))


def two_steps(network: Network) -> None:
    """For the memory that they take: after the first one, the optimizer has its state."""
    step = make_step(network)
    for _ in range(2):
        step()


def cost_of_steps(question: str, base: Network, points: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """A row for each point."""
    networks = {point: Network(**{**base._asdict(), FIELDS[question]: point}) for point in points}
    steps = {point: make_step(network) for point, network in networks.items()}
    for step in steps.values():
        for _ in range(2):
            step()
    times: dict[int, list[float]] = {point: [] for point in points}
    for repeat in range(repeats):
        say(f"{question}: repeat {repeat + 1} of {repeats}")
        for point, step in steps.items():
            times[point].append(1000 * seconds(step, CPU, 1) / networks[point].batch_size)
    del steps, step
    return [
        {question: point, "ms_per_tile": spread(times[point]), **peak_memory(two_steps, networks[point])}
        for point in points
    ]


# --- the store --------------------------------------------------------------------------------


def begin(path: Path) -> dict[str, float]:
    """Milliseconds of what stands before the first step."""
    size = SCENE_SHAPE[0] * 2 // 3
    moments = [time.perf_counter()]
    store = Store(path)
    moments.append(time.perf_counter())
    sampler = make_sampler(store, store.indices("train"), seed=0, tile_size=size, max_invalid_fraction=0.5)
    moments.append(time.perf_counter())
    next(iter(TileStream(store, sampler, batch_size=8, tile_size=size, noise_shape=(4, 4, 4))))
    moments.append(time.perf_counter())
    parts = zip(("open", "sampler", "first_batch"), moments, moments[1:], strict=False)
    return {f"{name}_ms": 1000 * (end - begun) for name, begun, end in parts}


def traced_peak(function: Callable[[], Any]) -> int:
    """Bytes that a call takes at most."""
    gc.collect()
    tracemalloc.start()
    function()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def cost_of_scenes(points: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """A row for each number of scenes."""
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        paths = {n: Path(folder) / str(n) for n in points}
        for n, path in paths.items():
            say(f"scenes: a store of {n}")
            write_store(path, n, SCENE_SHAPE, "float16")
            begin(path)
        found: dict[int, list[dict[str, float]]] = {n: [] for n in points}
        for _ in range(repeats):
            for n, path in paths.items():
                found[n].append(begin(path))
        return [
            {"scenes": n}
            | {key: spread([times[key] for times in found[n]]) for key in found[n][0]}
            | {"memory_mb": traced_peak(partial(begin, path)) / 1e6}
            for n, path in paths.items()
        ]


# --- processes --------------------------------------------------------------------------------


def steps_of_rank(environment: dict[str, str], network: Network, n_threads: int) -> list[float]:
    """Milliseconds of some steps, in one of the processes that make them together."""
    torch.set_num_threads(n_threads)
    os.environ.update(environment)
    ranks = find_ranks(environment)
    with ranks.joined(PEER_TIMEOUT):
        return time_steps(ranks, network)


def time_steps(ranks: Ranks, network: Network) -> list[float]:
    """Apart, since nothing may hold on to the engine when the processes part."""
    config = make_config(network)
    model = make_model(config)
    batch = make_batch(config, model, network.batch_size // ranks.world_size)
    engine = Engine(model, config, CPU, ranks)
    engine.order_buckets(batch)
    for _ in range(2):
        our_step(engine, batch)
    return [1000 * seconds(partial(our_step, engine, batch), CPU, 1) for _ in range(STEPS_OF_RANKS)]


def ms_of_ranks(n: int, network: Network, n_threads: int) -> float:
    """Of a step of n processes; the slower of them counts, but they wait for each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    calls = [
        ({**address, "RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank)}, network, max(1, n_threads // n))
        for rank in range(n)
    ]
    return max(statistics.median(times) for times in in_children(steps_of_rank, calls))


def cost_of_ranks(network: Network, repeats: int) -> list[dict[str, Any]]:
    """A row for one process, and one for two."""
    n_threads = torch.get_num_threads()
    found: dict[int, list[float]] = {1: [], 2: []}
    for repeat in range(repeats):
        say(f"ranks: repeat {repeat + 1} of {repeats}")
        for n, times in found.items():
            times.append(ms_of_ranks(n, network, n_threads))
    return [
        {
            "ranks": n,
            "threads_each": max(1, n_threads // n),
            "batch_each": network.batch_size // n,
            "ms_per_tile": spread([ms / network.batch_size for ms in times]),
            "times_faster": spread([alone / ms for alone, ms in zip(found[1], times, strict=True)]),
        }
        for n, times in found.items()
    ]


# --- threads ----------------------------------------------------------------------------------


def thread_counts() -> list[int]:
    """1, 2, 4 ... and all cores."""
    cores = os.cpu_count() or 1
    return sorted({cores, *(2**i for i in range(cores.bit_length()) if 2**i <= cores)})


def cost_of_threads(name: str, counts: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """A row for each number of threads, of one network."""
    network, before = NETWORKS[name], torch.get_num_threads()
    step = make_step(network)
    times: dict[int, list[float]] = {n: [] for n in counts}
    for repeat in range(-1, repeats):  # the first one warms up
        say(f"threads, {name}: repeat {repeat + 1} of {repeats}")
        for n in counts:
            torch.set_num_threads(n)
            ms = 1000 * seconds(step, CPU, 1) / network.batch_size
            if repeat >= 0:
                times[n].append(ms)
    torch.set_num_threads(before)
    return [
        {
            "network": name,
            "threads": n,
            "ms_per_tile": spread(times[n]),
            "times_faster": spread([alone / ms for alone, ms in zip(times[counts[0]], times[n], strict=True)]),
        }
        for n in counts
    ]


# --- beside the steps -------------------------------------------------------------------------


@contextmanager
def beside(folder: Path, network: Network) -> Iterator[dict[str, Callable[[], Any]]]:
    """What holds up a run of a network, and a step of it."""
    side = TILES_BESIDE * network.tile_size
    store = write_store(folder / "store", 2, (side, side, network.n_channels), "float16", n_val=1)
    config = make_config(network, device="cpu")
    data = config.data.model_copy(update={"store": store.path})
    config = config.model_copy(update={"output_dir": folder / "run", "data": data})
    trainer = set_up(config, Ranks(), Console(quiet=True))
    engine = Engine(trainer.model, config, CPU, Ranks())
    config.output_dir.mkdir()
    watch = Watch(config.output_dir, 0, n_steps=1, batch_size=network.batch_size, grad_clip=1.0, facts={}, spikes={})
    validation, normalization = trainer.validation, store.normalization
    saved = (trainer.model, trainer.settings, normalization, engine.optimizer, {})
    tiles = read_crops(store, validation.crops[:N_TILES], network.tile_size).float().numpy()
    drawn = tiles, 0.9 * tiles, [f"tile {i}" for i in range(N_TILES)]
    yield {
        "step": partial(our_step, engine, make_batch(config, trainer.model, network.batch_size)),
        "validation": lambda: watch.keep_validation(0, validation.run(engine).description),
        "reading": lambda: deque(validation._batches(engine), maxlen=0),
        "checkpoint": partial(save_checkpoint, config.output_dir, 0, *saved),
        "figure": lambda: watch.reconstructions(validation.draw(engine, 0), 0),
        "drawing": lambda: watch.reconstructions(draw_reconstructions(*drawn, normalization, "step 0"), 0),
    }
    watch.log.close()


def cost_beside(network: Network, repeats: int) -> list[dict[str, Any]]:
    """A row for each thing that holds up the steps."""
    training = make_config(network).training
    every = {"validation": training.val_every, "reading": training.val_every}
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder, beside(Path(folder), network) as calls:
        times: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(-1, repeats):  # the first one warms up
            say(f"beside: repeat {repeat + 1} of {repeats}")
            for name, call in calls.items():
                took = seconds(call, CPU, 1)
                if repeat >= 0:
                    times[name].append(took)
    step, rows = statistics.median(times["step"]), []
    for name in list(times)[1:]:
        took, n = statistics.median(times[name]), every.get(name, training.save_every)
        on_gpu = took / (took + n * MS_ON_A_GPU / 1000)
        rows.append(
            {
                "what": name,
                "every": n,
                "seconds": spread(times[name]),
                "step_seconds": step,
                "share_percent": 100 * took / (took + n * step),
                "share_at_45_ms_percent": None if name in WITH_NETWORK else 100 * on_gpu,
            }
        )
    return rows


# --- all --------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return "{median:.2f} ({least:.2f} - {most:.2f})".format(**value)
        return f"{value:.2f}" if isinstance(value, float) else "-" if value is None else str(value)

    lines = [list(rows[0]), *([text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("   ".join(f"{cell:>{n}s}" for cell, n in zip(line, widths, strict=True)) for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results there, too")
    parser.add_argument("--network", choices=NETWORKS, default="small")
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=QUESTIONS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two points a question")
    options = parser.parse_args(arguments)
    load_before, network = os.getloadavg(), NETWORKS[options.network]
    found: dict[str, list[dict[str, Any]]] = {}
    for question in options.questions:
        points = POINTS.get(question, [])[: 2 if options.quick else None]
        if question == "scenes":
            found[question] = cost_of_scenes(points, options.repeats)
        elif question == "ranks":
            found[question] = cost_of_ranks(network, options.repeats)
        elif question == "threads":
            counts = thread_counts()[: 2 if options.quick else None]
            found[question] = [row for n in NETWORKS_OF_THREADS for row in cost_of_threads(n, counts, options.repeats)]
        elif question == "beside":
            found[question] = cost_beside(NETWORKS[NETWORK_BESIDE], options.repeats)
        else:
            found[question] = cost_of_steps(question, network, points, options.repeats)
        print(f"{question}:\n{table(found[question])}\n", flush=True)
    if options.json:
        write_report(options.json, vars(options), load_before, {"network": network._asdict(), **found})


if __name__ == "__main__":
    main()
