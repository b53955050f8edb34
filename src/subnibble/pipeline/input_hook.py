"""A hook that quantizes a linear's input while a block is calibrated."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class InputHook:
    """A forward pre-hook that quantizes a linear's input, and counts how often it ran. path: names it in errors."""

    def __init__(self, path: str, linear: nn.Linear, quantize: Callable[[Tensor], Tensor]) -> None:
        self.path, self.runs, self._quantize = path, 0, quantize
        self.handle: RemovableHandle = linear.register_forward_pre_hook(self)

    def __call__(self, linear: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        """As torch calls it."""
        self.runs += 1
        return (self._quantize(args[0]),)
