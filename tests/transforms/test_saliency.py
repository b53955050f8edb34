"""Channel orders: what comes first, and which orders the linears before a site can carry out offline."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from conftest import CONFIGS
from subnibble.calibrate.stream import BlockStream, SiteStatistics
from subnibble.calibrate.survey import full_precision_blocks
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.errors import BadRecipe
from subnibble.model.skeleton import Block, Skeleton
from subnibble.model.transformers_api.blocks import run_block
from subnibble.tensor.scheme import Scheme
from subnibble.transforms.input_basis import InputBasis
from subnibble.transforms.residual_order import residual_order
from subnibble.transforms.saliency import PERMUTATIONS, Saliency, offline_rows


@pytest.fixture(params=CONFIGS)
def skeleton(request: pytest.FixtureRequest, folders: dict[str, object]) -> Skeleton:
    return Skeleton(SafetensorsSource(folders[request.param]), torch.float32, torch.device("cpu"))


def hidden_states(skeleton: Skeleton) -> Tensor:
    return torch.randn(4, 16, skeleton.config.hidden_size, generator=torch.Generator().manual_seed(0))


def statistics(skeleton: Skeleton, block: Block) -> SiteStatistics:
    call = skeleton.block_calls(16)[block.index]
    names = block.arch.linears
    stream = BlockStream(block, [hidden_states(skeleton)], call)
    return stream.statistics(dict.fromkeys(names, Scheme(3, 16)), dict.fromkeys(names))


def moved_by(skeleton: Skeleton, block: Block, edited: Block) -> float:
    hidden, call = hidden_states(skeleton), skeleton.block_calls(16)[block.index]
    with torch.no_grad():
        outputs = [run_block(part.module, hidden, call) for part in (block, edited)]
    before, after = (output[0] if isinstance(output, tuple) else output for output in outputs)
    return float((after - before).norm() / (before - hidden).norm())


def carry_out(block: Block, site_index: int, order: Tensor, rows: dict[str, Tensor]) -> Block:
    edited = Block(block.index, block.path, copy.deepcopy(block.module), block.arch, block.heads)
    for name, index in rows.items():
        linear = edited.linear(name)
        linear.weight.data = linear.weight.data[index]
        if linear.bias is not None:
            linear.bias.data = linear.bias.data[index]
    for name in block.arch.sites[site_index].readers:
        linear = edited.linear(name)
        linear.weight.data = linear.weight.data[:, order]
    return edited


@pytest.mark.parametrize("score", ["size", "energy"])
@pytest.mark.parametrize("permutation", PERMUTATIONS)
def test_every_order_is_a_permutation_and_starts_with_the_most_salient(
    score: str, permutation: str, skeleton: Skeleton
) -> None:
    block = skeleton.load_block(0)
    result = statistics(skeleton, block)
    for site in block.arch.sites:
        order = Saliency(score, permutation)(block, site, result)
        assert (order is None) == (permutation == "offline" and site.norm is not None)
        if order is None:
            continue
        assert torch.equal(order.sort().values, torch.arange(len(order)))
        if score == "size" and not (site.per_head and permutation == "offline"):
            assert bool((result.max_abs[site.name][order].diff() <= 0).all())


def test_the_residual_order_ranks_channels_by_their_size_before_norms(folders: dict[str, Path]) -> None:
    skeleton = Skeleton(SafetensorsSource(folders["llama"]), torch.float32, torch.device("cpu"))
    ids = torch.arange(64).view(4, 16) * 7 % 96
    model = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32)
    sizes: list[Tensor] = []
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(lambda module, args, y: sizes.append(y.flatten(0, 1).abs().amax(0).double()))
    with torch.no_grad():
        model(ids)
        hidden = [model.model.embed_tokens(ids)]
    scores = torch.stack([(size / size.median()).clamp(min=1e-3).log() for size in sizes]).mean(0)
    result = residual_order(full_precision_blocks(skeleton, hidden, skeleton.block_calls(16))).order
    assert torch.equal(result.sort().values, torch.arange(48))
    assert bool((scores[result].diff() <= 1e-5).all())


def test_orders_that_linears_write_are_carried_out_offline(skeleton: Skeleton) -> None:
    block = skeleton.load_block(1)
    result = statistics(skeleton, block)
    done = 0
    for index, site in enumerate(block.arch.sites):
        order = Saliency("size", "offline")(block, site, result)
        rows = None if order is None else offline_rows(site, order, block.heads)
        assert (rows is None) == (site.norm is not None)
        if rows is not None:
            assert moved_by(skeleton, block, carry_out(block, index, order, rows)) < 1e-5
            done += 1
    assert done == 2


def test_the_oracle_rejects_rows_that_stay_behind(skeleton: Skeleton) -> None:
    block = skeleton.load_block(1)
    result = statistics(skeleton, block)
    for index, site in enumerate(block.arch.sites):
        order = Saliency("size", "offline")(block, site, result)
        rows = None if order is None else offline_rows(site, order, block.heads)
        for name, order_of_rows in (rows or {}).items():
            if not torch.equal(order_of_rows, torch.arange(len(order_of_rows))):
                fewer = {other: value for other, value in rows.items() if other != name}
                assert moved_by(skeleton, block, carry_out(block, index, order, fewer)) > 1e-3, name


def test_an_order_across_heads_needs_a_gather(skeleton: Skeleton) -> None:
    block = skeleton.load_block(0)
    site = block.arch.sites[1]
    order = torch.arange(block.heads.query * block.heads.width)
    assert offline_rows(site, order, block.heads) is not None
    order[0], order[block.heads.width] = block.heads.width, 0
    assert offline_rows(site, order, block.heads) is None


def test_query_heads_that_share_a_value_must_be_moved_alike(folders: dict[str, object]) -> None:
    skeleton = Skeleton(SafetensorsSource(folders["llama"]), torch.float32, torch.device("cpu"))
    block = skeleton.load_block(0)
    order = torch.arange(block.heads.query * block.heads.width)
    order[0], order[1] = 1, 0
    assert offline_rows(block.arch.sites[1], order, block.heads) is None


def test_bad_words_name_the_choices() -> None:
    with pytest.raises(BadRecipe, match="choose one of size, energy"):
        Saliency("loud")
    with pytest.raises(BadRecipe, match="choose one of gather, offline"):
        Saliency("size", "half")


@pytest.mark.parametrize("blocks", [(), (40,), (8, 32)])
@pytest.mark.parametrize("ordered", [False, True])
def test_a_basis_leaves_products_and_undoes_itself(blocks: tuple[int, ...], ordered: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(40, generator=generator) if ordered else None
    basis = InputBasis(order, blocks)
    weight, x, y = (torch.randn(12, 40, generator=generator, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(basis.to_basis(x) @ basis.to_basis(weight).T, x @ weight.T)
    torch.testing.assert_close(basis.natural(basis.to_basis(weight)), weight)
    expected = basis.to_basis(y).T @ basis.to_basis(x)
    torch.testing.assert_close(basis.both_to_basis(y.T @ x), expected)
