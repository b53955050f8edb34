"""What goes from block to block while a checkpoint is quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from subnibble.calibrate.prefix import PrefixStream


@dataclass
class Streams:
    """Hidden states of all windows between two blocks, batches of (windows, tokens, channels), and what goes with them.

    hidden: in the model as quantized so far. wanted: in the full-precision model, empty if no method asks. arguments:
    what the model passes to each block beside them. prefix: of a system prompt before the windows, or None.
    """

    hidden: list[Tensor]
    wanted: list[Tensor]
    arguments: list[dict[str, Any]]
    prefix: PrefixStream | None = None
