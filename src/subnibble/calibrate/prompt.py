"""Tokens of a system prompt: text, a text file, the system turn that the chat template writes, or BOS alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from subnibble.calibrate.chat_template import has_template, in_template
from subnibble.calibrate.tokens import bos_token, text_ids
from subnibble.errors import BadRecipe
from subnibble.paths import expanded, is_file
from subnibble.tensor.cache_scheme import PrefixIds
from subnibble.text_file import check_characters, read_text_file

# "auto" (sink tokens) needs calibration data and is resolved while a model is quantized; see `sink_prefix`.
DEFAULT, BOS, AUTO = "default", "bos", "auto"
# A prompt with such an ending is more likely a mistyped file name than text.
_TEXT_FILES = (".txt", ".md", ".text")
# Placeholders that occur in no template.
_SYSTEM, _USER = "\u2983system\u2984", "\u2983user\u2984"


def prefix_ids(prompt: str, tokenizer: Any) -> PrefixIds:
    """Tokens of the prefix for a system prompt.

    prompt: "default" (the system turn that the chat template writes without being asked), "bos", a file name, or text.
        Text becomes a system turn if the chat template has system turns; otherwise it stays plain, after BOS if the
        tokenizer has one.
    tokenizer: of transformers.
    Raises `BadRecipe` for "auto", for an empty prompt, and if the tokenizer lacks what `prompt` needs.
    """
    check_characters(prompt, "the system prompt", BadRecipe)
    bos, added = tokenizer.bos_token_id, bos_token(tokenizer)
    if prompt == AUTO:
        raise BadRecipe(
            'system prompt "auto" is found in calibration text, so only quantizing can use it; give default, bos, text '
            "or a text file"
        )
    if prompt == BOS:
        if bos is None:
            raise BadRecipe("this tokenizer has no BOS token; give text with --system-prompt")
        return PrefixIds((int(bos),), added)
    turn = _system_turn(tokenizer)
    text = default_turn(tokenizer) if prompt == DEFAULT else None
    if prompt == DEFAULT and text is None:
        if not has_template(tokenizer):
            raise BadRecipe("this model's tokenizer has no chat template; give text with --system-prompt")
        raise BadRecipe("this model's chat template writes no system turn by itself; give text with --system-prompt")
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


def prompt_prefix(prompt: str | None, load_tokenizer: Callable[[], Any]) -> PrefixIds | None:
    """Tokens of the prefix for a system prompt; None without a prompt, and for "auto", which is resolved later.

    prompt: as in `prefix_ids`, or None.
    load_tokenizer: returns the tokenizer; called only if it is needed.
    """
    return None if prompt is None or prompt == AUTO else prefix_ids(prompt, load_tokenizer())


def sink_prefix(sinks: tuple[int, ...], tokenizer: Any) -> PrefixIds:
    """The prefix of sink tokens, followed by BOS (EOS if the tokenizer has no BOS).

    sinks: token ids that become attention sinks, from `calibrate/sinks.py`.
    tokenizer: of transformers.
    """
    last = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = [*(token for token in sinks if token != last), *([] if last is None else [last])]
    if not ids:
        raise BadRecipe(
            'system prompt "auto": this model has no sink tokens, and its tokenizer has neither BOS nor EOS; leave '
            '"auto" out'
        )
    return PrefixIds(tuple(map(int, ids)), bos_token(tokenizer))


def default_turn(tokenizer: Any) -> str | None:
    """Text of the system turn that the chat template writes without being asked, or None if it writes none."""
    turn = _system_turn(tokenizer)
    rendered = in_template(tokenizer, [{"role": "user", "content": _USER}])
    if turn is None or rendered is None or not turn[1] or not rendered.startswith(turn[0]):
        return None
    end = rendered.find(turn[1], len(turn[0])) + len(turn[1])
    return rendered[:end] if len(turn[1]) <= end <= rendered.find(_USER) else None


def is_system_turn(prefix: PrefixIds, tokenizer: Any) -> bool:
    """Whether a prefix is a system turn of the chat template, and not just BOS or sink tokens."""
    turn = _system_turn(tokenizer)
    return turn is not None and bool(turn[0]) and turn[0].strip() in str(tokenizer.decode(list(prefix.ids)))


def _text(prompt: str) -> str:
    """The prompt itself, or the content of the file with this name, without a line break at its end."""
    if not is_file(prompt):
        if prompt.lower().endswith(_TEXT_FILES) and len(prompt.split()) == 1:
            raise BadRecipe(f"--system-prompt {prompt}: there is no such file; give an existing file, or text")
        return prompt
    return read_text_file(expanded(prompt), BadRecipe).removesuffix("\n")


def _system_turn(tokenizer: Any) -> tuple[str, str] | None:
    """What the chat template writes before and after the text of a system turn; None if it has no system turns."""
    rendered = in_template(tokenizer, [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}])
    alone = in_template(tokenizer, [{"role": "system", "content": _SYSTEM}])
    if rendered is None or alone is None or not rendered.startswith(alone) or alone.count(_SYSTEM) != 1:
        return None
    before, _, after = alone.partition(_SYSTEM)
    return before, after
