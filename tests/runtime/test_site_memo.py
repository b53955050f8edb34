"""Readers of one tensor make the same of it once, and nothing is kept longer than they need it."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace

import pytest
import torch
from test_linear_terms import every_term

from subnibble.runtime import ops
from subnibble.runtime.modules import PackedLinear
from subnibble.runtime.site_memo import SiteMemo
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.linear import Linear


def readers() -> list[PackedLinear]:
    """Three linears that do the same to their input, the first of which holds what that takes."""
    terms = every_term(ActivationScheme(4, 16), requantized=37)
    first = PackedLinear(terms)
    site = replace(terms.input, gather=None, column_scale=None)
    others = [PackedLinear(Linear(terms.weight.rows(torch.arange(n)), site)) for n in (5, 3)]
    for other in others:
        other.enter_as_(first)
    return [first, *others]


def test_what_shares_an_input_gives_what_each_gives_alone() -> None:
    whole, x = readers(), torch.randn(4, 139, generator=torch.Generator().manual_seed(1))
    actual = [module(x) for module in whole]
    for module, y in zip(whole, actual, strict=True):
        assert torch.equal(y, ops.linear(x, module.linear))
    assert torch.equal(actual[1], actual[0][:, :5])
    assert torch.equal(actual[2], actual[0][:, :3])


def test_an_input_is_made_once_for_all_readers_and_then_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, applied = readers(), []
    usual = ops.prepare
    monkeypatch.setattr(ops, "prepare", lambda x, site: applied.append(x) or usual(x, site))
    for _ in range(2):
        x = torch.randn(4, 139)
        for module in whole:
            module(x)
        assert whole[0]._memo._kept is None
    assert len(applied) == 2


def test_another_tensor_or_other_numbers_in_it_are_made_anew() -> None:
    whole, x = readers(), torch.randn(4, 139)
    whole[0](x)
    y = torch.randn(4, 139)
    assert torch.equal(whole[1](y), ops.linear(y, whole[1].linear))
    whole[0](x)
    x.mul_(-3)
    assert torch.equal(whole[1](x), ops.linear(x, whole[1].linear))


def test_nothing_is_kept_of_a_tensor_that_is_gone() -> None:
    whole, x = readers(), torch.randn(4, 139)
    whole[0](x)
    assert whole[0]._memo._kept is not None
    del x
    gc.collect()
    assert whole[0]._memo._kept is None


def test_gradients_of_one_reader_do_not_meet_anothers() -> None:
    memo, x = SiteMemo(), torch.randn(2, requires_grad=True)
    memo.readers = 2
    assert memo.of(x, 0, lambda: [1]) is not memo.of(x, 0, lambda: [1])
    with torch.no_grad():
        assert memo.of(x, 0, lambda: [1]) is memo.of(x, 0, lambda: [2])


def test_a_copied_model_shares_within_the_copy() -> None:
    whole = readers()
    copied = copy.deepcopy(torch.nn.ModuleList(whole))
    assert copied[1].input is copied[0]
    assert copied[0]._memo.readers == 3
    x = torch.randn(4, 139)
    assert all(torch.equal(new(x), old(x)) for new, old in zip(copied, whole, strict=True))
    # One state dict entry for all.
    assert [name for name in copied.state_dict() if name.endswith("gather")] == ["0.gather"]
