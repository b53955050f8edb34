"""How weights are rounded by the methods that treat activations as well: to nearest, or by GPTQ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from subnibble.errors import BadRecipe
from subnibble.rounding.gptq import GPTQ
from subnibble.rounding.grid import Clip
from subnibble.rounding.rounder import Rounder
from subnibble.rounding.rtn import RTN

ROUNDINGS = ("rtn", "gptq")


@dataclass(frozen=True)
class RoundingOptions:
    """rounding: "rtn" or "gptq". clip, clip_power: `rounding/grid.py`; damping, weighting: `rounding/gptq.py`,
    `rounding/rtn.py`; inputs: `methods/method.py`.
    """

    rounding: str = "rtn"
    clip: str = "mse"
    clip_power: float = 2.0
    damping: float = 0.01
    weighting: str = "none"
    inputs: str = "exact"

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise BadRecipe(f"rounding is {self.rounding!r}; choose one of {', '.join(ROUNDINGS)}")


@dataclass(frozen=True)
class WeightOptions(RoundingOptions):
    """order: of columns, `rounding/order.py`; rotation: `transforms/rotate.py`. The others as above."""

    order: str = "natural"
    rotation: str = "none"


def symmetric(site: str, bits: int) -> Mapping[str, str]:
    """The wish for weights without zero-points; see `Preference`."""
    return {"zero_point": "none"}


def rounder_of(options: RoundingOptions, order: str = "natural") -> Rounder:
    """The rounder that options ask for. order: in which GPTQ visits columns."""
    clip = Clip(options.clip, options.clip_power)
    if options.rounding == "rtn":
        return RTN(clip, options.weighting)
    return GPTQ(clip, damping=options.damping, order=order, weighting=options.weighting)
