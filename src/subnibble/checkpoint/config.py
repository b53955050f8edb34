"""Read a model folder's config.json and check its values, before transformers builds a model from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from subnibble.errors import CheckpointError, UnsupportedModel
from subnibble.model.transformers_api.configs import NOT_OF_THE_MODEL, build_config, is_known_type
from subnibble.model.transformers_api.names import release
from subnibble.text_file import read_json_file, read_plain_json_file

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
# Keys for the type of weights; the second is from before transformers 5.
_DTYPE_KEYS = ("dtype", "torch_dtype")
# The value that means: keep each weight's stored type.
_AS_STORED = "auto"
# Entries of rope_parameters that must be positive, since they act as divisors.
_POSITIVE_ROPE = ("rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor")
# Sizes that must be positive, with upper bounds far above any real model: a larger model would fill the memory.
_MAXIMA = {
    "vocab_size": 10**8, "hidden_size": 10**7, "intermediate_size": 10**8, "num_hidden_layers": 10**4,
    "num_attention_heads": 10**5, "num_key_value_heads": 10**5, "head_dim": 10**6, "sliding_window": 10**12,
    "max_position_embeddings": 10**12, "rms_norm_eps": 1,
}  # fmt: skip


def read_config(folder: Path) -> Any:
    """Read the transformers config of a model folder.

    Raises `CheckpointError` or `UnsupportedModel`; both name the file, the wrong value and the remedy.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}; {_instead(folder)}")
    values = read_json_file(file)
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise CheckpointError(f"{file} has no model_type, so it is no transformers config; give a model that has one")
    if not isinstance(values.get("quantization_config"), dict | None):
        raise CheckpointError(f"{file}: its quantization_config is no table; remove it, or give the original model")
    if (folder / GENERATION_CONFIG).is_file():
        # transformers ignores a file that it cannot read, and generation would then stop at other tokens.
        read_plain_json_file(folder / GENERATION_CONFIG)
    model_values = {key: value for key, value in values.items() if key not in NOT_OF_THE_MODEL}
    return _build({**model_values, **_dtypes(values, file)}, file, "auto_map" in values)


def _build(values: dict[str, Any], file: Path, has_code: bool) -> Any:
    """Build and check the transformers config. has_code: whether the folder has model code, for an error."""
    kind = values["model_type"]
    if not is_known_type(kind):
        code = ", and code that comes with a model is never run" if has_code else ""
        raise UnsupportedModel(
            f"{file}: {release()} knows no model_type {kind!r}{code}; give another model, or a newer transformers"
        )
    try:
        config = build_config(values, file.parent)
    # Each config class of transformers raises its own type of error.
    except Exception as error:
        message = " ".join(str(error).split())
        raise CheckpointError(f"{file}: transformers refuses it: {message}; correct the file") from error
    _check_numbers(config, file)
    _check_rope(getattr(config, "rope_parameters", None) or {}, file)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if slides and getattr(config, "sliding_window", None) is None:
        raise CheckpointError(
            f"{file}: layer_types has sliding_attention, but there is no sliding_window; add it to the file"
        )
    return config


def _instead(folder: Path) -> str:
    """Say what to give instead of a folder without config.json."""
    gguf_files = sorted(folder.glob("*.gguf"))
    if gguf_files:
        return f"to read its GGUF file, give {gguf_files[0]}"
    inner = sorted(file.parent for file in folder.glob(f"*/{CONFIG}"))
    return f"give {inner[0]}" if inner else "give the folder of a Hugging Face checkpoint, or a .gguf file"


def _check_numbers(config: Any, file: Path) -> None:
    """Raise `CheckpointError` for sizes that no model has; transformers checks their types."""
    for key, maximum in _MAXIMA.items():
        value = getattr(config, key, None)
        if value is not None and not 0 < value <= maximum:
            raise CheckpointError(
                f"{file}: {key} is {value}, and must be above 0 and at most {maximum}; write the value that the model "
                "was trained with"
            )


def _check_rope(parameters: dict[str, Any], file: Path) -> None:
    """Raise `CheckpointError` for rotary parameters that give no valid frequencies."""
    for key, value in parameters.items():
        where = f"{file}: rope_parameters has {key} = {value!r}"
        if isinstance(value, dict):
            _check_rope(value, file)
        elif key in ("rope_type", "type"):
            if not isinstance(value, str):
                raise CheckpointError(f"{where}; write the name of a rope type, for example default")
        elif isinstance(value, str) or (key == "rope_theta" and value is None):
            raise CheckpointError(f"{where}; write a number")
        elif isinstance(value, float | int) and not (math.isfinite(value) and (key not in _POSITIVE_ROPE or value > 0)):
            raise CheckpointError(f"{where}; write the number that the model was trained with")


def _dtypes(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the config's types under the same keys, as transformers accepts them; None keeps the weights' types."""
    return {key: _dtype(values[key], f"{file}: {key}") for key in _DTYPE_KEYS if key in values}


def _dtype(value: Any, where: str) -> str | None:
    if value is None or value == _AS_STORED:
        return None
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CheckpointError(
            f"{where} is {value!r}, no floating-point type of torch; write float32, bfloat16 or float16, or remove "
            "the key"
        )
    # Passes run in 16 or 32 bits only. bfloat16 holds every value of the 8-bit float types.
    if dtype.itemsize < 2:
        return "bfloat16"
    return "float32" if dtype == torch.float64 else str(dtype).removeprefix("torch.")
