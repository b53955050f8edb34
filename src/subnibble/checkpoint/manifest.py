"""The packed checkpoint format, version 1 (docs/format.md): what `quantization_config` in config.json says.

It names every module whose tensors are not what the plain model would have. The tensors themselves are ordinary
safetensors: `<module path>.codes`, `.scales`, `.zeros`, and what else a kind of module has. Until 0.2.0 the version may
change its meaning; after that a change gets a new number.
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
from subnibble.tensor.packed import PackedLayout
from subnibble.tensor.scheme import Scheme

_S = TypeVar("_S", Scheme, ActivationScheme, CacheScheme)

QUANT_METHOD = "subnibble"
FORMAT_VERSION = 1
_KEYS = {"quant_method", "format_version", "schemes", "activations", "cache", "prefix", "modules"}


@dataclass(frozen=True)
class PackedConfig:
    """modules: path -> what is stored for it. cache: how the KV cache is coded, None for not at all. prefix: tokens
    before every text, whose keys and values the attentions hold.
    """

    modules: Mapping[str, Spec] = field(default_factory=dict)
    cache: CacheScheme | None = None
    prefix: PrefixIds | None = None

    def __post_init__(self) -> None:
        held = {spec.tokens for spec in self.modules.values() if isinstance(spec, PrefixSpec)}
        if held != (set() if self.prefix is None else {len(self.prefix.ids)}):
            raise ValueError("a prefix's ids and what attentions hold of it do not belong together")
        for path, spec in self.modules.items():
            if isinstance(spec, PackedLinearSpec) and spec.input is not None:
                other = self.modules.get(spec.input)
                if not isinstance(other, PackedLinearSpec) or other.input is not None or not spec.enters_as(other):
                    raise ValueError(f"{path} enters as {spec.input}, which is no packed linear that enters alike")
        cache = self.cache
        if cache is not None and cache.is_centered and cache.key_basis not in self._centers:
            raise ValueError("the cache codes keys less a centre, and no attention holds one of its kind")

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of config.json, but for the checksums (`checksums.py`)."""
        schemes = {scheme.name: scheme.to_dict() for layout in self._layouts for _, scheme in layout.ranges}
        activations = [spec.activation for spec in self.linears if spec.activation is not None]
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "schemes": schemes,
            "activations": {scheme.name: scheme.to_dict() for scheme in activations},
            "cache": None if self.cache is None else self.cache.to_dict(),
            "prefix": None if self.prefix is None else self.prefix.to_dict(),
            "modules": {path: spec.to_dict() for path, spec in self.modules.items()},
        }

    @property
    def _centers(self) -> set[tuple[str, str]]:
        """For which bases of keys there are centres."""
        return {spec.key_basis for spec in self.modules.values() if isinstance(spec, KeyCenterSpec)}

    @property
    def linears(self) -> list[PackedLinearSpec]:
        """What is said of each packed linear."""
        return [spec for spec in self.modules.values() if isinstance(spec, PackedLinearSpec)]

    @property
    def _layouts(self) -> list[PackedLayout]:
        return [layout for spec in self.modules.values() for layout in spec.matrices.values()]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "quantization_config") -> Self:
        """Read a `quantization_config`; anything that version 1 does not know is a `CheckpointError`."""
        version = values.get("format_version")
        # 1 == True and 1 == 1.0, which JSON tells apart.
        if type(version) is not int or version != FORMAT_VERSION:
            raise CheckpointError(
                f"{where}: format version {version!r}; this subnibble reads version {FORMAT_VERSION}: "
                "upgrade subnibble, or quantize the model again"
            )
        unknown = sorted(set(values) - _KEYS - {CHECKSUMS})
        if unknown:
            raise CheckpointError(f"{where}: unknown key {unknown[0]!r}; it was written by another subnibble")
        try:
            labels = Labels(
                {name: _complete(Scheme, scheme) for name, scheme in values["schemes"].items()},
                {name: _complete(ActivationScheme, scheme) for name, scheme in values["activations"].items()},
            )
            cache, prefix, modules = values["cache"], values["prefix"], values["modules"]
            return cls(
                {path: spec_from_dict(with_input(one, modules), labels) for path, one in modules.items()},
                None if cache is None else _complete(CacheScheme, cache),
                None if prefix is None else PrefixIds.from_dict(prefix),
            )
        except (KeyError, TypeError, ValueError, AttributeError, BadRecipe) as error:
            raise CheckpointError(f"{where} is damaged ({error!r}); quantize the model again") from error


def _complete(kind: type[_S], values: Mapping[str, Any]) -> _S:
    """A scheme of which a recipe may leave keys out, and a checkpoint may not."""
    found = kind.from_dict(values)
    if missing := sorted(found.to_dict().keys() - values.keys()):
        raise ValueError(f"no {missing[0]} in {dict(values)}")
    return found


def stored_shapes(packed: PackedConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the packed modules need in the checkpoint."""
    return {
        f"{path}.{name}": tuple(part.shape)
        for path, spec in packed.modules.items()
        for name, part in spec.parts.items()
    }


def packed_config_of(config: Any) -> PackedConfig | None:
    """The packed modules of a transformers config, or None if it is not a subnibble checkpoint's."""
    values = getattr(config, "quantization_config", None)
    if values is not None and not isinstance(values, Mapping):
        values = values.to_dict()
    if values is None or values.get("quant_method") != QUANT_METHOD:
        return None
    return PackedConfig.from_dict(values)


def readable_config_of(config: Any, where: Path) -> PackedConfig | None:
    """As `packed_config_of`; `CheckpointError` if something else quantized the checkpoint at `where`."""
    packed = packed_config_of(config)
    if packed is None and getattr(config, "quantization_config", None):
        values = config.quantization_config
        method = values.get("quant_method") if isinstance(values, Mapping) else getattr(values, "quant_method", None)
        raise CheckpointError(f"{where} was quantized as {method!r}, which is not read here; give the original model")
    return packed


def check_plain(source: Source) -> None:
    """Raise `CheckpointError` if the source is quantized already. GGUF files count as plain: they are dequantized."""
    if packed_config_of(source.config) is not None or getattr(source.config, "quantization_config", None):
        raise CheckpointError(f"{source.path} is quantized already; give the original model")
