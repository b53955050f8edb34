"""OmniQuant (Shao et al., arXiv 2308.13137): learned clipping and learned equivalent transformation, round to nearest.

Uses two of the parameter spaces that `bisup` tunes: ranges of each row and group, and smoothing factors that keep the
function, both learned block by block. Deviations: queries and keys have no factors, nor has down_proj, as in the
released program for Llama; ranges start at the result of the clip search instead of 98 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from subnibble.arch.site import Role
from subnibble.methods.method import Method, Steps
from subnibble.rounding.rtn import RTN
from subnibble.tuning.tuning import Tuning


@dataclass(frozen=True)
class Options:
    """Options of OmniQuant.

    effort: see `tuning/tuning.py`.
    """

    effort: str = "default"


def build(options: Options) -> Steps:
    """Compose OmniQuant's steps."""
    tuning = Tuning(smoothing="hard", low_rank="none", effort=options.effort, unsmoothed=(Role.MLP_HIDDEN,))
    return Steps(rounder=RTN(), tuning=tuning, inputs="quantized")


OMNIQUANT = Method(
    "omniquant", "learned clipping and smoothing, then round to nearest", "arXiv 2308.13137", Options, build
)
