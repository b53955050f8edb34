"""Shared parts of the benches: measure one quantization in its own process, collect rows, print tables."""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rows import Rows

if TYPE_CHECKING:
    from subnibble.recipe import Recipe

T = TypeVar("T")
WINDOW = 2048
HERE = Path(__file__).parent


def parts_of(text: str, form: str, numbers: int) -> tuple[list[str], list[int]]:
    """Split the name of a row, as given on the command line, into words and whole numbers.

    text: parts separated by colons, the numbers last.
    form: the form that `text` must have, shown in the error. A last part in brackets is optional; without it, the
        number before it is repeated.
    numbers: how many numbers there are. The last one, a number of windows, must be above 0.

    Raises `ArgumentTypeError` if `text` does not have this form.
    """
    parts, count = text.split(":"), form.count(":") + 1
    if "[" in form and len(parts) == count - 1:
        parts.append(parts[-1])
    words, counts = parts[:-numbers], parts[-numbers:]
    if len(parts) != count or not all(number.isdecimal() for number in counts) or int(counts[-1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: give {form}; it ends with whole numbers, the last of them above 0")
    return words, [int(number) for number in counts]


def texts(wikitext: Path) -> dict[str, str]:
    """Return the test texts: name -> argument of `read_text`.

    wikitext: folder with test.raw.txt. If the file is missing, a message says so and WikiText-2 is left out.
    """
    file = wikitext / "test.raw.txt"
    if not file.is_file():
        print(f"{file} does not exist: no rows on WikiText-2; name its folder with --wikitext DIR", file=sys.stderr)
        return {"news": "news"}
    return {"news": "news", "wikitext2": str(file)}


def with_data(recipe: Recipe, windows: int) -> Recipe:
    """Return the recipe with the calibration of all rows: news, in bfloat16, if it needs data.

    windows: number of windows of 2048 tokens. A recipe with shorter windows gets more of them, of the same text in all.
    """
    from subnibble.methods import find_method
    from subnibble.pipeline.plan import needs_data

    needs = needs_data(recipe, find_method(recipe.method).steps(recipe.options))
    window = min(recipe.window, WINDOW)
    windows = windows * WINDOW // window
    return replace(recipe, num_windows=windows, window=window, dtype="bfloat16", calibration="news" if needs else None)


def measure_row(
    recipe: Recipe | None,
    windows: int,
    names: dict[str, str],
    exact_inputs: bool = False,
    change: Callable[[Any, Any], None] | None = None,
) -> list[Any]:
    """Quantize the demo's model and score it; return one row per text. A row that was killed goes on where it was.

    recipe: how to quantize; None scores the original.
    windows: number of windows of 2048 tokens to score.
    names: the texts to score, as `texts` returns them.
    exact_inputs: also score the same codes with inputs that are not quantized.
    change: called with the loaded model and its tokenizer before scoring, to edit the model.
    """
    from subnibble.calibrate.tokens import bos_token
    from subnibble.calibrate.windows import evaluation_windows
    from subnibble.checkpoint.opening import open_source
    from subnibble.checkpoint.size import measure
    from subnibble.evaluation.perplexity import score
    from subnibble.hf import load_model, packed_modules
    from subnibble.packaged.model import find_model
    from subnibble.resume import fingerprint
    from subnibble.resume.keeper import Keeper
    from subnibble.resume.run import printing_run
    from subnibble.version import __version__

    model = find_model()
    facts: dict[str, Any] = {"version": __version__, "window": WINDOW, "scored_in": "float32", **environment()}
    target = {
        "recipe": None if recipe is None else recipe.to_dict(), "windows": windows, "texts": names,
        "exact inputs": exact_inputs, "change": None if change is None else change.__qualname__, **environment(),
        "versions": fingerprint.versions(),
    }  # fmt: skip
    with ExitStack() as stack:
        run = stack.enter_context(printing_run("row", target))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if run is None else run.folder
        if run is not None and not run.is_resumed:
            # A run without a step leaves nothing, and the unfinished quantization lies in its folder.
            run.journal.record({"begun": None})
        path = model
        if recipe is not None:
            path = folder / "model"
            report = _quantized(model, path, recipe)
            facts |= {
                "calibration": recipe.calibration,
                "calibrated_in": recipe.dtype,
                "seconds": report.seconds["total"],
                "peak_memory": report.peak_memory,
                "weights_sha256": report.weights_sha256,
            }
        source = open_source(path)
        facts |= measure(source).to_dict()
        tokenizer = source.load_tokenizer()
        loaded = load_model(path, "float32")
        if change is not None:
            change(loaded, tokenizer)
        cuts = {name: evaluation_windows(where, tokenizer, WINDOW, windows) for name, where in names.items()}

        def perplexities(inputs: str) -> list[float]:
            bos, journal = bos_token(tokenizer), None if run is None else run.journal
            return [
                score({"m": loaded}, cut, bos, keeper=Keeper(journal, f"{name}, {inputs} inputs"))["m"].perplexity
                for name, cut in cuts.items()
            ]

        rows = [
            {"text": name, "perplexity": value} for name, value in zip(cuts, perplexities("quantized"), strict=True)
        ]
        if exact_inputs:
            for module in packed_modules(loaded).values():
                module.activation = None
            for row, value in zip(rows, perplexities("exact"), strict=True):
                row["perplexity_exact_inputs"] = value
        return [row | facts for row in rows]


def _quantized(model: Any, path: Path, recipe: Recipe) -> Any:
    """Quantize the model into `path`, unless an earlier run of this row did it, and return the report."""
    from subnibble import quantize
    from subnibble.checkpoint.edit import read_report
    from subnibble.report import Report

    return Report.from_dict(read_report(path)) if path.is_dir() else quantize(model, path, recipe)


def environment() -> dict[str, Any]:
    """Return what a row depends on: commit of this tree, releases, instruction set of the processor, threads."""
    import torch
    import transformers

    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    described = subprocess.run(command, check=False, capture_output=True, text=True)
    return {
        "commit": described.stdout.strip(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }


def by_spec(rows: list[dict[str, Any]], spec: type[T]) -> dict[T, dict[str, dict[str, Any]]]:
    """Return the rows as spec -> text -> row. spec: a dataclass whose fields are also fields of the rows."""
    by_text: dict[T, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_text.setdefault(spec(**{item.name: row[item.name] for item in fields(spec)}), {})[row["text"]] = row
    return by_text


def score_cells(of_spec: dict[str, dict[str, Any]]) -> list[str]:
    """Cells of perplexity on news and WikiText-2; empty if not measured. of_spec: text -> row."""
    return [f"{of_spec[text]['perplexity']:.2f}" if text in of_spec else "" for text in ("news", "wikitext2")]


def share_cell(of_spec: dict[str, dict[str, Any]], share: Callable[[str], float | None], style: str) -> str:
    """Cell with a share for each text, in percent.

    of_spec: text -> row.
    share: the share on a text, or None to leave it out.
    style: format specification of the percentage.
    """
    values = (share(text) for text in of_spec)
    return " / ".join(f"{100 * value:{style}} %" for value in values if value is not None)


def cost_cells(row: dict[str, Any]) -> list[str]:
    """Cells of seconds and peak memory of quantizing (empty for the original), and of the row's commit, if known."""
    cost = [f"{row['seconds']:.0f}", f"{row['peak_memory'] / 1e9:.1f}"] if "seconds" in row else ["", ""]
    return [*cost, row.get("commit", "")]


def print_table(columns: tuple[str, ...], rows: Iterable[list[str]]) -> None:
    """Print a table as Markdown. rows: cells of each row, one per column."""
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for cells in rows:
        print("| " + " | ".join(cells) + " |")


def gap_left(row: dict[str, Any] | None, base: dict[str, Any] | None, original: dict[str, Any] | None) -> float | None:
    """Return the share of the log-perplexity gap between `base` and `original` that `row` leaves.

    log(p_row / p_original) / log(p_base / p_original), with p the perplexity; None if a row is missing.
    """
    if row is None or base is None or original is None:
        return None
    logs = [math.log(one["perplexity"] / original["perplexity"]) for one in (row, base)]
    return logs[0] / logs[1]


def run(
    parser: argparse.ArgumentParser,
    results: Path,
    key: tuple[str, ...],
    spec: Callable[..., Any],
    measured: Callable[[Any, dict[str, str]], list[dict[str, Any]]],
    target: Callable[[argparse.Namespace], Iterable[Any]],
    show: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Run a bench's command line: measure the rows that are missing, each in its own process, and print the table.

    parser: has the bench's own options; the shared ones are added here.
    results: the default results file.
    key: fields that identify a row.
    spec: a dataclass that describes one quantization.
    measured: rows of one spec on the given texts.
    target: specs to measure, from the parsed arguments.
    show: prints the table of all rows.
    """
    parser.add_argument(
        "--wikitext",
        type=Path,
        default=HERE.parent.parent / "shared" / "data" / "wikitext-2",
        metavar="DIR",
        help="folder with WikiText-2 raw test as test.raw.txt",
    )
    parser.add_argument("--results", type=Path, default=results, help="results file")
    parser.add_argument("--print", action="store_true", help="print finished rows, measure none")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        values, names = json.loads(arguments.child)
        print("ROWS " + json.dumps([{**values, **row} for row in _measured_rows(measured, spec(**values), names)]))
        return
    table = Rows(arguments.results, key)
    if not arguments.print:
        available = texts(arguments.wikitext)
        for one in target(arguments):
            missing = {n: w for n, w in available.items() if not table.has({**asdict(one), "text": n})}
            if not missing:
                continue
            print(f"{one} on {', '.join(missing)}", file=sys.stderr, flush=True)
            command = [sys.executable, sys.argv[0], "--child", json.dumps([asdict(one), missing])]
            child = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
            if child.returncode:
                sys.exit(f"{one} failed with exit code {child.returncode}; the rows before it are kept")
            line = next(line for line in child.stdout.splitlines() if line.startswith("ROWS "))
            for row in json.loads(line.removeprefix("ROWS ")):
                table.append(row)
    show(table.rows)


def _measured_rows(
    measured: Callable[..., list[dict[str, Any]]], spec: Any, names: dict[str, str]
) -> list[dict[str, Any]]:
    """Return the rows of `spec`; an error of ours ends the process with its message, without a traceback."""
    from subnibble.errors import SubnibbleError

    try:
        return measured(spec, names)
    except SubnibbleError as error:
        sys.exit(f"error: {error}")
