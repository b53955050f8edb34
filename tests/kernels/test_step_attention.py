"""Attention of the C++ step over its own KV tiles, against `runtime/attention.py` over `runtime/kv_cache.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from subnibble.hf.decoder_parts import cache_rules
from subnibble.kernels import native as kernels
from subnibble.runtime.attention import attend
from subnibble.runtime.kv_cache import TensorStore, map_view
from subnibble.runtime.rotary import rotate
from subnibble.tensor.cache_scheme import CacheScheme

pytestmark = pytest.mark.skipif(kernels.why_missing() is not None, reason="there are no kernels")

SCHEMES = {
    "none": None,
    **{f"{bits}-bits": CacheScheme(bits) for bits in (2, 3, 4, 8)},
    **{f"{bits}-bits-ragged": CacheScheme(bits, 24) for bits in (2, 3, 4, 8)},
    "small-groups": CacheScheme(4, 3),
    "aligned-groups": CacheScheme(3, 32),
    "before-rope": CacheScheme(3, 16, rope="before"),
    **{f"{bits}-bits-by-channel": CacheScheme(bits, 32, "channel", window=64) for bits in (2, 3, 4, 8)},
    "by-channel-16": CacheScheme(4, 16, "channel", window=16),
    "by-channel-48": CacheScheme(4, 48, "channel", window=96),
    "by-channel-ragged": CacheScheme(3, 20, "channel", window=40),
    "by-channel-before-rope": CacheScheme(4, 32, "channel", rope="before", window=32),
    "window": CacheScheme(4, window=37, clip=0.9),
    "window-before-rope": CacheScheme(2, 32, rope="before", window=5),
    "centered": CacheScheme(4, key_center="mean"),
    "centered-window-before-rope": CacheScheme(4, window=33, rope="before", key_center="mean"),
}
TOKENS = 330


@dataclass
class Case:
    """Queries (tokens, heads x repeats, width), scaled; keys and values (tokens, heads, width), all float32.

    cos, sin: (tokens, width / 2). center: (heads, width), or None.
    """

    scheme: CacheScheme | None
    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    center: Tensor | None


def case_of(name: str, heads: int = 2, repeats: int = 3, width: int = 64, tokens: int = TOKENS) -> Case:
    scheme = SCHEMES[name]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(tokens, heads * repeats, width, generator=generator)
    k, v = torch.randn(2, tokens, heads, width, generator=generator)
    # Outliers: a channel of keys, a first token that all attend to, one token without values.
    k[:, :, 1] += 9
    k[0] *= 3
    v[7] = 0
    angles = torch.arange(tokens).unsqueeze(1) * 100.0 ** -torch.linspace(0, 1, width // 2)
    center = None
    if scheme is not None and scheme.is_centered:
        center = k.mean(0)
    return Case(scheme, q * width**-0.5, k, v, angles.cos(), angles.sin(), center)


def by_reference(case: Case, window: int = 0) -> Tensor:
    """The output, (tokens, query heads, width), with tokens that are not quantized at 16 bits."""
    scheme = case.scheme
    keeps = scheme is None or scheme.window > 0
    keys, values = TensorStore(scheme, True, case.center), TensorStore(scheme, False)
    k, v = (x.transpose(0, 1).unsqueeze(0) for x in (case.k, case.v))
    k, v = (x.half().float() if keeps else x for x in (k, v))
    key_view, value_view = keys.append(k), values.append(v)
    if scheme is not None and scheme.rope == "before":
        cos, sin = (torch.cat([angles] * 2, -1).unsqueeze(0) for angles in (case.cos, case.sin))
        key_view = map_view(key_view, lambda x: rotate(x, cos, sin))
    count = case.q.shape[0]
    visible = torch.ones(count, count, dtype=torch.bool).tril()
    if window:
        visible = visible.triu(1 - window)
    out = attend(case.q.transpose(0, 1).unsqueeze(0), key_view, value_view, visible.view(1, 1, count, count), 1.0)
    return out[0].transpose(0, 1)


def by_step(case: Case, pieces: Sequence[int], isa: str, window: int = 0) -> Tensor:
    """The same by the C++ step, `pieces` tokens at a time."""
    heads, width = case.k.shape[1:]
    rules = cache_rules(case.scheme, heads, width)
    attention = kernels.module.Attention(isa, rules, case.q.shape[1], width // 2, window)
    sequence: Any = attention.open()
    out = torch.full_like(case.q, torch.nan)
    start = 0
    for tokens in pieces:
        part = slice(start, start + tokens)
        tensors = [x[part].contiguous() for x in (case.q, case.k, case.v, case.cos, case.sin)]
        center = 0 if case.center is None else case.center.data_ptr()
        result = torch.full_like(tensors[0], torch.nan)
        attention.append(sequence, tokens, *(x.data_ptr() for x in tensors), center, result.data_ptr())
        out[part] = result
        start += tokens
    assert sequence.length == start
    return out


def assert_equal(case: Case, actual: Tensor, expected: Tensor) -> None:
    """Exact products differ by the order of sums, those of codes by queries and weights of 16 bits.

    The keys have a channel of about 9, whose group multiplies the rounding of all its queries; hence the largest.
    """
    error = actual - expected
    largest, share = (1e-5, 1e-6) if is_exact(case.scheme, case.k.shape[2]) else (1e-3, 2e-4)
    torch.testing.assert_close(actual, expected, rtol=largest, atol=largest)
    assert error.norm() <= share * expected.norm()


def is_exact(scheme: CacheScheme | None, width: int) -> bool:
    """Whether no code is multiplied as a whole number: groups that end within 16 channels are decoded first."""
    if scheme is None:
        return True
    group = width if scheme.group_size == -1 else scheme.group_size
    return group % 16 != 0 and group < width


STEP_SETS = ("portable", "avx2", "avxvnni", "avx512", "avx512vnni", "neon")


def instruction_sets() -> list[str]:
    return [name for name in kernels.instruction_sets() if name in STEP_SETS]


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("name", SCHEMES)
def test_attention_equals_the_reference(name: str, isa: str) -> None:
    case = case_of(name)
    assert_equal(case, by_step(case, [TOKENS], isa), by_reference(case))


@pytest.mark.parametrize("name", SCHEMES)
def test_pieces_give_the_same_bits_as_a_whole(name: str) -> None:
    case, isa = case_of(name), kernels.default()
    whole = by_step(case, [TOKENS], isa)
    assert torch.equal(by_step(case, [1] * TOKENS, isa), whole)
    assert torch.equal(by_step(case, [13, 1, 1, 90, 200, 25], isa), whole)


@pytest.mark.parametrize("window", [1, 5, 32, 100, 257])
@pytest.mark.parametrize("name", ["none", "4-bits", "window", "4-bits-by-channel"])
def test_a_sliding_window_hides_older_tokens(name: str, window: int) -> None:
    case, isa = case_of(name), kernels.default()
    expected = by_reference(case, window)
    assert_equal(case, by_step(case, [TOKENS], isa, window), expected)
    assert_equal(case, by_step(case, [100, *[1] * 200, 30], isa, window), expected)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize(
    ("heads", "repeats", "width"), [(1, 1, 16), (3, 1, 40), (1, 7, 128), (2, 12, 96), (1, 30, 256)]
)
def test_any_head_count_and_width(heads: int, repeats: int, width: int, isa: str) -> None:
    for name in ("none", "3-bits", "window", "by-channel-16"):
        case = case_of(name, heads, repeats, width, 70)
        assert_equal(case, by_step(case, [69, 1], isa), by_reference(case))


def test_planted_faults_are_seen() -> None:
    isa = kernels.default()
    for name in ("window", "4-bits-by-channel", "centered"):
        case = case_of(name)
        expected = by_reference(case)
        faults = {
            "a key": ("k", 100), "a value": ("v", 100), "a query": ("q", 300),
        }  # fmt: skip
        for field, token in faults.values():
            changed = case_of(name)
            getattr(changed, field)[token] *= 1.5
            with pytest.raises(AssertionError):
                assert_equal(changed, by_step(changed, [TOKENS], isa), expected)
        with pytest.raises(AssertionError):
            assert_equal(case, by_step(case, [TOKENS], isa, TOKENS - 1), expected)


def test_cropping_gives_the_tokens_before_back() -> None:
    case, isa = case_of("4-bits"), kernels.default()
    expected = by_step(case, [TOKENS], isa)
    attention = kernels.module.Attention(isa, cache_rules(case.scheme, 2, 64), 6, 32, 0)
    sequence = attention.open()

    def append(start: int, stop: int) -> Tensor:
        tensors = [x[start:stop].contiguous() for x in (case.q, case.k, case.v)]
        out = torch.full_like(tensors[0], torch.nan)
        attention.append(sequence, stop - start, *(x.data_ptr() for x in tensors), 0, 0, 0, out.data_ptr())
        return out

    append(0, 200)
    assert sequence.crop(50)
    assert sequence.length == 50
    assert torch.equal(append(50, TOKENS), expected[50:])


def test_a_window_does_not_come_back() -> None:
    case, isa = case_of("window"), kernels.default()
    attention = kernels.module.Attention(isa, cache_rules(case.scheme, 2, 64), 6, 32, 0)
    sequence = attention.open()
    tensors = [x.contiguous() for x in (case.q, case.k, case.v)]
    out = torch.empty_like(case.q)
    attention.append(sequence, TOKENS, *(x.data_ptr() for x in tensors), 0, 0, 0, out.data_ptr())
    assert not sequence.crop(100)
    assert sequence.length == TOKENS
