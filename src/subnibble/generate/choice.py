"""Which backend runs a model: the C++ decoder step, or torch."""

from __future__ import annotations

from typing import Any

from subnibble.errors import BadRecipe
from subnibble.hf.decoder import why_not
from subnibble.runtime.modules import packed_modules

BACKENDS = ("auto", "native", "torch")


def check_backend(name: str) -> None:
    """Raise `BadRecipe` if there is no backend of this name."""
    if name not in BACKENDS:
        raise BadRecipe(f"backend is {name!r}; choose one of {', '.join(BACKENDS)}")


def chosen_backend(model: Any, name: str) -> tuple[str, str]:
    """(backend that runs a model, why).

    model: a loaded transformers model.
    name: "native" (the C++ decoder step), "torch", or "auto": native for packed models that it can run.
    Raises `BadRecipe` if the native step was chosen and cannot run the model.
    """
    check_backend(name)
    if name == "torch":
        return "torch", "chosen"
    if name == "native":
        if (reason := why_not(model)) is not None:
            raise BadRecipe(f"the native step cannot run this model: {reason}; use --backend torch")
        return "native", "chosen"
    if not packed_modules(model):
        return "torch", "the model is not packed"
    return native_or_torch(model, "packed, on the CPU")


def native_or_torch(model: Any, why_native: str = "on the CPU") -> tuple[str, str]:
    """(backend, why): native for every model that it can run, packed or not.

    model: a loaded transformers model.
    why_native: the reason to give if it is native.
    """
    reason = why_not(model)
    return ("native", why_native) if reason is None else ("torch", reason)
