"""A prefix on its way through the full-precision model: the keys and values that each block's attention makes of it.

Calibration windows go through the block behind them, as texts will.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.errors import NumericalFailure
from subnibble.model.skeleton import Block, Skeleton
from subnibble.model.transformers_api.blocks import BlockCache, BlockCall, run_block
from subnibble.runtime.kv_cache import Coding
from subnibble.runtime.quantized_text import quantized_keys, quantized_values

# Keys and values, (heads, tokens, width) each, positions put on.
States = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PrefixStep:
    """What one block makes of a prefix. states: keys and values. hidden: (1, tokens, channels), the block's output."""

    states: States
    hidden: Tensor


class PrefixStream:
    """Hidden states (1, tokens, channels) between two blocks. hidden: the embedded prefix. dtype: of the blocks."""

    def __init__(self, skeleton: Skeleton, hidden: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self._hidden = hidden.to(dtype)
        self._calls = skeleton.block_calls(hidden.shape[1], dtype)

    def run(self, block: Block) -> PrefixStep:
        """What a block makes of the prefix; the stream stays where it is."""
        kept = _Kept()
        with torch.no_grad():
            output = run_block(block.module, self._hidden, self._calls[block.index].with_cache(kept))
        return PrefixStep((kept.keys[0], kept.values[0]), output)

    def move(self, step: PrefixStep) -> None:
        """Move past the block that made `step`."""
        self._hidden = step.hidden

    def advance(self, block: Block) -> States:
        """Run a block and move past it; its keys and values."""
        step = self.run(block)
        self.move(step)
        return step.states


def half_states(states: States, where: str) -> States:
    """The states as they are stored, float16; `NumericalFailure` naming `where` if they do not fit."""
    keys, values = (part.to(torch.float16).contiguous() for part in states)
    if not bool(keys.isfinite().all() and values.isfinite().all()):
        raise NumericalFailure(f"{where}: keys or values of the system prompt do not fit float16; use another prompt")
    return keys, values


def behind(call: BlockCall, states: States | None, coding: Coding | None = None) -> BlockCall:
    """The call of a block behind a prefix's states, None for none, its cache coded, `coding` None for not at all.

    call: of `Skeleton.block_calls` with as many tokens of past.
    """
    if states is None and coding is None:
        return call
    # Without windows there are no positions, and nothing will be run.
    return call.with_cache(_Past(states, coding, call.positions)) if call.named else call


class _Kept(BlockCache):
    """Stands for an empty cache: keeps what attention gives it."""

    keys: Tensor
    values: Tensor

    def see(self, keys: Tensor, values: Tensor) -> States:
        """See `BlockCache`; given back as they are."""
        self.keys, self.values = keys, values
        return keys, values


class _Past(BlockCache):
    """Stands for a cache that holds a prefix, gives texts back as they come out of the codes, and keeps nothing."""

    def __init__(self, states: States | None, coding: Coding | None, positions: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self._states, self._coding, self._positions = states, coding, positions

    def see(self, keys: Tensor, values: Tensor) -> States:
        """See `BlockCache`; behind the prefix's."""
        if self._coding is not None:
            keys, values = quantized_keys(keys, self._coding, self._positions), quantized_values(values, self._coding)
        return (keys, values) if self._states is None else with_past(self._states, (keys, values))


def with_past(past: States, new: States) -> States:
    """A prefix's states, (heads, tokens, width), before a text's, (b, heads, tokens, width)."""
    first, second = (
        torch.cat([before.to(after).expand(after.shape[0], -1, -1, -1), after], 2)
        for before, after in zip(past, new, strict=True)
    )
    return first, second
