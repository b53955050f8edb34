"""Sites: the activations that flow between modules of a block, and the edits that they allow.

The channels of a site are written by a norm's gain or by the output rows of linears, and read by the input columns of
linears. Methods edit sites, never modules by name; an architecture is therefore just a table of sites.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self


class Role(StrEnum):
    """The role of a site in its block; methods look sites up by role."""

    ATTENTION_IN = "attention_in"
    ATTENTION_OUT = "attention_out"
    MLP_IN = "mlp_in"
    MLP_HIDDEN = "mlp_hidden"


@dataclass(frozen=True)
class Heads:
    """Attention heads of a model.

    query: number of query heads.
    key_value: number of key-value heads.
    width: channels of a head.
    """

    query: int
    key_value: int
    width: int

    @property
    def repeats(self) -> int:
        """Number of query heads that share one key-value head."""
        return self.query // self.key_value

    @classmethod
    def of(cls, config: Any) -> Self:
        """Read the heads from a transformers config; `head_dim` may differ from hidden size / query heads."""
        query = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // query
        return cls(query, getattr(config, "num_key_value_heads", None) or query, width)


@dataclass(frozen=True)
class Tail:
    """A module of the block whose last step is the site's only reader, so that the reader's output is the module's.

    Once the activations of the site are known, the rest of the module need not run again.

    module: name relative to the block.
    extra_outputs: number of `None` after the output in the tuple that the module returns; 0: it returns a bare tensor.
    """

    module: str
    extra_outputs: int = 0


@dataclass(frozen=True)
class Site:
    """One place in a block where activations flow from writers to readers; module names are relative to the block.

    name: `Role` of the site.
    readers: linears whose input columns are the channels of the site.
    norm: norm whose gain writes the site, or None.
    writers: linears whose output rows write the site.
    followers: linears whose rows are permuted with those of the writers, but never scaled (a gate before its
        activation function).
    edits: edits of the channels that leave the function of the block unchanged: "scale", "permute".
    per_head: whether the channels are query heads x head width. The writers then have rows per key-value head, and
        query heads that share a key-value head must be edited alike.
    queries: linears whose rows are query heads, which move when heads are permuted.
    keys: linears whose rows are key-value heads, which move when heads are permuted.
    tail: module that ends in the site's only reader, or None; see `Tail`.
    """

    name: str
    readers: tuple[str, ...]
    norm: str | None = None
    writers: tuple[str, ...] = ()
    followers: tuple[str, ...] = ()
    edits: frozenset[str] = frozenset({"scale"})
    per_head: bool = False
    queries: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    tail: Tail | None = None


@dataclass(frozen=True)
class Residual:
    """The norms and linears of a block that read or write the residual stream; names are relative to the block.

    norms: norms of the stream; their gains are indexed by its channels.
    readers: linears that read the output of these norms.
    writers: linears that add to the stream.
    """

    norms: tuple[str, ...]
    readers: tuple[str, ...]
    writers: tuple[str, ...]


@dataclass(frozen=True)
class Arch:
    """An architecture: its sites, its residual stream and its module paths.

    model_type: `model_type` of the config.
    sites: sites of a block, in data-flow order.
    residual: readers and writers of the residual stream.
    blocks: path in the model of the list of decoder blocks.
    embedding: path in the model of the embedding.
    final_norm: path in the model of the norm before the head.
    head: path in the model of the head.
    attention: path in a block of the module that has keys and values.
    """

    model_type: str
    sites: tuple[Site, ...]
    residual: Residual
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears of a block that get quantized, in data-flow order."""
        return tuple(reader for site in self.sites for reader in site.readers)

    def site(self, role: str) -> Site:
        """The site of a `Role`; `KeyError` if the architecture has none."""
        return {site.name: site for site in self.sites}[role]

    def site_of(self, linear: str) -> Site:
        """The site that a linear reads. linear: name relative to the block."""
        return next(site for site in self.sites if linear in site.readers)

    def block_path(self, index: int) -> str:
        """Path in the model of the block with this index."""
        return f"{self.blocks}.{index}"
