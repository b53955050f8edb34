"""GPTAQ (Li et al., arXiv 2504.02692): GPTQ towards the full-precision model's outputs on full-precision inputs.

`asymmetry = "released"` with alpha 0.25 does what the released program does, quirk included; `rounding/gptaq.py`
describes the other forms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from subnibble.methods.gptq import Options as GptqOptions
from subnibble.methods.gptq import rounder
from subnibble.methods.method import Method, Steps
from subnibble.rounding.gptaq import Asymmetry


@dataclass(frozen=True)
class Options(GptqOptions):
    """Options of GPTAQ; those not listed are described in `methods/gptq.py`.

    asymmetry, alpha: see `rounding/gptaq.py`.
    """

    asymmetry: str = "released"
    alpha: float = 0.25


def build(options: Options) -> Steps:
    """Compose GPTAQ's steps."""
    asymmetry = Asymmetry(options.asymmetry, options.alpha)
    return Steps(rounder=replace(rounder(options), asymmetry=asymmetry), rotation=options.rotation)


GPTAQ = Method("gptaq", "GPTQ towards full-precision outputs", "arXiv 2504.02692", Options, build)
