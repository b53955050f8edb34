"""Read a GGUF file: tensors are memory-mapped, dequantized one at a time, and named and laid out as in transformers.

The gguf package maps names and dequantizes blocks. This module undoes llama.cpp's row order: it stores q and k rows of
Llama-type models with the two halves of each rotary pair interleaved. `gguf_config.py` reads the metadata,
`gguf_parts.py` finds the files of a split model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from subnibble.arch import find_arch
from subnibble.arch.site import Arch
from subnibble.checkpoint.gguf_config import Metadata, config_of
from subnibble.checkpoint.gguf_parts import find_parts, read_parts
from subnibble.checkpoint.source import checked
from subnibble.checkpoint.tokenizer import load_gguf_tokenizer
from subnibble.errors import CheckpointError, UnsupportedModel

# Supported architectures, and whether llama.cpp's converter interleaves their q and k rows.
_INTERLEAVED = {"llama": True, "qwen2": False, "qwen3": False}
# Norms of a block that no table of sites names.
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_DIVISORS = "rope_freqs.weight"
_ENDS = ("eot", "eom")


class GgufSource:
    """A .gguf model as a `Source`. path: the file, or any part of a split model; the attribute is the first part."""

    def __init__(self, path: Path) -> None:
        parts = find_parts(path)
        readers = read_parts(parts)
        self.path, self.described_by, self.renamed = parts[0], "the file's metadata", False
        self._parts = parts
        self._tokenizer: Any = None
        self._metadata = Metadata(self.path, readers[0].fields)
        arch = self._metadata.arch
        if arch not in _INTERLEAVED:
            raise UnsupportedModel(
                f"{path}: GGUF architecture {arch!r} is not supported; supported: {', '.join(_INTERLEAVED)}"
            )
        tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        stored = tensors.pop(_DIVISORS, None)
        divisors = None if stored is None else np.asarray(stored.data, dtype=np.float64).ravel().tolist()
        shapes = {name: _shape(tensor) for name, tensor in tensors.items()}
        self.config = config_of(self._metadata, shapes, divisors)
        self._tensors = self._by_hf_name(tensors, arch)

    def names(self) -> list[str]:
        """Return the Hugging Face names of all stored tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, in transformers' order of axes."""
        return _shape(self._tensors[name])

    def stored_bits(self, name: str) -> int:
        """Return the bits that a tensor takes in its file."""
        return 8 * int(self._tensors[name].n_bytes)

    def check_type(self, name: str) -> None:
        """Raise `CheckpointError` unless the gguf package can dequantize the tensor's type."""
        kind = self._tensors[name].tensor_type
        if not _reads(kind):
            raise CheckpointError(
                f"{self.path}: {name} is stored as {kind.name}, which the installed gguf package cannot dequantize; "
                "upgrade gguf, or give the model in another type"
            )

    def load(self, name: str) -> Tensor:
        """Read and dequantize one tensor, in float32."""
        weight = self._dequantized(name, self._tensors[name].data).view(self.shape(name))
        return checked(self.in_model_order(name, weight), name, self.path)

    def load_rows(self, name: str, rows: slice) -> Tensor:
        """Read and dequantize these rows of a matrix, in float32 and the model's order."""
        return checked(self._dequantized(name, self._stored_rows(name, rows)), name, self.path)

    def type_name(self, name: str) -> str:
        """Return the name of a tensor's type, for example "Q4_0"."""
        return str(self._tensors[name].tensor_type.name)

    def blocks(self, name: str, rows: slice) -> NDArray[np.uint8]:
        """Return the blocks of these rows of a quantized matrix, (blocks, bytes of a block), in the model's order."""
        import gguf

        width = gguf.GGML_QUANT_SIZES[self._tensors[name].tensor_type][1]
        return np.ascontiguousarray(self._stored_rows(name, rows)).reshape(-1, width)

    def in_model_order(self, name: str, rows: Tensor) -> Tensor:
        """Return the rows of a tensor, or what belongs to each of them, in the model's order.

        rows: (m, ...), in the file's order.
        """
        if _INTERLEAVED[self.config.model_type]:
            if ".q_proj." in name:
                return _split_rotary_pairs(rows, self.config.num_attention_heads)
            if ".k_proj." in name:
                return _split_rotary_pairs(rows, self.config.num_key_value_heads)
        return rows

    def file_bytes(self) -> int:
        """Return the size of all parts together, in bytes."""
        return sum(file.stat().st_size for file in self._parts)

    def files(self) -> list[Path]:
        """Return all parts."""
        return list(self._parts)

    def load_tokenizer(self) -> Any:
        """Load the transformers tokenizer from the file's metadata."""
        # Kept, since parsing the vocabulary takes seconds.
        if self._tokenizer is None:
            self._tokenizer = load_gguf_tokenizer(self.path)
        return self._tokenizer

    def copy_side_files(self, folder: Path) -> None:
        """Write tokenizer files and a generation config into `folder`, made from the metadata."""
        self.load_tokenizer().save_pretrained(folder)
        ids = {key: getattr(self.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        known = {key: value for key, value in ids.items() if value is not None}
        # llama.cpp also stops at the tokens for the end of a turn and of a message.
        ends = [known.get("eos_token_id"), *(self._metadata.get(f"tokenizer.ggml.{key}_token_id") for key in _ENDS)]
        if len(several := list(dict.fromkeys(end for end in ends if end is not None))) > 1:
            known["eos_token_id"] = several
        (folder / "generation_config.json").write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")

    def _stored_rows(self, name: str, rows: slice) -> NDArray[Any]:
        """These rows of a matrix, by the model's order, as they are stored."""
        stored = self._tensors[name].data
        order = self.in_model_order(name, torch.arange(len(stored)))[rows]
        return stored[order.numpy()]  # type: ignore[no-any-return]

    def _dequantized(self, name: str, stored: NDArray[Any]) -> Tensor:
        from gguf import dequantize

        kind = self._tensors[name].tensor_type
        return torch.from_numpy((stored if kind.name == "F64" else dequantize(stored, kind)).copy()).float()

    def _by_hf_name(self, tensors: dict[str, Any], model_type: str) -> dict[str, Any]:
        """Return Hugging Face name -> tensor. tensors: name in the file -> tensor; one without a place is an error."""
        import gguf

        arch_id = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == model_type)
        name_map = gguf.get_tensor_name_map(arch_id, self.config.num_hidden_layers)
        by_gguf_name = dict(tensors)
        by_hf_name: dict[str, Any] = {}
        for hf_name in _hf_names(find_arch(model_type), self.config.num_hidden_layers):
            stem, _, kind = hf_name.rpartition(".")
            tensor = by_gguf_name.pop(f"{name_map.get_name(stem)}.{kind}", None)
            if tensor is not None:
                by_hf_name[hf_name] = tensor
        if by_gguf_name:
            raise UnsupportedModel(
                f"{self.path}: tensor {sorted(by_gguf_name)[0]} ({len(by_gguf_name)} in all) has no place in a "
                f"{model_type} model; use the original checkpoint instead of the GGUF file"
            )
        return by_hf_name


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))


def _reads(kind: Any) -> bool:
    """Whether `GgufSource.load` can read a type; tries to dequantize one block of zeros."""
    import gguf

    if kind.name in ("F64", "F32", "F16"):
        return True
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _hf_names(arch: Arch, blocks: int) -> list[str]:
    """Return every tensor name that a model of this architecture may have. blocks: number of blocks."""
    stems = [arch.embedding, arch.final_norm, arch.head]
    modules = (*arch.linears, *arch.residual.norms, *_HEAD_NORMS)
    stems += [f"{arch.block_path(index)}.{module}" for index in range(blocks) for module in modules]
    return [f"{stem}.{kind}" for stem in stems for kind in ("weight", "bias")]


def _split_rotary_pairs(rows: Tensor, heads: int) -> Tensor:
    """Undo the interleaving: within a head of d rows, (0, d/2, 1, d/2 + 1, ...) become (0, 1, ..., d - 1).

    rows: (heads * d, ...).
    """
    half = rows.shape[0] // heads // 2
    return rows.view(heads, half, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
