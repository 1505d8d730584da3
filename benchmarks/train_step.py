"""What a training step costs: a straightforward implementation against ours.

    python benchmarks/train_step.py [--network full|small] [--batch-size N ...] [--json FILE] [--profile] [--quick]

All modes begin with the same weights and see the same float16 tiles with the same noise; where loss or gradients of the
first step are not the same, the table says so and the exit code is 1:

    plain                what one would write: float32, NCHW, attention by einsum and softmax, a mask multiplied into
                         the loss, unfused AdamW
    plain-two-forwards   the same with a second forward pass for the pixel error
    plain-tf32           on GPUs: with TF32, to which torch rounds convolutions if not told otherwise
    ours                 the engine as the trainer drives it, with the defaults of the config
    ours-...             the engine with one thing set after the other: float32, tf32, bf16, compile, and the memory
                         layout: nchw or channels-last, both without Winograd's algorithm
    ours-bf16-cache      the engine with tiles that each step cuts out of a scene on the device, flips and turns there

All others are given finished tiles in (pinned) memory, and on GPUs transfer them in each step. Reading them is not in
here: threads do it beside the steps (loader.py).

The modes take turns in one process, in another order at each repeat; a ratio is the median over the repeats of a mode's
time by ours in the same repeat. FLOP are those of the plain network's convolutions and matrix products, as torch counts
them, whatever algorithm a mode takes (Winograd's needs fewer, and may so exceed the peak); a second pass counts. The
peak is the highest rate of some large matrix products, and on CPUs also convolutions, measured on the same device in
the same precision: MKL multiplies matrices much slower than oneDNN convolves on some processors. Memory: on GPUs the
most that is allocated for a mode, in a step; on CPUs, how much the RSS of a process of its own that makes two steps
grows at most. Hours are for 200,000 steps of 32 tiles at the rate measured.

--profile adds one step of ours by kind of operation. Time of operations inside others counts for the outer one, but
copies, which are mostly changes of layout or type, always count as such.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from progress import parse, say
from steps import (
    CHANNELS_LAST,
    NCHW,
    NETWORKS,
    Network,
    cached,
    cached_step,
    flags,
    flop_per_tile,
    make_batch,
    make_config,
    make_model,
    measure_peaks,
    our_step,
    peak_memory,
    plain_steps,
    seconds,
    set_flags,
    spread,
    write_report,
)
from torch import Tensor

from spectralvae.config.loading import dump_config
from spectralvae.data.loader import Batch
from spectralvae.model import AutoencoderKL
from spectralvae.runtime.ranks import Ranks
from spectralvae.training import engine as engine_module
from spectralvae.training.engine import Engine

STEPS = {"cpu": 1, "cuda": 10}  # timed together
PEAK_SIZES = {"cpu": 512, "cuda": 2048}
PEAK_SECONDS = {"cpu": 20.0, "cuda": 6.0}
QUICK = {"batch_size": [1], "repeats": 1, "modes": ["plain", "ours"], "peak_seconds": 5.0}
BATCH_SIZES = {"cpu": [2, 4], "cuda": [32]}
# of the first loss, and of the first gradient of each weight tensor, relative; that of l1 is a sum of signs, some of
# which rounding turns
TOLERANCES = {"float32": (1e-5, 0.01), "tf32": (1e-3, 0.1), "bf16": (1e-2, 0.5)}
NEGLIGIBLE = 1e-4  # of the whole gradient: tensors with less are rounding, as those of the keys' biases are
TILES_OF_RUN = 200_000 * 32


@dataclass(frozen=True)
class Mode:
    """One way to make a step.

    Attributes:
        training: of the config's `training:` section, what differs from the defaults.
        plain: not by the engine.
        second_forward: for the pixel error.
        cache: tiles are made on the device.
        memory_format: None leaves it to the engine.
    """

    training: dict[str, Any] = field(default_factory=dict)
    plain: bool = False
    second_forward: bool = False
    cache: bool = False
    memory_format: torch.memory_format | None = None


FLOAT32 = {"precision": "32-true", "tf32": False, "compile": False}
TF32 = {**FLOAT32, "tf32": True}
BF16 = {**TF32, "precision": "bf16-mixed"}  # TF32 in the layers that stay in float32
MODES = {
    "plain": Mode(FLOAT32, plain=True),
    "plain-two-forwards": Mode(FLOAT32, plain=True, second_forward=True),
    "plain-tf32": Mode(TF32, plain=True),
    "ours": Mode(),
    "ours-float32": Mode(FLOAT32),
    "ours-float32-nchw": Mode(FLOAT32, memory_format=NCHW),
    "ours-float32-channels-last": Mode(FLOAT32, memory_format=CHANNELS_LAST),
    "ours-float32-compile": Mode({**FLOAT32, "compile": True}),
    "ours-tf32": Mode(TF32),
    "ours-tf32-nchw": Mode(TF32, memory_format=NCHW),
    "ours-bf16": Mode(BF16),
    "ours-bf16-ieee": Mode({**BF16, "tf32": False}),
    "ours-bf16-cache": Mode(BF16, cache=True),
    "ours-bf16-nchw": Mode(BF16, memory_format=NCHW),
    "ours-bf16-channels-last": Mode(BF16, memory_format=CHANNELS_LAST),
    "ours-bf16-compile": Mode({**BF16, "compile": True}),
}
DEFAULT_MODES = {
    "cpu": ["plain-two-forwards", "plain", "ours"],
    "cuda": [name for name in MODES if not name.endswith(("-channels-last", "float32-compile"))],
}

# --- the modes --------------------------------------------------------------------------------


def precision_of(mode: Mode, device: torch.device) -> str:
    """float32, tf32 or bf16: whose peak is the limit."""
    training = make_config(NETWORKS["full"], **mode.training).training
    if training.precision == "bf16-mixed":
        return "bf16"
    return "tf32" if training.tf32 and device.type == "cuda" else "float32"


def placing_as(layout: torch.memory_format) -> AbstractContextManager[Any]:
    """Engines begun inside have this layout, and leave convolutions to torch."""

    def place(network: AutoencoderKL, device: torch.device, **_: Any) -> torch.memory_format:
        network.to(device, memory_format=layout)  # type: ignore[call-overload]
        return layout

    return mock.patch.object(engine_module, "place", place)


def make_steps(
    name: str, model: AutoencoderKL, batch: Batch, network: Network, device: torch.device
) -> Callable[[], float]:
    """A function that makes a step in a mode, and returns the loss before it; the model is moved and trained."""
    mode = MODES[name]
    config = make_config(network, **mode.training)
    if mode.plain:
        tf32 = config.training.tf32
        set_flags((tf32, tf32, False, False))
        make_step = plain_steps(model, batch, config, device, mode.second_forward)
    else:
        with nullcontext() if mode.memory_format is None else placing_as(mode.memory_format):
            engine = Engine(model, config, device, Ranks())  # sets the flags
        if mode.cache:
            make_step = partial(cached_step, engine, *cached(batch, device), batch)
        else:
            make_step = partial(our_step, engine, batch)
    wanted = flags()

    def step() -> float:
        set_flags(wanted)
        return make_step()

    return step


def two_steps(name: str, network: Network) -> None:
    """For the memory that they take on the CPU: after the first one, the optimizer has its state."""
    config = make_config(network)
    model = make_model(config)
    step = make_steps(name, model, make_batch(config, model, network.batch_size), network, torch.device("cpu"))
    for _ in range(2):
        step()


# --- measuring --------------------------------------------------------------------------------


def gradients(model: AutoencoderKL) -> dict[str, Tensor]:
    """By weight tensor, as a share of the norm of the whole: clipped or not, they are the same."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([g.norm() for g in found.values()]).norm()
    return {name: g.div_(norm) for name, g in found.items()}


