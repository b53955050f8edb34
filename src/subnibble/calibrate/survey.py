"""The full-precision model block by block, before anything is quantized: for what must be known of all blocks first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from subnibble.calibrate.prefix import PrefixStream, behind
from subnibble.calibrate.stream import BlockStream
from subnibble.model.skeleton import Block, Skeleton
from subnibble.model.transformers_api.blocks import BlockCall


def full_precision_blocks(
    skeleton: Skeleton,
    hidden: list[Tensor],
    calls: Sequence[BlockCall],
    prefix: PrefixStream | None = None,
) -> Iterator[tuple[Block, BlockStream]]:
    """Every block in float32, to look at and to edit, and the stream of all windows through a copy of it.

    hidden: what the embedding gives, batches (windows, tokens, channels); used up. calls: of each block. prefix:
    embedded, of a system prompt before the windows.
    """
    for index in range(skeleton.num_blocks):
        block = skeleton.load_block(index)
        twin = block.twin(skeleton.dtype)
        states = None if prefix is None else prefix.advance(block)
        stream = BlockStream(twin, hidden, behind(calls[index], states))
        yield block, stream
        stream.advance()
        skeleton.release(block.path)
