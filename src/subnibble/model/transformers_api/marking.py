"""A marker in config.json that stops transformers from loading a packed checkpoint without subnibble.

If no plug-in is registered for a `quant_method`, transformers only logs a line, initialises missing weights at random,
and goes on. The key `transformers_weights` names the file to load instead of model.safetensors; any other value is an
error that shows the value. So the marker is a value of this key that says what to do. The plug-in removes it before
transformers looks for files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from subnibble.checkpoint.checksums import CHECKSUMS

_KEY = "transformers_weights"
MARKER = "these weights are packed: `import subnibble` (pip install subnibble) before from_pretrained"


def marked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json with the marker added."""
    return {**config, _KEY: MARKER}


def unmark_(config: Any) -> None:
    """Remove the marker from a config that transformers has read; the name of a real file stays."""
    if getattr(config, _KEY, None) == MARKER:
        delattr(config, _KEY)


def complete_file(file: Path, checksums: Mapping[str, str]) -> None:
    """Add the marker and the checksums to a config.json that transformers wrote.

    file: the config.json, rewritten in place.
    checksums: name of a weight file -> SHA-256.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"][CHECKSUMS] = dict(checksums)
    file.write_text(json.dumps(marked(config), indent=2) + "\n", encoding="utf-8")
