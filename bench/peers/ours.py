"""Our own packed linears, as `runtime.ops.linear` multiplies them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from peers.product import Calls, Method, Tolerance, Weight

GROUP = 128
BITS = (2, 3, 4, 8)


def methods(isa: str | None = None) -> list[Method]:
    """Weights of groups of 128 (the last one ragged) with integer zero-points, inputs in float32.

    isa: the instruction set, if not the fastest one; its name becomes part of the methods' names.
    """
    suffix = "" if isa is None else f" {isa}"
    return [Method(f"subnibble w{bits}{suffix}", bits, _maker(bits, isa)) for bits in BITS]


def _maker(bits: int, isa: str | None) -> Callable[[Tensor, Callable[[float], int]], Weight]:
    def make(weight: Tensor, copies: Callable[[float], int]) -> Weight:
        from subnibble.kernels import native
        from subnibble.rounding.grid import Clip, quantized
        from subnibble.runtime import ops
        from subnibble.tensor.linear import Linear, PackedWeight
        from subnibble.tensor.packed import PackedRange, PackedTensor
        from subnibble.tensor.scheme import Scheme

        scheme = Scheme(bits, GROUP)
        packed = PackedTensor((PackedRange.pack(quantized(weight, scheme, Clip("minmax")), scheme),))
        read = sum(8 * tensor.nbytes for tensor in packed.state().values()) / weight.numel()

        def copied() -> PackedTensor:
            state = {name: tensor.clone() for name, tensor in packed.state().items()}
            return PackedTensor.from_state(state, packed.layout)

        def product(x: Tensor, linear: Linear) -> Tensor:
            if isa is None:
                return ops.linear(x, linear)
            with native.chosen(isa):
                return ops.linear(x, linear)

        ones: list[object] = [Linear(PackedWeight(copied())) for _ in range(copies(read))]
        return Calls(packed.dequantize(), read, Tolerance(), ones, product)

    return make
