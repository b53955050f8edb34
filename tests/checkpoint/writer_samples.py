"""Shards of a checkpoint, written as the pipeline writes them, and what a folder holds after."""

from __future__ import annotations

from pathlib import Path

import torch

from subnibble.checkpoint.writer import CheckpointWriter
from subnibble.resume.places import PARTIAL
from subnibble.resume.run import Run

CONFIG = {"model_type": "llama", "quantization_config": {"quant_method": "subnibble"}}
SHARDS = [
    {"a": torch.arange(6).view(2, 3), "b": torch.tensor([1.5, -2.0], dtype=torch.float16)},
    {"c": torch.zeros(0, 4)},
    {"d": torch.arange(12, dtype=torch.uint8).view(3, 4).T},
]


class Interrupted(Exception):
    """Stands for anything that goes wrong between two shards."""


def write(final: Path, shards: list[dict[str, torch.Tensor]], replace: bool = False, resume: str = "auto") -> None:
    """Write a checkpoint in a run that has recorded a step, so that it can be resumed."""
    with Run(final, "test", {"shards": len(shards)}, resume) as run:
        if run.is_committed:
            run.finish()
            return
        with CheckpointWriter(final, len(shards), replace, run) as writer:
            writer.continue_with([], {})
            for shard in shards:
                writer.write_shard(shard)
            writer.write_json("config.json", CONFIG)
            writer.finish_weights()
            run.journal.record({"all shards": None})
            writer.commit()


def content(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def bytes_by_name(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` that no writer hides."""
    return {name: text for name, text in content(folder).items() if PARTIAL not in name}


def hidden(folder: Path) -> Path:
    """The unfinished checkpoint that a run left behind in `folder`."""
    (work,) = (path for path in folder.iterdir() if path.name.endswith(PARTIAL))
    return work / "checkpoint"


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
