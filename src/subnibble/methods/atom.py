"""Atom (Zhao et al., arXiv 2310.19102): channels ordered by energy, the strongest at 8 bits, the others at low bits.

Channels of each site are sorted by rising energy, the diagonal of the Gram matrix; the last `outliers` channels keep
8 bits in weights and inputs. Weights are symmetric, rounded by GPTQ on quantized inputs, in the recipe's groups. The
KV cache's keys are quantized before rotary positions. For 4-bit inputs, the shipped recipe has the paper's symmetric
grid with clip 0.9. As in the released program, channel orders after norms and after attention are gathers at run time.

Deviations from the released program:
- Weight ranges are searched ("mse"); there the clip is the constant 0.85.
- Each row has its own scales; there two adjacent rows share one.
- Sites are rounded one after the other, each on inputs that earlier rounding has changed; there the seven linears of a
  block are rounded at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from subnibble.corrections.outliers import OutlierColumns
from subnibble.methods.method import Method, Steps
from subnibble.methods.weights import WeightOptions, rounder_of, symmetric
from subnibble.transforms.saliency import Saliency


@dataclass(frozen=True)
class Options(WeightOptions):
    """Options of Atom; those not listed are described in `methods/weights.py`, some defaults differ.

    outliers: number of channels at 8 bits.
    """

    rounding: str = "gptq"
    inputs: str = "quantized"
    outliers: int = 128


def build(options: Options) -> Steps:
    """Compose Atom's steps."""
    return Steps(
        rounder=rounder_of(options, options.order),
        prefers=symmetric,
        rotation=options.rotation,
        saliency=Saliency("energy", direction="rising"),
        correction=OutlierColumns(options.outliers),
        inputs=options.inputs,
        cache=keys_before_rope,
    )


def keys_before_rope(bits: int) -> Mapping[str, Any]:
    """Cache preference: quantize keys before rotary positions are applied."""
    return {"rope": "before"}


ATOM = Method(
    "atom", "strongest channels by energy at 8 bits, the others at low bits", "arXiv 2310.19102", Options, build
)
