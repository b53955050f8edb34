"""Checkpoints that are not whole, for readers to refuse."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from subnibble.checkpoint.checksums import CHECKSUMS, weight_checksums


def spoiled_copy(source: Path, folder: Path, name: str, how: str) -> Path:
    """A copy of a checkpoint with one tensor missing, misshapen, of another type, not finite, or one too many."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    index = folder / "model.safetensors.index.json"
    shard = json.loads(index.read_text())["weight_map"][name] if index.is_file() else "model.safetensors"
    tensors = load_file(folder / shard)
    if how == "missing":
        del tensors[name]
    elif how == "misshapen":
        tensors[name] = tensors[name][1:].contiguous()
    elif how == "another type":
        tensors[name] = tensors[name].double()
    elif how == "not finite":
        tensors[name].view(-1)[3] = torch.nan
    else:
        tensors[name + "_more"] = torch.zeros(1)
    save_file(tensors, folder / shard, metadata={"format": "pt"})
    renew_checksums(folder)
    return folder


def renew_checksums(folder: Path) -> None:
    """Make the checksums of a packed checkpoint those of its weight files, so that other checks find what is wrong."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    if CHECKSUMS in config.get("quantization_config", {}):
        config["quantization_config"][CHECKSUMS] = weight_checksums(folder)
        file.write_text(json.dumps(config))
