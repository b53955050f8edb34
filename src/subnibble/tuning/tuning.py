"""What is learned of each block before it is rounded, and at what effort (BiSup, arXiv 2405.15346, reconstructed)."""

from __future__ import annotations

from dataclasses import dataclass

from subnibble.errors import BadRecipe

CLIPPINGS = ("group", "none")
INPUT_CLIPPINGS = ("site", "none")
SMOOTHINGS = ("soft", "hard", "none")
LOW_RANKS = ("merge", "none")


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
    low_rank: "merge" learns a matrix of `rank` that is added to each weight before it is rounded, or "none".
    low_rank_rate: AdamW's step of its factors.
    effort: a name in EFFORTS.
    penalty: λ of soft smoothing.
    unsmoothed: roles of sites that keep their channels.
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
            raise BadRecipe(f"penalty is {self.penalty!r}; give a number from 0 on")
