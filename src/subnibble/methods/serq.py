"""SERQ (arXiv 2603.08185): flattened activations, a second weight for salient channels, offline channel orders.

The three stages are a transform (`transforms/flatten.py`), a correction (`corrections/salient.py`) and a channel order
(`transforms/saliency.py`). `serq` is the paper's form with GPTQ: channels are divided by their largest activation and
sorted by it in falling order, the first 128 are salient, the second matrix holds their coarse weight (appendix A.3 and
the released program), and grids are symmetric without a range search. With `rounding = "rtn"` it is the form of the
paper's section 4 if the salient channels fill whole groups.

Deviations:
- Factors and orders are computed on the model whose earlier blocks are quantized, not on the original.
- Heads that share a key-value head use the larger of their factors.
- Factors are folded into weights, and orders are folded or gathered at run time; the released program divides and
  gathers at run time in every linear.
- Grid ranges may be searched (`clip = "mse"`).
- A symmetric 4-bit grid has scale max|w| / 7.5 and levels -8 .. 7; the program has max|w| / 7.
- An input's range always contains 0, so that its zero-point is one of the codes; its scale is a bfloat16 number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from subnibble.calibrate.stream import SiteStatistics
from subnibble.corrections.correction import NOTHING, Correction, RoundMain
from subnibble.corrections.salient import SalientColumns
from subnibble.errors import BadRecipe
from subnibble.methods.method import Method, Steps
from subnibble.methods.weights import RoundingOptions, rounder_of, symmetric
from subnibble.rounding.grid import Clip
from subnibble.rounding.rtn import RTN
from subnibble.runtime import site_input
from subnibble.tensor.linear import SiteInput
from subnibble.transforms.flatten import Flatten, Loss, SearchedFlatten
from subnibble.transforms.saliency import SCORES, Saliency
from subnibble.transforms.transform import Transform

FLATTENINGS = ("none", "powers", "search")
SALIENCIES = ("none", *SCORES)


@dataclass(frozen=True)
class Options(RoundingOptions):
    """Options of SERQ; those not listed are described in `methods/weights.py`.

    weighting: weighting of the grid fits of the main matrix; grids of the second matrix are fitted without weights.
    rank: number of salient channels, 0 for none.
    residual: whether salient inputs are quantized twice, see `corrections/salient.py`.
    flattening: "none"; "powers" uses `alpha` and `beta` at all sites; "search" searches both for each site, see
        `transforms/flatten.py`. The search rounds to nearest and orders channels by magnitude with `rank` salient ones,
        regardless of `rounding`, `saliency` and `permutation`.
    alpha: exponent of the activations' magnitude in flattening.
    beta: exponent of the weights' magnitude in flattening.
    saliency: the score that orders channels, see `transforms/saliency.py`, or "none", allowed only without salient
        channels.
    permutation: "gather" lets linears gather their channels at run time; "offline" moves all channels in the weights,
        see `transforms/saliency.py`.
    """

    rounding: str = "gptq"
    clip: str = "minmax"
    rank: int = 128
    residual: str = "none"
    flattening: str = "powers"
    alpha: float = 1.0
    beta: float = 0.0
    saliency: str = "size"
    permutation: str = "gather"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0:
            raise BadRecipe(f"rank is {self.rank}; give a number of salient channels, 0 for none")
        if self.rank == 0 and self.residual != "none":
            raise BadRecipe(f'residual is {self.residual!r} but rank is 0; set rank > 0, or residual = "none"')
        if self.flattening not in FLATTENINGS:
            raise BadRecipe(f"flattening is {self.flattening!r}; choose one of {', '.join(FLATTENINGS)}")
        if self.saliency not in SALIENCIES:
            raise BadRecipe(f"saliency is {self.saliency!r}; choose one of {', '.join(SALIENCIES)}")
        if self.saliency == "none" and (self.rank, self.permutation) != (0, "gather"):
            raise BadRecipe(
                f'saliency is "none" with rank {self.rank} and permutation {self.permutation!r}; without a channel '
                "order, set rank = 0 and leave permutation out"
            )


def build(options: Options) -> Steps:
    """Compose SERQ's steps."""
    fitter = Clip(options.clip, options.clip_power)
    correction = SalientColumns(options.rank, fitter, options.residual) if options.rank else NOTHING
    return Steps(
        rounder=rounder_of(options),
        transforms=_flattening(options, correction),
        prefers=symmetric,
        saliency=None if options.saliency == "none" else Saliency(options.saliency, options.permutation),
        correction=correction,
        inputs=options.inputs,
    )


def _flattening(options: Options, correction: Correction) -> tuple[Transform, ...]:
    match options.flattening:
        case "none":
            return ()
        case "powers":
            return (Flatten(options.alpha, options.beta),)
    nearest = RTN(Clip(options.clip, options.clip_power), options.weighting)
    return (SearchedFlatten(_QuantizedError(nearest, correction)),)


@dataclass(frozen=True)
class _QuantizedError:
    """Squared output error with quantized inputs and weights rounded to nearest, salient columns with two weights."""

    rounder: RTN
    correction: Correction

    def __call__(self, statistics: SiteStatistics) -> Loss:
        """Return the error as a function of a linear's name, weight (m, k) and tokens (t, k)."""
        return partial(self._error, statistics)

    def _error(self, statistics: SiteStatistics, name: str, weight: Tensor, tokens: Tensor) -> float:
        scheme, activation = statistics.schemes[name], statistics.activations[name]
        assert scheme is not None
        round_main = RoundMain(self.rounder, scheme, name)
        _, main, salient = self.correction.round(weight, tokens.T @ tokens, scheme, round_main)
        dense = main.dequantize()
        if salient is not None:
            dense[:, : salient.num_columns] += salient.dequantize()
        site = SiteInput(activation=activation, requantized=self.correction.requantized)
        quantized = site_input.apply(tokens, site).values()
        return float((quantized @ dense.T - tokens @ weight.T).square().sum())


SERQ = Method("serq", "flattened activations, a second weight for salient channels", "arXiv 2603.08185", Options, build)
