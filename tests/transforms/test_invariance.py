"""The site tables describe the models, and a wrong table is found out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer

from conftest import CONFIGS
from subnibble.arch.llama import LLAMA
from subnibble.arch.site import Arch, Heads, Site
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.errors import BadRecipe, UnsupportedModel
from subnibble.model.skeleton import Block, Skeleton
from subnibble.model.transformers_api.blocks import BlockCall
from subnibble.transforms import invariance, permute, scale
from subnibble.transforms.invariance import check_sites, edit_errors
from subnibble.transforms.permute import permute_site_
from subnibble.transforms.scale import scale_site_

FAULT = 1e-2
SAME = 1e-5


def block_of(folder: Path, arch: Arch | None = None) -> tuple[Block, dict[str, Any]]:
    skeleton = Skeleton(SafetensorsSource(folder), torch.float32, torch.device("cpu"))
    block = skeleton.load_block(0)
    return replace(block, arch=arch or block.arch), skeleton.block_calls(12)[0]


def with_site(arch: Arch, name: str, **changes: Any) -> Arch:
    sites = tuple(replace(site, **changes) if site.name == name else site for site in arch.sites)
    return replace(arch, sites=sites)


@pytest.mark.parametrize("model", CONFIGS)
def test_accepted_edits_leave_hidden_states_unchanged(model: str, folders: dict[str, Path]) -> None:
    block, call = block_of(folders[model])
    errors = list(edit_errors(block, call))
    assert len(errors) == 7
    assert max(error for error, _ in errors) < SAME, errors


WRONG_TABLES: dict[str, Callable[[Arch], Arch]] = {
    "gate scaled as a writer": lambda a: with_site(a, "mlp_hidden", writers=("mlp.gate_proj", "mlp.up_proj")),
    "gate does not follow": lambda a: with_site(a, "mlp_hidden", followers=()),
    "up missing among readers": lambda a: with_site(a, "mlp_in", readers=("mlp.gate_proj",)),
    "v missing among readers": lambda a: with_site(
        a, "attention_in", readers=("self_attn.q_proj", "self_attn.k_proj")
    ),
    "k written by the value site": lambda a: with_site(
        a, "attention_out", writers=("self_attn.k_proj",)
    ),
    "norms swapped": lambda a: with_site(a, "attention_in", norm="post_attention_layernorm"),
    "residual writer missing": lambda a: replace(a, residual=replace(a.residual, writers=("mlp.down_proj",))),
    "residual norm missing": lambda a: replace(a, residual=replace(a.residual, norms=("input_layernorm",))),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG_TABLES)
def test_planted_table_faults_move_hidden_states(fault: str, folders: dict[str, Path]) -> None:
    block, call = block_of(folders["llama"], WRONG_TABLES[fault](LLAMA))
    assert max(error for error, _ in edit_errors(block, call)) > FAULT


def test_plain_repeat_over_query_heads_moves_hidden_states(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, call = block_of(folders["llama"])

    def tiled(factors: Tensor, block: Block) -> Tensor:
        return factors.repeat(block.heads.repeats)

    monkeypatch.setattr(scale, "repeat_over_heads", tiled)
    assert max(error for error, _ in edit_errors(block, call)) > FAULT


@pytest.mark.parametrize("forgotten", ["writer", "follower"])
def test_forgotten_bias_moves_hidden_states(
    forgotten: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, call = block_of(folders["llama"])
    victim = block.linear("mlp.up_proj" if forgotten == "writer" else "mlp.gate_proj")
    rows = permute._permute_rows_

    def forgetful(linear: nn.Linear, order: Tensor) -> None:
        rows(linear, order)
        if linear.weight.shape == victim.weight.shape and linear.bias is not None:
            linear.bias.copy_(linear.bias[torch.argsort(order)])

    monkeypatch.setattr(permute, "_permute_rows_", forgetful)
    assert max(error for error, _ in edit_errors(block, call)) > FAULT


def test_gemma2_with_the_llama_table_is_refused() -> None:
    config = Gemma2Config(
        hidden_size=48, intermediate_size=80, num_attention_heads=6, num_key_value_heads=2, head_dim=16,
        num_hidden_layers=2, vocab_size=96, sliding_window=None,
    )  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    module = Gemma2DecoderLayer(config, 0).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            parameter.normal_(0, 0.3)
    block = Block(0, "model.layers.0", module, LLAMA, Heads.of(config))
    call = BlockCall({"position_embeddings": (torch.ones(1, 12, 16), torch.zeros(1, 12, 16)), "attention_mask": None})
    assert max(error for error, _ in edit_errors(block, call)) > FAULT


def test_check_at_load_names_the_edit_and_leaves_no_weights(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = Skeleton(SafetensorsSource(folders["llama"]), torch.float32, torch.device("cpu"))
    check_sites(skeleton)
    assert all(parameter.device.type == "meta" for parameter in skeleton.model.parameters())
    skeleton.arch = WRONG_TABLES["gate does not follow"](LLAMA)
    with pytest.raises(UnsupportedModel, match="permute mlp_hidden"):
        check_sites(skeleton)


def test_check_at_load_covers_two_blocks(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    indices: list[int] = []
    original = invariance.edit_errors

    def watched(block: Block, call: BlockCall, seed: int = 0) -> Any:
        indices.append(block.index)
        return original(block, call, seed)

    monkeypatch.setattr(invariance, "edit_errors", watched)
    check_sites(Skeleton(SafetensorsSource(folders["qwen2"]), torch.bfloat16, torch.device("cpu")))
    assert indices == [0, 1]


def test_edits_that_a_site_forbids_are_errors(folders: dict[str, Path]) -> None:
    block, _ = block_of(folders["llama"])
    norm_site: Site = block.arch.sites[0]
    with pytest.raises(BadRecipe, match="may not be permuted"):
        permute_site_(block, norm_site, torch.arange(48))
    with pytest.raises(BadRecipe, match="may not be scaled"):
        scale_site_(block, replace(norm_site, edits=frozenset()), torch.ones(48))
