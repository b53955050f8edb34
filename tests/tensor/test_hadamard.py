"""Fast Hadamard products against dense ones; orders that the construction reaches, and those it does not."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from subnibble.tensor.hadamard import (
    hadamard,
    hadamard_blocks,
    hadamard_factors,
    has_paley,
    multiply,
    multiply_transposed,
)

# Paley factors, Sylvester's alone, both; orders without any other construction than Paley's.
ORDERS = [1, 2, 4, 8, 12, 16, 20, 24, 32, 40, 44, 48, 60, 64, 80, 96, 128, 144, 240]
BLOCKS = [(1,), (8,), (12,), (20, 20), (16, 4, 1), (12, 8, 2), (4, 24, 44), (1, 1, 1), (64, 32, 16)]
OUT_OF_REACH = [3, 5, 6, 7, 28, 36, 52, 56, 76, 92, 100]


def orthonormal(blocks: tuple[int, ...]) -> Tensor:
    """Block-diagonal, float64."""
    return torch.block_diag(*(hadamard(block) / block**0.5 for block in blocks))


def inputs(columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(2, 3, columns), signed, one channel a hundred times larger, one token zero."""
    x = torch.randn(2, 3, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(columns))
    x[..., columns // 2] *= 100
    x[1, 1] = 0
    return x.to(dtype)


def within_bound(y: Tensor, x: Tensor, matrix: Tensor, c: float = 4.0) -> bool:
    """Every element within `c * eps * sqrt(K) * (|x| @ |H|)` of the product in float64."""
    exact, size = x.double() @ matrix, x.double().abs() @ matrix.abs()
    bound = c * torch.finfo(y.dtype).eps * matrix.shape[0] ** 0.5 * size
    return y.shape == exact.shape and bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("order", ORDERS)
def test_a_hadamard_matrix_has_signs_and_orthogonal_rows_and_columns(order) -> None:
    matrix = hadamard(order)
    assert matrix.dtype == torch.float64
    assert bool((matrix.abs() == 1).all())
    identity = order * torch.eye(order, dtype=torch.float64)
    assert torch.equal(matrix @ matrix.T, identity)
    assert torch.equal(matrix.T @ matrix, identity)


def test_factors_multiply_to_the_order_and_are_two_or_a_prime_and_one() -> None:
    for order in range(1, 201):
        factors = hadamard_factors(order)
        if factors is None:
            assert hadamard(order) is None
            continue
        assert torch.tensor([1, *factors]).prod() == order
        for factor in factors:
            q = factor - 1
            assert factor == 2 or (q % 4 == 3 and all(q % d for d in range(2, q)))
    assert hadamard_factors(1) == ()
    assert hadamard_factors(8) == (2, 2, 2)
    assert hadamard_factors(576) == (12, 12, 2, 2)
    assert hadamard_factors(14336) == (224, 2, 2, 2, 2, 2, 2)


def test_factors_are_the_cheapest_of_all() -> None:
    def cheapest(order: int) -> float:
        if order == 1:
            return 0
        known = [f for f in range(2, order + 1) if order % f == 0 and has_paley(f)]
        return min((f + cheapest(order // f) for f in known), default=float("inf"))

    for order in range(1, 161):
        factors = hadamard_factors(order)
        assert cheapest(order) == (float("inf") if factors is None else sum(factors))


def test_an_online_transform_has_no_costly_factor() -> None:
    assert hadamard_blocks(8192) == (8192,)
    assert hadamard_blocks(11008) == (256,) * 43


def test_an_odd_width_has_no_blocks_and_stays_as_it_is() -> None:
    assert hadamard_blocks(1537) == ()
    x = torch.randn(3, 7)
    assert torch.equal(multiply(x, ()), x)
    assert torch.equal(multiply_transposed(x, ()), x)


def test_blocks_multiply_as_each_by_itself() -> None:
    x = torch.randn(2, 5, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    blocks = (4, 4, 4, 12, 12, 4, 20)
    single = [multiply(part, (size,)) for part, size in zip(x.split(list(blocks), -1), blocks, strict=True)]
    assert torch.equal(multiply(x, blocks), torch.cat(single, -1))
    assert torch.allclose(multiply_transposed(multiply(x, blocks), blocks), x)


@pytest.mark.parametrize("order", OUT_OF_REACH)
def test_an_order_out_of_reach_has_no_matrix_and_is_an_error_to_multiply_with(order) -> None:
    assert hadamard(order) is None
    assert hadamard_factors(order) is None
    for product in (multiply, multiply_transposed):
        with pytest.raises(ValueError, match=f"no Hadamard matrix of order {order}"):
            product(torch.ones(2, order), (order,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("blocks", [*((order,) for order in ORDERS), *BLOCKS])
def test_multiply_is_the_dense_product_and_its_transposed_undoes_it(blocks, dtype) -> None:
    matrix, x = orthonormal(blocks), inputs(sum(blocks), dtype)
    y = multiply(x, blocks)
    assert y.dtype == dtype
    assert within_bound(y, x, matrix)
    assert within_bound(multiply_transposed(x, blocks), x, matrix.T)
    back = multiply_transposed(y, blocks)
    # What is undone is x, to a bound of both products.
    size = x.double().abs() @ matrix.abs() @ matrix.abs().T
    assert bool(((back.double() - x.double()).abs() <= 8 * torch.finfo(dtype).eps * sum(blocks) ** 0.5 * size).all())


@pytest.mark.parametrize("blocks", BLOCKS)
def test_the_transform_is_orthonormal_and_keeps_norms_and_products(blocks) -> None:
    x = inputs(sum(blocks))
    matrix = multiply(torch.eye(sum(blocks), dtype=torch.float64), blocks)
    assert torch.allclose(matrix @ matrix.T, torch.eye(sum(blocks), dtype=torch.float64), rtol=0, atol=1e-14)
    y = multiply(x, blocks)
    assert torch.allclose(y.square().sum(-1), x.square().sum(-1), rtol=1e-13, atol=0)


def unscaled(x: Tensor) -> Tensor:
    return multiply(x, (12, 8)) * torch.tensor([12**0.5] * 12 + [8**0.5] * 8, dtype=x.dtype)


def transposed(x: Tensor) -> Tensor:
    return multiply_transposed(x, (12, 8))


def blocks_swapped(x: Tensor) -> Tensor:
    return multiply(x, (8, 12))


def scaled_by_the_width(x: Tensor) -> Tensor:
    return unscaled(x) / 20**0.5


def one_output_negated(x: Tensor) -> Tensor:
    y = multiply(x, (12, 8))
    y[0, 0, 19] *= -1
    return y


def one_output_off_by_a_thousandth(x: Tensor) -> Tensor:
    y = multiply(x, (12, 8))
    y[0, 2, 5] *= 1.001
    return y


def second_block_left_out(x: Tensor) -> Tensor:
    return torch.cat([multiply(x[..., :12], (12,)), x[..., 12:]], -1)


FAULTS = [
    unscaled, transposed, blocks_swapped, scaled_by_the_width, one_output_negated, one_output_off_by_a_thousandth,
    second_block_left_out,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_dense_oracle_rejects_a_planted_fault(fault: Callable[[Tensor], Tensor], dtype) -> None:
    x = inputs(20, dtype)
    assert within_bound(multiply(x, (12, 8)), x, orthonormal((12, 8)))
    assert not within_bound(fault(x), x, orthonormal((12, 8)))


def test_kronecker_factors_in_another_order_are_another_transform() -> None:
    assert hadamard_factors(40) == (20, 2)
    assert torch.equal(hadamard(40), torch.kron(hadamard(2), hadamard(20)))
    x, swapped = inputs(40), torch.kron(hadamard(20), hadamard(2)) / 40**0.5
    assert within_bound(multiply(x, (40,)), x, orthonormal((40,)))
    assert not within_bound(multiply(x, (40,)), x, swapped)


@pytest.mark.parametrize("width", range(1, 201))
def test_blocks_add_up_are_equal_and_can_be_multiplied_with(width) -> None:
    blocks = hadamard_blocks(width)
    if width > 1 and width % 2:
        assert blocks == ()
        return
    assert sum(blocks) == width
    assert len(set(blocks)) == 1
    if hadamard_factors(width) is not None:
        assert blocks == (width,)
    else:
        assert blocks[0] & (blocks[0] - 1) == 0
        assert (width // blocks[0]) % 2 == 1
    assert multiply(torch.ones(1, width), blocks).shape == (1, width)


def test_a_product_on_the_meta_device_leaves_later_ones_alone() -> None:
    # 212 is no order of another test here: nothing has built its matrix yet.
    with torch.device("meta"):
        assert multiply(torch.empty(2, 212), (212,)).is_meta
    x = inputs(212)
    assert within_bound(multiply(x, (212,)), x, orthonormal((212,)))


def test_any_leading_shape_is_that_of_rows() -> None:
    x = inputs(24)
    rows = multiply(x.reshape(6, 24), (12, 12))
    assert torch.equal(multiply(x, (12, 12)).reshape(6, 24), rows)
    assert torch.equal(multiply(x[0, 0], (12, 12)), rows[0])
    for i, j in itertools.product(range(2), range(3)):
        assert within_bound(multiply(x[i, j], (12, 12)), x[i, j], orthonormal((12, 12)))


def test_gradients_pass_through_a_product_that_was_first_used_in_inference_mode() -> None:
    blocks = (176,)
    with torch.inference_mode():
        multiply(torch.ones(1, 176, dtype=torch.float16), blocks)
    x = torch.ones(1, 176, dtype=torch.float16, requires_grad=True)
    outer_gradient = inputs(176, torch.float16)[0, :1]
    (gradient,) = torch.autograd.grad(multiply(x, blocks), x, outer_gradient)
    assert within_bound(gradient, outer_gradient, orthonormal(blocks).T)
