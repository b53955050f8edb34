"""How a linear's input is quantized while it runs: bit width, groups, grid, zero-point, clip, outliers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from subnibble.errors import BadRecipe
from subnibble.tensor.scheme import (
    E8M0,
    MX_GROUP,
    SCALE_BITS,
    WHOLE_CHANNEL,
    check_clip,
    check_group_size,
    group_bounds,
    known_fields,
)

ACTIVATION_BITS = (3, 4, 8)
# Dynamic scales are rounded to bfloat16, whose range no activation leaves.
_DYNAMIC_SCALE_BITS = 16


@dataclass(frozen=True)
class ActivationScheme:
    """How a linear's input is quantized while it runs: dynamically, each token by itself.

    bits: 8, 4 or 3. group_size: consecutive channels that share a scale; -1 is the whole token. A width that it does
    not divide ends in a shorter group. grid: "uniform", or "mxfp4" (4 bits, groups of 32, symmetric; the scale is
    2^(floor(log2 max|x|) - 2), and what is beyond the largest level saturates, as OCP Microscaling 1.0 has it).
    zero_point: of a uniform grid. "none": levels -(2^(b-1) - 1) .. 2^(b-1) - 1, scale max|x| / (2^(b-1) - 1);
    "integer": 2^b levels from min(x, 0) to max(x, 0). clip: the share of that range that is kept. outliers: of so many
    last channels the code has 8 bits, symmetric, unclipped, with one scale (Atom's). Uniform scales are rounded to
    bfloat16.
    """

    bits: int
    group_size: int = WHOLE_CHANNEL
    zero_point: str = "integer"
    grid: str = "uniform"
    clip: float = 1.0
    outliers: int = 0

    def __post_init__(self) -> None:
        if type(self.outliers) is not int or self.outliers < 0 or (self.outliers and self.grid != "uniform"):
            raise BadRecipe(
                f"the activations' outliers are {self.outliers!r} on a grid {self.grid!r}; give a number of channels, "
                "on a uniform grid"
            )
        if type(self.bits) is not int or self.bits not in ACTIVATION_BITS:
            known = ", ".join(map(str, ACTIVATION_BITS))
            raise BadRecipe(
                f"activation bits are {self.bits!r}; choose one of {known}, or 16 to leave inputs as they are"
            )
        check_group_size(self.group_size, "activations'", "token")
        if self.grid not in ("uniform", "mxfp4"):
            raise BadRecipe(f"the activations' grid is {self.grid!r}; choose uniform or mxfp4")
        if self.zero_point not in ("none", "integer"):
            raise BadRecipe(f"the activations' zero_point is {self.zero_point!r}; choose none or integer")
        check_clip(self.clip, "activations'")
        found = (self.bits, self.group_size, self.zero_point, self.clip)
        if self.grid == "mxfp4" and found != (4, MX_GROUP, "none", 1):
            raise BadRecipe(
                f"mxfp4 activations have 4 bits, groups of {MX_GROUP}, no zero-point and no clip; found {self.bits} "
                f"bits, groups of {self.group_size}, zero_point {self.zero_point!r}, clip {self.clip:g}"
            )

    @property
    def name(self) -> str:
        """Short name for tables, for example `a4g128`."""
        group = "token" if self.group_size == WHOLE_CHANNEL else f"g{self.group_size}"
        if self.grid == "mxfp4":
            return f"amxfp4{group}"
        clip = "" if self.clip == 1 else f"-clip{self.clip!r}"
        outliers = f"-o{self.outliers}" if self.outliers else ""
        return f"a{self.bits}{group}{'-sym' if self.zero_point == 'none' else ''}{clip}{outliers}"

    @property
    def of_outliers(self) -> ActivationScheme:
        """How the outliers are coded, as if they were a token of their own."""
        return ActivationScheme(8, WHOLE_CHANNEL, "none")

    @property
    def without_outliers(self) -> ActivationScheme:
        """That of the channels before the outliers, and of what lies between low-rank factors, where there are none."""
        return replace(self, outliers=0)

    def group_bounds(self, channels: int) -> list[tuple[int, int]]:
        """First and stop channel of every group of a token of `channels`; the outliers are one, the last.

        The group before them, or the last if there are none, may be shorter.
        """
        bounds = group_bounds(self.group_size, channels - self.outliers)
        return [*bounds, (channels - self.outliers, channels)] if self.outliers else bounds

    def token_bits(self, channels: int) -> int:
        """All bits of a token of `channels`: codes, scales, zero-points."""
        if self.outliers:
            usual = self.without_outliers.token_bits(channels - self.outliers)
            return usual + self.of_outliers.token_bits(self.outliers)
        groups = len(self.group_bounds(channels))
        if self.grid == "mxfp4":
            return self.bits * channels + SCALE_BITS[E8M0] * groups
        zero = self.bits if self.zero_point == "integer" else 0
        return self.bits * channels + groups * (_DYNAMIC_SCALE_BITS + zero)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, the inverse of `from_dict`; without outliers if there are none."""
        return {key: value for key, value in asdict(self).items() if key != "outliers" or value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a dictionary; an unknown key is an error."""
        return cls(**known_fields(cls, values, "unknown activation scheme key {}"))
