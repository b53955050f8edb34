"""How many salient channels each linear gets: more where they take more output error a bit (serq, option `ranks`).

A linear's gain from its j-th most salient channel is the output error that this channel's rounding makes,

    H_jj ||E_j||² / ||W X||²     and, where the remainder of the quantized input runs again, + t e_j ||W_j||² / ||W X||²

with E the error of rounding to nearest, e_j the mean squared error of the quantized input of channel j and t the number
of tokens. Salient channels come in steps of a group. All linears start with none; the step with the largest gain a bit
comes next, until as many bits are spent as the same rank everywhere would take.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.calibrate.stream import SiteStatistics
from subnibble.corrections.correction import Correction
from subnibble.model.skeleton import Block
from subnibble.rounding import grid
from subnibble.rounding.error import output_energy
from subnibble.runtime import activations
from subnibble.scheme import WHOLE_CHANNEL, ActivationScheme, Scheme

# Salient channels of a linear whose groups are whole rows come in steps of so many.
_STEP = 64


@dataclass(frozen=True)
class Gains:
    """What salient channels bring to one linear. gains: (columns,) of each, most salient first; relative output error.

    rows: outputs. step: channels are taken by so many. scheme: codes their weight.
    """

    gains: Tensor
    rows: int
    step: int
    scheme: Scheme

    def bits(self, rank: int) -> int:
        """Stored bits of a second weight of `rank` channels."""
        return self.rows * self.scheme.row_bits(rank) if rank else 0

    def worth(self, rank: int) -> tuple[float, int]:
        """Gain a bit of the next step, and the rank it leads to."""
        reached = min(rank + self.step, self.gains.shape[0])
        return float(self.gains[rank:reached].sum()) / (self.bits(reached) - self.bits(rank)), reached


def gains_of(
    block: Block, found: SiteStatistics, factors: Mapping[str, Tensor], orders: Mapping[str, Tensor | None],
    correction: Correction,
) -> dict[str, Gains]:  # fmt: skip
    """Gains of a block's linears, by path. block: transformed; found: statistics before; factors, orders: by site."""
    made = {}
    for site in block.arch.sites:
        s = factors.get(site.name, torch.ones_like(found.largest[site.name]))
        order = orders[site.name]
        order = torch.arange(s.shape[0], device=s.device) if order is None else order
        gram = found.grams[site.name] / (s * s.unsqueeze(1))
        gram, tokens = gram[order][:, order], (found.samples[site.name] / s)[:, order]
        for name in site.readers:
            scheme = found.schemes[name]
            if scheme is None:
                continue
            weight = block.linear(name).weight[:, order]
            error = weight - grid.nearest(weight, scheme)
            gains = gram.diagonal() * error.square().sum(0)
            activation = found.activations[name]
            if activation is not None and correction.coarse != "none":
                # Sampled tokens stand for all; of an idle input for none.
                sampled = tokens.square().sum(dtype=torch.float64).clamp(min=torch.finfo(torch.float64).tiny)
                gains = gains + _input_gains(tokens, weight, activation) * float(gram.trace() / sampled)
            (energy,) = output_energy(weight, gram, [weight.shape[0]])
            step = _STEP if scheme.group_size == WHOLE_CHANNEL else scheme.group_size
            made[f"{block.path}.{name}"] = Gains((gains / max(energy, 1e-300)).cpu(), weight.shape[0], step, scheme)
    return made


def allocate(found: Mapping[str, Gains], rank: int) -> dict[str, int]:
    """The rank of each linear, for the bits that `rank` everywhere would take."""
    budget = sum(gains.bits(min(rank, gains.gains.shape[0])) for gains in found.values())
    ranks = dict.fromkeys(found, 0)
    queue = [(-gains.worth(0)[0], path) for path, gains in found.items()]
    heapq.heapify(queue)
    while queue:
        _, path = heapq.heappop(queue)
        gains, now = found[path], ranks[path]
        _, reached = gains.worth(now)
        cost = gains.bits(reached) - gains.bits(now)
        if cost > budget:
            # A narrower linear may still fit.
            continue
        budget -= cost
        ranks[path] = reached
        if reached < gains.gains.shape[0]:
            heapq.heappush(queue, (-gains.worth(reached)[0], path))
    return ranks


def _input_gains(tokens: Tensor, weight: Tensor, scheme: ActivationScheme) -> Tensor:
    """Output error that each channel's input error makes, summed over the sampled tokens."""
    lost = (activations.quantize(tokens, scheme).values() - tokens).square().sum(0)
    return lost * weight.square().sum(0)
