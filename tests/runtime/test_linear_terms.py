"""A linear with every term takes its steps one by one, and stores, casts and loads each term as it is."""

import copy

import pytest
import torch
from packed_samples import CAST, ROWS, bias_of, column_scale_of, inputs, packed_range, packed_tensor, state_bytes
from torch import Tensor, nn

from linears import built, changed
from subnibble.runtime import ops
from subnibble.runtime.modules import PackedLinear
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.hadamard import hadamard, multiply
from subnibble.tensor.linear import Linear
from subnibble.tensor.packed import PackedRange, PackedTensor, QuantizedMatrix
from subnibble.tensor.scheme import Scheme

BLOCKS = (96, 40, 1, 1, 1)


def every_term(activation: ActivationScheme | None = None, **others: object) -> Linear:
    """A linear of 139 inputs and 9 outputs with all there is."""
    generator = torch.Generator().manual_seed(21)
    mx = Scheme(4, 32, "none", "e8m0", "mxfp4")
    exponents = torch.randint(-8, 0, (ROWS, 2), generator=generator).float()
    codes = torch.randint(0, 16, (ROWS, 37), generator=generator, dtype=torch.uint8)
    terms = built(
        packed_tensor("two ranges"),
        bias_of(ROWS),
        column_scale_of(139),
        gather=torch.randperm(139, generator=generator).to(torch.int16),
        blocks=BLOCKS,
        activation=activation,
        salient=PackedTensor((PackedRange.pack(QuantizedMatrix(codes, torch.exp2(exponents), None), mx),)),
        requantized=37,
        low_rank=(
            PackedTensor((packed_range(6, 139, Scheme(8, 64, "none", "bfloat16"), 5),)),
            PackedTensor((packed_range(ROWS, 6, Scheme(4, -1, "integer", "float32"), 6),)),
        ),
    )
    return changed(terms, **others)


TERM_NAMES = {
    "codes", "scales", "zeros", "codes_1", "scales_1", "bias", "column_scale", "gather", "salient.codes",
    "salient.scales", "down.codes", "down.scales", "up.codes", "up.scales", "up.zeros",
}  # fmt: skip
ACTIVATIONS = {"none": None, "8 bits": ActivationScheme(8, 64), "mxfp4": ActivationScheme(4, 32, "none", "mxfp4")}
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def test_a_linear_stores_every_term_under_the_names_of_the_format() -> None:
    state = PackedLinear(every_term()).state_dict()
    assert set(state) == TERM_NAMES
    assert state["gather"].dtype == torch.int16
    assert state["salient.scales"].dtype == state["salient.codes"].dtype == torch.uint8
    bare = built(packed_tensor("two ranges"))
    assert set(PackedLinear(bare).state_dict()) == set(packed_tensor("two ranges").state())


@every_activation
@pytest.mark.parametrize("dtype", CAST)
def test_a_cast_leaves_every_term_bit_identical(dtype, activation) -> None:
    linear = PackedLinear(every_term(ACTIVATIONS[activation]))
    before, x = state_bytes(linear), inputs(139, dtype)
    output = ops.linear(x, every_term(ACTIVATIONS[activation], bias=bias_of(ROWS).to(dtype)))
    CAST[dtype](linear)
    assert set(before) == TERM_NAMES - {"bias"}
    assert state_bytes(linear) == before
    assert linear.bias is not None
    assert linear.bias.dtype == output.dtype == dtype
    assert torch.equal(linear(x), output)


def test_every_term_moves_to_another_device() -> None:
    linear = PackedLinear(every_term()).to("meta", torch.bfloat16)
    assert {buffer.device.type for buffer in linear.buffers()} == {"meta"}
    assert linear(torch.empty(2, 139, dtype=torch.bfloat16, device="meta")).is_meta


@every_activation
def test_terms_of_a_linear_are_those_it_was_built_of_and_share_its_buffers(activation) -> None:
    terms = every_term(ACTIVATIONS[activation])
    linear, x = PackedLinear(terms), inputs(139)
    result = linear.linear
    assert (result.input.blocks, result.input.activation, result.input.requantized) == (
        BLOCKS,
        ACTIVATIONS[activation],
        37,
    )
    assert result.input.gather is linear.gather
    assert result.weight.salient.ranges[0].codes is linear.salient.codes
    assert torch.equal(linear(x), ops.linear(x, terms))
    assert torch.equal(copy.deepcopy(linear)(x), linear(x))


