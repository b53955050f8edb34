"""Weight files are compared with the SHA-256 in config.json before their weights are loaded."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import subnibble
from subnibble.checkpoint.checksums import CHECKSUMS, check_files, weights_checksum
from subnibble.checkpoint.edit import open_packed
from subnibble.errors import CheckpointError
from subnibble.hf import load_model

SINGLE = "model.safetensors"


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def flipped(source: Path, folder: Path) -> Path:
    """A copy of which one bit of the last tensor's last number differs: still a number, still of its shape."""
    shutil.copytree(source, folder)
    file = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(bytes(content))
    return file


def test_what_is_written_has_the_checksum_of_each_weight_file(packed: dict[str, Path]) -> None:
    for folder in packed.values():
        files = sorted(folder.glob("*.safetensors"))
        sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        assert config_of(folder)["quantization_config"][CHECKSUMS] == sums
        report = json.loads((folder / "report.json").read_text())
        assert report["weights_sha256"] == weights_checksum(sums)


def test_one_bit_is_found_by_every_reader_and_can_be_let_pass(packed: dict[str, Path], tmp_path: Path) -> None:
    file = flipped(packed["llama"], tmp_path / "flipped")
    for reader in (load_model, AutoModelForCausalLM.from_pretrained, open_packed):
        with pytest.raises(CheckpointError, match=f"{file.name}: its SHA-256 is .*; fetch it again"):
            reader(file.parent)
    with subnibble.unverified():
        load_model(file.parent)
        AutoModelForCausalLM.from_pretrained(file.parent)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_model(file.parent)


def test_a_file_of_another_name_is_of_another_checkpoint(packed: dict[str, Path]) -> None:
    quantization = config_of(packed["llama"])["quantization_config"]
    check_files([packed["llama"] / name for name in quantization[CHECKSUMS]], quantization)
    with pytest.raises(CheckpointError, match="has no checksum of it"):
        check_files([packed["llama"] / "model-00009-of-00009.safetensors"], quantization)


@pytest.mark.parametrize("sums", [[], "abc", {SINGLE: 3}, {SINGLE: "12"}, {SINGLE: "Z" * 64}])
def test_a_damaged_table_of_checksums_is_refused(sums: object, packed: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(packed["llama"], tmp_path / "damaged")
    config = config_of(tmp_path / "damaged")
    config["quantization_config"][CHECKSUMS] = sums
    (tmp_path / "damaged" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no table of hexadecimal SHA-256"):
        load_model(tmp_path / "damaged")


def test_saved_models_carry_their_own_checksums(packed: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed["llama"])
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    sums = config_of(tmp_path / "saved")["quantization_config"][CHECKSUMS]
    assert len(sums) > 1
    assert sums != config_of(packed["llama"])["quantization_config"][CHECKSUMS]
    again = load_model(tmp_path / "saved")
    assert torch.equal(again.model.norm.weight, model.model.norm.weight)
    flipped(tmp_path / "saved", tmp_path / "flipped")
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_model(tmp_path / "flipped")


def test_a_checkpoint_without_checksums_loads(packed: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(packed["llama"], tmp_path / "bare")
    config = config_of(tmp_path / "bare")
    del config["quantization_config"][CHECKSUMS]
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    assert torch.equal(load_model(tmp_path / "bare").model.norm.weight, load_model(packed["llama"]).model.norm.weight)
