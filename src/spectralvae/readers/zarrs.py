"""Zarr folders from strangers: their metadata is checked before zarr reads it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spectralvae.errors import InputError
from spectralvae.readers.base import damage_named

# Codecs that compress or reorder numbers. Others may run code of the file's author: pickle does.
_CODECS = {
    *("blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd"),
    *("bitround", "delta", "fixedscaleoffset", "quantize", "shuffle"),
    *("adler32", "crc32", "crc32c", "fletcher32"),
    *("bytes", "sharding_indexed", "transpose", "vlen-bytes", "vlen-utf8"),
}

_PLAIN_DTYPE = re.compile(r"[<>|=]?[biufcSUmM]\d*(\[\d*\w+\])?")


def is_array(path: Path) -> bool:
    if (path / ".zarray").is_file():
        return True
    mark = path / "zarr.json"
    return mark.is_file() and _metadata(mark).get("node_type") == "array"


def check_folder(path: Path) -> None:
    """Refuse a Zarr folder that could run code or lead elsewhere, before zarr opens it.

    Raises:
        InputError: It holds links or special files, or metadata with codecs or dtypes that aren't read.
    """
    for entry in _entries(path):
        if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
            problem = "a link or no regular file, which no Zarr folder holds"
            raise InputError(problem, path=entry.path, remedy="remove it")
        if entry.name in ("zarr.json", ".zarray"):
            with damage_named(path):
                unread = next(_problems(_metadata(Path(entry.path))), None)
            if unread:
                remedy = "write it with zarr's defaults"
                raise InputError(f"has {unread}, which is not read", path=entry.path, remedy=remedy)


def _entries(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    with damage_named(Path(folder)), os.scandir(folder) as entries:
        listed = list(entries)
    for entry in listed:
        yield entry
        if entry.is_dir(follow_symlinks=False):
            yield from _entries(entry.path)


def _metadata(path: Path) -> dict[str, Any]:
    with damage_named(path):
        content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise InputError("is corrupt: it holds no metadata of Zarr", path=path, remedy="fetch it again")
    return content


def _problems(metadata: dict[str, Any]) -> Iterator[str]:
    """What in an array's metadata isn't read: codecs out of the list, and dtypes of Python objects."""
    for codec in _codecs(metadata):
        name = codec.get("id", codec.get("name")) if isinstance(codec, dict) else codec
        if name not in _CODECS:
            yield f"the codec {name!r}"
        for key in ("dtype", "astype"):
            if isinstance(codec, dict) and key in codec and not _PLAIN_DTYPE.fullmatch(str(codec[key])):
                yield f"a codec for {codec[key]!r}"
    if metadata.get("zarr_format") == 2 and "dtype" in metadata and not _PLAIN_DTYPE.fullmatch(str(metadata["dtype"])):
        texts = any(isinstance(f, dict) and f.get("id") == "vlen-utf8" for f in metadata.get("filters") or ())
        if not (metadata["dtype"] == "|O" and texts):
            yield f"the dtype {metadata['dtype']!r}"


def _codecs(metadata: dict[str, Any]) -> Iterator[Any]:
    """All codecs of an array, those inside of shards, too."""
    yield from (codec for codec in (metadata.get("compressor"), *(metadata.get("filters") or ())) if codec)
    for key in ("codecs", "index_codecs"):
        for codec in metadata.get(key) or ():
            yield codec
            if isinstance(codec, dict) and isinstance(codec.get("configuration"), dict):
                yield from _codecs(codec["configuration"])
