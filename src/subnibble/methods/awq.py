"""AWQ (Lin et al., arXiv 2306.00978): activation-aware scaling of channels, then round to nearest.

The paper's search for clipped ranges by output error is the common clip search here, columns weighted by their inputs'
second moments: a diagonal model of the output error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from subnibble.methods import rtn
from subnibble.methods.method import Method, Steps
from subnibble.rounding.grid import Clip
from subnibble.rounding.rtn import RTN
from subnibble.transforms.awq import ActivationAwareScale


@dataclass(frozen=True)
class Options(rtn.Options):
    """As `methods/rtn.py`; weighting: see `rounding/rtn.py`."""

    weighting: str = "hessian"


def build(options: Options) -> Steps:
    """Steps of AWQ: RTN's, after the scaling."""
    steps = rtn.build(options)
    rounder = RTN(Clip(options.clip, options.clip_power), options.weighting)
    return replace(steps, rounder=rounder, transforms=(ActivationAwareScale(),))


AWQ = Method("awq", "channels scaled by their activations, then nearest", "arXiv 2306.00978", Options, build)
