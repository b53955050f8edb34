"""The full-precision model block by block, before anything is quantized: for what must be known of all blocks first."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from subnibble.calibrate.stream import BlockStream
from subnibble.model.skeleton import Block, Skeleton


def full_precision_blocks(
    skeleton: Skeleton, hidden: list[Tensor], arguments: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Block, BlockStream]]:
    """Every block in float32, to look at and to edit, and the stream of all windows through a copy of it.

    hidden: what the embedding gives, batches (windows, tokens, channels); used up. arguments: of each block.
    """
    for index in range(skeleton.num_blocks):
        block = skeleton.load_block(index)
        twin = replace(block, module=copy.deepcopy(block.module).to(skeleton.dtype))
        stream = BlockStream(twin, hidden, dict(arguments[index]))
        yield block, stream
        stream.advance()
        skeleton.release(block.path)
