"""Run all windows through one block while its linears are rounded, so that later sites see the rounding error."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from subnibble.arch.site import Site
from subnibble.calibrate.key_center import cache_quantizer_of
from subnibble.calibrate.prefix import after_prefix
from subnibble.calibrate.stats import value_over
from subnibble.calibrate.stream import BlockStream
from subnibble.corrections.mean_shift import MeanShift
from subnibble.model.transformers_api.blocks import BlockCall, run_block
from subnibble.pipeline.observe import Quantization
from subnibble.pipeline.plan import Resolved
from subnibble.pipeline.prepare import Prepared
from subnibble.pipeline.rounded_copy import RoundedCopy
from subnibble.pipeline.streams import Streams
from subnibble.report.clock import Clock
from subnibble.runtime.kv_cache import CacheQuantizer
from subnibble.tensor.cache_scheme import CacheScheme
from subnibble.tuning.samples import Samples
from subnibble.tuning.train import held_out_loss


@dataclass
class Passage:
    """The streams of hidden states through a block whose linears are replaced by rounded ones, site after site.

    prepared: the block after the method's transforms, float32.
    rounded: a copy of the block, with the linears rounded so far.
    streams: hidden states of all windows before the block.
    clock: counts the seconds of each step.
    stream: hidden states of the quantized model through `rounded`.
    reference: hidden states of the full-precision model through an unquantized copy, None if no step needs it.
    teacher: hidden states of the quantized model through an unquantized copy, None if no step needs it.
    cache_quantizer: of the block's KV cache; None if it is not quantized, and until the key projections are rounded.
    """

    prepared: Prepared
    rounded: RoundedCopy
    streams: Streams
    clock: Clock
    stream: BlockStream
    reference: BlockStream | None
    teacher: BlockStream | None
    cache_quantizer: CacheQuantizer | None = None

    @classmethod
    def start(
        cls,
        prepared: Prepared,
        resolved: Resolved,
        streams: Streams,
        clock: Clock,
        reference: BlockStream | None = None,
    ) -> Self:
        """Start the pass through a prepared block; none of its linears is rounded yet.

        reference: the full-precision stream, if the caller has one already.
        """
        steps, dtype, teacher = resolved.steps, resolved.skeleton.dtype, None
        block, before = prepared.block.copy(dtype), after_prefix(prepared.call, prepared.states)
        if reference is None and streams.hidden and (steps.needs_reference or steps.corrects_norms):
            block_copy = prepared.block.copy(dtype)
            reference = BlockStream(block_copy, streams.full_precision, before) if steps.needs_reference else None
            teacher = BlockStream(block_copy, streams.hidden, before) if steps.corrects_norms else None
        # The KV cache is not quantized yet: `quantize_cache` is called once the key projections are rounded.
        stream = BlockStream(block, streams.hidden, before)
        return cls(prepared, RoundedCopy(block, prepared.bases), streams, clock, stream, reference, teacher)

    def at(self, site: Site, reference: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the site's tensor in batches (t, k), each with the same tokens of the full-precision model, or None.

        reference: whether to yield the full-precision tokens.
        """
        if not reference or self.reference is None:
            return zip(self.stream.at(site), itertools.repeat(None), strict=False)
        return zip(self.stream.at(site), self.reference.at(site), strict=True)

    def shift_norm(self, site: Site, norm: str, teacher: BlockStream) -> Tensor:
        """Give the site's norm a bias that cancels the mean shift caused by the linears rounded so far.

        norm: name of the norm in the block.
        teacher: see `Passage`.

        Returns the bias, (channels,) float32.
        """
        with self.clock.step("mean shift"):
            outputs = zip(teacher.at(site), self.stream.at(site), strict=True)
            gain = self.rounded.block.gain(norm)
            bias = value_over(MeanShift(gain.shape[0], gain.device), outputs).to(torch.float16).float()
            self.rounded.add_bias(norm, bias)
        return bias

    def quantize_cache(self, scheme: CacheScheme, inputs: Mapping[str, Quantization], applies: bool) -> None:
        """Compute how the block's KV cache quantizes, and quantize keys and values from now on.

        Call it once the key projections are rounded, because the mean of the keys depends on them.

        scheme: how keys and values are quantized.
        inputs: name of a key projection -> how its input is quantized at run time, if calibration does not quantize it.
        applies: whether later sites of the block see quantized keys and values.
        """
        prepared, block = self.prepared, self.rounded.block
        with self.clock.step("key center"), self.rounded.quantizing(inputs):
            self.cache_quantizer = cache_quantizer_of(block, scheme, self.streams.hidden, prepared.call)
        if applies:
            self.stream = BlockStream(block, self.streams.hidden, self._after_prefix(prepared.call))

    def _after_prefix(self, call: BlockCall) -> BlockCall:
        """The call with the prompt prefix's keys and values in its cache, and the cache quantized."""
        return after_prefix(call, self.prepared.states, self.cache_quantizer)

    def output_error(self, samples: Samples) -> float:
        """The held-out loss of the block with the linears rounded so far; see `tuning/train.py`."""
        module = self.rounded.block.module

        def output(hidden: Tensor, call: BlockCall) -> Tensor:
            dtype = next(module.parameters()).dtype
            return run_block(module, hidden.to(dtype), self._after_prefix(call))

        return held_out_loss(output, samples)

    def outputs(self) -> list[Tensor]:
        """Outputs of the block with the linears rounded so far, batches (windows, tokens, channels)."""
        with self.clock.step("forward"):
            return list(self.stream.outputs())

    def advance(self, target: list[Tensor] | None = None) -> None:
        """Advance the streams past the block: inputs are replaced by outputs.

        target: outputs of the full-precision block, if they are known already.

        Raises `SilentFailure` if a hook or a norm's bias never ran.
        """
        with self.clock.step("forward"):
            self.stream.advance()
            if self.reference is not None:
                self.reference.advance(target)
        if self.streams.prefix is not None and self.prepared.prefix is not None:
            self.streams.prefix.move(self.prepared.prefix)
        # Checked here, before the next block is quantized on these outputs.
        self.rounded.check_ran()
