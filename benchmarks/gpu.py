"""Everything that only a GPU can tell, in one command of at most eight minutes.

    python benchmarks/gpu.py --json FILE [--budget SECONDS] [--stages NAME ...] [--device cpu --tiny]

Each stage runs in a fresh process and prints its result at once; the JSON is written anew after each. A stage that
fails, hangs or runs out of memory does not end the others, and the exit code is 1 if any failed. A stage whose packages
are missing, or for which no time is left, is listed as skipped. The stages, the most important first:

    golden-...           the network against tensors of the original (tests/golden), in float32, TF32 and bfloat16
    peaks                the fastest products of large matrices in each precision
    step-...             one training step of the full network at batch 32, in the modes of train_step.py; the first
                         loss and gradients must agree with those of `ours`
    train, train-cache   300 steps of `spectralvae train` on random spectra, with tiles from the store and with
                         `data.cache`: what share of the time the loop waits for data
    whole, half, resumed whether a run that stops at step 10 of 20 resumes bit-identically in a fresh process
    scenes               `encode` and `decode` of a simulated granule, in MB/s of float32 radiance
    two-ranks            two processes on one GPU must be refused with exit code 2
    step-...-compile     a step with torch.compile, whose compilation may take minutes
    doctor               `spectralvae doctor` on the full config: memory, hours, overfitting, and resume in float32

On a machine with network access, `make gpu` installs the package and starts it. To one without, carry the packages that
are missing there. The golden stages need torch, numpy and safetensors only; peaks and steps also pydantic, PyYAML,
rich, zarr and h5py; all runs also psutil, typer, matplotlib, tensorboard and Jinja2; scenes also xarray and h5netcdf.
Where only pydantic, zarr and h5netcdf are missing, these wheels (12 MB, here for x86-64 and Python 3.12) complete them:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \\
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -c constraints.txt -d wheels \\
        pydantic pydantic_core annotated-types zarr numcodecs donfig google-crc32c h5netcdf

and there, in this repository:

    python3 -m pip install --no-index --no-deps --target carry wheels/*.whl
    PYTHONPATH=src:carry python3 benchmarks/gpu.py --json gpu.json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from machine import machine
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "tests/golden"
# Of the reference's largest value. Gradients have larger ones: those of an L1 loss are sums of signs, some of which
# rounding turns.
GOLDEN_LIMITS = {
    "float32": {"forward": 1e-4, "gradients": 1e-3},
    "tf32": {"forward": 1e-2, "gradients": 0.1},
    "bf16": {"forward": 0.1, "gradients": 0.5},
}
STEP_MODES = (
    *("ours", "ours-float32-nchw", "ours-tf32"),
    *("ours-bf16", "ours-bf16-ieee", "ours-bf16-nchw", "ours-bf16-channels-last"),
)
STEPS, STOP_AT = 20, 10  # of the runs whose bytes are compared
TRACEBACK_LINES = 12
LEAST_SECONDS = 2.0  # no stage begins with less


@dataclass(frozen=True)
class Case:
    """What all stages share.

    Attributes:
        device: cpu or cuda.
        folder: temporary files of all stages.
        network: of NETWORKS in steps.py.
        batch_size: tiles in one step.
        repeats: timed groups of steps for each mode.
        n_steps: of the run whose waiting is measured.
        scene_shape: (y, x) of each of the three scenes of the store.
        granule_shape: (mirror_step, xtrack).
        peak_size, peak_seconds: of the products that the peaks are measured with.
    """

    device: str
    folder: Path
    network: str = "full"
    batch_size: int = 32
    repeats: int = 3
    n_steps: int = 300
    scene_shape: tuple[int, int] = (131, 512)
    granule_shape: tuple[int, int] = (64, 2048)
    peak_size: int = 2048
    peak_seconds: float = 6.0


TINY: dict[str, Any] = {
    "network": "tiny",
    "batch_size": 2,
    "repeats": 1,
    "n_steps": 4,
    "scene_shape": (24, 40),
    "granule_shape": (16, 32),
    "peak_size": 16,
    "peak_seconds": 1.0,
}


class Result(NamedTuple):
    """What a stage found.

    Attributes:
        text: one line for people.
        figures: for programs, as JSON values.
        ok: whether it is as it should be.
    """

    text: str
    figures: dict[str, Any]
    ok: bool = True


# --- the network against the original's tensors -----------------------------------------------------


def deviation(value: Tensor, reference: Tensor) -> float:
    """The largest, as a share of the reference's largest absolute value."""
    return float((value.detach().cpu() - reference).abs().max() / reference.abs().max().clamp_min(1e-30))


