"""A prompt is continued as transformers would: alone or with others, at once or in parts, within the positions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import CACHES, PREFIX, model_with

from conftest import CONFIGS, Run
from subnibble import Generator
from subnibble.checkpoint.opening import open_source
from subnibble.errors import BadArgument, BadRecipe, CalibrationError
from subnibble.generate import loop
from subnibble.generate.context import Context
from subnibble.generate.prefix import attach_prefix_
from subnibble.generate.settings import Settings
from subnibble.hf import load_model
from subnibble.tensor.cache_scheme import PrefixIds

POSITIONS = 128
TEMPLATE = "{% for m in messages %}{{ m.role | replace('user', 'w1') | replace('assistant', 'w2') }} {{ m.content }} w0 {% endfor %}w2 "  # noqa: E501
PROMPTS = ["w3 w7", "w9", "w4 w5 w6 w7 w8 w9 w10 w11 w12", "w50 w2 w3 w3"]


@pytest.fixture(scope="module")
def tokenizer(folders: dict[str, Path]) -> Any:
    return open_source(folders["llama"]).load_tokenizer()


@pytest.fixture
def model(folders: dict[str, Path]) -> Any:
    return load_model(folders["llama"])


def ids_of(prompt: str) -> list[int]:
    return [int(word[1:]) for word in prompt.split()]


def continued(model: Any, ids: list[int], **settings: Any) -> list[int]:
    """The new tokens of transformers' own `generate`."""
    tokens = torch.tensor([ids])
    out = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, pad_token_id=0, **settings)
    return out[0, len(ids) :].tolist()


