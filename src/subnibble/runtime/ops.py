"""The operations of a running packed model, each with one name.

These are the plain torch references that every faster kernel must agree with. They hold no dense copy of a weight
beyond the call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subnibble.runtime import activations
from subnibble.runtime.integer import multiply_add_
from subnibble.runtime.precision import as_written
from subnibble.runtime.site_input import Entered, SiteInput
from subnibble.tensor import hadamard
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.packed import PackedTensor

# What meets the remainder of the salient channels' quantized inputs: nothing, or their second weight.
RESIDUALS = ("none", "salient")


@dataclass(frozen=True)
class LinearTerms:
    """All that a running linear may contain, in the order in which an input meets it.

    weight: packed (m, k). bias: (m,) or None. column_scale: (k,) that multiplies the input, or None. gather: (k,)
    integers, input channel gather[j] becomes channel j, or None. blocks: widths of an online block-diagonal Hadamard
    transform, () for none. activation: how the input is quantized, None for not at all. salient: packed (m, r), a
    second weight of the first r channels as they are after the steps above (SERQ's extra K columns), or None.
    residual: "salient" quantizes what is left of these r channels once more and multiplies it with `salient`, too;
    "none" does not. low_rank: packed down (q, k) and up (m, q), or None: a branch `up · Q(down · x)` on the quantized
    input.
    """

    weight: PackedTensor
    bias: Tensor | None = None
    column_scale: Tensor | None = None
    gather: Tensor | None = None
    blocks: tuple[int, ...] = ()
    activation: ActivationScheme | None = None
    salient: PackedTensor | None = None
    residual: str = "none"
    low_rank: tuple[PackedTensor, PackedTensor] | None = None

    @property
    def input(self) -> SiteInput:
        """What becomes of the input before it is multiplied."""
        repeated = 0 if self.salient is None or self.residual == "none" else self.salient.shape[1]
        return SiteInput(self.column_scale, self.gather, self.blocks, self.activation, repeated)

    @property
    def matrices(self) -> dict[str, PackedTensor]:
        """Every packed matrix by the prefix of its stored names."""
        down, up = self.low_rank or (None, None)
        named = {"": self.weight, "salient.": self.salient, "down.": down, "up.": up}
        return {prefix: matrix for prefix, matrix in named.items() if matrix is not None}

    @property
    def stored_bits(self) -> int:
        """All bits of the packed matrices."""
        return sum(matrix.stored_bits for matrix in self.matrices.values())

    def rows(self, index: Tensor) -> LinearTerms:
        """The outputs at `index` (1-D integer tensor), still packed."""
        return replace(
            self,
            weight=self.weight.rows(index),
            bias=None if self.bias is None else self.bias[index],
            salient=None if self.salient is None else self.salient.rows(index),
            low_rank=None if self.low_rank is None else (self.low_rank[0], self.low_rank[1].rows(index)),
        )


def linear(x: Tensor, terms: LinearTerms) -> Tensor:
    """Apply a linear. x: (..., k). Result (..., m), x's dtype; see `LinearTerms`."""
    return product(x, terms.input.apply(x), terms)


def product(x: Tensor, made: Entered, terms: LinearTerms) -> Tensor:
    """The product with what was made of x (..., k). Result (..., m), x's dtype."""
    if made.quantized is None:
        assert made.tokens is not None
        y = torch.nn.functional.linear(made.tokens, dense(terms).to(x.dtype), terms.bias)
        if terms.low_rank is not None:
            down, up = terms.low_rank
            inner = torch.nn.functional.linear(made.tokens, down.dequantize(x.dtype))
            y = y + torch.nn.functional.linear(inner, up.dequantize(x.dtype))
        return y.view(*x.shape[:-1], y.shape[1])
    with as_written(x.device):
        y = _integer(made.quantized, made.rest, terms)
    if terms.bias is not None:
        y += terms.bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])


def embedding(ids: Tensor, weight: PackedTensor, dtype: torch.dtype) -> Tensor:
    """Rows of a packed table; `IndexError` for an id it does not have, negative ones included, as `nn.Embedding`.

    ids: any shape, integer. weight: packed (n, d). Result (*ids.shape, d) in `dtype`.
    """
    return weight.rows(ids.reshape(-1)).dequantize(dtype).view(*ids.shape, weight.shape[1])


def dense(terms: LinearTerms) -> Tensor:
    """The weight (m, k) float32 that inputs meet behind column scale, gather and transform, low-rank branch aside."""
    weight = terms.weight.dequantize()
    if terms.salient is not None:
        weight[:, : terms.salient.shape[1]] += terms.salient.dequantize()
    return weight


def dense_from_input(terms: LinearTerms) -> Tensor:
    """The weight (m, k) float32 that inputs meet as they come, all terms included."""
    weight = dense(terms)
    if terms.low_rank is not None:
        down, up = terms.low_rank
        weight += up.dequantize() @ down.dequantize()
    if terms.blocks:
        weight = hadamard.multiply_transposed(weight, terms.blocks)
    if terms.gather is not None:
        weight = torch.empty_like(weight).index_copy_(1, terms.gather.long(), weight)
    return weight if terms.column_scale is None else weight * terms.column_scale.float()


def _integer(x: activations.Quantized, rest: activations.Quantized | None, terms: LinearTerms) -> Tensor:
    """Whole numbers (t, k) to (t, m) float32. rest: of the salient channels, or None."""
    tokens, device = x.numbers.shape[0], x.numbers.device
    y = torch.zeros(tokens, terms.weight.shape[0], dtype=torch.float32, device=device)
    multiply_add_(y, x, terms.weight)
    if terms.salient is not None:
        multiply_add_(y, x, terms.salient)
        if rest is not None:
            multiply_add_(y, rest, terms.salient)
    if terms.low_rank is not None:
        down, up = terms.low_rank
        inner = torch.zeros(tokens, down.shape[0], dtype=torch.float32, device=device)
        multiply_add_(inner, x, down)
        assert terms.activation is not None
        # Between the factors there are no outlier channels.
        multiply_add_(y, activations.quantize(inner, terms.activation.without_outliers), up)
    return y
