"""A `Linear` of all its fields side by side, for tests that name some of them."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from subnibble.tensor.linear import Linear, PackedWeight, SiteInput
from subnibble.tensor.packed import PackedTensor

_OF_INPUT = {field.name for field in fields(SiteInput)}


def built(main: PackedTensor, bias: Tensor | None = None, column_scale: Tensor | None = None, **named: Any) -> Linear:
    """A linear of a main matrix and fields of its weight and input."""
    return changed(Linear(PackedWeight(main, bias), SiteInput(column_scale)), **named)


def changed(linear: Linear, **named: Any) -> Linear:
    """The same with other fields of its weight and input."""
    site = {name: named.pop(name) for name in _OF_INPUT & named.keys()}
    return Linear(replace(linear.weight, **named), replace(linear.input, **site))
