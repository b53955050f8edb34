"""What a call of a packed linear costs beside its product: one token, one thread.

    python bench/call_cost.py

Beside the product are the module's own steps, from the call to what `ops.linear` is given. Each figure is the least of
many rounds in which both are timed in turn, so that another program's work falls on both.
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
# More for the smaller one.
ROUNDS = {192: 1000, 4096: 30}


def main() -> None:
    from subnibble.rounding.grid import Clip, quantized
    from subnibble.runtime.modules import PackedLinear
    from subnibble.tensor.activation_scheme import ActivationScheme
    from subnibble.tensor.linear import Linear, PackedWeight, SiteInput
    from subnibble.tensor.packed import PackedRange, PackedTensor
    from subnibble.tensor.scheme import Scheme

    torch.set_num_threads(1)
    scheme = Scheme(4, 128)
    columns = ("weight", "inputs", "call, us", "product, us", "beside it, us", "dense float32, us")
    cells = []
    for rows, width in SHAPES:
        matrix = quantized(torch.randn(rows, width), scheme, Clip("minmax"))
        weight = PackedTensor((PackedRange.pack(matrix, scheme),))
        for name, more in {
            "16 bits": {},
            "4 bits": {"activation": ActivationScheme(4, 128)},
            "4 bits, gathered": {
                "activation": ActivationScheme(4, 128),
                "gather": torch.randperm(width).to(torch.int16),
                "column_scale": torch.ones(width, dtype=torch.float16),
            },
        }.items():
            call, product, plain = timed(PackedLinear(Linear(PackedWeight(weight), SiteInput(**more))).eval())
            figures = [f"{1e6 * value:.0f}" for value in (call, product, call - product, plain)]
            cells.append([f"{rows} x {width}", name, *figures])
    print_table(columns, cells)


def timed(module: PackedLinear) -> list[float]:
    """Seconds of a call, of its product alone and of a dense float32 product of its shape."""
    from subnibble.runtime import ops

    x, own, dense = torch.randn(1, module.in_features), module.linear, module.packed.dequantize()
    calls = (lambda: module(x), lambda: ops.linear(x, own), lambda: torch.nn.functional.linear(x, dense))
    return least(ROUNDS[module.out_features], *calls)


def least(rounds: int, *calls: Callable[[], object]) -> list[float]:
    """The least seconds of each call over many rounds."""
    found = [float("inf")] * len(calls)
    with torch.inference_mode():
        for _ in range(rounds):
            for index, call in enumerate(calls):
                start = time.perf_counter()
                call()
                found[index] = min(found[index], time.perf_counter() - start)
    return found


if __name__ == "__main__":
    main()
