"""How one range of a weight's input columns is quantized: grid, bit width, groups, zero-point, scale type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from subnibble.errors import BadRecipe
from subnibble.tensor.groups import check_group_size, group_bounds, group_name
from subnibble.tensor.scheme_checks import check_choice, known_fields

BITS = (2, 3, 4, 8)
GRIDS = ("uniform", "sign", "mxfp4")
ZERO_POINTS = ("none", "integer", "real")
# A sign-basis grid stores one scale per bit, and rounding searches all its levels for each weight.
_LARGEST_SIGN_BITS = 4
SCALE_TYPES = {"float16": 16, "bfloat16": 16, "float32": 32}
# A power of two, stored as a biased exponent.
E8M0 = "e8m0"
SCALE_BITS = {**SCALE_TYPES, E8M0: 8}
# Group size of the OCP Microscaling specification 1.0.
MX_GROUP = 32


@dataclass(frozen=True)
class Scheme:
    """How weights are quantized: each row and group has a grid of `2**bits` levels, and a code selects one level.

    bits: width of a code: 2, 3, 4 or 8.
    group_size: consecutive input columns that share a scale; -1 for the whole row. If it does not divide the width, the
        last group is shorter.
    zero_point: of a uniform grid; other grids have "none". "none" puts code `2**(bits-1)` at 0, "integer" stores an
        integer of `bits` bits per group, "real" stores a number of `scale_type` per group.
    scale_type: how scales and real zero-points are stored: a float type, or "e8m0" (a biased exponent) on an mxfp4
        grid, and only there.
    grid: "uniform": `w = scale * (code - zero)` with one scale per group. "sign": `w = sum_k scale_k * (+1 if bit k of
        the code is set else -1)` with one scale per bit: symmetric about 0, no level at 0, not evenly spaced. "mxfp4":
        `w = scale * E2M1(code)` in groups of 32, with scales that are powers of two (OCP Microscaling 1.0).
    """

    bits: int
    group_size: int = 128
    zero_point: str = "integer"
    scale_type: str = "float16"
    grid: str = "uniform"

    def __post_init__(self) -> None:
        check_choice(self.bits, BITS, "bits is")
        check_group_size(self.group_size, "group_size", "row")
        check_choice(self.zero_point, ZERO_POINTS, "zero_point is")
        if (self.grid, self.scale_type) != ("mxfp4", E8M0):
            check_choice(self.scale_type, tuple(SCALE_TYPES), "scale_type is")
        check_choice(self.grid, GRIDS, "grid is")
        if self.grid == "sign" and (self.bits > _LARGEST_SIGN_BITS or self.zero_point != "none"):
            raise BadRecipe(
                f"a sign grid has at most {_LARGEST_SIGN_BITS} bits and no zero-point; found {self.bits} bits and "
                f"zero_point {self.zero_point!r}: use 2, 3 or 4 bits, or a uniform grid"
            )
        settings = (self.bits, self.group_size, self.zero_point, self.scale_type)
        if self.grid == "mxfp4" and settings != (4, MX_GROUP, "none", E8M0):
            raise BadRecipe(
                f"an mxfp4 grid has 4 bits, groups of {MX_GROUP}, no zero-point and e8m0 scales; found {self.bits} "
                f"bits, groups of {self.group_size}, zero_point {self.zero_point!r}, {self.scale_type} scales; "
                "set bits = 4, group_size = 32"
            )

    @property
    def scales_per_group(self) -> int:
        """Number of scales that a row stores for each group."""
        return self.bits if self.grid == "sign" else 1

    @property
    def levels(self) -> int:
        """Number of levels, and of codes."""
        return int(2**self.bits)

    @property
    def has_zero(self) -> bool:
        """Whether 0 is a level of every grid."""
        return self.grid != "sign" and self.zero_point != "real"

    @property
    def name(self) -> str:
        """Short name for tables, for example `w3g128`."""
        group = group_name(self.group_size, "channel")
        zero = {"none": "-sym", "integer": "", "real": "-real"}[self.zero_point]
        kind = "-sign" if self.grid == "sign" else zero
        if self.grid == "mxfp4":
            return f"mxfp4g{self.group_size}"
        scale = "" if self.scale_type == "float16" else f"-{self.scale_type}"
        return f"w{self.bits}{group}{kind}{scale}"

    def group_bounds(self, columns: int) -> list[tuple[int, int]]:
        """First and stop column of every group in a row of `columns` columns; the last group may be shorter."""
        return group_bounds(self.group_size, columns)

    def groups(self, columns: int) -> int:
        """Number of groups in a row of `columns` columns."""
        return len(self.group_bounds(columns))

    def check_width(self, columns: int, where: str) -> None:
        """Raise `BadRecipe` if a group is larger than a row of `columns` columns. where: path for the error."""
        if self.group_size > columns:
            raise BadRecipe(
                f"group {self.group_size} is larger than the {columns} inputs of {where}; "
                f"use a group size of at most {columns}, or -1 for the whole row"
            )

    def row_bytes(self, columns: int) -> int:
        """Bytes of the packed codes of one row."""
        return (columns * self.bits + 7) // 8

    def row_bits(self, columns: int) -> int:
        """Number of bits stored for one row: codes with padding, scales and zero-points."""
        groups = self.groups(columns)
        scale = SCALE_BITS[self.scale_type]
        zeros = {"none": 0, "integer": 8 * self.row_bytes(groups), "real": groups * scale}[self.zero_point]
        return 8 * self.row_bytes(columns) + groups * self.scales_per_group * scale + zeros

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a dictionary; an unknown key is an error."""
        return cls(**known_fields(cls, values, "unknown scheme key {}"))
