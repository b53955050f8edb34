"""Models without weights, and the names that transformers gives to weights and weight files."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from subnibble.model.transformers_api.marking import MARKER
from subnibble.model.transformers_api.names import unknown


def empty_causal_lm(config: Any, dtype: torch.dtype) -> Any:
    """Build the causal language model of a config without weights: parameters on the meta device, buffers with values.

    Safe if other threads build modules at the same time: only this model is on the meta device.

    config: of transformers; its dtype is set to `dtype`.
    dtype: dtype of the parameters.
    """
    from transformers import AutoModelForCausalLM

    # Built in torch's default dtype and cast afterwards: for another dtype transformers would change that default for
    # the whole process.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype(), trust_remote_code=False)
    model.to(dtype)
    config.dtype = model.config.dtype = dtype
    _make_buffers_(model)
    model.eval()
    model.requires_grad_(False)
    return model


def _make_buffers_(model: nn.Module) -> None:
    """Give values to buffers that no checkpoint holds, such as rotary frequencies, by building their modules again."""
    for path, module in list(model.named_modules()):
        if not any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            continue
        if "config" not in inspect.signature(type(module)).parameters or not hasattr(module, "config"):
            raise unknown(f"has buffers in {type(module).__name__} that are not computed from the model's config")
        rebuilt = type(module)(config=module.config)
        if any(buffer.is_meta for buffer in rebuilt.buffers()):
            raise unknown(f"makes no buffers in {type(module).__name__}")
        model.set_submodule(path, rebuilt)


def architecture_name(model_type: str) -> str | None:
    """The class name of the causal language model of a `model_type`, as in config.json; None if there is none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name: str | None = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    return name


def take_named_weights_(config: Any) -> str | None:
    """Remove the name of a weight file from a config and return it; None if the weights have their default names.

    The name describes a folder, not the model. The marker of `marking.py` in its place is removed, too, and gives None.
    """
    name: str | None = getattr(config, "transformers_weights", None)
    if name is not None:
        del config.transformers_weights
    return None if name == MARKER else name


def untie_(model: Any, path: str) -> None:
    """Remove the weight of the module at `path` from the weights that transformers ties, because the module has no
    `weight` any more.
    """
    if not isinstance(getattr(model, "all_tied_weights_keys", None), dict):
        raise unknown("keeps the names of tied weights elsewhere than in all_tied_weights_keys")
    tied = {target: origin for target, origin in model.all_tied_weights_keys.items() if target != f"{path}.weight"}
    model.all_tied_weights_keys = tied
    model._tied_weights_keys = None


def tied_weights(model: Any) -> set[str]:
    """Names of weights that are tied to other weights, so that a checkpoint need not hold them."""
    return set(model.all_tied_weights_keys)


def stray_buffers(names: set[str]) -> Iterator[str]:
    """The names, of tensors in a checkpoint, that are buffers of old transformers releases and not needed any more."""
    return (name for name in names if name.endswith(("rotary_emb.inv_freq", ".masked_bias")))
