"""Rotate each head's values by one Hadamard matrix, offline: it spreads outliers before the KV cache is quantized.

    v_proj rows of a key-value head  Qᵀ W,  bias b Q;   o_proj columns of a query head  W Q;   Q = H diag(signs)

This is the within-head half of QuaRot's third rotation (arXiv 2404.00456). The signs come after H: otherwise a
later online Hadamard transform of the whole attention output would undo H inside each head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.errors import BadRecipe
from subnibble.model.skeleton import Block
from subnibble.tensor import hadamard

VALUE_ROTATIONS = ("none", "hadamard")


@dataclass(frozen=True)
class ValueRotation:
    """The rotation Q of one head; all heads share it.

    blocks: widths of its Hadamard blocks.
    signs: (width,) of +-1, float64.
    """

    blocks: tuple[int, ...]
    signs: Tensor

    def rotate_columns(self, matrix: Tensor) -> Tensor:
        """M Q for each head, with M (m, heads * width): computed in float64, returned in M's dtype."""
        wide = matrix.double().unflatten(-1, (-1, self.signs.shape[0]))
        return (hadamard.multiply(wide, self.blocks) * self.signs.to(wide.device)).flatten(-2).to(matrix.dtype)

    def edit_block_(self, block: Block) -> None:
        """Rotate the values of a block loaded in float32, in place."""
        for site in block.arch.sites:
            if not site.per_head:
                continue
            with torch.no_grad():
                for name in site.writers:
                    linear = block.linear(name)
                    linear.weight.copy_(self.rotate_columns(linear.weight.T).T)
                    if linear.bias is not None:
                        linear.bias.copy_(self.rotate_columns(linear.bias.unsqueeze(0))[0])
                for name in site.readers:
                    weight = block.linear(name).weight
                    weight.copy_(self.rotate_columns(weight))


def make_value_rotation(name: str, width: int, seed: int) -> ValueRotation | None:
    """The rotation called `name`, or None for "none".

    name: one of `VALUE_ROTATIONS`.
    width: channels per head.
    seed: draws the signs.
    """
    check_value_rotation(name)
    if name == "none":
        return None
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
    return ValueRotation(hadamard.hadamard_blocks(width), signs)


def check_value_rotation(name: str) -> None:
    """Raise `BadRecipe` if `name` is not one of `VALUE_ROTATIONS`."""
    if name not in VALUE_ROTATIONS:
        raise BadRecipe(f"value_rotation is {name!r}; choose one of {', '.join(VALUE_ROTATIONS)}")
