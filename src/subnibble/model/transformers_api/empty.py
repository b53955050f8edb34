"""Models without weights, and what transformers calls weights in checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from subnibble.model.transformers_api.marking import WORD
from subnibble.model.transformers_api.names import unknown


def empty_causal_lm(config: Any, dtype: torch.dtype) -> Any:
    """The causal language model of `config`, its parameters (in `dtype`) on the meta device, its buffers real.

    Other threads may make modules meanwhile: only the modules made here are on the meta device.
    """
    from transformers import AutoModelForCausalLM

    # In torch's default type, since transformers would change that for the whole process; cast afterwards.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype(), trust_remote_code=False)
    model.to(dtype)
    config.dtype = model.config.dtype = dtype
    _make_buffers_(model)
    model.eval()
    model.requires_grad_(False)
    return model


def _make_buffers_(model: nn.Module) -> None:
    """Give real values to buffers, which no checkpoint holds (rotary frequencies): their modules are made again."""
    for path, module in list(model.named_modules()):
        if not any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            continue
        if "config" not in inspect.signature(type(module)).parameters or not hasattr(module, "config"):
            raise unknown(f"has buffers in {type(module).__name__} that are not made of the model's config")
        again = type(module)(config=module.config)
        if any(buffer.is_meta for buffer in again.buffers()):
            raise unknown(f"makes no buffers in {type(module).__name__}")
        model.set_submodule(path, again)


def architecture_name(model_type: str) -> str | None:
    """The class of the causal language models of a `model_type`, as config.json names it; None if there is none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name: str | None = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    return name


def take_named_weights_(config: Any) -> str | None:
    """The file that a config names for its weights, None for the usual ones; taken out of it, as it is the folder's."""
    name: str | None = getattr(config, "transformers_weights", None)
    if name is not None:
        del config.transformers_weights
    return None if name == WORD else name


def untie_(model: Any, path: str) -> None:
    """Let transformers no longer tie the weight of the module at `path`, which has none any more."""
    if not isinstance(getattr(model, "all_tied_weights_keys", None), dict):
        raise unknown("keeps the weights that a model ties elsewhere than in all_tied_weights_keys")
    kept = {target: origin for target, origin in model.all_tied_weights_keys.items() if target != f"{path}.weight"}
    model.all_tied_weights_keys = kept
    model._tied_weights_keys = None


def tied_weights(model: Any) -> set[str]:
    """Names of weights that a model has from other weights, and no checkpoint needs to hold."""
    return set(model.all_tied_weights_keys)


def stray_buffers(names: set[str]) -> Iterator[str]:
    """Of names of tensors in a checkpoint, those that old releases wrote and no model needs."""
    return (name for name in names if name.endswith(("rotary_emb.inv_freq", ".masked_bias")))
