"""Run a prompt prefix through the full-precision model, for its keys and values in each block.

In each block, calibration windows then come after these keys and values, as texts do at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.errors import NumericalFailure
from subnibble.model.skeleton import Block, Skeleton
from subnibble.model.transformers_api.blocks import BlockCache, BlockCall, run_block
from subnibble.runtime.kv_cache import CacheQuantizer
from subnibble.runtime.quantized_text import quantized_keys, quantized_values

# Keys and values, (heads, tokens, width) each, rotary positions applied.
States = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PrefixStep:
    """The result of one block for a prefix.

    states: keys and values of the prefix.
    hidden: output of the block, (1, tokens, channels).
    """

    states: States
    hidden: Tensor


class PrefixStream:
    """The forward pass of a prefix, block by block; holds the hidden states (1, tokens, channels) between two blocks.

    skeleton: the model.
    hidden: output of the embedding for the prefix, (1, tokens, channels).
    dtype: dtype of the blocks that will run.
    """

    def __init__(self, skeleton: Skeleton, hidden: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self._hidden = hidden.to(dtype)
        self._calls = skeleton.block_calls(hidden.shape[1], dtype)

    @property
    def hidden(self) -> Tensor:
        """Hidden states before the next block, (1, tokens, channels)."""
        return self._hidden

    @hidden.setter
    def hidden(self, hidden: Tensor) -> None:
        self._hidden = hidden.to(self._hidden)

    def run(self, block: Block) -> PrefixStep:
        """Run a block on the prefix without moving past it."""
        recorder = _Recorder()
        with torch.no_grad():
            output = run_block(block.module, self._hidden, self._calls[block.index].with_cache(recorder))
        return PrefixStep((recorder.keys[0], recorder.values[0]), output)

    def move(self, step: PrefixStep) -> None:
        """Move past the block that returned `step`: its output is the input of the next block."""
        self._hidden = step.hidden

    def advance(self, block: Block) -> States:
        """Run a block, move past it, and return its keys and values for the prefix."""
        step = self.run(block)
        self.move(step)
        return step.states


def half_states(states: States, where: str) -> States:
    """Cast keys and values to float16, as they are stored; `NumericalFailure` if they exceed its range.

    states: (heads, tokens, width) each.
    where: what they belong to, for the error.
    """
    keys, values = (tensor.to(torch.float16).contiguous() for tensor in states)
    if not bool(keys.isfinite().all() and values.isfinite().all()):
        raise NumericalFailure(
            f"{where}: keys or values of the system prompt exceed the range of float16; use another prompt"
        )
    return keys, values


def after_prefix(call: BlockCall, states: States | None, cache_quantizer: CacheQuantizer | None = None) -> BlockCall:
    """Block arguments for windows that come after a prefix, and whose keys and values may be quantized.

    call: arguments from `Skeleton.block_calls`, whose `prefix_length` is the number of prefix tokens.
    states: keys and values of the prefix in this block, or None without a prefix.
    cache_quantizer: how the KV cache quantizes, or None if it does not.
    """
    if states is None and cache_quantizer is None:
        return call
    # A call without arguments belongs to a stream without windows: it has no positions and is never run.
    return call.with_cache(_PrefixCache(states, cache_quantizer, call.positions)) if call.named else call


class _Recorder(BlockCache):
    """Replaces an empty KV cache, and records the keys and values of the one update."""

    keys: Tensor
    values: Tensor

    def attended(self, keys: Tensor, values: Tensor) -> States:
        """Record keys and values, (b, heads, tokens, width) each, and return them unchanged."""
        self.keys, self.values = keys, values
        return keys, values


class _PrefixCache(BlockCache):
    """Replaces a KV cache that holds a prefix. Texts are quantized and dequantized, and not stored."""

    def __init__(
        self, states: States | None, cache_quantizer: CacheQuantizer | None, positions: tuple[Tensor, Tensor]
    ) -> None:
        super().__init__()
        self._states, self._cache_quantizer, self._positions = states, cache_quantizer, positions

    def attended(self, keys: Tensor, values: Tensor) -> States:
        """Quantize and dequantize a text's keys and values, and return them after those of the prefix."""
        if self._cache_quantizer is not None:
            keys, values = (
                quantized_keys(keys, self._cache_quantizer, self._positions),
                quantized_values(values, self._cache_quantizer),
            )
        return (keys, values) if self._states is None else after_states(self._states, (keys, values))


def after_states(prefix: States, new: States) -> States:
    """Concatenate keys and values of a prefix and of texts: (b, heads, prefix tokens + tokens, width) each.

    prefix: of the prefix, (heads, prefix tokens, width) each.
    new: of the texts, (b, heads, tokens, width) each.
    """
    first, second = (
        torch.cat([before.to(after).expand(after.shape[0], -1, -1, -1), after], 2)
        for before, after in zip(prefix, new, strict=True)
    )
    return first, second
