"""BiSup (Zou et al., arXiv 2405.15346), reconstructed: error that piles up is tuned away, over another method.

Of the paper, abstract and summaries were at hand, no equation: what is built is a reading of "appropriate parameter
spaces" (fine-grained clipping, soft-constrained smoothing, stabilized low-rank compensation, `tuning/`) in OmniQuant's
block-wise scheme, and results are to be called "BiSup (reconstructed)". Vertical: each block is tuned on the quantized
chain's inputs towards the full-precision chain's outputs; then its linears are rounded on the learned ranges with error
compensation, or to nearest where that leaves less held-out loss. Horizontal: the recipe's `system_prompt`, whose keys
and values stay at 16 bits, is before every window while a block is tuned as it is at run time.

The steps are those of the paper's two bases, Atom and QuaRot, on quantized inputs, with `tuning` added. Blocks of any
other method can be tuned in the same way, if its steps go with tuning (`methods/method.py`).
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
    """Settings beside the base's own.

    over: the method below, a name in BASES.
    clipping, input_clipping, smoothing, low_rank, low_rank_rate, rank, effort, penalty: see `tuning/tuning.py`.
    outliers: Atom's.
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
            raise BadRecipe(f"outliers is {self.outliers} and over is {self.over!r}; it acts over atom alone")


def build(options: Options) -> Steps:
    """Steps of the base, with tuning."""
    own = {"outliers": options.outliers} if options.over == ATOM.name else {}
    learned = {item.name: getattr(options, item.name) for item in fields(Tuning) if hasattr(options, item.name)}
    return replace(BASES[options.over].steps(own), inputs="quantized", tuning=Tuning(**learned))


BISUP = Method("bisup", "blocks tuned over another method", "arXiv 2405.15346, reconstructed", Options, build)
