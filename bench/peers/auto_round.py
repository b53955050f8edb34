"""auto-round's kernels (auto-round-lib, Intel's BesTLA): 2, 3, 4 and 8 bits a weight.

Processors without AMX get float32 products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peers.product import Calls, Method, Missing, Tolerance, Weight, symmetric

BITS = (2, 3, 4, 8)


def methods() -> list[Method]:
    try:
        import auto_round_kernel as ark
    except ImportError as error:
        raise Missing(f"{error}: pip install --no-deps auto-round-lib") from None
    if ark.cpu_lib is None:
        raise Missing("auto-round-lib has no library for this processor")
    return [Method(f"auto-round w{bits}", bits, _maker(bits)) for bits in BITS]


def _maker(bits: int) -> Callable[[Tensor, Callable[[float], int]], Weight]:
    def make(weight: Tensor, copies: Callable[[float], int]) -> Weight:
        import auto_round_kernel as ark

        codes = symmetric(weight, bits)
        rows, columns = weight.shape
        settings = (codes.group, "int8", f"int{bits}", "fp32", False)
        zeros = torch.zeros(columns // codes.group, rows, dtype=torch.int8)
        blob = ark.repack_quantized_weight(codes.codes.T.contiguous(), codes.scales.T.contiguous(), zeros, *settings)
        read = bits + 32 / codes.group
        ones: list[object] = [blob.clone() for _ in range(copies(read))]
        none = torch.empty(0)

        def product(x: Tensor, one: Tensor) -> Tensor:
            y: Tensor = ark.woqgemm(x, one, none, rows, columns, *settings)
            return y

        return Calls(codes.dense(), read, Tolerance(block=codes.group), ones, product)

    return make
