from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subnibble.errors import BadRecipe, NumericalFailure
from subnibble.rounding import grid
from subnibble.tensor.packed import scale_dtype
from subnibble.tensor.scheme import BITS, SCALE_TYPES, ZERO_POINTS, Scheme

MINMAX = grid.Clip("minmax")
CLIPS = (MINMAX, grid.Clip("mse", 2.4))
KINDS = [(2, "float16"), (3, "float16"), (3, "bfloat16"), (4, "float32"), (8, "float16")]
SCHEMES = [Scheme(bits, 19, zero, scale) for (bits, scale), zero in itertools.product(KINDS, ZERO_POINTS)]
every_clip = pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.name)


def schemes(*zero_points: str) -> pytest.MarkDecorator:
    chosen = [scheme for scheme in SCHEMES if scheme.zero_point in zero_points]
    return pytest.mark.parametrize("scheme", chosen, ids=lambda scheme: scheme.name)


every_scheme = schemes(*ZERO_POINTS)


def weights(rows: int = 11, columns: int = 47, seed: int = 0) -> Tensor:
    """Signed, with outliers; row 2 constant, 3 negative, 4 far from 0, columns 19..37 of row 5 zero."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=g) * 0.05
    w[0, 3], w[1, 40] = 1.7, -2.3
    w[2] = 0.37
    w[3] = -w[3].abs() - 0.01
    w[4] += 3
    w[5, 19:38] = 0
    return w


def levels(scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """All levels of every row: (m, 2**bits)."""
    return grid.decode(torch.arange(scheme.levels, dtype=torch.float32), scale, zero)


def stored_error(scheme: Scheme) -> float:
    """Relative rounding error of the stored type."""
    return torch.finfo(scale_dtype(scheme)).eps / 2


def bent_floats(largest: float) -> st.SearchStrategy[float]:
    return st.floats(-largest, largest, width=32, allow_subnormal=False)


@schemes("real")
def test_real_minmax_grid_ends_at_the_extremes_up_to_stored_precision(scheme: Scheme) -> None:
    w = weights()[[0, 1, 3, 4, 6, 7, 8], :19]
    scale, zero = grid.fit(w, scheme, MINMAX)
    ends = levels(scale, zero, scheme)
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    float32_error = 8 * torch.finfo(torch.float32).eps * w.abs().amax(1, keepdim=True)
    zero_error = 1.01 * stored_error(scheme) * low.abs() + float32_error
    scale_error = 1.01 * stored_error(scheme) * (high - low)
    assert ((ends[:, :1] - low).abs() <= zero_error).all()
    assert (ends[:, -1:] >= high - zero_error - scale_error).all()
    # Where a zero-point would lie more than 4096 steps away, the steps are made larger instead.
    far = torch.maximum(low.abs(), high.abs()) / 4096 > (high - low) / (scheme.levels - 1)
    assert (((ends[:, -1:] - high).abs() <= zero_error + scale_error) | far).all()
    assert int(far.sum()) <= 1


@schemes("integer")
@every_clip
def test_integer_zero_is_a_code_and_codes_a_weight_of_zero_exactly(scheme: Scheme, clip: grid.Clip) -> None:
    w = weights()
    scale, zero = grid.fit(w, scheme, clip)
    assert torch.equal(zero, zero.round())
    assert bool(((zero >= 0) & (zero < scheme.levels)).all())
    nothing = torch.zeros(w.shape[0], 1)
    assert torch.equal(grid.decode(grid.encode(nothing, scale, zero, scheme), scale, zero), nothing)


@schemes("none")
@every_clip
def test_symmetric_grid_has_zero_at_its_middle_code(scheme: Scheme, clip: grid.Clip) -> None:
    w = weights()
    scale, zero = grid.fit(w, scheme, clip)
    assert torch.equal(zero, torch.full_like(zero, 2 ** (scheme.bits - 1)))
    assert torch.equal(levels(scale, zero, scheme)[:, 2 ** (scheme.bits - 1)], torch.zeros(w.shape[0]))
    assert grid.quantized(w, scheme, clip).zeros is None


@pytest.mark.parametrize("zero_point", ["none", "integer"])
def test_minmax_grids_with_zero_reach_within_half_a_step_of_the_extremes(zero_point: str) -> None:
    for bits in BITS:
        scheme = Scheme(bits, 19, zero_point, "float32")
        w = weights()
        scale, zero = grid.fit(w, scheme, MINMAX)
        ends = levels(scale, zero, scheme)
        half = scale / 2 * (1 + 1e-5)
        assert (ends[:, :1] <= w.amin(1, keepdim=True) + half).all()
        assert (ends[:, -1:] >= w.amax(1, keepdim=True) - half).all()
        span = torch.maximum(w.amax(1), -w.amin(1)) * 2 if zero_point == "none" else (
            w.amax(1).clamp(min=0) - w.amin(1).clamp(max=0)
        )  # fmt: skip
        torch.testing.assert_close(scale[:, 0] * (scheme.levels - 1), span, rtol=1e-6, atol=0)


@every_scheme
@every_clip
def test_all_zero_group_decodes_to_zeros_exactly(scheme: Scheme, clip: grid.Clip) -> None:
    group = torch.zeros(3, 7)
    scale, zero = grid.fit(group, scheme, clip)
    assert bool((scale > 0).all())
    assert torch.equal(grid.decode(grid.encode(group, scale, zero, scheme), scale, zero), group)
    quantized = grid.quantized(weights(), scheme, clip)
    columns, z = quantized.codes[5, 19:38].float(), 2 ** (scheme.bits - 1)
    row_zero = torch.tensor(float(z)) if quantized.zeros is None else quantized.zeros[5, 1]
    assert torch.equal(grid.decode(columns, quantized.scales[5, 1], row_zero), torch.zeros(19))


@every_scheme
@every_clip
def test_constant_row_is_finite_and_accurate(scheme: Scheme, clip: grid.Clip) -> None:
    for value in (0.37, -0.37, 1000.0, -3e-3):
        group = torch.full((2, 13), value)
        scale, zero = grid.fit(group, scheme, clip)
        actual = grid.decode(grid.encode(group, scale, zero, scheme), scale, zero)
        assert bool(torch.isfinite(actual).all())
        # A grid without zero-point has no level at either end of -c .. c, but half a step off. Others do.
        exact = 4 * stored_error(scheme) * abs(value)
        bound = exact + (abs(value) / (scheme.levels - 1) if scheme.zero_point == "none" else 0)
        assert float((actual - group).abs().max()) <= bound


@every_scheme
@every_clip
def test_scales_and_zeros_are_exact_in_the_stored_type(scheme: Scheme, clip: grid.Clip) -> None:
    stored = scale_dtype(scheme)
    w = torch.cat([weights(), weights(seed=1) * 1e-4, torch.zeros(1, 47)])
    for tensor in grid.fit(w, scheme, clip):
        assert tensor.dtype == torch.float32
        assert tensor.shape == (w.shape[0], 1)
        assert torch.equal(tensor.to(stored).float(), tensor)
    quantized = grid.quantized(w, scheme, clip)
    assert torch.equal(quantized.scales.to(stored).float(), quantized.scales)
    assert quantized.zeros is None or torch.equal(quantized.zeros.to(stored).float(), quantized.zeros)


def loss(group: Tensor, scheme: Scheme, clip: grid.Clip, power: float) -> Tensor:
    scale, zero = grid.fit(group, scheme, clip)
    error = (grid.decode(grid.encode(group, scale, zero, scheme), scale, zero) - group).abs()
    return (error.square() if power == 2 else error.pow(power)).sum(1)


@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(1, 24).flatmap(
        lambda n: st.lists(st.lists(bent_floats(1e4), min_size=n, max_size=n), min_size=1, max_size=4)
    ),
    bits=st.sampled_from((2, 3, 4)),
    zero_point=st.sampled_from(ZERO_POINTS),
    scale_type=st.sampled_from(tuple(SCALE_TYPES)),
    power=st.sampled_from((1.0, 2.0, 2.4, 4.0)),
)
def test_mse_clip_is_never_worse_than_minmax(
    rows: list[list[float]], bits: int, zero_point: str, scale_type: str, power: float
) -> None:
    scheme = Scheme(bits, -1, zero_point, scale_type)
    group = torch.tensor(rows)
    clipped = loss(group, scheme, grid.Clip("mse", power), power)
    assert bool((clipped <= loss(group, scheme, MINMAX, power)).all())


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_mse_clip_is_never_worse_than_minmax_where_minmax_is_exact(zero_point: str) -> None:
    # Shrinking by 0 % must give back the extremes themselves, not extremes that went through the middle.
    g = torch.Generator().manual_seed(3)
    group = torch.randn(4000, 2, generator=g) * torch.logspace(-3, 3, 4000).unsqueeze(1)
    scheme = Scheme(2, -1, zero_point, "float32")
    assert bool((loss(group, scheme, grid.Clip("mse"), 2.0) <= loss(group, scheme, MINMAX, 2.0)).all())


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("together", [2, 7, 200])
def test_candidates_tried_together_give_the_grid_of_one_by_one(
    together: int, zero_point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, columns = weights(), torch.rand(47, generator=torch.Generator().manual_seed(2))
    # Losses that are infinite or, as infinity times 0, no numbers.
    w[7] *= 1e20
    w[7, 3], columns[3] = 4e19, 0.0
    scheme = Scheme(3, -1, zero_point, "float32")
    for group in (w, w[:, 2:40], w.T.contiguous().T, w[:1]):
        for power, h in ((2.0, None), (2.0, columns), (2.4, columns)):
            grids = []
            for at_once in (1, together):
                monkeypatch.setattr(grid, "_RANGES_AT_ONCE", at_once * len(group))
                monkeypatch.setattr(grid, "_ERRORS_AT_ONCE", at_once * group.numel())
                column_weights = None if h is None else h[: group.shape[1]]
                grids.append(grid.fit(group, scheme, grid.Clip("mse", power), column_weights))
            for one_by_one, all_together in zip(*grids, strict=True):
                assert torch.equal(one_by_one, all_together)


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_mse_clip_beats_minmax_where_one_outlier_spans_the_group(zero_point: str) -> None:
    group = weights(9, 128)
    group[:, 17] = 0.4
    scheme = Scheme(2, -1, zero_point)
    plain = loss(group, scheme, MINMAX, 2.0)
    assert bool((loss(group, scheme, grid.Clip("mse"), 2.0) < 0.999 * plain)[[1, 3, 6, 7, 8]].all())


@every_scheme
@every_clip
def test_encode_gives_the_nearest_of_all_levels(scheme: Scheme, clip: grid.Clip) -> None:
    w = weights(seed=4)
    scale, zero = grid.fit(w, scheme, clip)
    # Beyond both ends of every grid as well.
    asked = torch.cat([w, 1.9 * w, w - 1.5 * w.amax(1, keepdim=True)], dim=1)
    codes = grid.encode(asked, scale, zero, scheme)
    all_levels = levels(scale.double(), zero.double(), scheme).unsqueeze(1)
    distance = (all_levels - asked.double().unsqueeze(2)).abs()
    ours = distance.gather(2, codes.long().unsqueeze(2)).squeeze(2)
    ulps = 2 * torch.finfo(torch.float32).eps * (asked.abs() + scale * (zero.abs() + 1)).double()
    assert bool((ours <= distance.amin(2) + ulps).all())


@pytest.mark.parametrize("bits", BITS)
def test_encode_is_exact_on_dyadic_grids(bits: int) -> None:
    scheme = Scheme(bits, -1, "real", "float32")
    scale, zero = torch.tensor([[0.25], [0.5], [2.0]]), torch.tensor([[1.5], [-3.25], [0.0]])
    q = torch.arange(-8 * 4, (scheme.levels + 8) * 4) / 4
    expected = torch.tensor([min(max(round(float(x)), 0), scheme.levels - 1) for x in q])
    actual = grid.encode(grid.decode(q, scale, zero), scale, zero, scheme)
    assert torch.equal(actual, expected.expand(3, -1).float())


@every_scheme
@every_clip
def test_codes_are_in_range_and_groups_are_coded_side_by_side(scheme: Scheme, clip: grid.Clip) -> None:
    w = weights()
    quantized = grid.quantized(w, scheme, clip)
    assert quantized.codes.dtype == torch.uint8
    assert quantized.codes.shape == w.shape
    assert int(quantized.codes.max()) <= scheme.levels - 1
    assert quantized.scales.shape == (w.shape[0], 3)
    for index, (start, stop) in enumerate([(0, 19), (19, 38), (38, 47)]):
        scale, zero = grid.fit(w[:, start:stop], scheme, clip)
        assert torch.equal(quantized.scales[:, index : index + 1], scale)
        assert quantized.zeros is None or torch.equal(quantized.zeros[:, index : index + 1], zero)
        codes = grid.encode(w[:, start:stop], scale, zero, scheme)
        assert torch.equal(quantized.codes[:, start:stop].float(), codes)


@every_scheme
@every_clip
def test_rows_are_coded_independently(scheme: Scheme, clip: grid.Clip) -> None:
    w = weights()
    whole = grid.quantized(w, scheme, clip)
    for row in (0, 4, 5):
        alone = grid.quantized(w[row : row + 1], scheme, clip)
        assert torch.equal(whole.codes[row], alone.codes[0])
        assert torch.equal(whole.scales[row], alone.scales[0])


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@every_clip
def test_scales_too_large_for_float16_are_a_numerical_failure(zero_point: str, clip: grid.Clip) -> None:
    w = weights()
    w[1, 40] = -3e6
    with pytest.raises(NumericalFailure, match=r"set scale_type = .float32."):
        grid.quantized(w, Scheme(4, 19, zero_point, "float16"), clip)
    for wide in ("bfloat16", "float32"):
        assert bool(torch.isfinite(grid.quantized(w, Scheme(4, 19, zero_point, wide), clip).scales).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_weights_that_are_not_finite_are_a_numerical_failure(zero_point: str, bad: float) -> None:
    w = weights()
    w[7, 20] = bad
    for clip in CLIPS:
        with pytest.raises(NumericalFailure):
            grid.quantized(w, Scheme(4, 19, zero_point, "float32"), clip)


@every_scheme
@every_clip
@pytest.mark.parametrize("size", [1e-7, 1e-9, 1e-20, 1e-38])
def test_tiny_weights_stay_finite_within_a_step(scheme: Scheme, clip: grid.Clip, size: float) -> None:
    w = weights()[:, :19] * size
    scale, zero = grid.fit(w, scheme, clip)
    codes = grid.encode(w, scale, zero, scheme)
    result = grid.decode(codes, scale, zero)
    assert bool((scale > 0).all())
    for tensor in (scale, zero, codes, result):
        assert bool(torch.isfinite(tensor).all())
    assert bool((result.abs() <= 2 * w.abs().amax(1, keepdim=True) + scale).all())


def test_unknown_clip_and_power_are_bad_recipes() -> None:
    with pytest.raises(BadRecipe, match="minmax, mse"):
        grid.Clip("percentile")
    for power in (0.5, 4.5, float("nan")):
        with pytest.raises(BadRecipe, match="from 1 to 4"):
            grid.Clip("mse", power)
