"""AWQ (Lin et al., arXiv 2306.00978): activation-aware scaling of channels, then round to nearest."""

from __future__ import annotations

from dataclasses import dataclass

from subnibble.methods.method import Method, Steps
from subnibble.rounding.grid import Clip
from subnibble.rounding.rtn import RTN as Rounder
from subnibble.transforms.awq import ActivationAwareScale


@dataclass(frozen=True)
class Options:
    """clip, clip_power: see `rounding/grid.py`; rotation: `transforms/rotate.py`."""

    clip: str = "mse"
    clip_power: float = 2.0
    rotation: str = "none"


def build(options: Options) -> Steps:
    """Steps of AWQ."""
    return Steps(
        rounder=Rounder(Clip(options.clip, options.clip_power)),
        transforms=(ActivationAwareScale(),),
        rotation=options.rotation,
    )


AWQ = Method("awq", "channels scaled by their activations, then nearest", "arXiv 2306.00978", Options, build)
