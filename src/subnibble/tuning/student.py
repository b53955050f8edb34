"""A packed linear as a differentiable function of its scales and of the clip of its input; codes stay as they are.

Every grid is linear in its scales: with the whole numbers n_p of a code's planes (`runtime/integer.py`)

    w = Σ_p s_p (1 + δ_p) (n_p - z_p)

so that their gradients are exact; the scales that are multiplied are rounded as they will be stored, which gradients
pass straight. Scales alone are learned of a weight, as in PEQA (arXiv 2305.14152) and in EfficientQAT's end-to-end step
(arXiv 2407.11062, section 3.3). Clips: `input_clip.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subnibble.runtime import activations, ops
from subnibble.runtime.integer import planes
from subnibble.runtime.ops import LinearTerms
from subnibble.runtime.straight_through import straight_through
from subnibble.scheme import E8M0, ActivationScheme
from subnibble.tensor import PackedRange, PackedTensor, range_key, scale_dtype
from subnibble.tuning.input_clip import bound_, can_clip, clipped, with_share

# Nothing learned turns a scale around.
_SMALLEST_SHARE = -0.9


class LearnedMatrix(nn.Module):
    """A packed matrix (m, k) with a factor 1 + δ for each of its scales. learned: whether they are."""

    def __init__(self, packed: PackedTensor, learned: bool) -> None:
        super().__init__()
        self.parts = [_Part.of(part) for part in packed.ranges]
        self.shares = nn.ParameterList()
        for part in self.parts:
            moves = learned and part.range.scheme.scale_type != E8M0
            self.shares.append(nn.Parameter(torch.zeros_like(part.scales), requires_grad=moves))

    def forward(self, x: Tensor) -> Tensor:
        """`x wᵀ`, (t, k) to (t, m), in x's type."""
        found: Tensor = _Product.apply(x, self, *self.shares)  # type: ignore[no-untyped-call]
        return found

    def dense(self, shares: tuple[Tensor, ...]) -> Tensor:
        """The matrix (m, k) float32, with these δ."""
        return torch.cat([part.dense(share) for part, share in zip(self.parts, shares, strict=True)], 1)

    def stored(self) -> dict[str, Tensor]:
        """Scales that were learned as they are stored, by their names in the matrix."""
        return {
            range_key("scales", i): part.stored(share.detach())
            for i, (part, share) in enumerate(zip(self.parts, self.shares, strict=True))
            if share.requires_grad
        }


@dataclass(frozen=True)
class _Part:
    """A range of columns. numbers: (planes, m, groups, width) whole, the last group filled up with zeros, of a small
    type. zeros: (m, groups, 1), real zero-points of the first plane, or None. scales: (planes, m, groups).
    """

    range: PackedRange
    numbers: Tensor
    zeros: Tensor | None
    scales: Tensor

    @classmethod
    def of(cls, part: PackedRange) -> _Part:
        found = planes(part)
        first, stop = part.scheme.group_bounds(part.columns)[0]
        spare = -part.columns % (stop - first)
        numbers = torch.stack([plane.numbers for plane in found])
        small = torch.int8 if numbers.numel() == 0 or float(numbers.abs().amax()) < 2**7 else torch.int16
        numbers = nn.functional.pad(numbers, (0, spare)).unflatten(2, (-1, stop - first)).to(small)
        zeros = found[0].zeros
        return cls(
            part,
            numbers,
            None if zeros is None else zeros.unsqueeze(-1),
            torch.stack([plane.scales for plane in found]),
        )

    def dense(self, share: Tensor) -> Tensor:
        """(m, columns) float32."""
        scales = self._scales(share).float().unsqueeze(-1)
        found = sum(self._level(p) * scales[p] for p in range(scales.shape[0]))
        assert isinstance(found, Tensor)
        return found.flatten(1)[:, : self.range.columns]

    def gradient(self, of_dense: Tensor) -> Tensor:
        """Of δ, (planes, m, groups), where that of the dense matrix is (m, columns)."""
        width = self.numbers.shape[3]
        grouped = nn.functional.pad(of_dense, (0, -self.range.columns % width)).unflatten(1, (-1, width))
        sums = [(grouped * self._level(p)).sum(-1) for p in range(self.scales.shape[0])]
        return torch.stack(sums) * self.scales

    def stored(self, share: Tensor) -> Tensor:
        """Scales (m, groups * planes) in the scheme's type, a group's side by side."""
        return self._scales(share).permute(1, 2, 0).flatten(1).contiguous()

    def _scales(self, share: Tensor) -> Tensor:
        """(planes, m, groups) in the scheme's type; powers of two, which nothing learned moves, as numbers."""
        if self.range.scheme.scale_type == E8M0:
            return self.scales
        kind = scale_dtype(self.range.scheme)
        return (self.scales * (1 + share)).clamp(max=torch.finfo(kind).max).to(kind)

    def _level(self, plane: int) -> Tensor:
        """What a plane's scale multiplies, (m, groups, width)."""
        level = self.numbers[plane].float()
        return level if self.zeros is None else level - self.zeros


