"""Simulate a quantized block as a differentiable function of its learned parameters.

`TunedBlock` holds a float32 copy of the block whose linears are replaced. Each linear applies the input's channel order
and online transform, quantizes the input with the runtime's own operation (straight-through gradient) and multiplies it
by a weight that is smoothed, corrected by a low-rank term and rounded to nearest on learned ranges. Keys and values are
quantized as in the KV cache. During tuning, smoothing factors divide the input of a site's readers; `settle_` folds
them into the modules that write the site.

Another learned transform that folds into weights, for example a rotation of values within heads, is built like
`Smoothing`: a module held by a site's `TunedInput`. Its `inputs` transforms what the readers receive, its `values` what
is cached, and its `fold_` edits a block. `TunedLinear` applies it to the readers' weights before it adds the low-rank
term, and `settle_` applies the inverse to that term. Its parameters need a name in `parameters` and a learning rate in
`train.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from subnibble.arch.site import Site
from subnibble.calibrate.prefix import States, after_states
from subnibble.calibrate.stats import AbsMax
from subnibble.model.skeleton import Block
from subnibble.model.transformers_api.blocks import BlockCache, BlockCall, run_block
from subnibble.rounding.fixed import FixedGrids
from subnibble.runtime.kv_cache import CacheQuantizer
from subnibble.runtime.quantized_text import quantized_keys, quantized_values
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tuning.linear import BlockContext, TunedInput, TunedLinear
from subnibble.tuning.smoothing import Smoothing
from subnibble.tuning.tuning import Tuning

# Exponent of max |x| in the initial smoothing factors: OmniQuant's alpha.
_ALPHA = 0.5


class TunedBlock:
    """A block as a differentiable function of its learned parameters.

    block: the float32 block; not modified before `settle_`.
    context: what surrounds the learned parameters: schemes, bases, cache, prefix.
    tuning: what is learned.
    generator: draws the random initial values.
    """

    def __init__(self, block: Block, context: BlockContext, tuning: Tuning, generator: torch.Generator) -> None:
        self.tuning, self.prefix = tuning, context.prefix
        self._arch, self._context, self._cache_quantizer = block.arch, context, context.cache_quantizer
        self.module = copy.deepcopy(block.module)
        self.sites: dict[str, TunedInput] = {}
        self.linears: dict[str, TunedLinear] = {}
        for site in block.arch.sites:
            entrance = self.sites[site.name] = TunedInput(
                context.bases[site.name], context.dtype, context.correction.requantized
            )
            if tuning.input_clipping != "none":
                entrance.learn_clip(
                    {context.activations[name] for name in site.readers}, block.linear(site.readers[0]).weight.device
                )
            for name in site.readers:
                linear = TunedLinear(block.linear(name), entrance, context, name, tuning, generator)
                self.module.set_submodule(name, linear)
                self.linears[name] = linear
        self.module.requires_grad_(False)
        for parameter in self.parameters().values():
            parameter.requires_grad_(True)

    def smooth_(self, block: Block, abs_max: Mapping[str, Tensor]) -> None:
        """Give initial smoothing factors to every site that may be scaled.

        abs_max: site name -> max |x| of each input channel, (channels,).
        """
        for site in block.arch.sites:
            if "scale" not in site.edits or site.name in self.tuning.unsmoothed or self.tuning.smoothing == "none":
                continue
            outliers = self._outlier_channels(site)
            start = _start(block, site, abs_max[site.name])
            heads = block.heads if site.per_head else None
            self.sites[site.name].smoothing = Smoothing(start, outliers, heads, self.tuning.smoothing == "soft")

    def forget_smoothing_start_(self) -> None:
        """Set all smoothing factors to 1."""
        for entrance in self.sites.values():
            if entrance.smoothing is not None:
                entrance.smoothing.start_at_one_()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Learned parameters by name; the name's first component is the parameter space."""
        parameters: dict[str, nn.Parameter] = {}
        for name, linear in self.linears.items():
            if linear.clipping is not None and self.tuning.clipping != "none":
                parameters |= {f"clipping.{name}.{key}": value for key, value in linear.clipping.named_parameters()}
            if linear.low_rank is not None:
                parameters |= {f"low_rank.{name}.{key}": value for key, value in linear.low_rank.named_parameters()}
        for name, entrance in self.sites.items():
            if entrance.clip is not None:
                parameters[f"input_clipping.{name}"] = entrance.clip
            if entrance.smoothing is not None:
                parameters |= {f"smoothing.{name}.{key}": value for key, value in entrance.smoothing.named_parameters()}
        return parameters

    def penalty(self) -> Tensor:
        """λ mean(d²), with d the smoothing's slacks and the mean over all channels of all sites."""
        smoothings = [entrance.smoothing for entrance in self.sites.values()]
        slacks = [one.slack for one in smoothings if one is not None and one.slack is not None]
        return self.tuning.penalty * _mean_square(slacks)

    def __call__(self, hidden: Tensor, call: BlockCall) -> Tensor:
        """Run the block; returns (b, t, d).

        hidden: (b, t, d) float32.
        call: the block's call arguments for t tokens.
        """
        for entrance in self.sites.values():
            entrance.forget()
        return run_block(self.module, hidden, call.with_cache(_Cache(self, call.positions)))

    def max_abs(self, hidden: Tensor, call: BlockCall, ordinary: Tensor) -> dict[str, Tensor]:
        """Site name -> max |x| of each channel, (channels,), over the ordinary tokens.

        hidden: (b, t, d) float32.
        call: the block's call arguments for t tokens.
        ordinary: (b, t) bool, the tokens to include.
        """
        statistics: dict[str, AbsMax] = {}

        def note(name: str, x: Tensor) -> None:
            statistics.setdefault(name, AbsMax(x.shape[-1], x.device)).update(x.detach()[ordinary])

        handles = [
            self.linears[site.readers[0]].register_forward_pre_hook(lambda _, args, name=site.name: note(name, args[0]))
            for site in self._arch.sites
        ]
        with torch.no_grad():
            self(hidden, call)
        for handle in handles:
            handle.remove()
        return {name: statistic.value for name, statistic in statistics.items()}

    def settle_(self, block: Block) -> None:
        """Apply what was learned to the float32 `block`: fold smoothing factors, merge slacks and low-rank terms.

        Afterwards this object has the same weights as `block`, keeps its learned ranges and has no smoothing factors;
        its `prefix` holds the keys and values of the settled block.
        """
        with torch.no_grad():
            if self.prefix is not None:
                self.prefix = self.prefix[0], self._values(self.prefix[1])
            for site in block.arch.sites:
                smoothing = self.sites[site.name].smoothing
                factors = torch.ones(()) if smoothing is None else smoothing.wide()
                for name in site.readers:
                    weight, low_rank = block.linear(name).weight, self.linears[name].low_rank
                    if smoothing is not None:
                        weight.mul_(self.linears[name].factors(smoothing) / factors)
                    if low_rank is not None:
                        # The term was learned on the scaled weight; `fold_` multiplies by the factors below.
                        weight.add_(low_rank.product() / factors.to(weight.device))
                        self.linears[name].low_rank = None
            for site in block.arch.sites:
                entrance = self.sites[site.name]
                if entrance.smoothing is not None:
                    entrance.smoothing.fold_(block, site)
                    entrance.smoothing = None
        tensors = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        for name, parameter in block.module.named_parameters():
            tensors[name].data.copy_(parameter.data)

    def bound_(self) -> None:
        """Clamp learned parameters to their valid range."""
        for entrance in self.sites.values():
            entrance.bound_()

    def activations(self) -> dict[str, ActivationScheme | None]:
        """Linear name -> activation scheme with the learned clip; None if inputs are not quantized."""
        schemes = {}
        for site in self._arch.sites:
            for name in site.readers:
                schemes[name] = self.sites[site.name].learned(self._context.activations[name])
        return schemes

    def grids(self, names: tuple[str, ...]) -> FixedGrids:
        """Learned grids of several linears, their rows stacked."""
        return FixedGrids.stacked([self.linears[name].fitted() for name in names])

    def fix_(self, name: str, weight: Tensor, salient: Tensor | None = None) -> None:
        """Let a linear use a given weight, which was rounded elsewhere, instead of its learned one.

        weight: (m, k), dequantized, in the linear's input basis.
        salient: (m, r), the part of it that the salient columns' second weight holds, or None.
        """
        linear = self.linears[name]
        linear.fixed = weight if salient is None else linear.with_salient(weight, salient)

    def _outlier_channels(self, site: Site) -> Tensor | None:
        """Mask (channels,) of outlier channels, which have 8 bits and need no factors; None if there are none."""
        order, outliers = self._context.bases[site.name].order, self._context.correction.outliers
        if order is None or not outliers:
            return None
        mask = torch.zeros_like(order, dtype=torch.bool)
        mask[order[-outliers:]] = True
        return mask

    def _values(self, values: Tensor) -> Tensor:
        """Values (..., key-value heads, t, width) divided by their smoothing factors, as they are cached."""
        for entrance in self.sites.values():
            if entrance.smoothing is not None:
                values = entrance.smoothing.values(values)
        return values

    def use_cache_quantizer(self, cache_quantizer: CacheQuantizer | None) -> None:
        """Set how keys and values are quantized from now on; None keeps them at 16 bits."""
        self._cache_quantizer = cache_quantizer

    def attended(self, keys: Tensor, values: Tensor, positions: tuple[Tensor, Tensor]) -> States:
        """Keys and values as attention reads them: quantized and dequantized, preceded by the unquantized prefix.

        keys, values: (b, heads, t, width) of the text.
        positions: cosines and sines of the rotary embedding.
        """
        cache_quantizer, prefix = self._cache_quantizer, self.prefix
        values = self._values(values)
        prefix = None if prefix is None else (prefix[0], self._values(prefix[1]))
        # Query and key norms (Qwen3) return float32, but attention needs a single dtype.
        values = values.to(keys.dtype)
        if cache_quantizer is not None:
            keys, values = quantized_keys(keys, cache_quantizer, positions), quantized_values(values, cache_quantizer)
        return (keys, values) if prefix is None else after_states(prefix, (keys, values))


