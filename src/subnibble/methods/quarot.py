"""QuaRot (Ashkboos et al., arXiv 2404.00456): every linear reads a rotated input, weights by GPTQ.

The residual stream is rotated offline by a randomized Hadamard matrix (`rotation = "full"`; "groups" where the width
has none), values offline by one a head (`value_rotation`), the inputs of o_proj and down_proj online, and queries and
keys online behind rotary positions, where the KV cache is coded (`kv_bits`; keys and values in groups of a head, clip
0.95 up to 4 bits). Deviations: attention's output is transformed online as one vector, where the paper transforms
across heads; values have random signs besides, without which the two would cancel within heads; inputs keep their whole
range unless the recipe says `activation_clip = 0.9`, which its program has on symmetric grids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from subnibble.arch.site import Role
from subnibble.methods.method import Method, Steps
from subnibble.methods.weights import WeightOptions, rounder_of

# At 8 bits what a clip cuts off is more than what finer steps save.
_FEW_BITS = 4


@dataclass(frozen=True)
class Options(WeightOptions):
    """value_rotation: `transforms/rotate_values.py`. The others as in `methods/weights.py`, with other defaults."""

    rounding: str = "gptq"
    rotation: str = "full"
    value_rotation: str = "hadamard"


def build(options: Options) -> Steps:
    """Steps of QuaRot."""
    return Steps(
        rounder=rounder_of(options, options.order),
        rotation=options.rotation,
        online=(Role.ATTENTION_OUT, Role.MLP_HIDDEN),
        inputs=options.inputs,
        value_rotation=options.value_rotation,
        cache=rotated_keys,
    )


def rotated_keys(bits: int) -> Mapping[str, Any]:
    """Keys turned as queries are; ranges clipped where codes are few."""
    return {"key_rotation": "hadamard", "clip": 0.95 if bits <= _FEW_BITS else 1.0}


QUAROT = Method("quarot", "all inputs rotated, offline and online", "arXiv 2404.00456", Options, build)
