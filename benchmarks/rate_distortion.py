"""What the same bytes could buy: bytes against distortion, for our codec and for what a user would take instead.

    python benchmarks/rate_distortion.py --granules DIR --model RUN [--samson FILE --samson-model RUN]
                                         [--methods NAME ...] [--json FILE] [--figure FILE]

DIR holds simulated granules with their four level-2 products, on some of which RUN was trained. Coded is the first
granule that it was validated on; regressions of the products, and the size of the noise, come from granules that it was
trained on. Of Samson, whose network was trained on one region, another one is coded (--samson-region).

All codecs see the same z, normalised as the model's, not clipped, with the same mask. Bytes are all that decoding needs
but coordinates and attributes, which rivals don't have: of ours the whole file is counted beside (`file_bytes`), the
model is not. Ratios are to 4 bytes for each sample of the array, valid or not, and bits per sample are 32 / ratio.
Each codec's parameter is searched until its bytes are within 5 % of each ratio. Where it cannot go as far, or knows
but few parameters, it is shown with the bytes that come nearest, marked *.

MB/s are of float32, with one thread: of rivals from and to arrays in memory, of ours those of the whole commands, which
read and write files and check what they made.

    ours, ours-bounded       `compress` with rate.step, and with bound.z; `decompress`
    ours-network             as ours, with the network wherever it is worse than without
    pca                      components of each pixel's spectrum, quantised with one step, entropy-coded (order 0)
    pca-jpeg2000             the same components as 16-bit images, JPEG 2000, the same squared error in all
    pca-2-floats             two components a pixel, float32
    sz3, zfp                 with an absolute bound
    bitround-zstd3, -zstd19  few bits of mantissa, bytes shuffled, zstd
    zstd3, zstd19, deflate   without loss: z as it is, bytes shuffled; and the radiance as its source is stored
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import numpy as np
import torch
from distortion import distortion
from encode import command
from numpy.typing import NDArray
from rate_distortion_report import draw, table
from rivals import BitRound, Codec, Pca, PcaJpeg2000, Sz3, TwoComponents, Zfp, Zstd, deviation
from steps import spread, write_report
from subjects import Subject, samson, simulated
from threadpoolctl import threadpool_limits

from spectralvae import open_scene
from spectralvae.codec.coding import SceneCoder
from spectralvae.codec.stages import LEAST_BOUND, MARGIN

RATIOS = (4, 16, 64, 256, 1024, 4096)
TOLERANCE, MAX_TRIES, STRIDE = 0.05, 12, 16.0  # of the search for a parameter
CODECS = ("constriction", "imagecodecs", "numcodecs", "pysz", "h5py")

Float32 = NDArray[np.float32]


# --- codecs that need more than z -----------------------------------------------------------------


class Ours(Codec):
    """The commands `compress` and `decompress`.

    Args:
        subject: whose file is read.
        folder: for what the commands write.
        key: of `compress`, and the key below it that the parameter is given to.
        device: where the network computes.
        network: is used, whether it serves or not.
    """

    parameter = "step or bound"

    def __init__(
        self, subject: Subject, folder: Path, key: tuple[str, str], device: str, network: bool = False
    ) -> None:
        self._subject, self._folder, self._key, self._network = subject, folder, key, network
        self._shared = {"model": str(subject.model.absolute()), "device": device}
        self._beside: dict[bytes, int] = {}

    def limits(self, z: Float32) -> tuple[float, float]:
        scale, least = deviation(z), LEAST_BOUND * MARGIN if self._key[0] == "bound" else 0.0
        return max(least, 1e-5 * scale), 10 * math.sqrt(z.shape[-1]) * scale

    def encode(self, z: Float32, parameter: float) -> bytes:
        (key, what), inputs = self._key, [self._subject.spec]
        config = {"inputs": inputs, key: {what: parameter}, **self._shared}
        with ExitStack() as stack:
            for judgement in ("_cheaper", "_better") if self._network else ():
                stack.enter_context(mock.patch.object(SceneCoder, judgement, return_value=True))
            made = command("compress", self._folder, **config)
        (file,) = made.glob("*.svae")
        (row,) = json.loads((made / "report.json").read_text())["files"].values()
        data = file.read_bytes()
        self._beside[data] = len(data) - row["bytes_without_coordinates"]
        return data

    def decode(self, data: bytes) -> Float32:
        file = self._folder / "scene.svae"
        file.write_bytes(data)
        made = command("decompress", self._folder, inputs=[str(file)], **self._shared)
        (decoded,) = made.glob("*.nc")
        with open_scene(decoded, band=self._subject.normalization.band) as scene:
            return self._subject.normalization.standardize(scene.radiance.values).astype(np.float32)

    def beside(self, data: bytes) -> int:
        return self._beside[data]


class Deflate(Codec):
    """Radiance as its source stores it, in an HDF5 file, of which only the values are counted."""

    parameter = None

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def limits(self, z: Float32) -> tuple[float, float]:
        return 1.0, 1.0

    def encode(self, z: Float32, parameter: float) -> bytes:
        memory = io.BytesIO()
        with h5py.File(memory, "w") as file:
            file.create_dataset("radiance", data=self._subject.radiance, **self._subject.stored)
        return memory.getvalue()

    def decode(self, data: bytes) -> Float32:
        with h5py.File(io.BytesIO(data)) as file:
            return self._subject.normalization.standardize(file["radiance"][...]).astype(np.float32)

    def beside(self, data: bytes) -> int:
        with h5py.File(io.BytesIO(data)) as file:
            return len(data) - int(file["radiance"].id.get_storage_size())


METHODS: dict[str, Callable[[Subject, Path, str], Codec]] = {
    "ours": lambda subject, folder, device: Ours(subject, folder, ("rate", "step"), device),
    "ours-network": lambda subject, folder, device: Ours(subject, folder, ("rate", "step"), device, network=True),
    "ours-bounded": lambda subject, folder, device: Ours(subject, folder, ("bound", "z"), device),
    "pca": lambda *_: Pca(),
    "pca-jpeg2000": lambda *_: PcaJpeg2000(),
    "pca-2-floats": lambda *_: TwoComponents(),
    "sz3": lambda *_: Sz3(),
    "zfp": lambda *_: Zfp(),
    "bitround-zstd3": lambda *_: BitRound(3),
    "bitround-zstd19": lambda *_: BitRound(19),
    "zstd3": lambda *_: Zstd(3),
    "zstd19": lambda *_: Zstd(19),
    "deflate": lambda subject, *_: Deflate(subject),
}


# --- measuring ------------------------------------------------------------------------------------


def search(codec: Codec, z: Float32, target: float, sizes: dict[float, int]) -> float:
    """The parameter with which the bytes come near to a target.

    Their logarithm is taken to be linear in that of the parameter, between the nearest known ones on either side.

    Args:
        codec: whose parameter is sought.
        z: what it codes.
        target: bytes.
        sizes: bytes by parameter, as far as they are known; grows.

    Returns:
        The parameter with the nearest bytes of all that are known in the end.
    """
    low, high = codec.limits(z)
    for _ in range(MAX_TRIES):
        if any(abs(size / target - 1) <= TOLERANCE for size in sizes.values()):
            break
        above = max((p for p, size in sizes.items() if size >= target), default=None)
        below = min((p for p, size in sizes.items() if size < target), default=None)
        if above is None and below is None:
            tried = [math.sqrt(low * high)]
        elif below is None:
            tried = [min(high, above * STRIDE)]
        elif above is None:
            tried = [max(low, below / STRIDE)]
        else:
            share = math.log(sizes[above] / target) / math.log(sizes[above] / sizes[below])
            tried = [above * (below / above) ** s for s in (min(max(share, 0.1), 0.9), 0.5)]
        new = [p for p in map(codec.snap, tried) if p not in sizes]
        if not new:
            break
        data = codec.encode(z, new[0])
        sizes[new[0]] = len(data) - codec.beside(data)
    return min(sizes, key=lambda p: abs(math.log(sizes[p] / target)))


def measure(name: str, codec: Codec, parameter: float, subject: Subject, repeats: int) -> dict[str, Any]:
    """All about one codec with one parameter."""
    z, seconds = subject.z, {"encode": [0.0] * repeats, "decode": [0.0] * repeats}
    for repeat in range(repeats):
        begun = time.perf_counter()
        data = codec.encode(z, parameter)
        encoded = time.perf_counter()
        z_hat = codec.decode(data)
        seconds["encode"][repeat] = encoded - begun
        seconds["decode"][repeat] = time.perf_counter() - encoded
    counted = len(data) - codec.beside(data)
    speeds = {f"{task}_mb_per_s": z.nbytes / 1e6 / float(np.median(times)) for task, times in seconds.items()}
    return {
        "method": name,
        "parameter": parameter if codec.parameter else None,
        "bytes": counted,
        "file_bytes": len(data),
        "ratio": z.nbytes / counted,
        "bits_per_sample": 8 * counted / z.size,
        **distortion(z, z_hat, subject.normalization, subject.noise),
        "retrieval": {product: question.ask(z_hat) for product, question in subject.questions.items()},
        **{f"{task}_seconds": spread(times) for task, times in seconds.items()},
        **speeds,
    }


def measure_method(
    name: str, codec: Codec, subject: Subject, ratios: Sequence[float], repeats: int
) -> Iterator[dict[str, Any]]:
    """Its points, each once, under the first ratio that it comes nearest to."""
    if codec.parameter is None:
        parameter, _ = codec.limits(subject.z)
        yield {"target": None, "reached": True, **measure(name, codec, parameter, subject, repeats)}
        return
    sizes: dict[float, int] = {}
    seen = set()
    for ratio in ratios:
        target = subject.z.nbytes / ratio
        parameter = search(codec, subject.z, target, sizes)
        if parameter not in seen:
            seen.add(parameter)
            reached = abs(sizes[parameter] / target - 1) <= TOLERANCE
            yield {"target": ratio, "reached": reached, **measure(name, codec, parameter, subject, repeats)}


def measure_subject(subject: Subject, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All points of a scene, and what they depend on."""
    points = []
    for name in options.methods:
        codec = METHODS[name](subject, folder, options.device)
        for point in measure_method(name, codec, subject, options.ratios, options.repeats):
            print(f"{subject.name}: {name} {point['ratio']:.1f} x, {point['psnr']:.1f} dB", file=sys.stderr)
            points.append(point)
    deflated = subject.deflated_bytes
    if deflated is None:
        data = (codec := Deflate(subject)).encode(subject.z, 1.0)
        deflated = len(data) - codec.beside(data)
    for point in points:
        point["ratio_to_deflated"] = deflated / point["bytes"]
    return {
        "scene": subject.name,
        "shape": subject.z.shape,
        "float32_bytes": subject.z.nbytes,
        "deflated_bytes": deflated,
        "deflated": "as the source is stored" if subject.deflated_bytes else "as netCDF-4 would be: shuffled, zlib 4",
        "valid_share": float(np.isfinite(subject.z).mean()),
        "peak": float(np.nanmax(subject.z) - np.nanmin(subject.z)),
        "model_bytes": (subject.model / "model.safetensors").stat().st_size,
        "r2_before": {product: q.r2(q.before) for product, q in subject.questions.items()},
        "remarks": subject.remarks,
        "points": points,
    }


