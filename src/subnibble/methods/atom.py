"""Atom (Zhao et al., arXiv 2310.19102): channels ordered by energy, the strongest at 8 bits, the rest in groups.

Channels of each site are put in rising order of their energy, the diagonal of the Gram matrix; the last `outliers` of
them keep 8 bits, in weights and inputs. Weights are symmetric, by GPTQ on inputs that are quantized, with the recipe's
groups; the cache's keys are coded before rotary positions. Of its settings for 4 bits the shipped recipe has symmetric
inputs of clip 0.9. Deviations: ranges of weights are searched ("mse") where the program has the constant 0.85; each row
has scales of its own, where two neighbours share one; linears are rounded one site after the other, on what was rounded
before, where a block's seven go at once; the order behind attention and norms is a gather, as there.
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
    """outliers: channels at 8 bits. The others as in `methods/weights.py`, with other defaults."""

    rounding: str = "gptq"
    inputs: str = "quantized"
    outliers: int = 128


def build(options: Options) -> Steps:
    """Steps of Atom."""
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
    """Keys coded without positions."""
    return {"rope": "before"}


ATOM = Method("atom", "channels by energy, the strongest at 8 bits", "arXiv 2310.19102", Options, build)
