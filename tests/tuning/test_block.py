"""A tuned block: the same function where nothing is quantized, and settled as it was trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import CONFIGS
from subnibble.calibrate.prefix import PrefixStream, States, after_prefix
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.corrections.correction import NOTHING, Correction
from subnibble.corrections.outliers import OutlierColumns
from subnibble.corrections.salient import SalientColumns
from subnibble.model.skeleton import Block, Skeleton
from subnibble.model.transformers_api.blocks import run_block
from subnibble.rounding import grid
from subnibble.rounding.fixed import FixedGrids
from subnibble.rounding.rtn import RTN
from subnibble.runtime import activations
from subnibble.runtime.kv_cache import CacheQuantizer
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.cache_scheme import CacheScheme
from subnibble.tensor.hadamard import hadamard_blocks
from subnibble.tensor.packed import PackedRange
from subnibble.tensor.scheme import Scheme
from subnibble.transforms.input_basis import InputBasis
from subnibble.tuning.block import TunedBlock
from subnibble.tuning.linear import BlockContext
from subnibble.tuning.settle import settle_
from subnibble.tuning.smoothing_start import max_abs_inputs, smooth_
from subnibble.tuning.tuning import Tuning

TOKENS, PREFIX = 12, 3
WEIGHTS, INPUTS = Scheme(4, 16, "none"), ActivationScheme(8, 16)


class Case:
    """A block of a tiny model behind a prefix, and what it is tuned within."""

    def __init__(
        self,
        folder: Path,
        quantized: bool,
        rotated: bool = False,
        correction: Correction = NOTHING,
    ) -> None:
        skeleton = Skeleton(SafetensorsSource(folder), torch.float32, torch.device("cpu"))
        self.block: Block = skeleton.load_block(1)
        generator = torch.Generator().manual_seed(0)
        width = skeleton.config.hidden_size
        self.hidden = torch.randn(2, TOKENS, width, generator=generator)
        stream = PrefixStream(skeleton, torch.randn(1, PREFIX, width, generator=generator))
        self.stream, self.states = stream, stream.run(self.block).states
        self.call = skeleton.block_calls(TOKENS, torch.float32, PREFIX)[1]
        names = self.block.arch.linears
        bases = {}
        for site in self.block.arch.sites:
            channels = self.block.linear(site.readers[0]).in_features
            order = torch.randperm(channels, generator=generator) if rotated else None
            bases[site.name] = InputBasis(order, hadamard_blocks(channels) if rotated else ())
        self.context = BlockContext(
            dict.fromkeys(names, WEIGHTS if quantized else None),
            dict.fromkeys(names, INPUTS if quantized else None),
            bases,
            CacheQuantizer(CacheScheme(8)) if quantized else None,
            self.states,
            correction,
            grid.Clip(),
            torch.float32,
        )

    def tuned(self, **options: Any) -> TunedBlock:
        tuned = TunedBlock(self.block, self.context, Tuning(**{"rank": 4, **options}), torch.Generator().manual_seed(1))
        ordinary = torch.ones(self.hidden.shape[:2], dtype=torch.bool)
        max_abs = max_abs_inputs(tuned, self.block, self.hidden, self.call, ordinary)
        smooth_(tuned, self.block, self.context.correction.outliers, max_abs)
        return tuned

    def output(self, states: States | None) -> Tensor:
        with torch.no_grad():
            output = run_block(self.block.module, self.hidden, after_prefix(self.call, states))
        return output[0] if isinstance(output, tuple) else output

    def of(self, tuned: TunedBlock) -> Tensor:
        with torch.no_grad():
            return tuned(self.hidden, self.call)

    def distance(self, one: Tensor, other: Tensor) -> float:
        return float((one - other).norm() / (other - self.hidden).norm())


def shake_(tuned: TunedBlock, *spaces: str) -> None:
    """Move what is learned of these spaces anywhere."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in tuned.parameters().items():
            if name.startswith(spaces):
                value += 0.3 * torch.randn(value.shape, generator=generator)


