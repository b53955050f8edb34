"""Keys and values of a sequence of the C++ decoder step as tensors, in the form that all backends share.

`generate/backend.py` describes the form: names of tensors and their shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subnibble.arch.site import Heads
from subnibble.errors import BadRecipe
from subnibble.tensor.cache_scheme import CacheScheme
from subnibble.tensor.packed import pack_codes, unpack_codes

_NAMES = ("codes", "scales", "lows", "exact")


@dataclass(frozen=True)
class SequenceForm:
    """What keys and values of a sequence look like.

    scheme: how they are quantized; None for 16 bits.
    heads: heads of the model.
    layers: number of layers.
    """

    scheme: CacheScheme | None
    heads: Heads
    layers: int

    def read(self, sequence: Any) -> dict[str, Tensor]:
        """Copies of all keys and values of a C++ sequence."""
        state = {}
        for layer, kind, of_keys in self._sides():
            tensors = self._empty(sequence.length, of_keys)
            sequence.read(layer, of_keys, *(tensor.data_ptr() for tensor in tensors))
            for name, tensor in zip(_NAMES, tensors, strict=True):
                if tensor.numel():
                    stored = self._packed(tensor, of_keys) if name == "codes" else tensor
                    state[f"layers.{layer}.{kind}.{name}"] = stored
        return state

    def write(self, sequence: Any, state: Mapping[str, Tensor]) -> None:
        """Copy keys and values to a C++ sequence that has room for them (`reserve`).

        Raises `BadRecipe` if tensors are missing or do not fit the model.
        """
        tokens = self.tokens(state)
        for layer, kind, of_keys in self._sides():
            tensors = []
            for name, empty in zip(_NAMES, self._empty(tokens, of_keys), strict=True):
                path = f"layers.{layer}.{kind}.{name}"
                if not empty.numel():
                    tensors.append(empty)
                    continue
                if path not in state:
                    raise BadRecipe(f"the saved sequence lacks {path}; it does not belong to this model")
                dense = self._unpacked(state[path], of_keys) if name == "codes" else state[path].to(empty.dtype)
                if dense.shape != empty.shape:
                    raise BadRecipe(
                        f"{path} of the saved sequence has shape {tuple(dense.shape)}, and this model needs "
                        f"{tuple(empty.shape)}; it does not belong to this model"
                    )
                tensors.append(dense.contiguous())
            sequence.write(layer, of_keys, *(tensor.data_ptr() for tensor in tensors))

    def tokens(self, state: Mapping[str, Tensor]) -> int:
        """Number of tokens in a saved sequence."""
        values = (state.get(f"layers.0.values.{name}") for name in ("codes", "exact"))
        return sum(int(tensor.shape[1]) for tensor in values if tensor is not None)

    def _sides(self) -> Iterator[tuple[int, str, bool]]:
        """(layer, "keys" or "values", whether it is keys)."""
        for layer in range(self.layers):
            yield layer, "keys", True
            yield layer, "values", False

    def _by_channel(self, of_keys: bool) -> bool:
        return of_keys and self.scheme is not None and self.scheme.key_axis == "channel"

    def _empty(self, tokens: int, of_keys: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Room for `_NAMES` of one layer as the step copies them: codes are not packed, channels side by side."""
        heads, width, scheme = self.heads.key_value, self.heads.width, self.scheme
        coded = 0 if scheme is None else scheme.quantized_tokens(tokens, of_keys)
        codes: tuple[int, ...] = (heads, coded, width)
        scales: tuple[int, ...] = (heads, coded, 0 if scheme is None else len(scheme.bounds(width)))
        if scheme is not None and self._by_channel(of_keys):
            groups = coded // scheme.group_size
            codes, scales = (heads, groups, scheme.group_size, width), (heads, groups, width, 1)
        return (
            torch.empty(codes, dtype=torch.uint8),
            torch.empty(scales, dtype=torch.float16),
            torch.empty(scales, dtype=torch.float16),
            torch.empty(heads, tokens - coded, width, dtype=torch.float16),
        )

    def _packed(self, codes: Tensor, of_keys: bool) -> Tensor:
        """Pack codes (heads, tokens, width), or (heads, groups, tokens of a group, width) by channel, row by row."""
        assert self.scheme is not None
        rows = codes.transpose(2, 3) if self._by_channel(of_keys) else codes
        return pack_codes(rows.flatten(0, -2), self.scheme.bits).view(*rows.shape[:-1], -1)

    def _unpacked(self, packed: Tensor, of_keys: bool) -> Tensor:
        """Inverse of `_packed`."""
        assert self.scheme is not None
        by_channel = self._by_channel(of_keys)
        columns = self.scheme.group_size if by_channel else self.heads.width
        rows = unpack_codes(packed.flatten(0, -2), self.scheme.bits, columns).view(*packed.shape[:-1], columns)
        return rows.transpose(2, 3) if by_channel else rows
