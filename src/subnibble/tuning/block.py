"""A block as it will run quantized, and as a differentiable function of what is learned of it.

A twin of the block in float32 has its linears replaced: each enters its input into its basis, quantizes it by the
runtime's own operation (its gradient passes straight through) and multiplies it by a weight that is smoothed, given
its low-rank part and rounded to nearest on learned ranges. Keys and values go through the codes of the cache. Factors
of a site stand before its readers here; `settle_` folds them into what writes the site.

A further learned transform that folds into weights, say a rotation of values within their heads, goes where `Smoothing`
is: a module that a site's `TunedInput` holds. Its `inputs` is what readers meet and its `values` what is cached, its
`fold_` edits a block; `TunedLinear` turns readers' weights by it, under the low-rank part, which `settle_` turns back;
its parameters get a name in `parameters` and a step size in `train.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from subnibble.arch.site import Site
from subnibble.calibrate.prefix import States, with_past
from subnibble.calibrate.stats import AbsMax
from subnibble.model.skeleton import Block
from subnibble.model.transformers_api.blocks import BlockCache, BlockCall, run_block
from subnibble.rounding.fixed import FixedGrids
from subnibble.runtime.kv_cache import Coding
from subnibble.runtime.quantized_text import quantized_keys, quantized_values
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tuning.linear import Frame, TunedInput, TunedLinear
from subnibble.tuning.smoothing import Smoothing
from subnibble.tuning.tuning import Tuning

# Of a smoothing's start: the largest input's share, OmniQuant's alpha.
_ALPHA = 0.5


class TunedBlock:
    """See the module. block: in float32, which stays as it is until `settle_`. generator: draws what starts random."""

    def __init__(self, block: Block, frame: Frame, tuning: Tuning, generator: torch.Generator) -> None:
        self.tuning, self.prefix = tuning, frame.prefix
        self._arch, self._frame, self._coding = block.arch, frame, frame.coding
        self.module = copy.deepcopy(block.module)
        self.sites: dict[str, TunedInput] = {}
        self.linears: dict[str, TunedLinear] = {}
        for site in block.arch.sites:
            entrance = self.sites[site.name] = TunedInput(
                frame.bases[site.name], frame.dtype, frame.correction.repeated
            )
            if tuning.input_clipping != "none":
                entrance.learn_clip(
                    {frame.activations[name] for name in site.readers}, block.linear(site.readers[0]).weight.device
                )
            for name in site.readers:
                linear = TunedLinear(block.linear(name), entrance, frame, name, tuning, generator)
                self.module.set_submodule(name, linear)
                self.linears[name] = linear
        self.module.requires_grad_(False)
        for parameter in self.parameters().values():
            parameter.requires_grad_(True)

    def smooth_(self, block: Block, largest: Mapping[str, Tensor]) -> None:
        """Give every site that may be scaled its factors. largest: (channels,), magnitudes of its inputs, by name."""
        for site in block.arch.sites:
            if "scale" not in site.edits or site.name in self.tuning.unsmoothed or self.tuning.smoothing == "none":
                continue
            kept = self._kept(site)
            start = _start(block, site, largest[site.name])
            heads = block.heads if site.per_head else None
            self.sites[site.name].smoothing = Smoothing(start, kept, heads, self.tuning.smoothing == "soft")

    def forget_smoothing_start_(self) -> None:
        """Let all factors start at 1."""
        for entrance in self.sites.values():
            if entrance.smoothing is not None:
                entrance.smoothing.start_at_one_()

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that is learned, by name: what a name begins with says which space it belongs to."""
        found: dict[str, nn.Parameter] = {}
        for name, linear in self.linears.items():
            if linear.clipping is not None and self.tuning.clipping != "none":
                found |= {f"clipping.{name}.{key}": value for key, value in linear.clipping.named_parameters()}
            if linear.low_rank is not None:
                found |= {f"low_rank.{name}.{key}": value for key, value in linear.low_rank.named_parameters()}
        for name, entrance in self.sites.items():
            if entrance.clip is not None:
                found[f"input_clipping.{name}"] = entrance.clip
            if entrance.smoothing is not None:
                found |= {f"smoothing.{name}.{key}": value for key, value in entrance.smoothing.named_parameters()}
        return found

    def penalty(self) -> Tensor:
        """λ mean(d²) over all channels of all sites."""
        smoothings = [entrance.smoothing for entrance in self.sites.values()]
        slacks = [one.slack for one in smoothings if one is not None and one.slack is not None]
        return self.tuning.penalty * _mean_square(slacks)

    def __call__(self, hidden: Tensor, call: BlockCall) -> Tensor:
        """The block's output. hidden: (b, t, d) float32. call: of the block, for t tokens."""
        for entrance in self.sites.values():
            entrance.forget()
        return run_block(self.module, hidden, call.with_cache(_Cache(self, call.positions)))

    def largest(self, hidden: Tensor, call: BlockCall, ordinary: Tensor) -> dict[str, Tensor]:
        """Largest magnitudes (channels,) of each site's tensor over the ordinary tokens, (b, t) bool."""
        found: dict[str, AbsMax] = {}

        def note(name: str, x: Tensor) -> None:
            found.setdefault(name, AbsMax(x.shape[-1], x.device)).update(x.detach()[ordinary])

        handles = [
            self.linears[site.readers[0]].register_forward_pre_hook(lambda _, args, name=site.name: note(name, args[0]))
            for site in self._arch.sites
        ]
        with torch.no_grad():
            self(hidden, call)
        for handle in handles:
            handle.remove()
        return {name: largest.value for name, largest in found.items()}

    def settle_(self, block: Block) -> None:
        """Carry out on the float32 `block` what was learned: factors folded, slacks and low-rank parts merged. This
        block, too, is then one without factors, on the same weights and ranges, and `prefix` what the settled one makes
        of it.
        """
        with torch.no_grad():
            if self.prefix is not None:
                self.prefix = self.prefix[0], self._values(self.prefix[1])
            for site in block.arch.sites:
                smoothing = self.sites[site.name].smoothing
                wide = torch.ones(()) if smoothing is None else smoothing.wide()
                for name in site.readers:
                    weight, low_rank = block.linear(name).weight, self.linears[name].low_rank
                    if smoothing is not None:
                        weight.mul_(self.linears[name].factors(smoothing) / wide)
                    if low_rank is not None:
                        # As it was learned, behind the factors that come next.
                        weight.add_(low_rank.product() / wide.to(weight.device))
                        self.linears[name].low_rank = None
            for site in block.arch.sites:
                entrance = self.sites[site.name]
                if entrance.smoothing is not None:
                    entrance.smoothing.fold_(block, site)
                    entrance.smoothing = None
        own = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        for name, parameter in block.module.named_parameters():
            own[name].data.copy_(parameter.data)

    def bound_(self) -> None:
        """Bring what was learned back into its range."""
        for entrance in self.sites.values():
            entrance.bound_()

    def activations(self) -> dict[str, ActivationScheme | None]:
        """How each linear's input is quantized, as learned."""
        found = {}
        for site in self._arch.sites:
            for name in site.readers:
                found[name] = self.sites[site.name].learned(self._frame.activations[name])
        return found

    def grids(self, names: tuple[str, ...]) -> FixedGrids:
        """The learned ranges of linears on top of each other."""
        return FixedGrids.stacked([self.linears[name].fitted() for name in names])

    def fix_(self, name: str, weight: Tensor, second: Tensor | None = None) -> None:
        """Let a linear run on a weight (m, k), in its basis, that was rounded elsewhere.

        second: (m, r), the part of it that salient columns' second weight is.
        """
        linear = self.linears[name]
        linear.fixed = weight if second is None else linear.with_second(weight, second)

    def _kept(self, site: Site) -> Tensor | None:
        """Channels at 8 bits, which need no factors."""
        order, outliers = self._frame.bases[site.name].order, self._frame.correction.outliers
        if order is None or not outliers:
            return None
        kept = torch.zeros_like(order, dtype=torch.bool)
        kept[order[-outliers:]] = True
        return kept

    def _values(self, values: Tensor) -> Tensor:
        """Values (..., key-value heads, t, width) as they are cached: divided by their factors."""
        for entrance in self.sites.values():
            if entrance.smoothing is not None:
                values = entrance.smoothing.values(values)
        return values

    def use_coding(self, coding: Coding | None) -> None:
        """Quantize keys and values by `coding` from now on, None for not at all."""
        self._coding = coding

    def seen(self, keys: Tensor, values: Tensor, positions: tuple[Tensor, Tensor]) -> States:
        """What attention sees of a text's keys and values (b, heads, t, width), the prefix before them."""
        coding, prefix = self._coding, self.prefix
        values = self._values(values)
        prefix = None if prefix is None else (prefix[0], self._values(prefix[1]))
        # Norms of queries and keys (Qwen3) give float32; attention takes one type.
        values = values.to(keys.dtype)
        if coding is not None:
            keys, values = quantized_keys(keys, coding, positions), quantized_values(values, coding)
        return (keys, values) if prefix is None else with_past(prefix, (keys, values))


