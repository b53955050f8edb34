"""The recipe: all settings that decide what a quantized checkpoint holds, written into it as `recipe.toml`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from subnibble.arguments import as_path, check_types, described, plain
from subnibble.calibrate.sampling import SELF, WindowSampling
from subnibble.device import AUTO, DTYPES
from subnibble.distill.settings import Distillation
from subnibble.errors import BadArgument, BadRecipe
from subnibble.recipe.overrides import WITHOUT_ZERO_POINT, check_matched, check_override, override_of
from subnibble.recipe.toml import check_writable, parsed, written
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.cache_scheme import PLAIN_CACHE, CacheScheme
from subnibble.tensor.groups import WHOLE_CHANNEL
from subnibble.tensor.scheme import E8M0, Scheme
from subnibble.text_file import read_text_file

EMBEDDING_BITS = (16, 8, 4)
PLAIN_ACTIVATIONS = 16

_TYPES = {
    "method": str, "bits": int, "group_size": int, "zero_point": str, "scale_type": str, "grid": str,
    "embedding_bits": int, "activation_bits": int, "activation_group_size": (int, type(None)),
    "activation_zero_point": str, "activation_clip": (float, int), "kv_bits": int, "kv": Mapping,
    "system_prompt": (str, type(None)), "calibration": (str, type(None)), "num_windows": int, "window": int,
    "sampling": Mapping,
    "distill_steps": int, "distill": Mapping,
    "seed": int, "device": str, "dtype": str, "options": Mapping, "overrides": Mapping,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """All settings of one quantization. Unknown keys are errors; round-trips through TOML and dictionaries.

    method: name of a method; `subnibble list` shows them.
    bits: bits of a weight: 2, 3, 4 or 8.
    group_size: consecutive input columns of a weight that share a scale; -1: the whole row.
    zero_point: zero-point of uniform weight grids, "none", "integer" or "real"; "auto": the method's preference, else
        "integer". The grids "sign" and "mxfp4" have none.
    scale_type: dtype of scales and real zero-points: "float16", "bfloat16" or "float32". Ignored by the grid "mxfp4",
        whose scales are always "e8m0".
    grid: levels of the weights, "uniform", "sign" or "mxfp4" (see `Scheme`); "auto": the method's preference, else
        "uniform".
    embedding_bits: bits of the embedding and the head, on a uniform grid: 16 (not quantized), 8 or 4.
    activation_bits: bits of the inputs of linears at run time: 16 (not quantized), 8, 4 or 3. With the grid "mxfp4", 4
        means mxfp4 inputs.
    activation_group_size: consecutive channels of an input that share a scale; -1: the whole token; None: the
        group_size of the weights.
    activation_zero_point: zero-point of uniform input grids: "none" or "integer".
    activation_clip: share of an input's range that is kept, above 0 and at most 1; see `ActivationScheme`.
    kv_bits: bits of the KV cache: 16 (not quantized), 8, 4, 3 or 2.
    kv: table of the other settings of the KV cache: the fields of `CacheScheme` except bits.
    system_prompt: prompt prefix before every text: text, a text file, "default" (the system turn that the chat template
        writes), "bos" (the BOS token alone) or "auto" (the model's attention sinks, detected in the calibration data).
        The unquantized model computes its keys and values, which stay at 16 bits; see `calibrate/prompt.py`.
    calibration: calibration data, a file of text or token ids, a named set ("c4", "wikitext2", "news"), or "self": the
        model writes it; None: "c4" if the method needs data.
    num_windows: number of calibration windows.
    window: tokens of a calibration window.
    sampling: table of how the model writes calibration windows: the fields of `WindowSampling`; empty unless
        calibration is "self".
    distill_steps: optimizer steps that tune the whole packed model towards the original's predictions; 0: no tuning.
    distill: table of the other settings of this tuning: the fields of `Distillation` except steps.
    seed: seed for choosing or writing windows, for their order in distillation, and for the signs of rotations.
    device: torch device that computes; "auto": an accelerator if there is one.
    dtype: dtype of activations and weights during computation: "float32", "bfloat16", "float16", or "auto" (see
        `device.py`).
    options: table of options of the method; `subnibble list` shows them.
    overrides: table of exceptions for single linears: pattern -> table with any of bits, group_size, grid, zero_point,
        activation_bits and skip (true: not quantized). A pattern is the exact path of a linear, or "re:" and a regular
        expression that is matched from the start of the path; the first matching pattern counts.
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
    sampling: Mapping[str, Any] = field(default_factory=dict)
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
        _check_values(self)
        _check_schemes(self)
        _ = self.window_sampling
        if self.distillation is not None:
            self.distillation.pieces(self.num_windows, self.window)
        for pattern, values in self.overrides.items():
            check_override(pattern, values)
            self._activation(values, self._scheme(values, {}))
        _check_zero_point(self)
        check_writable(self.to_dict())

    @property
    def scheme(self) -> Scheme:
        """Weight scheme of linears without an override, for a method without preferences."""
        return self._scheme({}, {})

    @property
    def activation(self) -> ActivationScheme | None:
        """Activation scheme of linears without an override, for a method without preferences; None at 16 bits."""
        return self._activation({}, self.scheme)

    def cache_scheme(self, prefers: Callable[[int], Mapping[str, Any]] = lambda bits: {}) -> CacheScheme | None:
        """The scheme of the KV cache, or None if it is not quantized.

        prefers: bit width -> settings that the method prefers; the recipe's table kv overrides them.
        """
        if "bits" in self.kv:
            raise BadRecipe("kv.bits is set; set kv_bits instead")
        if self.kv_bits == PLAIN_CACHE:
            if self.kv:
                raise BadRecipe(f"kv.{next(iter(self.kv))} is set, but kv_bits is 16; set kv_bits to 8, 4, 3 or 2")
            return None
        return CacheScheme.from_dict({**prefers(self.kv_bits), **self.kv, "bits": self.kv_bits})

    @property
    def window_sampling(self) -> WindowSampling | None:
        """How the model writes calibration windows, or None if `calibration` is not "self"."""
        if self.calibration != SELF:
            if self.sampling:
                raise BadRecipe(
                    f"sampling.{next(iter(self.sampling))} is set, but calibration is {self.calibration!r}; set "
                    f'calibration = "{SELF}", or leave it out'
                )
            return None
        return WindowSampling.from_dict(self.sampling)

    @property
    def distillation(self) -> Distillation | None:
        """Settings of the tuning of the whole packed model, or None if `distill_steps` is 0."""
        if "steps" in self.distill:
            raise BadRecipe("distill.steps is set; set distill_steps instead")
        if self.distill_steps == 0:
            if self.distill:
                raise BadRecipe(f"distill.{next(iter(self.distill))} is set, but distill_steps is 0; set distill_steps")
            return None
        return Distillation.of(self.distill_steps, self.distill)

    @property
    def embedding_scheme(self) -> Scheme | None:
        """Weight scheme of the embedding and the head, or None if they stay at 16 bits."""
        if self.embedding_bits == 16:
            return None
        return Scheme(self.embedding_bits, self.group_size, _unless_auto(self.zero_point, "integer"), self.scale_type)

    def scheme_of(self, path: str, prefers: Callable[[int], Mapping[str, str]] = lambda bits: {}) -> Scheme | None:
        """Weight scheme of the linear at `path`, or None if an override skips it.

        prefers: bit width -> grid and zero_point that the method prefers for this linear, used where the recipe says
            "auto".
        """
        values = override_of(self.overrides, path)
        if values.get("skip", False):
            return None
        return self._scheme(values, prefers(values.get("bits", self.bits)))

    def activation_of(self, path: str, scheme: Scheme) -> ActivationScheme | None:
        """Activation scheme of the linear at `path`, or None if its input is not quantized.

        scheme: weight scheme of the linear.
        """
        return self._activation(override_of(self.overrides, path), scheme)

    def _activation(self, values: Mapping[str, Any], scheme: Scheme) -> ActivationScheme | None:
        bits = values.get("activation_bits", self.activation_bits)
        if bits == PLAIN_ACTIVATIONS:
            return None
        size = scheme.group_size if self.activation_group_size is None else self.activation_group_size
        if scheme.grid == "mxfp4" and bits == scheme.bits:
            return ActivationScheme(bits, size, "none", "mxfp4", self.activation_clip)
        return ActivationScheme(bits, size, self.activation_zero_point, "uniform", self.activation_clip)

    def _scheme(self, values: Mapping[str, Any], preferences: Mapping[str, str]) -> Scheme:
        """Weight scheme. A setting comes from the override, else from the recipe; "auto" means the preference.

        values: table of the override.
        preferences: grid and zero_point that the method prefers.
        """
        grid = _unless_auto(values.get("grid", self.grid), preferences.get("grid", "uniform"))
        zero_point = _unless_auto(values.get("zero_point", self.zero_point), preferences.get("zero_point", "integer"))
        return Scheme(
            values.get("bits", self.bits),
            values.get("group_size", self.group_size),
            zero_point if grid == "uniform" else "none",
            E8M0 if grid == "mxfp4" else self.scale_type,
            grid,
        )

    def check_overrides(self, paths: list[str]) -> None:
        """Raise `BadRecipe` for a pattern that matches no linear of the model.

        paths: paths of all linears that can be quantized.
        """
        check_matched(self.overrides, paths)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as a plain dictionary without keys that are None; the inverse of `from_dict`."""
        values = asdict(self)
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def of(cls, recipe: AnyRecipe) -> Recipe:
        """Convert what a caller gives as a recipe: a `Recipe`, a dictionary of its keys, or the name of a TOML file."""
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Mapping):
            return cls.from_dict(recipe)
        hint = 'a Recipe, as Recipe(method="gptq", bits=4) or preset("w3"), a dictionary of its keys, or a TOML file'
        file = as_path(recipe, "recipe", hint)
        if not file.is_file():
            raise BadRecipe(f"recipe is {str(recipe)!r}, which is not a file; give {hint}")
        return cls.from_toml(file)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a dictionary of keys; `BadRecipe` for an unknown key or an invalid value."""
        if not isinstance(values, Mapping):
            raise BadArgument(f"the recipe is {described(values)}; give a dictionary of its keys")
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(values) - set(known), key=str)
        if unknown:
            raise BadRecipe(f"unknown recipe key {unknown[0]!r}; known: {', '.join(known)}")
        return cls(**values)

    def to_toml(self) -> str:
        """The recipe as TOML text."""
        return written(self.to_dict())

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Read a recipe from a TOML file."""
        path = as_path(path, "the recipe file", "the name of a TOML file")
        return cls.from_text(read_text_file(path, BadRecipe), str(path))

    @classmethod
    def from_text(cls, text: str, where: str) -> Self:
        """Build from TOML text.

        where: names the text in errors, for example a file name.
        """
        return cls.from_dict(parsed(text, where))


# What Python calls accept as a recipe; see `Recipe.of`.
AnyRecipe = Recipe | Mapping[str, Any] | str | Path


def _check_values(recipe: Recipe) -> None:
    """Raise `BadRecipe` for a number or word that no recipe may have."""
    if recipe.embedding_bits not in EMBEDDING_BITS:
        raise BadRecipe(
            f"embedding_bits is {recipe.embedding_bits}; choose one of {', '.join(map(str, EMBEDDING_BITS))}"
        )
    for key in ("num_windows", "window"):
        if getattr(recipe, key) < 1:
            raise BadRecipe(f"{key} is {getattr(recipe, key)}; give a positive number")
    if not 0 <= recipe.seed < 2**63:
        raise BadRecipe(f"seed is {recipe.seed}; give a whole number from 0 to 2**63 - 1")
    if recipe.dtype not in (AUTO, *DTYPES):
        raise BadRecipe(f"dtype is {recipe.dtype!r}; choose one of {AUTO}, {', '.join(DTYPES)}")


def _check_schemes(recipe: Recipe) -> None:
    """Raise `BadRecipe` if the settings make an invalid scheme of weights, inputs or the KV cache."""
    _ = recipe.embedding_scheme, recipe.activation, recipe.cache_scheme()
    # Checked even if activation_bits is 16, since an override may quantize inputs.
    size = WHOLE_CHANNEL if recipe.activation_group_size is None else recipe.activation_group_size
    ActivationScheme(8, size, recipe.activation_zero_point, clip=recipe.activation_clip)


def _check_zero_point(recipe: Recipe) -> None:
    """Raise `BadRecipe` if `zero_point` is set but unused, because no weight has a uniform grid."""
    grids = {values.get("grid", recipe.grid) for values in recipe.overrides.values()}
    uniform = recipe.embedding_bits != 16 or not grids <= set(WITHOUT_ZERO_POINT)
    if recipe.grid in WITHOUT_ZERO_POINT and recipe.zero_point not in ("none", AUTO) and not uniform:
        raise BadRecipe(
            f"zero_point is {recipe.zero_point!r}, but no {recipe.grid} grid has a zero-point; "
            f'set zero_point = "{AUTO}"'
        )


def _unless_auto(value: str, preference: str) -> str:
    return preference if value == AUTO else value
