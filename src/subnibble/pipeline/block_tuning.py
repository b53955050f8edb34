"""The tuning of one block inside the pipeline: samples from its streams, training, and rounding on what was learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from subnibble.calibrate.prefix import States
from subnibble.calibrate.stats import value_over
from subnibble.calibrate.stream import BlockStream
from subnibble.corrections.correction import Correction, Rounded
from subnibble.errors import NumericalFailure
from subnibble.methods.method import Steps
from subnibble.model.skeleton import Block
from subnibble.model.transformers_api.blocks import BlockCall
from subnibble.pipeline.observe import Observed
from subnibble.pipeline.plan import Plan
from subnibble.pipeline.round import Stack, round_stack
from subnibble.pipeline.streams import Streams
from subnibble.report import BlockReport
from subnibble.report.clock import Clock
from subnibble.rounding import grid
from subnibble.rounding.rounder import OnGrids, Rounder
from subnibble.rounding.rtn import RTN
from subnibble.runtime.kv_cache import Coding
from subnibble.tensor.packed import PackedRange, PackedTensor
from subnibble.transforms.input_basis import InputBasis
from subnibble.tuning.block import TunedBlock
from subnibble.tuning.linear import Frame
from subnibble.tuning.samples import Samples, TrainingWindows
from subnibble.tuning.train import Trained, held_out_loss, train_
from subnibble.tuning.tuning import EFFORTS, Tuning

# Windows over which inputs are looked at before factors start.
_LOOKED_AT = 8


@dataclass
class BlockTuning:
    """A block that was tuned, on its way through rounding.

    reference: the full-precision block on the full-precision chain, whose outputs are known. kept: linears whose
    rounding with compensation made the loss smaller than rounding to nearest.
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
            self.kept += stack.names
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
    """Tunes blocks as they come. calls: of each block, for as many tokens as the effort takes of a window. seed: of
    the recipe. dtype: of streams and products. told: is called with the number of a block and its held-out loss so far.
    """

    steps: Steps
    plan: Plan
    calls: list[BlockCall]
    seed: int
    dtype: torch.dtype
    clock: Clock
    told: Callable[[int, float], None]

    @property
    def tuning(self) -> Tuning:
        """What is learned."""
        assert self.steps.tuning is not None
        return self.steps.tuning

    def __call__(
        self,
        block: Block,
        bases: Mapping[str, InputBasis],
        prefix: States | None,
        coding: Coding | None,
        streams: Streams,
        before: BlockCall,
    ) -> BlockTuning:
        """Tune a transformed float32 `block` in place.

        bases: of its sites. prefix: its states in the block. coding: of its cache. before: the block's call behind the
        prefix.
        """
        exact = streams.wanted
        reference = BlockStream(block.twin(self.dtype), exact, before)
        with self.clock.step("forward"):
            outputs = list(reference.outputs())
        with self.clock.step("tune"):
            effort = EFFORTS[self.tuning.effort]
            device = next(block.module.parameters()).device
            call = self.calls[block.index]
            windows = TrainingWindows(effort, call, device)
            samples = value_over(windows, zip(streams.hidden, exact, outputs, strict=True))
            tuned, trained = self._train(block, self._frame(block, bases, prefix, coding), samples)
            tuned.settle_(block)
        return BlockTuning(tuned, samples, trained, reference, outputs)

    def _frame(
        self, block: Block, bases: Mapping[str, InputBasis], prefix: States | None, coding: Coding | None
    ) -> Frame:
        schemes, inputs = self.plan.of_block(block)
        rounder = self.steps.rounder
        clip = rounder.fitter if isinstance(rounder, OnGrids) and isinstance(rounder.fitter, grid.Clip) else grid.Clip()
        return Frame(schemes, inputs, bases, coding, prefix, self.steps.correction, clip, self.dtype)

    def _train(self, block: Block, frame: Frame, samples: Samples) -> tuple[TunedBlock, Trained]:
        # Every block draws its own numbers.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + block.index) % 2**63)
        tuned = TunedBlock(block, frame, self.tuning, generator)
        plain = held_out_loss(tuned, samples)
        if not math.isfinite(plain):
            raise NumericalFailure(
                f"{block.path}: its outputs on quantized inputs are not finite: activations leave the range of "
                f'{str(self.dtype).removeprefix("torch.")}; use more bits, or dtype = "float32"'
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
