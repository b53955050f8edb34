"""Module specs: what a packed checkpoint stores for each kind of module, in `quantization_config` and as tensors.

Each spec is a dataclass, and each of its fields is a row of the storage table: the field's `Term` says how the field is
written to JSON and which tensors it stores. JSON, linears at run time, empty tensors, sizes and estimates all derive
from these rows. JSON omits a field that has its default. To add a term to linears, add a row here and a field of the
same name to `SiteInput` or `PackedWeight`. A stored bias may have any float type; `parts` describes it as float32.
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
from subnibble.runtime.modules import HEAD_INPUT
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.cache_scheme import CacheScheme
from subnibble.tensor.hadamard import hadamard_factors
from subnibble.tensor.linear import Linear, PackedWeight, SiteInput
from subnibble.tensor.packed import PackedLayout, PackedTensor

# Attributes of an attention module for the keys and values of a prefix, and for the mean of its keys.
PREFIX, KEY_CENTER = "prefix", "key_center"
# Fields of a linear's spec that describe what happens to its input.
INPUT_TERMS = tuple(field.name for field in fields(SiteInput))


def gather_type(columns: int) -> torch.dtype:
    """Return the stored integer type of a gather over `columns` channels: int16 if it is wide enough, else int32."""
    return torch.int16 if columns <= torch.iinfo(torch.int16).max else torch.int32


@dataclass(frozen=True)
class Stored:
    """The type and shape of a stored tensor.

    dtype: the type, or a function from the length of a vector to its type.
    shape: a function from the module's spec to the shape.
    """

    dtype: torch.dtype | Callable[[int], torch.dtype]
    shape: Callable[[Any], tuple[int, ...]]

    def empty(self, spec: ModuleSpec) -> Tensor:
        """Return the tensor that a module with this spec stores, on the meta device."""
        shape = self.shape(spec)
        dtype = self.dtype if isinstance(self.dtype, torch.dtype) else self.dtype(*shape)
        return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Term:
    """A row of the storage table: how one field of a spec is written to JSON and stored as tensors.

    form: converts the field to JSON and back.
    keys: JSON keys of the field; () for the name of the field.
    vector: the tensor that is stored under the field's name if the field is true.
    prefixes: prefixes of the names of stored packed matrices, one for each layout in the field.
    default: the field's default, which JSON omits; `MISSING` if there is none. `ModuleSpec.terms` sets it.
    """

    form: forms.Form
    keys: tuple[str, ...] = ()
    vector: Stored | None = None
    prefixes: tuple[str, ...] = ()
    default: Any = None


class ModuleSpec:
    """What a packed checkpoint stores for one module.

    kind: name of this kind of module in JSON.
    tensors: name -> tensor, for those that every module of this kind stores.
    """

    kind: ClassVar[str]
    tensors: ClassVar[Mapping[str, Stored]] = {}

    @classmethod
    @cache
    def terms(cls) -> dict[str, Term]:
        """Return field name -> row of the storage table."""
        hints = get_type_hints(cls, include_extras=True)
        rows = ((field, hints[field.name].__metadata__[0]) for field in fields(cls))  # type: ignore[arg-type]
        return {field.name: replace(row, keys=row.keys or (field.name,), default=field.default) for field, row in rows}

    @property
    def elsewhere(self) -> tuple[str, ...]:
        """Fields that another module stores for this one, in JSON and as tensors."""
        return ()

    @property
    def matrices(self) -> dict[str, PackedLayout]:
        """Return prefix of the stored names -> layout, for every packed matrix."""
        return _by_prefix({term.prefixes: getattr(self, name) for name, term in self.terms().items()})

    @property
    def parts(self) -> dict[str, Tensor]:
        """Return name, relative to the module -> stored tensor, on the meta device."""
        candidates = {name: term.vector for name, term in self.terms().items() if getattr(self, name)}
        vectors = {
            name: stored for name, stored in candidates.items() if stored is not None and name not in self.elsewhere
        }
        empty = {prefix: layout.empty() for prefix, layout in self.matrices.items()}
        return _states(empty) | {name: stored.empty(self) for name, stored in {**vectors, **self.tensors}.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as a JSON object; inverse of `spec_from_dict`."""
        values: dict[str, Any] = {"kind": self.kind}
        for name, term in self.terms().items():
            value = getattr(self, name)
            if name not in self.elsewhere and value != term.default:
                values |= zip(term.keys, term.form.write(value), strict=True)
        return values