def golden_small(folder: Path, device: torch.device, precision: str) -> dict[str, float]:
    """Deviations of all that the network computes in one case of tests/golden."""
    from safetensors.torch import load_file

    from spectralvae.model import AutoencoderKL
    from spectralvae.runtime.placement import place

    case = json.loads((folder / "case.json").read_text())
    weights, grads, reference = (load_file(folder / f"{name}.safetensors") for name in ("weights", "grads", "tensors"))
    model, x = AutoencoderKL(**case["config"]), reference["x"].to(device)
    model.load_state_dict(weights)
    if x.ndim == 4:
        place(model, device, plain=precision != "float32")
    else:  # volumes are never trained on, and have no channels_last
        model.to(device)
    torch.manual_seed(case["seed_noise"])
    noise = torch.randn(reference["mean"].shape).to(device)  # on the CPU, as the original's
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        posterior = model.encode(x)
        found = {"mean": posterior.mean, "logvar": posterior.logvar, "decoded_mode": model.decode(posterior.mode())}
        found["train_loss"] = loss = model.get_loss(x, noise=noise)[0]
    torch.autograd.backward(loss)
    gradients = {key: p.grad.cpu() for key, p in model.named_parameters() if p.grad is not None}
    largest = max(float(g.abs().max()) for g in grads.values())
    differences = [float((gradients[key] - expected).abs().max()) for key, expected in grads.items()]
    return {
        **{quantity: deviation(value, reference[quantity]) for quantity, value in found.items()},
        "gradients": max(differences) / largest,
    }


def golden_full_size(device: torch.device, precision: str) -> dict[str, float]:
    """Deviations of the full network at some points, and of its loss."""
    from spectralvae.model import AutoencoderKL
    from spectralvae.runtime.placement import place

    case = json.loads((GOLDEN / "full_size.json").read_text())
    model = AutoencoderKL(**case["config"])
    state = model.state_dict()
    norms = {name for name, module in model.named_modules() if isinstance(module, torch.nn.GroupNorm)}
    g = torch.Generator().manual_seed(case["seed_weights"])
    for key in sorted(state):
        drawn = torch.randn(state[key].shape, generator=g)
        if drawn.ndim >= 2:
            state[key] = drawn / math.sqrt(drawn[0].numel())
        else:
            state[key] = 0.1 * drawn + (1 if key.removesuffix(".weight") in norms else 0)
    model.load_state_dict(state)
    x = torch.randn([1, 1028, 64, 64], generator=g).to(device)
    place(model, device, plain=precision != "float32")
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        posterior = model.encode(x)
        torch.manual_seed(case["seed_noise"])
        loss = model.get_loss(x, noise=torch.randn(posterior.mean.shape).to(device))[0]
        found = {"mean": posterior.mean, "decoded": model.decode(posterior.mode())}
    deviations = {"loss": abs(float(loss) / case["loss"] - 1)}
    for name, values in found.items():
        points = {tuple(map(int, at.strip("()").split(","))): value for at, value in case[f"{name}_at"].items()}
        worst = max(abs(float(values[at]) - value) for at, value in points.items())
        deviations[name] = worst / float(values.abs().max())
    return deviations


