"""Running modules against dense ones: products within rounding, rows exactly, storage untouched by casts."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from subnibble.runtime import ops
from subnibble.runtime.hadamard import hadamard, multiply
from subnibble.runtime.modules import (
    InputMix,
    PackedEmbedding,
    PackedLinear,
    TiedHead,
    add_input_mix_,
    add_output_bias_,
)
from subnibble.runtime.ops import LinearTerms
from subnibble.scheme import ActivationScheme, Scheme
from subnibble.tensor import CodedMatrix, PackedRange, PackedTensor, scale_dtype

ROWS = 9
LAYOUTS = {
    "3 bits, ragged": [(139, Scheme(3, 32))],
    "2 bits, real zeros": [(139, Scheme(2, 64, "real"))],
    "4 bits, symmetric, whole row": [(139, Scheme(4, -1, "none", "float32"))],
    "8 bits, bfloat16 scales": [(5, Scheme(8, 3, "integer", "bfloat16"))],
    "two ranges": [(120, Scheme(2, 32)), (19, Scheme(8, -1, "none"))],
}
CAST: dict[torch.dtype, Callable[[nn.Module], nn.Module]] = {
    torch.bfloat16: lambda module: module.to(torch.bfloat16),
    torch.float16: lambda module: module.half(),
    torch.float64: lambda module: module.double(),
    torch.float32: lambda module: module.float(),
}


def packed_range(rows: int, columns: int, scheme: Scheme, seed: int) -> PackedRange:
    """Signed weights; row 0 has one code, the last row starts with an all-zero group."""
    generator = torch.Generator().manual_seed(seed)
    groups, stored = scheme.groups(columns), scale_dtype(scheme)
    codes = torch.randint(0, scheme.levels, (rows, columns), generator=generator, dtype=torch.uint8)
    codes[0] = codes[0, 0]
    scales = torch.exp2(torch.rand(rows, groups, generator=generator) * 6 - 8).to(stored).float()
    middle = scheme.levels // 2
    codes[-1, : scheme.group_bounds(columns)[0][1]] = middle
    if scheme.zero_point == "none":
        return PackedRange.pack(CodedMatrix(codes, scales, None), scheme)
    zeros = torch.randint(0, scheme.levels, (rows, groups), generator=generator).float()
    if scheme.zero_point == "real":
        zeros = (zeros + torch.rand(rows, groups, generator=generator)).to(stored).float()
    zeros[-1, 0] = middle
    return PackedRange.pack(CodedMatrix(codes, scales, zeros), scheme)


def packed_tensor(name: str, rows: int = ROWS) -> PackedTensor:
    layout = enumerate(LAYOUTS[name])
    return PackedTensor(tuple(packed_range(rows, columns, scheme, i) for i, (columns, scheme) in layout))


def dense(weight: PackedTensor) -> Tensor:
    """`scale * (code - zero)` of every element in float32, then widened to float64."""
    parts = []
    for part in weight.ranges:
        coded = part.unpack()
        width = part.columns if part.scheme.group_size == -1 else part.scheme.group_size
        group = torch.arange(part.columns) // width
        zeros = torch.tensor(2.0 ** (part.scheme.bits - 1)) if coded.zeros is None else coded.zeros[:, group]
        parts.append(coded.scales[:, group] * (coded.codes.float() - zeros))
    return torch.cat(parts, dim=1).double()


def inputs(columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(2, 7, columns), signed, one channel a hundred times larger, one token zero."""
    x = torch.randn(2, 7, columns, generator=torch.Generator().manual_seed(3))
    x[..., columns // 2] *= 100
    x[1, 2] = 0
    return x.to(dtype)


def bias_of(rows: int) -> Tensor:
    return torch.randn(rows, generator=torch.Generator().manual_seed(4))


def within_bound(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, c: float = 2.0) -> bool:
    """Every element within `c * eps * sqrt(K) * (|x| @ |w| + |b|)` of the product in float64."""
    exact, size = x.double() @ w.T, x.double().abs() @ w.abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    bound = c * torch.finfo(y.dtype).eps * w.shape[1] ** 0.5 * size
    return y.shape == exact.shape and bool(((y.double() - exact).abs() <= bound).all())


def state_bytes(module: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    """Type and bytes of every buffer."""
    return {
        name: (buffer.dtype, buffer.contiguous().view(torch.uint8).numpy().tobytes())
        for name, buffer in module.named_buffers()
    }


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_linear_equals_the_dense_linear(name, dtype, has_bias) -> None:
    weight = packed_tensor(name)
    bias = bias_of(ROWS).to(dtype) if has_bias else None
    linear = PackedLinear(LinearTerms(weight, bias))
    x = inputs(linear.in_features, dtype)
    y = linear(x)
    assert y.dtype == dtype
    assert within_bound(y, x, dense(weight), bias)
    # The same function of the dequantized weight, cast once: equal to the last bit.
    assert torch.equal(y, nn.functional.linear(x, weight.dequantize().to(dtype), bias))


def scale_off_by_two_percent(coded: CodedMatrix) -> None:
    coded.scales[1, 1] *= 1.02


def all_scales_off_by_a_thousandth(coded: CodedMatrix) -> None:
    coded.scales.mul_(1.001)


def one_code_off_by_one(coded: CodedMatrix) -> None:
    coded.codes[2, 5] ^= 1


def last_code_off_by_one(coded: CodedMatrix) -> None:
    coded.codes[3, -1] ^= 1


def groups_shifted_by_one(coded: CodedMatrix) -> None:
    coded.scales.copy_(coded.scales.roll(1, dims=1))


def zero_points_dropped(coded: CodedMatrix) -> None:
    coded.zeros.zero_()


def one_zero_point_off_by_one(coded: CodedMatrix) -> None:
    coded.zeros[4, -1] += 1 if coded.zeros[4, -1] < 7 else -1


def two_rows_swapped(coded: CodedMatrix) -> None:
    coded.codes[[1, 2]] = coded.codes[[2, 1]]


WEIGHT_FAULTS = [
    scale_off_by_two_percent,
    all_scales_off_by_a_thousandth,
    one_code_off_by_one,
    last_code_off_by_one,
    groups_shifted_by_one,
    zero_points_dropped,
    one_zero_point_off_by_one,
    two_rows_swapped,
]


@pytest.mark.parametrize("fault", WEIGHT_FAULTS, ids=lambda fault: fault.__name__)
def test_the_linear_oracle_rejects_a_planted_fault_of_the_weight(fault) -> None:
    scheme = Scheme(3, 32, "integer", "float32")
    right = packed_range(ROWS, 139, scheme, 0)
    coded = right.unpack()
    coded = CodedMatrix(coded.codes.clone(), coded.scales.clone(), coded.zeros.clone())
    fault(coded)
    wrong = PackedTensor((PackedRange.pack(coded, scheme),))
    w, x, bias = dense(PackedTensor((right,))), inputs(139), bias_of(ROWS)
    assert within_bound(PackedLinear(LinearTerms(PackedTensor((right,)), bias))(x), x, w, bias)
    assert not within_bound(PackedLinear(LinearTerms(wrong, bias))(x), x, w, bias)


def one_output_off_by_five_percent(y: Tensor) -> Tensor:
    y[0, 3, 4] *= 1.05
    return y


def one_output_unwritten(y: Tensor) -> Tensor:
    y[1, 6, ROWS - 1] = torch.nan
    return y


def bias_dropped(y: Tensor) -> Tensor:
    return y - bias_of(ROWS)


def bias_added_twice(y: Tensor) -> Tensor:
    return y + bias_of(ROWS)


def rounded_to_bfloat16(y: Tensor) -> Tensor:
    return y.bfloat16().float()


def tokens_reversed(y: Tensor) -> Tensor:
    return y.flip(1)


OUTPUT_FAULTS = [
    one_output_off_by_five_percent,
    one_output_unwritten,
    bias_dropped,
    bias_added_twice,
    rounded_to_bfloat16,
    tokens_reversed,
]


@pytest.mark.parametrize("fault", OUTPUT_FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_linear_oracle_rejects_a_planted_fault_of_the_output(name, fault) -> None:
    weight, bias = packed_tensor(name), bias_of(ROWS)
    linear = PackedLinear(LinearTerms(weight, bias))
    x = inputs(linear.in_features)
    assert not within_bound(fault(linear(x).detach()), x, dense(weight), bias)


@pytest.mark.parametrize("dtype", CAST)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_cast_leaves_codes_scales_and_zeros_bit_identical(name, dtype) -> None:
    linear = PackedLinear(LinearTerms(packed_tensor(name), bias_of(ROWS)))
    embedding = PackedEmbedding(packed_tensor(name), torch.float32)
    model = nn.ModuleList([linear, embedding, TiedHead(embedding)])
    before, layout = state_bytes(model), linear.layout
    CAST[dtype](model)
    assert state_bytes(model) == before
    assert linear.layout == linear.packed.layout == layout
    assert linear.bias is not None
    assert linear.bias.dtype == dtype


@pytest.mark.parametrize("dtype", CAST)
def test_a_cast_there_and_back_changes_no_output(dtype) -> None:
    linear = PackedLinear(LinearTerms(packed_tensor("3 bits, ragged"), None))
    x = inputs(linear.in_features)
    before = linear(x)
    assert torch.equal(CAST[dtype](linear)(x), before)
    assert torch.equal(linear.float()(x), before)


@pytest.mark.parametrize("dtype", CAST)
def test_a_cast_model_runs_in_its_new_type(dtype) -> None:
    embedding = PackedEmbedding(packed_tensor("3 bits, ragged"), torch.float32)
    model = nn.Sequential(embedding, PackedLinear(LinearTerms(packed_tensor("3 bits, ragged"), bias_of(ROWS))))
    assert CAST[dtype](model)(torch.tensor([0, 3])).dtype == dtype


def test_moving_to_another_device_moves_everything() -> None:
    linear = PackedLinear(LinearTerms(packed_tensor("two ranges"), bias_of(ROWS))).to("meta", torch.bfloat16)
    assert {buffer.device.type for buffer in linear.buffers()} == {"meta"}
    types = {name: tensor.dtype for name, tensor in packed_tensor("two ranges").state().items()}
    assert {name: buffer.dtype for name, buffer in linear.named_buffers()} == types


@pytest.mark.parametrize("name", LAYOUTS)
def test_stored_names_are_those_of_the_format(name) -> None:
    weight = packed_tensor(name)
    linear = PackedLinear(LinearTerms(weight, bias_of(ROWS)))
    assert set(linear.state_dict()) == {*weight.state(), "bias"}
    assert set(PackedLinear(LinearTerms(weight, None)).state_dict()) == set(weight.state())
    assert set(PackedEmbedding(weight, torch.float32).state_dict()) == set(weight.state())


def test_a_state_dict_loads_into_empty_storage() -> None:
    weight = packed_tensor("two ranges")
    source = PackedLinear(LinearTerms(weight, bias_of(ROWS)))
    target = PackedLinear(LinearTerms(weight.layout.empty("cpu"), torch.full((ROWS,), torch.nan)))
    target.load_state_dict(source.state_dict())
    x = inputs(source.in_features)
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_embedding_gives_the_rows_of_the_dense_table(name, dtype, shape) -> None:
    weight = packed_tensor(name)
    ids = torch.randint(0, ROWS, shape, generator=torch.Generator().manual_seed(5))
    table = weight.dequantize().to(dtype)
    rows = PackedEmbedding(weight, dtype)(ids)
    assert rows.dtype == dtype
    assert rows.shape == (*shape, table.shape[1])
    assert torch.equal(rows, nn.functional.embedding(ids, table))


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_ids_give_no_rows(shape) -> None:
    weight = packed_tensor("3 bits, ragged")
    rows = PackedEmbedding(weight, torch.float32)(torch.zeros(shape, dtype=torch.int64))
    assert rows.shape == (*shape, weight.shape[1])


@pytest.mark.parametrize("ids", [[ROWS], [0, -ROWS - 1]])
def test_an_id_outside_the_table_is_an_error(ids) -> None:
    with pytest.raises(IndexError):
        PackedEmbedding(packed_tensor("two ranges"), torch.float32)(torch.tensor(ids))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_tied_head_stores_nothing_and_equals_the_linear_of_the_table(name) -> None:
    weight = packed_tensor(name)
    head = TiedHead(PackedEmbedding(weight, torch.float32))
    assert head.state_dict() == {}
    assert list(head.parameters()) == []
    assert list(head.buffers()) == []
    assert (head.in_features, head.out_features) == (weight.shape[1], weight.shape[0])
    x = inputs(head.in_features)
    assert within_bound(head(x), x, dense(weight), None)
    assert torch.equal(head(x), nn.functional.linear(x, weight.dequantize()))


@pytest.mark.parametrize("head_first", [False, True])
def test_a_deep_copy_ties_its_head_to_its_own_table(head_first) -> None:
    embedding = PackedEmbedding(packed_tensor("3 bits, ragged"), torch.float32)
    modules = {"embedding": embedding, "head": TiedHead(embedding)}
    model = nn.ModuleDict(dict(reversed(modules.items())) if head_first else modules)
    clone = copy.deepcopy(model)
    x = inputs(embedding.embedding_dim)
    before = model["head"](x)
    assert torch.equal(clone["head"](x), before)
    clone["embedding"].scales.mul_(2)
    assert torch.equal(clone["head"](x), 2 * before)
    assert torch.equal(model["head"](x), before)


def test_a_tied_head_follows_its_table_to_another_device_and_to_loaded_weights() -> None:
    weight = packed_tensor("3 bits, ragged")
    embedding = PackedEmbedding(weight.layout.empty(), torch.float32)
    model = nn.ModuleDict({"embedding": embedding, "head": TiedHead(embedding)})
    model.load_state_dict({f"embedding.{key}": part for key, part in weight.state().items()}, assign=True)
    x = inputs(weight.shape[1])
    assert torch.equal(model["head"](x), nn.functional.linear(x, weight.dequantize()))
    assert model.to("meta")["head"](x.to("meta")).is_meta


def test_an_output_bias_is_added_once_and_stored_as_bias() -> None:
    norm = nn.RMSNorm(8)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(6))
    plain = norm(x)
    bias = bias_of(8)
    assert add_output_bias_(norm, bias) is None
    assert torch.equal(norm(x), plain + bias)
    assert set(norm.state_dict()) == {"weight", "bias"}
    assert torch.equal(norm.state_dict()["bias"], bias)
    assert norm.bias.requires_grad is False


def test_an_output_bias_follows_casts_copies_and_loaded_weights() -> None:
    norm = nn.RMSNorm(8)
    add_output_bias_(norm, bias_of(8))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(6))
    before = norm(x)
    clone = copy.deepcopy(norm)
    clone.load_state_dict({"weight": torch.ones(8), "bias": torch.zeros(8)})
    assert torch.equal(clone(x), nn.RMSNorm(8)(x))
    assert torch.equal(norm(x), before)
    assert norm.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_printing_shows_shape_and_schemes() -> None:
    assert "139 -> 9, w2g32+w8channel-sym" in repr(PackedLinear(LinearTerms(packed_tensor("two ranges"), None)))


# Column scales: y = (x c) Wᵀ + b.


def column_scale_of(columns: int) -> Tensor:
    """float16, between 1/64 and 64, half of them below 1."""
    return torch.exp2(torch.rand(columns, generator=torch.Generator().manual_seed(8)) * 12 - 6).half()


def scaled_linear(name: str, bias: Tensor | None = None) -> PackedLinear:
    weight = packed_tensor(name)
    return PackedLinear(LinearTerms(weight, bias, column_scale_of(weight.shape[1])))


def within_scaled_bound(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, column_scale: Tensor) -> bool:
    """As `within_bound`, of the inputs times c; narrow types round that product as well, element by element."""
    c = column_scale.double()
    # x c is rounded once, and c where the type is narrower than its own.
    return within_bound(y, x.double() * c, w, bias, c=4.0)


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
    # The same function of dense tensors, each cast once: equal to the last bit.
    wide = torch.promote_types(dtype, torch.float32)
    scaled = (x.to(wide) * linear.column_scale.to(wide)).to(dtype)
    assert torch.equal(y, nn.functional.linear(scaled, linear.packed.dequantize().to(dtype), bias))
    assert torch.equal(y, ops.linear(x, LinearTerms(linear.packed, bias, linear.column_scale)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_dequantize_is_the_weight_that_plain_inputs_meet(name) -> None:
    linear = scaled_linear(name)
    assert linear.dequantize().dtype == torch.float32
    assert torch.equal(linear.dequantize(), linear.packed.dequantize() * linear.column_scale.float())
    plain = PackedLinear(LinearTerms(packed_tensor(name), None))
    assert torch.equal(plain.dequantize(), packed_tensor(name).dequantize())
    x = inputs(linear.in_features)
    assert within_bound(linear(x), x, linear.dequantize().double(), None, c=4.0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_column_scales_of_one_change_no_bit(name) -> None:
    weight = packed_tensor(name)
    ones = torch.ones(weight.shape[1], dtype=torch.float16)
    x = inputs(weight.shape[1])
    assert torch.equal(
        PackedLinear(LinearTerms(weight, bias_of(ROWS), ones))(x), PackedLinear(LinearTerms(weight, bias_of(ROWS)))(x)
    )


def c_ignored(x: Tensor, weight: PackedTensor, c: Tensor) -> Tensor:
    return ops.linear(x, LinearTerms(weight, None))


def c_on_rows(x: Tensor, weight: PackedTensor, c: Tensor) -> Tensor:
    return ops.linear(x, LinearTerms(weight, None)) * c[: weight.shape[0]].float()


def c_divides(x: Tensor, weight: PackedTensor, c: Tensor) -> Tensor:
    return ops.linear(x, LinearTerms(weight, None, 1 / c))


def c_twice(x: Tensor, weight: PackedTensor, c: Tensor) -> Tensor:
    return ops.linear(x * c, LinearTerms(weight, None, c))


def c_shifted_by_one_column(x: Tensor, weight: PackedTensor, c: Tensor) -> Tensor:
    return ops.linear(x, LinearTerms(weight, None, c.roll(1)))


def c_of_the_first_range_only(x: Tensor, weight: PackedTensor, c: Tensor) -> Tensor:
    c = c.clone()
    c[120:] = 1
    return ops.linear(x, LinearTerms(weight, None, c))


def one_c_off_by_five_percent(x: Tensor, weight: PackedTensor, c: Tensor) -> Tensor:
    c = c.clone()
    c[int(c.argmax())] *= 1.05
    return ops.linear(x, LinearTerms(weight, None, c))


def c_rounded_to_bfloat16(x: Tensor, weight: PackedTensor, c: Tensor) -> Tensor:
    return ops.linear(x, LinearTerms(weight, None, c.bfloat16()))


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
    assert within_scaled_bound(ops.linear(x, LinearTerms(weight, None, c)), x, dense(weight), None, c)
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
        LinearTerms(empty, torch.full((ROWS,), torch.nan), torch.full((139,), torch.nan, dtype=torch.float16))
    )
    target.load_state_dict(source.state_dict())
    x = inputs(139)
    assert torch.equal(target(x), source(x))
    assert torch.equal(copy.deepcopy(target)(x), source(x))
    with pytest.raises(RuntimeError, match="column_scale"):
        PackedLinear(LinearTerms(empty, bias_of(ROWS))).load_state_dict(source.state_dict())
    with pytest.raises(RuntimeError, match="column_scale"):
        target.load_state_dict(PackedLinear(LinearTerms(packed_tensor("two ranges"), bias_of(ROWS))).state_dict())


BLOCKS = (96, 40, 1, 1, 1)


def every_term(activation: ActivationScheme | None = None, **others: object) -> LinearTerms:
    """A linear of 139 inputs and 9 outputs with all there is."""
    generator = torch.Generator().manual_seed(21)
    mx = Scheme(4, 32, "none", "e8m0", "mxfp4")
    exponents = torch.randint(-8, 0, (ROWS, 2), generator=generator).float()
    codes = torch.randint(0, 16, (ROWS, 37), generator=generator, dtype=torch.uint8)
    terms = LinearTerms(
        packed_tensor("two ranges"),
        bias_of(ROWS),
        column_scale_of(139),
        torch.randperm(139, generator=generator).to(torch.int16),
        BLOCKS,
        activation,
        PackedTensor((PackedRange.pack(CodedMatrix(codes, torch.exp2(exponents), None), mx),)),
        "salient",
        (
            PackedTensor((packed_range(6, 139, Scheme(8, 64, "none", "bfloat16"), 5),)),
            PackedTensor((packed_range(ROWS, 6, Scheme(4, -1, "integer", "float32"), 6),)),
        ),
    )
    return replace(terms, **others)


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
    bare = LinearTerms(packed_tensor("two ranges"))
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
    found = linear.terms
    assert (found.blocks, found.activation, found.residual) == (terms.blocks, terms.activation, terms.residual)
    assert found.gather is linear.gather
    assert found.salient.ranges[0].codes is linear.salient.codes
    assert torch.equal(linear(x), ops.linear(x, terms))
    assert torch.equal(copy.deepcopy(linear)(x), linear(x))


@every_activation
def test_a_state_dict_of_every_term_loads_into_empty_storage(activation) -> None:
    source = PackedLinear(every_term(ACTIVATIONS[activation]))
    terms = source.terms
    empty = replace(
        terms,
        weight=terms.weight.layout.empty("cpu"),
        bias=torch.full((ROWS,), torch.nan),
        column_scale=torch.full((139,), torch.nan, dtype=torch.float16),
        gather=torch.zeros(139, dtype=torch.int16),
        salient=terms.salient.layout.empty("cpu"),
        low_rank=(terms.low_rank[0].layout.empty("cpu"), terms.low_rank[1].layout.empty("cpu")),
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


def entered(x: Tensor, terms: LinearTerms) -> tuple[Tensor, Tensor]:
    """What meets the matrices, float64, and the size of what it is summed of."""
    y = x.double()
    if terms.column_scale is not None:
        y = y * terms.column_scale.double()
    if terms.gather is not None:
        y = torch.stack([y[..., int(channel)] for channel in terms.gather], -1)
    size = y.abs()
    if terms.blocks:
        y, size = y @ transform_of(terms.blocks), size @ transform_of(terms.blocks).abs()
    return y, size


def whole_weight(terms: LinearTerms) -> tuple[Tensor, Tensor]:
    """The dense weight (m, k) float64 behind the steps of the input, and the size of what it is summed of."""
    parts = [terms.weight.dequantize().double()]
    if terms.salient is not None:
        salient = terms.salient.dequantize().double()
        parts.append(nn.functional.pad(salient, (0, parts[0].shape[1] - salient.shape[1])))
    size = sum(part.abs() for part in parts)
    if terms.low_rank is not None:
        down, up = (part.dequantize().double() for part in terms.low_rank)
        parts.append(up @ down)
        size = size + up.abs() @ down.abs()
    return sum(parts), size


def within_term_bound(y: Tensor, x: Tensor, terms: LinearTerms, c: float = 4.0) -> bool:
    """Every element within `c * eps * sqrt(K) * size` of the steps taken one by one in float64."""
    (value, size), (weight, weight_size) = entered(x, terms), whole_weight(terms)
    exact, size = value @ weight.T, size @ weight_size.T
    if terms.bias is not None:
        exact, size = exact + terms.bias.double(), size + terms.bias.double().abs()
    bound = c * torch.finfo(y.dtype).eps * weight.shape[1] ** 0.5 * size
    return y.shape == exact.shape and bool(((y.double() - exact).abs() <= bound).all())


NO_TERM = {
    "bias": None,
    "column_scale": None,
    "gather": None,
    "blocks": (),
    "salient": None,
    "residual": "none",
    "low_rank": None,
}
SOME_TERMS = {
    "all": {},
    "no bias": {"bias": None},
    "no column scale": {"column_scale": None},
    "no gather": {"gather": None},
    "no transform": {"blocks": ()},
    "no salient": {"salient": None, "residual": "none"},
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
    terms = replace(terms, bias=None if terms.bias is None else terms.bias.to(dtype))
    x = inputs(139, dtype)
    assert within_term_bound(ops.linear(x, terms), x, terms)


@pytest.mark.parametrize("some", SOME_TERMS)
def test_dequantize_with_terms_is_the_weight_that_plain_inputs_meet(some) -> None:
    terms = every_term(**SOME_TERMS[some])
    weight, x = PackedLinear(terms).dequantize(), inputs(139)
    assert weight.shape == (ROWS, 139)
    assert weight.dtype == torch.float32
    y = x.double() @ weight.double().T
    y = y if terms.bias is None else y + terms.bias.double()
    assert within_term_bound(y.float(), x, terms)
    # Of each row: the weight is what the steps make of it.
    assert within_term_bound(weight.T.contiguous(), torch.eye(139), replace(terms, bias=None))


def hadamard_then_gather(x: Tensor, terms: LinearTerms) -> Tensor:
    x = multiply(x * terms.column_scale.float(), terms.blocks)[..., terms.gather.long()]
    return ops.linear(x, replace(terms, column_scale=None, gather=None, blocks=()))


def gather_then_scale(x: Tensor, terms: LinearTerms) -> Tensor:
    x = x[..., terms.gather.long()] * terms.column_scale.float()
    return ops.linear(x, replace(terms, column_scale=None, gather=None))


def hadamard_then_scale(x: Tensor, terms: LinearTerms) -> Tensor:
    x = multiply(x[..., terms.gather.long()], terms.blocks) * terms.column_scale.float()
    return ops.linear(x, replace(terms, column_scale=None, gather=None, blocks=()))


def gather_inverted(x: Tensor, terms: LinearTerms) -> Tensor:
    return ops.linear(x, replace(terms, gather=terms.gather.long().argsort().to(torch.int16)))


def blocks_reversed(x: Tensor, terms: LinearTerms) -> Tensor:
    return ops.linear(x, replace(terms, blocks=terms.blocks[::-1]))


def salient_at_the_end(x: Tensor, terms: LinearTerms) -> Tensor:
    value, _ = entered(x, terms)
    part = value.float()[..., -37:] @ terms.salient.dequantize().T
    return ops.linear(x, replace(terms, salient=None, residual="none")) + part


def branch_on_the_raw_input(x: Tensor, terms: LinearTerms) -> Tensor:
    down, up = terms.low_rank
    branch = x @ down.dequantize().T @ up.dequantize().T
    return ops.linear(x, replace(terms, low_rank=None)) + branch


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
    others = {"salient": None, "residual": "none"} if left_out == "salient" else {left_out: NO_TERM[left_out]}
    assert not within_term_bound(ops.linear(x, replace(terms, **others)), x, terms)


@pytest.mark.parametrize("residual", ops.RESIDUALS)
def test_inputs_that_are_not_quantized_leave_no_residual(residual) -> None:
    x = inputs(139)
    assert torch.equal(ops.linear(x, every_term(residual=residual)), ops.linear(x, every_term(residual="none")))


def test_inputs_in_8_bits_come_near_the_dense_weight() -> None:
    x = inputs(139)
    linear = PackedLinear(every_term(ActivationScheme(8, 16)))
    exact = x.double() @ linear.dequantize().double().T + linear.bias.double()
    assert float((linear(x).double() - exact).norm()) < 0.01 * float(exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_in_front_of_a_head_is_block_diagonal_and_keeps_its_type(dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.randn(width, width, generator=generator) for width in (16, 16, 7)]
    rows = torch.cat([nn.functional.pad(block, (0, 16 - block.shape[0])) for block in blocks])
    head = nn.Linear(39, 5, bias=False)
    add_input_mix_(head, InputMix(rows, (16, 16, 7)))
    head = head.to(dtype)
    assert head.mix.matrix.dtype == torch.float32
    x = torch.randn(2, 3, 39, generator=generator).to(dtype)
    mixed = (x.float() @ torch.block_diag(*blocks)).to(dtype)
    wanted = nn.functional.linear(mixed, head.weight)
    assert torch.allclose(head(x), wanted, rtol=1e-5 if dtype == torch.float32 else 0.02)
    assert torch.equal(head(input=x), head(x))
    assert set(head.state_dict()) == {"weight", "mix.matrix"}
    right = head.mix(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head.mix(x), right)
