"""The file of a compressed scene: whatever is changed in it is noticed, and it is whole or not there."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
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

from spectralvae.codec.container import inflate, read_container, read_head, write_container
from spectralvae.errors import DamagedError, InputError, NoRoomError

HEAD = {"shape": [2, 3, 4], "delta": 0.25, "name": "ü"}
BLOCKS = [("LAYT", b"layout"), ("RESI", bytes(range(40))), ("MASK", b"")]

Parts = list[tuple[bytes, bytes]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.svae"
    write_container(path, HEAD, BLOCKS)
    return path


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def made_by_hand(parts: Parts, version: int = 1, length: int | None = None) -> bytes:
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


def parts_of(head: Any = HEAD, blocks: Sequence[tuple[str, bytes]] = BLOCKS) -> Parts:
    return [(b"HEAD", zlib.compress(json.dumps(head).encode())), *((kind.encode(), data) for kind, data in blocks)]


def refusal(path: Path, read: Any = read_container) -> str:
    """The one line of a damaged file."""
    with pytest.raises(DamagedError) as refused:
        read(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: is damaged: ") and "\n" not in message
    return message


# --- whole files ------------------------------------------------------------------------------


def test_round_trip(path: Path) -> None:
    assert read_container(path) == (HEAD, dict(BLOCKS))
    assert read_head(path) == HEAD
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_without_blocks(tmp_path: Path) -> None:
    write_container(tmp_path / "a", {}, [])
    assert read_container(tmp_path / "a") == ({}, {})
    assert read_head(tmp_path / "a") == {}


def test_format(path: Path) -> None:
    written = path.read_bytes()
    path.write_bytes(made_by_hand(parts_of()))
    assert read_container(path) == (HEAD, dict(BLOCKS))
    assert path.read_bytes()[:20] == written[:20]


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


@pytest.mark.parametrize("read", [read_container, read_head])
def test_truncation_tells_where(path: Path, read: Any) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:40])
    told = 16 + 12 + struct.unpack_from("<Q", content, 20)[0] + 4
    assert f"cut off at 40 of {told} bytes, in block HEAD" in refusal(path, read)


@pytest.mark.parametrize("read", [read_container, read_head])
@pytest.mark.parametrize("more", [b"\0", b"\n", b"TAIL", made_by_hand(parts_of())])
def test_nothing_may_follow(path: Path, more: bytes, read: Any) -> None:
    path.write_bytes(path.read_bytes() + more)
    refusal(path, read)


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
    for order in itertools.permutations(range(5)):
        if order != tuple(range(5)):
            path.write_bytes(start + b"".join(blocks[i] for i in order))
            refusal(path)
    for i in range(5):
        path.write_bytes(start + b"".join(blocks[:i] + blocks[i + 1 :]))
        refusal(path)
        path.write_bytes(start + b"".join(blocks[: i + 1] + blocks[i:]))
        refusal(path)
    write_container(path, HEAD, [("LAYT", b"LAYOUT"), *BLOCKS[1:]])
    other = cut_into_blocks(path.read_bytes())[2]
    path.write_bytes(start + blocks[0] + other + b"".join(blocks[2:]))
    assert "blocks are not those that were written" in refusal(path)


def test_block_that_is_there_twice_by_intent(path: Path) -> None:
    path.write_bytes(made_by_hand([*parts_of(), (b"LAYT", b"other")]))
    assert "block LAYT is there twice" in refusal(path)


@pytest.mark.parametrize("parts", [[], parts_of()[1:], parts_of()[::-1]])
def test_head_is_there_and_first(path: Path, parts: Parts) -> None:
    path.write_bytes(made_by_hand(parts))
    for read in (read_container, read_head):
        assert "HEAD" in refusal(path, read)


@pytest.mark.parametrize("length", [2**31, 2**40, 2**63, 2**64 - 1])
def test_huge_lengths_ask_for_no_memory(path: Path, length: int) -> None:
    content = bytearray(path.read_bytes())
    for position in (20, len(content) - 24):  # of the first and of the last block
        damaged = content.copy()
        damaged[position : position + 8] = struct.pack("<Q", length)
        path.write_bytes(damaged)
        tracemalloc.start()
        try:
            for read in (read_container, read_head):
                assert "cut off at" in refusal(path, read)
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()


def test_file_of_another_length_than_its_end_says(path: Path) -> None:
    path.write_bytes(made_by_hand(parts_of(), length=1000))
    for read in (read_container, read_head):
        assert re.search(r"[0-9]+ bytes, where its end says 1000$", refusal(path, read))


@pytest.mark.parametrize(
    "head",
    [
        zlib.compress(b" " * 2**28, 9),
        zlib.compress(b'"' + b"a" * 2**23 + b'"', 9),
        zlib.compress(b"[" * 100_000),
        zlib.compress(b"[]"),
        zlib.compress(b"\xff"),
        zlib.compress(b"{"),
        zlib.compress(b"{}") + b"x",
        zlib.compress(b"{}")[:-1],
        b"{}",
        b"",
    ],
)
def test_heads_that_are_no_heads(path: Path, head: bytes) -> None:
    path.write_bytes(made_by_hand([(b"HEAD", head)]))
    tracemalloc.start()
    try:
        for read in (read_container, read_head):
            assert "block HEAD is not readable" in refusal(path, read)
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()


def test_limit_of_inflating() -> None:
    data = zlib.compress(b"a" * 1000)
    assert inflate(data, 1000) == b"a" * 1000
    with pytest.raises(ValueError, match="999 bytes at most"):
        inflate(data, 999)


def test_last_block_is_the_end(path: Path) -> None:
    content = path.read_bytes()[:-4]
    content = content[:-24] + b"XEND" + content[-20:]
    path.write_bytes(content + u32(google_crc32c.value(content[-24:])))
    for read in (read_container, read_head):
        assert "cut off at" in refusal(path, read)


# --- other files ------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [read_container, read_head])
@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\x1a\n" + bytes(100), b"\x89HDF\r\n\x1a\n", b"{}", b"\x89SVA\n\x1a\n"]
)
def test_files_of_other_kinds(path: Path, content: bytes, read: Any) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{path}: is not a compressed scene; ") as refused:
        read(path)
    assert not isinstance(refused.value, DamagedError)


@pytest.mark.parametrize("damage", [lambda c: c.replace(b"\r\n", b"\n"), lambda c: bytes(b & 0x7F for b in c)])
def test_transfers_as_text_or_of_seven_bits(path: Path, damage: Any) -> None:
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="is not a compressed scene"):
        read_container(path)


@pytest.mark.parametrize("read", [read_container, read_head])
def test_newer_versions(path: Path, read: Any) -> None:
    path.write_bytes(made_by_hand(parts_of(), version=2))
    with pytest.raises(InputError, match=r"a\.svae: has format 2, .* reads format 1: update spectralvae$") as refused:
        read(path)
    assert not isinstance(refused.value, DamagedError)


@pytest.mark.parametrize("read", [read_container, read_head])
def test_what_is_no_file(tmp_path: Path, read: Any) -> None:
    with pytest.raises(InputError, match="absent: no such file"):
        read(tmp_path / "absent")
    with pytest.raises(InputError, match="is not a file"):
        read(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is not a file"):
        read(tmp_path / "pipe")


def test_file_that_cannot_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # a superuser may read anything
    with pytest.raises(InputError, match=r"a\.svae: cannot be read: Permission denied"):
        read_head(path)


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


@pytest.mark.parametrize(("owner", "name"), [("os", "fsync"), ("Path", "replace")])
@pytest.mark.parametrize("old", [False, True])
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
        with pytest.raises(NoRoomError, match=r"a\.svae: File too large: [0-9,]+ bytes are needed"):
            write_container(path, {}, [("AAAA", bytes(100_000))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert read_container(path) == (HEAD, dict(BLOCKS))