def golden(case: Case, _: dict[str, Any], precision: str) -> Result:
    """All cases in a precision; the full network only where it is not to be tiny."""
    from spectralvae.runtime.placement import set_arithmetic

    device = torch.device(case.device)
    set_arithmetic(device, tf32=precision == "tf32")
    folders = sorted(path.parent for path in GOLDEN.glob("*/case.json"))
    found = {folder.name: golden_small(folder, device, precision) for folder in folders}
    if case.network == "full":
        found["full_size"] = golden_full_size(device, precision)
    limits, parts, ok = GOLDEN_LIMITS[precision], [], True
    for kind, limit in limits.items():
        values = {
            f"{quantity} of {name}": value
            for name, deviations in found.items()
            for quantity, value in deviations.items()
            if (quantity == "gradients") == (kind == "gradients")
        }
        worst = max(values, key=lambda name: values[name])
        ok = ok and all(value < limit for value in values.values())
        parts.append(f"{kind} {values[worst]:.1e} ({worst}; limit {limit:.0e})")
    return Result(f"largest deviation: {', '.join(parts)}", {"deviations": found, "limits": limits}, ok)


# --- one step ---------------------------------------------------------------------------------------


def peaks(case: Case, _: dict[str, Any]) -> Result:
    """TFLOP/s in each precision."""
    from steps import measure_peaks

    found = measure_peaks(torch.device(case.device), case.peak_size, case.peak_seconds)
    return Result(", ".join(f"{name} {peak['tflop_per_s']:.3g} TFLOP/s" for name, peak in found.items()), found)


def step(case: Case, found: dict[str, Any], mode: str) -> Result:
    """What a step costs in a mode of train_step.py."""
    from steps import NETWORKS, flop_per_tile, make_batch, make_config, make_model
    from train_step import FirstStep, Runner, add_rates

    device, network = torch.device(case.device), NETWORKS[case.network]._replace(batch_size=case.batch_size)
    config = make_config(network)
    model = make_model(config)
    batch = make_batch(config, model, case.batch_size, pin_memory=case.device == "cuda")
    runner = Runner(mode, model, batch, network, device)
    for _ in range(case.repeats):
        runner.measure()
    kept = case.folder / "first_step.pt"
    if mode == "ours":
        torch.save(tuple(runner.first), kept)
    compared = kept.exists()  # unless `ours` has failed
    row = runner.row(FirstStep(*torch.load(kept)) if compared else runner.first)
    add_rates(row, flop_per_tile(config), found.get("peaks", {}))
    share = "" if row["share_of_peak"] is None else f" ({row['share_of_peak']:.0%} of the peak)"
    text = (
        f"{row['ms']['median']:.1f} ms ({row['ms']['least']:.1f} - {row['ms']['most']:.1f}), "
        f"{row['tflop_per_s']:.3g} TFLOP/s{share}, {row['memory_mb'] / 1000:.2f} GB, {row['layout']}, "
        f"{row['hours']:.1f} h for 200,000 steps of 32 tiles; loss deviates by {row['loss_deviation']:.1e}, "
        f"gradients by {row['gradient_deviation']:.1e}"
    )
    if not compared:
        text += "; not compared with `ours`, which failed"
    return Result(text, {**row, "compared": compared}, row["same"])


# --- runs -------------------------------------------------------------------------------------------


def command(*arguments: str) -> tuple[int, str, str]:
    """Run a command of spectralvae in this process; returns exit code, stdout and stderr."""
    from spectralvae.cli import run

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = run(list(arguments))
    return code, out.getvalue(), err.getvalue()


def write_train_config(case: Case, name: str, data: dict[str, Any], training: dict[str, Any]) -> Path:
    """A config of `train` on a store of random spectra, which is written if there is none yet.

    Args:
        case: gives network, batch and device.
        name: of the output directory.
        data, training: what differs in these sections.
    """
    from loader import write_store
    from steps import NETWORKS

    network, store = NETWORKS[case.network], case.folder / "store"
    if not store.exists():
        write_store(store, 3, (*case.scene_shape, network.n_channels), "float16", n_val=1)
    path = case.folder / "train.yaml"
    sizes = {"batch_size": case.batch_size, "tile_size": network.tile_size}
    config = {
        "output_dir": str(case.folder / name),
        "data": {"store": str(store), **sizes, **data},
        "model": network.model,
        "training": {"device": case.device, **training},
    }
    path.write_text(json.dumps(config))
    return path


