"""Tune one block inside the pipeline.

Take training samples from the streams, train, round on the learned grids, and keep the tuned block unless the block
without tuning has the lower held-out loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from subnibble.calibrate.key_center import cache_quantizer_of
from subnibble.calibrate.prefix import after_prefix
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
from subnibble.pipeline.streams import Streams, prefix_length
from subnibble.report import BlockReport
from subnibble.report.clock import Clock
from subnibble.rounding import grid
from subnibble.rounding.fixed import FixedGrids
from subnibble.rounding.rounder import OnGrids, Rounder
from subnibble.rounding.rtn import RTN
from subnibble.runtime.kv_cache import CacheQuantizer
from subnibble.tensor.cache_scheme import PrefixIds
from subnibble.tensor.packed import PackedRange, PackedTensor
from subnibble.tuning.block import TunedBlock
from subnibble.tuning.linear import BlockContext
from subnibble.tuning.samples import Samples, TrainingWindows
from subnibble.tuning.settle import settle_
from subnibble.tuning.smoothing_start import max_abs_inputs, smooth_, start_at_one_
from subnibble.tuning.train import Trained, held_out_loss, train_
from subnibble.tuning.tuning import EFFORTS, Tuning

# Windows whose max_abs input magnitudes give smoothing factors their start.
_SMOOTHING_WINDOWS = 8


@dataclass(frozen=True)
class BlockTuning:
    """A tuned block that is being rounded.

    block: the block with its learned parameters.
    samples: training and held-out windows.
    trained: losses and counts of the training.
    reference: the full-precision block on the full-precision hidden states.
    outputs: outputs of `reference`, batches (windows, tokens, channels).
    compensated: names of linears that the rounder with error compensation rounded with less loss than round-to-nearest;
        filled during rounding.
    """

    block: TunedBlock
    samples: Samples
    trained: Trained
    reference: BlockStream
    outputs: list[Tensor]
    compensated: list[str] = field(default_factory=list)

    def round(
        self, stack: Stack, weight: Tensor, observed: Observed, rounder: Rounder, correction: Correction
    ) -> Rounded:
        """Round a stack on the learned grids, by `rounder` or to nearest, whichever gives the lower held-out loss.

        Arguments and result are those of `round_stack`. weight: (m, k) float32.
        """
        grids = FixedGrids.stacked([self.block.linears[name].fitted() for name in stack.names])
        attempts = [round_stack(stack, weight, observed, RTN(grids), correction)]
        compensating = rounder.with_fitter(grids) if rounder.needs_gram else None
        if compensating is not None:
            attempts.append(round_stack(stack, weight, observed, compensating, correction))
        losses = []
        for _, main, salient in attempts:
            self._fix_(stack, main, salient)
            losses.append(held_out_loss(self.block, self.samples))
        best = losses.index(min(losses))
        if best > 0:
            self.compensated.extend(stack.names)
        rounded = attempts[best]
        self._fix_(stack, rounded[1], rounded[2])
        return rounded

    def plan(self, plan: Plan, path: str) -> Plan:
        """Return a copy of `plan` with the learned input clips of this block. path: module path of the block."""
        learned = {f"{path}.{name}": linear.activation for name, linear in self.block.linears.items()}
        return replace(plan, activations={**plan.activations, **learned})

    def report(self, path: str, after: float, base: float) -> BlockReport:
        """The block's entry in the report.

        path: module path of the block.
        after: held-out loss of the tuned block, rounded.
        base: held-out loss of the block without tuning, rounded.
        """
        trained = self.trained
        return BlockReport(
            path, trained.before, trained.after, after, base, trained.epochs, trained.rollbacks, trained.left_out,
            tuple(self.compensated),
        )  # fmt: skip

    def _fix_(self, stack: Stack, main: PackedTensor, salient: PackedRange | None) -> None:
        """Let the linears of the stack run on their rounded weights."""
        dense, salient_weight = main.dequantize(), None if salient is None else salient.dequantize()
        if salient_weight is not None:
            dense[:, : salient_weight.shape[1]] += salient_weight
        for name, index in zip(stack.names, stack.rows(dense.device), strict=True):
            self.block.linears[name].fix_(dense[index], None if salient_weight is None else salient_weight[index])


@dataclass(frozen=True)
class Tuner:
    """Tunes block after block.

    resolved: the recipe on the model.
    tuning: the method's tuning settings.
    calls: arguments of each block's forward pass, for the tokens of a window that the effort trains on.
    clock: counts the seconds of each step.
    on_loss: called with the index of a block and its best held-out loss so far.
    """

    resolved: Resolved
    tuning: Tuning
    calls: list[BlockCall]
    clock: Clock
    on_loss: Callable[[int, float], None]

    @classmethod
    def of(
        cls, resolved: Resolved, prefix: PrefixIds | None, clock: Clock, on_loss: Callable[[int, float], None]
    ) -> Self | None:
        """Build the tuner, None if the method does not tune. prefix: prompt prefix before the windows, or None."""
        tuning = resolved.steps.tuning
        if tuning is None:
            return None
        tokens = min(EFFORTS[tuning.effort].tokens, resolved.recipe.window)
        return cls(
            resolved, tuning, resolved.skeleton.block_calls(tokens, prefix_length=prefix_length(prefix)), clock, on_loss
        )

    def tunes(self, block: Block) -> bool:
        """Whether the block is tuned: at least one of its linears will be rounded."""
        return any(scheme is not None for scheme in self.resolved.plan.of_block(block)[0].values())

    def __call__(self, prepared: Prepared, streams: Streams) -> BlockTuning:
        """Tune a prepared block in place. streams: read only; the hidden states are not advanced."""
        block, call, exact = prepared.block, prepared.call, streams.full_precision
        dtype = self.resolved.skeleton.dtype
        with self.clock.step("key center"):
            cache_quantizer = cache_quantizer_of(block.copy(dtype), self.resolved.plan.cache, streams.hidden, call)
        reference = BlockStream(block.copy(dtype), exact, after_prefix(call, prepared.states))
        with self.clock.step("forward"):
            outputs = list(reference.outputs())
        with self.clock.step("tune"):
            effort = EFFORTS[self.tuning.effort]
            device = next(block.module.parameters()).device
            windows = TrainingWindows(effort, self.calls[block.index], device)
            samples = value_over(windows, zip(streams.hidden, exact, outputs, strict=True))
            tuned, trained = self._train(block, self._context(prepared, cache_quantizer), samples)
            settle_(tuned, block)
        return BlockTuning(tuned, samples, trained, reference, outputs)

    def _context(self, prepared: Prepared, cache_quantizer: CacheQuantizer | None) -> BlockContext:
        steps, dtype = self.resolved.steps, self.resolved.skeleton.dtype
        schemes, inputs = self.resolved.plan.of_block(prepared.block)
        rounder = steps.rounder
        clip = rounder.fitter if isinstance(rounder, OnGrids) and isinstance(rounder.fitter, grid.Clip) else grid.Clip()
        return BlockContext(
            schemes, inputs, prepared.bases, cache_quantizer, prepared.states, steps.correction, clip, dtype
        )

    def _train(self, block: Block, context: BlockContext, samples: Samples) -> tuple[TunedBlock, Trained]:
        # A seed of its own for every block, so that blocks do not share random numbers.
        seed = (self.resolved.recipe.seed * 1_000_003 + block.index) % 2**63
        generator = torch.Generator().manual_seed(seed)
        tuned = TunedBlock(block, context, self.tuning, generator)
        plain = held_out_loss(tuned, samples)
        if not math.isfinite(plain):
            dtype = str(self.resolved.skeleton.dtype).removeprefix("torch.")
            raise NumericalFailure(
                f"{block.path}: the outputs of the block on quantized inputs are not finite, because activations "
                f'leave the range of {dtype}; use more bits, or dtype = "float32"'
            )
        if self.tuning.smoothing != "none":
            first = slice(0, min(_SMOOTHING_WINDOWS, samples.trained))
            inputs, ordinary = samples.inputs[first].float(), samples.ordinary[first]
            max_abs = max_abs_inputs(tuned, block, inputs, samples.call, ordinary)
            smooth_(tuned, block, context.correction.outliers, max_abs)
            if not held_out_loss(tuned, samples) <= plain:
                start_at_one_(tuned)
        effort = EFFORTS[self.tuning.effort]
        trained = train_(tuned, samples, effort, generator, lambda loss: self.on_loss(block.index, loss))
        return tuned, replace(trained, before=plain)


@dataclass(frozen=True)
class Candidate:
    """One rounded version of a block. passage: the windows' forward pass through it."""

    passage: Passage
    rounded: RoundedBlock


