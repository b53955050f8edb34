"""A method is data: a composition of steps that the pipeline carries out. New methods add no branches to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from subnibble.calibrate.stream import SiteStatistics
from subnibble.corrections.mean_shift import MeanShift
from subnibble.errors import BadRecipe
from subnibble.model.skeleton import Block
from subnibble.rounding.rounder import Rounder
from subnibble.transforms.rotate import check_rotation

# An edit of a block, in float32, that keeps its function, made before anything of it is rounded.
Transform = Callable[[Block, SiteStatistics], None]
# The grid and zero-point that a method wants, by the keys of `Scheme`, for a site's readers at a bit width.
Preference = Callable[[str, int], Mapping[str, str]]


def no_preference(site: str, bits: int) -> Mapping[str, str]:
    """See `Preference`."""
    return {}


@dataclass(frozen=True)
class Steps:
    """What the pipeline does: rotates the residual stream; at each block carries out the transforms, then rounds.

    rounder: of every linear but those of the sites named in `rounders`. prefers: see `Preference`; what the recipe
    says goes first. rotation: see `transforms/rotate.py`. mean_shift: corrects the norms behind quantized linears.
    """

    rounder: Rounder
    transforms: tuple[Transform, ...] = ()
    rounders: Mapping[str, Rounder] = field(default_factory=dict)
    prefers: Preference = no_preference
    rotation: str = "none"
    mean_shift: MeanShift | None = None

    def __post_init__(self) -> None:
        check_rotation(self.rotation)

    def rounder_of(self, site: str) -> Rounder:
        """The rounder of a site's readers."""
        return self.rounders.get(site, self.rounder)

    @property
    def needs_data(self) -> bool:
        """Whether calibration text is needed."""
        rounders = (self.rounder, *self.rounders.values())
        return bool(self.transforms) or self.mean_shift is not None or any(r.needs_gram for r in rounders)

    @property
    def needs_drift(self) -> bool:
        """Whether the full-precision model must be run beside the quantized one."""
        return any(rounder.needs_drift for rounder in (self.rounder, *self.rounders.values()))


@dataclass(frozen=True)
class Method:
    """A named composition. options: a frozen dataclass of the method's own settings; build: settings to steps."""

    name: str
    summary: str
    source: str
    options: type[Any]
    build: Callable[[Any], Steps]

    def needs_data(self, options: Mapping[str, Any]) -> bool:
        """Whether the method cannot do without calibration text."""
        return self.build(self.configure(options)).needs_data

    def configure(self, values: Mapping[str, Any]) -> Any:
        """The method's options from a recipe's table, defaults filled in; unknown keys and wrong types are errors."""
        defaults = self.options()
        known = {item.name: getattr(defaults, item.name) for item in fields(self.options)}
        for key, value in values.items():
            if key not in known:
                raise BadRecipe(f"method {self.name} has no option {key!r}; it has: {', '.join(known) or 'none'}")
            wanted = type(known[key])
            if not isinstance(value, (int, float) if wanted is float else wanted) or isinstance(value, bool):
                raise BadRecipe(f"option {key} of method {self.name} is {value!r}; expected {wanted.__name__}")
        return self.options(**values)
