"""`subnibble quantize` and `subnibble estimate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from subnibble.cli import options as o
from subnibble.cli.console import distilled, duration, megabytes, print_json, progress, table, unstable
from subnibble.cli.recipe_options import takes_recipe_options
from subnibble.cli.streams import say, tell


@takes_recipe_options(system_prompt=o.PromptOrAuto)
def quantize(
    model: o.Model,
    out: Annotated[Path, typer.Argument(help="Folder to write; it appears only when it is complete.", metavar="OUT")],
    settings: dict[str, Any],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in OUT.")] = False,
    resume: o.Resume = "auto",
) -> None:
    """Quantize MODEL into the folder OUT.

    Options change single settings of --recipe, --preset or --method.
    Without these three, the given bits choose a preset.
    The defaults below are those of --method; a recipe or preset has its own.
    """
    target = o.recipe_of(settings)
    from subnibble.evaluation.compare import recipe_name
    from subnibble.pipeline.driver import quantize as run

    with progress(recipe_name(replace(target, options={}))) as on_progress:
        report = run(model, out, target, overwrite=overwrite, resume=resume, progress=on_progress)
    size = report.size
    schemes = "+".join(sorted({linear.scheme for linear in report.linears}))
    inputs = f"{size['activation_bits']:.3f} activation bits, " if target.activation_bits < 16 else ""
    inputs += f"{size['cache_bytes']:.0f} KV-cache bytes per token, " if target.kv_bits < 16 else ""
    say(
        f"{out}: {report.method}{schemes and ' '}{schemes}, {size['effective_bits']:.3f} effective bits, {inputs}"
        f"{size['model_bits']:.3f} bits per parameter, {megabytes(size['file_bytes'])}, "
        f"{duration(report.seconds['total'])}, peak memory {megabytes(report.peak_memory)}"
    )
    if report.sampled is not None:
        sampled = report.sampled
        say(
            f"calibration: {sampled.windows} windows of {sampled.length} tokens that the model wrote, "
            f"{sampled.backend} ({sampled.reason}), {duration(report.seconds['sample windows'])}"
        )
    if target.system_prompt is not None:
        say(f"system prompt of {report.prefix_tokens} tokens at 16 bits")
    warning = unstable(report.blocks)
    if warning is not None:
        tell(warning)
    if report.distilled is not None:
        say(distilled(report.distilled))
    if not report.linears:
        return
    worst = sorted(report.linears, key=lambda linear: -(linear.output_error or linear.weight_error))[:3]
    kind = "output" if worst[0].output_error is not None else "weight"
    names = ", ".join(f"{linear.path} {linear.output_error or linear.weight_error:.3f}" for linear in worst)
    say(f"largest relative {kind} errors: {names}; {out / 'report.json'} has all")


@takes_recipe_options()
def estimate(model: o.Model, settings: dict[str, Any], json: o.Json = False) -> None:
    """Estimate size, memory and time of a quantization, without reading any weight.

    Options change single settings of --recipe, --preset or --method.
    Without these three, the given bits choose a preset.
    The defaults below are those of --method; a recipe or preset has its own.
    """
    target = o.recipe_of(settings)
    from subnibble.pipeline.estimate import estimate as run

    estimated = run(model, target)
    if json:
        print_json(estimated.to_dict())
        return
    rows = [
        ("parameters", f"{estimated.parameters / 1e6:.1f} M"),
        ("weights on disk", megabytes(estimated.file_bytes)),
        ("effective bits", f"{estimated.effective_bits:.3f}"),
        ("activation bits", f"{estimated.activation_bits:.3f}"),
        ("KV cache", f"{estimated.cache_bytes:.0f} bytes per token"),
        *[(f"memory: {name}", megabytes(count)) for name, count in estimated.memory_bytes.items()],
        *[(f"disk: {name}", megabytes(count)) for name, count in estimated.disk_bytes.items()],
        ("time, within a factor of about 2", duration(estimated.seconds)),
    ]
    table(("what", "estimate"), rows)
