"""`subnibble evaluate` and `subnibble generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from subnibble.cli import options as o
from subnibble.cli.console import duration, megabytes, print_json, progress, table
from subnibble.cli.streams import say, tell

Reference = Annotated[str | None, typer.Option(help="The original model, to compare MODEL with.", metavar="MODEL")]


def evaluate(
    model: o.Model,
    text: o.Text,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    max_windows: o.MaxWindows = None,
    reference: Reference = None,
    kv_bits: o.LoadedKvBits = None,
    kv_option: o.KvOptions = None,
    system_prompt: o.SystemPrompt = None,
    activations: o.Activations = None,
    backend: o.Backend = "auto",
    layers: Annotated[
        bool, typer.Option("--layers", help="Add the output error of each linear layer; needs --reference.")
    ] = False,
    resume: o.Resume = "auto",
    json: o.Json = False,
    device: o.Device = None,
    dtype: o.Dtype = None,
) -> None:
    """Measure the perplexity of MODEL on a text, and its distance from a reference model."""
    from subnibble.evaluation.evaluate import Evaluation
    from subnibble.evaluation.evaluate import evaluate as run

    settings = o.kv_settings(kv_option)
    evaluation = Evaluation(
        text, window, max_windows, device or "auto", dtype or "auto", kv_bits, settings, system_prompt, activations,
        backend,
    )  # fmt: skip
    with progress("evaluate") as on_progress:
        result = run(model, evaluation, reference, layers=layers, resume=resume, progress=on_progress)
    if json:
        print_json(result)
        return
    rows = [
        ("perplexity", f"{result['perplexity']:.4f}"),
        ("windows", f"{result['windows']} of {window} tokens{' after BOS' if result['bos'] else ''}"),
        ("effective bits", f"{result['effective_bits']:.3f}"),
        ("model bits", f"{result['model_bits']:.3f}"),
        ("inputs of linears", result["activations"]),
        ("kernels", f"{result['kernels']}, {result['backend']} step"),
        ("KV cache", f"{result['cache_bytes']:.0f} bytes per token"),
        *([("system prompt", f"{result['prefix_tokens']} tokens at 16 bits")] if result["prefix_tokens"] else []),
        ("on disk", megabytes(result["file_bytes"])),
        ("in memory", megabytes(result["memory_bytes"])),
        ("peak memory of this run", megabytes(result["peak_memory"])),
        ("time", duration(result["seconds"])),
    ]
    if reference is not None:
        rows.append(("KL divergence", f"{result['kl_divergence']:.5f} nats per token"))
        rows.append(("top-1 agreement", f"{100 * result['top1_agreement']:.2f} %"))
    rows += [(f"output error {path}", f"{error:.5f}") for path, error in result.get("output_errors", {}).items()]
    table(("what", "value"), rows)


def generate(
    model: o.Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[
        int, typer.Option(help="Number of tokens to generate, limited by the model's positions.", min=1)
    ] = 64,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the chat template, as a user's message.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 takes the most likely token.", min=0.0)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed for sampling.", min=0, max=2**63 - 1)] = 0,
    kv_bits: o.LoadedKvBits = None,
    kv_option: o.KvOptions = None,
    system_prompt: o.SystemPrompt = None,
    activations: o.Activations = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
) -> None:
    """Generate text: let MODEL continue a prompt."""
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
    prepare_(loaded, kv_bits, o.kv_settings(kv_option), prefix, activations)
    text = prompt
    if chat:
        attached = attached_cache(loaded)
        text = chat_prompt(tokenizer, prompt, None if attached is None else attached.prefix)
    if activations is not None:
        tell(f"inputs of linears: {activations}")
    say(speak(loaded, tokenizer, text, max_new_tokens, temperature, seed))
