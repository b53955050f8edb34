"""QuaRot (Ashkboos et al., arXiv 2404.00456): every linear reads a rotated input; weights are rounded by GPTQ.

| rotated tensor | when | how |
|---|---|---|
| residual stream | offline | randomized Hadamard matrix (`rotation = "full"`; "groups" if the width has none) |
| values | offline | a Hadamard matrix per head (`value_rotation`) |
| inputs of o_proj and down_proj | online | Hadamard transform |
| queries and keys | online, after rotary positions | Hadamard transform, if the KV cache is quantized (`kv_bits`) |

Keys and values are quantized in groups of one head, with clip 0.95 up to 4 bits.

Deviations: attention's output is transformed online as one vector, while the paper transforms across heads; the value
rotation has random signs, without which it and the online transform would cancel within heads; inputs keep their whole
range unless the recipe says `activation_clip = 0.9`, which the released program uses on symmetric grids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from subnibble.arch.site import Role
from subnibble.methods.method import Method, Steps
from subnibble.methods.weights import WeightOptions, rounder_of

# Above this bit width clipping loses more than its finer steps gain.
_FEW_BITS = 4


@dataclass(frozen=True)
class Options(WeightOptions):
    """Options of QuaRot; those not listed are described in `methods/weights.py`, some defaults differ.

    value_rotation: rotation of each head's values, see `transforms/rotate_values.py`.
    """

    rounding: str = "gptq"
    rotation: str = "full"
    value_rotation: str = "hadamard"


def build(options: Options) -> Steps:
    """Compose QuaRot's steps."""
    return Steps(
        rounder=rounder_of(options, options.order),
        rotation=options.rotation,
        online=(Role.ATTENTION_OUT, Role.MLP_HIDDEN),
        inputs=options.inputs,
        value_rotation=options.value_rotation,
        cache=rotated_keys,
    )


def rotated_keys(bits: int) -> Mapping[str, Any]:
    """Cache preference: rotated queries and keys; ranges clipped at 4 bits and below."""
    return {"key_rotation": "hadamard", "clip": 0.95 if bits <= _FEW_BITS else 1.0}


QUAROT = Method("quarot", "rotate the inputs of all linears, offline and online", "arXiv 2404.00456", Options, build)
