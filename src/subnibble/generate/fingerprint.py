"""A digest of a model's weights, by which saved keys and values find the model that they belong to."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from subnibble.checkpoint.checksums import CHECKSUMS, file_checksum, weights_checksum
from subnibble.checkpoint.source import Source

_WEIGHT_FILES = (".safetensors", ".gguf")


def source_fingerprint(source: Source) -> str:
    """SHA-256 of a checkpoint's weight files, 64 hexadecimal digits; a packed checkpoint holds it already."""
    quantization = getattr(source.config, "quantization_config", None) or {}
    checksums = quantization.get(CHECKSUMS) if isinstance(quantization, dict) else None
    if checksums is None:
        files = [source.path] if source.path.is_file() else source.files()
        checksums = {file.name: file_checksum(file) for file in files if file.suffix in _WEIGHT_FILES}
    return weights_checksum(checksums)


def tensors_fingerprint(model: nn.Module) -> str:
    """SHA-256 of a loaded model's tensors, 64 hexadecimal digits; it differs from that of the files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + _content(tensor))
    return digest.hexdigest()


def _content(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
