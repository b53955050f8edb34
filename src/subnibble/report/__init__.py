"""What a quantization says of itself: `report.json` beside the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LinearReport:
    """One quantized linear.

    weight_error: ||W - Q||² / ||W||². output_error: ||(W - Q) X||² / ||W X||² on the inputs X that it was quantized
    for, None if none were gathered. nearest_error: the same had it been rounded to nearest between its extremes.
    notes: what the rounder had to say. seconds: to round, shared by linears that were rounded together. moved: the
    stored weight is in another basis than the original's (rotated, or channels scaled), so that the two must not be
    compared; errors are of the weight as transformed.
    """

    path: str
    shape: tuple[int, int]
    scheme: str
    effective_bits: float
    weight_error: float
    output_error: float | None
    nearest_error: float | None
    seconds: float
    notes: dict[str, float] = field(default_factory=dict)
    moved: bool = False


@dataclass(frozen=True)
class BlockReport:
    """The tuning of one block. Losses are on held-out windows: the squared error of its output over the energy of what
    the full-precision block adds. before: on the method's own grids, to nearest; tuned: on the learned ones, to
    nearest; after: on the learned ones, rounded as the method does; base: of the method's own block without tuning,
    which is stored where its loss is below `after`. rollbacks: to the best state, from what was not finite. left_out:
    steps that were not.
    compensated: linears whose rounding with error compensation was kept, the others were rounded to nearest.
    """

    path: str
    before: float
    tuned: float
    after: float
    base: float
    epochs: int
    rollbacks: int
    left_out: int
    compensated: tuple[str, ...]

    @property
    def keeps_base(self) -> bool:
        """Whether the block is stored without tuning."""
        return self.base < self.after


@dataclass(frozen=True)
class DistillReport:
    """The tuning of the whole packed model. before, after: mean KL of its predictions from the original's on held-out
    windows, in nats a token. rollbacks: how often training went back to the best state, at a lower rate.
    """

    before: float
    after: float
    steps: int
    rollbacks: int


@dataclass(frozen=True)
class Report:
    """A whole quantization. seconds: by step, and "total". peak_memory: bytes, of the process.

    calibration_tokens: how many tokens the statistics were gathered on, 0 if none. prefix_tokens: of the system prompt.
    blocks: of methods that tune. distilled: None where nothing was; errors of linears are those before it.
    """

    model: str
    method: str
    version: str
    linears: tuple[LinearReport, ...]
    size: dict[str, float]
    calibration_tokens: int
    prefix_tokens: int
    seconds: dict[str, float]
    peak_memory: int
    weights_sha256: str
    blocks: tuple[BlockReport, ...] = ()
    distilled: DistillReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return asdict(self)
