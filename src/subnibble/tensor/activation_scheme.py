"""How a linear's input is quantized at run time: bit width, groups, grid, zero-point, clip, outliers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from subnibble.errors import BadRecipe
from subnibble.tensor.groups import WHOLE_CHANNEL, check_group_size, group_bounds, group_name
from subnibble.tensor.scheme import E8M0, MX_GROUP, SCALE_BITS
from subnibble.tensor.scheme_checks import check_choice, check_clip, known_fields

ACTIVATION_BITS = (3, 4, 8)
_GRIDS = ("uniform", "mxfp4")
_ZERO_POINTS = ("none", "integer")
# Dynamic scales are rounded to bfloat16; no activation exceeds its range.
_DYNAMIC_SCALE_BITS = 16


@dataclass(frozen=True)
class ActivationScheme:
    """How a linear's input is quantized at run time: dynamically, each token separately.

    bits: 8, 4 or 3.
    group_size: consecutive channels that share a scale; -1 for the whole token. If it does not divide the width, the
        last group is shorter.
    zero_point: of a uniform grid. "none": levels -(2^(b-1) - 1) .. 2^(b-1) - 1, scale max|x| / (2^(b-1) - 1);
        "integer": 2^b levels from min(x, 0) to max(x, 0).
    grid: "uniform", or "mxfp4": 4 bits, groups of 32, symmetric, scale 2^(floor(log2 max|x|) - 2); values beyond the
        largest level saturate (OCP Microscaling 1.0).
    clip: the share of the range of a uniform grid that is kept.
    outliers: number of last channels that are quantized to 8 bits, symmetric, unclipped, with one scale (as in Atom).

    Scales of a uniform grid are rounded to bfloat16.
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
                f"the activations have outliers = {self.outliers!r} on grid {self.grid!r}; give a number of channels, "
                "0 for none, and use outliers only on a uniform grid"
            )
        check_choice(self.bits, ACTIVATION_BITS, "activation bits are", ", or 16 to keep inputs unquantized")
        check_group_size(self.group_size, "the activations' group_size", "token")
        check_choice(self.grid, _GRIDS, "the activations' grid is")
        check_choice(self.zero_point, _ZERO_POINTS, "the activations' zero_point is")
        check_clip(self.clip, "the activations' clip")
        settings = (self.bits, self.group_size, self.zero_point, self.clip)
        if self.grid == "mxfp4" and settings != (4, MX_GROUP, "none", 1):
            raise BadRecipe(
                f"mxfp4 activations have 4 bits, groups of {MX_GROUP}, no zero-point and no clip; found {self.bits} "
                f"bits, groups of {self.group_size}, zero_point {self.zero_point!r}, clip {self.clip:g}"
            )

    @property
    def name(self) -> str:
        """Short name for tables, for example `a4g128`."""
        group = group_name(self.group_size, "token")
        if self.grid == "mxfp4":
            return f"amxfp4{group}"
        clip = "" if self.clip == 1 else f"-clip{self.clip!r}"
        outliers = f"-o{self.outliers}" if self.outliers else ""
        return f"a{self.bits}{group}{'-sym' if self.zero_point == 'none' else ''}{clip}{outliers}"

    @property
    def of_outliers(self) -> ActivationScheme:
        """The scheme of the outlier channels, as if they were a separate token."""
        return ActivationScheme(8, WHOLE_CHANNEL, "none")

    @property
    def without_outliers(self) -> ActivationScheme:
        """The scheme of the other channels, and of activations between low-rank factors, which have no outliers."""
        return replace(self, outliers=0)

    def group_bounds(self, channels: int) -> list[tuple[int, int]]:
        """First and stop channel of every group in a token of `channels` channels.

        Outliers form the last group. The last group without outliers may be shorter than `group_size`.
        """
        bounds = group_bounds(self.group_size, channels - self.outliers)
        return [*bounds, (channels - self.outliers, channels)] if self.outliers else bounds

    def token_bits(self, channels: int) -> int:
        """All bits of a token of `channels` channels: codes, scales, zero-points."""
        if self.outliers:
            inliers = self.without_outliers.token_bits(channels - self.outliers)
            return inliers + self.of_outliers.token_bits(self.outliers)
        groups = len(self.group_bounds(channels))
        if self.grid == "mxfp4":
            return self.bits * channels + SCALE_BITS[E8M0] * groups
        zero = self.bits if self.zero_point == "integer" else 0
        return self.bits * channels + groups * (_DYNAMIC_SCALE_BITS + zero)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, the inverse of `from_dict`; omits `outliers` if there are none."""
        return {key: value for key, value in asdict(self).items() if key != "outliers" or value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a dictionary; an unknown key is an error."""
        return cls(**known_fields(cls, values, "unknown activation scheme key {}"))
