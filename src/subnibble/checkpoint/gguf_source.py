"""Read a GGUF file: tensors are memory-mapped and dequantized one at a time, names and layout as transformers has.

The gguf package maps names and dequantizes blocks. The one thing of its own here: llama.cpp stores q and k rows of
Llama-type models with the two halves of each rotary pair interleaved, which is undone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subnibble.checkpoint.source import checked
from subnibble.errors import CheckpointError, MissingExtra, UnsupportedModel
from subnibble.model.arch import find_arch
from subnibble.model.site import Arch

# Architectures whose converter interleaves q and k rows; the others store them as transformers does.
_INTERLEAVED = {"llama": True, "qwen2": False}


class GgufSource:
    """One .gguf file, seen as a Hugging Face checkpoint."""

    def __init__(self, path: Path) -> None:
        gguf = _gguf()
        self.path = path
        self._tokenizer: Any = None
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise CheckpointError(f"{path} is truncated or no GGUF file ({error}); fetch it again") from error
        self.config = _read_config(path)
        arch = self.config.model_type
        if arch not in _INTERLEAVED:
            raise UnsupportedModel(
                f"{path}: GGUF architecture {arch!r} is not supported; supported: {', '.join(_INTERLEAVED)}"
            )
        self._tensors = self._by_hf_name(gguf, arch)

    def names(self) -> list[str]:
        """See `Source`."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Source`."""
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def stored_bits(self, name: str) -> int:
        """See `Source`."""
        return 8 * int(self._tensors[name].n_bytes)

    def load(self, name: str) -> Tensor:
        """See `Source`; float32."""
        from gguf import dequantize

        tensor = self._tensors[name]
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        weight = weight.view(self.shape(name))
        if _INTERLEAVED[self.config.model_type]:
            if ".q_proj." in name:
                weight = _split_rotary_pairs(weight, self.config.num_attention_heads)
            elif ".k_proj." in name:
                weight = _split_rotary_pairs(weight, self.config.num_key_value_heads)
        return checked(weight, name, self.path)

    def file_bytes(self) -> int:
        """See `Source`."""
        return self.path.stat().st_size

    def load_tokenizer(self) -> Any:
        """See `Source`."""
        from transformers import AutoTokenizer

        # Its vocabulary is parsed from the file's metadata, which takes seconds.
        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)
        return self._tokenizer

    def copy_side_files(self, folder: Path) -> None:
        """See `Source`."""
        self.load_tokenizer().save_pretrained(folder)
        ids = {key: getattr(self.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        known = {key: value for key, value in ids.items() if value is not None}
        (folder / "generation_config.json").write_text(json.dumps(known, indent=2) + "\n")

    def _by_hf_name(self, gguf: Any, model_type: str) -> dict[str, Any]:
        arch_id = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == model_type)
        name_map = gguf.get_tensor_name_map(arch_id, self.config.num_hidden_layers)
        by_gguf_name = {tensor.name: tensor for tensor in self._reader.tensors}
        found: dict[str, Any] = {}
        for hf_name in _hf_names(find_arch(model_type), self.config.num_hidden_layers):
            stem, _, kind = hf_name.rpartition(".")
            tensor = by_gguf_name.pop(f"{name_map.get_name(stem)}.{kind}", None)
            if tensor is not None:
                found[hf_name] = tensor
        if by_gguf_name:
            raise UnsupportedModel(
                f"{self.path}: tensor {sorted(by_gguf_name)[0]} ({len(by_gguf_name)} in all) has no place in a "
                f"{model_type} model here; use the original checkpoint instead of the GGUF file"
            )
        return found


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtra("reading GGUF files needs the gguf package: pip install 'subnibble[gguf]'") from error
    return gguf


def _read_config(path: Path) -> Any:
    """The transformers config of a GGUF file, without the `quantization_config` that would name it a GGUF model."""
    from transformers import AutoConfig

    from subnibble.model.transformers_api.empty import architecture_name

    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{path}: transformers cannot read its metadata ({error})") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    name = architecture_name(config.model_type)
    config.architectures = None if name is None else [name]
    return config


def _hf_names(arch: Arch, blocks: int) -> list[str]:
    """Every tensor name that a model of this architecture may have."""
    stems = [arch.embedding, arch.final_norm, arch.head]
    parts = (*arch.linears, *arch.residual.norms)
    stems += [f"{arch.block_path(index)}.{part}" for index in range(blocks) for part in parts]
    return [f"{stem}.{kind}" for stem in stems for kind in ("weight", "bias")]


def _split_rotary_pairs(rows: Tensor, heads: int) -> Tensor:
    """Undo the interleaving: within a head, rows (0, d/2, 1, d/2 + 1, ...) become (0, 1, ..., d - 1)."""
    half = rows.shape[0] // heads // 2
    return rows.view(heads, half, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
