"""The tuning of one block inside the pipeline: samples from its streams, training, rounding on what was learned, and
the choice between that and the method's own block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from subnibble.calibrate.key_center import coding_of
from subnibble.calibrate.prefix import behind
from subnibble.calibrate.stats import value_over
from subnibble.calibrate.stream import BlockStream
from subnibble.corrections.correction import Correction, Rounded
from subnibble.errors import NumericalFailure
from subnibble.model.skeleton import Block
from subnibble.model.transformers_api.blocks import BlockCall
from subnibble.pipeline.observe import Observed
from subnibble.pipeline.passage import Passage
from subnibble.pipeline.plan import Plan, Resolved
from subnibble.pipeline.prepare import Prepared
from subnibble.pipeline.round import RoundedBlock, Stack, round_block, round_stack
from subnibble.pipeline.streams import Streams, past
from subnibble.report import BlockReport
from subnibble.report.clock import Clock
from subnibble.rounding import grid
from subnibble.rounding.rounder import OnGrids, Rounder
from subnibble.rounding.rtn import RTN
from subnibble.runtime.kv_cache import Coding
from subnibble.tensor.cache_scheme import PrefixIds
from subnibble.tensor.packed import PackedRange, PackedTensor
from subnibble.tuning.block import TunedBlock
from subnibble.tuning.linear import Frame
from subnibble.tuning.samples import Samples, TrainingWindows
from subnibble.tuning.train import Trained, held_out_loss, train_
from subnibble.tuning.tuning import EFFORTS, Tuning

# Windows over which inputs are looked at before factors start.
_LOOKED_AT = 8


@dataclass(frozen=True)
class BlockTuning:
    """A block that was tuned, on its way through rounding.

    reference: the full-precision block on the full-precision chain, whose outputs are known. kept: filled while it is
    rounded, linears whose rounding with compensation made the loss smaller than rounding to nearest.
    """

    block: TunedBlock
    samples: Samples
    trained: Trained
    reference: BlockStream
    outputs: list[Tensor]
    kept: list[str] = field(default_factory=list)

    def round(self, stack: Stack, weight: Tensor, seen: Observed, rounder: Rounder, correction: Correction) -> Rounded:
        """As `round_stack`, on the learned grids: by `rounder` or to nearest, whichever leaves the lower loss."""
        grids = self.block.grids(stack.names)
        tried = [round_stack(stack, weight, seen, RTN(grids), correction)]
        compensating = rounder.on(grids) if rounder.needs_gram else None
        if compensating is not None:
            tried.append(round_stack(stack, weight, seen, compensating, correction))
        losses = []
        for _, whole, salient in tried:
            self._fix_(stack, whole, salient)
            losses.append(held_out_loss(self.block, self.samples))
        best = losses.index(min(losses))
        if best > 0:
            self.kept.extend(stack.names)
        found = tried[best]
        self._fix_(stack, found[1], found[2])
        return found

    def plan(self, plan: Plan, path: str) -> Plan:
        """The plan, with clips of this block's inputs as learned. path: the block's."""
        own = {f"{path}.{name}": scheme for name, scheme in self.block.activations().items()}
        return replace(plan, activations={**plan.activations, **own})

    def report(self, path: str, after: float, base: float) -> BlockReport:
        """What the report says of the block. after, base: see `BlockReport`."""
        trained = self.trained
        return BlockReport(
            path, trained.before, trained.after, after, base, trained.epochs, trained.rollbacks, trained.left_out,
            tuple(self.kept),
        )  # fmt: skip

    def _fix_(self, stack: Stack, whole: PackedTensor, salient: PackedRange | None) -> None:
        dense, second = whole.dequantize(), None if salient is None else salient.dequantize()
        if second is not None:
            dense[:, : second.shape[1]] += second
        for name, index in zip(stack.names, stack.rows(dense.device), strict=True):
            self.block.fix_(name, dense[index], None if second is None else second[index])


@dataclass(frozen=True)
class Tuner:
    """Tunes blocks as they come. calls: of each block, for as many tokens as the effort takes of a window. told: is
    called with the number of a block and its held-out loss so far.
    """

    resolved: Resolved
    tuning: Tuning
    calls: list[BlockCall]
    clock: Clock
    told: Callable[[int, float], None]

    @classmethod
    def of(
        cls, resolved: Resolved, prefix: PrefixIds | None, clock: Clock, told: Callable[[int, float], None]
    ) -> Self | None:
        """The tuner of a method's blocks, None if it tunes none. prefix: before the windows."""
        tuning = resolved.steps.tuning
        if tuning is None:
            return None
        tokens = min(EFFORTS[tuning.effort].tokens, resolved.recipe.window)
        return cls(resolved, tuning, resolved.skeleton.block_calls(tokens, past=past(prefix)), clock, told)

    def tunes(self, block: Block) -> bool:
        """Whether anything of a block will be rounded."""
        return any(scheme is not None for scheme in self.resolved.plan.of_block(block)[0].values())

    def __call__(self, prepared: Prepared, streams: Streams) -> BlockTuning:
        """Tune a prepared block in place."""
        block, call, exact = prepared.block, prepared.call, streams.full_precision
        dtype = self.resolved.skeleton.dtype
        with self.clock.step("key center"):
            coding = coding_of(block.twin(dtype), self.resolved.plan.cache, streams.hidden, call)
        reference = BlockStream(block.twin(dtype), exact, behind(call, prepared.states))
        with self.clock.step("forward"):
            outputs = list(reference.outputs())
        with self.clock.step("tune"):
            effort = EFFORTS[self.tuning.effort]
            device = next(block.module.parameters()).device
            windows = TrainingWindows(effort, self.calls[block.index], device)
            samples = value_over(windows, zip(streams.hidden, exact, outputs, strict=True))
            tuned, trained = self._train(block, self._frame(prepared, coding), samples)
            tuned.settle_(block)
        return BlockTuning(tuned, samples, trained, reference, outputs)

    def _frame(self, prepared: Prepared, coding: Coding | None) -> Frame:
        steps, dtype = self.resolved.steps, self.resolved.skeleton.dtype
        schemes, inputs = self.resolved.plan.of_block(prepared.block)
        rounder = steps.rounder
        clip = rounder.fitter if isinstance(rounder, OnGrids) and isinstance(rounder.fitter, grid.Clip) else grid.Clip()
        return Frame(schemes, inputs, prepared.bases, coding, prepared.states, steps.correction, clip, dtype)

    def _train(self, block: Block, frame: Frame, samples: Samples) -> tuple[TunedBlock, Trained]:
        # Every block draws its own numbers.
        seed = (self.resolved.recipe.seed * 1_000_003 + block.index) % 2**63
        generator = torch.Generator().manual_seed(seed)
        tuned = TunedBlock(block, frame, self.tuning, generator)
        plain = held_out_loss(tuned, samples)
        if not math.isfinite(plain):
            dtype = str(self.resolved.skeleton.dtype).removeprefix("torch.")
            raise NumericalFailure(
                f"{block.path}: its outputs on quantized inputs are not finite: activations leave the range of "
                f'{dtype}; use more bits, or dtype = "float32"'
            )
        if self.tuning.smoothing != "none":
            few = slice(0, min(_LOOKED_AT, samples.trained))
            largest = tuned.largest(samples.inputs[few].float(), samples.call, samples.ordinary[few])
            tuned.smooth_(block, largest)
            if not held_out_loss(tuned, samples) <= plain:
                tuned.forget_smoothing_start_()
        effort = EFFORTS[self.tuning.effort]
        trained = train_(tuned, samples, effort, generator, lambda loss: self.told(block.index, loss))
        return tuned, replace(trained, before=plain)


