"""What goes from block to block while a checkpoint is quantized, and the embedded text and prompt that it starts as."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from subnibble.calibrate.prefix import PrefixStream
from subnibble.model.skeleton import Skeleton
from subnibble.model.transformers_api.blocks import BlockCall
from subnibble.tensor.cache_scheme import PrefixIds

# Tokens forwarded together: enough to keep the matrix products large.
_TOKENS_PER_BATCH = 4096


@dataclass
class Streams:
    """Hidden states of all windows between two blocks, batches of (windows, tokens, channels), and what goes with them.

    hidden: in the quantized model so far.
    full_precision: in the full-precision model; empty if no method asks.
    calls: the arguments that the model calls each block with.
    prefix: of a system prompt before the windows, or None.
    unrounded: the last block's outputs before the readers of its last norm were rounded; empty if no method asks.
    """

    hidden: list[Tensor]
    full_precision: list[Tensor]
    calls: list[BlockCall]
    prefix: PrefixStream | None = None
    unrounded: list[Tensor] = field(default_factory=list)


def batches(windows: Tensor) -> tuple[Tensor, ...]:
    """Windows (n, t) in batches that are forwarded together."""
    parts: tuple[Tensor, ...] = windows.split(max(1, _TOKENS_PER_BATCH // windows.shape[1]))
    return parts


def embedded(ids: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Hidden states (windows, tokens, channels) of ids (windows, tokens)."""
    return torch.nn.functional.embedding(ids.to(table.device), table).to(dtype).cpu()


def embedded_prefix(skeleton: Skeleton, prefix: PrefixIds | None, table: Tensor) -> PrefixStream | None:
    """A prefix before the first block, None for none. table: the embedding's, exact."""
    if prefix is None:
        return None
    ids = torch.tensor([prefix.ids], device=table.device)
    return PrefixStream(skeleton, torch.nn.functional.embedding(ids, table))


def past(prefix: PrefixIds | None) -> int:
    """How many tokens of a prefix are before the windows."""
    return 0 if prefix is None else len(prefix.ids)
