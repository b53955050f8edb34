"""`Generator`: text from a packed or plain model, in Python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from subnibble.arguments import as_path, described
from subnibble.errors import BadArgument
from subnibble.generate.context import Context
from subnibble.generate.loop import CHUNK, Completion, Loop, Request
from subnibble.generate.opening import AnyModel, Loading, OpenedModel
from subnibble.generate.prompt import Prompt, Turns, is_conversation, token_ids, tokens_that_fit
from subnibble.generate.prompt_cache import SavedPrompt, load_prompt, save_prompt
from subnibble.generate.settings import Settings, generation_defaults, stop_ids


class Generator:
    """Generates text with a model.

    model: packed or plain folder, hub id, .gguf file, or a loaded transformers model, which `loading` changes in place.
    tokenizer: of transformers; a loaded model needs it, otherwise the default is the one beside the checkpoint.
    backend: what runs the model: "native" (the C++ step), "torch", or "auto": native for packed models where it can.
    loading: fields of `Loading`: dtype, device, kv_bits, kv, system_prompt, activations.
    """

    def __init__(self, model: AnyModel, tokenizer: Any = None, *, backend: str = "auto", **loading: Any) -> None:
        self._model = OpenedModel.of(model, tokenizer, backend, Loading.from_dict(loading))
        self.backend, self.tokenizer = self._model.backend, self._model.tokenizer
        self._defaults = generation_defaults(self._model.generation_config)
        self.stop_ids = stop_ids(self._model.generation_config)

    @overload
    def generate(self, prompt: str, *, prompt_cache: str | Path | None = None, **settings: Any) -> Completion: ...

    @overload
    def generate(self, prompt: Turns, *, prompt_cache: str | Path | None = None, **settings: Any) -> Completion: ...

    @overload
    def generate(
        self, prompt: Sequence[Prompt], *, prompt_cache: str | Path | None = None, **settings: Any
    ) -> list[Completion]: ...

    def generate(
        self, prompt: Any, *, prompt_cache: str | Path | None = None, **settings: Any
    ) -> Completion | list[Completion]:
        """Continue a prompt, or several at once.

        prompt: a text; the turns of a conversation, [{"role": "user", "content": ...}, ...], which the chat template
            formats; or a list of such prompts.
        prompt_cache: a file of `save_prompt`. The longest beginning that a prompt shares with it need not run.
        settings: fields of `Settings`, such as max_new_tokens, temperature, seed and stop.
        Returns a `Completion`, or a list of them for a list of prompts.
        """
        if isinstance(prompt, str) or is_conversation(prompt):
            return self._complete([prompt], prompt_cache, settings)[0]
        if not isinstance(prompt, list | tuple) or not prompt:
            raise BadArgument(f"prompt is {described(prompt)}; give a text, turns of a conversation, or a list of them")
        return self._complete(list(prompt), prompt_cache, settings)

    def stream(self, prompt: Prompt, *, prompt_cache: str | Path | None = None, **settings: Any) -> Iterator[str]:
        """Continue one prompt; yields pieces of text as soon as they are known. Arguments as in `generate`.

        A piece ends with a whole character. Text that may turn out to begin a stop string is held back.
        """
        request = self.request(self.tokens(prompt), Settings.from_dict(settings))
        return self._pieces(request, self._saved(prompt_cache))

    def save_prompt(self, path: str | Path, prompt: Prompt) -> int:
        """Run a prompt and save its keys and values, for `prompt_cache`; returns the number of tokens saved.

        The last token is not saved: whoever continues the prompt runs it for its logits.

        path: a file, which is replaced if it exists.
        prompt: a text or turns.
        """
        target = as_path(path, "path", "a file to write")
        ids = self.tokens(prompt)[:-1]
        context = Context(self.backend)
        try:
            for start in range(0, len(ids), CHUNK):
                self.backend.forward([context.slot], [ids[start : start + CHUNK]])
            save_prompt(target, SavedPrompt(tuple(ids), self.backend.save(context.slot)), self._model)
        finally:
            context.close()
        return len(ids)

    def tokens(self, prompt: Prompt) -> list[int]:
        """Token ids of a text or of turns, without those that repeat the model's prefix."""
        return token_ids(self.tokenizer, prompt, self.backend)

    def request(self, ids: Sequence[int], settings: Settings) -> Request:
        """What the loop needs to continue a prompt; `BadRecipe` if the model has no position left.

        ids: token ids of the prompt.
        """
        most = tokens_that_fit(ids, settings.most_tokens(self._defaults), self.backend)
        return Request(tuple(ids), settings.sampling(self._defaults), most, settings.stop)

    def loop(self) -> Loop:
        """An empty loop on this model, for callers that add and cancel sequences themselves."""
        return Loop(self.backend, self.tokenizer, self.stop_ids)

    def _saved(self, path: str | Path | None) -> SavedPrompt | None:
        if path is None:
            return None
        return load_prompt(as_path(path, "prompt_cache", "a file that save_prompt wrote"), self._model)

    def _complete(
        self, prompts: list[Prompt], prompt_cache: str | Path | None, settings: dict[str, Any]
    ) -> list[Completion]:
        chosen = Settings.from_dict(settings)
        requests = [self.request(self.tokens(prompt), chosen) for prompt in prompts]
        saved, loop = self._saved(prompt_cache), self.loop()
        contexts: list[Context] = []
        try:
            numbers = []
            for request in requests:
                contexts.append(self._context(saved))
                numbers.append(loop.add(request, contexts[-1]))
            results = {piece.number: piece.completion for piece in loop.run() if piece.completion is not None}
        finally:
            for context in contexts:
                context.close()
        return [results[number] for number in numbers]

    def _pieces(self, request: Request, saved: SavedPrompt | None) -> Iterator[str]:
        context, loop = self._context(saved), self.loop()
        try:
            loop.add(request, context)
            yield from (piece.text for piece in loop.run() if piece.text)
        finally:
            context.close()

    def _context(self, saved: SavedPrompt | None) -> Context:
        context = Context(self.backend)
        if saved is not None:
            context.restore(saved.state, saved.ids)
        return context