class _Cache(BlockCache):
    """Stands for the cache that attention updates."""

    def __init__(self, block: TunedBlock, positions: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self._block, self._positions = block, positions

    def see(self, keys: Tensor, values: Tensor) -> States:
        """See `BlockCache`."""
        return self._block.seen(keys, values, self._positions)


def _mean_square(parts: Sequence[Tensor]) -> Tensor:
    """Over all numbers of all parts, 0 of none."""
    return torch.cat([part.square().flatten() for part in parts]).mean() if parts else torch.zeros(())


def _start(block: Block, site: Site, largest: Tensor) -> Tensor:
    """Logarithms of a site's first factors, with mean 0: max |x|^alpha / max |w|^(1 - alpha)."""
    columns = torch.stack([block.linear(name).weight.detach().abs().amax(0) for name in site.readers]).amax(0)
    heads = block.heads
    if site.per_head:
        largest, columns = (
            part.view(heads.key_value, heads.repeats, heads.width).amax(1).flatten() for part in (largest, columns)
        )
    alive = (largest > 0) & (columns > 0)
    tiny = torch.finfo(columns.dtype).tiny
    logs = _ALPHA * largest.clamp(min=tiny).log() - (1 - _ALPHA) * columns.clamp(min=tiny).log()
    logs = torch.where(alive, logs, logs[alive].mean() if bool(alive.any()) else 0.0)
    centred: Tensor = logs - logs.mean()
    return centred
