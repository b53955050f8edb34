"""Tensors in one file, written and read one by one, so that writing needs no second copy of them in memory.

The file holds the tensors' bytes one after the other, in the machine's byte order. Types and shapes are in the journal.
safetensors is not used here because its writer first copies all tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subnibble.resume.durable import write_file


@dataclass(frozen=True)
class TensorFile:
    """Description of a file of tensors.

    name: file name.
    sha256: SHA-256 of the file, 64 hexadecimal digits.
    tensors: (dtype without "torch.", shape) of each tensor.
    """

    name: str
    sha256: str
    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return {"name": self.name, "sha256": self.sha256, "tensors": [[t, list(shape)] for t, shape in self.tensors]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TensorFile:
        """Read what `to_json` returned. Raises `KeyError`, `TypeError` or `ValueError` for anything else."""
        tensors = tuple((str(dtype), tuple(int(n) for n in shape)) for dtype, shape in values["tensors"])
        return cls(str(values["name"]), str(values["sha256"]), tensors)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return sum(torch.Size(shape).numel() * _dtype(name).itemsize for name, shape in self.tensors)


def write_tensors(folder: Path, name: str, tensors: Sequence[Tensor]) -> TensorFile:
    """Write tensors to folder/name, completely or not at all."""

    def chunks() -> Iterator[memoryview]:
        for tensor in tensors:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            yield _bytes_of(flat)

    digest = write_file(folder / name, chunks())
    described = tuple((str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for tensor in tensors)
    return TensorFile(name, digest, described)


def read_tensors(folder: Path, file: TensorFile) -> list[Tensor]:
    """Read the tensors of a file, on the CPU. Raises `ValueError` if it is not the file that was written, or `OSError`.

    The error's message says what differs, without the path.
    """
    path, digest = folder / file.name, hashlib.sha256()
    if (size := path.stat().st_size) != file.num_bytes:
        raise ValueError(f"it has {size} bytes and {file.num_bytes} were written")
    tensors = []
    with path.open("rb") as handle:
        for dtype, shape in file.tensors:
            tensor = torch.empty(shape, dtype=_dtype(dtype))
            buffer = _bytes_of(tensor.reshape(-1))
            handle.readinto(buffer)
            digest.update(buffer)
            tensors.append(tensor)
    if digest.hexdigest() != file.sha256:
        raise ValueError("its SHA-256 is not that of the file that was written")
    return tensors


def _bytes_of(flat: Tensor) -> memoryview:
    """The memory of a tensor of one dimension, not copied."""
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no type of tensors")
    return dtype
