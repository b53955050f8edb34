"""What computes a model's logits for scoring: its own forward pass in torch, or the C++ decoder step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

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
    """The C++ decoder step."""
    decoder, by_torch = Decoder(model), torch_runner(model)

    def run(ids: Tensor) -> Tensor:
        tokens = ids.tolist()
        hidden = 0 if decoder.prefix is None else decoder.prefix.repeated(tokens)
        if hidden > 1:
            # A text that begins with the prompt prefix itself: the step has no logits for tokens that it does not run.
            return by_torch(ids)
        logits = decoder.logits(tokens[hidden:])
        # Logits after a hidden BOS are not scored.
        return (
            logits
            if not hidden
            else logits.new_zeros(len(tokens), logits.shape[1]).index_copy_(
                0, ids.new_tensor(range(hidden, len(tokens))), logits
            )
        )

    return run
