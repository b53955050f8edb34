"""Generate a model's continuation of a prompt."""

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
    """Format a user's message with the tokenizer's chat template, ready for the model's turn.

    prefix: the model's prompt prefix, or None. If it is a system turn, the template's default system turn is left out.
    """
    text = question(tokenizer, message)
    replaced = prefix is not None and is_system_turn(prefix, tokenizer)
    return text.removeprefix(default_turn(tokenizer) or "") if replaced else text


def speak(model: Any, tokenizer: Any, prompt: str, tokens: int, temperature: float = 0.0, seed: int = 0) -> str:
    """Return the model's continuation of a prompt.

    tokens: largest number of new tokens; fewer are generated if the model has no more positions.
    temperature: 0 takes the most likely token each time; above 0, tokens are sampled, restricted as the model's
        generation_config says.
    seed: seeds the sampling.

    Raises `BadRecipe` if the prompt is empty or alone too long.
    """
    ids = prompt_ids(tokenizer, prompt, "the prompt")
    prompt_length = len(ids)
    if prompt_length == 0:
        raise BadRecipe("the prompt is empty; give some text to continue")
    inputs = torch.tensor([ids], device=model.device)
    check_vocabulary(inputs, model.config.vocab_size, "the prompt")
    settings: dict[str, Any] = {
        "do_sample": temperature > 0,
        "max_new_tokens": _tokens_that_fit(model, prompt_length, tokens),
    }
    if temperature > 0:
        settings["temperature"] = temperature
    else:
        settings["repetition_penalty"] = 1.0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = continued(model, inputs, settings)
    return str(tokenizer.decode(output[0, prompt_length:], skip_special_tokens=True))


def _tokens_that_fit(model: Any, prompt_length: int, tokens: int) -> int:
    """Number of new tokens, at most `tokens`, that have positions after a prompt of `prompt_length` tokens."""
    positions = getattr(model.config, "max_position_embeddings", None)
    attached = attached_cache(model)
    prefix_length = 0 if attached is None or attached.prefix is None else len(attached.prefix.ids)
    if positions is None:
        return tokens
    if prefix_length + prompt_length >= positions:
        after_prefix = f" after a system prompt of {prefix_length}" if prefix_length else ""
        raise BadRecipe(
            f"the prompt has {prompt_length} tokens{after_prefix} and the model {positions} positions; "
            "give a shorter one"
        )
    return min(tokens, int(positions) - prefix_length - prompt_length)
