"""Interfaces of a model that another tool quantized: its matrices, each dense and packed."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from subnibble.checkpoint.source import Source
from subnibble.tensor.packed import PackedTensor

# Weights that are dense at once: 4 MB in float32.
_WEIGHTS_AT_ONCE = 2**20


def row_chunks(rows: int, columns: int) -> list[slice]:
    """Consecutive rows of a matrix, in pieces that may be dense in memory."""
    at_once = max(1, _WEIGHTS_AT_ONCE // max(1, columns))
    return [slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once)]


@dataclass(frozen=True)
class Packed:
    """A matrix in our format.

    matrix: (m, k).
    gather: (k,) int64: column gather[j] of the foreign matrix is column j of `matrix`; None for the same order.
    is_exact: whether `matrix` must equal the foreign matrix bit for bit.
    """

    matrix: PackedTensor
    gather: Tensor | None = None
    is_exact: bool = True


class ForeignMatrix(Protocol):
    """A matrix that another tool quantized, read from disk."""

    def dense(self, rows: slice) -> Tensor:
        """Dequantize rows by the other tool's rule: (rows, k) float32."""

    def packed(self) -> Packed:
        """Pack the same codes, scales and zero-points; `CheckpointError` if our format cannot hold them."""


class Foreign(Protocol):
    """A model that another tool quantized.

    format: short name of its format.
    source: the model as a `Source` of dequantized weights.
    quantized: names of the weights that are quantized, for example "lm_head.weight".
    """

    format: str

    @property
    def source(self) -> Source:
        """The model, dequantized."""

    @property
    def quantized(self) -> Set[str]:
        """Names of the quantized weights."""

    def read(self, name: str) -> ForeignMatrix:
        """Read a quantized weight; `CheckpointError` if it is damaged."""
