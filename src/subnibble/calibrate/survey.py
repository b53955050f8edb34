"""Run the full-precision model block by block, for what must be known of all blocks before the first is quantized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from subnibble.calibrate.prefix import PrefixStream, after_prefix
from subnibble.calibrate.stream import BlockStream
from subnibble.model.skeleton import Block, Skeleton
from subnibble.model.transformers_api.blocks import BlockCall


def full_precision_blocks(
    skeleton: Skeleton,
    hidden: list[Tensor],
    calls: Sequence[BlockCall],
    prefix: PrefixStream | None = None,
) -> Iterator[tuple[Block, BlockStream]]:
    """Yield each block in float32, which the caller may edit, and the stream of all windows through a copy of it.

    The copy has the skeleton's dtype and does not see the edits.

    skeleton: the model; each block is released when the next is asked for.
    hidden: output of the embedding, batches (windows, tokens, channels); overwritten with the outputs of the blocks.
    calls: arguments of each block, from `Skeleton.block_calls`.
    prefix: stream of the system prompt before the windows, or None.
    """
    for index in range(skeleton.num_blocks):
        block = skeleton.load_block(index)
        block_copy = block.copy(skeleton.dtype)
        states = None if prefix is None else prefix.advance(block)
        stream = BlockStream(block_copy, hidden, after_prefix(calls[index], states))
        yield block, stream
        stream.advance()
        skeleton.release(block.path)
