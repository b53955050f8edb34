"""Instruction sets whose kernels have run on some processor, so that they may be chosen by default."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path

TABLE = Path(__file__).parent / "verified.toml"


@cache
def names() -> frozenset[str]:
    """Names of the instruction sets in verified.toml."""
    with TABLE.open("rb") as file:
        return frozenset(row["instruction_set"] for row in tomllib.load(file)["verified"])
