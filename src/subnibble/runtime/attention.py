"""Attention over a coded cache and a prefix at 16 bits: scores of both side by side before the softmax.

    A = softmax([q K_Pᵀ, q K̂ᵀ] * scaling);    y = A_P V_P + A_text V̂

which is what two attentions merged by their log-sum-exps would be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.runtime.kv_cache import Seen, changed


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
    """Where queries of one call see more or less of the cache coded: both forms, chosen score by score.

    Computed in float32 or better, as torch's own attention does inside, and rounded to the query's type once.
    """
    heads, wide = keys.late.shape[1], torch.promote_types(query.dtype, torch.float32)
    grouped = (query.to(wide) * scaling).unflatten(1, (heads, -1))
    keys, values = (changed(seen, lambda part: part.to(wide)) for seen in (keys, values))
    late = _behind(prefix, "keys", keys.late).unsqueeze(2)
    scores = grouped @ late.transpose(-1, -2)
    offset = late.shape[-2] - keys.late.shape[-2]
    if keys.early is not None:
        early = _behind(prefix, "keys", keys.early).unsqueeze(2)
        scores = torch.where(_coded(keys, offset), scores, grouped @ early.transpose(-1, -2))
    visible = visible.unsqueeze(1)
    shares = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    # A padded query sees nothing: 0, as of torch's own attention, not 0 / 0.
    shares = shares.masked_fill(~visible.any(-1, keepdim=True), 0)
    late = _behind(prefix, "values", values.late).unsqueeze(2)
    if values.early is None:
        found: Tensor = (shares @ late).flatten(1, 2)
        return found.to(query.dtype)
    coded = _coded(values, offset)
    early = _behind(prefix, "values", values.early).unsqueeze(2)
    text: Tensor = torch.where(coded, shares, 0) @ late + torch.where(coded, 0, shares) @ early
    return text.flatten(1, 2).to(query.dtype)


def _coded(seen: Seen, offset: int) -> Tensor:
    """(t, offset + n) bool: whether a query sees the late form of a token. offset: tokens of the prefix before."""
    assert seen.counts is not None
    places = torch.arange(seen.late.shape[2], device=seen.counts.device)
    coded = places < seen.counts.unsqueeze(1)
    return torch.nn.functional.pad(coded, (offset, 0), value=True)


def _behind(prefix: PrefixSeen | None, name: str, text: Tensor) -> Tensor:
    """Keys or values of the prefix, then of the text: (b, heads, p + n, width)."""
    if prefix is None:
        return text
    part: Tensor = getattr(prefix, name).to(text.dtype)
    return torch.cat([part.expand(text.shape[0], *part.shape), text], 2)
