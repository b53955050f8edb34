"""torch's own products: dense float32 and bfloat16, 4-bit weights in bfloat16, int8 by int8."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from peers.product import BFLOAT16, Calls, Method, Missing, Tolerance, Weight, group_of


def methods() -> list[Method]:
    return [
        Method("float32", 32, _float32),
        Method("bfloat16", 16, _bfloat16),
        Method("int4pack", 4, _int4pack),
        Method("_int_mm", 8, _int_mm),
    ]


def _float32(weight: Tensor, copies: Callable[[float], int]) -> Weight:
    ones: list[object] = [weight.clone() for _ in range(copies(32))]
    return Calls(weight, 32, Tolerance(), ones, torch.nn.functional.linear)


def _bfloat16(weight: Tensor, copies: Callable[[float], int]) -> Weight:
    short = weight.bfloat16()
    ones: list[object] = [short.clone() for _ in range(copies(16))]
    tolerance = Tolerance(inputs=BFLOAT16, output=BFLOAT16)
    return Calls(short.float(), 16, tolerance, ones, torch.nn.functional.linear, torch.Tensor.bfloat16)


def _int4pack(weight: Tensor, copies: Callable[[float], int]) -> Weight:
    """`_weight_int4pack_mm_for_cpu`: w = (code - 8) scale + zero, by group, in bfloat16."""
    rows, columns = weight.shape
    group = group_of(columns)
    if rows % 16:
        raise Missing(f"int4pack takes rows that 16 divides, not {rows}")
    parts = weight.view(rows, -1, group)
    low, high = parts.amin(-1), parts.amax(-1)
    scales = ((high - low) / 15).bfloat16().float()
    zeros = (low + 8 * scales).bfloat16().float()
    codes = ((parts - zeros[..., None]) / scales[..., None] + 8).round_().clamp_(0, 15)
    dense = ((codes - 8) * scales[..., None] + zeros[..., None]).view_as(weight)
    codes = codes.to(torch.int32).view(rows, columns)
    ranges = torch.stack((scales.T, zeros.T), -1).bfloat16().contiguous()
    bits = 4 + 32 / group
    ones: list[object] = [
        (torch._convert_weight_to_int4pack_for_cpu(codes, 1), ranges.clone()) for _ in range(copies(bits))
    ]

    def product(x: Tensor, one: tuple[Tensor, Tensor]) -> Tensor:
        return torch._weight_int4pack_mm_for_cpu(x, one[0], group, one[1])

    # The kernel rounds a dequantized weight to bfloat16, too, and its terms before they are summed.
    tolerance = Tolerance(weight=2 * BFLOAT16, inputs=BFLOAT16, output=BFLOAT16)
    return Calls(dense, bits, tolerance, ones, product, torch.Tensor.bfloat16)


class _IntegerProduct(Calls):
    """Weights in both orders of memory: which of them oneDNN multiplies faster depends on the number of tokens."""

    def inputs(self, x: Tensor) -> Tensor:
        return _whole(x)

    def bind(self, x: Tensor, copies: int) -> Callable[[], Tensor]:
        whole = super().bind(x, copies)
        by_rows = self.prepare(x)
        columns = [one.contiguous() for one in self.ones[:copies]]  # type: ignore[attr-defined]

        def run() -> Tensor:
            for one in columns:
                y = self.function(by_rows, one)
            return y

        seconds = []
        for trial in (whole, run):
            trial()
            start = time.perf_counter()
            trial()
            seconds.append(time.perf_counter() - start)
        return whole if seconds[0] < seconds[1] else run


def _int_mm(weight: Tensor, copies: Callable[[float], int]) -> Weight:
    """Inputs are whole numbers already, so this is the product alone, without scales and without rounding of inputs."""
    codes = (weight * (127 / weight.abs().max())).round().to(torch.int8)
    ones: list[object] = [codes.clone().T for _ in range(copies(8))]
    return _IntegerProduct(codes.float(), 8, Tolerance(), ones, torch._int_mm, lambda x: _whole(x).to(torch.int8))


def _whole(x: Tensor) -> Tensor:
    return (x * (127 / x.abs().max())).round()
