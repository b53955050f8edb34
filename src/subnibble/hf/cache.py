"""A quantized KV cache with the interface of transformers' caches; `attention.py` attaches it to a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from subnibble.errors import BadRecipe
from subnibble.model.transformers_api.attention import Cache, CacheLayerMixin
from subnibble.model.transformers_api.names import never_called
from subnibble.runtime.kv_cache import CacheView, LayerStore, map_view
from subnibble.runtime.precision import as_written
from subnibble.runtime.rotary import rotate, unrotate
from subnibble.tensor import hadamard
from subnibble.tensor.cache_scheme import CacheScheme, PrefixIds


class Positions:
    """Cosines and sines of all tokens in a cache that stores keys without rotary positions; shared by all layers."""

    def __init__(self) -> None:
        self._halves: tuple[Tensor, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return 0 if self._halves is None else sum(half.nbytes for half in self._halves)

    def append(self, cos: Tensor, sin: Tensor, batch: int) -> None:
        """Add cosines and sines of new tokens, (b or 1, t, rotary channels) each.

        Their two halves are equal, so only one is stored.
        """
        new = [angles[..., : angles.shape[-1] // 2].expand(batch, -1, -1) for angles in (cos, sin)]
        old = self._halves or tuple(half[:, :0] for half in new)
        with as_written(cos.device):
            first, second = (torch.cat(pair, 1) for pair in zip(old, new, strict=True))
        self._halves = (first, second)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of tokens start .. stop - 1: (b, stop - start, rotary channels) each."""
        assert self._halves is not None
        cos, sin = (torch.cat([half[:, start:stop]] * 2, -1) for half in self._halves)
        return cos, sin

    def clear(self) -> None:
        """Remove all tokens; the next text may have another batch size."""
        self._halves = None

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to the cosines and to the sines."""
        if self._halves is not None:
            self._halves = (change(self._halves[0]), change(self._halves[1]))


class CacheLayer(CacheLayerMixin):
    """One layer of a `KVCache`, with the interface of transformers' cache layers."""

    is_sliding = False
    is_compileable = False

    def __init__(self, scheme: CacheScheme | None, positions: Positions) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scheme = scheme
        # Whether tokens can be removed. A cache with a window cannot return quantized tokens to 16 bits.
        self.is_croppable = scheme is None or scheme.window == 0
        self.store = LayerStore(scheme)
        self._positions = positions
        self._expected = False
        self._view: tuple[CacheView, CacheView] | None = None
        self.queries: Tensor | None = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the first tokens allocate storage."""

    def expect(self, positions: Tensor | None, center: Tensor | None) -> None:
        """Announce that subnibble's attention is about to update this layer and will read it by `take`.

        positions: (b or 1, t), positions of the new tokens, or None.
        center: (heads, width), subtracted from keys before they are quantized, or None.
        """
        self._expected, self.queries = True, positions
        self.store.keys.center = center

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values (b, heads, t, width).

        Returns all keys and values, (b, heads, n, width) each, dense, as the last query sees them.
        """
        if not self._expected:
            raise BadRecipe(
                "this cache needs subnibble's own attention; attach it to the model (`attach_cache_`) instead of "
                "passing it in"
            )
        before, scheme = self.store.length, self.scheme
        with as_written(key_states.device):
            if scheme is not None and scheme.rope == "before":
                keys = self._without_positions(key_states, before)
            else:
                blocks = self.blocks(key_states)
                keys = self.store.keys.append(hadamard.multiply(key_states, blocks) if blocks else key_states)
            values = self.store.values.append(value_states)
        self._view, self._expected = (keys, values), False
        return keys.late, values.late

    def blocks(self, x: Tensor) -> tuple[int, ...]:
        """Block widths of the Hadamard matrix that rotates queries and keys x (..., width); () for none."""
        if self.scheme is None or self.scheme.key_rotation == "none":
            return ()
        return hadamard.hadamard_blocks(x.shape[-1])

    def take(self) -> tuple[CacheView, CacheView]:
        """Return the keys and values that the queries of the last update see, and drop them: they are dense."""
        view, self._view = self._view, None
        if view is None:
            raise never_called("a quantized KV cache")
        return view

    def check_taken(self) -> None:
        """Raise `SilentFailure` if attention was announced or updated the cache, but did not read it."""
        if self._view is not None or self._expected:
            self._view, self._expected = None, False
            raise never_called("the attention function that reads a quantized KV cache")

    def _without_positions(self, keys: Tensor, before: int) -> CacheView:
        total = before + keys.shape[2]
        cos, sin = (angles.float() for angles in self._positions.read(before, total))
        view = self.store.keys.append(unrotate(keys.float(), cos, sin).to(keys.dtype))
        cos, sin = (angles.float() for angles in self._positions.read(0, total))
        return map_view(view, lambda tensor: rotate(tensor.float(), cos, sin).to(keys.dtype))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the mask that new queries need."""
        return self.store.length + query_length, 0

    def get_seq_length(self) -> int:
        """Number of tokens stored, without the prefix."""
        return self.store.length

    def get_max_length(self) -> int:
        """There is no maximum: -1."""
        return -1

    def offload(self) -> None:
        """Do nothing: the cache is small."""

    def prefetch(self) -> None:
        """Do nothing."""

    def reset(self) -> None:
        """Remove all tokens."""
        self.store = LayerStore(self.scheme)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch: sequence beam_idx[i] becomes sequence i."""
        self.batch_select_indices(beam_idx)

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise `ValueError` if `crop` with this argument is not possible."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes the number of tokens to remove as a negative number; found {tokens_to_remove}"
            )
        for store in (self.store.keys, self.store.values):
            store.check_crop(-tokens_to_remove)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, of keys and values or of neither.

        tokens_to_remove: minus their number, as in transformers.
        """
        self.check_crop(tokens_to_remove)
        for store in (self.store.keys, self.store.values):
            store.crop(-tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times."""
        size = self.store.batch
        if size:
            self.batch_select_indices(torch.arange(size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at `indices`, in this order."""
        for store in (self.store.keys, self.store.values):
            store.select(indices)


class KVCache(Cache):
    """A transformers cache that stores keys and values quantized.

    scheme: how they are quantized; None keeps them at 16 bits.
    layers: number of layers.
    prefix: the prompt prefix before its texts, None for none.
    hides: whether tokens at the start of a text that repeat the prefix are hidden.
    hidden: (b, t) bool, the tokens that are hidden; None for none.
    """

    def __init__(self, scheme: CacheScheme | None, layers: int, prefix: PrefixIds | None = None) -> None:
        self.positions = Positions()
        self._cache_layers = [CacheLayer(scheme, self.positions) for _ in range(layers)]
        super().__init__(layers=[*self._cache_layers])
        self.scheme, self.prefix = scheme, prefix
        self.hides = True
        self.hidden: Tensor | None = None
        self._expected_length = 0

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.positions.nbytes + sum(layer.store.nbytes for layer in self._cache_layers)

    @property
    def skipped(self) -> Tensor | None:
        """Number of hidden tokens in each row, (b, 1); None if no row has any."""
        return None if self.hidden is None else self.hidden.sum(1, keepdim=True)

    def layer(self, index: int) -> CacheLayer:
        """The layer of this index."""
        return self._cache_layers[index]

    def begin(self, tokens: int) -> None:
        """Announce that the decoder is about to run on `tokens` new tokens."""
        self._expected_length = self.get_seq_length() + tokens

    def check_read(self) -> None:
        """Raise `SilentFailure` unless every layer got the tokens that `begin` announced and attention read them."""
        for index, layer in enumerate(self._cache_layers):
            layer.check_taken()
            if layer.store.length != self._expected_length:
                raise never_called(f"layer {index} of a KV cache")

    def visible(self, mask: Tensor | None, tokens: int) -> Tensor | None:
        """Hide the hidden tokens in a mask.

        mask: (b, n) as transformers has it, 0 for padding; None for no padding.
        tokens: number of new tokens.
        Returns (b, n), or None if nothing is masked.
        """
        if self.hidden is None:
            return mask
        total = self.get_seq_length() + tokens
        if mask is None:
            mask = torch.ones(self.hidden.shape[0], total, dtype=torch.long, device=self.hidden.device)
        unhidden = torch.nn.functional.pad(~self.hidden, (0, mask.shape[1] - self.hidden.shape[1]), value=True)
        return mask * unhidden.to(mask.dtype)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Reorder the batch: sequence beam_idx[i] becomes sequence i."""
        super().reorder_cache(beam_idx)
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at `indices`, in this order."""
        super().batch_select_indices(indices)
        self._map(lambda tensor: tensor[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens. tokens_to_remove: minus their number, as in transformers."""
        for layer in self._cache_layers:
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)
        length = self.get_seq_length()
        self.positions.map(lambda half: half[:, :length])

    def reset(self) -> None:
        """Remove all tokens."""
        super().reset()  # type: ignore[no-untyped-call]
        self.hidden = None
        self.positions.clear()

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.positions.map(change)
        self.hidden = None if self.hidden is None else change(self.hidden)
