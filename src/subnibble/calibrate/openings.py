"""What the documents of self-written calibration windows begin with, as token ids.

A document begins in one of three ways:

    bos          with BOS, after which the model draws from its own distribution of first tokens.
    vocabulary   with a token of the vocabulary, each as likely as the others; the next four tokens are the most likely
                 ones, because they follow a token that the model would not have chosen (LLM-QAT, Liu et al. 2023, arXiv
                 2305.17888, section 2.1: 3 to 5 such tokens). BOS comes first if the tokenizer puts it before texts.
    chat         with what the chat template writes before a user's message. The model writes the message; then comes
                 what the template writes before an answer, and the model answers (Magpie, Xu et al. 2024, arXiv
                 2406.08464, section 2).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

from subnibble.calibrate.chat_template import has_template, in_template
from subnibble.calibrate.prompt import is_system_turn
from subnibble.calibrate.sampling import AUTO, WindowSampling, joined
from subnibble.calibrate.tokens import bos_token, plain_tokens, prompt_ids, text_ids
from subnibble.errors import BadRecipe, CalibrationError
from subnibble.tensor.cache_scheme import PrefixIds

# Texts that occur in no template.
_USER, _ANSWER, _SYSTEM = "\u2983user\u2984", "\u2983answer\u2984", "\u2983system\u2984"


@dataclass(frozen=True)
class Opening:
    """How a document begins.

    ids: token ids that are given; empty if the first token is drawn like all others.
    draws: whether a token of the vocabulary follows, each as likely as the others.
    answer: token ids that follow the user's message, whose end-of-text token is the first of them; empty if the
        document ends there.
    """

    ids: tuple[int, ...]
    draws: bool = False
    answer: tuple[int, ...] = ()


@dataclass(frozen=True)
class Openings:
    """How the documents of all windows begin and end.

    kinds: the beginnings that take turns, at least one.
    plain: ids of the vocabulary that `Opening.draws` chooses from, sorted; empty if no opening does.
    ends: token ids that end a document.
    prefix: the prompt prefix that comes before every window and is no part of it, None for none.
    """

    kinds: tuple[Opening, ...]
    plain: tuple[int, ...]
    ends: frozenset[int]
    prefix: PrefixIds | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of all ids, 64 hexadecimal digits."""
        return hashlib.sha256(repr((self.kinds, self.plain, sorted(self.ends), self.prefix)).encode()).hexdigest()


def chosen_start(sampling: WindowSampling, tokenizer: Any) -> WindowSampling:
    """The settings with `start` chosen for a tokenizer, where it is "auto" and there are no prompts.

    tokenizer: of transformers.
    Raises `BadRecipe` if the tokenizer does not have what `start` needs.
    """
    if sampling.prompts:
        return sampling
    if sampling.start == AUTO:
        first = "vocabulary" if bos_token(tokenizer) is None else "bos"
        try:
            chat = ["chat"] if _turns(tokenizer) is not None else []
        except BadRecipe as error:
            raise BadRecipe(f'{error}; or set sampling start = "{first}"') from error
        return replace(sampling, start=joined([first, *chat]))
    if "bos" in sampling.starts and tokenizer.bos_token_id is None:
        raise BadRecipe('sampling start is "bos", and this tokenizer has no BOS token; use start = "vocabulary"')
    if "chat" in sampling.starts and _turns(tokenizer) is None:
        what = (
            "this model's chat template writes nothing before a user's message, or refuses it"
            if has_template(tokenizer)
            else "this model's tokenizer has no chat template"
        )
        raise BadRecipe(f'sampling start is "chat", and {what}; use start = "auto"')
    return sampling


def openings(
    sampling: WindowSampling, tokenizer: Any, vocabulary: int, ends: frozenset[int], prefix: PrefixIds | None
) -> Openings:
    """How documents begin.

    sampling: settings, from `chosen_start`.
    tokenizer: of transformers.
    vocabulary: rows of the embedding of the model.
    ends: token ids that end a text, of the model's generation config.
    prefix: the prompt prefix before every window, or None.
    Raises `CalibrationError` for token ids that the model does not know.
    """
    end = tokenizer.eos_token_id
    ends = ends if end is None else ends | {int(end)}
    kinds = [Opening(tuple(prompt_ids(tokenizer, text, "sampling prompts"))) for text in sampling.prompts]
    if not kinds:
        kinds = [_opening(start, tokenizer, ends, prefix) for start in sampling.starts]
    plain = tuple(plain_tokens(tokenizer, vocabulary)) if any(kind.draws for kind in kinds) else ()
    unknown = {id for kind in kinds for id in (*kind.ids, *kind.answer)} | ends
    if unknown and not 0 <= min(unknown) <= max(unknown) < vocabulary:
        raise CalibrationError(
            f"self-calibration: the tokenizer's ids run up to {max(unknown)}, the model knows 0 to {vocabulary - 1}; "
            "is the tokenizer that of another model?"
        )
    if prefix is None and not all(kind.ids or kind.draws for kind in kinds):
        raise CalibrationError("self-calibration: a document's beginning has no tokens; give other sampling prompts")
    return Openings(tuple(kinds), plain, ends, prefix)


def _opening(start: str, tokenizer: Any, ends: frozenset[int], prefix: PrefixIds | None) -> Opening:
    if start == "bos":
        return Opening((int(tokenizer.bos_token_id),))
    if start == "vocabulary":
        bos = bos_token(tokenizer)
        return Opening(() if bos is None else (bos,), draws=True)
    turns = _turns(tokenizer)
    assert turns is not None
    before, between = turns
    if prefix is not None and is_system_turn(prefix, tokenizer):
        # The prefix is the system turn of all documents.
        before = _after_system(tokenizer) or before
    answer = tuple(text_ids(tokenizer, between, "the chat template"))
    # Else the template does not end a user's turn as the model ends a text, and the model writes its answer itself.
    closes = answer[:1] != () and answer[0] in ends
    return Opening(tuple(text_ids(tokenizer, before, "the chat template")), answer=answer if closes else ())


def _turns(tokenizer: Any) -> tuple[str, str] | None:
    """What the chat template writes before a user's message, and between it and the answer.

    None if there is no template, or if it refuses the turns or writes nothing before the message.
    """
    user, answer = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}
    rendered = in_template(tokenizer, [user, answer])
    if rendered is None or rendered.count(_USER) != 1 or rendered.count(_ANSWER) != 1:
        return None
    before, _, rest = rendered.partition(_USER)
    return (before, rest.partition(_ANSWER)[0]) if before else None


def _after_system(tokenizer: Any) -> str | None:
    """What the chat template writes between a system turn and a user's message, None if it has no system turns."""
    system = {"role": "system", "content": _SYSTEM}
    alone = in_template(tokenizer, [system])
    both = in_template(tokenizer, [system, {"role": "user", "content": _USER}])
    if alone is None or both is None or not both.startswith(alone):
        return None
    return both[len(alone) :].partition(_USER)[0] or None