@pytest.mark.parametrize("rotated", [False, True], ids=["natural", "turned"])
@pytest.mark.parametrize("name", CONFIGS)
def test_factors_leave_the_function_and_settle_into_the_block(
    name: str, rotated: bool, folders: dict[str, Path]
) -> None:
    case = Case(folders[name], quantized=False, rotated=rotated)
    target = case.output(case.states)
    tuned = case.tuned(smoothing="hard")
    assert case.distance(case.of(tuned), target) < 1e-5
    shake_(tuned, "smoothing")
    assert case.distance(case.of(tuned), target) < 1e-5
    before = {key: value.clone() for key, value in case.block.module.named_parameters()}
    settle_(tuned, case.block)
    assert any(not torch.equal(before[key], value) for key, value in case.block.module.named_parameters())
    assert case.distance(case.output(tuned.cache.prefix), target) < 1e-5
    assert case.distance(case.of(tuned), target) < 1e-5
    # The prefix is what the settled block makes of it; as it was, it would be wrong.
    for found, made in zip(tuned.cache.prefix, case.stream.run(case.block).states, strict=True):
        assert torch.allclose(found, made, atol=1e-5)
    assert case.distance(case.output(case.states), target) > 1e-2


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_settled_block_is_the_one_that_was_trained(name: str, folders: dict[str, Path]) -> None:
    case = Case(folders[name], quantized=False)
    # Slacks and low-rank parts change the function: a scheme is needed for them, and one that rounds next to nothing.
    fine = dict.fromkeys(case.block.arch.linears, Scheme(8, 4, "none", "float32"))
    case.context = replace(case.context, schemes=fine)
    tuned = case.tuned()
    with torch.no_grad():
        for linear in tuned.linears.values():
            linear.clipping.upper.fill_(12.0)
    shake_(tuned, "smoothing", "low_rank")
    trained = case.of(tuned)
    assert case.distance(trained, case.output(case.states)) > 0.1
    settle_(tuned, case.block)
    assert case.distance(case.of(tuned), trained) < 0.02
    assert case.distance(case.output(tuned.cache.prefix), trained) < 0.02


@pytest.mark.parametrize("name", CONFIGS)
def test_products_may_be_of_half_the_width(name: str, folders: dict[str, Path]) -> None:
    case = Case(folders[name], quantized=True)
    target = case.of(case.tuned())
    skeleton = Skeleton(SafetensorsSource(folders[name]), torch.bfloat16, torch.device("cpu"))
    case.call = skeleton.block_calls(TOKENS, prefix_length=PREFIX)[1]
    case.context = replace(case.context, dtype=torch.bfloat16)
    actual = case.of(case.tuned())
    assert not torch.equal(actual, target)
    assert case.distance(actual, target) < 0.1


def test_linears_that_are_skipped_keep_the_function(folders: dict[str, Path]) -> None:
    case = Case(folders["llama"], quantized=False)
    target = case.output(case.states)
    tuned = case.tuned(low_rank="none")
    shake_(tuned, "smoothing")
    assert case.distance(case.of(tuned), target) < 1e-5
    settle_(tuned, case.block)
    assert case.distance(case.output(tuned.cache.prefix), target) < 1e-5


def test_nothing_is_changed_before_anything_is_learned(folders: dict[str, Path]) -> None:
    case = Case(folders["llama"], quantized=True)
    outputs = [case.of(case.tuned(low_rank=low_rank)) for low_rank in ("none", "merge")]
    assert torch.equal(*outputs)


CORRECTIONS = [NOTHING, OutlierColumns(8), SalientColumns(24, fitter=grid.Clip("minmax"))]


@pytest.mark.parametrize("correction", CORRECTIONS, ids=["none", "outliers", "salient"])
def test_learned_grids_round_as_the_tuned_block_does(correction: Correction, folders: dict[str, Path]) -> None:
    case = Case(folders["llama"], quantized=True, rotated=True, correction=correction)
    tuned = case.tuned()
    shake_(tuned, "smoothing", "low_rank", "clipping")
    settle_(tuned, case.block)
    trained = case.of(tuned)
    for site in case.block.arch.sites:
        natural = torch.cat([case.block.linear(name).weight for name in site.readers])
        weight = case.context.bases[site.name].to_basis(natural)
        main, rounder = weight.clone(), RTN(FixedGrids.stacked([tuned.linears[name].fitted() for name in site.readers]))
        if isinstance(correction, OutlierColumns):
            main = main[:, :-8]
        elif isinstance(correction, SalientColumns):
            second = grid.nearest(weight[:, :24], WEIGHTS)
            main[:, :24] -= second
        stored = PackedRange.pack(rounder(main, None, WEIGHTS, "w").quantized, WEIGHTS).dequantize()
        if isinstance(correction, OutlierColumns):
            stored = torch.cat([stored, grid.nearest(weight[:, -8:], Scheme(8, -1, "none"))], 1)
        elif isinstance(correction, SalientColumns):
            stored[:, :24] += second
        heights = [case.block.linear(name).out_features for name in site.readers]
        for name, part in zip(site.readers, stored.split(heights), strict=True):
            tuned.linears[name].fix_(part)
    assert torch.equal(case.of(tuned), trained)
    tuned.linears[site.readers[0]].fix_(0 * part)
    assert not torch.equal(case.of(tuned), trained)


