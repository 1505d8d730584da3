"""What rate_distortion.py compares with: codecs that a user would take instead, each decoding from its bytes alone.

Shapes: z is (y, x, C), float32 with NaN = invalid.
"""

from __future__ import annotations

import math
import struct
import zlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import imagecodecs
import numcodecs
import numpy as np
from components import Spectra, decode_integers, encode_integers, pack, unpack
from numpy.typing import NDArray
from pysz import sz, szAlgorithm, szConfig, szErrorBoundMode
from scipy.ndimage import distance_transform_edt

Bool = NDArray[np.bool_]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


# --- what all rivals share ----------------------------------------------------------------------


def pack_mask(valid: Bool) -> bytes:
    """Which pixels have a valid sample; then, unless these are valid in all channels, which samples of them are."""
    seen = valid.any(axis=-1)
    samples = valid[seen]
    maps = [seen] if samples.all() else [seen, samples]
    return pack(*(zlib.compress(np.packbits(part).tobytes(), 9) for part in maps))


def unpack_mask(data: bytes, shape: tuple[int, int, int]) -> Bool:
    """The inverse of ``pack_mask``: (y, x, C) bool."""
    maps = [np.frombuffer(zlib.decompress(part), np.uint8) for part in unpack(data)]
    ny, nx, nc = shape
    seen = np.unpackbits(maps[0], count=ny * nx).astype(np.bool_).reshape(ny, nx)
    valid = np.repeat(seen[..., None], nc, axis=-1)
    if len(maps) == 2:
        n = int(seen.sum())
        valid[seen] = np.unpackbits(maps[1], count=n * nc).astype(np.bool_).reshape(n, nc)
    return valid


def filled(z: Float32, valid: Bool) -> Float32:
    """z with numbers that cost little in place of NaN: from the channels beside it, else from the nearest pixel."""
    z, seen = z.copy(), valid.any(axis=-1)
    channels = np.arange(z.shape[-1])
    for y, x in np.argwhere(seen & ~valid.all(axis=-1)):
        known = valid[y, x]
        z[y, x, ~known] = np.interp(channels[~known], channels[known], z[y, x, known])
    if not seen.all():
        nearest = distance_transform_edt(~seen, return_distances=False, return_indices=True)
        z = z[tuple(nearest)]
    return z


class Codec(ABC):
    """From z to bytes and back, with one parameter: the larger it is, the fewer the bytes.

    Attributes:
        parameter: what it is; None for a codec that has none.
    """

    parameter: ClassVar[str | None]

    @abstractmethod
    def limits(self, z: Float32) -> tuple[float, float]:
        """Least and largest sensible parameter."""

    def snap(self, parameter: float) -> float:
        """The nearest parameter that the codec knows."""
        return parameter

    @abstractmethod
    def encode(self, z: Float32, parameter: float) -> bytes:
        """All that is needed to decode."""

    @abstractmethod
    def decode(self, data: bytes) -> Float32:
        """z, with NaN where it was."""

    def beside(self, data: bytes) -> int:
        """Bytes of ``data`` that are not counted: what they hold no other codec keeps."""
        return 0


class Rival(Codec):
    """A codec whose mask is coded apart, in the same way for all."""

    def encode(self, z: Float32, parameter: float) -> bytes:
        valid = ~np.isnan(z)
        body = self.encode_filled(filled(z, valid), valid.any(axis=-1), parameter)
        return pack(struct.pack("<3I", *z.shape), pack_mask(valid), body)

    def decode(self, data: bytes) -> Float32:
        head, mask, body = unpack(data)
        ny, nx, nc = struct.unpack("<3I", head)
        valid = unpack_mask(mask, (ny, nx, nc))
        z = self.decode_filled(body, valid.any(axis=-1), (ny, nx, nc)).astype(np.float32)
        z[~valid] = np.nan
        return z

    @abstractmethod
    def encode_filled(self, z: Float32, seen: Bool, parameter: float) -> bytes:
        """Of z (y, x, C) without NaN; ``seen`` (y, x) tells which pixels have a valid sample."""

    @abstractmethod
    def decode_filled(self, data: bytes, seen: Bool, shape: tuple[int, int, int]) -> NDArray[Any]:
        """The inverse of ``encode_filled``; pixels that are not seen may be anything."""