class FirstStep(NamedTuple):
    """What a mode computes before its weights have changed: the loss, and the gradients by weight tensor."""

    loss: float
    gradients: dict[str, Tensor]


class Runner:
    """A mode with what was measured of it so far."""

    def __init__(self, name: str, model: AutoencoderKL, batch: Batch, network: Network, device: torch.device) -> None:
        self.name, self.device = name, device
        self._batch_size = network.batch_size
        before = self._allocated()
        model = copy.deepcopy(model)
        self._step = make_steps(name, model, batch, network, device)
        largest = max(model.parameters(), key=torch.numel)  # of a convolution
        self._layout = "channels_last" if largest.is_contiguous(memory_format=CHANNELS_LAST) else "NCHW"
        loss = self._step()
        self.first = FirstStep(loss, {name: g.cpu() for name, g in gradients(model).items()})
        self._step()
        self._own = self._allocated() - before  # weights, gradients, state of the optimizer
        self.seconds: list[float] = []
        self._memory = 0

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def measure(self) -> None:
        """One more repeat."""
        before = self._allocated()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.seconds.append(seconds(self._step, self.device, STEPS[self.device.type]))
        if self.device.type == "cuda":
            self._memory = max(self._memory, torch.cuda.max_memory_allocated(self.device) - before + self._own)

    def row(self, ours: FirstStep) -> dict[str, Any]:
        """What was measured, and how far the first step is from that of ours."""
        return {
            "mode": self.name,
            "batch_size": self._batch_size,
            "precision": precision_of(MODES[self.name], self.device),
            "layout": self._layout,
            "first_loss": self.first.loss,
            **deviations(self.name, self.first, ours, self.device),
            "ms": spread([1000 * s for s in self.seconds]),
            "memory_mb": self._memory / 1e6,
        }


