"""What goes from block to block while a checkpoint is quantized."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from subnibble.calibrate.prefix import PrefixStream
from subnibble.model.transformers_api.blocks import BlockCall


@dataclass
class Streams:
    """Hidden states of all windows between two blocks, batches of (windows, tokens, channels), and what goes with them.

    hidden: in the model as quantized so far. wanted: in the full-precision model, empty if no method asks. calls:
    what the model calls each block with. prefix: of a system prompt before the windows, or None.
    """

    hidden: list[Tensor]
    wanted: list[Tensor]
    calls: list[BlockCall]
    prefix: PrefixStream | None = None
