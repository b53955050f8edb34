"""GPTAQ (Li et al., arXiv 2504.02692): GPTQ towards the outputs that the full-precision model has on its own inputs.

`asymmetry = "released"` with alpha 0.25 is what its program does, quirk included; `rounding/gptaq.py` has the others.
"""

from __future__ import annotations

from dataclasses import dataclass

from subnibble.methods.method import Method, Steps
from subnibble.rounding.gptaq import Asymmetry
from subnibble.rounding.gptq import GPTQ as Rounder
from subnibble.rounding.grid import Clip


@dataclass(frozen=True)
class Options:
    """As `methods/gptq.py`; asymmetry, alpha: see `rounding/gptaq.py`."""

    asymmetry: str = "released"
    alpha: float = 0.25
    clip: str = "mse"
    clip_power: float = 2.0
    damping: float = 0.01
    order: str = "gar"
    weighting: str = "none"
    sweeps: int = 0
    rotation: str = "none"


def build(options: Options) -> Steps:
    """Steps of GPTAQ."""
    rounder = Rounder(
        Clip(options.clip, options.clip_power),
        damping=options.damping,
        order=options.order,
        weighting=options.weighting,
        asymmetry=Asymmetry(options.asymmetry, options.alpha),
        sweeps=options.sweeps,
    )
    return Steps(rounder=rounder, rotation=options.rotation)


GPTAQ = Method("gptaq", "GPTQ towards full-precision outputs", "arXiv 2504.02692", Options, build)
