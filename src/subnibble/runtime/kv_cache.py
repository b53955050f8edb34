"""The packed store of a KV cache: what one layer keeps of its keys and values, and what queries see of it.

What a query at place t sees of a key or value at place j depends on t and j alone (`CacheScheme.coded_tokens`): so a
text read at once and one read token by token give the same result, and scoring a text at once measures the cache as
decoding will use it. These are the torch references; sums and codes are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subnibble.tensor.cache_scheme import CacheScheme
from subnibble.tensor.packed import pack_codes, unpack_codes

_LARGEST_STORED = torch.finfo(torch.float16).max
# A scale below this is raised to it, so that a constant group has one.
_SMALLEST_SCALE = torch.finfo(torch.float16).smallest_normal


@dataclass(frozen=True)
class Rows:
    """Coded rows, of any leading shape. codes: (..., bytes) uint8. scales, lows: (..., groups) float16."""

    codes: Tensor
    scales: Tensor
    lows: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All that is stored."""
        return self.codes, self.scales, self.lows

    def map(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """The same change to all tensors."""
        return Rows(change(self.codes), change(self.scales), change(self.lows))

    def append(self, other: Rows, dim: int) -> Rows:
        """With `other` behind, along `dim`."""
        return Rows(*(torch.cat(pair, dim) for pair in zip(self.tensors, other.tensors, strict=True)))


def quantize_rows(x: Tensor, bits: int, bounds: list[tuple[int, int]], clip: float = 1.0) -> Rows:
    """Code rows (..., k): in each group (first, stop) of columns `low + scale * code` with codes 0 .. 2**bits - 1.

    The range is the group's own, shrunk by `clip` towards its middle; scale and low are rounded to float16 before codes
    are made, so that what is stored is what was used.
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
    """The rows (..., k) that codes stand for, computed in float32 and cast once to `dtype`."""
    width = bounds[-1][1]
    shape = rows.codes.shape[:-1]
    codes = unpack_codes(rows.codes.flatten(0, -2), bits, width).view(*shape, width)
    parts = [
        rows.lows[..., g : g + 1].float() + rows.scales[..., g : g + 1].float() * codes[..., start:stop].float()
        for g, (start, stop) in enumerate(bounds)
    ]
    return torch.cat(parts, -1).to(dtype)


@dataclass(frozen=True)
class Seen:
    """What the queries of one call see of keys, or of values. late: (b, heads, n, width), as the last query does.

    early: as the first query does, coded less; None where all see the same. counts: (queries,), of how many first
    tokens each query sees the codes; None with `early`.
    """

    late: Tensor
    early: Tensor | None = None
    counts: Tensor | None = None


class TensorStore:
    """Keys, or values, of one layer: coded tokens, and behind them those that are still at 16 bits.

    scheme: None keeps all as it comes. of_keys: which of the two it is, for schemes that treat them differently.
    center: (heads, width), what is coded less; None for nothing.
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
        parts = [] if self.quantized is None else list(self.quantized.tensors)
        return sum(part.nbytes for part in (*parts, *([] if self.exact is None else [self.exact])))

    @property
    def batch(self) -> int:
        """Sequences in the store, 0 before the first token."""
        part = self.exact if self.quantized is None else self.quantized.codes
        return 0 if part is None else part.shape[0]

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

    def append(self, x: Tensor) -> Seen:
        """Add tokens x (b, heads, t, width), code what is to be coded by now; what their queries see."""
        first = self.length
        exact = x if self.exact is None else torch.cat([self.exact, x], 2)
        before = self._quantized_length
        scheme = self._scheme
        if scheme is None:
            self.exact = exact
            return Seen(exact)
        total = first + x.shape[2]
        counts = [scheme.quantized_tokens(first + i + 1, self._of_keys) for i in range(x.shape[2])]
        assert not counts or counts[-1] >= before
        ready = exact[:, :, : counts[-1] - before] if counts else exact[:, :, :0]
        # A window is none of a query's business where each sees all that it may see coded.
        differs = any(count < min(first + i + 1, counts[-1]) for i, count in enumerate(counts))
        early = self._read(exact, x.dtype) if differs else None
        if ready.shape[2]:
            self._code(ready)
        rest = exact[:, :, ready.shape[2] :]
        # A copy, lest a few tokens hold the memory of all.
        self.exact = rest.clone() if rest.shape[2] else None
        assert self.length == total
        late = self._read(rest, x.dtype)
        return Seen(late, early, torch.tensor(counts, device=x.device) if early is not None else None)

    def select(self, index: Tensor) -> None:
        """Keep these sequences of the batch, in this order; index may repeat."""
        self._map(lambda part: part.index_select(0, index.to(part.device)))

    def _quantized_without(self, tokens: int) -> int:
        left = max(self.length - tokens, 0)
        return 0 if self._scheme is None else self._scheme.quantized_tokens(left, self._of_keys)

    def check_crop(self, tokens: int) -> None:
        """Raise `ValueError` if without its last `tokens` tokens what is coded would have to be uncoded."""
        target = self._quantized_without(tokens)
        if self._scheme is not None and self._scheme.window and target != self._quantized_length:
            raise ValueError(
                f"without its last {tokens} tokens a cache of {self.length} would have {target} coded, and it has "
                f"{self._quantized_length}, which cannot be uncoded; use window = 0, or decode without assistant"
            )

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens; see `check_crop`."""
        self.check_crop(tokens)
        left, target = max(self.length - tokens, 0), self._quantized_without(tokens)
        if self.quantized is not None and target < self._quantized_length:
            self.quantized = self.quantized.map(lambda part: part[:, :, :target].clone())
        rest = left - target
        self.exact = self.exact[:, :, :rest].clone() if self.exact is not None and rest else None

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.quantized = None if self.quantized is None else self.quantized.map(change)
        self.exact = None if self.exact is None else change(self.exact)

    def _code(self, x: Tensor) -> None:
        scheme = self._scheme
        assert scheme is not None
        if self._by_channel:
            # (b, heads, groups, width, tokens of a group): a row is a channel of one group.
            x = x.unflatten(2, (-1, scheme.group_size)).transpose(3, 4)
            found = quantize_rows(x, scheme.bits, [(0, scheme.group_size)], scheme.clip)
        else:
            x = x if self.center is None else x.float() - self.center.float().unsqueeze(1)
            found = quantize_rows(x, scheme.bits, scheme.bounds(x.shape[3]), scheme.clip)
            self._width = x.shape[3]
        self.quantized = found if self.quantized is None else self.quantized.append(found, 2)

    def _read(self, exact: Tensor, dtype: torch.dtype) -> Tensor:
        """All tokens dense (b, heads, n, width): the coded ones, then `exact`."""
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
class Coding:
    """How the cache of one layer codes. center: of its keys, see `TensorStore`."""

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


def changed(seen: Seen, change: Callable[[Tensor], Tensor]) -> Seen:
    """The same with both forms changed alike."""
    return replace(seen, late=change(seen.late), early=None if seen.early is None else change(seen.early))
