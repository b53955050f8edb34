"""What is learned of each block before it is rounded, and at what effort (BiSup, arXiv 2405.15346, reconstructed)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from subnibble.errors import BadRecipe
from subnibble.scheme import Scheme

CLIPPINGS = ("group", "none")
SMOOTHINGS = ("soft", "hard", "none")
LOW_RANKS = ("merge", "side", "none")
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
    "fast": Effort(windows=64, tokens=512, first=0, second=3, batch=512),
    # What the paper's class of methods has (OmniQuant, DuQuant): 20 epochs on 128 windows of 2048 tokens.
    "default": Effort(windows=128, tokens=2048, first=10, second=10, batch=2048),
    "best": Effort(windows=256, tokens=2048, first=20, second=20, batch=2048),
}


@dataclass(frozen=True)
class Tuning:
    """Parameter spaces and effort.

    clipping: "group" learns the share of its range that each row keeps in each group, "none" leaves it. smoothing:
    "soft", "hard" (the same factors for inputs and weights) or "none". low_rank: "merge" learns a matrix of `rank` that
    is added to each weight before it is rounded, "side" a branch beside it. effort: a name in EFFORTS. penalty: λ of
    soft smoothing. unsmoothed: sites that keep their channels.
    """

    clipping: str = "group"
    smoothing: str = "soft"
    low_rank: str = "merge"
    rank: int = 32
    effort: str = "default"
    penalty: float = 0.01
    unsmoothed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        chosen = (
            ("clipping", CLIPPINGS), ("smoothing", SMOOTHINGS), ("low_rank", LOW_RANKS), ("effort", tuple(EFFORTS))
        )  # fmt: skip
        for name, choices in chosen:
            if getattr(self, name) not in choices:
                raise BadRecipe(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if self.clipping == self.smoothing == self.low_rank == "none":
            raise BadRecipe('there is nothing to tune: clipping, smoothing and low_rank are all "none"')
        if self.rank < 1:
            raise BadRecipe(f"rank is {self.rank}; give a positive number")
        if not 0 <= self.penalty < float("inf"):
            raise BadRecipe(f"penalty is {self.penalty!r}; give a number from 0 on")

    def branch_scheme(self, scheme: Scheme) -> Scheme:
        """How factors of a branch are coded, beside a weight of `scheme`."""
        return replace(scheme, bits=_BRANCH_BITS)

    def branch_bits(self, rows: int, columns: int, scheme: Scheme) -> int:
        """Stored bits of the branch beside a weight (rows, columns) of `scheme`; 0 without branches."""
        if self.low_rank != "side":
            return 0
        own, rank = self.branch_scheme(scheme), min(self.rank, rows, columns)
        return rank * own.row_bits(columns) + rows * own.row_bits(rank)
