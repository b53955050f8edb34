"""All windows on their way through one block while its linears are rounded: what each site sees by then."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Self

import torch
from torch import Tensor

from subnibble.arch.site import Site
from subnibble.calibrate.key_center import coding_of
from subnibble.calibrate.prefix import behind
from subnibble.calibrate.stats import value_over
from subnibble.calibrate.stream import BlockStream
from subnibble.corrections.mean_shift import MeanShift
from subnibble.model.skeleton import Block
from subnibble.model.transformers_api.blocks import BlockCall, run_block
from subnibble.model.transformers_api.names import never_called
from subnibble.pipeline.input_hook import InputHook
from subnibble.pipeline.observe import Quantization, View, quantized_input
from subnibble.pipeline.plan import Resolved
from subnibble.pipeline.prepare import Prepared
from subnibble.pipeline.streams import Streams
from subnibble.report.clock import Clock
from subnibble.runtime.kv_cache import Coding
from subnibble.runtime.modules import add_output_bias_, never_ran
from subnibble.tensor.cache_scheme import CacheScheme
from subnibble.tuning.samples import Samples
from subnibble.tuning.train import held_out_loss


@dataclass
class Passage:
    """A block that gets its rounded linears one site after the other, and the streams through it.

    block: a copy of the prepared one in the compute type. stream: of the quantized model's hidden states through it.
    reference: of the full-precision model's, through a full-precision copy. teacher: of the quantized model's, through
    such a copy. The last two are None where no step asks. coding: how the block's cache quantizes, None until its keys
    are as they will run. hooks: on the block, they quantize inputs.
    """

    prepared: Prepared
    block: Block
    streams: Streams
    clock: Clock
    stream: BlockStream
    reference: BlockStream | None
    teacher: BlockStream | None
    coding: Coding | None = None
    hooks: list[InputHook] = field(default_factory=list)

    @classmethod
    def start(
        cls,
        prepared: Prepared,
        resolved: Resolved,
        streams: Streams,
        clock: Clock,
        reference: BlockStream | None = None,
    ) -> Self:
        """Before anything of a prepared block is rounded. reference: if there is one already."""
        steps, dtype, teacher = resolved.steps, resolved.skeleton.dtype, None
        block, before = prepared.block.twin(dtype), behind(prepared.call, prepared.states)
        if reference is None and streams.hidden and (steps.needs_reference or steps.corrects_norms):
            twin = prepared.block.twin(dtype)
            reference = BlockStream(twin, streams.full_precision, before) if steps.needs_reference else None
            teacher = BlockStream(twin, streams.hidden, before) if steps.corrects_norms else None
        # Until keys are as they will run there is no cache to ask: `use_cache` comes then.
        stream = BlockStream(block, streams.hidden, before)
        return cls(prepared, block, streams, clock, stream, reference, teacher)

    def at(self, site: Site, reference: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The site's tensor, batches (t, k), and the full-precision model's if `reference` is asked for, else None."""
        if not reference or self.reference is None:
            return zip(self.stream.at(site), itertools.repeat(None), strict=False)
        return zip(self.stream.at(site), self.reference.at(site), strict=True)

    def shift_norm(self, site: Site, norm: str, teacher: BlockStream) -> Tensor:
        """Give the site's norm the bias that undoes the mean shift of what was rounded before; (channels,) float32."""
        with self.clock.step("mean shift"):
            outputs = zip(teacher.at(site), self.stream.at(site), strict=True)
            gain = self.block.gain(norm)
            bias = value_over(MeanShift(gain.shape[0], gain.device), outputs).to(torch.float16).float()
            add_output_bias_(self.block.module.get_submodule(norm), bias.to(gain.dtype))
        return bias

    def put(self, name: str, dense: Tensor, view: View) -> None:
        """Let the block run on a rounded weight (m, k). view: how its input is quantized from here on."""
        weight = self.block.linear(name).weight
        weight.data = dense.to(weight.dtype)
        if view is not None:
            self.hooks.append(self._hook(name, view))

    def use_cache(self, scheme: CacheScheme, inputs: Mapping[str, Quantization], seen: bool) -> None:
        """From here on code the keys and values by `scheme`. Keys are as they will run by now.

        inputs: how those of linears that write keys are quantized, where calibration does not. seen: whether the rest
        of the block sees the codes.
        """
        prepared = self.prepared
        with self.clock.step("key center"), self._quantizing(inputs):
            self.coding = coding_of(self.block, scheme, self.streams.hidden, prepared.call)
        if seen:
            self.stream = BlockStream(self.block, self.streams.hidden, self._behind(prepared.call))

    @contextmanager
    def _quantizing(self, inputs: Mapping[str, Quantization]) -> Iterator[None]:
        hooks = [self._hook(name, how) for name, how in inputs.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.handle.remove()

    def _hook(self, name: str, view: Quantization) -> InputHook:
        block, basis = self.block, self.prepared.bases[self.block.arch.site_of(name).name]
        quantize = partial(quantized_input, view=view, basis=basis)
        return InputHook(f"the quantized input of {block.path}.{name}", block.linear(name), quantize)

    def _behind(self, call: BlockCall) -> BlockCall:
        return behind(call, self.prepared.states, self.coding)

    def output_error(self, samples: Samples) -> float:
        """The held-out loss of the block as it is now, on its own operations; see `tuning/train.py`."""
        module = self.block.module

        def output(hidden: Tensor, call: BlockCall) -> Tensor:
            kind = next(module.parameters()).dtype
            return run_block(module, hidden.to(kind), self._behind(call))

        return held_out_loss(output, samples)

    def outputs(self) -> list[Tensor]:
        """The block's outputs as it is now."""
        with self.clock.step("forward"):
            return list(self.stream.outputs())

    def advance(self, target: list[Tensor] | None = None) -> None:
        """Move the streams to behind the block. target: outputs of the full-precision one, where they are known."""
        with self.clock.step("forward"):
            self.stream.advance()
            if self.reference is not None:
                self.reference.advance(target)
        if self.streams.prefix is not None and self.prepared.prefix is not None:
            self.streams.prefix.move(self.prepared.prefix)
        # Before the next block is made of these outputs.
        idle = [hook.path for hook in self.hooks if not hook.runs]
        idle += [f"the bias of {self.block.path}.{path}" for path in never_ran(self.block.module)]
        if idle:
            raise never_called(idle[0])
