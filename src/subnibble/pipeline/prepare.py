"""A block after the method's transforms, before anything of it is learned or rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from subnibble.arch.site import Site
from subnibble.calibrate.prefix import PrefixStep, States, behind
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
    """A transformed float32 block: these weights are rounded, not their copies in the compute type.

    bases: in which readers meet their inputs, by name of the site. call: what the model calls the block with. prefix:
    what the block makes of the system prompt, or None.
    """

    block: Block
    bases: Mapping[str, InputBasis]
    call: BlockCall
    prefix: PrefixStep | None

    @property
    def states(self) -> States | None:
        """The prompt's keys and values in the block, (heads, tokens, width) each, or None."""
        return None if self.prefix is None else self.prefix.states

    def twin(self) -> Prepared:
        """The same with a copy of the block, which stays as it is."""
        return replace(self, block=self.block.twin())

    def with_states(self, states: States | None) -> Prepared:
        """The same with other keys and values of the prompt."""
        if self.prefix is None or states is None:
            return self
        return replace(self, prefix=replace(self.prefix, states=states))


def prepare(block: Block, resolved: Resolved, streams: Streams, clock: Clock) -> Prepared:
    """Survey a loaded float32 block, if a step asks, and carry out the method's transforms on it, in place."""
    steps, call, prefix, found = resolved.steps, streams.calls[block.index], streams.prefix, None
    if steps.needs_survey:
        with clock.step("forward"):
            own = resolved.plan.of_block(block)
            before = behind(call, None if prefix is None else prefix.run(block).states)
            found = BlockStream(block.twin(resolved.skeleton.dtype), streams.hidden, before).statistics(*own)
    with clock.step("transform"):
        bases = _transform_(block, steps, found)
    with clock.step("prefix"):
        step = None if prefix is None else prefix.run(block)
    return Prepared(block, bases, call, step)


def _transform_(block: Block, steps: Steps, found: SiteStatistics | None) -> dict[str, InputBasis]:
    """Carry out the transforms; the bases in which readers meet their sites' tensors.

    found: statistics before, None where no step needs them.
    """
    bases = {site.name: _online(block, site, steps) for site in block.arch.sites}
    if found is None:
        return bases
    for transform in steps.transforms:
        try:
            transform(block, found)
        except NumericalFailure as error:
            # What rounds for a transform's search knows of no block.
            raise NumericalFailure(f"{block.path}: {str(error).removeprefix(block.path).lstrip()}") from error
    if steps.saliency is not None:
        for site in block.arch.sites:
            order = steps.saliency(block, site, found)
            bases[site.name] = replace(bases[site.name], order=order)
    return bases


def _online(block: Block, site: Site, steps: Steps) -> InputBasis:
    width = block.linear(site.readers[0]).in_features
    return InputBasis(blocks=hadamard_blocks(width) if site.name in steps.online else ())
