"""Let a model continue a prompt."""

from __future__ import annotations

from typing import Any

import torch

from subnibble.errors import BadRecipe


def speak(
    model: Any, tokenizer: Any, prompt: str, tokens: int, *, chat: bool = False, temperature: float = 0.0, seed: int = 0
) -> str:
    """The model's continuation of `prompt` in text. temperature 0 takes the likeliest token each time."""
    if chat:
        if not tokenizer.chat_template:
            raise BadRecipe("this model's tokenizer has no chat template; generate without --chat")
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    if inputs["input_ids"].shape[1] == 0:
        raise BadRecipe("the prompt is empty; give some text to continue")
    settings: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": tokens}
    if temperature > 0:
        settings["temperature"] = temperature
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = model.generate(**inputs.to(model.device), **settings)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
