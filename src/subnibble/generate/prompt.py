"""Token ids of what a caller wants continued: a text, or the turns of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from subnibble.arguments import described
from subnibble.calibrate.chat_template import before_answer
from subnibble.calibrate.prompt import default_turn, is_system_turn
from subnibble.calibrate.tokens import check_vocabulary, prompt_ids
from subnibble.errors import BadArgument, BadRecipe
from subnibble.generate.backend import Backend
from subnibble.tensor.cache_scheme import PrefixIds

# A text, or turns {"role": ..., "content": ...}, of which the last one is the user's.
Turns = Sequence[Mapping[str, str]]
Prompt = str | Turns


def conversation_text(tokenizer: Any, turns: Turns, prefix: PrefixIds | None) -> str:
    """Text of a conversation in the tokenizer's chat template, ready for the model's turn.

    tokenizer: of transformers.
    prefix: the model's prompt prefix, or None. If it is a system turn, the template's default system turn is left out.
    Raises `BadRecipe` if there is no template, or if it refuses the turns.
    """
    text = before_answer(tokenizer, [dict(turn) for turn in turns])
    has_system_turn = turns[0].get("role") == "system"
    replaced = not has_system_turn and prefix is not None and is_system_turn(prefix, tokenizer)
    return text.removeprefix(default_turn(tokenizer) or "") if replaced else text


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt consists of turns."""
    return isinstance(prompt, Sequence) and bool(prompt) and all(isinstance(turn, Mapping) for turn in prompt)


def token_ids(tokenizer: Any, prompt: Prompt, backend: Backend) -> list[int]:
    """Token ids of a prompt, without those that repeat the model's prefix.

    tokenizer: of transformers.
    Raises `BadRecipe` if the prompt is empty or alone too long for the model.
    """
    if isinstance(prompt, str):
        text = prompt
    elif is_conversation(prompt):
        text = conversation_text(tokenizer, prompt, backend.prefix)
    else:
        raise BadArgument(
            f'the prompt is {described(prompt)}; give a text, or turns [{{"role": "user", "content": "Hello"}}]'
        )
    ids = prompt_ids(tokenizer, text, "the prompt")
    if not ids:
        raise BadRecipe("the prompt is empty; give some text to continue")
    check_ids(ids, backend)
    return ids if backend.prefix is None else ids[backend.prefix.repeated(ids) :]


def check_ids(ids: Sequence[int], backend: Backend) -> None:
    """Raise `CalibrationError` if the model does not know a token of a prompt."""
    check_vocabulary(torch.tensor(list(ids)), backend.vocab_size, "the prompt")


def tokens_that_fit(ids: Sequence[int], most: int, backend: Backend) -> int:
    """Number of new tokens, at most `most`, that have positions after a prompt.

    ids: token ids of the prompt.
    Raises `BadRecipe` if there is no position left.
    """
    if backend.max_positions is None:
        return most
    room = backend.max_positions - len(ids)
    if room <= 0:
        prefix_length = 0 if backend.prefix is None else len(backend.prefix.ids)
        after_prefix = f" after a system prompt of {prefix_length}" if prefix_length else ""
        raise BadRecipe(
            f"the prompt has {len(ids)} tokens{after_prefix} and the model {backend.max_positions + prefix_length} "
            "positions; give a shorter one"
        )
    return min(most, room)
