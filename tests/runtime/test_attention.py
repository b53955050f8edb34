"""Attention over a prefix and a coded cache, against scores written out and a log-sum-exp merge."""

from __future__ import annotations

import pytest
import torch

from subnibble.runtime import attention
from subnibble.runtime.attention import PrefixView, attend
from subnibble.runtime.kv_cache import CacheView
from subnibble.runtime.rotary import rotate, unrotate

SCALING = 0.3


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def example(count: int = 5, total: int = 9, prefix: int = 4) -> dict[str, object]:
    """Two sequences, four query heads on two key-value heads; the second sequence is padded by two on the left."""
    visible = torch.ones(2, 1, count, total, dtype=torch.bool).tril(total - count)
    visible[1, :, :, :2] = False
    shown = torch.ones(1, 1, count, prefix, dtype=torch.bool)
    shown[..., 3:, 0] = False
    return {
        "query": random(2, 4, count, 6),
        "keys": random(2, 2, total, 6, seed=1),
        "values": random(2, 2, total, 6, seed=2),
        "visible": visible,
        "prefix": PrefixView(random(2, prefix, 6, seed=3), random(2, prefix, 6, seed=4), shown),
    }


def by_hand(e: dict[str, object], keys=None, values=None, with_prefix: bool = True) -> torch.Tensor:
    """Each query by itself. keys, values: (query, ...) of each query, by default the same for all."""
    query, prefix = e["query"], e["prefix"]
    result = torch.empty_like(query)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        k = e["keys"][b, h // 2] if keys is None else keys[t][b, h // 2]
        v = e["values"][b, h // 2] if values is None else values[t][b, h // 2]
        visible = e["visible"][b, 0, t]
        k, v = k[visible], v[visible]
        if with_prefix:
            shown = prefix.visible[0, 0, t]
            k = torch.cat([prefix.keys[h // 2][shown], k])
            v = torch.cat([prefix.values[h // 2][shown], v])
        result[b, h, t] = (SCALING * k @ query[b, h, t]).softmax(0) @ v
    return result


@pytest.mark.parametrize("with_prefix", [True, False])
def test_attention_is_that_of_each_query_by_itself(with_prefix: bool) -> None:
    e = example()
    prefix = e["prefix"] if with_prefix else None
    result = attend(e["query"], CacheView(e["keys"]), CacheView(e["values"]), e["visible"], SCALING, prefix)
    torch.testing.assert_close(result, by_hand(e, with_prefix=with_prefix), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("which", ["keys", "values", "both"])
@pytest.mark.parametrize("with_prefix", [True, False])
@pytest.mark.parametrize("at_once", [1, 2, 128])
def test_queries_that_see_more_or_less_coded_get_their_own(
    which: str, with_prefix: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_QUERIES", at_once)
    e = example()
    counts = torch.tensor([0, 2, 2, 5, 6])
    views, by_query = {}, {}
    for number, name in enumerate(("keys", "values")):
        late, early = e[name], e[name] + random(*e[name].shape, seed=7 + number)
        if which not in (name, "both"):
            views[name], by_query[name] = CacheView(late), None
            continue
        # What no query sees coded is the same in both.
        late = torch.cat([late[:, :, :6], early[:, :, 6:]], 2)
        views[name] = CacheView(late, early, counts)
        by_query[name] = [torch.cat([late[:, :, :c], early[:, :, c:]], 2) for c in counts.tolist()]
        e[name] = late
    prefix = e["prefix"] if with_prefix else None
    actual = attend(e["query"], views["keys"], views["values"], e["visible"], SCALING, prefix)
    target = by_hand(e, by_query["keys"], by_query["values"], with_prefix)
    torch.testing.assert_close(actual, target, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_scores_of_half_types_neither_overflow_nor_lose_more_than_torchs_own(dtype: torch.dtype) -> None:
    e = example()
    query, keys, values = (60 * e[name].to(dtype) for name in ("query", "keys", "values"))
    counts = torch.tensor([5, 6, 7, 8, 9])
    both = [CacheView(part, part, counts) for part in (keys, values)]
    actual = attend(query, *both, e["visible"], SCALING)
    alone = attend(query, CacheView(keys), CacheView(values), e["visible"], SCALING)
    wide = {"query": query.double(), "keys": keys.double(), "values": values.double(), "visible": e["visible"]}
    exact = by_hand({**wide, "prefix": None}, with_prefix=False)
    assert bool(actual.isfinite().all())
    assert float((actual - exact).norm()) <= 1.5 * float((alone - exact).norm())


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    e = example()
    e["visible"][1, :, 2] = False
    counts = torch.tensor([0, 2, 2, 5, 6])
    for keys in (CacheView(e["keys"]), CacheView(e["keys"], e["keys"] + 1, counts)):
        result = attend(e["query"], keys, CacheView(e["values"]), e["visible"], SCALING)
        assert bool((result[1, :, 2] == 0).all())
        assert bool(result.isfinite().all())


def test_no_mask_is_the_causal_mask() -> None:
    for count in (1, 4, 9):
        e = example(count)
        e["visible"] = torch.ones(2, 1, count, 9, dtype=torch.bool).tril(9 - count)
        for prefix in (None, e["prefix"]):
            actual = attend(e["query"], CacheView(e["keys"]), CacheView(e["values"]), None, SCALING, prefix)
            target = by_hand(e, with_prefix=prefix is not None)
            torch.testing.assert_close(actual, target, rtol=1e-12, atol=1e-12)


def test_two_segments_are_a_log_sum_exp_merge() -> None:
    e = example()
    e["prefix"].visible.fill_(True)
    parts = []
    for k, v, mask in (
        (e["keys"], e["values"], e["visible"]),
        *[(p.keys.expand(2, -1, -1, -1), p.values.expand(2, -1, -1, -1), p.visible) for p in [e["prefix"]]],
    ):
        scores = SCALING * e["query"].unflatten(1, (2, 2)) @ k.unsqueeze(2).transpose(-1, -2)
        scores = scores.masked_fill(~mask.unsqueeze(1), -torch.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        parts.append((lse, (scores - lse).exp() @ v.unsqueeze(2)))
    (a, y), (b, z) = parts
    share = torch.sigmoid(a - b)
    merged = (share * y + (1 - share) * z).flatten(1, 2)
    result = attend(e["query"], CacheView(e["keys"]), CacheView(e["values"]), e["visible"], SCALING, e["prefix"])
    torch.testing.assert_close(result, merged, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rotated", [16, 8])
@pytest.mark.parametrize("factor", [1.0, 1.7])
def test_taking_positions_off_undoes_putting_them_on(rotated: int, factor: float) -> None:
    x = random(2, 3, 7, 16)
    angle = random(2, 7, rotated // 2, seed=5).repeat(1, 1, 2)
    cos, sin = factor * angle.cos(), factor * angle.sin()
    torch.testing.assert_close(unrotate(rotate(x, cos, sin), cos, sin), x, rtol=1e-12, atol=1e-12)


def test_positions_are_those_of_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = random(2, 3, 7, 16)
    angle = random(2, 7, 8, seed=5).repeat(1, 1, 2)
    target, _ = apply_rotary_pos_emb(x, x, angle.cos(), angle.sin())
    torch.testing.assert_close(rotate(x, angle.cos(), angle.sin()), target)
