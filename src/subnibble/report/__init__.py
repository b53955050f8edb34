"""The contents of `report.json`, which is written beside the packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self


@dataclass(frozen=True)
class LinearReport:
    """Report of one quantized linear. Errors compare the transformed weight W with its quantized values Q.

    path: module path.
    shape: (outputs, inputs) of the weight.
    scheme: name of the weight's scheme.
    effective_bits: stored bits per weight.
    weight_error: ||W - Q||² / ||W||².
    output_error: ||(W - Q) X||² / ||W X||² on the calibration inputs X of the rounder, None without them.
    nearest_error: output_error of round-to-nearest with min-max ranges, or None.
    seconds: time of rounding; linears that were rounded together all show their common time.
    notes: numbers from the rounder and the other steps, by name.
    basis_changed: whether the stored weight is in another basis than the original weight (rotated, or channels scaled),
        so that the two must not be compared.
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
    basis_changed: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read an entry of report.json."""
        return cls(**{**values, "shape": tuple(values["shape"])})


@dataclass(frozen=True)
class BlockReport:
    """Report of the tuning of one block.

    Losses are held-out losses: squared error of the block's output over the energy of what the full-precision block
    adds to the residual stream.

    path: module path of the block.
    before: loss before training, rounded to nearest on the method's grids.
    tuned: loss after training, rounded to nearest on the learned grids.
    after: loss after the final rounding, to nearest or with error compensation, on the learned grids.
    base: loss of the block rounded by the method without tuning; this block is stored if `base` is below `after`.
    epochs: number of epochs trained.
    rollbacks: how often training went back to its best state, because steps or losses were not finite.
    left_out: number of steps left out, because their loss or gradient was not finite.
    compensated: names of linears that were rounded with error compensation; the others were rounded to nearest.
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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read an entry of report.json."""
        return cls(**{**values, "compensated": tuple(values["compensated"])})


@dataclass(frozen=True)
class DistillReport:
    """Report of the distillation of the original model into the packed model.

    before, after: mean KL divergence of the packed model's predictions from the original's on held-out windows, in nats
        per token.
    steps: number of training steps.
    rollbacks: how often training went back to its best state, with a lower learning rate.
    """

    before: float
    after: float
    steps: int
    rollbacks: int


@dataclass(frozen=True)
class SampledReport:
    """Report of calibration windows that the model wrote.

    backend: what ran the model, "native" or "torch".
    reason: why.
    windows: number of windows.
    length: tokens of a window.
    """

    backend: str
    reason: str
    windows: int
    length: int

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Report:
    """Report of a whole quantization.

    model: path of the original model.
    method: name of the method.
    version: release of subnibble.
    linears: quantized linears; their errors are those before distillation.
    size: bits and bytes of the checkpoint, see `checkpoint/size.py`.
    calibration_tokens: number of calibration tokens, 0 without calibration.
    prefix_tokens: number of tokens of the system prompt, 0 if there is none.
    seconds: seconds by step, and their "total".
    peak_memory: peak memory of the process in bytes.
    weights_sha256: SHA-256 over all weight files.
    blocks: tuned blocks; empty if the method does not tune.
    distilled: report of the distillation, or None.
    sampled: report of calibration windows that the model wrote, or None.
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
    sampled: SampledReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read the content of report.json; keys that later commands added, such as `distilled_later`, are left out."""
        names = {item.name for item in fields(cls)}
        distilled, sampled = values["distilled"], values["sampled"]
        parts = {
            "linears": tuple(LinearReport.from_dict(entry) for entry in values["linears"]),
            "blocks": tuple(BlockReport.from_dict(entry) for entry in values["blocks"]),
            "distilled": None if distilled is None else DistillReport(**distilled),
            "sampled": None if sampled is None else SampledReport(**sampled),
        }
        return cls(**{name: value for name, value in {**values, **parts}.items() if name in names})