def test_learned_clips_of_inputs_stay_in_their_range(folders: dict[str, Path]) -> None:
    case = Case(folders["llama"], quantized=True)
    names = case.block.arch.linears
    some = {**dict.fromkeys(names, INPUTS), names[0]: replace(INPUTS, clip=0.5), names[-1]: None}
    case.context = replace(case.context, activations=some)
    tuned = case.tuned(input_clipping="site")
    assert {name: linear.activation for name, linear in tuned.linears.items()} == some
    plain = case.of(case.tuned())
    assert torch.equal(case.of(tuned), plain)
    learned = {name for name in tuned.parameters() if name.startswith("input_clipping")}
    # The last site has one reader, whose input stays at 16 bits.
    assert learned == {f"input_clipping.{site.name}" for site in case.block.arch.sites[:-1]}
    for share, least, most in ((-5.0, 0.05, 0.1), (5.0, 0.5, 1.0), (-0.2, 0.4, 0.8)):
        with torch.no_grad():
            for name in learned:
                tuned.parameters()[name].fill_(share)
        tuned.bound_()
        found = {name: linear.activation for name, linear in tuned.linears.items()}
        assert found[names[-1]] is None
        clips = [scheme.clip for scheme in found.values() if scheme is not None]
        assert least <= min(clips) <= max(clips) <= most
        assert not torch.equal(case.of(tuned), plain) or share > 0
    case.of(tuned)
    tuned(case.hidden, case.call).square().sum().backward()
    assert all(float(tuned.parameters()[name].grad.abs()) > 0 for name in learned)


def test_inputs_and_cache_are_quantized(folders: dict[str, Path]) -> None:
    case = Case(folders["llama"], quantized=True)
    whole = case.of(case.tuned())
    for key, value in {"cache_quantizer": None, "activations": dict.fromkeys(case.block.arch.linears)}.items():
        other = Case(folders["llama"], quantized=True)
        other.context = replace(other.context, **{key: value})
        assert not torch.equal(other.of(other.tuned()), whole)


@pytest.mark.parametrize("input_clipping", ["none", "site"])
def test_the_remainder_of_salient_inputs_is_quantized_too(input_clipping: str, folders: dict[str, Path]) -> None:
    twice = SalientColumns(16, fitter=grid.Clip("minmax"), residual="salient")
    case = Case(folders["llama"], quantized=False, correction=twice)
    site = case.block.arch.sites[0]
    scheme = ActivationScheme(3, 16, clip=0.9)
    case.context = replace(case.context, activations=dict.fromkeys(case.block.arch.linears, scheme))
    tuned = case.tuned(input_clipping=input_clipping, smoothing="none")
    x = torch.cat([*case.hidden], 0).requires_grad_()
    entered = tuned.sites[site.name].enter(x, scheme)
    once = activations.quantize_values(x.detach(), scheme)
    remainder = activations.quantize_values(x.detach()[:, :16] - once[:, :16], scheme)
    assert torch.equal(entered, torch.cat([once, remainder], 1))
    held = entered[:, : x.shape[1]].clone()
    held[:, :16] += entered[:, x.shape[1] :]
    error = (held - x).detach().square().mean(0)
    assert float(error[:16].mean()) < 0.05 * float(error[16:].mean())
    # A gradient stops where an input was clipped whose clip is learned: of a salient one, where both its codes were.
    (gradient,) = torch.autograd.grad(held.sum(), x)
    assert set(gradient.unique().tolist()) <= {0.0, 1.0}
    stopped = (gradient == 0).float().mean(0)
    assert bool(stopped.any()) is (input_clipping == "site")
    if input_clipping == "site":
        assert float(stopped[:16].mean()) < 0.5 * float(stopped[16:].mean())
