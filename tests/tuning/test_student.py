"""A packed linear with gradients: the same function as the running one, and gradients as autograd and calculus have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from subnibble.runtime import activations, ops
from subnibble.runtime.ops import LinearTerms
from subnibble.scheme import ActivationScheme, Scheme
from subnibble.tensor import CodedMatrix, PackedRange, PackedTensor, float_scales, stored_scales
from subnibble.tuning.student import Entrance, LearnedMatrix, StudentLinear

ROWS, COLUMNS, TOKENS = 6, 40, 7
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
    return PackedRange.pack(CodedMatrix(codes, scales, zeros), scheme)


def packed(rows: int, columns: int, scheme: Scheme, seed: int = 0) -> PackedTensor:
    return PackedTensor((packed_range(rows, columns, scheme, seed),))


def two_ranges() -> PackedTensor:
    parts = packed_range(ROWS, COLUMNS - 8, SCHEMES["symmetric"]), packed_range(ROWS, 8, Scheme(8, -1, "none"), 1)
    return PackedTensor(parts)


def student(terms: LinearTerms, learned: bool = True) -> StudentLinear:
    return StudentLinear(terms, Entrance(terms, learned, torch.float32), learned)


def rank_terms(residual: str) -> LinearTerms:
    return LinearTerms(
        packed(ROWS, COLUMNS, SCHEMES["integer"]),
        activation=INPUTS["integer"],
        salient=packed(ROWS, 16, SCHEMES["integer"], 2),
        residual=residual,
    )


TERMS = {
    **{
        f"{w} on {a}": LinearTerms(packed(ROWS, COLUMNS, SCHEMES[w]), activation=INPUTS[a])
        for w in SCHEMES
        for a in INPUTS
    },
    **{f"salient, residual {kind}": rank_terms(kind) for kind in ops.RESIDUALS},
    "salient on exact": LinearTerms(
        packed(ROWS, COLUMNS, SCHEMES["integer"]), salient=packed(ROWS, 16, SCHEMES["real"], 2)
    ),
    **{
        f"branch on {a}": LinearTerms(
            packed(ROWS, COLUMNS, SCHEMES["symmetric"]),
            activation=INPUTS[a],
            low_rank=(packed(4, COLUMNS, SCHEMES["8 bits"], 3), packed(ROWS, 4, Scheme(8, -1, "integer"), 4)),
        )
        for a in ("exact", "symmetric")
    },
    "everything before": LinearTerms(
        packed(ROWS, COLUMNS, SCHEMES["sign"]),
        bias=drawn(ROWS, seed=5),
        column_scale=1 + drawn(COLUMNS, seed=6).half().float() / 8,
        gather=torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(7)).to(torch.int16),
        blocks=(32, 8),
        activation=INPUTS["integer"],
    ),
    "outliers": LinearTerms(two_ranges(), activation=ActivationScheme(3, 16, "none", clip=0.9, outliers=8)),
}  # fmt: skip


@pytest.mark.parametrize("name", TERMS)
def test_it_gives_what_the_running_linear_gives(name: str) -> None:
    x = drawn(2, TOKENS, COLUMNS, seed=9)

    found, wanted = student(TERMS[name])(x), ops.linear(x, TERMS[name])

    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4 * float(wanted.abs().amax()))


@pytest.mark.parametrize("name", TERMS)
def test_untouched_scales_are_stored_as_they_were(name: str) -> None:
    found = student(TERMS[name]).stored()

    held = {f"{prefix}{key}": part for prefix, m in TERMS[name].matrices.items() for key, part in m.state().items()}
    wanted = {key: part for key, part in held.items() if ".scales" in f".{key}" and part.dtype != torch.uint8}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) and found[key].dtype == wanted[key].dtype for key in wanted)


@pytest.mark.parametrize("name", [name for name in TERMS if "mxfp4 on" not in name])
def test_learned_scales_run_as_they_are_stored(name: str) -> None:
    linear = student(TERMS[name])
    with torch.no_grad():
        for i, share in enumerate(linear.matrices.parameters()):
            share.copy_(0.2 * drawn(*share.shape, seed=i))
    stored, x = linear.stored(), drawn(3, COLUMNS, seed=9)
    changed = {}
    for prefix, matrix in TERMS[name].matrices.items():
        own = {key.removeprefix(prefix): part for key, part in stored.items() if key.startswith(prefix or "scales")}
        changed[prefix] = PackedTensor.from_state(matrix.state() | own, matrix.layout)
    terms = TERMS[name]
    named = {"weight": changed[""]} | ({"salient": changed["salient."]} if terms.salient else {})
    named |= {"low_rank": (changed["down."], changed["up."])} if terms.low_rank else {}

    wanted = ops.linear(x, LinearTerms(**{**terms.__dict__, **named}))

    found = linear(x).detach()

    # float16 keeps three digits; a branch's inner codes may flip by one.
    assert float((found - wanted).norm() / wanted.norm()) < 5e-3
    assert float((ops.linear(x, terms) - wanted).norm() / wanted.norm()) > 0.02


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "mxfp4"])
def test_gradients_are_those_of_the_dense_product(name: str) -> None:
    matrix, x = LearnedMatrix(packed(ROWS, COLUMNS, SCHEMES[name]), True), drawn(TOKENS, COLUMNS).requires_grad_(True)
    with torch.no_grad():
        for share in matrix.shares:
            share.copy_(0.3 * drawn(*share.shape, seed=2))
    upstream = drawn(TOKENS, ROWS, seed=3)

    plain = x @ matrix.dense(tuple(matrix.shares)).T
    wanted = torch.autograd.grad(plain, [x, *matrix.shares], upstream)
    found = torch.autograd.grad(matrix(x), [x, *matrix.shares], upstream)

    for one, other in zip(found, wanted, strict=True):
        # Autograd carries a gradient back through the rounding to float16 in float16.
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().amax()))


def test_scales_that_are_powers_of_two_stay() -> None:
    linear = student(TERMS["mxfp4 on exact"])

    assert not any(share.requires_grad for share in linear.matrices.parameters())
    assert linear.stored() == {}


@pytest.mark.parametrize("name", ["symmetric", "integer", "token"])
def test_an_inputs_gradient_stops_where_it_was_clipped(name: str) -> None:
    scheme = INPUTS[name]
    assert scheme is not None
    terms = LinearTerms(packed(ROWS, COLUMNS, SCHEMES["integer"]), activation=scheme)
    x = drawn(TOKENS, COLUMNS, seed=4).requires_grad_(True)
    entrance = Entrance(terms, True, torch.float32)
    upstream = drawn(TOKENS, COLUMNS, seed=5)

    _, seen = entrance(x)
    to_x, to_share = torch.autograd.grad(seen, [x, entrance.share], upstream)

    # The oracle: a group's scale is proportional to the clip, what is inside the range moves with it by rounding alone.
    wanted_x, wanted_share = torch.zeros_like(to_x), 0.0
    for first, stop in scheme.group_bounds(COLUMNS):
        own = x.detach()[:, first:stop]
        if scheme.zero_point == "none":
            last = 2 ** (scheme.bits - 1) - 1
            scale, low, high = scheme.clip * own.abs().amax(1, keepdim=True) / last, -last, last
            zero = torch.zeros_like(scale)
        else:
            bottom, top = own.amin(1, keepdim=True).clamp(max=0), own.amax(1, keepdim=True).clamp(min=0)
            scale, low, high = scheme.clip * (top - bottom) / (2**scheme.bits - 1), 0, 2**scheme.bits - 1
            scale = scale.to(torch.bfloat16).float()
            zero = (-scheme.clip * bottom / scale).round().clamp(0, high)
        scale = scale.to(torch.bfloat16).float()
        place = own / scale + zero
        inside = (place >= low - 0.5) & (place <= high + 0.5)
        codes = place.round().clamp(low, high) - zero
        grad = upstream[:, first:stop]
        wanted_x[:, first:stop] = grad * inside
        wanted_share += float((grad * torch.where(inside, codes - own / scale, codes) * scale).sum())
    assert scheme.clip == 1 or bool((wanted_x == 0).any())
    torch.testing.assert_close(to_x, wanted_x)
    assert float(to_share) == pytest.approx(wanted_share, rel=1e-3, abs=1e-3)


def test_outliers_gradients_pass_and_move_no_clip() -> None:
    scheme = ActivationScheme(3, 16, "none", clip=0.7, outliers=8)
    entrance = Entrance(LinearTerms(two_ranges(), activation=scheme), True, torch.float32)
    x = drawn(TOKENS, COLUMNS, seed=4).requires_grad_(True)
    upstream = torch.zeros(TOKENS, COLUMNS)
    upstream[:, -8:] = 1

    _, seen = entrance(x)
    to_x, to_share = torch.autograd.grad(seen, [x, entrance.share], upstream)

    assert torch.equal(to_x, upstream)
    assert float(to_share) == 0


def test_a_learned_clip_is_the_one_that_runs() -> None:
    terms = TERMS["symmetric on symmetric"]
    linear, x = student(terms), drawn(TOKENS, COLUMNS, seed=9)
    with torch.no_grad():
        linear.entrance.share.fill_(-0.25)

    scheme = linear.entrance.scheme

    assert scheme == ActivationScheme(3, 16, "none", clip=0.6)
    wanted = activations.quantize_values(x, scheme) @ terms.weight.dequantize().T
    torch.testing.assert_close(linear(x), wanted, rtol=1e-5, atol=1e-4)


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
    entrance = Entrance(terms, True, torch.float32)
    readers, x = [StudentLinear(terms, entrance, True) for _ in range(3)], drawn(TOKENS, COLUMNS)

    outputs = [reader(x) for reader in readers]
    entrance.forget()
    readers[0](x)

    assert len(calls) == 2
    assert torch.equal(outputs[0], outputs[2])
