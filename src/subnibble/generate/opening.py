"""Open a model for generation: load it, change how it runs, and choose the backend that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from torch import nn

from subnibble.arguments import check_types, plain
from subnibble.calibrate.prompt import prefix_ids
from subnibble.checkpoint.opening import open_source
from subnibble.checkpoint.source import Source
from subnibble.errors import BadArgument
from subnibble.generate.backend import Backend
from subnibble.generate.choice import check_backend, chosen_backend
from subnibble.generate.fingerprint import source_fingerprint, tensors_fingerprint
from subnibble.generate.native_backend import NativeBackend
from subnibble.generate.prepare import prepare_
from subnibble.generate.settings import stored_settings
from subnibble.generate.torch_backend import TorchBackend
from subnibble.hf import load_model
from subnibble.tensor.scheme_checks import known_fields

AnyModel = str | Path | Source | nn.Module
_TEXT, _WHOLE = (str, type(None)), (int, type(None))
_TYPES = {"dtype": str, "device": str, "kv_bits": _WHOLE, "kv": Mapping, "system_prompt": _TEXT, "activations": _TEXT}


@dataclass(frozen=True)
class Loading:
    """How a model is loaded and run.

    dtype, device: of computation; for a model that is loaded already they are not read.
    kv_bits, kv, activations: see `prepare_`.
    system_prompt: a prompt prefix (`calibrate/prompt.py`); None keeps the model's.
    """

    dtype: str = "auto"
    device: str = "auto"
    kv_bits: int | None = None
    kv: Mapping[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    activations: str | None = None

    def __post_init__(self) -> None:
        for key in ("dtype", "device", "system_prompt", "activations"):
            object.__setattr__(self, key, plain(getattr(self, key)))
        check_types(self, _TYPES)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a dictionary; an unknown key is an error."""
        return cls(**known_fields(cls, values, "unknown option {} of loading"))


def backend_of(model: AnyModel, name: str, loading: Loading, tokenizer: Any) -> Backend:
    """The backend `name` for a model.

    model: a loaded transformers model, changed in place as `loading` says, or what `load_model` takes.
    name: of `choice.BACKENDS`.
    tokenizer: of transformers; only a system prompt needs it.
    """
    check_backend(name)
    loaded = model if isinstance(model, nn.Module) else load_model(model, loading.dtype, loading.device)
    prefix = None if loading.system_prompt is None else prefix_ids(loading.system_prompt, tokenizer)
    prepare_(loaded, loading.kv_bits, loading.kv, prefix, loading.activations)
    return NativeBackend(loaded) if chosen_backend(loaded, name)[0] == "native" else TorchBackend(loaded)


@dataclass(frozen=True)
class OpenedModel:
    """A model that is ready to generate.

    backend: runs the model.
    tokenizer: of transformers.
    generation_config: of transformers, the model's own settings of generation.
    name: of the model, for messages.
    origin: the checkpoint, or the loaded model.
    inputs: how inputs of linears are rounded (`prepare_`), None for as stored.
    """

    backend: Backend
    tokenizer: Any
    generation_config: Any
    name: str
    origin: Source | nn.Module
    inputs: str | None

    @classmethod
    def of(cls, model: AnyModel, tokenizer: Any, backend: str, loading: Loading) -> Self:
        """Open a model.

        model, loading: as in `backend_of`.
        tokenizer: of transformers; None for the one beside the checkpoint.
        backend: its name.
        """
        if isinstance(model, nn.Module):
            loaded: Any = model
            name = str(getattr(loaded.config, "name_or_path", "") or type(loaded).__name__)
            if tokenizer is None:
                raise BadArgument("a loaded model comes without its tokenizer; give it as the second argument")
            running = backend_of(model, backend, loading, tokenizer)
            return cls(running, tokenizer, loaded.generation_config, name, model, loading.activations)
        source = open_source(model)
        tokenizer = source.load_tokenizer() if tokenizer is None else tokenizer
        running = backend_of(source, backend, loading, tokenizer)
        return cls(running, tokenizer, stored_settings(source), source.path.name, source, loading.activations)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the numbers that keys and values depend on, apart from prefix and cache scheme."""
        origin = self.origin
        digest = tensors_fingerprint(origin) if isinstance(origin, nn.Module) else source_fingerprint(origin)
        return digest if self.inputs is None else f"{digest}-{self.inputs}"
