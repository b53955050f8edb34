"""What a block is trained on: the first tokens of the first calibration windows, the last of them held out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.calibrate.sinks import ordinary_tokens
from subnibble.errors import CalibrationError
from subnibble.model.transformers_api.blocks import BlockCall
from subnibble.tuning.tuning import Effort

# One window in so many is held out.
_HELD_OUT = 8
# Of what a block adds to the energy of its outputs, lest errors are measured against nothing.
_SMALLEST_SHARE = 1e-6


@dataclass(frozen=True)
class Samples:
    """What a block is trained on. inputs, target: (n, t, d), of the quantized chain and the block's outputs in the
    full-precision chain. ordinary: (n, t) bool, tokens that count. energy: of what the full-precision block adds to a
    token. call: of the block, for t tokens.
    """

    inputs: Tensor
    target: Tensor
    ordinary: Tensor
    energy: float
    call: BlockCall

    @property
    def held_out(self) -> range:
        """Windows that are only looked at."""
        count = self.inputs.shape[0]
        return range(count - max(1, count // _HELD_OUT), count)

    @property
    def trained(self) -> int:
        """How many first windows are trained on."""
        return self.held_out.start


class TrainingWindows:
    """The `Samples` of the first windows that come, a `Statistic` that is merged in the order of windows.

    Which windows are trained on and which are held out is known once all were seen. call: of the block, for
    `effort.tokens` tokens. device: the samples'. Views of batches are kept until they are put together.
    """

    def __init__(self, effort: Effort, call: BlockCall, device: torch.device | str = "cpu") -> None:
        self._effort, self._call, self._device = effort, call, device
        # Of a few windows: inputs, full-precision inputs and outputs (n, t, d), and which tokens are ordinary (n, t).
        self._parts: list[tuple[Tensor, ...]] = []

    def update(self, inputs: Tensor, exact: Tensor, target: Tensor) -> None:
        """Add windows (windows, tokens, channels): the block's inputs in the quantized and in the full-precision chain,
        and its outputs in the latter.
        """
        if self._missing:
            # A token may become a sink in this very block.
            ordinary = ordinary_tokens(exact) & ordinary_tokens(target)
            self._add(tuple(part[:, : self._effort.tokens] for part in (inputs, exact, target, ordinary)))

    def merge(self, other: TrainingWindows) -> None:
        """See `Statistic`."""
        for part in other._parts:
            self._add(part)

    @property
    def value(self) -> Samples:
        """See `Statistic`. Raises `CalibrationError` if a window has no token to train on."""
        inputs, before, after, usual = (torch.cat(parts).to(self._device) for parts in zip(*self._parts, strict=True))
        if not bool(usual[:, 1:].any(1).all()):
            raise CalibrationError(
                "a calibration window holds no token to tune on, only its first one and attention sinks; use longer "
                "windows"
            )
        added = (after.float() - before.float()).square().sum(-1)
        # An idle block adds nothing, and its error is that of its inputs.
        least = _SMALLEST_SHARE * float(after.float().square().sum(-1)[usual].mean())
        energy = max(float(added[usual].mean()), least, torch.finfo(torch.float32).tiny)
        return Samples(inputs, after, usual, energy, self._call)

    @property
    def _missing(self) -> int:
        """How many windows more will be taken."""
        return self._effort.windows - sum(part[0].shape[0] for part in self._parts)

    def _add(self, part: tuple[Tensor, ...]) -> None:
        self._parts.append(tuple(tensor[: self._missing] for tensor in part))
