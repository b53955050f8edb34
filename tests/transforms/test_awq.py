"""Activation-aware scaling leaves the function alone and picks, of its factors, those of the least output error."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import CONFIGS
from subnibble.arch.site import Site
from subnibble.calibrate.stream import BlockStream, SiteStatistics
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.errors import NumericalFailure
from subnibble.model.skeleton import Block, Skeleton
from subnibble.model.transformers_api.blocks import BlockCall
from subnibble.rounding import grid
from subnibble.tensor.packed import PackedRange
from subnibble.tensor.scheme import Scheme
from subnibble.transforms import awq
from subnibble.transforms.awq import ActivationAwareScale
from subnibble.transforms.scale import scale_site_

TOKENS = 24
SAME, FAULT = 1e-5, 1e-2
W3 = Scheme(3, 16)


def loaded(folder: Path) -> tuple[Block, list[Tensor], dict[str, Any]]:
    """A block, two batches of hidden states with some large channels, and the block's call."""
    skeleton = Skeleton(SafetensorsSource(folder), torch.float32, torch.device("cpu"))
    hidden = torch.randn(4, TOKENS, skeleton.config.hidden_size, generator=torch.Generator().manual_seed(2))
    hidden[..., 7] *= -20
    hidden[..., 30] *= 5
    return skeleton.load_block(1), [hidden[:3], hidden[3:]], skeleton.block_calls(TOKENS)[1]


def copy_of(block: Block) -> Block:
    return replace(block, module=copy.deepcopy(block.module))


def schemes(block: Block, **changes: Scheme | None) -> dict[str, Scheme | None]:
    """3 bits for every linear but those that are named by the last part of their path."""
    return {name: changes.get(name.rpartition(".")[2], W3) for name in block.arch.linears}


def statistics(
    block: Block, hidden: list[Tensor], call: BlockCall, result: Mapping[str, Scheme | None]
) -> SiteStatistics:
    return BlockStream(block, list(hidden), call).statistics(result)


def output(block: Block, hidden: list[Tensor], call: BlockCall) -> Tensor:
    return torch.cat(list(BlockStream(block, list(hidden), call).outputs()))


def relative_change(block: Block, edited: Block, hidden: list[Tensor], call: BlockCall) -> float:
    """The most that any token's update changes, relative to it."""
    before, after = output(block, hidden, call), output(edited, hidden, call)
    return float(((after - before).norm(dim=-1) / (before - torch.cat(hidden)).norm(dim=-1)).max())


