"""`Backend`, the interface of what runs a model: sequences in slots, each with its own keys and values.

A sequence is the tokens after the model's prompt prefix. The prefix is in no slot's tokens, lengths or saved states;
callers remove its repetition from a text before they run it (`PrefixIds.repeated`), and backends never look for it.

Backends do not check what a caller can: that token ids are below `vocab_size`, that a sequence stays within
`max_positions`, and that a slot is open and appears once in a call. One thread at a time may call a backend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from subnibble.tensor.cache_scheme import CacheScheme, PrefixIds


class Backend(Protocol):
    """Runs a model on sequences in slots; each slot keeps its keys and values.

    vocab_size: number of token ids, the width of logits.
    max_positions: largest number of tokens in a sequence, without the prefix; None for no limit.
    scheme: how keys and values are quantized; None for 16 bits, or the dtype of computation.
    prefix: token ids of the prompt prefix before every sequence, None for none.
    """

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    def max_positions(self) -> int | None:
        """Largest number of tokens in a sequence, without the prefix."""

    @property
    def scheme(self) -> CacheScheme | None:
        """How keys and values are quantized."""

    @property
    def prefix(self) -> PrefixIds | None:
        """The prompt prefix before every sequence."""

    def open(self) -> int:
        """Begin an empty sequence; returns its slot. Numbers of closed slots may be given again."""

    def close(self, slot: int) -> None:
        """End the sequence of a slot and free its keys and values."""

    def length(self, slot: int) -> int:
        """Number of tokens in the sequence of a slot."""

    def forward(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to sequences; returns the logits after each one's last token.

        slots: open slots, each once, in any order; b of them.
        tokens: the new token ids of each slot, at least one; numbers may differ between slots.
        Returns (b, vocab_size) float32 on the CPU. A sequence's logits depend neither on the other slots of a call nor
        on how its tokens are divided into calls, except for the order of floating-point sums.
        """

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """The logits after each token of a text, for scoring: (t, vocab_size) float32 on the CPU.

        tokens: t token ids, a sequence of its own that is not kept.
        """

    def crop(self, slot: int, length: int) -> None:
        """Drop the tokens of a slot after its first `length`.

        `scheme` must allow it: ask `CacheScheme.can_crop` first.
        """

    def save(self, slot: int) -> dict[str, Tensor]:
        """Copies of a slot's keys and values on the CPU, in a form that all backends share.

        For each layer i and `kind` in keys, values (see `runtime/kv_cache.py`):
        layers.{i}.{kind}.codes: packed codes of the quantized tokens, (heads, tokens, bytes) uint8; by channel (heads,
            groups of tokens, width, bytes).
        layers.{i}.{kind}.scales, layers.{i}.{kind}.lows: scale and lowest value of each group, float16, shaped like
            codes with the number of groups in place of bytes.
        layers.{i}.{kind}.exact: the tokens that are not quantized, which come last, (heads, tokens, width) floating
            point.
        Keys are as the scheme stores them: rotated, without positions or without their centre. Tensors without tokens
        are left out.
        """

    def load(self, state: Mapping[str, Tensor]) -> int:
        """Begin a sequence with the keys and values that `save` returned for a slot; returns its slot.

        state: of a backend of the same model, scheme and prefix.
        """
