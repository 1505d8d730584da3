"""A compressed scene's file: blocks of bytes, each with a checksum, and nothing else.

The file begins with 8 bytes that a transfer as text, or of 7 bits, would change, the format's version and their
checksum. Blocks follow: kind (4 letters), length (u64), payload, CRC-32C of all three. The first, HEAD, is JSON in
zlib's format. The last, TAIL, tells the file's length and the CRC-32C of all blocks' checksums. Numbers are
little-endian.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import google_crc32c

from spectralvae.errors import DamagedError, InputError
from spectralvae.runtime.atomic import write_atomic
from spectralvae.version import __version__

SUFFIX = ".svae"
FORMAT = 1
MAGIC = b"\x89SVA\r\n\x1a\n"

_HEAD, _TAIL = "HEAD", "TAIL"
_START = struct.Struct("<8sII")  # magic, version, checksum of both
_BLOCK = struct.Struct("<4sQ")  # kind, length
_CHECKSUM = struct.Struct("<I")
_END = struct.Struct("<QI")  # length of the file, checksum of the blocks' checksums
_TAIL_SIZE = _BLOCK.size + _END.size + _CHECKSUM.size
_LARGEST_HEAD = 2**22  # bytes of JSON


def container_size(head: Mapping[str, Any], n_blocks: int, n_bytes: int) -> int:
    """Bytes of a file with such a head and so many blocks, of so many bytes together."""
    n_head = len(zlib.compress(json.dumps(head).encode(), 9))
    each = _BLOCK.size + _CHECKSUM.size
    return _START.size + (n_blocks + 1) * each + n_head + n_bytes + _TAIL_SIZE


def write_container(path: Path, head: Mapping[str, Any], blocks: Sequence[tuple[str, bytes]]) -> None:
    """Write a file that is either whole or not there.

    Args:
        path: the file.
        head: what JSON can hold, 4 MiB of it at most.
        blocks: kind (4 letters) and payload of each, in order; no kind twice.

    Raises:
        NoRoomError: the disk is full; nothing of the file stays.
    """
    content = json.dumps(head).encode()
    assert len(content) <= _LARGEST_HEAD
    kinds = [_HEAD, *(kind for kind, _ in blocks), _TAIL]
    assert len(set(kinds)) == len(kinds) and all(len(kind) == 4 and kind.isascii() for kind in kinds)
    start = struct.pack("<8sI", MAGIC, FORMAT)
    parts = [start, _CHECKSUM.pack(google_crc32c.value(start))]
    checksums = b""
    for kind, payload in ((_HEAD, zlib.compress(content, 9)), *blocks):
        parts += _block(kind, payload)
        checksums += parts[-1]
    end = _END.pack(sum(map(len, parts)) + _TAIL_SIZE, google_crc32c.value(checksums))
    write_atomic(path, *parts, *_block(_TAIL, end))


def _block(kind: str, payload: bytes) -> tuple[bytes, bytes, bytes]:
    begin = _BLOCK.pack(kind.encode(), len(payload))
    return begin, payload, _CHECKSUM.pack(google_crc32c.extend(google_crc32c.value(begin), payload))


def read_container(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Read and check a whole file.

    Returns:
        The head, and the payload of each block by its kind.

    Raises:
        DamagedError: the file is corrupt or cut off.
        InputError: it cannot be read, is no such file, or is of a newer version.
    """
    with _opened(path) as (file, size):
        blocks: dict[str, bytes] = {}
        checksums = b""
        while True:
            kind, payload, checksum = _read_block(path, file, size)
            if kind == _TAIL:
                break
            if kind in blocks:
                raise DamagedError(f"is corrupt: block {kind} is there twice", path=path)
            if not blocks and kind != _HEAD:
                raise DamagedError(f"is corrupt: its first block is {kind}, not {_HEAD}", path=path)
            blocks[kind] = payload
            checksums += checksum
        _check_end(path, payload, file.tell(), size)
        if payload != _END.pack(size, google_crc32c.value(checksums)):
            raise DamagedError("is corrupt: its blocks are not those that were written", path=path)
    if not blocks:
        raise DamagedError(f"is corrupt: it has no block {_HEAD}", path=path)
    return _parse_head(path, blocks.pop(_HEAD)), blocks


