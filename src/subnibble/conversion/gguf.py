"""Read the quantized matrices of a GGUF file without dequantizing them; `gguf_blocks.py` has the types."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.checkpoint.gguf_source import GgufSource
from subnibble.conversion.foreign import Packed, row_chunks
from subnibble.conversion.gguf_blocks import BLOCK_TYPES, BlockType
from subnibble.conversion.offsets import pack_offsets, smallest_type, with_constant_groups
from subnibble.errors import UnsupportedModel
from subnibble.tensor.packed import PackedRange, PackedTensor, pack_codes
from subnibble.tensor.scheme import Scheme

_FLOATS = ("F64", "F32", "F16", "BF16")


class GgufModel:
    """A GGUF file as a `Foreign` model.

    source: the file.
    keep_dense: whether matrices of a type that cannot be packed count as unquantized; else they are an error.
    """

    format = "gguf"

    def __init__(self, source: GgufSource, keep_dense: bool) -> None:
        self._source = source
        types = {name: source.type_name(name) for name in source.names()}
        self._names = frozenset(name for name, kind in types.items() if kind in BLOCK_TYPES)
        others = {name: kind for name, kind in types.items() if kind not in BLOCK_TYPES and kind not in _FLOATS}
        if others and not keep_dense:
            name, kind = next(iter(others.items()))
            raise UnsupportedModel(
                f"{source.path}: {name} ({len(others)} in all) is stored as {kind}, which cannot be packed exactly; "
                f"types that can: {', '.join(BLOCK_TYPES)}. --dense (dense=True) stores such tensors unquantized; or "
                "give a file in another type"
            )

    @property
    def source(self) -> GgufSource:
        """The file."""
        return self._source

    @property
    def quantized(self) -> Set[str]:
        """Names of the matrices that are packed."""
        return self._names

    def read(self, name: str) -> GgufMatrix:
        """Read a quantized matrix."""
        return GgufMatrix(self._source, name, BLOCK_TYPES[self._source.type_name(name)])


@dataclass(frozen=True)
class GgufMatrix:
    """A quantized matrix of a GGUF file."""

    source: GgufSource
    name: str
    kind: BlockType

    def dense(self, rows: slice) -> Tensor:
        """Dequantize rows by the gguf package: (rows, k) float32."""
        return self.source.load_rows(self.name, rows)

    def packed(self) -> Packed:
        """Pack codes and scales; the codes of a chunk of rows at a time are unpacked."""
        rows, columns = self.source.shape(self.name)
        bits, group_size = self.kind.bits, self.kind.group_size
        packed_codes, all_scales, all_offsets = [], [], []
        for chunk in row_chunks(rows, columns):
            codes, scales, offsets = self._parts(chunk)
            if offsets is not None:
                codes = with_constant_groups(codes, scales, group_size)
                all_offsets.append(offsets)
            packed_codes.append(pack_codes(codes, bits))
            all_scales.append(scales)
        codes, scales = torch.cat(packed_codes), torch.cat(all_scales)
        del packed_codes, all_scales
        scheme = Scheme(bits, group_size, "none", smallest_type(scales))
        if not all_offsets:
            return Packed(PackedTensor((PackedRange.from_packed_codes(codes, columns, scales, None, scheme),)))
        packed = pack_offsets(codes, columns, scales, torch.cat(all_offsets), scheme, self.dense)
        return Packed(PackedTensor((packed,)), is_exact=False)

    def _parts(self, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes (rows, k), scales and offsets (rows, groups)."""
        parts, count = self.kind.take_apart(self.source.blocks(self.name, rows)), rows.stop - rows.start
        codes, scales = (torch.from_numpy(values).view(count, -1) for values in (parts.codes, parts.scales))
        return codes, scales, None if parts.offsets is None else torch.from_numpy(parts.offsets).view(count, -1)
