"""Compare two contents part by part: the first difference, and how much differs in all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_INTEGER_TYPES = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class Tolerance:
    """How far floating-point numbers may differ. Codes, orders, texts, types and shapes must always be equal.

    ulps: steps of the stored type.
    relative: share of the larger magnitude.
    """

    ulps: int = 0
    relative: float = 0.0

    @classmethod
    def of(cls, text: str) -> Tolerance:
        """Parse "3ulp" or "1e-6"; raise `ValueError` for anything else."""
        ulps = re.fullmatch(r"(\d+)ulps?", text)
        tolerance = cls(ulps=int(ulps[1])) if ulps else cls(relative=float(text))
        if not 0 <= tolerance.relative < 1:
            raise ValueError(f"a tolerance of {text}; give 2ulp, or a share below 1 such as 1e-6")
        return tolerance


@dataclass(frozen=True)
class Comparison:
    """The differences between two contents.

    first: the first difference, in words; "" for none.
    parts: number of parts that differ.
    of: number of parts.
    codes: number of codes, zero-points and entries of orders that differ.
    numbers: number of floating-point numbers that differ.
    max_difference: the largest difference of two of these numbers.
    excused: number of floating-point numbers that differ within the tolerance.
    ulps, relative: the largest difference among the excused numbers.
    """

    first: str
    parts: int
    of: int
    codes: int
    numbers: int
    max_difference: float
    excused: int
    ulps: int
    relative: float

    @property
    def same(self) -> bool:
        """Whether nothing differs beyond the tolerance."""
        return not self.first

    def __str__(self) -> str:
        """The text for the table."""
        if not self.same:
            return (
                f"differs first in {self.first}; {self.parts} of {self.of} parts differ, in {self.codes} codes and "
                f"{self.numbers} numbers, these by up to {self.max_difference:.3g}"
            )
        if self.excused:
            return (
                f"same within its tolerance: {self.excused} numbers differ, by up to {self.ulps} ulps and "
                f"{self.relative:.2g} of their size"
            )
        return "same"


@dataclass(frozen=True)
class _Difference:
    """The differences of one part, with fields as in `Comparison`."""

    first: str = ""
    codes: int = 0
    numbers: int = 0
    max_difference: float = 0.0
    excused: int = 0
    ulps: int = 0
    relative: float = 0.0


def compare(
    old: Mapping[str, Tensor | str], new: Mapping[str, Tensor | str], tolerance: Tolerance | None = None
) -> Comparison:
    """Compare two contents in the order of `new`; parts that only `old` has come last."""
    names = [*new, *(name for name in old if name not in new)]
    within = tolerance or Tolerance()
    parts = {name: _compare_entry(old.get(name), new.get(name), within) for name in names}
    wrong = {name: difference for name, difference in parts.items() if difference.first}
    return Comparison(
        first=next((f"{name}{difference.first}" for name, difference in wrong.items()), ""),
        parts=len(wrong),
        of=len(names),
        codes=sum(difference.codes for difference in wrong.values()),
        numbers=sum(difference.numbers for difference in wrong.values()),
        max_difference=max((difference.max_difference for difference in wrong.values()), default=0.0),
        excused=sum(difference.excused for difference in parts.values()),
        ulps=max((difference.ulps for difference in parts.values()), default=0),
        relative=max((difference.relative for difference in parts.values()), default=0.0),
    )


def _compare_entry(old: Tensor | str | None, new: Tensor | str | None, within: Tolerance) -> _Difference:
    if old is None or new is None:
        return _Difference(f", which the {'old' if old is None else 'new'} side does not have")
    if isinstance(old, str) or isinstance(new, str):
        same = isinstance(old, str) and old == new
        return _Difference() if same else _Difference(_text_difference(_shown(old), _shown(new)))
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return _Difference(f": {_shown(old)} -> {_shown(new)}")
    if old.dtype not in _INTEGER_TYPES:
        differ = old != new
        return _Difference(_first(old, new, differ), codes=int(differ.sum())) if bool(differ.any()) else _Difference()
    return _compare_numbers(old, new, within)


def _compare_numbers(old: Tensor, new: Tensor, within: Tolerance) -> _Difference:
    # 0 and -0 have the same step, so they are equal, and so are two NaNs of the same bits.
    ulps = (_steps(old) - _steps(new)).abs()
    a, b = old.double(), new.double()
    gap = (a - b).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(ulps == 0, 0)
    relative = (gap / torch.maximum(a.abs(), b.abs()).clamp(min=5e-324)).nan_to_num(nan=torch.inf, posinf=torch.inf)
    relative = relative.masked_fill(ulps == 0, 0)
    # A number that is not finite on one side is beyond any tolerance.
    excused = ((ulps <= within.ulps) | (relative <= within.relative)) & torch.isfinite(gap)
    differ = (ulps > 0) & ~excused
    if bool(differ.any()):
        return _Difference(_first(old, new, differ), numbers=int(differ.sum()), max_difference=float(gap[differ].max()))
    count = int((ulps > 0).sum())
    return _Difference(excused=count, ulps=int(ulps.max()), relative=float(relative.max())) if count else _Difference()


def _steps(numbers: Tensor) -> Tensor:
    """(...) int64: the number of steps of the type from 0 to each number, with its sign."""
    kind = _INTEGER_TYPES[numbers.dtype]
    bits = numbers.contiguous().view(kind).long()
    return torch.where(bits < 0, -(bits - torch.iinfo(kind).min), bits)


def _first(old: Tensor, new: Tensor, differ: Tensor) -> str:
    place = tuple(differ.nonzero()[0].tolist())
    return f"{list(place)}: {old[place].item():.9g} -> {new[place].item():.9g}"


def _text_difference(old: str, new: str) -> str:
    """Both texts from 20 characters before their first difference."""
    pairs = zip(old, new, strict=False)
    first = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(old), len(new)))
    start = max(first - 20, 0)
    shown = [f"{'...' if start else ''}{text[start : start + 60]}" for text in (old, new)]
    return f": {shown[0]} -> {shown[1]}"


def _shown(entry: Tensor | str) -> str:
    if isinstance(entry, Tensor):
        return f"{str(entry.dtype).removeprefix('torch.')} {tuple(entry.shape)}"
    return entry
