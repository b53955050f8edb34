"""Products of quantized inputs with packed weights: bit for bit those of a NumPy oracle on int64 codes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from integer_oracle import (
    COLUMNS,
    INPUTS,
    ROWS,
    WEIGHTS,
    columns_shifted_by_one,
    oracle,
    product,
    recoded,
    tokens,
    weight_of,
    weight_planes,
)
from linears import built
from subnibble.runtime import integer, ops
from subnibble.runtime.activations import Quantized, quantize
from subnibble.runtime.integer import multiply_add_
from subnibble.tensor.packed import PackedRange, PackedTensor, QuantizedMatrix
from subnibble.tensor.scheme import Scheme


@pytest.mark.parametrize("activation", INPUTS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_product_is_that_of_the_oracle_bit_for_bit(name, activation) -> None:
    weight, scheme = weight_of(WEIGHTS[name]), INPUTS[activation]
    x = tokens()
    y = ops.linear(x, built(weight, activation=scheme))
    assert torch.equal(y, oracle(x, built(weight), scheme))
    assert bool(y.any())


@pytest.mark.parametrize("activation", INPUTS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_product_is_that_of_the_dense_values(name, activation) -> None:
    weight, scheme = weight_of(WEIGHTS[name]), INPUTS[activation]
    x = quantize(tokens(), scheme)
    values, dense = x.values().double(), weight.dequantize().double()
    # A real zero-point cancels codes of its own size.
    size = values.abs() @ (dense.abs() + spread(weight)).T
    bound = 4 * torch.finfo(torch.float32).eps * COLUMNS**0.5 * size
    assert bool(((product(x, weight).double() - values @ dense.T).abs() <= bound).all())


def spread(weight: PackedTensor) -> Tensor:
    """The size of the terms that cancel in a weight: scale * (largest code + |zero|), (m, k) float64."""
    parts = []
    for part in weight.ranges:
        planes = weight_planes(part)
        parts.append(
            sum(
                abs(scales) * (part.scheme.levels + (0 if zeros is None else abs(zeros))) for _, scales, zeros in planes
            )
        )
    return torch.from_numpy(np.concatenate(parts, 1)).double()


def one_code_off_by_one(quantized: QuantizedMatrix) -> None:
    quantized.codes[2, 5] ^= 1


def last_code_off_by_one(quantized: QuantizedMatrix) -> None:
    quantized.codes[4, -1] ^= 1


def all_scales_off_by_a_thousandth(quantized: QuantizedMatrix) -> None:
    quantized.scales.mul_(1.001)


def one_scale_off_by_a_thousandth(quantized: QuantizedMatrix) -> None:
    quantized.scales[3, 1] *= 1.001


def zero_points_left_out(quantized: QuantizedMatrix) -> None:
    quantized.zeros.zero_()


def one_zero_point_off_by_one(quantized: QuantizedMatrix) -> None:
    quantized.zeros[3, -1] += 1 if quantized.zeros[3, -1] < 7 else -1


def scales_shifted_by_a_group(quantized: QuantizedMatrix) -> None:
    quantized.scales.copy_(quantized.scales.roll(1, 1))


WEIGHT_FAULTS = [
    one_code_off_by_one,
    last_code_off_by_one,
    all_scales_off_by_a_thousandth,
    one_scale_off_by_a_thousandth,
    zero_points_left_out,
    one_zero_point_off_by_one,
    scales_shifted_by_a_group,
    columns_shifted_by_one,
]


@pytest.mark.parametrize("fault", WEIGHT_FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("activation", INPUTS)
@pytest.mark.parametrize("zero_point", ["integer", "real"])
def test_the_oracle_rejects_a_planted_fault_of_the_weight(zero_point, activation, fault) -> None:
    weight, scheme, x = weight_of([(COLUMNS, Scheme(3, 32, zero_point, "float32"))]), INPUTS[activation], tokens()
    wrong = ops.linear(x, built(recoded(weight, fault), activation=scheme))
    assert not torch.equal(wrong, oracle(x, built(weight), scheme))


def one_number_off_by_one(x: Quantized) -> Quantized:
    numbers = x.numbers.clone()
    numbers[1, 20] += 1
    return replace(x, numbers=numbers)


def one_input_scale_off_by_a_thousandth(x: Quantized) -> Quantized:
    scales = x.scales.clone()
    scales[1, -1] *= 1.001
    return replace(x, scales=scales)


def groups_shifted_by_one_column(x: Quantized) -> Quantized:
    inner = [x.bounds[0][0], *(stop + 1 for _, stop in x.bounds[:-1]), x.bounds[-1][1]]
    return replace(x, bounds=list(itertools.pairwise(inner)))


def zero_points_put_back(x: Quantized) -> Quantized:
    numbers = x.numbers.clone()
    for start, stop in x.bounds:
        numbers[:, start:stop] -= numbers[:, start:stop].amin(1, keepdim=True).clamp(max=0)
    return replace(x, numbers=numbers)


def last_group_left_out(x: Quantized) -> Quantized:
    return replace(x, bounds=x.bounds[:-1])


INPUT_FAULTS = [
    one_number_off_by_one,
    one_input_scale_off_by_a_thousandth,
    groups_shifted_by_one_column,
    zero_points_put_back,
    last_group_left_out,
]


@pytest.mark.parametrize("fault", INPUT_FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_oracle_rejects_a_planted_fault_of_the_input(name, fault) -> None:
    weight, scheme, x = weight_of(WEIGHTS[name]), INPUTS["4 bits, groups of 16"], tokens()
    right = oracle(x, built(weight), scheme)
    assert torch.equal(product(quantize(x, scheme), weight), right)
    assert not torch.equal(product(fault(quantize(x, scheme)), weight), right)


@pytest.mark.parametrize("width", [1, 64, 128, 256])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_of_8_by_8_bits_are_exact(width, sign) -> None:
    # 128 * 255 * 255 is below 2^24; numbers differ by one here and there, so that no sum is a round one.
    numbers = 255.0 - torch.randint(0, 2, (3, 2 * width), generator=torch.Generator().manual_seed(0)).float()
    codes = 255 - torch.randint(0, 2, (4, 2 * width), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    zeros = torch.zeros(4, 2)
    scheme = Scheme(8, width, "integer", "float32")
    part = PackedRange.pack(QuantizedMatrix(codes, torch.ones(4, 2), zeros), scheme)
    for group in range(2):
        scales = torch.zeros(3, 2)
        scales[:, group] = 1
        x = Quantized(sign * numbers, scales, [(0, width), (width, 2 * width)], [255, 255])
        columns = slice(group * width, (group + 1) * width)
        exact = sign * numbers[:, columns].long() @ codes[:, columns].long().T
        assert torch.equal(product(x, PackedTensor((part,))).long(), exact)


@pytest.mark.parametrize("columns", [259, 1024, 4096])
def test_a_sum_over_a_whole_row_is_exact_before_its_one_rounding(columns) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(200, 256, (5, columns), generator=generator).to(torch.uint8)
    numbers = torch.randint(200, 256, (3, columns), generator=generator).float()
    scheme = Scheme(8, -1, "integer", "float32")
    part = PackedRange.pack(QuantizedMatrix(codes, torch.ones(5, 1), torch.zeros(5, 1)), scheme)
    y = product(Quantized(numbers, torch.ones(3, 1), [(0, columns)], [255]), PackedTensor((part,)))
    assert torch.equal(y, (numbers.long() @ codes.long().T).float())


def test_a_product_adds_to_what_is_there_and_leaves_its_operands() -> None:
    weight, x = weight_of(WEIGHTS["three ranges"]), quantize(tokens(), INPUTS["4 bits, groups of 23"])
    before = [tensor.clone() for tensor in (x.numbers, x.scales, *weight.state().values())]
    y = torch.full((7, ROWS), torch.nan)
    multiply_add_(y, x, weight)
    assert bool(y.isnan().all())
    for tensor, copy in zip((x.numbers, x.scales, *weight.state().values()), before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("activation", ["4 bits, groups of 23", "8 bits, whole token"])
def test_many_tokens_are_multiplied_as_each_by_itself(activation) -> None:
    scheme, weight = INPUTS[activation], weight_of(WEIGHTS["three ranges"])
    x = torch.randn(1027, COLUMNS, generator=torch.Generator().manual_seed(5))
    whole = product(quantize(x, scheme), weight)
    pieces = [product(quantize(part, scheme), weight) for part in x.split(1)]
    assert torch.equal(whole, torch.cat(pieces))


SATURATED = """
import torch
from subnibble.runtime.integer import _SMALL
wrong = 0
for rows, columns, width in ((1, 1, 2), (7, 9, 33), (40, 65, 128), (3, 17, 255)):
    a = torch.full((rows, width), float(LARGEST))
    n = torch.full((columns, width), float(LARGEST))
    a[::2], n[::3, ::2] = -LARGEST, -LARGEST
    small = [x.to(torch.int8) for x in (a, n)]
    product = torch._int_mm(small[0], small[1].T)
    wrong += int(not torch.equal(product.long(), a.long() @ n.long().T))
