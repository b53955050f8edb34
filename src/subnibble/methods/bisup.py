"""BiSup (Zou et al., arXiv 2405.15346), reconstructed: block tuning against accumulated error, over a base method.

Only the paper's abstract and summaries were available, no equations. This is our reading of its "appropriate parameter
spaces" (fine-grained clipping, soft-constrained smoothing, stabilized low-rank compensation, see `tuning/`) in
OmniQuant's block-wise scheme. Report results as "BiSup (reconstructed)".

Vertical (error over layers): each block is tuned so that, on the inputs that the quantized model gives it, its outputs
match those of the full-precision model. Then its linears are rounded on the learned ranges with error compensation, or
to nearest if that gives a lower held-out loss. Horizontal (error over tokens): the recipe's `system_prompt`, whose keys
and values stay at 16 bits, comes before every window during tuning, as it does at run time.

The steps are those of one of the paper's two bases, Atom or QuaRot, on quantized inputs, plus `tuning`. Blocks of any
other method can be tuned in the same way if its steps are compatible with tuning (`methods/method.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from subnibble.errors import BadRecipe
from subnibble.methods.atom import ATOM
from subnibble.methods.method import Method, Steps
from subnibble.methods.quarot import QUAROT
from subnibble.tuning.tuning import Tuning

BASES = {method.name: method for method in (ATOM, QUAROT)}


@dataclass(frozen=True)
class Options:
    """Options of BiSup; the base method's other options keep their defaults.

    over: the base method.
    clipping, input_clipping, smoothing, low_rank, low_rank_rate, rank, effort, penalty: see `tuning/tuning.py`.
    outliers: number of channels at 8 bits, if the base is Atom.
    """

    over: str = "quarot"
    clipping: str = "group"
    input_clipping: str = "none"
    smoothing: str = "soft"
    low_rank: str = "merge"
    low_rank_rate: float = 1e-3
    rank: int = 32
    effort: str = "default"
    penalty: float = 0.01
    outliers: int = 128

    def __post_init__(self) -> None:
        if self.over not in BASES:
            raise BadRecipe(f"over is {self.over!r}; choose one of {', '.join(BASES)}")
        if self.over != ATOM.name and self.outliers != Options.outliers:
            raise BadRecipe(
                f'outliers is {self.outliers} but over is {self.over!r}; set over = "atom" or leave outliers out'
            )


def build(options: Options) -> Steps:
    """Compose the base method's steps with tuning."""
    base_options = {"outliers": options.outliers} if options.over == ATOM.name else {}
    settings = {item.name: getattr(options, item.name) for item in fields(Tuning) if hasattr(options, item.name)}
    return replace(BASES[options.over].steps(base_options), inputs="quantized", tuning=Tuning(**settings))


BISUP = Method("bisup", "block tuning on top of another method", "arXiv 2405.15346, reconstructed", Options, build)
