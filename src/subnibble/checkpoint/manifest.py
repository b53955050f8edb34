"""The manifest of the packed checkpoint format, version 1 (docs/format.md): `quantization_config` in config.json.

It lists every module whose tensors differ from those of the plain model. The tensors are ordinary safetensors:
`<module path>.codes`, `.scales`, `.zeros`; some kinds of modules have other tensors. Until release 0.2.0, version 1 may
still change; after that, every change of the format gets a new version number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from subnibble.checkpoint.checksums import CHECKSUMS
from subnibble.checkpoint.json_forms import Labels
from subnibble.checkpoint.module_specs import (
    KeyCenterSpec,
    PackedLinearSpec,
    PrefixSpec,
    Spec,
    spec_from_dict,
    with_input,
)
from subnibble.checkpoint.source import Source
from subnibble.errors import BadRecipe, CheckpointError
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.cache_scheme import CacheScheme, PrefixIds
from subnibble.tensor.scheme import Scheme

_S = TypeVar("_S", Scheme, ActivationScheme, CacheScheme)

QUANT_METHOD = "subnibble"
FORMAT_VERSION = 1
_KEYS = {"quant_method", "format_version", "schemes", "activations", "cache", "prefix", "modules"}


@dataclass(frozen=True)
class PackedConfig:
    """The content of `quantization_config`, checked for contradictions when it is built.

    modules: path -> spec of each module that is stored packed or changed.
    cache: how the KV cache is quantized, None for not at all.
    prefix: tokens of a prompt prefix before every text, whose keys and values the attentions store; or None.
    """

    modules: Mapping[str, Spec] = field(default_factory=dict)
    cache: CacheScheme | None = None
    prefix: PrefixIds | None = None

    def __post_init__(self) -> None:
        lengths = {spec.tokens for spec in self.modules.values() if isinstance(spec, PrefixSpec)}
        if lengths != (set() if self.prefix is None else {len(self.prefix.ids)}):
            raise ValueError("the number of prefix ids differs from the prefix length that the attentions store")
        for path, spec in self.modules.items():
            if isinstance(spec, PackedLinearSpec) and spec.input is not None:
                other = self.modules.get(spec.input)
                if not isinstance(other, PackedLinearSpec) or other.input is not None or not spec.enters_as(other):
                    raise ValueError(
                        f"{path} shares the input of {spec.input}, which is not a packed linear with the same input "
                        "terms"
                    )
        cache = self.cache
        if cache is not None and cache.is_centered and cache.key_basis not in self._centers:
            raise ValueError(
                "the cache subtracts a mean from keys, but no attention stores a mean for its rope and key_rotation"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the `quantization_config` of config.json, except the checksums (`checksums.py`)."""
        modules = modules_to_dict(self.modules)
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "schemes": modules["schemes"],
            "activations": modules["activations"],
            "cache": None if self.cache is None else self.cache.to_dict(),
            "prefix": None if self.prefix is None else self.prefix.to_dict(),
            "modules": modules["modules"],
        }

    @property
    def _centers(self) -> set[tuple[str, str]]:
        """The key bases, (rope, key_rotation), for which attentions store means."""
        return {spec.key_basis for spec in self.modules.values() if isinstance(spec, KeyCenterSpec)}

    @property
    def linears(self) -> list[PackedLinearSpec]:
        """The specs of all packed linears."""
        return [spec for spec in self.modules.values() if isinstance(spec, PackedLinearSpec)]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "quantization_config") -> Self:
        """Read a `quantization_config`.

        where: names it in errors.
        Raises `CheckpointError` for another version, unknown keys, and missing or invalid values.
        """
        version = values.get("format_version")
        # In Python 1 == True and 1 == 1.0; in JSON they differ.
        if type(version) is not int or version != FORMAT_VERSION:
            raise CheckpointError(
                f"{where}: format version {version!r}; this subnibble reads version {FORMAT_VERSION}: "
                "upgrade subnibble, or quantize the model again"
            )
        unknown = sorted(set(values) - _KEYS - {CHECKSUMS})
        if unknown:
            raise CheckpointError(f"{where}: unknown key {unknown[0]!r}, of another version; upgrade subnibble")
        try:
            cache, prefix = values["cache"], values["prefix"]
            return cls(
                modules_from_dict(values),
                None if cache is None else _complete(CacheScheme, cache),
                None if prefix is None else PrefixIds.from_dict(prefix),
            )
        except (KeyError, TypeError, ValueError, AttributeError, BadRecipe) as error:
            raise CheckpointError(f"{where} is damaged ({error!r}); quantize the model again") from error