def deviation(z: Float32) -> float:
    """Standard deviation of all valid samples."""
    return float(np.nanstd(z, dtype=np.float64))


# --- codecs of spectral components --------------------------------------------------------------


class Pca(Rival):
    """Each pixel's principal components, quantised with one step, entropy-coded by adaptive tables of order 0."""

    parameter = "step"

    def limits(self, z: Float32) -> tuple[float, float]:
        scale = deviation(z)
        return 1e-6 * scale, 10 * math.sqrt(z.shape[-1]) * scale

    def encode_filled(self, z: Float32, seen: Bool, parameter: float) -> bytes:
        x = z[seen].astype(np.float64)
        spectra = Spectra.fit(x, parameter)
        indices = np.rint(spectra.scores(x) / parameter).astype(np.int64)
        return pack(struct.pack("<d", parameter), spectra.data, encode_integers(indices.T))

    def decode_filled(self, data: bytes, seen: Bool, shape: tuple[int, int, int]) -> Float64:
        head, basis, coded = unpack(data)
        (step,) = struct.unpack("<d", head)
        spectra = Spectra.from_bytes(basis, shape[2])
        z = np.zeros(shape)
        z[seen] = spectra.spectra(decode_integers(coded, (len(spectra.basis), int(seen.sum()))).T * step)
        return z


class TwoComponents(Rival):
    """Two principal components a pixel, float32, as they are."""

    parameter = None

    def limits(self, z: Float32) -> tuple[float, float]:
        return 1.0, 1.0

    def encode_filled(self, z: Float32, seen: Bool, parameter: float) -> bytes:
        x = z[seen].astype(np.float64)
        spectra = Spectra.fit(x, 0.0, n_components=2)
        return pack(spectra.data, spectra.scores(x).astype("<f4").tobytes())

    def decode_filled(self, data: bytes, seen: Bool, shape: tuple[int, int, int]) -> Float64:
        basis, scores = unpack(data)
        z = np.zeros(shape)
        z[seen] = Spectra.from_bytes(basis, shape[2]).spectra(np.frombuffer(scores, "<f4").reshape(-1, 2))
        return z


class PcaJpeg2000(Rival):
    """Images of the principal components, 16 bits each, as JPEG 2000 with the same squared error in all.

    The error is set as a PSNR of the 16-bit image; where that is more than the irreversible transform gives, the
    image is coded without loss.
    """

    parameter = "step"
    LARGEST: ClassVar[int] = 2**16 - 1
    REVERSIBLE: ClassVar[float] = 98.0  # dB; beyond, rounding within the codec outweighs what is left out

    def limits(self, z: Float32) -> tuple[float, float]:
        scale = deviation(z)
        return 1e-6 * scale, 10 * math.sqrt(z.shape[-1]) * scale

    def encode_filled(self, z: Float32, seen: Bool, parameter: float) -> bytes:
        ny, nx, nc = z.shape
        spectra = Spectra.fit(z[seen].astype(np.float64), parameter)
        images = spectra.scores(z.reshape(-1, nc)).T.reshape(-1, ny, nx)
        parts = []
        for image in images:
            low, unit = float(image.min()), float(np.ptp(image)) / self.LARGEST or 1.0
            low, unit = struct.unpack("<2f", scale := struct.pack("<2f", low, unit))
            whole = np.clip(np.rint((image - low) / unit), 0, self.LARGEST).astype(np.uint16)
            psnr = 20 * math.log10(self.LARGEST * unit / (parameter / math.sqrt(12)))
            level = psnr if psnr < self.REVERSIBLE else 0
            parts.append(
                scale
                + imagecodecs.jpeg2k_encode(whole, level=level, codecformat="j2k", reversible=level == 0, numthreads=1)
            )
        return pack(spectra.data, *parts)

    def decode_filled(self, data: bytes, seen: Bool, shape: tuple[int, int, int]) -> Float64:
        basis, *parts = unpack(data)
        scores = np.empty((len(parts), shape[0] * shape[1]))
        for row, part in zip(scores, parts, strict=True):
            low, unit = struct.unpack_from("<2f", part)
            row[:] = imagecodecs.jpeg2k_decode(part[8:], numthreads=1).reshape(-1) * float(unit) + low
        return Spectra.from_bytes(basis, shape[2]).spectra(scores.T).reshape(shape)


