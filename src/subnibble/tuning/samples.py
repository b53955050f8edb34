"""Training data of a block: the first tokens of the first calibration windows, the last of these windows held out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.calibrate.sinks import ordinary_tokens
from subnibble.errors import CalibrationError
from subnibble.model.transformers_api.blocks import BlockCall
from subnibble.tuning.tuning import Effort

# One window in this many is held out.
_HELD_OUT = 8
# Lower bound of the loss normalization, as a share of the output energy: avoids division by 0 for an idle block.
_SMALLEST_SHARE = 1e-6


@dataclass(frozen=True)
class Samples:
    """Training data of a block, n windows of t tokens.

    inputs: (n, t, d), the block's inputs in the quantized chain.
    target: (n, t, d), the block's outputs in the full-precision chain.
    ordinary: (n, t) bool, tokens that count in the loss (no attention sinks, no first tokens).
    energy: mean squared norm of what the full-precision block adds to a token.
    call: the block's call arguments for t tokens.
    """

    inputs: Tensor
    target: Tensor
    ordinary: Tensor
    energy: float
    call: BlockCall

    @property
    def held_out(self) -> range:
        """Indices of the held-out windows."""
        count = self.inputs.shape[0]
        return range(count - max(1, count // _HELD_OUT), count)

    @property
    def trained(self) -> int:
        """Number of windows, from the first, that are trained on."""
        return self.held_out.start


class TrainingWindows:
    """A `Statistic` that collects the first windows into `Samples`; merge in the order of windows.

    Which windows are held out is known only after all were added. Views of batches are kept until `value` joins them.

    effort: number of windows and tokens per window.
    call: the block's call arguments for `effort.tokens` tokens.
    device: device of the samples.
    """

    def __init__(self, effort: Effort, call: BlockCall, device: torch.device | str = "cpu") -> None:
        self._effort, self._call, self._device = effort, call, device
        # Per batch: inputs, full-precision inputs and outputs, (n, t, d) each, and the mask of ordinary tokens, (n, t).
        self._parts: list[tuple[Tensor, ...]] = []

    def update(self, inputs: Tensor, exact: Tensor, target: Tensor) -> None:
        """Add windows; each tensor is (windows, tokens, channels).

        inputs: the block's inputs in the quantized chain.
        exact: the block's inputs in the full-precision chain.
        target: the block's outputs in the full-precision chain.
        """
        if self._missing:
            # A token may become an attention sink inside this block.
            ordinary = ordinary_tokens(exact) & ordinary_tokens(target)
            self._add(tuple(tensor[:, : self._effort.tokens] for tensor in (inputs, exact, target, ordinary)))

    def merge(self, other: TrainingWindows) -> None:
        """Add the windows of `other` after these."""
        for batch in other._parts:
            self._add(batch)

    @property
    def value(self) -> Samples:
        """The samples; raises `CalibrationError` if a window has no token to train on."""
        inputs, before, after, ordinary = (
            torch.cat(tensors).to(self._device) for tensors in zip(*self._parts, strict=True)
        )
        if not bool(ordinary[:, 1:].any(1).all()):
            raise CalibrationError(
                "a calibration window has no token to tune on, only its first one and attention sinks; use longer "
                "windows"
            )
        added = (after.float() - before.float()).square().sum(-1)
        # An idle block adds nothing to its inputs; the bound keeps the loss finite.
        smallest = _SMALLEST_SHARE * float(after.float().square().sum(-1)[ordinary].mean())
        energy = max(float(added[ordinary].mean()), smallest, torch.finfo(torch.float32).tiny)
        return Samples(inputs, after, ordinary, energy, self._call)

    @property
    def _missing(self) -> int:
        """Number of windows still to be collected."""
        return self._effort.windows - sum(batch[0].shape[0] for batch in self._parts)

    def _add(self, batch: tuple[Tensor, ...]) -> None:
        self._parts.append(tuple(tensor[: self._missing] for tensor in batch))
