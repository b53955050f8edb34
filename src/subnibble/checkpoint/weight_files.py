"""Which files of a Hugging Face folder hold the weights: those that transformers' `from_pretrained` reads.

In its order: what config.json names as `transformers_weights`, then `model.safetensors`, then the shards that
`model.safetensors.index.json` lists, with all that they hold. Other files are left alone, such as an index that an
earlier upload left, a second set of weights or the maker's own layout. An adapter is neither read nor passed over: the
folder is refused. Where no weights are found the error says what the folder has instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from subnibble.errors import CheckpointError
from subnibble.text_file import read_plain_json_file

# Shape and safetensors type.
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
    """A tensor as a header describes it. file: in the folder. name: in the file. kind: its safetensors type."""

    file: str
    name: str
    shape: tuple[int, ...]
    kind: str


def check_adapter(path: Path) -> None:
    """Raise `CheckpointError` if the folder holds a PEFT adapter, alone or beside the weights that it belongs to."""
    found = next((name for name in _ADAPTER if (path / name).is_file()), None)
    if found is None:
        return
    if (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} holds a PEFT adapter ({found}) that is not part of the weights beside it; merge it "
            "(merge_and_unload() in peft) and save the model, or move the adapter's files away to leave it out"
        )
    base = read_plain_json_file(path / _ADAPTER[0]).get("base_model_name_or_path") if found == _ADAPTER[0] else None
    raise CheckpointError(
        f"{path} is a PEFT adapter ({found}) and no model; merge it into its base model"
        f"{f' {base}' if base else ''} (merge_and_unload() in peft), save that, and give its folder"
    )


def find_weights(path: Path, named: str | None) -> dict[str, Stored]:
    """Name -> stored tensor, of all that `from_pretrained` would read in the folder. named: `transformers_weights`."""
    if named is not None:
        if Path(named).name != named or not named.endswith((_ENDING, _INDEX_ENDING)) or not (path / named).is_file():
            raise CheckpointError(
                f"{path / 'config.json'} names {named!r} as transformers_weights, which is no safetensors file or "
                f"index in this folder; take that key out to read {SINGLE} or {INDEX}"
            )
        return _from_index(path, named) if named.endswith(_INDEX_ENDING) else _from_files(path, [named])
    if (path / SINGLE).is_file():
        return _from_files(path, [SINGLE])
    if (path / INDEX).is_file():
        return _from_index(path, INDEX)
    raise CheckpointError(f"{path} has neither {SINGLE} nor {INDEX}; {_instead(path)}")


def read_headers(files: Iterable[Path]) -> dict[str, Header]:
    """Tensor name -> its header, of several files together."""
    return {name: header for file in files for name, header in read_header(file).items()}


def read_header(file: Path) -> dict[str, Header]:
    """Tensor name -> its header; a truncated file is found here."""
    try:
        with safe_open(file, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        check_pointer(file)
        if "unknown variant" in str(error):
            raise CheckpointError(
                f"{file}: it holds a type of numbers that the installed safetensors does not know ({error}); give the "
                "model in bfloat16, float16 or float32"
            ) from error
        raise CheckpointError(f"{file} is truncated or no safetensors file ({error}); fetch it again") from error


def check_pointer(file: Path) -> None:
    """Raise `CheckpointError` if a file is not there itself, but git-lfs's note of where it is."""
    try:
        with file.open("rb") as handle:
            is_pointer = handle.read(len(_POINTER)) == _POINTER
    except OSError:
        return
    if is_pointer:
        raise CheckpointError(f"{file} is a Git LFS pointer, the file itself was not fetched; run git lfs pull there")


def _from_index(path: Path, index: str) -> dict[str, Stored]:
    """All that the shards of an index hold; what it lists must be where it says, as shards may be of two uploads."""
    listed = read_plain_json_file(path / index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise CheckpointError(f"{path / index} is damaged: its weight_map maps no tensors to files; fetch it again")
    files = sorted(set(listed.values()))
    for file in files:
        if Path(file).name != file:
            raise CheckpointError(f"{path / index} names {file!r}, which is outside the folder")
        if not (path / file).is_file():
            others = [other.name for other in sorted(path.glob("*.safetensors")) if other.name not in files]
            raise CheckpointError(
                f"{path}: shard {file} is missing; "
                + (
                    f"{index} asks for it, and not for {others[0]} ({len(others)} such), so it may be of another "
                    "upload: give a folder with one model"
                    if others
                    else "fetch the model again"
                )
            )
    found = _from_files(path, files)
    for name, file in listed.items():
        if name not in found or found[name].file != file:
            where = f"{found[name].file} does" if name in found else "no other does"
            raise CheckpointError(
                f"{path / index} places {name} in {file}, which does not hold it ({where}); index and shards are not "
                "of one upload: fetch both again"
            )
    return found


def _from_files(path: Path, files: list[str]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for file in files:
        for name, (shape, kind) in read_header(path / file).items():
            if name in found:
                raise CheckpointError(
                    f"{path}: {name} is in {found[name].file} and in {file}; the shards are not of one upload"
                )
            found[name] = Stored(file, name, shape, kind)
    return found


def _instead(path: Path) -> str:
    """What a folder without weights holds, and what to do with it."""
    names = sorted(item.name for item in path.iterdir() if item.is_file())
    weights = [name for name in names if name.endswith(_ENDING)]
    variants = [name for name in weights if _VARIANT.match(name)]
    makers = [name for name in weights if name.startswith("consolidated")]
    parts = [name for name in weights if _PART.search(name) and name not in variants + makers]
    inner = sorted({item.parent for name in (SINGLE, INDEX) for item in path.glob(f"*/{name}")})
    if parts:
        return f"shards are there ({', '.join(parts[:2])}, ...) without their index: fetch {INDEX}, too"
    if variants:
        return f"it has a variant, {variants[0]}: take the variant out of the names of its files (and in its index)"
    if makers:
        return f"{makers[0]} has the maker's own layout: fetch the model's files for transformers, or convert it"
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
        return f"there are weights in a folder of it: give {inner[0]}"
    return "it has no weights at all: fetch them, or give the folder of a Hugging Face checkpoint"