def test_greedy_tokens_are_the_likeliest_each(model: Any, tokenizer: Any) -> None:
    ids = [3, 7]
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    completion = Generator(model, tokenizer).generate("w3 w7", max_new_tokens=5, temperature=0)
    assert completion.text == " ".join(f"w{i}" for i in ids[2:])
    assert completion.ids == tuple(ids[2:])
    assert (completion.finish_reason, completion.prompt_tokens, completion.cached_tokens) == ("length", 2, 0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.pairwise
def test_greedy_tokens_are_those_of_transformers(name: str, cache: str, tokenizer: Any) -> None:
    model = model_with(cache, cache != "dynamic", name)
    model.generation_config.repetition_penalty = 1.3
    generator = Generator(model, tokenizer)
    for prompt in PROMPTS:
        expected = continued(model, ids_of(prompt), max_new_tokens=40)
        assert list(generator.generate(prompt, max_new_tokens=40).ids) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("cache", CACHES)
def test_several_prompts_give_what_each_gives_alone(cache: str, temperature: float, tokenizer: Any) -> None:
    generator = Generator(model_with(cache, cache != "dynamic"), tokenizer)
    settings = {"max_new_tokens": 20, "temperature": temperature, "seed": 3, "stop": ("w17", "w30 w4")}
    alone = [generator.generate(prompt, **settings) for prompt in PROMPTS]
    assert generator.generate(PROMPTS, **settings) == alone
    assert len({completion.ids for completion in alone}) == len(PROMPTS)


@pytest.mark.parametrize("cache", CACHES)
def test_a_prompt_in_parts_gives_the_tokens_of_the_whole(
    cache: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_with(cache, cache != "dynamic")
    expected = Generator(model, tokenizer).generate(PROMPTS, max_new_tokens=12, temperature=0)
    generator = Generator(model, tokenizer)
    monkeypatch.setattr(generator, "loop", lambda: loop.Loop(generator.backend, tokenizer, frozenset(), chunk=4))
    assert generator.generate(PROMPTS, max_new_tokens=12, temperature=0) == expected


def test_a_seed_repeats_draws_and_another_changes_them(model: Any, tokenizer: Any) -> None:
    generator = Generator(model, tokenizer)

    def drawn(temperature: float, seed: int) -> str:
        return generator.generate("w3 w7", max_new_tokens=12, temperature=temperature, seed=seed).text

    assert drawn(1.0, 1) == drawn(1.0, 1)
    assert len({drawn(1.0, seed) for seed in range(4)}) == 4
    assert drawn(1.0, 1) != drawn(0.0, 1)
    assert drawn(1e-4, 1) == drawn(0.0, 1)
    state = torch.get_rng_state()
    drawn(1.0, 1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("prompt", [0, 6])
def test_words_end_where_positions_do(prompt: int, model: Any, tokenizer: Any) -> None:
    if prompt:
        attach_prefix_(model, None, PrefixIds(tuple(range(prompt)), None))
    generator, room = Generator(model, tokenizer), POSITIONS - prompt
    for num_words, expected in ((room - 1, 1), (room - 3, 3), (4, 5)):
        text = " ".join((["w3", "w7"] * room)[:num_words])
        completion = generator.generate(text, max_new_tokens=5)
        assert len(completion.ids) == expected
        assert completion.finish_reason == "length"
    after_prefix = "" if prompt == 0 else " after a system prompt of 6"
    with pytest.raises(BadRecipe, match=f"{room} tokens{after_prefix} and the model 128 positions; give a shorter one"):
        generator.generate(" ".join(["w3"] * room))


@pytest.mark.parametrize("as_list", [False, True])
def test_an_end_of_text_token_ends_the_text(as_list: bool, model: Any, tokenizer: Any) -> None:
    free = Generator(model, tokenizer).generate("w3 w7", max_new_tokens=12, temperature=0)
    end = free.ids[5]
    first = free.ids.index(end)
    model.generation_config.eos_token_id = [90, end] if as_list else end
    completion = Generator(model, tokenizer).generate("w3 w7", max_new_tokens=12, temperature=0)
    assert completion.finish_reason == "stop"
    assert completion.ids == free.ids[: first + 1]
    assert list(completion.ids) == continued(model, [3, 7], max_new_tokens=12)
    # Each of several prompts ends by itself.
    several = Generator(model, tokenizer).generate(["w3 w7", *PROMPTS], max_new_tokens=12, temperature=0)
    assert several[0] == completion
    expected = [continued(model, ids_of(prompt), max_new_tokens=12) for prompt in PROMPTS]
    assert [list(other.ids) for other in several[1:]] == expected
    assert len({len(ids) for ids in expected}) > 1


def test_a_stop_string_over_several_tokens_ends_the_text_before_it(model: Any, tokenizer: Any) -> None:
    generator = Generator(model, tokenizer)
    free = generator.generate("w3 w7", max_new_tokens=12, temperature=0.9, seed=1)
    words = free.text.split()
    stop = f"{words[4]} {words[5]} {words[6][:2]}"
    settings = {"max_new_tokens": 12, "temperature": 0.9, "seed": 1, "stop": (stop, "none of these")}
    completion = generator.generate("w3 w7", **settings)
    assert completion.finish_reason == "stop"
    assert completion.text == free.text[: free.text.index(stop)]
    assert completion.ids == free.ids[:7]
    assert "".join(generator.stream("w3 w7", **settings)) == completion.text


def test_text_that_only_begins_a_stop_string_is_shown_at_the_end(model: Any, tokenizer: Any) -> None:
    free = Generator(model, tokenizer).generate("w3 w7", max_new_tokens=4, temperature=1.0, seed=1)
    settings = {"max_new_tokens": 5, "temperature": 1.0, "seed": 1, "stop": f"{free.text.split()[-1]} and more"}
    assert Generator(model, tokenizer).generate("w3 w7", **{**settings, "max_new_tokens": 4}) == free
    # The same where an end-of-text token ends it.
    model.generation_config.eos_token_id = Generator(model, tokenizer).generate("w3 w7", **settings).ids[-1]
    ended = Generator(model, tokenizer).generate("w3 w7", **settings)
    assert (ended.text, ended.finish_reason) == (free.text, "stop")


def test_streamed_pieces_are_the_text(model: Any, tokenizer: Any) -> None:
    generator = Generator(model, tokenizer)
    text = generator.generate("w3 w7", max_new_tokens=6).text
    pieces = generator.stream("w3 w7", max_new_tokens=6)
    assert next(pieces) == text.split()[0]
    assert "".join([text.split()[0], *pieces]) == text
    # What a caller leaves early is freed.
    left = generator.stream("w3 w7", max_new_tokens=6)
    next(left)
    left.close()
    assert generator.backend._caches == {}  # type: ignore[attr-defined]
    # A wrong setting is an error at once, not at the first piece.
    with pytest.raises(BadRecipe, match="top_k is -1"):
        generator.stream("w3", top_k=-1)


def test_a_prompt_that_repeats_the_prefix_is_read_after_it(tokenizer: Any) -> None:
    generator = Generator(model_with("by token", prefixed=True), tokenizer)
    begun = " ".join(f"w{i}" for i in PREFIX.ids)
    whole = generator.generate(f"{begun} w3 w7", max_new_tokens=8, temperature=0)
    assert whole == generator.generate("w3 w7", max_new_tokens=8, temperature=0)
    assert whole.prompt_tokens == 2


def test_turns_are_written_in_the_chat_template(model: Any, folders: dict[str, Path]) -> None:
    tokenizer = open_source(folders["llama"]).load_tokenizer()
    turns = [{"role": "user", "content": "w5 w6"}]
    with pytest.raises(BadRecipe, match="no chat template"):
        Generator(model, tokenizer).generate(turns)
    tokenizer.chat_template = TEMPLATE
    generator = Generator(model, tokenizer)
    expected = generator.generate("w1 w5 w6 w0 w2", max_new_tokens=4)
    assert generator.generate(turns, max_new_tokens=4) == expected
    assert generator.generate([turns, "w3"], max_new_tokens=4)[0] == expected


def test_options_of_loading_reach_the_model(folders: dict[str, Path]) -> None:
    generator = Generator(
        folders["llama"], kv_bits=4, kv={"group_size": 8}, system_prompt="w5 w9 w2", device="cpu", dtype="float32"
    )
    assert generator.backend.scheme == CACHES["by token"]
    assert generator.backend.prefix == PREFIX
    completion = generator.generate("w3 w7", max_new_tokens=5)
    own = model_with("by token", prefixed=True)
    assert completion.ids == Generator(own, generator.tokenizer).generate("w3 w7", max_new_tokens=5).ids


def test_the_models_generation_config_is_read_beside_it(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "model")
    content = {"max_new_tokens": 3, "do_sample": True, "temperature": 5.0, "eos_token_id": [1, 2]}
    (folder / "generation_config.json").write_text(json.dumps(content))
    generator = Generator(folder)
    assert generator.stop_ids == {1, 2}
    drawn = generator.generate("w3", seed=1)
    assert len(drawn.ids) == 3
    assert drawn.ids != generator.generate("w3", temperature=0).ids
    assert drawn == Generator(load_model(folder), generator.tokenizer).generate("w3", seed=1)


def test_what_cannot_be_continued_is_named(model: Any, tokenizer: Any, folders: dict[str, Path]) -> None:
    generator = Generator(model, tokenizer)
    for wrong in ("", [""], " "):
        with pytest.raises(BadRecipe, match="the prompt is empty"):
            generator.generate(wrong)
    for wrong in (None, 3, [], [3], {}):
        with pytest.raises(BadArgument, match=r"prompt is .*give a text"):
            generator.generate(wrong)  # type: ignore[call-overload]
    with pytest.raises(BadArgument, match="comes without its tokenizer"):
        Generator(model)
    with pytest.raises(BadRecipe, match="backend is 'none'; choose one of auto, native, torch"):
        Generator(folders["llama"], backend="none")
    with pytest.raises(BadRecipe, match="unknown option 'kvbits' of loading"):
        Generator(folders["llama"], kvbits=4)
    tokenizer = open_source(folders["llama"]).load_tokenizer()
    tokenizer.add_tokens(["new"])
    with pytest.raises(CalibrationError, match="the model knows 0 to 95"):
        Generator(model, tokenizer).generate("new")


def test_a_call_that_is_interrupted_leaves_no_half_of_its_tokens(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(model, tokenizer)
    request = generator.request([3, 7], Settings(max_new_tokens=5))
    context, running = Context(generator.backend), generator.loop()
    running.add(request, context)
    running.step()
    half = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        running.step()
    half.remove()
    running.close()
    assert (context.ids, generator.backend.length(context.slot)) == ([], 0)


def interrupt(module: Any, args: Any) -> None:
    raise KeyboardInterrupt


def test_the_command_streams_to_a_terminal_what_it_writes_elsewhere(
    run: Run, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("generate", folders["llama"], "--prompt", "w3 w7", "--max-new-tokens", 12, "--temperature", 0.9)
    more = ("--top-k", 20, "--top-p", 0.9, "--min-p", 0.01, "--repetition-penalty", 1.1, "--seed", 2)
    code, text, err = run(*words, *more)
    assert code == 0, err
    settings = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 2}
    generator = Generator(folders["llama"])
    assert text.rstrip("\n") == generator.generate("w3 w7", max_new_tokens=12, **settings).text
    pieces: list[str] = []
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("subnibble.cli.generate.stream", pieces.append)
    stop = ("--stop", " ".join(text.split()[5:7]), "--stop", "no such text")
    code, _, err = run(*words, *more, *stop)
    assert code == 0, err
    assert "".join(pieces).split() == text.split()[:5]
    assert len(pieces) > 1


def test_the_command_says_what_cannot_be(run: Run, folders: dict[str, Path]) -> None:
    code, _, err = run("generate", folders["llama"], "--prompt", " ".join(["w1"] * 200))
    assert code == 2
    assert "the prompt has 200 tokens and the model 128 positions" in err
    for seed in (10**22, -1):
        code, _, err = run("generate", folders["llama"], "--prompt", "w1", "--seed", seed)
        assert code == 2
        assert "--seed" in err
