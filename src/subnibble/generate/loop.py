"""Generate several sequences at once; each begins and ends by itself.

One step runs one call of the backend: of sequences that still read their prompt, its next part; of the others, the
token that was chosen last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from subnibble.generate.backend import Backend
from subnibble.generate.context import Context
from subnibble.generate.detokenize import Detokenizer
from subnibble.generate.sampler import Sampler
from subnibble.generate.settings import Sampling
from subnibble.generate.stop_text import StopText

# Tokens of a prompt that one step runs at most, so that other sequences need not wait for a long prompt.
CHUNK = 512


@dataclass(frozen=True)
class Request:
    """What to generate.

    ids: token ids of the prompt, at least one, without the model's prefix.
    sampling: how tokens are chosen.
    max_new_tokens: largest number of new tokens.
    stop: stop strings.
    """

    ids: tuple[int, ...]
    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """What was generated for one prompt.

    text: the new text, without the stop string and special tokens.
    ids: the new token ids, with those of the stop string or the end of text.
    finish_reason: "stop" if the text ended with a stop string or an end-of-text token, "length" if the number of tokens
        or the model's positions were used up, "cancelled" if the caller ended it.
    prompt_tokens: number of tokens in the prompt, without the model's prefix.
    cached_tokens: how many of them did not have to run, because their keys and values were there.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Piece:
    """The result of one step for one sequence.

    number: of the sequence, from `Loop.add`.
    text: new text; empty while a prompt is read or text is held back.
    completion: the whole result if the sequence has ended, else None.
    """

    number: int
    text: str
    completion: Completion | None = None


@dataclass
class _Sequence:
    """A sequence that is being generated.

    pending: tokens that the backend has not run yet.
    """

    request: Request
    context: Context
    owns_context: bool
    cached: int
    pending: list[int]
    sampler: Sampler
    detokenizer: Detokenizer
    stops: StopText
    ids: list[int] = field(default_factory=list)
    text: str = ""

    def advance(self, logits: Tensor, eos: frozenset[int]) -> tuple[str, str | None]:
        """Choose the next token after these logits (vocabulary,); returns new text and the finish reason, if any."""
        token = self.sampler.pick(logits, self.context.ids)
        self.ids.append(token)
        reason: str | None = "stop"
        if token in eos:
            text = self.stops.rest()
        else:
            text, has_stopped = self.stops.push(self.detokenizer.push(token))
            is_full = len(self.ids) >= self.request.max_new_tokens
            reason = "stop" if has_stopped else "length" if is_full else None
            if reason == "length":
                text += self.stops.rest()
            self.pending = [token]
        self.text += text
        return text, reason

    def completion(self, reason: str) -> Completion:
        """The result, once the sequence has ended."""
        return Completion(self.text, tuple(self.ids), reason, len(self.request.ids), self.cached)


class Loop:
    """Sequences that are generated together.

    backend: runs the model.
    tokenizer: of transformers.
    eos: token ids that end a text.
    chunk: largest number of a prompt's tokens in one step.
    """

    def __init__(self, backend: Backend, tokenizer: Any, eos: frozenset[int], chunk: int = CHUNK) -> None:
        self._backend, self._tokenizer, self._eos, self._chunk = backend, tokenizer, eos, chunk
        self._running: dict[int, _Sequence] = {}
        self._next = 0

    def add(self, request: Request, context: Context | None = None) -> int:
        """Add a sequence to those that `step` runs; returns its number.

        context: a sequence whose common beginning with the prompt need not run again. It holds prompt and new tokens
            afterwards (all but the last token), and the caller closes it. None: a slot of its own.
        """
        own = Context(self._backend) if context is None else context
        cached = own.rewind(request.ids)
        number, self._next = self._next, self._next + 1
        self._running[number] = _Sequence(
            request, own, context is None, cached, list(request.ids[cached:]), Sampler(request.sampling),
            Detokenizer(self._tokenizer), StopText(request.stop),
        )  # fmt: skip
        return number

    @property
    def is_idle(self) -> bool:
        """Whether no sequence is left."""
        return not self._running

    def step(self) -> list[Piece]:
        """Run one call of the backend; returns a piece of each sequence, in the order in which they were added.

        After an error the sequences can only be cancelled.
        """
        running = list(self._running.items())
        parts = [sequence.pending[: self._chunk] for _, sequence in running]
        try:
            logits = self._backend.forward([sequence.context.slot for _, sequence in running], parts)
        except BaseException:
            # The call may have ended between two layers, for example by Ctrl-C.
            for _, sequence in running:
                sequence.context.forget()
            raise
        pieces = []
        for (number, sequence), part, row in zip(running, parts, logits, strict=True):
            sequence.context.ids += part
            sequence.pending = sequence.pending[len(part) :]
            if sequence.pending:
                pieces.append(Piece(number, ""))
                continue
            text, reason = sequence.advance(row, self._eos)
            pieces.append(Piece(number, text, None if reason is None else self._end(number, reason)))
        return pieces

    def run(self) -> Iterator[Piece]:
        """The pieces of all steps until no sequence is left; sequences are cancelled if the caller stops early."""
        try:
            while self._running:
                yield from self.step()
        finally:
            self.close()

    def cancel(self, number: int) -> Completion:
        """End a sequence; returns what it has. Text that was held back is not part of it."""
        return self._end(number, "cancelled")

    def close(self) -> None:
        """End all sequences."""
        for number in list(self._running):
            self.cancel(number)

    def _end(self, number: int, reason: str) -> Completion:
        sequence = self._running.pop(number)
        if sequence.owns_context:
            sequence.context.close()
        return sequence.completion(reason)
