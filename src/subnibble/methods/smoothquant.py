"""SmoothQuant (Xiao et al., arXiv 2211.10438): move activation outliers after norms into the weights, alpha 0.5.

Weights and activations have the recipe's bits and groups; the paper has 8 bits. Two options are not in the paper:
`rounding = "gptq"`, and the clip search, which is weighted by the inputs' second moments because without weights it
would clip the scaled-up columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from subnibble.methods.method import Method, Steps
from subnibble.methods.weights import WeightOptions, rounder_of
from subnibble.transforms.flatten import NormFlatten


@dataclass(frozen=True)
class Options(WeightOptions):
    """Options of SmoothQuant; those not listed are described in `methods/weights.py`.

    alpha: exponent of the activations' magnitude, 1 - alpha that of the weights', see `transforms/flatten.py`.
    """

    alpha: float = 0.5
    weighting: str = "hessian"


def build(options: Options) -> Steps:
    """Compose SmoothQuant's steps."""
    return Steps(
        rounder=rounder_of(options, options.order),
        transforms=(NormFlatten(options.alpha, 1 - options.alpha),),
        rotation=options.rotation,
        inputs=options.inputs,
    )


SMOOTHQUANT = Method("smoothquant", "move activation outliers into weights", "arXiv 2211.10438", Options, build)
