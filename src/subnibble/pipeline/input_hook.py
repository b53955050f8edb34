"""A forward pre-hook that quantizes a linear's input during calibration."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class InputHook:
    """A forward pre-hook that quantizes a linear's input.

    path: name of the input, for errors.
    linear: the linear that gets the hook.
    quantize: input (..., k) -> dequantized input, same shape and dtype.
    runs: how often the hook ran.
    handle: removes the hook.
    """

    def __init__(self, path: str, linear: nn.Linear, quantize: Callable[[Tensor], Tensor]) -> None:
        self.path, self.runs, self._quantize = path, 0, quantize
        self.handle: RemovableHandle = linear.register_forward_pre_hook(self)

    def __call__(self, linear: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Quantize the first positional argument, as torch calls a forward pre-hook."""
        self.runs += 1
        return (self._quantize(args[0]),)
