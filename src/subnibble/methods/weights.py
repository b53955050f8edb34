"""Options of weight rounding, to nearest or by GPTQ, for methods that also quantize activations."""

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
    """Options of weight rounding.

    rounding: "rtn" rounds weights to nearest, "gptq" with error compensation.
    clip: how weight ranges are chosen, see `rounding/grid.py`.
    clip_power: exponent of the error that the clip search minimises.
    damping, weighting: see `rounding/gptq.py`.
    inputs: see `methods/method.py`.
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
    """Rounding options plus column order and rotation.

    order: see `rounding/gptq.py`.
    rotation: rotation of the residual stream, see `transforms/rotate.py`.
    """

    order: str = "natural"
    rotation: str = "none"


def symmetric(site: str, bits: int) -> Mapping[str, str]:
    """Grid preference: symmetric weights, without zero-points."""
    return {"zero_point": "none"}


def rounder_of(options: RoundingOptions, order: str = "natural") -> Rounder:
    """Build the rounder for `options`. order: order in which GPTQ rounds columns."""
    clip = Clip(options.clip, options.clip_power)
    if options.rounding == "rtn":
        return RTN(clip, options.weighting)
    return GPTQ(clip, damping=options.damping, order=order, weighting=options.weighting)
