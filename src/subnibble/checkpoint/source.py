"""A checkpoint to read from: tensors by their Hugging Face name, one at a time, from whatever file holds them.

Never loaded: pickle files (`.bin`, `.pt`) and code that comes with a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from subnibble.errors import CheckpointError


@runtime_checkable
class Source(Protocol):
    """Where weights come from, under the names that the model has for them.

    path: the folder or file. config: the model's transformers config. described_by: what that was read from. renamed:
    whether the file has other names, so that transformers would not find the tensors.
    """

    path: Path
    config: Any
    described_by: str
    renamed: bool

    def names(self) -> list[str]:
        """Names of all stored tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""

    def stored_bits(self, name: str) -> int:
        """Bits that the tensor takes in its file."""

    def check_type(self, name: str) -> None:
        """Raise `CheckpointError` unless the tensor is stored in a type that `load` reads; from the header alone."""

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
    """Check before any weight is read that a packed checkpoint has all tensors that its config describes."""
    there = set(source.names())
    for name, shape in expected:
        if name not in there:
            raise CheckpointError(
                f"{source.path}: tensor {name} is missing, though config.json asks for it; config and weights do not "
                "belong together: fetch the checkpoint again, or quantize the model again"
            )
        if source.shape(name) != shape:
            raise CheckpointError(
                f"{source.path}: {name} has shape {source.shape(name)} where config.json asks for {shape}; "
                "config and weights do not belong together"
            )
