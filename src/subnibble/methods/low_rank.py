"""L2QER (Zhang et al., arXiv 2402.02446) and QERA (Zhang et al., arXiv 2410.06040): low-rank rounding-error terms.

Weights are rounded to nearest. A (rank, k) and B (m, rank) are a scaled SVD of the rounding error and are quantized to
`factor_bits`, 8 by default. SERQ's paper uses 8 with 8-bit activations and 4 with 4-bit activations. Deviations: the
recipe's integer groups, where L2QER has MXINT blocks; the mean magnitude of an input is the mean over all tokens, not
the largest of the batch means.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from subnibble.corrections.low_rank import LowRank
from subnibble.methods.method import Method, Steps
from subnibble.methods.weights import WeightOptions, rounder_of


@dataclass(frozen=True)
class Options(WeightOptions):
    """Options of L2QER and QERA; those not listed are described in `methods/weights.py`.

    rank: rank of the factors.
    factor_bits: bit width of the factors.
    """

    rank: int = 64
    factor_bits: int = 8


def build(options: Options, form: str) -> Steps:
    """Compose the steps of either method. form: "l2qer" or "qera", see `corrections/low_rank.py`."""
    return Steps(
        rounder=rounder_of(options, options.order),
        rotation=options.rotation,
        correction=LowRank(options.rank, form, options.factor_bits),
        inputs=options.inputs,
    )


L2QER = Method(
    "l2qer",
    "low-rank rounding-error term, weighted by mean activations",
    "arXiv 2402.02446",
    Options,
    partial(build, form="l2qer"),
)
QERA = Method(
    "qera",
    "low-rank rounding-error term with the least output error",
    "arXiv 2410.06040",
    Options,
    partial(build, form="qera"),
)
