"""A packed linear with gradients: the same function as the running one, and gradients as autograd and calculus have."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from linears import built, changed
from subnibble.checkpoint.module_specs import linear_of, linear_spec, linear_state, matrices_of
from subnibble.distill.linear import Entrance, StudentLinear
from subnibble.distill.settings import SPACES
from subnibble.runtime import activations, ops, site_input
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.linear import Linear, SiteInput
from subnibble.tensor.packed import PackedRange, PackedTensor, QuantizedMatrix, float_scales, stored_scales
from subnibble.tensor.scheme import Scheme

ROWS, COLUMNS, TOKENS = 6, 40, 7
CPU = torch.device("cpu")
SCHEMES = {
    "symmetric": Scheme(3, 16, "none"),
    "integer": Scheme(4, 16, "integer"),
    "real": Scheme(2, 16, "real"),
    "sign": Scheme(3, 16, "none", grid="sign"),
    "8 bits": Scheme(8, -1, "integer"),
    "mxfp4": Scheme(4, 32, "none", "e8m0", "mxfp4"),
}
INPUTS = {
    "exact": None,
    "symmetric": ActivationScheme(3, 16, "none", clip=0.8),
    "integer": ActivationScheme(4, 16, clip=0.9),
    "token": ActivationScheme(8),
    "mxfp4": ActivationScheme(4, 32, "none", "mxfp4"),
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed_range(rows: int, columns: int, scheme: Scheme, seed: int = 0) -> PackedRange:
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(columns)
    codes = torch.randint(scheme.levels, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = 0.05 + torch.rand(rows, groups * scheme.scales_per_group, generator=generator) / 4
    if scheme.grid == "mxfp4":
        scales = torch.exp2(scales.log2().floor())
    scales = float_scales(stored_scales(scales, scheme), scheme)
    zeros = None
    if scheme.zero_point == "integer":
        zeros = torch.randint(scheme.levels, (rows, groups), generator=generator).float()
    if scheme.zero_point == "real":
        zeros = (scheme.levels * torch.rand(rows, groups, generator=generator)).half().float()
    return PackedRange.pack(QuantizedMatrix(codes, scales, zeros), scheme)


def packed(rows: int, columns: int, scheme: Scheme, seed: int = 0) -> PackedTensor:
    return PackedTensor((packed_range(rows, columns, scheme, seed),))


def two_ranges() -> PackedTensor:
    parts = packed_range(ROWS, COLUMNS - 8, SCHEMES["symmetric"]), packed_range(ROWS, 8, Scheme(8, -1, "none"), 1)
    return PackedTensor(parts)


def student(terms: Linear, learned: Collection[str] = SPACES) -> StudentLinear:
    return StudentLinear(terms, Entrance(terms.input, learned, torch.float32, CPU), learned)


def rank_terms(requantized: int) -> Linear:
    return built(
        packed(ROWS, COLUMNS, SCHEMES["integer"]),
        activation=INPUTS["integer"],
        salient=packed(ROWS, 16, SCHEMES["integer"], 2),
        requantized=requantized,
    )


def with_changes(linear: StudentLinear) -> StudentLinear:
    """With all that is learned somewhere else."""
    with torch.no_grad():
        for i, parameter in enumerate((*linear.matrices.parameters(), *linear.entrance.parameters())):
            if parameter.requires_grad:
                parameter.copy_(0.2 * drawn(*parameter.shape, seed=i))
    linear.bound_()
    linear.entrance.bound_()
    linear.entrance.forget()
    return linear


def is_learned(key: str, part: Tensor) -> bool:
    """Whether that is learned which is stored for a linear under this name."""
    return part.is_floating_point() and key.rpartition(".")[2].partition("_")[0] in ("scales", "zeros", "column")


def stored_terms(terms: Linear, linear: StudentLinear) -> Linear:
    """The terms with what a linear learned, as a checkpoint holds it."""
    spec = replace(linear_spec(terms), activation=linear.entrance.scheme)
    return linear_of(spec, linear_state(terms) | dict(linear.stored()))


TERMS = {
    **{
        f"{w} on {a}": built(packed(ROWS, COLUMNS, SCHEMES[w]), activation=INPUTS[a])
        for w in SCHEMES
        for a in INPUTS
    },
    **{f"salient, {requantized} of them twice": rank_terms(requantized) for requantized in (0, 16)},
    "salient on exact": built(
        packed(ROWS, COLUMNS, SCHEMES["integer"]), salient=packed(ROWS, 16, SCHEMES["real"], 2)
    ),
    **{
        f"branch on {a}": built(
            packed(ROWS, COLUMNS, SCHEMES["symmetric"]),
            activation=INPUTS[a],
            low_rank=(packed(4, COLUMNS, SCHEMES["8 bits"], 3), packed(ROWS, 4, Scheme(8, -1, "integer"), 4)),
        )
        for a in ("exact", "symmetric")
    },
    "everything before": built(
        packed(ROWS, COLUMNS, SCHEMES["sign"]),
        bias=drawn(ROWS, seed=5),
        column_scale=(1 + drawn(COLUMNS, seed=6) / 8).half(),
        gather=torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(7)).to(torch.int16),
        blocks=(32, 8),
        activation=INPUTS["integer"],
    ),
    "scaled": built(
        packed(ROWS, COLUMNS, SCHEMES["real"]),
        column_scale=(1 + drawn(COLUMNS, seed=6) / 8).half(),
        activation=INPUTS["symmetric"],
    ),
    "outliers": built(two_ranges(), activation=ActivationScheme(3, 16, "none", clip=0.9, outliers=8)),
}  # fmt: skip


@pytest.mark.parametrize("name", TERMS)
def test_it_gives_what_the_running_linear_gives(name: str) -> None:
    x = drawn(2, TOKENS, COLUMNS, seed=9)

    actual, target = student(TERMS[name])(x), ops.linear(x, TERMS[name])

    assert actual.shape == target.shape
    torch.testing.assert_close(actual, target, rtol=1e-5, atol=1e-4 * float(target.abs().amax()))


@pytest.mark.parametrize("name", TERMS)
def test_what_was_not_touched_is_stored_as_it_was(name: str) -> None:
    actual = student(TERMS[name]).stored()

    target = {key: part for key, part in linear_state(TERMS[name]).items() if is_learned(key, part)}
    assert actual.keys() == target.keys()
    assert all(torch.equal(actual[key], target[key]) and actual[key].dtype == target[key].dtype for key in target)


@pytest.mark.parametrize("name", [name for name in TERMS if "mxfp4 on" not in name])
def test_what_is_learned_runs_as_it_is_stored(name: str) -> None:
    terms, x = TERMS[name], drawn(3, COLUMNS, seed=9)
    linear = with_changes(student(terms))

    now = stored_terms(terms, linear)

    # Bit for bit: what meets an input first, and every matrix.
    parts = zip(matrices_of(now.weight).values(), linear._learned_matrices.values(), strict=True)
    assert all(torch.equal(matrix.dequantize(), part.dense()) for matrix, part in parts)
    assert torch.equal(site_input.enter(x, now.input), linear.entrance(x)[0])
    # float16 keeps three digits; a branch's inner codes may flip by one.
    target, actual = ops.linear(x, now), linear(x).detach()
    assert float((actual - target).norm() / target.norm()) < 5e-3
    assert float((ops.linear(x, terms) - target).norm() / target.norm()) > 0.02


@pytest.mark.parametrize("space", ["scales", "zero_points", "column_scales", "clips"])
@pytest.mark.parametrize("name", ["real on integer", "scaled", "salient on exact"])
def test_one_setting_lets_its_own_move_and_nothing_else(name: str, space: str) -> None:
    linear, terms = student(TERMS[name], [space]), TERMS[name]

    ends = {"scales": ".scales", "zero_points": ".zeros", "column_scales": ".column_scale", "clips": ".clip"}
    result = linear.learned("l") | linear.entrance.learned("l")
    assert all(one.name.endswith(ends[space]) for group in result.values() for one in group)
    assert {key: len(group) for key, group in result.items() if group} == {
        "scales": {"scales": len(matrices_of(terms.weight))},
        "zero_points": {"zero_points": 1},
        "column_scales": {"column_scales": 1} if terms.input.column_scale is not None else {},
        "clips": {"clips": 1} if terms.input.activation is not None else {},
    }[space]
    assert all(f".{key}".endswith(ends[space]) for key in linear.stored())


@pytest.mark.parametrize("activation", INPUTS)
def test_gradients_of_column_scales_are_those_of_the_inputs_that_they_multiply(activation: str) -> None:
    # Of y = f(x c (1 + δ)): (1 + δ_j) dL/dδ_j = Σ_t x_tj dL/dx_tj.
    terms = changed(TERMS["scaled"], activation=INPUTS[activation], column_scale=1 + drawn(COLUMNS, seed=6) / 8)
    linear, x = with_changes(student(terms)), drawn(TOKENS, COLUMNS, seed=4).requires_grad_(True)
    columns = linear.entrance.scale_change
    assert columns is not None

    to_x, actual = torch.autograd.grad(linear(x), [x, columns], drawn(TOKENS, ROWS, seed=5))

    target = (x.detach() * to_x).sum(0) / (1 + columns.detach())
    torch.testing.assert_close(actual, target, rtol=1e-4, atol=1e-5 * float(target.abs().amax()))


def test_gradients_of_column_scales_are_finite_differences() -> None:
    terms = changed(TERMS["scaled"], activation=None, column_scale=1 + drawn(COLUMNS, seed=6) / 8)
    linear, x, upstream = student(terms), drawn(TOKENS, COLUMNS, seed=4), drawn(TOKENS, ROWS, seed=5)
    columns, scales = linear.entrance.scale_change, terms.input.column_scale
    assert columns is not None
    assert scales is not None

    (actual,) = torch.autograd.grad(linear(x), [columns], upstream)

    def loss(step: Tensor) -> Tensor:
        return (ops.linear(x, changed(terms, column_scale=scales * (1 + step))).double() * upstream).sum()

    # The product is linear in them: a difference is exact however large its step.
    steps = torch.eye(COLUMNS) / 2
    target = torch.stack([loss(step) - loss(-step) for step in steps]).float()
    torch.testing.assert_close(actual, target, rtol=1e-4, atol=1e-4 * float(target.abs().amax()))


def test_readers_of_one_entrance_store_the_column_scales_that_they_share() -> None:
    terms = TERMS["scaled"]
    entrance = Entrance(terms.input, SPACES, torch.float32, CPU)
    readers, x = [StudentLinear(terms, entrance, SPACES) for _ in range(2)], drawn(TOKENS, COLUMNS)
    columns = entrance.scale_change
    assert columns is not None

    alone = torch.autograd.grad(readers[0](x).sum(), [columns])[0]
    entrance.forget()
    together = torch.autograd.grad(sum(reader(x).sum() for reader in readers), [columns])[0]
    with_changes(readers[0])

    torch.testing.assert_close(together, 2 * alone)
    stored = [reader.stored()["column_scale"] for reader in readers]
    assert torch.equal(stored[0], stored[1])
    assert stored[0].data_ptr() != stored[1].data_ptr()


def test_factors_keep_their_signs_and_stay_finite() -> None:
    terms = changed(TERMS["scaled"], column_scale=torch.tensor([-1.0, 40000.0, 1e-3, 1.0] * 10).half())
    linear = student(terms)
    for far in (-5.0, 5.0):
        with torch.no_grad():
            for parameter in (*linear.parameters(), *linear.entrance.parameters()):
                parameter.fill_(far)
        linear.bound_()
        linear.entrance.bound_()
        stored = linear.stored()
        assert all(bool(part.isfinite().all()) for part in stored.values())
        assert torch.equal(stored["column_scale"].sign(), torch.tensor([-1.0, 1, 1, 1] * 10).half())
        assert bool((stored["scales"] > 0).all())


def test_scales_that_are_powers_of_two_stay() -> None:
    linear = student(TERMS["mxfp4 on exact"])

    assert not any(share.requires_grad for share in linear.matrices.parameters())
    assert linear.stored() == {}


@pytest.mark.parametrize("name", ["symmetric", "integer", "token"])
def test_an_inputs_gradient_stops_where_it_was_clipped(name: str) -> None:
    scheme = INPUTS[name]
    assert scheme is not None
    terms = built(packed(ROWS, COLUMNS, SCHEMES["integer"]), activation=scheme)
    x = drawn(TOKENS, COLUMNS, seed=4).requires_grad_(True)
    entrance = Entrance(terms.input, SPACES, torch.float32, CPU)
    upstream = drawn(TOKENS, COLUMNS, seed=5)

    _, entered = entrance(x)
    to_x, to_share = torch.autograd.grad(entered, [x, entrance.share], upstream)

    # The oracle: a group's scale is proportional to the clip, what is inside the range moves with it by rounding alone.
    wanted_x, expected_share = torch.zeros_like(to_x), 0.0
    for first, stop in scheme.group_bounds(COLUMNS):
        group_x = x.detach()[:, first:stop]
        if scheme.zero_point == "none":
            last = 2 ** (scheme.bits - 1) - 1
            scale, low, high = scheme.clip * group_x.abs().amax(1, keepdim=True) / last, -last, last
            zero = torch.zeros_like(scale)
        else:
            bottom, top = group_x.amin(1, keepdim=True).clamp(max=0), group_x.amax(1, keepdim=True).clamp(min=0)
            scale, low, high = scheme.clip * (top - bottom) / (2**scheme.bits - 1), 0, 2**scheme.bits - 1
            scale = scale.to(torch.bfloat16).float()
            zero = (-scheme.clip * bottom / scale).round().clamp(0, high)
        scale = scale.to(torch.bfloat16).float()
        place = group_x / scale + zero
        inside = (place >= low - 0.5) & (place <= high + 0.5)
        codes = place.round().clamp(low, high) - zero
        grad = upstream[:, first:stop]
        wanted_x[:, first:stop] = grad * inside
        expected_share += float((grad * torch.where(inside, codes - group_x / scale, codes) * scale).sum())
    assert scheme.clip == 1 or bool((wanted_x == 0).any())
    torch.testing.assert_close(to_x, wanted_x)
    assert float(to_share) == pytest.approx(expected_share, rel=1e-3, abs=1e-3)


def test_outliers_gradients_pass_and_move_no_clip() -> None:
    scheme = ActivationScheme(3, 16, "none", clip=0.7, outliers=8)
    entrance = Entrance(SiteInput(activation=scheme), SPACES, torch.float32, CPU)
    x = drawn(TOKENS, COLUMNS, seed=4).requires_grad_(True)
    upstream = torch.zeros(TOKENS, COLUMNS)
    upstream[:, -8:] = 1

    _, entered = entrance(x)
    to_x, to_share = torch.autograd.grad(entered, [x, entrance.share], upstream)

    assert torch.equal(to_x, upstream)
    assert float(to_share) == 0


def test_a_learned_clip_is_the_one_that_runs() -> None:
    terms = TERMS["symmetric on symmetric"]
    linear, x = student(terms), drawn(TOKENS, COLUMNS, seed=9)
    with torch.no_grad():
        linear.entrance.share.fill_(-0.25)

    scheme = linear.entrance.scheme

    assert scheme == ActivationScheme(3, 16, "none", clip=0.6)
    target = activations.quantize_values(x, scheme) @ terms.weight.main.dequantize().T
    torch.testing.assert_close(linear(x), target, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("share", "clip"), [(5.0, 1.0), (-3.0, 0.05)])
def test_a_clip_stays_in_its_range(share: float, clip: float) -> None:
    entrance = student(TERMS["symmetric on symmetric"]).entrance
    with torch.no_grad():
        entrance.share.fill_(share)

    entrance.bound_()

    assert entrance.scheme is not None
    assert entrance.scheme.clip == clip


def test_a_site_is_quantized_once_for_all_its_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, usual = [], activations.quantize
    monkeypatch.setattr(activations, "quantize", lambda *args: calls.append(1) or usual(*args))
    terms = TERMS["symmetric on symmetric"]
    entrance = Entrance(terms.input, SPACES, torch.float32, CPU)
    readers, x = [StudentLinear(terms, entrance, SPACES) for _ in range(3)], drawn(TOKENS, COLUMNS)

    outputs = [reader(x) for reader in readers]
    entrance.forget()
    readers[0](x)

    assert len(calls) == 2
    assert torch.equal(outputs[0], outputs[2])
