"""No weight is rounded: for a coded KV cache, a system prompt or a quantized embedding alone.

Matrices of 32 bits are stored at 16, as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from subnibble.methods.method import Method, Steps
from subnibble.rounding.rtn import RTN


@dataclass(frozen=True)
class Options:
    """None."""


def build(options: Options) -> Steps:
    """Steps that leave every linear alone."""
    return Steps(rounder=RTN(), leaves_weights=True)


NONE = Method("none", "weights stay: KV cache, prefix, embedding alone", "-", Options, build)
