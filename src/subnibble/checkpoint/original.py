"""Whether a model can be the one that a checkpoint was quantized from, as far as their configs tell."""

from __future__ import annotations

from subnibble.checkpoint.source import Source
from subnibble.errors import CheckpointError

# What two configs of one model agree in: its shape, and what else its function depends on.
_SAME = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters", "attention_bias", "mlp_bias",
    "sliding_window", "layer_types",
)  # fmt: skip


def check_original(original: Source, packed: Source) -> None:
    """Raise `CheckpointError` if `packed` cannot have been made of `original`."""
    for key in _SAME:
        theirs, ours = getattr(original.config, key, None), getattr(packed.config, key, None)
        if theirs != ours:
            raise CheckpointError(
                f"{original.path}: {key} is {theirs!r}, and {packed.path} has {ours!r}; give the model that it was "
                "quantized from"
            )
