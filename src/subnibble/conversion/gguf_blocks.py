"""Take blocks of GGUF's quantized types apart, into codes, scales and offsets (ggml's `ggml-quants.c`).

A block holds 32 or 256 weights of a row. The K types have two levels of scales: a float16 per block, times a small
integer per group of 16 or 32 weights. The product is exact in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Bytes = NDArray[np.uint8]
_Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Parts:
    """The weights `scale * code + offset`, or without offsets `scale * (code - 2**(bits-1))`, of n blocks.

    codes: (n, weights of a block) uint8.
    scales: (n, groups of a block) float32.
    offsets: (n, groups of a block) float32, or None.
    """

    codes: _Bytes
    scales: _Floats
    offsets: _Floats | None = None


@dataclass(frozen=True)
class BlockType:
    """A quantized type of GGUF, in terms of our format.

    bits: of our codes. Types of 5 and 6 bits become codes of 8 bits.
    group_size: weights that share a scale.
    take_apart: takes blocks (n, bytes of a block).
    """

    bits: int
    group_size: int
    take_apart: Callable[[_Bytes], Parts]


def _split(blocks: _Bytes, *widths: int) -> list[_Bytes]:
    """Split blocks into fields of these numbers of bytes, in order."""
    assert sum(widths) == blocks.shape[1]
    return np.split(blocks, np.cumsum(widths)[:-1], axis=1)


def _half(field: _Bytes) -> _Floats:
    """Read float16 numbers as float32."""
    return np.ascontiguousarray(field).view(np.float16).astype(np.float32)


def _fields(packed: _Bytes, run: int, bits: int) -> _Bytes:
    """Unpack codes: of each run of bytes the lowest bits of all bytes, then the next bits of all bytes, and so on."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, -1, 1)
    fields = (packed.reshape(len(packed), -1, 1, run) >> shifts) & np.uint8(2**bits - 1)
    return fields.reshape(len(packed), -1)


def _joined(low: _Bytes, high: _Bytes, weight: int) -> _Bytes:
    """Codes of low bits and of high bits, which count `weight` each."""
    return low + high * np.uint8(weight)


def _q4_0(blocks: _Bytes) -> Parts:
    d, qs = _split(blocks, 2, 16)
    return Parts(_fields(qs, 16, 4), _half(d))


def _q4_1(blocks: _Bytes) -> Parts:
    d, m, qs = _split(blocks, 2, 2, 16)
    return Parts(_fields(qs, 16, 4), _half(d), _half(m))


def _q5_0(blocks: _Bytes) -> Parts:
    d, high, qs = _split(blocks, 2, 4, 16)
    codes = _joined(_fields(qs, 16, 4), np.unpackbits(high, axis=1, bitorder="little"), 16)
    return Parts(codes + np.uint8(128 - 16), _half(d))


def _q5_1(blocks: _Bytes) -> Parts:
    d, m, high, qs = _split(blocks, 2, 2, 4, 16)
    codes = _joined(_fields(qs, 16, 4), np.unpackbits(high, axis=1, bitorder="little"), 16)
    return Parts(codes, _half(d), _half(m))


def _q8_0(blocks: _Bytes) -> Parts:
    d, qs = _split(blocks, 2, 32)
    # From two's complement.
    return Parts(qs ^ np.uint8(128), _half(d))


def _q2_k(blocks: _Bytes) -> Parts:
    scales, qs, d, dmin = _split(blocks, 16, 64, 2, 2)
    return Parts(_fields(qs, 32, 2), _half(d) * (scales & 15), -_half(dmin) * (scales >> 4))


def _q3_k(blocks: _Bytes) -> Parts:
    high, qs, scales, d = _split(blocks, 32, 64, 12, 2)
    six_bits = _joined(_fields(scales[:, :8], 8, 4), _fields(scales[:, 8:], 4, 2), 16)
    codes = _joined(_fields(qs, 32, 2), _fields(high, 32, 1), 4)
    return Parts(codes, _half(d) * (six_bits.astype(np.float32) - 32))


def _q4_k(blocks: _Bytes) -> Parts:
    d, dmin, scales, qs = _split(blocks, 2, 2, 12, 128)
    return Parts(_fields(qs, 32, 4), *_two_levels(d, dmin, scales))


def _q5_k(blocks: _Bytes) -> Parts:
    d, dmin, scales, high, qs = _split(blocks, 2, 2, 12, 32, 128)
    return Parts(_joined(_fields(qs, 32, 4), _fields(high, 32, 1), 16), *_two_levels(d, dmin, scales))


def _q6_k(blocks: _Bytes) -> Parts:
    low, high, scales, d = _split(blocks, 128, 64, 16, 2)
    codes = _joined(_fields(low, 64, 4), _fields(high, 32, 2), 16)
    return Parts(codes + np.uint8(128 - 32), _half(d) * scales.view(np.int8))


def _two_levels(d: _Bytes, dmin: _Bytes, packed: _Bytes) -> tuple[_Floats, _Floats]:
    """Scales and offsets (n, 8) of Q4_K and Q5_K.

    packed: (n, 12): 8 scales and 8 minima of 6 bits. Bytes 0 to 3 have scales 0 to 3, bytes 4 to 7 minima 0 to 3, in
        their low 6 bits. Bytes 8 to 11 have the low 4 bits of scales (low half) and minima (high half) 4 to 7, whose
        highest 2 bits are those of bytes 0 to 7.
    """
    first, second, third = _split(packed, 4, 4, 4)
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 2) & 48)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | ((second >> 2) & 48)], axis=1)
    return _half(d) * scales, -_half(dmin) * minima


BLOCK_TYPES = {
    "Q4_0": BlockType(4, 32, _q4_0),
    "Q4_1": BlockType(4, 32, _q4_1),
    "Q5_0": BlockType(8, 32, _q5_0),
    "Q5_1": BlockType(8, 32, _q5_1),
    "Q8_0": BlockType(8, 32, _q8_0),
    "Q2_K": BlockType(2, 16, _q2_k),
    "Q3_K": BlockType(3, 16, _q3_k),
    "Q4_K": BlockType(4, 32, _q4_k),
    "Q5_K": BlockType(8, 32, _q5_k),
    "Q6_K": BlockType(8, 16, _q6_k),
}
