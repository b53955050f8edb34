"""Block tuning settings: what is learned before rounding, at what effort (BiSup, arXiv 2405.15346, reconstructed)."""

from __future__ import annotations

from dataclasses import dataclass

from subnibble.errors import BadRecipe

CLIPPINGS = ("group", "none")
INPUT_CLIPPINGS = ("site", "none")
SMOOTHINGS = ("soft", "hard", "none")
LOW_RANKS = ("merge", "none")


@dataclass(frozen=True)
class Effort:
    """How much data and how many epochs block tuning uses.

    windows: number of calibration windows.
    tokens: number of first tokens used of each window.
    first: epochs of stage 1 (clipping and smoothing alone).
    second: epochs of stage 2 (everything).
    batch: tokens per step.
    """

    windows: int
    tokens: int
    first: int
    second: int
    batch: int


EFFORTS = {
    "fast": Effort(windows=64, tokens=512, first=0, second=2, batch=512),
    # As in comparable methods (OmniQuant, DuQuant): 20 epochs on 128 windows of 2048 tokens.
    "default": Effort(windows=128, tokens=2048, first=10, second=10, batch=2048),
    "best": Effort(windows=256, tokens=2048, first=20, second=20, batch=2048),
}


@dataclass(frozen=True)
class Tuning:
    """Parameter spaces of block tuning, and its effort.

    clipping: "group" learns the share of the weight range that is kept, per row and group; "none" does not.
    input_clipping: "site" learns the share of the input range that is kept, per site; "none" does not.
    smoothing: "soft" (weight factors may differ from input factors), "hard" (the same factors) or "none".
    low_rank: "merge" learns a matrix of rank `rank` that is added to each weight before rounding, or "none".
    low_rank_rate: AdamW learning rate of the low-rank matrix's factors.
    rank: rank of the low-rank matrix.
    effort: how much data and how many epochs, a name in EFFORTS.
    penalty: λ, how strongly soft smoothing holds weight and input factors together.
    unsmoothed: roles of sites that are not smoothed.
    """

    clipping: str = "group"
    input_clipping: str = "none"
    smoothing: str = "soft"
    low_rank: str = "merge"
    low_rank_rate: float = 1e-3
    rank: int = 32
    effort: str = "default"
    penalty: float = 0.01
    unsmoothed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        chosen = (
            ("clipping", CLIPPINGS), ("input_clipping", INPUT_CLIPPINGS), ("smoothing", SMOOTHINGS),
            ("low_rank", LOW_RANKS), ("effort", tuple(EFFORTS)),
        )  # fmt: skip
        for name, choices in chosen:
            if getattr(self, name) not in choices:
                raise BadRecipe(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if {self.clipping, self.input_clipping, self.smoothing, self.low_rank} == {"none"}:
            raise BadRecipe('there is nothing to tune: clipping, input_clipping, smoothing and low_rank are all "none"')
        if self.rank < 1:
            raise BadRecipe(f"rank is {self.rank}; give a positive number")
        if not 0 < self.low_rank_rate < 1:
            raise BadRecipe(f"low_rank_rate is {self.low_rank_rate!r}; give a number between 0 and 1")
        if not 0 <= self.penalty < float("inf"):
            raise BadRecipe(f"penalty is {self.penalty!r}; give a finite number, 0 or larger")
