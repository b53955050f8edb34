"""The packed checkpoint format, versions 1 to 4 (docs/format.md): what `quantization_config` in config.json says.

It names every module whose tensors are not what the plain model would have. The tensors themselves are ordinary
safetensors: `<module path>.codes`, `.scales`, `.zeros`, and what else a kind of module has. What a lower version can
say is written as that version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from subnibble.cache_scheme import CacheScheme, PrefixIds
from subnibble.errors import BadRecipe, CheckpointError
from subnibble.runtime.hadamard import hadamard_factors
from subnibble.runtime.ops import RESIDUALS, LinearTerms
from subnibble.scheme import ActivationScheme, Scheme
from subnibble.tensor import PackedLayout

T = TypeVar("T")

QUANT_METHOD = "subnibble"
FORMAT_VERSIONS = (1, 2, 3, 4, 5)
# Where an attention holds a prefix's states, and under which names there.
PREFIX, PREFIX_NAMES = "prefix", ("keys", "values")
# Where it holds the centre of its keys.
KEY_CENTER = "key_center"
_LINEAR, _SCALED_LINEAR, _COMPOSED_LINEAR = "linear", "scaled_linear", "composed_linear"
_MODULE_KEYS = {
    _LINEAR: {"kind", "rows", "ranges", "bias"},
    _SCALED_LINEAR: {"kind", "rows", "ranges", "bias"},
    _COMPOSED_LINEAR: {"kind", "rows", "ranges", "bias"}
    | {"column_scale", "gather", "hadamard", "activation", "salient", "residual", "low_rank"},
    "embedding": {"kind", "rows", "ranges"},
    "tied_head": {"kind", "table"},
    "norm_bias": {"kind", "rows"},
    "prefix": {"kind", "heads", "tokens", "width"},
    "key_center": {"kind", "heads", "width", "rope", "key_rotation"},
}


@dataclass(frozen=True)
class PackedLinearEntry:
    """A linear with a packed weight. bias, column_scale, gather: whether `<path>.bias` and so on is stored.

    blocks, activation, residual: see `ops.LinearTerms`; salient, low_rank: the layouts of its matrices.
    """

    layout: PackedLayout
    bias: bool
    column_scale: bool = False
    gather: bool = False
    blocks: tuple[int, ...] = ()
    activation: ActivationScheme | None = None
    salient: PackedLayout | None = None
    residual: str = "none"
    low_rank: tuple[PackedLayout, PackedLayout] | None = None

    def __post_init__(self) -> None:
        columns, rows = self.layout.columns, self.layout.rows
        if self.residual not in RESIDUALS or (self.residual != "none" and self.salient is None):
            raise ValueError(f"residual is {self.residual!r} with{'' if self.salient else 'out'} salient columns")
        if self.blocks and sum(self.blocks) != columns:
            raise ValueError(f"Hadamard blocks {self.blocks} do not add up to {columns} columns")
        if any(hadamard_factors(width) is None for width in self.blocks):
            raise ValueError(f"no Hadamard matrix is known for one of the orders {self.blocks}")
        if self.salient is not None and (self.salient.rows != rows or self.salient.columns > columns):
            raise ValueError(f"{self.salient.columns} salient columns do not fit a weight of {rows} x {columns}")
        if self.low_rank is not None:
            down, up = self.low_rank
            if (down.columns, up.rows) != (columns, rows) or up.columns != down.rows:
                raise ValueError(f"a low-rank branch does not fit a weight of {rows} x {columns}")

    @property
    def matrices(self) -> dict[str, PackedLayout]:
        """Every packed matrix by the prefix of its stored names."""
        down, up = self.low_rank or (None, None)
        named = {"": self.layout, "salient.": self.salient, "down.": down, "up.": up}
        return {prefix: layout for prefix, layout in named.items() if layout is not None}

    @property
    def is_composed(self) -> bool:
        """Whether it has a term that versions 1 and 2 do not know."""
        return bool(self.gather or self.blocks or self.activation or self.salient or self.low_rank)

    def token_bits(self) -> int:
        """Bits of a token's quantized input, extra columns included; 16 a channel where it is not quantized."""
        if self.activation is None:
            return 16 * self.layout.columns
        bits = self.activation.token_bits(self.layout.columns)
        if self.salient is not None:
            # The same codes meet a second weight: columns of the product, and so bits that are read.
            bits += self.activation.token_bits(self.salient.columns) * (1 if self.residual == "none" else 2)
        if self.low_rank is not None:
            bits += self.activation.token_bits(self.low_rank[0].rows)
        return bits


