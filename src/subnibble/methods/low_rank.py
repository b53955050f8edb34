"""L2QER (Zhang et al., arXiv 2402.02446) and QERA (Zhang et al., arXiv 2410.06040): rounding error in two factors.

Weights are rounded to nearest; A (rank, k) and B (m, rank) hold a scaled SVD of what is lost and are coded at
`factor_bits`, 8 unless set. SERQ's paper has 8 beside 8-bit activations and 4 beside 4-bit ones. Deviations: integer
groups as the recipe's, where L2QER has MXINT blocks; the mean size of an input is taken over all tokens, not the
largest of batch means.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from subnibble.corrections.low_rank import LowRank
from subnibble.methods.method import Method, Steps
from subnibble.methods.weights import WeightOptions, rounder_of


@dataclass(frozen=True)
class Options(WeightOptions):
    """rank: of the factors. factor_bits: of their codes. The others as in `methods/weights.py`."""

    rank: int = 64
    factor_bits: int = 8


def build(options: Options, form: str) -> Steps:
    """Steps of either method."""
    return Steps(
        rounder=rounder_of(options, options.order),
        rotation=options.rotation,
        correction=LowRank(options.rank, form, options.factor_bits),
        inputs=options.inputs,
    )


L2QER = Method(
    "l2qer",
    "rounding error in two factors, by mean activations",
    "arXiv 2402.02446",
    Options,
    partial(build, form="l2qer"),
)
QERA = Method(
    "qera",
    "rounding error in two factors, least output error",
    "arXiv 2410.06040",
    Options,
    partial(build, form="qera"),
)
