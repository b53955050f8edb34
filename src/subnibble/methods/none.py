"""Round no weight of a linear; quantize only the KV cache or the embedding, or add only a system prompt.

32-bit matrices are stored in 16 bits, as with every method.
"""

from __future__ import annotations

from dataclasses import dataclass

from subnibble.methods.method import Method, Steps
from subnibble.rounding.rtn import RTN


@dataclass(frozen=True)
class Options:
    """No options."""


def build(options: Options) -> Steps:
    """Compose steps that round no linear."""
    return Steps(rounder=RTN(), rounds_no_weights=True)


NONE = Method("none", "weights not rounded; for a KV cache, prompt or embedding alone", "-", Options, build)
