"""AWQ (Lin et al., arXiv 2306.00978): activation-aware scaling of channels, then round to nearest as RTN does."""

from __future__ import annotations

from dataclasses import replace

from subnibble.methods import rtn
from subnibble.methods.method import Method, Steps
from subnibble.transforms.awq import ActivationAwareScale


def build(options: rtn.Options) -> Steps:
    """Steps of AWQ: RTN's, after the scaling."""
    return replace(rtn.build(options), transforms=(ActivationAwareScale(),))


AWQ = Method("awq", "channels scaled by their activations, then nearest", "arXiv 2306.00978", rtn.Options, build)
