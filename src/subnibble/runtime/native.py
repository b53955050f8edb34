"""Products of packed weights by the C++ kernels (`kernels/`): where they run, and why not elsewhere.

Kernels multiply whole numbers. A weight is repacked once into tiles, in the order in which the processor multiplies it;
tokens are rounded once for all linears that read them. Inputs of a scheme are those of `activations.quantize`, and
products are those of `integer.multiply_add_`, both bit for bit. Inputs without a scheme are rounded to fixed point in
groups of `FIXED_GROUP` channels: 24 bits of float32 inputs, 16 bits of bfloat16 and float16 ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.weak import WeakTensorKeyDictionary

from subnibble.kernels import native
from subnibble.runtime import site_input
from subnibble.runtime.precision import as_written
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.linear import PackedWeight, SiteInput
from subnibble.tensor.packed import PackedLayout, PackedRange, PackedTensor
from subnibble.tensor.scheme import Scheme

# Channels that share a scale where inputs have no scheme.
FIXED_GROUP = 128
# Bytes of a fixed-point number.
_FIXED_BYTES = {torch.float32: 3, torch.bfloat16: 2, torch.float16: 2}
# As in cpp/matrix.h and cpp/tiles.h.
_GRIDS = {"uniform": 0, "sign": 1, "mxfp4": 2}
_NUMBERS = {"float16": 0, "bfloat16": 1, "float32": 2, "e8m0": 3}
_SYMMETRIC, _ASYMMETRIC, _MXFP4, _FIXED = range(4)
_TYPES = {torch.bfloat16: 1, torch.float32: 2}
# Of tokens, and of codes.
_RUNS = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
# Sums of more products of 8 bits with 8 bits may not fit 32 bits.
_MOST_COLUMNS = 2**31 // 255**2


@dataclass(frozen=True)
class Choice:
    """What multiplies a packed matrix. kernel: an instruction set, or "torch". reason: why, in a few words."""

    kernel: str
    reason: str


def choice(device: str = "cpu", columns: int = 0) -> Choice:
    """What multiplies a packed matrix in eager mode, without gradients.

    device: type of the device that holds it.
    columns: its number of input columns.
    """
    if reason := native.why_missing():
        return Choice(native.TORCH, reason)
    if native.isa() == native.TORCH:
        return Choice(native.TORCH, "chosen")
    if device != "cpu":
        return Choice(native.TORCH, f"kernels run on the CPU, not on {device}")
    if columns > _MOST_COLUMNS:
        return Choice(native.TORCH, f"sums over more than {_MOST_COLUMNS} columns may not fit 32 bits")
    if native.isa() != native.default():
        return Choice(native.isa(), "chosen")
    fastest = native.instruction_sets()[0]
    if native.isa() != fastest:
        return Choice(native.isa(), f"{fastest} is not verified")
    return Choice(native.isa(), "fastest of this processor")


def runs(x: Tensor) -> bool:
    """Whether kernels run for an operation on x: tokens, or a matrix's codes."""
    if native.isa() == native.TORCH:
        if not torch.compiler.is_compiling():
            native.say_if_missing()
        return False
    return x.is_cpu and x.dtype in _RUNS and type(x) in (Tensor, torch.nn.Parameter)


