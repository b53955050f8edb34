"""A `Backend` on the C++ decoder step (`hf/decoder.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from subnibble.hf.decoder import Decoder
from subnibble.tensor.cache_scheme import CacheScheme, PrefixIds


class NativeBackend:
    """Runs a loaded model by the C++ decoder step. See `generate/backend.py` for the methods.

    model: a loaded transformers model on the CPU; its modules must not change afterwards.
    fixed_bytes: bytes of the fixed-point numbers of inputs without a scheme, 2 or 3. None: 3 for float32 models, else
        2.
    Raises `UnsupportedModel` if the step cannot run the model.
    """

    def __init__(self, model: Any, fixed_bytes: int | None = None) -> None:
        self._decoder = Decoder(model, fixed_bytes)
        self._sequences: dict[int, Any] = {}
        positions = getattr(model.config, "max_position_embeddings", None)
        prefix = self._decoder.prefix
        self._max_positions = None if positions is None else int(positions) - (0 if prefix is None else len(prefix.ids))

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._decoder.vocab_size

    @property
    def max_positions(self) -> int | None:
        """Largest number of tokens in a sequence, without the prefix."""
        return self._max_positions

    @property
    def scheme(self) -> CacheScheme | None:
        """How keys and values are quantized."""
        return self._decoder.scheme

    @property
    def prefix(self) -> PrefixIds | None:
        """The prompt prefix before every sequence."""
        return self._decoder.prefix

    @property
    def nbytes(self) -> int:
        """Bytes of all sequences' keys and values."""
        return self._decoder.nbytes

    def open(self) -> int:
        """Begin an empty sequence; returns its slot, the lowest free number."""
        return self._hold(self._decoder.open())

    def close(self, slot: int) -> None:
        """End the sequence of a slot and free its keys and values."""
        del self._sequences[slot]

    def length(self, slot: int) -> int:
        """Number of tokens in the sequence of a slot."""
        return int(self._sequences[slot].length)

    def forward(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to sequences; returns the logits after each one's last token, (b, vocab_size) float32."""
        return self._decoder.forward([self._sequences[slot] for slot in slots], tokens)

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """The logits after each token of a text that is not kept: (t, vocab_size) float32."""
        return self._decoder.logits(tokens)

    def crop(self, slot: int, length: int) -> None:
        """Drop the tokens of a slot after its first `length`."""
        if length == 0:
            self._sequences[slot] = self._decoder.open()
        elif not self._sequences[slot].crop(length):
            raise ValueError(f"cannot crop to {length} tokens: they are quantized, and they cannot return to 16 bits")

    def save(self, slot: int) -> dict[str, Tensor]:
        """Copies of a slot's keys and values."""
        return self._decoder.save(self._sequences[slot])

    def load(self, state: Mapping[str, Tensor]) -> int:
        """Begin a sequence with saved keys and values; returns its slot."""
        return self._hold(self._decoder.load(state))

    def _hold(self, sequence: Any) -> int:
        slot = next(number for number in range(len(self._sequences) + 1) if number not in self._sequences)
        self._sequences[slot] = sequence
        return slot
