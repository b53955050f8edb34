"""Change a packed checkpoint that is there already: the folder is replaced in one step, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from subnibble.checkpoint.packed import PackedConfig, packed_config_of
from subnibble.checkpoint.safetensors_source import INDEX, read_header
from subnibble.checkpoint.size import measure, weights_hash
from subnibble.checkpoint.source import Source, open_source
from subnibble.checkpoint.writer import CheckpointWriter
from subnibble.errors import CheckpointError


def open_packed(folder: str | Path) -> tuple[Source, PackedConfig]:
    """The packed checkpoint in a folder on this machine; `CheckpointError` if it is none."""
    if not Path(folder).is_dir():
        raise CheckpointError(f"{folder} is no folder; give a checkpoint on this machine that subnibble quantize wrote")
    source = open_source(folder)
    packed = packed_config_of(source.config)
    if packed is None:
        raise CheckpointError(
            f"{source.path} is no subnibble checkpoint; quantize the model first (--method none keeps its weights)"
        )
    return source, packed


def change_checkpoint(
    source: Source, packed: PackedConfig, tensors: Mapping[str, Tensor], told: Mapping[str, Any]
) -> None:
    """Give the checkpoint in `source` these tensors, in place of those of their names, and let its config say `packed`.

    Those that take a tensor's place get its type; new ones are a shard of their own. told: goes into report.json, if
    there is one, beside the new size and hash. recipe.toml and whatever else is in the folder stays as it is.
    """
    files = [file for file in sorted(source.path.glob("*.safetensors")) if _holds_weights(file, source)]
    new = {name: tensor for name, tensor in tensors.items() if name not in set(source.names())}
    with CheckpointWriter(source.path, len(files) + bool(new), replace=True) as writer:
        for file in files:
            held = load_file(file)
            writer.write_shard({name: tensors.get(name, part).to(part.dtype) for name, part in held.items()})
        if new:
            writer.write_shard(new)
        config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = packed.to_dict()
        writer.write_json("config.json", config)
        writer.finish_weights()
        _copy_others(source, writer, told)
        writer.commit()


def _holds_weights(file: Path, source: Source) -> bool:
    return file.suffix == ".safetensors" and bool(set(source.names()) & set(read_header(file)))


def _copy_others(source: Source, writer: CheckpointWriter, told: Mapping[str, Any]) -> None:
    report = source.path / "report.json"
    for item in source.path.iterdir():
        if _holds_weights(item, source) or item.name in ("config.json", INDEX, report.name):
            continue
        copy = shutil.copytree if item.is_dir() else shutil.copy2
        copy(item, writer.folder / item.name)
    if report.is_file():
        values = json.loads(report.read_text(encoding="utf-8"))
        values["size"] = measure(open_source(writer.folder)).to_dict()
        values["weights_sha256"] = weights_hash(writer.folder)
        writer.write_json("report.json", values | dict(told))
