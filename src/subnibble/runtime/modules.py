"""Modules of a running packed model: they hold tensors in their stored form, and their forward calls `ops`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor, nn

from subnibble.errors import NoWeight
from subnibble.runtime import native, ops
from subnibble.runtime.cached_handle import CachedHandle
from subnibble.runtime.native import NativeInput
from subnibble.runtime.offloaded import has_hook, resident
from subnibble.runtime.precision import as_written
from subnibble.runtime.site_input import PreparedInput
from subnibble.runtime.site_memo import SiteMemo, plain_inputs
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.linear import Linear, PackedWeight, SiteInput
from subnibble.tensor.packed import PackedLayout, PackedTensor

# Name of the submodule in which a head holds its `HeadInputMatrix`.
HEAD_INPUT = "mix"


class StoredModule(nn.Module):
    """A module whose buffers keep their stored dtype on `.to(dtype)`."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move between devices as any module does, but keep the dtype of buffers."""
        types = {name: buffer.dtype for name, buffer in self.named_buffers(recurse=False)}
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, dtype in types.items():
            after = getattr(self, name)
            if after.dtype != dtype:
                setattr(self, name, before[name].to(after.device))
        return self


class PrefixStates(StoredModule):
    """Keys and values of a prompt prefix in one attention.

    keys, values: (heads, tokens, width) float16 each.
    persistent: whether they are saved with the model.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("keys", keys, persistent)
        self.register_buffer("values", values, persistent)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Keys and values, loaded if accelerate offloaded them."""
        with resident(self):
            return self.keys, self.values

    def extra_repr(self) -> str:
        """Number of tokens, for printing."""
        return f"{self.keys.shape[1]} tokens"


class KeyCenter(StoredModule):
    """The mean that one attention subtracts from keys before its cache quantizes them.

    mean: (heads, width) float16.
    rope, key_rotation: settings of the `CacheScheme` for which the mean was computed.
    """

    mean: Tensor

    def __init__(self, mean: Tensor, rope: str, key_rotation: str) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.rope, self.key_rotation = rope, key_rotation

    def held(self) -> Tensor:
        """The mean, loaded if accelerate offloaded it."""
        with resident(self):
            return self.mean

    def extra_repr(self) -> str:
        """Shape and kind, for printing."""
        return f"{tuple(self.mean.shape)}, rope={self.rope}, key_rotation={self.key_rotation}"


