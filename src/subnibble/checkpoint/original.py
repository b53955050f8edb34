"""Check by their configs whether a model can be the original of a packed checkpoint."""

from __future__ import annotations

from subnibble.checkpoint.source import Source
from subnibble.errors import CheckpointError

# Config keys that a model and its packed checkpoint share: shapes, and all else that the model's function depends on.
_SAME = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters", "attention_bias", "mlp_bias",
    "sliding_window", "layer_types",
)  # fmt: skip


def check_original(original: Source, packed: Source) -> None:
    """Raise `CheckpointError` if `packed` cannot have been quantized from `original`."""
    for key in _SAME:
        original_value, packed_value = getattr(original.config, key, None), getattr(packed.config, key, None)
        if original_value != packed_value:
            raise CheckpointError(
                f"{original.path}: {key} is {original_value!r}, and {packed.path} has {packed_value!r}; give the "
                "model that it was quantized from"
            )