def modules_to_dict(modules: Mapping[str, Spec]) -> dict[str, Any]:
    """Return the specs of modules and the schemes that they name, under "schemes", "activations" and "modules".

    modules: path -> spec.
    """
    layouts = [layout for spec in modules.values() for layout in spec.matrices.values()]
    linears = [spec for spec in modules.values() if isinstance(spec, PackedLinearSpec)]
    activations = [spec.activation for spec in linears if spec.activation is not None]
    return {
        "schemes": {scheme.name: scheme.to_dict() for layout in layouts for _, scheme in layout.ranges},
        "activations": {scheme.name: scheme.to_dict() for scheme in activations},
        "modules": {path: spec.to_dict() for path, spec in modules.items()},
    }


def modules_from_dict(values: Mapping[str, Any]) -> dict[str, Spec]:
    """Read what `modules_to_dict` returned, as path -> spec.

    Raises `KeyError`, `TypeError`, `ValueError`, `AttributeError` or `BadRecipe` for anything else.
    """
    labels = Labels(
        {name: _complete(Scheme, scheme) for name, scheme in values["schemes"].items()},
        {name: _complete(ActivationScheme, scheme) for name, scheme in values["activations"].items()},
    )
    modules = values["modules"]
    return {path: spec_from_dict(with_input(entry, modules), labels) for path, entry in modules.items()}


def _complete(kind: type[_S], values: Mapping[str, Any]) -> _S:
    """Read a scheme that must have all of its keys: in a recipe some may be missing, in a checkpoint none."""
    scheme = kind.from_dict(values)
    if missing := sorted(scheme.to_dict().keys() - values.keys()):
        raise ValueError(f"no {missing[0]} in {dict(values)}")
    return scheme


def stored_shapes(packed: PackedConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor that the packed modules store in the checkpoint."""
    return {
        f"{path}.{name}": tuple(tensor.shape)
        for path, spec in packed.modules.items()
        for name, tensor in spec.parts.items()
    }


def packed_config_of(config: Any) -> PackedConfig | None:
    """Read the `PackedConfig` from a transformers config; None if the config is not that of a subnibble checkpoint."""
    values = getattr(config, "quantization_config", None)
    if values is not None and not isinstance(values, Mapping):
        values = values.to_dict()
    if values is None or values.get("quant_method") != QUANT_METHOD:
        return None
    return PackedConfig.from_dict(values)


def readable_config_of(config: Any, where: Path) -> PackedConfig | None:
    """Read the `PackedConfig` as `packed_config_of` does, and refuse models that another tool quantized.

    where: the checkpoint, for the error.
    Returns None for a plain model. Raises `CheckpointError` for another tool's quantization.
    """
    packed = packed_config_of(config)
    if packed is None and getattr(config, "quantization_config", None):
        values = config.quantization_config
        method = values.get("quant_method") if isinstance(values, Mapping) else getattr(values, "quant_method", None)
        raise CheckpointError(
            f"{where} was quantized as {method!r} and cannot be used as it is: `subnibble convert` packs some "
            "formats of other tools (GPTQ, compressed-tensors); else give the original model"
        )
    return packed


def check_plain(source: Source) -> None:
    """Raise `CheckpointError` if the source is quantized already. GGUF files count as plain."""
    # GGUF files are dequantized when they are read.
    if packed_config_of(source.config) is not None or getattr(source.config, "quantization_config", None):
        raise CheckpointError(f"{source.path} is quantized already; give the original model")
