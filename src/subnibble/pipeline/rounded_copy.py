"""A copy of a block that gets the rounded weights, quantized inputs and norm biases, site after site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from subnibble.model.skeleton import Block
from subnibble.model.transformers_api.names import never_called
from subnibble.pipeline.input_hook import InputHook
from subnibble.pipeline.observe import Quantization, View, quantized_input
from subnibble.runtime.modules import add_output_bias_, never_ran
from subnibble.transforms.input_basis import InputBasis


@dataclass(frozen=True)
class RoundedCopy:
    """A block in the compute type, whose linears are replaced by rounded ones.

    block: the copy.
    bases: name of a site -> channel order and Hadamard transform of its readers' input.
    hooks: hooks on `block` that quantize inputs.
    """

    block: Block
    bases: Mapping[str, InputBasis]
    hooks: list[InputHook] = field(default_factory=list)

    def put(self, name: str, dense: Tensor, view: View) -> None:
        """Replace the weight of a linear by its rounded one.

        name: name of the linear in the block.
        dense: (m, k), the dequantized weight.
        view: how its input is quantized from now on, or None.
        """
        weight = self.block.linear(name).weight
        weight.data = dense.to(weight.dtype)
        if view is not None:
            self.hooks.append(self._hook(name, view))

    def add_bias(self, norm: str, bias: Tensor) -> None:
        """Add a bias (channels,) to the output of a norm. norm: name of the norm in the block."""
        add_output_bias_(self.block.module.get_submodule(norm), bias.to(self.block.gain(norm).dtype))

    @contextmanager
    def quantizing(self, inputs: Mapping[str, Quantization]) -> Iterator[None]:
        """Quantize the inputs of these linears inside the `with` block."""
        hooks = [self._hook(name, view) for name, view in inputs.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.handle.remove()

    def check_ran(self) -> None:
        """Raise `SilentFailure` if a hook or a norm's bias never ran."""
        idle = [hook.path for hook in self.hooks if not hook.runs]
        idle += [f"the bias of {self.block.path}.{path}" for path in never_ran(self.block.module)]
        if idle:
            raise never_called(idle[0])

    def _hook(self, name: str, view: Quantization) -> InputHook:
        basis = self.bases[self.block.arch.site_of(name).name]
        quantize = partial(quantized_input, view=view, basis=basis)
        return InputHook(f"the quantized input of {self.block.path}.{name}", self.block.linear(name), quantize)
