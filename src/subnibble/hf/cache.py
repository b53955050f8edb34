"""A coded KV cache as transformers' models use it; `attention.py` brings the two together."""

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
    """Cosines and sines of all tokens in a cache whose keys are stored without them; one for all layers."""

    def __init__(self) -> None:
        self._halves: tuple[Tensor, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return 0 if self._halves is None else sum(part.nbytes for part in self._halves)

    def append(self, cos: Tensor, sin: Tensor, batch: int) -> None:
        """Add those of new tokens, (b or 1, t, turned); their two halves are equal, and one is kept."""
        new = [part[..., : part.shape[-1] // 2].expand(batch, -1, -1) for part in (cos, sin)]
        old = self._halves or tuple(part[:, :0] for part in new)
        with as_written(cos.device):
            first, second = (torch.cat(pair, 1) for pair in zip(old, new, strict=True))
        self._halves = (first, second)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Of tokens start .. stop - 1."""
        assert self._halves is not None
        cos, sin = (torch.cat([part[:, start:stop]] * 2, -1) for part in self._halves)
        return cos, sin

    def clear(self) -> None:
        """Forget them; the next text may be of another batch."""
        self._halves = None

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change both alike."""
        if self._halves is not None:
            self._halves = (change(self._halves[0]), change(self._halves[1]))


class CacheLayer(CacheLayerMixin):
    """One layer of a `KVCache`, as transformers' models use it."""

    is_sliding = False
    is_compileable = False

    def __init__(self, scheme: CacheScheme | None, positions: Positions) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scheme = scheme
        # Whether tokens can be taken back: a cache with a window cannot uncode what it coded.
        self.is_croppable = scheme is None or scheme.window == 0
        self.store = LayerStore(scheme)
        self._positions = positions
        self._expected = False
        self._seen: tuple[CacheView, CacheView] | None = None
        self.queries: Tensor | None = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: storage comes with the first tokens."""

    def expect(self, positions: Tensor | None, center: Tensor | None) -> None:
        """An attention that will ask for what its queries see is about to update. positions: (b or 1, t), theirs.

        center: what its keys are coded less, (heads, width), or None.
        """
        self._expected, self.queries = True, positions
        self.store.keys.center = center

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values (b, heads, t, width); all of them dense, as the last query sees them."""
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
        self._seen, self._expected = (keys, values), False
        return keys.late, values.late

    def blocks(self, x: Tensor) -> tuple[int, ...]:
        """Blocks of the Hadamard matrix by which queries and keys (..., width) are turned; () for none."""
        if self.scheme is None or self.scheme.key_rotation == "none":
            return ()
        return hadamard.hadamard_blocks(x.shape[-1])

    def take(self) -> tuple[CacheView, CacheView]:
        """What the queries of the last update see of keys and values, handed out once: it is dense."""
        seen, self._seen = self._seen, None
        if seen is None:
            raise never_called("a coded KV cache")
        return seen

    def check_taken(self) -> None:
        """Raise `SilentFailure` if attention was announced or updated the cache, and then went past it."""
        if self._seen is not None or self._expected:
            self._seen, self._expected = None, False
            raise never_called("the attention function that reads a coded KV cache")

    def _without_positions(self, keys: Tensor, before: int) -> CacheView:
        total = before + keys.shape[2]
        cos, sin = (part.float() for part in self._positions.read(before, total))
        seen = self.store.keys.append(unrotate(keys.float(), cos, sin).to(keys.dtype))
        cos, sin = (part.float() for part in self._positions.read(0, total))
        return map_view(seen, lambda part: rotate(part.float(), cos, sin).to(keys.dtype))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask that is needed for new queries."""
        return self.store.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens stored, the prefix not counted."""
        return self.store.length

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def offload(self) -> None:
        """Nothing: it is small."""

    def prefetch(self) -> None:
        """Nothing."""

    def reset(self) -> None:
        """Forget everything."""
        self.store = LayerStore(self.scheme)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the batch in another order."""
        self.batch_select_indices(beam_idx)

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise `ValueError` if `crop` cannot be done."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to forget negative; found {tokens_to_remove}")
        for part in (self.store.keys, self.store.values):
            part.check_crop(-tokens_to_remove)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number negative, as transformers has it. All or none."""
        self.check_crop(tokens_to_remove)
        for part in (self.store.keys, self.store.values):
            part.crop(-tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence so many times."""
        size = self.store.batch
        if size:
            self.batch_select_indices(torch.arange(size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, in this order."""
        for part in (self.store.keys, self.store.values):
            part.select(indices)


class KVCache(Cache):
    """A transformers cache whose keys and values are codes. scheme: None keeps them at 16 bits. layers: how many.

    prefix: what its texts stand behind, None for nothing. hidden: (b, t) bool, tokens at the start of rows that
    repeat the prefix, None for none.
    """

    def __init__(self, scheme: CacheScheme | None, layers: int, prefix: PrefixIds | None = None) -> None:
        self.positions = Positions()
        self._own = [CacheLayer(scheme, self.positions) for _ in range(layers)]
        super().__init__(layers=[*self._own])
        self.scheme, self.prefix = scheme, prefix
        self.hidden: Tensor | None = None
        self._due = 0

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.positions.nbytes + sum(layer.store.nbytes for layer in self._own)

    @property
    def skipped(self) -> Tensor | None:
        """(b, 1) tokens that are hidden in each row; None for none anywhere."""
        return None if self.hidden is None else self.hidden.sum(1, keepdim=True)

    def layer(self, index: int) -> CacheLayer:
        """One of its layers."""
        return self._own[index]

    def begin(self, tokens: int) -> None:
        """The decoder is about to run on so many new tokens."""
        self._due = self.get_seq_length() + tokens

    def check_read(self) -> None:
        """Raise `SilentFailure` unless every layer got what `begin` announced, and attention read it from there."""
        for index, layer in enumerate(self._own):
            layer.check_taken()
            if layer.store.length != self._due:
                raise never_called(f"layer {index} of a KV cache")

    def visible(self, mask: Tensor | None, tokens: int) -> Tensor | None:
        """A mask (b, n) of transformers' kind without the hidden tokens. tokens: new ones."""
        if self.hidden is None:
            return mask
        total = self.get_seq_length() + tokens
        if mask is None:
            mask = torch.ones(self.hidden.shape[0], total, dtype=torch.long, device=self.hidden.device)
        shown = torch.nn.functional.pad(~self.hidden, (0, mask.shape[1] - self.hidden.shape[1]), value=True)
        return mask * shown.to(mask.dtype)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Put the batch in another order."""
        super().reorder_cache(beam_idx)
        self._map(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence so many times."""
        super().batch_repeat_interleave(repeats)
        self._map(lambda part: part.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, in this order."""
        super().batch_select_indices(indices)
        self._map(lambda part: part[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number negative, as transformers has it."""
        for layer in self._own:
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)
        length = self.get_seq_length()
        self.positions.map(lambda part: part[:, :length])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[no-untyped-call]
        self.hidden = None
        self.positions.clear()

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.positions.map(change)
        self.hidden = None if self.hidden is None else change(self.hidden)
