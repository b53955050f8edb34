"""Packed codes against literal bytes and a bit-by-bit oracle; dense values against an explicit loop."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from subnibble.errors import CheckpointError
from subnibble.tensor.packed import (
    PackedLayout,
    PackedRange,
    PackedTensor,
    QuantizedMatrix,
    pack_codes,
    range_key,
    scale_dtype,
    unpack_codes,
)
from subnibble.tensor.scheme import BITS, SCALE_TYPES, ZERO_POINTS, Scheme

ROWS = 5
# (columns, group size): whole groups, ragged last groups, one short group, the whole row, groups of one.
SHAPES = [(256, 128), (576, 128), (5, 3), (5, 64), (7, -1), (9, 1), (37, 8), (1, 1)]

# Worked out by hand: code j fills bits j*bits.. of the row, the least significant bit of byte 0 first.
LITERAL = [
    # One byte is 3·64 + 2·16 + 1·4 + 0.
    (2, [0, 1, 2, 3], [0xE4]),
    # The fifth code opens a second byte, padded with zeros.
    (2, [3, 0, 0, 1, 2], [0x43, 0x02]),
    # 111 110 101 100 011 010 001 000 read from the last code to the first, cut into bytes from the right.
    (3, [0, 1, 2, 3, 4, 5, 6, 7], [0b10001000, 0b11000110, 0b11111010]),
    # Code 2 = 0b110 straddles bytes: its two low bits end byte 0, its high bit opens byte 1.
    (3, [0, 0, 6], [0b10000000, 0b00000001]),
    (3, [7], [0x07]),
    (4, [1, 2, 3, 4], [0x21, 0x43]),
    (4, [15, 0, 9], [0x0F, 0x09]),
    (8, [0, 1, 128, 255], [0x00, 0x01, 0x80, 0xFF]),
]


def bit_stream(codes: list[int], bits: int) -> list[int]:
    """The specified stream, bit by bit, in plain Python."""
    stream = [0] * ((len(codes) * bits + 7) // 8)
    for j, code in enumerate(codes):
        for b in range(bits):
            position = j * bits + b
            stream[position // 8] |= ((code >> b) & 1) << (position % 8)
    return stream


def random_matrix(rows: int, columns: int, scheme: Scheme, seed: int = 0) -> QuantizedMatrix:
    """Signed values of very different size; row 0 has one code, the last row an all-zero first group."""
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(columns)
    codes = torch.randint(0, scheme.levels, (rows, columns), generator=generator, dtype=torch.uint8)
    codes[0] = codes[0, 0]
    stored = scale_dtype(scheme)
    scales = torch.exp2(torch.rand(rows, groups, generator=generator) * 12 - 10).to(stored).float()
    if scheme.zero_point == "none":
        codes[-1, : scheme.group_bounds(columns)[0][1]] = scheme.levels // 2
        return QuantizedMatrix(codes, scales, None)
    if scheme.zero_point == "integer":
        zeros = torch.randint(0, scheme.levels, (rows, groups), generator=generator).float()
    else:
        zeros = (torch.randn(rows, groups, generator=generator) * scheme.levels).to(stored).float()
    zeros[-1, 0] = 1.0
    codes[-1, : scheme.group_bounds(columns)[0][1]] = 1
    return QuantizedMatrix(codes, scales, zeros)


def dense_by_loop(quantized: QuantizedMatrix, scheme: Scheme) -> np.ndarray:
    """`scale * (code - zero)` of every element in float32, with no use of the package's grouping."""
    rows, columns = quantized.codes.shape
    codes, scales = quantized.codes.numpy(), quantized.scales.numpy()
    zeros = np.full_like(scales, 2 ** (scheme.bits - 1)) if quantized.zeros is None else quantized.zeros.numpy()
    dense = np.full((rows, columns), np.nan, dtype=np.float32)
    for i in range(rows):
        for j in range(columns):
            group = 0 if scheme.group_size == -1 else j // scheme.group_size
            dense[i, j] = scales[i, group] * (np.float32(codes[i, j]) - zeros[i, group])
    return dense


def is_exactly(dense: Tensor, oracle: np.ndarray) -> bool:
    """Equal bit for bit."""
    bits = torch.from_numpy(oracle.view(np.int32))
    return dense.dtype == torch.float32 and torch.equal(dense.view(torch.int32), bits)


