"""HDF5 files from strangers: their structure is checked before it is trusted, and chunks are inflated within bounds.

Few structures of HDF5 carry a checksum. A damaged chunk index, a wrong number in a header or a deflated bomb are
seen here; links and storage that lead into other files are refused.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

from spectralvae.errors import InputError

MAX_CHUNK_BYTES = 2**28
_MAX_ATTRIBUTE_BYTES = 2**20

_DEFLATE, _SHUFFLE, _FLETCHER32 = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32
_FILTERS = {_DEFLATE: "deflate", _SHUFFLE: "shuffle", _FLETCHER32: "fletcher32"}
_DEFLATE_RATIO = 1032  # of zlib at its best: 258 bytes in 2 bits
_CHECKSUM_BYTES = 4
_InflateError = cast(type[Exception], zlib_ng.error)  # The stubs of zlib_ng declare an instance instead of a class.

_NUMBERS = tuple(
    getattr(h5py.h5t, f"{kind}{bits}{order}")
    for kind, widths in (("IEEE_F", (16, 32, 64)), ("STD_I", (8, 16, 32, 64)), ("STD_U", (8, 16, 32, 64)))
    for bits in widths
    for order in ("LE", "BE")
)


def check_links(path: Path, file: h5py.File) -> None:
    """Check that nothing in a file leads into another one or nowhere.

    Raises:
        InputError: There is an external or user-defined link, a soft link to nothing, external storage, or a
            virtual dataset.
    """
    groups = [(file.id, "")]
    seen = {h5py.h5o.get_info(file.id).addr}
    while groups:
        group, above = groups.pop()
        for name in group:
            place = above + name.decode("utf-8", "replace")
            kind = group.links.get_info(name).type
            if kind not in (h5py.h5l.TYPE_HARD, h5py.h5l.TYPE_SOFT):
                problem = "is a link into another file, which is never followed"
                raise InputError(problem, key=place, path=path, remedy="remove it")
            try:
                item = h5py.h5o.open(group, name)
            except (KeyError, RuntimeError) as error:
                if kind == h5py.h5l.TYPE_HARD:
                    raise
                remedy = "fetch the file again"
                raise InputError("is a link that leads nowhere", key=place, path=path, remedy=remedy) from error
            address = h5py.h5o.get_info(item).addr
            if address not in seen:
                seen.add(address)
                if isinstance(item, h5py.h5g.GroupID):
                    groups.append((item, f"{place}/"))
                elif isinstance(item, h5py.h5d.DatasetID):
                    layout = item.get_create_plist()
                    if layout.get_layout() == h5py.h5d.VIRTUAL or layout.get_external_count():
                        problem = "keeps its data in another file, which is never followed"
                        raise InputError(problem, key=place, path=path, remedy="copy the data into one")


def check_variables(path: Path, variables: Mapping[str, h5py.Dataset]) -> None:
    """Check all that is known of variables without reading their values.

    Their numbers are of a standard type and one byte order; every chunk of the grid is there once, within the file,
    apart from all others, and of a size that its content may have; attributes are small.

    Args:
        path: The file.
        variables: By their place in the file. None is external or virtual.

    Raises:
        InputError: It isn't so.
    """
    orders: dict[str, str] = {}
    pieces = [np.empty((0, 2), dtype=np.int64)]  # offset and size
    for place, variable in variables.items():
        _check_type(path, place, variable)
        if variable.dtype.itemsize > 1:
            orders.setdefault("big-endian" if variable.dtype.byteorder == ">" else "little-endian", place)
        for key in variable.attrs:
            size = variable.attrs.get_id(key).get_storage_size()
            if size > _MAX_ATTRIBUTE_BYTES:
                limit = f"at most {_MAX_ATTRIBUTE_BYTES} bytes"
                raise InputError(f"its attribute {key!r} has {size} bytes", key=place, path=path, limit=limit)
        if variable.chunks:
            pieces.append(_chunk_extents(path, place, variable))
            continue
        stored = variable.id.get_storage_size()
        if stored not in (0, variable.nbytes):
            problem = f"is corrupt: it declares {variable.nbytes} bytes, but {stored} are stored"
            raise InputError(problem, key=place, path=path, remedy="fetch the file again")
        offset = variable.id.get_offset()
        if stored and offset is not None:  # data in the header have no offset
            pieces.append(np.array([(offset, stored)], dtype=np.int64))
    if len(orders) > 1:
        (one, here), (other, there) = orders.items()
        problem = f"is corrupt: {here} is {one}, {there} {other}"
        raise InputError(problem, path=path, remedy="fetch it again")
    extents = np.concatenate(pieces)
    extents = extents[np.argsort(extents[:, 0])]
    ends = extents.sum(axis=1)
    total = path.stat().st_size
    if extents.size and (extents[0, 0] < 0 or ends.max() > total):
        problem = f"is truncated: its data reach to byte {ends.max()} of {total}"
        raise InputError(problem, path=path, remedy="fetch it again")
    if (extents[1:, 0] < ends[:-1]).any():
        problem = "its chunk index is corrupt: two pieces of its data overlap"
        raise InputError(problem, path=path, remedy="fetch it again")


def check_written(path: Path, place: str, variable: h5py.Dataset) -> None:
    """Check that a variable was ever written; otherwise it would be fill of whatever size it declares.

    A single value need not be, for that of a grid mapping says nothing.

    Raises:
        InputError: It wasn't.
    """
    if variable.size > 1 and not variable.id.get_storage_size():
        problem = f"declares {variable.nbytes} bytes, but none is stored"
        raise InputError(problem, key=place, path=path, remedy="fetch the file again, or remove the variable")


def read(variable: h5py.Dataset, *cut: Any) -> NDArray[Any]:
    """Read a part of a checked variable; no chunk takes more memory than it declares, whatever is in it.

    Several threads may read one file at the same time: they inflate in parallel.

    Args:
        variable: Numbers.
        cut: A part of each axis, a slice without step or an h5py.MultiBlockSlice; nothing for all of them.

    Returns:
        The stored values in the variable's own type.

    Raises:
        ValueError: A chunk's content is damaged.
    """
    cut = cut or tuple(slice(0, n) for n in variable.shape)
    chunks = variable.chunks
    if not chunks or not variable.id.get_num_chunks():
        return np.asarray(variable[cut])
    wanted: list[NDArray[np.int64]] = []
    for part, size in zip(cut, variable.shape, strict=True):
        if isinstance(part, slice):
            wanted.append(np.arange(*part.indices(size)))
        else:
            start, stride, count, block = part.indices(size)
            wanted.append(np.add.outer(start + stride * np.arange(count), np.arange(block)).ravel())
    result = np.empty([len(indices) for indices in wanted], dtype=variable.dtype)
    if not result.size:
        return result
    filters = _filters(variable)
    axes = [_by_chunk(indices, size) for indices, size in zip(wanted, chunks, strict=True)]
    scratch = np.empty(chunks, dtype=result.dtype)
    for parts in itertools.product(*axes):
        starts, inner, outer = zip(*parts, strict=True)
        part = result[outer]
        if part.shape == chunks and part.flags.c_contiguous:
            _read_chunk(variable, starts, filters, part)
        else:
            _read_chunk(variable, starts, filters, scratch)
            part[...] = scratch[inner]
    return result


def _by_chunk(indices: NDArray[np.int64], size: int) -> list[tuple[int, Any, slice]]:
    """Where an axis's indices lie: for each chunk its start, the indices in it, and their place in the result."""
    parts = []
    chunks, firsts = np.unique(indices // size, return_index=True)
    for chunk, first, end in zip(chunks.tolist(), firsts, [*firsts[1:], len(indices)], strict=True):
        inside = indices[first:end] - chunk * size
        gapless = inside[-1] - inside[0] + 1 == len(inside)
        parts.append(
            (chunk * size, slice(inside[0], inside[-1] + 1) if gapless else inside, slice(int(first), int(end)))
        )
    return parts


def _read_chunk(
    variable: h5py.Dataset, starts: tuple[int, ...], filters: list[tuple[int, tuple[int, ...]]], chunk: NDArray[Any]
) -> None:
    """Fill a contiguous array with a whole chunk, its filters undone."""
    mask, data = variable.id.read_direct_chunk(starts)
    if mask:
        raise ValueError(f"the chunk at {starts} skips filters")
    item = chunk.itemsize
    result = chunk.reshape(-1).view(np.uint8)
    content = np.frombuffer(data, dtype=np.uint8)
    for code, _ in reversed(filters):
        if code == _FLETCHER32:
            content, stored = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
            number = int.from_bytes(stored.tobytes(), "little")
            sums = (number & 0xFFFF) % 65535, (number >> 16) % 65535
            if stored.size != _CHECKSUM_BYTES or sums != _fletcher32(content):
                raise ValueError("a Fletcher-32 checksum does not match its chunk")
        elif code == _DEFLATE:
            inflater = zlib_ng.decompressobj()
            # One byte more than there may be, so that what is too long shows without being inflated.
            limit = result.size + _CHECKSUM_BYTES + 1
            try:
                content = np.frombuffer(inflater.decompress(content, limit), dtype=np.uint8)
            except _InflateError as error:
                raise ValueError(f"the chunk at {starts}: {error}") from error
            if not inflater.eof or inflater.unused_data:
                raise ValueError(f"the chunk at {starts} does not end where it should")
        else:
            # A checksum may follow the numbers and not fill a last one; shuffle leaves it in place.
            end = content.size - content.size % item
            planes, rest = content[:end].reshape(item, -1), content[end:]
            content = result if content.size == result.size else np.empty_like(content)
            # Sets the other bytes to 0, and is faster than placing only those of this plane.
            content[:end].view(f"<u{item}")[:] = planes[0]
            for byte in range(1, item):
                content[byte:end:item] = planes[byte]
            content[end:] = rest
    if content.size != result.size:
        raise ValueError(f"the chunk at {starts} holds {content.size} bytes of {result.size}")
    if content is not result:
        result[:] = content


def _fletcher32(content: NDArray[np.uint8]) -> tuple[int, int]:
    """The two sums of the Fletcher-32 checksum of bytes, each below 65535."""
    first = second = 0
    for start in range(0, content.size, 2**16):
        block = content[start : start + 2**16]
        words = np.append(block, np.zeros(block.size % 2, dtype=np.uint8)).view(">u2").astype(np.uint64)
        second += words.size * first + int((words * np.arange(words.size, 0, -1, dtype=np.uint64)).sum())
        first += int(words.sum())
    return first % 65535, second % 65535


def pack_chunk(chunk: NDArray[Any], level: int) -> bytes:
    """A whole chunk as the filters shuffle, deflate and Fletcher-32 make it, in this order; releases the GIL.

    Args:
        chunk: Numbers.
        level: Of deflate.
    """
    planes = np.ascontiguousarray(chunk).view(np.uint8).reshape(-1, chunk.itemsize).T
    content = zlib.compress(planes.tobytes(), level)
    first, second = _fletcher32(np.frombuffer(content, dtype=np.uint8))
    return content + (second << 16 | first).to_bytes(_CHECKSUM_BYTES, "little")


def _filters(variable: h5py.Dataset) -> list[tuple[int, tuple[int, ...]]]:
    """Code and parameters of each filter, in the order of writing."""
    layout = variable.id.get_create_plist()
    return [(code, values) for code, _, values, _ in map(layout.get_filter, range(layout.get_nfilters()))]


def _check_type(path: Path, place: str, variable: h5py.Dataset) -> None:
    """Check that numbers are of a standard type and their filters known."""
    stored = variable.id.get_type()
    if not any(stored.equal(number) for number in _NUMBERS):
        problem = f"holds {variable.dtype} of an odd layout, no standard numbers"
        raise InputError(problem, key=place, path=path, remedy="fetch the file again")
    filters = _filters(variable)
    codes = [code for code, _ in filters]
    for code, values in filters:
        if code not in _FILTERS or codes.count(code) > 1:
            name = _FILTERS.get(code, f"number {code}")
            limit = "shuffle, deflate and fletcher32, each once"
            remedy = "convert it: h5repack -f SHUF -f GZIP=4"
            raise InputError(f"its filters {codes} include {name}", key=place, path=path, limit=limit, remedy=remedy)
        if code == _SHUFFLE and tuple(values) != (variable.dtype.itemsize,):
            problem = f"is corrupt: shuffled by {values} bytes, its numbers have {variable.dtype.itemsize}"
            raise InputError(problem, key=place, path=path, remedy="fetch the file again")


def _chunk_extents(path: Path, place: str, variable: h5py.Dataset) -> NDArray[np.int64]:
    """(n, 2) offset and size of each chunk; refuses an index that is no sound one."""
    size = math.prod(variable.chunks) * variable.dtype.itemsize
    if size > MAX_CHUNK_BYTES:
        limit = f"at most {MAX_CHUNK_BYTES} bytes"
        remedy = "rewrite it in smaller chunks: nccopy -c or h5repack -l"
        problem = f"its chunks {variable.chunks} have {size} bytes"
        raise InputError(problem, key=place, path=path, limit=limit, remedy=remedy)
    found: list[Any] = []
    variable.id.chunk_iter(found.append)
    if not found:
        return np.empty((0, 2), dtype=np.int64)
    grid = math.prod(-(-n // c) for n, c in zip(variable.shape, variable.chunks, strict=True))
    starts = np.array([chunk.chunk_offset for chunk in found], dtype=np.uint64)
    places, misaligned = np.divmod(starts, np.array(variable.chunks, dtype=np.uint64))
    n_places = len(np.unique(places, axis=0))
    if len(found) != grid or n_places != grid or misaligned.any() or (starts >= variable.shape).any():
        problem = f"{n_places} of {grid} chunks are in their places"
        remedy = "either the file is corrupt, then fetch it again, or not all of it was ever written"
        raise InputError(problem, key=place, path=path, remedy=remedy)
    if skipping := sum(chunk.filter_mask != 0 for chunk in found):
        problem = f"its chunk index is corrupt: {skipping} of {grid} chunks skip filters"
        raise InputError(problem, key=place, path=path, remedy="fetch the file again")
    codes = [code for code, _ in _filters(variable)]
    low = high = size + _CHECKSUM_BYTES * (_FLETCHER32 in codes)
    if _DEFLATE in codes:
        # What cannot be deflated grows by less than 0.1 % and 16 bytes.
        low, high = low // _DEFLATE_RATIO, high + high // 1000 + 16
    extents = np.array([(chunk.byte_offset, chunk.size) for chunk in found], dtype=np.int64)
    wrong = (extents[:, 1] < low) | (extents[:, 1] > high)
    if wrong.any():
        stored = int(extents[wrong, 1][0])
        problem = f"its chunk index is corrupt: {size} bytes are stored in {stored}, not in {low} to {high}"
        raise InputError(problem, key=place, path=path, remedy="fetch the file again")
    return extents
