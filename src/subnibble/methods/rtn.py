"""RTN: round to nearest. The floor that every other method is measured against."""

from __future__ import annotations

from dataclasses import dataclass

from subnibble.methods.method import Method, Steps
from subnibble.rounding.grid import Clip
from subnibble.rounding.rtn import RTN as Rounder


@dataclass(frozen=True)
class Options:
    """clip, clip_power: see `rounding/grid.py`; rotation: `transforms/rotate.py`."""

    clip: str = "mse"
    clip_power: float = 2.0
    rotation: str = "none"


def build(options: Options) -> Steps:
    """Steps of RTN."""
    return Steps(rounder=Rounder(Clip(options.clip, options.clip_power)), rotation=options.rotation)


RTN = Method("rtn", "round to nearest; needs no data", "baseline", Options, build)