class _Product(torch.autograd.Function):
    """Keeps its input alone: the dense matrix is made again on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: LearnedMatrix, *shares: Tensor) -> Tensor:
        ctx.save_for_backward(x, *shares)
        ctx.matrix = matrix
        return x @ matrix.dense(shares).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, *shares) = grads, ctx.saved_tensors
        matrix: LearnedMatrix = ctx.matrix
        to_x = grad @ matrix.dense(tuple(shares)).to(grad.dtype) if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = [None] * len(shares)
        if any(ctx.needs_input_grad[2:]):
            to_dense = (grad.T @ x).float()
            start = 0
            for i, part in enumerate(matrix.parts):
                stop = start + part.range.columns
                if ctx.needs_input_grad[2 + i]:
                    found[i] = part.gradient(to_dense[:, start:stop])
                start = stop
        return (to_x, None, *found)


class Entrance(nn.Module):
    """What linears that read one tensor alike share: the tensor in their basis, quantized with a learned clip.

    terms: of one of them. learned: whether the clip is. dtype: that products are computed in.
    """

    def __init__(self, terms: LinearTerms, learned: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self._terms, self._dtype = terms, dtype
        scheme = terms.activation
        moves = learned and scheme is not None and can_clip(scheme)
        self.share = nn.Parameter(torch.zeros((), device=terms.weight.ranges[0].codes.device), requires_grad=moves)
        self._x: Tensor | None = None
        self._seen: tuple[Tensor, Tensor] | None = None

    @property
    def scheme(self) -> ActivationScheme | None:
        """As learned."""
        scheme = self._terms.activation
        return None if scheme is None else with_share(scheme, self.share.detach())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """X (..., k) in the readers' basis, (t, k) float32, and the same quantized. Made once for all of them."""
        if self._x is not x or self._seen is None:
            tokens = ops.enter(x, self._terms).flatten(0, -2).float()
            self._x, self._seen = x, (tokens, self.quantized(tokens))
        return self._seen

    def quantized(self, tokens: Tensor) -> Tensor:
        """Tokens (t, k) float32 as products meet them, in the compute type."""
        scheme = self._terms.activation
        if scheme is None:
            return tokens.to(self._dtype)
        return clipped(tokens, self.share, scheme).to(self._dtype)

    def between(self, inner: Tensor) -> Tensor:
        """What is between the factors of a low-rank branch, as the second meets it."""
        scheme = self.scheme
        if scheme is None:
            return inner
        own = scheme.without_outliers
        return straight_through(inner, activations.quantize_values(inner.detach(), own))

    def forget(self) -> None:
        """Forget the last tensor."""
        self._x = self._seen = None

    def bound_(self) -> None:
        """Bring the clip back into its range."""
        scheme = self._terms.activation
        if scheme is not None:
            bound_(self.share, scheme)


class StudentLinear(nn.Module):
    """A packed linear: `ops.linear` with gradients. learned: whether scales are."""

    def __init__(self, terms: LinearTerms, entrance: Entrance, learned: bool) -> None:
        super().__init__()
        self._terms = terms
        # In a tuple: several linears share it, and it is not theirs.
        self._entrance = (entrance,)
        self.matrices = nn.ModuleDict(
            {prefix.rstrip(".") or "weight": LearnedMatrix(part, learned) for prefix, part in terms.matrices.items()}
        )
        self.in_features, self.out_features = terms.weight.shape[1], terms.weight.shape[0]

    @property
    def entrance(self) -> Entrance:
        """Shared with the site's other readers."""
        return self._entrance[0]

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., k) to (..., m), in x's type."""
        terms, entrance = self._terms, self.entrance
        exact, entered = entrance(x)
        y = self._times("weight", entered)
        if terms.salient is not None:
            rank = terms.salient.shape[1]
            y = y + self._times("salient", entered[:, :rank])
            if terms.residual != "none":
                rest = entrance.quantized(exact[:, :rank] - entered[:, :rank].float())
                y = y + self._residual(rest)
        if terms.low_rank is not None:
            inner = entrance.between(self._times("down", entered))
            y = y + self._times("up", inner.to(entered.dtype))
        if terms.bias is not None:
            y = y + terms.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])

    def _residual(self, rest: Tensor) -> Tensor:
        """What is left of the first channels, by the matrix that meets it."""
        if self._terms.residual == "salient":
            return self._times("salient", rest)
        return self._times("weight", nn.functional.pad(rest, (0, self.in_features - rest.shape[1])))

    def _times(self, matrix: str, x: Tensor) -> Tensor:
        """The product with one of the matrices, float32."""
        found: Tensor = self.matrices[matrix](x)
        return found.float()

    def stored(self) -> Mapping[str, Tensor]:
        """Scales that were learned, by their names in the linear."""
        found: dict[str, Tensor] = {}
        for prefix, part in zip(self._terms.matrices, self.matrices.values(), strict=True):
            assert isinstance(part, LearnedMatrix)
            found |= {f"{prefix}{name}": scales for name, scales in part.stored().items()}
        return found

    def bound_(self) -> None:
        """Bring what was learned back into its range."""
        with torch.no_grad():
            for share in self.matrices.parameters():
                share.clamp_(min=_SMALLEST_SHARE)
