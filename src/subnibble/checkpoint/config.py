"""Read a model folder's config.json: what a user's file says, checked before transformers builds anything of it."""

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
# Names of the type of weights; the second is from before transformers 5.
_DTYPE_KEYS = ("dtype", "torch_dtype")
# Means that the weights' own types hold.
_AS_STORED = "auto"
# Entries of rope_parameters that divide or are divided by.
_POSITIVE_ROPE = ("rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor")
# Sizes that must be positive, and bounds that no model comes near: building one of such a size would fill the memory.
_MOST = {
    "vocab_size": 10**8, "hidden_size": 10**7, "intermediate_size": 10**8, "num_hidden_layers": 10**4,
    "num_attention_heads": 10**5, "num_key_value_heads": 10**5, "head_dim": 10**6, "sliding_window": 10**12,
    "max_position_embeddings": 10**12, "rms_norm_eps": 1,
}  # fmt: skip


def read_config(folder: Path) -> Any:
    """The transformers config of a folder; `CheckpointError` names the file, what is wrong, and what to do."""
    file = folder / CONFIG
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}; {_instead(folder)}")
    values = read_json_file(file)
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise CheckpointError(f"{file} names no model_type; it is no transformers config")
    if not isinstance(values.get("quantization_config"), dict | None):
        raise CheckpointError(f"{file}: its quantization_config is no table; take it out, or give the original model")
    if (folder / GENERATION_CONFIG).is_file():
        # transformers passes over one that it cannot read, and generation would end elsewhere.
        read_plain_json_file(folder / GENERATION_CONFIG)
    kept = {key: value for key, value in values.items() if key not in NOT_OF_THE_MODEL}
    return _build({**kept, **_dtypes(values, file)}, file, "auto_map" in values)


def _build(values: dict[str, Any], file: Path, has_code: bool) -> Any:
    """has_code: whether the folder has a model class of its own, for an error."""
    kind = values["model_type"]
    if not is_known_type(kind):
        own = ", and code that comes with a model is never run" if has_code else ""
        raise UnsupportedModel(
            f"{file}: {release()} knows no model_type {kind!r}{own}; give another model, or a newer transformers"
        )
    try:
        config = build_config(values, file.parent)
    # Each of its classes checks in its own way.
    except Exception as error:
        said = " ".join(str(error).split())
        raise CheckpointError(f"{file}: transformers refuses it: {said}; mend it there") from error
    _check_numbers(config, file)
    _check_rope(getattr(config, "rope_parameters", None) or {}, file)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if slides and getattr(config, "sliding_window", None) is None:
        raise CheckpointError(
            f"{file}: layer_types has sliding_attention, and there is no sliding_window; add it there"
        )
    return config


def _instead(folder: Path) -> str:
    """What to give instead of a folder without config.json."""
    found = sorted(folder.glob("*.gguf"))
    if found:
        return f"to read its GGUF file, give {found[0]}"
    inner = sorted(file.parent for file in folder.glob(f"*/{CONFIG}"))
    return f"give {inner[0]}" if inner else "give the folder of a Hugging Face checkpoint, or a .gguf file"


def _check_numbers(config: Any, file: Path) -> None:
    """Raise `CheckpointError` for sizes that no model has; their types are checked by transformers."""
    for key, most in _MOST.items():
        value = getattr(config, key, None)
        if value is not None and not 0 < value <= most:
            raise CheckpointError(
                f"{file}: {key} is {value}, and must be above 0 and at most {most}; write there what the model was "
                "trained with"
            )


def _check_rope(parameters: dict[str, Any], file: Path) -> None:
    """Raise `CheckpointError` for rotary parameters of which no frequencies can be computed."""
    for key, value in parameters.items():
        where = f"{file}: rope_parameters has {key} = {value!r}"
        if isinstance(value, dict):
            _check_rope(value, file)
        elif key in ("rope_type", "type"):
            if not isinstance(value, str):
                raise CheckpointError(f"{where}; write the name of a type there, for example default")
        elif isinstance(value, str) or (key == "rope_theta" and value is None):
            raise CheckpointError(f"{where}; write a number there")
        elif isinstance(value, float | int) and not (math.isfinite(value) and (key not in _POSITIVE_ROPE or value > 0)):
            raise CheckpointError(f"{where}; write the number there that the model was trained with")


def _dtypes(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """The types that the config names, as transformers takes them: None for those of the weights."""
    return {key: _dtype(values[key], f"{file}: {key}") for key in _DTYPE_KEYS if key in values}


def _dtype(word: Any, where: str) -> str | None:
    if word is None or word == _AS_STORED:
        return None
    found = getattr(torch, word.removeprefix("torch."), None) if isinstance(word, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CheckpointError(
            f"{where} is {word!r}, no floating-point type of torch; write float32, bfloat16 or float16 there, or take "
            "it out"
        )
    # Nothing computes in narrower types, of which bfloat16 has all numbers with 8 bits, or in wider ones.
    if found.itemsize < 2:
        return "bfloat16"
    return "float32" if found == torch.float64 else str(found).removeprefix("torch.")
