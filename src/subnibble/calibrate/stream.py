"""Stream all calibration windows through a block, stopping at each site in data-flow order.

At a site every window is run up to the site's first reader, where its tensor is handed out. A site that ends a
module (`Site.tail`) keeps its tensor, so that attention and MLP are each computed once: later passes apply only the
reader, by then quantized, to what was kept. Nothing is forwarded twice for the same statistic.
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

# Tokens of a site that are kept for searches.
_SAMPLES = 1024


@dataclass(frozen=True)
class SiteStatistics:
    """What transforms may know of a block that is not quantized yet, by name of the site; see `stats.py`.

    grams: (channels, channels). mean_sizes, largest: (channels,), of magnitudes. samples: (tokens, channels) float32,
    spread evenly over the text. schemes, activations: of each linear's weight and input, None if it stays as it is.
    """

    grams: Mapping[str, Tensor]
    mean_sizes: Mapping[str, Tensor]
    largest: Mapping[str, Tensor]
    samples: Mapping[str, Tensor]
    schemes: Mapping[str, Scheme | None]
    activations: Mapping[str, ActivationScheme | None]


class BlockStream:
    """The passage of all windows through one block.

    hidden: batches (windows, tokens, channels), the block's inputs; replaced by its outputs in `advance`.
    call: what the model calls the block with. Activations stay on the device of `hidden` and visit
    the block's one batch at a time, so that an accelerator need not hold them all.
    """

    def __init__(self, block: Block, hidden: list[Tensor], call: BlockCall) -> None:
        self._block, self._hidden, self._call = block, hidden, call
        self._device = next(block.module.parameters()).device
        self._kept: dict[Tail, _Replay] = {}

    def at(self, site: Site) -> Iterator[Tensor]:
        """The site's tensor, batch by batch, as (tokens, channels). Take all: only then is it kept for later sites."""
        seen: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            raise _SiteReached

        reader = self._block.linear(site.readers[0])
        handle = reader.register_forward_pre_hook(stop)
        kept = []
        try:
            with self._replaying():
                for batch in range(len(self._hidden)):
                    x = self._until(site, batch, seen)
                    if site.tail is not None:
                        kept.append(x.to(self._hidden[batch].device))
                    yield x.flatten(0, -2)
        finally:
            handle.remove()
        if site.tail is not None:
            self._kept[site.tail] = _Replay(reader, kept, site.tail.extra_outputs)

    def statistics(
        self, schemes: Mapping[str, Scheme | None], activations: Mapping[str, ActivationScheme | None] | None = None
    ) -> SiteStatistics:
        """Statistics of all sites, of the block as it is now. schemes, activations: handed on; None: none."""
        grams: dict[str, Tensor] = {}
        sizes: dict[str, Tensor] = {}
        largest: dict[str, Tensor] = {}
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
            grams[site.name], sizes[site.name], largest[site.name] = gram.value, size.value, top.value
            samples[site.name] = sample.value
        inputs = dict.fromkeys(schemes) if activations is None else activations
        return SiteStatistics(grams, sizes, largest, samples, schemes, inputs)

    def outputs(self) -> Iterator[Tensor]:
        """The block's outputs as it is now, batch by batch (windows, tokens, channels)."""
        with self._replaying():
            for batch in range(len(self._hidden)):
                yield self._run(batch)

    def advance(self, outputs: Iterable[Tensor] | None = None) -> None:
        """Run the block to its end: `hidden` becomes its output, in place of its input. outputs: where known."""
        for batch, output in enumerate(self.outputs() if outputs is None else outputs):
            self._hidden[batch] = output
        self._kept.clear()

    def _until(self, site: Site, batch: int, seen: list[Tensor]) -> Tensor:
        """Run a batch up to a site, whose tensor a hook puts into `seen`."""
        cache = self._call.cache
        before = 0 if cache is None else cache.updates
        try:
            self._run(batch)
        except _SiteReached:
            inside = site.tail is not None and site.tail.module == self._block.arch.attention
            if inside and cache is not None and cache.updates == before:
                raise never_called(f"the KV cache of {self._block.path}") from None
            x = seen.pop()
            check_finite(x, f"{self._block.path}: what {site.readers[0]} reads")
            return x
        raise never_called(f"{self._block.path}.{site.readers[0]}")

    @contextmanager
    def _replaying(self) -> Iterator[None]:
        """Put what is kept in the place of the modules that made it."""
        module = self._block.module
        originals = {tail: module.get_submodule(tail.module) for tail in self._kept}
        try:
            for tail, replay in self._kept.items():
                module.set_submodule(tail.module, replay)
            yield
        finally:
            for tail, original in originals.items():
                module.set_submodule(tail.module, original)

    def _run(self, batch: int) -> Tensor:
        for replay in self._kept.values():
            replay.batch, replay.runs = batch, 0
        # An attention that is replayed asks for no keys and values.
        replayed = any(tail.module == self._block.arch.attention for tail in self._kept)
        call = self._call.with_cache(None) if replayed else self._call
        hidden = self._hidden[batch]
        with torch.no_grad():
            output = run_block(self._block.module, hidden.to(self._device), call)
        for tail, replay in self._kept.items():
            if not replay.runs:
                raise never_called(f"{self._block.path}.{tail.module}")
        check_finite(output, f"{self._block.path}: its output")
        return output.to(hidden.device)


def check_finite(x: Tensor, what: str) -> None:
    """Raise `NumericalFailure` that names the type whose range activations left. what: names them."""
    if bool(torch.isfinite(x).all()):
        return
    remedy = 'use dtype = "bfloat16" or "float32"'
    if x.dtype != torch.float16:
        remedy = "use more bits if the original model runs on this text, else an intact copy of it"
    raise NumericalFailure(
        f"{what} is not finite: activations leave the range of {str(x.dtype).removeprefix('torch.')}; {remedy}"
    )


class _SiteReached(Exception):
    """Ends a forward pass at the site it was run for."""


class _Replay(nn.Module):
    """Stands for a module whose tail's input is known: applies the tail alone."""

    def __init__(self, reader: nn.Linear, kept: list[Tensor], extra_outputs: int) -> None:
        super().__init__()
        # In a tuple: it is not this module's own.
        self._reader, self._kept, self._extra = (reader,), kept, extra_outputs
        self.batch = self.runs = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output for the current batch; arguments are not needed."""
        self.runs += 1
        reader = self._reader[0]
        output = reader(self._kept[self.batch].to(reader.weight.device))
        return (output, *([None] * self._extra)) if self._extra else output