class HeadInputMatrix(StoredModule):
    """A block-diagonal matrix M (d, d) that multiplies a head's input before the head's own table multiplies it.

    matrix: (d, widest block) float32; row i is row i of M, cut to the columns of its block and padded with zeros.
    widths: widths of the blocks.
    """

    matrix: Tensor
    ran = False

    def __init__(self, matrix: Tensor, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.widths = widths

    def forward(self, x: Tensor) -> Tensor:
        """Compute x M for x (..., d), in float32 or better and rounded to x's dtype once."""
        _ran_(self)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rows = self.matrix.to(wide.dtype).split(self.widths)
        pairs = zip(wide.split(self.widths, -1), rows, strict=True)
        with as_written(x.device):
            return torch.cat([channels @ block[:, : block.shape[0]] for channels, block in pairs], -1).to(x.dtype)

    def extra_repr(self) -> str:
        """Number and largest width of blocks, for printing."""
        return f"{len(self.widths)} blocks of up to {max(self.widths)}"


class PackedModule(StoredModule):
    """Holds one packed matrix as buffers, under the names of the checkpoint format."""

    def __init__(self, weight: PackedTensor) -> None:
        super().__init__()
        self._packed: CachedHandle[PackedTensor] = CachedHandle()
        self.layout: PackedLayout = weight.layout
        for name, tensor in weight.state().items():
            self.register_buffer(name, tensor)

    def __getattr__(self, name: str) -> Any:
        """Look up as any module does, except that `weight` raises `NoWeight`, which says what replaced it."""
        if name == "weight":
            raise _no_weight(self)
        return super().__getattr__(name)

    def dequantize(self) -> Tensor:
        """The dense matrix, float32."""
        return self.packed.dequantize()

    @property
    def packed(self) -> PackedTensor:
        """The packed matrix; shares this module's buffers."""
        if has_hook(self):
            # No cached handle: it would keep offloaded tensors in memory.
            with resident(self):
                return self._from_buffers()
        return self._packed.of(tuple(self._buffers.values()), self._from_buffers)

    def _from_buffers(self) -> PackedTensor:
        return PackedTensor.from_state(dict(self.named_buffers(recurse=False)), self.layout)

    def extra_repr(self) -> str:
        """Shape and schemes, for printing."""
        schemes = "+".join(scheme.name for _, scheme in self.layout.ranges)
        return f"{self.layout.num_columns} -> {self.layout.rows}, {schemes}"


class PackedLinear(PackedModule):
    """A running `Linear`: its matrices are submodules, its vectors are buffers named after their fields."""

    def __init__(self, linear: Linear) -> None:
        super().__init__(linear.weight.main)
        self._linear: CachedHandle[Linear] = CachedHandle()
        self._memo: SiteMemo[PreparedInput | NativeInput] = SiteMemo()
        # Another linear, if it stores the input's steps for this one. In a tuple, so that it is not registered, saved
        # and counted twice.
        self._input: tuple[PackedLinear, ...] = ()
        self.in_features, self.out_features = self.layout.num_columns, self.layout.rows
        site, bias = linear.input, linear.weight.bias
        self.blocks, self.activation, self.requantized = site.blocks, site.activation, site.requantized
        self.column_scale: Tensor | None
        self.gather: Tensor | None
        self.bias: nn.Parameter | None
        self.register_buffer("column_scale", site.column_scale)
        self.register_buffer("gather", site.gather)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        matrices = (linear.weight.salient, *(linear.weight.low_rank or (None, None)))
        self.salient, self.down, self.up = (None if matrix is None else PackedModule(matrix) for matrix in matrices)

    @property
    def linear(self) -> Linear:
        """The module as a `Linear` that shares its buffers."""
        source = self.input
        if has_hook(self) or has_hook(source):
            with resident(self), resident(source):
                return self._build_linear()
        children = (child._buffers.values() for child in self._modules.values() if child is not None)
        tensors = (*self._buffers.values(), *self._parameters.values(), *chain.from_iterable(children))
        vectors = (source._buffers["column_scale"], source._buffers["gather"])
        parts = (*tensors, *vectors, source.blocks, source.activation, source.requantized)
        return self._linear.of(parts, self._build_linear)

    @property
    def input(self) -> PackedLinear:
        """The linear that stores the input's steps: another reader of the same tensor, or this one."""
        return self._input[0] if self._input else self

    def enter_as_(self, other: PackedLinear) -> None:
        """Share the input's steps, and their result, with `other`, which stores them for both."""
        self._input = (other,)
        other._memo.readers += 1

    @property
    def kernel(self) -> native.Choice:
        """What multiplies this linear in eager mode, and why: a kernel of the C++ module, or torch."""
        return native.choice(self.get_buffer("codes").device.type, self.in_features)

    def _build_linear(self) -> Linear:
        source = self.input
        low_rank = None if self.down is None or self.up is None else (self.down.packed, self.up.packed)
        salient = None if self.salient is None else self.salient.packed
        site = SiteInput(source.column_scale, source.gather, source.blocks, source.activation, source.requantized)
        return Linear(PackedWeight(self.packed, self.bias, salient, low_rank), site)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the linear: x (..., k) to (..., m)."""
        linear = self.linear
        site = linear.input
        memo = plain_inputs() if site.is_plain else self.input._memo
        return ops.product(x, memo.of(x, native.settings(), lambda: ops.prepare(x, site)), linear)

    def dequantize(self) -> Tensor:
        """Dense weight (m, k) float32 for the untransformed input, all terms included."""
        return ops.dense_from_input(self.linear)

    def extra_repr(self) -> str:
        """Shape, schemes and the input's steps, for printing."""
        steps = [self.activation.name] if self.activation is not None else []
        steps += ["gather"] if self.gather is not None else []
        steps += ["hadamard"] if self.blocks else []
        return ", ".join([super().extra_repr(), *steps])


class PackedEmbedding(PackedModule):
    """A packed embedding table (n, d); its rows are returned in `dtype`."""

    def __init__(self, weight: PackedTensor, dtype: torch.dtype) -> None:
        super().__init__(weight)
        self.num_embeddings, self.embedding_dim = self.layout.rows, self.layout.num_columns
        self.dtype = dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move as `PackedModule` does; after `.to(dtype)`, rows are returned in the new dtype."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.get_buffer("codes").device)).dtype
        return super()._apply(fn, recurse)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up rows: ids (integer, any shape) to (*ids.shape, d)."""
        return ops.embedding(ids, self.packed, self.dtype)


class TiedHead(nn.Module):
    """Output projection that reads the embedding's packed table and stores no tensor itself."""

    ran = False

    def __init__(self, embedding: PackedEmbedding) -> None:
        super().__init__()
        # In a tuple, so that the table is not registered, saved and counted twice.
        self._embedding = (embedding,)
        self.in_features, self.out_features = embedding.layout.num_columns, embedding.layout.rows
        self.activation: ActivationScheme | None = None

    @property
    def embedding(self) -> PackedEmbedding:
        """The embedding whose table the head reads."""
        return self._embedding[0]

    def __getattr__(self, name: str) -> Any:
        """Look up as `PackedModule` does: `weight` raises `NoWeight`."""
        if name == "weight":
            raise _no_weight(self._embedding[0])
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits: x (..., d) to (..., n)."""
        _ran_(self)
        site = SiteInput(activation=self.activation)
        return ops.linear(x, Linear(PackedWeight(self._embedding[0].packed), site))


def _no_weight(module: PackedModule) -> NoWeight:
    kind = type(module).__name__
    return NoWeight(
        f"this {kind} holds codes ({module.extra_repr()}) and no `weight`; call `dequantize()` for the dense matrix"
    )


def add_output_bias_(module: nn.Module, bias: Tensor) -> None:
    """Add a bias (d,) to the output of a norm that has none; stored as `<norm>.bias`."""
    module.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
    module.ran = False  # type: ignore[assignment]
    # A copied or pickled module has a handle of its own hook.
    module.bias_hook = module.register_forward_hook(_add_bias)  # type: ignore[assignment]


def add_head_input_(head: nn.Module, matrix: HeadInputMatrix) -> None:
    """Multiply a head's input by `matrix` before the head reads it; stored as the head's submodule `HEAD_INPUT`."""
    head.add_module(HEAD_INPUT, matrix)
    head.register_forward_pre_hook(_transform_head_input, with_kwargs=True)


def _transform_head_input(
    module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    matrix = module.get_submodule(HEAD_INPUT)
    if args:
        return (matrix(args[0]), *args[1:]), named
    name, x = next(iter(named.items()))
    return args, {**named, name: matrix(x)}


def remove_output_bias_(module: nn.Module) -> None:
    """Undo `add_output_bias_`."""
    hook: Any = module.bias_hook
    hook.remove()
    del module.bias, module.ran, module.bias_hook


def _add_bias(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    _ran_(module)
    with resident(module):
        bias = module.bias
    assert isinstance(bias, Tensor)
    return output + bias


def _ran_(module: Any) -> None:
    """Record that a forward pass has used a module, or the bias or matrix that was added to it."""
    # Written once: torch.compile would see a state change in each call.
    if not module.ran:
        module.ran = True


def never_ran(module: nn.Module) -> list[str]:
    """Paths of the modules that subnibble added to a model or extended, and that no forward pass has used yet."""
    return [path for path, child in module.named_modules() if getattr(child, "ran", True) is False]


def packed_modules(model: nn.Module) -> dict[str, PackedModule]:
    """All packed modules of a loaded model, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, PackedModule)}
