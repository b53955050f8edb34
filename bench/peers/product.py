"""What every adapter makes: a weight that runs products, what it stands for, and how exact its products must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# The smallest normal differences of a type: half a unit in the last place at 1.
FLOAT32, BFLOAT16 = 2.0**-24, 2.0**-9


class Missing(Exception):
    """A peer cannot be used here; the message says why and what to do."""


@dataclass(frozen=True)
class Tolerance:
    """How a method rounds, from which the bound of its error follows (`checking.py`).

    block: number of inputs that share a scale where inputs are rounded to 8 bits; -1 for a whole token, None if they
        are not rounded.
    weight: relative rounding of a weight that is dequantized, 0 if exact.
    inputs: relative rounding of an input to a shorter type, 0 if exact.
    output: relative rounding of the result.
    """

    block: int | None = None
    weight: float = 0.0
    inputs: float = 0.0
    output: float = FLOAT32


class Weight(Protocol):
    """A weight (n, k) in a method's own form, as copies at different addresses."""

    dense: Tensor
    """(n, k) float32: what the codes stand for."""
    bits: float
    """Bits that are read for each weight, scales included."""
    tolerance: Tolerance
    copies: int

    def inputs(self, x: Tensor) -> Tensor:
        """Return the tokens (t, k) that `bind(x)` multiplies: x, unless the method takes other numbers."""
        ...

    def bind(self, x: Tensor, copies: int) -> Callable[[], Tensor]:
        """Return a function that multiplies tokens x (t, k) with each of the first `copies` copies, one after another.

        The function returns the last product (t, n). What a caller does once for all calls belongs before it.
        """
        ...


@dataclass(frozen=True)
class Method:
    """A way to multiply.

    name: as tables show it.
    bits: nominal bits of a weight, which groups methods that compete.
    make: makes a weight from a dense one (n, k) float32, with `copies(bits a weight)` copies. Raises `Missing` if the
        method does not take that shape.
    """

    name: str
    bits: int
    make: Callable[[Tensor, Callable[[float], int]], Weight]


@dataclass
class Calls:
    """A weight whose copies are multiplied by a Python function, call by call.

    function: gets what `prepare` made of the tokens, and one of `ones`; returns the product.
    prepare: what the caller has ready, for example tokens in another type.
    """

    dense: Tensor
    bits: float
    tolerance: Tolerance
    ones: list[object]
    function: Callable[..., Tensor]
    prepare: Callable[[Tensor], object] = lambda x: x

    @property
    def copies(self) -> int:
        """How many copies there are."""
        return len(self.ones)

    def inputs(self, x: Tensor) -> Tensor:
        """The tokens themselves."""
        return x

    def bind(self, x: Tensor, copies: int) -> Callable[[], Tensor]:
        """Call the function with each copy in turn."""
        ready, ones, function = self.prepare(x), self.ones[:copies], self.function

        def run() -> Tensor:
            for one in ones:
                y = function(ready, one)
            return y

        return run


def group_of(columns: int) -> int:
    """Inputs that share a scale: 128, or 64 or 32 where 128 does not divide the columns: peers take no ragged group."""
    for group in (128, 64, 32):
        if columns % group == 0:
            return group
    raise Missing(f"no group of 128, 64 or 32 divides {columns} columns")


@dataclass(frozen=True)
class Codes:
    """Symmetric codes of a weight.

    codes: (n, k) int8 from -2^(bits-1).
    scales: (n, groups) float32.
    group: columns that share a scale.
    """

    codes: Tensor
    scales: Tensor
    group: int

    def dense(self) -> Tensor:
        """(n, k) float32."""
        return self.codes.float() * self.scales.repeat_interleave(self.group, 1)


def symmetric(weight: Tensor, bits: int) -> Codes:
    """Round a weight (n, k) to the nearest codes, with the largest magnitude of a group at the last level."""
    group = group_of(weight.shape[1])
    parts = weight.view(weight.shape[0], -1, group)
    top = 2 ** (bits - 1)
    scales = parts.abs().amax(-1) / max(top - 1, 1)
    codes = (parts / scales[..., None]).round_().clamp_(-top, top - 1)
    return Codes(codes.to(torch.int8).view_as(weight), scales.contiguous(), group)
