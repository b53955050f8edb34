from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from subnibble.calibrate.stats import AbsMax, AbsMean, Drift, Gram, Mean, Sample, WeightedMean

CHANNELS = 37
SPLITS = ((0, 1), (1, 64), (64, 64), (64, 203), (203, 260))
Make = Callable[[], Gram | AbsMax | Mean]
KINDS: dict[str, Make] = {
    "gram": lambda: Gram(CHANNELS),
    "gram64": lambda: Gram(CHANNELS, dtype=torch.float64),
    "absmax": lambda: AbsMax(CHANNELS),
    "mean": lambda: Mean(CHANNELS),
    "absmean": lambda: AbsMean(CHANNELS),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def tokens(count: int = 260, seed: int = 0) -> Tensor:
    """Signed, with an outlier channel, an outlier token, a channel of zeros and one that is constant."""
    x = torch.randn(count, CHANNELS, generator=torch.Generator().manual_seed(seed))
    x[:, 4] *= -300
    x[1] *= 50
    x[:, 9] = 0
    x[:, 11] = -0.75
    return x


def whole_numbers(count: int = 260) -> Tensor:
    """Small whole numbers: every sum of their products is exact in float32."""
    return torch.randint(-15, 16, (count, CHANNELS), generator=torch.Generator().manual_seed(1)).float()


def gathered(kind: str, *parts: Tensor) -> Gram | AbsMax | Mean:
    statistic = KINDS[kind]()
    for part in parts:
        statistic.update(part)
    return statistic


def gram_bound(x: Tensor, eps: float) -> Tensor:
    """Per element: each of the n sums and products may be off by eps of the magnitudes summed."""
    wide = x.double().abs()
    return 2 * x.shape[0] ** 0.5 * eps * (wide.T @ wide)


def oracle(kind: str, x: Tensor) -> Tensor:
    wide = x.double()
    if kind.startswith("gram"):
        return torch.einsum("ti,tj->ij", wide, wide)
    if kind == "absmax":
        return wide.abs().max(0).values
    return (wide.abs() if kind == "absmean" else wide).sum(0) / x.shape[0]


def wide_mean(x: Tensor) -> Tensor:
    return x.double().sum(0) / x.shape[0]


def faulty(kind: str, x: Tensor) -> dict[str, Tensor]:
    """Wrong statistics that the comparison with the oracle must tell from right ones."""
    good = oracle(kind, x)
    one_less = oracle(kind, x[:-1])
    largest_signed = x.double().max(0).values
    off = good.clone()
    off.view(-1)[5] *= 1.0001
    return {
        "last token lost": one_less,
        "one element 0.01 % off": off,
        "centred": torch.einsum("ti,tj->ij", x.double() - x.double().mean(0), x.double())
        if kind.startswith("gram")
        else largest_signed,
        "per token": good / x.shape[0],
    } | ({"signed": wide_mean(x), "size of the mean": wide_mean(x).abs()} if kind == "absmean" else {})


def agrees(kind: str, actual: Tensor, x: Tensor) -> bool:
    expected = oracle(kind, x)
    if kind == "absmax":
        return torch.equal(actual.double(), expected)
    if kind in ("mean", "absmean"):
        mass = x.double().abs().sum(0) / x.shape[0]
        bound = torch.finfo(torch.float32).eps * expected.abs() + 1e-13 * mass
    else:
        bound = gram_bound(x, torch.finfo(torch.float64 if kind == "gram64" else torch.float32).eps)
    return bool(((actual.double() - expected).abs() <= bound).all())


@every_kind
def test_statistic_agrees_with_its_definition_in_float64(kind: str) -> None:
    x = tokens()
    assert agrees(kind, gathered(kind, x).value, x)
    assert agrees(kind, gathered(kind, *(x[a:b] for a, b in SPLITS)).value, x)
    assert agrees(kind, gathered(kind, x.bfloat16()).value, x.bfloat16())


@every_kind
def test_oracle_rejects_planted_faults(kind: str) -> None:
    x = tokens()
    assert agrees(kind, oracle(kind, x), x)
    x[-1] = -1000 * x[-1].abs() - 1
    for fault, value in faulty(kind, x).items():
        assert not agrees(kind, value, x), fault


@every_kind
def test_updates_and_merges_without_tokens_change_nothing(kind: str) -> None:
    nothing = torch.empty(0, CHANNELS)
    fresh = gathered(kind, nothing)
    assert torch.equal(fresh.value, torch.zeros_like(KINDS[kind]().value))
    full = gathered(kind, tokens())
    before = full.value.clone()
    full.update(nothing)
    full.merge(fresh)  # type: ignore[arg-type]
    assert torch.equal(full.value, before)
    fresh.merge(full)  # type: ignore[arg-type]
    assert torch.equal(fresh.value, before)


@every_kind
def test_update_leaves_the_tokens_alone_and_keeps_no_view_of_them(kind: str) -> None:
    x = tokens()
    kept = x.clone()
    statistic = gathered(kind, x)
    assert torch.equal(x, kept)
    before = statistic.value.clone()
    x.zero_()
    assert torch.equal(statistic.value, before)


def test_gram_is_symmetric_and_has_exact_zeros_for_a_silent_channel() -> None:
    x = whole_numbers()
    x[:, 9] = 0
    value = gathered("gram", x).value
    assert torch.equal(value, value.T)
    assert torch.equal(value[9], torch.zeros(CHANNELS))


@pytest.mark.parametrize("channels", [1, 255, 256, 257, 600])
def test_gram_of_many_channels_is_whole_and_may_be_read_between_updates(channels: int) -> None:
    x = torch.randint(-15, 16, (40, channels), generator=torch.Generator().manual_seed(2)).float()
    expected = torch.einsum("ti,tj->ij", x.double(), x.double())
    gram, other = Gram(channels), Gram(channels)
    gram.update(x[:7])
    assert torch.equal(gram.value.double(), torch.einsum("ti,tj->ij", x[:7].double(), x[:7].double()))
    gram.update(x[7:20])
    other.update(x[20:])
    gram.merge(other)
    assert torch.equal(gram.value.double(), expected)
    assert torch.equal(gram.value.double(), expected)


@pytest.mark.parametrize("channels", [37, 600])
def test_gram_is_exactly_symmetric_on_any_input(channels: int) -> None:
    gram = Gram(channels)
    for seed in range(3):
        gram.update(torch.randn(70, channels, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(gram.value, gram.value.T)


def test_gram_of_half_precision_tokens_is_accumulated_wide() -> None:
    x = torch.full((4096, CHANNELS), 3.0, dtype=torch.float16)
    assert torch.equal(gathered("gram", x).value, torch.full((CHANNELS, CHANNELS), 9.0 * 4096))
    assert torch.equal(gathered("mean", x * 1000).value, torch.full((CHANNELS,), 3000.0))


# Drift: of two streams, so that its updates take pairs.


def pair(count: int = 260) -> tuple[Tensor, Tensor]:
    """Tokens as fed now, and the full-precision model's: another outlier, a shifted channel, one that is the same."""
    x = tokens(count)
    target = x + 0.1 * tokens(count, seed=2)
    target[:, 5] += 3
    target[:, 12] = x[:, 12]
    return x, target


def drift_of(x: Tensor, target: Tensor, *cuts: int) -> Drift:
    drift = Drift(CHANNELS)
    for a, b in zip((0, *cuts), (*cuts, x.shape[0]), strict=True):
        drift.update(x[a:b], target[a:b])
    return drift


def drift_oracle(x: Tensor, target: Tensor) -> Tensor:
    """Sum over tokens of (x~ - x) xᵀ, one outer product a token, in float64."""
    total = torch.zeros(CHANNELS, CHANNELS, dtype=torch.float64)
    for now, goal in zip(x.double(), target.double(), strict=True):
        total += torch.outer(goal - now, now)
    return total


def is_drift(actual: Tensor, x: Tensor, target: Tensor) -> bool:
    """Per element: differences, products and sums of n tokens may each be off by eps of the magnitudes."""
    now, goal = x.double().abs(), target.double().abs()
    bound = 2 * x.shape[0] ** 0.5 * torch.finfo(torch.float32).eps * (now + goal).T @ now
    return bool(((actual.double() - drift_oracle(x, target)).abs() <= bound).all())


def test_drift_agrees_with_its_definition() -> None:
    x, target = pair()
    assert is_drift(drift_of(x, target).value, x, target)
    assert is_drift(drift_of(x, target, 1, 64, 64, 203).value, x, target)
    half = x.bfloat16(), target.bfloat16()
    assert is_drift(drift_of(*half).value, *half)
    assert drift_of(x, target).value.dtype == torch.float32


def test_drift_oracle_rejects_planted_faults() -> None:
    x, target = pair()
    good = drift_oracle(x, target)
    off = good.clone()
    off[5, 11] *= 1.0001
    wrong = {
        "transposed": good.T,
        "the other sign": -good,
        "of the full-precision inputs": torch.einsum("ti,tj->ij", target.double() - x.double(), target.double()),
        "of the inputs alone": torch.einsum("ti,tj->ij", target.double(), x.double()),
        "last token lost": drift_oracle(x[:-1], target[:-1]),
        "tokens out of step": drift_oracle(x, target.roll(1, 0)),
        "per token": good / x.shape[0],
        "one element 0.01 % off": off,
    }
    assert is_drift(good, x, target)
    for fault, value in wrong.items():
        assert not is_drift(value, x, target), fault


def test_rows_of_drift_are_the_difference_and_columns_the_input() -> None:
    x, target = torch.zeros(1, CHANNELS), torch.zeros(1, CHANNELS)
    x[0, 3], target[0, 3], target[0, 7] = 2.0, 2.0, 5.0
    value = drift_of(x, target).value
    assert torch.nonzero(value).tolist() == [[7, 3]]
    assert float(value[7, 3]) == 10.0


def test_no_difference_is_no_drift() -> None:
    x, target = pair()
    assert torch.equal(drift_of(x, x).value, torch.zeros(CHANNELS, CHANNELS))
    assert torch.equal(drift_of(x, target).value[12], torch.zeros(CHANNELS))


def test_drift_of_double_inputs_is_their_gram_matrix() -> None:
    x = whole_numbers()
    assert torch.equal(drift_of(x, 2 * x).value, gathered("gram", x).value)


def test_drift_leaves_the_tokens_alone_and_keeps_no_view_of_them() -> None:
    x, target = pair()
    kept = x.clone(), target.clone()
    drift = drift_of(x, target)
    assert torch.equal(x, kept[0])
    assert torch.equal(target, kept[1])
    before = drift.value.clone()
    x.zero_()
    target.zero_()
    drift.update(torch.empty(0, CHANNELS), torch.empty(0, CHANNELS))
    assert torch.equal(drift.value, before)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_sums_of_products_hold_numbers_whose_squares_leave_float32(size: float) -> None:
    x = torch.randn(20, 7, generator=torch.Generator().manual_seed(0)) * size
    gram, drift, other = Gram(7), Drift(7), Gram(7)
    gram.update(torch.zeros(3, 7))
    gram.update(x)
    drift.update(x, 2 * x)
    target = x.double().T @ x.double()
    torch.testing.assert_close(gram.value.double(), target, rtol=1e-5, atol=1e-5 * size**2)
    torch.testing.assert_close(drift.value.double(), target, rtol=1e-5, atol=1e-5 * size**2)
    assert gram.value.dtype == drift.value.dtype == (torch.float32 if size == 1 else torch.float64)
    other.update(torch.ones(1, 7))
    other.merge(gram)
    torch.testing.assert_close(other.value.double(), target + 1, rtol=1e-5, atol=1e-5 * size**2)


@pytest.mark.parametrize("every", [1, 7])
def test_a_sample_is_every_so_many_th_token_and_a_copy(every: int) -> None:
    x, sample = tokens(), Sample(CHANNELS, every=every)
    assert sample.value.shape == (0, CHANNELS)
    for a, b in SPLITS:
        sample.update(x[a:b])
    before = x[::every].clone()
    assert torch.equal(sample.value, before)
    x.zero_()
    assert torch.equal(sample.value, before)
    sample.update(x.bfloat16())
    assert sample.value.dtype == torch.float32


def test_a_weighted_mean_is_rounded_once() -> None:
    assert WeightedMean().value == 0
    mean = WeightedMean()
    for number, weight in ((1e16, 1), (2.0, 3), (-1e16, 1)):
        mean.update(number, weight)
    assert mean.value == 6 / 5
