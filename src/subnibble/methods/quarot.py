"""QuaRot (Ashkboos et al., arXiv 2404.00456): every linear reads a rotated input, weights by GPTQ.

The residual stream is rotated offline by a randomized Hadamard matrix (`rotation = "full"`; "groups" where the width
has none), and the inputs of o_proj and down_proj online. Attention's output is transformed as one vector, which is what
the paper's per-head factor (in v_proj) and across-head factor (online) make together, where the number of heads has a
Hadamard matrix. Queries, keys and the cache come with the KV cache's own schemes.
"""

from __future__ import annotations

from dataclasses import dataclass

from subnibble.methods.method import Method, Steps
from subnibble.methods.weights import WeightOptions, rounder_of


@dataclass(frozen=True)
class Options(WeightOptions):
    """As `methods/weights.py`, with other defaults."""

    rounding: str = "gptq"
    rotation: str = "full"


def build(options: Options) -> Steps:
    """Steps of QuaRot."""
    return Steps(
        rounder=rounder_of(options),
        rotation=options.rotation,
        online=("attention_out", "mlp_hidden"),
        inputs=options.inputs,
    )


QUAROT = Method("quarot", "all inputs rotated, offline and online", "arXiv 2404.00456", Options, build)
