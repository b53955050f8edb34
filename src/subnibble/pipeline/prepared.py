"""A block after the method's transforms: the start of every way to quantize it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from subnibble.calibrate.prefix import PrefixStep, behind
from subnibble.calibrate.stream import BlockStream
from subnibble.methods.method import Steps
from subnibble.model.skeleton import Block
from subnibble.model.transformers_api.blocks import BlockCall
from subnibble.pipeline.block_transforms import prepare_block_
from subnibble.pipeline.plan import Plan
from subnibble.pipeline.streams import Streams
from subnibble.report.clock import Clock
from subnibble.transforms.input_basis import InputBasis


@dataclass(frozen=True)
class Prepared:
    """A transformed float32 block, before anything of it is learned or rounded.

    bases: in which readers meet their inputs, by name of the site. call: what the model calls the block with. prefix:
    what the block makes of the system prompt, or None.
    """

    block: Block
    bases: Mapping[str, InputBasis]
    call: BlockCall
    prefix: PrefixStep | None

    def twin(self) -> Prepared:
        """The same with a copy of the block, which stays as it is."""
        return replace(self, block=self.block.twin())


def prepare(block: Block, steps: Steps, plan: Plan, clock: Clock, streams: Streams, dtype: torch.dtype) -> Prepared:
    """Survey a loaded float32 block, if a step asks, and carry out the method's transforms on it, in place.

    dtype: of the streams.
    """
    call, prefix, found = streams.calls[block.index], streams.prefix, None
    if steps.needs_survey:
        with clock.step("forward"):
            own = plan.of_block(block)
            before = behind(call, None if prefix is None else prefix.run(block).states)
            found = BlockStream(block.twin(dtype), streams.hidden, before).statistics(*own)
    with clock.step("transform"):
        bases = prepare_block_(block, steps, found)
    with clock.step("prefix"):
        return Prepared(block, bases, call, None if prefix is None else prefix.run(block))
