"""Read a Hugging Face folder with safetensors weights, from the files that transformers reads (`weight_files.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from subnibble.arch import ARCHITECTURES
from subnibble.checkpoint.config import read_config
from subnibble.checkpoint.names import model_names
from subnibble.checkpoint.side_files import copy_side_files
from subnibble.checkpoint.source import checked, numel
from subnibble.checkpoint.tokenizer import load_tokenizer
from subnibble.checkpoint.weight_files import Stored, check_adapter, find_weights
from subnibble.errors import CheckpointError
from subnibble.model.transformers_api.empty import take_named_weights_

# Bits per number of each safetensors type in a checkpoint, packed or plain.
_BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "U8": 8,
    "I8": 8,
    "I16": 16,
    "I32": 32,
}
# The types that `load` reads as weights.
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)
STORED_TYPES = {
    torch.uint8: "U8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int16: "I16",
    torch.int32: "I32",
}


class SafetensorsSource:
    """A folder with config.json and safetensors weights. Opening it reads the headers, not the weights."""

    def __init__(self, path: Path) -> None:
        check_adapter(path)
        self.path, self.described_by = path, "config.json"
        self.config = read_config(path)
        tensors = find_weights(path, take_named_weights_(self.config))
        self._stored: dict[str, Stored] = {name: tensors[stored] for name, stored in self._names(tensors).items()}
        self.renamed = any(name != stored.name for name, stored in self._stored.items())

    def _names(self, stored: dict[str, Stored]) -> dict[str, str]:
        """Return the name in the model -> the name in the file."""
        arch = ARCHITECTURES.get(self.config.model_type)
        if arch is None or getattr(self.config, "quantization_config", None):
            return {name: name for name in stored}
        return model_names(stored, arch, bool(self.config.tie_word_embeddings), self.path)

    def names(self) -> list[str]:
        """Return the model's names of all stored tensors."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the header."""
        return self.header(name).shape

    def stored_bits(self, name: str) -> int:
        """Return the bits that a tensor takes in its file."""
        stored = self.header(name)
        return numel(stored.shape) * _BITS.get(stored.kind, 64)

    def check_type(self, name: str) -> None:
        """Raise `CheckpointError` unless the tensor has a type that `load` reads; from the header."""
        kind = self.header(name).kind
        if kind not in _FLOATS:
            raise CheckpointError(
                f"{self.path}: {name} is stored as {kind}, and weights are read only from {', '.join(_FLOATS)}; "
                "the model may be quantized already: give the original"
            )

    def load(self, name: str) -> Tensor:
        """Read one tensor, in its stored float type; 8-bit floats become bfloat16, which holds all of their values."""
        self.check_type(name)
        tensor = self.load_raw(name)
        return checked(tensor.to(torch.bfloat16) if tensor.dtype in _NARROW else tensor, name, self.path)

    def load_raw(self, name: str) -> Tensor:
        """Read one tensor as stored, without checks; packed codes are integers."""
        stored = self.header(name)
        file = self.path / stored.file
        try:
            with safe_open(file, framework="pt") as handle:
                tensor: Tensor = handle.get_tensor(stored.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: {stored.name} cannot be read ({error}); get an intact copy") from error
        return tensor

    def header(self, name: str) -> Stored:
        """Return what the header says of a tensor; `CheckpointError` if there is none."""
        if name not in self._stored:
            raise CheckpointError(f"{self.path}: tensor {name} is missing; config.json and weights do not match")
        return self._stored[name]

    def shards(self) -> dict[Path, list[str]]:
        """Return weight file -> the model's names of the tensors that are read from it."""
        names: dict[Path, list[str]] = {}
        for name, stored in sorted(self._stored.items()):
            names.setdefault(self.path / stored.file, []).append(name)
        return dict(sorted(names.items()))

    def files(self) -> list[Path]:
        """Return all files of the folder, hidden ones left out."""
        return [path for path in sorted(self.path.iterdir()) if path.is_file() and not path.name.startswith(".")]

    def file_bytes(self) -> int:
        """Return the size of all weight files together, in bytes."""
        return sum((self.path / file).stat().st_size for file in {stored.file for stored in self._stored.values()})

    def load_tokenizer(self) -> Any:
        """Load the transformers tokenizer from the folder."""
        return load_tokenizer(self.path, self.config)

    def copy_side_files(self, folder: Path) -> None:
        """Copy tokenizer, chat templates and generation config into `folder`, if they exist."""
        copy_side_files(self.path, folder)
