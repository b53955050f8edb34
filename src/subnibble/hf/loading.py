"""A model ready to run, from whatever a checkpoint may be: packed or plain, folder, hub id or GGUF file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subnibble.arch import ARCHITECTURES
from subnibble.checkpoint.manifest import readable_config_of
from subnibble.checkpoint.opening import open_source
from subnibble.checkpoint.source import Source
from subnibble.device import resolve_device, resolve_dtype
from subnibble.model.skeleton import Skeleton
from subnibble.model.transformers_api.generation import read_generation_config_


def load_model(
    model: str | Path | Source, dtype: str | torch.dtype = "auto", device: str | torch.device = "auto"
) -> Any:
    """A transformers model, ready to run: packed or plain folder, hub id or .gguf file.

    dtype, device: see `device.py`.
    """
    source = open_source(model)
    place = resolve_device(device)
    kind = resolve_dtype(dtype, source.config.dtype, place)
    if source.path.suffix == ".gguf":
        # transformers would keep a `gguf` quantization_config and parse the file's metadata twice more.
        return Skeleton(source, kind, place).load_all()
    if readable_config_of(source.config, source.path) is None and source.config.model_type in ARCHITECTURES:
        # transformers would make up missing tensors.
        skeleton = Skeleton(source, kind, place)
        skeleton.check_tied_head()
        if source.renamed:
            whole = skeleton.load_all()
            read_generation_config_(whole, source.path)
            return whole
    from transformers import AutoModelForCausalLM

    # A copy, because loading writes into the config; the file itself is not read a second time.
    config = copy.deepcopy(source.config)
    loaded: Any = AutoModelForCausalLM.from_pretrained(source.path, config=config, dtype=kind, trust_remote_code=False)
    return loaded.to(place).eval()


def memory_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())
