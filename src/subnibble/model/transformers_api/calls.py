"""Wrap two methods of `PreTrainedModel` that would go wrong for a packed model; other models are not affected.

`save_pretrained` would leave out the marker of `marking.py`. `resize_token_embeddings` would copy rows of `weight`,
which packed embeddings do not have, and would replace a head that has an input matrix by a plain one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import wrapt
from torch import nn

from subnibble.checkpoint.checksums import weight_checksums
from subnibble.errors import BadArgument
from subnibble.model.transformers_api.marking import complete_file
from subnibble.runtime.modules import HEAD_INPUT

_Call = Callable[..., Any]


def wrap_calls(method: str) -> None:
    """Wrap the methods, once, for models with `quant_method: method`.

    Called when a model is loaded: when the plug-in is imported, `PreTrainedModel` may not exist yet.
    """
    from transformers import PreTrainedModel

    for name, call in (("save_pretrained", _save), ("resize_token_embeddings", _resize)):
        # The raw attribute of the class: normal attribute access binds it and returns a new object of another type.
        if not isinstance(inspect.getattr_static(PreTrainedModel, name), wrapt.FunctionWrapper):
            wrapt.wrap_function_wrapper(PreTrainedModel, name, _for_packed(method, call))


def _for_packed(method: str, call: _Call) -> _Call:
    def chosen(wrapped: _Call, model: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        quantization = getattr(model.config, "quantization_config", None)
        if getattr(quantization, "quant_method", None) != method:
            return wrapped(*arguments, **named)
        return call(wrapped, model, *arguments, **named)

    return chosen


def _save(
    wrapped: _Call, model: Any, save_directory: Any, is_main_process: bool = True, *arguments: Any, **named: Any
) -> None:
    if named.get("push_to_hub"):
        raise BadArgument(
            "push_to_hub=True would upload an incomplete config.json; call model.push_to_hub(REPO) instead"
        )
    wrapped(save_directory, is_main_process, *arguments, **named)
    if is_main_process:
        folder = Path(save_directory)
        complete_file(folder / "config.json", weight_checksums(folder))


def _resize(wrapped: _Call, model: Any, new_num_tokens: int | None = None, *arguments: Any, **named: Any) -> Any:
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(table, nn.Embedding) and type(head) is nn.Linear and not hasattr(head, HEAD_INPUT):
        return wrapped(new_num_tokens, *arguments, **named)
    if new_num_tokens in (None, table.num_embeddings) and not arguments and not named.get("pad_to_multiple_of"):
        return table
    raise BadArgument(
        f"new_num_tokens is {new_num_tokens}, but the model has {table.num_embeddings} tokens, and its embedding or "
        "head is quantized, so that no rows can be added; add the tokens to the original model and quantize it again, "
        "or quantize it with embedding_bits = 16"
    )
