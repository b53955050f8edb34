"""The packed checkpoint format, versions 1 and 2 (docs/format.md): what `quantization_config` in config.json says.

It names every module whose tensors are not what the plain model would have. The tensors themselves are ordinary
safetensors, `<module path>.codes`, `.scales`, `.zeros`, `.bias`, `.column_scale`. What
version 1 can say is written as version 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from subnibble.errors import BadRecipe, CheckpointError
from subnibble.scheme import Scheme
from subnibble.tensor import PackedLayout

T = TypeVar("T")

QUANT_METHOD = "subnibble"
FORMAT_VERSIONS = (1, 2)
_LINEAR, _SCALED_LINEAR = "linear", "scaled_linear"
_MODULE_KEYS = {
    _LINEAR: {"kind", "rows", "ranges", "bias"},
    _SCALED_LINEAR: {"kind", "rows", "ranges", "bias"},
    "embedding": {"kind", "rows", "ranges"},
    "tied_head": {"kind", "table"},
    "norm_bias": {"kind", "rows"},
}


@dataclass(frozen=True)
class PackedLinearEntry:
    """A linear with a packed weight. bias, column_scale: whether `<path>.bias`, `<path>.column_scale` is stored."""

    layout: PackedLayout
    bias: bool
    column_scale: bool = False


@dataclass(frozen=True)
class PackedEmbeddingEntry:
    """An embedding table, packed."""

    layout: PackedLayout


@dataclass(frozen=True)
class TiedHeadEntry:
    """An output projection without tensors of its own: it uses the packed table of the embedding at `table`."""

    table: str


@dataclass(frozen=True)
class NormBiasEntry:
    """A norm that gained a bias of `rows` channels, stored as `<path>.bias`."""

    rows: int


Entry = PackedLinearEntry | PackedEmbeddingEntry | TiedHeadEntry | NormBiasEntry


@dataclass(frozen=True)
class PackedConfig:
    """Module path -> what is stored for it."""

    modules: Mapping[str, Entry] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        layouts = [e.layout for e in self.modules.values() if isinstance(e, PackedLinearEntry | PackedEmbeddingEntry)]
        schemes = {scheme.name: scheme.to_dict() for layout in layouts for _, scheme in layout.ranges}
        return {
            "quant_method": QUANT_METHOD,
            "format_version": 2 if self._has_column_scales else 1,
            "schemes": schemes,
            "modules": {path: _entry_to_dict(entry) for path, entry in self.modules.items()},
        }

    @property
    def _has_column_scales(self) -> bool:
        return any(isinstance(entry, PackedLinearEntry) and entry.column_scale for entry in self.modules.values())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "quantization_config") -> Self:
        """Read a `quantization_config`; anything this version does not know is a `CheckpointError`."""
        version = values.get("format_version")
        # 1 == True and 1 == 1.0, which JSON tells apart.
        if type(version) is not int or version not in FORMAT_VERSIONS:
            known = " and ".join(map(str, FORMAT_VERSIONS))
            raise CheckpointError(
                f"{where}: format version {version!r}; this subnibble reads versions {known}: "
                "upgrade subnibble, or quantize the model again"
            )
        unknown = sorted(set(values) - {"quant_method", "format_version", "schemes", "modules"})
        if unknown:
            raise CheckpointError(f"{where}: unknown key {unknown[0]!r}; it was written by a newer subnibble")
        try:
            schemes = {name: Scheme.from_dict(scheme) for name, scheme in values["schemes"].items()}
            modules = {path: _entry_from_dict(entry, schemes) for path, entry in values["modules"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, BadRecipe) as error:
            raise CheckpointError(f"{where} is damaged ({error!r}); quantize the model again") from error
        found = cls(modules)
        if version == 1 and found._has_column_scales:
            raise CheckpointError(f"{where}: {_SCALED_LINEAR} came with version 2 and this says version 1")
        return found


def stored_shapes(packed: PackedConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the packed modules need in the checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, entry in packed.modules.items():
        match entry:
            case PackedLinearEntry(layout) | PackedEmbeddingEntry(layout):
                shapes |= {f"{path}.{name}": tuple(part.shape) for name, part in layout.empty().state().items()}
        match entry:
            case PackedLinearEntry(layout, bias, column_scale):
                shapes |= {f"{path}.bias": (layout.rows,)} if bias else {}
                shapes |= {f"{path}.column_scale": (layout.columns,)} if column_scale else {}
            case NormBiasEntry(rows):
                shapes[f"{path}.bias"] = (rows,)
    return shapes


def packed_config_of(config: Any) -> PackedConfig | None:
    """The packed modules of a transformers config, or None if it is not a subnibble checkpoint's."""
    values = getattr(config, "quantization_config", None)
    if values is not None and not isinstance(values, Mapping):
        values = values.to_dict()
    if values is None or values.get("quant_method") != QUANT_METHOD:
        return None
    return PackedConfig.from_dict(values)


def _entry_to_dict(entry: Entry) -> dict[str, Any]:
    match entry:
        case PackedLinearEntry(layout, bias, column_scale):
            kind = _SCALED_LINEAR if column_scale else _LINEAR
            return {"kind": kind, **_layout_to_dict(layout), "bias": bias}
        case PackedEmbeddingEntry(layout):
            return {"kind": "embedding", **_layout_to_dict(layout)}
        case TiedHeadEntry(table):
            return {"kind": "tied_head", "table": table}
        case NormBiasEntry(rows):
            return {"kind": "norm_bias", "rows": rows}


def _entry_from_dict(values: Mapping[str, Any], schemes: Mapping[str, Scheme]) -> Entry:
    kind = values["kind"]
    if set(values) != _MODULE_KEYS.get(kind):
        raise CheckpointError(f"module of kind {kind!r} has keys {sorted(values)}; written by a newer subnibble?")
    if kind == "tied_head":
        return TiedHeadEntry(_typed(values["table"], str))
    if kind == "norm_bias":
        return NormBiasEntry(_count(values["rows"]))
    ranges = tuple((_count(columns), schemes[name]) for columns, name in values["ranges"])
    if not ranges:
        raise ValueError("a packed matrix without column ranges")
    layout = PackedLayout(_count(values["rows"]), ranges)
    if kind == "embedding":
        return PackedEmbeddingEntry(layout)
    return PackedLinearEntry(layout, _typed(values["bias"], bool), kind == _SCALED_LINEAR)


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
    return {"rows": layout.rows, "ranges": [[columns, scheme.name] for columns, scheme in layout.ranges]}
