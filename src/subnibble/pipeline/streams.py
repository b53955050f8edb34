"""Hidden states that go from block to block during quantization, and the embedding of windows and prompt prefix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from subnibble.calibrate.prefix import PrefixStream
from subnibble.model.skeleton import Skeleton
from subnibble.model.transformers_api.blocks import BlockCall
from subnibble.tensor.cache_scheme import PrefixIds

# Tokens per forward pass: enough to keep the matrix products large.
_TOKENS_PER_BATCH = 4096


@dataclass
class Streams:
    """Hidden states of all windows between two blocks, in batches (windows, tokens, channels).

    hidden: hidden states of the quantized model.
    full_precision: hidden states of the full-precision model; empty if the method does not need them.
    calls: arguments of each block's forward pass.
    prefix: hidden states of the system prompt before the windows, or None.
    unrounded: outputs of the last block before the readers of its last norm were rounded; empty if the method does not
        need them.
    """

    hidden: list[Tensor]
    full_precision: list[Tensor]
    calls: list[BlockCall]
    prefix: PrefixStream | None = None
    unrounded: list[Tensor] = field(default_factory=list)

    def tensors(self) -> dict[str, list[Tensor]]:
        """All hidden states by the name of the field; what `restore_` needs to go on from here."""
        prefix = [] if self.prefix is None else [self.prefix.hidden]
        return {
            "hidden": self.hidden, "full_precision": self.full_precision, "unrounded": self.unrounded,
            "prefix": prefix,
        }  # fmt: skip

    def restore_(self, tensors: Mapping[str, list[Tensor]]) -> None:
        """Go on from these hidden states, which `tensors` returned in an earlier run."""
        self.hidden, self.full_precision = tensors["hidden"], tensors["full_precision"]
        self.unrounded = tensors["unrounded"]
        if self.prefix is not None:
            (self.prefix.hidden,) = tensors["prefix"]


def batches(windows: Tensor) -> tuple[Tensor, ...]:
    """Split windows (n, t) into batches for the forward pass."""
    split: tuple[Tensor, ...] = windows.split(max(1, _TOKENS_PER_BATCH // windows.shape[1]))
    return split


def embedded(ids: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Embed ids (windows, tokens) with a table (vocabulary, channels): (windows, tokens, channels) in dtype, on CPU."""
    return torch.nn.functional.embedding(ids.to(table.device), table).to(dtype).cpu()


def embedded_prefix(skeleton: Skeleton, prefix: PrefixIds | None, table: Tensor) -> PrefixStream | None:
    """Embed the prompt prefix for the first block; None if there is none.

    table: (vocabulary, channels), the embedding before it is quantized.
    """
    if prefix is None:
        return None
    ids = torch.tensor([prefix.ids], device=table.device)
    return PrefixStream(skeleton, torch.nn.functional.embedding(ids, table))


def prefix_length(prefix: PrefixIds | None) -> int:
    """Number of tokens of the prompt prefix, 0 if there is none."""
    return 0 if prefix is None else len(prefix.ids)
