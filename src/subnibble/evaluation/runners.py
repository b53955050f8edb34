"""What computes a model's logits for scoring: its own forward pass in torch, or the C++ decoder step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from subnibble.errors import BadRecipe
from subnibble.generate.choice import chosen_backend
from subnibble.hf.decoder import Decoder
from subnibble.model.transformers_api.generation import logits_of

# Token ids (t,) -> logits (t, vocabulary) after each token.
Runner = Callable[[Tensor], Tensor]


def runner_of(model: Any, backend: str = "auto") -> Runner:
    """What computes a model's logits. backend: a name of `BACKENDS`."""
    return native_runner(model) if chosen_backend(model, backend)[0] == "native" else torch_runner(model)


def torch_runner(model: Any) -> Runner:
    """The model's own forward pass, without a KV cache of transformers."""
    device = next(iter((*model.parameters(), *model.buffers()))).device
    return lambda ids: logits_of(model, ids.unsqueeze(0).to(device))[0]


def native_runner(model: Any) -> Runner:
    """The C++ decoder step. It raises `BadRecipe` for a text that begins with the model's prompt prefix."""
    decoder = Decoder(model)

    def run(ids: Tensor) -> Tensor:
        tokens = ids.tolist()
        hidden = 0 if decoder.prefix is None else decoder.prefix.repeated(tokens)
        if hidden > 1:
            raise BadRecipe(
                "a window begins with the model's own system prompt, whose tokens the native step does not score; use "
                "--backend torch"
            )
        logits = decoder.logits(tokens[hidden:])
        # A hidden BOS has no logits; nobody scores it.
        return torch.cat([logits.new_zeros(hidden, logits.shape[1]), logits]) if hidden else logits

    return run
