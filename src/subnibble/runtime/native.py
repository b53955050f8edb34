"""Products of packed weights by the C++ kernels (`kernels/`): where they run, and why not elsewhere.

Few tokens are multiplied by the kernel, which decodes weights in registers; more than `FEW_TOKENS` by torch, with rows
that the kernel dequantizes part by part. Both read the checkpoint's own bytes. Weights are the reference's, bit for bit
(`PackedTensor.dequantize`); sums are float32 in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

from subnibble.kernels import native
from subnibble.runtime.precision import as_written
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.linear import PackedWeight
from subnibble.tensor.packed import PackedRange, PackedTensor
from subnibble.tensor.scheme import Scheme

# More tokens than this are multiplied by torch: measured in bench/kernels.py.
FEW_TOKENS = 24
# Floats of dense rows at once, so few that they are still in the processor's cache when they are multiplied.
_PANEL = 2**18
# As in cpp/matrix.h.
_GRIDS = {"uniform": 0, "sign": 1, "mxfp4": 2}
_NUMBERS = {"float16": 0, "bfloat16": 1, "float32": 2, "e8m0": 3}
_TYPES = {torch.bfloat16: 1, torch.float32: 2}
# Of tokens, and of codes.
_RUNS = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


@dataclass(frozen=True)
class Choice:
    """What multiplies a packed matrix. kernel: an instruction set, or "torch". reason: why, in a few words."""

    kernel: str
    reason: str


def choice(device: str = "cpu", activation: ActivationScheme | None = None) -> Choice:
    """What multiplies a packed matrix in eager mode, without gradients.

    device: type of the device that holds it.
    activation: how its inputs are quantized, None if they are not.
    """
    if reason := native.why_missing():
        return Choice(native.TORCH, reason)
    if native.isa() == native.TORCH:
        return Choice(native.TORCH, "chosen")
    if device != "cpu":
        return Choice(native.TORCH, f"kernels run on the CPU, not on {device}")
    if activation is not None:
        return Choice(native.TORCH, f"no kernel for inputs of {activation.name}")
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


def needs_gradient(x: Tensor, weight: PackedWeight) -> bool:
    """Whether autograd has to record a product: x or the bias learns, or derivatives are pushed forward."""
    learns = x.requires_grad or (weight.bias is not None and weight.bias.requires_grad)
    return (learns and torch.is_grad_enabled()) or forward_ad._current_level >= 0


def product(x: Tensor, weight: PackedWeight) -> Tensor:
    """Multiply tokens x (t, k) with all terms of a weight, bias included: (t, m) in x's dtype, or in autocast's.

    Records no gradient. Sums are float32 and rounded to the result's dtype once; of many bfloat16 or float16 tokens, as
    torch's product rounds.
    """
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
        with as_written(x.device):
            return product(x, weight)
    if torch.compiler.is_compiling():
        return _traced(x, weight)
    return _few(x, weight) if x.shape[0] <= FEW_TOKENS else _many(x, weight)


def _few(x: Tensor, weight: PackedWeight) -> Tensor:
    tokens = x if x.dtype in _TYPES else x.float()
    y = torch.empty(x.shape[0], weight.main.shape[0], dtype=torch.float32)
    multiply_(y, tokens, weight.main)
    if weight.salient is not None:
        multiply_(y, tokens, weight.salient, add=True)
    if weight.low_rank is not None:
        down, up = weight.low_rank
        inner = torch.empty(x.shape[0], down.shape[0], dtype=torch.float32)
        multiply_(inner, tokens, down)
        multiply_(y, inner, up, add=True)
    if weight.bias is not None:
        y += weight.bias
    return y.to(x.dtype)


def _many(x: Tensor, weight: PackedWeight) -> Tensor:
    rows, columns = weight.main.shape
    y = torch.empty(x.shape[0], rows, dtype=x.dtype)
    size = max(1, _PANEL // max(1, columns))
    for first in range(0, rows, size):
        last = min(rows, first + size)
        panel = dense_rows(weight, first, last).to(x.dtype).T
        if weight.bias is None:
            torch.mm(x, panel, out=y[:, first:last])
        else:
            torch.addmm(weight.bias[first:last].to(x.dtype), x, panel, out=y[:, first:last])
    if weight.low_rank is not None:
        down, up = weight.low_rank
        inner = torch.nn.functional.linear(x, dequantize(down, x.dtype))
        y += torch.nn.functional.linear(inner, dequantize(up, x.dtype))
    return y


def _traced(x: Tensor, weight: PackedWeight) -> Tensor:
    """`product` as operations that torch.compile does not look into, one for each range."""
    y = _traced_sum(x, weight.main)
    if weight.salient is not None:
        y = y + _traced_sum(x, weight.salient)
    if weight.low_rank is not None:
        down, up = weight.low_rank
        y = y + _traced_sum(_traced_sum(x, down), up)
    if weight.bias is not None:
        y = y + weight.bias
    return y.to(x.dtype)


def _traced_sum(x: Tensor, weight: PackedTensor) -> Tensor:
    start = 0
    y: Tensor | None = None
    for part in weight.ranges:
        scheme, stop = part.scheme, start + part.num_columns
        fields = (scheme.bits, scheme.group_size, scheme.zero_point, scheme.scale_type, scheme.grid)
        term: Tensor = _range_product(x[:, start:stop], part.codes, part.scales, part.zeros, *fields)
        y, start = term if y is None else y + term, stop
    assert y is not None
    return y


@torch.library.custom_op("subnibble::range_product", mutates_args=())
def _range_product(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    zero_point: str,
    scale_type: str,
    grid: str,
) -> Tensor:
    """X (t, k) times a range (m, k): (t, m) float32. Fields of the range's scheme follow its tensors."""
    scheme = Scheme(bits, group_size, zero_point, scale_type, grid)
    packed = PackedTensor((PackedRange(scheme, x.shape[1], codes, scales, zeros),))
    run = _few if x.shape[0] <= FEW_TOKENS else _many
    return run(x.float(), PackedWeight(packed))


