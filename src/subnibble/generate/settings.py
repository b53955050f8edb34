"""Settings of generation, by the names of transformers, and the values that they have for a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from subnibble.checkpoint.source import Source
from subnibble.errors import BadRecipe
from subnibble.model.transformers_api.generation import generation_config_of
from subnibble.tensor.scheme_checks import known_fields

# New tokens if neither the caller nor the model's generation_config says how many.
_MAX_NEW_TOKENS = 256
# What `generate` of transformers uses when it samples and generation_config is silent.
_SAMPLING_DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
_MOST_TOKENS, _LARGEST_SEED = 2**31 - 1, 2**63 - 1


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits; a value for every setting.

    temperature: divides the logits before a token is drawn; 0 takes the most likely token.
    top_k: number of most likely tokens that may be drawn; 0 for all.
    top_p: tokens may be drawn that are needed for this total probability; 1 for all.
    min_p: tokens may be drawn whose probability is at least this share of the largest one; 0 for all.
    repetition_penalty: lowers the logits of tokens that occurred already; 1 for none.
    seed: seed of the draws.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int


@dataclass(frozen=True)
class Settings:
    """What a caller may set; None: as the model's generation_config says, else as transformers does.

    max_new_tokens: largest number of new tokens; fewer are generated if the model has no more positions.
    temperature: 0 takes the most likely token each time. If it is None, generation_config's do_sample decides between
        its temperature and 0.
    top_k, top_p, min_p, repetition_penalty: see `Sampling`.
    seed: seed of the draws. Each of several prompts starts from it, so that its text does not depend on the others.
    stop: text that ends generation, or several; it is not part of the result.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise BadRecipe(f"stop is {list(stop)!r}; give texts that are not empty")
        self._check_whole("max_new_tokens", 1, _MOST_TOKENS)
        self._check_whole("top_k", 0, _MOST_TOKENS)
        self._check_whole("seed", 0, _LARGEST_SEED)
        self._check_number("temperature", "0 or more", lambda value: 0 <= value < float("inf"))
        self._check_number("top_p", "above 0 and at most 1", lambda value: 0 < value <= 1)
        self._check_number("min_p", "0 to 1", lambda value: 0 <= value <= 1)
        self._check_number("repetition_penalty", "above 0", lambda value: 0 < value < float("inf"))

    def _check_whole(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if value is not None and (type(value) is not int or not least <= value <= most):
            raise BadRecipe(f"{name} is {value!r}; give a whole number from {least} to {most}")

    def _check_number(self, name: str, target: str, fits: Any) -> None:
        value = getattr(self, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not fits(value)):
            raise BadRecipe(f"{name} is {value!r}; give a number, {target}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a dictionary; an unknown key is an error."""
        return cls(**known_fields(cls, values, "unknown setting {} of generation"))

    def sampling(self, defaults: Mapping[str, Any]) -> Sampling:
        """The values of all settings of the sampler. defaults: of the model, from `generation_defaults`."""
        values = {
            name: _first(getattr(self, name), defaults.get(name), default)
            for name, default in _SAMPLING_DEFAULTS.items()
        }
        if self.temperature is None and not defaults.get("do_sample"):
            values["temperature"] = 0.0
        return Sampling(**values, seed=self.seed)

    def most_tokens(self, defaults: Mapping[str, Any]) -> int:
        """The largest number of new tokens. defaults: of the model, from `generation_defaults`."""
        return int(_first(self.max_new_tokens, defaults.get("max_new_tokens"), _MAX_NEW_TOKENS))


def generation_defaults(config: Any) -> dict[str, Any]:
    """The settings in a generation config of transformers by name, None where it is silent.

    config: a generation config.
    """
    return {name: getattr(config, name, None) for name in (*_SAMPLING_DEFAULTS, "do_sample", "max_new_tokens")}


def stored_settings(source: Source) -> Any:
    """The generation config of transformers that lies beside a checkpoint, or the one that its config implies."""
    folder = source.path if source.path.is_dir() else source.path.parent / "no folder"
    return generation_config_of(source.config, folder)


def stop_ids(config: Any) -> frozenset[int]:
    """Token ids that end a text. config: a generation config; its eos_token_id may be a number, a list or None."""
    ids = config.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else map(int, ids))


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next(value for value in values if value is not None)
