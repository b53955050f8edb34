"""Find and open the files of a GGUF model: one file, or the parts written by llama.cpp's `llama-gguf-split`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from subnibble.checkpoint.weight_files import check_pointer
from subnibble.errors import CheckpointError, MissingExtra

_PART = re.compile(r"^(?P<stem>.*)-(?P<number>\d+)-of-(?P<count>\d+)\.gguf$")


def find_parts(path: Path) -> list[Path]:
    """Return all files of the model that `path` belongs to, in order; only `path` if its name is not that of a part.

    Raises `CheckpointError` if a part is missing.
    """
    match = _PART.match(path.name)
    if match is None:
        return [path]
    digits, count = len(match["count"]), int(match["count"])
    names = [f"{match['stem']}-{number:0{digits}d}-of-{match['count']}.gguf" for number in range(1, count + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path} is part of a model that was split into {count} files, and {missing[0]} ({len(missing)} in all) is "
            "missing; fetch all parts into one folder"
        )
    return [path.parent / name for name in names]


def read_parts(paths: list[Path]) -> list[Any]:
    """Open all files; return a `gguf.GGUFReader` for each.

    Raises `CheckpointError` unless the files are all parts of one model, in order; `MissingExtra` without gguf.
    """
    readers = [_read(path) for path in paths]
    counts = [_number(reader, "split.count", 1) for reader in readers]
    for index, (path, reader) in enumerate(zip(paths, readers, strict=True)):
        number = _number(reader, "split.no", index if counts[index] <= 1 else 0)
        if max(counts[index], 1) != len(paths) or number != index:
            raise CheckpointError(
                f"{path}: its metadata say that it is part {number + 1} of {counts[index]} of a split model, but its "
                "name does not; give the parts the names that llama-gguf-split gives, or merge them with it (--merge)"
            )
    stored, expected = sum(len(reader.tensors) for reader in readers), _number(readers[0], "split.tensors.count", None)
    if expected is not None and len(paths) > 1 and stored != expected:
        raise CheckpointError(
            f"{paths[0]}: its {len(paths)} parts hold {stored} of {expected} tensors, so they are of two models; fetch "
            "all parts of one model"
        )
    return readers


def _read(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtra("reading GGUF files needs the gguf package: pip install 'subnibble[gguf]'") from error
    try:
        return gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        check_pointer(path)
        raise CheckpointError(f"{path} is truncated or no GGUF file ({error}); fetch it again") from error


def _number(reader: Any, key: str, default: Any) -> Any:
    return int(reader.fields[key].contents()) if key in reader.fields else default
