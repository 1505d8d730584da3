"""A scene's layout, with all its coordinates and attributes, to bytes and back."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace

from spectralvae.codec.container import inflate
from spectralvae.codec.lossless import pack_array, unpack_array
from spectralvae.files.layout import Layout, from_json, to_json

_LENGTH = struct.Struct("<Q")
_LARGEST_JSON, _LARGEST_ARRAY = 2**26, 2**31  # bytes


def pack_layout(layout: Layout) -> bytes:
    """A layout as bytes, to the last bit of its variables' values."""
    parts = [zlib.compress(to_json(layout).encode(), 9)]
    for stored in layout.variables:
        assert stored.values is not None
        parts.append(pack_array(stored.values))
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)


def unpack_layout(data: bytes) -> Layout:
    """The layout that `pack_layout` packed.

    Raises:
        ValueError: The data is corrupt.
    """
    parts = _split(data)
    try:
        layout = from_json(inflate(next(parts, b""), _LARGEST_JSON).decode())
        variables = []
        for stored in layout.variables:
            values = unpack_array(next(parts, b""), _LARGEST_ARRAY)
            shape = tuple(layout.dimensions[dim] for dim in stored.dims)
            dtype = "str" if values.dtype.kind in "OTSU" and stored.dtype == "str" else values.dtype.str[1:]
            if (dtype, values.shape) != (stored.dtype, shape):
                raise ValueError(f"{stored.place} is {dtype} {values.shape}, not {stored.dtype} {shape}")
            variables.append(replace(stored, values=values))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"packed layout is corrupt: {type(error).__name__}: {error}") from error
    if next(parts, None) is not None:
        raise ValueError("packed layout is corrupt: something is left over")
    return replace(layout, variables=tuple(variables))


def _split(data: bytes) -> Iterator[bytes]:
    first = 0
    while first < len(data):
        begin = first + _LENGTH.size
        if begin > len(data) or begin + (length := _LENGTH.unpack_from(data, first)[0]) > len(data):
            raise ValueError(f"packed layout is corrupt: cut off at {len(data):,} bytes")
        yield data[begin : begin + length]
        first = begin + length
