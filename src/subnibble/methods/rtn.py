"""RTN: round to nearest. The baseline for every other method."""

from __future__ import annotations

from dataclasses import dataclass

from subnibble.methods.method import Method, Steps
from subnibble.rounding.grid import Clip
from subnibble.rounding.rtn import RTN as Rounder


@dataclass(frozen=True)
class Options:
    """Options of RTN.

    clip, clip_power, rotation: see `methods/weights.py`.
    """

    clip: str = "mse"
    clip_power: float = 2.0
    rotation: str = "none"


def build(options: Options) -> Steps:
    """Compose RTN's steps."""
    return Steps(rounder=Rounder(Clip(options.clip, options.clip_power)), rotation=options.rotation)


RTN = Method("rtn", "round to nearest; needs no calibration data", "baseline", Options, build)
