"""D2Quant (arXiv 2602.02546): dual-scale quantizer on down-projections, mean-shift correction in norms, with GPTAQ.

`d2quant` does what the authors' program does by default:
- the residual stream is rotated by groups;
- weights are rounded by GPTAQ (alpha 0.25) in group-aware order;
- the linears that read the MLP's hidden channels use `DualScale`: version R (sign bases, unweighted) at 2 and 3 bits,
  version P at 4 bits, where version R does not exist. With `grid = "uniform"` they use version P at any bit width, as
  in the paper's text;
- the other linears use a clipped grid with integer zero-points;
- DAC (the mean-shift correction) is applied to all channels.

Deviations: the column scale is absorbed by the up-projection's stored scales, which the paper shows and the program
omits; with group sizes other than 128, columns are indexed inside their own group; embeddings keep their mean; each
group's rotation draws its own signs, while the program uses one block for all groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from subnibble.arch.site import Role
from subnibble.errors import BadRecipe
from subnibble.methods.method import Method, Steps
from subnibble.rounding.dual_scale import DualScale, RowScale
from subnibble.rounding.gptaq import Asymmetry
from subnibble.rounding.gptq import GPTQ as Rounder
from subnibble.rounding.grid import Clip
from subnibble.rounding.levels import Fitter

# Which linears get column scales: none, those that read the MLP's hidden channels, all.
COLUMNS = ("none", "down", "all")
ROWS = ("clip", "refit")
_DOWN = Role.MLP_HIDDEN


@dataclass(frozen=True)
class Options:
    """Options of D2Quant.

    columns: which linears get column scales: "none", "down" (readers of the MLP's hidden channels) or "all".
    rows: how grids without column scales are fitted: "clip" (clip search) or "refit" (alternating least squares).
    iterations: steps of the alternating fit.
    mean_shift: see `corrections/mean_shift.py`.
    weighting, sweeps, order, damping: see `rounding/gptq.py`.
    asymmetry, alpha: see `rounding/gptaq.py`.
    clip, clip_power, rotation: see `methods/weights.py`.
    """

    columns: str = "down"
    rows: str = "clip"
    iterations: int = 15
    weighting: str = "none"
    mean_shift: str = "published"
    asymmetry: str = "released"
    alpha: float = 0.25
    sweeps: int = 0
    order: str = "gar"
    damping: float = 0.01
    clip: str = "mse"
    clip_power: float = 2.4
    rotation: str = "groups"

    def __post_init__(self) -> None:
        if self.columns not in COLUMNS:
            raise BadRecipe(f"columns is {self.columns!r}; choose one of {', '.join(COLUMNS)}")
        if self.rows not in ROWS:
            raise BadRecipe(f"rows is {self.rows!r}; choose one of {', '.join(ROWS)}")


def released_grid(site: str, bits: int) -> Mapping[str, str]:
    """Grid preference: sign bases where the authors' program uses them, on down-projections at 2 and 3 bits."""
    return {"grid": "sign"} if site == _DOWN and bits in (2, 3) else {}


def build(options: Options, prefers: Callable[[str, int], Mapping[str, str]]) -> Steps:
    """Compose D2Quant's steps.

    prefers: the grid preference, see `Preference` in `methods/method.py`.
    """
    clip = Clip(options.clip, options.clip_power)
    dual = DualScale(clip, options.iterations)
    single = RowScale(clip, options.iterations) if options.rows == "refit" else clip

    def rounder(fitter: Fitter) -> Rounder:
        return Rounder(
            fitter,
            damping=options.damping,
            order=options.order,
            weighting=options.weighting,
            asymmetry=Asymmetry(options.asymmetry, options.alpha),
            sweeps=options.sweeps,
        )

    return Steps(
        rounder=rounder(dual if options.columns == "all" else single),
        rounders={_DOWN: rounder(dual)} if options.columns == "down" else {},
        prefers=prefers,
        rotation=options.rotation,
        mean_shift=options.mean_shift,
    )


D2QUANT = Method(
    "d2quant",
    "column scales on down-projections, sign-basis grids, norm biases",
    "arXiv 2602.02546",
    Options,
    partial(build, prefers=released_grid),
)
