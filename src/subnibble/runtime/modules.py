"""Modules of a running packed model: their parameters are packed codes, their forward calls `ops`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from subnibble.runtime import ops
from subnibble.tensor import PackedLayout, PackedTensor


class PackedModule(nn.Module):
    """Holds one packed matrix as buffers, under the names of the checkpoint format."""

    def __init__(self, weight: PackedTensor) -> None:
        super().__init__()
        self.layout: PackedLayout = weight.layout
        for name, tensor in weight.state().items():
            self.register_buffer(name, tensor)

    @property
    def packed(self) -> PackedTensor:
        """The packed matrix, sharing the buffers."""
        return PackedTensor.from_state(dict(self.named_buffers(recurse=False)), self.layout)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move between devices as any module does; codes and scales keep their stored type on `.to(dtype)`."""
        types = {name: buffer.dtype for name, buffer in self.named_buffers(recurse=False)}
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, dtype in types.items():
            after = getattr(self, name)
            if after.dtype != dtype:
                setattr(self, name, before[name].to(after.device))
        return self

    def extra_repr(self) -> str:
        """Shape and schemes, for printing."""
        schemes = "+".join(scheme.name for _, scheme in self.layout.ranges)
        return f"{self.layout.columns} -> {self.layout.rows}, {schemes}"


class PackedLinear(PackedModule):
    """`y = (x c) Wᵀ + b` with W packed (m, k). bias: (m,) or None. column_scale: c (k,) float16, or None for 1."""

    def __init__(self, weight: PackedTensor, bias: Tensor | None, column_scale: Tensor | None = None) -> None:
        super().__init__(weight)
        self.column_scale: Tensor | None
        self.register_buffer("column_scale", column_scale)
        self.in_features, self.out_features = self.layout.columns, self.layout.rows
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., k) to (..., m)."""
        return ops.linear(x, self.packed, self.bias, self.column_scale)

    def dequantize(self) -> Tensor:
        """The dense weight (m, k) float32 that inputs meet, column scales included."""
        weight = self.packed.dequantize()
        return weight if self.column_scale is None else weight * self.column_scale.float()


class PackedEmbedding(PackedModule):
    """Embedding table packed (n, d); rows come out in `dtype`."""

    def __init__(self, weight: PackedTensor, dtype: torch.dtype) -> None:
        super().__init__(weight)
        self.num_embeddings, self.embedding_dim = self.layout.rows, self.layout.columns
        self.dtype = dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As `PackedModule`; rows come out in the new type after `.to(dtype)`."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.get_buffer("codes").device)).dtype
        return super()._apply(fn, recurse)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: integer, any shape, to (*ids.shape, d)."""
        return ops.embedding(ids, self.packed, self.dtype)


class TiedHead(nn.Module):
    """Output projection that reads the embedding's packed table; it stores nothing of its own."""

    def __init__(self, embedding: PackedEmbedding) -> None:
        super().__init__()
        # In a tuple, so that the table is not registered, saved and counted twice.
        self._embedding = (embedding,)
        self.in_features, self.out_features = embedding.layout.columns, embedding.layout.rows

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d) to (..., n)."""
        return ops.linear(x, self._embedding[0].packed, None)


def add_output_bias_(module: nn.Module, bias: Tensor) -> None:
    """Give a norm (which has no bias) a bias (d,) that is added to its output; stored as `<norm>.bias`."""
    module.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
    module.register_forward_hook(_add_bias)


def remove_output_bias_(module: nn.Module) -> None:
    """Undo `add_output_bias_`."""
    for key, hook in list(module._forward_hooks.items()):
        if hook is _add_bias:
            del module._forward_hooks[key]
    del module.bias


def _add_bias(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    bias = module.bias
    assert isinstance(bias, Tensor)
    return output + bias
