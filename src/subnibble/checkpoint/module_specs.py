"""What a packed checkpoint stores for a module: its spec in `quantization_config`, and its tensors by name.

The specs are the one table of what there is. A row is a field with its `Term`: how JSON spells it, and which tensors it
stands for. JSON, running linears, empty tensors, sizes and estimates derive from the rows. JSON leaves a field out if
it has its default. A new term of linears takes a row here, and a field of its name in `SiteInput` or `PackedWeight`.
Biases, which any float type may have, are float32 in `parts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from itertools import chain
from typing import Annotated, Any, ClassVar, Self, get_type_hints

import torch
from torch import Tensor

from subnibble.checkpoint import json_forms as forms
from subnibble.errors import CheckpointError
from subnibble.runtime.modules import MIX
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.cache_scheme import CacheScheme
from subnibble.tensor.hadamard import hadamard_factors
from subnibble.tensor.linear import Linear, PackedWeight, SiteInput
from subnibble.tensor.packed import PackedLayout, PackedTensor

# Where an attention holds a prefix's states, and where the centre of its keys.
PREFIX, KEY_CENTER = "prefix", "key_center"
# Fields of a linear's spec that say what happens to its input.
INPUT_TERMS = tuple(one.name for one in fields(SiteInput))


def gather_type(columns: int) -> torch.dtype:
    """The stored type of a gather of that many channels."""
    return torch.int16 if columns <= torch.iinfo(torch.int16).max else torch.int32


@dataclass(frozen=True)
class Stored:
    """A tensor. dtype: its type, or that of a vector by its length. shape: of a spec."""

    dtype: torch.dtype | Callable[[int], torch.dtype]
    shape: Callable[[Any], tuple[int, ...]]

    def empty(self, spec: ModuleSpec) -> Tensor:
        """The tensor that `spec` stores, on the meta device."""
        shape = self.shape(spec)
        dtype = self.dtype if isinstance(self.dtype, torch.dtype) else self.dtype(*shape)
        return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Term:
    """A row of the table.

    form: how JSON spells the field.
    keys: in JSON, () for the field's name.
    vector: the tensor stored under the field's name if the field is true.
    prefixes: of the stored names of the packed matrices whose layouts the field has.
    default: the field's, which JSON leaves out, `MISSING` if it has none; `terms` fills it in.
    """

    form: forms.Form
    keys: tuple[str, ...] = ()
    vector: Stored | None = None
    prefixes: tuple[str, ...] = ()
    default: Any = None


class ModuleSpec:
    """What is stored for a module. kind: its name in JSON. tensors: that it always stores, by name."""

    kind: ClassVar[str]
    tensors: ClassVar[Mapping[str, Stored]] = {}

    @classmethod
    @cache
    def terms(cls) -> dict[str, Term]:
        """The rows of the table, by field."""
        rows = ((one, get_type_hints(cls, include_extras=True)[one.name].__metadata__[0]) for one in fields(cls))  # type: ignore[arg-type]
        return {one.name: replace(row, keys=row.keys or (one.name,), default=one.default) for one, row in rows}

    @property
    def elsewhere(self) -> tuple[str, ...]:
        """Fields that another module has for this one, in JSON and tensors."""
        return ()

    @property
    def matrices(self) -> dict[str, PackedLayout]:
        """The layout of every packed matrix by the prefix of its stored names."""
        return _by_prefix({term.prefixes: getattr(self, name) for name, term in self.terms().items()})

    @property
    def parts(self) -> dict[str, Tensor]:
        """The stored tensors on the meta device, by name relative to the module."""
        own = {name: term.vector for name, term in self.terms().items() if getattr(self, name)}
        vectors = {name: one for name, one in own.items() if one is not None and name not in self.elsewhere}
        empty = {prefix: layout.empty() for prefix, layout in self.matrices.items()}
        return _states(empty) | {name: one.empty(self) for name, one in {**vectors, **self.tensors}.items()}

    def to_dict(self) -> dict[str, Any]:
        """The spec in JSON."""
        found: dict[str, Any] = {"kind": self.kind}
        for name, term in self.terms().items():
            value = getattr(self, name)
            if name not in self.elsewhere and value != term.default:
                found |= zip(term.keys, term.form.write(value), strict=True)
        return found


def spec_from_dict(values: Mapping[str, Any], labels: forms.Labels) -> Spec:
    """The spec of a module in JSON; inverse of `ModuleSpec.to_dict`, but see `with_input`."""
    kind = values["kind"]
    terms = _KINDS[kind].terms() if kind in _KINDS else {}
    needed = {key for term in terms.values() for key in term.keys if term.default is MISSING}
    known = {key for term in terms.values() for key in term.keys}
    if not terms or not needed <= values.keys() - {"kind"} <= known:
        raise CheckpointError(f"module of kind {kind!r} has keys {sorted(values)}; written by another subnibble?")
    found: dict[str, Any] = {}
    for name, term in terms.items():
        given = [values[key] for key in term.keys if key in values]
        if given and term.default is not MISSING and repr(given) == repr([*term.form.write(term.default)]):
            raise ValueError(f"{term.keys[0]} says {given[0]!r}, which a {kind} without it means")
        if given:
            found[name] = term.form.read(labels, found, *given)
    return _KINDS[kind](**found)


def with_input(values: Mapping[str, Any], modules: Mapping[str, Any]) -> Mapping[str, Any]:
    """A module in JSON that enters as another does, with what that one says of the input."""
    source = values.get("input")
    if source is None:
        return values
    keys = {key for name in INPUT_TERMS for key in PackedLinearSpec.terms()[name].keys}
    if own := sorted(keys & values.keys()):
        raise ValueError(f"it enters as {source}, and has {own[0]} of its own")
    return {**values, **{key: modules[source][key] for key in keys & modules[source].keys()}}


@dataclass(frozen=True)
class PackedLinearSpec(ModuleSpec):
    """A linear with a packed weight: a `Linear` without its numbers.

    input: path of the linear that reads the same tensor alike and stores for both what happens to it, None for itself.
    """

    kind = "linear"
    layout: Annotated[PackedLayout, Term(forms.MATRIX, ("rows", "ranges"), prefixes=("",))]
    bias: Annotated[bool, Term(forms.FLAG, vector=Stored(torch.float32, lambda s: (s.layout.rows,)))]
    column_scale: Annotated[bool, Term(forms.FLAG, vector=Stored(torch.float16, lambda s: (s.layout.columns,)))] = False
    gather: Annotated[bool, Term(forms.FLAG, vector=Stored(gather_type, lambda s: (s.layout.columns,)))] = False
    blocks: Annotated[tuple[int, ...], Term(forms.COUNTS, ("hadamard",))] = ()
    activation: Annotated[ActivationScheme | None, Term(forms.ACTIVATION)] = None
    salient: Annotated[PackedLayout | None, Term(forms.RANGES, prefixes=("salient.",))] = None
    repeated: Annotated[int, Term(forms.RESIDUAL, ("residual",))] = 0
    low_rank: Annotated[tuple[PackedLayout, PackedLayout] | None, Term(forms.FACTORS, prefixes=("down.", "up."))] = None
    input: Annotated[str | None, Term(forms.TEXT)] = None

    def __post_init__(self) -> None:
        columns, rows = self.layout.columns, self.layout.rows
        if self.repeated and (self.salient is None or self.repeated != self.salient.columns):
            raise ValueError(f"{self.repeated} channels are quantized twice, which are not the salient ones")
        if self.blocks and sum(self.blocks) != columns:
            raise ValueError(f"Hadamard blocks {self.blocks} do not add up to {columns} columns")
        if any(hadamard_factors(width) is None for width in self.blocks):
            raise ValueError(f"no Hadamard matrix is known for one of the orders {self.blocks}")
        if self.salient is not None and (self.salient.rows != rows or self.salient.columns > columns):
            raise ValueError(f"{self.salient.columns} salient columns do not fit a weight of {rows} x {columns}")
        outliers = 0 if self.activation is None else self.activation.outliers
        if outliers >= columns or (outliers and self.salient is not None):
            raise ValueError(f"{outliers} outlier channels do not fit {columns} columns, or salient ones beside them")
        if self.low_rank is not None:
            down, up = self.low_rank
            if (down.columns, up.rows) != (columns, rows) or up.columns != down.rows:
                raise ValueError(f"a low-rank branch does not fit a weight of {rows} x {columns}")

    @property
    def elsewhere(self) -> tuple[str, ...]:
        """See `ModuleSpec`."""
        return () if self.input is None else INPUT_TERMS

    def enters_as(self, other: PackedLinearSpec) -> bool:
        """Whether both may store what they do to their input once."""
        alike = all(getattr(self, name) == getattr(other, name) for name in INPUT_TERMS)
        return alike and self.layout.columns == other.layout.columns

    @property
    def stored_bits(self) -> int:
        """Bits of all that is stored, its own bias aside."""
        return 8 * sum(part.nbytes for name, part in self.parts.items() if name != "bias")

    def token_bits(self) -> int:
        """Bits of a token's quantized input, extra columns included; 16 a channel where it is not quantized."""
        if self.activation is None:
            return 16 * self.layout.columns
        bits = self.activation.token_bits(self.layout.columns)
        if self.salient is not None:
            # The same codes meet a second weight: columns of the product, and so bits that are read.
            bits += self.activation.token_bits(self.salient.columns) * (2 if self.repeated else 1)
        if self.low_rank is not None:
            bits += self.activation.without_outliers.token_bits(self.low_rank[0].rows)
        return bits