def packed_tensor(rows: int, layout: list[tuple[int, Scheme]]) -> tuple[PackedTensor, list[QuantizedMatrix]]:
    quantized = [random_matrix(rows, columns, scheme, seed) for seed, (columns, scheme) in enumerate(layout)]
    ranges = tuple(PackedRange.pack(part, scheme) for part, (_, scheme) in zip(quantized, layout, strict=True))
    return PackedTensor(ranges), quantized


MIXED = [
    (130, Scheme(3, 64, "integer")),
    (9, Scheme(8, -1, "none", "float32")),
    (12, Scheme(2, 5, "real", "bfloat16")),
]
ALL_SCHEMES = [Scheme(b, 8, zero, kind) for b in BITS for zero in ZERO_POINTS for kind in SCALE_TYPES]


@pytest.mark.parametrize(("bits", "codes", "expected"), LITERAL)
def test_codes_pack_to_the_literal_bytes(bits, codes, expected) -> None:
    packed = pack_codes(torch.tensor([codes], dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [expected]
    assert unpack_codes(torch.tensor([expected], dtype=torch.uint8), bits, len(codes)).tolist() == [codes]


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_packed_codes_unpack_to_the_same_and_are_the_specified_bit_stream(data) -> None:
    bits = data.draw(st.sampled_from(BITS))
    columns = data.draw(st.integers(1, 40))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=columns, max_size=columns)
    rows = data.draw(st.lists(row, min_size=1, max_size=4))
    packed = pack_codes(torch.tensor(rows, dtype=torch.uint8), bits)
    assert packed.tolist() == [bit_stream(codes, bits) for codes in rows]
    unpacked = unpack_codes(packed, bits, columns)
    assert unpacked.dtype == torch.uint8
    assert unpacked.tolist() == rows


@pytest.mark.parametrize("bits", BITS)
def test_every_row_starts_on_a_byte_and_is_padded_with_zeros(bits) -> None:
    codes = torch.full((3, 5), 2**bits - 1, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (3, (5 * bits + 7) // 8)
    # Ones in the low bits that the last byte uses, nothing above them.
    assert packed[:, -1].tolist() == [2 ** (5 * bits - 8 * (packed.shape[1] - 1)) - 1] * 3


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float32])
def test_codes_of_any_type_pack_alike(bits, dtype) -> None:
    codes = torch.randint(0, 2**bits, (3, 19), generator=torch.Generator().manual_seed(1))
    assert pack_codes(codes.to(dtype), bits).tolist() == [bit_stream(row, bits) for row in codes.tolist()]


@pytest.mark.parametrize("columns", [1, 7, 64, 129])
@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=lambda scheme: scheme.name)
def test_packed_range_unpacks_to_what_was_packed(scheme, columns) -> None:
    quantized = random_matrix(ROWS, columns, scheme)
    result = PackedRange.pack(quantized, scheme).unpack()
    assert torch.equal(result.codes, quantized.codes)
    assert torch.equal(result.scales, quantized.scales)
    if quantized.zeros is None:
        assert result.zeros is None
    else:
        assert torch.equal(result.zeros, quantized.zeros)


@pytest.mark.parametrize("zero_point", ["integer", "real"])
def test_a_scheme_with_zero_points_refuses_a_matrix_without(zero_point) -> None:
    quantized = replace(random_matrix(2, 8, Scheme(4, 4, zero_point)), zeros=None)
    with pytest.raises(ValueError, match="needs zero-points"):
        PackedRange.pack(quantized, Scheme(4, 4, zero_point))


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("columns", "group_size"), SHAPES)
def test_dequantize_equals_the_explicit_loop(columns, group_size, bits, zero_point) -> None:
    scheme = Scheme(bits, group_size, zero_point)
    quantized = random_matrix(ROWS, columns, scheme)
    assert is_exactly(PackedRange.pack(quantized, scheme).dequantize(), dense_by_loop(quantized, scheme))


@pytest.mark.parametrize("scale_type", SCALE_TYPES)
@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_dequantize_equals_the_explicit_loop_for_every_scale_type(scale_type, zero_point) -> None:
    scheme = Scheme(3, 8, zero_point, scale_type)
    quantized = random_matrix(ROWS, 37, scheme)
    assert is_exactly(PackedRange.pack(quantized, scheme).dequantize(), dense_by_loop(quantized, scheme))


