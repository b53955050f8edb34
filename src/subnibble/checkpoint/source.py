"""`Source`, the interface to a checkpoint on disk: it reads tensors one at a time, by their Hugging Face names.

Pickle files (`.bin`, `.pt`) and code that comes with a checkpoint are never loaded.
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
    """A checkpoint to read, with tensors under the names that the model gives them.

    path: the folder or file.
    config: the model's transformers config.
    described_by: where the config comes from, for errors: "config.json" or the file's metadata.
    renamed: whether names in the file differ from the model's, so that transformers would not find the tensors.
    """

    path: Path
    config: Any
    described_by: str
    renamed: bool

    def names(self) -> list[str]:
        """Return the names of all stored tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the header alone."""

    def stored_bits(self, name: str) -> int:
        """Return the bits that the tensor takes in its file."""

    def check_type(self, name: str) -> None:
        """Raise `CheckpointError` unless the tensor is stored in a type that `load` reads; from the header alone."""

    def load(self, name: str) -> Tensor:
        """Read one tensor, in a floating-point type; `CheckpointError` if it is damaged."""

    def file_bytes(self) -> int:
        """Return the size of all weight files together, in bytes."""

    def files(self) -> list[Path]:
        """Return all files that the model may be read from, tokenizer and config included."""

    def load_tokenizer(self) -> Any:
        """Load the transformers tokenizer that comes with the checkpoint."""

    def copy_side_files(self, folder: Path) -> None:
        """Write tokenizer and generation config into `folder`, if the source has them."""


def checked(tensor: Tensor, name: str, path: Path) -> Tensor:
    """Return the tensor unchanged; raise `CheckpointError` unless it is floating point and finite.

    name, path: the tensor and its checkpoint, for errors.
    """
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"{path}: {name} has type {tensor.dtype}, and subnibble quantizes only float checkpoints; "
            "give the original model, not one that is quantized already"
        )
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(f"{path}: {name} has {bad} NaN or infinite values; get an intact copy of the model")
    return tensor


def numel(shape: tuple[int, ...]) -> int:
    """Return the number of elements of a shape."""
    return int(torch.Size(shape).numel())


def expect_shapes(source: Source, expected: Iterator[tuple[str, tuple[int, ...]]]) -> None:
    """Check, before any weight is read, that a packed checkpoint has all tensors that its config describes.

    expected: (name, shape) of each tensor.
    Raises `CheckpointError` for a tensor that is missing or has another shape.
    """
    stored = set(source.names())
    for name, shape in expected:
        if name not in stored:
            raise CheckpointError(
                f"{source.path}: tensor {name} is missing, though config.json asks for it; config and weights do not "
                "belong together: fetch the checkpoint again, or quantize the model again"
            )
        if source.shape(name) != shape:
            raise CheckpointError(
                f"{source.path}: {name} has shape {source.shape(name)} where config.json asks for {shape}; "
                "config and weights do not belong together: fetch the checkpoint again, or quantize the model again"
            )
