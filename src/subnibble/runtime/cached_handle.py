"""A handle of a module, built at the module's first call and rebuilt when one of its parts is replaced."""

from __future__ import annotations

from collections.abc import Callable
from operator import is_not
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class CachedHandle(Generic[T]):
    """A handle built from parts, and reused while the parts are the same objects.

    A part that moves in place with its module stays the same object, so the handle stays valid.
    """

    def __init__(self) -> None:
        self._parts: tuple[object, ...] = ()
        self._handle: T | None = None

    def of(self, parts: tuple[object, ...], make: Callable[[], T]) -> T:
        """Return the cached handle, or a new one from `make` if a part is not the same object as before."""
        handle = self._handle
        if handle is None or len(parts) != len(self._parts) or any(map(is_not, parts, self._parts)):
            handle = make()
            # A traced call does not store its handle: torch.compile would expect this change in every call.
            if not torch.compiler.is_compiling():
                self._parts, self._handle = parts, handle
        return handle

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedHandle[T]:
        """Copy as empty: the copy of a module builds its own handle."""
        return CachedHandle()

    def __reduce__(self) -> tuple[type[CachedHandle[T]], tuple[()]]:
        """Pickle as empty."""
        return CachedHandle, ()
