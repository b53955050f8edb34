"""Linears and the steps on their inputs, as the C++ decoder step takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from subnibble.errors import UnsupportedModel
from subnibble.kernels import native as kernels
from subnibble.runtime import native
from subnibble.runtime.modules import PackedLinear
from subnibble.tensor import hadamard
from subnibble.tensor.linear import PackedWeight, SiteInput

# As `Number` in cpp/matrix.h.
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


class LinearParts:
    """Makes C++ objects of linears, and holds what their addresses point to.

    fixed_bytes: bytes of the fixed-point numbers of inputs without a scheme.
    held: tensors and repacked weights.
    used: ids of the modules that became parts.
    """

    def __init__(self, fixed_bytes: int) -> None:
        self._fixed_bytes = fixed_bytes
        self.held: list[object] = []
        self.used: set[int] = set()

    def site(self, steps: SiteInput, width: int) -> Any:
        """The steps on a tensor of `width` channels, without readers."""
        return kernels.module.Site(
            width,
            0 if steps.column_scale is None else self.address(steps.column_scale.float()),
            0 if steps.gather is None else self.address(steps.gather.long()),
            self.runs(steps.blocks),
            native.rounding(kernels.isa(), steps.activation, self._fixed_bytes),
            steps.requantized if steps.activation is not None else 0,
        )

    def terms(self, module: nn.Module, steps: SiteInput) -> Any:
        """A linear's terms: packed, or dense of an `nn.Linear`."""
        self.used.update(id(child) for child in module.modules())
        if isinstance(module, PackedLinear):
            return self.packed_terms(module.linear.weight, steps)
        if not isinstance(module, nn.Linear):
            raise UnsupportedModel(f"the native decoder step cannot run a {type(module).__name__}")
        terms = kernels.module.Terms(module.out_features)
        terms.dense(self.address(module.weight.detach()), DTYPES[module.weight.dtype])
        if module.bias is not None:
            terms.bias(self.address(module.bias.detach().float()))
        return terms

    def packed_terms(self, weight: PackedWeight, steps: SiteInput) -> Any:
        """A packed weight's terms. steps: on its input."""
        terms = kernels.module.Terms(weight.main.shape[0])
        down, up = weight.low_rank or (None, None)
        for add, matrix in (
            (terms.main, weight.main),
            (terms.salient, weight.salient),
            (terms.down, down),
            (terms.up, up),
        ):
            start = 0
            for part in () if matrix is None else matrix.ranges:
                repacked = native.repacked(part)
                self.held.append(repacked)
                add(repacked, start)
                start += part.num_columns
        # There are no outlier channels between the low-rank factors.
        inner = None if steps.activation is None else steps.activation.without_outliers
        terms.inner(native.rounding(kernels.isa(), inner, self._fixed_bytes))
        if weight.bias is not None:
            terms.bias(self.address(weight.bias.detach().float()))
        return terms

    def runs(self, blocks: tuple[int, ...]) -> list[tuple[int, int, list[tuple[int, int]]]]:
        """Adjacent blocks of one order: (order, count, [(order of a factor, its address)])."""
        result = []
        for order, count in hadamard.runs(blocks):
            factors = [(matrix.shape[0], self.address(matrix)) for matrix in hadamard.stage_matrices(order)]
            result.append((order, count, factors))
        return result

    def address(self, tensor: Tensor) -> int:
        """The address of a tensor, which is held from now on."""
        dense = tensor.contiguous()
        self.held.append(dense)
        return dense.data_ptr()
