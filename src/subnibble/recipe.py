"""A recipe: everything that decides what a quantized checkpoint holds. Written beside it as `recipe.toml`."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import tomli_w

from subnibble.device import AUTO, DTYPES
from subnibble.distill.settings import Distillation
from subnibble.errors import BadArgument, BadRecipe
from subnibble.given import check_types, described, given_path, plain
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.cache_scheme import PLAIN_CACHE, CacheScheme
from subnibble.tensor.scheme import E8M0, WHOLE_CHANNEL, Scheme
from subnibble.text_file import check_characters, read_text_file

EMBEDDING_BITS = (16, 8, 4)
_OVERRIDE_KEYS = ("bits", "group_size", "grid", "zero_point", "activation_bits", "skip")
PLAIN_ACTIVATIONS = 16

_WITHOUT_ZERO_POINT = ("sign", "mxfp4")
_TYPES = {
    "method": str, "bits": int, "group_size": int, "zero_point": str, "scale_type": str, "grid": str,
    "embedding_bits": int, "activation_bits": int, "activation_group_size": (int, type(None)),
    "activation_zero_point": str, "activation_clip": (float, int), "kv_bits": int, "kv": Mapping,
    "system_prompt": (str, type(None)), "calibration": (str, type(None)), "num_windows": int, "window": int,
    "distill_steps": int, "distill": Mapping,
    "seed": int, "device": str, "dtype": str, "options": Mapping, "overrides": Mapping,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What to do to a model. Unknown keys are errors; round-trips through TOML and dictionaries.

    method: a name that `subnibble list` shows.
    bits, group_size, scale_type: of weights, see `Scheme`.
    grid, zero_point: see `Scheme`. "auto" leaves them to the method; where it has no wish they are "uniform" and
        "integer". "mxfp4" as grid fixes zero_point and scale_type.
    embedding_bits: 16, 8 or 4, for embedding and head, on a uniform grid.
    activation_bits: of the inputs of linears while the model runs: 16 leaves them as they are; 8, 4 and 3 quantize
        them. 4 bits beside mxfp4 weights are mxfp4.
    activation_group_size: of these inputs, None for that of the weights.
    activation_zero_point, activation_clip: see `ActivationScheme`.
    kv_bits: 16 leaves the KV cache as it is; 8, 4, 3 and 2 code it.
    kv: the other settings of `CacheScheme`.
    system_prompt: text or a file of text that everything stands behind: its keys and values are computed by the
        unquantized model and stay at 16 bits. "default" is the chat template's system turn, "bos" BOS alone, "auto" the
        model's own sink tokens; see `calibrate/prompt.py`.
    calibration: a text file or a named set; None takes "c4" if the method needs data.
    num_windows, window: how many windows of how many tokens calibrate.
    distill_steps: for how many steps the packed model is tuned as a whole, towards the original's predictions.
    distill: the other settings of `Distillation`.
    seed: draws the windows, their order in distillation, and a rotation's signs.
    device: where to compute, a torch device or "auto".
    dtype: of activations and weights while computing, see `device.py`.
    options: the method's own.
    overrides: patterns of linears ("re:..." a regular expression matched from the start, else an exact path) to bits,
        group_size, grid, zero_point, activation_bits or skip; the first that matches holds.
    """

    method: str = "gptq"
    bits: int = 4
    group_size: int = 128
    zero_point: str = AUTO
    scale_type: str = "float16"
    grid: str = AUTO
    embedding_bits: int = 16
    activation_bits: int = PLAIN_ACTIVATIONS
    activation_group_size: int | None = None
    activation_zero_point: str = "integer"
    activation_clip: float = 1.0
    kv_bits: int = PLAIN_CACHE
    kv: Mapping[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    calibration: str | None = None
    num_windows: int = 128
    window: int = 2048
    distill_steps: int = 0
    distill: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("system_prompt", "calibration", "device", "dtype"):
            object.__setattr__(self, key, plain(getattr(self, key)))
        check_types(self, _TYPES)
        if self.embedding_bits not in EMBEDDING_BITS:
            raise BadRecipe(
                f"embedding_bits is {self.embedding_bits}; choose one of {', '.join(map(str, EMBEDDING_BITS))}"
            )
        for key in ("num_windows", "window"):
            if getattr(self, key) < 1:
                raise BadRecipe(f"{key} is {getattr(self, key)}; give a positive number")
        if not 0 <= self.seed < 2**63:
            raise BadRecipe(f"seed is {self.seed}; give a whole number from 0 to 2**63 - 1")
        if self.dtype not in (AUTO, *DTYPES):
            raise BadRecipe(f"dtype is {self.dtype!r}; choose one of {AUTO}, {', '.join(DTYPES)}")
        _ = self.embedding_scheme, self.activation, self.cache_scheme()
        # Whatever uses them: an override may.
        size = WHOLE_CHANNEL if self.activation_group_size is None else self.activation_group_size
        ActivationScheme(8, size, self.activation_zero_point, clip=self.activation_clip)
        if self.distillation is not None:
            self.distillation.pieces(self.num_windows, self.window)
        for pattern, values in self.overrides.items():
            _check_override(self, pattern, values)
        _check_zero_point(self)
        _check_writable(self)

    @property
    def scheme(self) -> Scheme:
        """The scheme of linears that no override touches, of a method without wishes."""
        return self._scheme({}, {})

    @property
    def activation(self) -> ActivationScheme | None:
        """How inputs of linears are quantized that no override touches."""
        return self._activation({}, self.scheme)

    def cache_scheme(self, prefers: Callable[[int], Mapping[str, Any]] = lambda bits: {}) -> CacheScheme | None:
        """How the KV cache is coded, None for not at all.

        prefers: the settings that the method wants at a bit width, where the recipe is silent.
        """
        if "bits" in self.kv:
            raise BadRecipe("the table kv has no bits; set kv_bits")
        if self.kv_bits == PLAIN_CACHE:
            if self.kv:
                raise BadRecipe(f"kv.{next(iter(self.kv))} is set and kv_bits is 16; set kv_bits to 8, 4, 3 or 2")
            return None
        return CacheScheme.from_dict({**prefers(self.kv_bits), **self.kv, "bits": self.kv_bits})

    @property
    def distillation(self) -> Distillation | None:
        """How the packed model is tuned as a whole, None for not at all."""
        if "steps" in self.distill:
            raise BadRecipe("the table distill has no steps; set distill_steps")
        if self.distill_steps == 0:
            if self.distill:
                raise BadRecipe(f"distill.{next(iter(self.distill))} is set and distill_steps is 0; set distill_steps")
            return None
        return Distillation.of(self.distill_steps, self.distill)

    @property
    def embedding_scheme(self) -> Scheme | None:
        """The scheme of embedding and head, or None if they stay at 16 bits."""
        if self.embedding_bits == 16:
            return None
        return Scheme(self.embedding_bits, self.group_size, _unless_auto(self.zero_point, "integer"), self.scale_type)

    def scheme_of(self, path: str, prefers: Callable[[int], Mapping[str, str]] = lambda bits: {}) -> Scheme | None:
        """The scheme of the linear at `path`, or None if an override skips it.

        prefers: the grid and zero-point that the method wants there at a bit width, for what the recipe leaves open.
        """
        values = self._override(path)
        if values.get("skip", False):
            return None
        return self._scheme(values, prefers(values.get("bits", self.bits)))

    def activation_of(self, path: str, scheme: Scheme) -> ActivationScheme | None:
        """How the input of the linear at `path` is quantized, None for not at all. scheme: its weight's."""
        return self._activation(self._override(path), scheme)

    def _override(self, path: str) -> Mapping[str, Any]:
        for pattern, found in self.overrides.items():
            if matches(pattern, path):
                return found
        return {}

    def _activation(self, values: Mapping[str, Any], scheme: Scheme) -> ActivationScheme | None:
        bits = values.get("activation_bits", self.activation_bits)
        if bits == PLAIN_ACTIVATIONS:
            return None
        size = scheme.group_size if self.activation_group_size is None else self.activation_group_size
        if scheme.grid == "mxfp4" and bits == scheme.bits:
            return ActivationScheme(bits, size, "none", "mxfp4", self.activation_clip)
        return ActivationScheme(bits, size, self.activation_zero_point, "uniform", self.activation_clip)

    def _scheme(self, values: Mapping[str, Any], wishes: Mapping[str, str]) -> Scheme:
        """values: an override's, which come first; wishes: the method's, which come last."""
        grid = _unless_auto(values.get("grid", self.grid), wishes.get("grid", "uniform"))
        zero_point = _unless_auto(values.get("zero_point", self.zero_point), wishes.get("zero_point", "integer"))
        return Scheme(
            values.get("bits", self.bits),
            values.get("group_size", self.group_size),
            zero_point if grid == "uniform" else "none",
            E8M0 if grid == "mxfp4" else self.scale_type,
            grid,
        )

    def check_overrides(self, paths: list[str]) -> None:
        """Raise `BadRecipe` for a pattern that matches none of the model's linears."""
        for pattern in self.overrides:
            if not any(matches(pattern, path) for path in paths):
                raise BadRecipe(f"override {pattern!r} matches no linear; they have names like {paths[0]}")

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary without unset keys, the inverse of `from_dict`."""
        values = asdict(self)
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def of(cls, given: AnyRecipe) -> Recipe:
        """The recipe that a caller means: one, a table of its keys, or the name of a TOML file."""
        if isinstance(given, Recipe):
            return given
        if isinstance(given, Mapping):
            return cls.from_dict(given)
        hint = 'a Recipe, as Recipe(method="gptq", bits=4) or preset("w3"), a table of its keys, or a TOML file'
        file = given_path(given, "recipe", hint)
        if not file.is_file():
            raise BadRecipe(f"recipe is {str(given)!r}, which is no file; give {hint}")
        return cls.from_toml(file)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a dictionary; an unknown key is an error."""
        if not isinstance(values, Mapping):
            raise BadArgument(f"a recipe's table is {described(values)}; give a dictionary of its keys")
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(values) - set(known), key=str)
        if unknown:
            raise BadRecipe(f"unknown recipe key {unknown[0]!r}; known: {', '.join(known)}")
        return cls(**values)

    def to_toml(self) -> str:
        """The recipe as TOML text."""
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Read a recipe file."""
        path = given_path(path, "a recipe's file", "the name of a TOML file")
        return cls.from_text(read_text_file(path, BadRecipe), str(path))

    @classmethod
    def from_text(cls, text: str, where: str) -> Self:
        """Read a recipe's TOML. where: what it is of, for errors."""
        try:
            values = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadRecipe(f"{where} is no valid TOML: {error}") from error
        return cls.from_dict(values)


