"""A checkpoint to read from: tensors by their Hugging Face name, one at a time, from whatever file holds them.

Never loaded: pickle files (`.bin`, `.pt`) and code that comes with a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from subnibble.errors import CheckpointError


class Source(Protocol):
    """Where weights come from. `path` is the folder or file, `config` the model's transformers config."""

    path: Path
    config: Any

    def names(self) -> list[str]:
        """Names of all stored tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""

    def stored_bits(self, name: str) -> int:
        """Bits that the tensor takes in its file."""

    def load(self, name: str) -> Tensor:
        """Read one tensor, in a floating-point type; `CheckpointError` if it is damaged."""

    def file_bytes(self) -> int:
        """Size of all weight files together."""

    def load_tokenizer(self) -> Any:
        """The tokenizer that comes with the checkpoint."""

    def copy_side_files(self, folder: Path) -> None:
        """Put tokenizer and generation config into `folder`, as far as the source has them."""


def checked(tensor: Tensor, name: str, path: Path) -> Tensor:
    """The tensor, if it is floating point and finite; `CheckpointError` otherwise."""
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"{path}: {name} has type {tensor.dtype}; subnibble quantizes float checkpoints, "
            "so give it the original model, not one that is quantized already"
        )
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(f"{path}: {name} has {bad} NaN or infinite values; get an intact copy of the model")
    return tensor


def numel(shape: tuple[int, ...]) -> int:
    """Number of elements of a shape."""
    return int(torch.Size(shape).numel())


def expect_shapes(source: Source, expected: Iterator[tuple[str, tuple[int, ...]]]) -> None:
    """Check before any weight is read that every tensor a model needs is there in the right shape."""
    there = set(source.names())
    for name, shape in expected:
        if name not in there:
            raise CheckpointError(
                f"{source.path}: tensor {name} is missing, though config.json asks for it; "
                "the download may be incomplete: fetch the model again"
            )
        if source.shape(name) != shape:
            raise CheckpointError(
                f"{source.path}: {name} has shape {source.shape(name)} where config.json asks for {shape}; "
                "config and weights do not belong together"
            )
