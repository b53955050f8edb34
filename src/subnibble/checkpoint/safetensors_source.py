"""Read a Hugging Face folder: safetensors weights, wherever transformers would find them (`weight_files.py`)."""

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

# Bits of a number of each type that a checkpoint may have, packed or plain.
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
# Those that weights are read in.
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
    """A folder with config.json and safetensors weights, whose headers are read when the folder is opened."""

    def __init__(self, path: Path) -> None:
        check_adapter(path)
        self.path, self.described_by = path, "config.json"
        self.config = read_config(path)
        found = find_weights(path, take_named_weights_(self.config))
        self._stored: dict[str, Stored] = {name: found[stored] for name, stored in self._names(found).items()}
        self.renamed = any(name != stored.name for name, stored in self._stored.items())

    def _names(self, stored: dict[str, Stored]) -> dict[str, str]:
        """Name in the model -> name in the file."""
        arch = ARCHITECTURES.get(self.config.model_type)
        if arch is None or getattr(self.config, "quantization_config", None):
            return {name: name for name in stored}
        return model_names(stored, arch, bool(self.config.tie_word_embeddings), self.path)

    def names(self) -> list[str]:
        """See `Source`."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Source`."""
        return self._find(name).shape

    def stored_bits(self, name: str) -> int:
        """See `Source`."""
        found = self._find(name)
        return numel(found.shape) * _BITS.get(found.kind, 64)

    def check_type(self, name: str) -> None:
        """See `Source`."""
        kind = self._find(name).kind
        if kind not in _FLOATS:
            raise CheckpointError(
                f"{self.path}: {name} is stored as {kind}, of which no weights are read (but {', '.join(_FLOATS)}); "
                "the model may be quantized already: give the original"
            )

    def load(self, name: str) -> Tensor:
        """See `Source`; 8-bit floats come in bfloat16, which has all of their values."""
        self.check_type(name)
        tensor = self.load_raw(name)
        return checked(tensor.to(torch.bfloat16) if tensor.dtype in _NARROW else tensor, name, self.path)

    def load_raw(self, name: str) -> Tensor:
        """One tensor as stored, unchecked: packed codes are integers."""
        found = self._find(name)
        file = self.path / found.file
        try:
            with safe_open(file, framework="pt") as handle:
                tensor: Tensor = handle.get_tensor(found.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: {found.name} cannot be read ({error}); get an intact copy") from error
        return tensor

    def _find(self, name: str) -> Stored:
        if name not in self._stored:
            raise CheckpointError(f"{self.path}: tensor {name} is missing; config.json and weights do not fit")
        return self._stored[name]

    def shards(self) -> dict[Path, list[str]]:
        """Each weight file with the names of what is read from it."""
        found: dict[Path, list[str]] = {}
        for name, stored in sorted(self._stored.items()):
            found.setdefault(self.path / stored.file, []).append(name)
        return dict(sorted(found.items()))

    def file_bytes(self) -> int:
        """See `Source`."""
        return sum((self.path / file).stat().st_size for file in {stored.file for stored in self._stored.values()})

    def load_tokenizer(self) -> Any:
        """See `Source`."""
        return load_tokenizer(self.path, self.config)

    def copy_side_files(self, folder: Path) -> None:
        """See `Source`."""
        copy_side_files(self.path, folder)