def compare(names: Sequence[str], network: Network, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """A row for each mode, of one batch size."""
    torch.compiler.reset()
    config = make_config(network)
    model = make_model(config)
    batch = make_batch(config, model, network.batch_size, pin_memory=device.type == "cuda")
    runners = {}
    for name in names:
        say(f"first steps of {name}, batches of {network.batch_size}")
        runners[name] = Runner(name, model, batch, network, device)
    for repeat in range(repeats):
        for name in np.random.default_rng(repeat).permutation(names):
            say(f"repeat {repeat + 1} of {repeats}: {name}, batches of {network.batch_size}")
            runners[str(name)].measure()
    rows = []
    for runner in runners.values():
        ratios = [theirs / ours for theirs, ours in zip(runner.seconds, runners["ours"].seconds, strict=True)]
        rows.append({**runner.row(runners["ours"].first), "ours_times_faster": spread(ratios)})
    return rows


def deviations(name: str, first: FirstStep, ours: FirstStep, device: torch.device) -> dict[str, Any]:
    """Of a mode's first loss and, at worst, of a weight tensor's first gradient, relative; and whether both are small.

    A mode that computes something else is none to compare with.
    """
    loss = abs(first.loss - ours.loss) / abs(ours.loss)
    by_tensor = {
        tensor: float((first.gradients[tensor] - expected).norm() / expected.norm())
        for tensor, expected in ours.gradients.items()
        if expected.norm() > NEGLIGIBLE
    }
    worst = max(by_tensor, key=lambda tensor: by_tensor[tensor])
    limits = [TOLERANCES[precision_of(MODES[mode], device)] for mode in (name, "ours")]
    same = loss <= max(limit[0] for limit in limits) and by_tensor[worst] <= max(limit[1] for limit in limits)
    return {"loss_deviation": loss, "gradient_deviation": by_tensor[worst], "worst_tensor": worst, "same": same}


def add_rates(row: dict[str, Any], flop: dict[str, int], peaks: dict[str, dict[str, Any]]) -> None:
    """What follows from the time of a step; the share of the peak is None if that was not measured."""
    per_tile = flop["training"] + (flop["forward"] if MODES[row["mode"]].second_forward else 0)
    tiles_per_s = 1000 * row["batch_size"] / row["ms"]["median"]
    tflop_per_s = tiles_per_s * per_tile / 1e12
    row |= {
        "tiles_per_s": tiles_per_s,
        "tflop_per_step": per_tile * row["batch_size"] / 1e12,
        "tflop_per_s": tflop_per_s,
        "share_of_peak": tflop_per_s / peaks[row["precision"]]["tflop_per_s"] if peaks else None,
        "hours": TILES_OF_RUN / tiles_per_s / 3600,
    }


# --- where the time goes ----------------------------------------------------------------------

COPIES = ("aten::copy_", "aten::contiguous", "aten::clone", "aten::_to_copy", "Memcpy", "Memset")
# the first that fits an operation or, before it, one that it is part of
KINDS = (
    ("optimizer", ("Optimizer.", "aten::_foreach", "aten::_fused_adamw", "aten::linalg_vector_norm")),
    ("convolutions backward", ("_WinogradBackward", "ConvolutionBackward", "aten::convolution_backward")),
    ("convolutions forward", ("_Winograd", "aten::conv")),
    ("GroupNorm", ("NativeGroupNorm", "aten::group_norm", "aten::native_group_norm")),
    ("activation", ("Gelu", "Relu", "Silu", "aten::gelu", "aten::relu", "aten::silu")),
    ("attention", ("ScaledDotProduct", "aten::scaled_dot_product")),
    ("fused by the compiler", ("triton_",)),
)


def kind_of(event: Any) -> str:
    """Of an operation that the profiler saw."""
    if event.name.startswith(COPIES):
        return "copies"
    inside: list[str] = []
    while event is not None:
        inside.insert(0, event.name.removeprefix("autograd::engine::evaluate_function: "))
        event = event.cpu_parent
    for name in inside:
        for kind, beginnings in KINDS:
            if name.startswith(beginnings):
                return kind
    return "other"


def profile(network: Network, device: torch.device) -> dict[str, Any]:
    """One step of ours: prints torch's table, and returns shares of the time by kind of operation."""
    config = make_config(network)
    model = make_model(config)
    batch = make_batch(config, model, network.batch_size, pin_memory=device.type == "cuda")
    step = make_steps("ours", model, batch, network, device)
    for _ in range(3):
        step()
    plain_seconds = seconds(step, device, 1)
    with torch.profiler.profile() as profiler:
        profiled_seconds = seconds(step, device, 1)
    sort = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=sort, row_limit=25, max_name_column_width=60))
    microseconds: dict[str, float] = {}
    for event in profiler.events():
        if event.device_type.name == "CPU":  # a kernel's time counts for what launched it
            kind = kind_of(event)
            microseconds[kind] = microseconds.get(kind, 0.0) + getattr(event, sort)
    total = sum(microseconds.values())
    shares = {kind: us / total for kind, us in sorted(microseconds.items(), key=lambda item: -item[1])}
    print("\n".join(f"{kind:22s} {share:6.1%}" for kind, share in shares.items()))
    return {
        "batch_size": network.batch_size,
        "ms_of_operations": total / 1000,
        "ms_profiled": 1000 * profiled_seconds,
        "ms_unprofiled": 1000 * plain_seconds,
        "shares": shares,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [
        f"{'mode':27s} {'batch':>5s} {'ms':>9s} {'(least - most)':>19s} {'tiles/s':>8s} {'TFLOP/s':>8s} {'peak':>5s} "
        f"{'GB':>6s} {'hours':>7s}  ours is x times as fast"
    ]
    for r in rows:
        ms, ratio = r["ms"], r["ours_times_faster"]
        lines.append(
            f"{r['mode']:27s} {r['batch_size']:5d} {ms['median']:9.1f} "
            f"{'({least:.1f} - {most:.1f})'.format(**ms):>19s} {r['tiles_per_s']:8.2f} {r['tflop_per_s']:8.3f} "
            f"{r['share_of_peak']:5.0%} {r['memory_mb'] / 1000:6.2f} {r['hours']:7.1f}  "
            + "{median:.2f} ({least:.2f} - {most:.2f})".format(**ratio)
            + ("" if r["same"] else "; COMPUTES SOMETHING ELSE, see worst_tensor in the JSON")
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results there, too")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--network", choices=NETWORKS, default="full")
    parser.add_argument("--batch-size", type=int, nargs="+", help=f"if left out: {BATCH_SIZES}")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--modes", nargs="+", choices=MODES, help="ours always is among them; if left out, the usual")
    parser.add_argument(
        "--peak-size", type=int, help=f"scale of the products that the peak is measured with; if left out: {PEAK_SIZES}"
    )
    parser.add_argument(
        "--peak-seconds", type=float, help=f"at most for the measurement of the peak; if left out: {PEAK_SECONDS}"
    )
    parser.add_argument("--profile", action="store_true", help="one step of ours by kind of operation")
    options = parse(parser, arguments, QUICK)
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(usual if options.device == "auto" else options.device)
    names = list(dict.fromkeys([*(options.modes or DEFAULT_MODES[device.type]), "ours"]))
    batch_sizes = options.batch_size or BATCH_SIZES[device.type]
    load_before, rows = os.getloadavg(), []
    peak_seconds = options.peak_seconds or PEAK_SECONDS[device.type]
    peaks = measure_peaks(device, options.peak_size or PEAK_SIZES[device.type], peak_seconds)
    for precision, peak in peaks.items():
        print(f"peak {precision}: {peak['tflop_per_s']:.3f} TFLOP/s ({peak['of']})", flush=True)
    flop = flop_per_tile(make_config(NETWORKS[options.network]))
    print(f"a tile: {flop['forward'] / 1e9:.1f} GFLOP forward, {flop['training'] / 1e9:.1f} GFLOP in training")
    for batch_size in batch_sizes:
        network = NETWORKS[options.network]._replace(batch_size=batch_size)
        found = compare(names, network, device, options.repeats)
        for row in found:
            add_rates(row, flop, peaks)
            if device.type == "cpu":
                say(f"memory of two steps of {row['mode']}")
                row |= peak_memory(two_steps, row["mode"], network)
        rows += found
    print(table(rows))
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "peaks": peaks,
        "flop_per_tile": flop,
        "training": dump_config(make_config(NETWORKS[options.network]).training),
        "rows": rows,
    }
    if options.profile:
        results["profile"] = profile(NETWORKS[options.network]._replace(batch_size=max(batch_sizes)), device)
    if options.json:
        write_report(options.json, vars(options), load_before, results)
    return int(not all(row["same"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
