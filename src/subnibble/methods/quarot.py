"""QuaRot (Ashkboos et al., arXiv 2404.00456): every linear reads a rotated input, weights by GPTQ.

The residual stream is rotated offline by a randomized Hadamard matrix (`rotation = "full"`; "groups" where the width
has none), values offline by one a head (`value_rotation`), the inputs of o_proj and down_proj online, and queries and
keys online behind rotary positions, where the KV cache is coded (`kv_bits`; keys and values in groups of a head, clip
0.95). Deviations: attention's output is transformed online as one vector, where the paper transforms across heads;
values have random signs besides, without which the two would cancel within heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from subnibble.methods.method import Method, Steps
from subnibble.methods.weights import WeightOptions, rounder_of


@dataclass(frozen=True)
class Options(WeightOptions):
    """value_rotation: `transforms/rotate_values.py`. The others as in `methods/weights.py`, with other defaults."""

    rounding: str = "gptq"
    rotation: str = "full"
    value_rotation: str = "hadamard"


def build(options: Options) -> Steps:
    """Steps of QuaRot."""
    return Steps(
        rounder=rounder_of(options),
        rotation=options.rotation,
        online=("attention_out", "mlp_hidden"),
        inputs=options.inputs,
        value_rotation=options.value_rotation,
        cache={"key_rotation": "hadamard", "clip": 0.95},
    )


QUAROT = Method("quarot", "all inputs rotated, offline and online", "arXiv 2404.00456", Options, build)