@dataclass(frozen=True)
class Candidate:
    """One way to round a block, and the windows' passage through it."""

    passage: Passage
    rounded: RoundedBlock


def round_tuned(
    prepared: Prepared, resolved: Resolved, streams: Streams, tuner: Tuner, on_site: Callable[[int, str], None]
) -> tuple[RoundedBlock, BlockReport]:
    """Tune a block and round it; the method's own block without tuning is a candidate, too. Streams are moved behind
    the one that is given. on_site: see `round_block`.
    """
    own = prepared.twin()
    tuning = tuner(prepared, streams)
    learned = replace(resolved, plan=tuning.plan(resolved.plan, prepared.block.path))
    # The prompt's states are now those of the tuned block.
    passage = Passage.start(prepared.with_states(tuning.block.prefix), learned, streams, tuner.clock, tuning.reference)

    def rounds(stack: Stack, weight: Tensor, seen: Observed, rounder: Rounder, correction: Correction) -> Rounded:
        if passage.coding is not None:
            tuning.block.use_coding(passage.coding)
        return tuning.round(stack, weight, seen, rounder, correction)

    tuned = Candidate(passage, round_block(passage, learned, rounds, on_site))
    plain = Passage.start(own, resolved, streams, tuner.clock, tuning.reference)
    base = Candidate(plain, round_block(plain, resolved, round_stack, lambda number, site: None))
    kept, report = better(tuning, tuned, base)
    kept.passage.advance(tuning.outputs)
    return kept.rounded, report


def better(tuning: BlockTuning, tuned: Candidate, base: Candidate) -> tuple[Candidate, BlockReport]:
    """Of a block that was tuned and the same block without tuning, both rounded, the one to keep: of the smaller loss
    on held-out windows, as the block runs.
    """
    losses = tuned.passage.output_error(tuning.samples), base.passage.output_error(tuning.samples)
    # Written so that a loss that is not finite is not kept.
    kept = tuned if losses[0] <= losses[1] or not math.isfinite(losses[1]) else base
    return kept, tuning.report(tuned.rounded.block.path, *losses)
