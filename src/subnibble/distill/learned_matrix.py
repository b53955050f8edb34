"""A packed matrix as a differentiable function of its scales and real zero-points; its codes are fixed.

With the integers n_p of a code's planes (`runtime/integer.py`), a weight is

    w = Σ_p s_p (1 + δ_p) (n_p - z - ζ)

The real zero-point z exists only on grids with one plane; it is 0 otherwise. The learned parameters are δ, relative
changes of scales, and ζ, in grid levels. ζ is absolute because its derivative is -s for any z, while the derivative by
a relative change of z would vanish at z = 0. Scale and zero-point are rounded to their stored dtype before they are
used, with straight-through gradients. Only scales and zero-points are learned, as in PEQA (arXiv 2305.14152) and
EfficientQAT's end-to-end step (arXiv 2407.11062, section 3.3); the latter fixes zero-points, which are integers there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subnibble.runtime.integer import planes
from subnibble.runtime.straight_through import straight_through
from subnibble.tensor.packed import PackedRange, PackedTensor, range_key, scale_dtype
from subnibble.tensor.scheme import E8M0

# Lower bound of relative changes: a learned factor keeps its sign.
SMALLEST_SHARE = -0.9


@dataclass(frozen=True)
class Learned:
    """A learned parameter.

    name: name of the tensor that it changes, for messages.
    parameter: the parameter.
    unit: its change in an optimizer step at rate 1; the learning rate is multiplied by it.
    """

    name: str
    parameter: nn.Parameter
    unit: float = 1.0


def stored_factor(factor: Tensor, share: Tensor, kind: torch.dtype) -> Tensor:
    """Return factor (1 + share), rounded to the dtype `kind` with the straight-through gradient; float32."""
    return _in_type(factor.float() * (1 + share), kind)


def _in_type(exact: Tensor, kind: torch.dtype) -> Tensor:
    """Round to the dtype `kind`, clamped to its range, with the straight-through gradient; returned as float32."""
    limit = torch.finfo(kind).max
    return straight_through(exact, exact.detach().clamp(-limit, limit).to(kind))


class LearnedMatrix(nn.Module):
    """A packed matrix (m, k) with learned scales and zero-points.

    packed: the stored matrix.
    learned: names of `Distillation` settings that are on; only "scales" and "zero_points" matter here.
    """

    def __init__(self, packed: PackedTensor, learned: Collection[str]) -> None:
        super().__init__()
        self.ranges = nn.ModuleList(LearnedRange(column_range, learned) for column_range in packed.ranges)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x wᵀ`: (t, k) to (t, m), in x's dtype."""
        product: Tensor = _Product.apply(x, self, *self.parameters())  # type: ignore[no-untyped-call]
        return product

    def dense(self) -> Tensor:
        """The dequantized matrix (m, k) float32, as it will be stored; differentiable in the learned parameters."""
        return torch.cat([column_range.dense() for column_range in self._ranges], 1)

    def gradients(self, of_dense: Tensor) -> list[Tensor]:
        """Gradients of the parameters, in the order of `parameters()`.

        of_dense: (m, k) float32, the gradient of the dense matrix.
        """
        of_ranges = of_dense.split([column_range.range.num_columns for column_range in self._ranges], 1)
        return [
            grad
            for column_range, of_range in zip(self._ranges, of_ranges, strict=True)
            for grad in column_range.gradients(of_range)
        ]

    def learned(self, name: str) -> dict[str, list[Learned]]:
        """Learned parameters by the setting that enables them.

        name: the matrix's name, used in messages.
        """
        spaces: dict[str, list[Learned]] = {"scales": [], "zero_points": []}
        for i, column_range in enumerate(self._ranges):
            if column_range.share.requires_grad:
                spaces["scales"].append(Learned(f"{name}{range_key('scales', i)}", column_range.share))
            if column_range.shift is not None and column_range.shift.requires_grad:
                # The unit makes a zero-point step move weights as far as a scale step does.
                spaces["zero_points"].append(
                    Learned(f"{name}{range_key('zeros', i)}", column_range.shift, column_range.mean_level())
                )
        return spaces

    def stored(self) -> dict[str, Tensor]:
        """The learned tensors in their stored dtype, by their names in the matrix."""
        tensors: dict[str, Tensor] = {}
        for i, column_range in enumerate(self._ranges):
            if column_range.share.requires_grad:
                tensors[range_key("scales", i)] = column_range.stored_scales()
            if column_range.shift is not None and column_range.shift.requires_grad:
                tensors[range_key("zeros", i)] = column_range.stored_zeros()
        return tensors

    def bound_(self) -> None:
        """Clamp learned parameters to their valid range."""
        for column_range in self._ranges:
            column_range.bound_()

    @property
    def _ranges(self) -> Iterator[LearnedRange]:
        for column_range in self.ranges:
            assert isinstance(column_range, LearnedRange)
            yield column_range


