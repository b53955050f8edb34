"""`subnibble evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from subnibble.cli import options as o
from subnibble.cli.console import duration, megabytes, print_json, progress, table

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
