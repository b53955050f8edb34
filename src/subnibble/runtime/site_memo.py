"""Prepare a tensor once for all linears that read it: the first computes the result, the others reuse it.

q, k and v of an attention read the same tensor: it is scaled, gathered, transformed and quantized once. The result is
dropped as soon as the last reader has used it, or the tensor is freed.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class SiteMemo(Generic[T]):
    """Holds the result for the last tensor. readers: number of linears that use it."""

    def __init__(self, readers: int = 1) -> None:
        self.readers = readers
        # The tensor, its version and the settings, the result, and the number of readers that have used it.
        self._kept: tuple[weakref.ref[Tensor], tuple[int, object], T, int] | None = None

    def of(self, x: Tensor, settings: object, make: Callable[[], T]) -> T:
        """Return `make()` for `x`: computed now, or reused from another reader of the same tensor object.

        settings: what else the result depends on.
        """
        # A traced call has no state between calls, and readers must not share an autograd graph.
        if self.readers == 1 or torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            return make()
        memo, version = self._kept, (_version(x), settings)
        if memo is not None and memo[0]() is x and memo[1] == version:
            used = memo[3] + 1
            self._kept = None if used == self.readers else (*memo[:3], used)
            return memo[2]
        result = make()
        self._kept = (weakref.ref(x, self._forget), version, result, 1)
        return result

    def _forget(self, reference: weakref.ref[Tensor]) -> None:
        if self._kept is not None and self._kept[0] is reference:
            self._kept = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SiteMemo[T]:
        """Copy as empty."""
        return SiteMemo(self.readers)

    def __reduce__(self) -> tuple[type[SiteMemo[T]], tuple[int]]:
        """Pickle as empty."""
        return SiteMemo, (self.readers,)


class _Plain(threading.local):
    def __init__(self) -> None:
        # More readers than there are: the result is dropped with the tensor.
        self.memo: SiteMemo[Any] = SiteMemo(readers=sys.maxsize)


_plain = _Plain()


def plain_inputs() -> SiteMemo[Any]:
    """Return this thread's memo of tensors that linears without steps read: they all prepare them the same way."""
    return _plain.memo


def _version(x: Tensor) -> int:
    """How often `x` was written to; 0 for an inference tensor, which does not count writes."""
    return 0 if x.is_inference() else x._version