def spec_from_dict(values: Mapping[str, Any], labels: forms.Labels) -> Spec:
    """Read the spec of a module from its JSON object; inverse of `ModuleSpec.to_dict`.

    values: the object. If it has `input`, complete it by `with_input` first.
    labels: the schemes that the object refers to by label.
    Raises `CheckpointError` or `ValueError` for unknown, missing or invalid values.
    """
    kind = values["kind"]
    terms = _KINDS[kind].terms() if kind in _KINDS else {}
    needed = {key for term in terms.values() for key in term.keys if term.default is MISSING}
    known = {key for term in terms.values() for key in term.keys}
    if not terms or not needed <= values.keys() - {"kind"} <= known:
        raise CheckpointError(f"module of kind {kind!r} has keys {sorted(values)}; was it written by another version?")
    arguments: dict[str, Any] = {}
    for name, term in terms.items():
        written = [values[key] for key in term.keys if key in values]
        if written and term.default is not MISSING and repr(written) == repr([*term.form.write(term.default)]):
            raise ValueError(f"{term.keys[0]} says {written[0]!r}, the default of a {kind}; a default must be left out")
        if written:
            arguments[name] = term.form.read(labels, arguments, *written)
    return _KINDS[kind](**arguments)


def with_input(values: Mapping[str, Any], modules: Mapping[str, Any]) -> Mapping[str, Any]:
    """Complete the JSON object of a module whose `input` names another module, with that module's input terms.

    values: the object. Returned unchanged if it has no `input`.
    modules: path -> object, for all modules.
    Raises `ValueError` if the object has input terms itself.
    """
    source = values.get("input")
    if source is None:
        return values
    keys = {key for name in INPUT_TERMS for key in PackedLinearSpec.terms()[name].keys}
    if conflicts := sorted(keys & values.keys()):
        raise ValueError(f"its input is that of {source}, so it must not have {conflicts[0]}")
    return {**values, **{key: modules[source][key] for key in keys & modules[source].keys()}}


def _per_column(spec: PackedLinearSpec) -> tuple[int, ...]:
    return (spec.layout.num_columns,)


@dataclass(frozen=True)
class PackedLinearSpec(ModuleSpec):
    """A linear with a packed weight (m, k): the description of a `Linear`, without its tensors.

    layout: of the weight: m rows, and the column ranges with their schemes.
    bias: whether it has a bias, (m,).
    column_scale: whether it has a scale for each input channel, (k,) float16.
    gather: whether it reorders input channels, (k,) integers.
    blocks: widths of a block-diagonal Hadamard transform of the input; they add up to k. () for none.
    activation: how inputs are quantized, None for not at all.
    salient: layout of a second weight of the first r channels, (m, r), or None.
    requantized: number of first channels that are quantized twice: r, or 0 for none.
    low_rank: layouts of down (q, k) and up (m, q), or None.
    input: path of another linear that reads the same tensor and stores the input terms of both; None if this linear
        stores its own.
    """

    kind = "linear"
    layout: Annotated[PackedLayout, Term(forms.MATRIX, ("rows", "ranges"), prefixes=("",))]
    bias: Annotated[bool, Term(forms.FLAG, vector=Stored(torch.float32, lambda s: (s.layout.rows,)))]
    column_scale: Annotated[bool, Term(forms.FLAG, vector=Stored(torch.float16, _per_column))] = False
    gather: Annotated[bool, Term(forms.FLAG, vector=Stored(gather_type, _per_column))] = False
    blocks: Annotated[tuple[int, ...], Term(forms.COUNTS, ("hadamard",))] = ()
    activation: Annotated[ActivationScheme | None, Term(forms.ACTIVATION)] = None
    salient: Annotated[PackedLayout | None, Term(forms.RANGES, prefixes=("salient.",))] = None
    requantized: Annotated[int, Term(forms.RESIDUAL, ("residual",))] = 0
    low_rank: Annotated[tuple[PackedLayout, PackedLayout] | None, Term(forms.FACTORS, prefixes=("down.", "up."))] = None
    input: Annotated[str | None, Term(forms.TEXT)] = None

    def __post_init__(self) -> None:
        columns, rows = self.layout.num_columns, self.layout.rows
        if self.requantized and (self.salient is None or self.requantized != self.salient.num_columns):
            raise ValueError(f"{self.requantized} channels are quantized twice, but only all salient channels can be")
        if self.blocks and sum(self.blocks) != columns:
            raise ValueError(f"Hadamard blocks {self.blocks} do not add up to {columns} columns")
        if any(hadamard_factors(width) is None for width in self.blocks):
            raise ValueError(f"no Hadamard matrix is known for one of the orders {self.blocks}")
        if self.salient is not None and (self.salient.rows != rows or self.salient.num_columns > columns):
            raise ValueError(f"{self.salient.num_columns} salient columns do not fit a weight of {rows} x {columns}")
        outliers = 0 if self.activation is None else self.activation.outliers
        if outliers >= columns or (outliers and self.salient is not None):
            raise ValueError(
                f"{outliers} outlier channels do not fit {columns} columns, or there are salient columns as well"
            )
        if self.low_rank is not None:
            down, up = self.low_rank
            if (down.num_columns, up.rows) != (columns, rows) or up.num_columns != down.rows:
                raise ValueError(f"a low-rank branch does not fit a weight of {rows} x {columns}")

    @property
    def elsewhere(self) -> tuple[str, ...]:
        """The input terms, if the linear at path `input` stores them; else ()."""
        return () if self.input is None else INPUT_TERMS

    def enters_as(self, other: PackedLinearSpec) -> bool:
        """Whether both treat their input alike, so that one of them can store the input terms of both."""
        alike = all(getattr(self, name) == getattr(other, name) for name in INPUT_TERMS)
        return alike and self.layout.num_columns == other.layout.num_columns

    @property
    def stored_bits(self) -> int:
        """Bits of all stored tensors except the bias."""
        return 8 * sum(tensor.nbytes for name, tensor in self.parts.items() if name != "bias")

    def token_bits(self) -> int:
        """Return the bits of one token's input, including extra columns; 16 per channel if inputs are not quantized."""
        if self.activation is None:
            return 16 * self.layout.num_columns
        bits = self.activation.token_bits(self.layout.num_columns)
        if self.salient is not None:
            # The salient weight is extra columns of the product: the same codes are read again for it.
            bits += self.activation.token_bits(self.salient.num_columns) * (2 if self.requantized else 1)
        if self.low_rank is not None:
            bits += self.activation.without_outliers.token_bits(self.low_rank[0].rows)
        return bits


