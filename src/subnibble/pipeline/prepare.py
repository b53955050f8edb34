"""Apply the method's transforms to a block, before it is tuned and rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from subnibble.arch.site import Site
from subnibble.calibrate.prefix import PrefixStep, States, after_prefix
from subnibble.calibrate.stream import BlockStream, SiteStatistics
from subnibble.errors import NumericalFailure
from subnibble.methods.method import Steps
from subnibble.model.skeleton import Block
from subnibble.model.transformers_api.blocks import BlockCall
from subnibble.pipeline.plan import Resolved
from subnibble.pipeline.streams import Streams
from subnibble.report.clock import Clock
from subnibble.tensor.hadamard import hadamard_blocks
from subnibble.transforms.input_basis import InputBasis


@dataclass(frozen=True)
class Prepared:
    """A block after the transforms.

    block: the float32 block, whose weights are rounded. Forward passes run on copies in the compute type.
    bases: name of a site -> channel order and Hadamard transform of its readers' input.
    call: arguments of the block's forward pass.
    prefix: keys, values and output of the block for the system prompt, or None.
    """

    block: Block
    bases: Mapping[str, InputBasis]
    call: BlockCall
    prefix: PrefixStep | None

    @property
    def states(self) -> States | None:
        """Keys and values of the system prompt in this block, (heads, tokens, width) each, or None."""
        return None if self.prefix is None else self.prefix.states

    def copy(self) -> Prepared:
        """The same values with a copy of the block, so that later edits of the block do not reach it."""
        return replace(self, block=self.block.copy())

    def with_states(self, states: States | None) -> Prepared:
        """The same values with other keys and values of the system prompt, (heads, tokens, width) each."""
        if self.prefix is None or states is None:
            return self
        return replace(self, prefix=replace(self.prefix, states=states))


def prepare(block: Block, resolved: Resolved, streams: Streams, clock: Clock) -> Prepared:
    """Apply the method's transforms to a loaded float32 block, in place.

    streams: hidden states before the block; read for statistics if a transform needs them.
    """
    steps, call, prefix, statistics = resolved.steps, streams.calls[block.index], streams.prefix, None
    if steps.needs_survey:
        with clock.step("forward"):
            schemes = resolved.plan.of_block(block)
            before = after_prefix(call, None if prefix is None else prefix.run(block).states)
            statistics = BlockStream(block.copy(resolved.skeleton.dtype), streams.hidden, before).statistics(*schemes)
    with clock.step("transform"):
        bases = _transform_(block, steps, statistics)
    with clock.step("prefix"):
        step = None if prefix is None else prefix.run(block)
    return Prepared(block, bases, call, step)


def _transform_(block: Block, steps: Steps, statistics: SiteStatistics | None) -> dict[str, InputBasis]:
    """Apply the transforms in place; return site name -> basis of the site's input.

    statistics: of the block before the transforms, None if no step needs them.
    """
    bases = {site.name: _online(block, site, steps) for site in block.arch.sites}
    if statistics is None:
        return bases
    for transform in steps.transforms:
        try:
            transform(block, statistics)
        except NumericalFailure as error:
            # A transform's search may call a rounder, which does not know the block's path; it is added here.
            raise NumericalFailure(f"{block.path}: {str(error).removeprefix(block.path).lstrip()}") from error
    if steps.saliency is not None:
        for site in block.arch.sites:
            order = steps.saliency(block, site, statistics)
            bases[site.name] = replace(bases[site.name], order=order)
    return bases


def _online(block: Block, site: Site, steps: Steps) -> InputBasis:
    """The basis of the site's input without a channel order: an online Hadamard transform if the method asks for it."""
    width = block.linear(site.readers[0]).in_features
    return InputBasis(blocks=hadamard_blocks(width) if site.name in steps.online else ())
