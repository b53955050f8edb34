"""A packed linear as a differentiable function of what is learned of it; codes stay as they are.

Its matrices are `learned_matrix.py`'s. Before them an input meets the stored column scales c (1 + δ), rounded as they
will be stored with the straight-through gradient, and its clip, `input_clip.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from subnibble.checkpoint.module_specs import matrices_of
from subnibble.distill.learned_matrix import SMALLEST_SHARE, Learned, LearnedMatrix, stored_factor
from subnibble.runtime import activations, site_input
from subnibble.runtime.straight_through import straight_through
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.linear import Linear, SiteInput
from subnibble.tuning.input_clip import bound_, can_clip, clipped, with_share


class Entrance(nn.Module):
    """What linears that read one tensor alike share: the tensor in their basis, quantized with a learned clip.

    site: as it is stored, once for all of them. learned: names of `Distillation`'s settings, of which it knows clips
    and column_scales. dtype: that products are computed in.
    """

    def __init__(self, site: SiteInput, learned: Collection[str], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._site, self._dtype = site, dtype
        scheme, scales = site.activation, site.column_scale
        moves = "clips" in learned and scheme is not None and can_clip(scheme)
        self.share = nn.Parameter(torch.zeros((), device=device), requires_grad=moves)
        # Shares of column scales.
        self.columns: nn.Parameter | None = None
        if scales is not None:
            start = torch.zeros_like(scales, dtype=torch.float32)
            self.columns = nn.Parameter(start, requires_grad="column_scales" in learned)
        self._x: Tensor | None = None
        self._seen: tuple[Tensor, Tensor] | None = None

    @property
    def scheme(self) -> ActivationScheme | None:
        """As learned."""
        scheme = self._site.activation
        return None if scheme is None else with_share(scheme, self.share.detach())

    @property
    def column_scale(self) -> Tensor | None:
        """As learned, (k,) float32 of the values that its stored type has; None if there is none."""
        scales = self._site.column_scale
        return None if scales is None or self.columns is None else stored_factor(scales, self.columns, scales.dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """X (..., k) in the readers' basis, (t, k) float32, and the same quantized. Made once for all of them."""
        if self._x is not x or self._seen is None:
            own = replace(self._site, column_scale=self.column_scale)
            tokens = site_input.enter(x, own).flatten(0, -2).float()
            self._x, self._seen = x, (tokens, self.quantized(tokens))
        return self._seen

    def quantized(self, tokens: Tensor) -> Tensor:
        """Tokens (t, k) float32 as products meet them, in the compute type."""
        scheme = self._site.activation
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

    def learned(self, name: str) -> dict[str, list[Learned]]:
        """What is learned, by the setting that lets it be. name: of one of the linears, in messages."""
        found: dict[str, list[Learned]] = {"clips": [], "column_scales": []}
        if self.share.requires_grad:
            found["clips"].append(Learned(f"{name}.activation.clip", self.share))
        if self.columns is not None and self.columns.requires_grad:
            found["column_scales"].append(Learned(f"{name}.column_scale", self.columns))
        return found

    def stored(self) -> dict[str, Tensor]:
        """Column scales that were learned, by their name in each of the linears."""
        scales, old = self.column_scale, self._site.column_scale
        if scales is None or old is None or self.columns is None or not self.columns.requires_grad:
            return {}
        return {"column_scale": scales.detach().to(old.dtype)}

    def bound_(self) -> None:
        """Bring what was learned back into its range."""
        scheme = self._site.activation
        if scheme is not None:
            bound_(self.share, scheme)
        if self.columns is not None:
            with torch.no_grad():
                self.columns.clamp_(min=SMALLEST_SHARE)


class StudentLinear(nn.Module):
    """A packed linear: `ops.linear` with gradients. learned: names of `Distillation`'s settings."""

    def __init__(self, own: Linear, entrance: Entrance, learned: Collection[str]) -> None:
        super().__init__()
        self._own = own
        # In a tuple: several linears share it, and it is not theirs.
        self._entrance = (entrance,)
        parts = matrices_of(own.weight)
        self._prefixes = tuple(parts)
        self.matrices = nn.ModuleDict(
            {name.rstrip(".") or "weight": LearnedMatrix(part, learned) for name, part in parts.items()}
        )
        self.out_features, self.in_features = own.weight.main.shape

    @property
    def entrance(self) -> Entrance:
        """Shared with the site's other readers."""
        return self._entrance[0]

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., k) to (..., m), in x's type."""
        weight, entrance = self._own.weight, self.entrance
        exact, entered = entrance(x)
        y = self._times("weight", entered)
        if weight.salient is not None:
            rank = weight.salient.shape[1]
            y = y + self._times("salient", entered[:, :rank])
            if self._own.input.repeated:
                rest = entrance.quantized(exact[:, :rank] - entered[:, :rank].float())
                y = y + self._times("salient", rest)
        if weight.low_rank is not None:
            inner = entrance.between(self._times("down", entered))
            y = y + self._times("up", inner.to(entered.dtype))
        if weight.bias is not None:
            y = y + weight.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])

    def _times(self, matrix: str, x: Tensor) -> Tensor:
        """The product with one of the matrices, float32."""
        found: Tensor = self.matrices[matrix](x)
        return found.float()

    def learned(self, name: str) -> dict[str, list[Learned]]:
        """What is learned of its matrices, by the setting that lets it be. name: its own, in messages."""
        found: dict[str, list[Learned]] = {}
        for prefix, matrix in self._learned_matrices.items():
            for space, own in matrix.learned(f"{name}.{prefix}").items():
                found.setdefault(space, []).extend(own)
        return found

    def stored(self) -> Mapping[str, Tensor]:
        """What was learned, by its name in the linear."""
        found = self.entrance.stored()
        for prefix, matrix in self._learned_matrices.items():
            found |= {f"{prefix}{name}": tensor for name, tensor in matrix.stored().items()}
        return found

    def bound_(self) -> None:
        """Bring what was learned of its matrices back into its range."""
        for matrix in self._learned_matrices.values():
            matrix.bound_()

    @property
    def _learned_matrices(self) -> dict[str, LearnedMatrix]:
        """By the prefix of their stored names."""
        found = {}
        for prefix, matrix in zip(self._prefixes, self.matrices.values(), strict=True):
            assert isinstance(matrix, LearnedMatrix)
            found[prefix] = matrix
        return found