def round_tuned(
    prepared: Prepared, resolved: Resolved, streams: Streams, tuner: Tuner, on_site: Callable[[int, str], None]
) -> tuple[RoundedBlock, BlockReport]:
    """Tune a block and round it; round a copy without tuning, too; return the better one and its report.

    streams: advanced past the block that is returned.
    on_site: called with the number of finished sites and the name of the last one.
    """
    untuned = prepared.copy()
    tuning = tuner(prepared, streams)
    learned = replace(resolved, plan=tuning.plan(resolved.plan, prepared.block.path))
    # Tuning changed the block, so the prompt prefix has other keys and values now.
    passage = Passage.start(
        prepared.with_states(tuning.block.cache.prefix), learned, streams, tuner.clock, tuning.reference
    )

    def round_tuned_stack(
        stack: Stack, weight: Tensor, observed: Observed, rounder: Rounder, correction: Correction
    ) -> Rounded:
        if passage.cache_quantizer is not None:
            tuning.block.cache.quantizer = passage.cache_quantizer
        return tuning.round(stack, weight, observed, rounder, correction)

    tuned = Candidate(passage, round_block(passage, learned, round_tuned_stack, on_site))
    base_passage = Passage.start(untuned, resolved, streams, tuner.clock, tuning.reference)
    base = Candidate(base_passage, round_block(base_passage, resolved, round_stack, lambda number, site: None))
    best, report = better(tuning, tuned, base)
    best.passage.advance(tuning.outputs)
    return best.rounded, report


def better(tuning: BlockTuning, tuned: Candidate, base: Candidate) -> tuple[Candidate, BlockReport]:
    """Choose between the tuned and the untuned block, both rounded, by their loss on held-out windows.

    Return the chosen one and the block's report. Losses are those of the block with its runtime operations.
    """
    losses = tuned.passage.output_error(tuning.samples), base.passage.output_error(tuning.samples)
    # A comparison with NaN is False, so a tuned block of loss NaN loses to a base of finite loss.
    chosen = tuned if losses[0] <= losses[1] or not math.isfinite(losses[1]) else base
    return chosen, tuning.report(tuned.rounded.block.path, *losses)
