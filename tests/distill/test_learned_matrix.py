"""A packed matrix with gradients: those of calculus, on each grid, and what is multiplied is what is stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_student import COLUMNS, ROWS, SCHEMES, TOKENS, drawn, packed, two_ranges
from torch import Tensor

from subnibble.distill import learned_matrix
from subnibble.distill.learned_matrix import LearnedMatrix, LearnedRange
from subnibble.distill.settings import SPACES
from subnibble.tensor.packed import PackedRange, PackedTensor, QuantizedMatrix
from subnibble.tensor.scheme import Scheme

# On which something is learned; and numbers that are not rounded.
LEARNED = {name: scheme for name, scheme in SCHEMES.items() if name != "mxfp4"}
LEARNED |= {f"{name}, {kind}": replace(LEARNED[name], scale_type=kind)
            for name in ("real", "sign") for kind in ("float32", "bfloat16")}  # fmt: skip
BOTH = ("scales", "zero_points")


def with_changes(matrix: LearnedMatrix) -> LearnedMatrix:
    with torch.no_grad():
        for i, parameter in enumerate(matrix.parameters()):
            parameter.copy_(0.3 * drawn(*parameter.shape, seed=i))
    matrix.bound_()
    return matrix


def stored(matrix: LearnedMatrix, before: PackedTensor) -> PackedTensor:
    return PackedTensor.from_state(before.state() | matrix.stored(), before.layout)


def written_out(quantized: QuantizedMatrix, scheme: Scheme, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """The matrix by docs/format.md, column by column, float64. scales, zeros: leaves for autograd."""
    columns = []
    for group, (first, stop) in enumerate(scheme.group_bounds(quantized.codes.shape[1])):
        for column in range(first, stop):
            code = quantized.codes[:, column].long()
            if scheme.grid == "sign":
                signs = [2 * ((code >> bit) & 1) - 1 for bit in range(scheme.bits)]
                columns.append(sum(scales[:, group * scheme.bits + b] * signs[b] for b in range(scheme.bits)))
                continue
            zero = scheme.levels // 2 if zeros is None else zeros[:, group]
            columns.append(scales[:, group] * (code - zero))
    return torch.stack(columns, 1)


def check_gradients(scheme: Scheme) -> None:
    """Compare with autograd over the matrix written out, of the numbers that are stored."""
    before = packed(ROWS, COLUMNS, scheme)
    matrix, x = with_changes(LearnedMatrix(before, BOTH)), drawn(TOKENS, COLUMNS).requires_grad_(True)
    upstream = drawn(TOKENS, ROWS, seed=3)
    old, new = before.ranges[0].unpack(), stored(matrix, before).ranges[0].unpack()
    leaves = [new.scales.double().requires_grad_(True)]
    zeros = None if new.zeros is None else new.zeros.double().requires_grad_(scheme.zero_point == "real")
    leaves += [zeros] if zeros is not None and zeros.requires_grad else []

    actual = torch.autograd.grad(matrix(x), [x, *matrix.parameters()], upstream)

    plain = x.double() @ written_out(new, scheme, leaves[0], zeros).T
    expected_x, to_scales, *to_zeros = torch.autograd.grad(plain, [x, *leaves], upstream.double())
    # A share of a scale moves it by as much as it was; planes are outermost.
    probs = (to_scales * old.scales).unflatten(1, (-1, scheme.scales_per_group)).permute(2, 0, 1)
    target = [expected_x, probs, *(gradient.unsqueeze(-1) for gradient in to_zeros)]
    for one, other in zip(actual, target, strict=True):
        bound = 1e-5 * float(other.abs().amax())
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=bound)


@pytest.mark.parametrize("name", LEARNED)
def test_gradients_are_those_of_the_matrix_written_out(name: str) -> None:
    check_gradients(LEARNED[name])


@pytest.mark.parametrize("name", ["real, float32", "sign, float32"])
def test_gradients_are_finite_differences(name: str) -> None:
    before, upstream = packed(ROWS, COLUMNS, LEARNED[name]), drawn(ROWS, COLUMNS, seed=3)
    matrix = with_changes(LearnedMatrix(before, BOTH))

    actual = matrix.gradients(upstream)

    # The matrix is linear in each: a difference is exact however large its step.
    for parameter, gradient in zip(matrix.parameters(), actual, strict=True):
        target = torch.empty_like(gradient).flatten()
        for i in range(parameter.numel()):
            sums = []
            for step in (0.25, -0.25):
                with torch.no_grad():
                    parameter.view(-1)[i] += step
                    sums.append(float((matrix.dense().double() * upstream).sum()))
                    parameter.view(-1)[i] -= step
            target[i] = (sums[0] - sums[1]) / 0.5
        torch.testing.assert_close(gradient.flatten(), target, rtol=1e-3, atol=1e-4)


def rotated(matrix: LearnedRange, result: list[Tensor]) -> list[Tensor]:
    return [*result[:-1], -result[-1]]


def without_scale(matrix: LearnedRange, result: list[Tensor]) -> list[Tensor]:
    return [*result[:-1], result[-1] / matrix._learned_scales()[0].unsqueeze(-1)]


def of_the_old_scale(matrix: LearnedRange, result: list[Tensor]) -> list[Tensor]:
    return [*result[:-1], result[-1] * (matrix._scales / matrix._learned_scales())[0].unsqueeze(-1)]


def without_zero(matrix: LearnedRange, result: list[Tensor]) -> list[Tensor]:
    return [result[0] + result[1].squeeze(-1) * matrix._scales * 0.1, *result[1:]]


def in_another_row(matrix: LearnedRange, result: list[Tensor]) -> list[Tensor]:
    return [*result[:-1], result[-1].roll(1, 0)]


@pytest.mark.parametrize("fault", [rotated, without_scale, of_the_old_scale, without_zero, in_another_row])
def test_planted_faults_of_gradients_are_found(
    fault: Callable[[LearnedRange, list[Tensor]], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = LearnedRange.gradients
    monkeypatch.setattr(LearnedRange, "gradients", lambda self, grad: fault(self, right(self, grad)))
    with pytest.raises(AssertionError, match="not close"):
        check_gradients(LEARNED["real"])


@pytest.mark.parametrize("name", [*LEARNED, "mxfp4"])
def test_it_is_what_the_stored_matrix_gives_bit_for_bit(name: str) -> None:
    before = packed(ROWS, COLUMNS, LEARNED.get(name, SCHEMES["mxfp4"]))
    matrix = LearnedMatrix(before, SPACES)
    assert torch.equal(matrix.dense(), before.dequantize())
    assert stored(matrix, before).state().keys() == before.state().keys()

    with_changes(matrix)

    after = stored(matrix, before)
    assert torch.equal(matrix.dense(), after.dequantize())
    assert torch.equal(before.dequantize(), after.dequantize()) == (name == "mxfp4")
    assert torch.equal(after.ranges[0].codes, before.ranges[0].codes)


def test_what_is_not_rounded_as_it_is_stored_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_matrix, "_in_type", lambda exact, kind: exact)
    before = packed(ROWS, COLUMNS, LEARNED["real"])

    matrix = with_changes(LearnedMatrix(before, BOTH))

    assert not torch.equal(matrix.dense(), stored(matrix, before).dequantize())


def test_each_range_moves_by_itself() -> None:
    before = two_ranges()
    matrix = with_changes(LearnedMatrix(before, SPACES))

    after = stored(matrix, before)

    assert set(matrix.stored()) == {"scales", "scales_1"}
    assert torch.equal(matrix.dense(), after.dequantize())
    upstream = drawn(ROWS, COLUMNS, seed=3)
    parts = upstream.split([part.num_columns for part in before.ranges], 1)
    target = [LearnedMatrix(PackedTensor((part,)), BOTH).gradients(column_range)[0]
              for part, column_range in zip(before.ranges, parts, strict=True)]  # fmt: skip
    actual = matrix.gradients(upstream)
    assert all(torch.equal(one, other) for one, other in zip(actual, target, strict=True))


def test_a_zero_point_at_zero_is_learned_too() -> None:
    scheme = SCHEMES["real"]
    column_range = packed(ROWS, COLUMNS, scheme).ranges[0]
    quantized = replace(column_range.unpack(), zeros=torch.zeros(ROWS, scheme.groups(COLUMNS)))
    matrix = LearnedMatrix(PackedTensor((PackedRange.pack(quantized, scheme),)), ["zero_points"])

    to_shift = matrix.gradients(drawn(ROWS, COLUMNS))[1]

    assert bool((to_shift != 0).all())
    (one,) = matrix.learned("l.")["zero_points"]
    assert one.name == "l.zeros"
    assert one.unit == pytest.approx(float(quantized.codes.float().mean()))


def test_zero_points_move_by_less_than_the_grid_is_wide_and_stay_finite() -> None:
    scheme = SCHEMES["real"]
    column_range = packed(ROWS, COLUMNS, scheme).ranges[0]
    zeros = torch.tensor([0.0, 65504, -65504])
    quantized = replace(column_range.unpack(), zeros=zeros.expand(ROWS, 3))
    for far in (-100.0, 100.0):
        matrix = LearnedMatrix(PackedTensor((PackedRange.pack(quantized, scheme),)), BOTH)
        with torch.no_grad():
            for parameter in matrix.parameters():
                parameter.fill_(far)
        matrix.bound_()
        result = matrix.stored()["zeros"]
        assert bool(result.isfinite().all())
        assert result[0, 0] == (4 if far > 0 else -4)
