"""d2quant-plus: D2Quant's column scales on every linear, real zero-points, rounded towards full-precision outputs.

What the ablation (docs/results.md) found to pay of D2Quant's parts, each in its strongest form:

- column scales everywhere (`DualScale`, version P), not on down-projections alone: norms and the up- and
  value-projections absorb them; only an output projection under grouped-query attention stores its own;
- a real zero-point, so that no level is forced to 0: better than sign bases at the same bits at 2 bits, cheaper at 3;
- fits weighted by the Hessian's diagonal;
- GPTAQ's loss exactly (`shifted`, half-way: alpha 0.5), in group-aware order;
- the residual stream rotated by groups.

Not in it: the mean shift in norms, and coordinate descent (`sweeps`), which lowered the calibration text's error more
than other text's. Both are options. Side data is a scale and a zero-point of 16 bits a group, 0.11 bits a weight more
than GPTQ's in groups of 128.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from subnibble.methods.d2quant import Options as D2QuantOptions
from subnibble.methods.d2quant import build
from subnibble.methods.method import Method


@dataclass(frozen=True)
class Options(D2QuantOptions):
    """As `methods/d2quant.py`, with other defaults."""

    columns: str = "all"
    rows: str = "refit"
    iterations: int = 10
    weighting: str = "hessian"
    mean_shift: str = "none"
    asymmetry: str = "shifted"
    alpha: float = 0.5
    clip_power: float = 2.0
    rotation: str = "groups"


def real_zero(site: str, bits: int) -> Mapping[str, str]:
    """A stored real zero-point: a grid that need not have a level at 0."""
    return {"zero_point": "real"}


D2QUANT_PLUS = Method(
    "d2quant-plus",
    "column scales and real zero-points on all linears",
    "this project, after arXiv 2602.02546 and 2504.02692",
    Options,
    partial(build, prefers=real_zero),
)
