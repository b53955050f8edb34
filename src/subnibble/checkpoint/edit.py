"""Change a packed checkpoint that is there already: the folder is replaced in one step, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from subnibble.checkpoint.checksums import CHECKSUMS, check_files, weights_checksum
from subnibble.checkpoint.config import CONFIG
from subnibble.checkpoint.manifest import PackedConfig, packed_config_of, stored_shapes
from subnibble.checkpoint.opening import open_source
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.checkpoint.size import measure
from subnibble.checkpoint.source import expect_shapes
from subnibble.checkpoint.weight_files import INDEX
from subnibble.checkpoint.writer import CheckpointWriter, contents
from subnibble.errors import CheckpointError, OutputError
from subnibble.given import given_path
from subnibble.model.transformers_api.marking import marked
from subnibble.model.verify import check_written
from subnibble.text_file import read_json_file

REPORT = "report.json"


def open_packed(folder: str | Path) -> tuple[SafetensorsSource, PackedConfig]:
    """The packed checkpoint in a folder on this machine; `CheckpointError` if it is none, or not whole."""
    if not given_path(folder, "folder", "a folder that subnibble quantize wrote").is_dir():
        raise CheckpointError(f"{folder} is no folder; give a checkpoint on this machine that subnibble quantize wrote")
    source = open_source(folder)
    packed = packed_config_of(source.config)
    if packed is None or not isinstance(source, SafetensorsSource):
        raise CheckpointError(
            f"{source.path} is no subnibble checkpoint; quantize the model first (--method none rounds no weight)"
        )
    expect_shapes(source, iter(stored_shapes(packed).items()))
    check_files(source.shards(), source.config.quantization_config)
    # Before the work that it is to tell of.
    read_report(source.path)
    return source, packed


def change_checkpoint(
    source: SafetensorsSource, packed: PackedConfig, tensors: Mapping[str, Tensor], told: Mapping[str, Any]
) -> None:
    """Give the checkpoint in `source` these tensors, in place of those of their names, and let its config say `packed`.

    Those that take a tensor's place get its type; new ones are a shard of their own. told: goes into report.json, if
    there is one, beside the new size and hash. recipe.toml and whatever else is in the folder stays as it is.
    """
    shards = source.shards()
    new = {name: tensor for name, tensor in tensors.items() if name not in set(source.names())}
    with CheckpointWriter(source.path, len(shards) + bool(new), replace=True) as writer:
        for names in shards.values():
            held = {name: source.load_raw(name) for name in names}
            writer.write_shard({name: tensors.get(name, part).to(part.dtype) for name, part in held.items()})
        if new:
            writer.write_shard(new)
        config = read_json_file(source.path / CONFIG)
        config["quantization_config"] = packed.to_dict() | {CHECKSUMS: writer.checksums}
        writer.write_json("config.json", marked(config))
        _copy_others(source, writer)
        writer.finish_weights()
        check_written(writer.folder)
        _write_report(source, writer, told)
        writer.commit()


def check_space(source: SafetensorsSource) -> None:
    """Raise `OutputError` if the checkpoint cannot be written anew beside itself: known before any work."""
    needed, free = source.file_bytes(), shutil.disk_usage(source.path).free
    if free < needed:
        raise OutputError(
            f"{source.path}: {free / 1e9:.2f} GB are free and {needed / 1e9:.2f} GB are needed to replace it; free "
            "space"
        )
    with CheckpointWriter(source.path, 1, replace=True):
        # Whether the folder beside it can be made.
        pass


def read_report(folder: Path) -> dict[str, Any]:
    """The folder's report.json, empty if there is none; `CheckpointError` if it is damaged."""
    file = folder / REPORT
    if not file.is_file():
        return {}
    again = "remove it, or quantize the model again"
    found = read_json_file(file, again)
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds no JSON object; {again}")
    return found


def _copy_others(source: SafetensorsSource, writer: CheckpointWriter) -> None:
    for item in contents(source.path):
        if item in source.shards() or item.name in ("config.json", INDEX, REPORT):
            continue
        copy = shutil.copytree if item.is_dir() else shutil.copy2
        copy(item, writer.folder / item.name)


def _write_report(source: SafetensorsSource, writer: CheckpointWriter, told: Mapping[str, Any]) -> None:
    report = read_report(source.path)
    if report:
        report["size"] = measure(open_source(writer.folder)).to_dict()
        report["weights_sha256"] = weights_checksum(writer.checksums)
        writer.write_json(REPORT, report | dict(told))
