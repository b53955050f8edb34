"""Simulate a quantized block as a differentiable function of its learned parameters.

`TunedBlock` holds a float32 copy of the block whose linears are replaced. Each linear applies the input's channel order
and online transform, quantizes the input with the runtime's own operation (straight-through gradient) and multiplies it
by a weight that is smoothed, corrected by a low-rank term and rounded to nearest on learned ranges. Keys and values are
quantized as in the KV cache. During tuning, smoothing factors divide the input of a site's readers; `settle.py` folds
them into the modules that write the site.

Another learned transform that folds into weights, for example a rotation of values within heads, is built like
`Smoothing`: a module held by a site's `TunedInput`. Its `inputs` transforms what the readers receive, its `values` what
is cached, and its `fold_` edits a block. `TunedLinear` applies it to the readers' weights before it adds the low-rank
term, and `settle.py` applies the inverse to that term. Its parameters need a name in `parameters` and a learning rate
in `train.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from subnibble.model.skeleton import Block
from subnibble.model.transformers_api.blocks import BlockCall, run_block
from subnibble.tuning.cache import TunedCache
from subnibble.tuning.linear import BlockContext, TunedInput, TunedLinear
from subnibble.tuning.tuning import Tuning


class TunedBlock:
    """A block as a differentiable function of its learned parameters.

    block: the float32 block; it is copied.
    context: what surrounds the learned parameters: schemes, bases, cache, prefix.
    tuning: what is learned.
    generator: draws the random initial values.
    sites (attribute): site name -> the input of its readers.
    linears (attribute): linear name -> the linear.
    cache (attribute): the keys and values that attention reads.
    """

    def __init__(self, block: Block, context: BlockContext, tuning: Tuning, generator: torch.Generator) -> None:
        self.tuning = tuning
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
        self.cache = TunedCache(context.cache_quantizer, context.prefix, self.sites)
        self.module.requires_grad_(False)
        for parameter in self.parameters().values():
            parameter.requires_grad_(True)

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

    def bound_(self) -> None:
        """Clamp learned parameters to their valid range."""
        for entrance in self.sites.values():
            entrance.bound_()

    def __call__(self, hidden: Tensor, call: BlockCall) -> Tensor:
        """Run the block; returns (b, t, d).

        hidden: (b, t, d) float32.
        call: the block's call arguments for t tokens.
        """
        for entrance in self.sites.values():
            entrance.forget()
        return run_block(self.module, hidden, call.with_cache(self.cache.of_text(call.positions)))


def _mean_square(tensors: Sequence[Tensor]) -> Tensor:
    """Mean square over all elements of all tensors; 0 if there are none."""
    return torch.cat([tensor.square().flatten() for tensor in tensors]).mean() if tensors else torch.zeros(())
