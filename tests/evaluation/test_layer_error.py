from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from linears import built
from subnibble.arch.llama import LLAMA
from subnibble.evaluation.layer_error import layer_errors
from subnibble.rounding import grid
from subnibble.runtime.modules import PackedLinear
from subnibble.tensor.packed import PackedRange, PackedTensor
from subnibble.tensor.scheme import Scheme
from tiny_llama import tiny_llama

# Group 19 divides none of the widths 48, 80 and 96.
SCHEME = Scheme(3, 19)
ALL = tuple(f"model.layers.{index}.{name}" for index in range(2) for name in LLAMA.linears)


def packed(reference: Any, paths: tuple[str, ...]) -> Any:
    model = copy.deepcopy(reference)
    for path in paths:
        quantized = grid.quantized(model.get_submodule(path).weight.detach(), SCHEME, grid.Clip())
        weight = PackedTensor((PackedRange.pack(quantized, SCHEME),))
        model.set_submodule(path, PackedLinear(built(weight, None)))
    return model


def windows() -> Tensor:
    return torch.randint(0, 61, (4, 13), generator=torch.Generator().manual_seed(2))


def explicit(model: Any, reference: Any, fed: Any, paths: tuple[str, ...]) -> dict[str, float]:
    """||(W - Q) X||² / ||W X||² in float64, X (inputs, tokens) what `fed` feeds each linear."""
    inputs: dict[str, list[Tensor]] = {path: [] for path in paths}
    handles = [
        fed.get_submodule(path).register_forward_pre_hook(
            lambda module, args, path=path: inputs[path].append(args[0].flatten(0, -2).double())
        )
        for path in paths
    ]
    with torch.no_grad():
        fed(windows(), use_cache=False)
    for handle in handles:
        handle.remove()
    errors = {}
    for path in paths:
        x, w = torch.cat(inputs[path]).T, reference.get_submodule(path).weight.detach().double()
        q = model.get_submodule(path).packed.dequantize().double()
        errors[path] = float(((w - q) @ x).square().sum() / (w @ x).square().sum())
    return errors


@pytest.mark.parametrize("paths", [ALL, ALL[:1], ALL[2:3], (ALL[5], ALL[13])], ids=["all", "q", "v", "two"])
def test_layer_error_equals_the_explicit_ratio_on_the_reference_inputs(paths: tuple[str, ...]) -> None:
    reference = tiny_llama(3)
    model = packed(reference, paths)
    actual, expected = layer_errors(model, reference, windows()), explicit(model, reference, reference, paths)
    assert set(actual) == set(paths)
    for path in paths:
        assert actual[path] == pytest.approx(expected[path], rel=1e-4)


def test_comparison_rejects_inputs_of_the_packed_model() -> None:
    reference = tiny_llama(3)
    model = packed(reference, ALL)
    result = layer_errors(model, reference, windows())
    packed_inputs = explicit(model, reference, model, ALL)
    for path in ALL[3:]:
        assert result[path] != pytest.approx(packed_inputs[path], rel=1e-4)


def test_layer_error_of_a_linear_that_lost_nothing_is_zero_and_of_zeros_is_one() -> None:
    reference = tiny_llama(3)
    path, zeros = ALL[4], ALL[6]
    model = packed(reference, (path, zeros))
    reference.get_submodule(path).weight.data.copy_(model.get_submodule(path).packed.dequantize())
    blank = grid.quantized(torch.zeros(48, 80), SCHEME, grid.Clip())
    model.set_submodule(zeros, PackedLinear(built(PackedTensor((PackedRange.pack(blank, SCHEME),)), None)))
    assert layer_errors(model, reference, windows()) == {path: 0.0, zeros: 1.0}


def test_measuring_leaves_no_hooks_behind() -> None:
    reference = tiny_llama(3)
    layer_errors(packed(reference, ALL), reference, windows())
    assert all(not module._forward_pre_hooks for module in reference.modules())