@pytest.mark.parametrize("bits", BITS)
def test_without_zero_points_the_middle_code_is_zero(bits) -> None:
    scheme = Scheme(bits, -1, "none")
    middle = 2 ** (bits - 1)
    codes = torch.tensor([[middle - 1, middle, middle + 1]], dtype=torch.uint8)
    packed = PackedRange.pack(QuantizedMatrix(codes, torch.tensor([[0.5]]), None), scheme)
    assert packed.dequantize().tolist() == [[-0.5, 0.0, 0.5]]


def test_dequantize_leaves_the_stored_tensors_alone() -> None:
    packed, _ = packed_tensor(3, MIXED)
    before = {name: tensor.clone() for name, tensor in packed.state().items()}
    assert torch.equal(packed.dequantize(), packed.dequantize())
    assert all(torch.equal(before[name], tensor) for name, tensor in packed.state().items())


def scale_off_by_two_percent(part: PackedRange) -> PackedRange:
    scales = part.scales.clone()
    scales[1, -1] *= 1.02
    return replace(part, scales=scales)


def one_code_off_by_one(part: PackedRange) -> PackedRange:
    codes = unpack_codes(part.codes, part.scheme.bits, part.num_columns).clone()
    codes[2, -1] ^= 1
    return replace(part, codes=pack_codes(codes, part.scheme.bits))


def groups_shifted_by_one(part: PackedRange) -> PackedRange:
    return replace(part, scales=part.scales.roll(1, dims=1))


def last_group_reads_the_one_before(part: PackedRange) -> PackedRange:
    return replace(part, scales=torch.cat([part.scales[:, :-1], part.scales[:, -2:-1]], dim=1))


def zero_points_dropped(part: PackedRange) -> PackedRange:
    return replace(part, scheme=replace(part.scheme, zero_point="none"), zeros=None)


def one_zero_point_off_by_one(part: PackedRange) -> PackedRange:
    zeros = part.unpack().zeros
    assert zeros is not None
    zeros[1, -1] += 1 if zeros[1, -1] < part.scheme.levels - 1 else -1
    if part.scheme.zero_point == "integer":
        return replace(part, zeros=pack_codes(zeros, part.scheme.bits))
    return replace(part, zeros=zeros.to(part.scales.dtype))


def group_boundary_off_by_one(part: PackedRange) -> PackedRange:
    return replace(part, scheme=replace(part.scheme, group_size=part.scheme.group_size + 1))


def rows_reversed(part: PackedRange) -> PackedRange:
    return part.rows(torch.arange(ROWS - 1, -1, -1))


def codes_high_bits_first(part: PackedRange) -> PackedRange:
    reverse = torch.tensor([int(f"{byte:08b}"[::-1], 2) for byte in range(256)], dtype=torch.uint8)
    return replace(part, codes=reverse[part.codes.long()])


FAULTS: list[Callable[[PackedRange], PackedRange]] = [
    scale_off_by_two_percent,
    one_code_off_by_one,
    groups_shifted_by_one,
    last_group_reads_the_one_before,
    group_boundary_off_by_one,
    rows_reversed,
    codes_high_bits_first,
]
FAULTY = [("none", fault) for fault in FAULTS]
ZERO_FAULTS = [zero_points_dropped, one_zero_point_off_by_one]
FAULTY += [(zero_point, fault) for zero_point in ("integer", "real") for fault in FAULTS + ZERO_FAULTS]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("zero_point", "fault"), FAULTY)
def test_the_dequantize_oracle_rejects_a_planted_fault(zero_point, bits, fault) -> None:
    # 580 = 4 groups of 128 and a ragged one of 68; one more column a group still makes five groups.
    scheme = Scheme(bits, 128, zero_point)
    quantized = random_matrix(ROWS, 580, scheme)
    oracle = dense_by_loop(quantized, scheme)
    part = PackedRange.pack(quantized, scheme)
    assert is_exactly(part.dequantize(), oracle)
    assert not is_exactly(fault(part).dequantize(), oracle)


def test_ranges_stand_side_by_side_in_order() -> None:
    packed, quantized = packed_tensor(4, MIXED)
    parts = [dense_by_loop(part, scheme) for part, (_, scheme) in zip(quantized, MIXED, strict=True)]
    assert packed.shape == (4, 151)
    assert is_exactly(packed.dequantize(), np.concatenate(parts, axis=1))


