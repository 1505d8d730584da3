"""The file of a compressed scene: whatever is changed in it is noticed, and it is whole or not there."""

from __future__ import annotations

import itertools
import json
import os
import resource
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from refusals import refused

from spectralvae.codec.container import read_container, read_head, write_container
from spectralvae.errors import DamagedError, InputError, NoRoomError

HEAD = {"shape": [2, 3, 4], "delta": 0.25, "name": "ü"}
BLOCKS = [("LAYT", b"layout"), ("RESI", bytes(range(40))), ("MASK", b"")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.svae"
    write_container(path, HEAD, BLOCKS)
    return path


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def made_by_hand(parts: Sequence[tuple[bytes, bytes]], version: int = 1, length: int | None = None) -> bytes:
    """A file after the format's description; the TAIL fits whatever is in it."""
    start = b"\x89SVA\r\n\x1a\n" + u32(version)
    content = start + u32(google_crc32c.value(start))
    checksums = b""
    for kind, payload in parts:
        block = kind + struct.pack("<Q", len(payload)) + payload
        checksums += u32(google_crc32c.value(block))
        content += block + checksums[-4:]
    end = struct.pack("<Q", len(content) + 28 if length is None else length) + u32(google_crc32c.value(checksums))
    tail = b"TAIL" + struct.pack("<Q", len(end)) + end
    return content + tail + u32(google_crc32c.value(tail))


PARTS = [(b"HEAD", zlib.compress(json.dumps(HEAD).encode())), *((kind.encode(), data) for kind, data in BLOCKS)]
WHOLE = made_by_hand(PARTS)


def check_damaged(path: Path, *words: str, readers: Sequence[Any] = (read_container, read_head)) -> None:
    """One line with some words, and little memory."""
    for read in readers:
        tracemalloc.start()
        try:
            with refused(DamagedError, *words, path=path):
                read(path)
            assert tracemalloc.get_traced_memory()[1] < 2**25
        finally:
            tracemalloc.stop()


# --- whole files ------------------------------------------------------------------------------


def test_round_trip(path: Path, tmp_path: Path) -> None:
    assert read_container(path) == (HEAD, dict(BLOCKS))
    assert read_head(path) == HEAD
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes()[:20] == WHOLE[:20]
    path.write_bytes(WHOLE)
    assert read_container(path) == (HEAD, dict(BLOCKS))
    write_container(path, {}, [])
    assert read_container(path) == ({}, {})
    assert read_head(path) == {}


def test_large_blocks_are_not_copied(tmp_path: Path) -> None:
    block = os.urandom(2**23)
    tracemalloc.start()
    try:
        write_container(tmp_path / "a", {}, [("AAAA", block), ("BBBB", block)])
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()
    assert read_container(tmp_path / "a")[1] == {"AAAA": block, "BBBB": block}


@pytest.mark.parametrize("kinds", [("AAAA", "AAAA"), ("HEAD",), ("TAIL",), ("AAA",), ("äöüß",)])
def test_kinds_are_four_letters_and_different(tmp_path: Path, kinds: Sequence[str]) -> None:
    with pytest.raises(AssertionError):
        write_container(tmp_path / "a", {}, [(kind, b"") for kind in kinds])


# --- damage -----------------------------------------------------------------------------------


def test_every_flipped_bit_is_noticed(path: Path) -> None:
    content = path.read_bytes()
    head_ends = 16 + 12 + struct.unpack_from("<Q", content, 20)[0] + 4
    for position, bit in itertools.product(range(len(content)), range(8)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << bit
        path.write_bytes(damaged)
        with pytest.raises(InputError if position < 8 else DamagedError):
            read_container(path)
        if position < head_ends or position >= len(content) - 28:
            with pytest.raises(InputError if position < 8 else DamagedError):
                read_head(path)
        else:
            assert read_head(path) == HEAD


def test_every_truncation_is_noticed(path: Path) -> None:
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        for read in (read_container, read_head):
            with pytest.raises(InputError if length == 0 else DamagedError):
                read(path)
    path.write_bytes(content[:40])
    head_ends = 16 + 12 + struct.unpack_from("<Q", content, 20)[0] + 4
    check_damaged(path, "40", str(head_ends), "HEAD")  # where it is cut off


def cut_into_blocks(content: bytes) -> list[bytes]:
    """First bytes, then each block."""
    pieces, first = [content[:16]], 16
    while first < len(content):
        end = first + 12 + struct.unpack_from("<Q", content, first + 4)[0] + 4
        pieces.append(content[first:end])
        first = end
    return pieces


def test_blocks_that_are_swapped_missing_twice_or_of_another_file(path: Path) -> None:
    start, *blocks = cut_into_blocks(path.read_bytes())
    assert len(blocks) == 5
    write_container(path, HEAD, [("LAYT", b"LAYOUT"), *BLOCKS[1:]])
    other = cut_into_blocks(path.read_bytes())[2]
    variants = [[blocks[0], other, *blocks[2:]], *map(list, itertools.permutations(blocks))]
    for i in range(5):
        variants += [blocks[:i] + blocks[i + 1 :], blocks[: i + 1] + blocks[i:]]
    variants.remove(blocks)
    for variant in variants:
        path.write_bytes(start + b"".join(variant))
        check_damaged(path, readers=[read_container])
    path.write_bytes(made_by_hand([*PARTS, (b"LAYT", b"other")]))  # by intent
    check_damaged(path, "LAYT", readers=[read_container])


HEADS = {
    "large": zlib.compress(b" " * 2**28, 9),
    "a large text": zlib.compress(b'"' + b"a" * 2**23 + b'"', 9),
    "deep": zlib.compress(b"[" * 100_000),
    "a list": zlib.compress(b"[]"),
    "not UTF-8": zlib.compress(b"\xff"),
    "not JSON": zlib.compress(b"{"),
    "more behind": zlib.compress(b"{}") + b"x",
    "cut off": zlib.compress(b"{}")[:-1],
    "not compressed": b"{}",
    "empty": b"",
}
LAST = WHOLE[:-28] + b"XEND" + WHOLE[-24:-4]
LENGTHS = (2**31, 2**40, 2**63, 2**64 - 1)
DAMAGED = {
    **{f"followed by {more[:4]!r}": (WHOLE + more, "") for more in (b"\0", b"\n", b"TAIL", WHOLE)},
    "empty": (made_by_hand([]), "HEAD"),
    "without head": (made_by_hand(PARTS[1:]), "HEAD"),
    "head last": (made_by_hand(PARTS[::-1]), "HEAD"),
    **{f"head: {name}": (made_by_hand([(b"HEAD", head)]), "HEAD") for name, head in HEADS.items()},
    "another length": (made_by_hand(PARTS, length=1000), "1000"),
    "another last block": (LAST + u32(google_crc32c.value(LAST[-24:])), ""),
    **{f"first block of {n}": (WHOLE[:20] + struct.pack("<Q", n) + WHOLE[28:], "HEAD") for n in LENGTHS},
    **{f"last block of {n}": (WHOLE[:-24] + struct.pack("<Q", n) + WHOLE[-16:], "TAIL") for n in LENGTHS},
}
OTHERS = {
    **{str(content[:8]): content for content in (b"", b"\x89PNG\r\n\x1a\n" + bytes(100), b"\x89HDF\r\n\x1a\n", b"{}")},
    "as text": WHOLE.replace(b"\r\n", b"\n"),
    "7 bits": bytes(byte & 0x7F for byte in WHOLE),
    "format 2": made_by_hand(PARTS, version=2),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_files_that_nobody_wrote(path: Path, name: str) -> None:
    content, word = DAMAGED[name]
    path.write_bytes(content)
    check_damaged(path, word)


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_other_kinds(path: Path, name: str) -> None:
    path.write_bytes(OTHERS[name])
    for read in (read_container, read_head):
        with refused(InputError, *([name] if name == "format 2" else []), path=path):
            read(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "pipe", tmp_path / "loop"):
        for read in (read_container, read_head):
            with refused(InputError, path=path):
                read(path)


# --- writing that is cut off ------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from spectralvae.codec.container import write_container

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

setattr({owner}, "{name}", die)
write_container(Path(sys.argv[1]), {{"new": 1}}, [("AAAA", bytes(2**20))])
"""


@pytest.mark.parametrize(("owner", "name", "old"), [("os", "fsync", False), ("Path", "replace", True)])
def test_killed_while_writing(tmp_path: Path, owner: str, name: str, old: bool) -> None:
    path = tmp_path / "a.svae"
    if old:
        write_container(path, HEAD, BLOCKS)
    process = subprocess.run([sys.executable, "-c", KILLED.format(owner=owner, name=name), path], check=False)
    assert process.returncode == -9
    assert path.exists() == old
    if old:
        assert read_container(path) == (HEAD, dict(BLOCKS))
    write_container(path, {}, BLOCKS)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_no_room(path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with refused(NoRoomError, "File too large", "a.svae"):
            write_container(path, {}, [("AAAA", bytes(100_000))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert read_container(path) == (HEAD, dict(BLOCKS))
