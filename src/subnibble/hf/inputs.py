"""Round the inputs of a loaded model's linears more coarsely than its checkpoint says, for speed."""

from __future__ import annotations

from typing import Any

from subnibble.errors import BadRecipe
from subnibble.runtime.modules import PackedLinear, TiedHead
from subnibble.tensor.activation_scheme import ActivationScheme

# How inputs can be rounded, by the name that users give: one multiplication of bytes instead of two or three.
INPUTS = {"int8": ActivationScheme(8, 128, "none")}


def round_inputs_(model: Any, name: str) -> int:
    """Round inputs that the checkpoint does not quantize, in place. Afterwards `save_pretrained` raises `BadArgument`.

    model: a packed transformers model.
    name: a name of `INPUTS`; "int8": each token in groups of 128 channels, symmetric, scale max|x| / 127.
    Returns the number of packed linears and heads whose inputs are rounded now. Raises `BadRecipe` if there are none.
    """
    if name not in INPUTS:
        raise BadRecipe(f"activations are {name!r}; choose one of {', '.join(INPUTS)}, or leave them as stored")
    readers = [module for module in model.modules() if isinstance(module, PackedLinear | TiedHead)]
    changed = [module for module in readers if module.activation is None]
    if not changed:
        raise BadRecipe(f"no packed linear of this model has inputs that {name} would change; leave out --activations")
    for module in changed:
        module.activation = INPUTS[name]
    # What it writes would say nothing of the rounding, and so be another model.
    model.hf_quantizer.unsaved_because = (
        f"this model rounds its inputs to {name}, which a checkpoint does not store; load it again to save it"
    )
    return len(changed)
