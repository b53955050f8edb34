"""Find attention-sink tokens by their massive activations (PrefixQuant, Chen et al., arXiv 2410.05265).

A token is a sink in a block if the largest magnitude of its hidden MLP channels is more than 64 times the median over
the tokens of its window; the result does not depend on how windows are batched. A model needs as many sinks as the
block with the most sinks has per window. As a prefix before every text, they keep later tokens from becoming sinks.
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

# A token is massive above this multiple of its window's median.
_FACTOR = 64.0
# Share of the windows in which a token id must be a sink; ids below it are sinks by chance.
_FEWEST_WINDOWS = 0.1
# Multiple of the median norm above which a hidden state is a sink's: sinks reach a hundred times the median, ordinary
# tokens a few times.
_SINK_FACTOR = 10.0


class MassivePlaces:
    """Tokens with massive activations in a block; a `Statistic`, merged in the order of windows.

    The value is (n, 3) int64, sorted: number of the window, position in the window, token id.
    """

    def __init__(self) -> None:
        self._windows = 0
        self._rows = [torch.empty(0, 3, dtype=torch.int64)]

    def update(self, x: Tensor, ids: Tensor) -> None:
        """Add windows.

        x: hidden channels of the MLP, (windows * tokens, channels).
        ids: token ids, (windows, tokens).
        """
        magnitudes = x.abs().amax(1).float().cpu().view(ids.shape)
        massive = magnitudes > _FACTOR * magnitudes.median(1, keepdim=True).values
        self._add(torch.cat([massive.nonzero(), ids.cpu()[massive].unsqueeze(1)], 1), ids.shape[0])

    def merge(self, other: MassivePlaces) -> None:
        """Add the windows of `other`, which come after those of this one."""
        self._add(other.value, other._windows)

    @property
    def value(self) -> Tensor:
        """(n, 3) int64, see the class."""
        return torch.cat(self._rows)

    def _add(self, rows: Tensor, windows: int) -> None:
        """Add rows of `windows` further windows, which `rows` numbers from 0."""
        self._rows.append(rows + torch.tensor([self._windows, 0, 0]))
        self._windows += windows


def sink_tokens(blocks: Iterable[tuple[Block, BlockStream]], windows: Tensor) -> tuple[int, ...]:
    """Token ids that become sinks after a window's first position: most frequent first, as many as the model needs.

    blocks: every block of the full-precision model, with the stream of all windows through it.
    windows: token ids of these windows, (n, tokens).
    """
    needed, counts = 0, Counter[int]()
    windows_of: dict[int, set[int]] = {}
    for block, stream in blocks:
        massive = value_over(MassivePlaces(), _with_ids(stream.at(block.arch.site(Role.MLP_HIDDEN)), windows))
        needed = max(needed, math.ceil(massive.shape[0] / windows.shape[0]))
        for window, place, token in massive.tolist():
            if place:
                counts[token] += 1
                windows_of.setdefault(token, set()).add(window)
    fewest = _FEWEST_WINDOWS * windows.shape[0]
    common = [token for token, _ in counts.most_common() if len(windows_of[token]) >= fewest]
    return tuple(common[:needed])


def _with_ids(batches: Iterable[Tensor], windows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pair each batch (windows * tokens, channels) with its token ids (windows, tokens)."""
    start = 0
    for x in batches:
        stop = start + x.shape[0] // windows.shape[1]
        yield x, windows[start:stop]
        start = stop


def ordinary_tokens(hidden: Tensor) -> Tensor:
    """Whether each token is not an attention sink: (windows, tokens) bool.

    Sinks are the first token of each window, and tokens whose hidden state is huge.

    hidden: residual stream, (windows, tokens, channels).
    """
    norms = hidden.float().norm(dim=-1)
    mask: Tensor = norms <= _SINK_FACTOR * norms.median(-1, keepdim=True).values
    mask[:, 0] = False
    return mask
