"""A handle of a module that is made once, at its first call, and again when what it is made of moves."""

from __future__ import annotations

from collections.abc import Callable
from operator import is_not
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class Kept(Generic[T]):
    """A handle that is made of parts and kept for as long as they are the very same: they move with their module."""

    def __init__(self) -> None:
        self._parts: tuple[object, ...] = ()
        self._handle: T | None = None

    def of(self, parts: tuple[object, ...], make: Callable[[], T]) -> T:
        """The kept handle, or a new one if a part is another object than before."""
        handle = self._handle
        if handle is None or len(parts) != len(self._parts) or any(map(is_not, parts, self._parts)):
            handle = make()
            # A traced call makes its own; it would take the change for one of each call.
            if not torch.compiler.is_compiling():
                self._parts, self._handle = parts, handle
        return handle

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept[T]:
        """A copy of a module makes its own."""
        return Kept()

    def __reduce__(self) -> tuple[type[Kept[T]], tuple[()]]:
        """What is pickled with a module is empty."""
        return Kept, ()