def linear_spec(linear: Linear, source: str | None = None) -> PackedLinearSpec:
    """Return the spec of a linear.

    source: path of another linear that stores the input terms of both, or None (`PackedLinearSpec.input`).
    """
    arguments: dict[str, Any] = {}
    for name, term in LINEAR_TERMS.items():
        value = _value(linear, name)
        if term.prefixes and value is not None:
            value = tuple(matrix.layout for matrix in value) if isinstance(value, tuple) else value.layout
        arguments[name] = value if term.vector is None else value is not None
    return PackedLinearSpec(**arguments, input=source)


def linear_state(linear: Linear) -> dict[str, Tensor]:
    """Return name, relative to the linear -> stored tensor."""
    vectors = {name: _value(linear, name) for name, term in LINEAR_TERMS.items() if term.vector is not None}
    return _states(matrices_of(linear.weight)) | {
        name: vector for name, vector in vectors.items() if vector is not None
    }


def linear_of(spec: PackedLinearSpec, parts: Mapping[str, Tensor]) -> Linear:
    """Build a linear from its spec and its stored tensors; inverse of `linear_spec` and `linear_state`.

    parts: name, relative to the linear -> tensor. If `spec.input` names another linear, column scale and gather are
        missing here, and the result has None for them.
    """
    arguments: dict[str, Any] = {}
    for name, term in LINEAR_TERMS.items():
        value = getattr(spec, name)
        if term.prefixes and value is not None:
            layouts = [(prefix, layout) for prefix, layout in spec.matrices.items() if prefix in term.prefixes]
            matrices = tuple(PackedTensor.from_state(_under(prefix, parts), layout) for prefix, layout in layouts)
            value = matrices if isinstance(value, tuple) else matrices[0]
        arguments[name] = value if term.vector is None else parts.get(name)
    site_input = SiteInput(**{name: arguments.pop(name) for name in INPUT_TERMS})
    return Linear(PackedWeight(arguments.pop("layout"), **arguments), site_input)


def matrices_of(weight: PackedWeight) -> dict[str, PackedTensor]:
    """Return prefix of the stored names -> packed matrix: "" for the main one, "salient.", "down.", "up."."""
    linear = Linear(weight)
    return _by_prefix({term.prefixes: _value(linear, name) for name, term in LINEAR_TERMS.items()})


# The rows of the storage table that describe the linear itself.
LINEAR_TERMS = {name: term for name, term in PackedLinearSpec.terms().items() if name != "input"}


def _value(linear: Linear, name: str) -> Any:
    """Return the linear's value for a field of its spec."""
    if name in INPUT_TERMS:
        return getattr(linear.input, name)
    return getattr(linear.weight, "main" if name == "layout" else name)


