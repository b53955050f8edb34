"""Column scales of a running linear: y = (x c) Wᵀ + b, c stored in float16 whatever the casts."""

import copy

import pytest
import torch
from packed_samples import (
    CAST,
    LAYOUTS,
    ROWS,
    bias_of,
    column_scale_of,
    dense,
    half_steps,
    inputs,
    packed_tensor,
    state_bytes,
    within_bound,
)
from torch import Tensor, nn

from linears import built
from subnibble.kernels.native import TORCH, chosen
from subnibble.runtime import ops
from subnibble.runtime.modules import PackedLinear
from subnibble.tensor.packed import PackedTensor


def scaled_linear(name: str, bias: Tensor | None = None) -> PackedLinear:
    weight = packed_tensor(name)
    return PackedLinear(built(weight, bias, column_scale_of(weight.shape[1])))


def within_scaled_bound(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, column_scale: Tensor) -> bool:
    """As `within_bound`, of the inputs times c; narrow types round that product as well, element by element."""
    c = column_scale.double()
    # x c is rounded once, and c where the type is narrower than its own.
    rounding = half_steps((x.float() * column_scale.float()).to(x.dtype)) if x.dtype != torch.float64 else None
    return within_bound(y, x.double() * c, w, bias, c=4.0, rounding=rounding)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_scaled_linear_equals_the_dense_linear_of_scaled_inputs(name, dtype, has_bias) -> None:
    bias = bias_of(ROWS).to(dtype) if has_bias else None
    linear = scaled_linear(name, bias)
    x = inputs(linear.in_features, dtype)
    y = linear(x)
    assert y.dtype == dtype
    assert within_scaled_bound(y, x, dense(packed_tensor(name)), bias, linear.column_scale)
    assert torch.equal(y, ops.linear(x, built(linear.packed, bias, linear.column_scale)))
    # On torch operations it is the same function of dense tensors, each cast once: equal to the last bit.
    wide = torch.promote_types(dtype, torch.float32)
    scaled = (x.to(wide) * linear.column_scale.to(wide)).to(dtype)
    with chosen(TORCH):
        assert torch.equal(linear(x), nn.functional.linear(scaled, linear.packed.dequantize().to(dtype), bias))


@pytest.mark.parametrize("name", LAYOUTS)
def test_dequantize_is_the_weight_that_plain_inputs_meet(name) -> None:
    linear = scaled_linear(name)
    assert linear.dequantize().dtype == torch.float32
    assert torch.equal(linear.dequantize(), linear.packed.dequantize() * linear.column_scale.float())
    plain = PackedLinear(built(packed_tensor(name), None))
    assert torch.equal(plain.dequantize(), packed_tensor(name).dequantize())
    x = inputs(linear.in_features)
    rounding = half_steps(x * linear.column_scale.float()) / linear.column_scale.double()
    assert within_bound(linear(x), x, linear.dequantize().double(), None, c=4.0, rounding=rounding)


@pytest.mark.parametrize("name", LAYOUTS)
def test_column_scales_of_one_change_no_bit(name) -> None:
    weight = packed_tensor(name)
    ones = torch.ones(weight.shape[1], dtype=torch.float16)
    x = inputs(weight.shape[1])
    assert torch.equal(
        PackedLinear(built(weight, bias_of(ROWS), ones))(x), PackedLinear(built(weight, bias_of(ROWS)))(x)
    )


def c_ignored(x: Tensor, weight: PackedTensor, c: Tensor) -> Tensor:
    return ops.linear(x, built(weight, None))


def c_on_rows(x: Tensor, weight: PackedTensor, c: Tensor) -> Tensor:
    return ops.linear(x, built(weight, None)) * c[: weight.shape[0]].float()


def c_divides(x: Tensor, weight: PackedTensor, c: Tensor) -> Tensor:
    return ops.linear(x, built(weight, None, 1 / c))


def c_twice(x: Tensor, weight: PackedTensor, c: Tensor) -> Tensor:
    return ops.linear(x * c, built(weight, None, c))


def c_shifted_by_one_column(x: Tensor, weight: PackedTensor, c: Tensor) -> Tensor:
    return ops.linear(x, built(weight, None, c.roll(1)))


def c_of_the_first_range_only(x: Tensor, weight: PackedTensor, c: Tensor) -> Tensor:
    c = c.clone()
    c[120:] = 1
    return ops.linear(x, built(weight, None, c))


def one_c_off_by_five_percent(x: Tensor, weight: PackedTensor, c: Tensor) -> Tensor:
    c = c.clone()
    c[int(c.argmax())] *= 1.05
    return ops.linear(x, built(weight, None, c))


def c_rounded_to_bfloat16(x: Tensor, weight: PackedTensor, c: Tensor) -> Tensor:
    return ops.linear(x, built(weight, None, c.bfloat16()))


SCALE_FAULTS = [
    c_ignored,
    c_on_rows,
    c_divides,
    c_twice,
    c_shifted_by_one_column,
    c_of_the_first_range_only,
    one_c_off_by_five_percent,
    c_rounded_to_bfloat16,
]


@pytest.mark.parametrize("fault", SCALE_FAULTS, ids=lambda fault: fault.__name__)
def test_the_scaled_oracle_rejects_a_planted_fault(fault) -> None:
    weight, x = packed_tensor("two ranges"), inputs(139)
    c = column_scale_of(139)
    assert within_scaled_bound(ops.linear(x, built(weight, None, c)), x, dense(weight), None, c)
    assert not within_scaled_bound(fault(x, weight, c), x, dense(weight), None, c)


@pytest.mark.parametrize("dtype", CAST)
def test_a_cast_leaves_column_scales_bit_identical_in_float16(dtype) -> None:
    linear = scaled_linear("two ranges", bias_of(ROWS))
    before, x = state_bytes(linear), inputs(139)
    output = scaled_linear("two ranges", bias_of(ROWS).to(dtype))(x.to(dtype))
    CAST[dtype](linear)
    assert "column_scale" in before
    assert state_bytes(linear) == before
    assert linear.column_scale.dtype == torch.float16
    assert torch.equal(linear(x.to(dtype)), output)


def test_a_scaled_linear_stores_its_scale_under_the_name_of_the_format() -> None:
    linear = scaled_linear("two ranges", bias_of(ROWS))
    state = linear.state_dict()
    assert set(state) == {*packed_tensor("two ranges").state(), "bias", "column_scale"}
    assert state["column_scale"].dtype == torch.float16
    assert state["column_scale"].shape == (139,)
    assert linear.to("meta").column_scale.is_meta


def test_a_scaled_state_dict_loads_into_empty_storage_and_not_into_a_plain_linear() -> None:
    source = scaled_linear("two ranges", bias_of(ROWS))
    empty = source.layout.empty("cpu")
    target = PackedLinear(
        built(empty, torch.full((ROWS,), torch.nan), torch.full((139,), torch.nan, dtype=torch.float16))
    )
    target.load_state_dict(source.state_dict())
    x = inputs(139)
    assert torch.equal(target(x), source(x))
    assert torch.equal(copy.deepcopy(target)(x), source(x))
    with pytest.raises(RuntimeError, match="column_scale"):
        PackedLinear(built(empty, bias_of(ROWS))).load_state_dict(source.state_dict())
    with pytest.raises(RuntimeError, match="column_scale"):
        target.load_state_dict(PackedLinear(built(packed_tensor("two ranges"), bias_of(ROWS))).state_dict())
