"""Attention over a quantized cache and a 16-bit prompt prefix: one softmax over the scores of both.

    A = softmax([q K_Pᵀ, q K̂ᵀ] * scaling);    y = A_P V_P + A_text V̂

This equals two attentions merged by their log-sum-exps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.runtime.kv_cache import CacheView, map_view

# Number of queries whose scores are held at once if queries differ in which tokens they see quantized.
_QUERIES = 128


@dataclass(frozen=True)
class PrefixView:
    """Keys and values of a prompt prefix that all sequences share.

    keys, values: (heads, p, width).
    visible: (b or 1, 1, t, p) bool, which prefix tokens each query sees.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor


def attend(
    query: Tensor,
    keys: CacheView,
    values: CacheView,
    visible: Tensor | None,
    scaling: float,
    prefix: PrefixView | None = None,
) -> Tensor:
    """Compute attention's output: (b, query heads, t, width).

    query: (b, query heads, t, width), the last t of n tokens; query heads that share a key-value head are adjacent.
    keys, values: of the text, (b, heads, n, width).
    visible: (b or 1, 1, t, n) bool, which tokens each query sees; None for a causal mask.
    scaling: factor on the scores before the softmax.
    prefix: keys and values before the text, or None.
    """
    batch, count, total = query.shape[0], query.shape[2], keys.late.shape[2]
    same_for_all = keys.early is None and values.early is None
    causal = visible is None and prefix is None and same_for_all and count in (1, total)
    if visible is None and not causal:
        visible = torch.ones(1, 1, count, total, dtype=torch.bool, device=query.device).tril(total - count)
    if prefix is not None and visible is not None:
        masks = [mask.expand(batch, *mask.shape[1:]) for mask in (prefix.visible, visible)]
        visible = torch.cat(masks, -1)
    if visible is not None and not same_for_all:
        return _by_query(query, keys, values, visible, scaling, prefix)
    k, v = (_after_prefix(prefix, name, view.late) for name, view in (("keys", keys), ("values", values)))
    k, v = (tensor.repeat_interleave(query.shape[1] // k.shape[1], 1) for tensor in (k, v))
    output: Tensor = torch.nn.functional.scaled_dot_product_attention(
        query, k, v, attn_mask=visible, is_causal=causal and count > 1, scale=scaling
    )
    return output


def _by_query(
    query: Tensor, keys: CacheView, values: CacheView, visible: Tensor, scaling: float, prefix: PrefixView | None
) -> Tensor:
    """Attention if the queries of one call differ in which tokens they see quantized: `_QUERIES` queries at a time.

    Computed in float32 or better, as torch's attention does internally, and rounded to the query's dtype once.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = (query.to(wide) * scaling).unflatten(1, (keys.late.shape[1], -1))
    keys, values = (map_view(view, lambda tensor: tensor.to(wide)) for view in (keys, values))
    offset, outputs = visible.shape[-1] - keys.late.shape[2], []
    for start in range(0, query.shape[2], _QUERIES):
        mask = visible[:, :, start : start + _QUERIES]
        # Skip tokens after the last one that any of these queries sees.
        ends = mask.flatten(0, 2).any(0).nonzero()
        stop = max(int(ends.max()) + 1 if ends.numel() else 0, offset)
        k, v = (_ChunkView(view, start, stop - offset) for view in (keys, values))
        outputs.append(_chunk(grouped[..., start : start + _QUERIES, :], k, v, mask[..., :stop], prefix))
    return torch.cat(outputs, -2).flatten(1, 2).to(query.dtype)


class _ChunkView:
    """The first n keys or values as one chunk of queries sees them: `_QUERIES` queries from query `start` on.

    base: (b, heads, 1, n, width), as every query of the chunk sees them, except tokens first .. stop - 1.
    late: (b, heads, 1, stop - first, width), these tokens quantized.
    quantized: (queries, stop - first) bool, whether a query sees `late` instead of `base`.
    """

    def __init__(self, view: CacheView, start: int, n: int) -> None:
        self.first = self.stop = 0
        late = view.late[:, :, :n]
        self.base, self.late = late.unsqueeze(2), late
        if view.early is None or view.counts is None:
            return
        counts = view.counts[start : start + _QUERIES].clamp(max=n)
        self.first, self.stop = int(counts.min()), int(counts.max())
        self.base = torch.cat([late[:, :, : self.first], view.early[:, :, self.first : n]], 2).unsqueeze(2)
        self.late = late[:, :, self.first : self.stop].unsqueeze(2)
        self.quantized = torch.arange(self.first, self.stop, device=counts.device) < counts.unsqueeze(1)


def _chunk(query: Tensor, keys: _ChunkView, values: _ChunkView, visible: Tensor, prefix: PrefixView | None) -> Tensor:
    """Attention of one chunk of queries, (b, heads, repeats, t, width), already scaled.

    visible: (b or 1, 1, t, p + n).
    """
    offset = visible.shape[-1] - keys.base.shape[-2]
    scores = query @ _after_prefix(prefix, "keys", keys.base).transpose(-1, -2)
    if keys.first < keys.stop:
        mixed = scores[..., offset + keys.first : offset + keys.stop]
        mixed.copy_(torch.where(keys.quantized, query @ keys.late.transpose(-1, -2), mixed))
    visible = visible.unsqueeze(1)
    probs = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    # A padded query sees nothing: its output is 0, as in torch's attention, instead of 0 / 0.
    probs = probs.masked_fill(~visible.any(-1, keepdim=True), 0)
    output: Tensor = probs @ _after_prefix(prefix, "values", values.base)
    if values.first < values.stop:
        mixed = torch.where(values.quantized, probs[..., offset + values.first : offset + values.stop], 0)
        output += mixed @ (values.late - values.base[..., values.first : values.stop, :])
    return output


def _after_prefix(prefix: PrefixView | None, name: str, text: Tensor) -> Tensor:
    """Put the prefix's keys or values before the text's: (b, heads, ..., p + n, width).

    name: "keys" or "values". text: (b, heads, ..., n, width).
    """
    if prefix is None:
        return text
    before: Tensor = getattr(prefix, name).to(text.dtype)
    between = [1] * (text.dim() - 4)
    before = before.view(1, before.shape[0], *between, *before.shape[1:])
    return torch.cat([before.expand(*text.shape[:-2], *before.shape[-2:]), text], -2)
