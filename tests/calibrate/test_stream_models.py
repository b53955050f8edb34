"""Streaming a whole model block by block is the model's own forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import CONFIGS
from subnibble.calibrate.stream import BlockStream
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.model.skeleton import Skeleton


@pytest.mark.parametrize("name", CONFIGS)
def test_streamed_hidden_states_are_those_of_the_model(name: str, folders: dict[str, Path]) -> None:
    skeleton = Skeleton(SafetensorsSource(folders[name]), torch.float32, torch.device("cpu"))
    ids = torch.arange(60).view(3, 20) * 7 % 96
    model = AutoModelForCausalLM.from_pretrained(folders[name])
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states
        hidden = [model.get_input_embeddings()(ids[:2]), model.get_input_embeddings()(ids[2:])]
    calls = skeleton.block_calls(20)
    for index in range(skeleton.num_blocks):
        block = skeleton.load_block(index)
        stream = BlockStream(block, hidden, calls[index])
        for site in block.arch.sites:
            for _ in stream.at(site):
                pass
        stream.advance()
        skeleton.release(block.path)
        # the last of transformers' hidden states lies behind the final norm
        if index + 1 < skeleton.num_blocks:
            torch.testing.assert_close(torch.cat(hidden), expected[index + 1], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        last = model.get_submodule("model.norm")(torch.cat(hidden))
    torch.testing.assert_close(last, expected[-1], rtol=1e-5, atol=1e-5)


def test_a_lost_sliding_window_is_noticed(folders: dict[str, Path]) -> None:
    skeleton = Skeleton(SafetensorsSource(folders["mistral"]), torch.float32, torch.device("cpu"))
    mask = skeleton.block_calls(20)[0].mask
    block = skeleton.load_block(0)
    x = torch.randn(1, 20, 48, generator=torch.Generator().manual_seed(0))
    outputs = []
    for kept in (mask, None):
        hidden = [x]
        BlockStream(block, hidden, skeleton.block_calls(20)[0].with_mask(kept)).advance()
        outputs.append(hidden[0])
    assert float((outputs[0] - outputs[1]).abs().max()) > 1e-2
