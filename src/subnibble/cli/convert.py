"""`subnibble convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from subnibble.cli import options as o
from subnibble.cli.console import duration, megabytes, shown_progress
from subnibble.cli.streams import say


def convert(
    model: o.Model,
    out: Annotated[Path, typer.Argument(help="Folder to write; it appears only when it is complete.", metavar="OUT")],
    dense: Annotated[
        bool, typer.Option("--dense", help="Store matrices of a GGUF file unquantized if they cannot be packed.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in OUT.")] = False,
) -> None:
    """Pack a MODEL that another tool quantized (GPTQ, compressed-tensors, GGUF) into the folder OUT.

    Nothing is quantized again: codes, scales and zero-points are kept.
    """
    from subnibble.conversion.convert import DIFFERENCE
    from subnibble.conversion.convert import convert as run

    with shown_progress("convert") as on_progress:
        report = run(model, out, dense=dense, overwrite=overwrite, progress=on_progress)
    size = report.size
    schemes = "+".join(sorted({linear.scheme for linear in report.linears}))
    say(
        f"{out}: {report.method}, {schemes}, {size['effective_bits']:.3f} effective bits, "
        f"{size['model_bits']:.3f} bits per parameter, {megabytes(size['file_bytes'])}, "
        f"{duration(report.seconds['total'])}, peak memory {megabytes(report.peak_memory)}"
    )
    differences = [linear.notes[DIFFERENCE] for linear in report.linears]
    exact = differences.count(0.0)
    say(
        f"{exact} of {len(differences)} matrices equal the original's bit for bit"
        + (f"; weights of the others differ by at most {max(differences):.1e}" if exact < len(differences) else "")
    )
