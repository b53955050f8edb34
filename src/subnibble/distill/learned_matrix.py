"""A packed matrix as a differentiable function of its scales and real zero-points; codes stay as they are.

With the whole numbers n_p of a code's planes (`runtime/integer.py`)

    w = Σ_p s_p (1 + δ_p) (n_p - z - ζ)

where the real zero-point z is of grids of one plane, else 0. Learned are δ, shares of scales, and ζ, in levels of the
grid: the derivative by ζ is -s, whatever z is, where that by a share of z would vanish with it. Both factors are
rounded as they will be stored before they are multiplied; gradients pass straight through that. Scales and
zero-points are learned, and nothing else of a weight, as in PEQA (arXiv 2305.14152) and in EfficientQAT's end-to-end
step (arXiv 2407.11062, section 3.3), which keeps its zero-points: its are integers.
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

# Nothing learned turns a factor around.
SMALLEST_SHARE = -0.9


@dataclass(frozen=True)
class Learned:
    """A parameter that is learned. name: of what it changes, for messages. unit: a step of rate 1 moves it so far."""

    name: str
    parameter: nn.Parameter
    unit: float = 1.0


def stored_factor(factor: Tensor, share: Tensor, kind: torch.dtype) -> Tensor:
    """A factor changed by a share of it, as the type `kind` stores it, with the straight-through gradient; float32."""
    return _in_type(factor.float() * (1 + share), kind)


def _in_type(exact: Tensor, kind: torch.dtype) -> Tensor:
    """Rounded to `kind`, what is beyond its range to its largest, with the straight-through gradient; float32."""
    largest = torch.finfo(kind).max
    return straight_through(exact, exact.detach().clamp(-largest, largest).to(kind))


class LearnedMatrix(nn.Module):
    """A packed matrix (m, k). learned: names of `Distillation`'s settings, of which it knows scales and zero_points."""

    def __init__(self, packed: PackedTensor, learned: Collection[str]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(LearnedRange(part, learned) for part in packed.ranges)

    def forward(self, x: Tensor) -> Tensor:
        """`x wᵀ`, (t, k) to (t, m), in x's type."""
        found: Tensor = _Product.apply(x, self, *self.parameters())  # type: ignore[no-untyped-call]
        return found

    def dense(self) -> Tensor:
        """The matrix (m, k) float32, as it will be stored; autograd goes through it to what is learned."""
        return torch.cat([part.dense() for part in self._parts], 1)

    def gradients(self, of_dense: Tensor) -> list[Tensor]:
        """Gradients of the parameters, in their order. of_dense: (m, k), the gradient of the dense matrix."""
        ranges = of_dense.split([part.range.columns for part in self._parts], 1)
        return [one for part, own in zip(self._parts, ranges, strict=True) for one in part.gradients(own)]

    def learned(self, name: str) -> dict[str, list[Learned]]:
        """What is learned, by the setting that lets it be. name: the matrix's, in messages."""
        found: dict[str, list[Learned]] = {"scales": [], "zero_points": []}
        for i, part in enumerate(self._parts):
            if part.share.requires_grad:
                found["scales"].append(Learned(f"{name}{range_key('scales', i)}", part.share))
            if part.shift is not None and part.shift.requires_grad:
                # A step of the zero-point moves weights as far as one of the scale does.
                found["zero_points"].append(Learned(f"{name}{range_key('zeros', i)}", part.shift, part.mean_level()))
        return found

    def stored(self) -> dict[str, Tensor]:
        """What was learned as it is stored, by its name in the matrix."""
        found: dict[str, Tensor] = {}
        for i, part in enumerate(self._parts):
            if part.share.requires_grad:
                found[range_key("scales", i)] = part.stored_scales()
            if part.shift is not None and part.shift.requires_grad:
                found[range_key("zeros", i)] = part.stored_zeros()
        return found

    def bound_(self) -> None:
        """Bring what was learned back into its range."""
        for part in self._parts:
            part.bound_()

    @property
    def _parts(self) -> Iterator[LearnedRange]:
        for part in self.parts:
            assert isinstance(part, LearnedRange)
            yield part


class LearnedRange(nn.Module):
    """A range of columns. share: δ, (planes, m, groups). shift: ζ, (m, groups, 1), None without real zero-points."""

    def __init__(self, part: PackedRange, learned: Collection[str]) -> None:
        super().__init__()
        found = planes(part)
        first, stop = part.scheme.group_bounds(part.columns)[0]
        spare = -part.columns % (stop - first)
        numbers = torch.stack([plane.numbers for plane in found])
        small = torch.int8 if numbers.numel() == 0 or float(numbers.abs().amax()) < 2**7 else torch.int16
        self.range = part
        # (planes, m, groups, width) whole, the last group filled up with zeros.
        self._numbers = nn.functional.pad(numbers, (0, spare)).unflatten(2, (-1, stop - first)).to(small)
        self._scales = torch.stack([plane.scales for plane in found])
        zeros = found[0].zeros
        self._zeros = None if zeros is None else zeros.unsqueeze(-1)
        moves = "scales" in learned and part.scheme.scale_type != E8M0
        self.share = nn.Parameter(torch.zeros_like(self._scales), requires_grad=moves)
        self.shift: nn.Parameter | None = None
        if self._zeros is not None:
            self.shift = nn.Parameter(torch.zeros_like(self._zeros), requires_grad="zero_points" in learned)

    def dense(self) -> Tensor:
        """(m, columns) float32."""
        scales, zeros = self._seen_scales().unsqueeze(-1), self._seen_zeros()
        found = sum(self._level(p, zeros) * scales[p] for p in range(scales.shape[0]))
        assert isinstance(found, Tensor)
        return found.flatten(1)[:, : self.range.columns]

    def gradients(self, of_dense: Tensor) -> list[Tensor]:
        """Gradients of the parameters, in their order. of_dense: (m, columns), the gradient of the dense range."""
        width = self._numbers.shape[3]
        with torch.no_grad():
            grouped = nn.functional.pad(of_dense, (0, -self.range.columns % width)).unflatten(1, (-1, width))
            zeros = self._seen_zeros()
            sums = [(grouped * self._level(p, zeros)).sum(-1) for p in range(self._scales.shape[0])]
            found = [torch.stack(sums) * self._scales]
            if self.shift is not None:
                found.append(-(grouped.sum(-1) * self._seen_scales()[0]).unsqueeze(-1))
        return found

    def stored_scales(self) -> Tensor:
        """Scales (m, groups * planes) in the scheme's type, a group's side by side."""
        scales = self._seen_scales().detach().to(scale_dtype(self.range.scheme))
        return scales.permute(1, 2, 0).flatten(1).contiguous()

    def stored_zeros(self) -> Tensor:
        """Real zero-points (m, groups) in the scheme's type."""
        zeros = self._seen_zeros()
        assert zeros is not None
        return zeros.detach().squeeze(-1).to(scale_dtype(self.range.scheme)).contiguous()

    def mean_level(self) -> float:
        """Mean of |n - z|: how far a weight moves, in steps of its grid, where its scale grows by itself."""
        level = self._level(0, self._zeros).flatten(1)[:, : self.range.columns]
        return float(level.abs().mean())

    def bound_(self) -> None:
        """Scales keep their signs; no zero-point moves by more than the grid is wide."""
        with torch.no_grad():
            self.share.clamp_(min=SMALLEST_SHARE)
            if self.shift is not None:
                self.shift.clamp_(-self.range.scheme.levels, self.range.scheme.levels)

    def _seen_scales(self) -> Tensor:
        """(planes, m, groups) float32, of the values that the scheme's type has; powers of two stay."""
        if self.range.scheme.scale_type == E8M0:
            return self._scales
        return stored_factor(self._scales, self.share, scale_dtype(self.range.scheme))

    def _seen_zeros(self) -> Tensor | None:
        """(m, groups, 1) float32, likewise."""
        if self._zeros is None or self.shift is None:
            return None
        return _in_type(self._zeros + self.shift, scale_dtype(self.range.scheme))

    def _level(self, plane: int, zeros: Tensor | None) -> Tensor:
        """What a plane's scale multiplies, (m, groups, width)."""
        level: Tensor = self._numbers[plane].float()
        return level if zeros is None else level - zeros


class _Product(torch.autograd.Function):
    """Keeps its input alone: the dense matrix is made again on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: LearnedMatrix, *factors: Tensor) -> Tensor:
        # Kept with x, so that autograd sees if they change before the way back.
        ctx.save_for_backward(x, *factors)
        ctx.matrix = matrix
        return x @ matrix.dense().to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, x = grads[0], ctx.saved_tensors[0]
        matrix: LearnedMatrix = ctx.matrix
        needed: Sequence[bool] = ctx.needs_input_grad
        to_x = grad @ matrix.dense().detach().to(grad.dtype) if needed[0] else None
        found: list[Tensor | None] = [None] * len(needed[2:])
        if any(needed[2:]):
            gradients = matrix.gradients((grad.T @ x).float())
            found = [own if needs else None for own, needs in zip(gradients, needed[2:], strict=True)]
        return (to_x, None, *found)
