"""Attention over a coded cache and a prefix at 16 bits: scores of both side by side before the softmax.

    A = softmax([q K_Pᵀ, q K̂ᵀ] * scaling);    y = A_P V_P + A_text V̂

which is what two attentions merged by their log-sum-exps would be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.runtime.kv_cache import Seen, changed

# Queries whose scores are held at once where they differ in what they see coded.
_QUERIES = 128


@dataclass(frozen=True)
class PrefixSeen:
    """Keys and values of a prefix, one for all sequences. keys, values: (heads, p, width). visible: (b or 1, 1, t, p),
    which of its tokens a query sees.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor


def attend(
    query: Tensor, keys: Seen, values: Seen, visible: Tensor | None, scaling: float, prefix: PrefixSeen | None = None
) -> Tensor:
    """Attention's output (b, query heads, t, width).

    query: (b, query heads, t, width), the last t of n tokens; query heads that share a key-value head are neighbours.
    keys, values: of the text, (b, heads, n, width). visible: (b or 1, 1, t, n) bool, None for all that is not later.
    """
    batch, count, total = query.shape[0], query.shape[2], keys.late.shape[2]
    plain = keys.early is None and values.early is None
    causal = visible is None and prefix is None and plain and count in (1, total)
    if visible is None and not causal:
        visible = torch.ones(1, 1, count, total, dtype=torch.bool, device=query.device).tril(total - count)
    if prefix is not None and visible is not None:
        shown = [part.expand(batch, *part.shape[1:]) for part in (prefix.visible, visible)]
        visible = torch.cat(shown, -1)
    if visible is not None and not plain:
        return _by_query(query, keys, values, visible, scaling, prefix)
    k, v = (_behind(prefix, name, seen.late) for name, seen in (("keys", keys), ("values", values)))
    k, v = (part.repeat_interleave(query.shape[1] // k.shape[1], 1) for part in (k, v))
    found: Tensor = torch.nn.functional.scaled_dot_product_attention(
        query, k, v, attn_mask=visible, is_causal=causal and count > 1, scale=scaling
    )
    return found


def _by_query(
    query: Tensor, keys: Seen, values: Seen, visible: Tensor, scaling: float, prefix: PrefixSeen | None
) -> Tensor:
    """Where queries of one call see more or less of the cache quantized: some queries at a time.

    Computed in float32 or better, as torch's own attention does inside, and rounded to the query's type once.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = (query.to(wide) * scaling).unflatten(1, (keys.late.shape[1], -1))
    keys, values = (changed(seen, lambda part: part.to(wide)) for seen in (keys, values))
    offset, found = visible.shape[-1] - keys.late.shape[2], []
    for start in range(0, query.shape[2], _QUERIES):
        shown = visible[:, :, start : start + _QUERIES]
        # Tokens behind the last that any of these queries sees cost nothing.
        ends = shown.flatten(0, 2).any(0).nonzero()
        stop = max(int(ends.max()) + 1 if ends.numel() else 0, offset)
        k, v = (_Part(seen, start, stop - offset) for seen in (keys, values))
        found.append(_few(grouped[..., start : start + _QUERIES, :], k, v, shown[..., :stop], prefix))
    return torch.cat(found, -2).flatten(1, 2).to(query.dtype)


class _Part:
    """What the queries from `start` on, `_QUERIES` of them, see of the first n keys or values.

    base: (b, heads, 1, n, width), tokens as all of these queries see them, but for those of the range first .. stop -
    1: coded says of each query and token there whether it sees late instead.
    """

    def __init__(self, seen: Seen, start: int, n: int) -> None:
        self.first = self.stop = 0
        late = seen.late[:, :, :n]
        self.base, self.late = late.unsqueeze(2), late
        if seen.early is None or seen.counts is None:
            return
        counts = seen.counts[start : start + _QUERIES].clamp(max=n)
        self.first, self.stop = int(counts.min()), int(counts.max())
        self.base = torch.cat([late[:, :, : self.first], seen.early[:, :, self.first : n]], 2).unsqueeze(2)
        self.late = late[:, :, self.first : self.stop].unsqueeze(2)
        self.quantized = torch.arange(self.first, self.stop, device=counts.device) < counts.unsqueeze(1)


def _few(query: Tensor, keys: _Part, values: _Part, visible: Tensor, prefix: PrefixSeen | None) -> Tensor:
    """Attention of some queries (b, heads, repeats, t, width), scaled already. visible: (b or 1, 1, t, p + n)."""
    offset = visible.shape[-1] - keys.base.shape[-2]
    scores = query @ _behind(prefix, "keys", keys.base).transpose(-1, -2)
    if keys.first < keys.stop:
        mixed = scores[..., offset + keys.first : offset + keys.stop]
        mixed.copy_(torch.where(keys.quantized, query @ keys.late.transpose(-1, -2), mixed))
    visible = visible.unsqueeze(1)
    probs = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    # A padded query sees nothing: 0, as of torch's own attention, not 0 / 0.
    probs = probs.masked_fill(~visible.any(-1, keepdim=True), 0)
    found: Tensor = probs @ _behind(prefix, "values", values.base)
    if values.first < values.stop:
        mixed = torch.where(values.quantized, probs[..., offset + values.first : offset + values.stop], 0)
        found += mixed @ (values.late - values.base[..., values.first : values.stop, :])
    return found


def _behind(prefix: PrefixSeen | None, name: str, text: Tensor) -> Tensor:
    """Keys or values of the prefix, then of the text: (b, heads, ..., p + n, width)."""
    if prefix is None:
        return text
    part: Tensor = getattr(prefix, name).to(text.dtype)
    between = [1] * (text.dim() - 4)
    part = part.view(1, part.shape[0], *between, *part.shape[1:])
    return torch.cat([part.expand(*text.shape[:-2], *part.shape[-2:]), text], -2)
