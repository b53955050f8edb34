"""A quantized matrix: packed codes, scales and zero-points, and how they dequantize.

Codes of a row form one bit stream, least significant bit first: code `j` of a row occupies bits
`j*bits .. (j+1)*bits - 1`, and bit `i` of the stream is bit `i % 8` of byte `i // 8`. Each row starts on a new byte.
Integer zero-points are packed along the groups in the same way. docs/format.md specifies the format with examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from subnibble.errors import CheckpointError
from subnibble.tensor import mxfp4
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.scheme import Scheme

# Codes are packed in words that fill whole bytes. Bit width -> (codes, bytes) of a word.
_WORD = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}
_SCALE_DTYPE = {
    "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "e8m0": torch.uint8,
}  # fmt: skip


def scale_dtype(scheme: Scheme) -> torch.dtype:
    """The torch dtype in which `scheme` stores scales and real zero-points."""
    return _SCALE_DTYPE[scheme.scale_type]


def stored_scales(scales: Tensor, scheme: Scheme) -> Tensor:
    """Convert scales (m, n) float32, which the scheme's type represents exactly, to their stored form."""
    if scheme.scale_type == "e8m0":
        return mxfp4.encode_e8m0(scales)
    return scales.to(scale_dtype(scheme))


def float_scales(stored: Tensor, scheme: Scheme) -> Tensor:
    """Convert stored scales to float32; inverse of `stored_scales`."""
    if scheme.scale_type == "e8m0":
        return mxfp4.decode_e8m0(stored)
    return stored.float()


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (m, n), integers in `0 .. 2**bits - 1`, to uint8 (m, ceil(n * bits / 8))."""
    per_word, word_bytes = _WORD[bits]
    rows, columns = codes.shape
    words = -(-columns // per_word)
    padded = torch.zeros(rows, words * per_word, dtype=torch.int32, device=codes.device)
    padded[:, :columns] = codes
    shifts = torch.arange(per_word, dtype=torch.int32, device=codes.device) * bits
    word = (padded.view(rows, words, per_word) << shifts).sum(-1, dtype=torch.int32)
    byte_shifts = torch.arange(word_bytes, dtype=torch.int32, device=codes.device) * 8
    stream = ((word.unsqueeze(-1) >> byte_shifts) & 255).to(torch.uint8).view(rows, words * word_bytes)
    return stream[:, : (columns * bits + 7) // 8].contiguous()


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Unpack uint8 (m, ceil(columns * bits / 8)) to codes (m, columns), uint8."""
    if bits == 8:
        return packed
    per_word, word_bytes = _WORD[bits]
    rows = packed.shape[0]
    if word_bytes == 1:
        shifts = torch.arange(per_word, dtype=torch.uint8, device=packed.device) * bits
        codes: Tensor = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
        return codes.flatten(1)[:, :columns]
    words = -(-columns // per_word)
    short = words * word_bytes - packed.shape[1]
    padded = torch.nn.functional.pad(packed, (0, short)) if short else packed
    b = padded.view(rows, words, word_bytes).to(torch.int32)
    word = b[..., 0] | (b[..., 1] << 8) | (b[..., 2] << 16)
    shifts = torch.arange(per_word, dtype=torch.int32, device=packed.device) * bits
    codes = ((word.unsqueeze(-1) >> shifts) & (2**bits - 1)).to(torch.uint8)
    return codes.flatten(1)[:, :columns]


def grouped_views(matrix: Tensor, scheme: Scheme | ActivationScheme) -> list[tuple[Tensor, slice]]:
    """Split a matrix (m, k) into views of its groups: the full groups, then a shorter last group if there is one.

    scheme: a scheme without outliers.
    Returns a list of (view (m, groups, width), the slice of groups that it covers).
    """
    columns = matrix.shape[1]
    bounds = scheme.group_bounds(columns)
    width = bounds[0][1] - bounds[0][0]
    full = sum(stop - start == width for start, stop in bounds)
    views = [(matrix[:, : full * width].unflatten(1, (full, width)), slice(0, full))]
    if full < len(bounds):
        views.append((matrix[:, full * width :].unsqueeze(1), slice(full, full + 1)))
    return views


@dataclass(frozen=True)
class QuantizedMatrix:
    """A rounder's result before packing. Its scales and zeros are exact in the scheme's storage type.

    codes: (m, k) uint8.
    scales: (m, groups * scales_per_group) float32, the scales of a group side by side.
    zeros: (m, groups) float32, or None if the scheme has none.
    column_scales: (k,) float32, additional scales, or None for 1. Packing omits them: the caller must store them
        elsewhere.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    column_scales: Tensor | None = None


@dataclass(frozen=True)
class PackedRange:
    """Consecutive input columns that are quantized by one scheme.

    scheme: the scheme.
    num_columns: number of columns.
    codes: (m, scheme.row_bytes(num_columns)) uint8.
    scales: (m, groups * scales_per_group) in the scheme's type.
    zeros: (m, ...) integer zero-points packed like codes (uint8), (m, groups) real ones in the scheme's type, or None.
    """

    scheme: Scheme
    num_columns: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    # What a runtime made of these tensors, by name; not part of the value.
    derived: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def pack(cls, quantized: QuantizedMatrix, scheme: Scheme) -> PackedRange:
        """Pack a quantized matrix; exact, because the scheme's type represents its scales and zeros exactly."""
        codes, columns = pack_codes(quantized.codes, scheme.bits), quantized.codes.shape[1]
        return cls.from_packed_codes(codes, columns, quantized.scales, quantized.zeros, scheme)

    @classmethod
    def from_packed_codes(
        cls, codes: Tensor, num_columns: int, scales: Tensor, zeros: Tensor | None, scheme: Scheme
    ) -> PackedRange:
        """As `pack`, of codes (m, scheme.row_bytes(num_columns)) that `pack_codes` packed."""
        if scheme.zero_point == "none":
            stored_zeros = None
        else:
            if zeros is None:
                raise ValueError(f"scheme {scheme.name} needs zero-points, but the quantized matrix has none")
            integer = scheme.zero_point == "integer"
            stored_zeros = pack_codes(zeros, scheme.bits) if integer else zeros.to(scale_dtype(scheme))
        return cls(scheme, num_columns, codes, stored_scales(scales, scheme), stored_zeros)

    @classmethod
    def empty(cls, rows: int, columns: int, scheme: Scheme, device: str = "meta") -> PackedRange:
        """Uninitialized storage of the right shapes and dtypes."""
        groups = scheme.groups(columns)
        scale = scale_dtype(scheme)
        shapes = {"none": None, "integer": scheme.row_bytes(groups), "real": groups}
        width = shapes[scheme.zero_point]
        zero_type = torch.uint8 if scheme.zero_point == "integer" else scale
        return cls(
            scheme,
            columns,
            torch.empty(rows, scheme.row_bytes(columns), dtype=torch.uint8, device=device),
            torch.empty(rows, groups * scheme.scales_per_group, dtype=scale, device=device),
            None if width is None else torch.empty(rows, width, dtype=zero_type, device=device),
        )

    def unpack(self) -> QuantizedMatrix:
        """Unpack codes, scales and zero-points; inverse of `pack`."""
        codes = unpack_codes(self.codes, self.scheme.bits, self.num_columns)
        return QuantizedMatrix(codes, float_scales(self.scales, self.scheme), self.float_zeros())

    def dequantize(self) -> Tensor:
        """Dequantize: dense float32 (m, columns)."""
        codes = unpack_codes(self.codes, self.scheme.bits, self.num_columns)
        if self.scheme.grid == "sign":
            return self._on_sign_grid(codes)
        return self._on_mx_grid(codes) if self.scheme.grid == "mxfp4" else self._on_uniform_grid(codes)

    def _on_uniform_grid(self, codes: Tensor) -> Tensor:
        values = codes.float()
        scales, zeros = self.scales.float().unsqueeze(-1), self.float_zeros()
        centre = torch.full_like(scales, self.scheme.levels // 2) if zeros is None else zeros.unsqueeze(-1)
        for view, groups in grouped_views(values, self.scheme):
            view.sub_(centre[:, groups]).mul_(scales[:, groups])
        return values

    def _on_mx_grid(self, codes: Tensor) -> Tensor:
        values = mxfp4.decode_e2m1(codes)
        scales = float_scales(self.scales, self.scheme).unsqueeze(-1)
        for view, groups in grouped_views(values, self.scheme):
            view.mul_(scales[:, groups])
        return values

    def _on_sign_grid(self, codes: Tensor) -> Tensor:
        values = torch.zeros(codes.shape, dtype=torch.float32, device=codes.device)
        scales = self.scales.float().unflatten(1, (-1, 1, self.scheme.bits))
        # Summed from the first bit to the last, in the order of the grid's fit, so that both round the same way.
        for bit in range(self.scheme.bits):
            signs = ((codes >> bit) & 1).float().mul_(2).sub_(1)
            for view, groups in grouped_views(signs, self.scheme):
                view.mul_(scales[:, groups, :, bit])
            values += signs
        return values

    def rows(self, index: Tensor) -> PackedRange:
        """Select the rows at `index` (1-D, int32 or int64), still packed; `IndexError` for a negative index."""
        # `index_select`, because plain indexing would count negative indices from the end.
        codes, scales = self.codes.index_select(0, index), self.scales.index_select(0, index)
        zeros = None if self.zeros is None else self.zeros.index_select(0, index)
        return PackedRange(self.scheme, self.num_columns, codes, scales, zeros)

    def float_zeros(self) -> Tensor | None:
        """Zero-points (m, groups) float32, or None if the scheme has none."""
        if self.zeros is None:
            return None
        if self.scheme.zero_point == "real":
            return self.zeros.float()
        return unpack_codes(self.zeros, self.scheme.bits, self.scheme.groups(self.num_columns)).float()


@dataclass(frozen=True)
class PackedTensor:
    """A quantized matrix (m, k): ranges of input columns side by side, each with its own scheme."""

    ranges: tuple[PackedRange, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (m, k) of the dense matrix."""
        return self.ranges[0].codes.shape[0], sum(packed.num_columns for packed in self.ranges)

    @property
    def stored_bits(self) -> int:
        """Number of bits that this tensor stores, padding included."""
        return 8 * sum(tensor.nbytes for tensor in self.state().values())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantize: dense (m, k), computed in float32 and cast once to `dtype`."""
        return torch.cat([packed.dequantize() for packed in self.ranges], dim=1).to(dtype)

    def rows(self, index: Tensor) -> PackedTensor:
        """Select the rows at `index` (1-D, int32 or int64), still packed; `IndexError` for a negative index."""
        return PackedTensor(tuple(packed.rows(index) for packed in self.ranges))

    def state(self) -> dict[str, Tensor]:
        """Stored tensors by name: `codes`, `scales`, `zeros` of the first range, `codes_1` and so on of the others."""
        tensors: dict[str, Tensor] = {}
        for i, packed in enumerate(self.ranges):
            for name in ("codes", "scales", "zeros"):
                tensor = getattr(packed, name)
                if tensor is not None:
                    tensors[range_key(name, i)] = tensor
        return tensors

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], layout: PackedLayout, where: str = "tensor") -> PackedTensor:
        """Rebuild from stored tensors.

        state: stored tensors by name, as `state` returns them.
        layout: the shape and schemes they must have.
        where: path of the tensor, for errors.
        Raises `CheckpointError` for a missing, unexpected or wrongly shaped tensor, or one of another dtype.
        """
        ranges = []
        for i, expected in enumerate(layout.empty().ranges):
            tensors: dict[str, Tensor | None] = {}
            for name in ("codes", "scales", "zeros"):
                want, have = getattr(expected, name), state.get(range_key(name, i))
                if (want is None) != (have is None) or (
                    want is not None and have is not None and (want.shape, want.dtype) != (have.shape, have.dtype)
                ):
                    target = "nothing" if want is None else f"{want.dtype} of shape {tuple(want.shape)}"
                    actual = "nothing" if have is None else f"{have.dtype} of shape {tuple(have.shape)}"
                    raise CheckpointError(
                        f"{where}.{range_key(name, i)}: expected {target}, found {actual}; quantize the model again"
                    )
                tensors[name] = have
            codes, scales = tensors["codes"], tensors["scales"]
            assert codes is not None
            assert scales is not None
            ranges.append(PackedRange(expected.scheme, expected.num_columns, codes, scales, tensors["zeros"]))
        return cls(tuple(ranges))

    @property
    def layout(self) -> PackedLayout:
        """The shape and schemes, without the data."""
        return PackedLayout(self.shape[0], tuple((packed.num_columns, packed.scheme) for packed in self.ranges))


@dataclass(frozen=True)
class PackedLayout:
    """Shape and schemes of a packed matrix.

    rows: number of rows m.
    ranges: (number of columns, scheme) of every range.
    """

    rows: int
    ranges: tuple[tuple[int, Scheme], ...]

    @property
    def num_columns(self) -> int:
        """Number of input columns over all ranges."""
        return sum(columns for columns, _ in self.ranges)

    @property
    def stored_bits(self) -> int:
        """Number of bits that a tensor of this layout stores."""
        return self.rows * sum(scheme.row_bits(columns) for columns, scheme in self.ranges)

    def empty(self, device: str = "meta") -> PackedTensor:
        """Uninitialized storage of the right shapes and dtypes."""
        return PackedTensor(tuple(PackedRange.empty(self.rows, n, scheme, device) for n, scheme in self.ranges))


def range_key(name: str, index: int) -> str:
    """Stored name of a tensor of range `index`: `name` for the first range, `name_1` and so on for the others."""
    return name if index == 0 else f"{name}_{index}"
