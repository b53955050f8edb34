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
from subnibble.checkpoint.entries import (
    Entry,
    InputMixEntry,
    KeyCenterEntry,
    NormBiasEntry,
    PackedEmbeddingEntry,
    PackedLinearEntry,
    PrefixEntry,
    TiedHeadEntry,
)
from subnibble.checkpoint.source import Source
from subnibble.errors import BadRecipe, CheckpointError
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.cache_scheme import CacheScheme, PrefixIds
from subnibble.tensor.packed import PackedLayout
from subnibble.tensor.scheme import Scheme

T = TypeVar("T")
_S = TypeVar("_S", Scheme, ActivationScheme, CacheScheme)

QUANT_METHOD = "subnibble"
FORMAT_VERSION = 1
_KEYS = {"quant_method", "format_version", "schemes", "activations", "cache", "prefix", "modules"}
# Terms of a linear that it may lack, with what their absence means.
_NO_TERMS: dict[str, Any] = {
    "input": None,
    "column_scale": False,
    "gather": False,
    "hadamard": [],
    "activation": None,
    "salient": None,
    "residual": "none",
    "low_rank": None,
}
_OF_INPUT = {"column_scale", "gather", "hadamard", "activation", "residual"}
_MODULE_KEYS = {
    "linear": {"kind", "rows", "ranges", "bias"},
    "embedding": {"kind", "rows", "ranges"},
    "tied_head": {"kind", "table"},
    "input_mix": {"kind", "widths"},
    "norm_bias": {"kind", "rows"},
    "prefix": {"kind", "heads", "tokens", "width"},
    "key_center": {"kind", "heads", "width", "rope", "key_rotation"},
}


