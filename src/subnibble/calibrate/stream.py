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

from subnibble.calibrate.stats import AbsMax, AbsMean, Gram
from subnibble.model.site import Site, Tail
from subnibble.model.skeleton import Block, run_block
from subnibble.scheme import ActivationScheme, Scheme

# Tokens of a site that are kept for searches.
_SAMPLES = 1024


@dataclass(frozen=True)
class SiteStatistics:
    """What transforms may know of a block that is not quantized yet, by name of the site; see `stats.py`.

    grams: (channels, channels). mean_sizes, largest: (channels,), of magnitudes. samples: (tokens, channels) float32,
    spread evenly over the windows. schemes, activations: of each linear's weight and input, None if it stays as it is.
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
    arguments: what the model passes to the block beside them. Activations stay on the device of `hidden` and visit
    the block's one batch at a time, so that an accelerator need not hold them all.
    """

    def __init__(self, block: Block, hidden: list[Tensor], arguments: dict[str, Any]) -> None:
        self._block, self._hidden, self._arguments = block, hidden, arguments
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
                    try:
                        self._run(batch)
                    except _SiteReached:
                        x = seen.pop()
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
        for site in self._block.arch.sites:
            channels = self._block.linear(site.readers[0]).in_features
            gram, size, top = (kind(channels, self._device) for kind in (Gram, AbsMean, AbsMax))
            kept = []
            for x in self.at(site):
                gram.update(x)
                size.update(x)
                top.update(x)
                kept.append(x[:: max(1, x.shape[0] * len(self._hidden) // _SAMPLES)].float())
            grams[site.name], sizes[site.name], largest[site.name] = gram.value, size.value, top.value
            samples[site.name] = torch.cat(kept)
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
            replay.batch = batch
        hidden = self._hidden[batch]
        with torch.no_grad():
            output = run_block(self._block.module, hidden.to(self._device), self._arguments)
        return output.to(hidden.device)


class _SiteReached(Exception):
    """Ends a forward pass at the site it was run for."""


class _Replay(nn.Module):
    """Stands for a module whose tail's input is known: applies the tail alone."""

    def __init__(self, reader: nn.Linear, kept: list[Tensor], extra_outputs: int) -> None:
        super().__init__()
        # In a tuple: it is not this module's own.
        self._reader, self._kept, self._extra = (reader,), kept, extra_outputs
        self.batch = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output for the current batch; arguments are not needed."""
        reader = self._reader[0]
        output = reader(self._kept[self.batch].to(reader.weight.device))
        return (output, *([None] * self._extra)) if self._extra else output
