from __future__ import annotations

import copy
import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from subnibble.arch.llama import ATTENTION_IN, ATTENTION_OUT, LLAMA, MLP_HIDDEN, MLP_IN
from subnibble.arch.site import Heads, Site
from subnibble.calibrate.stream import BlockStream
from subnibble.model.skeleton import Block
from subnibble.model.transformers_api.blocks import BlockCall, run_block
from subnibble.model.transformers_api.names import CACHE_NAMES
from subnibble.tensor.scheme import Scheme
from tiny_llama import tiny_llama

LENGTH = 11
BATCHES = (3, 1, 2)
SITES = LLAMA.sites
SUBSETS = [subset for n in range(5) for subset in itertools.combinations(SITES, n)]
every_subset = pytest.mark.parametrize(
    "sites", SUBSETS, ids=lambda sites: "+".join(site.name for site in sites) or "none"
)


def recorded(index: int) -> tuple[Block, list[Tensor], BlockCall]:
    """A block of a tiny random Llama, its inputs by batch, and what the model calls it with."""
    model = tiny_llama(5).requires_grad_(False)
    layer = model.model.layers[index]
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.weight.copy_(torch.randn(48) + 1)
    hidden: list[Tensor] = []
    named: dict[str, Any] = {}

    def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0].clone())
        named.update({name: value for name, value in kwargs.items() if name not in CACHE_NAMES})

    handle = layer.register_forward_pre_hook(record, with_kwargs=True)
    for count in BATCHES:
        model(torch.randint(0, 61, (count, LENGTH)), use_cache=False)
    handle.remove()
    return Block(index, LLAMA.block_path(index), layer, LLAMA, Heads.of(model.config)), hidden, BlockCall(named)


def plain(block: Block, hidden: list[Tensor], call: BlockCall) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What forward hooks see at every linear, all batches as (tokens, channels), and the block's outputs."""
    module = copy.deepcopy(block.module)
    by_linear: dict[str, list[Tensor]] = {name: [] for name in LLAMA.linears}
    for name, tensors in by_linear.items():
        module.get_submodule(name).register_forward_hook(
            lambda module, args, output, tensors=tensors: tensors.append(args[0].flatten(0, -2).clone())
        )
    with torch.no_grad():
        outputs = [run_block(module, x, call) for x in hidden]
    return {name: torch.cat(tensors) for name, tensors in by_linear.items()}, outputs


def observed(stream: BlockStream, site: Site) -> Tensor:
    parts = [x.clone() for x in stream.at(site)]
    assert [part.shape[0] for part in parts] == [count * LENGTH for count in BATCHES]
    return torch.cat(parts)


def bend(block: Block, site: Site, seed: int) -> None:
    """Change the site's readers, as quantization does."""
    g = torch.Generator().manual_seed(seed)
    for reader in site.readers:
        weight = block.linear(reader).weight
        weight.data = weight + 0.1 * torch.randn(weight.shape, generator=g)


def modules(block: Block) -> dict[str, nn.Module]:
    return dict(block.module.named_modules())


def hooks(block: Block) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in block.module.modules())


@pytest.mark.parametrize("index", [0, 1])
def test_heads_need_not_fill_the_hidden_size(index: int) -> None:
    block, hidden, _ = recorded(index)
    assert block.heads == Heads(6, 2, 16)
    assert block.linear("self_attn.o_proj").in_features == 96
    assert [tuple(x.shape) for x in hidden] == [(count, LENGTH, 48) for count in BATCHES]


@every_subset
def test_sites_and_outputs_equal_those_of_a_plain_forward(sites: tuple[Site, ...]) -> None:
    block, hidden, call = recorded(1)
    inputs, outputs = plain(block, hidden, call)
    before = modules(block)
    stream = BlockStream(block, hidden, call)
    for site in sites:
        actual = observed(stream, site)
        for reader in site.readers:
            assert torch.equal(actual, inputs[reader])
    stream.advance()
    assert all(torch.equal(a, b) for a, b in zip(hidden, outputs, strict=True))
    assert modules(block) == before
    assert hooks(block) == 0


@every_subset
def test_later_sites_and_outputs_see_the_changed_readers(sites: tuple[Site, ...]) -> None:
    block, hidden, call = recorded(0)
    _, unchanged = plain(block, hidden, call)
    start = [x.clone() for x in hidden]
    stream = BlockStream(block, hidden, call)
    actual = {}
    for seed, site in enumerate(sites):
        actual[site.name] = observed(stream, site)
        bend(block, site, seed)
    stream.advance()
    # Readers of a site change nothing at the site or before it, so one forward with all changes tells all.
    inputs, outputs = plain(block, start, call)
    for site in sites:
        assert torch.equal(actual[site.name], inputs[site.readers[0]])
    assert all(torch.equal(a, b) for a, b in zip(hidden, outputs, strict=True))
    assert torch.equal(hidden[0], unchanged[0]) == (not sites)


