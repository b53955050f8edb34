"""SERQ (arXiv 2603.08185): flattened activations, error of salient channels in one low-rank matrix, offline orders.

The three stages are a transform (`transforms/flatten.py`), a correction (`corrections/salient.py`) and a channel order
(`transforms/saliency.py`). `serq` is the paper's form with GPTQ: factors are the largest activations, channels in their
falling order, 128 of them salient, the coarse weight in the second matrix (appendix A.3 and the released program), a
symmetric grid whose range is not searched for. `rounding = "rtn"` is the form of its section 4 where the salient set
fills whole groups. Deviations: factors and orders are those of the model as quantized up to the block, not of the
original; heads that share a key-value head take the larger factor; factors and orders are folded or gathered where the
released program divides and gathers online in every linear; the recipe's grids may be searched (`clip = "mse"`). Grids
are this project's: a symmetric 4-bit one has the scale max|w| / 7.5 and levels -8 .. 7 where the program has max|w| /
7; an input's range always contains 0, so that its zero-point is a code, and its scale is a bfloat16 number.
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
    """SERQ's own settings; the others as in `methods/weights.py`. weighting: of the main matrix, the second one's grids
    are fitted without.

    rank: salient channels, 0 for none.
    residual: `corrections/salient.py`.
    flattening: "none"; "powers" for alpha and beta everywhere; "search" for each site's own, see
        `transforms/flatten.py`: the search rounds to nearest and takes channels in the order of their sizes, `rank` of
        them salient, whatever rounding, saliency and permutation say.
    saliency: `transforms/saliency.py`; "none", too, where there are no salient channels.
    permutation: "gather" lets linears gather their channels, "offline" moves all channels in the weights, see
        `transforms/saliency.py`.
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
            raise BadRecipe(f'rank is 0 and residual {self.residual!r}; give salient channels, or residual = "none"')
        if self.flattening not in FLATTENINGS:
            raise BadRecipe(f"flattening is {self.flattening!r}; choose one of {', '.join(FLATTENINGS)}")
        if self.saliency not in SALIENCIES:
            raise BadRecipe(f"saliency is {self.saliency!r}; choose one of {', '.join(SALIENCIES)}")
        if self.saliency == "none" and (self.rank, self.permutation) != (0, "gather"):
            raise BadRecipe(
                f'saliency is "none", rank {self.rank} and permutation {self.permutation!r}; without an order use '
                "rank = 0 and leave permutation out"
            )


def build(options: Options) -> Steps:
    """Steps of SERQ."""
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
    """Squared output error with weights rounded to nearest, salient columns twice, and inputs quantized."""

    rounder: RTN
    correction: Correction

    def __call__(self, found: SiteStatistics) -> Loss:
        """The error as a function of a linear's name, weight (m, k) and tokens (t, k)."""
        return partial(self._error, found)

    def _error(self, found: SiteStatistics, name: str, weight: Tensor, tokens: Tensor) -> float:
        scheme, activation = found.schemes[name], found.activations[name]
        assert scheme is not None
        round_main = RoundMain(self.rounder, scheme, name)
        _, main, salient = self.correction.round(weight, tokens.T @ tokens, scheme, round_main)
        dense = main.dequantize()
        if salient is not None:
            dense[:, : salient.columns] += salient.dequantize()
        own = SiteInput(activation=activation, repeated=self.correction.repeated)
        seen = site_input.apply(tokens, own).values()
        return float((seen @ dense.T - tokens @ weight.T).square().sum())


SERQ = Method("serq", "flattened activations, salient channels twice", "arXiv 2603.08185", Options, build)