class LearnedRange(nn.Module):
    """A column range of a packed matrix, with one scheme.

    packed_range: the stored range, (m, columns).
    learned: names of `Distillation` settings that are on.
    share (attribute): δ, (planes, m, groups).
    shift (attribute): ζ, (m, groups, 1); None without real zero-points.
    """

    def __init__(self, packed_range: PackedRange, learned: Collection[str]) -> None:
        super().__init__()
        integer_planes = planes(packed_range)
        first, stop = packed_range.scheme.group_bounds(packed_range.num_columns)[0]
        padding = -packed_range.num_columns % (stop - first)
        numbers = torch.stack([plane.numbers for plane in integer_planes])
        dtype = torch.int8 if numbers.numel() == 0 or float(numbers.abs().amax()) < 2**7 else torch.int16
        self.range = packed_range
        # Integers (planes, m, groups, width), the last group padded with zeros.
        self._numbers = nn.functional.pad(numbers, (0, padding)).unflatten(2, (-1, stop - first)).to(dtype)
        self._scales = torch.stack([plane.scales for plane in integer_planes])
        zeros = integer_planes[0].zeros
        self._zeros = None if zeros is None else zeros.unsqueeze(-1)
        learns_scales = "scales" in learned and packed_range.scheme.scale_type != E8M0
        self.share = nn.Parameter(torch.zeros_like(self._scales), requires_grad=learns_scales)
        self.shift: nn.Parameter | None = None
        if self._zeros is not None:
            self.shift = nn.Parameter(torch.zeros_like(self._zeros), requires_grad="zero_points" in learned)

    def dense(self) -> Tensor:
        """The dequantized range, (m, columns) float32."""
        scales, zeros = self._learned_scales().unsqueeze(-1), self._learned_zeros()
        dense = sum(self._level(p, zeros) * scales[p] for p in range(scales.shape[0]))
        assert isinstance(dense, Tensor)
        return dense.flatten(1)[:, : self.range.num_columns]

    def gradients(self, of_dense: Tensor) -> list[Tensor]:
        """Gradients of the parameters, in the order of `parameters()`.

        of_dense: (m, columns) float32, the gradient of the dense range.
        """
        width = self._numbers.shape[3]
        with torch.no_grad():
            grouped = nn.functional.pad(of_dense, (0, -self.range.num_columns % width)).unflatten(1, (-1, width))
            zeros = self._learned_zeros()
            sums = [(grouped * self._level(p, zeros)).sum(-1) for p in range(self._scales.shape[0])]
            gradients = [torch.stack(sums) * self._scales]
            if self.shift is not None:
                gradients.append(-(grouped.sum(-1) * self._learned_scales()[0]).unsqueeze(-1))
        return gradients

    def stored_scales(self) -> Tensor:
        """Scales (m, groups * planes) in the stored dtype, the planes of one group adjacent."""
        scales = self._learned_scales().detach().to(scale_dtype(self.range.scheme))
        return scales.permute(1, 2, 0).flatten(1).contiguous()

    def stored_zeros(self) -> Tensor:
        """Real zero-points (m, groups) in the stored dtype."""
        zeros = self._learned_zeros()
        assert zeros is not None
        return zeros.detach().squeeze(-1).to(scale_dtype(self.range.scheme)).contiguous()

    def mean_level(self) -> float:
        """Mean of |n - z|: how far a weight moves on average, in grid steps, if its scale doubles."""
        level = self._level(0, self._zeros).flatten(1)[:, : self.range.num_columns]
        return float(level.abs().mean())

    def bound_(self) -> None:
        """Clamp the parameters: scales keep their signs, a zero-point moves by at most the number of levels."""
        with torch.no_grad():
            self.share.clamp_(min=SMALLEST_SHARE)
            if self.shift is not None:
                self.shift.clamp_(-self.range.scheme.levels, self.range.scheme.levels)

    def _learned_scales(self) -> Tensor:
        """Learned scales (planes, m, groups) float32, rounded to the stored dtype; powers of two are not learned."""
        if self.range.scheme.scale_type == E8M0:
            return self._scales
        return stored_factor(self._scales, self.share, scale_dtype(self.range.scheme))

    def _learned_zeros(self) -> Tensor | None:
        """Learned zero-points (m, groups, 1) float32, rounded to the stored dtype; None without real zero-points."""
        if self._zeros is None or self.shift is None:
            return None
        return _in_type(self._zeros + self.shift, scale_dtype(self.range.scheme))

    def _level(self, plane: int, zeros: Tensor | None) -> Tensor:
        """The factor n - z that a plane's scale is multiplied by, (m, groups, width)."""
        level: Tensor = self._numbers[plane].float()
        return level if zeros is None else level - zeros


class _Product(torch.autograd.Function):
    """x wᵀ that stores only x for the backward pass, where the dense matrix is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: LearnedMatrix, *factors: Tensor) -> Tensor:
        # The factors are saved, too, so that autograd reports an in-place change before the backward pass.
        ctx.save_for_backward(x, *factors)
        ctx.matrix = matrix
        return x @ matrix.dense().to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, x = grads[0], ctx.saved_tensors[0]
        matrix: LearnedMatrix = ctx.matrix
        needs_grad: Sequence[bool] = ctx.needs_input_grad
        to_x = grad @ matrix.dense().detach().to(grad.dtype) if needs_grad[0] else None
        of_factors: list[Tensor | None] = [None] * len(needs_grad[2:])
        if any(needs_grad[2:]):
            gradients = matrix.gradients((grad.T @ x).float())
            of_factors = [
                gradient if needs else None for gradient, needs in zip(gradients, needs_grad[2:], strict=True)
            ]
        return (to_x, None, *of_factors)
