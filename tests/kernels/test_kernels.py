"""Kernels against the reference: every form of matrix, length and instruction set that this machine has."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from kernel_samples import KINDS, MX, ROWS, misaligned, multiplied, near, sample, scheme_of, tokens

from subnibble.kernels import native as kernels
from subnibble.runtime import native
from subnibble.tensor.packed import PackedRange, PackedTensor, pack_codes
from subnibble.tensor.scheme import Scheme

ISAS = kernels.instruction_sets()
pytestmark = pytest.mark.skipif(not ISAS, reason="the kernels were not built")
BITS = (2, 3, 4, 8)
# Of 300 columns: one group, a whole chunk of 128 or 64 columns, words of 8 or 4, and groups that end anywhere.
GROUPS = (-1, 256, 128, 96, 64, 32, 8, 5)
# Around a word of 4 or 8 codes, a vector of 8 or 16 floats, and a chunk of 32, 64 or 128 columns; and larger.
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 576)
every_isa = pytest.mark.parametrize("isa", ISAS)


def schemes(group_size: int, scale_type: str) -> list[Scheme]:
    """Every grid and zero-point of every bit width."""
    pairs = [(kind, bits) for kind in KINDS for bits in BITS if not (kind == "sign" and bits == 8)]
    return [scheme_of(kind, bits, group_size, scale_type) for kind, bits in pairs]


@every_isa
@pytest.mark.parametrize("scale_type", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("group_size", GROUPS)
def test_products_of_every_scheme_are_within_rounding(isa: str, scale_type: str, group_size: int) -> None:
    with kernels.chosen(isa):
        for scheme in schemes(group_size, scale_type):
            part = sample(scheme, 300)
            for count in (1, 2, 3, 7):
                x = tokens(count, 300)
                assert near(multiplied(part, x), x, part), (scheme.name, count)


@every_isa
@pytest.mark.parametrize("columns", LENGTHS)
def test_products_of_every_length_are_within_rounding(isa: str, columns: int) -> None:
    with kernels.chosen(isa):
        for scheme in [*schemes(64, "float16"), *schemes(-1, "float16"), *schemes(3, "float16"), MX]:
            part, x = sample(scheme, columns), tokens(5, columns)
            assert near(multiplied(part, x), x, part), scheme.name


@every_isa
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9])
def test_products_of_every_number_of_rows_are_within_rounding(isa: str, rows: int) -> None:
    part, x = sample(Scheme(3, 32), 139, rows), tokens(3, 139)
    with kernels.chosen(isa):
        assert near(multiplied(part, x), x, part)


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", GROUPS)
def test_dequantized_rows_are_those_of_the_reference_bit_for_bit(isa: str, dtype: torch.dtype, group_size: int) -> None:
    with kernels.chosen(isa):
        for scheme in [*schemes(group_size, "float16"), *schemes(group_size, "float32"), MX]:
            for columns in (300, 128, 5, 1):
                part = sample(scheme, columns)
                out = torch.full((4, columns), math.nan, dtype=dtype)
                native._on(part, kernels.module.dequantize, 2, 6, out.data_ptr(), native._TYPES[dtype], out.stride(0))
                assert torch.equal(out, part.dequantize()[2:6].to(dtype)), (scheme.name, columns)


@every_isa
@pytest.mark.parametrize("offset", [1, 2, 3, 7, 17, 63])
def test_no_address_has_to_be_aligned(isa: str, offset: int) -> None:
    for scheme in (Scheme(3, 32), Scheme(4, 128, "real"), Scheme(2, 64, "none", "float32"), MX):
        part, x = sample(scheme, 300), tokens(2, 300)
        moved = replace(
            part,
            codes=misaligned(part.codes, offset),
            scales=misaligned(part.scales, offset),
            zeros=None if part.zeros is None else misaligned(part.zeros, offset),
        )
        moved_x, y = misaligned(x, 4 * offset), torch.full((2, ROWS + 3), math.nan)
        with kernels.chosen(isa):
            form = native.form(isa, scheme, ROWS, 300)
            zeros = 0 if moved.zeros is None else moved.zeros.data_ptr()
            tiles = kernels.module.Weight(form, moved.codes.data_ptr(), moved.scales.data_ptr(), zeros)
            tiles.multiply(native.rounded(moved_x, None), 0, y.data_ptr(), y.stride(0), False)
            assert torch.equal(y[:, :ROWS], multiplied(part, x))
        # Nothing is written beyond the rows.
        assert bool(y[:, ROWS:].isnan().all())


@every_isa
def test_a_token_does_not_depend_on_those_beside_it(isa: str) -> None:
    x = tokens(9, 300)
    with kernels.chosen(isa):
        for scheme in (Scheme(3, 128), Scheme(8, 32), Scheme(4, 5), MX):
            part = sample(scheme, 300)
            alone = torch.cat([multiplied(part, x[i : i + 1]) for i in range(9)])
            assert torch.equal(multiplied(part, x), alone)


@every_isa
def test_bfloat16_inputs_are_multiplied_as_the_same_numbers_in_float32(isa: str) -> None:
    x = tokens(3, 300, torch.bfloat16)
    with kernels.chosen(isa):
        for group_size in (64, 5):
            part = sample(Scheme(4, group_size), 300)
            assert torch.equal(multiplied(part, x), multiplied(part, x.float()))


@every_isa
def test_rows_of_inputs_and_outputs_may_lie_apart(isa: str) -> None:
    part, wide = sample(Scheme(2, 32), 139), tokens(3, 200)
    y = torch.full((3, 20), math.nan)
    with kernels.chosen(isa):
        native.multiply_(y[:, 4 : 4 + ROWS], native.rounded(wide[:, 30:169], None), PackedTensor((part,)))
        assert torch.equal(y[:, 4 : 4 + ROWS], multiplied(part, wide[:, 30:169].contiguous()))
    assert bool(y[:, :4].isnan().all())
    assert bool(y[:, 4 + ROWS :].isnan().all())


@every_isa
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_token(isa: str, bad: float) -> None:
    part, x = sample(Scheme(4, 32), 139), tokens(3, 139)
    x[1, 138] = bad
    with kernels.chosen(isa):
        y = multiplied(part, x)
    assert not bool(y[1].isfinite().any())
    assert bool(y[[0, 2]].isfinite().all())


def test_e8m0_scales_of_every_exponent_are_those_of_the_reference() -> None:
    part = sample(MX, 32, rows=256)
    part = replace(part, scales=torch.arange(256, dtype=torch.uint8).view(256, 1))
    part.codes[:, 0] |= 2
    for isa in ISAS:
        with kernels.chosen(isa):
            dense = native.dequantize(PackedTensor((part,)))
        assert torch.equal(dense.nan_to_num(7.5), part.dequantize().nan_to_num(7.5))


def test_half_scales_of_every_value_are_those_of_the_reference() -> None:
    scheme = Scheme(4, 8, "none")
    halves = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    finite = halves[halves.isfinite()].view(-1, 16)
    part = sample(scheme, 128, rows=finite.shape[0])
    part = replace(part, scales=finite.contiguous())
    for isa in ISAS:
        with kernels.chosen(isa):
            assert torch.equal(native.dequantize(PackedTensor((part,))), part.dequantize())


def test_a_form_without_a_kernel_is_refused() -> None:
    for form in ((1, 8, 8, 5, 0, 0), (1, 8, 8, 8, 1, 0), (1, 8, 8, 2, 2, 0), (1, 8, 0, 4, 0, 0), (1, 8, 8, 4, 0, 4)):
        with pytest.raises(ValueError, match="no kernel"):
            kernels.module.Form("portable", *form, False)


def recoded(part: PackedRange, row: int, column: int) -> PackedRange:
    codes = part.unpack().codes.clone()
    codes[row, column] ^= 1
    return replace(part, codes=pack_codes(codes, part.scheme.bits))


FAULTS: dict[str, Callable[[PackedRange], PackedRange]] = {
    "one code off by one": lambda part: recoded(part, 3, 299),
    "a scale off by a thousandth": lambda part: replace(part, scales=part.scales * 1.001),
    "scales of the next group": lambda part: replace(part, scales=part.scales.roll(1, 1)),
    "zero-points of the next row": lambda part: replace(part, zeros=part.zeros.roll(1, 0)),
    "the last column left out": lambda part: part,
    "groups of half the size": lambda part: replace(
        part, scheme=replace(part.scheme, group_size=16), scales=part.scales.repeat(1, 2)[:, :19].contiguous()
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_bound_rejects_a_planted_fault(fault: str) -> None:
    part, x = sample(Scheme(4, 32, "integer", "float32"), 300), tokens(3, 300)
    assert near(multiplied(part, x), x, part)
    spoiled_x = x.clone()
    if fault == "the last column left out":
        spoiled_x[:, -1] = 0
    spoiled = FAULTS[fault](part)
    if fault == "groups of half the size":
        spoiled = replace(spoiled, zeros=part.zeros.repeat(1, 2)[:, :10].contiguous())
    assert not near(multiplied(spoiled, spoiled_x), x, part)


def test_an_output_that_is_not_written_is_rejected() -> None:
    part, x = sample(Scheme(4, 32), 300), tokens(3, 300)
    y = multiplied(part, x)
    y[1, 2] = math.nan
    assert not near(y, x, part)
