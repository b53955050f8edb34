"""How a packed model is tuned as a whole, towards the original's predictions (`train.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from subnibble.errors import BadRecipe
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.scheme import E8M0, Scheme, known_fields
from subnibble.tuning.input_clip import can_clip

# What can be learned, by the names of the settings that say whether it is.
SPACES = ("scales", "zero_points", "column_scales", "norms", "norm_biases", "clips")


def learnable(
    weights: Iterable[Scheme], inputs: Iterable[ActivationScheme | None], column_scales: bool, norm_biases: bool
) -> frozenset[str]:
    """Those of `SPACES` that a packed model has.

    weights: how matrices are coded. inputs: how linears' inputs are, None for not at all. column_scales, norm_biases:
    whether any is stored.
    """
    quantized = list(weights)
    there = {
        "scales": any(scheme.scale_type != E8M0 for scheme in quantized),
        "zero_points": any(scheme.zero_point == "real" for scheme in quantized),
        "column_scales": column_scales,
        "norms": True,
        "norm_biases": norm_biases,
        "clips": any(scheme is not None and can_clip(scheme) for scheme in inputs),
    }
    return frozenset(name for name in SPACES if there[name])


@dataclass(frozen=True)
class Distillation:
    """What is learned of a packed model whose codes stay as they are, and for how long.

    steps: of the optimizer. tokens: of calibration text in each step. rate: largest change of a number in one step,
    about, as a share of it. The others say what is learned, where the model has it. scales: of weights. zero_points: of
    weights, where they are real. column_scales: of linears that store their own. norms: gains of norms. norm_biases: of
    norms that got one against mean shift. clips: shares of inputs' ranges that are kept, one a site.
    """

    steps: int
    tokens: int = 512
    rate: float = 0.02
    scales: bool = True
    zero_points: bool = True
    column_scales: bool = True
    norms: bool = True
    norm_biases: bool = True
    clips: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "tokens"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise BadRecipe(f"distill {name} is {value!r}; give a positive whole number")
        if isinstance(self.rate, bool) or not isinstance(self.rate, float | int) or not 0 < self.rate < 1:
            raise BadRecipe(f"distill rate is {self.rate!r}; give a number between 0 and 1")
        for name in SPACES:
            if not isinstance(getattr(self, name), bool):
                raise BadRecipe(f"distill {name} is {getattr(self, name)!r}; give true or false")
        if not self.learned:
            raise BadRecipe(f"there is nothing to distill into: {', '.join(SPACES)} are all false")

    @property
    def learned(self) -> frozenset[str]:
        """What is learned, where the model has it: the names of the settings that say so."""
        return frozenset(name for name in SPACES if getattr(self, name))

    def pieces(self, windows: int, window: int) -> tuple[int, int]:
        """How many pieces of how many tokens so many windows give: a window longer than a step is cut into several.

        Raises `BadRecipe` where none would be left to hold out.
        """
        length = min(self.tokens, window)
        count = windows * (window // length)
        if count < 2:
            raise BadRecipe(
                f"distillation holds some text out and there is one window of {window} tokens for steps of "
                f"{self.tokens}; use more windows, or fewer tokens a step (distill.tokens)"
            )
        return count, length

    def check_learns(self, there: Iterable[str], where: str) -> None:
        """Raise `BadRecipe` if nothing is learned of a model, in messages `where`.

        there: what it has that could be, by the names of the settings; see `learnable`.
        """
        if self.learned.isdisjoint(there):
            settings = ", ".join(f"{name} = {getattr(self, name)}" for name in SPACES)
            raise BadRecipe(
                f"nothing of {where} is learned with distill {settings}: scales are learned on grids other than MXFP4, "
                "zero-points where they are real, column scales and norm biases where they are stored, clips of inputs "
                "quantized on a uniform grid; let norms be learned"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary."""
        return asdict(self)

    @classmethod
    def of(cls, steps: int, others: Mapping[str, Any]) -> Self:
        """For so many steps, with the settings of a recipe's table; an unknown key is an error."""
        return cls(steps, **known_fields(cls, others, "unknown key {} of distill", but=("steps",)))
