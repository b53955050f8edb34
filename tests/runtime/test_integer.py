"""Products of quantized inputs with packed weights: bit for bit those of a NumPy oracle on int64 codes.

The oracle corrects for zero-points afterwards, `sum q_x q_w - z_x sum q_w - z_w sum q_x + n z_x z_w`, where the code
under test takes them off first; what follows is float32 in the documented order.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from subnibble.runtime import integer, ops
from subnibble.runtime.activations import Quantized, quantize
from subnibble.runtime.integer import multiply_add_
from subnibble.runtime.ops import LinearTerms
from subnibble.scheme import ActivationScheme, Scheme
from subnibble.tensor import CodedMatrix, PackedRange, PackedTensor, scale_dtype

ROWS, COLUMNS = 9, 139
MX, AMX = Scheme(4, 32, "none", "e8m0", "mxfp4"), ActivationScheme(4, 32, "none", "mxfp4")
E2M1_HALVES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int64)
WEIGHTS = {
    "2 bits": [(COLUMNS, Scheme(2, 32))],
    "3 bits, symmetric": [(COLUMNS, Scheme(3, 16, "none"))],
    "4 bits, whole row": [(COLUMNS, Scheme(4, -1, "integer", "float32"))],
    "8 bits": [(COLUMNS, Scheme(8, 64, "integer", "bfloat16"))],
    "8 bits, symmetric": [(COLUMNS, Scheme(8, 128, "none"))],
    "3 bits, real": [(COLUMNS, Scheme(3, 32, "real"))],
    "8 bits, real": [(COLUMNS, Scheme(8, 48, "real", "float32"))],
    "2 bits, sign": [(COLUMNS, Scheme(2, 32, "none", "float16", "sign"))],
    "4 bits, sign": [(COLUMNS, Scheme(4, 40, "none", "bfloat16", "sign"))],
    "mxfp4": [(COLUMNS, MX)],
    "three ranges": [(70, Scheme(2, 32)), (50, Scheme(3, 24, "real")), (19, Scheme(8, -1, "none"))],
}
INPUTS = {
    "8 bits, whole token": ActivationScheme(8),
    "8 bits, symmetric, groups of 128": ActivationScheme(8, 128, "none"),
    "4 bits, groups of 16": ActivationScheme(4, 16),
    "4 bits, groups of 23": ActivationScheme(4, 23),
    "4 bits, symmetric, groups of 40": ActivationScheme(4, 40, "none", clip=0.9),
    "3 bits, groups of 32": ActivationScheme(3, 32),
    "mxfp4": AMX,
}


def weight_range(rows: int, columns: int, scheme: Scheme, seed: int) -> PackedRange:
    """Codes over the whole range; row 0 has one code, row 1 the largest, the last row a first group of zeros."""
    generator = torch.Generator().manual_seed(seed)
    groups, stored = scheme.groups(columns), scale_dtype(scheme)
    codes = torch.randint(0, scheme.levels, (rows, columns), generator=generator, dtype=torch.uint8)
    codes[0], codes[1] = codes[0, 0], scheme.levels - 1
    middle = 0 if scheme.grid == "mxfp4" else scheme.levels // 2
    codes[-1, : scheme.group_bounds(columns)[0][1]] = middle
    scales = torch.exp2(torch.rand(rows, groups * scheme.scales_per_group, generator=generator) * 6 - 8)
    scales = torch.exp2(scales.log2().floor()) if scheme.grid == "mxfp4" else scales.to(stored).float()
    if scheme.zero_point == "none":
        return PackedRange.pack(CodedMatrix(codes, scales, None), scheme)
    zeros = torch.randint(0, scheme.levels, (rows, groups), generator=generator).float()
    if scheme.zero_point == "real":
        zeros = (zeros - torch.rand(rows, groups, generator=generator)).to(stored).float()
    zeros[-1, 0] = middle
    return PackedRange.pack(CodedMatrix(codes, scales, zeros), scheme)


def weight_of(ranges: list[tuple[int, Scheme]], rows: int = ROWS, seed: int = 0) -> PackedTensor:
    parts = [weight_range(rows, columns, scheme, seed + i) for i, (columns, scheme) in enumerate(ranges)]
    return PackedTensor(tuple(parts))


def tokens(columns: int = COLUMNS, dtype: torch.dtype = torch.float32) -> Tensor:
    """(7, columns): signed, one channel a hundred times larger, one token zero, one constant, one positive."""
    x = torch.randn(7, columns, generator=torch.Generator().manual_seed(3))
    x[:, columns // 2] *= 100
    x[2] = 0
    x[3] = 0.37
    x[4] = x[4].abs()
    return x.to(dtype)


@dataclass(frozen=True)
class Codes:
    """Inputs as int64 codes (t, k), scales and zero-points (t, k) of every channel, bounds of groups."""

    codes: NDArray[np.int64]
    scales: NDArray[np.float32]
    zeros: NDArray[np.int64]
    edges: list[int]


def codes_of(x: Quantized, scheme: ActivationScheme) -> Codes:
    """Numbers with a zero-point put back: any will do for the product, so every group has one of its own."""
    numbers = x.numbers.numpy().astype(np.int64)
    zeros = np.zeros_like(numbers)
    if scheme.zero_point == "integer":
        for start, stop in x.bounds:
            # The lowest code is 0.
            zeros[:, start:stop] = -np.minimum(numbers[:, start:stop].min(1, keepdims=True), 0)
    scales = np.concatenate(
        [np.repeat(x.scales[:, g : g + 1].numpy(), stop - start, 1) for g, (start, stop) in enumerate(x.bounds)], 1
    )
    return Codes(numbers + zeros, scales, zeros, [start for start, _ in x.bounds])


def weight_planes(part: PackedRange) -> list[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32] | None]]:
    """Codes (m, n) int64, scales and zero-points of every column (m, n), None for 0; a plane for each sign bit."""
    coded, scheme = part.unpack(), part.scheme
    width = part.columns if scheme.group_size == -1 else scheme.group_size
    group = np.arange(part.columns) // width
    codes, scales = coded.codes.numpy().astype(np.int64), coded.scales.numpy()
    if scheme.grid == "mxfp4":
        return [(E2M1_HALVES[codes], (scales / np.float32(2))[:, group], None)]
    if scheme.grid == "sign":
        bits = scheme.bits
        return [(codes >> b & 1, 2 * scales[:, b::bits][:, group], None) for b in range(bits)]
    if coded.zeros is None:
        middle = np.full((len(codes), part.columns), scheme.levels // 2, np.float32)
        return [(codes, scales[:, group], middle)]
    return [(codes, scales[:, group], coded.zeros.numpy()[:, group])]


def segments(part: PackedRange, start: int, x: Codes) -> list[tuple[int, int]]:
    """First and stop column of runs between edges of the weight's groups and of the input's."""
    width = part.columns if part.scheme.group_size == -1 else part.scheme.group_size
    stop = min(part.columns, x.codes.shape[1] - start)
    edges = {*range(0, part.columns, width), *(e - start for e in x.edges), stop}
    inside = sorted(e for e in edges if 0 <= e <= stop)
    return list(itertools.pairwise(inside))


def oracle_product(x: Codes, weight: PackedTensor, y: NDArray[np.float32]) -> NDArray[np.float32]:
    start = 0
    for part in weight.ranges:
        found = weight_planes(part)
        for first, stop in segments(part, start, x):
            q_x = x.codes[:, start + first : start + stop]
            s_x, z_x = x.scales[:, start + first, None], x.zeros[:, start + first, None]
            n = stop - first
            for codes, scales, zeros in found:
                q_w, s_w = codes[:, first:stop], scales[:, first]
                whole = q_x @ q_w.T - z_x * q_w.sum(1)
                sums = q_x.sum(1, keepdims=True) - n * z_x
                if part.scheme.grid == "sign":
                    # A bit is (1 + sign) / 2: 2 bit - 1, and its scale is half of what is stored here.
                    product, s_w = (2 * whole - sums).astype(np.float32), s_w / np.float32(2)
                elif zeros is None:
                    product = whole.astype(np.float32)
                elif part.scheme.zero_point == "real":
                    product = whole.astype(np.float32) - sums.astype(np.float32) * zeros[:, first]
                else:
                    z_w = zeros[:, first].astype(np.int64)
                    product = (q_x @ q_w.T - z_x * q_w.sum(1) - z_w * q_x.sum(1, keepdims=True) + n * z_x * z_w).astype(
                        np.float32
                    )
                y = y + (product * s_w) * s_x
        start += part.columns
    return y


def oracle(x: Tensor, terms: LinearTerms, scheme: ActivationScheme) -> Tensor:
    """What a linear gives for tokens (t, k) as they enter the product: float32 (t, m)."""
    entered = quantize(x, scheme)
    codes = codes_of(entered, scheme)
    y = oracle_product(codes, terms.weight, np.zeros((len(x), terms.weight.shape[0]), np.float32))
    if terms.salient is not None:
        y = oracle_product(codes, terms.salient, y)
        if terms.residual != "none":
            rank = terms.salient.shape[1]
            rest = quantize(x[:, :rank].float() - entered.values()[:, :rank], scheme)
            target = terms.weight if terms.residual == "weight" else terms.salient
            y = oracle_product(codes_of(rest, scheme), target, y)
    if terms.low_rank is not None:
        down, up = terms.low_rank
        inner = torch.from_numpy(oracle_product(codes, down, np.zeros((len(x), down.shape[0]), np.float32)))
        y = oracle_product(codes_of(quantize(inner, scheme), scheme), up, y)
    result = torch.from_numpy(y)
    return result if terms.bias is None else result + terms.bias.float()


def product(x: Quantized, weight: PackedTensor) -> Tensor:
    y = torch.zeros(len(x.numbers), weight.shape[0])
    multiply_add_(y, x, weight)
    return y


@pytest.mark.parametrize("activation", INPUTS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_product_is_that_of_the_oracle_bit_for_bit(name, activation) -> None:
    weight, scheme = weight_of(WEIGHTS[name]), INPUTS[activation]
    x = tokens()
    y = ops.linear(x, LinearTerms(weight, activation=scheme))
    assert torch.equal(y, oracle(x, LinearTerms(weight), scheme))
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


def recoded(weight: PackedTensor, change: Callable[[CodedMatrix], None], index: int = 0) -> PackedTensor:
    parts = list(weight.ranges)
    coded = parts[index].unpack()
    zeros = None if coded.zeros is None else coded.zeros.clone()
    changed = CodedMatrix(coded.codes.clone(), coded.scales.clone(), zeros)
    change(changed)
    parts[index] = PackedRange.pack(changed, parts[index].scheme)
    return PackedTensor(tuple(parts))


def one_code_off_by_one(coded: CodedMatrix) -> None:
    coded.codes[2, 5] ^= 1


def last_code_off_by_one(coded: CodedMatrix) -> None:
    coded.codes[4, -1] ^= 1


def all_scales_off_by_a_thousandth(coded: CodedMatrix) -> None:
    coded.scales.mul_(1.001)


def one_scale_off_by_a_thousandth(coded: CodedMatrix) -> None:
    coded.scales[3, 1] *= 1.001


def zero_points_left_out(coded: CodedMatrix) -> None:
    coded.zeros.zero_()


def one_zero_point_off_by_one(coded: CodedMatrix) -> None:
    coded.zeros[3, -1] += 1 if coded.zeros[3, -1] < 7 else -1


def scales_shifted_by_a_group(coded: CodedMatrix) -> None:
    coded.scales.copy_(coded.scales.roll(1, 1))


def columns_shifted_by_one(coded: CodedMatrix) -> None:
    coded.codes.copy_(coded.codes.roll(1, 1))


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
    wrong = ops.linear(x, LinearTerms(recoded(weight, fault), activation=scheme))
    assert not torch.equal(wrong, oracle(x, LinearTerms(weight), scheme))


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
    right = oracle(x, LinearTerms(weight), scheme)
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
    part = PackedRange.pack(CodedMatrix(codes, torch.ones(4, 2), zeros), scheme)
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
    part = PackedRange.pack(CodedMatrix(codes, torch.ones(5, 1), torch.zeros(5, 1)), scheme)
    y = product(Quantized(numbers, torch.ones(3, 1), [(0, columns)], [255]), PackedTensor((part,)))
    assert torch.equal(y, (numbers.long() @ codes.long().T).float())


def salient_terms(residual: str = "none") -> LinearTerms:
    """37 salient columns inside the first groups of the weight and of the input."""
    return LinearTerms(
        weight_of([(COLUMNS, Scheme(4, 32))]),
        salient=weight_of([(37, Scheme(8, 16, "none"))], seed=9),
        residual=residual,
    )


@pytest.mark.parametrize("activation", INPUTS)
@pytest.mark.parametrize("residual", ops.RESIDUALS)
def test_salient_columns_and_residuals_are_those_of_the_oracle(residual, activation) -> None:
    terms, scheme, x = salient_terms(residual), INPUTS[activation], tokens()
    assert torch.equal(ops.linear(x, replace(terms, activation=scheme)), oracle(x, terms, scheme))


@pytest.mark.parametrize("activation", INPUTS)
def test_a_salient_term_is_one_product_over_concatenated_columns(activation) -> None:
    terms, scheme, x = salient_terms(), INPUTS[activation], tokens()
    codes = codes_of(quantize(x, scheme), scheme)
    # [x, first channels of x once more] times [weight, salient]: SERQ's wider K.
    wide = Codes(
        *(np.concatenate([part, part[:, :37]], 1) for part in (codes.codes, codes.scales, codes.zeros)),
        codes.edges + [COLUMNS + edge for edge in codes.edges if edge < 37],
    )
    joined = PackedTensor((*terms.weight.ranges, *terms.salient.ranges))
    expected = oracle_product(wide, joined, np.zeros((len(x), ROWS), np.float32))
    assert torch.equal(ops.linear(x, replace(terms, activation=scheme)), torch.from_numpy(expected))


@pytest.mark.parametrize("activation", INPUTS)
def test_the_residual_brings_salient_channels_nearer(activation) -> None:
    scheme, x = INPUTS[activation], tokens()
    dense = salient_terms().weight.dequantize().double()[:, :37]
    channels = torch.zeros(7, COLUMNS)
    channels[:, :37] = x[:, :37]
    plain, mended = (
        ops.linear(channels, replace(salient_terms(), activation=scheme, residual=residual))
        for residual in ("none", "weight")
    )
    salient = salient_terms().salient.dequantize().double()
    values = quantize(channels, scheme).values().double()[:, :37]
    exact = channels[:, :37].double() @ dense.T + values @ salient.T
    assert float((mended - exact).norm()) < 0.6 * float((plain - exact).norm())


def low_rank_terms() -> LinearTerms:
    down = weight_of([(COLUMNS, Scheme(8, 128, "none"))], rows=37, seed=5)
    return LinearTerms(weight_of([(COLUMNS, MX)]), low_rank=(down, weight_of([(37, Scheme(4, 32))], seed=6)))


@pytest.mark.parametrize("activation", INPUTS)
def test_a_low_rank_branch_is_that_of_the_oracle(activation) -> None:
    terms, scheme, x = low_rank_terms(), INPUTS[activation], tokens()
    y = ops.linear(x, replace(terms, activation=scheme))
    assert torch.equal(y, oracle(x, terms, scheme))
    inner = product(quantize(x, scheme), terms.low_rank[0])
    branch = product(quantize(inner, scheme), terms.low_rank[1])
    main = product(quantize(x, scheme), terms.weight)
    assert torch.allclose(y, main + branch, rtol=1e-4, atol=1e-3 * float(y.abs().max()))


def every_term() -> LinearTerms:
    generator = torch.Generator().manual_seed(11)
    return replace(
        salient_terms("salient"), low_rank=low_rank_terms().low_rank, bias=torch.randn(ROWS, generator=generator)
    )


TERM_FAULTS = {
    "salient left out": {"salient": None, "residual": "none"},
    "residual left out": {"residual": "none"},
    "residual meets the weight": {"residual": "weight"},
    "low rank left out": {"low_rank": None},
    "bias left out": {"bias": None},
    "salient of 36 columns": {"salient": PackedTensor((weight_range(ROWS, 36, Scheme(8, 16, "none"), 9),))},
    "another up": {
        "low_rank": (low_rank_terms().low_rank[0], recoded(low_rank_terms().low_rank[1], columns_shifted_by_one))
    },
    "inputs not quantized": {"activation": None},
}


@pytest.mark.parametrize("fault", TERM_FAULTS)
@pytest.mark.parametrize("activation", INPUTS)
def test_the_oracle_rejects_a_planted_fault_of_a_term(activation, fault) -> None:
    scheme, x = INPUTS[activation], tokens()
    terms = replace(every_term(), activation=scheme)
    right = oracle(x, terms, scheme)
    assert torch.equal(ops.linear(x, terms), right)
    assert not torch.equal(ops.linear(x, replace(terms, **TERM_FAULTS[fault])), right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_result_is_rounded_to_the_type_of_the_input_once_at_the_end(dtype) -> None:
    scheme = INPUTS["4 bits, groups of 23"]
    terms, x = replace(every_term(), activation=scheme), tokens(dtype=dtype)
    y = ops.linear(x, terms)
    assert y.dtype == dtype
    assert torch.equal(y, oracle(x, terms, scheme).to(dtype))


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (2, 0)])
def test_any_leading_shape_is_that_of_tokens(shape) -> None:
    terms = replace(every_term(), activation=INPUTS["8 bits, whole token"])
    x = tokens()[: math.prod(shape)].reshape(*shape, COLUMNS)
    y = ops.linear(x, terms)
    assert y.shape == (*shape, ROWS)
    assert torch.equal(y.reshape(-1, ROWS), ops.linear(x.reshape(-1, COLUMNS), terms))


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


@pytest.mark.parametrize("activation", INPUTS)
def test_neither_autocast_nor_a_build_without_int8_products_changes_a_bit(activation, monkeypatch) -> None:
    terms = replace(every_term(), activation=INPUTS[activation])
    x = tokens()
    right = ops.linear(x, terms)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.linear(x, terms), right)
    monkeypatch.setattr(integer, "_multiplies_int8", lambda device: False)
    assert torch.equal(ops.linear(x, terms), right)


def test_autocast_leaves_an_online_transform_as_it_is() -> None:
    x, weight = torch.randn(4, 64), PackedTensor((weight_range(ROWS, 64, Scheme(4, 32), 3),))
    terms = LinearTerms(weight, blocks=(64,), activation=INPUTS["8 bits, whole token"])
    right = ops.linear(x, terms)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.linear(x, terms), right)


def test_no_number_is_beyond_what_is_said_of_it() -> None:
    x = tokens() * 1e3
    for scheme in INPUTS.values():
        found = quantize(x, scheme)
        for (start, stop), largest in zip(found.bounds, found.largest, strict=True):
            assert float(found.numbers[:, start:stop].abs().amax()) <= largest
    for ranges in WEIGHTS.values():
        for part in weight_of(ranges).ranges:
            for plane in integer.planes(part):
                assert float(plane.numbers.abs().amax()) <= plane.largest
