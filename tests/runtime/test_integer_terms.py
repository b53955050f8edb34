"""Salient columns, residuals and low-rank branches of quantized inputs: bit for bit those of the oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from integer_oracle import (
    COLUMNS,
    INPUTS,
    MX,
    ROWS,
    Codes,
    codes_of,
    columns_shifted_by_one,
    oracle,
    oracle_product,
    product,
    recoded,
    tokens,
    weight_of,
    weight_range,
)
from linears import built, changed
from subnibble.runtime import integer, ops
from subnibble.runtime.activations import quantize
from subnibble.tensor.linear import Linear
from subnibble.tensor.packed import PackedTensor
from subnibble.tensor.scheme import Scheme


def salient_terms(requantized: int = 0) -> Linear:
    """37 salient columns inside the first groups of the weight and of the input."""
    return built(
        weight_of([(COLUMNS, Scheme(4, 32))]),
        salient=weight_of([(37, Scheme(8, 16, "none"))], seed=9),
        requantized=requantized,
    )


@pytest.mark.parametrize("activation", INPUTS)
@pytest.mark.parametrize("requantized", [0, 37])
def test_salient_columns_and_residuals_are_those_of_the_oracle(requantized, activation) -> None:
    terms, scheme, x = salient_terms(requantized), INPUTS[activation], tokens()
    assert torch.equal(ops.linear(x, changed(terms, activation=scheme)), oracle(x, terms, scheme))


@pytest.mark.parametrize("activation", INPUTS)
def test_a_salient_term_is_one_product_over_concatenated_columns(activation) -> None:
    terms, scheme, x = salient_terms(), INPUTS[activation], tokens()
    codes = codes_of(quantize(x, scheme), scheme)
    # [x, first channels of x once more] times [weight, salient]: SERQ's wider K.
    wide = Codes(
        *(np.concatenate([part, part[:, :37]], 1) for part in (codes.codes, codes.scales, codes.zeros)),
        codes.edges + [COLUMNS + edge for edge in codes.edges if edge < 37],
    )
    joined = PackedTensor((*terms.weight.main.ranges, *terms.weight.salient.ranges))
    expected = oracle_product(wide, joined, np.zeros((len(x), ROWS), np.float32))
    assert torch.equal(ops.linear(x, changed(terms, activation=scheme)), torch.from_numpy(expected))


@pytest.mark.parametrize("activation", INPUTS)
def test_the_residual_brings_salient_channels_nearer(activation) -> None:
    scheme, x = INPUTS[activation], tokens()
    channels = torch.zeros(7, COLUMNS)
    channels[:, :37] = x[:, :37]
    plain, mended = (
        ops.linear(channels, changed(salient_terms(), activation=scheme, requantized=requantized))
        for requantized in (0, 37)
    )
    weight = salient_terms().weight
    dense, salient = (part.dequantize().double()[:, :37] for part in (weight.main, weight.salient))
    values = quantize(channels, scheme).values().double()[:, :37]
    exact = channels[:, :37].double() @ salient.T + values @ dense.T
    assert float((mended - exact).norm()) < 0.6 * float((plain - exact).norm())


def low_rank_terms() -> Linear:
    down = weight_of([(COLUMNS, Scheme(8, 128, "none"))], rows=37, seed=5)
    return built(weight_of([(COLUMNS, MX)]), low_rank=(down, weight_of([(37, Scheme(4, 32))], seed=6)))


@pytest.mark.parametrize("activation", INPUTS)
def test_a_low_rank_branch_is_that_of_the_oracle(activation) -> None:
    terms, scheme, x = low_rank_terms(), INPUTS[activation], tokens()
    y = ops.linear(x, changed(terms, activation=scheme))
    assert torch.equal(y, oracle(x, terms, scheme))
    inner = product(quantize(x, scheme), terms.weight.low_rank[0])
    branch = product(quantize(inner, scheme), terms.weight.low_rank[1])
    main = product(quantize(x, scheme), terms.weight.main)
    assert torch.allclose(y, main + branch, rtol=1e-4, atol=1e-3 * float(y.abs().max()))


def every_term() -> Linear:
    generator = torch.Generator().manual_seed(11)
    low_rank, bias = low_rank_terms().weight.low_rank, torch.randn(ROWS, generator=generator)
    return changed(salient_terms(37), low_rank=low_rank, bias=bias)


TERM_FAULTS = {
    "salient left out": {"salient": None, "requantized": 0},
    "residual left out": {"requantized": 0},
    "low rank left out": {"low_rank": None},
    "bias left out": {"bias": None},
    "salient of 36 columns": {
        "salient": PackedTensor((weight_range(ROWS, 36, Scheme(8, 16, "none"), 9),)),
        "requantized": 36,
    },
    "another up": {
        "low_rank": (
            low_rank_terms().weight.low_rank[0],
            recoded(low_rank_terms().weight.low_rank[1], columns_shifted_by_one),
        )
    },
    "inputs not quantized": {"activation": None},
}


@pytest.mark.parametrize("fault", TERM_FAULTS)
@pytest.mark.parametrize("activation", INPUTS)
def test_the_oracle_rejects_a_planted_fault_of_a_term(activation, fault) -> None:
    scheme, x = INPUTS[activation], tokens()
    terms = changed(every_term(), activation=scheme)
    right = oracle(x, terms, scheme)
    assert torch.equal(ops.linear(x, terms), right)
    assert not torch.equal(ops.linear(x, changed(terms, **TERM_FAULTS[fault])), right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_result_is_rounded_to_the_type_of_the_input_once_at_the_end(dtype) -> None:
    scheme = INPUTS["4 bits, groups of 23"]
    terms, x = changed(every_term(), activation=scheme), tokens(dtype=dtype)
    y = ops.linear(x, terms)
    assert y.dtype == dtype
    assert torch.equal(y, oracle(x, terms, scheme).to(dtype))


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (2, 0)])
def test_any_leading_shape_is_that_of_tokens(shape) -> None:
    terms = changed(every_term(), activation=INPUTS["8 bits, whole token"])
    x = tokens()[: math.prod(shape)].reshape(*shape, COLUMNS)
    y = ops.linear(x, terms)
    assert y.shape == (*shape, ROWS)
    assert torch.equal(y.reshape(-1, ROWS), ops.linear(x.reshape(-1, COLUMNS), terms))


@pytest.mark.parametrize("activation", INPUTS)
def test_neither_autocast_nor_a_build_without_int8_products_changes_a_bit(activation, monkeypatch) -> None:
    terms = changed(every_term(), activation=INPUTS[activation])
    x = tokens()
    right = ops.linear(x, terms)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.linear(x, terms), right)
    monkeypatch.setattr(integer, "_multiplies_int8", lambda device: False)
    assert torch.equal(ops.linear(x, terms), right)


def test_autocast_leaves_an_online_transform_as_it_is() -> None:
    x, weight = torch.randn(4, 64), PackedTensor((weight_range(ROWS, 64, Scheme(4, 32), 3),))
    terms = built(weight, blocks=(64,), activation=INPUTS["8 bits, whole token"])
    right = ops.linear(x, terms)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.linear(x, terms), right)
