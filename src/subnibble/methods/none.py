"""No weight is rounded: for a quantized KV cache, a system prompt or a quantized embedding alone.

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


NONE = Method("none", "round no weight: for the KV cache, prompt or embedding alone", "-", Options, build)
