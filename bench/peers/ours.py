"""Our own packed linears, as `runtime.ops.linear` multiplies them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from peers.product import Calls, Method, Tolerance, Weight

if TYPE_CHECKING:
    from subnibble.tensor.activation_scheme import ActivationScheme

GROUP = 128
BITS = (2, 3, 4, 8)
# Bits of inputs that are not quantized.
WHOLE = 16


def methods(inputs: int = WHOLE, isa: str | None = None) -> list[Method]:
    """Weights of groups of 128 (the last one ragged) with integer zero-points.

    inputs: bits of an input, in the same groups; 16 for float32.
    isa: the instruction set, if not the fastest one; its name becomes part of the methods' names.
    """
    end = ("" if inputs == WHOLE else f"a{inputs}") + ("" if isa is None else f" {isa}")
    return [Method(f"subnibble w{bits}{end}", bits, _maker(bits, inputs, isa)) for bits in BITS]


@dataclass
class _Linears(Calls):
    """Linears whose inputs are quantized: their product is that of the dequantized tokens."""

    activation: ActivationScheme | None = None

    def inputs(self, x: Tensor) -> Tensor:
        """Quantize and dequantize tokens, as the reference does."""
        from subnibble.runtime.activations import quantize_values

        return x if self.activation is None else quantize_values(x, self.activation)


def _maker(bits: int, inputs: int, isa: str | None) -> Callable[[Tensor, Callable[[float], int]], Weight]:
    def make(weight: Tensor, copies: Callable[[float], int]) -> Weight:
        from subnibble.kernels import native
        from subnibble.rounding.grid import Clip, quantized
        from subnibble.runtime import ops
        from subnibble.tensor.activation_scheme import ActivationScheme
        from subnibble.tensor.linear import Linear, PackedWeight, SiteInput
        from subnibble.tensor.packed import PackedRange, PackedTensor
        from subnibble.tensor.scheme import Scheme

        scheme = Scheme(bits, GROUP)
        packed = PackedTensor((PackedRange.pack(quantized(weight, scheme, Clip("minmax")), scheme),))
        read = sum(8 * tensor.nbytes for tensor in packed.state().values()) / weight.numel()
        activation = None if inputs == WHOLE else ActivationScheme(inputs, GROUP)

        def copied() -> Linear:
            state = {name: tensor.clone() for name, tensor in packed.state().items()}
            return Linear(PackedWeight(PackedTensor.from_state(state, packed.layout)), SiteInput(activation=activation))

        def product(x: Tensor, linear: Linear) -> Tensor:
            if isa is None:
                return ops.linear(x, linear)
            with native.chosen(isa):
                return ops.linear(x, linear)

        ones: list[object] = [copied() for _ in range(copies(read))]
        return _Linears(packed.dequantize(), read, Tolerance(), ones, product, activation=activation)

    return make
