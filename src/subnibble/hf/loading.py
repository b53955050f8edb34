"""Load a model from any checkpoint: packed or plain, folder, hub id or GGUF file."""

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
    """Load a transformers model, ready to run.

    model: packed or plain folder, hub id, .gguf file, or opened source.
    dtype: dtype of computation; "auto" follows the checkpoint and the device (`device.resolve_dtype`).
    device: where the model runs; "auto" chooses (`device.resolve_device`).
    """
    source = open_source(model)
    target_device = resolve_device(device)
    compute_dtype = resolve_dtype(dtype, source.config.dtype, target_device)
    if source.path.suffix == ".gguf":
        # transformers would keep a `gguf` quantization_config and parse the file's metadata twice more.
        return Skeleton(source, compute_dtype, target_device).load_all()
    if readable_config_of(source.config, source.path) is None and source.config.model_type in ARCHITECTURES:
        # transformers would initialize missing tensors at random.
        skeleton = Skeleton(source, compute_dtype, target_device)
        skeleton.check_tied_head()
        if source.renamed:
            renamed = skeleton.load_all()
            read_generation_config_(renamed, source.path)
            return renamed
    from transformers import AutoModelForCausalLM

    # A copy, because loading writes into the config. Passing it avoids reading the file a second time.
    config = copy.deepcopy(source.config)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source.path, config=config, dtype=compute_dtype, trust_remote_code=False
    )
    return loaded.to(target_device).eval()


def memory_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; shared ones count once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())
