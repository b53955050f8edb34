"""A method is data: a composition of steps that the pipeline carries out. New methods add no branches to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from subnibble.errors import BadRecipe
from subnibble.model.skeleton import Block
from subnibble.rounding.rounder import Rounder

# An edit of a block that keeps its function, made before anything of it is observed or rounded.
Transform = Callable[[Block], None]


@dataclass(frozen=True)
class Steps:
    """What the pipeline does at each block: first the transforms, then each site's readers through the rounder."""

    rounder: Rounder
    transforms: tuple[Transform, ...] = ()


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
        return self.build(self.configure(options)).rounder.needs_gram

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
