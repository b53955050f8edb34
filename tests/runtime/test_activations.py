"""Dynamic quantization of inputs against a NumPy oracle and literal tokens; the laws a nearest level obeys."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from subnibble.runtime.activations import Quantized, quantize
from subnibble.tensor.activation_scheme import ActivationScheme

Float32 = NDArray[np.float32]
MX = ActivationScheme(4, 32, "none", "mxfp4")
SCHEMES = [
    ActivationScheme(8),
    ActivationScheme(8, 128, "none"),
    ActivationScheme(8, 32, clip=0.9),
    ActivationScheme(4, 128),
    ActivationScheme(4, -1, "none"),
    ActivationScheme(4, 24, "none", clip=0.85),
    ActivationScheme(3, 7),
    ActivationScheme(3, 64, "none"),
    MX,
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
CHANNELS = 139


def tokens(channels: int = CHANNELS) -> Tensor:
    """(12, channels) float32: signed, an outlier channel, and tokens that are zero, constant, positive, tiny, huge."""
    x = torch.randn(12, channels, generator=torch.Generator().manual_seed(0))
    x[:, channels // 2] *= 100
    x[1] = 0
    x[2] = 3.7
    x[3] = -0.013
    x[4] = x[4].abs() + 1
    x[5] = -x[5].abs()
    x[6, :40] = 0
    x[7] *= 1e-30
    x[8] *= 1e30
    x[9] *= 1e-41
    x[10] = torch.arange(channels) - 20
    return x


def to_bfloat16(x: Float32) -> Float32:
    """Round to the upper 16 bits, ties to even."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def oracle_group(x: Float32, scheme: ActivationScheme) -> tuple[Float32, np.float32, int]:
    """Numbers (g,), scale and zero-point of one group of one token; all arithmetic float32."""
    if scheme.grid == "mxfp4":
        largest = float(np.abs(x).max())
        exponent = math.frexp(largest)[1] - 3 if largest > 0 else -126
        scale = np.float32(2.0 ** max(exponent, -126))
        numbers = []
        for value in x / scale:
            size = abs(float(value))
            code = min(range(8), key=lambda c: (abs(E2M1[c] - size), c % 2))
            numbers.append(math.copysign(2 * E2M1[code], value))
        return np.array(numbers, np.float32), np.float32(scale / 2), 0
    clip = np.float32(scheme.clip)
    smallest = np.float32(2.0**-120)
    if scheme.zero_point == "none":
        last = 2 ** (scheme.bits - 1) - 1
        scale = to_bfloat16(np.maximum(clip * np.abs(x).max() / np.float32(last), smallest).reshape(1))[0]
        return np.clip(np.rint(x / scale), -last, last), scale, 0
    last = 2**scheme.bits - 1
    low, high = np.minimum(x.min(), np.float32(0)), np.maximum(x.max(), np.float32(0))
    scale = to_bfloat16(np.maximum(clip * (high - low) / np.float32(last), smallest).reshape(1))[0]
    zero = int(np.clip(np.rint(clip * -low / scale), 0, last))
    codes = np.clip(np.rint(x / scale).astype(np.float64) + zero, 0, last)
    return (codes - zero).astype(np.float32), scale, zero


