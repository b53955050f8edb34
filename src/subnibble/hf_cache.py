"""A quantized KV cache and a prefix at 16 bits in a transformers model: its `Cache`, hooks, and attention function.

No modeling file is involved. `attach_cache_` gives the model three things:

- A hook on the decoder puts a `KVCache` in the place of none, or of the empty one that `generate` makes, moves
  positions behind the prefix, and hides what an input repeats of the prefix.
- A hook on each attention hands that cache's layer, which transformers gives turned keys alone, the positions, and the
  attention function the layer.
- That function, under the name `subnibble` in transformers' registry, turns queries where keys are stored turned, and
  attends over prefix and cache (`runtime/attention.py`).

The prefix is before the text, not in it: token ids, masks and lengths of `generate` and `forward` are the text's alone.
An input that begins with the prefix's ids is taken as if it began behind them, and a BOS that the tokenizer put before
a text is dropped where the prefix begins with it: these tokens stay in the ids, hidden. A row's last token is never
hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from subnibble.cache_scheme import CacheScheme, PrefixIds
from subnibble.checkpoint.packed import PREFIX_KEYS, PREFIX_VALUES
from subnibble.errors import BadRecipe
from subnibble.model.arch import find_arch
from subnibble.runtime import hadamard
from subnibble.runtime.attention import PrefixSeen, attend
from subnibble.runtime.kv_cache import LayerStore, Seen, changed
from subnibble.runtime.rotary import rotate, unrotate

ATTENTION = "subnibble"
_RECORD = "_subnibble_cache"


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
        first, second = (torch.cat(pair, 1) for pair in zip(old, new, strict=True))
        self._halves = (first, second)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Of tokens start .. stop - 1."""
        assert self._halves is not None
        cos, sin = (torch.cat([part[:, start:stop]] * 2, -1) for part in self._halves)
        return cos, sin

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
        self._seen: tuple[Seen, Seen] | None = None
        self.queries: Tensor | None = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: storage comes with the first tokens."""

    def expect(self, positions: Tensor | None) -> None:
        """An attention that will ask for what its queries see is about to update. positions: (b or 1, t), theirs."""
        self._expected, self.queries = True, positions

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values (b, heads, t, width); all of them dense, as the last query sees them."""
        if not self._expected:
            raise BadRecipe(
                "this cache needs subnibble's own attention; attach it to the model (`attach_cache_`) instead of "
                "passing it in"
            )
        before, scheme = self.store.length, self.scheme
        if scheme is not None and scheme.rope == "before":
            keys = self._without_positions(key_states, before)
        else:
            turned = hadamard.multiply(key_states, self.blocks(key_states)) if self.blocks(key_states) else key_states
            keys = self.store.keys.append(turned)
        values = self.store.values.append(value_states)
        self._seen, self._expected = (keys, values), False
        return keys.late, values.late

    def blocks(self, x: Tensor) -> tuple[int, ...]:
        """Blocks of the Hadamard matrix by which queries and keys (..., width) are turned; () for none."""
        if self.scheme is None or self.scheme.key_rotation == "none":
            return ()
        return hadamard.hadamard_blocks(x.shape[-1])

    def take(self) -> tuple[Seen, Seen]:
        """What the queries of the last update see of keys and values, handed out once: it is dense."""
        seen, self._seen = self._seen, None
        assert seen is not None
        return seen

    def _without_positions(self, keys: Tensor, before: int) -> Seen:
        total = before + keys.shape[2]
        cos, sin = (part.float() for part in self._positions.read(before, total))
        seen = self.store.keys.append(unrotate(keys.float(), cos, sin).to(keys.dtype))
        cos, sin = (part.float() for part in self._positions.read(0, total))
        return changed(seen, lambda part: rotate(part.float(), cos, sin).to(keys.dtype))

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

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number negative, as transformers has it."""
        for part in (self.store.keys, self.store.values):
            part.crop(abs(tokens_to_remove))

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

    hidden: (b, t) bool, tokens at the start of rows that repeat the prefix, None for none.
    """

    def __init__(self, scheme: CacheScheme | None, layers: int) -> None:
        self.positions = Positions()
        self._own = [CacheLayer(scheme, self.positions) for _ in range(layers)]
        super().__init__(layers=[*self._own])
        self.scheme = scheme
        self.hidden: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.positions.nbytes + sum(layer.store.nbytes for layer in self._own)

    @property
    def skipped(self) -> Tensor | None:
        """(b, 1) tokens that are hidden in each row; None for none anywhere."""
        return None if self.hidden is None else self.hidden.sum(1, keepdim=True)

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
        super().crop(tokens_to_remove)
        length = self.get_seq_length()
        self.positions.map(lambda part: part[:, :length])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[no-untyped-call]
        self.hidden = None
        self.positions.map(lambda part: part[:, :0])

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.positions.map(change)
        self.hidden = None if self.hidden is None else change(self.hidden)


