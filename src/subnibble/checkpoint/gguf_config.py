"""Translate the metadata of a GGUF file into a transformers config.

Keys and defaults are llama.cpp's (gguf's `constants.py`). An unknown key may change what the model computes, so the
file is refused and the error names the key, unless the value is known to change nothing. Some facts come only from the
tensors: the size of the token table, biases, a tied head, and Llama 3's rotary scaling, for which llama.cpp stores the
divisor of each frequency.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from subnibble.checkpoint.gguf_rope import rope_parameters
from subnibble.errors import CheckpointError, UnsupportedModel
from subnibble.model.transformers_api.empty import architecture_name

_READ = frozenset({
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "rope.scaling.finetuned", "rope.scaling.yarn_ext_factor",
})  # fmt: skip
# Values that do not change the model's function. For all other keys: zero, false or empty.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "tensor_data_layout": ("Meta AI original pth",),
}
_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


class Metadata:
    """The metadata of a GGUF file.

    path: the file, for errors.
    fields: key -> field, from `gguf.GGUFReader`.
    """

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path, self._fields = path, fields
        self.arch = str(self.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or `default` if the file has no such key."""
        return self._fields[key].contents() if key in self._fields else default

    def of_arch(self, key: str, default: Any = None) -> Any:
        """Return the value of an architecture key. key: without the prefix, for example "context_length"."""
        return self.get(f"{self.arch}.{key}", default)

    def number(self, key: str, default: float | None = None) -> float:
        """Return the number of an architecture key.

        key: without the architecture prefix. A list of equal numbers, one per block, counts as one number.
        default: for a missing key.
        Raises `CheckpointError` unless the number is above 0.
        """
        entry = self.of_arch(key, default)
        values = set(entry) if isinstance(entry, list) else {entry}
        value = values.pop() if len(values) == 1 else None
        if not isinstance(value, int | float) or value <= 0:
            shown = "nothing" if entry is None else str(entry)[:60]
            raise CheckpointError(
                f"{self.path}: its metadata has {shown} for {self.arch}.{key}, but subnibble needs one number above 0; "
                "use the original checkpoint instead of the GGUF file"
            )
        return value

    def tokens(self) -> int | None:
        """Return the number of tokens in the vocabulary, or None if the file has no vocabulary."""
        field = self._fields.get("tokenizer.ggml.tokens")
        return None if field is None else len(field.data)

    def arch_keys(self) -> list[str]:
        """Return the keys that start with the architecture's prefix, without that prefix."""
        return [key.removeprefix(f"{self.arch}.") for key in self._fields if key.startswith(f"{self.arch}.")]


def config_of(metadata: Metadata, tensors: Mapping[str, tuple[int, ...]], divisors: Sequence[float] | None) -> Any:
    """Build the transformers config of a GGUF model.

    metadata: of the file, or of the first part of a split model.
    tensors: name in the file -> shape.
    divisors: one per rotary frequency, from `rope_freqs.weight`; None if the file has none.
    Raises `UnsupportedModel` for metadata that transformers cannot express, `CheckpointError` for invalid metadata.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedModel(f"{metadata.path} is a GGUF file of type {kind!r}, not a model; give the model's file")
    try:
        return AutoConfig.for_model(metadata.arch, **_values(metadata, tensors, divisors))
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(f"{metadata.path}: bad metadata ({error}); use the original checkpoint") from error


def _values(
    metadata: Metadata, tensors: Mapping[str, tuple[int, ...]], divisors: Sequence[float] | None
) -> dict[str, Any]:
    """Return the values of the config, by transformers' keys; arguments as in `config_of`."""
    _check_keys(metadata)
    heads, hidden = int(metadata.number("attention.head_count")), int(metadata.number("embedding_length"))
    width = _head_width(metadata, hidden // heads)
    context, table = int(metadata.number("context_length")), tensors.get("token_embd.weight", (0,))
    values = {
        "hidden_size": hidden,
        "num_hidden_layers": int(metadata.number("block_count")),
        "intermediate_size": int(metadata.number("feed_forward_length")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(metadata.number("attention.head_count_kv", heads)),
        "max_position_embeddings": context,
        "rms_norm_eps": float(metadata.number("attention.layer_norm_rms_epsilon")),
        "rope_parameters": rope_parameters(metadata, width, context, divisors),
        "vocab_size": int(metadata.of_arch("vocab_size") or metadata.tokens() or table[0]),
        "tie_word_embeddings": "output.weight" not in tensors,
        **{key: metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in _IDS.items()},
        "architectures": [architecture_name(metadata.arch)],
        "dtype": torch.float32,
    }
    if metadata.arch == "llama":
        values["attention_bias"] = "blk.0.attn_q.bias" in tensors
        values["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    if metadata.arch in ("llama", "qwen3") or width * heads != hidden:
        values["head_dim"] = width
    return values


def _check_keys(metadata: Metadata) -> None:
    """Raise `UnsupportedModel` for a key that is unknown and may change what the model computes."""
    window, context = metadata.of_arch("attention.sliding_window"), metadata.number("context_length")
    for key in metadata.arch_keys():
        value = metadata.of_arch(key)
        is_wide = key == "attention.sliding_window" and isinstance(window, int) and window >= context
        is_neutral = value in _NEUTRAL[key] if key in _NEUTRAL else not value
        if key in _READ or is_neutral or is_wide:
            continue
        raise UnsupportedModel(
            f"{metadata.path}: its metadata has {metadata.arch}.{key} = {str(value)[:60]}, which may change what the "
            "model computes and is unknown to subnibble; use the original checkpoint instead of the GGUF file"
        )


def _head_width(metadata: Metadata, default: int) -> int:
    """Return the channels of a head; keys, values and rotary positions must all have this width."""
    width = int(metadata.number("attention.key_length", default))
    for key in ("attention.value_length", "rope.dimension_count"):
        if int(metadata.number(key, width)) != width:
            raise UnsupportedModel(
                f"{metadata.path}: {metadata.arch}.{key} is {metadata.of_arch(key)}, but heads have {width} channels; "
                f"subnibble supports {metadata.arch} models only if both are equal"
            )
    return width
