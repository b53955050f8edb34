"""Values rotated head by head leave the function alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import CONFIGS
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.errors import BadRecipe
from subnibble.model.skeleton import Skeleton
from subnibble.model.transformers_api.blocks import run_block
from subnibble.tensor import hadamard
from subnibble.transforms.rotate_values import ValueRotation, make_value_rotation


@pytest.mark.parametrize("name", CONFIGS)
def test_a_block_keeps_its_function_and_its_values_are_rotated(name: str, folders: dict[str, Path]) -> None:
    skeleton = Skeleton(SafetensorsSource(folders[name]), torch.float32, torch.device("cpu"))
    block, call = skeleton.load_block(1), skeleton.block_calls(12)[1]
    hidden = torch.randn(1, 12, skeleton.config.hidden_size, generator=torch.Generator().manual_seed(0))
    rotation = make_value_rotation("hadamard", block.heads.width, seed=0)
    with torch.no_grad():
        before, values = run_block(block.module, hidden, call), block.linear("self_attn.v_proj")(hidden)
        rotation.edit_block_(block)
        after, rotated = run_block(block.module, hidden, call), block.linear("self_attn.v_proj")(hidden)
    assert float((after - before).norm() / (before - hidden).norm()) < 1e-5
    heads = values.unflatten(-1, (-1, block.heads.width))
    target = hadamard.multiply(heads, rotation.blocks) * rotation.signs.float()
    torch.testing.assert_close(rotated, target.flatten(-2), rtol=1e-5, atol=1e-4)
    assert float((rotated - values).norm() / values.norm()) > 0.5


def test_a_reader_that_is_left_out_changes_the_function(folders: dict[str, Path]) -> None:
    skeleton = Skeleton(SafetensorsSource(folders["llama"]), torch.float32, torch.device("cpu"))
    block, call = skeleton.load_block(1), skeleton.block_calls(12)[1]
    hidden = torch.randn(1, 12, skeleton.config.hidden_size, generator=torch.Generator().manual_seed(0))
    kept = block.linear("self_attn.o_proj").weight.clone()
    with torch.no_grad():
        before = run_block(block.module, hidden, call)
        make_value_rotation("hadamard", block.heads.width, seed=0).edit_block_(block)
        block.linear("self_attn.o_proj").weight.copy_(kept)
        after = run_block(block.module, hidden, call)
    assert float((after - before).norm() / (before - hidden).norm()) > 0.05


def test_an_online_transform_behind_it_mixes_heads_channels_again() -> None:
    """Without signs, Sylvester's matrix within heads and over all of them would cancel there."""
    width, heads = 16, 4
    seeded = make_value_rotation("hadamard", width, seed=0)
    unsigned = ValueRotation(seeded.blocks, torch.ones(width, dtype=torch.float64))
    one_channel = torch.zeros(1, heads * width, dtype=torch.float64)
    one_channel[0, 5] = 1

    def channels_reached(rotation: ValueRotation) -> int:
        mixed = hadamard.multiply(rotation.rotate_columns(one_channel), (heads * width,))
        return int((mixed.abs() > 1e-9).sum())

    assert channels_reached(unsigned) == heads
    assert channels_reached(seeded) > heads * width // 2


def test_names_and_seeds() -> None:
    assert make_value_rotation("none", 16, 0) is None
    with pytest.raises(BadRecipe, match="choose one of none, hadamard"):
        make_value_rotation("full", 16, 0)
    assert torch.equal(make_value_rotation("hadamard", 64, 3).signs, make_value_rotation("hadamard", 64, 3).signs)
    assert not torch.equal(make_value_rotation("hadamard", 64, 3).signs, make_value_rotation("hadamard", 64, 4).signs)