def train(config: Path) -> dict[str, Any]:
    """Run `train`; returns its run.json.

    Raises:
        RuntimeError: it failed.
    """
    code, out, err = command("train", str(config))
    if code:
        raise RuntimeError(f"`spectralvae train` ended with exit code {code}: {err or out}")
    record: dict[str, Any] = json.loads((Path(json.loads(config.read_text())["output_dir"]) / "run.json").read_text())
    return record


def train_and_wait(case: Case, _: dict[str, Any], cache: bool) -> Result:
    """Where the time of a run's loop goes."""
    training = {"precision": "bf16-mixed", "n_steps": case.n_steps}
    record = train(write_train_config(case, f"run-{cache}", {"cache": cache}, training))
    seconds = record["starts"][-1]["seconds"]
    whole = seconds["all"]
    shares = {what: part / whole for what, part in seconds.items() if what != "all"}
    ms = 1000 * whole * (1 - sum(shares.values())) / case.n_steps
    parts = ", ".join(f"{what} {share:.2%}" for what, share in shares.items())
    text = f"{case.n_steps} steps of {case.batch_size} tiles in {whole:.1f} s, {ms:.1f} ms a step; of the time: {parts}"
    return Result(text, {"seconds": seconds, "shares": shares, "ms": ms})


def train_to(case: Case, _: dict[str, Any], name: str, n_steps: int) -> Result:
    """A short run, or more steps of one."""
    training = {"precision": "bf16-mixed", "n_steps": n_steps, "save_every": STOP_AT}
    record = train(write_train_config(case, name, {}, training))
    start = record["starts"][-1]
    return Result(f"from step {start['from_step']} to step {start['to_step']}", {"from_step": start["from_step"]})


def resume(case: Case, found: dict[str, Any]) -> Result:
    """Resume the stopped run, and compare its last checkpoint with that of the whole one."""
    from safetensors.torch import load_file

    from_step = train_to(case, found, "stopped", STEPS).figures["from_step"]
    whole, resumed = (case.folder / name / f"checkpoints/step={STEPS:06d}" for name in ("whole", "stopped"))
    figures: dict[str, Any] = {"from_step": from_step}
    for name in ("model.safetensors", "optimizer.safetensors", "trainer.json"):
        expected, got = ((folder / name).read_bytes() for folder in (whole, resumed))
        figures[name] = {"same": expected == got}
        if name.endswith(".safetensors"):
            a, b = (load_file(folder / name) for folder in (whole, resumed))
            figures[name]["largest_deviation"] = max(deviation(b[key].double(), a[key].double()) for key in a)
        elif expected != got:
            figures[name] |= {"whole": json.loads(expected), "resumed": json.loads(got)}
    differing = [name for name, values in figures.items() if name != "from_step" and not values["same"]]
    text = f"resumed from step {from_step}; "
    text += (
        "bit-identical at step 20"
        if not differing
        else ", ".join(
            f"{name} differs (largest deviation {figures[name].get('largest_deviation', 0):.1e})" for name in differing
        )
    )
    return Result(text, figures, from_step == STOP_AT and not differing)


def two_ranks(case: Case, _: dict[str, Any]) -> Result:
    """Two processes that see one GPU."""
    config = write_train_config(case, "ranks", {}, {"device": "auto", "n_steps": 1})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "spectralvae", "train", str(config)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    codes = [int(code) for code in re.findall(r"exitcode\s*:\s*(-?\d+)", done.stderr)]  # torchrun's own is 1
    refused = bool(codes) and codes[-1] == 2 and not (case.folder / "ranks").exists()  # the first to fail comes last
    said = next((line for line in done.stderr.splitlines() if "CUDA device" in line), done.stderr[-500:])
    return Result(f"exit codes {codes}: {said}", {"exit_codes": codes, "stderr": done.stderr[-2000:]}, refused)


# --- scenes -----------------------------------------------------------------------------------------


