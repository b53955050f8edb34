"""`subnibble evaluate` and `subnibble generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from subnibble.cli import options as o
from subnibble.cli.console import duration, megabytes, print_json, progress, table
from subnibble.cli.streams import say

Reference = Annotated[str | None, typer.Option(help="The original, to compare with.", metavar="MODEL")]


def evaluate(
    model: o.Model,
    text: o.Text,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    max_windows: o.MaxWindows = None,
    reference: Reference = None,
    kv_bits: o.KvBits = None,
    kv_option: o.KvOptions = None,
    system_prompt: o.SystemPrompt = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Add each linear's output error; needs --reference.")
    ] = False,
    json: o.Json = False,
    device: o.Device = None,
    dtype: o.Dtype = None,
) -> None:
    """Measure the perplexity of MODEL on a text, and how far it is from a reference."""
    from subnibble.evaluation.evaluate import Evaluation
    from subnibble.evaluation.evaluate import evaluate as run

    settings = o.kv_settings(kv_option)
    evaluation = Evaluation(
        text, window, max_windows, device or "auto", dtype or "auto", kv_bits, settings, system_prompt
    )
    with progress("evaluate") as told:
        found = run(model, evaluation, reference, layers=layers, progress=told)
    if json:
        print_json(found)
        return
    rows = [
        ("perplexity", f"{found['perplexity']:.4f}"),
        ("windows", f"{found['windows']} of {window} tokens{' after BOS' if found['bos'] else ''}"),
        ("effective bits", f"{found['effective_bits']:.3f}"),
        ("model bits", f"{found['model_bits']:.3f}"),
        ("KV cache", f"{found['cache_bytes']:.0f} bytes a token"),
        *([("system prompt", f"{found['prefix_tokens']} tokens at 16 bits")] if found["prefix_tokens"] else []),
        ("on disk", megabytes(found["file_bytes"])),
        ("in memory", megabytes(found["memory_bytes"])),
        ("peak memory of this run", megabytes(found["peak_memory"])),
        ("time", duration(found["seconds"])),
    ]
    if reference is not None:
        rows.append(("KL divergence", f"{found['kl_divergence']:.5f} nats a token"))
        rows.append(("top-1 agreement", f"{100 * found['top1_agreement']:.2f} %"))
    rows += [(f"output error {path}", f"{error:.5f}") for path, error in found.get("output_errors", {}).items()]
    table(("what", "value"), rows)


def generate(
    model: o.Model,
    prompt: Annotated[str, typer.Option(help="What to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate, as far as positions reach.", min=1)] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the chat template.")] = False,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.", min=0, max=2**63 - 1)] = 0,
    kv_bits: o.KvBits = None,
    kv_option: o.KvOptions = None,
    system_prompt: o.SystemPrompt = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
) -> None:
    """Let MODEL continue a prompt."""
    from subnibble.calibrate.prompt import prefix_ids
    from subnibble.checkpoint.opening import open_source
    from subnibble.evaluation.evaluate import prepare_
    from subnibble.generate.speak import chat_prompt, speak
    from subnibble.hf import load_model
    from subnibble.hf.attention import attached_cache

    source = open_source(model)
    tokenizer = source.load_tokenizer()
    loaded = load_model(source, dtype or "auto", device or "auto")
    prefix = None if system_prompt is None else prefix_ids(system_prompt, tokenizer)
    prepare_(loaded, kv_bits, o.kv_settings(kv_option), prefix)
    text = prompt
    if chat:
        attached = attached_cache(loaded)
        text = chat_prompt(tokenizer, prompt, None if attached is None else attached.prefix)
    say(speak(loaded, tokenizer, text, max_new_tokens, temperature, seed))
