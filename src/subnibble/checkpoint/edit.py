"""Change an existing packed checkpoint: the new files replace the folder's content in one step, all or none."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from subnibble.arguments import as_path
from subnibble.checkpoint.checksums import CHECKSUMS, check_files, weights_checksum
from subnibble.checkpoint.config import CONFIG
from subnibble.checkpoint.manifest import PackedConfig, packed_config_of, stored_shapes
from subnibble.checkpoint.opening import open_source
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.checkpoint.size import measure
from subnibble.checkpoint.source import expect_shapes
from subnibble.checkpoint.weight_files import INDEX
from subnibble.checkpoint.writer import CheckpointWriter
from subnibble.errors import CheckpointError, OutputError
from subnibble.model.transformers_api.marking import marked
from subnibble.model.verify import check_written
from subnibble.resume.commit import contents
from subnibble.resume.run import Run
from subnibble.text_file import read_json_file

REPORT = "report.json"


def open_packed(folder: str | Path) -> tuple[SafetensorsSource, PackedConfig]:
    """Open a packed checkpoint in a local folder and check that it is complete.

    If a run that changed the folder was killed while it put the new files in their place, that is finished first.

    Returns the source and its `PackedConfig`.
    Raises `CheckpointError` if the folder holds no packed checkpoint, or a damaged one.
    """
    if not as_path(folder, "folder", "a folder that subnibble quantize wrote").is_dir():
        raise CheckpointError(f"{folder} is no folder; give a local checkpoint that subnibble quantize wrote")
    Run.recover(as_path(folder, "folder", ""))
    source = open_source(folder)
    packed = packed_config_of(source.config)
    if packed is None or not isinstance(source, SafetensorsSource):
        raise CheckpointError(
            f"{source.path} is no subnibble checkpoint; quantize the model first (--method none rounds no weight)"
        )
    expect_shapes(source, iter(stored_shapes(packed).items()))
    check_files(source.shards(), source.config.quantization_config)
    # A damaged report is an error now, before the work whose results it will get.
    read_report(source.path)
    return source, packed


def change_checkpoint(
    source: SafetensorsSource,
    packed: PackedConfig,
    tensors: Mapping[str, Tensor],
    report_entries: Mapping[str, Any],
    run: Run,
) -> None:
    """Rewrite a packed checkpoint with these tensors replaced or added, and with `packed` as its config.

    source: the checkpoint, whose folder is replaced.
    packed: the new `quantization_config`.
    tensors: name -> tensor. One that replaces a stored tensor is cast to its type; new ones go to an additional shard.
    report_entries: added to report.json, if there is one, together with the new size and hash.
    run: the run on that folder, entered by the caller.
    recipe.toml and all other files in the folder are kept.
    """
    shards = source.shards()
    new = {name: tensor for name, tensor in tensors.items() if name not in set(source.names())}
    with CheckpointWriter(source.path, len(shards) + bool(new), replace=True, run=run) as writer:
        writer.continue_with([], {})
        for names in shards.values():
            stored = {name: source.load_raw(name) for name in names}
            writer.write_shard({name: tensors.get(name, old).to(old.dtype) for name, old in stored.items()})
        if new:
            writer.write_shard(new)
        config = read_json_file(source.path / CONFIG)
        config["quantization_config"] = packed.to_dict() | {CHECKSUMS: writer.checksums}
        writer.write_json("config.json", marked(config))
        _copy_others(source, writer)
        writer.finish_weights()
        check_written(writer.folder)
        _write_report(source, writer, report_entries)
        writer.commit()


def check_space(source: SafetensorsSource, run: Run, state: int = 0) -> None:
    """Raise `OutputError` if the disk has no space for a second copy of the checkpoint; called before any work.

    run: the run that will write it.
    state: further bytes that the run's journal needs.
    """
    needed, free = source.file_bytes() + state, shutil.disk_usage(run.folder).free + run.written
    if free < needed:
        raise OutputError(
            f"{source.path}: {free / 1e9:.2f} GB are free and {needed / 1e9:.2f} GB are needed to replace it; free "
            "space on that disk"
        )


def read_report(folder: Path) -> dict[str, Any]:
    """Read the folder's report.json; empty if there is none. Raises `CheckpointError` if it is damaged."""
    file = folder / REPORT
    if not file.is_file():
        return {}
    again = "remove it, or quantize the model again"
    report = read_json_file(file, again)
    if not isinstance(report, dict):
        raise CheckpointError(f"{file} holds no JSON object; {again}")
    return report


def _copy_others(source: SafetensorsSource, writer: CheckpointWriter) -> None:
    for item in contents(source.path):
        if item in source.shards() or item.name in ("config.json", INDEX, REPORT):
            continue
        copy = shutil.copytree if item.is_dir() else shutil.copy2
        copy(item, writer.folder / item.name)


def _write_report(source: SafetensorsSource, writer: CheckpointWriter, entries: Mapping[str, Any]) -> None:
    report = read_report(source.path)
    if report:
        report["size"] = measure(open_source(writer.folder)).to_dict()
        report["weights_sha256"] = weights_checksum(writer.checksums)
        writer.write_json(REPORT, report | dict(entries))
