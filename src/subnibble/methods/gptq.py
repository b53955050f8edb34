"""GPTQ (Frantar et al., arXiv 2210.17323) with group-aware column order (Gafni et al., arXiv 2505.14638) by default.

`order = "natural"` is the published form. Each linear's inputs come from the model as quantized so far.
"""

from __future__ import annotations

from dataclasses import dataclass

from subnibble.methods.method import Method, Steps
from subnibble.rounding.gptq import GPTQ as Rounder
from subnibble.rounding.grid import Clip


@dataclass(frozen=True)
class Options:
    """Options of GPTQ.

    clip, clip_power, rotation: see `methods/weights.py`.
    damping, order, weighting, sweeps: see `rounding/gptq.py`.
    """

    clip: str = "mse"
    clip_power: float = 2.0
    damping: float = 0.01
    order: str = "gar"
    weighting: str = "none"
    sweeps: int = 0
    rotation: str = "none"


def build(options: Options) -> Steps:
    """Compose GPTQ's steps."""
    return Steps(rounder=rounder(options), rotation=options.rotation)


def rounder(options: Options) -> Rounder:
    """Build GPTQ's rounder; GPTAQ adds an asymmetry to it."""
    return Rounder(
        Clip(options.clip, options.clip_power),
        damping=options.damping,
        order=options.order,
        weighting=options.weighting,
        sweeps=options.sweeps,
    )


GPTQ = Method("gptq", "round column by column with error compensation", "arXiv 2210.17323", Options, build)
