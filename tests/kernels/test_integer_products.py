"""Products of quantized inputs on every instruction set: bit for bit those of torch's reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from kernel_samples import sample
from torch import Tensor

from integer_oracle import INPUTS, WEIGHTS, tokens, weight_of
from linears import built
from subnibble.kernels import native as kernels
from subnibble.runtime import native, ops
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.linear import Linear
from subnibble.tensor.packed import PackedTensor
from subnibble.tensor.scheme import Scheme

ISAS = kernels.instruction_sets()
pytestmark = pytest.mark.skipif(not ISAS, reason="the kernels were not built")
every_isa = pytest.mark.parametrize("isa", ISAS)
OUTLIERS = {
    "8 bits": ActivationScheme(8, outliers=9),
    "4 bits, groups of 16": ActivationScheme(4, 16, outliers=13),
    "3 bits, symmetric": ActivationScheme(3, 32, "none", outliers=1),
}
SCHEMES = INPUTS | {f"{name}, outliers": scheme for name, scheme in OUTLIERS.items()}


def many_terms(scheme: ActivationScheme | None, requantized: int = 37) -> Linear:
    """Two ranges, a salient matrix whose channels are quantized twice, a low-rank branch, a bias."""
    weight = PackedTensor((sample(Scheme(3, 32), 120, 40), sample(Scheme(4, -1, "none"), 19, 40, seed=1)))
    low_rank = PackedTensor((sample(Scheme(4, 64), 139, 5),)), PackedTensor((sample(Scheme(8, -1), 5, 40),))
    salient = PackedTensor((sample(Scheme(4, 16), 37, 40),))
    return built(
        weight, torch.randn(40), activation=scheme, salient=salient, low_rank=low_rank, requantized=requantized
    )


def reference(x: Tensor, layer: Linear) -> Tensor:
    with kernels.chosen(kernels.TORCH):
        return ops.linear(x, layer)


@every_isa
@pytest.mark.parametrize("activation", SCHEMES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_product_is_that_of_the_reference_bit_for_bit(isa: str, name: str, activation: str) -> None:
    layer, x = built(weight_of(WEIGHTS[name]), activation=SCHEMES[activation]), tokens()
    expected = reference(x, layer)
    assert bool(expected.any())
    with kernels.chosen(isa):
        for count in (1, 2, 3, 7):
            assert torch.equal(ops.linear(x[:count], layer), expected[:count]), count


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [*SCHEMES, "none"])
def test_every_term_of_a_linear_is_that_of_the_reference(isa: str, activation: str, dtype: torch.dtype) -> None:
    scheme = SCHEMES.get(activation)
    layer, x = many_terms(scheme), tokens(dtype=dtype)
    with kernels.chosen(isa):
        y = ops.linear(x, layer)
    if scheme is not None:
        assert torch.equal(y, reference(x, layer))
    else:
        exact = x.double() @ ops.dense_from_input(layer).double().T + layer.weight.bias.double()
        assert y.dtype == dtype
        size = float(exact.norm())
        assert float((y.double() - exact).norm()) < 8 * torch.finfo(dtype).eps * size + 2e-5 * size


# Around a register's tokens, tiles of 16 rows alone and in pairs, and what a thread gets of them.
@every_isa
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 32, 33, 49])
@pytest.mark.parametrize("count", [1, 4, 5, 8, 9, 13, 23, 40])
def test_every_number_of_rows_and_tokens(isa: str, rows: int, count: int) -> None:
    x = torch.randn(count, 160, generator=torch.Generator().manual_seed(5))
    for scheme in (Scheme(3, 32), Scheme(8, 128, "none"), Scheme(2, 32, "none", "float16", "sign")):
        layer = built(PackedTensor((sample(scheme, 160, rows),)), activation=ActivationScheme(8, 64))
        with kernels.chosen(isa):
            assert torch.equal(ops.linear(x, layer), reference(x, layer)), scheme.name


@every_isa
def test_sums_beyond_float32_are_rounded_once(isa: str) -> None:
    # Sums of 4096 products of 255 and 255 exceed 2^24.
    x, scheme = torch.rand(3, 4096) + 1, Scheme(8, -1, "integer", "float32")
    part = sample(scheme, 4096, 20)
    layer = built(PackedTensor((part,)), activation=ActivationScheme(8))
    with kernels.chosen(isa):
        assert torch.equal(ops.linear(x, layer), reference(x, layer))


@every_isa
@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("activation", SCHEMES)
def test_small_and_large_inputs_are_rounded_as_in_the_reference(isa: str, activation: str, value: float) -> None:
    layer = built(weight_of(WEIGHTS["2 bits"]), activation=SCHEMES[activation])
    x = tokens().sign() * value
    x[0, ::2] = 0
    with kernels.chosen(isa):
        y = ops.linear(x, layer)
    torch.testing.assert_close(y, reference(x, layer), rtol=0, atol=0, equal_nan=True)


@every_isa
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("activation", [*SCHEMES, "none"])
def test_what_is_not_finite_stays_so_and_in_its_token(isa: str, activation: str, value: float) -> None:
    layer, x = built(weight_of(WEIGHTS["mxfp4"]), activation=SCHEMES.get(activation)), tokens()
    x[1, 130] = value
    with kernels.chosen(isa):
        y = ops.linear(x, layer)
    assert not bool(y[1].isfinite().any())
    assert bool(y[[0, 2, 3, 4, 5, 6]].isfinite().all())


FAULTS: dict[str, Callable[[Linear], Linear]] = {
    "the residual left out": lambda layer: replace(layer, input=replace(layer.input, requantized=0)),
    "the outliers left out": lambda layer: replace(
        layer, input=replace(layer.input, activation=layer.input.activation.without_outliers)
    ),
    "the branch left out": lambda layer: replace(layer, weight=replace(layer.weight, low_rank=None)),
    "the salient matrix left out": lambda layer: replace(layer, weight=replace(layer.weight, salient=None)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_equality_rejects_a_planted_fault(fault: str) -> None:
    layer, x = many_terms(OUTLIERS["4 bits, groups of 16"]), tokens()
    assert torch.equal(ops.linear(x, layer), reference(x, layer))
    assert not torch.equal(ops.linear(x, FAULTS[fault](layer)), reference(x, layer))


def test_a_weight_that_was_written_to_is_repacked() -> None:
    layer, x = built(weight_of(WEIGHTS["4 bits, whole row"]), activation=ActivationScheme(8)), tokens()
    first = ops.linear(x, layer)
    part = layer.weight.main.ranges[0]
    assert native.repacked(part) is native.repacked(part)
    part.scales.mul_(2)
    assert torch.equal(ops.linear(x, layer), 2 * first)
    part.codes[0, 0] ^= 1
    assert torch.equal(ops.linear(x, layer), reference(x, layer))
