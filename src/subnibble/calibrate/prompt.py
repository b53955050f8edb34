"""The tokens of a system prompt: text, a file of text, the chat template's own system turn, or BOS alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from subnibble.calibrate.chat_template import has_template, in_template
from subnibble.calibrate.tokens import bos_token, text_ids
from subnibble.errors import BadRecipe
from subnibble.paths import expanded, is_file
from subnibble.tensor.cache_scheme import PrefixIds
from subnibble.text_file import check_characters, read_text_file

# "auto" is found in calibration text, while a model is quantized.
DEFAULT, BOS, AUTO = "default", "bos", "auto"
# Endings of what is more likely a file's name with a mistake than a prompt.
_TEXT_FILES = (".txt", ".md", ".text")
# Text that no template contains.
_SYSTEM, _USER = "\u2983system\u2984", "\u2983user\u2984"


def prefix_ids(prompt: str, tokenizer: Any) -> PrefixIds:
    """The prefix that `prompt` asks for, in the tokens of a transformers `tokenizer`.

    prompt: "default", the system turn that the chat template writes by itself; "bos"; a file's name; or text. Text
    becomes a system turn where the chat template has such turns; else it comes bare, behind BOS if there is one.
    """
    check_characters(prompt, "the system prompt", BadRecipe)
    bos, added = tokenizer.bos_token_id, bos_token(tokenizer)
    if prompt == AUTO:
        raise BadRecipe('system prompt "auto" is found in calibration text, while a model is quantized; give another')
    if prompt == BOS:
        if bos is None:
            raise BadRecipe("this tokenizer has no BOS token; give --system-prompt text")
        return PrefixIds((int(bos),), added)
    turn = _system_turn(tokenizer)
    text = default_turn(tokenizer) if prompt == DEFAULT else None
    if prompt == DEFAULT and text is None:
        if not has_template(tokenizer):
            raise BadRecipe("this model's tokenizer has no chat template; give --system-prompt text")
        raise BadRecipe("this model's chat template writes no system turn by itself; give --system-prompt text")
    if text is None:
        text = _text(prompt)
        text = f"{turn[0]}{text}{turn[1]}" if turn is not None else text
    ids = text_ids(tokenizer, text, "the system prompt")
    first = added if turn is not None else bos
    if first is not None and ids[:1] != [first]:
        ids = [first, *ids]
    if not ids:
        raise BadRecipe("the system prompt is empty; give some text, or leave --system-prompt out")
    return PrefixIds(tuple(map(int, ids)), added)


def given_prefix(prompt: str | None, load_tokenizer: Callable[[], Any]) -> PrefixIds | None:
    """As `prefix_ids`; None for no prompt, and for one that is to be found."""
    return None if prompt is None or prompt == AUTO else prefix_ids(prompt, load_tokenizer())


def sink_prefix(sinks: tuple[int, ...], tokenizer: Any) -> PrefixIds:
    """The prefix of tokens that become sinks (`calibrate/sinks.py`), with BOS behind them, EOS where there is none."""
    last = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = [*(token for token in sinks if token != last), *([] if last is None else [last])]
    if not ids:
        raise BadRecipe('this model has no sink tokens, and its tokenizer neither BOS nor EOS; leave "auto" out')
    return PrefixIds(tuple(map(int, ids)), bos_token(tokenizer))


def default_turn(tokenizer: Any) -> str | None:
    """The system turn that the chat template writes by itself, None if it writes none."""
    turn = _system_turn(tokenizer)
    rendered = in_template(tokenizer, [{"role": "user", "content": _USER}])
    if turn is None or rendered is None or not turn[1] or not rendered.startswith(turn[0]):
        return None
    end = rendered.find(turn[1], len(turn[0])) + len(turn[1])
    return rendered[:end] if len(turn[1]) <= end <= rendered.find(_USER) else None


def is_system_turn(prefix: PrefixIds, tokenizer: Any) -> bool:
    """Whether a prefix is a system turn of the chat template, and not BOS or sink tokens alone."""
    turn = _system_turn(tokenizer)
    return turn is not None and bool(turn[0]) and turn[0].strip() in str(tokenizer.decode(list(prefix.ids)))


def _text(prompt: str) -> str:
    """The prompt, or what is in the file of this name; a line break at its end is not part of it."""
    if not is_file(prompt):
        if prompt.lower().endswith(_TEXT_FILES) and len(prompt.split()) == 1:
            raise BadRecipe(f"--system-prompt {prompt}: there is no such file; give its full name, or text")
        return prompt
    return read_text_file(expanded(prompt), BadRecipe).removesuffix("\n")


def _system_turn(tokenizer: Any) -> tuple[str, str] | None:
    """What the chat template writes before and behind the text of a system turn; None if it has no such turn."""
    rendered = in_template(tokenizer, [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}])
    alone = in_template(tokenizer, [{"role": "system", "content": _SYSTEM}])
    if rendered is None or alone is None or not rendered.startswith(alone) or alone.count(_SYSTEM) != 1:
        return None
    before, _, behind = alone.partition(_SYSTEM)
    return before, behind
