"""What was written must load: a writer's fault is found before the folder gets its name, with nothing kept."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spoiled_checkpoint import spoiled_copy
from subnibble import Recipe, distill_checkpoint, quantize
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.checkpoint.writer import CheckpointWriter, Shard
from subnibble.errors import NotLoadable
from subnibble.generate.prefix import add_prefix
from subnibble.hf import load_model
from subnibble.model.verify import check_written

NAME = "model.layers.1.mlp.up_proj.scales"
Fault = Callable[[dict[str, Tensor]], None]
FAULTS: dict[str, tuple[Fault, str]] = {
    "missing": (lambda shard: shard.pop(NAME), f"tensor {NAME} is missing"),
    "another shape": (lambda shard: shard.update({NAME: shard[NAME][1:]}), f"{NAME} is F16 of shape (79, "),
    "another type": (lambda shard: shard.update({NAME: shard[NAME].float()}), f"{NAME} is F32 of shape"),
    "not finite": (lambda shard: shard[NAME].view(-1)[3:4].fill_(torch.inf), f"{NAME} is not finite"),
    "one too many": (lambda shard: shard.update({f"{NAME}_9": shard[NAME].clone()}), f"tensor {NAME}_9 has no place"),
}


def plant(fault: Fault, patch: pytest.MonkeyPatch) -> None:
    """Let the writer spoil the shard that holds `NAME`."""
    write = CheckpointWriter.write_shard

    def spoiling(self: CheckpointWriter, tensors: dict[str, Tensor]) -> Shard:
        shard = {name: tensor.clone() for name, tensor in tensors.items()}
        if NAME in shard:
            fault(shard)
        return write(self, shard)

    patch.setattr(CheckpointWriter, "write_shard", spoiling)


def recipe(tokens: Path, **values: object) -> Recipe:
    return Recipe(
        "rtn", 4, 16, calibration=str(tokens), num_windows=2, window=32, device="cpu", embedding_bits=8, **values
    )


@pytest.mark.parametrize("how", FAULTS)
def test_a_run_whose_checkpoint_would_not_load_is_a_fault_of_ours_and_leaves_nothing(
    how: str, folders: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault, message = FAULTS[how]
    plant(fault, monkeypatch)
    with pytest.raises(NotLoadable, match=re.escape(f"would not load, so nothing was kept: {message}")):
        quantize(folders["llama"], tmp_path / "out", recipe(token_file))
    assert list(tmp_path.iterdir()) == []


def test_scales_of_a_type_that_the_config_does_not_say_are_found(
    folders: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(lambda shard: shard.update({NAME: shard[NAME].half()}), monkeypatch)
    with pytest.raises(NotLoadable, match=re.escape(f"{NAME} is F16 of shape (80, 3), but config.json asks for")):
        quantize(folders["llama"], tmp_path / "out", recipe(token_file, scale_type="float32"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["prefix", "distill"])
def test_a_changed_checkpoint_that_would_not_load_leaves_the_old_one(
    step: str, folders: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    quantize(folders["llama"], out, recipe(token_file))
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    plant(FAULTS["another type"][0], monkeypatch)
    steps = {
        "prefix": lambda: add_prefix(out, "w1 w2", device="cpu"),
        "distill": lambda: distill_checkpoint(out, folders["llama"], recipe(token_file, distill_steps=1)),
    }
    with pytest.raises(NotLoadable, match="would not load"):
        steps[step]()
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_distillation_rewrites_is_checked_too(
    folders: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite = CheckpointWriter.rewrite

    def spoiling(self: CheckpointWriter, tensors: dict[str, Tensor], on_checksum: Callable[[str, str], None]) -> None:
        rewrite(self, {**tensors, NAME: torch.full_like(tensors[NAME], torch.nan)}, on_checksum)

    monkeypatch.setattr(CheckpointWriter, "rewrite", spoiling)
    with pytest.raises(NotLoadable, match=re.escape(f"{NAME} is not finite")):
        quantize(folders["llama"], tmp_path / "out", recipe(token_file, distill_steps=1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [NAME, "model.embed_tokens.zeros", "model.layers.0.self_attn.q_proj.codes"])
@pytest.mark.parametrize("how", ["missing", "misshapen", "another type", "one too many"])
def test_writing_refuses_what_loading_refuses(how: str, name: str, packed: dict[str, Path], tmp_path: Path) -> None:
    check_written(packed["llama"])
    folder = spoiled_copy(packed["llama"], tmp_path / "spoiled", name, how)
    with pytest.raises(NotLoadable, match=re.escape(name)):
        check_written(folder)
    with pytest.raises(Exception, match=re.escape(name)):
        load_model(folder)


def test_a_parameter_that_is_not_packed_must_be_finite_where_it_is_written(
    packed: dict[str, Path], tmp_path: Path
) -> None:
    name = "model.layers.1.input_layernorm.weight"
    folder = spoiled_copy(packed["llama"], tmp_path / "spoiled", name, "not finite")
    with pytest.raises(NotLoadable, match=re.escape(f"{name} is not finite")):
        check_written(folder)


def test_one_tensor_at_a_time_is_read(packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    load = SafetensorsSource.load_raw

    def noted(self: SafetensorsSource, name: str) -> Tensor:
        read.append(name)
        return load(self, name)

    monkeypatch.setattr(SafetensorsSource, "load_raw", noted)
    check_written(packed["llama"])
    assert sorted(read) == sorted(SafetensorsSource(packed["llama"]).names())
