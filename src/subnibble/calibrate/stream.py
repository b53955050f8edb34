"""Stream all calibration windows through a block, stopping at each site in data-flow order.

At a site, every batch of windows runs up to the site's first reader, whose input is handed out. If the site ends a
module (`Site.tail`), the input is also kept: later passes apply only the reader, by then quantized, to it, so that
attention and MLP are each computed once. No forward pass runs twice for the same statistic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subnibble.arch.site import Site, Tail
from subnibble.calibrate.stats import AbsMax, AbsMean, Gram, Sample
from subnibble.errors import NumericalFailure
from subnibble.model.skeleton import Block
from subnibble.model.transformers_api.blocks import BlockCall, run_block
from subnibble.model.transformers_api.names import never_called
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.scheme import Scheme

# Tokens of a site that are sampled for searches.
_SAMPLES = 1024


@dataclass(frozen=True)
class SiteStatistics:
    """What transforms may know about a block before it is quantized; see `stats.py`.

    grams: site name -> Gram matrix, (channels, channels).
    mean_abs: site name -> mean magnitude of each channel, (channels,).
    max_abs: site name -> largest magnitude of each channel, (channels,).
    samples: site name -> sampled activations, (tokens, channels) float32, spread evenly over the text.
    schemes: linear -> scheme of its weight, None if the weight is not quantized.
    activations: linear -> scheme of its input, None if the input is not quantized.
    """

    grams: Mapping[str, Tensor]
    mean_abs: Mapping[str, Tensor]
    max_abs: Mapping[str, Tensor]
    samples: Mapping[str, Tensor]
    schemes: Mapping[str, Scheme | None]
    activations: Mapping[str, ActivationScheme | None]


class BlockStream:
    """The forward passes of all windows through one block.

    block: the block, on the device that computes.
    hidden: inputs of the block, batches (windows, tokens, channels); `advance` overwrites them with the outputs.
        Activations stay on the device of `hidden`, and visit the block's device one batch at a time, so that an
        accelerator need not hold all of them.
    call: arguments of the block, from `Skeleton.block_calls`.
    """

    def __init__(self, block: Block, hidden: list[Tensor], call: BlockCall) -> None:
        self._block, self._hidden, self._call = block, hidden, call
        self._device = next(block.module.parameters()).device
        self._replays: dict[Tail, _Replay] = {}

    def at(self, site: Site) -> Iterator[Tensor]:
        """Yield the activations at a site batch by batch, (tokens, channels) each.

        Consume all batches: only then are they kept for later sites.
        """
        inputs: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.append(args[0])
            raise _SiteReached

        reader = self._block.linear(site.readers[0])
        handle = reader.register_forward_pre_hook(stop)
        batches = []
        try:
            with self._replaying():
                for batch in range(len(self._hidden)):
                    x = self._run_to(site, batch, inputs)
                    if site.tail is not None:
                        batches.append(x.to(self._hidden[batch].device))
                    yield x.flatten(0, -2)
        finally:
            handle.remove()
        if site.tail is not None:
            self._replays[site.tail] = _Replay(reader, batches, site.tail.extra_outputs)

    def statistics(
        self, schemes: Mapping[str, Scheme | None], activations: Mapping[str, ActivationScheme | None] | None = None
    ) -> SiteStatistics:
        """Statistics of all sites of the block in its current state.

        schemes, activations: copied into the result; `activations` None: no input is quantized.
        """
        grams: dict[str, Tensor] = {}
        mean_abs: dict[str, Tensor] = {}
        max_abs: dict[str, Tensor] = {}
        samples: dict[str, Tensor] = {}
        every = max(1, sum(batch.shape[0] * batch.shape[1] for batch in self._hidden) // _SAMPLES)
        for site in self._block.arch.sites:
            channels = self._block.linear(site.readers[0]).in_features
            gram, size, top = (kind(channels, self._device) for kind in (Gram, AbsMean, AbsMax))
            sample = Sample(channels, self._device, every)
            for x in self.at(site):
                gram.update(x)
                size.update(x)
                top.update(x)
                sample.update(x)
            grams[site.name], mean_abs[site.name], max_abs[site.name] = gram.value, size.value, top.value
            samples[site.name] = sample.value
        inputs = dict.fromkeys(schemes) if activations is None else activations
        return SiteStatistics(grams, mean_abs, max_abs, samples, schemes, inputs)

    def outputs(self) -> Iterator[Tensor]:
        """Yield the outputs of the block in its current state, batches (windows, tokens, channels)."""
        with self._replaying():
            for batch in range(len(self._hidden)):
                yield self._run(batch)

    def advance(self, outputs: Iterable[Tensor] | None = None) -> None:
        """Overwrite the inputs in `hidden` with the outputs of the block.

        outputs: the outputs, if they are known; otherwise the block runs.
        """
        for batch, output in enumerate(self.outputs() if outputs is None else outputs):
            self._hidden[batch] = output
        self._replays.clear()

    def _run_to(self, site: Site, batch: int, inputs: list[Tensor]) -> Tensor:
        """Run a batch up to a site and return its activations, which a hook has appended to `inputs`."""
        cache = self._call.cache
        before = 0 if cache is None else cache.updates
        try:
            self._run(batch)
        except _SiteReached:
            inside = site.tail is not None and site.tail.module == self._block.arch.attention
            if inside and cache is not None and cache.updates == before:
                raise never_called(f"the KV cache of {self._block.path}") from None
            x = inputs.pop()
            check_finite(x, f"{self._block.path}: the input of {site.readers[0]}")
            return x
        raise never_called(f"{self._block.path}.{site.readers[0]}")

    @contextmanager
    def _replaying(self) -> Iterator[None]:
        """Replace, in the block, each module that has a replay."""
        module = self._block.module
        originals = {tail: module.get_submodule(tail.module) for tail in self._replays}
        try:
            for tail, replay in self._replays.items():
                module.set_submodule(tail.module, replay)
            yield
        finally:
            for tail, original in originals.items():
                module.set_submodule(tail.module, original)

    def _run(self, batch: int) -> Tensor:
        for replay in self._replays.values():
            replay.batch, replay.runs = batch, 0
        # A replayed attention does not update the KV cache.
        replayed = any(tail.module == self._block.arch.attention for tail in self._replays)
        call = self._call.with_cache(None) if replayed else self._call
        hidden = self._hidden[batch]
        with torch.no_grad():
            output = run_block(self._block.module, hidden.to(self._device), call)
        for tail, replay in self._replays.items():
            if not replay.runs:
                raise never_called(f"{self._block.path}.{tail.module}")
        check_finite(output, f"{self._block.path}: its output")
        return output.to(hidden.device)


def check_finite(x: Tensor, what: str) -> None:
    """Raise `NumericalFailure` if activations are not finite; the message names their dtype.

    x: activations of any shape.
    what: what they are, for the message.
    """
    if bool(torch.isfinite(x).all()):
        return
    remedy = 'use dtype = "bfloat16" or "float32"'
    if x.dtype != torch.float16:
        remedy = "use more bits if the original model runs on this text, otherwise an intact copy of the model"
    raise NumericalFailure(
        f"{what} is not finite: activations exceed the range of {str(x.dtype).removeprefix('torch.')}; {remedy}"
    )


class _SiteReached(Exception):
    """Ends a forward pass at the site that it was started for."""


class _Replay(nn.Module):
    """Replaces a module whose last linear (`Tail`) has a known input, and applies that linear alone.

    reader: the linear.
    batches: its input, batch by batch.
    extra_outputs: see `Tail`.
    """

    def __init__(self, reader: nn.Linear, batches: list[Tensor], extra_outputs: int) -> None:
        super().__init__()
        # In a tuple, so that torch does not register the linear as a submodule.
        self._reader, self._batches, self._extra = (reader,), batches, extra_outputs
        self.batch = self.runs = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output for the current batch; the arguments are ignored."""
        self.runs += 1
        reader = self._reader[0]
        output = reader(self._batches[self.batch].to(reader.weight.device))
        return (output, *([None] * self._extra)) if self._extra else output
