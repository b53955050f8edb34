"""A conversation: answers are those of the whole conversation, and only new tokens run."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from backends import CACHES, model_with
from test_generator import TEMPLATE

from conftest import Run, save_model
from subnibble import Generator
from subnibble.checkpoint.opening import open_source
from subnibble.errors import BadRecipe
from subnibble.generate.chat import Chat
from subnibble.generate.sampler import Sampler

SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0}
MESSAGES = ["w5 w6", "w7", "w8 w9 w10"]


@pytest.fixture(scope="module")
def tokenizer(folders: dict[str, Path]) -> Any:
    loaded = open_source(folders["llama"]).load_tokenizer()
    loaded.chat_template = TEMPLATE
    return loaded


def said(chat: Chat, message: str, **settings: Any) -> str:
    return "".join(chat.answer(message, **{**SETTINGS, **settings}))


@pytest.mark.parametrize("cache", CACHES)
def test_each_answer_is_that_to_the_whole_conversation(cache: str, tokenizer: Any) -> None:
    generator = Generator(model_with(cache, cache != "dynamic"), tokenizer)
    chat, turns = Chat(generator), list[dict[str, str]]()
    for number, message in enumerate(MESSAGES):
        turns.append({"role": "user", "content": message})
        expected = generator.generate(turns, **SETTINGS)
        assert said(chat, message) == expected.text
        assert chat.last is not None
        assert chat.last.ids == expected.ids
        # The last token of an answer has not run yet, and the end of the turn and the message are new.
        new = 1 + 1 + 1 + len(message.split()) + 1 + 1
        assert expected.prompt_tokens - chat.last.cached_tokens == (new if number else new - 2)
        turns.append({"role": "assistant", "content": expected.text})
        assert chat.turns == turns


def test_an_end_of_text_token_is_not_run_twice(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(model_with("dynamic", prefixed=False), tokenizer)
    generator.stop_ids = frozenset([0])
    # The second answer is not read.
    chosen = iter([10, 11, 0, 0])
    monkeypatch.setattr(Sampler, "pick", lambda *_: next(chosen))
    chat = Chat(generator)
    assert said(chat, "w5 w6") == "w10 w11"
    assert chat.last is not None
    assert chat.last.ids == (10, 11, 0)
    said(chat, "w7")
    # w1 w5 w6 w0 w2 and w10 w11 have run; new are the template's w0 in place of the token that ended the turn, and
    # w1 w7 w0 w2.
    assert (chat.last.cached_tokens, chat.last.prompt_tokens) == (7, 12)


def test_what_was_said_before_a_stop_stays_in_the_conversation(tokenizer: Any) -> None:
    generator = Generator(model_with("by token", prefixed=False), tokenizer)
    whole, chat = generator.generate([{"role": "user", "content": "w5"}], **SETTINGS), Chat(generator)
    steps = iter([False, False, True])
    pieces = list(chat.answer("w5", lambda: next(steps), **SETTINGS))
    assert "".join(pieces) == " ".join(whole.text.split()[:3])
    assert chat.turns[1]["content"] == "".join(pieces)
    assert chat.last is not None
    assert chat.last.finish_reason == "cancelled"
    # A caller that leaves the iterator does the same.
    left = Chat(generator)
    answer = left.answer("w5", **SETTINGS)
    next(answer)
    answer.close()
    assert left.turns[1]["content"] == whole.text.split()[0]
    turns = [*chat.turns, {"role": "user", "content": "w7"}]
    assert said(chat, "w7") == generator.generate(turns, **SETTINGS).text


def test_an_answer_cut_at_a_stop_string_is_read_as_it_was_shown(tokenizer: Any) -> None:
    generator = Generator(model_with("by token", prefixed=False), tokenizer)
    words = said(Chat(generator), "w5").split()
    chat = Chat(generator)
    assert said(chat, "w5", stop=f"{words[2]} {words[3][:1]}").split() == words[:2]
    turns = [*chat.turns, {"role": "user", "content": "w7"}]
    expected = generator.generate(turns, **SETTINGS)
    assert said(chat, "w7") == expected.text
    assert chat.last is not None
    assert chat.last.prompt_tokens == expected.prompt_tokens


def test_a_changed_system_turn_and_a_reset_begin_anew(tokenizer: Any) -> None:
    generator = Generator(model_with("by token", prefixed=False), tokenizer)
    chat = Chat(generator, system="w40 w41")
    first = said(chat, "w5")
    assert first == generator.generate(chat.turns[:2], **SETTINGS).text
    chat.system = "w42"
    turns = [*chat.turns, {"role": "user", "content": "w7"}]
    assert turns[0] == {"role": "system", "content": "w42"}
    assert said(chat, "w7") == generator.generate(turns, **SETTINGS).text
    chat.reset()
    chat.system = "w40 w41"
    assert said(chat, "w5") == first


def test_a_message_that_does_not_fit_is_not_part_of_the_conversation(tokenizer: Any) -> None:
    chat = Chat(Generator(model_with("by token", prefixed=False), tokenizer))
    said(chat, "w5")
    turns = chat.turns
    with pytest.raises(BadRecipe, match="and the model 128 positions"):
        said(chat, " ".join(["w3"] * 130))
    assert chat.turns == turns
    assert said(chat, "w7")


@pytest.fixture
def folder(tokenizer: Any, tmp_path: Path) -> Path:
    saved = save_model("llama", tmp_path / "model")
    tokenizer.save_pretrained(saved)
    return saved


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    remaining = iter(lines)

    def read(shown: str) -> str:
        line = next(remaining, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", read)


def test_the_command_chats(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    typed(
        monkeypatch, "w5 w6", "", "^C", "/what", "/system w40", "w7", f"/save {saved}", "/reset", "w5 w6",
        " ".join(["w3"] * 130), "/exit", "w9",
    )  # fmt: skip
    code, out, err = run("chat", folder, "--max-new-tokens", 4, "--temperature", 0)
    assert code == 0, err
    lines = [line for line in out.splitlines() if line]
    assert len(lines) == 3
    assert all(len(line.split()) == 4 for line in lines)
    turns = json.loads(saved.read_text())
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [turn["content"] for turn in turns[2::2]] == lines[:2]
    generator = Generator(folder)
    assert lines[1] == generator.generate(turns[:4], max_new_tokens=4, temperature=0).text
    assert "/what is no command; there are /reset" in err
    assert "positions; give a shorter one" in err
    assert f"{saved}: 5 turns saved" in err


def test_ctrl_c_ends_an_answer_and_not_the_chat(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "w5 w6", "w7")
    handler, shown = signal.getsignal(signal.SIGINT), []

    def press(text: str) -> None:
        shown.append(text)
        if len(shown) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("subnibble.cli.generate.stream", press)
    code, _, err = run("chat", folder, "--max-new-tokens", 6, "--temperature", 0)
    assert code == 0, err
    # One step may end before the key is noticed; the second answer is whole.
    assert 2 + 6 <= len(shown) <= 3 + 6
    assert signal.getsignal(signal.SIGINT) == handler


def test_a_chat_needs_a_template(run: Run, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "w5")
    code, _, err = run("chat", folders["llama"])
    assert code == 2
    assert "no chat template" in err
