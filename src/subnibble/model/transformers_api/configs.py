"""Build a transformers config from the values of a config.json, without reading the file again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Keys that are no property of a model: run-time switches, and names of code that is never loaded. A packed checkpoint
# does not inherit them.
NOT_OF_THE_MODEL = (
    "attn_implementation", "_attn_implementation", "auto_map", "output_attentions", "output_hidden_states",
    "return_dict", "use_cache",
)  # fmt: skip


def is_known_type(model_type: str) -> bool:
    """Whether transformers has a config class for this model_type."""
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def build_config(values: dict[str, Any], folder: Path) -> Any:
    """The config that `AutoConfig.from_pretrained` would return for these values; raises what transformers raises.

    values: content of config.json, with a known model_type.
    folder: folder of the checkpoint.
    """
    from transformers import CONFIG_MAPPING

    if values["model_type"] == "mistral" and values.get("layer_types"):
        # As in AutoConfig: Mistral models whose attention differs between layers are "ministral".
        values = {**values, "model_type": "ministral"}
    return CONFIG_MAPPING[values["model_type"]].from_dict(values, name_or_path=str(folder))