# --- codecs of arrays ---------------------------------------------------------------------------


class Sz3(Rival):
    """SZ3 with an absolute bound, by its default predictor or by Lorenzo and regression: whichever is smaller."""

    parameter = "absolute bound"

    def limits(self, z: Float32) -> tuple[float, float]:
        return 1e-6 * deviation(z), float(np.nanmax(z) - np.nanmin(z))

    def encode_filled(self, z: Float32, seen: Bool, parameter: float) -> bytes:
        found = []
        for algorithm in (szAlgorithm.INTERP_LORENZO, szAlgorithm.LORENZO_REG):
            config = szConfig(*z.shape)
            config.errorBoundMode = szErrorBoundMode.ABS
            config.absErrorBound = parameter
            config.cmprAlgo = algorithm
            found.append(sz.compress(np.ascontiguousarray(z), config)[0].tobytes())
        return min(found, key=len)

    def decode_filled(self, data: bytes, seen: Bool, shape: tuple[int, int, int]) -> Float32:
        return np.asarray(sz.decompress(np.frombuffer(data, np.uint8), np.float32, shape)[0]).reshape(shape)


class Zfp(Rival):
    """ZFP with a tolerance, of which it takes the next lower power of 2."""

    parameter = "tolerance"

    def limits(self, z: Float32) -> tuple[float, float]:
        return 1e-6 * deviation(z), 64 * float(np.nanmax(z) - np.nanmin(z))

    def snap(self, parameter: float) -> float:
        return 2.0 ** math.floor(math.log2(parameter))

    def encode_filled(self, z: Float32, seen: Bool, parameter: float) -> bytes:
        return bytes(imagecodecs.zfp_encode(np.ascontiguousarray(z), level=parameter, mode="a", numthreads=1))

    def decode_filled(self, data: bytes, seen: Bool, shape: tuple[int, int, int]) -> Float32:
        return np.array(imagecodecs.zfp_decode(data))


class BitRound(Rival):
    """z with few bits in its mantissa, bytes shuffled, zstd; the parameter is 2^-bits."""

    parameter = "relative bound"

    def __init__(self, level: int, bits: tuple[int, int] = (1, 14)) -> None:
        self._bits = bits
        self._codecs = [numcodecs.Shuffle(4), numcodecs.Zstd(level)]

    def limits(self, z: Float32) -> tuple[float, float]:
        return 2.0 ** -self._bits[1], 2.0 ** -self._bits[0]

    def snap(self, parameter: float) -> float:
        return 2.0 ** round(math.log2(parameter))

    def encode_filled(self, z: Float32, seen: Bool, parameter: float) -> bytes:
        rounded: Any = numcodecs.BitRound(round(-math.log2(parameter))).encode(np.ascontiguousarray(z))
        for codec in self._codecs:
            rounded = codec.encode(rounded)
        return bytes(rounded)

    def decode_filled(self, data: bytes, seen: Bool, shape: tuple[int, int, int]) -> Float32:
        plain: Any = data
        for codec in reversed(self._codecs):
            plain = codec.decode(plain)
        return np.frombuffer(plain, np.float32).reshape(shape).copy()


class Zstd(BitRound):
    """z as it is, bytes shuffled, zstd."""

    parameter = None

    def __init__(self, level: int) -> None:
        super().__init__(level, (23, 23))