# What Python calls take for a recipe.
AnyRecipe = Recipe | Mapping[str, Any] | str | Path


def matches(pattern: str, path: str) -> bool:
    """Whether an override pattern holds for a linear."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], path) is not None
    return pattern == path


def _check_writable(recipe: Recipe) -> None:
    """Raise `BadRecipe` for a value that `recipe.toml` cannot hold, before the hours after which it is written."""
    for key, value in recipe.to_dict().items():
        try:
            text = tomli_w.dumps({key: value})
        except (TypeError, ValueError, AttributeError) as error:
            raise BadRecipe(
                f"{key} is {value!r}, which no recipe file can hold ({error}); give text or numbers"
            ) from error
        check_characters(value if isinstance(value, str) else text, key, BadRecipe)


def _check_zero_point(recipe: Recipe) -> None:
    """Raise `BadRecipe` for one that is given and that nothing would have."""
    grids = {values.get("grid", recipe.grid) for values in recipe.overrides.values()}
    uniform = recipe.embedding_bits != 16 or not grids <= set(_WITHOUT_ZERO_POINT)
    if recipe.grid in _WITHOUT_ZERO_POINT and recipe.zero_point not in ("none", AUTO) and not uniform:
        given = recipe.zero_point
        raise BadRecipe(f'zero_point is {given!r}, and no {recipe.grid} grid has one; set zero_point = "{AUTO}"')


def _check_override(recipe: Recipe, pattern: str, values: Any) -> None:
    if not isinstance(values, Mapping):
        raise BadRecipe(f"override {pattern!r} is {values!r}; give a table with {', '.join(_OVERRIDE_KEYS)}")
    unknown = sorted(set(values) - set(_OVERRIDE_KEYS))
    if unknown:
        raise BadRecipe(f"override {pattern!r} has unknown key {unknown[0]!r}; known: {', '.join(_OVERRIDE_KEYS)}")
    if not isinstance(values.get("skip", False), bool):
        raise BadRecipe(f"override {pattern!r}: skip is {values['skip']!r}; give true or false")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except (re.error, OverflowError) as error:
            raise BadRecipe(f"override {pattern!r} is no regular expression: {error}") from error
    if values.get("grid") in _WITHOUT_ZERO_POINT and values.get("zero_point", "none") not in ("none", AUTO):
        raise BadRecipe(f"override {pattern!r}: a {values['grid']} grid has no zero-point; leave zero_point out")
    recipe._activation(values, recipe._scheme(values, {}))


def _unless_auto(value: str, wish: str) -> str:
    return wish if value == AUTO else value
