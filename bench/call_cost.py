"""Time the overhead of one call of a packed linear, on one token and one thread.

    python bench/call_cost.py

The overhead is the time of a call less that of its product (`ops.linear`). Each figure is the minimum of many rounds.
Every round times the call, the product and a dense product in turn, so that other programs slow down all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from measure import print_table

if TYPE_CHECKING:
    from subnibble.runtime.modules import PackedLinear

SHAPES = ((192, 576), (4096, 4096))
# Rounds by number of rows: more for the smaller linear, whose calls are short.
ROUNDS = {192: 1000, 4096: 30}


def main() -> None:
    """Print the table of times as Markdown."""
    from subnibble.rounding.grid import Clip, quantized
    from subnibble.runtime.modules import PackedLinear
    from subnibble.tensor.activation_scheme import ActivationScheme
    from subnibble.tensor.linear import Linear, PackedWeight, SiteInput
    from subnibble.tensor.packed import PackedRange, PackedTensor
    from subnibble.tensor.scheme import Scheme

    torch.set_num_threads(1)
    scheme = Scheme(4, 128)
    columns = ("weight", "inputs", "call, us", "product, us", "overhead, us", "dense float32, us")
    cells = []
    for rows, width in SHAPES:
        matrix = quantized(torch.randn(rows, width), scheme, Clip("minmax"))
        weight = PackedTensor((PackedRange.pack(matrix, scheme),))
        for inputs, terms in {
            "16 bits": {},
            "4 bits": {"activation": ActivationScheme(4, 128)},
            "4 bits, gathered": {
                "activation": ActivationScheme(4, 128),
                "gather": torch.randperm(width).to(torch.int16),
                "column_scale": torch.ones(width, dtype=torch.float16),
            },
        }.items():
            call, product, plain = timed(PackedLinear(Linear(PackedWeight(weight), SiteInput(**terms))).eval())
            figures = [f"{1e6 * value:.0f}" for value in (call, product, call - product, plain)]
            cells.append([f"{rows} x {width}", inputs, *figures])
    print_table(columns, cells)


def timed(module: PackedLinear) -> list[float]:
    """Return seconds of one call of `module`, of its product alone, and of a dense float32 product of its shape."""
    from subnibble.runtime import ops

    x, packed, dense = torch.randn(1, module.in_features), module.linear, module.packed.dequantize()
    calls = (lambda: module(x), lambda: ops.linear(x, packed), lambda: torch.nn.functional.linear(x, dense))
    return least(ROUNDS[module.out_features], *calls)


def least(rounds: int, *calls: Callable[[], object]) -> list[float]:
    """Return the least seconds of each call over `rounds` rounds."""
    seconds = [float("inf")] * len(calls)
    with torch.inference_mode():
        for _ in range(rounds):
            for index, call in enumerate(calls):
                start = time.perf_counter()
                call()
                seconds[index] = min(seconds[index], time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