def oracle(x: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers (t, k), scales (t, groups), zero-points (t, groups)."""
    wide = x.float().numpy()
    width = x.shape[1] if scheme.group_size == -1 else scheme.group_size
    numbers = np.empty_like(wide)
    groups = -(-x.shape[1] // width)
    scales, zeros = np.empty((len(wide), groups), np.float32), np.empty((len(wide), groups), np.float32)
    for t, token in enumerate(wide):
        for g in range(groups):
            part = slice(g * width, (g + 1) * width)
            numbers[t, part], scales[t, g], zeros[t, g] = oracle_group(token[part], scheme)
    return torch.from_numpy(numbers), torch.from_numpy(scales), torch.from_numpy(zeros)


def agrees(actual: Quantized, x: Tensor, scheme: ActivationScheme) -> bool:
    numbers, scales, _ = oracle(x, scheme)
    return torch.equal(actual.numbers, numbers) and torch.equal(actual.scales, scales)


@every_scheme
@pytest.mark.parametrize("channels", [CHANNELS, 128, 5, 1])
def test_numbers_and_scales_are_those_of_the_oracle(scheme, channels) -> None:
    x = tokens(channels)
    result = quantize(x, scheme)
    assert result.numbers.dtype == result.scales.dtype == torch.float32
    assert agrees(result, x, scheme)


def one_number_off_by_one(result: Quantized) -> Quantized:
    numbers = result.numbers.clone()
    numbers[0, 17] += 1
    return replace(result, numbers=numbers)


def one_scale_off_by_one_bit(result: Quantized) -> Quantized:
    scales = result.scales.clone()
    scales[0, -1] *= 1 + 2.0**-23
    return replace(result, scales=scales)


def tokens_share_a_scale(result: Quantized) -> Quantized:
    return replace(result, scales=result.scales.amax(0, keepdim=True).expand_as(result.scales))


def tokens_reversed(result: Quantized) -> Quantized:
    return replace(result, numbers=result.numbers.flip(0), scales=result.scales.flip(0))


def channels_shifted_by_one(result: Quantized) -> Quantized:
    return replace(result, numbers=result.numbers.roll(1, 1))


def signs_flipped(result: Quantized) -> Quantized:
    return replace(result, numbers=-result.numbers)


FAULTS = [
    one_number_off_by_one,
    one_scale_off_by_one_bit,
    tokens_share_a_scale,
    tokens_reversed,
    channels_shifted_by_one,
    signs_flipped,
]


@every_scheme
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_oracle_rejects_a_planted_fault(scheme, fault: Callable[[Quantized], Quantized]) -> None:
    x = tokens()
    assert not agrees(fault(quantize(x, scheme)), x, scheme)


OTHER_RULES = {
    "clip left out": (ActivationScheme(4, 24, "none", clip=0.85), ActivationScheme(4, 24, "none")),
    "zero-points left out": (ActivationScheme(4, 128), ActivationScheme(4, 128, "none")),
    "a group wider by one": (ActivationScheme(3, 7), ActivationScheme(3, 8)),
    "a scale for the whole token": (ActivationScheme(8, 32), ActivationScheme(8)),
    "even steps for mxfp4": (MX, ActivationScheme(4, 32, "none")),
}


@pytest.mark.parametrize("rule", OTHER_RULES)
def test_the_oracle_rejects_another_rule(rule) -> None:
    scheme, other = OTHER_RULES[rule]
    assert agrees(quantize(tokens(), scheme), tokens(), scheme)
    assert not agrees(quantize(tokens(), other), tokens(), scheme)


LITERAL = [
    # Scale 1: halves go to even.
    (ActivationScheme(4, -1, "none"), [7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -7.0], [7, 0, 2, 2, 0, -2, -2, -7], [1.0]),
    # From 0 to 15, though no value is below 5.
    (ActivationScheme(4), [15.0, 5.0, 6.5, 7.5], [15, 5, 6, 8], [1.0]),
    # From -3 to 12: zero-point 3.
    (ActivationScheme(4), [12.0, -3.0, 0.5, 1.5, -0.5], [12, -3, 0, 2, 0], [1.0]),
    # From -7 to 0: zero-point 7, the last code.
    (ActivationScheme(3), [-7.0, -3.5, -1.0], [-7, -4, -1], [1.0]),
    # Half of the range is kept: 7 at scale 0.5.
    (ActivationScheme(4, -1, "none", clip=0.5), [7.0, -7.0, 1.25, 3.5], [7, -7, 2, 7], [0.5]),
    # 1 / 7 in bfloat16 is 0.142578125, 3 / 7 is 0.427734375, 1 / 3 is 0.333984375; the last group has one channel.
    (ActivationScheme(4, 2, "none"), [1.0, 0.5, -3.0], [7, 4, -7], [0.142578125, 0.427734375]),
    (ActivationScheme(3, 2, "none"), [1.0, 0.5, -3.0], [3, 1, -3], [0.333984375, 1.0]),
    # Largest 7.5: scale 1, numbers in halves; what is beyond 6 saturates, ties to even.
    (MX, [7.5, -7.5, 5.0, 2.5, 0.25, 0.75, -1.0, 3.5], [12, -12, 8, 4, 0, 2, -2, 8], [0.5]),
    (MX, [0.0, 0.0], [0, 0], [2.0**-127]),
    (ActivationScheme(8), [0.0, 0.0], [0, 0], [2.0**-120]),
]


@pytest.mark.parametrize(("scheme", "token", "numbers", "scales"), LITERAL)
def test_a_literal_token_has_these_numbers(scheme, token, numbers, scales) -> None:
    result = quantize(torch.tensor([token]), scheme)
    assert result.numbers.tolist() == [numbers]
    assert result.scales.tolist() == [scales]


@every_scheme
def test_numbers_are_whole_and_in_range(scheme) -> None:
    numbers = quantize(tokens(), scheme).numbers
    largest = {8: 255, 4: 15, 3: 7}[scheme.bits]
    if scheme.grid == "mxfp4":
        largest = 12
    elif scheme.zero_point == "none":
        largest //= 2
    assert torch.equal(numbers, numbers.round())
    assert float(numbers.abs().max()) == largest
    if scheme.zero_point == "integer":
        for start, stop in scheme.group_bounds(CHANNELS):
            group = numbers[:, start:stop]
            assert bool((group.amax(1) - group.amin(1) <= largest).all())


def grid_of(scheme: ActivationScheme, zero: Tensor) -> Tensor:
    """All numbers of a group's grid: (levels,)."""
    if scheme.grid == "mxfp4":
        sizes = torch.tensor(E2M1) * 2
        return torch.cat([sizes, -sizes])
    if scheme.zero_point == "none":
        last = 2 ** (scheme.bits - 1) - 1
        return torch.arange(-last, last + 1).float()
    return torch.arange(2**scheme.bits) - zero


@every_scheme
def test_no_other_level_is_nearer(scheme) -> None:
    x = tokens()
    actual, (_, _, zeros) = quantize(x, scheme), oracle(x, scheme)
    values = actual.values().double()
    for g, (start, stop) in enumerate(actual.bounds):
        for t in range(len(x)):
            part, scale = x[t, start:stop].double(), actual.scales[t, g].double()
            others = (grid_of(scheme, zeros[t, g]).double() * scale - part.unsqueeze(1)).abs().amin(1)
            # The quotient is rounded to float32, no more.
            slack = 2.0**-22 * part.abs()
            assert bool(((values[t, start:stop] - part).abs() <= others + slack).all())


@every_scheme
def test_values_are_numbers_times_the_scale_of_their_group(scheme) -> None:
    result = quantize(tokens(), scheme)
    values = result.values()
    assert result.bounds == scheme.group_bounds(CHANNELS)
    for g, (start, stop) in enumerate(result.bounds):
        assert torch.equal(values[:, start:stop], result.numbers[:, start:stop] * result.scales[:, g : g + 1])


@every_scheme
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_type_of_input_is_widened_and_nothing_else(scheme, dtype) -> None:
    x = tokens()[[0, 1, 2, 3, 4, 5, 6, 10, 11]].to(dtype)
    result, wide = quantize(x, scheme), quantize(x.float(), scheme)
    assert torch.equal(result.numbers, wide.numbers)
    assert torch.equal(result.scales, wide.scales)
    assert result.scales.dtype == torch.float32


@every_scheme
def test_a_token_is_quantized_by_itself(scheme) -> None:
    x = tokens()
    together = quantize(x, scheme)
    for t in range(len(x)):
        alone = quantize(x[t : t + 1], scheme)
        assert torch.equal(alone.numbers[0], together.numbers[t])
        assert torch.equal(alone.scales[0], together.scales[t])
    assert quantize(x[:0], scheme).numbers.shape == (0, CHANNELS)


@every_scheme
def test_zero_is_a_number_and_scales_are_never_zero(scheme) -> None:
    x = tokens()
    result = quantize(x, scheme)
    assert bool((result.numbers[x == 0] == 0).all())
    assert bool((result.scales > 0).all())
    assert bool(result.values().isfinite().all())
    narrow = result.scales.bfloat16().float()
    assert torch.equal(narrow, result.scales)


@pytest.mark.parametrize("clip", [0.9, 0.5])
@pytest.mark.parametrize("zero_point", ["none", "integer"])
def test_a_clip_shrinks_the_range_and_saturates_beyond(zero_point, clip) -> None:
    x = tokens()[[0, 4, 5]]
    whole = quantize(x, ActivationScheme(8, -1, zero_point))
    kept = quantize(x, ActivationScheme(8, -1, zero_point, clip=clip))
    assert torch.allclose(kept.scales, clip * whole.scales, rtol=2.0**-7, atol=0)
    assert torch.allclose(
        kept.values().amax(1), clip * whole.values().amax(1), rtol=0.02, atol=float(kept.scales.max())
    )
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    inside = (x > 0.4 * low) & (x < 0.4 * high)
    assert bool(((kept.values() - x)[inside].abs() <= 0.51 * kept.scales.expand_as(x)[inside]).all())


@every_scheme
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_made_finite(scheme, value) -> None:
    x = tokens()[[0, 0]].clone()
    x[0, 3] = value
    values = quantize(x, scheme).values()
    assert not bool(values[0, 3].isfinite())
    assert bool(values[1].isfinite().all())


def test_a_very_wide_token_stays_finite() -> None:
    x = torch.tensor([[1e38, -1e38, 1.0, 0.0]])
    for scheme in SCHEMES:
        assert bool(quantize(x, scheme).values().isfinite().all()), scheme.name
