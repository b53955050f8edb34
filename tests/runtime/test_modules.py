"""Running modules against dense ones: products within rounding, rows exactly, storage untouched by casts."""

import copy
import pickle

import pytest
import torch
from packed_samples import (
    CAST,
    LAYOUTS,
    ROWS,
    bias_of,
    dense,
    inputs,
    packed_range,
    packed_tensor,
    state_bytes,
    within_bound,
)
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from linears import built
from subnibble.kernels.native import TORCH, chosen
from subnibble.runtime.modules import (
    HeadInputMatrix,
    PackedEmbedding,
    PackedLinear,
    TiedHead,
    add_head_input_,
    add_output_bias_,
    remove_output_bias_,
)
from subnibble.tensor.packed import PackedRange, PackedTensor, QuantizedMatrix
from subnibble.tensor.scheme import Scheme


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_linear_equals_the_dense_linear(name, dtype, has_bias) -> None:
    weight = packed_tensor(name)
    bias = bias_of(ROWS).to(dtype) if has_bias else None
    linear = PackedLinear(built(weight, bias))
    x = inputs(linear.in_features, dtype)
    y = linear(x)
    assert y.dtype == dtype
    assert within_bound(y, x, dense(weight), bias)
    # On torch operations it is the same function of the dequantized weight, cast once: equal to the last bit.
    with chosen(TORCH):
        assert torch.equal(linear(x), nn.functional.linear(x, weight.dequantize().to(dtype), bias))


def scale_off_by_two_percent(quantized: QuantizedMatrix) -> None:
    quantized.scales[1, 1] *= 1.02


def all_scales_off_by_a_thousandth(quantized: QuantizedMatrix) -> None:
    quantized.scales.mul_(1.001)


def one_code_off_by_one(quantized: QuantizedMatrix) -> None:
    quantized.codes[2, 5] ^= 1


def last_code_off_by_one(quantized: QuantizedMatrix) -> None:
    quantized.codes[3, -1] ^= 1


def groups_shifted_by_one(quantized: QuantizedMatrix) -> None:
    quantized.scales.copy_(quantized.scales.roll(1, dims=1))


def zero_points_dropped(quantized: QuantizedMatrix) -> None:
    quantized.zeros.zero_()


def one_zero_point_off_by_one(quantized: QuantizedMatrix) -> None:
    quantized.zeros[4, -1] += 1 if quantized.zeros[4, -1] < 7 else -1


def two_rows_swapped(quantized: QuantizedMatrix) -> None:
    quantized.codes[[1, 2]] = quantized.codes[[2, 1]]


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
    quantized = right.unpack()
    quantized = QuantizedMatrix(quantized.codes.clone(), quantized.scales.clone(), quantized.zeros.clone())
    fault(quantized)
    wrong = PackedTensor((PackedRange.pack(quantized, scheme),))
    w, x, bias = dense(PackedTensor((right,))), inputs(139), bias_of(ROWS)
    assert within_bound(PackedLinear(built(PackedTensor((right,)), bias))(x), x, w, bias)
    assert not within_bound(PackedLinear(built(wrong, bias))(x), x, w, bias)


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
    linear = PackedLinear(built(weight, bias))
    x = inputs(linear.in_features)
    assert not within_bound(fault(linear(x).detach()), x, dense(weight), bias)


@pytest.mark.parametrize("dtype", CAST)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_cast_leaves_codes_scales_and_zeros_bit_identical(name, dtype) -> None:
    linear = PackedLinear(built(packed_tensor(name), bias_of(ROWS)))
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
    linear = PackedLinear(built(packed_tensor("3 bits, ragged"), None))
    x = inputs(linear.in_features)
    before = linear(x)
    assert torch.equal(CAST[dtype](linear)(x), before)
    assert torch.equal(linear.float()(x), before)


@pytest.mark.parametrize("dtype", CAST)
def test_a_cast_model_runs_in_its_new_type(dtype) -> None:
    embedding = PackedEmbedding(packed_tensor("3 bits, ragged"), torch.float32)
    model = nn.Sequential(embedding, PackedLinear(built(packed_tensor("3 bits, ragged"), bias_of(ROWS))))
    assert CAST[dtype](model)(torch.tensor([0, 3])).dtype == dtype


