"""Compare two contents part by part: what differs first, and how much."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_WHOLE = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class Tolerance:
    """How far real numbers may be apart: steps of their stored type (ulps), or a share of the larger magnitude.

    Codes, orders, texts, types and shapes must be the same whatever it says.
    """

    ulps: int = 0
    relative: float = 0.0

    @classmethod
    def of(cls, text: str) -> Tolerance:
        """From "3ulp" or "1e-6"; `ValueError` for anything else."""
        ulps = re.fullmatch(r"(\d+)ulps?", text)
        found = cls(ulps=int(ulps[1])) if ulps else cls(relative=float(text))
        if not 0 <= found.relative < 1:
            raise ValueError(f"a tolerance of {text}")
        return found


@dataclass(frozen=True)
class Comparison:
    """What differs between two contents.

    first: the first difference, in words; "" for none. parts: how many of `of` parts differ. codes: how many codes,
    zero-points and places of orders do. numbers: how many real numbers do. largest: difference between two of them.
    excused: real numbers that differ within the tolerance; `ulps` and `relative` are the most that these do.
    """

    first: str
    parts: int
    of: int
    codes: int
    numbers: int
    largest: float
    excused: int
    ulps: int
    relative: float

    @property
    def same(self) -> bool:
        """Whether nothing differs beyond the tolerance."""
        return not self.first

    def __str__(self) -> str:
        """For a table."""
        if not self.same:
            return (
                f"differs first in {self.first}; {self.parts} of {self.of} parts differ, in {self.codes} codes and "
                f"{self.numbers} numbers, these by up to {self.largest:.3g}"
            )
        if self.excused:
            return (
                f"same within its tolerance: {self.excused} numbers differ, by up to {self.ulps} ulps and "
                f"{self.relative:.2g} of their size"
            )
        return "same"


@dataclass(frozen=True)
class _Part:
    """Of one part: the first difference beyond the tolerance ("" for none), and counts as of `Comparison`."""

    first: str = ""
    codes: int = 0
    numbers: int = 0
    largest: float = 0.0
    excused: int = 0
    ulps: int = 0
    relative: float = 0.0


def compare(
    old: Mapping[str, Tensor | str], new: Mapping[str, Tensor | str], tolerance: Tolerance | None = None
) -> Comparison:
    """Compare contents in the order of `new`; what it does not have comes last."""
    names = [*new, *(name for name in old if name not in new)]
    within = tolerance or Tolerance()
    found = {name: _compare_part(old.get(name), new.get(name), within) for name in names}
    wrong = {name: part for name, part in found.items() if part.first}
    return Comparison(
        first=next((f"{name}{part.first}" for name, part in wrong.items()), ""),
        parts=len(wrong),
        of=len(names),
        codes=sum(part.codes for part in wrong.values()),
        numbers=sum(part.numbers for part in wrong.values()),
        largest=max((part.largest for part in wrong.values()), default=0.0),
        excused=sum(part.excused for part in found.values()),
        ulps=max((part.ulps for part in found.values()), default=0),
        relative=max((part.relative for part in found.values()), default=0.0),
    )


def _compare_part(old: Tensor | str | None, new: Tensor | str | None, within: Tolerance) -> _Part:
    if old is None or new is None:
        return _Part(f", which the {'old' if old is None else 'new'} side does not have")
    if isinstance(old, str) or isinstance(new, str):
        return _Part() if isinstance(old, str) and old == new else _Part(_text_difference(_shown(old), _shown(new)))
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return _Part(f": {_shown(old)} -> {_shown(new)}")
    if old.dtype not in _WHOLE:
        differ = old != new
        return _Part(_first(old, new, differ), codes=int(differ.sum())) if bool(differ.any()) else _Part()
    return _compare_numbers(old, new, within)


def _compare_numbers(old: Tensor, new: Tensor, within: Tolerance) -> _Part:
    # 0 and -0 are the same number; one that is not a number is the same as itself.
    ulps = (_steps(old) - _steps(new)).abs()
    a, b = old.double(), new.double()
    gap = (a - b).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(ulps == 0, 0)
    relative = (gap / torch.maximum(a.abs(), b.abs()).clamp(min=5e-324)).nan_to_num(nan=torch.inf, posinf=torch.inf)
    relative = relative.masked_fill(ulps == 0, 0)
    # What is not finite on one side is beyond any tolerance.
    excused = ((ulps <= within.ulps) | (relative <= within.relative)) & torch.isfinite(gap)
    differ = (ulps > 0) & ~excused
    if bool(differ.any()):
        return _Part(_first(old, new, differ), numbers=int(differ.sum()), largest=float(gap[differ].max()))
    count = int((ulps > 0).sum())
    return _Part(excused=count, ulps=int(ulps.max()), relative=float(relative.max())) if count else _Part()


def _steps(numbers: Tensor) -> Tensor:
    """(...) int64: how many numbers of the type lie between each and 0, with its sign."""
    kind = _WHOLE[numbers.dtype]
    bits = numbers.contiguous().view(kind).long()
    return torch.where(bits < 0, -(bits - torch.iinfo(kind).min), bits)


def _first(old: Tensor, new: Tensor, differ: Tensor) -> str:
    place = tuple(differ.nonzero()[0].tolist())
    return f"{list(place)}: {old[place].item():.9g} -> {new[place].item():.9g}"


def _text_difference(old: str, new: str) -> str:
    """From a little before where two texts part."""
    pairs = zip(old, new, strict=False)
    parted = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(old), len(new)))
    start = max(parted - 20, 0)
    shown = [f"{'...' if start else ''}{text[start : start + 60]}" for text in (old, new)]
    return f": {shown[0]} -> {shown[1]}"


def _shown(part: Tensor | str) -> str:
    if isinstance(part, Tensor):
        return f"{str(part.dtype).removeprefix('torch.')} {tuple(part.shape)}"
    return part
