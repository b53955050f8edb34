"""Keys and values of a prompt in a safetensors file, so that it need not run again.

| in the file | what it is |
|---|---|
| tensor `ids` | token ids of the prompt, (t,) int64 |
| tensors `layers.{i}...` | keys and values, see `Backend.save` |
| metadata `format`, `model`, `fingerprint` | "subnibble-prompt"; name of the model; digest of its weights |
| metadata `cache`, `prefix` | cache scheme and prompt prefix as JSON, `null` for none |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subnibble.errors import CheckpointError, OutputError
from subnibble.generate.opening import OpenedModel
from subnibble.resume.durable import write_file

_FORMAT, _IDS = "subnibble-prompt", "ids"


@dataclass(frozen=True)
class SavedPrompt:
    """A prompt that has run.

    ids: its token ids.
    state: its keys and values, see `Backend.save`.
    """

    ids: tuple[int, ...]
    state: Mapping[str, Tensor]


def save_prompt(path: Path, prompt: SavedPrompt, model: OpenedModel) -> None:
    """Write a prompt's keys and values to a file, completely or not at all; `OutputError` if that fails."""
    from safetensors.torch import save

    content = save({_IDS: torch.tensor(prompt.ids, dtype=torch.int64), **prompt.state}, _metadata(model))
    try:
        write_file(path, [content])
    except OSError as error:
        raise OutputError(f"{path}: the prompt cannot be saved ({error.strerror}); choose another file") from error


def load_prompt(path: Path, model: OpenedModel) -> SavedPrompt:
    """Read a file of `save_prompt`.

    Raises `CheckpointError` if it is damaged, or of another model, cache scheme or prefix.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as a saved prompt ({error}); save the prompt again") from error
    if metadata.get("format") != _FORMAT or _IDS not in tensors:
        raise CheckpointError(f"{path} is no saved prompt of subnibble; give a file that save_prompt wrote")
    expected = _metadata(model)
    if metadata.get("fingerprint") != expected["fingerprint"]:
        raise CheckpointError(
            f"{path} is a prompt of {metadata.get('model')} and not of {model.name}, or the model's weights or the "
            "rounding of its inputs have changed since; save the prompt again with this model"
        )
    for key, what in (("cache", "KV cache"), ("prefix", "system prompt")):
        if metadata.get(key) != expected[key]:
            raise CheckpointError(
                f"{path} was saved with the {what} {metadata.get(key)} and the model has {expected[key]}; save the "
                "prompt again"
            )
    return SavedPrompt(tuple(tensors.pop(_IDS).tolist()), tensors)


def _metadata(model: OpenedModel) -> dict[str, str]:
    backend = model.backend
    return {
        "format": _FORMAT,
        "model": model.name,
        "fingerprint": model.fingerprint,
        "cache": _json(backend.scheme),
        "prefix": _json(backend.prefix),
    }


def _json(value: Any) -> str:
    return json.dumps(None if value is None else value.to_dict(), sort_keys=True)
