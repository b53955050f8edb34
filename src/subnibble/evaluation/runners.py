"""What computes a model's logits for scoring: its own forward pass in torch, or the C++ decoder step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from subnibble.errors import BadRecipe
from subnibble.hf.decoder import Decoder, why_not
from subnibble.model.transformers_api.generation import logits_of
from subnibble.runtime.modules import packed_modules

# Token ids (t,) -> logits (t, vocabulary) after each token.
Runner = Callable[[Tensor], Tensor]

BACKENDS = ("auto", "native", "torch")


def backend_of(model: Any, backend: str) -> tuple[str, str]:
    """(backend that runs a model, why).

    model: a loaded transformers model.
    backend: "native" (the C++ decoder step), "torch", or "auto": native for packed models that it can run.
    Raises `BadRecipe` if the native step was chosen and cannot run the model.
    """
    if backend not in BACKENDS:
        raise BadRecipe(f"backend is {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend == "torch":
        return "torch", "chosen"
    reason = why_not(model)
    if backend == "native":
        if reason is not None:
            raise BadRecipe(f"the native step cannot run this model: {reason}; use --backend torch")
        return "native", "chosen"
    if not packed_modules(model):
        return "torch", "the model is not packed"
    return ("native", "packed, on the CPU") if reason is None else ("torch", reason)


def runner_of(model: Any, backend: str = "auto") -> Runner:
    """What computes a model's logits. Arguments as in `backend_of`."""
    return native_runner(model) if backend_of(model, backend)[0] == "native" else torch_runner(model)


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
