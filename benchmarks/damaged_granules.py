"""Damage granules at random and read them: what is refused, what is unharmed, and what changes without notice.

    python benchmarks/damaged_granules.py [--n 2000] [--seed 0] [--json FILE]
    python benchmarks/damaged_granules.py --kinds [--json FILE]

Granules of three layouts (see tests/badfiles.py) in turn; a process of its own reads each of them, so that a hang or a
crash would be counted. --kinds makes the bad files of the tests instead: for each the line, seconds and memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import re
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from progress import say

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import badfiles

from spectralvae.errors import UserError
from spectralvae.readers import guard

TIME_LIMIT = 120
DEFLATED, PLAIN, HEADERS = "deflated chunks", "plain data", "headers"

# What begins with a signature; it ends where the next thing begins.
SIGNATURES = {
    b"\x89HDF": "superblock",
    b"OHDR": HEADERS,
    b"OCHK": HEADERS,
    b"TREE\x00": "group index",
    b"SNOD": "group index",
    b"HEAP": "group index",
    b"TREE\x01": "chunk index",
    b"FAHD": "chunk index",
    b"FADB": "chunk index",
    b"GCOL": "references",
    b"FRHP": "attributes",
    b"FHDB": "attributes",
    b"BTHD": "attributes",
    b"BTLF": "attributes",
}

DAMAGES = ("bit", "byte", "burst", "zeros", "cut off", "doubled", "cut out")


def damage(content: bytes, kind: str, random: np.random.Generator) -> tuple[bytes, slice]:
    """Damaged content, and where the damage is."""
    start = int(random.integers(len(content)))
    size = int(random.integers(16, 513))
    data = np.frombuffer(content, dtype=np.uint8).copy()
    if kind == "bit":
        data[start] ^= 1 << int(random.integers(8))
        return data.tobytes(), slice(start, start + 1)
    if kind == "byte":
        data[start] ^= int(random.integers(1, 256))
        return data.tobytes(), slice(start, start + 1)
    where = slice(start, min(start + size, len(content)))
    if kind == "burst":
        data[where] = random.integers(0, 256, where.stop - start)
        return data.tobytes(), where
    if kind == "zeros":
        data[where] = 0
        return data.tobytes(), where
    if kind == "cut off":
        return content[:start], slice(start, len(content))
    if kind == "doubled":
        return content[: where.stop] + content[where] + content[where.stop :], slice(start, len(content))
    return content[:start] + content[where.stop :], slice(start, len(content))


def map_structures(path: Path) -> np.ndarray:
    """For each byte of a granule the structure that it belongs to."""
    content = path.read_bytes()
    labels = np.full(len(content), "", dtype=object)

    def data(name: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        if item.chunks:
            item.id.chunk_iter(lambda chunk: label(chunk.byte_offset, chunk.size, DEFLATED))
        elif item.id.get_offset() is not None:
            label(item.id.get_offset(), item.nbytes, PLAIN)

    def label(start: int, size: int, text: str) -> None:
        labels[start : start + size] = text

    with h5py.File(path) as file:
        file.visititems(data)
    for heap in re.finditer(b"HEAP", content):
        size, _, start = struct.unpack_from("<3Q", content, heap.start() + 8)
        label(start, size, "names")
    starts = {m.start(): text for s, text in SIGNATURES.items() for m in re.finditer(re.escape(s), content)}
    current = HEADERS
    for i in range(len(labels)):
        if labels[i]:
            current = HEADERS
        else:
            labels[i] = current = starts.get(i, current)
    return labels


def read_forever(pipe: Connection, truth: dict[str, np.ndarray]) -> None:
    """Read the file of each path that comes, and send back (class, detail)."""
    while path := pipe.recv():
        try:
            values = badfiles.read_all(path)
        except UserError as error:
            whole = "\n" not in str(error) and str(path) in str(error)
            pipe.send(("refused", "") if whole else ("traceback", f"no line with the file's name: {error}"))
        except BaseException:
            pipe.send(("traceback", traceback.format_exc()))
        else:
            names = set(values) ^ set(truth)
            names |= {n for n in set(values) & set(truth) if not same(values[n], truth[n])}
            pipe.send(("changed", sorted(names)) if names else ("unchanged", ""))


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


class Reader:
    """A process that reads, replaced when it hangs or dies."""

    def __init__(self, truth: dict[str, np.ndarray]) -> None:
        self.truth = truth
        self.start()

    def start(self) -> None:
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=read_forever, args=(theirs, self.truth), daemon=True)
        self.process.start()
        theirs.close()

    def read(self, path: Path) -> tuple[str, Any]:
        self.pipe.send(path)
        try:
            if self.pipe.poll(TIME_LIMIT):
                return self.pipe.recv()
            found = "hang", f"over {TIME_LIMIT} s"
        except EOFError:
            self.process.join()
            found = "crash", f"status {self.process.exitcode}"
        self.process.kill()
        self.start()
        return found

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


def run_damages(n: int, seed: int, folder: Path) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    granules = {layout: badfiles.write_granule(folder / f"{layout}.nc", layout=layout) for layout in badfiles.LAYOUTS}
    contents = {layout: path.read_bytes() for layout, path in granules.items()}
    maps = {layout: map_structures(path) for layout, path in granules.items()}
    reader = Reader(badfiles.read_all(granules["newest"]))
    for path in granules.values():
        assert reader.read(path) == ("unchanged", ""), f"{path.name} differs before it is damaged"
    rows = []
    seconds = []
    path = folder / "damaged.nc"
    for i in range(n):
        if i % 100 == 0:
            say(f"{i} of {n} files")
        layout = list(granules)[i % len(granules)]
        kind = DAMAGES[i // len(granules) % len(DAMAGES)]
        content, where = damage(contents[layout], kind, random)
        path.write_bytes(content)
        start = time.perf_counter()
        found, detail = reader.read(path)
        seconds.append(time.perf_counter() - start)
        hit = sorted(set(maps[layout][where])) if kind in DAMAGES[:4] else ["from there on, all"]
        rows.append({"i": i, "layout": layout, "damage": kind, "at": where.start, "in": hit, "class": found,
                     "detail": detail})  # fmt: skip
    reader.close()
    return {"n": n, "seed": seed, "rows": rows, "seconds": {"total": sum(seconds), "longest": max(seconds)}}


def print_damages(result: dict[str, Any]) -> None:
    rows = result["rows"]
    classes = ("refused", "unchanged", "changed", "traceback", "hang", "crash")
    for r in rows:
        r["hit"] = r["in"][0] if len(r["in"]) == 1 else "several structures"
    for key in ("layout", "damage", "hit"):
        print(f"\n{key:24s}" + "".join(f"{name:>11s}" for name in classes))
        counts = Counter((r[key], r["class"]) for r in rows)
        for value in dict.fromkeys(r[key] for r in rows):
            print(f"{value:24s}" + "".join(f"{counts[value, name]:11d}" for name in classes))
    total = Counter(r["class"] for r in rows)
    print(f"{'all':24s}" + "".join(f"{total[name]:11d}" for name in classes))
    print(f"\nseconds: {result['seconds']['total']:.0f} in all, {result['seconds']['longest']:.2f} at most")
    for r in rows:
        if r["class"] not in ("refused", "unchanged"):
            where = f"#{r['i']} {r['layout']}, {r['damage']} at {r['at']} in {', '.join(r['in'])}"
            print(f"{r['class']}: {where}: {r['detail']}")


def try_kind(name: str, pipe: Connection) -> None:
    """Read one bad file; send the line, seconds, and MiB that this process and the guard's took more than before."""
    with tempfile.TemporaryDirectory() as folder:
        path = badfiles.KINDS[name](Path(folder))
        guard._HELPER.end()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        try:
            badfiles.read_all(path)
            line = "READ"
        except UserError as error:
            line = f"{type(error).__name__}: {error}".replace(f"{folder}/", "")
        seconds = time.perf_counter() - start
    guard._HELPER.end()
    own, theirs = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    mib = {"mib": (own - before) / 1024, "guard_mib": theirs / 1024}
    pipe.send({"kind": name, "line": line, "seconds": seconds, **mib})


def run_kinds() -> list[dict[str, Any]]:
    context = mp.get_context("spawn")
    rows = []
    print(f"{'kind':40s} {'seconds':>7s} {'MiB':>6s} {'guard':>6s}  line")
    for name in badfiles.KINDS:
        ours, theirs = context.Pipe()
        process = context.Process(target=try_kind, args=(name, theirs))
        process.start()
        hang = {"kind": name, "line": "HANG", "seconds": TIME_LIMIT, "mib": 0.0, "guard_mib": 0.0}
        row = ours.recv() if ours.poll(TIME_LIMIT) else hang
        process.kill()
        process.join()
        rows.append(row)
        print(f"{name:40s} {row['seconds']:7.2f} {row['mib']:6.0f} {row['guard_mib']:6.0f}  {row['line']}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result: Any
    if arguments.kinds:
        result = run_kinds()
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = run_damages(arguments.n, arguments.seed, Path(folder))
        print_damages(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
