"""`subnibble compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subnibble.cli import options as o
from subnibble.cli.console import duration, megabytes, print_json, progress, table
from subnibble.cli.recipe_options import takes_recipe_options
from subnibble.errors import BadRecipe

if TYPE_CHECKING:
    from subnibble.evaluation.compare import Row


@takes_recipe_options(method=None, bits=None, recipe=None, preset=None)
def compare(
    model: o.Model,
    text: o.Text,
    settings: dict[str, Any],
    methods: Annotated[str, typer.Option(help="Methods to compare, separated by commas.")] = "rtn,gptq",
    bits: Annotated[str, typer.Option(help="Bits of a weight, several separated by commas.")] = "3",
    max_windows: o.MaxWindows = None,
    out: Annotated[Path | None, typer.Option(help="Keep the checkpoints in this folder. Default: delete them.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace checkpoints in --out.")] = False,
    backend: o.Backend = "auto",
    resume: o.Resume = "auto",
    json: o.Json = False,
) -> None:
    """Quantize MODEL by several methods at several bit widths, and compare them in one table.

    Each --option applies to the methods that have it.
    """
    values = dict(settings)
    window, device, dtype = (values[name] for name in ("window", "device", "dtype"))
    option = o.with_effort(values.pop("option"), values.pop("effort"))
    o.check_options(_words(methods), option)
    recipes = [
        o.build_recipe(None, o.options_of(method, option), method=method, bits=width, **values)
        for width, method in _arms(_words(methods), numbers(bits))
    ]
    from subnibble.evaluation.compare import compare as run
    from subnibble.evaluation.evaluate import Evaluation

    window = 2048 if window is None else window
    evaluation = Evaluation(text, window, max_windows, device or "auto", dtype or "auto", backend=backend)
    with progress("compare") as on_progress:
        rows = run(model, recipes, evaluation, out, overwrite=overwrite, resume=resume, progress=on_progress)
    if json:
        print_json([row.to_dict() for row in rows])
    else:
        show(rows)


def show(rows: Sequence[Row]) -> None:
    """Print a comparison as a table, without columns whose values are the same in all rows."""
    columns = (
        "model", "perplexity", "KL", "top-1", "effective bits", "activation bits", "KV bytes per token", "model bits",
        "on disk", "in memory", "time",
    )  # fmt: skip
    cells = [
        (
            row.name,
            f"{row.scores.perplexity:.2f}",
            f"{row.scores.kl_divergence or 0:.3f}",
            f"{100 * (row.scores.top1_agreement or 0):.1f} %",
            f"{row.effective_bits:.3f}",
            f"{row.activation_bits:.3f}",
            f"{row.cache_bytes:.0f}",
            f"{row.model_bits:.2f}",
            megabytes(row.file_bytes),
            megabytes(row.memory_bytes),
            "-" if row.seconds is None else duration(row.seconds),
        )
        for row in rows
    ]
    shown = [index for index, column in enumerate(zip(*cells, strict=True)) if index == 0 or len(set(column)) > 1]
    table([columns[index] for index in shown], [[row[index] for index in shown] for row in cells])


def _arms(methods: list[str], widths: list[int]) -> list[tuple[int, str]]:
    """(bits, method) of each quantization; a method that leaves weights unquantized runs once, at the first width."""
    from subnibble.methods import find_method

    unquantized = {name for name in methods if find_method(name).steps({}).rounds_no_weights}
    return [(width, name) for width in widths for name in methods if width == widths[0] or name not in unquantized]


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise BadRecipe("--methods is empty; give names separated by commas, for example rtn,gptq")
    return words


def numbers(text: str) -> list[int]:
    """Parse bit widths separated by commas; `BadRecipe` for anything but whole numbers."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise BadRecipe(f"--bits {text!r}: give whole numbers separated by commas, for example 2,3,4") from error
