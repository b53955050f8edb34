"""What is learned of each block before it is rounded, and at what effort (BiSup, arXiv 2405.15346, reconstructed)."""

from __future__ import annotations

from dataclasses import dataclass

from subnibble.corrections.low_rank import LowRank
from subnibble.errors import BadRecipe

CLIPPINGS = ("group", "none")
INPUT_CLIPPINGS = ("site", "none")
SMOOTHINGS = ("soft", "hard", "none")
LOW_RANKS = ("merge", "side", "none")
LOW_RANK_STARTS = ("zero", "error")
LEARNED_ROTATIONS = ("values", "none")
_BRANCH_BITS = 8


@dataclass(frozen=True)
class Effort:
    """windows, tokens: how many calibration windows are trained on, and how many of each one's first tokens.

    first, second: epochs of clipping and smoothing alone, then of everything. batch: tokens of one step.
    """

    windows: int
    tokens: int
    first: int
    second: int
    batch: int


EFFORTS = {
    "fast": Effort(windows=64, tokens=512, first=0, second=2, batch=512),
    # What the paper's class of methods has (OmniQuant, DuQuant): 20 epochs on 128 windows of 2048 tokens.
    "default": Effort(windows=128, tokens=2048, first=10, second=10, batch=2048),
    "best": Effort(windows=256, tokens=2048, first=20, second=20, batch=2048),
}


@dataclass(frozen=True)
class Tuning:
    """Parameter spaces and effort.

    clipping: "group" learns the share of its range that each row keeps in each group, "none" leaves it.
    input_clipping: "site" learns the same of a site's quantized inputs, or "none".
    smoothing: "soft", "hard" (the same factors for inputs and weights) or "none".
    low_rank: "merge" learns a matrix of `rank` that is added to each weight before it is rounded, "side" a branch
        beside it; or "none".
    low_rank_start: "zero", or "error" for a branch that begins as what rounding leaves, as well as its rank can hold.
    low_rank_rate: AdamW's step of its factors.
    effort: a name in EFFORTS.
    penalty: λ of soft smoothing.
    anchor: μ of what smoothing costs away from its start.
    learned_rotation: "values" learns how values are turned within their heads (`rotation.py`), or "none".
    unsmoothed: roles of sites that keep their channels.
    """

    clipping: str = "group"
    input_clipping: str = "none"
    smoothing: str = "soft"
    low_rank: str = "merge"
    low_rank_start: str = "zero"
    low_rank_rate: float = 1e-3
    rank: int = 32
    effort: str = "default"
    penalty: float = 0.01
    anchor: float = 0.0
    learned_rotation: str = "none"
    unsmoothed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        chosen = (
            ("clipping", CLIPPINGS), ("input_clipping", INPUT_CLIPPINGS), ("smoothing", SMOOTHINGS),
            ("low_rank", LOW_RANKS), ("low_rank_start", LOW_RANK_STARTS), ("learned_rotation", LEARNED_ROTATIONS),
            ("effort", tuple(EFFORTS)),
        )  # fmt: skip
        for name, choices in chosen:
            if getattr(self, name) not in choices:
                raise BadRecipe(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        spaces = (self.clipping, self.input_clipping, self.smoothing, self.low_rank, self.learned_rotation)
        if set(spaces) == {"none"}:
            raise BadRecipe(
                "there is nothing to tune: clipping, input_clipping, smoothing, low_rank and learned_rotation are all "
                '"none"'
            )
        if self.low_rank_start == "error" and self.low_rank != "side":
            raise BadRecipe(
                f'low_rank_start is "error" and low_rank {self.low_rank!r}; a matrix that is merged begins at "zero"'
            )
        if self.rank < 1:
            raise BadRecipe(f"rank is {self.rank}; give a positive number")
        if not 0 < self.low_rank_rate < 1:
            raise BadRecipe(f"low_rank_rate is {self.low_rank_rate!r}; give a number between 0 and 1")
        for name in ("penalty", "anchor"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise BadRecipe(f"{name} is {getattr(self, name)!r}; give a number from 0 on")

    @property
    def branch(self) -> LowRank | None:
        """How branches are stored, None without: as those of other methods, of 8 bits."""
        return LowRank(self.rank, "svd", _BRANCH_BITS) if self.low_rank == "side" else None
