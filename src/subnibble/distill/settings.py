"""Distillation settings: what is learned of a packed model, and for how many steps (`train.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from subnibble.errors import BadRecipe
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.scheme import E8M0, Scheme
from subnibble.tensor.scheme_checks import known_fields
from subnibble.tuning.input_clip import can_clip

# Parameter spaces; each is also the name of the setting that enables it.
SPACES = ("scales", "zero_points", "column_scales", "norms", "norm_biases", "clips")


def learnable(
    weights: Iterable[Scheme], inputs: Iterable[ActivationScheme | None], column_scales: bool, norm_biases: bool
) -> frozenset[str]:
    """The names in `SPACES` that a packed model has parameters for.

    weights: scheme of each packed matrix.
    inputs: activation scheme of each linear, None if its input is not quantized.
    column_scales, norm_biases: whether any are stored.
    """
    quantized = list(weights)
    available = {
        "scales": any(scheme.scale_type != E8M0 for scheme in quantized),
        "zero_points": any(scheme.zero_point == "real" for scheme in quantized),
        "column_scales": column_scales,
        "norms": True,
        "norm_biases": norm_biases,
        "clips": any(scheme is not None and can_clip(scheme) for scheme in inputs),
    }
    return frozenset(name for name in SPACES if available[name])


@dataclass(frozen=True)
class Distillation:
    """What is learned of a packed model with fixed codes, and for how many steps.

    steps: optimizer steps.
    tokens: calibration tokens per step.
    rate: approximate largest relative change of a parameter in one step.

    The other fields say whether a parameter space is learned, if the model has it:
    scales: weight scales.
    zero_points: real weight zero-points.
    column_scales: column scales that linears store.
    norms: norm gains.
    norm_biases: norm biases that correct mean shift.
    clips: the share of the input range that is kept, per site.
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
            raise BadRecipe(f"distillation has nothing to learn: {', '.join(SPACES)} are all false; set one to true")

    @property
    def learned(self) -> frozenset[str]:
        """Names of the parameter spaces that are enabled."""
        return frozenset(name for name in SPACES if getattr(self, name))

    def pieces(self, windows: int, window: int) -> tuple[int, int]:
        """Number and length in tokens of the pieces; a window longer than a step is cut into several pieces.

        windows: number of windows.
        window: tokens per window.

        Raises `BadRecipe` if there is only one piece, because one must be held out.
        """
        length = min(self.tokens, window)
        count = windows * (window // length)
        if count < 2:
            raise BadRecipe(
                f"distillation needs text to train on and text to hold out, but there is one window of {window} tokens "
                f"for steps of {self.tokens}; use more windows, or fewer tokens a step (distill.tokens)"
            )
        return count, length

    def check_learns(self, available: Iterable[str], where: str) -> None:
        """Raise `BadRecipe` if no enabled parameter space exists in a model.

        available: names of the spaces that the model has, see `learnable`.
        where: names the model in the message.
        """
        if self.learned.isdisjoint(available):
            settings = ", ".join(f"{name} = {getattr(self, name)}" for name in SPACES)
            raise BadRecipe(
                f"{where} has nothing to learn with distill {settings}: scales are learned on grids other than MXFP4, "
                "zero-points if they are real, column scales and norm biases if they are stored, clips of inputs "
                "quantized on a uniform grid; set norms = true"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as a plain dictionary."""
        return asdict(self)

    @classmethod
    def of(cls, steps: int, others: Mapping[str, Any]) -> Self:
        """Settings for `steps` steps with the other fields from a recipe's table; an unknown key is an error."""
        return cls(steps, **known_fields(cls, others, "unknown key {} of distill", but=("steps",)))