@_range_product.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    zero_point: str,
    scale_type: str,
    grid: str,
) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]), dtype=torch.float32)


def multiply_(y: Tensor, x: Tensor, weight: PackedTensor, add: bool = False) -> None:
    """Write x wᵀ to y, or add it.

    y: (t, m) float32, rows contiguous.
    x: (t, k') float32 or bfloat16; of more columns than the weight has, the first ones count.
    weight: (m, k).
    """
    start = 0
    for part in weight.ranges:
        stop = start + part.num_columns
        columns = x[:, start:stop]
        if columns.stride(1) != 1:
            columns = columns.contiguous()
        _on(part, native.module.multiply, columns.data_ptr(), _TYPES[x.dtype], x.shape[0], columns.stride(0),
            y.data_ptr(), y.stride(0), add)  # fmt: skip
        start, add = stop, True


def dequantize(weight: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dense (m, k) in `dtype`, bit for bit that of `PackedTensor.dequantize`."""
    return _dense(weight, 0, weight.shape[0]).to(dtype)


def dense_rows(weight: PackedWeight, first: int, last: int) -> Tensor:
    """Dense rows first .. last - 1 (.., k) float32 of the main and salient matrices."""
    summed = _dense(weight.main, first, last)
    if weight.salient is not None:
        summed[:, : weight.salient.shape[1]] += _dense(weight.salient, first, last)
    return summed


def _dense(weight: PackedTensor, first: int, last: int) -> Tensor:
    out = torch.empty(last - first, weight.shape[1], dtype=torch.float32)
    start = 0
    for part in weight.ranges:
        columns = out[:, start:]
        _on(part, native.module.dequantize, first, last, columns.data_ptr(), _TYPES[out.dtype], out.stride(0))
        start += part.num_columns
    return out


def _on(part: PackedRange, function: Callable[..., None], *arguments: object) -> None:
    """Call a kernel on a range. Addresses are taken at each call: a module's tensors may move in place."""
    # Contiguous copies of what is not live until the call is over.
    codes, scales = part.codes.contiguous(), part.scales.contiguous()
    zeros = None if part.zeros is None else part.zeros.contiguous()
    form = _form(native.isa(), part.scheme, codes.shape[0], part.num_columns)
    function(form, codes.data_ptr(), scales.data_ptr(), 0 if zeros is None else zeros.data_ptr(), *arguments)


@cache
def _form(isa: str, scheme: Scheme, rows: int, columns: int) -> object:
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
