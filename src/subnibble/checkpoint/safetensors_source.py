"""Read a Hugging Face folder: one safetensors file, or shards with their index."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from subnibble.checkpoint.source import checked, numel
from subnibble.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
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
STORED_TYPES = {
    torch.uint8: "U8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int16: "I16",
    torch.int32: "I32",
}
_SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip


class SafetensorsSource:
    """A folder with config.json and safetensors weights; the index is verified when the folder is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read_config(path)
        self._files = _locate(path)
        headers = {file: read_header(path / file) for file in sorted(set(self._files.values()))}
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        for name, file in self._files.items():
            if name not in headers[file]:
                raise CheckpointError(f"{path / INDEX} places {name} in {file}, which does not hold it; fetch it again")
            self._headers[name] = headers[file][name]

    def names(self) -> list[str]:
        """See `Source`."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Source`."""
        return self._header(name)[0]

    def stored_bits(self, name: str) -> int:
        """See `Source`."""
        shape, kind = self._header(name)
        return numel(shape) * _BITS.get(kind, 64)

    def load(self, name: str) -> Tensor:
        """See `Source`."""
        return checked(self.load_raw(name), name, self.path)

    def load_raw(self, name: str) -> Tensor:
        """One tensor as stored, unchecked: packed codes are integers."""
        self._header(name)
        file = self.path / self._files[name]
        try:
            with safe_open(file, framework="pt") as handle:
                tensor: Tensor = handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: {name} cannot be read ({error}); get an intact copy") from error
        return tensor

    def _header(self, name: str) -> tuple[tuple[int, ...], str]:
        if name not in self._headers:
            raise CheckpointError(f"{self.path}: tensor {name} is missing; fetch it again, or quantize the model again")
        return self._headers[name]

    def shards(self) -> dict[Path, list[str]]:
        """Each weight file with the names that are read from it."""
        found: dict[Path, list[str]] = {}
        for name, file in sorted(self._files.items()):
            found.setdefault(self.path / file, []).append(name)
        return dict(sorted(found.items()))

    def file_bytes(self) -> int:
        """See `Source`."""
        return sum((self.path / file).stat().st_size for file in set(self._files.values()))

    def load_tokenizer(self) -> Any:
        """See `Source`."""
        from transformers import AutoTokenizer

        if not any((self.path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise CheckpointError(
                f"{self.path} has no tokenizer; put tokenizer.json beside the weights, or pass token ids "
                "(.npy or .safetensors) instead of text"
            )
        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        # The tokenizers library raises plain Exception on a damaged file.
        except Exception as error:
            raise CheckpointError(f"{self.path}: its tokenizer cannot be loaded ({error}); fetch it again") from error

    def copy_side_files(self, folder: Path) -> None:
        """See `Source`."""
        for name in _SIDE_FILES:
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, folder / name)


def _read_config(path: Path) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json; give the folder of a Hugging Face checkpoint")
    try:
        values = json.loads((path / "config.json").read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path / 'config.json'} cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise CheckpointError(f"{path / 'config.json'} names no model_type; it is no transformers config")
    if not isinstance(values.get("quantization_config") or {}, dict):
        raise CheckpointError(f"{path / 'config.json'}: its quantization_config is no table; fetch it again")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(f"{path / 'config.json'}: transformers refuses it: {error}") from error


def _locate(path: Path) -> dict[str, str]:
    """Tensor name -> file name; every file of the index must exist."""
    if (path / INDEX).is_file():
        try:
            weight_map: dict[str, str] = dict(json.loads((path / INDEX).read_text())["weight_map"])
            if not all(isinstance(file, str) for file in weight_map.values()):
                raise TypeError("a file's name is no text")
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path / INDEX} is damaged ({error}); fetch it again") from error
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file:
                raise CheckpointError(f"{path / INDEX} names {file!r}, which is outside the folder")
            if not (path / file).is_file():
                raise CheckpointError(f"{path}: shard {file} is missing; fetch the model again")
        return weight_map
    if (path / SINGLE).is_file():
        return dict.fromkeys(read_header(path / SINGLE), SINGLE)
    pickles = [file.name for file in path.iterdir() if file.suffix in {".bin", ".pt", ".pth"}]
    if pickles:
        raise CheckpointError(
            f"{path} has only pickle weights ({pickles[0]}), which can run code when loaded and are never read; "
            "convert them to safetensors with transformers' save_pretrained"
        )
    raise CheckpointError(f"{path} has neither {SINGLE} nor {INDEX}; give the folder of a Hugging Face checkpoint")


def read_header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Tensor name -> (shape, safetensors type); a truncated file is found here."""
    try:
        with safe_open(file, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or no safetensors file ({error}); fetch it again") from error
