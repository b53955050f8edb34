"""What a packed checkpoint stores for a module: its entry in `quantization_config`, and its tensors by name.

`parts` of an entry is the one table of stored names, types and shapes: tensors on the meta device, by name relative to
the module. Biases, which any float type may have, are float32 there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from subnibble.runtime.modules import MIX
from subnibble.runtime.ops import RESIDUALS, LinearTerms
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.cache_scheme import CacheScheme
from subnibble.tensor.hadamard import hadamard_factors
from subnibble.tensor.packed import PackedLayout, PackedTensor

# Where an attention holds a prefix's states, and under which names there.
PREFIX, PREFIX_NAMES = "prefix", ("keys", "values")
# Where it holds the centre of its keys.
KEY_CENTER = "key_center"
# What a linear does to its input, of the fields of its entry.
INPUT_TERMS = ("column_scale", "gather", "blocks", "activation", "residual")


@dataclass(frozen=True)
class PackedLinearEntry:
    """A linear with a packed weight. bias, column_scale, gather: whether it has them.

    blocks, activation, residual: see `ops.LinearTerms`; salient, low_rank: the layouts of its matrices. input: path of
    the linear that reads the same tensor alike and stores column scale and gather for both, None for itself.
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
    input: str | None = None

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
        outliers = 0 if self.activation is None else self.activation.outliers
        if outliers >= columns or (outliers and self.salient is not None):
            raise ValueError(f"{outliers} outlier channels do not fit {columns} columns, or salient ones beside them")
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
    def parts(self) -> dict[str, Tensor]:
        """See the module."""
        found = {
            f"{prefix}{name}": part
            for prefix, layout in self.matrices.items()
            for name, part in layout.empty().state().items()
        }
        columns = self.layout.columns
        vectors = {
            "bias": _empty(torch.float32, self.layout.rows) if self.bias else None,
            "column_scale": _empty(torch.float16, columns) if self.column_scale and self.input is None else None,
            "gather": _empty(gather_type(columns), columns) if self.gather and self.input is None else None,
        }
        return found | {name: part for name, part in vectors.items() if part is not None}

    def enters_as(self, other: PackedLinearEntry) -> bool:
        """Whether both may store what they do to their input once."""
        ranks = [entry.salient.columns if entry.salient is not None else 0 for entry in (self, other)]
        return (
            self.layout.columns == other.layout.columns
            and (self.residual == "none" or ranks[0] == ranks[1])
            and all(getattr(self, name) == getattr(other, name) for name in INPUT_TERMS)
        )

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
            bits += self.activation.token_bits(self.salient.columns) * (1 if self.residual == "none" else 2)
        if self.low_rank is not None:
            bits += self.activation.without_outliers.token_bits(self.low_rank[0].rows)
        return bits


def linear_entry(terms: LinearTerms, source: str | None = None) -> PackedLinearEntry:
    """The entry of a linear that contains `terms`. source: see `PackedLinearEntry.input`."""
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
        input=source,
    )


def linear_state(terms: LinearTerms) -> dict[str, Tensor]:
    """What is stored for a linear that contains `terms`, but for its bias, by name relative to it."""
    found = {
        f"{prefix}{name}": tensor
        for prefix, matrix in terms.matrices.items()
        for name, tensor in matrix.state().items()
    }
    vectors = {"column_scale": terms.column_scale, "gather": terms.gather}
    return found | {name: tensor for name, tensor in vectors.items() if tensor is not None}


def linear_terms(entry: PackedLinearEntry, parts: Mapping[str, Tensor]) -> LinearTerms:
    """The linear of an entry and what is stored for it, by name relative to it; inverse of the two above.

    Of one that enters as another does, column scale and gather are missing.
    """
    matrices = {
        prefix: PackedTensor.from_state(
            {name.removeprefix(prefix): part for name, part in parts.items() if name.startswith(prefix)}, layout
        )
        for prefix, layout in entry.matrices.items()
    }
    return LinearTerms(
        weight=matrices[""],
        bias=parts.get("bias"),
        column_scale=parts.get("column_scale"),
        gather=parts.get("gather"),
        blocks=entry.blocks,
        activation=entry.activation,
        salient=matrices.get("salient."),
        residual=entry.residual,
        low_rank=None if entry.low_rank is None else (matrices["down."], matrices["up."]),
    )


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def gather_type(columns: int) -> torch.dtype:
    """The stored type of a gather of that many channels."""
    return torch.int16 if columns <= torch.iinfo(torch.int16).max else torch.int32


@dataclass(frozen=True)
class PackedEmbeddingEntry:
    """An embedding table, packed."""

    layout: PackedLayout

    @property
    def parts(self) -> dict[str, Tensor]:
        """See the module."""
        return self.layout.empty().state()


@dataclass(frozen=True)
class TiedHeadEntry:
    """An output projection without tensors of its own: it uses the packed table of the embedding at `table`."""

    table: str

    @property
    def parts(self) -> dict[str, Tensor]:
        """See the module."""
        return {}


@dataclass(frozen=True)
class InputMixEntry:
    """A block-diagonal matrix in front of a head, `<path>.matrix`, (channels, widest) float32, path ending in `MIX`.

    widths: of its blocks.
    """

    widths: tuple[int, ...]

    @property
    def parts(self) -> dict[str, Tensor]:
        """See the module."""
        return {"matrix": _empty(torch.float32, sum(self.widths), max(self.widths))}


def input_mix_state(path: str, blocks: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], dict[str, Entry]]:
    """What is stored of square blocks in front of the head at `path`, and their entry."""
    widths, where = tuple(block.shape[0] for block in blocks), f"{path}.{MIX}"
    rows = [torch.nn.functional.pad(block.float(), (0, max(widths) - block.shape[0])) for block in blocks]
    return {f"{where}.matrix": torch.cat(rows)}, {where: InputMixEntry(widths)}


@dataclass(frozen=True)
class NormBiasEntry:
    """A norm that gained a bias of `rows` channels, stored as `<path>.bias`."""

    rows: int

    @property
    def parts(self) -> dict[str, Tensor]:
        """See the module."""
        return {"bias": _empty(torch.float32, self.rows)}


@dataclass(frozen=True)
class PrefixEntry:
    """An attention that holds keys and values of a prefix, (heads, tokens, width) float16 each."""

    heads: int
    tokens: int
    width: int

    @property
    def parts(self) -> dict[str, Tensor]:
        """See the module."""
        return {f"{PREFIX}.{name}": _empty(torch.float16, self.heads, self.tokens, self.width) for name in PREFIX_NAMES}


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

    @property
    def parts(self) -> dict[str, Tensor]:
        """See the module."""
        return {"mean": _empty(torch.float16, self.heads, self.width)}

    @property
    def key_basis(self) -> tuple[str, str]:
        """See `CacheScheme`."""
        return self.rope, self.key_rotation

    @classmethod
    def of(cls, center: Tensor, scheme: CacheScheme) -> Self:
        """Of a centre (heads, width) that was made for `scheme`."""
        return cls(center.shape[0], center.shape[1], *scheme.key_basis)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary."""
        return asdict(self)


Entry = (
    PackedLinearEntry
    | PackedEmbeddingEntry
    | TiedHeadEntry
    | InputMixEntry
    | NormBiasEntry
    | PrefixEntry
    | KeyCenterEntry
)
