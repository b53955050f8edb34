"""A word in config.json without which transformers alone would load a packed checkpoint, with random linears.

Where no plug-in is registered for a `quant_method`, transformers logs a line, makes up the weights it does not find and
goes on. `transformers_weights` names the file to load in place of model.safetensors; one that is no name of such a file
is an error that shows it. So it says what to do, and the plug-in takes it away before files are looked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from subnibble.checkpoint.checksums import CHECKSUMS

_KEY = "transformers_weights"
WORD = "these weights are packed: `import subnibble` (pip install subnibble) before from_pretrained"


def marked(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json holds, with the word."""
    return {**config, _KEY: WORD}


def unmark_(config: Any) -> None:
    """Take the word out of a config that transformers has read; the name of a file stays."""
    if getattr(config, _KEY, None) == WORD:
        delattr(config, _KEY)


def complete_file(file: Path, checksums: Mapping[str, str]) -> None:
    """Put the word, and checksums of the weight files, into a config.json that transformers wrote."""
    found = json.loads(file.read_text(encoding="utf-8"))
    found["quantization_config"][CHECKSUMS] = dict(checksums)
    file.write_text(json.dumps(marked(found), indent=2) + "\n", encoding="utf-8")
