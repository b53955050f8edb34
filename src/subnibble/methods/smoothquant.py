"""SmoothQuant (Xiao et al., arXiv 2211.10438): activation outliers move into weights behind norms, alpha 0.5.

Weights and activations take the recipe's bits and groups; the paper has 8 bits. `rounding = "gptq"` is beyond it, and
so is the clip search, weighted by the inputs' second moments: unweighted, it would cut off the scaled-up columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from subnibble.methods.method import Method, Steps
from subnibble.methods.weights import WeightOptions, rounder_of
from subnibble.transforms.flatten import NormFlatten


@dataclass(frozen=True)
class Options(WeightOptions):
    """alpha: see `transforms/flatten.py`; the others as in `methods/weights.py`."""

    alpha: float = 0.5
    weighting: str = "hessian"


def build(options: Options) -> Steps:
    """Steps of SmoothQuant."""
    return Steps(
        rounder=rounder_of(options, options.order),
        transforms=(NormFlatten(options.alpha, 1 - options.alpha),),
        rotation=options.rotation,
        inputs=options.inputs,
    )


SMOOTHQUANT = Method("smoothquant", "activation outliers moved into weights", "arXiv 2211.10438", Options, build)
