"""A method is data: a composition of steps that the pipeline carries out. The pipeline has no branch for any method."""

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

# Whether calibration statistics of later linears, and their rounding, use unquantized or quantized inputs.
INPUTS = ("exact", "quantized")
# The grid and zero-point that a method prefers: (site name, bits) -> settings by the keys of `Scheme`.
Preference = Callable[[str, int], Mapping[str, str]]
# The KV-cache settings that a method prefers: bits -> settings by the keys of `CacheScheme`.
CachePreference = Callable[[int], Mapping[str, Any]]


def no_preference(site: str, bits: int) -> Mapping[str, str]:
    """Grid preference of a method without one."""
    return {}


def no_cache_preference(bits: int) -> Mapping[str, Any]:
    """KV-cache preference of a method without one."""
    return {}


@dataclass(frozen=True)
class Steps:
    """What the pipeline does for a method: rotate the residual stream; per block, apply transforms, then round.

    rounder: rounds every linear, except readers of the sites in `rounders`.
    transforms: edits of a block, applied in this order before any of its linears is rounded.
    rounders: role of a site -> rounder of its readers.
    prefers: the preferred grid, see `Preference`; the recipe's own settings take precedence.
    rotation: rotation of the residual stream, see `transforms/rotate.py`.
    mean_shift: correction of mean shift in norms that follow quantized linears, see `corrections/mean_shift.py`.
    saliency: how channels of a site are ordered, or None.
    correction: further terms of a linear against rounding error.
    online: roles of sites whose readers get an online Hadamard transform.
    inputs: "exact" calibrates on unquantized inputs, keys and values; "quantized" on quantized ones, as at run time.
    value_rotation: rotation of values within heads, see `transforms/rotate_values.py`.
    cache: the preferred KV cache, see `CachePreference`; the recipe's own settings take precedence.
    rounds_no_weights: whether all weights stay unrounded.
    tuning: which parameters of a block are trained before it is rounded, or None.
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
    rounds_no_weights: bool = False
    tuning: Tuning | None = None

    def __post_init__(self) -> None:
        check_rotation(self.rotation)
        check_value_rotation(self.value_rotation)
        check_mean_shift(self.mean_shift)
        if self.inputs not in INPUTS:
            raise BadRecipe(f"inputs is {self.inputs!r}; choose one of {', '.join(INPUTS)}")
        if self.orders_residual and self.rotation != "none":
            raise BadRecipe(
                'permutation = "offline" gives the residual stream a channel order, which cannot be combined with its '
                'rotation; use permutation = "gather" or rotation = "none"'
            )
        if self.tuning is not None:
            _check_tuning(self)
        if self.needs_drift and self.correction != NOTHING:
            raise BadRecipe(
                'a rounder towards full-precision outputs (asymmetry other than "none") cannot be combined with '
                "salient columns, outliers or low-rank terms; leave one of them out"
            )
        _check_column_scales(self)

    def rounder_of(self, site: str) -> Rounder:
        """The rounder of a site's readers. site: its role."""
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
        """Whether norms that follow quantized linears get a bias that corrects mean shift."""
        return self.mean_shift != "none"

    @property
    def orders_residual(self) -> bool:
        """Whether the residual stream gets one channel order for the whole model."""
        return self.saliency is not None and self.saliency.permutation == "offline"

    @property
    def needs_survey(self) -> bool:
        """Whether statistics of a block are needed before any of its linears is rounded."""
        return bool(self.transforms) or self.saliency is not None

    @property
    def needs_drift(self) -> bool:
        """Whether a rounder needs the drift: the difference of inputs from the full-precision model's."""
        return any(rounder.needs_drift for rounder in (self.rounder, *self.rounders.values()))

    @property
    def needs_reference(self) -> bool:
        """Whether the full-precision model must run alongside the quantized one."""
        return self.needs_drift or self.tuning is not None


def _check_tuning(steps: Steps) -> None:
    """Raise `BadRecipe` if a step is incompatible with tuning."""
    if steps.transforms:
        raise BadRecipe("tuning learns its own scaling factors and cannot follow transforms; leave one of them out")
    if steps.corrects_norms:
        raise BadRecipe("tuning cannot be combined with a mean-shift correction; leave one of them out")
    steps.correction.check_tuned()
    for rounder in (steps.rounder, *steps.rounders.values()):
        if rounder.with_fitter(Clip()) is None:
            raise BadRecipe(f"tuning rounds on learned grids, which {type(rounder).__name__} does not accept; use GPTQ")
    if steps.needs_drift:
        raise BadRecipe('tuning already targets full-precision outputs; use a rounder with asymmetry = "none"')
    if steps.inputs != "quantized":
        raise BadRecipe('tuning needs inputs that are quantized as at run time; use inputs = "quantized"')


def _check_column_scales(steps: Steps) -> None:
    """Raise `BadRecipe` if a rounder's column scales would apply to the wrong channels or to other terms."""
    rounders = (steps.rounder, *steps.rounders.values())
    others = steps.saliency is not None or steps.correction != NOTHING
    # With a channel order or other terms, no rounder may scale columns; otherwise, none at online-transformed sites.
    if any(rounder.has_column_scales for rounder in (rounders if others else map(steps.rounder_of, steps.online))):
        raise BadRecipe(
            "a rounder that scales columns cannot be combined with a channel order, with salient columns, outliers or "
            "low-rank terms, or with an online transform of its input; leave one of them out"
        )


@dataclass(frozen=True)
class Method:
    """A named composition of steps.

    name: the name that recipes use.
    summary: one line for `subnibble list`.
    source: the publication.
    options: frozen dataclass of the method's options.
    build: function from options to steps.
    """

    name: str
    summary: str
    source: str
    options: type[Any]
    build: Callable[[Any], Steps]

    def steps(self, options: Mapping[str, Any]) -> Steps:
        """The steps for a recipe's table of options, checked by `configure`."""
        return self.build(self.configure(options))

    def configure(self, values: Mapping[str, Any]) -> Any:
        """The method's options from a recipe's table, with defaults filled in.

        Raises `BadRecipe` for unknown keys and wrong types.
        """
        defaults = self.options()
        known = {item.name: getattr(defaults, item.name) for item in fields(self.options)}
        for key, value in values.items():
            if key not in known:
                raise BadRecipe(f"method {self.name} has no option {key!r}; it has: {', '.join(known) or 'none'}")
            target = type(known[key])
            if not isinstance(value, (int, float) if target is float else target) or isinstance(value, bool):
                raise BadRecipe(f"option {key} of method {self.name} is {value!r}; expected {target.__name__}")
        return self.options(**values)
