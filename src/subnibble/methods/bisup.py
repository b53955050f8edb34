"""BiSup (Zou et al., arXiv 2405.15346), reconstructed: error that piles up is tuned away, over Atom or over QuaRot.

Of the paper, abstract and summaries were at hand, no equation: what is built is a reading of "appropriate parameter
spaces" (fine-grained clipping, soft-constrained smoothing, stabilized low-rank compensation, `tuning/`) in OmniQuant's
block-wise scheme, and results are to be called "BiSup (reconstructed)". Vertical: each block is tuned on the quantized
chain's inputs towards the full-precision chain's outputs; then its linears are rounded on the learned ranges with error
compensation, or to nearest where that leaves less held-out loss. Horizontal: the recipe's `system_prompt`, whose keys
and values stay at 16 bits, is before every window while a block is tuned as it is at run time.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from subnibble.errors import BadRecipe
from subnibble.methods import atom, quarot
from subnibble.methods.method import Method, Steps
from subnibble.tuning.tuning import Tuning

BASES: dict[str, Any] = {"atom": atom, "quarot": quarot}


@dataclass(frozen=True)
class Options:
    """over: the method below, "atom" or "quarot". clipping, input_clipping, smoothing, low_rank, rank, effort,
    penalty: see `tuning/tuning.py`. asymmetry, alpha_drift: of the rounding at the end, see `rounding/gptaq.py`.
    rotation: of the residual stream, "method" for the base's own. outliers: Atom's.
    """

    over: str = "quarot"
    clipping: str = "group"
    input_clipping: str = "none"
    smoothing: str = "soft"
    low_rank: str = "merge"
    rank: int = 32
    effort: str = "default"
    penalty: float = 0.01
    asymmetry: str = "none"
    alpha_drift: float = 0.5
    rotation: str = "method"
    outliers: int = 128

    def __post_init__(self) -> None:
        if self.over not in BASES:
            raise BadRecipe(f"over is {self.over!r}; choose one of {', '.join(BASES)}")
        if self.over != "atom" and self.outliers != Options.outliers:
            raise BadRecipe(f"outliers is {self.outliers} and over is {self.over!r}; outlier channels are Atom's")


def build(options: Options) -> Steps:
    """Steps of the base, with tuning."""
    base = BASES[options.over]
    own = {"inputs": "quantized", "asymmetry": options.asymmetry, "alpha_drift": options.alpha_drift}
    if options.rotation != "method":
        own["rotation"] = options.rotation
    if options.over == "atom":
        own["outliers"] = options.outliers
    learned = {item.name: getattr(options, item.name) for item in fields(Tuning) if hasattr(options, item.name)}
    steps: Steps = base.build(base.Options(**own))
    return replace(steps, tuning=Tuning(**learned))


BISUP = Method("bisup", "blocks tuned over Atom or QuaRot", "arXiv 2405.15346, reconstructed", Options, build)
