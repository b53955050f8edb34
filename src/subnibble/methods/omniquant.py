"""OmniQuant (Shao et al., arXiv 2308.13137): learned clipping and learned equivalent transformation, to nearest.

A composition of what `bisup` tunes: ranges of each row and group, and factors that keep the function, both block by
block. Deviations: factors of queries and keys are left out, and so is, as in the released program for Llama, that of
down_proj; ranges start at the clip search's instead of 98 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from subnibble.arch.site import Role
from subnibble.methods.method import Method, Steps
from subnibble.rounding.rtn import RTN
from subnibble.tuning.tuning import Tuning


@dataclass(frozen=True)
class Options:
    """effort: see `tuning/tuning.py`."""

    effort: str = "default"


def build(options: Options) -> Steps:
    """Steps of OmniQuant."""
    tuning = Tuning(smoothing="hard", low_rank="none", effort=options.effort, unsmoothed=(Role.MLP_HIDDEN,))
    return Steps(rounder=RTN(), tuning=tuning, inputs="quantized")


OMNIQUANT = Method("omniquant", "learned clipping and smoothing", "arXiv 2308.13137", Options, build)
