"""Small packed weights and inputs for running modules, and how near to the dense product an output has to be."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from subnibble.runtime.native import FIXED_GROUP
from subnibble.tensor.packed import PackedRange, PackedTensor, QuantizedMatrix, scale_dtype
from subnibble.tensor.scheme import Scheme

ROWS = 9
LAYOUTS = {
    "3 bits, ragged": [(139, Scheme(3, 32))],
    "2 bits, real zeros": [(139, Scheme(2, 64, "real"))],
    "4 bits, symmetric, whole row": [(139, Scheme(4, -1, "none", "float32"))],
    "8 bits, bfloat16 scales": [(5, Scheme(8, 3, "integer", "bfloat16"))],
    "two ranges": [(120, Scheme(2, 32)), (19, Scheme(8, -1, "none"))],
}
CAST: dict[torch.dtype, Callable[[nn.Module], nn.Module]] = {
    torch.bfloat16: lambda module: module.to(torch.bfloat16),
    torch.float16: lambda module: module.half(),
    torch.float64: lambda module: module.double(),
    torch.float32: lambda module: module.float(),
}


def packed_range(rows: int, columns: int, scheme: Scheme, seed: int) -> PackedRange:
    """Signed weights; row 0 has one code, the last row starts with an all-zero group."""
    generator = torch.Generator().manual_seed(seed)
    groups, stored = scheme.groups(columns), scale_dtype(scheme)
    codes = torch.randint(0, scheme.levels, (rows, columns), generator=generator, dtype=torch.uint8)
    codes[0] = codes[0, 0]
    scales = torch.exp2(torch.rand(rows, groups, generator=generator) * 6 - 8).to(stored).float()
    middle = scheme.levels // 2
    codes[-1, : scheme.group_bounds(columns)[0][1]] = middle
    if scheme.zero_point == "none":
        return PackedRange.pack(QuantizedMatrix(codes, scales, None), scheme)
    zeros = torch.randint(0, scheme.levels, (rows, groups), generator=generator).float()
    if scheme.zero_point == "real":
        zeros = (zeros + torch.rand(rows, groups, generator=generator)).to(stored).float()
    zeros[-1, 0] = middle
    return PackedRange.pack(QuantizedMatrix(codes, scales, zeros), scheme)


def packed_tensor(name: str, rows: int = ROWS) -> PackedTensor:
    layout = enumerate(LAYOUTS[name])
    return PackedTensor(tuple(packed_range(rows, columns, scheme, i) for i, (columns, scheme) in layout))


def dense(weight: PackedTensor) -> Tensor:
    """`scale * (code - zero)` of every element in float32, then widened to float64."""
    parts = []
    for part in weight.ranges:
        quantized = part.unpack()
        width = part.num_columns if part.scheme.group_size == -1 else part.scheme.group_size
        group = torch.arange(part.num_columns) // width
        zeros = torch.tensor(2.0 ** (part.scheme.bits - 1)) if quantized.zeros is None else quantized.zeros[:, group]
        parts.append(quantized.scales[:, group] * (quantized.codes.float() - zeros))
    return torch.cat(parts, dim=1).double()


def inputs(columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(2, 7, columns), signed, one channel a hundred times larger, one token zero."""
    x = torch.randn(2, 7, columns, generator=torch.Generator().manual_seed(3))
    x[..., columns // 2] *= 100
    x[1, 2] = 0
    return x.to(dtype)


def bias_of(rows: int) -> Tensor:
    return torch.randn(rows, generator=torch.Generator().manual_seed(4))


def column_scale_of(columns: int) -> Tensor:
    """float16, between 1/64 and 64, half of them below 1."""
    return torch.exp2(torch.rand(columns, generator=torch.Generator().manual_seed(8)) * 12 - 6).half()


def within_bound(
    y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, c: float = 2.0, rounding: Tensor | None = None
) -> bool:
    """Every element within `c * eps * sqrt(K) * (|x| @ |w| + |b|)` of the product in float64.

    Kernels round inputs to fixed point first: half a step of each input (`rounding`) times |w| is added.
    """
    exact, size = x.double() @ w.T, x.double().abs() @ w.abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    bound = (
        c * torch.finfo(y.dtype).eps * w.shape[1] ** 0.5 * size
        + (half_steps(x) if rounding is None else rounding) @ w.abs().T
    )
    return y.shape == exact.shape and bool(((y.double() - exact).abs() <= bound).all())


def half_steps(x: Tensor) -> Tensor:
    """Half of the distance between fixed-point numbers in each input's group, as kernels round x (..., k)."""
    largest = {torch.float32: 2.0**23, torch.bfloat16: 2.0**15, torch.float16: 2.0**15}.get(x.dtype)
    if largest is None:
        return torch.zeros_like(x, dtype=torch.float64)
    groups = [part.abs().amax(-1, keepdim=True).expand_as(part) for part in x.double().split(FIXED_GROUP, -1)]
    return torch.cat(groups, -1) * (1.01 * 0.5 / largest)


def state_bytes(module: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    """Type and bytes of every buffer."""
    return {
        name: (buffer.dtype, buffer.contiguous().view(torch.uint8).numpy().tobytes())
        for name, buffer in module.named_buffers()
    }
