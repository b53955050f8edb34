"""Sites: the tensors that flow between modules of a block, and what may be done to them.

A site's channels are written by a norm's gain or by the output rows of linears, and read by the input columns of
linears. A method edits sites, never modules by name, so that an architecture is a table of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self


class Role(StrEnum):
    """What a site is in its block, by which methods ask for it."""

    ATTENTION_IN = "attention_in"
    ATTENTION_OUT = "attention_out"
    MLP_IN = "mlp_in"
    MLP_HIDDEN = "mlp_hidden"


@dataclass(frozen=True)
class Heads:
    """Attention heads: query heads, key-value heads, channels a head."""

    query: int
    key_value: int
    width: int

    @property
    def repeats(self) -> int:
        """Query heads that share one key-value head."""
        return self.query // self.key_value

    @classmethod
    def of(cls, config: Any) -> Self:
        """From a transformers config; `head_dim` need not be hidden size over heads."""
        query = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // query
        return cls(query, getattr(config, "num_key_value_heads", None) or query, width)


@dataclass(frozen=True)
class Tail:
    """A module of the block whose output is the site's one reader applied to the site's tensor.

    Once the tensor is known the rest of that module need not run again. extra_outputs: how many `None` follow the
    output in the module's returned tuple; 0 means that it returns the bare tensor.
    """

    module: str
    extra_outputs: int = 0


@dataclass(frozen=True)
class Site:
    """One tensor of a block, module names relative to the block.

    name: its `Role`. readers: linears whose input columns are its channels. norm: the norm whose gain writes it, or
    None. writers: linears whose output rows write it. followers: linears whose rows are permuted with the writers'
    but never scaled (a gate before its activation). edits: what leaves the function unchanged, of "scale" and
    "permute". per_head: channels are heads x head width, writers have one per key-value head, and query heads that
    share a key-value head must be edited alike. queries, keys: linears with a head's rows for each query head, for
    each key-value head, which move when heads do. tail: see `Tail`.
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
    """The residual stream: norms and linears of every block that touch its channels, names relative to the block.

    norms: read it (their gains are indexed by its channels). readers: linears fed through those norms.
    writers: linears that add to it.
    """

    norms: tuple[str, ...]
    readers: tuple[str, ...]
    writers: tuple[str, ...]


@dataclass(frozen=True)
class Arch:
    """An architecture: the sites of a block in data-flow order, the residual stream, and where the rest lives.

    attention: the module of a block that has keys and values, relative to it; the other paths are the model's.
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
        """The site that a linear, named relative to its block, reads."""
        return next(site for site in self.sites if linear in site.readers)

    def block_path(self, index: int) -> str:
        """Module path of a block."""
        return f"{self.blocks}.{index}"
