"""What the metadata of a GGUF file say of a model, as a transformers config.

Keys and defaults are llama.cpp's (gguf's `constants.py`). A key that is unknown here may change what the model
computes, so the file is refused by that key's name, unless its value is one that changes nothing. Sizes of the
tables, biases and a tied head are told by the tensors alone, and so are Llama 3's rotary frequencies: llama.cpp stores
what each is divided by.
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
# Values that change nothing; of other keys these are zero, false and nothing.
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
    """The metadata of a GGUF file, by key. fields: as gguf's reader has them."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path, self._fields = path, fields
        self.arch = str(self.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """A value, or `default` where the file has none."""
        return self._fields[key].contents() if key in self._fields else default

    def of_arch(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own, named without it."""
        return self.get(f"{self.arch}.{key}", default)

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0 of the architecture's own; where each block has one, they must be the same."""
        found = self.of_arch(key, default)
        values = set(found) if isinstance(found, list) else {found}
        value = values.pop() if len(values) == 1 else None
        if not isinstance(value, int | float) or value <= 0:
            told = "nothing" if found is None else str(found)[:60]
            raise CheckpointError(
                f"{self.path}: its metadata has {told} for {self.arch}.{key}, where one number above 0 is read here"
            )
        return value

    def tokens(self) -> int | None:
        """How many tokens the vocabulary has, None if there is none."""
        field = self._fields.get("tokenizer.ggml.tokens")
        return None if field is None else len(field.data)

    def own_keys(self) -> list[str]:
        """Keys of the architecture's own, without it."""
        return [key.removeprefix(f"{self.arch}.") for key in self._fields if key.startswith(f"{self.arch}.")]


def config_of(metadata: Metadata, tensors: Mapping[str, tuple[int, ...]], divisors: Sequence[float] | None) -> Any:
    """The transformers config of a GGUF model.

    tensors: name in the file -> shape. divisors: what each rotary frequency is divided by, of `rope_freqs.weight`.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedModel(f"{metadata.path} is a GGUF file of type {kind!r} and no model; give the model's file")
    try:
        return AutoConfig.for_model(metadata.arch, **_values(metadata, tensors, divisors))
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(f"{metadata.path}: no config can be made of its metadata ({error})") from error


def _values(
    metadata: Metadata, tensors: Mapping[str, tuple[int, ...]], divisors: Sequence[float] | None
) -> dict[str, Any]:
    """The config's values; see `config_of`."""
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
    if metadata.arch == "llama" or width * heads != hidden:
        values["head_dim"] = width
    return values


def _check_keys(metadata: Metadata) -> None:
    """Raise `UnsupportedModel` for metadata that may change what the model computes and are not understood."""
    window, context = metadata.of_arch("attention.sliding_window"), metadata.number("context_length")
    for key in metadata.own_keys():
        value = metadata.of_arch(key)
        is_wide = key == "attention.sliding_window" and isinstance(window, int) and window >= context
        is_neutral = value in _NEUTRAL[key] if key in _NEUTRAL else not value
        if key in _READ or is_neutral or is_wide:
            continue
        raise UnsupportedModel(
            f"{metadata.path}: its metadata has {metadata.arch}.{key} = {str(value)[:60]}, which may change what the "
            "model computes and is not understood here; use the original checkpoint instead of the GGUF file"
        )


def _head_width(metadata: Metadata, default: int) -> int:
    """Channels of a head, which all turn with the position."""
    width = int(metadata.number("attention.key_length", default))
    for key in ("attention.value_length", "rope.dimension_count"):
        if int(metadata.number(key, width)) != width:
            raise UnsupportedModel(
                f"{metadata.path}: {metadata.arch}.{key} is {metadata.of_arch(key)} where heads have {width} channels; "
                f"a {metadata.arch} model here has the same number"
            )
    return width
