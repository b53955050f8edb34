"""GPTAQ (Li et al., arXiv 2504.02692): match the output that full-precision inputs would give. Three forms.

With x the inputs of the quantized model, x~ those of the full-precision one, H = sum x xᵀ and R = sum (x~ - x) xᵀ,
GPTAQ minimises ||W x~ - Q x||², GPTQ ||W x - Q x||². When column j is rounded, later columns k > j take over its part
of the input difference:

    W_k += alpha w_j P_jk,   P = triu(R Uᵀ, 1) U          (GPTAQ, their equation for P; H⁻¹ = Uᵀ U)

    `released`   the authors' program: w_j is the compensated weight inside a block, the rounded weight across blocks
    `corrected`  the paper's algorithm: w_j is the compensated weight everywhere
    `shifted`    the exact loss: move the weights to W* below once, then round them with plain GPTQ

    ||W x~ - Q x||² = tr[(W* - Q) H (W* - Q)ᵀ] + const     W* = W (H + R) H⁻¹; with alpha, W* = W + alpha W R H⁻¹

The `released` form exists because the program reads a buffer after overwriting it. With alpha = 0 every form is GPTQ.
H is damped both in U and in the inverse, so R = 0 changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from subnibble.errors import BadRecipe

FORMS = ("none", "released", "corrected", "shifted")


@dataclass(frozen=True)
class Asymmetry:
    """Form and strength of GPTAQ's correction.

    form: one of `FORMS`; "none" is plain GPTQ.
    alpha: strength of GPTAQ's correction, from 0 to 1: 0.25 in GPTAQ's released program, 1 for the exact loss.
    """

    form: str = "none"
    alpha: float = 0.25

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise BadRecipe(f"asymmetry is {self.form!r}; choose one of {', '.join(FORMS)}")
        if not 0 <= self.alpha <= 1:
            raise BadRecipe(f"alpha of GPTAQ is {self.alpha!r}; give a number from 0 to 1")


@dataclass(frozen=True)
class Push:
    """GPTAQ's correction for one linear.

    drift: R (k, k), in visiting order.
    asymmetry: form and strength.

    In the methods, w is (k, m): columns of the linear are rows. u: (k, k), upper factor of the damped H's inverse.
    """

    drift: Tensor
    asymmetry: Asymmetry

    def propagation(self, u: Tensor) -> Tensor:
        """The matrix alpha P (k, k), strictly upper triangular."""
        return (self.drift @ u.T).triu(1) @ u * self.asymmetry.alpha

    def shifted(self, w: Tensor, u: Tensor) -> Tensor:
        """W* = W + alpha W R (H + damping)⁻¹, transposed: (k, m)."""
        return w + u.T @ (u @ (self.drift.T @ w)) * self.asymmetry.alpha


@dataclass(frozen=True)
class Spread:
    """Adds alpha w_j P_jk to later columns, inside the column loop and after each block.

    A dead column (input always 0) is rounded to 0, but its full-precision input need not be 0: its w_j is the weight
    before rounding. The `released` form uses 0, as the released program does.

    source: (k, m), the w_j; starts as the weights before the loop.
    p: (k, k), alpha P.
    dead: (k,) bool.
    form: "released" or "corrected"; see the module.
    """

    source: Tensor
    p: Tensor
    dead: Tensor
    form: str

    def take_(self, w: Tensor, j: int) -> None:
        """Set w_j to column j of `w`, before the loop rounds it. Dead columns keep their first w_j."""
        if not self.dead[j]:
            self.source[j] = w[j]

    def inside_(self, w: Tensor, j: int, end: int) -> None:
        """Update columns `j .. end` of `w` for column j."""
        w[j:end].addr_(self.p[j, j:end], self.source[j])

    def behind_(self, w: Tensor, start: int, end: int) -> None:
        """Update the columns after the block `start .. end`, whose rows of `w` hold rounded weights by now."""
        source = self.source[start:end]
        if self.form == "released":
            source = w[start:end].masked_fill(self.dead[start:end].unsqueeze(1), 0)
        w[end:].addmm_(self.p[start:end, end:].T, source)