def linear_spec(own: Linear, source: str | None = None) -> PackedLinearSpec:
    """The spec of a linear. source: see `PackedLinearSpec.input`."""
    found: dict[str, Any] = {}
    for name, term in LINEAR_TERMS.items():
        value = _value(own, name)
        if term.prefixes and value is not None:
            value = tuple(matrix.layout for matrix in value) if isinstance(value, tuple) else value.layout
        found[name] = value if term.vector is None else value is not None
    return PackedLinearSpec(**found, input=source)


def linear_state(own: Linear) -> dict[str, Tensor]:
    """What is stored of a linear, by name relative to it."""
    vectors = {name: _value(own, name) for name, term in LINEAR_TERMS.items() if term.vector is not None}
    return _states(matrices_of(own.weight)) | {name: part for name, part in vectors.items() if part is not None}


def linear_of(spec: PackedLinearSpec, parts: Mapping[str, Tensor]) -> Linear:
    """The linear of a spec and of what is stored for it, by name relative to it; inverse of the two above.

    Of one that enters as another does, column scale and gather are missing.
    """
    found: dict[str, Any] = {}
    for name, term in LINEAR_TERMS.items():
        value = getattr(spec, name)
        if term.prefixes and value is not None:
            own = [(prefix, layout) for prefix, layout in spec.matrices.items() if prefix in term.prefixes]
            several = tuple(PackedTensor.from_state(_under(prefix, parts), layout) for prefix, layout in own)
            value = several if isinstance(value, tuple) else several[0]
        found[name] = value if term.vector is None else parts.get(name)
    site = SiteInput(**{name: found.pop(name) for name in INPUT_TERMS})
    return Linear(PackedWeight(found.pop("layout"), **found), site)


