"""The packed store of a KV cache: codes by an oracle, and what queries see of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from subnibble.runtime.kv_cache import LayerStore, TensorStore, dequantize_rows, map_view, quantize_rows
from subnibble.tensor.cache_scheme import CacheScheme

SCHEMES = [
    CacheScheme(4),
    CacheScheme(2, 8),
    CacheScheme(3, 5),
    CacheScheme(8, clip=0.9),
    CacheScheme(3, window=3),
    CacheScheme(2, 4, "channel", window=4),
    CacheScheme(4, 2, "channel", window=6),
]


def states(tokens: int, batch: int = 2, heads: int = 3, width: int = 16, seed: int = 0) -> torch.Tensor:
    """Signed, with an outlier channel, a head of zeros and a constant token."""
    x = torch.randn(batch, heads, tokens, width, generator=torch.Generator().manual_seed(seed))
    x[..., 3] = 20 * x[..., 3] + 50
    x[0, 1] = 0
    x[1, 2, tokens // 2] = 7.5
    return x


def oracle(group: np.ndarray, bits: int, clip: float) -> np.ndarray:
    """One group in NumPy: what its codes stand for."""
    group = group.astype(np.float32)
    low, high = group.min(), group.max()
    middle, half = (low + high) / np.float32(2), np.float32(clip) * (high - low) / np.float32(2)
    stored = np.float32(np.float16(middle - half))
    step = np.float32(max(np.float16(np.float32(2) * half / np.float32(2**bits - 1)), np.float16(2.0**-14)))
    codes = np.clip(np.rint((group - stored) / step), 0, 2**bits - 1)
    return stored + step * codes.astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("clip", [1.0, 0.9])
@pytest.mark.parametrize("group", [16, 5])
def test_coded_rows_are_those_of_the_oracle(bits: int, clip: float, group: int) -> None:
    x = states(5)
    bounds = CacheScheme(bits, group).bounds(16)
    rows = quantize_rows(x, bits, bounds, clip)
    actual = dequantize_rows(rows, bits, bounds, torch.float32)
    for index in np.ndindex(*x.shape[:-1]):
        for start, stop in bounds:
            target = oracle(x[index].numpy()[start:stop], bits, clip)
            assert np.array_equal(actual[index].numpy()[start:stop], target)


def test_error_is_at_most_half_a_step_and_a_constant_group_is_exact() -> None:
    x = states(7)
    bounds = [(0, 16)]
    rows = quantize_rows(x, 4, bounds)
    error = (dequantize_rows(rows, 4, bounds, torch.float32) - x).abs()
    # Of 16-bit lows and scales, a little more than half a step.
    assert bool((error <= 0.5 * rows.scales.float() + 2.0**-10 * x.abs().amax(-1, keepdim=True)).all())
    assert float(error[0, 1].max()) == 0
    assert float(error[1, 2, 3].max()) == 0


def test_what_float16_does_not_hold_is_limited_and_finite() -> None:
    x = torch.tensor([[-1e6, 0.0, 1e6, 3.0]])
    rows = quantize_rows(x, 8, [(0, 4)])
    assert bool(dequantize_rows(rows, 8, [(0, 4)], torch.float32).isfinite().all())


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("of_keys", [True, False])
@pytest.mark.parametrize("chunks", [(19,), (1,) * 19, (7, 1, 1, 5, 5), (4, 4, 4, 4, 3)])
def test_what_a_query_sees_depends_on_its_place_alone(
    scheme: CacheScheme, of_keys: bool, chunks: tuple[int, ...]
) -> None:
    x = states(19)
    store = TensorStore(scheme, of_keys)
    start = 0
    for count in chunks:
        view = store.append(x[:, :, start : start + count])
        assert view.late.shape[2] == store.length == start + count
        for i in range(count):
            mine = view.late
            if view.early is not None:
                positions = torch.arange(view.late.shape[2])
                mine = torch.where((positions < view.counts[i])[:, None], view.late, view.early)
            dense = mine[:, :, : start + i + 1]
            assert torch.equal(dense, expected(x, scheme, of_keys, start + i + 1))
        start += count


def expected(x: torch.Tensor, scheme: CacheScheme, of_keys: bool, tokens: int) -> torch.Tensor:
    """The first `tokens` tokens as their last query sees them, from scratch."""
    quantized = scheme.quantized_tokens(tokens, of_keys)
    actual = x[:, :, :tokens].clone()
    if of_keys and scheme.key_axis == "channel":
        for start in range(0, quantized, scheme.group_size):
            part = actual[:, :, start : start + scheme.group_size].transpose(2, 3).contiguous()
            bounds = [(0, scheme.group_size)]
            rows = quantize_rows(part, scheme.bits, bounds, scheme.clip)
            dense = dequantize_rows(rows, scheme.bits, bounds, x.dtype)
            actual[:, :, start : start + scheme.group_size] = dense.transpose(2, 3)
        return actual
    bounds = scheme.bounds(x.shape[3])
    rows = quantize_rows(actual[:, :, :quantized], scheme.bits, bounds, scheme.clip) if quantized else None
    if rows is not None:
        actual[:, :, :quantized] = dequantize_rows(rows, scheme.bits, bounds, x.dtype)
    return actual


def test_the_oracle_of_positions_rejects_a_window_that_is_one_off() -> None:
    x, scheme = states(9), CacheScheme(3, window=3)
    wrong = CacheScheme(3, window=2)
    assert not torch.equal(expected(x, scheme, False, 9), expected(x, wrong, False, 9))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_memory_is_what_the_scheme_says(scheme: CacheScheme) -> None:
    tokens = 48
    store = LayerStore(scheme)
    x = states(tokens).half()
    store.keys.append(x)
    store.values.append(x)
    left = sum(tokens - scheme.quantized_tokens(tokens, of_keys) for of_keys in (True, False))
    quantized_keys, quantized_values = (scheme.quantized_tokens(tokens, of_keys) for of_keys in (True, False))
    assert left == 2 * tokens - quantized_keys - quantized_values
    exact = left * 2 * 3 * 16 * 2
    if scheme.window == 0:
        assert store.nbytes == 2 * tokens * scheme.token_bytes(3, 16)
    else:
        by_value = CacheScheme(scheme.bits, scheme.group_size).token_bytes(3, 16) / 2
        by_key = scheme.token_bytes(3, 16) - by_value
        assert store.nbytes == 2 * (quantized_keys * by_key + quantized_values * by_value) + exact


def test_a_cache_really_shrinks() -> None:
    x = torch.randn(1, 3, 100, 64).half()
    store = LayerStore(CacheScheme(4))
    store.keys.append(x)
    store.values.append(x)
    assert store.nbytes == 2 * x.nbytes * 36 / 128


def test_no_scheme_keeps_everything_as_it_comes() -> None:
    store = TensorStore(None, of_keys=True)
    x = states(6).double()
    store.append(x[:, :, :4])
    assert torch.equal(store.append(x[:, :, 4:]).late, x)
    assert store.nbytes == x.nbytes


@pytest.mark.parametrize("scheme", [None, *SCHEMES], ids=lambda scheme: scheme.name if scheme else "plain")
def test_selecting_sequences_is_selecting_their_tokens(scheme: CacheScheme | None) -> None:
    x, more = states(9), states(2, seed=1)
    index = torch.tensor([1, 1, 0])
    store, other = TensorStore(scheme, True), TensorStore(scheme, True)
    store.append(x)
    store.select(index)
    other.append(x[index])
    assert store.batch == 3
    assert torch.equal(store.append(more[index]).late, other.append(more[index]).late)


@pytest.mark.parametrize("scheme", [None, CacheScheme(3, 5)], ids=["plain", "coded"])
def test_cropping_takes_the_last_tokens_back(scheme: CacheScheme | None) -> None:
    x = states(9)
    store, other = TensorStore(scheme, False), TensorStore(scheme, False)
    store.append(x)
    store.crop(4)
    other.append(x[:, :, :5])
    assert store.length == 5
    assert torch.equal(store.append(x[:, :, 5:]).late, other.append(x[:, :, 5:]).late)


def test_what_is_coded_behind_a_window_cannot_be_taken_back() -> None:
    by_token, by_channel = TensorStore(CacheScheme(3, window=4), False), TensorStore(SCHEMES[5], True)
    for store in (by_token, by_channel):
        store.append(states(10))
    with pytest.raises(ValueError, match="window = 0"):
        by_token.crop(1)
    # Two windows of four are coded; the two tokens behind them are not.
    by_channel.crop(2)
    assert torch.equal(by_channel.append(states(10)[:, :, 8:]).late, expected(states(10), SCHEMES[5], True, 10))
    with pytest.raises(ValueError, match="window = 0"):
        by_channel.crop(3)
    assert (by_token.length, by_channel.length) == (10, 10)


def test_both_forms_change_alike() -> None:
    store = TensorStore(CacheScheme(3, window=4), False)
    view = store.append(states(9))
    twice = map_view(view, lambda part: 2 * part)
    assert torch.equal(twice.late, 2 * view.late)
    assert torch.equal(twice.early, 2 * view.early)
