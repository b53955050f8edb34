"""GPTAQ (Li et al., arXiv 2504.02692): round towards the output on full-precision inputs, in three forms.

With x the inputs of the quantized model, x~ those of the full-precision one, H = sum x xᵀ and R = sum (x~ - x) xᵀ,
the loss ||W x~ - Q x||² asks for more than GPTQ's ||W x - Q x||². As column j is rounded, its share of the input
difference is handed to the columns behind it,

    W_k += alpha w_j P_jk,   P = triu(R Uᵀ, 1) U          (GPTAQ, their equation for P; H⁻¹ = Uᵀ U)

    `released`   their program: w_j is the compensated weight inside a block, across blocks the rounded one.
    `corrected`  their paper's algorithm: w_j is the compensated weight everywhere.
    `shifted`    the loss exactly: the weights are moved to W* below once, then plain GPTQ rounds them.

    ||W x~ - Q x||² = tr[(W* - Q) H (W* - Q)ᵀ] + const     W* = W (H + R) H⁻¹, with alpha W + alpha W R H⁻¹

The released program reads its buffer after it was overwritten; hence its form. alpha = 0 makes all of them GPTQ. With
damping, H is damped in U and in the inverse, so R = 0 changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from subnibble.errors import BadRecipe

FORMS = ("none", "released", "corrected", "shifted")


@dataclass(frozen=True)
class Asymmetry:
    """Which form, and how much of it: alpha is 0.25 in GPTAQ's released program, 1 in the exact loss."""

    form: str = "none"
    alpha: float = 0.25

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise BadRecipe(f"asymmetry is {self.form!r}; choose one of {', '.join(FORMS)}")
        if not 0 <= self.alpha <= 1:
            raise BadRecipe(f"alpha is {self.alpha!r}; give a number from 0 to 1")


@dataclass(frozen=True)
class Push:
    """What moves weights towards full-precision inputs. drift: R (k, k) in visiting order.

    Weights w are (k, m) here, columns of the linear as rows. u: (k, k), upper factor of the damped H's inverse.
    """

    drift: Tensor
    asymmetry: Asymmetry

    def propagation(self, u: Tensor) -> Tensor:
        """The matrix alpha P (k, k), strictly upper."""
        return (self.drift @ u.T).triu(1) @ u * self.asymmetry.alpha

    def shifted(self, w: Tensor, u: Tensor) -> Tensor:
        """W + alpha W R (H + damping)⁻¹, transposed like w."""
        return w + u.T @ (u @ (self.drift.T @ w)) * self.asymmetry.alpha


@dataclass(frozen=True)
class Spread:
    """Hands each column's share on, in the loop over columns and behind each block.

    A dead column (never fed) is rounded as 0, but its full-precision input still wants its weight, which is what is
    handed on; `released` takes it for 0, as its program does.

    source: (k, m), the weights before rounding; p: alpha P; dead: (k,) bool. form: see the module.
    """

    source: Tensor
    p: Tensor
    dead: Tensor
    form: str

    def take_(self, w: Tensor, j: int) -> None:
        """Note column j as it is before it is rounded."""
        if not self.dead[j]:
            self.source[j] = w[j]

    def inside_(self, w: Tensor, j: int, end: int) -> None:
        """Push the columns behind j, up to `end`."""
        w[j:end].addr_(self.p[j, j:end], self.source[j])

    def behind_(self, w: Tensor, start: int, end: int) -> None:
        """Push the columns behind the block `start .. end`, whose rows of w hold rounded weights by now."""
        source = self.source[start:end]
        if self.form == "released":
            source = w[start:end].masked_fill(self.dead[start:end].unsqueeze(1), 0)
        w[end:].addmm_(self.p[start:end, end:].T, source)
