"""Let a model continue a prompt."""

from __future__ import annotations

from typing import Any

import torch

from subnibble.calibrate.chat_template import question
from subnibble.calibrate.prompt import default_turn, is_system_turn
from subnibble.calibrate.tokens import check_vocabulary, prompt_ids
from subnibble.errors import BadRecipe
from subnibble.hf.attention import attached_cache
from subnibble.model.transformers_api.generation import continued
from subnibble.tensor.cache_scheme import PrefixIds


def chat_prompt(tokenizer: Any, message: str, prefix: PrefixIds | None = None) -> str:
    """The message of a user in the tokenizer's chat template, ready for the model's turn.

    prefix: what the model stands behind; where that is a system turn, the one that the template writes by itself is
    left out.
    """
    text = question(tokenizer, message)
    replaced = prefix is not None and is_system_turn(prefix, tokenizer)
    return text.removeprefix(default_turn(tokenizer) or "") if replaced else text


def speak(model: Any, tokenizer: Any, prompt: str, tokens: int, temperature: float = 0.0, seed: int = 0) -> str:
    """The model's continuation of `prompt` by at most `tokens` tokens, fewer where its positions end before.

    temperature 0 takes the likeliest each time; above, seed draws, as the model's generation_config narrows it.
    `BadRecipe` if the prompt alone is too long.
    """
    ids = prompt_ids(tokenizer, prompt, "the prompt")
    given = len(ids)
    if given == 0:
        raise BadRecipe("the prompt is empty; give some text to continue")
    inputs = torch.tensor([ids], device=model.device)
    check_vocabulary(inputs, model.config.vocab_size, "the prompt")
    settings: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": _that_fit(model, given, tokens)}
    if temperature > 0:
        settings["temperature"] = temperature
    else:
        settings["repetition_penalty"] = 1.0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = continued(model, inputs, settings)
    return str(tokenizer.decode(output[0, given:], skip_special_tokens=True))


def _that_fit(model: Any, given: int, tokens: int) -> int:
    """How many of `tokens` have positions behind a prompt of `given`."""
    most = getattr(model.config, "max_position_embeddings", None)
    attached = attached_cache(model)
    before = 0 if attached is None or attached.prefix is None else len(attached.prefix.ids)
    if most is None:
        return tokens
    if before + given >= most:
        behind = f" behind a system prompt of {before}" if before else ""
        raise BadRecipe(f"the prompt has {given} tokens{behind} and the model {most} positions; give a shorter one")
    return min(tokens, int(most) - before - given)
