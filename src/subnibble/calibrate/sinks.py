"""Which tokens become attention sinks, by their massive activations (PrefixQuant, Chen et al., arXiv 2410.05265).

A token is one in a block if its largest magnitude at the MLP's hidden channels is more than 64 times the median over
the tokens of its window; so it does not matter how windows are batched. A model needs as many as it has in the block
with most of them; set before every text as a prefix, they keep later tokens from becoming one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from subnibble.arch.site import Role
from subnibble.calibrate.stats import value_over
from subnibble.calibrate.stream import BlockStream
from subnibble.model.skeleton import Block

_FACTOR = 64.0
# A token that is rarely one is none of the model's own.
_FEWEST_WINDOWS = 0.1
# Times the median norm: massive activations lie a hundred times above it, ordinary tokens within a few.
_SINK_FACTOR = 10.0


class MassivePlaces:
    """Where a block has massive activations: (n, 3) int64, rows of the window's number, the place in it and the token's
    id, sorted. A `Statistic`, merged in the order of windows.
    """

    def __init__(self) -> None:
        self._windows = 0
        self._found = [torch.empty(0, 3, dtype=torch.int64)]

    def update(self, x: Tensor, ids: Tensor) -> None:
        """Add windows. x: (windows * tokens, channels), the MLP's hidden channels. ids: (windows, tokens)."""
        sizes = x.abs().amax(1).float().cpu().view(ids.shape)
        massive = sizes > _FACTOR * sizes.median(1, keepdim=True).values
        self._add(torch.cat([massive.nonzero(), ids.cpu()[massive].unsqueeze(1)], 1), ids.shape[0])

    def merge(self, other: MassivePlaces) -> None:
        """See `Statistic`."""
        self._add(other.value, other._windows)

    @property
    def value(self) -> Tensor:
        """See `Statistic`: (n, 3)."""
        return torch.cat(self._found)

    def _add(self, found: Tensor, windows: int) -> None:
        """Add what was found in so many windows, numbered from 0."""
        self._found.append(found + torch.tensor([self._windows, 0, 0]))
        self._windows += windows


def sink_tokens(blocks: Iterable[tuple[Block, BlockStream]], windows: Tensor) -> tuple[int, ...]:
    """Ids that become sinks behind the first place of a window, most frequent first, as many as the model needs.

    blocks: of the full-precision model, with the passage of all windows. windows: (n, tokens), their ids.
    """
    needed, found = 0, Counter[int]()
    seen: dict[int, set[int]] = {}
    for block, stream in blocks:
        massive = value_over(MassivePlaces(), _with_ids(stream.at(block.arch.site(Role.MLP_HIDDEN)), windows))
        needed = max(needed, math.ceil(massive.shape[0] / windows.shape[0]))
        for window, place, token in massive.tolist():
            if place:
                found[token] += 1
                seen.setdefault(token, set()).add(window)
    common = [token for token, _ in found.most_common() if len(seen[token]) >= _FEWEST_WINDOWS * windows.shape[0]]
    return tuple(common[:needed])


def _with_ids(batches: Iterable[Tensor], windows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (windows * tokens, channels), each with the ids (windows, tokens) of its tokens."""
    start = 0
    for x in batches:
        stop = start + x.shape[0] // windows.shape[1]
        yield x, windows[start:stop]
        start = stop


def ordinary_tokens(hidden: Tensor) -> Tensor:
    """Which tokens are no sinks, (windows, tokens) bool, by the residual stream `hidden` (windows, tokens, channels).

    A sink's hidden state is huge; the first token of a window is one to the attention of every later token.
    """
    norms = hidden.float().norm(dim=-1)
    mask: Tensor = norms <= _SINK_FACTOR * norms.median(-1, keepdim=True).values
    mask[:, 0] = False
    return mask