def scenes(case: Case, _: dict[str, Any]) -> Result:
    """Both commands on a granule, each with all that it does first on a device."""
    import encode
    from steps import NETWORKS

    network = NETWORKS[case.network]
    granule = encode.simulate(case.folder, list(case.granule_shape), network.n_channels)
    chs = network.model.get("chs", [512, 256, 128])
    model = encode.write_model(case.folder / "model", granule, chs, network.tile_size)
    given = encode.Case(granule, model, case.folder, case.device, case.batch_size)
    megabytes = 4 * math.prod(case.granule_shape) * network.n_channels / 1e6
    figures: dict[str, Any] = {"float32_mb": megabytes}
    for task in ("encode", "decode"):
        begun = time.perf_counter()
        with encode.stages() as seconds:
            encode.ours(task, "command", given)
        whole = time.perf_counter() - begun
        shares = {stage: part / whole for stage, part in seconds.items()}
        figures[task] = {"seconds": whole, "mb_per_s": megabytes / whole, "shares": shares}
    parts = [
        f"{task} {figures[task]['mb_per_s']:.0f} MB/s (network {figures[task]['shares']['network']:.0%} of the time)"
        for task in ("encode", "decode")
    ]
    return Result(f"{megabytes:.0f} MB: {', '.join(parts)}", figures)


def doctor(case: Case, _: dict[str, Any]) -> Result:
    """The checks of `doctor` on the default config."""
    code, out, err = command("doctor", str(write_train_config(case, "doctor", {}, {})), "--json")
    report = json.loads(out) if out else {"checks": {}}
    marks = ", ".join(f"{name} {'ok' if check['ok'] else 'FAILED'}" for name, check in report["checks"].items())
    return Result(f"{marks}{'; ' if err else ''}{err.strip()}", report, code == 0)


