"""What the readers of one tensor make of it, made by the first and used by the others.

q, k and v of an attention read the same tensor: it is scaled, gathered, transformed and quantized once. What was made
is forgotten as soon as the last reader has used it, or the tensor is gone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class SiteMemo(Generic[T]):
    """Holds what was made of the last tensor. readers: how many linears use it."""

    def __init__(self, readers: int = 1) -> None:
        self.readers = readers
        # The tensor, its version, what was made of it, and how many have used it.
        self._kept: tuple[weakref.ref[Tensor], int, T, int] | None = None

    def of(self, x: Tensor, make: Callable[[], T]) -> T:
        """What `make` gives for `x`: made now, or by another reader of the very same tensor."""
        # A traced call has no state between calls, and gradients of one reader must not meet another's.
        if self.readers == 1 or torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            return make()
        kept, version = self._kept, _version(x)
        if kept is not None and kept[0]() is x and kept[1] == version:
            used = kept[3] + 1
            self._kept = None if used == self.readers else (*kept[:3], used)
            return kept[2]
        made = make()
        self._kept = (weakref.ref(x, self._forget), version, made, 1)
        return made

    def _forget(self, reference: weakref.ref[Tensor]) -> None:
        if self._kept is not None and self._kept[0] is reference:
            self._kept = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SiteMemo[T]:
        """A copy holds nothing yet."""
        return SiteMemo(self.readers)

    def __reduce__(self) -> tuple[type[SiteMemo[T]], tuple[int]]:
        """What is pickled with a module holds nothing."""
        return SiteMemo, (self.readers,)


def _version(x: Tensor) -> int:
    """How often `x` was written to; tensors of inference mode do not count that."""
    return 0 if x.is_inference() else x._version