def chosen(block: Block, result: SiteStatistics, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Site -> the factors by which the transform scales `block`, in place."""
    factors: dict[str, Tensor] = {}

    def record(block: Block, site: Site, values: Tensor) -> None:
        factors[site.name] = values
        scale_site_(block, site, values)

    monkeypatch.setattr(awq, "scale_site_", record)
    ActivationAwareScale()(block, result)
    return factors


def nearest(weight: Tensor, scheme: Scheme) -> Tensor:
    return PackedRange.pack(grid.quantized(weight, scheme, grid.Clip("minmax")), scheme).dequantize()


def site_tokens(block: Block, site: Site, hidden: list[Tensor], call: BlockCall) -> Tensor:
    return torch.cat(list(BlockStream(block, list(hidden), call).at(site)))


def over_query_heads(factors: Tensor, block: Block) -> Tensor:
    """Per key-value head to per query head: query head h is served by key-value head h // repeats."""
    heads = block.heads
    return torch.cat([factors.view(heads.key_value, -1)[h // heads.repeats] for h in range(heads.query)])


def output_error(block: Block, site: Site, x: Tensor, factors: Tensor, result: SiteStatistics) -> float:
    """Sum of squares of what rounding does to the readers' outputs on tokens `x`, in float64."""
    wide = over_query_heads(factors, block) if site.per_head else factors
    total = 0.0
    for name in site.readers:
        scheme = result.schemes[name]
        if scheme is not None:
            weight = block.linear(name).weight.detach()
            delta = nearest(weight * wide, scheme).double() / wide.double() - weight.double()
            total += float((x.double() @ delta.T).square().sum())
    return total


def candidates(block: Block, site: Site, x: Tensor) -> list[Tensor]:
    """The factors of every alpha, from the tokens themselves."""
    sizes = x.abs().mean(0)
    if site.per_head:
        heads = block.heads
        by_head = sizes.view(heads.query, heads.width)
        groups = [by_head[k * heads.repeats : (k + 1) * heads.repeats].mean(0) for k in range(heads.key_value)]
        sizes = torch.cat(groups)
    powers = [sizes ** (step / 20) for step in range(20)]
    return [power / (power.max() * power.min()).sqrt() for power in powers]


@pytest.mark.parametrize("name", CONFIGS)
def test_awq_leaves_the_function_unchanged(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, hidden, call = loaded(folders[name])
    edited = copy_of(block)
    result = statistics(block, hidden, call, schemes(block))
    factors = chosen(edited, result, monkeypatch)
    assert set(factors) == {site.name for site in block.arch.sites}
    assert any(float(values.max() / values.min()) > 2 for values in factors.values())
    assert relative_change(block, edited, hidden, call) < SAME


@pytest.mark.parametrize("fault", ["factors on other heads", "a reader forgotten", "a writer forgotten"])
def test_planted_faults_of_the_scaling_move_the_output(
    fault: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, hidden, call = loaded(folders["llama"])
    edited = copy_of(block)
    result = statistics(block, hidden, call, schemes(block))

    def faulty(block: Block, site: Site, factors: Tensor) -> None:
        if fault == "a reader forgotten":
            site = replace(site, readers=site.readers[:1])
        elif fault == "a writer forgotten":
            site = replace(site, writers=())
        elif site.per_head:
            wrong = factors.repeat(block.heads.repeats)
            block.linear(site.readers[0]).weight.data.mul_(wrong / over_query_heads(factors, block))
        scale_site_(block, site, factors)

    monkeypatch.setattr(awq, "scale_site_", faulty)
    ActivationAwareScale()(edited, result)
    assert relative_change(block, edited, hidden, call) > FAULT


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2-untied", "qwen3"])
def test_the_chosen_alpha_has_the_least_output_error_of_all_and_never_more_than_none(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, hidden, call = loaded(folders[name])
    actual = statistics(block, hidden, call, schemes(block, gate_proj=Scheme(2, 32, "real"), k_proj=None))
    factors = chosen(copy_of(block), actual, monkeypatch)
    improved = 0
    for site in block.arch.sites:
        x = site_tokens(block, site, hidden, call)
        tried = candidates(block, site, x)
        errors = [output_error(block, site, x, values, actual) for values in tried]
        plain = output_error(block, site, x, torch.ones_like(tried[0]), actual)
        error = output_error(block, site, x, factors[site.name], actual)
        assert error <= plain
        # Float32 sums may settle a tie differently, no more.
        assert error <= min(errors) * (1 + 1e-4)
        closest = min(float((factors[site.name] / values - 1).abs().max()) for values in tried)
        assert closest < 1e-4
        improved += error < 0.95 * plain
    assert improved > 0


def test_weights_that_lie_on_their_grid_are_not_scaled(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, hidden, call = loaded(folders["llama"])
    for reader in ("mlp.gate_proj", "mlp.up_proj"):
        weight = block.linear(reader).weight.data
        codes = torch.randint(0, 8, weight.shape, generator=torch.Generator().manual_seed(6))
        codes[:, ::16], codes[:, 1::16] = 0, 7
        weight.copy_((codes - 4) / 8)
        assert torch.equal(nearest(weight, W3), weight)
    factors = chosen(copy_of(block), statistics(block, hidden, call, schemes(block)), monkeypatch)
    assert torch.equal(factors["mlp_in"], torch.ones(48))
    assert not torch.equal(factors["attention_in"], torch.ones(48))


def test_one_step_tries_no_scaling_alone(folders: dict[str, Path]) -> None:
    block, hidden, call = loaded(folders["llama"])
    edited = copy_of(block)
    ActivationAwareScale(steps=1)(edited, statistics(block, hidden, call, schemes(block)))
    for parameter, before in zip(edited.module.parameters(), block.module.parameters(), strict=True):
        assert torch.equal(parameter, before)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_huge_channel_is_rounded_with_less_output_error_than_without_scaling(
    name: str, folders: dict[str, Path]
) -> None:
    block, hidden, call = loaded(folders[name])
    with torch.no_grad():
        block.gain("post_attention_layernorm")[13] = 60
    edited = copy_of(block)
    ActivationAwareScale()(edited, statistics(block, hidden, call, schemes(block)))
    site = next(site for site in block.arch.sites if site.name == "mlp_in")
    x, scaled = (site_tokens(each, site, hidden, call) for each in (block, edited))
    plain = aware = 0.0
    for reader in site.readers:
        exact = x @ block.linear(reader).weight.detach().T
        plain += float((x @ nearest(block.linear(reader).weight.detach(), W3).T - exact).square().sum())
        # The rows of up_proj are scaled as a writer, too: compare in the units of the edited block.
        rows = edited.linear(reader).weight.detach()
        unit = (rows @ scaled.T).norm(dim=1) / exact.norm(dim=0)
        aware += float(((scaled @ (nearest(rows, W3) - rows).T) / unit).square().sum())
    assert aware < 0.5 * plain
    # Of the whole block, with all its linears rounded.
    target, errors = output(block, hidden, call), []
    for each in (block, edited):
        for linear in each.arch.linears:
            each.linear(linear).weight.data = nearest(each.linear(linear).weight.data, W3)
        errors.append(float((output(each, hidden, call) - target).norm()))
    assert errors[1] < errors[0]


def parameters(block: Block) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in block.module.named_parameters()}


SKIPS = {
    "all of mlp_in": (("gate_proj", "up_proj"), {"post_attention_layernorm.weight", "mlp.gate_proj.weight"}),
    "down_proj": (("down_proj",), {"mlp.down_proj.weight", "mlp.up_proj.bias"}),
    "o_proj": (("o_proj",), {"self_attn.o_proj.weight", "self_attn.v_proj.bias"}),
    "all of attention_in": (
        ("q_proj", "k_proj", "v_proj"),
        {"input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight"},
    ),
}


@pytest.mark.parametrize("skip", SKIPS)
def test_a_site_whose_readers_are_all_skipped_stays_untouched(skip: str, folders: dict[str, Path]) -> None:
    names, untouched = SKIPS[skip]
    block, hidden, call = loaded(folders["llama"])
    before = parameters(block)
    ActivationAwareScale()(block, statistics(block, hidden, call, schemes(block, **dict.fromkeys(names))))
    same = {name for name, value in parameters(block).items() if torch.equal(value, before[name])}
    assert untouched <= same
    assert not {"input_layernorm.weight", "post_attention_layernorm.weight"} <= same


def test_nothing_is_scaled_where_all_is_skipped_or_no_site_may_be(folders: dict[str, Path]) -> None:
    block, hidden, call = loaded(folders["llama"])
    before = parameters(block)
    result = statistics(block, hidden, call, schemes(block))
    nothing = statistics(block, hidden, call, dict.fromkeys(block.arch.linears))
    frozen = tuple(replace(site, edits=frozenset({"permute"})) for site in block.arch.sites)
    ActivationAwareScale()(block, nothing)
    ActivationAwareScale()(replace(block, arch=replace(block.arch, sites=frozen)), result)
    assert all(torch.equal(value, before[name]) for name, value in parameters(block).items())


def test_a_partly_skipped_site_is_scaled_with_all_its_readers(folders: dict[str, Path]) -> None:
    block, hidden, call = loaded(folders["llama"])
    edited = copy_of(block)
    result = statistics(block, hidden, call, schemes(block, gate_proj=None, down_proj=None))
    ActivationAwareScale()(edited, result)
    assert not torch.equal(edited.linear("mlp.gate_proj").weight, block.linear("mlp.gate_proj").weight)
    assert relative_change(block, edited, hidden, call) < SAME


def test_a_silent_channel_gets_a_finite_factor(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    block, hidden, call = loaded(folders["llama"])
    with torch.no_grad():
        block.gain("input_layernorm")[3] = 0
    edited = copy_of(block)
    factors = chosen(edited, statistics(block, hidden, call, schemes(block)), monkeypatch)
    for values in factors.values():
        assert bool(torch.isfinite(values).all())
        assert bool((values > 0).all())
    assert relative_change(block, edited, hidden, call) < SAME


def test_activations_that_overflow_are_refused_by_name(folders: dict[str, Path]) -> None:
    block, hidden, call = loaded(folders["llama"])
    result = statistics(block, hidden, call, schemes(block))
    for spoiled in (
        replace(result, mean_abs=result.mean_abs | {"mlp_in": result.mean_abs["mlp_in"] * torch.inf}),
        replace(result, grams=result.grams | {"mlp_in": result.grams["mlp_in"] * torch.inf}),
    ):
        with pytest.raises(NumericalFailure, match=r"model.layers.1 mlp_in: activations are not finite.*--dtype"):
            ActivationAwareScale()(copy_of(block), spoiled)
