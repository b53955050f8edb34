"""The packed store of a KV cache: the keys and values that one layer stores, and what queries see of them.

Whether a query at position t sees the key or value at position j quantized depends on t and j alone
(`CacheScheme.quantized_tokens`). So a text in one forward pass and the same text token by token give the same result,
and scoring a text in one pass measures the cache as decoding will use it. These are the torch references; sums and
codes are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subnibble.tensor.cache_scheme import CacheScheme
from subnibble.tensor.packed import pack_codes, unpack_codes

_LARGEST_STORED = torch.finfo(torch.float16).max
# Smaller scales are raised to this, so that a constant group has a scale.
_SMALLEST_SCALE = torch.finfo(torch.float16).smallest_normal


@dataclass(frozen=True)
class Rows:
    """Quantized rows, of any leading shape.

    codes: (..., bytes) uint8, packed.
    scales, lows: (..., groups) float16.
    """

    codes: Tensor
    scales: Tensor
    lows: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All stored tensors."""
        return self.codes, self.scales, self.lows

    def map(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """Apply `change` to each tensor."""
        return Rows(change(self.codes), change(self.scales), change(self.lows))

    def append(self, other: Rows, dim: int) -> Rows:
        """Append `other` along `dim`."""
        return Rows(*(torch.cat(pair, dim) for pair in zip(self.tensors, other.tensors, strict=True)))


def quantize_rows(x: Tensor, bits: int, bounds: list[tuple[int, int]], clip: float = 1.0) -> Rows:
    """Quantize rows: in each group, x is about `low + scale * code` with codes 0 .. 2**bits - 1.

    x: (..., k).
    bounds: first and stop column of each group.
    clip: the share of a group's range that is kept, around its middle.

    Scale and low are rounded to float16 before codes are computed, so that codes fit the stored values.
    """
    last = 2**bits - 1
    codes, scales, lows = [], [], []
    for start, stop in bounds:
        group = x[..., start:stop].float()
        low, high = group.amin(-1, keepdim=True), group.amax(-1, keepdim=True)
        middle, half = (low + high) / 2, clip * (high - low) / 2
        low = (middle - half).clamp(-_LARGEST_STORED, _LARGEST_STORED).to(torch.float16)
        scale = (2 * half / last).clamp(_SMALLEST_SCALE, _LARGEST_STORED).to(torch.float16)
        codes.append(((group - low.float()) / scale.float()).round_().clamp_(0, last))
        scales.append(scale)
        lows.append(low)
    packed = pack_codes(torch.cat(codes, -1).flatten(0, -2).to(torch.uint8), bits)
    return Rows(packed.view(*x.shape[:-1], -1), torch.cat(scales, -1), torch.cat(lows, -1))


def dequantize_rows(rows: Rows, bits: int, bounds: list[tuple[int, int]], dtype: torch.dtype) -> Tensor:
    """Dequantize to rows (..., k), computed in float32 and cast once to `dtype`. Inverse of `quantize_rows`."""
    width = bounds[-1][1]
    shape = rows.codes.shape[:-1]
    codes = unpack_codes(rows.codes.flatten(0, -2), bits, width).view(*shape, width)
    parts = [
        rows.lows[..., g : g + 1].float() + rows.scales[..., g : g + 1].float() * codes[..., start:stop].float()
        for g, (start, stop) in enumerate(bounds)
    ]
    return torch.cat(parts, -1).to(dtype)


@dataclass(frozen=True)
class CacheView:
    """The keys, or the values, that the queries of one call see, dense.

    late: (b, heads, n, width), as the last query sees them.
    early: (b, heads, n, width), quantized only as far as before this call; None if all queries see the same.
    counts: (queries,), how many of the first tokens each query sees quantized; None if `early` is None.
    """

    late: Tensor
    early: Tensor | None = None
    counts: Tensor | None = None


class TensorStore:
    """The keys, or the values, of one layer: quantized tokens, followed by those that are still at 16 bits.

    scheme: None stores every token unquantized.
    of_keys: whether it stores keys; some schemes treat keys and values differently.
    center: (heads, width), subtracted before quantization; None for nothing.
    """

    def __init__(self, scheme: CacheScheme | None, of_keys: bool, center: Tensor | None = None) -> None:
        self._scheme, self._of_keys, self.center = scheme, of_keys, center
        self._by_channel = of_keys and scheme is not None and scheme.key_axis == "channel"
        self._width = 0
        self.quantized: Rows | None = None
        self.exact: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        tensors = [] if self.quantized is None else list(self.quantized.tensors)
        return sum(tensor.nbytes for tensor in (*tensors, *([] if self.exact is None else [self.exact])))

    @property
    def batch(self) -> int:
        """Sequences in the store, 0 before the first token."""
        tensor = self.exact if self.quantized is None else self.quantized.codes
        return 0 if tensor is None else tensor.shape[0]

    @property
    def length(self) -> int:
        """Tokens in the store."""
        return self._quantized_length + (0 if self.exact is None else self.exact.shape[2])

    @property
    def _quantized_length(self) -> int:
        if self.quantized is None or self._scheme is None:
            return 0
        groups = self.quantized.codes.shape[2]
        return groups * self._scheme.group_size if self._by_channel else groups

    def append(self, x: Tensor) -> CacheView:
        """Add tokens x (b, heads, t, width), quantize the tokens now due, and return what the new queries see."""
        first = self.length
        exact = x if self.exact is None else torch.cat([self.exact, x], 2)
        before = self._quantized_length
        scheme = self._scheme
        if scheme is None:
            self.exact = exact
            return CacheView(exact)
        total = first + x.shape[2]
        counts = [scheme.quantized_tokens(first + i + 1, self._of_keys) for i in range(x.shape[2])]
        assert not counts or counts[-1] >= before
        ready = exact[:, :, : counts[-1] - before] if counts else exact[:, :, :0]
        # If every query already sees all its tokens quantized, no 16-bit view is needed.
        differs = any(count < min(first + i + 1, counts[-1]) for i, count in enumerate(counts))
        early = self._read(exact, x.dtype) if differs else None
        if ready.shape[2]:
            self._quantize(ready)
        waiting = exact[:, :, ready.shape[2] :]
        # A copy, because a view of a few tokens would keep the memory of all.
        self.exact = waiting.clone() if waiting.shape[2] else None
        assert self.length == total
        late = self._read(waiting, x.dtype)
        return CacheView(late, early, torch.tensor(counts, device=x.device) if early is not None else None)

    def select(self, index: Tensor) -> None:
        """Keep the sequences at `index` (1-D, integer) of the batch, in this order; an index may repeat."""
        self._map(lambda tensor: tensor.index_select(0, index.to(tensor.device)))

    def state(self) -> dict[str, Tensor]:
        """Copies of what the store holds of its one sequence, on the CPU; without what has no tokens.

        codes, scales, lows: of the quantized tokens, as in `Rows`, without the batch.
        exact: (heads, tokens, width), the tokens that are not quantized.
        """
        names = (
            {}
            if self.quantized is None
            else dict(zip(("codes", "scales", "lows"), self.quantized.tensors, strict=True))
        )
        names |= {} if self.exact is None else {"exact": self.exact}
        return {name: tensor[0].cpu().clone(memory_format=torch.contiguous_format) for name, tensor in names.items()}

    def restore_(self, state: Mapping[str, Tensor], width: int, dtype: torch.dtype, device: torch.device) -> None:
        """Hold what `state` returned, in place of what the store holds.

        width: channels of a head.
        dtype, device: of the tokens that are not quantized, and of all tensors.
        """
        self._width = width
        parts = {name: tensor.unsqueeze(0).to(device) for name, tensor in state.items()}
        self.quantized = Rows(parts["codes"], parts["scales"], parts["lows"]) if "codes" in parts else None
        self.exact = parts["exact"].to(dtype) if "exact" in parts else None

    def _quantized_without(self, tokens: int) -> int:
        """How many tokens should be quantized after the last `tokens` tokens are removed."""
        left = max(self.length - tokens, 0)
        return 0 if self._scheme is None else self._scheme.quantized_tokens(left, self._of_keys)

    def check_crop(self, tokens: int) -> None:
        """Raise `ValueError` if removing the last `tokens` tokens needs tokens at 16 bits that are quantized by now."""
        target = self._quantized_without(tokens)
        if self._scheme is not None and self._scheme.window and target != self._quantized_length:
            raise ValueError(
                f"cannot remove the last {tokens} of the cache's {self.length} tokens: only {target} tokens would then "
                f"be quantized, but {self._quantized_length} are, and they cannot return to 16 bits; use window = 0, "
                "or decode without an assistant model"
            )

    def crop(self, tokens: int) -> None:
        """Remove the last `tokens` tokens; raises as `check_crop` does."""
        self.check_crop(tokens)
        left, target = max(self.length - tokens, 0), self._quantized_without(tokens)
        if self.quantized is not None and target < self._quantized_length:
            self.quantized = self.quantized.map(lambda tensor: tensor[:, :, :target].clone())
        unquantized = left - target
        self.exact = self.exact[:, :, :unquantized].clone() if self.exact is not None and unquantized else None

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.quantized = None if self.quantized is None else self.quantized.map(change)
        self.exact = None if self.exact is None else change(self.exact)

    def _quantize(self, x: Tensor) -> None:
        scheme = self._scheme
        assert scheme is not None
        if self._by_channel:
            # (b, heads, groups, width, tokens of a group): a row is one channel of one group.
            x = x.unflatten(2, (-1, scheme.group_size)).transpose(3, 4)
            rows = quantize_rows(x, scheme.bits, [(0, scheme.group_size)], scheme.clip)
        else:
            x = x if self.center is None else x.float() - self.center.float().unsqueeze(1)
            rows = quantize_rows(x, scheme.bits, scheme.bounds(x.shape[3]), scheme.clip)
            self._width = x.shape[3]
        self.quantized = rows if self.quantized is None else self.quantized.append(rows, 2)

    def _read(self, exact: Tensor, dtype: torch.dtype) -> Tensor:
        """All tokens dense, (b, heads, n, width): the quantized ones, then `exact`."""
        if self.quantized is None:
            return exact
        scheme = self._scheme
        assert scheme is not None
        if self._by_channel:
            dense = dequantize_rows(self.quantized, scheme.bits, [(0, scheme.group_size)], dtype)
            dense = dense.transpose(3, 4).flatten(2, 3)
        else:
            wide = dtype if self.center is None else torch.float32
            dense = dequantize_rows(self.quantized, scheme.bits, scheme.bounds(self._width), wide)
            if self.center is not None:
                dense = (dense + self.center.float().unsqueeze(1)).to(dtype)
        return torch.cat([dense, exact], 2) if exact.shape[2] else dense


@dataclass(frozen=True)
class CacheQuantizer:
    """How one layer's cache is quantized. center: (heads, width), subtracted from keys first; None for nothing."""

    scheme: CacheScheme
    center: Tensor | None = None


class LayerStore:
    """Keys and values of one layer."""

    def __init__(self, scheme: CacheScheme | None) -> None:
        self.keys, self.values = TensorStore(scheme, of_keys=True), TensorStore(scheme, of_keys=False)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def length(self) -> int:
        """Tokens in the store."""
        return self.values.length

    @property
    def batch(self) -> int:
        """Sequences in the store, 0 before the first token."""
        return self.values.batch

    def state(self) -> dict[str, Tensor]:
        """The states of keys and values (`TensorStore.state`), as keys.NAME and values.NAME."""
        stores = {"keys": self.keys, "values": self.values}
        return {f"{kind}.{name}": tensor for kind, store in stores.items() for name, tensor in store.state().items()}

    def restore_(self, state: Mapping[str, Tensor], width: int, dtype: torch.dtype, device: torch.device) -> None:
        """Hold what `state` returned; arguments as in `TensorStore.restore_`."""
        for kind, store in (("keys", self.keys), ("values", self.values)):
            own = {name.removeprefix(f"{kind}."): part for name, part in state.items() if name.startswith(f"{kind}.")}
            store.restore_(own, width, dtype, device)


def map_view(view: CacheView, change: Callable[[Tensor], Tensor]) -> CacheView:
    """Apply `change` to `late` and to `early`."""
    return replace(view, late=change(view.late), early=None if view.early is None else change(view.early))
