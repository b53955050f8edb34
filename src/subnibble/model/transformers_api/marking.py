"""A word in config.json without which transformers alone would load a packed checkpoint, with random linears.

Where no plug-in is registered for a `quant_method`, transformers logs a line, makes up the weights it does not find and
goes on. `transformers_weights` names the file to load in place of model.safetensors; one that is no name of such a file
is an error that shows it. So it says what to do, and the plug-in takes it away before files are looked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import wrapt

from subnibble.errors import BadArgument

_KEY = "transformers_weights"
_WORD = "these weights are packed: `import subnibble` (pip install subnibble) before from_pretrained"


def marked(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json holds, with the word."""
    return {**config, _KEY: _WORD}


def unmark_(config: Any) -> None:
    """Take the word out of a config that transformers has read."""
    if getattr(config, _KEY, None) is not None:
        setattr(config, _KEY, None)


def mark_saves(method: str) -> None:
    """Let `save_pretrained` of every model of `quant_method: method` write the word, which transformers leaves out.

    Called when a model is loaded: while the plug-in is imported, the class of models may not be there yet.
    """
    from transformers import PreTrainedModel

    if isinstance(PreTrainedModel.save_pretrained, wrapt.FunctionWrapper):
        return

    def save(wrapped: Callable[..., Any], model: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        quantization = getattr(model.config, "quantization_config", None)
        if getattr(quantization, "quant_method", None) != method:
            return wrapped(*arguments, **named)
        if named.get("push_to_hub"):
            raise BadArgument("push_to_hub would send config.json too early; give the hub's id to model.push_to_hub")
        result = wrapped(*arguments, **named)
        _mark_file(Path(named["save_directory"] if "save_directory" in named else arguments[0]) / "config.json")
        return result

    wrapt.wrap_function_wrapper(PreTrainedModel, "save_pretrained", save)


def _mark_file(file: Path) -> None:
    # Of several processes, one writes it.
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(marked(found), indent=2) + "\n", encoding="utf-8")