def linear_entry(terms: LinearTerms) -> PackedLinearEntry:
    """The entry of a linear that contains `terms`."""
    low_rank = None if terms.low_rank is None else (terms.low_rank[0].layout, terms.low_rank[1].layout)
    return PackedLinearEntry(
        layout=terms.weight.layout,
        bias=terms.bias is not None,
        column_scale=terms.column_scale is not None,
        gather=terms.gather is not None,
        blocks=terms.blocks,
        activation=terms.activation,
        salient=None if terms.salient is None else terms.salient.layout,
        residual=terms.residual,
        low_rank=low_rank,
    )


def linear_state(terms: LinearTerms) -> dict[str, Tensor]:
    """What is stored for a linear that contains `terms`, but for its bias, by name relative to it."""
    tensors = {
        f"{prefix}{name}": tensor
        for prefix, matrix in terms.matrices.items()
        for name, tensor in matrix.state().items()
    }
    vectors = {"column_scale": terms.column_scale, "gather": terms.gather}
    return tensors | {name: tensor for name, tensor in vectors.items() if tensor is not None}


def gather_type(columns: int) -> torch.dtype:
    """The stored type of a gather of that many channels."""
    return torch.int16 if columns <= torch.iinfo(torch.int16).max else torch.int32


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


@dataclass(frozen=True)
class PrefixEntry:
    """An attention that holds keys and values of a prefix, (heads, tokens, width) float16 each."""

    heads: int
    tokens: int
    width: int


