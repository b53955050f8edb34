"""Read the quantized matrices of a GGUF file without dequantizing them; `gguf_blocks.py` has the types."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from subnibble.checkpoint.gguf_source import GgufSource
from subnibble.conversion.foreign import Packed
from subnibble.conversion.gguf_blocks import BLOCK_TYPES, BlockType
from subnibble.conversion.offsets import pack_offsets, smallest_type
from subnibble.errors import UnsupportedModel
from subnibble.tensor.packed import PackedRange, PackedTensor, QuantizedMatrix
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

    def dense(self) -> Tensor:
        """Dequantize by the gguf package: (m, k) float32."""
        return self.source.load(self.name)

    def packed(self) -> Packed:
        """Pack codes and scales."""
        rows = self.source.shape(self.name)[0]
        blocks = self.source.blocks(self.name)
        parts = self.kind.take_apart(np.ascontiguousarray(blocks))
        codes = self._table(parts.codes, rows)
        scales = self._table(parts.scales, rows)
        scheme = Scheme(self.kind.bits, self.kind.group_size, "none", smallest_type(scales))
        if parts.offsets is None:
            packed = PackedRange.pack(QuantizedMatrix(codes, scales, None), scheme)
        else:
            packed = pack_offsets(codes, scales, self._table(parts.offsets, rows), scheme, self.dense())
        return Packed(PackedTensor((packed,)), is_exact=parts.offsets is None)

    def _table(self, values: np.ndarray, rows: int) -> Tensor:
        """Rows of all blocks, in the model's order."""
        return self.source.in_model_order(self.name, torch.from_numpy(values).view(rows, -1))