def test_dequantize_to_another_type_casts_the_float32_values_once() -> None:
    packed, quantized = packed_tensor(4, [(37, Scheme(4, 8, "real"))])
    oracle = torch.from_numpy(dense_by_loop(quantized[0], Scheme(4, 8, "real")))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(packed.dequantize(dtype), oracle.to(dtype))


@pytest.mark.parametrize("index", [[0], [3, 1, 1], []])
def test_rows_are_the_rows_of_the_dense_matrix(index) -> None:
    packed, _ = packed_tensor(4, MIXED)
    rows = torch.tensor(index, dtype=torch.int64)
    assert torch.equal(packed.rows(rows).dequantize(), packed.dequantize()[rows])
    assert packed.rows(rows).layout == PackedLayout(len(index), packed.layout.ranges)


def test_a_negative_index_is_no_row() -> None:
    packed, _ = packed_tensor(4, MIXED)
    with pytest.raises(IndexError):
        packed.rows(torch.tensor([-1, 2]))


def test_the_parts_of_the_first_range_have_plain_names_and_later_ones_numbers() -> None:
    packed, _ = packed_tensor(2, MIXED)
    assert set(packed.state()) == {
        "codes", "scales", "zeros",
        "codes_1", "scales_1",
        "codes_2", "scales_2", "zeros_2",
    }  # fmt: skip
    assert range_key("codes", 0) == "codes"
    assert range_key("zeros", 2) == "zeros_2"


@pytest.mark.parametrize("columns", [1, 5, 64, 577])
@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=lambda scheme: scheme.name)
def test_stored_bits_are_those_of_the_layout_and_of_the_written_file(scheme, columns) -> None:
    packed, _ = packed_tensor(3, [(columns, scheme), (10, Scheme(3, 4, "integer"))])
    blob = save(packed.state())
    header = 8 + int.from_bytes(blob[:8], "little")
    assert packed.stored_bits == packed.layout.stored_bits == 8 * (len(blob) - header)


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=lambda scheme: scheme.name)
def test_empty_storage_has_the_shapes_and_types_of_packed_data(scheme) -> None:
    packed, _ = packed_tensor(3, [(37, scheme), (5, Scheme(2, -1, "none"))])
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in packed.state().items()}
    empty = packed.layout.empty()
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in empty.state().items()} == expected
    assert all(tensor.is_meta for tensor in empty.state().values())


def test_a_tensor_rebuilt_from_its_state_is_the_same() -> None:
    packed, _ = packed_tensor(4, MIXED)
    rebuilt = PackedTensor.from_state(packed.state(), packed.layout)
    assert rebuilt.layout == packed.layout
    assert torch.equal(rebuilt.dequantize(), packed.dequantize())


WRONG = {
    "codes a byte short": ("codes", lambda t: t[:, :-1]),
    "codes a row short": ("codes", lambda t: t[:-1]),
    "codes transposed": ("codes", lambda t: t.T),
    "codes signed": ("codes", lambda t: t.to(torch.int8)),
    "codes missing": ("codes", lambda t: None),
    "scales of another type": ("scales", lambda t: t.to(torch.bfloat16)),
    "scales a group short": ("scales", lambda t: t[:, :-1]),
    "scales missing": ("scales", lambda t: None),
    "zeros missing": ("zeros", lambda t: None),
    "zeros not packed": ("zeros", lambda t: t.to(torch.float16)),
    "zeros one too many": ("zeros_1", lambda t: torch.zeros(4, 1)),
    "codes of a later range missing": ("codes_1", lambda t: None),
    "scales of a later range wrong": ("scales_2", lambda t: t.float()),
    "real zeros of a later range missing": ("zeros_2", lambda t: None),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_state_that_does_not_fit_the_layout_is_an_error_naming_the_tensor(wrong) -> None:
    name, change = WRONG[wrong]
    packed, _ = packed_tensor(4, MIXED)
    changed = change(packed.state().get(name))
    state = {key: tensor for key, tensor in packed.state().items() if key != name}
    if changed is not None:
        state[name] = changed
    with pytest.raises(CheckpointError, match=rf"^model\.layers\.0\.mlp\.{name}: expected"):
        PackedTensor.from_state(state, packed.layout, "model.layers.0.mlp")
