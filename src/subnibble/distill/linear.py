"""A packed linear as a differentiable function of its learned parameters; its codes are fixed.

`learned_matrix.py` implements its matrices. Before them, the input is multiplied by the column scales c (1 + δ), which
are rounded to their stored dtype (straight-through gradient), and quantized with the learned clip of
`tuning/input_clip.py`.
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
    """The transformed and quantized input that several linears share, with learned clip and column scales.

    site: the stored description of the input, the same for all these linears.
    learned: names of `Distillation` settings that are on; only "clips" and "column_scales" matter here.
    dtype: compute dtype of matrix products.
    device: device of the parameters.
    """

    def __init__(self, site: SiteInput, learned: Collection[str], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._site, self._dtype = site, dtype
        scheme, scales = site.activation, site.column_scale
        learns_clip = "clips" in learned and scheme is not None and can_clip(scheme)
        self.share = nn.Parameter(torch.zeros((), device=device), requires_grad=learns_clip)
        # Relative changes δ of the column scales.
        self.scale_change: nn.Parameter | None = None
        if scales is not None:
            start = torch.zeros_like(scales, dtype=torch.float32)
            self.scale_change = nn.Parameter(start, requires_grad="column_scales" in learned)
        self._x: Tensor | None = None
        self._entered: tuple[Tensor, Tensor] | None = None

    @property
    def scheme(self) -> ActivationScheme | None:
        """The activation scheme with the learned clip; None if inputs are not quantized."""
        scheme = self._site.activation
        return None if scheme is None else with_share(scheme, self.share.detach())

    @property
    def column_scale(self) -> Tensor | None:
        """Learned column scales (k,) float32, rounded to the stored dtype; None if there are none."""
        scales = self._site.column_scale
        return (
            None
            if scales is None or self.scale_change is None
            else stored_factor(scales, self.scale_change, scales.dtype)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Transform x (..., k) into the input basis: (t, k) float32, unquantized and quantized.

        Computed once for all linears that share it.
        """
        if self._x is not x or self._entered is None:
            site = replace(self._site, column_scale=self.column_scale)
            tokens = site_input.enter(x, site).flatten(0, -2).float()
            self._x, self._entered = x, (tokens, self.quantized(tokens))
        return self._entered

    def quantized(self, tokens: Tensor) -> Tensor:
        """Quantize and dequantize tokens (t, k) float32; returns the compute dtype."""
        scheme = self._site.activation
        if scheme is None:
            return tokens.to(self._dtype)
        return clipped(tokens, self.share, scheme).to(self._dtype)

    def between(self, inner: Tensor) -> Tensor:
        """Quantize and dequantize the tensor (t, r) between the two factors of a low-rank branch."""
        scheme = self.scheme
        if scheme is None:
            return inner
        # The branch's inner channels have no outliers among them.
        inner_scheme = scheme.without_outliers
        return straight_through(inner, activations.quantize_values(inner.detach(), inner_scheme))

    def forget(self) -> None:
        """Drop the cached input."""
        self._x = self._entered = None

    def learned(self, name: str) -> dict[str, list[Learned]]:
        """Learned parameters by the setting that enables them.

        name: the name of one of the linears, used in messages.
        """
        spaces: dict[str, list[Learned]] = {"clips": [], "column_scales": []}
        if self.share.requires_grad:
            spaces["clips"].append(Learned(f"{name}.activation.clip", self.share))
        if self.scale_change is not None and self.scale_change.requires_grad:
            spaces["column_scales"].append(Learned(f"{name}.column_scale", self.scale_change))
        return spaces

    def stored(self) -> dict[str, Tensor]:
        """Learned column scales in their stored dtype, by their name in each of the linears."""
        scales, old = self.column_scale, self._site.column_scale
        if scales is None or old is None or self.scale_change is None or not self.scale_change.requires_grad:
            return {}
        return {"column_scale": scales.detach().to(old.dtype)}

    def bound_(self) -> None:
        """Clamp learned parameters to their valid range."""
        scheme = self._site.activation
        if scheme is not None:
            bound_(self.share, scheme)
        if self.scale_change is not None:
            with torch.no_grad():
                self.scale_change.clamp_(min=SMALLEST_SHARE)


class StudentLinear(nn.Module):
    """A packed linear with learned parameters: `ops.linear` with gradients.

    linear: the stored linear, (m, k).
    entrance: its input, shared with the site's other readers.
    learned: names of `Distillation` settings that are on.
    """

    def __init__(self, linear: Linear, entrance: Entrance, learned: Collection[str]) -> None:
        super().__init__()
        self._linear = linear
        # The tuple hides the module from torch: several linears share it and none may register it as a submodule.
        self._entrance = (entrance,)
        matrices = matrices_of(linear.weight)
        self._prefixes = tuple(matrices)
        self.matrices = nn.ModuleDict(
            {name.rstrip(".") or "weight": LearnedMatrix(matrix, learned) for name, matrix in matrices.items()}
        )
        self.out_features, self.in_features = linear.weight.main.shape

    @property
    def entrance(self) -> Entrance:
        """The input, shared with the site's other readers."""
        return self._entrance[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., k) to (..., m), in x's dtype."""
        weight, entrance = self._linear.weight, self.entrance
        unquantized, quantized = entrance(x)
        y = self._times("weight", quantized)
        if weight.salient is not None:
            rank = weight.salient.shape[1]
            y = y + self._times("salient", quantized[:, :rank])
            if self._linear.input.requantized:
                remainder = entrance.quantized(unquantized[:, :rank] - quantized[:, :rank].float())
                y = y + self._times("salient", remainder)
        if weight.low_rank is not None:
            inner = entrance.between(self._times("down", quantized))
            y = y + self._times("up", inner.to(quantized.dtype))
        if weight.bias is not None:
            y = y + weight.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])

    def _times(self, matrix: str, x: Tensor) -> Tensor:
        """The product x wᵀ with the matrix named `matrix`, float32."""
        product: Tensor = self.matrices[matrix](x)
        return product.float()

    def learned(self, name: str) -> dict[str, list[Learned]]:
        """Learned parameters of the matrices, by the setting that enables them.

        name: the linear's name, used in messages.
        """
        spaces: dict[str, list[Learned]] = {}
        for prefix, matrix in self._learned_matrices.items():
            for space, parameters in matrix.learned(f"{name}.{prefix}").items():
                spaces.setdefault(space, []).extend(parameters)
        return spaces

    def stored(self) -> Mapping[str, Tensor]:
        """Learned tensors in their stored dtype, by their names in the linear."""
        tensors = self.entrance.stored()
        for prefix, matrix in self._learned_matrices.items():
            tensors |= {f"{prefix}{name}": tensor for name, tensor in matrix.stored().items()}
        return tensors

    def bound_(self) -> None:
        """Clamp learned parameters of the matrices to their valid range."""
        for matrix in self._learned_matrices.values():
            matrix.bound_()

    @property
    def _learned_matrices(self) -> dict[str, LearnedMatrix]:
        """The matrices by the prefix of their stored names."""
        learned = {}
        for prefix, matrix in zip(self._prefixes, self.matrices.values(), strict=True):
            assert isinstance(matrix, LearnedMatrix)
            learned[prefix] = matrix
        return learned
