"""A conversation whose keys and values stay in a slot, so that each answer runs only the tokens that are new."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from subnibble.arguments import as_path
from subnibble.calibrate.tokens import text_ids
from subnibble.errors import OutputError
from subnibble.generate.context import Context
from subnibble.generate.detokenize import decode
from subnibble.generate.generator import Generator
from subnibble.generate.loop import Completion
from subnibble.generate.prompt import check_ids, conversation_text, token_ids
from subnibble.generate.settings import Settings
from subnibble.resume.durable import write_file


def _never() -> bool:
    return False


class Chat:
    """A conversation with a model; `BadRecipe` for a model without a chat template.

    generator: the model.
    system: text of the system turn, None for none.
    """

    def __init__(self, generator: Generator, system: str | None = None) -> None:
        # Fails at once without a template.
        conversation_text(generator.tokenizer, [{"role": "user", "content": "Hello"}], None)
        self._generator, self._context = generator, Context(generator.backend)
        self._history: list[dict[str, str]] = []
        self.system = system
        self.last: Completion | None = None
        # What the last answer continued, as text and tokens, and the answer itself.
        self._before: tuple[str, list[int]] = ("", [])

    @property
    def turns(self) -> list[dict[str, str]]:
        """All turns so far, {"role": ..., "content": ...} each."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *self._history]

    def answer(self, message: str, is_stopped: Callable[[], bool] = _never, **settings: Any) -> Iterator[str]:
        """Let the model answer a message; yields pieces of text.

        What was said up to then stays in the conversation if the caller stops early.

        message: the user's.
        is_stopped: asked after each step; True ends the answer.
        settings: fields of `Settings`.
        """
        question = {"role": "user", "content": message}
        text = conversation_text(self._generator.tokenizer, [*self.turns, question], self._generator.backend.prefix)
        ids = self._ids(text)
        request = self._generator.request(ids, Settings.from_dict(settings))
        loop = self._generator.loop()
        number = loop.add(request, self._context)
        self._history.append(question)
        self._before, self.last = (text, ids), None
        try:
            while self.last is None:
                (piece,) = loop.step()
                self.last = piece.completion
                if self.last is None and is_stopped():
                    self.last = loop.cancel(number)
                if piece.text:
                    yield piece.text
        finally:
            if self.last is None:
                self.last = loop.cancel(number)
            self._history.append({"role": "assistant", "content": self.last.text})

    def _ids(self, text: str) -> list[int]:
        """Token ids of a conversation; those of the last answer are the ones that the model chose, if they fit.

        text: the conversation in the chat template.
        """
        tokenizer, backend = self._generator.tokenizer, self._generator.backend
        before, ids = self._before
        if self.last is not None and text.startswith(before + self.last.text):
            chosen = list(self.last.ids)
            # The template writes the end of the turn itself.
            chosen = chosen[:-1] if chosen and chosen[-1] in self._generator.stop_ids else chosen
            if decode(tokenizer, chosen) == self.last.text:
                rest = text_ids(tokenizer, text[len(before) + len(self.last.text) :], "the message")
                check_ids(rest, backend)
                return [*ids, *chosen, *rest]
        return token_ids(tokenizer, text, backend)

    def reset(self) -> None:
        """Forget all turns but the system turn."""
        self._history, self.last, self._before = [], None, ("", [])

    def save(self, path: str | Path) -> None:
        """Write all turns to a JSON file, which is replaced if it exists; `OutputError` if that fails."""
        target = as_path(path, "path", "a file to write")
        try:
            write_file(target, [json.dumps(self.turns, indent=2, ensure_ascii=False).encode() + b"\n"])
        except OSError as error:
            raise OutputError(f"{target}: the chat cannot be saved ({error.strerror}); choose another file") from error

    def close(self) -> None:
        """Free the slot."""
        self._context.close()
