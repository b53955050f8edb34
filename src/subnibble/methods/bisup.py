"""BiSup (Zou et al., arXiv 2405.15346), reconstructed: error that piles up is tuned away, over another method.

Of the paper, abstract and summaries were at hand, no equation: what is built is a reading of "appropriate parameter
spaces" (fine-grained clipping, soft-constrained smoothing, stabilized low-rank compensation, `tuning/`) in OmniQuant's
block-wise scheme, and results are to be called "BiSup (reconstructed)". Vertical: each block is tuned on the quantized
chain's inputs towards the full-precision chain's outputs; then its linears are rounded on the learned ranges with error
compensation, or to nearest where that leaves less held-out loss. Horizontal: the recipe's `system_prompt`, whose keys
and values stay at 16 bits, is before every window while a block is tuned as it is at run time.

The paper's are Atom and QuaRot below. Over SERQ, or twinfit, salient channels have a second weight where Atom's have 8
bits and a branch would be beside all: learned smoothing stands for their static flattening, ranges are learned of what
the second weight leaves, and its own are not searched, since it is made anew at every step.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from subnibble.corrections.salient import SalientColumns
from subnibble.errors import BadRecipe
from subnibble.methods import atom, quarot, serq, twinfit
from subnibble.methods.method import Method, Steps
from subnibble.rounding.grid import Clip
from subnibble.transforms.rotate import ROTATIONS
from subnibble.tuning.tuning import Tuning

BASES: dict[str, Any] = {"atom": atom, "quarot": quarot, "serq": serq, "twinfit": twinfit}
_SALIENT = ("serq", "twinfit")
# An option of some bases alone, by its name here and there.
_COUNTS = {"outliers": ("outliers", ("atom",)), "salient": ("rank", _SALIENT)}


@dataclass(frozen=True)
class Options:
    """Settings beside the base's own.

    over: the method below, a name in BASES.
    clipping, input_clipping, smoothing, low_rank, low_rank_start, low_rank_rate, rank, effort, penalty, anchor,
        learned_rotation: see `tuning/tuning.py`.
    rotation: of the residual stream, "method" for the base's own; SERQ and twinfit have none.
    outliers: Atom's.
    salient: channels, SERQ's and twinfit's.
    """

    over: str = "quarot"
    clipping: str = "group"
    input_clipping: str = "none"
    smoothing: str = "soft"
    low_rank: str = "merge"
    low_rank_start: str = "zero"
    low_rank_rate: float = 1e-3
    rank: int = 32
    effort: str = "default"
    penalty: float = 0.01
    anchor: float = 0.0
    learned_rotation: str = "none"
    rotation: str = "method"
    outliers: int = 128
    salient: int = 128

    def __post_init__(self) -> None:
        if self.over not in BASES:
            raise BadRecipe(f"over is {self.over!r}; choose one of {', '.join(BASES)}")
        if self.rotation not in ("method", *ROTATIONS):
            raise BadRecipe(f"rotation is {self.rotation!r}; choose one of method, {', '.join(ROTATIONS)}")
        if self.rotation != "method" and self.over in _SALIENT:
            raise BadRecipe(
                f"rotation is {self.rotation!r} and over is {self.over!r}; it acts over atom or quarot alone"
            )
        for name, (_, bases) in _COUNTS.items():
            count = getattr(self, name)
            if self.over not in bases and count != getattr(Options, name):
                raise BadRecipe(f"{name} is {count} and over is {self.over!r}; it acts over {' or '.join(bases)} alone")
        if self.salient < 1:
            raise BadRecipe(f"salient is {self.salient}; give a positive number of channels")


def build(options: Options) -> Steps:
    """Steps of the base, with tuning."""
    base = BASES[options.over]
    own: dict[str, Any] = {"inputs": "quantized"}
    if options.rotation != "method":
        own["rotation"] = options.rotation
    own |= {there: getattr(options, name) for name, (there, bases) in _COUNTS.items() if options.over in bases}
    if options.over in _SALIENT:
        own |= {"flattening": "none", "clip": "mse"}
    learned = {item.name: getattr(options, item.name) for item in fields(Tuning) if hasattr(options, item.name)}
    steps: Steps = base.build(base.Options(**own))
    if isinstance(steps.correction, SalientColumns):
        steps = replace(steps, correction=replace(steps.correction, fitter=Clip("minmax")))
    return replace(steps, tuning=Tuning(**learned))


BISUP = Method("bisup", "blocks tuned over another method", "arXiv 2405.15346, reconstructed", Options, build)