def read_head(path: Path) -> dict[str, Any]:
    """Read and check a file's head, and whether all of the file is there; its other blocks are not read.

    Raises:
        DamagedError, InputError: as `read_container` does.
    """
    with _opened(path) as (file, size):
        kind, content, _ = _read_block(path, file, size)
        if kind != _HEAD:
            raise DamagedError(f"is corrupt: its first block is {kind}, not {_HEAD}", path=path)
        file.seek(max(file.tell(), size - _TAIL_SIZE))
        kind, end, _ = _read_block(path, file, size)
        if kind != _TAIL:
            raise DamagedError(f"is corrupt: cut off at {size:,} bytes", path=path)
        _check_end(path, end, file.tell(), size)
    return _parse_head(path, content)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """The file after its first bytes, and its size."""
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            raise InputError("is not a file", path=path, remedy="give a file that `compress` wrote")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            _check_start(path, file.read(_START.size))
            yield file, size
    except FileNotFoundError as error:
        raise InputError("no such file", path=path) from error
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", path=path) from error


def _check_start(path: Path, start: bytes) -> None:
    if not start.startswith(MAGIC[: max(len(start), 1)]):
        raise InputError("is not a compressed scene", path=path, remedy="give a file that `compress` wrote")
    if len(start) < _START.size:
        raise DamagedError(f"is corrupt: cut off at {len(start)} bytes", path=path)
    _, version, checksum = _START.unpack(start)
    if checksum != google_crc32c.value(start[: -_CHECKSUM.size]):
        raise DamagedError(f"is corrupt: the checksum of its first {_START.size} bytes differs", path=path)
    if version != FORMAT:
        problem = f"has format {version}, but this version ({__version__}) reads format {FORMAT}"
        raise InputError(problem, path=path, remedy="update spectralvae")


def _read_block(path: Path, file: IO[bytes], size: int) -> tuple[str, bytes, bytes]:
    """Kind, payload and checksum of the next block."""
    first = file.tell()
    begin = file.read(_BLOCK.size)
    if len(begin) < _BLOCK.size:
        raise DamagedError(f"is corrupt: cut off at {size:,} bytes", path=path)
    kind, length = _BLOCK.unpack(begin)
    name = kind.decode("latin-1").encode("unicode_escape").decode()
    end = first + _BLOCK.size + length + _CHECKSUM.size
    if end > size:  # before memory is asked for
        raise DamagedError(f"is corrupt: cut off at {size:,} of {end:,} bytes, in block {name}", path=path)
    payload, checksum = file.read(length), file.read(_CHECKSUM.size)
    if checksum != _CHECKSUM.pack(google_crc32c.extend(google_crc32c.value(begin), payload)):
        raise DamagedError(f"is corrupt: the checksum of block {name} differs", path=path)
    return name, payload, checksum


def _check_end(path: Path, end: bytes, position: int, size: int) -> None:
    """Whether the last block is at the end of a file as long as it says."""
    written = _END.unpack(end)[0] if len(end) == _END.size else None
    if not written == position == size:
        raise DamagedError(f"is corrupt: {size:,} bytes, where its end says {written}", path=path)


def _parse_head(path: Path, payload: bytes) -> dict[str, Any]:
    try:
        content = inflate(payload, _LARGEST_HEAD)
        head = json.loads(content)
        if not isinstance(head, dict):
            raise ValueError("it is no mapping")
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"is corrupt: block {_HEAD} is not readable: {error}", path=path) from error
    return head


def inflate(data: bytes, limit: int) -> bytes:
    """What zlib compressed, if that is no more than so many bytes.

    Raises:
        ValueError: it is more, or the data is corrupt.
    """
    decompressor = zlib.decompressobj()
    try:
        content = decompressor.decompress(data, limit + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(content) > limit or not decompressor.eof or decompressor.unused_data:
        raise ValueError(f"it is not {limit:,} bytes at most in zlib's format")
    return content
