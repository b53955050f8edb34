"""A transformers config of the values of a config.json, without the file being read once more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Switches of a run, and code that is never loaded: no part of a model, and none is passed on to a packed one.
NOT_OF_THE_MODEL = (
    "attn_implementation", "_attn_implementation", "auto_map", "output_attentions", "output_hidden_states",
    "return_dict", "use_cache",
)  # fmt: skip


def is_known_type(model_type: str) -> bool:
    """Whether transformers has a config of this model_type."""
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def build_config(values: dict[str, Any], folder: Path) -> Any:
    """As `AutoConfig.from_pretrained(folder)` with these values in its config.json; raises whatever transformers does.

    values: of a known model_type.
    """
    from transformers import CONFIG_MAPPING

    if values["model_type"] == "mistral" and values.get("layer_types"):
        # As AutoConfig has it: attention that differs between layers.
        values = {**values, "model_type": "ministral"}
    return CONFIG_MAPPING[values["model_type"]].from_dict(values, name_or_path=str(folder))
