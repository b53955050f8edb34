"""How weights are rounded by the methods that treat activations as well: to nearest, or by GPTQ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from subnibble.errors import BadRecipe
from subnibble.rounding.gptaq import Asymmetry
from subnibble.rounding.gptq import GPTQ
from subnibble.rounding.grid import Clip
from subnibble.rounding.rounder import Rounder
from subnibble.rounding.rtn import RTN

ROUNDINGS = ("rtn", "gptq")


@dataclass(frozen=True)
class WeightOptions:
    """rounding: "rtn" or "gptq". clip, clip_power: `rounding/grid.py`; damping, order, weighting: `rounding/gptq.py`,
    `rounding/rtn.py`; asymmetry, alpha_drift: form and alpha of `rounding/gptaq.py`; rotation: `transforms/rotate.py`;
    inputs: `methods/method.py`.
    """

    rounding: str = "rtn"
    clip: str = "mse"
    clip_power: float = 2.0
    damping: float = 0.01
    order: str = "natural"
    weighting: str = "none"
    asymmetry: str = "none"
    alpha_drift: float = 0.5
    rotation: str = "none"
    inputs: str = "exact"

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise BadRecipe(f"rounding is {self.rounding!r}; choose one of {', '.join(ROUNDINGS)}")
        if self.rounding == "rtn" and self.asymmetry != "none":
            raise BadRecipe(f'asymmetry {self.asymmetry!r} needs rounding = "gptq"; found "rtn"')


def symmetric(site: str, bits: int) -> Mapping[str, str]:
    """The wish for weights without zero-points; see `Preference`."""
    return {"zero_point": "none"}


def rounder_of(options: WeightOptions) -> Rounder:
    """The rounder that options ask for."""
    clip = Clip(options.clip, options.clip_power)
    if options.rounding == "rtn":
        return RTN(clip, options.weighting)
    asymmetry = Asymmetry(options.asymmetry, options.alpha_drift)
    return GPTQ(clip, damping=options.damping, order=options.order, weighting=options.weighting, asymmetry=asymmetry)
