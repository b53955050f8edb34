"""The handle that a packed linear calls is built once, and again whenever one of its parts is replaced."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from test_linear_terms import every_term

from subnibble.runtime import ops
from subnibble.runtime.modules import PackedLinear
from subnibble.tensor.activation_scheme import ActivationScheme


def linear() -> PackedLinear:
    return PackedLinear(every_term(ActivationScheme(4, 16)))


def replaced_buffer(module: PackedLinear, path: str) -> None:
    owner, name = module.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    setattr(owner, name, getattr(owner, name).clone())


CHANGES: dict[str, Callable[[PackedLinear], object]] = {
    "codes": lambda module: replaced_buffer(module, "codes"),
    "gather": lambda module: replaced_buffer(module, "gather"),
    "salient scales": lambda module: replaced_buffer(module, "salient.scales"),
    "up codes": lambda module: replaced_buffer(module, "up.codes"),
    "bias": lambda module: setattr(module, "bias", torch.nn.Parameter(module.bias.clone(), requires_grad=False)),
    "activation": lambda module: setattr(module, "activation", ActivationScheme(8)),
    "state dict": lambda module: module.load_state_dict(copy.deepcopy(module.state_dict()), assign=True),
}


def test_a_handle_is_made_once() -> None:
    module, x = linear(), torch.randn(3, linear().in_features)
    first = module.linear
    module(x)
    assert module.linear is first
    assert first.weight.main is module.packed


@pytest.mark.parametrize("change", CHANGES)
def test_a_handle_is_renewed_when_a_part_is_replaced(change: str) -> None:
    module = linear()
    first, x = module.linear, torch.randn(3, module.in_features)
    before = module(x)
    CHANGES[change](module)
    assert module.linear is not first
    assert torch.equal(module(x), ops.linear(x, module.linear))
    assert torch.equal(module(x), before) == (change != "activation")


def test_other_numbers_in_place_are_seen() -> None:
    module, x = linear(), torch.randn(3, linear().in_features)
    before = module(x)
    module.scales.mul_(2)
    assert not torch.equal(module(x), before)
    assert torch.equal(module(x), ops.linear(x, module.linear))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_has_a_handle_of_its_own(copied: Callable[[PackedLinear], PackedLinear]) -> None:
    module = linear()
    first = module.linear
    other = copied(module)
    assert other.linear is not first
    assert other.linear.weight.main.ranges[0].codes.data_ptr() != first.weight.main.ranges[0].codes.data_ptr()
    assert module.linear is first


def test_a_handle_holds_nothing_of_modules_whose_tensors_come_and_go() -> None:
    module = linear()
    module._hf_hook = object()
    assert module.linear is not module.linear
    assert module._linear._handle is None
    assert module._packed._handle is None