def test_a_site_observed_again_after_its_readers_changed_is_the_same() -> None:
    block, hidden, call = recorded(0)
    stream = BlockStream(block, hidden, call)
    for seed, site in enumerate(SITES):
        first = observed(stream, site)
        bend(block, site, seed)
        if site.tail is None:
            assert torch.equal(observed(stream, site), first)


def test_comparison_rejects_a_stream_that_forgets_changes_or_mixes_batches() -> None:
    block, hidden, call = recorded(0)
    inputs, outputs = plain(block, hidden, call)
    bend(block, ATTENTION_IN, 0)
    changed, changed_outputs = plain(block, hidden, call)
    for site in (ATTENTION_OUT, MLP_IN, MLP_HIDDEN):
        assert not torch.equal(changed[site.readers[0]], inputs[site.readers[0]])
    assert torch.equal(changed[ATTENTION_IN.readers[0]], inputs[ATTENTION_IN.readers[0]])
    assert not torch.equal(changed_outputs[0], outputs[0])
    _, swapped = plain(block, [hidden[0].flip(0), *hidden[1:]], call)
    assert not torch.equal(swapped[0], changed_outputs[0])


def test_nothing_is_forwarded_twice_for_the_same_statistic() -> None:
    block, hidden, call = recorded(0)
    started: Counter[str] = Counter()
    finished: Counter[str] = Counter()
    for name, module in block.module.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: started.update([name]))
        module.register_forward_hook(lambda module, args, output, name=name: finished.update([name]))
    stream, batches = BlockStream(block, hidden, call), len(BATCHES)
    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    ran: dict[str, dict[str, int]] = {}
    for site in SITES:
        before = finished.copy()
        observed(stream, site)
        ran[site.name] = {name: finished[name] - before[name] for name in LLAMA.linears}
        assert all(finished[reader] == 0 for reader in site.readers)
    before = finished.copy()
    stream.advance()
    ran["advance"] = {name: finished[name] - before[name] for name in LLAMA.linears}
    attention, mlp = projections[:3], projections[3:]
    expected = {
        "attention_in": (),
        "attention_out": attention,
        "mlp_in": ("self_attn.o_proj",),
        "mlp_hidden": ("self_attn.o_proj", *mlp),
        "advance": ("self_attn.o_proj", "mlp.down_proj"),
    }
    for stage, names in expected.items():
        assert ran[stage] == {name: batches * (name in names) for name in LLAMA.linears}
    # Begun once to reach each site inside, never run to its end: the tail stands for it afterwards.
    assert (started["self_attn"], finished["self_attn"]) == (2 * batches, 0)
    assert (started["mlp"], finished["mlp"]) == (2 * batches, 0)
    assert finished["mlp.act_fn"] == batches
    assert finished[""] == batches


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.name)
@pytest.mark.parametrize("batch", [0, 1])
def test_an_exception_in_receive_leaves_the_original_modules(site: Site, batch: int) -> None:
    block, hidden, call = recorded(0)
    inputs, outputs = plain(block, hidden, call)
    before = modules(block)
    stream = BlockStream(block, hidden, call)
    for earlier in SITES[: SITES.index(site)]:
        observed(stream, earlier)
    received = []

    def receive(x: Tensor) -> None:
        received.append(x)
        if len(received) > batch:
            raise MemoryError("no room for the statistic")

    with pytest.raises(MemoryError, match="no room"):
        list(map(receive, stream.at(site)))
    after = modules(block)
    assert list(after) == list(before)
    assert all(after[name] is module for name, module in before.items())
    assert hooks(block) == 0
    assert torch.equal(observed(stream, site), inputs[site.readers[0]])
    stream.advance()
    assert all(torch.equal(a, b) for a, b in zip(hidden, outputs, strict=True))


def test_an_exception_in_the_block_is_not_swallowed_and_leaves_the_original_modules() -> None:
    block, hidden, call = recorded(0)
    stream = BlockStream(block, hidden, call)
    observed(stream, ATTENTION_OUT)
    before = modules(block)
    hidden[1] = hidden[1][..., :47]
    with pytest.raises(RuntimeError):
        observed(stream, MLP_IN)
    with pytest.raises(RuntimeError):
        stream.advance()
    assert all(modules(block)[name] is module for name, module in before.items())
    assert hooks(block) == 0


def test_streaming_tracks_no_gradients() -> None:
    block, hidden, call = recorded(0)
    block.module.requires_grad_(True)
    stream = BlockStream(block, hidden, call)
    for site in SITES:
        assert not observed(stream, site).requires_grad
    stream.advance()
    assert not any(x.requires_grad for x in hidden)


def paired_streams() -> tuple[BlockStream, BlockStream, Block, Block, list[Tensor], list[Tensor], dict[str, Any]]:
    """Streams of two blocks, one of them bent, each over hidden states of its own."""
    block, hidden, call = recorded(0)
    other = replace(block, module=copy.deepcopy(block.module))
    for seed, site in enumerate(SITES):
        bend(other, site, seed)
    away = [x + 0.5 for x in hidden]
    return (
        BlockStream(block, hidden, call),
        BlockStream(other, away, call),
        block,
        other,
        hidden,
        away,
        call,
    )