print("WRONG", wrong, LARGEST == _SMALL)
"""


@pytest.mark.parametrize(("largest", "fits"), [(64, True), (127, False)])
def test_no_x86_processor_saturates_products_of_numbers_that_go_as_int8(largest: int, fits: bool) -> None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("on x86 alone")
    # oneDNN's kernels for processors that add two int8 products in int16; 127 shows that they are the ones tested.
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    program = SATURATED.replace("LARGEST", str(largest))
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    _, wrong, is_bound = done.stdout.split()
    assert (int(wrong) == 0) is fits
    assert (is_bound == "True") is fits


def test_one_token_of_any_strides_gives_the_same() -> None:
    weight, x = weight_of(WEIGHTS["2 bits"]), quantize(tokens()[:1], INPUTS["4 bits, groups of 23"])
    odd = replace(x, numbers=x.numbers.as_strided((1, COLUMNS), (1, 1)))
    assert torch.equal(product(odd, weight), product(x, weight))


def test_no_number_is_beyond_what_is_said_of_it() -> None:
    x = tokens() * 1e3
    for scheme in INPUTS.values():
        result = quantize(x, scheme)
        for (start, stop), largest in zip(result.bounds, result.max_numbers, strict=True):
            assert float(result.numbers[:, start:stop].abs().amax()) <= largest
    for ranges in WEIGHTS.values():
        for part in weight_of(ranges).ranges:
            for plane in integer.planes(part):
                assert float(plane.numbers.abs().amax()) <= plane.max_number