def settings() -> tuple[str, torch.dtype | None]:
    """What a prepared input depends on beside the tensor: the instruction set, and autocast's dtype if it is on."""
    return native.isa(), torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def takes(x: Tensor) -> bool:
    """Whether kernels multiply the tokens x (..., k): kernels run, and no derivative goes through x."""
    differentiates = (x.requires_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0
    return runs(x) and not differentiates and x.shape[-1] <= _MOST_COLUMNS


class NativeInput(NamedTuple):
    """Tokens after all steps of a `SiteInput`, as the kernels multiply them.

    tokens: (t, k) before they are rounded; under torch.compile they are rounded by each linear.
    scheme: how they are rounded, None for fixed point.
    requantized: number of first channels whose error is rounded again.
    dtype: of the product.
    rounded, rest: C++ objects: the tokens as whole numbers; the error of the first channels, rounded again, or None.
    """

    tokens: Tensor
    scheme: ActivationScheme | None
    requantized: int
    dtype: torch.dtype
    rounded: Any = None
    rest: Any = None

    @property
    def fixed_bytes(self) -> int:
        """Bytes of a fixed-point number, for inputs without a scheme."""
        return _FIXED_BYTES[self.tokens.dtype]


def prepare(x: Tensor, site: SiteInput) -> NativeInput:
    """Apply a site's steps to x (..., k), the last one by a kernel."""
    dtype, tokens = x.dtype, site_input.enter(x, site)
    if tokens.ndim != 2:
        tokens = tokens.reshape(-1, x.shape[-1])
    if site.activation is None and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        tokens = tokens.to(dtype)
    if torch.compiler.is_compiling():
        return NativeInput(tokens, site.activation, site.requantized, dtype)
    dense, fixed_bytes, rest = _readable(tokens), _FIXED_BYTES[tokens.dtype], None
    whole = rounded(dense, site.activation, fixed_bytes)
    if site.requantized and site.activation is not None:
        how = rounding(native.isa(), site.activation, fixed_bytes)
        rest = how.rest(whole, dense.data_ptr(), _TYPES[dense.dtype], dense.stride(0), site.requantized)
    return NativeInput(tokens, site.activation, site.requantized, dtype, whole, rest)


def product(x: NativeInput, weight: PackedWeight) -> Tensor:
    """Multiply prepared tokens (t, k) with all terms of a weight, bias included: (t, m) in x's dtype."""
    if torch.is_autocast_enabled("cpu"):
        with as_written(x.tokens.device):
            return _product(x, weight)
    return _product(x, weight)


def _product(x: NativeInput, weight: PackedWeight) -> Tensor:
    y = _traced(x, weight) if torch.compiler.is_compiling() else _eager(x, weight)
    if weight.bias is not None:
        y = y + weight.bias.float()
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _eager(x: NativeInput, weight: PackedWeight) -> Tensor:
    y = torch.empty(x.tokens.shape[0], weight.main.ranges[0].codes.shape[0], dtype=torch.float32)
    multiply_(y, x.rounded, weight.main)
    if weight.salient is not None:
        multiply_(y, x.rounded, weight.salient, add=True)
        if x.rest is not None:
            multiply_(y, x.rest, weight.salient, add=True)
    if weight.low_rank is not None:
        down, up = weight.low_rank
        inner = torch.empty(x.tokens.shape[0], down.shape[0], dtype=torch.float32)
        multiply_(inner, x.rounded, down)
        # There are no outlier channels between the low-rank factors.
        scheme = None if x.scheme is None else x.scheme.without_outliers
        multiply_(y, rounded(inner, scheme, x.fixed_bytes), up, add=True)
    return y


def rounded(tokens: Tensor, scheme: ActivationScheme | None, fixed_bytes: int = 3) -> Any:
    """Round tokens (t, k), by a scheme or to fixed point: a C++ object."""
    dense = _readable(tokens)
    how = rounding(native.isa(), scheme, fixed_bytes)
    return how.round(dense.data_ptr(), _TYPES[dense.dtype], *dense.shape, dense.stride(0))


def multiply_(y: Tensor, x: Any, weight: PackedTensor, add: bool = False) -> None:
    """Write x wᵀ to y, or add it.

    y: (t, m) float32, rows contiguous.
    x: rounded tokens (t, k'); of more columns than the weight has, the first ones count.
    weight: (m, k).
    """
    start, address, stride = 0, y.data_ptr(), y.stride(0)
    for part in weight.ranges:
        repacked(part).multiply(x, start, address, stride, add)
        start, add = start + part.num_columns, True


def _readable(tokens: Tensor) -> Tensor:
    """Tokens in a dtype that kernels read, channels side by side."""
    dense = tokens if tokens.dtype in _TYPES else tokens.float()
    return dense if dense.stride(1) == 1 or dense.shape[1] == 1 else dense.contiguous()


@cache
def rounding(isa: str, scheme: ActivationScheme | None, fixed_bytes: int) -> Any:
    """How kernels of an instruction set round tokens."""
    if scheme is None:
        return native.module.Scheme(isa, _FIXED, 0, 1.0, FIXED_GROUP, 0, fixed_bytes)
    symmetric = scheme.zero_point == "none"
    kind = _MXFP4 if scheme.grid == "mxfp4" else _SYMMETRIC if symmetric else _ASYMMETRIC
    last = 2 ** (scheme.bits - 1) - 1 if symmetric else 2**scheme.bits - 1
    group = 2**62 if scheme.group_size == -1 else scheme.group_size
    # Numbers of an asymmetric scheme of 8 bits are -255 .. 255.
    planes = 2 if last > 127 else 1
    return native.module.Scheme(isa, kind, last, scheme.clip, group, scheme.outliers, planes)


# Codes of a range -> (state of its tensors, the range in tiles): for ranges that live only for one call.
_tiles: Any = WeakTensorKeyDictionary()


def repacked(part: PackedRange) -> Any:
    """The range in tiles: repacked at its first product, and again after its tensors were written to."""
    state = (native.isa(), _state(part.codes), _state(part.scales), _state(part.zeros))
    known = part.derived.get("tiles") or _tiles.get(part.codes)
    if known is None or known[0] != state:
        known = state, _on(part, native.module.Weight)
        _tiles[part.codes] = known
    part.derived["tiles"] = known
    return known[1]


def _state(tensor: Tensor | None) -> tuple[int, int] | None:
    """Where a tensor's data is, and how often it was written to (0 for an inference tensor, which does not count)."""
    return None if tensor is None else (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)


def dequantize(weight: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dense (m, k) in `dtype`, bit for bit that of `PackedTensor.dequantize`."""
    out = torch.empty(weight.shape, dtype=torch.float32)
    start = 0
    for part in weight.ranges:
        columns = out[:, start:]
        _on(part, native.module.dequantize, 0, out.shape[0], columns.data_ptr(), _TYPES[out.dtype], out.stride(0))
        start += part.num_columns
    return out.to(dtype)


def _on(part: PackedRange, function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function of a range's form and addresses. Addresses are taken at each call: tensors may move in place."""
    # Contiguous copies of what is not live until the call is over.
    codes, scales = part.codes.contiguous(), part.scales.contiguous()
    zeros = None if part.zeros is None else part.zeros.contiguous()
    matrix_form = form(native.isa(), part.scheme, codes.shape[0], part.num_columns)
    addresses = (codes.data_ptr(), scales.data_ptr(), 0 if zeros is None else zeros.data_ptr())
    return function(matrix_form, *addresses, *arguments)


@cache
def form(isa: str, scheme: Scheme, rows: int, columns: int) -> object:
    """A matrix's form as the kernels take it: the same for all matrices of one shape and scheme."""
    whole = scheme.group_size == -1 or scheme.group_size > columns
    return native.module.Form(
        isa,
        rows,
        columns,
        max(1, columns) if whole else scheme.group_size,
        scheme.bits,
        _GRIDS[scheme.grid],
        _NUMBERS[scheme.scale_type],
        scheme.zero_point == "integer",
    )


def _traced(x: NativeInput, weight: PackedWeight) -> Tensor:
    """`_eager` as one operation that torch.compile does not look into."""
    down, up = weight.low_rank or (None, None)
    matrices = {"main": weight.main, "salient": weight.salient, "down": down, "up": up}
    tensors, layouts = [], []
    for name, matrix in matrices.items():
        if matrix is not None:
            state = matrix.state()
            tensors += list(state.values())
            ranges = [f"{columns},{_text(scheme)}" for columns, scheme in matrix.layout.ranges]
            layouts.append(" ".join([name, str(matrix.layout.rows), ",".join(state), *ranges]))
    rows = weight.main.shape[0]
    y: Tensor = _compiled_product(x.tokens, tensors, ";".join(layouts), _text(x.scheme), x.requantized, rows)
    return y


def _text(scheme: Scheme | ActivationScheme | None) -> str:
    """A scheme as text, in operations that torch.compile can trace; "" for None."""
    if scheme is None:
        return ""
    if isinstance(scheme, Scheme):
        return f"{scheme.bits},{scheme.group_size},{scheme.zero_point},{scheme.scale_type},{scheme.grid}"
    fields = f"{scheme.bits},{scheme.group_size},{scheme.zero_point},{scheme.grid}"
    return f"{fields},{scheme.clip},{scheme.outliers}"


@cache
def _layout(text: str) -> PackedLayout:
    """The layout that `_traced` wrote as "name rows names-of-tensors columns,scheme columns,scheme ..."."""
    _, rows, _, *ranges = text.split()
    parts = [part.split(",") for part in ranges]
    schemes = [Scheme(int(bits), int(group), zero, scale, grid) for _, bits, group, zero, scale, grid in parts]
    return PackedLayout(int(rows), tuple(zip((int(part[0]) for part in parts), schemes, strict=True)))


@cache
def _activation(text: str) -> ActivationScheme | None:
    if not text:
        return None
    bits, group, zero, grid, clip, outliers = text.split(",")
    return ActivationScheme(int(bits), int(group), zero, grid, float(clip), int(outliers))


@torch.library.custom_op("subnibble::packed_product", mutates_args=())
def _compiled_product(
    tokens: Tensor, tensors: list[Tensor], layouts: str, activation: str, requantized: int, rows: int
) -> Tensor:
    """Multiply tokens (t, k) with a weight's terms, bias excluded: (t, rows) float32.

    tensors: stored tensors of all matrices, in order. layouts: names and layouts of the matrices, see `_layout`, with
        ";" between them.
    activation: the `ActivationScheme` as `_text` writes it, "" for none.
    """
    matrices: dict[str, PackedTensor] = {}
    rest = iter(tensors)
    for text in layouts.split(";"):
        name, _, stored, *_ = text.split()
        matrices[name] = PackedTensor.from_state({key: next(rest) for key in stored.split(",")}, _layout(text))
    low_rank = (matrices["down"], matrices["up"]) if "down" in matrices else None
    weight = PackedWeight(matrices["main"], None, matrices.get("salient"), low_rank)
    return _eager(prepare(tokens, SiteInput(activation=_activation(activation), requantized=requantized)), weight)


@_compiled_product.register_fake
def _(tokens: Tensor, tensors: list[Tensor], layouts: str, activation: str, requantized: int, rows: int) -> Tensor:
    return tokens.new_empty((tokens.shape[0], rows), dtype=torch.float32)