@dataclass(frozen=True)
class Attached:
    """What `attach_cache_` did to a model."""

    scheme: CacheScheme | None
    prefix: PrefixIds | None
    attention: str


def attach_cache_(model: Any, scheme: CacheScheme | None, prefix: PrefixIds | None = None) -> None:
    """Let a transformers model, packed or plain, run on a `KVCache` of `scheme`, in `forward` and `generate`.

    scheme: None for a cache at 16 bits. prefix: ids of the keys and values that the model's attentions hold
    (`set_prefix_`), None for none. What was attached before is replaced.
    """
    detach_cache_(model)
    arch = find_arch(model.config.model_type)
    decoder = model.get_submodule(arch.blocks.rpartition(".")[0])
    attentions = _attentions(model)
    decoder.register_forward_pre_hook(_DecoderHook(scheme, prefix, len(attentions)), with_kwargs=True)
    for module in attentions:
        module.register_forward_pre_hook(_announce, with_kwargs=True)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    setattr(model, _RECORD, Attached(scheme, prefix, before))


def detach_cache_(model: Any) -> None:
    """Undo `attach_cache_`; a prefix's keys and values are dropped."""
    attached = attached_cache(model)
    if attached is None:
        return
    arch = find_arch(model.config.model_type)
    for module in (model.get_submodule(arch.blocks.rpartition(".")[0]), *_attentions(model)):
        # Found by what they are: a deep copy of the model has copies of them.
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _announce or isinstance(hook, _DecoderHook):
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    for module in _attentions(model):
        for name in (PREFIX_KEYS, PREFIX_VALUES):
            if hasattr(module, name):
                delattr(module, name)
    model.set_attn_implementation(attached.attention)
    delattr(model, _RECORD)


def change_scheme_(model: Any, scheme: CacheScheme | None) -> None:
    """Give a model another cache; its prefix stays."""
    attached, attentions = attached_cache(model), _attentions(model)
    prefix = None if attached is None else attached.prefix
    held = [(module.prefix_keys, module.prefix_values) for module in attentions] if prefix is not None else []
    attach_cache_(model, scheme, prefix)
    if held:
        set_prefix_(model, [keys for keys, _ in held], [values for _, values in held])


def attached_cache(model: Any) -> Attached | None:
    """What `attach_cache_` gave the model, None if nothing."""
    return getattr(model, _RECORD, None)


def set_prefix_(model: Any, keys: list[Tensor], values: list[Tensor]) -> None:
    """Give every attention of the model its prefix, (heads, p, width) float16 each, in the order of the layers."""
    for module, key, value in zip(_attentions(model), keys, values, strict=True):
        module.register_buffer(PREFIX_KEYS, key)
        module.register_buffer(PREFIX_VALUES, value)


def _attentions(model: Any) -> list[Any]:
    arch = find_arch(model.config.model_type)
    return [block.get_submodule(arch.attention) for block in model.get_submodule(arch.blocks)]


