"""Open a model from a folder, a `.gguf` file or a repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from subnibble.arguments import as_path
from subnibble.checkpoint.gguf_source import GgufSource
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.checkpoint.side_files import SIDE_FILES, TEMPLATE_FOLDER
from subnibble.checkpoint.source import Source
from subnibble.errors import CheckpointError
from subnibble.resume.commit import is_interrupted


def open_source(model: str | Path | Source, name: str = "model") -> Source:
    """Open a model as a `Source`.

    model: a folder, a `.gguf` file, a hub id (downloaded when online), or a `Source`, which is returned unchanged.
    name: the caller's name for this argument, for errors.
    Raises `BadArgument` if model is no path, `CheckpointError` if nothing can be opened there.
    """
    if isinstance(model, Source):
        return model
    path = as_path(model, name, "a model folder, a hub id or a .gguf file")
    if path.is_dir():
        if is_interrupted(path):
            raise CheckpointError(
                f"{path}: a run was killed while it moved the finished checkpoint there; repeat its command, which "
                "`subnibble list --runs` shows"
            )
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
    """Download a model from the hub and return the local folder.

    repo_id: owner/name.
    Only safetensors weights, JSON files, tokenizer files and chat templates are downloaded.
    Raises `CheckpointError` if the hub does not answer or has no such model.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.txt", *(name for name in SIDE_FILES if not name.endswith(".json"))]
    # Never read: the same weights in the maker's own layout or in another type, adapters, and other folders.
    ignored = ["consolidated*", "model.*.safetensors", "adapter_model*", *_folders_but(TEMPLATE_FOLDER)]
    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns, ignore_patterns=ignored))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{repo_id}: no such folder here, and the hub did not give it ({type(error).__name__}); "
            "check the name and the connection, or pass a local folder or a .gguf file"
        ) from error


def _folders_but(folder: str) -> list[str]:
    """Glob patterns for the files in every folder except `folder`: glob patterns have no negation of a whole name."""
    prefixes = (folder[:end] for end in range(len(folder)))
    differing = [f"{prefix}[!{following}]*/*" for prefix, following in zip(prefixes, folder, strict=True)]
    return [*differing, *(f"{folder[:end]}/*" for end in range(1, len(folder))), f"{folder}?*/*"]