def test_moving_to_another_device_moves_everything() -> None:
    linear = PackedLinear(built(packed_tensor("two ranges"), bias_of(ROWS))).to("meta", torch.bfloat16)
    assert {buffer.device.type for buffer in linear.buffers()} == {"meta"}
    types = {name: tensor.dtype for name, tensor in packed_tensor("two ranges").state().items()}
    assert {name: buffer.dtype for name, buffer in linear.named_buffers()} == types


@pytest.mark.parametrize("name", LAYOUTS)
def test_stored_names_are_those_of_the_format(name) -> None:
    weight = packed_tensor(name)
    linear = PackedLinear(built(weight, bias_of(ROWS)))
    assert set(linear.state_dict()) == {*weight.state(), "bias"}
    assert set(PackedLinear(built(weight, None)).state_dict()) == set(weight.state())
    assert set(PackedEmbedding(weight, torch.float32).state_dict()) == set(weight.state())


def test_a_state_dict_loads_into_empty_storage() -> None:
    weight = packed_tensor("two ranges")
    source = PackedLinear(built(weight, bias_of(ROWS)))
    target = PackedLinear(built(weight.layout.empty("cpu"), torch.full((ROWS,), torch.nan)))
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


@pytest.mark.parametrize("beyond", [-1, -ROWS, ROWS])
def test_packed_embedding_refuses_ids_that_it_does_not_have_as_a_plain_one_does(beyond: int) -> None:
    packed = PackedEmbedding(packed_tensor("3 bits, ragged"), torch.float32)
    for table in (packed, nn.Embedding(ROWS, packed.embedding_dim)):
        with pytest.raises(IndexError):
            table(torch.tensor([[0, beyond]]))


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
    assert torch.equal(head(x), PackedLinear(built(weight))(x))


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
    assert torch.equal(model["head"](x), PackedLinear(built(weight))(x))
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


@pytest.mark.parametrize("copied", [lambda norm: norm, copy.deepcopy, lambda norm: pickle.loads(pickle.dumps(norm))])
def test_an_output_bias_is_removed_and_added_again(copied) -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(6))
    original = nn.RMSNorm(8)
    plain, attributes = original(x), set(vars(original))
    add_output_bias_(original, bias_of(8))
    norm = copied(original)
    remove_output_bias_(norm)
    assert torch.equal(norm(x), plain)
    assert set(vars(norm)) == attributes
    assert set(norm.state_dict()) == {"weight"}
    assert norm is original or torch.equal(original(x), plain + bias_of(8))
    add_output_bias_(norm, bias_of(8))
    assert torch.equal(norm(x), plain + bias_of(8))


def test_a_later_hook_does_not_displace_the_bias_of_a_loaded_module(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = nn.RMSNorm(8)
    add_output_bias_(norm, bias_of(8))
    x, pickled = torch.ones(1, 8), pickle.dumps(norm)
    # As in a new process, whose hooks are counted from 0.
    monkeypatch.setattr(RemovableHandle, "next_id", norm.bias_hook.id)
    loaded = pickle.loads(pickled)
    loaded.register_forward_hook(lambda module, args, output: None)
    assert torch.equal(loaded(x), norm(x))


def test_printing_shows_shape_and_schemes() -> None:
    assert "139 -> 9, w2g32+w8channel-sym" in repr(PackedLinear(built(packed_tensor("two ranges"), None)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_in_front_of_a_head_is_block_diagonal_and_keeps_its_type(dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.randn(width, width, generator=generator) for width in (16, 16, 7)]
    rows = torch.cat([nn.functional.pad(block, (0, 16 - block.shape[0])) for block in blocks])
    head = nn.Linear(39, 5, bias=False)
    nn.init.normal_(head.weight, generator=generator)
    add_head_input_(head, HeadInputMatrix(rows, (16, 16, 7)))
    head = head.to(dtype)
    assert head.mix.matrix.dtype == torch.float32
    x = torch.randn(2, 3, 39, generator=generator).to(dtype)
    mixed = (x.float() @ torch.block_diag(*blocks)).to(dtype)
    expected = nn.functional.linear(mixed, head.weight)
    share = 1e-5 if dtype == torch.float32 else 0.02
    assert bool((head(x) - expected).abs().max() < share * expected.abs().max())
    assert torch.equal(head(input=x), head(x))
    assert set(head.state_dict()) == {"weight", "mix.matrix"}
    right = head.mix(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head.mix(x), right)
