"""Which tokens become attention sinks, by their massive activations (PrefixQuant, Chen et al., arXiv 2410.05265).

A token is one in a block if its largest magnitude at the MLP's hidden channels is more than 64 times the median over
the tokens of its window; so it does not matter how windows are batched. A model needs as many as it has in the block
with most of them; set before every text as a prefix, they keep later tokens from becoming one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from subnibble.arch.site import Role
from subnibble.calibrate.stream import BlockStream
from subnibble.model.skeleton import Block

_FACTOR = 64.0
# A token that is rarely one is none of the model's own.
_FEWEST_WINDOWS = 0.1
# Times the median norm: massive activations lie a hundred times above it, ordinary tokens within a few.
_SINK_FACTOR = 10.0


def sink_tokens(blocks: Iterable[tuple[Block, BlockStream]], windows: Tensor) -> tuple[int, ...]:
    """Ids that become sinks behind the first place of a window, most frequent first, as many as the model needs.

    blocks: of the full-precision model, with the passage of all windows. windows: (n, tokens), their ids.
    """
    needed, found = 0, Counter[int]()
    seen: dict[int, set[int]] = {}
    for block, stream in blocks:
        sizes = torch.cat([x.abs().amax(1).float().cpu() for x in stream.at(block.arch.site(Role.MLP_HIDDEN))])
        sizes = sizes.view(windows.shape)
        massive = sizes > _FACTOR * sizes.median(1, keepdim=True).values
        needed = max(needed, math.ceil(float(massive.sum(1).float().mean())))
        massive[:, 0] = False
        for window, place in massive.nonzero().tolist():
            token = int(windows[window, place])
            found[token] += 1
            seen.setdefault(token, set()).add(window)
    common = [token for token, _ in found.most_common() if len(seen[token]) >= _FEWEST_WINDOWS * windows.shape[0]]
    return tuple(common[:needed])


def ordinary_tokens(hidden: Tensor) -> Tensor:
    """Which tokens are no sinks, (windows * tokens,) bool, by the residual stream `hidden` (windows, tokens, channels).

    A sink's hidden state is huge; the first token of a window is one to the attention of every later token.
    """
    norms = hidden.float().norm(dim=-1)
    mask: Tensor = norms <= _SINK_FACTOR * norms.median(-1, keepdim=True).values
    mask[:, 0] = False
    return mask.flatten()