def counted(block: Block) -> Counter[str]:
    ran: Counter[str] = Counter()
    for name in LLAMA.linears:
        block.linear(name).register_forward_hook(lambda module, args, output, name=name: ran.update([name]))
    return ran


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.name)
def test_at_gives_what_observe_hands_out_batch_by_batch(site: Site) -> None:
    block, hidden, call = recorded(1)
    inputs, _ = plain(block, hidden, call)
    parts = list(BlockStream(block, hidden, call).at(site))
    assert [part.shape[0] for part in parts] == [count * LENGTH for count in BATCHES]
    assert torch.equal(torch.cat(parts), inputs[site.readers[0]])
    assert torch.equal(torch.cat(parts), observed(BlockStream(block, hidden, call), site))


def test_two_streams_zipped_strictly_give_pairs_of_the_same_tokens_and_keep_their_tails() -> None:
    first, second, block, other, hidden, away, call = paired_streams()
    inputs, outputs = plain(block, hidden, call)
    inputs_away, outputs_away = plain(other, away, call)
    counts = counted(block), counted(other)
    for site in SITES:
        pairs = list(zip(first.at(site), second.at(site), strict=True))
        assert [(len(a), len(b)) for a, b in pairs] == [(count * LENGTH,) * 2 for count in BATCHES]
        a, b = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        assert torch.equal(a, inputs[site.readers[0]])
        assert torch.equal(b, inputs_away[site.readers[0]])
    for stream in (first, second):
        stream.advance()
    assert all(torch.equal(a, b) for a, b in zip(hidden, outputs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(away, outputs_away, strict=True))
    # Each tail was kept: attention and MLP ran once, o_proj once for every later site and once at the end.
    for ran in counts:
        expected = dict.fromkeys(LLAMA.linears, 1) | {"self_attn.o_proj": 3}
        assert ran == {name: times * len(BATCHES) for name, times in expected.items()}
    for each in (block, other):
        assert sum(len(m._forward_pre_hooks) for m in each.module.modules()) == 0


def test_a_tail_of_which_not_all_was_taken_is_not_kept() -> None:
    block, hidden, call = recorded(0)
    _, outputs = plain(block, hidden, call)
    before = modules(block)
    stream = BlockStream(block, hidden, call)
    taken = stream.at(ATTENTION_OUT)
    next(taken)
    taken.close()
    assert modules(block) == before
    assert hooks(block) == 0
    ran = counted(block)
    for _ in stream.at(MLP_IN):
        pass
    assert ran["self_attn.q_proj"] == len(BATCHES)
    stream.advance()
    assert all(torch.equal(a, b) for a, b in zip(hidden, outputs, strict=True))


@every_subset
def test_outputs_are_those_of_the_blocks_own_forward_and_move_nothing(sites: tuple[Site, ...]) -> None:
    block, hidden, call = recorded(1)
    start = [x.clone() for x in hidden]
    before = modules(block)
    stream = BlockStream(block, hidden, call)
    for seed, site in enumerate(sites):
        observed(stream, site)
        bend(block, site, seed)
    _, expected = plain(block, start, call)
    for _ in range(2):
        actual = list(stream.outputs())
        assert [tuple(x.shape) for x in actual] == [(count, LENGTH, 48) for count in BATCHES]
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(hidden, start, strict=True))
    assert modules(block) == before
    stream.advance()
    assert all(torch.equal(a, b) for a, b in zip(hidden, expected, strict=True))


def test_statistics_are_those_of_every_sites_tensor() -> None:
    block, hidden, call = recorded(1)
    inputs, outputs = plain(block, hidden, call)
    start = [x.clone() for x in hidden]
    schemes = {name: Scheme(3, 16) if "mlp" in name else None for name in LLAMA.linears}
    stream = BlockStream(block, hidden, call)
    actual = stream.statistics(schemes)
    assert actual.schemes == schemes
    assert set(actual.grams) == set(actual.mean_abs) == {site.name for site in SITES}
    for site in SITES:
        x = inputs[site.readers[0]].double()
        gram, sizes = actual.grams[site.name].double(), actual.mean_abs[site.name].double()
        bound = 2 * x.shape[0] ** 0.5 * torch.finfo(torch.float32).eps * (x.abs().T @ x.abs())
        assert bool(((gram - x.T @ x).abs() <= bound).all())
        assert bool(((sizes - x.abs().mean(0)).abs() <= 1e-6 * x.abs().mean(0)).all())
    assert all(torch.equal(a, b) for a, b in zip(hidden, start, strict=True))
    stream.advance()
    assert all(torch.equal(a, b) for a, b in zip(hidden, outputs, strict=True))
