"""AWQ (Lin et al., arXiv 2306.00978): activation-aware scaling of channels, then round to nearest.

Deviation: the paper searches clipped ranges by output error. Here the common clip search does it, with columns weighted
by the second moments of their inputs, which is a diagonal approximation of the output error.
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
    """Options of AWQ; those not listed are described in `methods/rtn.py`.

    weighting: weights of columns in the clip search, see `rounding/rtn.py`.
    """

    weighting: str = "hessian"


def build(options: Options) -> Steps:
    """Compose AWQ's steps: activation-aware scaling, then the steps of RTN."""
    steps = rtn.build(options)
    rounder = RTN(Clip(options.clip, options.clip_power), options.weighting)
    return replace(steps, rounder=rounder, transforms=(ActivationAwareScale(),))


AWQ = Method("awq", "scale channels by their activations, then round to nearest", "arXiv 2306.00978", Options, build)
