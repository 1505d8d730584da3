"""Arrays to bytes and back, to the last bit."""

from __future__ import annotations

import json
import math
import re
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectralvae.codec.container import inflate
from spectralvae.codec.entropy import Integers
from spectralvae.codec.prediction import pack_table, unpack_table

_TEXTS = {"O": np.dtype(object), "T": np.dtypes.StringDType()}
_DTYPE = re.compile(r"[<>|][biufcSUV][0-9]{1,9}")
_LARGEST_HEADER = 2**14
_PROBE = 2**18  # bytes that zlib is tried on, as it takes long


def pack_array(array: NDArray[Any]) -> bytes:
    """An array as bytes: dtype, byte order and shape, and every bit, NaN's included.

    Args:
        array: numbers, bool, fixed strings, or texts of any length (StringDType, or objects that are str or bytes).
    """
    if array.dtype.kind in _TEXTS:
        return _with_header(array, {"by": "texts"}, _pack_texts(array))
    assert array.dtype.fields is None and array.dtype.kind not in "mM"
    data = array.tobytes()
    candidates = [_with_header(array, {"by": "bytes"}, data)]
    if data:
        item = data[: array.dtype.itemsize]
        if data == item * array.size:
            return min(*candidates, _with_header(array, {"by": "item"}, item), key=len)
        if _has_integers(array.dtype):
            values, content = pack_table(_to_integers(array).reshape(_table_shape(array.shape)))
            candidates.append(_with_header(array, {"by": "neighbours", **values}, content))
        ratio = len(zlib.compress(data[:_PROBE], 9)) / len(data[:_PROBE])
        if ratio * len(data) < len(candidates[-1]):
            candidates.append(_with_header(array, {"by": "zlib"}, zlib.compress(data, 9)))
    return min(candidates, key=len)


def unpack_array(data: bytes, max_bytes: int) -> NDArray[Any]:
    """The array that `pack_array` packed.

    Args:
        data: from there.
        max_bytes: how many bytes the array may have; of texts, their JSON.

    Raises:
        ValueError: the data is corrupt, or the array is larger.
    """
    header, content = _split_header(data)
    try:
        name, shape, by = header["dtype"], tuple(header["shape"]), header["by"]
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise ValueError(f"the shape is {shape}")
        if by == "texts":
            return _unpack_texts(content, _TEXTS[name], shape, max_bytes)
        if not _DTYPE.fullmatch(str(name)):
            raise ValueError(f"the type is {name!r}")
        dtype = np.dtype(name)
        n_bytes = math.prod(shape) * dtype.itemsize
        if n_bytes > max_bytes:
            raise ValueError(f"{shape} of {name} are more than {max_bytes:,} bytes")
        return _unpack(by, header, content, dtype, shape)
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"packed array is corrupt: {type(error).__name__}: {error}") from error


def _unpack(
    by: str, header: dict[str, Any], content: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> NDArray[Any]:
    size = math.prod(shape)
    n_bytes = size * dtype.itemsize
    if by == "neighbours" and size and _has_integers(dtype):
        values = {key: header[key] for key in header.keys() - {"dtype", "shape", "by"}}
        table = unpack_table(values, content, _table_shape(shape))
        return _from_integers(table, dtype).reshape(shape)
    if by == "zlib":
        content = inflate(content, n_bytes)
    elif by == "item" and len(content) == dtype.itemsize:
        content *= size
    elif by != "bytes":
        raise ValueError(f"packed array is corrupt: {by!r} of {dtype}")
    if len(content) != n_bytes:
        raise ValueError(f"packed array is corrupt: {len(content):,} of {n_bytes:,} bytes")
    return np.ndarray(shape, dtype, bytearray(content))


def _with_header(array: NDArray[Any], values: dict[str, Any], content: bytes) -> bytes:
    name = array.dtype.kind if array.dtype.kind in _TEXTS else array.dtype.str
    header = {"dtype": name, "shape": array.shape, **values}
    return json.dumps(header, separators=(",", ":")).encode() + b"\n" + content


def _split_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    end = data.find(b"\n", 0, _LARGEST_HEADER)
    try:
        header = json.loads(data[: max(end, 0)])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"packed array is corrupt: {error}") from error
    if not isinstance(header, dict):
        raise ValueError("packed array is corrupt: it has no header")
    return header, data[end + 1 :]


# --- numbers ----------------------------------------------------------------------------------


def _has_integers(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "biuf" and dtype.itemsize <= 8


def _table_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    nx = shape[-1] if shape else 1
    return math.prod(shape) // nx, nx


def _to_integers(array: NDArray[Any]) -> Integers:
    """64-bit integers in the order of the numbers; of -0.0 and 0.0, too."""
    kind, width = array.dtype.kind, array.dtype.itemsize
    unsigned = kind in "bu" and width < 8
    order = array.dtype.str[0].replace("|", "<")
    bits = np.ascontiguousarray(array).view(f"{order}{'u' if unsigned else 'i'}{width}").astype(np.int64)
    if kind == "f":
        bits = np.where(bits < 0, bits ^ (2 ** (8 * width - 1) - 1), bits)
    return bits


def _from_integers(table: Integers, dtype: np.dtype[Any]) -> NDArray[Any]:
    width = dtype.itemsize
    order = dtype.str[0].replace("|", "<")
    bits = table.astype(f"=i{width}")
    if dtype.kind == "f":
        bits = np.where(bits < 0, bits ^ np.array(2 ** (8 * width - 1) - 1, bits.dtype), bits)
    return bits.astype(f"{order}i{width}").view(dtype)


# --- texts ------------------------------------------------------------------------------------


def _pack_texts(array: NDArray[Any]) -> bytes:
    items = []
    for item in array.ravel().tolist():
        assert isinstance(item, str | bytes)
        items.append([item.decode("latin-1")] if isinstance(item, bytes) else item)
    return zlib.compress(json.dumps(items, separators=(",", ":")).encode(), 9)


def _unpack_texts(content: bytes, dtype: Any, shape: tuple[int, ...], max_bytes: int) -> NDArray[Any]:
    try:
        items = json.loads(inflate(content, max_bytes))
    except RecursionError as error:
        raise ValueError(f"packed array is corrupt: {error}") from error
    if not isinstance(items, list) or len(items) != math.prod(shape):
        raise ValueError(f"packed array is corrupt: its texts are not {shape}")
    array = np.empty(len(items), dtype)
    for i, item in enumerate(items):
        if isinstance(item, list):
            (text,) = item
            item = text.encode("latin-1")
        elif not isinstance(item, str):
            raise ValueError(f"packed array is corrupt: {item!r} is no text")
        array[i] = item
    return array.reshape(shape)