def _by_prefix(values: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Return prefix of the stored names -> matrix or layout. values: prefixes of a field -> its value or values."""
    present = ((prefixes, value) for prefixes, value in values.items() if prefixes and value is not None)
    pairs = (zip(prefixes, value if isinstance(value, tuple) else (value,), strict=True) for prefixes, value in present)
    return dict(chain.from_iterable(pairs))


def _states(matrices: Mapping[str, PackedTensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for prefix, matrix in matrices.items() for name, tensor in matrix.state().items()}


def _under(prefix: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in parts.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class PackedEmbeddingSpec(ModuleSpec):
    """A packed embedding table. layout: of the table (vocabulary size, width)."""

    kind = "embedding"
    layout: Annotated[PackedLayout, Term(forms.MATRIX, ("rows", "ranges"), prefixes=("",))]


@dataclass(frozen=True)
class TiedHeadSpec(ModuleSpec):
    """A head without tensors of its own. table: path of the embedding whose packed table it uses."""

    kind = "tied_head"
    table: Annotated[str, Term(forms.TEXT)]


@dataclass(frozen=True)
class HeadInputSpec(ModuleSpec):
    """A block-diagonal matrix that multiplies a head's input. Its path ends in `HEAD_INPUT`. widths: of its blocks."""

    kind = "input_mix"
    tensors: ClassVar = {"matrix": Stored(torch.float32, lambda s: (sum(s.widths), max(s.widths)))}
    widths: Annotated[tuple[int, ...], Term(forms.COUNTS)]

    def __post_init__(self) -> None:
        if not self.widths:
            raise ValueError("an input_mix matrix has no blocks")


def head_input_state(path: str, blocks: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], dict[str, Spec]]:
    """Return the stored tensor, by name, and the spec, by path, of the `HeadInputMatrix` of a head.

    path: of the head.
    blocks: square matrices on the diagonal, each (width, width).
    """
    widths, where = tuple(block.shape[0] for block in blocks), f"{path}.{HEAD_INPUT}"
    rows = [torch.nn.functional.pad(block.float(), (0, max(widths) - block.shape[0])) for block in blocks]
    return {f"{where}.matrix": torch.cat(rows)}, {where: HeadInputSpec(widths)}


@dataclass(frozen=True)
class NormBiasSpec(ModuleSpec):
    """A norm to which subnibble added a bias. rows: number of channels."""

    kind = "norm_bias"
    tensors: ClassVar = {"bias": Stored(torch.float32, lambda s: (s.rows,))}
    rows: Annotated[int, Term(forms.COUNT)]


@dataclass(frozen=True)
class PrefixSpec(ModuleSpec):
    """An attention that stores the keys and values of a prompt prefix, (heads, tokens, width) each, in float16.

    heads: number of key-value heads.
    tokens: length of the prefix.
    width: channels of a head.
    """

    kind = "prefix"
    tensors: ClassVar = dict.fromkeys(
        (f"{PREFIX}.keys", f"{PREFIX}.values"), Stored(torch.float16, lambda s: (s.heads, s.tokens, s.width))
    )
    heads: Annotated[int, Term(forms.COUNT)]
    tokens: Annotated[int, Term(forms.COUNT)]
    width: Annotated[int, Term(forms.COUNT)]


def prefix_state(path: str, states: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Return name -> stored tensor for a prefix's keys and values in the attention at `path`.

    states: keys and values, (heads, tokens, width) each.
    """
    return {f"{path}.{name}": tensor for name, tensor in zip(PrefixSpec.tensors, states, strict=True)}


@dataclass(frozen=True)
class KeyCenterSpec(ModuleSpec):
    """The mean that an attention's cache subtracts from keys before it quantizes them: (heads, width) float16.

    Its path ends in `KEY_CENTER`.
    heads: number of key-value heads.
    width: channels of a head.
    rope, key_rotation: of the `CacheScheme` that the mean was computed for.
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
        """The basis of the keys: (rope, key_rotation), as `CacheScheme.key_basis`."""
        return self.rope, self.key_rotation

    @classmethod
    def of(cls, center: Tensor, scheme: CacheScheme) -> Self:
        """Return the spec of a mean, (heads, width), that was computed for `scheme`."""
        return cls(center.shape[0], center.shape[1], *scheme.key_basis)


Spec = PackedLinearSpec | PackedEmbeddingSpec | TiedHeadSpec | HeadInputSpec | NormBiasSpec | PrefixSpec | KeyCenterSpec
_KINDS: dict[str, type[Spec]] = {spec.kind: spec for spec in Spec.__args__}