class _Cache(BlockCache):
    """Replaces the KV cache that attention updates."""

    def __init__(self, block: TunedBlock, positions: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self._block, self._positions = block, positions

    def attended(self, keys: Tensor, values: Tensor) -> States:
        """Keys and values as attention reads them, (b, heads, prefix + t, width) each."""
        return self._block.attended(keys, values, self._positions)


def _mean_square(tensors: Sequence[Tensor]) -> Tensor:
    """Mean square over all elements of all tensors; 0 if there are none."""
    return torch.cat([tensor.square().flatten() for tensor in tensors]).mean() if tensors else torch.zeros(())


def _start(block: Block, site: Site, input_max: Tensor) -> Tensor:
    """Logarithms of a site's initial factors max |x|^alpha / max |w|^(1 - alpha), shifted to mean 0."""
    weight_max = torch.stack([block.linear(name).weight.detach().abs().amax(0) for name in site.readers]).amax(0)
    heads = block.heads
    if site.per_head:
        input_max, weight_max = (
            maxima.view(heads.key_value, heads.repeats, heads.width).amax(1).flatten()
            for maxima in (input_max, weight_max)
        )
    nonzero = (input_max > 0) & (weight_max > 0)
    tiny = torch.finfo(weight_max.dtype).tiny
    logs = _ALPHA * input_max.clamp(min=tiny).log() - (1 - _ALPHA) * weight_max.clamp(min=tiny).log()
    logs = torch.where(nonzero, logs, logs[nonzero].mean() if bool(nonzero.any()) else 0.0)
    centred: Tensor = logs - logs.mean()
    return centred
