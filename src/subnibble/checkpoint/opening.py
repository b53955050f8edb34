"""Open a model, whatever it comes in: a folder, a `.gguf` file, or a repository of the hub."""

from __future__ import annotations

from pathlib import Path

from subnibble.checkpoint.gguf_source import GgufSource
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.checkpoint.side_files import SIDE_FILES, TEMPLATE_FOLDER
from subnibble.checkpoint.source import Source
from subnibble.errors import CheckpointError
from subnibble.given import given_path


def open_source(model: str | Path | Source, name: str = "model") -> Source:
    """Open a folder, a `.gguf` file or a hub id (downloaded when online); what is open already is given back.

    name: of the caller's argument, for what is none of these.
    """
    if isinstance(model, Source):
        return model
    path = given_path(model, name, "a model folder, a hub id or a .gguf file")
    if path.is_dir():
        return SafetensorsSource(path)
    if path.is_file():
        if path.suffix == ".gguf":
            return GgufSource(path)
        folder = f"its folder, {path.resolve().parent}" if path.suffix == ".safetensors" else "a model folder"
        raise CheckpointError(f"{path} is a file, but no .gguf file; give {folder}, a .gguf file or a hub id")
    if path.suffix == ".gguf" or path.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") != 1:
        raise CheckpointError(f"{model}: no such file or folder, and no hub id (those look like owner/name)")
    return SafetensorsSource(download(str(model)))


def download(repo_id: str) -> Path:
    """Fetch a model from the hub, safetensors and JSON files alone, and give the local folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.txt", *(name for name in SIDE_FILES if not name.endswith(".json"))]
    # The same weights once more, in their makers' own layouts or in another type, and adapters, which are not read.
    others = ["consolidated*", "model.*.safetensors", "adapter_model*", *_folders_but(TEMPLATE_FOLDER)]
    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns, ignore_patterns=others))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{repo_id}: no such folder here, and the hub did not give it ({type(error).__name__}); "
            "check the name and the connection, or pass a local folder or a .gguf file"
        ) from error


def _folders_but(kept: str) -> list[str]:
    """Patterns of files in any folder but `kept`: they have no other way to leave one out."""
    begun = (kept[:end] for end in range(len(kept)))
    differing = [f"{start}[!{following}]*/*" for start, following in zip(begun, kept, strict=True)]
    return [*differing, *(f"{kept[:end]}/*" for end in range(1, len(kept))), f"{kept}?*/*"]
