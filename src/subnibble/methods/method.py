"""A method is data: a composition of steps that the pipeline carries out. New methods add no branches to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from subnibble.corrections.correction import NOTHING, Correction
from subnibble.corrections.mean_shift import check_mean_shift
from subnibble.errors import BadRecipe
from subnibble.rounding.grid import Clip
from subnibble.rounding.rounder import Rounder
from subnibble.transforms.rotate import check_rotation
from subnibble.transforms.rotate_values import check_value_rotation
from subnibble.transforms.saliency import Saliency
from subnibble.transforms.transform import Transform
from subnibble.tuning.tuning import Tuning

# What the statistics of later linears, and their rounding, see of quantized inputs.
INPUTS = ("exact", "quantized")
# The grid and zero-point that a method wants, by the keys of `Scheme`, for a site's readers at a bit width.
Preference = Callable[[str, int], Mapping[str, str]]
# The settings that a method wants, by the keys of `CacheScheme`, for a KV cache of so many bits.
CachePreference = Callable[[int], Mapping[str, Any]]


def no_preference(site: str, bits: int) -> Mapping[str, str]:
    """See `Preference`."""
    return {}


def no_cache_preference(bits: int) -> Mapping[str, Any]:
    """See `CachePreference`."""
    return {}


@dataclass(frozen=True)
class Steps:
    """What the pipeline does: rotates the residual stream; at each block carries out the transforms, then rounds.

    rounder: of every linear but those of the sites named in `rounders`.
    transforms: edits of a block, in this order, before anything of it is rounded.
    rounders: rounders of some sites' readers, by role.
    prefers: the grid that the method wants, see `Preference`; what the recipe says goes first.
    rotation: of the residual stream, see `transforms/rotate.py`.
    mean_shift: of the norms behind quantized linears, see `corrections/mean_shift.py`.
    saliency: gives sites their channel order, or None.
    correction: gives linears more terms against rounding error.
    online: roles of sites whose readers get an online Hadamard transform.
    inputs: "exact" calibrates on inputs, keys and values that are not quantized, "quantized" on what the running model
        will see.
    value_rotation: see `transforms/rotate_values.py`.
    cache: the cache that the method wants, see `CachePreference`; what the recipe says goes first.
    leaves_weights: no linear is rounded at all.
    tuning: what is learned of each block before it is rounded, or None.
    """

    rounder: Rounder
    transforms: tuple[Transform, ...] = ()
    rounders: Mapping[str, Rounder] = field(default_factory=dict)
    prefers: Preference = no_preference
    rotation: str = "none"
    mean_shift: str = "none"
    saliency: Saliency | None = None
    correction: Correction = NOTHING
    online: tuple[str, ...] = ()
    inputs: str = "exact"
    value_rotation: str = "none"
    cache: CachePreference = no_cache_preference
    leaves_weights: bool = False
    tuning: Tuning | None = None

    def __post_init__(self) -> None:
        check_rotation(self.rotation)
        check_value_rotation(self.value_rotation)
        check_mean_shift(self.mean_shift)
        if self.inputs not in INPUTS:
            raise BadRecipe(f"inputs is {self.inputs!r}; choose one of {', '.join(INPUTS)}")
        if self.orders_residual and self.rotation != "none":
            raise BadRecipe(
                'one order of the residual stream and its rotation exclude each other; use permutation = "gather"'
            )
        if self.tuning is not None:
            _check_tuning(self)
        if self.needs_drift and self.correction != NOTHING:
            raise BadRecipe(
                "a rounder towards full-precision outputs does not go with other terms of a linear; leave one of them "
                "out"
            )
        _check_column_scales(self)

    def rounder_of(self, site: str) -> Rounder:
        """The rounder of a site's readers."""
        return self.rounders.get(site, self.rounder)

    @property
    def needs_data(self) -> bool:
        """Whether calibration text is needed."""
        rounders = (self.rounder, *self.rounders.values())
        parts = (self.transforms, self.corrects_norms, self.saliency, self.correction.needs_data, self.tuning)
        return any(parts) or any(rounder.needs_gram for rounder in rounders)

    @property
    def sees_cache(self) -> bool:
        """Whether calibration and tuning see keys and values as the cache will quantize them."""
        return self.inputs == "quantized" or self.tuning is not None

    @property
    def corrects_norms(self) -> bool:
        """Whether norms behind quantized linears get a bias against mean shift."""
        return self.mean_shift != "none"

    @property
    def orders_residual(self) -> bool:
        """Whether the whole residual stream gets one channel order."""
        return self.saliency is not None and self.saliency.permutation == "offline"

    @property
    def needs_survey(self) -> bool:
        """Whether a block must be observed before anything of it is rounded."""
        return bool(self.transforms) or self.saliency is not None

    @property
    def needs_drift(self) -> bool:
        """Whether a rounder must know how far inputs are from the full-precision model's."""
        return any(rounder.needs_drift for rounder in (self.rounder, *self.rounders.values()))

    @property
    def needs_reference(self) -> bool:
        """Whether the full-precision model must be run beside the quantized one."""
        return self.needs_drift or self.tuning is not None


def _check_tuning(steps: Steps) -> None:
    """Raise `BadRecipe` where a step does not go with tuning, whatever the method."""
    if steps.transforms:
        raise BadRecipe("tuning learns factors of its own and goes without transforms; leave one of them out")
    if steps.corrects_norms:
        raise BadRecipe("tuning does not go with a mean shift; leave one of them out")
    steps.correction.check_tuned()
    for rounder in (steps.rounder, *steps.rounders.values()):
        if rounder.on(Clip()) is None:
            raise BadRecipe(f"tuning rounds on learned grids, which {type(rounder).__name__} does not take; use GPTQ")
    if steps.needs_drift:
        raise BadRecipe('tuning itself aims at full-precision outputs; use a rounder without drift, asymmetry = "none"')
    if steps.inputs != "quantized":
        raise BadRecipe('tuning sees inputs as they will run; use inputs = "quantized"')


def _check_column_scales(steps: Steps) -> None:
    """Raise `BadRecipe` where column scales of a rounder would meet other channels than theirs, or other terms."""
    rounders = (steps.rounder, *steps.rounders.values())
    others = steps.saliency is not None or steps.correction != NOTHING
    # Under other terms no linear may have column scales, else those alone whose input is not transformed.
    if any(rounder.scales_columns for rounder in (rounders if others else map(steps.rounder_of, steps.online))):
        raise BadRecipe(
            "a rounder that scales columns goes with neither a channel order, nor other terms of a linear, nor an "
            "online transform of its input; leave one of them out"
        )


@dataclass(frozen=True)
class Method:
    """A named composition. options: a frozen dataclass of the method's own settings; build: settings to steps."""

    name: str
    summary: str
    source: str
    options: type[Any]
    build: Callable[[Any], Steps]

    def steps(self, options: Mapping[str, Any]) -> Steps:
        """What the pipeline does for a recipe's table of options; see `configure`."""
        return self.build(self.configure(options))

    def configure(self, values: Mapping[str, Any]) -> Any:
        """The method's options from a recipe's table, defaults filled in; unknown keys and wrong types are errors."""
        defaults = self.options()
        known = {item.name: getattr(defaults, item.name) for item in fields(self.options)}
        for key, value in values.items():
            if key not in known:
                raise BadRecipe(f"method {self.name} has no option {key!r}; it has: {', '.join(known) or 'none'}")
            target = type(known[key])
            if not isinstance(value, (int, float) if target is float else target) or isinstance(value, bool):
                raise BadRecipe(f"option {key} of method {self.name} is {value!r}; expected {target.__name__}")
        return self.options(**values)