# --- stages -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One question.

    Attributes:
        name: of the stage.
        function: answers it, given the case, the figures of earlier stages by name, and ``arguments``.
        seconds: after which it is stopped.
        arguments: of the function.
        on: the devices on which it makes sense.
    """

    name: str
    function: Callable[..., Result]
    seconds: float
    arguments: tuple[Any, ...] = ()
    on: tuple[str, ...] = ("cpu", "cuda")


STAGES = [
    Stage("golden-float32", golden, 60, ("float32",)),
    Stage("golden-tf32", golden, 60, ("tf32",), on=("cuda",)),
    Stage("golden-bf16", golden, 60, ("bf16",)),
    Stage("peaks", peaks, 40),
    *(Stage(f"step-{mode}", step, 60, (mode,)) for mode in (*STEP_MODES, "ours-bf16-cache")),
    Stage("train", train_and_wait, 120, (False,)),
    Stage("train-cache", train_and_wait, 120, (True,)),
    Stage("whole", train_to, 60, ("whole", STEPS)),
    Stage("half", train_to, 60, ("stopped", STOP_AT)),
    Stage("resumed", resume, 60),
    Stage("scenes", scenes, 120),
    Stage("two-ranks", two_ranks, 60, on=("cuda",)),
    Stage("step-ours-bf16-compile", step, 180, ("ours-bf16-compile",), on=("cuda",)),
    Stage("doctor", doctor, 180),
]


def answer(connection: Connection, stage: Stage, case: Case, found: dict[str, Any]) -> None:
    """Run a stage in this process, which leads a group of its own, and send its outcome."""
    os.setsid()
    outcome: dict[str, Any]
    try:
        text, figures, ok = stage.function(case, found, *stage.arguments)
        outcome = {"status": "ok" if ok else "failed", "text": text, "figures": figures}
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("spectralvae"):
            raise
        outcome = {"status": "skipped", "text": f"package {error.name} is missing"}
    except Exception as error:
        lines = traceback.format_exc().strip().splitlines()[-TRACEBACK_LINES:]
        outcome = {"status": "failed", "text": f"{type(error).__name__}: {error}", "traceback": lines}
    connection.send(outcome)


def outcome_of(stage: Stage, case: Case, found: dict[str, Any], left: float) -> dict[str, Any]:
    """Run a stage in a fresh process.

    Args:
        stage: to be run.
        case: of the stage.
        found: figures of earlier stages.
        left: seconds of the whole budget.

    Returns:
        status, text, and figures or the end of a traceback.
    """
    if case.device not in stage.on:
        return {"status": "not applicable", "text": f"needs {' or '.join(stage.on)}"}
    if left < LEAST_SECONDS:
        return {"status": "skipped", "text": "the time budget is used up"}
    context = multiprocessing.get_context("forkserver")  # forked from a process that has imported these, and no more
    modules = ["torch", "spectralvae.cli", "spectralvae.training.trainer"]
    if case.device == "cpu":
        modules.append("torch._dynamo")  # which may look for GPUs, and no process can use CUDA after a fork then
    context.set_forkserver_preload(modules)
    ours, theirs = context.Pipe()
    process = context.Process(target=answer, args=(theirs, stage, case, found))
    process.start()
    theirs.close()
    try:
        if ours.poll(min(stage.seconds, left)):
            outcome: dict[str, Any] = ours.recv()
        elif left < stage.seconds:
            outcome = {"status": "skipped", "text": f"stopped after {left:.0f} s, when the time budget was used up"}
        else:
            outcome = {"status": "failed", "text": f"stopped after its {stage.seconds:.0f} s"}
    except EOFError:
        process.join()
        outcome = {"status": "failed", "text": f"its process died with exit code {process.exitcode}"}
    finally:
        with contextlib.suppress(ProcessLookupError):  # it leads no group yet, or nothing is left of it
            os.killpg(process.pid or 0, signal.SIGKILL)  # and what it has started
        process.kill()
        process.join()
    return outcome


def describe(device: str) -> dict[str, Any]:
    """What the figures depend on, beside the machine."""
    if device == "cpu":
        return {"name": "cpu"}
    properties, cudnn = torch.cuda.get_device_properties(0), cast(Any, torch.backends.cudnn)
    return {
        "name": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "count": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version(),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="the results")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds in all")
    parser.add_argument("--stages", nargs="+", choices=[stage.name for stage in STAGES], help="if left out, all")
    parser.add_argument("--tiny", action="store_true", help="a tiny network, a few steps: whether the script works")
    options = parser.parse_args(arguments)
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    device = usual if options.device == "auto" else options.device
    begun, load_before = time.monotonic(), os.getloadavg()
    folder = Path(tempfile.mkdtemp(prefix="gpu-"))
    case = Case(device, folder, **(TINY if options.tiny else {}))
    report: dict[str, Any] = {
        "machine": machine(["torch", "numpy"]),
        "device": describe(device),
        "settings": {key: str(value) for key, value in vars(options).items()},
        "load_before": load_before,
    }
    print(f"{report['device']['name']}, torch {torch.__version__}, at most {options.budget:.0f} s", flush=True)
    stages: dict[str, dict[str, Any]] = {}
    try:
        for stage in STAGES:
            if options.stages and stage.name not in options.stages:
                continue
            print(f"{stage.name} ...", flush=True)
            found = {name: outcome["figures"] for name, outcome in stages.items() if "figures" in outcome}
            stage_begun = time.monotonic()
            outcome = outcome_of(stage, case, found, options.budget - (stage_begun - begun))
            outcome["seconds"] = round(time.monotonic() - stage_begun, 2)
            stages[stage.name] = outcome
            print(f"    {outcome['status']} in {outcome['seconds']:.1f} s: {outcome['text']}", flush=True)
            report |= {"load_after": os.getloadavg(), "seconds": time.monotonic() - begun, "stages": stages}
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    finally:
        shutil.rmtree(folder)
    print()
    for name, outcome in stages.items():
        print(f"{name:24s} {outcome['status']:15s} {outcome['seconds']:6.1f} s  {outcome['text']}")
    failed = [name for name, outcome in stages.items() if outcome["status"] == "failed"]
    for name in failed:
        print("\n".join(["", f"{name}:", *stages[name].get("traceback", ["no traceback"])]))
    print(f"\n{time.monotonic() - begun:.0f} s; failed: {', '.join(failed) or 'none'}; {options.json}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