def finite(value: Any) -> Any:
    """As JSON has it: null for what is no number."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--granules", type=Path, help="folder of simulated granules with level 2")
    parser.add_argument("--model", type=Path, help="run or export, trained on some of them")
    parser.add_argument("--samson", type=Path, help="the Samson scene, a MATLAB file")
    parser.add_argument("--samson-model", type=Path, help="run or export, trained on one region of it")
    parser.add_argument("--samson-region", type=int, nargs=4, default=[60, 95, 0, 95], metavar=("Y0", "Y1", "X0", "X1"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="float32 to bytes")
    parser.add_argument("--repeats", type=int, default=3, help="of what is timed")
    parser.add_argument("--device", default="cpu", help="of the network")
    parser.add_argument("--directory", type=Path, help="where the temporary folder is made")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--figure", type=Path, help="draw them there")
    options = parser.parse_args(arguments)
    for scene, model in (("granules", "model"), ("samson", "samson_model")):
        if (getattr(options, scene) is None) != (getattr(options, model) is None):
            parser.error(f"--{scene} and --{model.replace('_', '-')} go together")
    if options.granules is None and options.samson is None:
        parser.error("give --granules and --model, or --samson and --samson-model")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, save."""
    options, load_before = parse(arguments), os.getloadavg()
    torch.set_num_threads(1)
    scenes = []
    with threadpool_limits(1), tempfile.TemporaryDirectory(prefix="rate-", dir=options.directory) as name:
        if options.granules:
            scenes.append(measure_subject(simulated(options.granules, options.model), Path(name), options))
        if options.samson:
            subject = samson(options.samson, options.samson_model, options.samson_region)
            scenes.append(measure_subject(subject, Path(name), options))
    for scene in scenes:
        print(table(scene, options.ratios))
    if options.json:
        settings = {key: value.name if isinstance(value, Path) else value for key, value in vars(options).items()}
        versions = {package: version(package) for package in CODECS}
        write_report(options.json, settings, load_before, finite({"codecs": versions, "scenes": scenes}))
    if options.figure:
        draw(scenes).savefig(options.figure, dpi=100)


if __name__ == "__main__":
    main()
