"""Groups: consecutive columns, channels or tokens that share a scale."""

from __future__ import annotations

from typing import Any

from subnibble.errors import BadRecipe

# As a group size: one group for the whole row, token or head.
WHOLE_CHANNEL = -1


def group_bounds(group_size: int, columns: int) -> list[tuple[int, int]]:
    """First and stop column of every group of `columns` columns; the last may be shorter. -1 is one group."""
    width = columns if group_size == WHOLE_CHANNEL else group_size
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]


def group_name(group_size: int, whole: str) -> str:
    """Short name of a group size for tables, for example `g128`; `whole` if it is -1."""
    return whole if group_size == WHOLE_CHANNEL else f"g{group_size}"


def check_group_size(size: Any, name: str, unit: str) -> None:
    """Raise `BadRecipe` unless `size` is a positive whole number, or -1.

    name: names the setting in the error, for example "the cache's group_size".
    unit: what one group covers if the size is -1, for example "token".
    """
    if type(size) is not int or (size != WHOLE_CHANNEL and size < 1):
        raise BadRecipe(f"{name} is {size!r}; give a positive whole number, or -1 for the whole {unit}")
