"""A prefix on its way through the full-precision model: the keys and values that each block's attention makes of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subnibble.model.skeleton import Block, Skeleton


class PrefixStream:
    """Hidden states (1, tokens, channels) float32 between two blocks. hidden: the embedded prefix."""

    def __init__(self, skeleton: Skeleton, hidden: Tensor) -> None:
        self._hidden = hidden.float()
        self._arguments = skeleton.block_arguments(hidden.shape[1], torch.float32)

    def advance(self, block: Block) -> tuple[Tensor, Tensor]:
        """Run the prefix through a block in float32; its keys and values (heads, tokens, width), positions put on."""
        kept = _Kept()
        with torch.no_grad():
            output = block.module(self._hidden, **self._arguments[block.index], past_key_values=kept)
        self._hidden = output[0] if isinstance(output, tuple) else output
        return kept.keys[0], kept.values[0]


class _Kept:
    """Stands for an empty cache: keeps what attention gives it."""

    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """keys, values: (1, heads, tokens, width), given back as they are."""
        self.keys, self.values = keys, values
        return keys, values
