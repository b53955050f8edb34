"""Find the files of a Hugging Face folder that hold the weights, as transformers' `from_pretrained` does.

The first of these that exists: the file that config.json names as `transformers_weights`; `model.safetensors`; the
shards that `model.safetensors.index.json` lists. Every tensor in a shard counts, even if the index does not list it.
Other files are ignored, such as an old index, a second set of weights or weights in the maker's own layout. A folder
with an adapter is refused, since ignoring the adapter would change the model. If there are no weights, the error says
what the folder has instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from subnibble.errors import CheckpointError
from subnibble.text_file import read_plain_json_file

# A tensor's shape and safetensors type, for example ((64, 64), "BF16").
Header = tuple[tuple[int, ...], str]
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_INDEX_ENDING, _ENDING = ".safetensors.index.json", ".safetensors"
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_PART = re.compile(r"-\d+-of-\d+\.safetensors$")
_VARIANT = re.compile(r"model(-\d+-of-\d+)?\.[^.]+(-\d+-of-\d+)?\.safetensors$")
_PICKLES = frozenset({".bin", ".pt", ".pth"})
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Stored:
    """A tensor, as the header of its safetensors file describes it.

    file: name of the file in the folder.
    name: name of the tensor in the file.
    kind: safetensors type, for example "BF16".
    """

    file: str
    name: str
    shape: tuple[int, ...]
    kind: str


def check_adapter(path: Path) -> None:
    """Raise `CheckpointError` if the folder holds a PEFT adapter, alone or beside the base model's weights."""
    adapter = next((name for name in _ADAPTER if (path / name).is_file()), None)
    if adapter is None:
        return
    if (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} holds a PEFT adapter ({adapter}) that is not merged into the weights beside it; merge it "
            "(merge_and_unload() in peft) and save the model, or move the adapter's files away to quantize without it"
        )
    base = read_plain_json_file(path / _ADAPTER[0]).get("base_model_name_or_path") if adapter == _ADAPTER[0] else None
    raise CheckpointError(
        f"{path} is a PEFT adapter ({adapter}) and no model; merge it into its base model"
        f"{f' {base}' if base else ''} (merge_and_unload() in peft), save the merged model, and give its folder"
    )


def find_weights(path: Path, named: str | None) -> dict[str, Stored]:
    """Find every tensor that `from_pretrained` would read from the folder.

    named: the file or index that config.json names as `transformers_weights`, or None.
    Returns tensor name -> where it is stored.
    """
    if named is not None:
        if Path(named).name != named or not named.endswith((_ENDING, _INDEX_ENDING)) or not (path / named).is_file():
            raise CheckpointError(
                f"{path / 'config.json'} names {named!r} as transformers_weights, which is no safetensors file or "
                f"index in this folder; remove that key to read {SINGLE} or {INDEX}"
            )
        return _from_index(path, named) if named.endswith(_INDEX_ENDING) else _from_files(path, [named])
    if (path / SINGLE).is_file():
        return _from_files(path, [SINGLE])
    if (path / INDEX).is_file():
        return _from_index(path, INDEX)
    raise CheckpointError(f"{path} has neither {SINGLE} nor {INDEX}; {_instead(path)}")


def read_headers(files: Iterable[Path]) -> dict[str, Header]:
    """Return tensor name -> header, for all tensors of several safetensors files."""
    return {name: header for file in files for name, header in read_header(file).items()}


def read_header(file: Path) -> dict[str, Header]:
    """Return tensor name -> header of one safetensors file; raise `CheckpointError` if the file is truncated."""
    try:
        with safe_open(file, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
            return {name: (tuple(tensor.get_shape()), tensor.get_dtype()) for name, tensor in slices.items()}
    except (SafetensorError, OSError) as error:
        check_pointer(file)
        if "unknown variant" in str(error):
            raise CheckpointError(
                f"{file} has a tensor type that the installed safetensors does not know ({error}); convert the model "
                "to bfloat16, float16 or float32"
            ) from error
        raise CheckpointError(f"{file} is truncated or no safetensors file ({error}); fetch it again") from error


def check_pointer(file: Path) -> None:
    """Raise `CheckpointError` if a file is a Git LFS pointer, which stands in for a file that was not downloaded."""
    try:
        with file.open("rb") as handle:
            is_pointer = handle.read(len(_POINTER)) == _POINTER
    except OSError:
        return
    if is_pointer:
        raise CheckpointError(f"{file} is a Git LFS pointer, not the file itself; run git lfs pull there")


def _from_index(path: Path, index: str) -> dict[str, Stored]:
    """Return all tensors in the shards that an index lists.

    Each listed tensor must be in the shard that the index names: otherwise the shards may come from two uploads.
    """
    listed = read_plain_json_file(path / index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise CheckpointError(f"{path / index} is damaged: its weight_map maps no tensor to a file; fetch it again")
    files = sorted(set(listed.values()))
    for file in files:
        if Path(file).name != file:
            raise CheckpointError(f"{path / index} names {file!r}, which is outside the folder; get an intact index")
        if not (path / file).is_file():
            others = [other.name for other in sorted(path.glob("*.safetensors")) if other.name not in files]
            raise CheckpointError(
                f"{path}: shard {file} is missing; "
                + (
                    f"{index} lists it, and does not list {others[0]} ({len(others)} such), so the index may be of "
                    "another upload: give a folder with one model"
                    if others
                    else "fetch the model again"
                )
            )
    tensors = _from_files(path, files)
    for name, file in listed.items():
        if name not in tensors or tensors[name].file != file:
            holder = f"{tensors[name].file} does" if name in tensors else "no other shard does"
            raise CheckpointError(
                f"{path / index} places {name} in {file}, which does not hold it ({holder}); index and shards are not "
                "of one upload: fetch both again"
            )
    return tensors


def _from_files(path: Path, files: list[str]) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, (shape, kind) in read_header(path / file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{path}: {name} is in {tensors[name].file} and in {file}; the shards are not of one upload: "
                    "fetch the model again"
                )
            tensors[name] = Stored(file, name, shape, kind)
    return tensors


def _instead(path: Path) -> str:
    """Say what a folder without weights holds instead, and what to do with it."""
    names = sorted(item.name for item in path.iterdir() if item.is_file())
    weights = [name for name in names if name.endswith(_ENDING)]
    variants = [name for name in weights if _VARIANT.match(name)]
    makers = [name for name in weights if name.startswith("consolidated")]
    parts = [name for name in weights if _PART.search(name) and name not in variants + makers]
    inner = sorted({item.parent for name in (SINGLE, INDEX) for item in path.glob(f"*/{name}")})
    if parts:
        return f"it has shards ({', '.join(parts[:2])}, ...) without their index: fetch {INDEX}, too"
    if variants:
        return f"it has a variant, {variants[0]}: remove the variant from the file names (and from its index)"
    if makers:
        return f"{makers[0]} has the maker's own layout: fetch the files for transformers, or convert it"
    if weights:
        return f"if {weights[0]} holds the model, rename it to {SINGLE}"
    if files := [name for name in names if name.endswith(".gguf")]:
        return f"to read its GGUF file, give {path / files[0]}"
    if pickles := [name for name in names if Path(name).suffix in _PICKLES]:
        return (
            f"it has only pickle weights ({pickles[0]}), which can run code when loaded and are never read; convert "
            "them to safetensors with transformers' save_pretrained"
        )
    if inner:
        return f"a folder inside it has weights: give {inner[0]}"
    return "it has no weights at all: fetch them, or give the folder of a Hugging Face checkpoint"