@every_activation
def test_a_state_dict_of_every_term_loads_into_empty_storage(activation) -> None:
    source = PackedLinear(every_term(ACTIVATIONS[activation]))
    terms = source.linear
    empty = changed(
        terms,
        main=terms.weight.main.layout.empty("cpu"),
        bias=torch.full((ROWS,), torch.nan),
        column_scale=torch.full((139,), torch.nan, dtype=torch.float16),
        gather=torch.zeros(139, dtype=torch.int16),
        salient=terms.weight.salient.layout.empty("cpu"),
        low_rank=(terms.weight.low_rank[0].layout.empty("cpu"), terms.weight.low_rank[1].layout.empty("cpu")),
    )
    target = PackedLinear(empty)
    target.load_state_dict(source.state_dict())
    assert state_bytes(target) == state_bytes(source)
    assert torch.equal(target(inputs(139)), source(inputs(139)))
    for name in ("salient.codes", "down.scales", "up.zeros", "gather"):
        state = {key: value for key, value in source.state_dict().items() if key != name}
        with pytest.raises(RuntimeError, match=name):
            target.load_state_dict(state)


def transform_of(blocks: tuple[int, ...]) -> Tensor:
    return torch.block_diag(*(hadamard(block) / block**0.5 for block in blocks))


def entered(x: Tensor, terms: Linear) -> tuple[Tensor, Tensor]:
    """What meets the matrices, float64, and the size of what it is summed of."""
    y = x.double()
    if terms.input.column_scale is not None:
        y = y * terms.input.column_scale.double()
    if terms.input.gather is not None:
        y = torch.stack([y[..., int(channel)] for channel in terms.input.gather], -1)
    size = y.abs()
    if terms.input.blocks:
        y, size = y @ transform_of(terms.input.blocks), size @ transform_of(terms.input.blocks).abs()
    return y, size


def whole_weight(terms: Linear) -> tuple[Tensor, Tensor]:
    """The dense weight (m, k) float64 behind the steps of the input, and the size of what it is summed of."""
    parts = [terms.weight.main.dequantize().double()]
    if terms.weight.salient is not None:
        salient = terms.weight.salient.dequantize().double()
        parts.append(nn.functional.pad(salient, (0, parts[0].shape[1] - salient.shape[1])))
    size = sum(part.abs() for part in parts)
    if terms.weight.low_rank is not None:
        down, up = (part.dequantize().double() for part in terms.weight.low_rank)
        parts.append(up @ down)
        size = size + up.abs() @ down.abs()
    return sum(parts), size


def within_term_bound(y: Tensor, x: Tensor, terms: Linear, c: float = 4.0) -> bool:
    """Every element within `c * eps * sqrt(K) * size` of the steps taken one by one in float64."""
    (value, size), (weight, weight_size) = entered(x, terms), whole_weight(terms)
    exact, size = value @ weight.T, size @ weight_size.T
    if terms.weight.bias is not None:
        exact, size = exact + terms.weight.bias.double(), size + terms.weight.bias.double().abs()
    bound = c * torch.finfo(y.dtype).eps * weight.shape[1] ** 0.5 * size
    return y.shape == exact.shape and bool(((y.double() - exact).abs() <= bound).all())


