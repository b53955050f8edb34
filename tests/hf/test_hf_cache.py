"""A transformers model on a coded cache and behind a prefix: `forward` and `generate`, against what they must equal."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from conftest import CONFIGS, VOCABULARY, random_model
from kv_calls import cache_of, passing
from subnibble import Recipe, quantize
from subnibble.errors import BadRecipe, UnsupportedTransformers
from subnibble.hf.attention import attach_cache_, attached_cache, detach_cache_, repeated_prefix, set_prefix_
from subnibble.hf.cache import KVCache
from subnibble.tensor.cache_scheme import CacheScheme, PrefixIds

SCHEMES = {
    "token": CacheScheme(4),
    "before-rope": CacheScheme(3, 5, rope="before"),
    "hadamard": CacheScheme(4, key_rotation="hadamard"),
    "channel": CacheScheme(2, 4, "channel", window=4),
    "channel-before-rope": CacheScheme(3, 4, "channel", rope="before", window=8),
    "window": CacheScheme(3, window=5),
}
PREFIX = 5


def model_of(name: str) -> torch.nn.Module:
    model = random_model(name).double()
    model.generation_config.pad_token_id = 0
    return model


def ids(tokens: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def logits(model: torch.nn.Module, tokens: torch.Tensor, **more: object) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, **more).logits


def in_pieces(model: torch.nn.Module, tokens: torch.Tensor, pieces: tuple[int, ...], mask=None) -> torch.Tensor:
    past, result, start = None, [], 0
    for piece in pieces:
        stop = start + piece
        more = {} if mask is None else {"attention_mask": mask[:, :stop]}
        if mask is not None:
            more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, start:stop]
        with torch.no_grad():
            out = model(tokens[:, start:stop], **passing(model, past), use_cache=True, **more)
        past, start = cache_of(out), stop
        result.append(out.logits)
    return torch.cat(result, 1)


def with_prefix(model: torch.nn.Module, prefix: torch.Tensor, scheme: CacheScheme | None, bos: int | None = None):
    """A copy of the model behind the prefix (p,), whose keys and values it makes itself."""
    cache = DynamicCache()
    with torch.no_grad():
        model.model(prefix.unsqueeze(0), **passing(model.model, cache), use_cache=True)
    prefixed = copy.deepcopy(model)
    attach_cache_(prefixed, scheme, PrefixIds(tuple(prefix.tolist()), bos))
    set_prefix_(prefixed, [(layer.keys[0], layer.values[0]) for layer in cache.layers])
    return prefixed


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_without_scheme_and_prefix_nothing_changes(name: str) -> None:
    model, tokens = model_of(name), ids(14)
    target = logits(model, tokens)
    attach_cache_(model, None)
    assert_close(logits(model, tokens), target)
    assert_close(in_pieces(model, tokens, (5, 1, 8)), target)
    detach_cache_(model)
    assert attached_cache(model) is None
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, tokens), target)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_at_once_and_token_by_token_are_the_same(name: str, scheme: str) -> None:
    model, tokens = model_of(name), ids(17)
    plain = logits(model, tokens)
    attach_cache_(model, SCHEMES[scheme])
    target = logits(model, tokens)
    assert_close(in_pieces(model, tokens, (1,) * 17), target)
    assert_close(in_pieces(model, tokens, (7, 4, 1, 5)), target)
    # It is coded at all.
    assert float((target - plain).abs().max()) > 1e-3


def test_keys_coded_before_positions_are_those_of_an_attention_that_codes_them_there() -> None:
    """Against the model's own attention with k_proj's output replaced by what its codes stand for."""
    from subnibble.runtime.kv_cache import dequantize_rows, quantize_rows

    model, tokens, scheme = model_of("llama"), ids(11), SCHEMES["before-rope"]
    model_copy = copy.deepcopy(model)
    bounds = scheme.bounds(16)

    def quantized(module, args, output):
        heads = output.unflatten(-1, (-1, 16))
        return dequantize_rows(quantize_rows(heads, scheme.bits, bounds), scheme.bits, bounds, output.dtype).flatten(-2)

    for block in model_copy.model.layers:
        block.self_attn.k_proj.register_forward_hook(quantized)
        block.self_attn.v_proj.register_forward_hook(quantized)
    attach_cache_(model, scheme)
    # Positions are taken off in float32.
    torch.testing.assert_close(logits(model, tokens), logits(model_copy, tokens), rtol=1e-4, atol=1e-4)


def test_turned_keys_at_many_bits_are_the_plain_ones() -> None:
    model, tokens = model_of("llama"), ids(11)
    plain = logits(model, tokens)
    attach_cache_(model, CacheScheme(8, key_rotation="hadamard"))
    error = float((logits(model, tokens) - plain).abs().max())
    attach_cache_(model, CacheScheme(2, key_rotation="hadamard"))
    assert error < 0.1 * float((logits(model, tokens) - plain).abs().max())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("scheme", [None, "window", "hadamard"])
def test_a_prefix_is_what_the_model_makes_of_it_in_front(name: str, scheme: str | None) -> None:
    model = model_of(name)
    prefix, text = ids(PREFIX, 1, seed=3)[0], ids(14)
    whole = torch.cat([prefix.expand(2, -1), text], 1)
    prefixed = with_prefix(model, prefix, None if scheme is None else SCHEMES[scheme])
    if scheme is None:
        target = logits(model, whole)[:, PREFIX:]
        assert_close(logits(prefixed, text), target)
        # The test can fail: without the prefix's positions it is something else.
        attach_cache_(prefixed, None)
        assert float((logits(prefixed, text) - target).abs().max()) > 1e-2
        return
    target = logits(prefixed, text)
    assert_close(in_pieces(prefixed, text, (1,) * 14), target)
    assert_close(logits(prefixed, whole)[:, PREFIX:], target)


def padded_batch(name: str, scheme: CacheScheme | None, prefixed: bool):
    """A model on a cache, behind a prefix or not; two rows of 12 tokens, the first padded by three; their mask."""
    model = model_of(name)
    if prefixed:
        model = with_prefix(model, ids(PREFIX, 1, seed=3)[0], scheme)
    else:
        attach_cache_(model, scheme)
    rows = ids(12, seed=4)
    rows[0, :3] = 0
    mask = torch.ones_like(rows)
    mask[0, :3] = 0
    return model, rows, mask


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("scheme", [None, *(name for name, scheme in SCHEMES.items() if not scheme.window)])
@pytest.mark.parametrize("prefixed", [False, True])
def test_padding_on_the_left_changes_nothing(name: str, scheme: str | None, prefixed: bool) -> None:
    model, rows, mask = padded_batch(name, SCHEMES.get(scheme), prefixed)
    both = in_pieces(model, rows, (12,), mask)
    assert_close(both[:1, 3:], logits(model, rows[:1, 3:]))
    assert_close(both[1:], logits(model, rows[1:]))


# A window counts places in the cache, padding among them, and keys by channel share ranges with it.
@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("scheme", [name for name, scheme in SCHEMES.items() if scheme.window])
@pytest.mark.parametrize("prefixed", [False, True])
def test_padded_rows_in_windows_are_the_same_at_once_and_in_pieces(name: str, scheme: str, prefixed: bool) -> None:
    model, rows, mask = padded_batch(name, SCHEMES[scheme], prefixed)
    assert_close(in_pieces(model, rows, (4, 1, 7), mask)[mask.bool()], in_pieces(model, rows, (12,), mask)[mask.bool()])


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("prefixed", [False, True])
def test_generate_takes_the_likeliest_continuation(scheme: str | None, beams: int, prefixed: bool) -> None:
    """Greedy search is that of whole forwards; beams score what whole forwards score."""
    result = None if scheme is None else SCHEMES[scheme]
    model = model_of("llama")
    if prefixed:
        model = with_prefix(model, ids(PREFIX, 1, seed=3)[0], result)
    else:
        attach_cache_(model, result)
    text = ids(6)
    out = model.generate(
        text, attention_mask=torch.ones_like(text), max_new_tokens=7, do_sample=False, num_beams=beams,
        output_scores=True, return_dict_in_generate=True, length_penalty=0.0,
    )  # fmt: skip
    assert torch.equal(out.sequences[:, :6], text)
    scores = logits(model, out.sequences[:, :-1]).log_softmax(-1)[:, 5:]
    if beams == 1:
        assert torch.equal(scores.argmax(-1), out.sequences[:, 6:])
        assert isinstance(cache_of(out), KVCache)
        return
    picked = scores.gather(-1, out.sequences[:, 6:, None]).sum((1, 2))
    torch.testing.assert_close(picked, out.sequences_scores.double(), rtol=1e-4, atol=1e-4)


def test_generate_with_and_without_the_prefix_in_its_ids() -> None:
    prefix, text = ids(PREFIX, 1, seed=3)[0], ids(6)
    model = with_prefix(model_of("llama"), prefix, CacheScheme(4))
    whole = torch.cat([prefix.expand(2, -1), text], 1)
    settings = {"max_new_tokens": 6, "do_sample": False}
    alone = model.generate(text, attention_mask=torch.ones_like(text), **settings)
    after_prefix = model.generate(whole, attention_mask=torch.ones_like(whole), **settings)
    assert torch.equal(after_prefix[:, PREFIX:], alone)
    # One row with, one without, which is padded.
    mixed = torch.cat([whole[:1], torch.nn.functional.pad(text[1:], (PREFIX, 0))])
    mask = torch.ones_like(mixed)
    mask[1, :PREFIX] = 0
    both = model.generate(mixed, attention_mask=mask, **settings)
    assert torch.equal(both[:, PREFIX:], alone)
    beams = model.generate(mixed, attention_mask=mask, num_beams=3, **settings)
    assert torch.equal(
        beams[:, PREFIX:], model.generate(text, attention_mask=torch.ones_like(text), num_beams=3, **settings)
    )


def test_a_second_bos_is_dropped_and_another_token_is_not() -> None:
    prefix, text = ids(PREFIX, 1, seed=3)[0], ids(6)
    bos = int(prefix[0])
    model = with_prefix(model_of("llama"), prefix, None, bos)
    begun = torch.cat([torch.full((2, 1), bos), text], 1)
    assert_close(logits(model, begun)[:, 1:], logits(model, text))
    without = with_prefix(model_of("llama"), prefix, None, None)
    assert float((logits(without, begun)[:, 1:] - logits(without, text)).abs().max()) > 1e-3


def test_what_repeats_the_prefix_is_found_row_by_row() -> None:
    prefix = PrefixIds((7, 8, 9), 7)
    rows = torch.tensor([[7, 8, 9, 1, 2], [0, 0, 7, 8, 9], [7, 8, 1, 1, 1], [1, 7, 8, 9, 1], [0, 0, 0, 0, 7]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    hidden = repeated_prefix(rows, mask, prefix)
    assert hidden.int().tolist() == [[1, 1, 1, 0, 0], [0, 0, 1, 1, 0], [1, 0, 0, 0, 0], [0] * 5, [0] * 5]
    assert repeated_prefix(rows[3:4], None, prefix) is None
    assert repeated_prefix(rows[2:3], None, replace(prefix, bos=None)) is None
    # Behind sink tokens BOS comes last; one that is somewhere else is none of the prefix's ends.
    hidden = repeated_prefix(rows, mask, PrefixIds((9, 1, 7), 7))
    assert hidden.int().tolist() == [[1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0] * 5, [0] * 5]
    assert repeated_prefix(rows, mask, PrefixIds((9, 7, 1), 7)) is None


def test_the_prefix_is_shared_and_the_cache_does_not_hold_it() -> None:
    prefix = ids(PREFIX, 1, seed=3)[0]
    model = with_prefix(model_of("llama"), prefix, CacheScheme(4))
    text = ids(6, batch=4)
    with torch.no_grad():
        cache = cache_of(model(text, use_cache=True))
    assert cache.get_seq_length() == 6
    assert cache.nbytes == 4 * 6 * 3 * CacheScheme(4).token_bytes(2, 16)
    assert [tuple(block.self_attn.prefix.keys.shape) for block in model.model.layers] == [(2, PREFIX, 16)] * 3


def test_no_dense_copy_stays_behind() -> None:
    model = model_of("llama")
    attach_cache_(model, CacheScheme(4, rope="before"))
    with torch.no_grad():
        cache = cache_of(model(ids(6), use_cache=True))
    held = {id(t): t for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)}
    assert sum(t.numel() for t in held.values()) <= 6 * len(cache.layers)
    assert all(layer._view is None for layer in cache.layers)


def test_a_cache_that_the_model_returned_goes_on_and_another_does_not() -> None:
    model, tokens = model_of("llama"), ids(9)
    attach_cache_(model, CacheScheme(4))
    target = logits(model, tokens)
    with torch.no_grad():
        past = cache_of(model(tokens[:, :5], use_cache=True))
    assert_close(logits(model, tokens[:, 5:], **passing(model, past)), target[:, 5:])
    used = DynamicCache()
    used.update(torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 3, 16), 0)
    static = StaticCache(config=model.config, max_cache_len=16)
    other = KVCache(CacheScheme(4), 3, PrefixIds((1,)))
    for wrong in (used, DynamicCache(), static, KVCache(CacheScheme(3), 3), other):
        with pytest.raises(BadRecipe, match="leave the cache"):
            logits(model, tokens, **passing(model, wrong))
        with pytest.raises(BadRecipe, match="leave the cache"):
            model.generate(tokens, **passing(model, wrong), max_new_tokens=2)
    for name in ("static", "dynamic", "offloaded"):
        with pytest.raises(BadRecipe, match="leave cache_implementation out"):
            model.generate(tokens, cache_implementation=name, max_new_tokens=2)


def test_a_cache_resets_selects_repeats_and_crops() -> None:
    model, tokens = model_of("llama"), ids(9)
    for scheme in (CacheScheme(4), CacheScheme(3, rope="before")):
        attach_cache_(model, scheme)
        target = logits(model, tokens)
        with torch.no_grad():
            past = cache_of(model(tokens, use_cache=True))
        past.crop(-4)
        assert_close(logits(model, tokens[:, 5:], **passing(model, past)), target[:, 5:])
        past.crop(-4)
        past.batch_select_indices(torch.tensor([1]))
        past.batch_repeat_interleave(2)
        both = logits(model, tokens[1:, 5:].expand(2, -1), **passing(model, past))
        assert_close(both, target[1:, 5:].expand(2, -1, -1))
        past.reset()
        assert past.get_seq_length() == 0
        assert_close(logits(model, tokens, **passing(model, past)), target)
        past.reset()
        assert_close(logits(model, tokens[:1], **passing(model, past)), target[:1])


def test_a_cache_is_refused_by_a_model_that_is_not_attached() -> None:
    model = model_of("llama")
    with pytest.raises(BadRecipe, match="attach it to the model"):
        logits(model, ids(5), **passing(model, KVCache(CacheScheme(4), 3)))


def test_masks_that_cannot_be_moved_are_refused_behind_a_prefix() -> None:
    model = with_prefix(model_of("llama"), ids(PREFIX, 1, seed=3)[0], None)
    with pytest.raises(BadRecipe, match="two dimensions"):
        logits(model, ids(5), attention_mask=torch.ones(2, 1, 5, 5, dtype=torch.bool))


def test_a_deep_copy_has_a_cache_of_its_own_and_can_be_detached() -> None:
    model, tokens = model_of("llama"), ids(9)
    plain = logits(model, tokens)
    attach_cache_(model, CacheScheme(2))
    target = logits(model, tokens)
    model_copy = copy.deepcopy(model)
    assert_close(logits(model_copy, tokens), target)
    detach_cache_(model_copy)
    assert_close(logits(model_copy, tokens), plain)
    assert_close(logits(model, tokens), target)


def hooks_of(model: torch.nn.Module) -> int:
    """Number of hooks, those with keyword arguments counted twice."""
    return sum(len(hooks) for m in model.modules() for name, hooks in vars(m).items() if name.startswith("_forward_"))


def saved_and_loaded(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_a_cache_can_be_attached_again_and_again() -> None:
    model, tokens = model_of("llama"), ids(9)
    plain = logits(model, tokens)
    attach_cache_(model, CacheScheme(2))
    target, hooks = logits(model, tokens), hooks_of(model)
    # On the decoder before and after it, and on each attention.
    assert hooks == 2 * (2 + len(model.model.layers))
    attach_cache_(model, CacheScheme(2))
    assert hooks_of(model) == hooks
    for _ in range(2):
        detach_cache_(model)
        assert hooks_of(model) == 0
        assert torch.equal(logits(model, tokens), plain)
        attach_cache_(model, CacheScheme(2))
        assert hooks_of(model) == hooks
        assert torch.equal(logits(model, tokens), target)


def test_detaching_leaves_the_hooks_of_others() -> None:
    model, seen = model_of("llama"), []
    attach_cache_(model, CacheScheme(4))
    model.model.register_forward_hook(lambda module, args, output: seen.append(output))
    detach_cache_(model)
    logits(model, ids(3))
    assert len(seen) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded])
def test_a_copy_and_its_original_are_detached_apart(copied: Callable[[Any], Any]) -> None:
    model, tokens = model_of("llama"), ids(9)
    plain = logits(model, tokens)
    attach_cache_(model, CacheScheme(2))
    target, hooks = logits(model, tokens), hooks_of(model)
    twin, other = copied(model), copied(copied(model))
    detach_cache_(twin)
    assert (hooks_of(twin), hooks_of(model), hooks_of(other)) == (0, hooks, hooks)
    assert torch.equal(logits(twin, tokens), plain)
    assert torch.equal(logits(model, tokens), target)
    detach_cache_(model)
    assert (hooks_of(model), hooks_of(other)) == (0, hooks)
    assert torch.equal(logits(other, tokens), target)
    attach_cache_(twin, CacheScheme(2))
    assert hooks_of(twin) == hooks
    assert torch.equal(logits(twin, tokens), target)


def test_a_loaded_model_is_detached_and_attached_as_one_that_was_saved_again(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    quantize(folders["llama"], tmp_path / "out", Recipe(method="none", kv_bits=2, kv={"group_size": 16}))
    model, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), ids(9)
    target, hooks = logits(model, tokens), hooks_of(model)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, tokens), target)
    detach_cache_(again)
    # What is left checks the first pass.
    assert hooks - hooks_of(again) == 2 * (2 + len(model.model.layers))
    assert not torch.equal(logits(again, tokens), target)
    attach_cache_(again, attached_cache(model).scheme)
    assert hooks_of(again) == hooks
    assert torch.equal(logits(again, tokens), target)


def test_a_model_that_is_refused_gets_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)
    with pytest.raises(UnsupportedTransformers):
        attach_cache_(model, CacheScheme(4))
    assert hooks_of(model) == 0
    assert attached_cache(model) is None


def test_inputs_may_be_embeddings_or_positional() -> None:
    model, tokens = model_of("llama"), ids(9)
    attach_cache_(model, CacheScheme(4))
    target = logits(model, tokens)
    assert_close(logits(model, None, inputs_embeds=model.model.embed_tokens(tokens)), target)
    with torch.no_grad():
        assert_close(model.lm_head(model.model(tokens).last_hidden_state), target)
        mask = torch.ones_like(tokens)
        mask[0, :3] = 0
        padded = model.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        assert_close(model.model(tokens, mask).last_hidden_state, padded)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("scheme", [None, CacheScheme(3)])
def test_generation_without_a_cache_is_generation_with_one(name: str, scheme: CacheScheme | None) -> None:
    model, tokens = model_of(name), ids(6)
    attach_cache_(model, scheme)
    settings = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(tokens, use_cache=False, **settings), model.generate(tokens, **settings))
    with torch.no_grad():
        assert cache_of(model(tokens, use_cache=False)) is None


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_padding_on_the_left_needs_no_positions_behind_a_prefix(name: str) -> None:
    model = with_prefix(model_of(name), ids(PREFIX, 1, seed=3)[0], None)
    text = ids(9)
    padded = torch.nn.functional.pad(text, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(text), (3, 0))
    assert_close(logits(model, padded, attention_mask=mask)[:, 3:], logits(model, text))


def test_padding_on_the_right_is_no_text() -> None:
    prefix = PrefixIds((7, 8, 9), 7)
    rows, mask = torch.tensor([[7, 8, 9, 0, 0], [7, 8, 9, 1, 0]]), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    assert repeated_prefix(rows, mask, prefix).int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]


@pytest.mark.parametrize("scheme", ["token", "window", "channel"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_looked_up_tokens_change_no_text_or_are_refused(scheme: str, name: str) -> None:
    model, tokens = model_of(name), ids(12, batch=1).repeat(1, 2)
    attach_cache_(model, SCHEMES[scheme])
    settings = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 12, "do_sample": False}
    target = model.generate(tokens, **settings)
    if SCHEMES[scheme].window:
        # Newer releases of transformers ask beforehand whether tokens can be taken back.
        with pytest.raises(ValueError, match=r"cannot return to 16 bits|can be cropped"):
            model.generate(tokens, prompt_lookup_num_tokens=3, **settings)
        return
    assert torch.equal(model.generate(tokens, prompt_lookup_num_tokens=3, **settings), target)


def test_another_attention_is_refused_while_a_cache_is_attached() -> None:
    model, tokens = model_of("llama"), ids(5)
    attach_cache_(model, CacheScheme(4))
    model.set_attn_implementation("eager")
    with pytest.raises(BadRecipe, match="detach the cache first"):
        logits(model, tokens)


def test_ids_without_states_are_refused() -> None:
    model = model_of("llama")
    attach_cache_(model, None, PrefixIds((1, 2)))
    with pytest.raises(BadRecipe, match="not its keys and values"):
        logits(model, ids(5))


def test_groups_larger_than_a_head_are_refused() -> None:
    with pytest.raises(BadRecipe, match="at most 16"):
        attach_cache_(model_of("llama"), CacheScheme(4, 17))


def test_additive_masks_are_refused() -> None:
    model = model_of("llama")
    attach_cache_(model, CacheScheme(4))
    with pytest.raises(BadRecipe, match="only boolean"):
        logits(model, ids(5), attention_mask=torch.zeros(2, 1, 5, 5))


def test_a_positive_crop_is_refused_as_transformers_does() -> None:
    with pytest.raises(ValueError, match="negative"):
        KVCache(CacheScheme(4), 2).crop(3)


@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_a_coded_cache_runs_under_autocast(scheme: str | None, prefixed: bool) -> None:
    """Whose products are less exact, and which must leave codes and scales alone."""
    model, tokens = random_model("llama"), ids(12)
    chosen = None if scheme is None else replace(SCHEMES[scheme], bits=8)
    if prefixed:
        model = with_prefix(model, ids(PREFIX, 1, seed=3)[0], chosen)
    else:
        attach_cache_(model, chosen)
    target = logits(model, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        actual = logits(model, tokens).float()
        in_two = in_pieces(model, tokens, (7, 5)).float()
    for other in (actual, in_two):
        assert float((other - target).norm() / target.norm()) < 0.05


def test_a_crop_that_some_of_a_cache_cannot_make_takes_nothing() -> None:
    """Keys by channel end in whole groups of tokens and values do not: one could give back what the other cannot."""
    scheme, tokens = CacheScheme(2, 4, "channel", window=4), ids(10)
    model = model_of("llama")
    attach_cache_(model, scheme)
    with torch.no_grad():
        past = cache_of(model(tokens, use_cache=True))
        for removed in range(1, 10):
            before = [(layer.store.keys.length, layer.store.values.length) for layer in past.layers]
            kept = copy.deepcopy(past)
            try:
                past.crop(-removed)
            except ValueError:
                assert [(layer.store.keys.length, layer.store.values.length) for layer in past.layers] == before
                new = ids(1, seed=5)
                assert_close(model(new, **passing(model, past)).logits, model(new, **passing(model, kept)).logits)
                return
            past = kept
    raise AssertionError("every crop was made; the test shows nothing")


def test_gradient_checkpointing_which_drops_caches_is_refused() -> None:
    model, tokens = with_prefix(model_of("llama"), ids(PREFIX, 1, seed=3)[0], None), ids(5)
    model.train()
    # By its name in transformers 5, or in those before.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with pytest.raises(BadRecipe, match="gradient checkpointing"):
        model(tokens)
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    assert torch.isfinite(model(tokens).logits).all()


def test_a_text_behind_a_prefix_comes_in_one_piece() -> None:
    model = with_prefix(model_of("llama"), ids(PREFIX, 1, seed=3)[0], None)
    with pytest.raises(BadRecipe, match="leave prefill_chunk_size out"):
        model.generate(ids(8), max_new_tokens=2, prefill_chunk_size=4)


def test_torch_compile_takes_a_model_on_a_coded_cache() -> None:
    model, tokens = model_of("llama"), ids(9)
    attach_cache_(model, CacheScheme(4))
    target = logits(model, tokens, use_cache=False)
    torch._dynamo.reset()
    assert_close(logits(torch.compile(model, backend="eager"), tokens, use_cache=False), target)