@dataclass(frozen=True)
class _DecoderHook:
    """Gives the decoder its cache, and positions behind the prefix."""

    scheme: CacheScheme | None
    prefix: PrefixIds | None
    layers: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A forward pre-hook."""
        if args:
            kwargs, args = {"input_ids": args[0], **kwargs}, args[1:]
        kwargs = dict(kwargs)
        found = kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if found is None else found
        if tokens is None or args:
            return args, kwargs
        cache = kwargs["past_key_values"] = self._cache(kwargs.get("past_key_values"))
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            if self.prefix is not None:
                raise BadRecipe("a model with a prefix takes attention masks of two dimensions, (batch, tokens)")
        elif self.prefix is not None and found is not None and cache.get_seq_length() == 0:
            cache.hidden = repeated_prefix(found, mask, self.prefix)
        past, new = cache.get_seq_length(), tokens.shape[1]
        kwargs["attention_mask"] = cache.visible(mask, new) if mask is None or isinstance(mask, Tensor) else mask
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(past, past + new, device=tokens.device).unsqueeze(0)
        if cache.skipped is not None:
            positions = (positions - cache.skipped.to(positions.device)).clamp(min=0)
        kwargs["position_ids"] = positions + (0 if self.prefix is None else len(self.prefix.ids))
        return args, kwargs

    def _cache(self, given: Any) -> KVCache:
        """The cache to use in place of what the caller passed."""
        if isinstance(given, KVCache):
            if given.scheme != self.scheme:
                raise BadRecipe("this cache has another scheme than the model's; leave past_key_values out")
            return given
        if given is None or (isinstance(given, Cache) and not given.is_compileable and given.get_seq_length() == 0):
            return KVCache(self.scheme, self.layers)
        raise BadRecipe(
            f"the model keeps its cache coded, and cannot go on from a {type(given).__name__}: leave past_key_values "
            "and cache_implementation out, or pass what the model itself returned"
        )


def repeated_prefix(ids: Tensor, mask: Tensor | None, prefix: PrefixIds) -> Tensor | None:
    """(b, t) bool: tokens at the start of each row that repeat the prefix or its BOS; None if there are none.

    ids: (b, t). mask: (b, t), 0 where a row is padded, None for no padding.
    """
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    known = torch.tensor(prefix.ids, device=ids.device)
    for row in range(ids.shape[0]):
        start = 0 if mask is None else int(mask[row].ne(0).int().argmax())
        own = ids[row, start:]
        if own.shape[0] >= len(known) and torch.equal(own[: len(known)], known):
            count = len(known)
        else:
            count = int(own.shape[0] > 0 and prefix.bos == int(own[0]) == prefix.ids[0])
        hidden[row, start : start + min(count, own.shape[0] - 1)] = True
    return hidden if bool(hidden.any()) else None


def _announce(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A pre-hook of attention: hands its cache layer over."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, KVCache):
        return args, kwargs
    layer = cache.layers[module.layer_idx]
    cos, sin = kwargs["position_embeddings"]
    hidden = args[0] if args else kwargs["hidden_states"]
    if module.layer_idx == 0 and cache.scheme is not None and cache.scheme.rope == "before":
        cache.positions.append(cos, sin, hidden.shape[0])
    layer.expect(kwargs.get("position_ids"))
    return args, {**kwargs, "kv_layer": layer}


def cached_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    kv_layer: CacheLayer | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, on what `kv_layer` holds. query: (b, query heads, t, width)."""
    if kv_layer is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **kwargs
        )
        return found
    keys, values = kv_layer.take()
    blocks = kv_layer.blocks(query)
    turned = hadamard.multiply(query, blocks) if blocks else query
    prefix = None
    if hasattr(module, PREFIX_KEYS):
        own = module.prefix_keys.to(query.dtype)
        shown = _prefix_visible(query, own.shape[1], kv_layer.queries, sliding_window)
        prefix = PrefixSeen(hadamard.multiply(own, blocks) if blocks else own, module.prefix_values, shown)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = attend(turned, keys, values, attention_mask, scale, prefix)
    return output.transpose(1, 2).contiguous(), None


def _prefix_visible(query: Tensor, length: int, positions: Tensor | None, sliding_window: int | None) -> Tensor:
    """(b or 1, 1, t, length): which tokens of the prefix are near enough to a query."""
    if sliding_window is None or positions is None:
        return torch.ones(1, 1, query.shape[2], length, dtype=torch.bool, device=query.device)
    distance = positions.unsqueeze(-1) - torch.arange(length, device=positions.device)
    return (distance < sliding_window).unsqueeze(1)


AttentionInterface.register(ATTENTION, cached_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