def prefix_state(path: str, states: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """What is stored of a prefix's keys and values in the attention at `path`, by name."""
    return {f"{path}.{PREFIX}.{name}": part for name, part in zip(PREFIX_NAMES, states, strict=True)}


@dataclass(frozen=True)
class KeyCenterEntry:
    """What an attention's cache codes keys less, `<path>.mean`, (heads, width) float16, path ending in `KEY_CENTER`.

    rope, key_rotation: of the `CacheScheme` that it was made for.
    """

    heads: int
    width: int
    rope: str
    key_rotation: str

    def __post_init__(self) -> None:
        CacheScheme(4, rope=self.rope, key_rotation=self.key_rotation)

    @classmethod
    def of(cls, center: Tensor, scheme: CacheScheme) -> Self:
        """Of a centre (heads, width) that was made for `scheme`."""
        return cls(center.shape[0], center.shape[1], scheme.rope, scheme.key_rotation)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary."""
        return asdict(self)


Entry = PackedLinearEntry | PackedEmbeddingEntry | TiedHeadEntry | NormBiasEntry | PrefixEntry | KeyCenterEntry


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
        cache = self.cache
        if cache is not None and cache.key_center != "none" and (cache.rope, cache.key_rotation) not in self._centers:
            raise ValueError("the cache codes keys less a centre, and no attention holds one of its kind")

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        schemes = {scheme.name: scheme.to_dict() for layout in self._layouts for _, scheme in layout.ranges}
        version = self._version
        found = [entry.activation for entry in self._linears if entry.activation is not None]
        activations = {"activations": {scheme.name: scheme.to_dict() for scheme in found}} if version > 2 else {}
        cache = {
            "cache": None if self.cache is None else self.cache.to_dict(),
            "prefix": None if self.prefix is None else self.prefix.to_dict(),
        }
        return {
            "quant_method": QUANT_METHOD,
            "format_version": version,
            "schemes": schemes,
            **activations,
            **(cache if version > 3 else {}),
            "modules": {path: _entry_to_dict(entry) for path, entry in self.modules.items()},
        }

    @property
    def _centers(self) -> set[tuple[str, str]]:
        """For which bases of keys there are centres."""
        found = (entry for entry in self.modules.values() if isinstance(entry, KeyCenterEntry))
        return {(entry.rope, entry.key_rotation) for entry in found}

    @property
    def _linears(self) -> list[PackedLinearEntry]:
        return [entry for entry in self.modules.values() if isinstance(entry, PackedLinearEntry)]

    @property
    def _layouts(self) -> list[PackedLayout]:
        tables = [entry.layout for entry in self.modules.values() if isinstance(entry, PackedEmbeddingEntry)]
        return [layout for entry in self._linears for layout in entry.matrices.values()] + tables

    @property
    def _version(self) -> int:
        """The lowest version that can say this."""
        if self._centers:
            return 5
        if self.cache is not None or self.prefix is not None:
            return 4
        if any(entry.activation is not None and entry.activation.outliers for entry in self._linears):
            return 4
        grids = {scheme.grid for layout in self._layouts for _, scheme in layout.ranges}
        if "mxfp4" in grids or any(entry.is_composed for entry in self._linears):
            return 3
        return 2 if any(entry.column_scale for entry in self._linears) else 1

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "quantization_config") -> Self:
        """Read a `quantization_config`; anything this version does not know is a `CheckpointError`."""
        version = values.get("format_version")
        # 1 == True and 1 == 1.0, which JSON tells apart.
        if type(version) is not int or version not in FORMAT_VERSIONS:
            known = ", ".join(map(str, FORMAT_VERSIONS))
            raise CheckpointError(
                f"{where}: format version {version!r}; this subnibble reads versions {known}: "
                "upgrade subnibble, or quantize the model again"
            )
        keys = {"quant_method", "format_version", "schemes", "modules"} | ({"activations"} if version > 2 else set())
        keys |= {"cache", "prefix"} if version > 3 else set()
        unknown = sorted(set(values) - keys)
        if unknown:
            raise CheckpointError(f"{where}: unknown key {unknown[0]!r}; it was written by a newer subnibble")
        try:
            schemes = {name: Scheme.from_dict(scheme) for name, scheme in values["schemes"].items()}
            found = values["activations"] if version > 2 else {}
            activations = {name: ActivationScheme.from_dict(scheme) for name, scheme in found.items()}
            labels = _Labels(schemes, activations)
            modules = {path: _entry_from_dict(entry, labels) for path, entry in values["modules"].items()}
            cache, prefix = (values[key] if version > 3 else None for key in ("cache", "prefix"))
            config = cls(
                modules,
                None if cache is None else CacheScheme.from_dict(cache),
                None if prefix is None else PrefixIds.from_dict(prefix),
            )
        except (KeyError, TypeError, ValueError, AttributeError, BadRecipe) as error:
            raise CheckpointError(f"{where} is damaged ({error!r}); quantize the model again") from error
        if config._version > version:
            raise CheckpointError(
                f"{where}: what it describes came with version {config._version} and it says version {version}"
            )
        return config


def stored_shapes(packed: PackedConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the packed modules need in the checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, entry in packed.modules.items():
        match entry:
            case PackedLinearEntry(layout, bias, column_scale, gather):
                for prefix, matrix in entry.matrices.items():
                    shapes |= _matrix_shapes(f"{path}.{prefix}", matrix)
                shapes |= {f"{path}.bias": (layout.rows,)} if bias else {}
                shapes |= {f"{path}.column_scale": (layout.columns,)} if column_scale else {}
                shapes |= {f"{path}.gather": (layout.columns,)} if gather else {}
            case PackedEmbeddingEntry(layout):
                shapes |= _matrix_shapes(f"{path}.", layout)
            case NormBiasEntry(rows):
                shapes[f"{path}.bias"] = (rows,)
            case PrefixEntry(heads, tokens, width):
                shapes |= dict.fromkeys((f"{path}.{PREFIX}.{name}" for name in PREFIX_NAMES), (heads, tokens, width))
            case KeyCenterEntry(heads, width):
                shapes[f"{path}.mean"] = (heads, width)
    return shapes


def _matrix_shapes(prefix: str, layout: PackedLayout) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}{name}": tuple(part.shape) for name, part in layout.empty().state().items()}


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
        case PackedLinearEntry() if entry.is_composed:
            return _composed_to_dict(entry)
        case PackedLinearEntry(layout, bias, column_scale):
            kind = _SCALED_LINEAR if column_scale else _LINEAR
            return {"kind": kind, **_layout_to_dict(layout), "bias": bias}
        case PackedEmbeddingEntry(layout):
            return {"kind": "embedding", **_layout_to_dict(layout)}
        case TiedHeadEntry(table):
            return {"kind": "tied_head", "table": table}
        case NormBiasEntry(rows):
            return {"kind": "norm_bias", "rows": rows}
        case PrefixEntry(heads, tokens, width):
            return {"kind": "prefix", "heads": heads, "tokens": tokens, "width": width}
        case KeyCenterEntry():
            return {"kind": "key_center", **entry.to_dict()}


def _composed_to_dict(entry: PackedLinearEntry) -> dict[str, Any]:
    low_rank = None
    if entry.low_rank is not None:
        down, up = entry.low_rank
        low_rank = {"rank": down.rows, "down": _ranges_to_list(down), "up": _ranges_to_list(up)}
    return {
        "kind": _COMPOSED_LINEAR,
        **_layout_to_dict(entry.layout),
        "bias": entry.bias,
        "column_scale": entry.column_scale,
        "gather": entry.gather,
        "hadamard": list(entry.blocks),
        "activation": None if entry.activation is None else entry.activation.name,
        "salient": None if entry.salient is None else _ranges_to_list(entry.salient),
        "residual": entry.residual,
        "low_rank": low_rank,
    }


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
    if set(values) != _MODULE_KEYS.get(kind):
        raise CheckpointError(f"module of kind {kind!r} has keys {sorted(values)}; written by a newer subnibble?")
    if kind == "tied_head":
        return TiedHeadEntry(_typed(values["table"], str))
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
    if kind == _COMPOSED_LINEAR:
        return _composed_from_dict(values, layout, labels)
    return PackedLinearEntry(layout, _typed(values["bias"], bool), kind == _SCALED_LINEAR)


def _composed_from_dict(values: Mapping[str, Any], layout: PackedLayout, labels: _Labels) -> PackedLinearEntry:
    low_rank = None
    if values["low_rank"] is not None:
        branch = values["low_rank"]
        if set(branch) != {"rank", "down", "up"}:
            raise KeyError(f"low_rank has keys {sorted(branch)}")
        low_rank = (labels.layout(branch["rank"], branch["down"]), labels.layout(layout.rows, branch["up"]))
    entry = PackedLinearEntry(
        layout,
        _typed(values["bias"], bool),
        _typed(values["column_scale"], bool),
        _typed(values["gather"], bool),
        tuple(_count(width) for width in values["hadamard"]),
        None if values["activation"] is None else labels.activations[values["activation"]],
        None if values["salient"] is None else labels.layout(layout.rows, values["salient"]),
        _typed(values["residual"], str),
        low_rank,
    )
    if not entry.is_composed:
        raise ValueError(f"a {_COMPOSED_LINEAR} without a term of its own")
    return entry


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