def matrices_of(weight: PackedWeight) -> dict[str, PackedTensor]:
    """Every packed matrix by the prefix of its stored names."""
    own = Linear(weight)
    return _by_prefix({term.prefixes: _value(own, name) for name, term in LINEAR_TERMS.items()})


# The rows of what a linear contains.
LINEAR_TERMS = {name: term for name, term in PackedLinearSpec.terms().items() if name != "input"}


def _value(own: Linear, name: str) -> Any:
    """What a linear has for a field of its spec."""
    if name in INPUT_TERMS:
        return getattr(own.input, name)
    return getattr(own.weight, "main" if name == "layout" else name)


def _by_prefix(values: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Matrices, or their layouts, by the prefix of their stored names. values: of fields, by the prefixes in them."""
    held = ((prefixes, value) for prefixes, value in values.items() if prefixes and value is not None)
    each = (zip(prefixes, value if isinstance(value, tuple) else (value,), strict=True) for prefixes, value in held)
    return dict(chain.from_iterable(each))


def _states(matrices: Mapping[str, PackedTensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": part for prefix, own in matrices.items() for name, part in own.state().items()}


def _under(prefix: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): part for name, part in parts.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class PackedEmbeddingSpec(ModuleSpec):
    """An embedding table, packed."""

    kind = "embedding"
    layout: Annotated[PackedLayout, Term(forms.MATRIX, ("rows", "ranges"), prefixes=("",))]


@dataclass(frozen=True)
class TiedHeadSpec(ModuleSpec):
    """An output projection without tensors of its own: it uses the packed table of the embedding at `table`."""

    kind = "tied_head"
    table: Annotated[str, Term(forms.TEXT)]


@dataclass(frozen=True)
class InputMixSpec(ModuleSpec):
    """A block-diagonal matrix in front of a head, at a path that ends in `MIX`. widths: of its blocks."""

    kind = "input_mix"
    tensors: ClassVar = {"matrix": Stored(torch.float32, lambda s: (sum(s.widths), max(s.widths)))}
    widths: Annotated[tuple[int, ...], Term(forms.COUNTS)]

    def __post_init__(self) -> None:
        if not self.widths:
            raise ValueError("a matrix without blocks")


def input_mix_state(path: str, blocks: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], dict[str, Spec]]:
    """What is stored of square blocks in front of the head at `path`, and their spec."""
    widths, where = tuple(block.shape[0] for block in blocks), f"{path}.{MIX}"
    rows = [torch.nn.functional.pad(block.float(), (0, max(widths) - block.shape[0])) for block in blocks]
    return {f"{where}.matrix": torch.cat(rows)}, {where: InputMixSpec(widths)}


@dataclass(frozen=True)
class NormBiasSpec(ModuleSpec):
    """A norm that gained a bias. rows: its channels."""

    kind = "norm_bias"
    tensors: ClassVar = {"bias": Stored(torch.float32, lambda s: (s.rows,))}
    rows: Annotated[int, Term(forms.COUNT)]


@dataclass(frozen=True)
class PrefixSpec(ModuleSpec):
    """An attention that holds keys and values of a prefix."""

    kind = "prefix"
    tensors: ClassVar = dict.fromkeys(
        (f"{PREFIX}.keys", f"{PREFIX}.values"), Stored(torch.float16, lambda s: (s.heads, s.tokens, s.width))
    )
    heads: Annotated[int, Term(forms.COUNT)]
    tokens: Annotated[int, Term(forms.COUNT)]
    width: Annotated[int, Term(forms.COUNT)]


def prefix_state(path: str, states: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """What is stored of a prefix's keys and values in the attention at `path`, by name."""
    return {f"{path}.{name}": part for name, part in zip(PrefixSpec.tensors, states, strict=True)}


@dataclass(frozen=True)
class KeyCenterSpec(ModuleSpec):
    """What an attention's cache codes keys less, at a path that ends in `KEY_CENTER`.

    rope, key_rotation: of the `CacheScheme` that it was made for.
    """

    kind = "key_center"
    tensors: ClassVar = {"mean": Stored(torch.float16, lambda s: (s.heads, s.width))}
    heads: Annotated[int, Term(forms.COUNT)]
    width: Annotated[int, Term(forms.COUNT)]
    rope: Annotated[str, Term(forms.TEXT)]
    key_rotation: Annotated[str, Term(forms.TEXT)]

    def __post_init__(self) -> None:
        CacheScheme(4, rope=self.rope, key_rotation=self.key_rotation)

    @property
    def key_basis(self) -> tuple[str, str]:
        """See `CacheScheme`."""
        return self.rope, self.key_rotation

    @classmethod
    def of(cls, center: Tensor, scheme: CacheScheme) -> Self:
        """Of a centre (heads, width) that was made for `scheme`."""
        return cls(center.shape[0], center.shape[1], *scheme.key_basis)


Spec = PackedLinearSpec | PackedEmbeddingSpec | TiedHeadSpec | InputMixSpec | NormBiasSpec | PrefixSpec | KeyCenterSpec
_KINDS: dict[str, type[Spec]] = {spec.kind: spec for spec in Spec.__args__}