@dataclass(frozen=True)
class PackedConfig:
    """modules: path -> what is stored for it. cache: how the KV cache is coded, None for not at all. prefix: tokens
    before every text, whose keys and values the attentions hold.
    """

    modules: Mapping[str, Entry] = field(default_factory=dict)
    cache: CacheScheme | None = None
    prefix: PrefixIds | None = None

    def __post_init__(self) -> None:
        held = {entry.tokens for entry in self.modules.values() if isinstance(entry, PrefixEntry)}
        if held != (set() if self.prefix is None else {len(self.prefix.ids)}):
            raise ValueError("a prefix's ids and what attentions hold of it do not belong together")
        for path, entry in self.modules.items():
            if isinstance(entry, PackedLinearEntry) and entry.input is not None:
                other = self.modules.get(entry.input)
                if not isinstance(other, PackedLinearEntry) or other.input is not None or not entry.enters_as(other):
                    raise ValueError(f"{path} enters as {entry.input}, which is no packed linear that enters alike")
        cache = self.cache
        if cache is not None and cache.is_centered and cache.key_basis not in self._centers:
            raise ValueError("the cache codes keys less a centre, and no attention holds one of its kind")

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of config.json, but for the checksums (`checksums.py`)."""
        schemes = {scheme.name: scheme.to_dict() for layout in self._layouts for _, scheme in layout.ranges}
        activations = [entry.activation for entry in self.linears if entry.activation is not None]
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "schemes": schemes,
            "activations": {scheme.name: scheme.to_dict() for scheme in activations},
            "cache": None if self.cache is None else self.cache.to_dict(),
            "prefix": None if self.prefix is None else self.prefix.to_dict(),
            "modules": {path: _entry_to_dict(entry) for path, entry in self.modules.items()},
        }

    @property
    def _centers(self) -> set[tuple[str, str]]:
        """For which bases of keys there are centres."""
        return {entry.key_basis for entry in self.modules.values() if isinstance(entry, KeyCenterEntry)}

    @property
    def linears(self) -> list[PackedLinearEntry]:
        """What is said of each packed linear."""
        return [entry for entry in self.modules.values() if isinstance(entry, PackedLinearEntry)]

    @property
    def _layouts(self) -> list[PackedLayout]:
        tables = [entry.layout for entry in self.modules.values() if isinstance(entry, PackedEmbeddingEntry)]
        return [layout for entry in self.linears for layout in entry.matrices.values()] + tables

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
            labels = _Labels(
                {name: _complete(Scheme, scheme) for name, scheme in values["schemes"].items()},
                {name: _complete(ActivationScheme, scheme) for name, scheme in values["activations"].items()},
            )
            cache, prefix, modules = values["cache"], values["prefix"], values["modules"]
            return cls(
                {path: _entry_from_dict(_with_input(entry, modules), labels) for path, entry in modules.items()},
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
        for path, entry in packed.modules.items()
        for name, part in entry.parts.items()
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


def _entry_to_dict(entry: Entry) -> dict[str, Any]:
    match entry:
        case PackedLinearEntry():
            return _linear_to_dict(entry)
        case PackedEmbeddingEntry(layout):
            return {"kind": "embedding", **_layout_to_dict(layout)}
        case TiedHeadEntry(table):
            return {"kind": "tied_head", "table": table}
        case InputMixEntry(widths):
            return {"kind": "input_mix", "widths": list(widths)}
        case NormBiasEntry(rows):
            return {"kind": "norm_bias", "rows": rows}
        case PrefixEntry(heads, tokens, width):
            return {"kind": "prefix", "heads": heads, "tokens": tokens, "width": width}
        case KeyCenterEntry():
            return {"kind": "key_center", **entry.to_dict()}


def _linear_to_dict(entry: PackedLinearEntry) -> dict[str, Any]:
    low_rank = None
    if entry.low_rank is not None:
        down, up = entry.low_rank
        low_rank = {"rank": down.rows, "down": _ranges_to_list(down), "up": _ranges_to_list(up)}
    own = {
        "column_scale": entry.column_scale,
        "gather": entry.gather,
        "hadamard": list(entry.blocks),
        "activation": None if entry.activation is None else entry.activation.name,
        "residual": entry.residual,
    }
    terms = {
        "input": entry.input,
        **(own if entry.input is None else {}),
        "salient": None if entry.salient is None else _ranges_to_list(entry.salient),
        "low_rank": low_rank,
    }
    said = {key: value for key, value in terms.items() if value != _NO_TERMS[key]}
    return {"kind": "linear", **_layout_to_dict(entry.layout), "bias": entry.bias, **said}


@dataclass(frozen=True)
class _Labels:
    """What the labels of a `quantization_config` stand for."""

    schemes: Mapping[str, Scheme]
    activations: Mapping[str, ActivationScheme]

    def layout(self, rows: int, ranges: Any) -> PackedLayout:
        found = tuple((_count(columns), self.schemes[name]) for columns, name in ranges)
        if not found:
            raise ValueError("a packed matrix without column ranges")
        return PackedLayout(_count(rows), found)


def _entry_from_dict(values: Mapping[str, Any], labels: _Labels) -> Entry:
    kind = values["kind"]
    terms = _NO_TERMS.keys() if kind == "linear" else set()
    if set(values) - terms != _MODULE_KEYS.get(kind):
        raise CheckpointError(f"module of kind {kind!r} has keys {sorted(values)}; written by another subnibble?")
    if kind == "tied_head":
        return TiedHeadEntry(_typed(values["table"], str))
    if kind == "input_mix":
        widths = tuple(_count(width) for width in values["widths"])
        if not widths:
            raise ValueError("a matrix without blocks")
        return InputMixEntry(widths)
    if kind == "norm_bias":
        return NormBiasEntry(_count(values["rows"]))
    if kind == "prefix":
        return PrefixEntry(*(_count(values[key]) for key in ("heads", "tokens", "width")))
    if kind == "key_center":
        basis = (_typed(values[key], str) for key in ("rope", "key_rotation"))
        return KeyCenterEntry(_count(values["heads"]), _count(values["width"]), *basis)
    layout = labels.layout(values["rows"], values["ranges"])
    if kind == "embedding":
        return PackedEmbeddingEntry(layout)
    return _linear_from_dict(values, layout, labels)


def _with_input(values: Mapping[str, Any], modules: Mapping[str, Any]) -> Mapping[str, Any]:
    """An entry that enters as another does, with what that does to its input."""
    source = values.get("input")
    if source is None:
        return values
    if own := sorted(_OF_INPUT & values.keys()):
        raise ValueError(f"it enters as {source}, and has {own[0]} of its own")
    return {**values, **{key: modules[source][key] for key in _OF_INPUT & modules[source].keys()}}


def _linear_from_dict(values: Mapping[str, Any], layout: PackedLayout, labels: _Labels) -> PackedLinearEntry:
    for key, absent in _NO_TERMS.items():
        if key in values and values[key] == absent and type(values[key]) is type(absent):
            raise ValueError(f"{key} says {absent!r}, which a linear without it means")
    terms = _NO_TERMS | dict(values)
    low_rank, branch = None, terms["low_rank"]
    if branch is not None:
        if set(branch) != {"rank", "down", "up"}:
            raise KeyError(f"low_rank has keys {sorted(branch)}")
        low_rank = (labels.layout(branch["rank"], branch["down"]), labels.layout(layout.rows, branch["up"]))
    return PackedLinearEntry(
        layout,
        _typed(terms["bias"], bool),
        _typed(terms["column_scale"], bool),
        _typed(terms["gather"], bool),
        tuple(_count(width) for width in terms["hadamard"]),
        None if terms["activation"] is None else labels.activations[terms["activation"]],
        None if terms["salient"] is None else labels.layout(layout.rows, terms["salient"]),
        _typed(terms["residual"], str),
        low_rank,
        None if terms["input"] is None else _typed(terms["input"], str),
    )


def _typed(value: Any, kind: type[T]) -> T:
    # bool is an int to isinstance, and 64.0 must not pass for 64.
    if type(value) is not kind:
        raise TypeError(f"{value!r} where {kind.__name__} is expected")
    return value


def _count(value: Any) -> int:
    if _typed(value, int) < 1:
        raise ValueError(f"{value} where a positive count is expected")
    return int(value)


def _layout_to_dict(layout: PackedLayout) -> dict[str, Any]:
    return {"rows": layout.rows, "ranges": _ranges_to_list(layout)}


def _ranges_to_list(layout: PackedLayout) -> list[list[Any]]:
    return [[columns, scheme.name] for columns, scheme in layout.ranges]
