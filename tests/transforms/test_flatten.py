"""Flattening: channels divided by fixed factors, the function unchanged on every architecture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from conftest import CONFIGS
from subnibble.calibrate.stream import BlockStream, SiteStatistics
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.errors import BadRecipe
from subnibble.model.skeleton import Block, Skeleton
from subnibble.model.transformers_api.blocks import run_block
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.scheme import Scheme
from subnibble.transforms import flatten
from subnibble.transforms.flatten import Flatten, NormFlatten, SearchedFlatten, factors

SAME = 1e-5
DOWN = "mlp.down_proj"


class Streamed:
    """A block, what goes into it, and its statistics."""

    def __init__(self, folder: object) -> None:
        skeleton = Skeleton(SafetensorsSource(folder), torch.float32, torch.device("cpu"))
        self.block = skeleton.load_block(1)
        self.call = skeleton.block_calls(16)[1]
        width = skeleton.config.hidden_size
        self.hidden = torch.randn(6, 16, width, generator=torch.Generator().manual_seed(0))
        self.hidden[..., 5] *= 30

    def statistics(self) -> SiteStatistics:
        schemes = dict.fromkeys(self.block.arch.linears, Scheme(4, 16, "none"))
        inputs = dict.fromkeys(self.block.arch.linears, ActivationScheme(4, 16))
        return BlockStream(self.block, [self.hidden.clone()], self.call).statistics(schemes, inputs)

    def output(self) -> Tensor:
        with torch.no_grad():
            output = run_block(self.block.module, self.hidden, self.call)
        return output[0] if isinstance(output, tuple) else output

    def moved_by(self, edit: Callable[[Block, SiteStatistics], object]) -> float:
        before = self.output()
        edit(self.block, self.statistics())
        return float((self.output() - before).norm() / (before - self.hidden).norm())


@pytest.fixture(params=CONFIGS)
def streamed(request: pytest.FixtureRequest, folders: dict[str, object]) -> Streamed:
    return Streamed(folders[request.param])


@pytest.mark.parametrize("transform", [Flatten(), Flatten(0.5, 0.5), Flatten(0.3), NormFlatten(0.5, 0.5)])
def test_flattening_leaves_the_function(transform: Flatten, streamed: Streamed) -> None:
    assert streamed.moved_by(transform) < SAME


def test_the_invariance_oracle_rejects_planted_faults(folders: dict[str, object]) -> None:
    def only_the_norm(block: Block, result: SiteStatistics) -> None:
        block.gain("input_layernorm").data /= factors(block, block.arch.sites[0], result, 1.0, 0.0)[0]

    def gate_too(block: Block, result: SiteStatistics) -> None:
        Flatten()(block, result)
        block.linear("mlp.gate_proj").weight.data *= 1.01

    def heads_in_turn(block: Block, result: SiteStatistics) -> None:
        site = block.arch.sites[1]
        narrow, _ = factors(block, site, result, 1.0, 0.0)
        block.linear("self_attn.v_proj").weight.data /= narrow.unsqueeze(1)
        block.linear("self_attn.v_proj").bias.data /= narrow
        block.linear("self_attn.o_proj").weight.data *= narrow.repeat(block.heads.repeats)

    for fault in (only_the_norm, gate_too, heads_in_turn):
        assert Streamed(folders["llama"]).moved_by(fault) > 10 * SAME


def test_the_published_factors_make_every_largest_value_one(streamed: Streamed) -> None:
    divisors = Flatten()(streamed.block, streamed.statistics())
    after = streamed.statistics()
    for site in streamed.block.arch.sites:
        largest = after.max_abs[site.name]
        if site.per_head:
            # Heads that share a key-value head share the factor of the largest of them.
            heads = streamed.block.heads
            largest = largest.view(heads.key_value, heads.repeats, heads.width).amax(1)
        torch.testing.assert_close(largest, torch.ones_like(largest), rtol=1e-4, atol=0)
        assert divisors[site.name].shape == after.max_abs[site.name].shape


def test_factors_are_smoothquants_formula(streamed: Streamed) -> None:
    result, block = streamed.statistics(), streamed.block
    site = block.arch.sites[0]
    sizes = result.samples[site.name].abs().amax(0)
    columns = torch.cat([block.linear(name).weight for name in site.readers]).abs().amax(0)
    narrow, wide = factors(block, site, result, 0.5, 0.5)
    torch.testing.assert_close(narrow, sizes.sqrt() / columns.sqrt())
    assert torch.equal(narrow, wide)


def test_a_silent_channel_keeps_its_scale_and_no_factor_is_tiny(streamed: Streamed) -> None:
    actual = streamed.statistics()
    site = streamed.block.arch.sites[3]
    plain = actual.max_abs[site.name].clone()
    for size in (1e-4, 1.0, 1e6):
        actual.max_abs[site.name] = plain * size
        actual.max_abs[site.name][2] = 0
        actual.max_abs[site.name][4] = 1e-12
        narrow, _ = factors(streamed.block, site, actual, 1.0, 0.0)
        assert float(narrow[2]) == 1
        # The silent channel says nothing of what is small.
        assert float(narrow[4]) == pytest.approx(1e-4 * float(actual.max_abs[site.name].max()))


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.5, 0.5)])
def test_an_outlier_that_no_reader_takes_is_flattened(alpha: float, beta: float, streamed: Streamed) -> None:
    result, block = streamed.statistics(), streamed.block
    site = block.arch.sites[0]
    usual, _ = factors(block, site, result, alpha, beta)
    for name in site.readers:
        block.linear(name).weight.data[:, 5] = 0
    assert int(result.max_abs[site.name].argmax()) == 5
    narrow, _ = factors(block, site, result, alpha, beta)
    others = torch.arange(len(narrow)) != 5
    assert torch.equal(narrow[others], usual[others])
    assert float(narrow[5]) >= float(usual[5])
    for name in site.readers:
        block.linear(name).weight.data[:] = 0
    assert bool(torch.isfinite(factors(block, site, result, alpha, beta)[0]).all())


def test_norm_flattening_touches_sites_behind_norms_alone(streamed: Streamed) -> None:
    divisors = NormFlatten(0.5, 0.5)(streamed.block, streamed.statistics())
    assert set(divisors) == {site.name for site in streamed.block.arch.sites if site.norm is not None}


def test_sites_whose_readers_are_all_skipped_stay(streamed: Streamed) -> None:
    result = streamed.statistics()
    result.schemes["mlp.down_proj"] = None
    assert "mlp_hidden" not in Flatten()(streamed.block, result)


def test_the_search_takes_the_powers_with_the_least_loss(streamed: Streamed, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, float]] = []
    plain = flatten.factors

    def noted(block: Block, site: object, actual: SiteStatistics, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
        asked.append((alpha, beta))
        return plain(block, site, actual, alpha, beta)

    def loss(name: str, weight: Tensor, tokens: Tensor) -> float:
        return abs(asked[-1][0] - 0.4) + abs(asked[-1][1] - 0.6)

    monkeypatch.setattr(flatten, "factors", noted)
    assert streamed.moved_by(SearchedFlatten(lambda actual: loss)) < SAME
    # Every site ends with the pair that was carried out.
    assert asked.count((0.4, 0.6)) == 2 * len(streamed.block.arch.sites)


def test_the_search_sees_columns_in_falling_order_and_a_function_that_stays(streamed: Streamed) -> None:
    block, actual = streamed.block, streamed.statistics()
    target = {
        name: actual.samples[site.name] @ block.linear(name).weight.T
        for site in block.arch.sites
        for name in site.readers
    }
    sizes = {name: actual.max_abs[site.name] for site in block.arch.sites for name in site.readers}

    def loss(name: str, weight: Tensor, tokens: Tensor) -> float:
        torch.testing.assert_close(tokens @ weight.T, target[name], rtol=1e-3, atol=1e-3)
        first = int(sizes[name].argmax())
        assert float((tokens[:, 0] / actual.samples[block.arch.site_of(name).name][:, first]).std()) < 1e-4
        return 0.0

    SearchedFlatten(lambda actual: loss)(block, actual)


@pytest.mark.parametrize("values", [(-0.1, 0.0), (1.1, 0.0), (0.5, 2.0)])
def test_powers_outside_their_range_are_refused(values: tuple[float, float]) -> None:
    with pytest.raises(BadRecipe, match="give a number from 0 to 1"):
        Flatten(*values)