NO_TERM = {
    "bias": None,
    "column_scale": None,
    "gather": None,
    "blocks": (),
    "salient": None,
    "requantized": 0,
    "low_rank": None,
}
SOME_TERMS = {
    "all": {},
    "no bias": {"bias": None},
    "no column scale": {"column_scale": None},
    "no gather": {"gather": None},
    "no transform": {"blocks": ()},
    "no salient": {"salient": None, "requantized": 0},
    "no branch": {"low_rank": None},
    **{
        f"only {name}": {key: value for key, value in NO_TERM.items() if key != name}
        for name in ("column_scale", "gather", "blocks", "salient", "low_rank")
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("some", SOME_TERMS)
def test_a_linear_takes_its_steps_one_by_one(some, dtype) -> None:
    terms = every_term(**SOME_TERMS[some])
    terms = changed(terms, bias=None if terms.weight.bias is None else terms.weight.bias.to(dtype))
    x = inputs(139, dtype)
    assert within_term_bound(ops.linear(x, terms), x, terms)


@pytest.mark.parametrize("some", SOME_TERMS)
def test_dequantize_with_terms_is_the_weight_that_plain_inputs_meet(some) -> None:
    terms = every_term(**SOME_TERMS[some])
    weight, x = PackedLinear(terms).dequantize(), inputs(139)
    assert weight.shape == (ROWS, 139)
    assert weight.dtype == torch.float32
    y = x.double() @ weight.double().T
    y = y if terms.weight.bias is None else y + terms.weight.bias.double()
    assert within_term_bound(y.float(), x, terms)
    # Of each row: the weight is what the steps make of it.
    assert within_term_bound(weight.T.contiguous(), torch.eye(139), changed(terms, bias=None))


def hadamard_then_gather(x: Tensor, terms: Linear) -> Tensor:
    x = multiply(x * terms.input.column_scale.float(), terms.input.blocks)[..., terms.input.gather.long()]
    return ops.linear(x, changed(terms, column_scale=None, gather=None, blocks=()))


def gather_then_scale(x: Tensor, terms: Linear) -> Tensor:
    x = x[..., terms.input.gather.long()] * terms.input.column_scale.float()
    return ops.linear(x, changed(terms, column_scale=None, gather=None))


def hadamard_then_scale(x: Tensor, terms: Linear) -> Tensor:
    x = multiply(x[..., terms.input.gather.long()], terms.input.blocks) * terms.input.column_scale.float()
    return ops.linear(x, changed(terms, column_scale=None, gather=None, blocks=()))


def gather_inverted(x: Tensor, terms: Linear) -> Tensor:
    return ops.linear(x, changed(terms, gather=terms.input.gather.long().argsort().to(torch.int16)))


def blocks_reversed(x: Tensor, terms: Linear) -> Tensor:
    return ops.linear(x, changed(terms, blocks=terms.input.blocks[::-1]))


def salient_at_the_end(x: Tensor, terms: Linear) -> Tensor:
    value, _ = entered(x, terms)
    part = value.float()[..., -37:] @ terms.weight.salient.dequantize().T
    return ops.linear(x, changed(terms, salient=None, requantized=0)) + part


def branch_on_the_raw_input(x: Tensor, terms: Linear) -> Tensor:
    down, up = terms.weight.low_rank
    branch = x @ down.dequantize().T @ up.dequantize().T
    return ops.linear(x, changed(terms, low_rank=None)) + branch


TERM_FAULTS = [
    hadamard_then_gather,
    gather_then_scale,
    hadamard_then_scale,
    gather_inverted,
    blocks_reversed,
    salient_at_the_end,
    branch_on_the_raw_input,
]


@pytest.mark.parametrize("fault", TERM_FAULTS, ids=lambda fault: fault.__name__)
def test_the_oracle_of_terms_rejects_a_planted_fault(fault) -> None:
    terms, x = every_term(), inputs(139)
    assert within_term_bound(ops.linear(x, terms), x, terms)
    assert not within_term_bound(fault(x, terms), x, terms)


@pytest.mark.parametrize("left_out", ["bias", "column_scale", "gather", "blocks", "salient", "low_rank"])
def test_the_oracle_of_terms_rejects_a_term_left_out(left_out) -> None:
    terms, x = every_term(), inputs(139)
    others = {"salient": None, "requantized": 0} if left_out == "salient" else {left_out: NO_TERM[left_out]}
    assert not within_term_bound(ops.linear(x, changed(terms, **others)), x, terms)


def test_inputs_that_are_not_quantized_leave_no_residual() -> None:
    x = inputs(139)
    assert torch.equal(ops.linear(x, every_term(requantized=37)), ops.linear(x, every_term(requantized=0)))


def test_inputs_in_8_bits_come_near_the_dense_weight() -> None:
    x = inputs(139)
    linear = PackedLinear(every_term(ActivationScheme(8, 16)))
    exact = x.double() @ linear.dequantize().double().T + linear.bias.double()
    assert float((linear(x).double() - exact).norm()) < 0.01 * float(exact.norm())
